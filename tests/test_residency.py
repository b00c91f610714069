"""Weights that do not fit into memory: which stay, what is given back, what is read; and the same results."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from loader.checkpoint import open_checkpoint
from loader.params import Param, Weights, load_params
from models import residency
from models.memory import Memory
from models.residency import Policy, Range, Residency, Use, split, total
from models.room import Room, free_memory
from pyggml import Backend, Cancelled, GGMLError, Graph, Type, ops

N, LAYERS = 512, 24  # a matrix is 1 MB
MB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="pages are looked after on Linux only")


def chain(n: int, size: int, start: int = 1 << 40) -> list[Use]:
    """A graph that reads n ranges of a size, one after the other."""
    return [(3 * i, ((start + i * size, size),)) for i in range(n)]


# -- how much room there is --------------------------------------------------------------------------------------------


def fake_system(root: Path, cgroup: str, mounts: str, files: dict[str, str], available: int = 8 << 30) -> str:
    texts = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:  {available >> 10} kB\n", "proc/self/cgroup": cgroup,
             "proc/self/mountinfo": mounts, **files}  # fmt: skip
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return str(root)


V1_MOUNT = "35 31 0:32 {} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
V2_MOUNT = "30 23 0:26 {} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def test_room_is_what_the_system_has_available(tmp_path: Path) -> None:
    root = fake_system(tmp_path, "", "", {}, available=5 << 30)
    assert free_memory(root) == Room(5 << 30, "available memory")
    assert free_memory().n_bytes > 0


def test_cgroup_v1_counts_cached_files_as_free(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory/job"
    root = fake_system(tmp_path, "4:memory:/job\n1:cpu:/\n", V1_MOUNT.format("/"), {
        f"{group}/memory.limit_in_bytes": f"{3 << 30}\n", f"{group}/memory.usage_in_bytes": f"{2 << 30}\n",
        f"{group}/memory.stat": f"active_file 7\ntotal_active_file {1 << 30}\ntotal_inactive_file {512 << 20}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
    })  # fmt: skip
    assert free_memory(root) == Room((3 << 30) - (512 << 20), "memory cgroup /job")


@pytest.mark.parametrize("top", ["/", "/box"])
def test_cgroup_v2_above_and_high_count_too(tmp_path: Path, top: str) -> None:
    """With a cgroup namespace the mount begins at our own group, and paths are longer than what is mounted."""
    inside = "" if top == "/box" else "box/"
    folder = f"sys/fs/cgroup/{inside}"
    root = fake_system(tmp_path, "0::/box/job\n", V2_MOUNT.format(top), {
        f"{folder}job/memory.max": "max\n", f"{folder}job/memory.current": "5\n", f"{folder}job/memory.high": "max\n",
        f"{folder}memory.max": f"{4 << 30}\n", f"{folder}memory.high": f"{2 << 30}\n",
        f"{folder}memory.current": f"{1 << 30}\n", f"{folder}memory.stat": f"anon 3\nactive_file {1 << 29}\n",
    })  # fmt: skip
    assert free_memory(root).n_bytes == (2 << 30) - (1 << 29)


# -- what is decided ---------------------------------------------------------------------------------------------------


def test_nothing_is_given_back_while_there_is_room() -> None:
    policy = Policy()
    first, second = chain(10, MB), chain(10, MB, start=1 << 41)
    assert policy.enter(first, 20 * MB, ()).give_back == ()
    assert policy.enter(second, 20 * MB, ()) == residency.Decision()
    assert policy.n_held == 20 * MB


def test_what_was_used_longest_ago_is_given_back_first_and_no_more_than_is_needed() -> None:
    policy = Policy()
    first, second, third = chain(4, MB), chain(4, MB, 1 << 41), chain(4, MB, 1 << 42)
    live = {r for uses in (first, second) for _, ranges in uses for r in ranges}
    policy.enter(first, 8 * MB, live)
    policy.enter(second, 8 * MB, live)
    policy.enter(first, 8 * MB, live)
    decision = policy.enter(third, 9 * MB, live)
    assert decision.stream is None
    assert [r for r, in (ranges for _, ranges in second)][:3] == list(decision.give_back)
    assert policy.n_held == 9 * MB


def test_what_closed_graphs_have_read_is_given_back_first_and_all_of_it() -> None:
    policy = Policy()
    over, open_, third = chain(4, MB), chain(4, MB, 1 << 41), chain(4, MB, 1 << 42)
    live = {r for _, ranges in open_ for r in ranges}
    policy.enter(open_, 11 * MB, ())  # used longest ago
    policy.enter(over, 11 * MB, live)
    assert policy.enter(third, 11 * MB, live).give_back == tuple(r for r, in (ranges for _, ranges in over))
    assert policy.n_held == 8 * MB


@pytest.mark.parametrize("room", [2, 7, 20, 50, 90, 99])
def test_a_stream_stays_in_its_room_and_reads_only_what_does_not_fit(room: int) -> None:
    uses = chain(100, MB)
    stream = split(uses, room * MB)
    ranges = [r for piece in stream.pieces for r in piece.ranges]
    assert ranges == [r for _, group in uses for r in group]  # all of them, in the graph's order
    assert stream.kept + stream.window <= room * MB
    assert stream.streamed == 100 * MB - stream.kept
    largest = max(piece.n_bytes for piece in stream.pieces)
    assert stream.window >= 2 * largest  # one is computed with while the next is read
    assert stream.kept >= room * MB - stream.window - largest
    ends = [piece.end for piece in stream.pieces[:-1]]
    assert ends == sorted(set(ends)) and all(end % 3 == 0 for end in ends)  # before a node that reads weights


def test_what_stays_is_evenly_spread() -> None:
    stream = split(chain(120, MB), 60 * MB)
    half = len(stream.pieces) // 2
    kept = [sum(p.n_bytes for p in part if p.stays) for part in (stream.pieces[:half], stream.pieces[half:])]
    assert stream.pieces[0].stays
    assert abs(kept[0] - kept[1]) <= 2 * max(p.n_bytes for p in stream.pieces)


def test_small_tensors_stay() -> None:
    uses: list[Use] = [(i, (((1 << 40) + i * 2 * MB, MB if i % 2 else 1000),)) for i in range(40)]
    stream = split(uses, 10 * MB)
    assert total(stream.small) == 20 * 1000
    assert all(r[1] == MB for piece in stream.pieces for r in piece.ranges)


# -- graphs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with Backend.cpu(2) as backend:
        yield backend


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrices, and vectors that are multiplied in after a norm: what ggml fuses. And a table."""
    rng = np.random.default_rng(0)
    tensors = {f"w{i}": rng.standard_normal((N, N), np.float32) / np.float32(N**0.5) for i in range(LAYERS)}
    tensors |= {f"v{i}": rng.standard_normal(N, np.float32) for i in range(LAYERS)}
    tensors["table"] = rng.standard_normal((4 * N, N), np.float32)
    path = tmp_path_factory.mktemp("chain") / "chain.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture
