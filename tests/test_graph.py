"""Graphs: computed many times, looked into, timed, cancelled, interrupted; threads."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pyggml import Backend, Cancelled, GGMLError, Graph, OutOfMemory, ShapeError, Tensor, ops, summarise

BACKEND = Backend.cpu(2)


def slow_graph(backend: Backend, n: int = 256, layers: int = 400) -> Graph:
    graph = Graph(backend, 2 * layers + 16)
    x = graph.input((n, n), name="x")
    y = x
    for _ in range(layers):
        y = ops.mul_mat(x, y)
    graph.output(y, name="y")
    return graph


def test_computed_many_times_with_new_inputs() -> None:
    with Graph(BACKEND) as graph:
        a, b = graph.input((5, 3), name="a"), graph.input((5,), name="b")
        graph.output(a * b + 1.0, name="y")
        graph.output(a.sum(), name="sum")
        for i in range(20):
            x = np.full((3, 5), i, np.float32)
            result = graph.compute(a=x, b=np.arange(5))
            assert np.array_equal(result["y"], x * np.arange(5) + 1)
            assert result["sum"] == x.sum()
        kept = graph.compute(a=np.ones((3, 5)))  # b stays
        assert np.array_equal(kept["y"], np.ones((3, 5)) * np.arange(5) + 1)
        assert graph.buffer_size > 0


def test_what_is_wrong_with_a_graph_is_said() -> None:
    with Graph(BACKEND) as graph:
        with pytest.raises(GGMLError, match="empty"):
            graph.compute()
        x = graph.input((4,), name="x")
        with pytest.raises(GGMLError, match="already"):
            graph.input((4,), name="x")
        with pytest.raises(GGMLError, match="computed by nothing"):
            graph.output(x)
        y = graph.output(x + 1.0, name="y")
        with pytest.raises(GGMLError, match="already"):
            graph.output(y, name="y")
        with pytest.raises(GGMLError, match="no input 'z'"):
            graph.compute(z=[1.0])
        with pytest.raises(ShapeError):
            graph.compute(x=[1.0])
        with pytest.raises(GGMLError, match="allocated"):
            graph.input((4,), name="late")
    with Graph(BACKEND) as graph:
        graph.input((4,), name="unused")
        graph.output(graph.input((4,), name="x") + 1.0)
        with pytest.raises(GGMLError, match="depends on the input 'unused'"):
            graph.alloc()
    with Graph(BACKEND) as graph:
        x = graph.input((2**30,), name="x")
        graph.output(x.reshape(2**15, -1).repeat((2**15, 2**15, 2**10)), name="y")
        with pytest.raises(OutOfMemory, match="bytes are free"):
            graph.alloc()


def test_each_shows_every_node_and_profile_times_it() -> None:
    with Graph(BACKEND) as graph:
        x = graph.input((4,), name="x")
        y = x * 2.0
        y.name = "double"
        graph.output((y + 1.0).sum(), name="z")
        graph.set(x=np.arange(4))
        seen: dict[str, Any] = {}
        graph.each(lambda node: seen.__setitem__(node.name, node.numpy().tolist()))
        assert seen["double"] == [0, 2, 4, 6] and seen["z"] == [16.0]

        def stop(node: Tensor) -> bool:
            return node.name != "double"

        with pytest.raises(Cancelled, match="double"):
            graph.each(stop)
        times = graph.profile()
        assert [t.op for t in times] == ["scale", "scale", "sum"] and all(t.seconds >= 0 for t in times)
        assert summarise(times)["scale"][0] == 2


def test_a_callback_may_raise() -> None:
    def fail(node: Tensor) -> None:
        raise KeyError("mine")

    with Graph(BACKEND) as graph:
        graph.output(graph.input((4,), name="x") + 1.0, name="y")
        graph.set(x=np.zeros(4))
        with pytest.raises(KeyError, match="mine"):
            graph.each(fail)
        assert graph.compute(x=np.zeros(4))["y"].tolist() == [1.0] * 4


def test_cancelled_from_another_thread_and_usable_afterwards() -> None:
    backend = Backend.cpu(1)
    with slow_graph(backend) as graph:
        x = np.eye(256, dtype=np.float32)
        start = time.monotonic()
        graph.compute(x=x)
        whole = time.monotonic() - start
        timer = threading.Timer(whole / 10, backend.cancel)
        start = time.monotonic()
        timer.start()
        with pytest.raises(Cancelled):
            graph.compute(x=x)
        assert time.monotonic() - start < whole
        timer.join()
        assert np.array_equal(graph.compute(x=x)["y"], x)
        backend.cancel()  # nothing runs: nothing happens
        assert np.array_equal(graph.compute(x=x)["y"], x)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("how", ["compute", "profile"])
def test_interrupt_stops_within_an_operation(how: str) -> None:
    code = f"""
