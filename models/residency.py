"""Weights in mapped files when memory may not hold all of them: what stays, what is given back, what is read again.

A graph says which weights it reads and in which order; nothing here knows names or models.

- Room for everything: nothing is done. That is decided before a graph runs that is not the one that ran last.
- Room for this graph's weights, but not beside those of graphs before it: those of graphs that are closed by now are
  given back, all of them, and of the others the ones used longest ago, no more than needed.
- No room for this graph's weights: it runs in pieces. Some pieces stay for good, evenly spread; each of the others is
  read while those before it compute, and given back when it has been used. A cyclic scan through a cache that is too
  small finds nothing in it; so this reads, in each pass, only what does not fit.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import time
import weakref
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from loader.params import Weights
from pyggml import Graph
from pyggml.lib import ffi, lib
from pyggml.types import Op

from .memory import Memory
from .room import Room, free_memory

log = logging.getLogger("pyggml.models")

_PAGE = os.sysconf("SC_PAGESIZE") if hasattr(os, "sysconf") else 4096
_SMALL = 256 << 10  # tensors below this are never given back while their graph is in use
_LARGEST_PIECE = 64 << 20
_CALL = 64 << 20  # bytes of one call that waits for the disk: between two, a stop is noticed
_AHEAD, _POPULATE, _UNMAP = range(3)  # pyggml_advise_pages
_PLAIN_READ = 512 << 10  # what a system surely reads ahead at once

Range = tuple[int, int]  # address and bytes of a tensor
Use = tuple[int, tuple[Range, ...]]  # a node of a graph, and the mapped weights that it reads


class Span(NamedTuple):
    """A mapped file of a component: where it is in memory; `fd` -1 where it is only planned."""

    start: int
    n_bytes: int
    component: str
    fd: int


class Piece(NamedTuple):
    """Nodes of a graph up to `end`, the large weights that they read for the first time, and whether these stay."""

    end: int
    ranges: tuple[Range, ...]
    stays: bool

    @property
    def n_bytes(self) -> int:
        return total(self.ranges)


@dataclass(frozen=True)
class Stream:
    """How a graph runs whose weights do not fit.

    `small`: tensors that always stay; `window`: bytes for what is read ahead and not yet given back.
    """

    pieces: tuple[Piece, ...]
    small: tuple[Range, ...]
    window: int

    @property
    def stays(self) -> tuple[Range, ...]:
        return (*self.small, *(r for piece in self.pieces if piece.stays for r in piece.ranges))

    @property
    def kept(self) -> int:
        """Bytes that stay."""
        return total(self.stays)

    @property
    def streamed(self) -> int:
        """Bytes that are read in each pass."""
        return sum(piece.n_bytes for piece in self.pieces if not piece.stays)


@dataclass(frozen=True)
class Decision:
    """What happens before a graph runs: ranges to give back, and how it runs when its weights do not fit."""

    give_back: tuple[Range, ...] = ()
    stream: Stream | None = None


class Policy:
    """Which ranges are in memory. Arithmetic only, so that a plan can ask it what a run would do."""

    def __init__(self) -> None:
        self.held: dict[Range, None] = {}  # the one used longest ago first

    @property
    def n_held(self) -> int:
        """Bytes that are held."""
        return total(self.held)

    def enter(self, uses: Sequence[Use], room: int, live: Collection[Range]) -> Decision:
        """A graph with these uses is about to run, and weights may take `room` bytes; `live`: graphs that are open may
        ask for them again.
        """
        ranges = dict.fromkeys(r for _, group in uses for r in group)
        others = [r for r in self.held if r not in ranges]
        need, left = total(ranges), total(others)
        give_back: list[Range] = []
        if need + left > room:  # idle pages in a full memory are what the system takes first, or others lack
            give_back = [r for r in others if r not in live]
            others = [r for r in others if r in live]
            left = total(others)
        for r in others:
            if need + left <= room:
                break
            give_back.append(r)
            left -= r[1]
        stream = None
        if need > room:
            stream = split(uses, room)
            stay = set(stream.stays)
            give_back += [r for r in self.held if r in ranges and r not in stay]
            ranges = dict.fromkeys(r for r in ranges if r in stay)
        for r in give_back:
            self.held.pop(r, None)
        for r in ranges:
            self.held.pop(r, None)
            self.held[r] = None
        return Decision(tuple(give_back), stream)


def total(ranges: Iterable[Range]) -> int:
    """Bytes of distinct ranges."""
    return sum(n for _, n in ranges)


def split(uses: Sequence[Use], room: int) -> Stream:
    """Pieces of a graph of which as many stay as `room` bytes hold beside the window for the others."""
    target = max(_PAGE, min(_LARGEST_PIECE, room // 12))
    large = min(_SMALL, target // 8)
    groups: list[tuple[int, list[Range]]] = []  # first node, ranges
    small: list[Range] = []
    seen: set[Range] = set()
    for node, ranges in uses:
        fresh = [r for r in ranges if r not in seen]
        seen.update(fresh)
        small += [r for r in fresh if r[1] < large]
        if not (fresh := [r for r in fresh if r[1] >= large]):
            continue
        # A cut comes only before a node that reads something large: never inside what ggml fuses.
        if not groups or total(groups[-1][1]) >= target:
            groups.append((node, []))
        groups[-1][1].extend(fresh)
    ends = [first for first, _ in groups[1:]] + [sys.maxsize]
    sizes = [total(ranges) for _, ranges in groups]
    largest, in_all = max(sizes, default=0), sum(sizes)
    window = max(2 * largest, min(3 * largest, room // 4))
    keep = max(0, room - window - total(small))
    # Evenly spread, so that the disk has all of the pass to read the others; and the first, which nothing precedes.
    pieces, kept, credit = [], 0, (sizes[0] if sizes else 0) * in_all
    for end, (_, group), n in zip(ends, groups, sizes, strict=True):
        credit += n * keep
        stays = credit >= n * in_all and kept + n <= keep
        if stays:
            credit -= n * in_all
            kept += n
        pieces.append(Piece(end, tuple(group), stays))
    return Stream(tuple(pieces), tuple(small), window)


def uses_of(graph: Graph, spans: Sequence[Span]) -> list[Use]:
    """Nodes that read weights inside `spans`, in the order they are computed.

    Tables of which a few rows are taken are left out: the pages of those rows come when they are read.
    """
    inside = _Inside(spans)
    result: list[Use] = []
    for i in range(lib.ggml_graph_n_nodes(graph.graph_ptr)):
        node = lib.ggml_graph_node(graph.graph_ptr, i)
        ranges: list[Range] = []
        for j in range(lib.GGML_MAX_SRC):
            source = node.src[j]
            if source == ffi.NULL:
                continue
            if source.view_src != ffi.NULL:
                source = source.view_src
            address = int(ffi.cast("uintptr_t", source.data))
            if address in inside and not (j == 0 and node.op == Op.GET_ROWS):
                ranges.append((address, int(lib.ggml_nbytes(source))))
        if ranges:
            result.append((i, tuple(dict.fromkeys(ranges))))
    return result


class _Inside:
    """Whether an address is in one of some spans."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._spans = sorted(spans)
        self._starts = [span.start for span in self._spans]

    def __contains__(self, address: int) -> bool:
        at = bisect_right(self._starts, address) - 1
        return at >= 0 and address < self._starts[at] + self._spans[at].n_bytes


