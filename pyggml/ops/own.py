"""Operations of our own, in C, for the CPU: where ggml's are far slower or larger, or less exact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ShapeError
from ..lib import lib
from ..tensor import Tensor
from ..types import Type
from .node import NULL, graph_of, refuse

if TYPE_CHECKING:
    from ..graph import Graph

_KERNELS = (Type.F32, Type.F16, Type.BF16)


def conv_2d_3x3(kernel: Tensor, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """A 3x3 convolution with padding 1 and stride 1, plus `bias` and `residual`, by Winograd's F(4x4, 3x3).

    x: f32 [W, H, IC, N], contiguous; kernel: f32, f16 or bf16 [3, 3, IC, OC], each 3x3 contiguous, such as a view of
    one time step of a 3-D kernel; bias: f32 [OC]; residual and result: f32 [W, H, OC, N].
    Error against exact arithmetic about 2e-6 of the output (rms), as a plain f32 sum has 1e-6.
    ShapeError when shapes or types differ from that, or the graph is not the CPU's.
    """
    width, height, channels, n = x.ne
    size = kernel.nb[0]
    if (
        kernel.ne[:3] != (3, 3, channels) or kernel.type not in _KERNELS
        or kernel.nb[:2] != (size, 3 * size) or size != kernel.type.type_size
    ):  # fmt: skip
        wanted = f"[3, 3, {channels}, n_out]"
        raise ShapeError(f"conv_2d_3x3: {kernel!r} is no f32, f16 or bf16 kernel of ne {wanted}, each 3x3 contiguous")
    if x.type is not Type.F32 or not x.is_contiguous:
        raise ShapeError(f"conv_2d_3x3: {x!r} is not f32 and contiguous")
    n_out = kernel.ne[3]
    if bias is not None and (bias.type is not Type.F32 or bias.ne != (n_out, 1, 1, 1)):
        raise ShapeError(f"conv_2d_3x3: {bias!r} is no f32 bias of ne [{n_out}]")
    if residual is not None and (
        residual.type is not Type.F32 or residual.ne != (width, height, n_out, n) or not residual.is_contiguous
    ):
        wanted = f"[{width}, {height}, {n_out}, {n}]"
        raise ShapeError(f"conv_2d_3x3: {residual!r} is no contiguous f32 tensor of ne {wanted}")
    graph = graph_of(*(t for t in (x, kernel, bias, residual) if t is not None))
    _check_cpu("conv_2d_3x3", graph)
    ptr = lib.py_pyggml_conv2d_3x3(
        graph.ptr, x.ptr, kernel.ptr, NULL if bias is None else bias.ptr, NULL if residual is None else residual.ptr,
        graph.backend.n_threads,
    )  # fmt: skip
    return _made(ptr, graph, "conv_2d_3x3", (x, kernel, bias, residual))


def group_norm_scaled(
    x: Tensor, weight: Tensor, bias: Tensor, n_groups: int, eps: float = 1e-6, *, silu: bool = False
) -> Tensor:
    """Group norm, then weight * y + bias for each channel, then SiLU when asked: one pass instead of four.

    x: f32 [W, H, C, N], contiguous; weight, bias: f32 [C]; n_groups divides C. Result like x.
    ShapeError when shapes or types differ from that, or the graph is not the CPU's.
    """
    channels = x.ne[2]
    if x.type is not Type.F32 or not x.is_contiguous:
        raise ShapeError(f"group_norm_scaled: {x!r} is not f32 and contiguous")
    if n_groups < 1 or channels % n_groups:
        raise ShapeError(f"group_norm_scaled: {channels} channels do not divide into {n_groups} groups")
    for tensor in (weight, bias):
        if tensor.type is not Type.F32 or tensor.ne != (channels, 1, 1, 1):
            raise ShapeError(f"group_norm_scaled: {tensor!r} is not f32 of ne [{channels}]")
    graph = graph_of(x, weight, bias)
    _check_cpu("group_norm_scaled", graph)
    ptr = lib.py_pyggml_group_norm(graph.ptr, x.ptr, weight.ptr, bias.ptr, n_groups, eps, silu)
    return _made(ptr, graph, "group_norm_scaled", (x, weight, bias), (n_groups, eps, silu))


def channel_norm(x: Tensor, gamma: Tensor, eps: float = 0.0, *, silu: bool = False) -> Tensor:
    """gamma * x / sqrt(mean of x² over the channels + eps) for each pixel, then SiLU when asked.

    x: f32 [W, H, C, N], contiguous; gamma: f32 [C]. Result like x.
    ShapeError when shapes or types differ from that, or the graph is not the CPU's.
    """
    if x.type is not Type.F32 or not x.is_contiguous:
        raise ShapeError(f"channel_norm: {x!r} is not f32 and contiguous")
    if gamma.type is not Type.F32 or gamma.ne != (x.ne[2], 1, 1, 1):
        raise ShapeError(f"channel_norm: {gamma!r} is not f32 of ne [{x.ne[2]}]")
    graph = graph_of(x, gamma)
    _check_cpu("channel_norm", graph)
    ptr = lib.py_pyggml_channel_norm(graph.ptr, x.ptr, gamma.ptr, eps, silu)
    return _made(ptr, graph, "channel_norm", (x, gamma), (eps, silu))


def gelu_f32(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU of x + bias by its tanh formula, in f32, where ggml's `gelu` looks it up in a table of f16.

    x: f32 [N, ...], contiguous; bias: f32 [N]. Result like x.
    ShapeError when shapes or types differ from that, or the graph is not the CPU's.
    """
    if x.type is not Type.F32 or not x.is_contiguous:
        raise ShapeError(f"gelu_f32: {x!r} is not f32 and contiguous")
    if bias is not None and (bias.type is not Type.F32 or bias.ne != (x.ne[0], 1, 1, 1)):
        raise ShapeError(f"gelu_f32: {bias!r} is no f32 bias of ne [{x.ne[0]}]")
    graph = graph_of(x, bias)
    _check_cpu("gelu_f32", graph)
    ptr = lib.py_pyggml_gelu(graph.ptr, x.ptr, NULL if bias is None else bias.ptr)
    return _made(ptr, graph, "gelu_f32", (x, bias))


