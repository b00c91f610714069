"""Every operation against numpy, one line each. Shapes are in ne order; the arrays have them reversed."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyggml import Backend, Buffer, Context, Graph, ShapeError, Type, ops
from pyggml.lib import ffi, lib
from pyggml.types import PoolOp, Prec, ScaleMode, SortOrder, TriType

BACKEND = Backend.cpu(1)
F32, F16, BF16, I32 = Type.F32, Type.F16, Type.BF16, Type.I32
TOLERANCE = {F32: 1e-5, F16: 2e-3, BF16: 1.6e-2}


def values(ne: tuple[int, ...], seed: int = 0, low: float = -2.0, high: float = 2.0) -> Any:
    return np.random.default_rng(seed).uniform(low, high, ne[::-1]).astype(np.float32)


def run(build: Callable[..., Any], arrays: list[Any], types: list[Type]) -> Any:
    """The result of one operation on arrays given as inputs."""
    with Graph(BACKEND, 64) as graph:
        inputs = [
            graph.input(a.shape[::-1], t, name=f"x{i}") for i, (a, t) in enumerate(zip(arrays, types, strict=True))
        ]
        graph.output(build(*inputs), name="y")
        return graph.compute(**{f"x{i}": a for i, a in enumerate(arrays)})["y"]


def as_stored(array: Any, type: Type) -> Any:
    """The array after a round trip through `type`: what the operation really sees."""
    if type is F16:
        return array.astype(np.float16).astype(np.float32)
    if type is BF16:
        bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return rounded.astype(np.uint32).view(np.float32)
    return array


def check_op(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    *shapes: tuple[int, ...],
    type: Type = F32,
    low: float = -2.0,
    high: float = 2.0,
    tolerance: float | None = None,
    arrays: list[Any] | None = None,
    types: list[Type] | None = None,
    **kwargs: Any,
) -> None:
    """Compare `op(*inputs, **kwargs)` with `reference(*arrays)`; relative to the largest value, per type."""
    arrays = arrays if arrays is not None else [values(ne, i, low, high) for i, ne in enumerate(shapes)]
    types = types or [type] * len(arrays)
    result = run(lambda *x: op(*x, **kwargs), arrays, types)
    wanted = np.asarray(reference(*[as_stored(a, t) for a, t in zip(arrays, types, strict=True)]))
    assert result.reshape(-1).shape == wanted.reshape(-1).shape, (result.shape, wanted.shape)
    limit = tolerance or max(TOLERANCE.get(t, 0.0) for t in types)
    wanted = wanted.reshape(result.shape).astype(np.float64)
    same = result == wanted  # infinities
    error = np.abs(np.where(same, 0, result.astype(np.float64) - np.where(same, 0, wanted)))
    assert error.max(initial=0) <= limit * max(1.0, np.abs(np.where(same, 0, wanted)).max(initial=0)), error.max()


# -- references -------------------------------------------------------------------------------------------------------


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def gelu(x: Any) -> Any:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


erf = np.vectorize(math.erf)


def rms_norm(x: Any, eps: float) -> Any:
    return x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + eps)


def layer_norm(x: Any, eps: float) -> Any:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def soft_max(x: Any) -> Any:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def conv_2d(k: Any, x: Any, stride: int = 1, padding: int = 0, dilation: int = 1, depthwise: bool = False) -> Any:
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    (n, _, h, w), (oc, _, kh, kw) = x.shape, k.shape
    oh, ow = (h - dilation * (kh - 1) - 1) // stride + 1, (w - dilation * (kw - 1) - 1) // stride + 1
    out = np.zeros((n, oc, oh, ow))
    for i in range(kh):
        for j in range(kw):
            part = x[:, :, i * dilation :, j * dilation :][:, :, : oh * stride : stride, : ow * stride : stride]
            out += (
                part * k[:, 0, i, j][None, :, None, None]
                if depthwise
                else np.einsum("nchw,oc->nohw", part, k[:, :, i, j])
            )
    return out


def rope(x: Any, positions: Any, n_dims: int, neox: bool, base: float = 10000.0, sign: int = 1) -> Any:
    out = x.astype(np.float64).copy()
    i = np.arange(n_dims // 2)
    angle = sign * positions[:, None] * base ** (-2.0 * i / n_dims)  # [token, pair]
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first, second = (i, i + n_dims // 2) if neox else (2 * i, 2 * i + 1)
    a, b = x[..., first], x[..., second]
    out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
    return out


def attention(q: Any, k: Any, v: Any, mask: Any = 0.0, scale: float = 1.0) -> Any:
    k, v = (np.repeat(t, q.shape[0] // t.shape[0], 0) for t in (k, v))
    return (soft_max(q @ k.swapaxes(-1, -2) * scale + mask) @ v).swapaxes(0, 1)


# -- element by element -----------------------------------------------------------------------------------------------

UNARY: list[tuple[Any, Any, float, float]] = [
    (ops.sqr, np.square, -2, 2),
    (ops.sqrt, np.sqrt, 0.1, 4),
    (ops.exp, np.exp, -2, 2),
    (ops.expm1, np.expm1, -2, 2),
    (ops.log, np.log, 0.1, 4),
    (ops.sin, np.sin, -6, 6),
    (ops.cos, np.cos, -6, 6),
    (ops.neg, np.negative, -2, 2),
    (ops.abs, np.abs, -2, 2),
    (ops.sgn, np.sign, -2, 2),
    (ops.step, lambda x: x > 0, -2, 2),
    (ops.floor, np.floor, -5, 5),
    (ops.ceil, np.ceil, -5, 5),
    (ops.trunc, np.trunc, -5, 5),
    (ops.round, lambda x: np.trunc(x + np.copysign(0.5, x)), -5, 5),
    (ops.relu, lambda x: np.maximum(x, 0), -2, 2),
    (ops.elu, lambda x: np.where(x > 0, x, np.expm1(x)), -2, 2),
    (ops.tanh, np.tanh, -3, 3),
    (ops.sigmoid, sigmoid, -6, 6),
    (ops.silu, lambda x: x * sigmoid(x), -6, 6),
    (ops.gelu_erf, lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))), -4, 4),
    (ops.hardswish, lambda x: x * np.clip(x + 3, 0, 6) / 6, -5, 5),
    (ops.hardsigmoid, lambda x: np.clip(x + 3, 0, 6) / 6, -5, 5),
    (ops.softplus, lambda x: np.log1p(np.exp(x)), -5, 5),
]


@pytest.mark.parametrize("type", [F32, F16, BF16], ids=lambda t: t.name)
@pytest.mark.parametrize(("op", "reference", "low", "high"), UNARY, ids=[row[0].__name__ for row in UNARY])
def test_unary(op: Any, reference: Any, low: float, high: float, type: Type) -> None:
    check_op(op, reference, (37, 5, 3), type=type, low=low, high=high)


@pytest.mark.parametrize("op", [row[0] for row in UNARY if "inplace" in inspect.signature(row[0]).parameters])
def test_in_place_gives_the_same_in_the_same_memory(op: Any) -> None:
    x = values((16, 4), low=0.5, high=2.0)
    with Graph(BACKEND, 16) as graph:
        a = graph.input((16, 4), name="a")
        source = a * 1.0
        graph.output(op(source, inplace=True), name="y")
        y = graph.compute(a=x)["y"]
        assert source.ptr.data == graph.outputs["y"].ptr.data
    assert np.array_equal(y, run(op, [x], [F32]))


@pytest.mark.parametrize("type", [F32, F16, BF16], ids=lambda t: t.name)
@pytest.mark.parametrize(
    ("op", "reference"), [(ops.add, np.add), (ops.sub, np.subtract), (ops.mul, np.multiply), (ops.div, np.divide)]
)
@pytest.mark.parametrize("second", [(16, 6, 4), (16,), (1, 6), (8, 3, 2), (1, 1, 4)])
def test_binary(op: Any, reference: Any, second: tuple[int, ...], type: Type) -> None:
    def repeated(a: Any, b: Any) -> Any:
        b = b.reshape((1,) * (3 - b.ndim) + b.shape)
        return reference(a, np.tile(b, [n // m for n, m in zip(a.shape, b.shape, strict=True)]))

    check_op(op, repeated, (16, 6, 4), second, type=type, low=0.5)
    check_op(op, repeated, (16, 6, 4), second, types=[type, F32], low=0.5)


def test_arithmetic() -> None:
    check_op(ops.scale, lambda x: 3 * x, (33, 5), s=3.0)
    check_op(ops.scale, lambda x: 3 * x - 1, (33, 5), s=3.0, bias=-1.0)
    check_op(ops.fill, lambda x: x * 0 + 7, (33, 5), value=7.0)
    check_op(lambda x: ops.clamp(x, -1.0, 0.5), lambda x: np.clip(x, -1, 0.5), (33, 5))
    check_op(lambda x: ops.clamp(x, -1.0, 0.5), lambda x: np.clip(x, -1, 0.5), (33, 5), type=F16)
    check_op(lambda a, b: ops.add_cast(a, b, F32), lambda a, b: a + b, (32, 5), (32, 5), types=[F16, F32])
    ids = np.array([[2, 0], [1, 2]], np.int32)
    check_op(
        ops.add_id, lambda a, b, i: a + b[i], arrays=[values((8, 2, 2)), values((8, 3), 1), ids], types=[F32, F32, I32]
    )

    def accumulated(a: Any, b: Any) -> Any:
        a = a.copy()
        a[1:3, 2:6] += b
        return a

    check_op(lambda a, b: ops.acc(a, b, 32, 160, 160, 32 + 8), accumulated, (8, 5), (4, 2))


def test_activations_with_parameters() -> None:
    check_op(ops.leaky_relu, lambda x: np.where(x > 0, x, 0.1 * x), (33, 5), negative_slope=0.1)
    check_op(ops.gelu, gelu, (64, 9), tolerance=2e-3)
    check_op(ops.gelu_quick, lambda x: x * sigmoid(1.702 * x), (64, 9), tolerance=2e-3)
    n, p, beta, eps = 0.3, 0.7, 0.5, -1e-6
    soft = lambda x: np.log1p(np.exp(x))  # noqa: E731
    check_op(
        lambda x: ops.xielu(x, n, p, beta, eps),
        lambda x: np.where(
            x > 0, soft(p) * x * x + beta * x, (np.expm1(np.minimum(x, eps)) - x) * (beta + soft(n)) + beta * x
        ),
        (64, 9),
    )


GLU = [
    ("reglu", lambda x: np.maximum(x, 0), 1e-5),
    ("geglu", gelu, 2e-3),
    ("swiglu", lambda x: x * sigmoid(x), 1e-5),
    ("geglu_erf", lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))), 1e-5),
    ("geglu_quick", lambda x: x * sigmoid(1.702 * x), 2e-3),
]


@pytest.mark.parametrize(("name", "act", "tolerance"), GLU, ids=[row[0] for row in GLU])
def test_gated(name: str, act: Any, tolerance: float) -> None:
    op, split = getattr(ops, name), getattr(ops, f"{name}_split")
    check_op(op, lambda x: act(x[..., :16]) * x[..., 16:], (32, 5, 2), tolerance=tolerance)
    check_op(op, lambda x: act(x[..., 16:]) * x[..., :16], (32, 5, 2), tolerance=tolerance, swapped=True)
    check_op(split, lambda a, b: act(a) * b, (16, 5), (16, 5), tolerance=tolerance)
    check_op(split, lambda a, b: act(a) * b, (16, 5), (16, 5), type=F16, tolerance=4e-3)


def test_gated_with_limits() -> None:
    def oai(g: Any, u: Any) -> Any:
        g, u = np.minimum(g, 1.0), np.clip(u, -1.0, 1.0)
        return g * sigmoid(1.7 * g) * (u + 1)

    check_op(ops.swiglu_oai, oai, (16, 5), (16, 5), alpha=1.7, limit=1.0)
    check_op(
        ops.swiglu_clamp,
        lambda g, u: (lambda c: c * sigmoid(c))(np.minimum(g, 1.0)) * np.clip(u, -1, 1),
        (16, 5),
        (16, 5),
        limit=1.0,
    )


# -- along rows -------------------------------------------------------------------------------------------------------


def test_reduce() -> None:
    check_op(ops.sum, np.sum, (33, 5, 2))
    check_op(ops.sum, np.sum, (33, 5, 2), type=F16, tolerance=5e-3)
    check_op(ops.sum_rows, lambda x: x.sum(-1), (33, 5, 2))
    check_op(ops.mean, lambda x: x.mean(-1), (33, 5, 2))
    check_op(ops.cumsum, lambda x: x.cumsum(-1), (33, 5, 2))
    check_op(ops.argmax, lambda x: x.argmax(-1), (33, 5))
    check_op(ops.argsort, lambda x: x.argsort(-1), (33, 5))
    check_op(ops.argsort, lambda x: (-x).argsort(-1), (33, 5), order=SortOrder.DESC)
    check_op(lambda x: ops.cont(ops.argsort_top_k(x, 4)), lambda x: (-x).argsort(-1)[:, :4], (33, 5))
    found = run(lambda x: ops.top_k(x, 4), [values((33, 5))], [F32])
    assert np.array_equal(np.sort(found), np.sort((-values((33, 5))).argsort(-1)[:, :4]))
    a = np.arange(12, dtype=np.int32).reshape(3, 4)
    b = np.where(a % 3, a, 0).astype(np.int32)
    check_op(ops.count_equal, lambda x, y: (x == y).sum(), arrays=[a, b], types=[I32, I32])


def test_norms() -> None:
    check_op(ops.rms_norm, lambda x: rms_norm(x, 1e-6), (128, 30, 7), eps=1e-6)
    check_op(ops.norm, lambda x: layer_norm(x, 1e-5), (128, 30, 7), eps=1e-5)
    check_op(ops.l2_norm, lambda x: x / np.sqrt((x * x).sum(-1, keepdims=True)), (128, 30), eps=1e-6)
    check_op(
        lambda x: ops.group_norm(x, 4, 1e-6),
        lambda x: layer_norm(x.reshape(2, 4, -1), 1e-6).reshape(x.shape),
        (9, 7, 16, 2),
    )


# -- matrices ---------------------------------------------------------------------------------------------------------


def weights(type: Type, array: Any) -> Any:
    """A tensor of `type` with data, and the values it really holds."""
    context = Context(1)
    tensor = context.new_tensor(array.shape[::-1], type, "w")
    Buffer.allocate(context, BACKEND.buffer_type)
    tensor.set(array)
    return tensor, tensor.numpy()


QUANTISED = [t for t in Type if t.is_quantized and t.name not in ("Q8_1", "Q8_K")]
# Quantising to these needs an importance matrix, or first searches a grid for seconds.
NEEDS_IMPORTANCE = {t for t in QUANTISED if lib.ggml_quantize_requires_imatrix(t)}
MULTIPLIED = [t for t in QUANTISED if t not in NEEDS_IMPORTANCE and t.name not in ("IQ1_M", "IQ2_S")]


@pytest.mark.parametrize("type", [F32, F16, BF16, *MULTIPLIED], ids=lambda t: t.name)
def test_mul_mat(type: Type) -> None:
    w, w_values = weights(type, values((256, 24, 2), 1))
    x = values((256, 7, 4))
    with Graph(BACKEND, 16) as graph:
        graph.output(ops.mul_mat(w, graph.input((256, 7, 4), name="x"), prec=Prec.F32), name="y")
        y = graph.compute(x=x)["y"]
    wanted = x @ np.repeat(w_values.reshape(2, 24, 256), 2, 0).swapaxes(-1, -2)
    # x is rounded to 8 bits beside quantised weights, to half precision beside f16 and bf16.
    limit = 1e-5 if type is F32 else 2e-3 if type is F16 else 1e-2 if type is BF16 else 2e-2
    assert np.abs(y - wanted).max() <= limit * np.abs(wanted).max()


def test_matrices() -> None:
    check_op(ops.mul_mat, lambda w, x: x @ w.swapaxes(-1, -2), (32, 5), (32, 7, 3, 2))
    check_op(ops.mul_mat, lambda w, x: x @ w.swapaxes(-1, -2), (32, 5), (32, 7), types=[F16, F16])
    check_op(ops.out_prod, lambda a, b: b.swapaxes(-1, -2) @ a, (6, 4, 2), (5, 4, 2))
    ids = np.array([[2, 0], [1, 2], [0, 1]], np.int32)
    check_op(
        ops.mul_mat_id,
        lambda w, x, i: np.stack([[w[i[t, u]] @ x[t, 0] for u in range(2)] for t in range(3)]),
        arrays=[values((32, 5, 3)), values((32, 1, 3), 1), ids],
        types=[F32, F32, I32],
    )
    lower = np.tril(values((6, 6, 2))) + 3 * np.eye(6, dtype=np.float32)
    check_op(ops.solve_tri, np.linalg.solve, arrays=[lower, values((4, 6, 2), 1)], types=[F32, F32])


# -- shapes -----------------------------------------------------------------------------------------------------------


def test_shapes() -> None:
    check_op(lambda x: ops.reshape(x, 6, -1).cont(), lambda x: x.reshape(4, 6), (4, 3, 2))
    check_op(lambda x: ops.permute(x, 1, 2, 0, 3).cont(), lambda x: np.moveaxis(x, [2, 1, 0], [1, 0, 2]), (4, 3, 2))
    check_op(lambda x: ops.transpose(x).cont(), lambda x: x.swapaxes(-1, -2), (4, 3, 2))
    check_op(lambda x: ops.view(x, (2, 3), (16,), 4).cont(), lambda x: x.reshape(6, 4)[:3, 1:3], (4, 3, 2))
    check_op(lambda x: ops.view(x, (5,), offset=8).cont(), lambda x: x.reshape(-1)[2:7], (4, 3, 2))
    check_op(lambda x: ops.narrow(x, 1, 1, 2).cont(), lambda x: x[:, 1:3], (4, 3, 2))
    check_op(lambda x: ops.chunk(x, 2)[1].cont(), lambda x: x[..., 2:], (4, 3, 2))
    check_op(lambda x: ops.cont(ops.transpose(x), 6, 2), lambda x: x.swapaxes(-1, -2).reshape(2, 6), (4, 3))
    check_op(ops.dup, lambda x: x, (4, 3))
    check_op(lambda x: ops.dup(ops.transpose(x)), lambda x: x.T, (4, 3))
    for dim in range(4):
        check_op(ops.concat, lambda a, b, d=dim: np.concatenate([a, b], 3 - d), (4, 3, 2, 5), (4, 3, 2, 5), dim=dim)
    check_op(ops.repeat, lambda x: np.tile(x, (2, 1, 3)), (4, 3), like=(12, 3, 2))
    check_op(lambda y: ops.repeat(ops.narrow(y, 1, 0, 3), y), lambda y: np.tile(y[:3], (2, 1)), (12, 6))
    check_op(
        lambda x: ops.set(x, ops.fill(ops.view(x, (4,)), 9.0), 16),
        lambda x: np.concatenate([x[:1], x[1:2] * 0 + 9, x[2:]]),
        (4, 3),
    )
    check_op(ops.diag, lambda x: np.diag(x.reshape(-1)), (5,))
    square = (6, 6, 2)
    check_op(ops.tri, np.tril, square, kind=TriType.LOWER_DIAG)
    check_op(ops.tri, lambda x: np.tril(x, -1), square, kind=TriType.LOWER)
    check_op(ops.tri, np.triu, square, kind=TriType.UPPER_DIAG)


def test_arange() -> None:
    with Graph(BACKEND, 8) as graph:
        graph.output(ops.arange(graph, 1.0, 7.0, 1.5), name="y")
        assert graph.compute()["y"].tolist() == [1.0, 2.5, 4.0, 5.5]


@pytest.mark.parametrize("to", [F32, F16, BF16, I32, Type.Q8_0, Type.Q4_K], ids=lambda t: t.name)
@pytest.mark.parametrize("of", [F32, F16, BF16], ids=lambda t: t.name)
def test_cast(of: Type, to: Type) -> None:
    if to is I32 and of is not F32:
        with pytest.raises(ShapeError, match="types that convert"):
            run(lambda x: ops.cast(x, to), [values((256, 4))], [of])
        return
    limit = {F32: 0.0, F16: 1e-3, BF16: 8e-3, I32: 0.0, Type.Q8_0: 1e-2, Type.Q4_K: 1.2e-1}[to]
    check_op(
        lambda x: ops.cast(x, to), np.trunc if to is I32 else lambda x: x, (256, 4), type=of, tolerance=max(limit, 1e-9)
    )


def test_copy_into_a_part() -> None:
    with Graph(BACKEND, 16) as graph:
        x, y = graph.input((4, 2), name="x"), graph.input((4, 3), name="y")
        target = y * 1.0
        graph.add(ops.cpy(x, ops.narrow(target, 1, 1, 2)))
        graph.output(target + 0.0, name="z")
        z = graph.compute(x=np.ones((2, 4)), y=np.zeros((3, 4)))["z"]
    assert z.tolist() == [[0] * 4, [1] * 4, [1] * 4]


@pytest.mark.parametrize("type", [F32, F16, BF16, Type.Q8_0, Type.Q4_K], ids=lambda t: t.name)
def test_get_rows(type: Type) -> None:
    w, w_values = weights(type, values((256, 9), 1))
    ids = np.array([8, 0, 3], np.int32)
    with Graph(BACKEND, 16) as graph:
        graph.output(ops.get_rows(w, graph.input((3,), I32, "ids")), name="y")
        assert np.array_equal(graph.compute(ids=ids)["y"], w_values[ids])
        for bad in (9, -1):
            with pytest.raises(ShapeError, match=f"row {bad} of 9"):
                graph.compute(ids=[0, 0, bad])
        assert np.array_equal(graph.compute(ids=ids)["y"], w_values[ids])


def test_rows() -> None:
    ids = np.array([3, 1], np.int64)
    rows, table = values((8, 2)), values((8, 5), 1)

    def written(to: Any, rows: Any, ids: Any) -> Any:
        to = to.copy()
        to[ids] = rows
        return to

    check_op(
        lambda t, r, i: ops.set_rows(t * 1.0, r, i), written, arrays=[table, rows, ids], types=[F32, F32, Type.I64]
    )
    grads = values((8, 3))
    twice = np.array([1, 4, 1], np.int32)

    def gathered(g: Any, i: Any, t: Any) -> Any:
        out = np.zeros_like(t)
        np.add.at(out, i, g)
        return out

    like, _ = weights(F32, table)
    with Graph(BACKEND, 16) as graph:
        g, i = graph.input((8, 3), name="g"), graph.input((3,), I32, "i")
        graph.output(ops.get_rows_back(g, i, like), name="y")
        y = graph.compute(g=grads, i=twice)["y"]
    assert np.allclose(y, gathered(grads, twice, table))


# -- attention --------------------------------------------------------------------------------------------------------


def test_soft_max() -> None:
    check_op(ops.soft_max, soft_max, (33, 5, 2))
    mask = np.where(np.tri(5, 33, 20), 0, -np.inf).astype(np.float32)
    check_op(
        lambda x, m: ops.soft_max_ext(x, m, 0.3),
        lambda x, m: soft_max(0.3 * x + m),
        arrays=[values((33, 5, 2)), mask],
        types=[F32, F16],
    )
    sinks = values((2,), 1)

    def with_sinks(x: Any, s: Any) -> Any:
        e = np.exp(x)
        return e / (e.sum(-1, keepdims=True) + np.exp(s)[:, None, None])

    check_op(
        lambda x, s: ops.soft_max_ext(x, sinks=s), with_sinks, arrays=[values((33, 5, 2)), sinks], types=[F32, F32]
    )
    check_op(
        ops.soft_max_ext_back,
        lambda g, y: (g - (g * y).sum(-1, keepdims=True)) * y,
        (33, 5),
        (33, 5),
    )
    check_op(lambda x: ops.diag_mask_inf(x, 1), lambda x: np.where(np.tri(4, 6, 1), x, -np.inf), (6, 4))
    check_op(lambda x: ops.diag_mask_zero(x, 1), lambda x: np.where(np.tri(4, 6, 1), x, 0), (6, 4))


@pytest.mark.parametrize("neox", [False, True])
@pytest.mark.parametrize("type", [F32, F16], ids=lambda t: t.name)
def test_rope(neox: bool, type: Type) -> None:
    positions = np.array([0, 1, 5, 100, 3], np.int32)
    mode = ops.ROPE_NEOX if neox else ops.ROPE_NORMAL
    x = values((16, 3, 5, 2))
    for n_dims in (16, 8):
        check_op(
            lambda x, p, n=n_dims: ops.rope_ext(x, p, n, mode, freq_base=500.0),
            lambda x, p, n=n_dims: rope(x, p, n, neox, 500.0),
            arrays=[x, positions],
            types=[type, I32],
        )
    check_op(
        lambda x, p: ops.rope(x, p, 16, mode),
        lambda x, p: rope(x, p, 16, neox),
        arrays=[x, positions],
        types=[type, I32],
    )
    check_op(
        lambda x, p: ops.rope_ext(x, p, 16, mode, back=True),
        lambda x, p: rope(x, p, 16, neox, sign=-1),
        arrays=[x, positions],
        types=[type, I32],
    )


def test_rope_more() -> None:
    x, positions = values((16, 3, 4)), np.array([0, 1, 5, 7], np.int32)
    check_op(
        lambda x, p: ops.rope_offset(ops.rope_ext(x, p, 8), 4),
        lambda x, p: np.concatenate([x[..., :4], rope(x[..., 4:12], p, 8, False), x[..., 12:]], -1),
        arrays=[x, positions],
        types=[F32, I32],
    )
    factors = np.linspace(1, 2, 8).astype(np.float32)

    def with_factors(x: Any, p: Any, f: Any) -> Any:
        angle = p[:, None] * 10000.0 ** (-2 * np.arange(8) / 16) / f
        c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., ::2], x[..., 1::2]
        return np.stack([a * c - b * s, a * s + b * c], -1).reshape(x.shape)

    check_op(
        lambda x, p, f: ops.rope_ext(x, p, 16, freq_factors=f),
        with_factors,
        arrays=[x, positions, factors],
        types=[F32, I32, F32],
    )
    kinds = np.concatenate([positions, positions + 2, positions * 3, positions * 0]).astype(np.int32)

    def sections(x: Any, p: Any) -> Any:
        which = np.repeat([0, 1, 2], [4, 2, 2])  # the pairs of each kind of position
        angle = p.reshape(4, 4)[which].T * 10000.0 ** (-2 * np.arange(8) / 16)
        c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :8], x[..., 8:]
        return np.concatenate([a * c - b * s, a * s + b * c], -1)

    check_op(lambda x, p: ops.rope_multi(x, p, 16, (4, 2, 2)), sections, arrays=[x, kinds], types=[F32, I32])


@pytest.mark.parametrize("kv", [F32, F16, BF16, Type.Q8_0], ids=lambda t: t.name)
def test_flash_attention(kv: Type) -> None:
    q, k, v = values((64, 9, 4)), values((64, 21, 2), 1, -1, 1), values((64, 21, 2), 2, -1, 1)
    mask = np.where(np.tri(9, 21, 6), 0, -np.inf).astype(np.float32)
    check_op(
        lambda q, k, v, m: ops.flash_attn_ext(q, ops.cast(k, kv), ops.cast(v, kv), m, 0.125, prec=Prec.F32),
        lambda q, k, v, m: attention(q, k, v, m, 0.125),
        arrays=[q, k, v, mask],
        types=[F32, F32, F32, F16],
        tolerance=3e-2 if kv is Type.Q8_0 else 1e-2,
    )


def test_flash_attention_with_sinks_and_cap() -> None:
    q, k, v, sinks = values((64, 9, 2)), values((64, 21, 2), 1, -1, 1), values((64, 21, 2), 2, -1, 1), values((2,), 3)

    def reference(q: Any, k: Any, v: Any, s: Any) -> Any:
        e = np.exp(4 * np.tanh(q @ k.swapaxes(-1, -2) * 0.125 / 4))
        return ((e / (e.sum(-1, keepdims=True) + np.exp(s)[:, None, None])) @ v).swapaxes(0, 1)

    check_op(
        lambda q, k, v, s: ops.flash_attn_ext(q, k, v, None, 0.125, logit_softcap=4.0, sinks=s),
        reference,
        arrays=[q, k, v, sinks],
        types=[F32] * 4,
        tolerance=1e-2,
    )


# -- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [(1, 0, 1), (1, 1, 1), (2, 1, 1), (1, 2, 2)], ids=str)
def test_conv_2d(numbers: tuple[int, int, int]) -> None:
    stride, padding, dilation = numbers
    shapes = (3, 3, 4, 5), (11, 9, 4, 2)
    reference = lambda k, x: conv_2d(k, x, stride, padding, dilation)  # noqa: E731
    check_op(lambda k, x: ops.conv_2d(k, x, *numbers), reference, *shapes, types=[F16, F32], tolerance=5e-3)
    check_op(lambda k, x: ops.conv_2d_direct(k, x, *numbers), reference, *shapes)
    deep = (3, 3, 1, 4), (11, 9, 4, 2)
    reference = lambda k, x: conv_2d(k, x, stride, padding, dilation, depthwise=True)  # noqa: E731
    check_op(lambda k, x: ops.conv_2d_dw(k, x, *numbers), reference, *deep, types=[F16, F32], tolerance=5e-3)
    check_op(lambda k, x: ops.conv_2d_dw_direct(k, x, *numbers), reference, *deep)


def test_convolutions() -> None:
    check_op(
        ops.conv_2d_sk_p0,
        lambda k, x: conv_2d(k, x, 2),
        (2, 2, 4, 5),
        (8, 6, 4),
        types=[F16, F32],
        tolerance=5e-3,
        arrays=[values((2, 2, 4, 5)), values((8, 6, 4, 1), 1)],
    )
    check_op(
        ops.conv_2d_s1_ph,
        lambda k, x: conv_2d(k, x, 1, 1),
        types=[F16, F32],
        tolerance=5e-3,
        arrays=[values((3, 3, 4, 5)), values((8, 6, 4, 1), 1)],
    )

    def conv_1d(k: Any, x: Any, padding: int = 1, stride: int = 2) -> Any:
        k, x = k[:, :, None], np.pad(x.reshape(1, 4, 12), ((0, 0), (0, 0), (padding, padding)))[:, :, None]
        wide = (x.shape[-1] - k.shape[-1]) // stride + 1
        parts = [
            np.einsum("ncw,oc->now", x[:, :, 0, i:][..., : wide * stride : stride], k[:, :, 0, i])
            for i in range(k.shape[-1])
        ]
        return np.sum(parts, 0)

    check_op(lambda k, x: ops.conv_1d(k, x, 2, 1), conv_1d, (3, 4, 5), (12, 4, 1), types=[F16, F32], tolerance=5e-3)
    check_op(lambda k, x: ops.conv_1d_ph(k, x, 2), conv_1d, (3, 4, 5), (12, 4, 1), types=[F16, F32], tolerance=5e-3)
    with pytest.raises(ShapeError, match="one signal at a time"):
        run(ops.conv_1d, [values((3, 4, 5)), values((12, 4, 2))], [F16, F32])
    deep = lambda k, x: np.stack([np.convolve(np.pad(r, 1), f[0][::-1], "valid") for r, f in zip(x, k, strict=True)])  # noqa: E731
    check_op(lambda k, x: ops.conv_1d_dw(k, x, 1, 1), deep, (3, 1, 4), (12, 4), types=[F16, F32], tolerance=5e-3)
    check_op(lambda k, x: ops.conv_1d_dw_ph(k, x), deep, (3, 1, 4), (12, 4), types=[F16, F32], tolerance=5e-3)

    def transposed_1d(k: Any, x: Any) -> Any:
        out = np.zeros((k.shape[1], (x.shape[-1] - 1) * 2 + k.shape[-1]))
        for i in range(x.shape[-1]):
            out[:, i * 2 : i * 2 + k.shape[-1]] += np.einsum("iok,i->ok", k, x[:, i])
        return out

    check_op(ops.conv_transpose_1d, transposed_1d, (3, 5, 4), (7, 4), stride=2)
    check_op(
        lambda k, x: ops.col2im_1d(
            ops.mul_mat(ops.reshape(ops.permute(k, 1, 2, 0, 3).cont(), 4, 15), ops.transpose(x).cont()), 2, 5
        ),
        transposed_1d,
        (3, 5, 4),
        (7, 4),
    )

    def transposed_2d(k: Any, x: Any) -> Any:
        (n, _, h, w), (_, oc, kh, kw) = x.shape, k.shape
        out = np.zeros((n, oc, (h - 1) * 2 + kh, (w - 1) * 2 + kw))
        for i in range(h):
            for j in range(w):
                out[:, :, i * 2 : i * 2 + kh, j * 2 : j * 2 + kw] += np.einsum("iokl,ni->nokl", k, x[:, :, i, j])
        return out

    check_op(
        ops.conv_transpose_2d,
        transposed_2d,
        (3, 3, 5, 4),
        (7, 6, 4, 1),
        types=[F16, F32],
        stride=2,
        tolerance=5e-3,
        arrays=[values((3, 3, 5, 4)), values((7, 6, 4, 1), 1)],
    )


def conv_3d(k: Any, x: Any, n_channels: int) -> Any:
    oc = k.shape[0] // n_channels
    k, x = k.reshape(oc, n_channels, *k.shape[1:]), x.reshape(-1, n_channels, *x.shape[1:])
    d, h, w = (x.shape[i] - k.shape[i] + 1 for i in (2, 3, 4))
    out = sum(
        np.einsum("ncdhw,oc->nodhw", x[:, :, a : a + d, b : b + h, c : c + w], k[:, :, a, b, c])
        for a in range(k.shape[2])
        for b in range(k.shape[3])
        for c in range(k.shape[4])
    )
    return np.asarray(out).reshape(-1, d, h, w)


def test_conv_3d() -> None:
    arrays = [values((2, 3, 2, 4 * 5)), values((6, 5, 4, 4 * 2), 1)]
    patches = lambda k, x: np.lib.stride_tricks.sliding_window_view(x.reshape(2, 4, 4, 5, 6), (2, 3, 2), (2, 3, 4))  # noqa: E731
    check_op(
        lambda k, x: ops.im2col_3d(k, x, 4),
        lambda k, x: patches(k, x).transpose(0, 2, 3, 4, 1, 5, 6, 7),
        arrays=arrays,
        types=[F16, F32],
        tolerance=2e-3,
    )
    check_op(
        lambda k, x: ops.conv_3d(k, x, 4),
        lambda k, x: conv_3d(k, x, 4),
        arrays=arrays,
        types=[F16, F32],
        tolerance=5e-3,
    )
    check_op(
        lambda k, x: ops.conv_3d_direct(k, x, 4, 5, 2),
        lambda k, x: conv_3d(k, x, 4),
        arrays=arrays,
        types=[F16, F32],
        tolerance=5e-3,
    )


def test_im2col() -> None:
    def patches(k: Any, x: Any) -> Any:
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))  # n c oh ow kh kw
        return windows.transpose(0, 2, 3, 1, 4, 5)

    check_op(
        lambda k, x: ops.im2col(k * 1.0, x, type=F32),
        patches,
        arrays=[values((3, 3, 2, 1)), values((6, 5, 2, 1), 1)],
        types=[F32, F32],
    )

    def added(k: Any, g: Any) -> Any:
        out = np.zeros((1, 2, 5, 6))
        g = g.reshape(1, 3, 4, 2, 3, 3)
        for i in range(3):
            for j in range(4):
                out[:, :, i : i + 3, j : j + 3] += g[:, i, j]
        return out

    check_op(
        lambda k, g: ops.im2col_back(k * 1.0, g, (6, 5, 2, 1)),
        added,
        arrays=[values((3, 3, 2, 1)), values((18, 4, 3, 1), 1)],
        types=[F32, F32],
    )


def test_pool() -> None:
    blocks = lambda x: x.reshape(2, 3, 2, 4, 2)  # noqa: E731
    check_op(lambda x: ops.pool_2d(x, PoolOp.MAX, 2, 2), lambda x: blocks(x).max((2, 4)), (8, 6, 2))
    check_op(lambda x: ops.pool_2d(x, PoolOp.AVG, 2, 2), lambda x: blocks(x).mean((2, 4)), (8, 6, 2))
    check_op(lambda x: ops.pool_1d(x, PoolOp.AVG, 2, 2), lambda x: x.reshape(6, 4, 2).mean(-1), (8, 6))
    check_op(
        lambda g, x: ops.pool_2d_back(g, x, PoolOp.AVG, 2, 2),
        lambda g, x: np.repeat(np.repeat(g, 2, -1), 2, -2) / 4,
        (4, 3, 2),
        (8, 6, 2),
    )


def test_resize_and_pad() -> None:
    check_op(lambda x: ops.upscale(x, 2), lambda x: np.repeat(np.repeat(x, 2, -1), 2, -2), (4, 3, 2))
    check_op(
        lambda x: ops.interpolate(x, (5, 1, 1, 1), ScaleMode.BILINEAR | ops.ALIGN_CORNERS),
        lambda x: np.interp(np.linspace(0, 2, 5), np.arange(3), x),
        (3,),
    )
    check_op(lambda x: ops.pad(x, 1, 2, 3), lambda x: np.pad(x, ((0, 3), (0, 2), (0, 1))), (4, 3, 2))
    check_op(lambda x: ops.pad(x, 1, 2, circular=True), lambda x: np.pad(x, ((0, 2), (0, 1)), "wrap"), (4, 3))
    check_op(lambda x: ops.pad_ext(x, (1, 2), (0, 1)), lambda x: np.pad(x, ((0, 1), (1, 2))), (4, 3))
    check_op(lambda x: ops.pad_ext(x, (1, 2), circular=True), lambda x: np.pad(x, ((0, 0), (1, 2)), "wrap"), (4, 3))
    check_op(lambda x: ops.pad_reflect_1d(x, 2, 1), lambda x: np.pad(x, ((0, 0), (2, 1)), "reflect"), (4, 3))
    check_op(lambda x: ops.roll(x, 1, -1), lambda x: np.roll(x, (-1, 1), (0, 1)), (4, 3))
    check_op(lambda x: ops.win_unpart(ops.win_part(x, 3), 7, 5, 3), lambda x: x, (2, 7, 5))
    check_op(lambda x: ops.win_part(x, 2), lambda x: x.reshape(2, 2, 3, 2, 2).transpose(0, 2, 1, 3, 4), (2, 6, 4))
    f = 10000.0 ** (-np.arange(4) / 4)
    check_op(
        lambda t: ops.timestep_embedding(t, 8),
        lambda t: np.concatenate([np.cos(t[:, None] * f), np.sin(t[:, None] * f)], 1),
        (5,),
        low=0,
        high=1000,
        tolerance=1e-3,
    )


def test_relative_positions() -> None:
    check_op(
        lambda x: ops.get_rel_pos(x, 3, 3),
        lambda x: np.stack([[x[3 - 1 - k + q] for k in range(3)] for q in range(3)]),
        (4, 5),
        type=F16,
    )
    # scores[q, k] with q = (qy, qx) and k = (ky, kx), 2 by 2 each
    pw, ph = values((2, 2, 2), 1), values((2, 2, 2), 2)
    check_op(
        ops.add_rel_pos,
        lambda x, w, h: x + (h.reshape(4, 2)[:, :, None] + w.reshape(4, 2)[:, None, :]).reshape(4, 4),
        arrays=[values((4, 4)), pw, ph],
        types=[F32] * 3,
    )


# -- sequences --------------------------------------------------------------------------------------------------------


def test_ssm_conv() -> None:
    def reference(x: Any, k: Any) -> Any:
        windows = np.lib.stride_tricks.sliding_window_view(x, 4, -1)  # seq channel token k
        return np.einsum("sctk,ck->stc", windows, k)

    check_op(ops.ssm_conv, reference, arrays=[values((8, 6, 2)), values((4, 6), 1)], types=[F32, F32])


def test_ssm_scan() -> None:
    d, p, h, t = 16, 4, 2, 3
    arrays = [
        values((d, p, h, 1)),
        values((p, h, t, 1), 1),
        values((h, t, 1), 2),
        values((1, h), 3, -1, -0.1),
        values((d, 1, t, 1), 4),
        values((d, 1, t, 1), 5),
        np.array([0], np.int32),
    ]

    def reference(state: Any, x: Any, dt: Any, a: Any, b: Any, c: Any, ids: Any) -> Any:
        s, ys = state.reshape(h, p, d).astype(np.float64), []
        x, dt, b, c = x.reshape(t, h, p), dt.reshape(t, h), b.reshape(t, d), c.reshape(t, d)
        for i in range(t):
            soft = np.log1p(np.exp(dt[i]))
            s = s * np.exp(soft * a.reshape(h))[:, None, None] + (soft[:, None] * x[i])[:, :, None] * b[i]
            ys.append(s @ c[i])
        return np.concatenate([np.ravel(ys), s.ravel()])

    # inputs that end in sizes of 1 lose them in numpy; ne says them again
    with Graph(BACKEND, 32) as graph:
        shapes = [(d, p, h, 1), (p, h, t, 1), (h, t, 1), (1, h), (d, 1, t, 1), (d, 1, t, 1), (1,)]
        xs = [graph.input(s, I32 if i == 6 else F32, f"x{i}") for i, s in enumerate(shapes)]
        graph.output(ops.ssm_scan(*xs), name="y")
        y = graph.compute(**{f"x{i}": a for i, a in enumerate(arrays)})["y"]
    assert np.allclose(y, reference(*arrays), atol=1e-4)


S, H, T = 64, 2, 3


def test_rwkv_and_gated_linear_attention() -> None:
    k, v, r, w, b = (values((S, H, T), i, -1, 1) for i in range(5))
    state = values((S * S * H, 1), 9, -1, 1)
    first = values((S, H), 7, -1, 1)

    def wkv6(k: Any, v: Any, r: Any, f: Any, d: Any, s: Any) -> Any:
        s, ys = s.reshape(H, S, S).astype(np.float64), []  # [k, v]
        for t in range(T):
            kv = k[t][:, :, None] * v[t][:, None, :]
            ys.append(np.einsum("hk,hkv->hv", r[t], f[:, :, None] * kv + s))
            s = s * d[t][:, :, None] + kv
        return np.concatenate([np.ravel(ys), s.ravel()])

    check_op(ops.rwkv_wkv6, wkv6, arrays=[k, v, r, first, w, state], types=[F32] * 6)

    def gla(k: Any, v: Any, q: Any, g: Any, s: Any) -> Any:
        s, ys = s.reshape(H, S, S).astype(np.float64), []
        for t in range(T):
            s = s * g[t][:, :, None] + k[t][:, :, None] * v[t][:, None, :]
            ys.append(0.5 * np.einsum("hk,hkv->hv", q[t], s))
        return np.concatenate([np.ravel(ys), s.ravel()])

    check_op(ops.gated_linear_attn, gla, arrays=[k, v, r, w, state], types=[F32] * 5, scale=0.5)

    def wkv7(r: Any, w: Any, k: Any, v: Any, a: Any, b: Any, s: Any) -> Any:
        s, ys = s.reshape(H, S, S).astype(np.float64), []  # [v, k]
        for t in range(T):
            sa = np.einsum("hvk,hk->hv", s, a[t])
            s = s * w[t][:, None, :] + v[t][:, :, None] * k[t][:, None, :] + sa[:, :, None] * b[t][:, None, :]
            ys.append(np.einsum("hvk,hk->hv", s, r[t]))
        return np.concatenate([np.ravel(ys), s.ravel()])

    check_op(ops.rwkv_wkv7, wkv7, arrays=[r, w, k, v, values((S, H, T), 5, -1, 1), b, state], types=[F32] * 7)


def test_gated_delta_net() -> None:
    def reference(q: Any, k: Any, v: Any, g: Any, beta: Any, s: Any) -> Any:
        s, ys = s[0].astype(np.float64), []  # head, v, k
        for t in range(T):
            s = s * np.exp(g[0, t])[:, :, None]
            delta = (v[0, t] - np.einsum("hvk,hk->hv", s, k[0, t])) * beta[0, t]
            s = s + delta[:, :, None] * k[0, t][:, None, :]
            ys.append(np.einsum("hvk,hk->hv", s, q[0, t]) / math.sqrt(S))
        return np.concatenate([np.ravel(ys), s.ravel()])

    shapes = [(S, H, T, 1)] * 3 + [(1, H, T, 1), (1, H, T, 1), (S, S, H, 1)]
    check_op(
        ops.gated_delta_net, reference, arrays=[values(s, i, -1, 1) for i, s in enumerate(shapes)], types=[F32] * 6
    )


def test_hyper_connections() -> None:
    x, weights_ = values((8, 4, 3)), values((4, 3), 1)
    check_op(ops.dsv4_hc_pre, lambda x, w: np.einsum("thn,th->tn", x, w), arrays=[x, weights_], types=[F32, F32])
    check_op(
        ops.dsv4_hc_pre_gated,
        lambda x, g: 0.5 * (x * sigmoid(g)).sum(1),
        arrays=[x, values((8, 4, 3), 1)],
        types=[F32, F32],
        scale=0.5,
    )
    y, comb = values((8, 3), 2), values((4, 4, 3), 3)
    check_op(
        ops.dsv4_hc_post,
        lambda y, r, p, c: y[:, None] * p[:, :, None] + np.einsum("tsn,tsd->tdn", r, c),
        arrays=[y, x, weights_, comb],
        types=[F32] * 4,
    )
    check_op(ops.dsv4_hc_post, lambda y, r, p: y[:, None] * p[:, :, None] + r, arrays=[y, x, weights_], types=[F32] * 3)

    def combined(m: Any, scale: Any, base: Any) -> Any:
        logits = (m[:, 8:] * scale[2] + base[8:]).reshape(-1, 4, 4)  # src, dst
        c = soft_max(logits) + 1e-3
        c = c / (c.sum(1, keepdims=True) + 1e-3)
        for _ in range(2):
            c = c / (c.sum(2, keepdims=True) + 1e-3)
            c = c / (c.sum(1, keepdims=True) + 1e-3)
        return c

    check_op(
        lambda m, s, b: ops.dsv4_hc_comb(m, s, b, 1e-3, 3),
        combined,
        arrays=[values((24, 3)), values((3,), 1), values((24,), 2)],
        types=[F32] * 3,
    )


def test_lightning_indexer() -> None:
    def reference(q: Any, k: Any, w: Any, m: Any) -> Any:
        scores = np.maximum(np.einsum("bthd,bkxd->bthk", q, k), 0)
        return np.einsum("bthk,bxth->bxtk", scores, w) + m

    shapes = [(32, 4, 5, 2), (32, 1, 6, 2), (4, 5, 1, 2), (6, 5, 1, 2)]
    check_op(
        ops.lightning_indexer,
        reference,
        arrays=[values(s, i) for i, s in enumerate(shapes)],
        types=[F32, F32, F32, F16],
        tolerance=5e-3,
    )


# -- training ---------------------------------------------------------------------------------------------------------


def test_losses_and_gradients() -> None:
    labels = soft_max(values((10, 4), 1))
    check_op(
        ops.cross_entropy_loss,
        lambda x, p: -(p * np.log(soft_max(x))).sum() / 4,
        arrays=[values((10, 4)), labels],
        types=[F32] * 2,
    )
    check_op(
        ops.cross_entropy_loss_back,
        lambda g, x, p: (soft_max(x) - p) * g / 4,
        arrays=[np.array([2.0], np.float32), values((10, 4)), labels],
        types=[F32] * 3,
    )
    check_op(ops.silu_back, lambda g, x: g * sigmoid(x) * (1 + x * (1 - sigmoid(x))), (16, 5), (16, 5))

    def rms_back(g: Any, x: Any) -> Any:
        r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        return r * (g - x * r * r * (g * x).mean(-1, keepdims=True))

    check_op(ops.rms_norm_back, rms_back, (16, 5), (16, 5))


def test_optimiser_steps() -> None:
    context = Context(4)
    w, m, v = (context.new_tensor((6,), name=n) for n in "wmv")
    Buffer.allocate(context, BACKEND.buffer_type)
    start, grad = values((6,)), values((6,), 1)
    w.set(start), m.set(np.zeros(6)), v.set(np.zeros(6))
    with Graph(BACKEND, 16, grads=True) as graph:
        g, p = graph.input((6,), name="g"), graph.input((7,), name="p")
        graph.add(ops.opt_step_adamw(graph.param(w), g, m, v, p))
        graph.compute(g=grad, p=[0.1, 0.9, 0.999, 1e-8, 0.01, 1 / (1 - 0.9), 1 / (1 - 0.999)])
    wanted = start * (1 - 0.1 * 0.01) - 0.1 * grad / (np.abs(grad) + 1e-8)
    assert np.allclose(w.numpy(), wanted, atol=1e-5)
    w.set(start)
    with Graph(BACKEND, 16, grads=True) as graph:
        g, p = graph.input((6,), name="g"), graph.input((2,), name="p")
        graph.add(ops.opt_step_sgd(graph.param(w), g, p))
        graph.compute(g=grad, p=[0.1, 0.01])
    assert np.allclose(w.numpy(), start * (1 - 0.1 * 0.01) - 0.1 * grad, atol=1e-6)


def test_repeat_back() -> None:
    like, _ = weights(F32, values((8, 2, 3)))
    check_op(lambda g: ops.repeat_back(g, like), lambda g: g.reshape(2, 3, 2, 2, 8).sum((0, 2)), (8, 4, 6))


# -- custom -----------------------------------------------------------------------------------------------------------


def test_custom() -> None:
    # Any C function of the right type does; this one of ours only sees that it was called with its arguments.
    calls: list[tuple[int, int]] = []

    @ffi.callback("ggml_custom_op_t")  # type: ignore[untyped-decorator]
    def double(dst: Any, ith: int, nth: int, userdata: Any) -> None:
        calls.append((ith, nth))
        n = dst.ne[0]
        source, target = ffi.cast("float *", dst.src[0].data), ffi.cast("float *", dst.data)
        for i in range(ith, n, nth):
            target[i] = source[i] * ffi.cast("float *", userdata)[0]

    factor = ffi.new("float *", 2.0)
    with Graph(BACKEND, 16) as graph:
        x = graph.input((5,), name="x")
        graph.output(ops.custom_4d(F32, (5,), [x], double, n_tasks=1, userdata=factor), name="y")
        graph.output(ops.custom_inplace(x * 3.0, [x], double, n_tasks=1, userdata=factor), name="z")
        result = graph.compute(x=np.arange(5))
    assert result["y"].tolist() == [0, 2, 4, 6, 8]
    assert result["z"].tolist() == [0, 6, 12, 18, 24]
    assert calls == [(0, 1), (0, 1)]


# -- completeness -----------------------------------------------------------------------------------------------------

EXCLUDED = {
    "constructors: Context.new_tensor and Graph.input": {
        "ggml_new_tensor",
        "ggml_new_tensor_1d",
        "ggml_new_tensor_2d",
        "ggml_new_tensor_3d",
        "ggml_new_tensor_4d",
        "ggml_dup_tensor",
        "ggml_view_tensor",
    },
    "deprecated by ggml": {
        "ggml_add1",
        "ggml_add1_inplace",
        "ggml_rope_custom",
        "ggml_rope_custom_inplace",
        "ggml_upscale_ext",
    },
    "ops.set takes all strides": {"ggml_set_1d", "ggml_set_1d_inplace", "ggml_set_2d", "ggml_set_2d_inplace"},
    "ops.reshape takes sizes": {"ggml_reshape"},
    "one Python function for each member of the enumeration": {
        "ggml_unary",
        "ggml_unary_inplace",
        "ggml_glu",
        "ggml_glu_split",
    },
    "custom_4d and custom_inplace do the same for any number of arguments": {
        "ggml_map_custom1",
        "ggml_map_custom1_inplace",
        "ggml_map_custom2",
        "ggml_map_custom2_inplace",
        "ggml_map_custom3",
        "ggml_map_custom3_inplace",
    },
    "ggml aborts in it, always: it was not adapted to flash_attn_ext": {"ggml_flash_attn_back"},
}


def node_makers() -> set[str]:
    """Every guarded function that takes a context and makes a node, from the generated module."""
    found = set()
    for name in dir(getattr(lib, "_opened", [lib])[0]):
        if name.startswith("py_ggml_"):
            kind = ffi.typeof(getattr(lib, name))
            arguments = [a.cname for a in kind.args]
            if kind.result.cname == "struct ggml_tensor *" and arguments[:1] == ["struct ggml_context *"]:
                found.add(name.removeprefix("py_"))
    return found


def test_every_operation_of_ggml_is_a_function_or_excluded_with_a_reason() -> None:
    sources = "".join(p.read_text(encoding="utf-8") for p in Path(ops.__file__).parent.glob("*.py"))
    used = set(re.findall(r"lib\.py_(ggml_\w+)", sources))
    excluded = set().union(*EXCLUDED.values())
    makers = node_makers()
    assert len(makers) > 200
    assert makers - used - excluded == set()
    assert excluded <= makers, "excluded, but ggml has no such function"
    assert not excluded & used


def test_every_operation_is_documented_and_typed() -> None:
    functions = [getattr(ops, n) for n in ops.__all__ if inspect.isfunction(getattr(ops, n))]
    assert len(functions) > 110
    for function in functions:
        signature = inspect.signature(function)
        assert function.__doc__ and len(function.__doc__) > 8, function
        assert all(p.annotation is not p.empty for p in signature.parameters.values()), function
        assert signature.return_annotation is not signature.empty, function


def test_every_operation_is_tested() -> None:
    text = "".join(p.read_text(encoding="utf-8") for p in Path(__file__).parent.glob("test_*.py"))
    glu = {f"{name}{end}" for name, _, _ in GLU for end in ("", "_split")}
    untested = [
        n for n in ops.__all__ if inspect.isfunction(getattr(ops, n)) and f"ops.{n}" not in text and n not in glu
    ]
    assert untested == []
