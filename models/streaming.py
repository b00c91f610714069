"""Weights larger than a device's memory: some stay there while they are in use, others come just in time.

A graph runs in pieces, cut by the weights that it reads. The weights of some pieces stay, evenly spread; those of the
others take turns in two slots: while a piece computes, a thread uploads the next ones that do not stay. A weight has
one address for as long as an arrangement lasts, so nothing is changed between pieces, and ggml's allocator never owns
a weight. Vectors are few bytes, and always stay.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final, NamedTuple

from loader.errors import printable
from loader.offload import Visit, address_of, bytes_of, is_host
from loader.params import Param, Weights
from loader.upload import Uploader, take
from pyggml import Backend, Buffer, Context, Graph, OutOfMemory, Tensor
from pyggml.lib import ffi, lib

log = logging.getLogger("pyggml.models")

_TARGETS: Final = tuple(4096 << 2 * i for i in range(8))  # bytes of a piece: to 64 MiB
_N_SLOTS: Final = 2
_NOWHERE: Final = 1 << 44  # where weights without a place say that they are: graphs are built around tensors with data

Use = tuple[int, tuple[int, ...]]  # a node of a graph, and the numbers of the weights that it reads, each once
Group = tuple[int, tuple[int, ...], int]  # a piece that has no place yet: end, weights, bytes


class Piece(NamedTuple):
    """Nodes of a graph up to `end` (-1: all), and the numbers of the weights that they read for the first time.

    `slot`: where these are put for each pass, one after another; None when they stay.
    """

    end: int
    weights: tuple[int, ...]
    slot: int | None


@dataclass(frozen=True)
class Arrangement:
    """How a graph runs: its pieces, weights that stay besides theirs, and bytes: of all that stays, of each
    slot, of what comes in each pass. `whole`: of several graphs, where this is the part of one of them.
    """

    pieces: tuple[Piece, ...]
    always: tuple[int, ...]
    stays: int
    slots: tuple[int, ...]
    per_pass: int
    whole: Arrangement | None = None

    @property
    def n_bytes(self) -> int:
        return self.stays + sum(self.slots)

    @property
    def placement(self) -> object:
        """Graphs of equal placements find each weight at the same address."""
        if self.whole is not None:
            return self.whole.placement
        return self.always, self.slots, tuple(piece[1:] for piece in self.pieces)


def all_stay(weights: Sequence[int], sizes: Sequence[int]) -> Arrangement:
    """One piece, and these weights at the device."""
    return Arrangement((Piece(-1, tuple(weights), None),), (), sum(sizes[w] for w in weights), (), 0)


def arrange(uses: Sequence[Use], sizes: Sequence[int], room: int) -> Arrangement:
    """As many pieces stay as `room` bytes hold beside the slots for the others.

    sizes: bytes of each weight. Where `room` is too small for every arrangement, the one that needs least.
    """
    least = all_stay(sorted({w for _, weights in uses for w in weights}), sizes)
    if least.n_bytes <= room:
        return least
    # Small pieces make small slots, large ones few waits: a dozen or more, or else whatever fits.
    for target in sorted(_TARGETS, key=lambda target: (target > room // 12, -target)):
        groups, always = _cut(uses, sizes, target)
        for n_kept in range(len(groups), -1, -1):
            found = _spread(groups, always, sizes, n_kept)
            if found.n_bytes <= room:
                return found
            least = min(least, found, key=lambda a: a.n_bytes)
    return least


def arrange_together(graphs: Sequence[Sequence[Use]], sizes: Sequence[int], room: int) -> list[Arrangement | None]:
    """For each of several graphs that run in turn, its part of one arrangement, so that what stays does so for all.

    None where a graph reads weights in another order than an earlier one of the same weights.
    """
    joined: list[Use] = []
    seen: list[set[int]] = []
    for uses in graphs:
        weights = {w for _, group in uses for w in group}
        if weights not in seen:
            seen.append(weights)
            first = joined[-1][0] + 1 if joined else 0
            joined += [(first + node, group) for node, group in uses]
    whole = arrange(joined, sizes, room)
    return [_part(whole, uses, sizes) for uses in graphs]


def _part(whole: Arrangement, uses: Sequence[Use], sizes: Sequence[int]) -> Arrangement | None:
    own = {w for _, group in uses for w in group}
    piece_of = {w: i for i, piece in enumerate(whole.pieces) for w in piece.weights}
    pieces: list[Piece] = []
    begun: set[int] = set()
    in_slot: dict[int, int] = {}
    for node, group in uses:
        numbers = dict.fromkeys(piece_of[w] for w in group if w in piece_of)
        for i in numbers:
            piece = whole.pieces[i]
            if i not in begun:
                begun.add(i)
                if pieces:
                    pieces[-1] = pieces[-1]._replace(end=node)
                pieces.append(Piece(-1, tuple(w for w in piece.weights if w in own), piece.slot))
                if piece.slot is not None:
                    in_slot[piece.slot] = i
        if len({piece.end for piece in pieces}) < len(pieces):
            return None  # two begin at one node
        if any(in_slot[slot] != i for i in numbers if (slot := whole.pieces[i].slot) is not None):
            return None
    per_pass = sum(sizes[w] for piece in pieces if piece.slot is not None for w in piece.weights)
    pieces = pieces or [Piece(-1, (), None)]
    return Arrangement(tuple(pieces), whole.always, whole.stays, whole.slots, per_pass, whole)


def _cut(uses: Sequence[Use], sizes: Sequence[int], target: int) -> tuple[list[Group], tuple[int, ...]]:
    """Groups of up to `target` bytes, or of one node's weights; and the weights that several of them read."""
    groups: list[tuple[int, list[int]]] = []  # first node, weights
    size = 0  # of the last group
    group_of: dict[int, int] = {}
    shared: set[int] = set()
    for node, weights in uses:
        fresh = [w for w in weights if w not in group_of]
        n_bytes = sum(sizes[w] for w in fresh)
        # A cut comes only before a node that reads a matrix for the first time: never inside what backends fuse.
        if fresh and (not groups or size + n_bytes > target):
            groups.append((node, []))
            size = 0
        size += n_bytes
        for w in fresh:
            group_of[w] = len(groups) - 1
            groups[-1][1].append(w)
        shared.update(w for w in weights if group_of[w] != len(groups) - 1)
    ends = [first for first, _ in groups[1:]] + [-1]
    own = [tuple(w for w in group if w not in shared) for _, group in groups]
    found = [(end, weights, sum(sizes[w] for w in weights)) for end, weights in zip(ends, own, strict=True)]
    return found, tuple(sorted(shared))