import sys, time
import numpy as np
from tests.test_graph import slow_graph, Backend
graph = slow_graph(Backend.cpu(1), 256, 1000)
graph.compute(x=np.eye(256))
graph.set(x=np.eye(256))
print("ready", flush=True)
start = time.monotonic()
try:
    while time.monotonic() - start < 60:
        graph.{"run" if how == "compute" else "profile"}()
except KeyboardInterrupt:
    late = time.monotonic() - start
    assert np.array_equal(graph.compute(x=np.eye(256))["y"], np.eye(256))
    print(f"interrupted {{late:.3f}}", flush=True)
    sys.exit(130)
"""
    run = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert run.stdout and run.stdout.readline() == "ready\n"
    time.sleep(0.3)
    sent = time.monotonic()
    run.send_signal(signal.SIGINT)
    line = run.stdout.readline()
    seconds = time.monotonic() - sent
    _, err = run.communicate(timeout=60)
    assert line.startswith("interrupted"), err
    assert run.returncode == 130 and seconds < 20


def test_threads_are_kept() -> None:
    process = psutil.Process()
    backend = Backend.cpu(2)
    with Graph(backend) as graph:
        x = graph.input((256, 256), name="x")
        graph.output(ops.mul_mat(x, x), name="y")
        graph.compute(x=np.ones((256, 256)))
        before = process.num_threads()
        for _ in range(50):
            graph.run()
            assert process.num_threads() == before
    backend.close()
    until = time.monotonic() + 10  # a thread that was joined may still be listed for a moment
    while process.num_threads() != before - 1 and time.monotonic() < until:
        time.sleep(0.01)
    assert process.num_threads() == before - 1


def test_refusals_from_several_threads_do_not_mix() -> None:
    wrong: list[str] = []

    def work(n: int) -> None:
        with Graph(BACKEND, 64) as graph:
            x, w = graph.input((n, 2), name="x"), graph.input((n + 1, 3), name="w")
            for _ in range(300):
                try:
                    ops.mul_mat(w, x)
                    wrong.append("not refused")
                except ShapeError as error:
                    if f"[{n}, 2, 1, 1]" not in str(error) or "can_mul_mat" not in str(error):
                        wrong.append(str(error))
                try:
                    ops.add(x, w)
                    wrong.append("not refused")
                except ShapeError as error:
                    if "can_repeat" not in str(error):
                        wrong.append(str(error))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(10, 18)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_several_backends_compute_at_once() -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with slow_graph(Backend.cpu(1), 64, 50) as graph:
                for _ in range(20):
                    assert np.array_equal(graph.compute(x=np.eye(64))["y"], np.eye(64))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_gradients_of_a_small_network() -> None:
    from pyggml import Buffer, Context

    rng = np.random.default_rng(0)
    context = Context(2)
    w1, w2 = context.new_tensor((3, 4), name="w1"), context.new_tensor((4, 1), name="w2")
    Buffer.allocate(context, BACKEND.buffer_type)
    a1, a2 = rng.normal(size=(4, 3)), rng.normal(size=(1, 4))
    w1.set(a1), w2.set(a2)
    x = rng.normal(size=(5, 3))
    with Graph(BACKEND, 256, grads=True) as graph:
        p1, p2 = graph.param(w1), graph.param(w2)
        hidden = ops.mul_mat(p1, graph.input((3, 5), name="x")).silu()
        loss = ops.mul_mat(p2, hidden).sqr().sum()
        grads = graph.backward(loss, [p1, p2])
        for i, grad in enumerate(grads):
            graph.output(grad, name=f"g{i}")
        graph.output(loss, name="loss")
        result = graph.compute(x=x)

    def value(a1: Any, a2: Any) -> float:
        h = x @ a1.T
        return float((((h / (1 + np.exp(-h))) @ a2.T) ** 2).sum())

    assert np.isclose(result["loss"][0], value(a1, a2), rtol=1e-4)
    for i, j in ((0, 0), (3, 2)):
        step = np.zeros_like(a1)
        step[i, j] = 1e-4
        numeric = (value(a1 + step, a2) - value(a1 - step, a2)) / 2e-4
        assert np.isclose(result["g0"][i, j], numeric, rtol=1e-2)
    with Graph(BACKEND, 64, grads=True) as graph:
        p1 = graph.param(w1)
        with pytest.raises(ShapeError, match="one f32 element"):
            graph.backward(ops.mul_mat(p1, graph.input((3, 5))), [p1])
        with pytest.raises(GGMLError, match="gives up"):
            graph.backward(ops.floor(ops.mul_mat(p1, graph.input((3, 5)))).sum(), [p1])
