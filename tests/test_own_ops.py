"""Our own kernels (pyggml/*.c) against exact arithmetic: odd sizes, types, numbers of threads."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pyggml import Backend, Buffer, Context, Graph, ShapeError, Tensor, Type, ops

RNG = np.random.default_rng(7)


@pytest.fixture(scope="module", params=[1, 2, 3])
def backend(request: pytest.FixtureRequest) -> Backend:
    return Backend.cpu(request.param)


def weight(ctx: Context, values: NDArray[np.float32], type: Type) -> Tensor:
    """A weight with `values` (numpy shape) in a context of its own."""
    return ctx.new_tensor(values.shape[::-1], type)


def placed(values: NDArray[np.float32], type: Type, backend: Backend) -> Tensor:
    ctx = Context(4)
    tensor = weight(ctx, values, type)
    Buffer.allocate(ctx, backend.buffer_type)
    tensor.set(values)
    return tensor


def convolve(x: NDArray[np.float64], w: NDArray[np.float64]) -> NDArray[np.float64]:
    """Direct 3x3 convolution with padding 1: x [N, IC, H, W], w [OC, IC, 3, 3]."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    h, width = x.shape[2:]
    y = np.zeros((len(x), len(w), h, width))
    for r in range(3):
        for c in range(3):
            y += np.einsum("nihw,oi->nohw", padded[:, :, r : r + h, c : c + width], w[:, :, r, c])
    return y


@pytest.mark.parametrize("type", [Type.F32, Type.F16, Type.BF16], ids=lambda t: t.name)
@pytest.mark.parametrize(
    ("width", "height", "n_in", "n_out", "n"),
    [(1, 1, 1, 1, 1), (4, 4, 3, 6, 1), (33, 5, 16, 32, 1), (7, 70, 64, 3, 2), (40, 40, 37, 41, 1),
     (32, 32, 128, 64, 1)],
)
def test_convolution(backend: Backend, type: Type, width: int, height: int, n_in: int, n_out: int, n: int) -> None:
    x = RNG.standard_normal((n, n_in, height, width)).astype(np.float32)
    w = (RNG.standard_normal((n_out, n_in, 3, 3)) / np.sqrt(9 * n_in)).astype(np.float32)
    bias = RNG.standard_normal(n_out).astype(np.float32)
    residual = RNG.standard_normal((n, n_out, height, width)).astype(np.float32)
    kernel = placed(w, type, backend)
    exact_w = kernel.numpy().reshape(w.shape).astype(np.float64)  # rounded to the type
    graph = Graph(backend, 64)
    a, b = graph.input(x.shape[::-1], name="x"), graph.input((n_out,), name="b")
    r = graph.input(residual.shape[::-1], name="r")
    graph.output(ops.conv_2d_3x3(kernel, a, b, r), name="all")
    graph.output(ops.conv_2d_3x3(kernel, a), name="plain")
    out = graph.compute(x=x, b=bias, r=residual)
    exact = convolve(x.astype(np.float64), exact_w)
    scale = np.abs(exact).max() + 1
    assert np.abs(out["plain"].reshape(exact.shape) - exact).max() <= 1e-5 * scale
    whole = exact + bias[:, None, None] + residual
    assert np.abs(out["all"].reshape(exact.shape) - whole).max() <= 1e-5 * scale


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    ("width", "height", "channels", "groups"), [(1, 1, 32, 32), (5, 3, 32, 8), (17, 9, 96, 32), (64, 64, 64, 32)]
)
def test_group_norm(backend: Backend, silu: bool, width: int, height: int, channels: int, groups: int) -> None:
    x = (3 + 5 * RNG.standard_normal((channels, height, width))).astype(np.float32)
    w, b = (RNG.standard_normal(channels).astype(np.float32) for _ in range(2))
    graph = Graph(backend, 64)
    args = graph.input(x.shape[::-1], name="x"), graph.input((channels,), name="w"), graph.input((channels,), name="b")
    graph.output(ops.group_norm_scaled(*args, groups, 1e-6, silu=silu), name="y")
    out = graph.compute(x=x, w=w, b=b)["y"].reshape(x.shape)
    rows = x.astype(np.float64).reshape(groups, -1)
    y = ((rows - rows.mean(1, keepdims=True)) / np.sqrt(rows.var(1, keepdims=True) + 1e-6)).reshape(x.shape)
    y = y * w[:, None, None] + b[:, None, None]
    y = y / (1 + np.exp(-y)) if silu else y
    assert np.abs(out - y).max() <= 2e-6 * (1 + np.abs(y).max()) + (0 if width * height > 1 else 1e-3)


