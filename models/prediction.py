"""What a run will take, from headers alone: graphs are built around stand-ins for weights and measured, not computed.

`predict` plays through what models.residency would do, with the same arithmetic.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loader.checkpoint import Checkpoint
from loader.merge import Changes, Merged
from loader.options import LoadOptions
from loader.params import LoadReport, Param, Weights
from loader.placement import Plan, device_of, plan_params
from pyggml import Backend, Buffer, BufferType, Context, Graph, Tensor
from pyggml.lib import ffi

from .residency import Policy, Range, Span, Use, margin, spans_of, uses_of
from .room import Room

_FIRST_BASE = 1 << 44  # where stand-ins say that the first file is mapped; the next one is as far behind it
_OWNED = 1 << 43  # and where copies say that they are
_ROW = 64 << 10  # what the system maps around a row of a table that is read


class StandIn(Weights):
    """What load_params would return, without data: graphs can be built with it, and are refused when computed."""

    _n_files = 0

    def __init__(
        self, plan: Plan, params: Mapping[str, Param], where: str, *, locked: bool = False, reclaim: bool = True
    ) -> None:
        context = Context(len(plan.placements))
        spans: dict[int, Span] = {}
        for p in plan.placements:
            tensor = context.new_tensor(p.ne or (1,), p.type, p.name)
            address = _OWNED
            if p.action == "map":
                if id(p.info.file) not in spans:
                    StandIn._n_files += 1
                    base = _FIRST_BASE * (1 + StandIn._n_files % 4096)
                    spans[id(p.info.file)] = Span(base, p.info.file.n_bytes, plan.component, -1)
                address = spans[id(p.info.file)].start + p.info.offset
            tensor.ptr.data = ffi.cast("void *", address)
            params[p.name].tensor = tensor
        context.buffers.append(Buffer.__new__(Buffer))  # a closed one: whoever would compute is told so
        self.plan, self.where = plan, where
        self.spans = [] if locked else list(spans.values())
        # Pages of mappings that are copied from and not given back: until the load is over, or as long as the mapping.
        self.source_bytes = self.source_kept = 0
        for p in plan.placements if locked or not reclaim else ():
            if p.reading == "io" or (p.action == "repack" and p.reading == "map"):
                self.source_bytes += p.info.n_bytes
                self.source_kept += p.info.n_bytes if id(p.info.file) in spans else 0
        copied = plan.n_bytes() - plan.n_bytes("map")
        super().__init__(context, (), params, LoadReport(
            component=plan.component, n_tensors=plan.n_tensors(), n_mapped=plan.n_tensors("map"),
            mapped_bytes=plan.n_bytes("map"), n_mapped_files=len(spans),
            n_copied=plan.n_tensors() - plan.n_tensors("map"), n_converted=plan.n_tensors("convert"),
            allocated_bytes=copied, read_bytes=0, seconds=0.0, not_mapped=plan.reasons(),
            locked_bytes=plan.n_bytes() if locked else 0,
        ))  # fmt: skip


def stand_in(
    params: Mapping[str, Param], checkpoint: Checkpoint, *, backend: Backend, component: str,
    options: LoadOptions | None = None, buffer_type: BufferType | None = None,
) -> Weights:  # fmt: skip
    """As loader.load_params, which it stands in for: the same plan and the same errors, nothing read or allocated."""
    buffer_type = buffer_type or backend.buffer_type
    device = device_of(buffer_type) or backend.device
    wanted = {name: (param.ne, param.type, param.optional) for name, param in params.items()}
    options = LoadOptions.from_environment() if options is None else options
    plan = plan_params(
        wanted, checkpoint, device=device, buffer_type=buffer_type, component=component, options=options,
        products={name for name, param in params.items() if param.product},
    )  # fmt: skip
    return StandIn(plan, params, device.name, locked=options.mlock, reclaim=options.reclaim)


class MergedStandIn(Merged):
    """Merged over stand-ins: the same copies, without memory or values."""

    def write(self, changes: Changes, check: Callable[[int, int], None] = lambda done, total: None) -> None:
        for name, param in self.params.items():
            param.tensor = self._tensors[name]

    def restore(self) -> None:
        return

    def _is_read_only(self, tensor: Tensor) -> bool:
        return int(ffi.cast("uintptr_t", tensor.ptr.data)) != _OWNED

    def _allocate(self, memory: BufferType) -> None:
        for tensor in self.context.tensors():
            tensor.ptr.data = ffi.cast("void *", _OWNED)
        self.context.buffers.append(Buffer.__new__(Buffer))


@dataclass(frozen=True)
class Phase:
    """One graph of a run. `stays`: it is kept, and its compute buffer, until the end; `n_rows`: how many different rows
    it takes of tables; `extra`: bytes of arrays beside the graph.
    """

    name: str
    uses: tuple[Use, ...]
    buffer: int
    work: int
    stays: bool = False
    n_rows: int = 0
    extra: int = 0

    @classmethod
    def of(cls, name: str, graph: Graph, spans: Sequence[Span], **more: Any) -> Phase:
        """Measure a graph, and close it."""
        with graph:
            buffer, work = graph.measure() if graph.backend.is_cpu else (0, 0)  # else it is a device's memory
            return cls(name, tuple(uses_of(graph, spans)), buffer, work, **more)


@dataclass(frozen=True)
class PhasePrediction:
    """Bytes in memory at the end of a phase: private ones, those of files, both; and of its weights, what is read in
    each pass because it does not fit, and what of others is given back before it.
    """

    name: str
    weights: int
    private: int
    from_files: int
    rss: int
    per_pass: int
    given_back: int


@dataclass(frozen=True)
class Prediction:
    """Phases in order, the peak of the resident memory, and the room that it was compared with."""

    phases: tuple[PhasePrediction, ...]
    peak_rss: int
    private_peak: int
    room: int
    room_source: str
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def all_spans(weights: Sequence[Weights]) -> list[Span]:
    """Mapped files of components, loaded or standing in."""
    return [s for w in weights for s in (w.spans if isinstance(w, StandIn) else spans_of(w.report.component, w))]


def predict(
    phases: Sequence[Phase], *, mapped: int, copied: int, private: int, from_files: int, room: Room,
    limit: int | None = None, load_peak: int = 0,
) -> Prediction:  # fmt: skip
    """The memory of a run of these phases, as Residency would run them.

    mapped, copied: bytes of the weights that stay in their files and may be given back, and of those in memory of our
    own; private, from_files: what is resident beside them when the run begins; room: what is free before `copied` is
    there; limit: as Residency's; load_peak: resident at most until the weights are there.
    """
    free, source = room.n_bytes, room.source
    if limit is not None and limit - private < free:
        free, source = max(0, limit - private), "the limit that was set"
    policy = Policy()
    taken, work = copied, 0  # private bytes beside those of the beginning
    live: set[Range] = set()  # of graphs that stay
    touched: dict[str, int] = {}  # tables: they are not among what the policy knows
    found: list[PhasePrediction] = []
    fits = copied <= free
    for phase in phases:
        work = max(work, phase.work)
        now = taken + phase.buffer + work
        left = max(0, free - now)
        left -= margin(left)
        held = policy.n_held
        decision = policy.enter(phase.uses, left if mapped > left else sys.maxsize, live)
        stream = decision.stream
        fits = fits and now <= free and (stream is None or stream.kept + stream.window <= free - now)
        touched[phase.name] = max(touched.get(phase.name, 0), phase.n_rows * _ROW)
        files = from_files + policy.n_held + (stream.window if stream else 0) + sum(touched.values())
        found.append(PhasePrediction(
            phase.name, sum({r: r[1] for _, ranges in phase.uses for r in ranges}.values()), private + now, files,
            private + now + phase.extra + files, stream.streamed if stream else 0,
            min(held, sum(n for _, n in decision.give_back)),
        ))  # fmt: skip
        if phase.stays:
            taken += phase.buffer
            live.update(r for _, ranges in phase.uses for r in ranges)
    return Prediction(
        tuple(found), max([load_peak, *(p.rss for p in found)]), max((p.private for p in found), default=0), free,
        source, fits,
    )  # fmt: skip