def mul_mat_fast(w: Tensor, x: Tensor) -> Tensor | None:
    """mul_mat(w, x) by our own kernel, or None where ggml's is at least as good: ask each time.

    w: q8_0 or q4_K [K, N]; x: f32 [K, M, ...], contiguous; result: f32 [N, M, ...]. For x86 processors with AVX2 or
    AVX-512; as exact as ggml's (q4_K), or more (q8_0: activations keep 16 bits instead of 8).
    """
    graph = graph_of(w, x)
    if not graph.backend.is_cpu or not lib.pyggml_mul_mat_fits(w.ptr, x.ptr):
        return None
    ptr = lib.py_pyggml_mul_mat(graph.ptr, w.ptr, x.ptr)
    return _made(ptr, graph, "mul_mat_fast", (w, x))


def add_low_rank(y: Tensor, up: Tensor, h: Tensor, at: int = 0) -> Tensor:
    """y with up h added to its features at.., in place: the result is a view of y.

    y: f32 [n_y, n_tokens]; up: f32 [r, n_out]; h: f32 [r, n_tokens]; all contiguous. ShapeError when shapes or types
    differ from that, or the graph is not the CPU's.
    """
    for t in (y, up, h):
        if t.type is not Type.F32 or not t.is_contiguous or t.n_dims > 2:
            raise ShapeError(f"add_low_rank: {t!r} is no contiguous f32 matrix")
    if up.ne[0] != h.ne[0] or h.ne[1] != y.ne[1] or not 0 <= at <= y.ne[0] - up.ne[1]:
        raise ShapeError(f"add_low_rank: {y!r}, {up!r} and {h!r} at {at} do not go together")
    graph = graph_of(y, up, h)
    _check_cpu("add_low_rank", graph)
    ptr = lib.py_pyggml_add_low_rank(graph.ptr, y.ptr, up.ptr, h.ptr, at)
    return _made(ptr, graph, "add_low_rank", (y, up, h), (at,))


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q kᵀ) v for each head, in f32 and without a mask.

    q: f32 [D, n_heads, n_q], D a multiple of 32; k, v: f32 [D, n_kv_heads, n_kv], n_heads a multiple of n_kv_heads:
    consecutive heads share one. All may be views with rows of their own strides. Result: f32 [D, n_heads, n_q].
    ShapeError when shapes or types differ from that, or the graph is not the CPU's.
    """
    d, n_heads, _, batch = q.ne
    n_kv_heads = k.ne[1]
    if k.ne != v.ne or (k.ne[0], k.ne[3], batch) != (d, 1, 1) or d % 32 or not n_kv_heads or n_heads % n_kv_heads:
        raise ShapeError(f"attention: {q!r}, {k!r} and {v!r} do not go together")
    if any(t.type is not Type.F32 or t.nb[0] != 4 for t in (q, k, v)):
        raise ShapeError("attention: q, k and v must be f32 with their heads' elements side by side")
    graph = graph_of(q, k, v)
    _check_cpu("attention", graph)
    ptr = lib.py_pyggml_attention(graph.ptr, q.ptr, k.ptr, v.ptr, scale, graph.backend.n_threads)
    return _made(ptr, graph, "attention", (q, k, v), (scale,))


def _made(ptr: Any, graph: Graph, name: str, args: tuple[Tensor | None, ...], params: tuple[Any, ...] = ()) -> Tensor:
    """The result, named after what makes it: ggml has one name for all operations that are not its own."""
    if ptr == NULL:
        refuse(name, args, params)
    tensor = Tensor(ptr, graph)
    tensor.name = f"{name}()"
    return tensor


def _check_cpu(name: str, graph: Graph) -> None:
    if not graph.backend.is_cpu:
        raise ShapeError(f"{name} is computed by the CPU only, this graph is {graph.backend.device.name}'s")