@pytest.mark.parametrize("type", [Type.F32, Type.F16, Type.BF16], ids=lambda t: t.name)
def test_convolution_with_one_time_step_of_a_3d_kernel(backend: Backend, type: Type) -> None:
    n_in, n_out = 35, 4  # more channels than are transformed at once
    w = (RNG.standard_normal((n_out * n_in, 3, 3, 3)) / 18).astype(np.float32)
    x = RNG.standard_normal((n_in, 6, 9)).astype(np.float32)
    kernel = placed(w, type, backend)
    graph = Graph(backend, 64)
    all_steps, size = graph.use(kernel), kernel.nb[0]
    strides = 3 * size, 27 * size, 27 * size * n_in
    last = ops.view(all_steps, (3, 3, n_in, n_out), strides, offset=18 * size)
    graph.output(ops.conv_2d_3x3(last, graph.input((9, 6, n_in), name="x")), name="y")
    taps = kernel.numpy().reshape(n_out, n_in, 3, 3, 3)[:, :, 2].astype(np.float64)
    exact = convolve(x[None].astype(np.float64), taps)[0]
    assert np.abs(graph.compute(x=x)["y"] - exact).max() <= 1e-5 * (np.abs(exact).max() + 1)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("width", "height", "channels", "n"), [(1, 1, 3, 1), (5, 13, 96, 2), (64, 3, 7, 1)])
def test_channel_norm(backend: Backend, silu: bool, width: int, height: int, channels: int, n: int) -> None:
    x = (1 + 5 * RNG.standard_normal((n, channels, height, width))).astype(np.float32)
    x[0, :, 0, 0] = 0  # nothing to divide by
    gamma = RNG.standard_normal(channels).astype(np.float32)
    graph = Graph(backend, 64)
    args = graph.input(x.shape[::-1], name="x"), graph.input((channels,), name="gamma")
    graph.output(ops.channel_norm(*args, 1e-20, silu=silu), name="y")
    out = graph.compute(x=x, gamma=gamma)["y"].reshape(x.shape)
    y = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-20) * gamma[:, None, None]
    y = y / (1 + np.exp(-y)) if silu else y
    assert np.abs(out - y).max() <= 2e-6 * np.abs(y).max()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("n", "n_rows"), [(1, 1), (35, 3), (64, 10)])
def test_gelu(backend: Backend, with_bias: bool, n: int, n_rows: int) -> None:
    x = (4 * RNG.standard_normal((n_rows, n))).astype(np.float32)
    x.flat[0] = -200
    bias = RNG.standard_normal(n).astype(np.float32)
    graph = Graph(backend, 64)
    a, b = graph.input((n, n_rows), name="x"), graph.input((n,), name="b") if with_bias else None
    graph.output(ops.gelu_f32(a, b), name="y")
    out = graph.compute(x=x, **({"b": bias} if with_bias else {}))["y"].reshape(x.shape)
    v = x.astype(np.float64) + (bias if with_bias else 0)
    exact = v / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))
    assert np.abs(out - exact).max() <= 1e-6 * (1 + np.abs(exact).max())


