"""What is refused, and how: an exception with both shapes and the caller's line, and never the end of the process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyggml import Backend, Buffer, ClosedError, Context, GGMLError, Graph, ShapeError, Type, ops
from pyggml.lib import lib
from pyggml.types import Op

BACKEND = Backend.cpu(1)
ROOT = Path(__file__).parents[1]
F32, F16, BF16, I32, Q8 = Type.F32, Type.F16, Type.BF16, Type.I32, Type.Q8_0


@pytest.fixture
def graph() -> Any:
    with Graph(BACKEND, 256) as graph:
        yield graph


def test_a_wrong_shape_names_both_and_the_line(graph: Graph) -> None:
    x, w = graph.input((8, 4), name="x"), graph.input((7, 3), name="w")
    line = sys._getframe().f_lineno + 2
    with pytest.raises(ShapeError) as error:
        ops.mul_mat(w, x)
    message = str(error.value)
    assert "w: F32 [7, 3, 1, 1]" in message and "x: F32 [8, 4, 1, 1]" in message
    assert f"test_errors.py:{line}" in message
    assert ops.mul_mat(x, x).ne == (4, 4, 1, 1), "the graph goes on after a refusal"


REFUSED: list[tuple[str, Callable[[Graph], Any]]] = [
    ("add does not repeat", lambda g: g.input((8, 4)) + g.input((3,))),
    ("reshape count", lambda g: g.input((8, 4)).reshape(5, 5)),
    ("reshape rest", lambda g: g.input((8, 4)).reshape(3, -1)),
    ("reshape two rests", lambda g: g.input((8, 4)).reshape(-1, -1)),
    ("reshape strided", lambda g: g.input((8, 4)).transpose().reshape(32)),
    ("reshape five", lambda g: g.input((8, 4)).reshape(2, 2, 2, 2, 2)),
    ("narrow beyond", lambda g: g.input((8, 4)).narrow(0, 6, 3)),
    ("narrow before", lambda g: g.input((8, 4)).narrow(0, -1, 3)),
    ("narrow in a block", lambda g: g.input((64, 4), Q8).narrow(0, 16, 32)),
    ("view beyond", lambda g: ops.view(g.input((8, 4)), (8, 4), (32,), 4)),
    ("view stride beyond", lambda g: ops.view(g.input((8, 4)), (8, 4), (64,))),
    ("view negative", lambda g: ops.view(g.input((8, 4)), (8, 4), (32,), -4)),
    ("permute twice the same", lambda g: ops.permute(g.input((8, 4)), 0, 0, 2, 3)),
    ("concat sizes", lambda g: ops.concat(g.input((8, 4)), g.input((7, 4)), 1)),
    ("concat types", lambda g: ops.concat(g.input((8, 4)), g.input((8, 4), F16), 1)),
    ("concat dimension", lambda g: ops.concat(g.input((8, 4)), g.input((8, 4)), 4)),
    ("repeat", lambda g: ops.repeat(g.input((8, 4)), (12, 4))),
    ("mul_mat batch", lambda g: ops.mul_mat(g.input((8, 4, 3)), g.input((8, 4, 2)))),
    ("mul_mat transposed", lambda g: ops.mul_mat(g.input((4, 8)).transpose(), g.input((8, 4)))),
    ("mul_mat ints", lambda g: ops.mul_mat(g.input((8, 4), I32), g.input((8, 4)))),
    ("mul_mat second type", lambda g: ops.mul_mat(g.input((32, 4), Q8), g.input((32, 4), F16))),
    ("mul_mat strided", lambda g: ops.mul_mat(g.input((8, 4)), g.input((4, 8)).transpose())),
    ("mul_mat empty", lambda g: ops.mul_mat(g.input((8, 4, 0)), g.input((8, 4)))),
    ("add ints", lambda g: g.input((8,), I32) + g.input((8,), I32)),
    ("mul f32 by f16", lambda g: g.input((8,)) * g.input((8,), F16)),
    ("add quantised of another shape", lambda g: ops.add(g.input((32, 2), Q8), g.input((32,)))),
    ("scale f16", lambda g: g.input((8,), F16) * 2.0),
    ("scale strided", lambda g: g.input((8, 4)).transpose() * 2.0),
    ("silu ints", lambda g: g.input((8,), I32).silu()),
    ("silu strided", lambda g: g.input((8, 4)).transpose().silu()),
    ("silu quantised", lambda g: g.input((32,), Q8).silu()),
    ("norm f16", lambda g: g.input((8,), F16).rms_norm()),
    ("norm strided", lambda g: g.input((8, 4)).transpose().norm()),
    ("norm eps", lambda g: ops.rms_norm(g.input((8,)), -1.0)),
    ("no groups", lambda g: ops.group_norm(g.input((8, 8, 4)), 0)),
    ("sum ints", lambda g: g.input((8,), I32).sum()),
    ("soft_max f16", lambda g: g.input((8,), F16).soft_max()),
    ("soft_max mask", lambda g: ops.soft_max_ext(g.input((8, 4)), g.input((7, 4)))),
    ("soft_max mask type", lambda g: ops.soft_max_ext(g.input((8, 4)), g.input((8, 4), I32))),
    ("rope positions", lambda g: ops.rope_ext(g.input((8, 2, 4)), g.input((3,), I32), 8)),
    ("rope positions type", lambda g: ops.rope_ext(g.input((8, 2, 4)), g.input((4,)), 8)),
    ("rope odd", lambda g: ops.rope_ext(g.input((8, 2, 4)), g.input((4,), I32), 7)),
    ("rope too long", lambda g: ops.rope_ext(g.input((8, 2, 4)), g.input((4,), I32), 10)),
    ("rope mode", lambda g: ops.rope_ext(g.input((8, 2, 4)), g.input((4,), I32), 8, 7)),
    ("rope bf16", lambda g: ops.rope_ext(g.input((8, 2, 4), BF16), g.input((4,), I32), 8)),
    ("flash mask f32", lambda g: ops.flash_attn_ext(*[g.input((8, 4, 2)) for _ in range(3)], g.input((4, 4)))),
    ("flash mask small", lambda g: ops.flash_attn_ext(*[g.input((8, 4, 2)) for _ in range(3)], g.input((2, 4), F16))),
    ("flash q f16", lambda g: ops.flash_attn_ext(*[g.input((8, 4, 2), F16) for _ in range(3)])),
    ("flash values", lambda g: ops.flash_attn_ext(g.input((8, 4)), g.input((8, 6)), g.input((8, 5)))),
    ("flash sinks", lambda g: ops.flash_attn_ext(*[g.input((8, 4, 2)) for _ in range(3)], sinks=g.input((3,)))),
    ("get_rows float ids", lambda g: ops.get_rows(g.input((8, 4)), g.input((4,)))),
    ("set_rows rows f16", lambda g: ops.set_rows(g.input((8, 4)), g.input((8, 2), F16), g.input((2,), Type.I64))),
    ("cast ints", lambda g: g.input((8,), I32).cast(F16)),
    ("cast to importance", lambda g: g.input((256,)).cast(Type.IQ2_XXS)),
    ("cast broken blocks", lambda g: g.input((40,)).cast(Q8)),
    ("cpy count", lambda g: ops.cpy(g.input((8,)), g.input((7,)))),
    ("cpy type", lambda g: ops.cpy(g.input((32,), Q8), g.input((32,), F16))),
    ("conv channels", lambda g: ops.conv_2d(g.input((3, 3, 4, 5), F16), g.input((8, 8, 3)))),
    ("conv_direct channels", lambda g: ops.conv_2d_direct(g.input((3, 3, 4, 5)), g.input((8, 8, 3)))),
    ("conv image type", lambda g: ops.conv_2d_direct(g.input((3, 3, 4, 5)), g.input((8, 8, 4), F16))),
    ("conv too large", lambda g: ops.conv_2d(g.input((3, 3, 4, 5), F16), g.input((2, 2, 4)))),
    ("pool f64", lambda g: ops.pool_2d(g.input((8, 8), Type.F64), 0, 2, 2)),
    ("upscale by one", lambda g: ops.upscale(g.input((8, 8)), 1)),
    ("upscale f16", lambda g: ops.upscale(g.input((8, 8), F16), 2)),
    ("top_k", lambda g: ops.top_k(g.input((8,)), 9)),
    ("mask", lambda g: ops.diag_mask_inf(g.input((8, 8)), -1)),
    ("acc beyond", lambda g: ops.acc(g.input((8,)), g.input((4,)), 32, 32, 32, 20)),
    ("set beyond", lambda g: ops.set(g.input((8,)), g.input((4,)), 20)),
    ("glu shapes", lambda g: ops.swiglu_split(g.input((8,)), g.input((4,)))),
    ("glu odd", lambda g: ops.swiglu(g.input((7,)))),
    ("shape of fractions", lambda g: g.input((8.5, 2))),  # type: ignore[arg-type]
    ("negative shape", lambda g: g.input((-8, 2))),
    ("huge shape", lambda g: g.input((2**40, 2**40))),
]


@pytest.mark.parametrize("build", [row[1] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(graph: Graph, build: Callable[[Graph], Any]) -> None:
    with pytest.raises(ShapeError):
        build(graph)
    x = graph.input((4,), name="after")
    graph.output(x + 1.0, name="y")
    inputs = {name: np.zeros(0) for name in ()}
    graph.inputs = {"after": x}  # the refused node's inputs are used by nothing
    assert graph.compute(after=np.zeros(4), **inputs)["y"].tolist() == [1.0] * 4


def test_a_full_graph_says_so() -> None:
    with Graph(BACKEND, 8) as graph:
        x = graph.input((4,), name="x")
        with pytest.raises(GGMLError, match="no room for another tensor") as error:
            for _ in range(100):
                x = x + 1.0
        assert not isinstance(error.value, ShapeError)


def test_other_graphs_weights_and_closed_things(graph: Graph) -> None:
    x = graph.input((4,), name="x")
    with Graph(BACKEND) as other, pytest.raises(GGMLError, match="another graph"):
        x + other.input((4,))
    context = Context(4)
    w = context.new_tensor((4,), name="w")
    with pytest.raises(GGMLError, match="no data"):
        x + w
    buffer = Buffer.allocate(context, BACKEND.buffer_type)
    assert buffer
    with pytest.raises(GGMLError, match=r"graph\.use"):
        w + w
    w.set(np.ones(4))
    graph.output(graph.use(w) + w + x, name="y")
    assert graph.compute(x=np.ones(4))["y"].tolist() == [3.0] * 4
    buffer.close()
    with pytest.raises(ClosedError):
        graph.compute(x=np.ones(4))
    context.close()
    with pytest.raises(ClosedError):
        w + x
    graph.close()
    with pytest.raises(ClosedError):
        x + 1.0
    with pytest.raises(ClosedError):
        graph.compute(x=np.ones(4))


def test_only_tensors_are_arguments(graph: Graph) -> None:
    x = graph.input((4,))
    for wrong in (np.zeros(4), "a", [1.0]):
        with pytest.raises(TypeError):
            x + wrong  # type: ignore[operator]
        with pytest.raises(TypeError):
            wrong + x  # type: ignore[operator]
    with pytest.raises(TypeError, match="make it an input"):
        ops.add(x, np.zeros(4))  # type: ignore[arg-type]


def test_read_only_weights_are_not_overwritten(graph: Graph) -> None:
    context = Context(1)
    w = context.new_tensor((8,), name="w")
    raw = np.zeros(64 + 8, np.float32)
    start = (-raw.ctypes.data) % 64
    buffer = Buffer.from_memory(BACKEND.device, raw.ctypes.data + start, 128, owner=raw, read_only=True)
    buffer.place(w, 0)
    x = graph.input((8,), name="x")
    graph.add(ops.cpy(x, w))
    with pytest.raises(GGMLError, match="overwrite read-only weights"):
        graph.compute(x=np.ones(8))


# What the kernels would take: every layout and type, computed in a process that would die of an assert.
TYPES = [F32, F16, BF16, I32, Type.I8, Type.I16, Type.I64, Type.F64, Q8, Type.Q4_K, Type.IQ2_XXS, Type.Q8_K]


def one_of_each(graph: Graph) -> list[Any]:
    """Tensors of every type; contiguous, transposed, with gaps between rows, permuted."""
    found = []
    for type in TYPES:
        n = max(16, type.block_size)
        x = graph.input((n, 16, 4), type, name=type.name)
        found += [x, x.narrow(1, 0, 4), x.permute(0, 2, 1, 3)]
        if type.block_size == 1:
            found += [x.transpose(), x.narrow(0, 0, 8), x.permute(2, 1, 0, 3)]
    return found


def survive_all_unary() -> int:
    """Build every function of one tensor with every layout and type, and compute what is not refused."""
    calls: list[Callable[[Any], Any]] = [
        ops.sqr, ops.sqrt, ops.exp, ops.log, ops.neg, ops.abs, ops.floor, ops.relu, ops.silu, ops.gelu, ops.gelu_erf,
        ops.gelu_quick, ops.tanh, ops.elu, ops.hardswish, ops.softplus, ops.sum, ops.sum_rows, ops.mean, ops.cumsum,
        ops.argsort, ops.norm, ops.rms_norm, ops.l2_norm, ops.soft_max, ops.cont, ops.dup, ops.swiglu, ops.geglu,
        ops.reglu, ops.transpose, lambda x: ops.argmax(x), lambda x: ops.scale(x, 2.0), lambda x: ops.fill(x, 1.0),
        lambda x: ops.clamp(x, 0, 1), lambda x: ops.leaky_relu(x, 0.1), lambda x: ops.xielu(x, 1, 1, 1, 0),
        lambda x: ops.group_norm(x, 2), lambda x: ops.diag_mask_inf(x, 0), lambda x: ops.upscale(x, 2),
        lambda x: ops.repeat(x, [2 * n for n in x.ne]), lambda x: ops.pad(x, 1),
        lambda x: ops.roll(x, 1), lambda x: ops.pool_2d(x, 0, 2, 2),
        lambda x: ops.pool_1d(x, 1, 2, 2), lambda x: ops.pad_reflect_1d(x, 1, 1), lambda x: ops.win_part(x, 3),
        lambda x: ops.top_k(x, 3), lambda x: ops.timestep_embedding(x, 8), lambda x: ops.tri(x, 0), ops.diag,
        *[lambda x, t=t: ops.cast(x, t) for t in TYPES],
    ]  # fmt: skip
    pairs: list[Callable[[Any, Any], Any]] = [
        ops.add, ops.sub, ops.mul, ops.div, ops.mul_mat, ops.out_prod, ops.cpy, ops.swiglu_split, ops.silu_back,
        ops.get_rows, ops.soft_max_ext, ops.count_equal, ops.cross_entropy_loss, ops.rms_norm_back, ops.ssm_conv,
        lambda a, b: ops.concat(a, b, 1), lambda a, b: ops.rope(a, b, 8), lambda a, b: ops.conv_2d(a, b),
        lambda a, b: ops.conv_2d_direct(a, b), lambda a, b: ops.flash_attn_ext(a, b, b),
        lambda a, b: ops.im2col(a, b, padding=1),
    ]  # fmt: skip
    n_computed = 0

    def attempt(build: Callable[[Graph], Any]) -> None:
        nonlocal n_computed
        with Graph(BACKEND, 512) as graph:
            try:
                node = build(graph)
                if node.op == Op.NONE:
                    return
                graph.add(node)
                graph.inputs = {}  # zeros will do
                fill_with_zeros(graph)
            except ShapeError:
                return
            graph.run()
            n_computed += 1

    for call in calls:
        for i in range(60):
            attempt(lambda g, i=i, call=call: call(one_of_each(g)[i]))
    for pair in pairs:
        for i in range(60):
            for j in range(i % 3, 60, 3):
                attempt(lambda g, i=i, j=j, pair=pair: (lambda t: pair(t[i], t[j]))(one_of_each(g)))
    return n_computed


def fill_with_zeros(graph: Graph) -> None:
    """Zero the compute buffer: row numbers must be in range."""
    graph.alloc()
    for tensor in graph.tensors():
        if tensor.has_data and tensor.ptr.buffer and tensor.is_contiguous:
            lib.ggml_backend_tensor_memset(tensor.ptr, 0, 0, tensor.n_bytes)


def test_whatever_is_not_refused_computes() -> None:
    code = "import tests.test_errors as t; print(t.survive_all_unary())"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=250, check=False, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout) > 500
