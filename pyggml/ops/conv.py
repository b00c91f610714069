"""Convolution and pooling.

Kernels come first. Images are [W, H, C, N], signals [L, C, N], kernels [KW, KH, IC, OC]. Strides, padding and dilation
are in the order of `ne`: width, then height, then depth. A size after convolution is
(size + 2·padding - dilation·(kernel - 1) - 1) // stride + 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ShapeError
from ..lib import ffi, lib
from ..tensor import Tensor
from ..types import Type
from .node import binary, graph_of, one, refuse, two

Pair = int | tuple[int, int]
Triple = int | tuple[int, int, int]


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _triple(value: Triple) -> tuple[int, int, int]:
    return (value, value, value) if isinstance(value, int) else value


def _one_signal(x: Tensor) -> None:
    if x.ne[2] * x.ne[3] != 1:
        raise ShapeError(f"conv_1d takes one signal at a time, not {x!r}: use im2col and mul_mat for a batch")


def im2col(
    kernel: Tensor, x: Tensor, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1, *,
    is_2d: bool = True, type: Type = Type.F16,
) -> Tensor:  # fmt: skip
    """The patches of x that the kernel meets, one in each row.

    2-D: x [W, H, IC, N], kernel [KW, KH, IC, OC] (only its shape is used) -> [IC·KH·KW, OW, OH, N].
    1-D: x [L, IC, N], kernel [K, IC, OC] -> [IC·K, OL, N]. x: f32 or f16; result: f16 or f32.
    """
    (s0, s1), (p0, p1), (d0, d1) = _pair(stride), _pair(padding), _pair(dilation)
    return two("im2col", lib.py_ggml_im2col, kernel, x, s0, s1, p0, p1, d0, d1, is_2d, type)


def im2col_back(
    kernel: Tensor, grad: Tensor, ne: Sequence[int], stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1, *,
    is_2d: bool = True,
) -> Tensor:  # fmt: skip
    """The gradient of im2col's x, of shape `ne`, from that of its result. f32."""
    (s0, s1), (p0, p1), (d0, d1) = _pair(stride), _pair(padding), _pair(dilation)
    graph = graph_of(kernel, grad)
    sizes = ffi.new("int64_t[4]", [*ne, 1, 1, 1][:4])
    # The gradient comes first, whatever ggml.h's names of the arguments say.
    ptr = lib.py_ggml_im2col_back(graph.ptr, grad.ptr, kernel.ptr, sizes, s0, s1, p0, p1, d0, d1, is_2d)
    if not ptr:
        refuse("im2col_back", (kernel, grad), (list(ne),))
    return Tensor(ptr, graph)


def im2col_3d(
    kernel: Tensor, x: Tensor, n_channels: int, stride: Triple = 1, padding: Triple = 0, dilation: Triple = 1, *,
    type: Type = Type.F16,
) -> Tensor:  # fmt: skip
    """The patches of a volume. x: f32 [W, H, D, IC·N], kernel [KW, KH, KD, IC·OC] -> [IC·KD·KH·KW, OW, OH, OD·N]."""
    numbers = (*_triple(stride), *_triple(padding), *_triple(dilation))
    return two("im2col_3d", lib.py_ggml_im2col_3d, kernel, x, n_channels, *numbers, type)


def col2im_1d(x: Tensor, stride: int, n_channels_out: int, padding: int = 0) -> Tensor:
    """The columns of a transposed convolution added up. [K·OC, T] -> [(T - 1)·stride + K - 2·padding, OC].

    f32, f16, bf16.
    """
    return one("col2im_1d", lib.py_ggml_col2im_1d, x, stride, n_channels_out, padding)


def conv_1d(kernel: Tensor, x: Tensor, stride: int = 1, padding: int = 0, dilation: int = 1) -> Tensor:
    """1-D convolution by im2col in f16. kernel: f16 [K, IC, OC]; x: f32 [L, IC] -> f32 [OL, OC].

    ShapeError for more than one signal: ggml 0.25 exchanges channels and signals in the result.
    """
    _one_signal(x)
    return two("conv_1d", lib.py_ggml_conv_1d, kernel, x, stride, padding, dilation)