@pytest.mark.parametrize("type", [Type.Q8_0, Type.Q4_K], ids=lambda t: t.name)
@pytest.mark.parametrize(("n_rows", "n_tokens"), [(1, 4), (15, 5), (16, 6), (47, 7), (64, 33), (130, 100), (33, 515)])
@pytest.mark.parametrize("n_in", [256, 1280])
def test_matrix_product(backend: Backend, type: Type, n_rows: int, n_tokens: int, n_in: int) -> None:
    w = placed((RNG.standard_normal((n_rows, n_in)) * 0.05).astype(np.float32), type, backend)
    x = RNG.standard_normal((n_tokens, n_in)).astype(np.float32)
    x[1] *= 1000  # tokens of very different size must not share a scale
    x[2] = 0
    graph = Graph(backend, 64)
    a = graph.input((n_in, n_tokens), name="x")
    fast = ops.mul_mat_fast(w, a)
    if fast is None:
        pytest.skip("ggml's kernel is taken on this processor")
    graph.output(fast, name="fast")
    graph.output(ops.mul_mat(w, a), name="ggml")
    out = graph.compute(x=x)
    matrix = w.numpy().reshape(n_rows, n_in).astype(np.float64)
    exact = x.astype(np.float64) @ matrix.T
    # The size that an output of this token has: an output that is small by chance has no smaller error.
    size = np.linalg.norm(x, axis=1, keepdims=True) * np.linalg.norm(matrix) / np.sqrt(n_rows) + 1e-9
    error = np.abs(out["fast"].reshape(exact.shape) - exact) / size
    theirs = np.abs(out["ggml"].reshape(exact.shape) - exact) / size
    # q8_0 keeps 16 bits of the activations; q4_K 8 bits for 256 of them, as ggml's own does.
    assert error.max() <= 1e-3 if type is Type.Q8_0 else error.max() <= max(2 * theirs.max(), 0.02)
    assert np.sqrt((error**2).mean()) <= (1e-4 if type is Type.Q8_0 else 1.5 * np.sqrt((theirs**2).mean()) + 1e-4)