def _spread(groups: Sequence[Group], always: tuple[int, ...], sizes: Sequence[int], n_kept: int) -> Arrangement:
    """`n_kept` pieces stay, evenly spread: the others have time to come. And the first, which nothing precedes."""
    stays, per_pass, n_streamed = sum(sizes[w] for w in always), 0, 0
    slots = [0] * _N_SLOTS
    pieces: list[Piece] = []
    for i, (end, weights, size) in enumerate(groups):
        slot = None
        if not weights or i * n_kept % len(groups) < n_kept:
            stays += size
        else:
            slot = n_streamed % _N_SLOTS
            slots[slot] = max(slots[slot], size)
            per_pass += size
            n_streamed += 1
        pieces.append(Piece(end, weights, slot))
    return Arrangement(tuple(pieces), always, stays, tuple(slots), per_pass)


@dataclass
class VramReport:
    """Device memory of one component. Bytes: the limit, its weights, those that stay, the slots that the others come
    into, those that come in each pass, compute buffers, and the most that all of it took at once. Then passes, bytes
    uploaded, the seconds that took, and those of them that a computation waited for.
    """

    limit: int
    weights: int
    stays: int = 0
    slots: int = 0
    per_pass: int = 0
    compute: int = 0
    peak: int = 0
    passes: int = 0
    uploaded_bytes: int = 0
    upload_seconds: float = 0.0
    waited_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass
class _Known:
    """A graph that was seen: the matrices that it reads, what of it points into them, and how it runs."""

    uses: list[Use]
    views: list[Any]
    compute: int  # bytes
    room: int = 0  # that the arrangement was made for
    arrangement: Arrangement | None = None
    pointed: int = -1  # the placement that its views are of, by number


class Stream:
    """Weights at a device, within `limit` bytes of its memory; what does not fit comes as it is computed with.

    Until it is closed, parameters have tensors of its own; the weights that they come from, in memory of the host, are
    not to be closed before. Each graph around them is computed by `prepare`, then `run`. Used by one thread at a time.
    OutOfMemory when the device has no room for vectors; LoadError (WeightsChanged) when a mapped file became shorter.
    """

    def __init__(self, weights: Weights, backend: Backend, limit: int, report: VramReport | None = None) -> None:
        self.name = printable(weights.report.component)
        self.limit = limit
        self._weights, self._backend, self._type = weights, backend, backend.buffer_type
        # Also read outside of graphs: where a picture is decoded in tiles.
        self._vectors = Visit(weights, backend, _is_vector)
        loaded = [(p, p.tensor) for p in weights.params.values() if p.loaded]
        # What was made at the device, such as the sum of a weight and a LoRA, is there already.
        self._rest: list[tuple[Param, Tensor]] = [(p, t) for p, t in loaded if is_host(t) and not _is_vector(t)]
        self._context = Context(len(self._rest) + 1)
        self._copies = [self._context.new_tensor(t.ne, t.type, t.name) for _, t in self._rest]
        self._numbers = {_number(copy.ptr): i for i, copy in enumerate(self._copies)}
        step = self._type.alignment
        size_of = partial(lib.ggml_backend_buft_get_alloc_size, self._type.ptr)
        self._sizes = [-(-int(size_of(copy.ptr)) // step) * step for copy in self._copies]
        self._graphs: weakref.WeakKeyDictionary[Graph, _Known] = weakref.WeakKeyDictionary()
        self._placement: object = None
        self._n_placements = 0
        self._left: set[object] = set()  # placements that others took the place of
        self._in_turn = False  # one came back: graphs run in turn, and are arranged together
        self._arrived: set[int] = set()  # of those that stay
        self._uploader: Uploader | None = None
        self.report = report or VramReport(limit, 0)
        self.report.limit, self.report.weights = limit, sum(self._sizes) + self._vectors.device_bytes
        self._displace()
        for (param, _), copy in zip(self._rest, self._copies, strict=True):
            param.tensor = copy

    def feeds(self, graph: Graph) -> bool:
        """Whether it is around these weights."""
        return not self._context.closed and any(c in graph.uses for c in (id(self._context), id(self._vectors.context)))

    def prepare(self, graph: Graph) -> None:
        """Find places for weights, before anything is copied into the graph. OutOfMemory with the bytes needed."""
        if graph not in self._graphs:
            self._graphs[graph] = self._look(graph)
        known = self._graphs[graph]
        taken = sum(k.compute for g, k in self._graphs.items() if not g.closed) + self._beside(graph)
        if known.arrangement is None or known.room != self.limit - taken:
            known.room = self.limit - taken
            known.arrangement = self._arrange(known)
        if known.arrangement.n_bytes > known.room:
            raise OutOfMemory(
                f"{self.name} needs {taken + known.arrangement.n_bytes} bytes of {self._backend.device.name} at least, "
                f"{taken} of them beside the weights that can come in pieces, but may take {self.limit}"
            )
        if known.arrangement.placement != self._placement:
            if not self._in_turn and known.arrangement.placement in self._left:
                self._in_turn = True
                for other in self._graphs.values():
                    other.arrangement = None
                self.prepare(graph)
                return
            self._left.add(self._placement)
            self._place(known.arrangement)
        if known.pointed != self._n_placements:
            for view in known.views:
                view.data = ffi.cast("void *", _number(view.view_src.data) + view.view_offs)
                view.buffer = view.view_src.buffer
            known.pointed = self._n_placements

    def comes_again(self, graph: Graph) -> bool:
        """Whether weights of a graph come to the device again in each pass. Raises what `prepare` raises."""
        self.prepare(graph)
        arrangement = self._graphs[graph].arrangement
        return arrangement is not None and arrangement.per_pass > 0

    def run(self, graph: Graph) -> None:
        """graph.run(), with weights that come in time. After `prepare`; raises what graph.run raises, and uploads."""
        self.prepare(graph)
        graph.alloc()
        arrangement = self._graphs[graph].arrangement
        assert arrangement is not None
        report = self.report
        report.stays = arrangement.stays + self._vectors.device_bytes
        report.per_pass, report.slots = arrangement.per_pass, sum(arrangement.slots)
        report.compute = sum(g.buffer_size for g in self._graphs if not g.closed)
        held = sum(buffer.n_bytes for buffer in self._context.buffers)
        report.peak = max(report.peak, held + report.compute + self._beside(graph))
        feeder = _Feeder(self, arrangement, self._backend)
        try:
            graph.run_pieces([piece.end for piece in arrangement.pieces[:-1]], feeder.before)
        finally:
            feeder.close()
            report.waited_seconds += feeder.waited
        report.passes += 1
        for buffer in self._weights.context.buffers:  # a mapped file may have become shorter
            if buffer.check is not None:
                buffer.check()

    def upload(self, piece: Piece, is_stopped: Callable[[], bool]) -> bool:
        """The weights of a piece to where they have been placed; False when it was stopped on the way."""
        numbers = [i for i in piece.weights if i not in self._arrived]
        if not numbers:
            return True
        start = time.perf_counter()
        uploader, self._uploader = self._uploader or Uploader(self._backend.device), None
        try:
            for i in sorted(numbers, key=lambda i: address_of(self._rest[i][1])):  # as in the file
                if is_stopped():
                    return False
                source = self._rest[i][1]
                uploader.put(self._copies[i], 0, source.n_bytes, partial(take, bytes_of(source)))
                self.report.uploaded_bytes += source.n_bytes
            uploader.finish()
            self._uploader = uploader
        finally:
            self.report.upload_seconds += time.perf_counter() - start
            if self._uploader is None:  # half done: nothing of that may arrive later
                uploader.close()
        if piece.slot is None:
            self._arrived.update(numbers)
        return True

    def close(self) -> None:
        """Free everything at the device; parameters have their own tensors again. Twice is fine."""
        if self._context.closed:
            return
        for param, tensor in self._rest:
            param.tensor = tensor
        self._vectors.close()
        self._displace()
        if self._uploader is not None:
            self._uploader.close()
        self._context.close()
        report = self.report
        if report.uploaded_bytes:
            rate = report.uploaded_bytes / 1e9 / max(report.upload_seconds, 1e-9)
            log.info(
                "%s: %.2f GB to %s in %.2fs (%.2f GB/s), of which %.2fs were waited for, in %d passes", self.name,
                report.uploaded_bytes / 1e9, self._backend.device.name, report.upload_seconds, rate,
                report.waited_seconds, report.passes,
            )  # fmt: skip

    def _arrange(self, known: _Known) -> Arrangement:
        if sum(self._sizes) <= known.room:  # also what this graph does not read: the next one may
            return all_stay(range(len(self._sizes)), self._sizes)
        found = None
        if self._in_turn:
            graphs = [k.uses for g, k in self._graphs.items() if not g.closed]
            at = next(i for i, uses in enumerate(graphs) if uses is known.uses)
            found = arrange_together(graphs, self._sizes, known.room)[at]
        if found is None or found.n_bytes > known.room:
            found = arrange(known.uses, self._sizes, known.room)
        log.info(
            "%s: %.2f GB of weights, room for %.2f GB on %s: %.2f GB stay, %.2f GB come in each pass", self.name,
            sum(self._sizes) / 1e9, known.room / 1e9, self._backend.device.name, found.stays / 1e9,
            found.per_pass / 1e9,
        )  # fmt: skip
        return found

    def _look(self, graph: Graph) -> _Known:
        uses: list[Use] = []
        views: dict[int, Any] = {}
        for i in range(lib.ggml_graph_n_nodes(graph.graph_ptr)):
            node = lib.ggml_graph_node(graph.graph_ptr, i)
            numbers: dict[int, None] = {}
            for tensor in (node, *node.src):
                if tensor == ffi.NULL:
                    continue
                root = tensor if tensor.view_src == ffi.NULL else tensor.view_src
                number = self._numbers.get(_number(root))
                if number is not None:
                    numbers[number] = None
                    if root != tensor:
                        views[_number(tensor)] = tensor
            if numbers and _number(node.view_src) not in self._numbers:  # what makes a view of a weight reads nothing
                uses.append((i, tuple(numbers)))
        return _Known(uses, list(views.values()), graph.measure()[0])

    def _beside(self, graph: Graph) -> int:
        """Bytes at the device that the graph uses besides these matrices and memory of its own: vectors, LoRAs."""
        contexts = {id(c): c for c in (self._vectors.context, *graph.uses.values()) if c is not self._context}
        return sum(buffer.n_bytes for context in contexts.values() for buffer in context.buffers)

    def _displace(self) -> None:
        """No matrix has a place."""
        for buffer in self._context.buffers:
            buffer.close()
        self._context.buffers.clear()
        for copy in self._copies:
            copy.ptr.data, copy.ptr.buffer = ffi.cast("void *", _NOWHERE), ffi.NULL
        self._arrived.clear()
        self._placement = None
        self._n_placements += 1

    def _place(self, arrangement: Arrangement) -> None:
        self._displace()
        try:
            slots = [Buffer.of_size(self._type, n, name=self.name) if n else None for n in arrangement.slots]
            self._context.buffers += [slot for slot in slots if slot is not None]
            whole = arrangement.whole or arrangement
            for numbers, at in [(whole.always, None), *((p.weights, p.slot) for p in whole.pieces)]:
                slot, offset = None if at is None else slots[at], 0
                for i in numbers:
                    self._copies[i].ptr.data = ffi.NULL
                    if slot is not None:
                        slot.place(self._copies[i], offset)
                        offset += self._sizes[i]
            Buffer.allocate(self._context, self._type, weights=True, name=self.name)
        except BaseException:
            self._displace()
            raise
        self._placement = arrangement.placement


class _Feeder:
    """A thread that uploads weights in the order of the pieces of one pass."""

    def __init__(self, stream: Stream, arrangement: Arrangement, backend: Backend) -> None:
        self.waited = 0.0  # seconds
        self._stream = stream
        self._arrangement = arrangement
        self._backend = backend
        self._changed = threading.Condition()
        self._n_ready = 0  # pieces that can run
        self._n_run = 0  # pieces that have run
        self._stopped = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="pyggml uploads", daemon=True)
        self._thread.start()

    def before(self, i: int) -> None:
        """Wait for the weights of piece `i`; those before it have run. Returns early when the backend was cancelled."""
        start = time.perf_counter()
        with self._changed:
            self._n_run = i
            self._changed.notify_all()
            while self._n_ready <= i and self._error is None and not self._backend.is_cancelled:
                self._changed.wait(0.1)  # a time: cancel() does not wake it, nor, everywhere, Ctrl-C
        self.waited += time.perf_counter() - start
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stop; when it returns nothing is uploaded any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            occupied: dict[int, int] = {}  # slot -> pieces that have to run before it is free
            first = Piece(0, self._arrangement.always, None)
            for i, piece in enumerate((first, *self._arrangement.pieces)):
                if piece.slot is not None:
                    self._wait_for_run(occupied.get(piece.slot, 0))
                    occupied[piece.slot] = i
                if not self._stream.upload(piece, lambda: self._stopped):
                    return
                with self._changed:
                    self._n_ready = i
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _wait_for_run(self, n_pieces: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._n_run >= n_pieces or self._stopped)


def _is_vector(tensor: Tensor) -> bool:
    return tensor.ne[1:] == (1, 1, 1)


def _number(pointer: Any) -> int:
    return int(ffi.cast("uintptr_t", pointer))