def weights(file: Path, backend: Backend) -> Iterator[Weights]:
    params = {f"w{i}": Param((N, N)) for i in range(LAYERS)} | {f"v{i}": Param((N,)) for i in range(LAYERS)}
    with load_params(params | {"table": Param((N, 4 * N))}, open_checkpoint(file), backend=backend,
                     component="chain") as weights:  # fmt: skip
        os.posix_fadvise(weights.files[0].fd, 0, 0, os.POSIX_FADV_DONTNEED)
        yield weights


def chain_graph(backend: Backend, weights: Weights, first: int = 0, last: int = LAYERS) -> Graph:
    graph = Graph(backend, n_nodes=16 + 8 * LAYERS)
    ids = graph.input((8,), Type.I32, name="ids")
    x = ops.get_rows(weights["table"], ids)
    for i in range(first, last):
        x = x + ops.mul_mat(weights[f"w{i}"], ops.mul(ops.rms_norm(x, 1e-6), weights[f"v{i}"]))
    graph.output(x, name="y")
    return graph


def in_memory(weights: Weights) -> int:
    """Bytes of the file that this process has mapped and present."""
    start, found = weights.files[0].address, 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            inside = int(head.split("-")[0], 16) == start
        elif inside and head == "Rss:":
            found += int(line.split()[1]) * 1024
    return found


IDS = np.arange(8, dtype=np.int32) * 3