def test_matrix_product_q8_0_of_short_rows(backend: Backend) -> None:
    """Rows of q8_0 may be any multiple of 32."""
    for n_in in (32, 96, 288):
        w = placed((RNG.standard_normal((20, n_in)) * 0.05).astype(np.float32), Type.Q8_0, backend)
        x = RNG.standard_normal((9, n_in)).astype(np.float32)
        graph = Graph(backend, 64)
        y = ops.mul_mat_fast(w, graph.input((n_in, 9), name="x"))
        if y is None:
            continue
        graph.output(y, name="y")
        exact = x @ w.numpy().T
        assert np.abs(graph.compute(x=x)["y"] - exact).max() <= 1e-3 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("d", "n_heads", "n_kv_heads", "n_q", "n_kv"),
    [(32, 4, 2, 7, 7), (64, 3, 3, 1, 37), (128, 2, 1, 100, 17), (512, 1, 1, 65, 130), (32, 5, 5, 6, 1),
     (64, 1, 1, 200, 385), (32, 2, 2, 97, 256)],
)  # fmt: skip
def test_attention(backend: Backend, d: int, n_heads: int, n_kv_heads: int, n_q: int, n_kv: int) -> None:
    q = RNG.standard_normal((n_q, n_heads, d)).astype(np.float32) * 3
    # Half of the heads see larger and larger scores, the others smaller ones: keys come in blocks.
    growing = np.linspace(0.1, 2, n_kv, dtype=np.float32)[:, None, None]
    kv = RNG.standard_normal((n_kv, 2 * n_kv_heads, d)).astype(np.float32)
    kv[:, : n_kv_heads // 2] *= growing
    kv[:, n_kv_heads // 2 : n_kv_heads] *= growing[::-1]
    graph = Graph(backend, 64)
    a, b = graph.input(q.shape[::-1], name="q"), graph.input(kv.shape[::-1], name="kv")
    k, v = (ops.view(b, (d, n_kv_heads, n_kv), b.nb[1:3], i * n_kv_heads * b.nb[1]) for i in range(2))
    graph.output(ops.attention(a, k, v, d**-0.5), name="y")
    keys, values = (np.repeat(p.astype(np.float64), n_heads // n_kv_heads, 1) for p in np.split(kv, 2, axis=1))
    scores = np.einsum("qhd,khd->hqk", q.astype(np.float64), keys) * d**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    exact = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), values)
    y = graph.compute(q=q, kv=kv)["y"]
    assert np.abs(y - exact).max() <= 1e-5 * np.abs(exact).max()
    kv[n_kv // 2] = np.nan  # must not be lost on the way
    assert np.isnan(graph.compute(q=q, kv=kv)["y"]).all()


@pytest.mark.parametrize(("rank", "n_out", "n_y", "at", "n_tokens"), [
    (16, 300, 300, 0, 7), (1, 5, 40, 35, 3), (33, 257, 1000, 512, 40), (4, 64, 192, 64, 1), (20, 1100, 1100, 0, 2),
])  # fmt: skip
def test_add_low_rank(backend: Backend, rank: int, n_out: int, n_y: int, at: int, n_tokens: int) -> None:
    up, h = (RNG.standard_normal(shape).astype(np.float32) for shape in ((n_out, rank), (n_tokens, rank)))
    start = RNG.standard_normal((n_tokens, n_y)).astype(np.float32)
    graph = Graph(backend, 64)
    a, b, c = (graph.input(array.shape[::-1], name=name) for name, array in (("y", start), ("up", up), ("h", h)))
    graph.output(ops.add_low_rank(ops.scale(a, 2.0), b, c, at), name="out")
    out = graph.compute(y=start, up=up, h=h)["out"].reshape(start.shape)
    exact = 2 * start.astype(np.float64)
    exact[:, at : at + n_out] += h.astype(np.float64) @ up.T
    assert np.abs(out - exact).max() <= 1e-6 * rank * np.abs(exact).max()
    np.testing.assert_array_equal(out[:, :at], 2 * start[:, :at])
    np.testing.assert_array_equal(out[:, at + n_out :], 2 * start[:, at + n_out :])
    with pytest.raises(ShapeError, match="do not go together"):
        ops.add_low_rank(ops.scale(a, 2.0), b, c, n_y - n_out + 1)


def test_a_profile_names_them(backend: Backend) -> None:
    graph = Graph(backend, 64)
    x = graph.input((32, 2, 3), name="x")
    graph.output(ops.scale(ops.gelu_f32(ops.attention(x, x, x, 1.0)), 2.0), name="y")
    graph.compute(x=np.ones((3, 2, 32), np.float32))
    assert {"attention", "gelu_f32", "scale"} <= {time.op for time in graph.profile()}


def test_wrong_arguments(backend: Backend) -> None:
    graph = Graph(backend, 64)
    x = graph.input((8, 8, 4), name="x")
    for kernel in ((3, 3, 5, 2), (1, 1, 4, 2)):
        with pytest.raises(ShapeError, match="each 3x3 contiguous"):
            ops.conv_2d_3x3(placed(np.zeros(kernel[::-1], np.float32), Type.F32, backend), x)
    with pytest.raises(ShapeError, match="groups"):
        vector = graph.input((4,), name="v")
        ops.group_norm_scaled(x, vector, vector, 3)
    with pytest.raises(ShapeError, match=r"not f32 of ne \[4\]"):
        ops.channel_norm(x, graph.input((3,)))
    with pytest.raises(ShapeError, match=r"no f32 bias of ne \[8\]"):
        ops.gelu_f32(x, graph.input((4,)))
    with pytest.raises(ShapeError, match="do not go together"):
        ops.attention(graph.input((48, 2, 3)), graph.input((48, 2, 3)), graph.input((48, 2, 3)), 1.0)
    with pytest.raises(ShapeError, match="do not go together"):
        ops.attention(graph.input((32, 3, 3)), graph.input((32, 2, 3)), graph.input((32, 2, 3)), 1.0)
