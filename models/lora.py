"""LoRAs on a running pipeline: beside the weights as the graph runs, or merged into copies of the tensors they change.

`at_runtime` leaves every matrix where it is and computes y = W x + s * up(down(x)). The factors stay in their file
where the backend maps files. s is a tensor of its own, so that another weight rebuilds nothing. A LoHa is two such
products multiplied element by element, which is one of rank r * r (each column of one times all columns of the other),
a LoKr two small products after one another: no matrix of the weight's size is made for either. Vectors (biases, norms)
are a few kilobytes and are always merged, into copies.

`immediately` writes W + weight * delta: over weights that were read into memory of ours, into copies of those that are
mapped, so that the rest stays mapped and shared. Always made from the file's values, never from merged ones: weights
may change without end and nothing adds up.

`auto` takes what needs no memory: at_runtime for quantised weights, which merging would round once more, and for mapped
ones, of which it would make private copies; immediately for others.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from loader.checkpoint import Checkpoint
from loader.dtypes import QUANTISED
from loader.errors import printable
from loader.lora import Change, Float32, LoraFile, LoraReport, Place, add_rows, open_lora, underscored
from loader.merge import Merged
from loader.options import LoadOptions
from loader.params import Param, Weights, load_params
from pyggml import Backend, Buffer, BufferType, Context, Graph, Tensor, Type, ops

from .nn import Linear, Module, find, on_cpu
from .prediction import MergedStandIn, StandIn, stand_in

log = logging.getLogger("pyggml.models")

Path: TypeAlias = str | os.PathLike[str]
ApplyMode: TypeAlias = Literal["auto", "at_runtime", "immediately"]

MAX_LORAS = 16
MAX_WEIGHT = 8.0
NODES = 24  # of a graph, at most, for one delta
_TITLES = ("modelspec.title", "ss_output_name", "general.name", "title", "name")  # of a LoRA, in its metadata


@dataclass(frozen=True)
class Naming:
    """How LoRA files name the modules of a network, besides the names that it has itself.

    aliases: (regex, replacement) from a module's own name to another one. stacked: the end of a name whose rows are
    those of several modules in a row, and their ends. unused: regex of names, with underscores, that are of parts of
    the model which are never computed.
    """

    aliases: Sequence[tuple[str, str]] = ()
    stacked: tuple[str, tuple[str, ...]] | None = None
    unused: str = r"$."

    def table(self, params: Mapping[str, Param]) -> dict[str, list[Place]]:
        """Name with underscores -> places, for the modules of `params`."""
        modules = dict.fromkeys(re.sub(r"\.(weight|bias)$", "", name) for name in params)
        table: dict[str, list[Place]] = {}

        def enter(name: str, places: list[Place]) -> None:
            for alias in (name, *self._others(name)):
                if table.setdefault(underscored(alias), places) != places:
                    raise AssertionError(f"two modules are called {alias}")

        for module in modules:
            enter(module, [Place(module)])
        if self.stacked:
            whole, parts = self.stacked
            for module in modules:
                if module.endswith(whole):  # the model has one matrix, files may have the parts
                    n = params[f"{module}.weight"].ne[1] // len(parts)
                    for i, part in enumerate(parts):
                        enter(module.removesuffix(whole) + part, [Place(module, at=i * n, n=n)])
                elif module.endswith(parts[0]):  # the model has parts, files may have the whole
                    stem = module.removesuffix(parts[0])
                    places, first = [], 0
                    for part in parts:
                        n = params[f"{stem}{part}.weight"].ne[1]
                        places.append(Place(stem + part, first=first, n=n))
                        first += n
                    enter(stem + whole, places)
        return table

    def _others(self, name: str) -> list[str]:
        return [re.sub(pattern, other, name) for pattern, other in self.aliases if re.search(pattern, name)]


# -- in a graph -------------------------------------------------------------------------------------------------------


class RuntimeDelta:
    """Adds one change to a linear layer's product. `factors`: part -> tensor; `scale`: f32, ne [1]."""

    def __init__(self, change: Change, factors: Mapping[str, Param], scale: Tensor) -> None:
        self.change = change
        self.factors = factors
        self.scale = scale

    def __call__(self, y: Tensor, x: Tensor) -> Tensor:
        """y + s * delta x. y: ne [n_out, n_tokens], x: ne [n_in, n_tokens]."""
        c = self.change
        x = x if x.is_contiguous else ops.cont(x)
        if c.delta.kind in ("lora", "loha"):
            up, h = (self._lora if c.delta.kind == "lora" else self._loha)(x)
            if c.n < up.ne[1]:
                up = ops.view(up, (up.ne[0], c.n), (up.nb[1],), c.first * up.nb[1])
            if on_cpu(x):
                return ops.add_low_rank(y, up, h, c.at)
            d = ops.mul_mat(up, h)
        else:
            d = self._lokr(x) if c.delta.kind == "lokr" else self._diff(x)  # ne [delta's n_out, n_tokens]
            if c.n < d.ne[0]:
                d = ops.view(d, (c.n, d.ne[1]), (d.nb[1],), c.first * 4)
        if c.n == y.ne[0]:
            return ops.add(y, d)
        return ops.acc(y, d, y.nb[1], y.nb[2], y.nb[3], c.at * 4, inplace=True)

    def _lora(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(up, h), whose product it is: ne [r, n_out] and [r, n_tokens]."""
        h = ops.mul_mat(self._factor("down", x), x)
        if "mid" in self.factors:
            h = ops.mul_mat(self._factor("mid", x), h)
        return self._factor("up", x), self._scaled(h)

    def _loha(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c, d = (self._factor(name, x) for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        (r1, n_out), (n_in, r2) = a.ne[:2], d.ne[:2]
        down = ops.mul(ops.repeat(ops.reshape(b, n_in, 1, r1), (n_in, r2, r1)), d)  # rows of b times rows of d
        up = ops.mul(ops.repeat(ops.reshape(a, 1, r1, n_out), (r2, r1, n_out)), ops.reshape(c, r2, 1, n_out))
        h = ops.mul_mat(ops.reshape(down, n_in, r2 * r1), x)
        return ops.reshape(up, r2 * r1, n_out), self._scaled(h)

    def _lokr(self, x: Tensor) -> Tensor:
        """kron(w1, w2) x: the columns of x, as matrices ne [i2, i1], times w2 from one side and w1 from the other."""
        n_tokens, i2 = x.ne[1], self._n_in("w2")
        h = ops.reshape(x, i2, x.ne[0] // i2, n_tokens)  # ne [i2, i1, n_tokens]
        h = ops.cont(ops.permute(self._through("w2", h), 1, 0, 2, 3))  # ne [i1, o2, n_tokens]
        h = ops.cont(ops.permute(self._through("w1", self._scaled(h)), 1, 0, 2, 3))  # ne [o2, o1, n_tokens]
        return ops.reshape(h, h.ne[0] * h.ne[1], n_tokens)

    def _diff(self, x: Tensor) -> Tensor:
        # A matrix as large as the weight: multiplied in its own type, as weights are.
        return self._scaled(ops.mul_mat(self.factors["diff"].tensor, x))

    def _through(self, w: str, x: Tensor) -> Tensor:
        for name in (w,) if w in self.factors else (f"{w}_b", f"{w}_a"):
            x = ops.mul_mat(self._factor(name, x), x)
        return x

    def _n_in(self, w: str) -> int:
        return self.factors[w if w in self.factors else f"{w}_b"].tensor.ne[0]

    def _factor(self, name: str, x: Tensor) -> Tensor:
        """A factor as f32: in f16 or bf16 the processor's kernels would round x as well, and x may be too large."""
        tensor, graph = self.factors[name].tensor, x.ctx
        assert isinstance(graph, Graph)
        own = graph.use(tensor)
        return own if tensor.type is Type.F32 else ops.cast(own, Type.F32)

    def _scaled(self, x: Tensor) -> Tensor:
        return ops.mul(x, self.scale)


# -- on components ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A component that LoRAs can change: its network, its weights, the file they came from, where it computes.

    copies: memory for copies of weights, which is where they rest. options: how the factors come to rest, which should
    be as the weights did.
    """

    module: Module
    weights: Weights
    checkpoint: Checkpoint
    backend: Backend
    naming: Naming
    copies: BufferType
    options: LoadOptions | None = None

    @property
    def is_stand_in(self) -> bool:
        """Whether this is only about what would be done: values are neither read nor made then."""
        return isinstance(self.weights, StandIn)


class _OnBackend:
    """The factors of one LoRA's matrices for one component, where that computes, and a scale for each of them."""

    def __init__(self, file: LoraFile, changes: Sequence[Change], target: Target, name: str) -> None:
        self.changes = changes
        infos = {f"{i}.{part}": info for i, c in enumerate(changes) for part, info in c.delta.parts.items()}
        self.params = {key: _param(info) for key, info in infos.items()}
        checkpoint = Checkpoint(file.path, file.checkpoint.format, infos, files=file.checkpoint.files)
        load = stand_in if target.is_stand_in else load_params
        self.weights = load(self.params, checkpoint, backend=target.backend, component=name, options=target.options)
        self.context = Context(len(changes))
        self.scales = [self.context.new_tensor((1,), Type.F32, f"scale {i}") for i in range(len(changes))]
        Buffer.allocate(self.context, target.backend.buffer_type)
        self.deltas = [
            RuntimeDelta(c, {part: self.params[f"{i}.{part}"] for part in c.delta.parts}, self.scales[i])
            for i, c in enumerate(changes)
        ]

    def set_weight(self, weight: float) -> None:
        for change, scale in zip(self.changes, self.scales, strict=True):
            scale.set([weight * change.delta.scale])

    def close(self) -> None:
        self.weights.close()
        for buffer in self.context.buffers:
            buffer.close()
        self.context.close()


def _param(info: Any) -> Param:
    ne = info.ne
    while len(ne) > 2 and ne[0] == 1:  # a 1x1 convolution: numpy's last dimensions are ggml's first
        ne = ne[1:]
    return Param(ne, Type.F16 if info.dtype in QUANTISED else None)


class Lora:
    """One LoRA file, checked against a pipeline's components."""

    def __init__(self, path: Path, targets: Mapping[str, Target]) -> None:
        self.file = open_lora(path)
        try:
            names = {role: t.naming.table(t.weights.params) for role, t in targets.items()}
            shapes = {role: {name: p.ne for name, p in t.weights.params.items()} for role, t in targets.items()}
            unused = {role: t.naming.unused for role, t in targets.items()}
            values = not any(t.is_stand_in for t in targets.values())
            self.changes, self.report = self.file.match(names, shapes, unused, values=values)
        except BaseException:
            self.file.close()
            raise
        self.on_backend: dict[str, _OnBackend] = {}
        self.lightning = lightning_steps(path, self.file.checkpoint.metadata) if "transformer" in self.changes else None
        # The content, not the name: another LoRA may be loaded under that later.
        scales = (change.delta.scale for changes in self.changes.values() for change in changes)
        self.identity = (*(file.identity for file in self.file.checkpoint.files), *scales)
        r = self.report
        n, path = r.n_applied, printable(r.path)
        log.info("(%d / %d) LoRA tensors have been applied, lora_file_path = %s", n, r.n_keys, path)
        for warning in (*r.warnings, *([r.sentence()] if r.unknown else [])):
            log.warning("%s", warning)

    def is_replaced(self) -> bool:
        """Whether the path leads to another file than the one that was opened, or to none."""
        file = self.file.checkpoint.files[0]
        try:
            now = os.stat(file.path)
        except OSError:
            return True
        return (now.st_dev, now.st_ino) != file.identity[:2] or file.changed() is not None

    def close(self) -> None:
        for part in self.on_backend.values():
            part.close()
        self.on_backend.clear()
        self.file.close()


class Held(NamedTuple):
    """What LoRAs hold in memory, or would: factors of one for a component, or copies that several are merged into."""

    role: str
    paths: tuple[str, ...]
    what: Weights | Merged
    on_host: bool
    device: str


class Loras:
    """The LoRAs of a pipeline: which are loaded, which are active and how strongly.

    `targets`: role -> component. An instance belongs to one pipeline; graphs built while other LoRAs were active must
    not be used again: `changed` is called then. `rest(role)` is before weights of a component become others: they have
    to be where they rest.
    """

    def __init__(
        self, targets: Mapping[str, Target], mode: ApplyMode, changed: Callable[[], None],
        rest: Callable[[str], None] = lambda role: None,
    ) -> None:  # fmt: skip
        if mode not in get_args(ApplyMode):
            raise ValueError(f"lora_apply_mode is one of {', '.join(get_args(ApplyMode))}, not {mode!r}")
        self.targets = targets
        self.modes = {role: _choose(mode, target) for role, target in targets.items()}
        self.loaded: dict[str, Lora] = {}
        self.active: dict[str, float] = {}
        self._changed, self._rest = changed, rest
        self._merged: dict[str, Merged] = {}

    def load(self, path: Path, name: str) -> LoraReport:
        """Open and check a LoRA; it changes nothing before `activate`. LoadError for a bad file or another model's."""
        if name not in self.loaded:
            self.loaded[name] = Lora(path, self.targets)
        return self.loaded[name].report

    def activate(self, weights: Mapping[str, float], check: Callable[[int, int], None] | None = None) -> None:
        """Make exactly these LoRAs active, in this order. Nothing happens when they are already.

        check(done, total) is called as tensors are merged, and may raise. When that or merging raises (LoadError: a
        value does not fit its type), no LoRA is active afterwards.
        """
        weights = {name: check_weight(weight) for name, weight in weights.items()}
        if len(weights) > MAX_LORAS:
            raise ValueError(f"{len(weights)} LoRAs at once; {MAX_LORAS} are the most")
        if unknown := [name for name in weights if name not in self.loaded]:
            raise ValueError(f"no LoRA {unknown[0]!r} is loaded: {', '.join(map(repr, self.loaded)) or 'none is'}")
        if list(weights.items()) == list(self.active.items()):
            return
        for name in weights:
            self._bring(name)
        rebuilt = list(weights) != list(self.active)
        try:
            if rebuilt:
                self._changed()
            self.active = {}
            for role in self.targets:
                if rebuilt:
                    self._attach(role, weights)
                self._merge(role, weights, check or (lambda done, total: None))
            for name, weight in weights.items():
                for part in self.loaded[name].on_backend.values():
                    part.set_weight(weight)
            self.active = dict(weights)
        except BaseException:
            self.clear()
            raise

    def clear(self) -> None:
        """No LoRA active: the weights as the files have them."""
        self._changed()
        self.active = {}
        for role in self.targets:
            self._attach(role, {})
            self._unmerge(role)

    def forget_replaced(self) -> None:
        """Unload LoRAs whose path leads to another file by now."""
        replaced = [name for name, lora in self.loaded.items() if lora.is_replaced()]
        if any(name in self.active for name in replaced):
            self.clear()
        for name in replaced:
            self.unload(name)

    def unload(self, name: str) -> None:
        """Forget a LoRA that is not active."""
        assert name not in self.active
        self.loaded.pop(name).close()

    def state(self, role: str) -> tuple[tuple[object, float], ...]:
        """What a component computes depends on this: the active LoRAs that change it, and their weights."""
        active = ((self.loaded[name], weight) for name, weight in self.active.items())
        return tuple((lora.identity, weight) for lora, weight in active if role in lora.changes)

    def lightning(self) -> tuple[str, int] | None:
        """File and steps of the first active LoRA that is a Lightning one."""
        active = (self.loaded[name] for name, weight in self.active.items() if weight > 0)
        return next(((lora.report.path, lora.lightning) for lora in active if lora.lightning), None)

    def report(self) -> list[dict[str, Any]]:
        """For JSON: each active LoRA, its weight, and what became of its keys."""
        result = []
        for name, weight in self.active.items():
            r = self.loaded[name].report
            result.append({
                "name": name, "path": r.path, "weight": weight, "keys": r.n_keys,
                "applied": {role: {"keys": n, "of": m, "mode": self.modes[role]} for role, (n, m) in r.applied.items()},
                "ignored": r.ignored, "unknown": len(r.unknown), "first_unknown": r.unknown[:5],
            })  # fmt: skip
        return result

    def held(self) -> list[Held]:
        """What the active LoRAs hold in memory, or would."""
        found = []
        for name in self.active:
            for role, part in self.loaded[name].on_backend.items():
                backend = self.targets[role].backend
                path = self.loaded[name].file.path
                found.append(Held(role, (path,), part.weights, backend.is_cpu, backend.device.name))
        for role, merged in self._merged.items():
            paths = tuple(self.loaded[name].file.path for name in self.active if role in self.loaded[name].changes)
            on_host = self.targets[role].copies.is_host
            device = "CPU" if on_host else self.targets[role].backend.device.name
            found.append(Held(role, paths, merged, on_host, device))
        return found

    def file_changed(self) -> str | None:
        """Which file of an active LoRA changed since it was opened, and how."""
        return next(filter(None, (self.loaded[name].file.checkpoint.changed() for name in self.active)), None)

    def close(self) -> None:
        """Let go of everything; the weights are not put in order again, as they are closed next."""
        self.active = {}
        for merged in self._merged.values():
            merged.close()
        self._merged.clear()
        for name in list(self.loaded):
            self.unload(name)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _bring(self, name: str) -> None:
        """The factors of a LoRA to where its components compute."""
        lora = self.loaded[name]
        for role, changes in lora.changes.items():
            beside = [c for c in changes if not self._is_merged(role, c)]
            for change in beside:
                if not isinstance(find(self.targets[role].module, change.param.removesuffix(".weight")), Linear):
                    raise ValueError(
                        f"{printable(lora.file.path)} changes {change.param} of the {role}, which is no linear layer: "
                        "that takes lora_apply_mode 'immediately'"
                    )
            if beside and role not in lora.on_backend:
                lora.on_backend[role] = _OnBackend(lora.file, beside, self.targets[role], f"LoRA {name}")

    def _is_merged(self, role: str, change: Change) -> bool:
        return self.modes[role] == "immediately" or len(change.delta.shape) == 1

    def _attach(self, role: str, weights: Mapping[str, float]) -> None:
        module = self.targets[role].module
        deltas: dict[str, list[RuntimeDelta]] = {}
        for name in weights:
            if part := self.loaded[name].on_backend.get(role):
                for change, delta in zip(part.changes, part.deltas, strict=True):
                    deltas.setdefault(change.param.removesuffix(".weight"), []).append(delta)
        for path, layer in module.named_modules():
            if isinstance(layer, Linear):
                layer.deltas = tuple(deltas.get(path, ()))

    def _merge(self, role: str, weights: Mapping[str, float], check: Callable[[int, int], None]) -> None:
        changes: dict[str, list[tuple[Change, float]]] = {}
        for name, weight in weights.items():
            for change in self.loaded[name].changes.get(role, ()):
                if self._is_merged(role, change):
                    changes.setdefault(change.param, []).append((change, weight))
        if role in self._merged and set(self._merged[role].params) != set(changes):
            self._unmerge(role)
        if changes:
            self._rest(role)
            target = self.targets[role]
            if role not in self._merged:
                in_place = self.modes[role] == "immediately"
                make = MergedStandIn if target.is_stand_in else Merged
                self._merged[role] = make(target.weights, changes, target.checkpoint, target.copies, in_place)
            self._merged[role].write(changes, check)

    def _unmerge(self, role: str) -> None:
        if role in self._merged:
            self._rest(role)
            merged = self._merged.pop(role)
            try:
                merged.restore()
            finally:
                merged.close()


def changes_of(
    checkpoint: Checkpoint, role: str, naming: Naming, loras: Sequence[tuple[Path, float]]
) -> tuple[dict[str, Callable[[Float32], Float32]], list[LoraReport]]:
    """What merging does to the tensors of a model's file: name in that file -> what its values become.

    checkpoint: under the model's names. Keys for another component are left out, and counted. Factors are read as they
    are needed; the LoRAs' files stay open as long as the functions live. Raises as `Lora`.
    """
    shapes = {role: {name: info.ne for name, info in checkpoint.items()}}
    names = {role: naming.table({name: Param(info.ne) for name, info in checkpoint.items()})}
    found: dict[str, list[tuple[Change, float]]] = {}
    reports = []
    for path, weight in loras:
        changes, report = open_lora(path).match(names, shapes, {role: naming.unused})
        reports.append(report)
        for change in changes[role] if check_weight(weight) else ():  # by 0 nothing changes, rounding neither
            found.setdefault(checkpoint[change.param].name_in_file, []).append((change, float(weight)))

    def merge(listed: Sequence[tuple[Change, float]]) -> Callable[[Float32], Float32]:
        def change(values: Float32) -> Float32:
            values = np.array(values, np.float32)
            add_rows(values, 0, [(c, c.delta.rows(), weight) for c, weight in listed])
            for info in (info for c, _ in listed for info in c.delta.parts.values()):
                info.file.check()
            return values

        return change

    return {name: merge(listed) for name, listed in found.items()}, reports


def lightning_steps(path: Path, metadata: Mapping[str, Any]) -> int | None:
    """The steps that a Lightning LoRA was distilled for, 8 where it does not say; None when it is no such LoRA.

    That is read from the title in its metadata or, as published ones have none, from its file's name:
    Qwen-Image-Lightning-4steps-V1.0.safetensors.
    """
    for text in (*(metadata.get(key) for key in _TITLES), os.path.basename(os.fspath(path))):
        if isinstance(text, str) and re.search("lightning", text, re.IGNORECASE):
            steps = re.search(r"(?<!\d)([1-9]\d?)[ _-]?steps?(?![a-z])", text, re.IGNORECASE)
            return int(steps[1]) if steps else 8
    return None


def check_weight(weight: object) -> float:
    """A LoRA's weight as a float. ValueError unless it is a number in -8..8."""
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight) \
            or abs(weight) > MAX_WEIGHT:  # fmt: skip
        raise ValueError(f"a LoRA's weight is a number in -{MAX_WEIGHT:g}..{MAX_WEIGHT:g}, not {weight!r}")
    return float(weight)


def extra_nodes(module: Module) -> int:
    """Room that a graph needs for the LoRAs on a network, besides its own."""
    return NODES * sum(len(layer.deltas) for _, layer in module.named_modules() if isinstance(layer, Linear))


def _choose(mode: ApplyMode, target: Target) -> ApplyMode:
    if mode != "auto":
        return mode
    if target.weights.closed:  # they rest on disk: nothing is there that could be changed
        return "at_runtime"
    matrices = [name for name, param in target.weights.params.items() if len(param.ne) > 1 and param.loaded]
    quantised = any(target.weights[name].type.is_quantized for name in matrices)
    return "at_runtime" if quantised or target.weights.report.n_mapped else "immediately"