@linux
def test_in_pieces_the_result_is_the_same_and_memory_stays_in_its_room(backend: Backend, weights: Weights) -> None:
    with chain_graph(backend, weights) as graph:
        expected = graph.compute(ids=IDS)["y"]
    everything = in_memory(weights)
    assert everything > LAYERS * MB
    keeper = Residency({"chain": weights}, room=lambda: Room(10 * MB, "a test"))
    with chain_graph(backend, weights) as graph:
        graph.set(ids=IDS)
        # Earlier pages are what somebody else left: give them back, so that what is there is this run's.
        weights.files[0].advise("dontneed")
        seen = []
        run_pieces = graph.run_pieces

        def watched(ends: list[int], before: object) -> None:
            def look(i: int) -> None:
                before(i)  # type: ignore[operator]
                seen.append(in_memory(weights))

            run_pieces(ends, look)

        graph.run_pieces = watched  # type: ignore[method-assign, assignment]
        for _ in range(3):
            keeper.run(graph)
            assert np.array_equal(graph.outputs["y"].numpy(), expected)
        stream = keeper.report.streams[-1]
        assert stream.passes == 3 and len(seen) > 3 * 4
        assert stream.kept + stream.per_pass == LAYERS * (MB + 4 * N)
        # The table's rows, and what lies between tensors, come with the pages around them.
        assert max(seen) < 10 * MB + MB
        assert in_memory(weights) < stream.kept + 2 * MB
        assert "stay" in keeper.report.decisions[-1]


