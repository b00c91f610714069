"""No order of closing, dropping or exiting crashes: children keep their parents, and closing is idempotent."""

from __future__ import annotations

import subprocess
import sys

import pytest

ORDERS = 25  # per process; eight processes make 200
SCRIPT = """
import gc, random, sys
import numpy as np
from pyggml import Backend, Buffer, ClosedError, Context, GGMLError, Graph, ops

first, n, at_exit = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "exit"

def things():
    backend = Backend.cpu(1)
    context = Context(4)
    w = context.new_tensor((8, 8), name="w")
    buffer = Buffer.allocate(context, backend.buffer_type)
    w.set(np.eye(8))
    memory = np.zeros(64, np.float32)
    wrapped = Buffer.from_memory(backend.device, memory.ctypes.data + (-memory.ctypes.data) % 32, 32, owner=memory)
    placed_in = Context(1)
    wrapped.place(placed_in.new_tensor((8,), name="b"), 0)
    b = next(placed_in.tensors())
    graph = Graph(backend, 32)
    x = graph.input((8, 2), name="x")
    y = graph.output(ops.mul_mat(w, x) + b, name="y")
    graph.compute(x=np.ones((2, 8)))
    other = Graph(backend, 32)
    z = other.output(other.input((8,), name="x") * 2.0, name="z")
    return dict(backend=backend, context=context, w=w, buffer=buffer, wrapped=wrapped, placed_in=placed_in, b=b,
                graph=graph, x=x, y=y, view=w.view(), result=y.view(), part=w.view()[2:, 3:], memory=memory,
                other=other, z=z)

def use(kept):
    for name, thing in kept.items():
        try:
            if isinstance(thing, np.ndarray):
                thing.sum()
            elif isinstance(thing, Graph):
                thing.compute(x=np.ones((2, 8) if name == "graph" else 8))
            elif hasattr(thing, "numpy"):
                thing.numpy(), repr(thing)
            else:
                repr(thing)
        except GGMLError:
            pass  # closed, or something it needs is

everything = []
for seed in range(first, first + n):
    choice = random.Random(seed)
    kept = things()
    names = list(kept)
    choice.shuffle(names)
    for name in names[: choice.randrange(len(names) + 1)] if at_exit else names:
        thing = kept[name]
        if hasattr(thing, "close") and choice.random() < 0.5:
            try:
                thing.close()
                thing.close()
            except GGMLError:
                pass  # views of it are alive
        else:
            del kept[name]
        del thing
        if choice.random() < 0.5:
            gc.collect()
        if choice.random() < 0.5:
            use(kept)
    if at_exit:
        everything.append(kept)
    kept = None
print("done")
"""


@pytest.mark.parametrize("how", ["drop", "exit"])
def test_random_orders(how: str) -> None:
    runs = [
        subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", SCRIPT, str(first), str(ORDERS), how],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for first in range(0, 4 * ORDERS, ORDERS)
    ]  # fmt: skip
    for run in runs:
        out, err = run.communicate(timeout=120)
        assert (run.returncode, out, err) == (0, "done\n", "")


def test_an_error_in_a_constructor_leaves_nothing_behind() -> None:
    from pyggml import Backend, Context, Device, GGMLError, OutOfMemory

    device = Backend.cpu(1).device
    with pytest.raises(GGMLError, match="n_threads"):
        Backend(device, 100_000)
    with pytest.raises(OutOfMemory):
        Context(2**50)
    with pytest.raises(GGMLError, match="no device"):
        Device.by_name("abacus")