def ranges_of(weights: Weights, spans: Sequence[Span]) -> list[Range]:
    """The mapped tensors of a component."""
    inside = _Inside(spans)
    found = ((int(ffi.cast("uintptr_t", t.ptr.data)), t.n_bytes) for t in weights.context.tensors())
    return [r for r in found if r[0] in inside]


def spans_of(component: str, weights: Weights) -> list[Span]:
    """The mapped files of a component; none where pages cannot be given back, or are locked."""
    if sys.platform != "linux" or not weights.report.n_mapped or weights.report.locked_bytes:
        return []
    return [Span(file.address, file.n_bytes, component, file.fd) for file in weights.files if file.mapped]


def margin(room: int) -> int:
    """Bytes left alone: what libraries have mapped counts as free, and the kernel's own bookkeeping is not seen."""
    return min(room // 4, (96 << 20) + room // 32)


@dataclass
class StreamReport:
    """Weights of one graph that did not fit: bytes in all, kept, read in each pass; passes; seconds waited."""

    stage: str
    weights: int
    kept: int
    per_pass: int
    window: int
    passes: int = 0
    waited_seconds: float = 0.0


@dataclass
class ResidencyReport:
    """What was decided, and why: the room that was found, what was given back of which component, what streamed."""

    room: int = 0
    room_source: str = ""
    mapped: int = 0
    decisions: list[str] = field(default_factory=list)
    given_back: dict[str, int] = field(default_factory=dict)
    streams: list[StreamReport] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Residency:
    """Runs graphs whose weights live in mapped files, within the memory there is.

    `limit`: bytes that weights and the process's own memory may take together, beside what the system allows. Used by
    one thread at a time.
    """

    def __init__(
        self, weights: Mapping[str, Weights] | None = None, *, limit: int | None = None,
        room: Callable[[], Room] = free_memory,
    ) -> None:  # fmt: skip
        self.limit = limit
        self.policy = Policy()
        self.report = ResidencyReport()
        self._find_room = room
        self._spans: list[Span] = []
        self._weights: list[Weights] = []
        self._untold: list[Weights] = []  # used while there was room for all: the policy has not heard of them
        self._uses: weakref.WeakKeyDictionary[Graph, list[Use]] = weakref.WeakKeyDictionary()
        self._ran: weakref.WeakSet[Graph] = weakref.WeakSet()
        self._current: weakref.ref[Graph] | None = None
        self._stream: Stream | None = None
        self._plenty_until = 0.0  # seconds: there was room for all weights not long ago
        self._present: set[Range] = set()  # ranges that stay and have been read
        for name, owner in (weights or {}).items():
            self.add(name, owner)

    def add(self, component: str, weights: Weights) -> None:
        """Look after the mapped files of a component too."""
        if spans := spans_of(component, weights):
            self._spans += spans
            self._weights.append(weights)
            self.report.mapped += weights.report.mapped_bytes

    def begin(self) -> None:
        """A new report, for a new run."""
        self.report = ResidencyReport(mapped=self.report.mapped)
        self._current = None
        self._plenty_until = 0.0

    def run(self, graph: Graph, stage: str = "a graph") -> None:
        """graph.run(), after a look at the memory there is. Raises what it raises."""
        if self._current is None or self._current() is not graph:
            self._enter(graph, stage)
        elif self._stream is not None and self.room(graph) < 0.9 * (self._stream.kept + self._stream.window):
            self._enter(graph, stage)  # somebody else has taken memory since
        if self._stream is None:
            graph.run()
        else:
            self._run_stream(graph, self._stream)
        self._ran.add(graph)

    def room(self, graph: Graph | None = None) -> int:
        """Bytes that mapped weights may take now; `graph`: one whose compute buffer may still have to come."""
        found = self._find_room()
        n_bytes, source = found.n_bytes, found.source
        if self.limit is not None and (own := self.limit - _anonymous()) < n_bytes:
            n_bytes, source = max(0, own), "the limit that was set"
        if not self.report.room_source:
            self.report.room, self.report.room_source = n_bytes, source
        if graph is not None and graph not in self._ran and graph.backend.is_cpu:
            n_bytes -= sum(graph.measure())
        return max(0, n_bytes - margin(n_bytes))

    def reads_again(self, graph: Graph) -> bool:
        """Whether weights of a graph would be read from the disk in each pass, as they do not fit into memory."""
        ranges = {r for _, group in uses_of(graph, self._spans) for r in group}
        return total(ranges) > self.room(graph)

    def _enter(self, graph: Graph, stage: str) -> None:
        graph.alloc()
        self._current = weakref.ref(graph)
        now = time.monotonic()
        if self._plenty_until > now and graph in self._ran:
            return  # two graphs in turn, as with guidance: a look takes a millisecond
        self._stream = None
        room = self.room(graph)
        if not self._spans or self.report.mapped <= room:
            self._say("room for all weights" if self._spans else "no mapped weights to look after")
            used = [w for w in self._weights if id(w.context) in graph.uses and w not in self._untold]
            self._untold += used
            self._plenty_until = now + 1.0
            return
        self._plenty_until = 0.0
        for weights in self._untold:
            self.policy.held |= dict.fromkeys(ranges_of(weights, self._spans))
        self._untold.clear()
        uses = self._uses_of(graph)
        still_open = [other for other in self._ran if not other.closed]
        live = {r for other in still_open for _, ranges in self._uses_of(other) for r in ranges}
        decision = self.policy.enter(uses, room, live)
        self._give_back(decision.give_back)
        stream = self._stream = decision.stream
        if stream is None:
            gone = f"; {total(decision.give_back) / 1e9:.2f} GB of others given back" if decision.give_back else ""
            self._say(f"{stage}: room for its weights{gone}")
            return
        size = stream.kept + stream.streamed
        self._say(
            f"{stage}: {size / 1e9:.2f} GB of weights, room for {room / 1e9:.2f} GB: {stream.kept / 1e9:.2f} GB "
            f"stay, {stream.streamed / 1e9:.2f} GB are read in each pass"
        )
        known = next((s for s in self.report.streams if (s.stage, s.kept) == (stage, stream.kept)), None)
        if known is None:
            self.report.streams.append(StreamReport(stage, size, stream.kept, stream.streamed, stream.window))
        else:  # the last one is the one that counts
            self.report.streams.remove(known)
            self.report.streams.append(known)

    def _uses_of(self, graph: Graph) -> list[Use]:
        if graph not in self._uses:
            self._uses[graph] = uses_of(graph, self._spans)
        return self._uses[graph]

    def _say(self, text: str) -> None:
        if text not in self.report.decisions:
            self.report.decisions.append(text)
            log.info("weights in memory: %s", text)

    def _span(self, r: Range) -> Span:
        return next(span for span in self._spans if span.start <= r[0] < span.start + span.n_bytes)

    def _give_back(self, ranges: Iterable[Range]) -> None:
        for r in ranges:
            component = self._span(r).component
            self.report.given_back[component] = self.report.given_back.get(component, 0) + r[1]
        self._drop(ranges)

    def _drop(self, ranges: Iterable[Range]) -> None:
        """Whole pages of ranges: out of our memory, and out of the system's unless others have them mapped."""
        dropped = list(ranges)
        self._present.difference_update(dropped)
        for start, n in joined(dropped):
            first, end = -(-start // _PAGE) * _PAGE, (start + n) // _PAGE * _PAGE
            if first < end:
                span = self._span((start, n))
                lib.pyggml_advise_pages(first, end - first, _UNMAP)
                os.posix_fadvise(span.fd, first - span.start, end - first, os.POSIX_FADV_DONTNEED)

    def _run_stream(self, graph: Graph, stream: Stream) -> None:
        report = self.report.streams[-1]
        reader = _Reader(stream, self._present, self._drop)

        def before(i: int) -> None:
            if i and not stream.pieces[i - 1].stays:
                reader.give_back(i - 1)
            report.waited_seconds += reader.wait(i)

        try:
            graph.run_pieces([piece.end for piece in stream.pieces[:-1]], before)
            report.passes += 1
        finally:
            reader.close()


class _Reader:
    """A thread that reads the pieces of a stream in their order, as far ahead as the window allows, and drops those
    that have been used: while that is done, or waited for, the other threads compute.
    """

    def __init__(self, stream: Stream, present: set[Range], drop: Callable[[Iterable[Range]], None]) -> None:
        self._stream = stream
        self._present = present  # ranges that stay and have been read
        self._drop = drop
        self._changed = threading.Condition()
        self._n_read = 0  # pieces
        self._unreturned: set[int] = set()  # pieces that do not stay, read or being read
        self._used: list[int] = []  # those of them that nobody needs any more
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="pyggml weights", daemon=True)
        self._thread.start()

    def wait(self, i: int) -> float:
        """Until piece `i` is in memory; the seconds it took."""
        start = time.perf_counter()
        with self._changed:
            while self._n_read <= i and not self._stopped:
                self._changed.wait(1.0)  # a time: else Ctrl-C is not heard everywhere
        return time.perf_counter() - start

    def give_back(self, i: int) -> None:
        """Piece `i` has been used: its memory is for others."""
        with self._changed:
            self._used.append(i)
            self._changed.notify_all()

    def close(self) -> None:
        """Stop, and give back what has been read and not been used."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()
        for i in self._unreturned:
            self._drop(self._stream.pieces[i].ranges)

    def _run(self) -> None:
        try:
            for i, piece in enumerate(self._stream.pieces):
                if not piece.stays and not self._wait_for_room(piece.n_bytes):
                    return
                if not piece.stays:
                    self._unreturned.add(i)
                for start, n in joined(r for r in piece.ranges if r not in self._present):
                    for at in range(start, start + n, _CALL):
                        if self._stopped:
                            return
                        read_pages(at, min(_CALL, start + n - at))
                if piece.stays:
                    self._present.update(piece.ranges)
                with self._changed:
                    self._n_read = i + 1
                    self._changed.notify_all()
            self._wait_for_room(sys.maxsize)  # that is never: what is used is dropped, until the end
        finally:
            with self._changed:  # whatever happened here, the pages come when they are computed with
                self._stopped = True
                self._changed.notify_all()

    def _wait_for_room(self, n_bytes: int) -> bool:
        """Drop what has been used, until the window has room; False when there is no need to go on."""
        pieces = self._stream.pieces
        while True:
            with self._changed:
                while not self._used and not self._stopped:
                    if sum(pieces[k].n_bytes for k in self._unreturned) + n_bytes <= self._stream.window:
                        return True
                    self._changed.wait(1.0)
                if self._stopped:
                    return False
                used, self._used = self._used, []
            for i in used:
                self._drop(pieces[i].ranges)
            self._unreturned.difference_update(used)


def read_pages(address: int, n_bytes: int) -> None:
    """Read mapped pages from the disk and map them; where the system cannot, it is only told that they are wanted."""
    first = address // _PAGE * _PAGE
    n = -(-(address + n_bytes - first) // _PAGE) * _PAGE
    lib.pyggml_advise_pages(first, n, _AHEAD)
    if lib.pyggml_advise_pages(first, n, _POPULATE) == errno.EINVAL:  # Linux before 5.14
        for at in range(first, first + n, _PLAIN_READ):  # it reads no more than this for each time it is told
            lib.pyggml_advise_pages(at, min(_PLAIN_READ, first + n - at), _AHEAD)


def joined(ranges: Iterable[Range]) -> list[Range]:
    """Ranges with those that touch each other, but for padding, made one."""
    result: list[Range] = []
    for start, n in sorted(ranges):
        if result and start - sum(result[-1]) < _PAGE:
            result[-1] = (result[-1][0], max(start + n, sum(result[-1])) - result[-1][0])
        else:
            result.append((start, n))
    return result


def _anonymous() -> int:
    return Memory.now().anonymous