@linux
def test_the_threads_that_compute_do_not_give_back(
    backend: Backend, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop, dropped = Residency._drop, dict.fromkeys(("the reader", "others"), 0)

    def watched(self: Residency, ranges: Iterable[Range]) -> None:
        ranges = list(ranges)
        reads = threading.current_thread().name == "pyggml weights"
        dropped["the reader" if reads else "others"] += total(ranges)
        drop(self, ranges)

    monkeypatch.setattr(Residency, "_drop", watched)
    keeper = Residency({"chain": weights}, room=lambda: Room(10 * MB, "a test"))
    with chain_graph(backend, weights) as graph:
        graph.set(ids=IDS)
        keeper.run(graph)
    stream = keeper.report.streams[-1]
    assert sum(dropped.values()) == stream.per_pass > 2 * stream.window
    assert dropped["others"] <= stream.window  # what is left when the pass is at its end


@linux
def test_with_room_nothing_is_done(backend: Backend, weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = Residency({"chain": weights}, room=lambda: Room(1 << 40, "a test"))
    with chain_graph(backend, weights) as graph:
        graph.set(ids=IDS)
        monkeypatch.setattr(graph, "run_pieces", None)
        monkeypatch.setattr(residency, "uses_of", None)  # not even looked at
        keeper.run(graph)
        keeper.run(graph)
    assert keeper.report.decisions == ["room for all weights"]
    assert not keeper.report.given_back and not keeper.report.streams


@linux
def test_graphs_that_take_turns_do_not_look_each_time(backend: Backend, weights: Weights) -> None:
    looks = []

    def room() -> Room:
        looks.append(1)
        return Room(1 << 40, "a test")

    keeper = Residency({"chain": weights}, room=room)
    with chain_graph(backend, weights, 0, 2) as first, chain_graph(backend, weights, 0, 3) as second:
        for graph in (first, second):
            graph.set(ids=IDS)
        for _ in range(5):
            keeper.run(first)
            keeper.run(second)
        assert len(looks) == 2
        keeper._plenty_until = 0.0  # a second later
        keeper.run(first)
        assert len(looks) == 3


@linux
def test_a_graph_that_needs_the_room_gets_that_of_the_one_before(backend: Backend, weights: Weights) -> None:
    rooms = [Room(1 << 40, "before"), Room(int(1.4 * LAYERS // 2 * MB * 4 / 3), "a test")]  # of which 3/4 are used
    keeper = Residency({"chain": weights}, room=lambda: rooms[0])
    half = LAYERS // 2
    with chain_graph(backend, weights, 0, half) as first, chain_graph(backend, weights, half, LAYERS) as second:
        for graph in (first, second):
            graph.set(ids=IDS)
        keeper.run(first)
        with_first = in_memory(weights)
        assert with_first >= half * MB
        rooms.pop(0)
        keeper.run(second)
        # It may run again: no more than is needed, and the table.
        assert half * MB // 2 < keeper.report.given_back["chain"] < (half + 4) * MB
        assert in_memory(weights) < with_first + half * MB // 2
        assert not keeper.report.streams


@linux
def test_a_graph_that_needs_the_room_gets_all_that_closed_ones_had(backend: Backend, weights: Weights) -> None:
    third = LAYERS // 3
    rooms = [Room(1 << 40, "before"), Room(int(2.8 * third * MB * 4 / 3), "a test")]  # of which 3/4 are used
    keeper = Residency({"chain": weights}, room=lambda: rooms[0])
    with chain_graph(backend, weights, third, 2 * third) as kept:
        with chain_graph(backend, weights, 0, third) as closed:
            for graph in (kept, closed):  # that of the kept one was used longest ago
                graph.set(ids=IDS)
                keeper.run(graph)
        rooms.pop(0)
        with chain_graph(backend, weights, 2 * third, 3 * third) as last:
            last.set(ids=IDS)
            keeper.run(last)
        assert keeper.report.given_back["chain"] == third * (MB + 4 * N) + 4 * MB  # and the table


@linux
def test_a_limit_counts_what_the_process_has_itself(weights: Weights) -> None:
    own = Memory.now().anonymous
    keeper = Residency({"chain": weights}, limit=own + 100 * MB, room=lambda: Room(1 << 40, "a test"))
    assert 50 * MB < keeper.room() < 100 * MB
    assert keeper.report.room_source == "the limit that was set"
    assert Residency({"chain": weights}, limit=1).room() == 0


@linux
def test_what_is_read_in_each_pass_is_known_before(backend: Backend, weights: Weights) -> None:
    for room, again in ((10 * MB, True), (1 << 30, False)):
        keeper = Residency({"chain": weights}, room=lambda room=room: Room(room, "a test"))  # type: ignore[misc]
        with chain_graph(backend, weights) as graph:
            assert keeper.reads_again(graph) is again
            graph.set(ids=IDS)
            keeper.run(graph)
            assert bool(keeper.report.streams) is again


@linux
def test_no_room_at_all_still_computes(backend: Backend, weights: Weights) -> None:
    keeper = Residency({"chain": weights}, room=lambda: Room(0, "a test"))
    with chain_graph(backend, weights) as graph:
        expected = graph.compute(ids=IDS)["y"]
        keeper.run(graph)
        assert np.array_equal(graph.outputs["y"].numpy(), expected)


@linux
def test_cancelling_a_stream_ends_its_reader(backend: Backend, weights: Weights) -> None:
    keeper = Residency({"chain": weights}, room=lambda: Room(8 * MB, "a test"))
    with chain_graph(backend, weights) as graph:
        graph.set(ids=IDS)
        calls = []

        def wait(self: object, i: int) -> float:
            calls.append(i)
            if i == 3:
                backend.cancel()
            return 0.0

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(residency._Reader, "wait", wait)
            with pytest.raises(Cancelled):
                keeper.run(graph)
        assert calls == [0, 1, 2, 3]
        assert not [t for t in threading.enumerate() if t.name == "pyggml weights"]
        keeper.run(graph)  # and goes on working
        assert keeper.report.streams[-1].passes == 1


def test_pieces_must_ascend(backend: Backend, weights: Weights) -> None:
    with chain_graph(backend, weights) as graph:
        graph.set(ids=IDS)
        for ends in ([5, 3], [10**6], [-1]):
            with pytest.raises(GGMLError, match="pieces"):
                graph.run_pieces(ends, lambda i: None)


def test_a_graph_is_measured_without_allocating(backend: Backend, weights: Weights) -> None:
    with chain_graph(backend, weights) as graph:
        buffer, work = graph.measure()
        assert graph.buffer_size == 0
        graph.alloc()
        assert graph.buffer_size == buffer == graph.measure()[0]
        assert work == 0
    with Graph(backend) as graph:
        x, w = graph.input((256, 9), name="x"), graph.input((256, 4), Type.F16, name="w")
        graph.output(ops.mul_mat(w, x), name="y")
        assert graph.measure()[1] >= 256 * 9 * 2  # x as f16, which the kernel multiplies with