def conv_1d_ph(kernel: Tensor, x: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
    """conv_1d with padding of half the kernel."""
    _one_signal(x)
    return two("conv_1d_ph", lib.py_ggml_conv_1d_ph, kernel, x, stride, dilation)


def conv_1d_dw(kernel: Tensor, x: Tensor, stride: int = 1, padding: int = 0, dilation: int = 1) -> Tensor:
    """Depth-wise 1-D convolution by im2col in f16. kernel: [K, 1, C]; x: f32 [L, C] -> f32 [OL, C]."""
    return two("conv_1d_dw", lib.py_ggml_conv_1d_dw, kernel, x, stride, padding, dilation)


def conv_1d_dw_ph(kernel: Tensor, x: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
    """conv_1d_dw with padding of half the kernel."""
    return two("conv_1d_dw_ph", lib.py_ggml_conv_1d_dw_ph, kernel, x, stride, dilation)


def conv_transpose_1d(kernel: Tensor, x: Tensor, stride: int = 1) -> Tensor:
    """Transposed 1-D convolution. kernel: f16 or f32 [K, OC, IC]; x: f32 [L, IC] -> f32 [(L - 1)·stride + K, OC].

    ggml has neither padding nor dilation here.
    """
    return two("conv_transpose_1d", lib.py_ggml_conv_transpose_1d, kernel, x, stride, 0, 1)


def conv_2d(kernel: Tensor, x: Tensor, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1) -> Tensor:
    """2-D convolution by im2col and mul_mat; the patches are f16 (f32 for a bf16 kernel).

    kernel: f16, f32 or bf16 [KW, KH, IC, OC]; x: f32 [W, H, IC, N] -> f32 [OW, OH, OC, N].
    """
    (s0, s1), (p0, p1), (d0, d1) = _pair(stride), _pair(padding), _pair(dilation)
    return two("conv_2d", lib.py_ggml_conv_2d, kernel, x, s0, s1, p0, p1, d0, d1)


def conv_2d_direct(kernel: Tensor, x: Tensor, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1) -> Tensor:
    """2-D convolution in one operation, its patches in small pieces and in the kernel's type.

    kernel: f32 or f16 [KW, KH, IC, OC], contiguous; x: f32 [W, H, IC, N] -> f32 [OW, OH, OC, N].
    """
    (s0, s1), (p0, p1), (d0, d1) = _pair(stride), _pair(padding), _pair(dilation)
    return two("conv_2d_direct", lib.py_ggml_conv_2d_direct, kernel, x, s0, s1, p0, p1, d0, d1)


def conv_2d_sk_p0(kernel: Tensor, x: Tensor) -> Tensor:
    """conv_2d with a stride of the kernel's size and no padding: patches side by side."""
    return binary("conv_2d_sk_p0", lib.py_ggml_conv_2d_sk_p0, kernel, x)


def conv_2d_s1_ph(kernel: Tensor, x: Tensor) -> Tensor:
    """conv_2d with stride 1 and padding of half the kernel: the size stays."""
    return binary("conv_2d_s1_ph", lib.py_ggml_conv_2d_s1_ph, kernel, x)


def conv_2d_dw(kernel: Tensor, x: Tensor, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1) -> Tensor:
    """Depth-wise 2-D convolution by im2col. kernel: f16 [KW, KH, 1, C]; x: f32 [W, H, C, N] -> f32 [OW, OH, C, N]."""
    (s0, s1), (p0, p1), (d0, d1) = _pair(stride), _pair(padding), _pair(dilation)
    return two("conv_2d_dw", lib.py_ggml_conv_2d_dw, kernel, x, s0, s1, p0, p1, d0, d1)


def conv_2d_dw_direct(kernel: Tensor, x: Tensor, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1) -> Tensor:
    """Depth-wise 2-D convolution in one operation.

    kernel: f32 [KW, KH, 1, C]; x: f32 [W, H, C, N] -> [OW, OH, C, N].
    """
    (s0, s1), (p0, p1), (d0, d1) = _pair(stride), _pair(padding), _pair(dilation)
    return two("conv_2d_dw_direct", lib.py_ggml_conv_2d_dw_direct, kernel, x, s0, s1, p0, p1, d0, d1)


def conv_transpose_2d(kernel: Tensor, x: Tensor, stride: int = 1) -> Tensor:
    """Transposed 2-D convolution without padding.

    kernel: f16 or f32 [KW, KH, OC, IC]; x: f32 [W, H, IC, N] -> f32 [(W - 1)·stride + KW, (H - 1)·stride + KH, OC, N].
    """
    return two("conv_transpose_2d", lib.py_ggml_conv_transpose_2d_p0, kernel, x, stride)


def conv_3d(
    kernel: Tensor, x: Tensor, n_channels: int, stride: Triple = 1, padding: Triple = 0, dilation: Triple = 1
) -> Tensor:
    """3-D convolution by im2col in f16.

    kernel: [KW, KH, KD, IC·OC]; x: f32 [W, H, D, IC·N] -> f32 [OW, OH, OD, OC·N].
    """
    numbers = (*_triple(stride), *_triple(padding), *_triple(dilation))
    return two("conv_3d", lib.py_ggml_conv_3d, kernel, x, n_channels, *numbers)


def conv_3d_direct(
    kernel: Tensor, x: Tensor, n_channels: int, n_channels_out: int, n_batch: int = 1, stride: Triple = 1,
    padding: Triple = 0, dilation: Triple = 1,
) -> Tensor:  # fmt: skip
    """3-D convolution in one operation.

    kernel: f32 or f16 [KW, KH, KD, IC·OC]; x: f32 [W, H, D, IC·N] -> [OW, OH, OD, OC·N].
    """
    numbers = (*_triple(stride), *_triple(padding), *_triple(dilation))
    return two("conv_3d_direct", lib.py_ggml_conv_3d_direct, kernel, x, *numbers, n_channels, n_batch, n_channels_out)


def pool_1d(x: Tensor, op: int, kernel: int, stride: int, padding: int = 0) -> Tensor:
    """Maximum or mean of windows of a row; op: a PoolOp.

    f32 or f16 [L, ...] -> f32 [(L + 2·padding - kernel) // stride + 1, ...].
    """
    return one("pool_1d", lib.py_ggml_pool_1d, x, op, kernel, stride, padding)


def pool_2d(x: Tensor, op: int, kernel: Pair, stride: Pair, padding: float | tuple[float, float] = 0.0) -> Tensor:
    """Maximum or mean of windows of an image; op: a PoolOp. f32 or f16 [W, H, C, N] -> f32 [OW, OH, C, N]."""
    (k0, k1), (s0, s1) = _pair(kernel), _pair(stride)
    p0, p1 = padding if isinstance(padding, tuple) else (padding, padding)
    if min(k0, k1, s0, s1) < 1:
        raise ShapeError(f"pool_2d: kernel {kernel} and stride {stride} are at least 1")
    return one("pool_2d", lib.py_ggml_pool_2d, x, op, k0, k1, s0, s1, p0, p1)


def pool_2d_back(
    grad: Tensor, x: Tensor, op: int, kernel: Pair, stride: Pair, padding: float | tuple[float, float] = 0.0
) -> Tensor:
    """The gradient of pool_2d's x from that of its result. f32."""
    (k0, k1), (s0, s1) = _pair(kernel), _pair(stride)
    p0, p1 = padding if isinstance(padding, tuple) else (padding, padding)
    return two("pool_2d_back", lib.py_ggml_pool_2d_back, grad, x, op, k0, k1, s0, s1, p0, p1)
