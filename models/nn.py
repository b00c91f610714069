"""The parts that networks are made of. The path of an attribute is the name of its tensor.

Shapes are ggml's `ne`, fastest first: a linear layer's activations have ne [n_features, n_tokens], pictures have
ne [width, height, n_channels, n].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loader.params import Param
from pyggml import Graph, Tensor, Type, ops
from pyggml.types import Prec


class Module:
    """A tree of parameters. Lists stand for numbered children; None fills a number that has no parameters."""

    def named_params(self, prefix: str = "") -> Iterator[tuple[str, Param]]:
        """(name, Param) of every parameter below, in the order the attributes were made."""
        for name, value in vars(self).items():
            yield from _named(f"{prefix}{name}", value)

    def params(self) -> dict[str, Param]:
        """name -> Param, as `loader.load_params` takes it."""
        return dict(self.named_params())

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """(path, module) of every module below, in the order the attributes were made."""
        for name, value in vars(self).items():
            for path, module in _modules(f"{prefix}{name}", value):
                yield path, module
                yield from module.named_modules(f"{path}.")


def find(module: Module, path: str) -> Module | None:
    """The module at a path such as "layers.0.attention.out"; None when there is none."""
    value: Any = module
    for part in path.split("."):
        if isinstance(value, (list, tuple)):
            value = value[int(part)] if part.isdigit() and int(part) < len(value) else None
        else:
            value = getattr(value, part, None)
    return value if isinstance(value, Module) else None


def _modules(path: str, value: Any) -> Iterator[tuple[str, Module]]:
    if isinstance(value, Module):
        yield path, value
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _modules(f"{path}.{i}", item)


def _named(path: str, value: Any) -> Iterator[tuple[str, Param]]:
    if isinstance(value, Param):
        yield path, value
    elif isinstance(value, Module):
        yield from value.named_params(f"{path}.")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _named(f"{path}.{i}", item)


def linear(w: Tensor, x: Tensor) -> Tensor:
    """W x by the fastest kernel there is that is exact enough. w: ne [n_in, n_out], x: ne [n_in, n_tokens]."""
    y = ops.mul_mat_fast(w, x)
    return ops.mul_mat(w, x, prec=_sums_in(x)) if y is None else y


def _sums_in(x: Tensor) -> int | None:
    """The precision that sums of products are asked for. Vulkan's default is f16: the error then grows with the square
    root of a product's length, to 1.5 % at 10,240 (docs/devices.md). The processor always sums in f32.
    """
    return None if on_cpu(x) else Prec.F32


class Linear(Module):
    """y = W x + b. Weight ne [n_in, n_out], in whatever type the file has.

    `headroom`: where x is rounded to f16 on its way, it is divided by this power of two, and the product multiplied.
    `deltas`: what LoRAs add to the product as it is computed, each as delta(y, x) -> y.
    """

    def __init__(
        self, n_in: int, n_out: int, bias: bool = True, type: Type | None = None, headroom: float = 1.0
    ) -> None:
        self.weight = Param((n_in, n_out), type, product=True)
        self.bias = Param((n_out,), Type.F32) if bias else None
        self.headroom = headroom
        self.deltas: tuple[Callable[[Tensor, Tensor], Tensor], ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        y = self.product(x)  # ne [n_out, n_tokens]
        return y if self.bias is None else ops.add(y, self.bias.tensor)

    def product(self, x: Tensor) -> Tensor:
        """W x, with what LoRAs add to it, without the bias."""
        w = self.weight.tensor
        if self.headroom != 1 and _rounds_to_f16(w, x):
            y = ops.scale(linear(w, ops.scale(x, 1 / self.headroom)), self.headroom)
        else:
            y = linear(w, x)
        for add_delta in self.deltas:
            y = add_delta(y, x)
        return y


class RMSNorm(Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the fastest dimension."""

    def __init__(self, n: int, eps: float) -> None:
        self.weight = Param((n,), Type.F32)
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return ops.mul(ops.rms_norm(x, self.eps), self.weight.tensor)


def linear_gelu(layer: Linear, x: Tensor) -> Tensor:
    """GELU of a layer's result, by the tanh formula: y/2 (1 + tanh(sqrt(2/pi) (y + 0.044715 y^3)))."""
    if not on_cpu(x):
        return ops.gelu(layer(x))
    # ggml's own looks it up in a table of f16 on the processor
    return ops.gelu_f32(layer.product(x), None if layer.bias is None else layer.bias.tensor)


class Embedding(Module):
    """Rows of a table by number. Weight ne [n_features, n_rows]."""

    def __init__(self, n_rows: int, n: int) -> None:
        self.weight = Param((n, n_rows))

    def __call__(self, ids: Tensor) -> Tensor:
        return ops.get_rows(self.weight.tensor, ids)  # ne [n_features, n_ids], f32

    def checked(self, ids: Any) -> NDArray[np.int32]:
        """Token ids [n] as an array. ValueError for none, and for one that is not in the table."""
        found: NDArray[np.int32] = np.asarray(ids, np.int32)
        n_rows = self.weight.ne[1]
        if found.ndim != 1 or not found.size:
            raise ValueError(f"token ids are a list of at least one, not of shape {found.shape}")
        if found.min() < 0 or found.max() >= n_rows:
            raise ValueError(f"token id {found.max()} is not in the encoder's table of {n_rows} rows")
        return found


class GroupNorm(Module):
    """Normalise groups of channels over all pixels, then scale and shift each channel; SiLU after it on request."""

    N_GROUPS = 32

    def __init__(self, n: int, eps: float = 1e-6) -> None:
        self.weight = Param((n,), Type.F32)
        self.bias = Param((n,), Type.F32)
        self.eps = eps

    def __call__(self, x: Tensor, silu: bool = False) -> Tensor:
        if on_cpu(x):
            return ops.group_norm_scaled(
                x, self.weight.tensor, self.bias.tensor, self.N_GROUPS, self.eps, silu=silu
            )
        y = ops.group_norm(x, self.N_GROUPS, self.eps)  # ne [width, height, n_channels]
        y = ops.add(ops.mul(y, _channels(x, self.weight)), _channels(x, self.bias))
        return ops.silu(y) if silu else y


class ChannelNorm(Module):
    """Each pixel's channels divided by their root mean square, times gamma; SiLU after it on request."""

    def __init__(self, n: int) -> None:
        self.gamma = Param((n,), Type.F32)

    def __call__(self, x: Tensor, silu: bool = False) -> Tensor:
        """x and result: ne [width, height, n_channels]."""
        eps = 1e-24 / x.ne[2]  # the reference divides by the length, but by no less than 1e-12
        if on_cpu(x):
            return ops.channel_norm(x, self.gamma.tensor, eps, silu=silu)
        y = ops.rms_norm(ops.cont(ops.permute(x, 1, 2, 0, 3)), eps)  # ne [n_channels, width, height]
        y = ops.mul(ops.cont(ops.permute(y, 2, 0, 1, 3)), _channels(x, self.gamma))
        return ops.silu(y) if silu else y


class Conv2d(Module):
    """A 3x3 convolution that keeps the size, or halves it (then padded at the right and bottom only).

    Weight ne [3, 3, n_in, n_out]; [3, 3, n_frames, n_in * n_out] when it is a causal one over several frames, of which
    the picture is the last and those before it are empty.
    """

    def __init__(self, n_in: int, n_out: int, stride: int = 1, n_frames: int = 1, bias: bool = True) -> None:
        self.weight = Param((3, 3, n_in, n_out) if n_frames == 1 else (3, 3, n_frames, n_in * n_out))
        self.bias = Param((n_out,), Type.F32) if bias else None
        self.stride = stride
        self.n_frames = n_frames

    def _kernel(self, x: Tensor) -> Tensor:
        """ne [3, 3, n_in, n_out]: the whole weight, or a view of its last frame."""
        w, n_in, last = self.weight.tensor, x.ne[2], self.n_frames - 1
        if not last:
            return w
        nb = (w.nb[1], w.nb[3], n_in * w.nb[3])
        return ops.view(graph_use(x, w), (3, 3, n_in, w.ne[3] // n_in), nb, offset=last * w.nb[2])

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        w = self._kernel(x)
        if self.stride == 1 and on_cpu(x):
            return ops.conv_2d_3x3(w, x, None if self.bias is None else self.bias.tensor, residual)
        pad = 1
        if self.stride == 2:
            x, pad = ops.pad(x, 1, 1), 0
        columns = ops.im2col(w, x, stride=self.stride, padding=pad, type=Type.F32)
        # Pixels as rows: the order that ggml multiplies fastest, and the result has a picture's layout.
        width, height = columns.ne[1:3]
        kernel = ops.reshape(ops.cast(graph_use(x, w), Type.F32), -1, w.ne[3])  # ne [9 * n_in, n_out]
        y = ops.mul_mat(ops.reshape(columns, -1, width * height), kernel, prec=_sums_in(x))  # ne [pixels, n_out]
        y = ops.reshape(y, width, height, -1)
        if self.bias is not None:
            y = ops.add(y, _channels(x, self.bias))
        return y if residual is None else ops.add(y, residual)


class PixelLinear(Module):
    """A linear layer on the channels of each pixel; a file may store its weight as a 1x1 convolution."""

    def __init__(self, n_in: int, n_out: int, bias: bool = True) -> None:
        self.weight = Param((n_in, n_out))
        self.bias = Param((n_out,), Type.F32) if bias else None

    def tokens(self, x: Tensor) -> Tensor:
        """x: ne [n_in, n_pixels] to ne [n_out, n_pixels]."""
        y = linear(self.weight.tensor, x)
        return y if self.bias is None else ops.add(y, self.bias.tensor)

    def __call__(self, x: Tensor) -> Tensor:
        """x: ne [width, height, n_in] to ne [width, height, n_out]."""
        width, height, n_in, _ = x.ne
        pixels = ops.cont(ops.transpose(ops.reshape(x, width * height, n_in)))  # ne [n_in, n_pixels]
        return ops.reshape(ops.cont(ops.transpose(self.tokens(pixels))), width, height, -1)


def on_cpu(x: Tensor) -> bool:
    """True in a graph for the CPU, where our own kernels run."""
    graph = x.ctx
    return isinstance(graph, Graph) and graph.backend.is_cpu


def _rounds_to_f16(w: Tensor, x: Tensor) -> bool:
    """Whether a product may hold x, or sums of it, in f16. On the processor: with f16 weights, and for q4_1 and q5_1,
    whose kernel takes blocks of x with their sums. Elsewhere nobody promises anything.
    """
    return not on_cpu(x) or w.type in (Type.F16, Type.Q4_1, Type.Q5_1)


def graph_use(x: Tensor, weight: Tensor) -> Tensor:
    """`weight` as a tensor of x's graph, for operations on weights alone."""
    graph = x.ctx
    assert isinstance(graph, Graph)
    return graph.use(weight)


def _channels(x: Tensor, param: Param) -> Tensor:
    """A vector ne [n] as ne [1, 1, n], to be broadcast over pixels."""
    return ops.reshape(graph_use(x, param.tensor), 1, 1, -1)


def side_by_side(parts: Sequence[Tensor], dim: int = 1) -> Tensor:
    """Tokens of several streams one after the other; the last dimension, `dim`, counts them."""
    return reduce(lambda a, b: ops.concat(a, b, dim=dim), parts)


def tokens(x: Tensor, start: int, n: int, dim: int = 1) -> Tensor:
    """`n` tokens from `start`, as a view; the last dimension, `dim`, counts them."""
    if n == x.ne[dim]:
        return x
    return ops.view(x, (*x.ne[:dim], n), x.nb[1 : dim + 1], start * x.nb[dim])  # a dense one where x is dense


def split_heads(x: Tensor, i_part: int, n_heads: int, head_dim: int) -> Tensor:
    """Heads `i_part * n_heads ...` of ne [n_parts * n_heads * head_dim, n_tokens], as a view.

    ne [head_dim, n_heads, n_tokens]
    """
    size = 4  # f32
    stride = x.nb[1]
    offset = i_part * n_heads * head_dim * size
    return ops.view(x, (head_dim, n_heads, x.ne[1]), (head_dim * size, stride), offset)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """As flash_attn_ext, with all scores of n_tokens * n_tokens * n_heads in memory."""
    scores = ops.mul_mat(k, q, prec=_sums_in(q))  # ne [n_kv, n_tokens, n_heads]
    scores = ops.soft_max_ext(scores, mask, scale=q.ne[0] ** -0.5)
    v = ops.cont(ops.permute(v, 1, 0, 2, 3))  # ne [n_kv, head_dim, n_kv_heads]
    y = ops.mul_mat(v, scores, prec=_sums_in(q))  # ne [head_dim, n_tokens, n_heads]
    return ops.cont(ops.permute(y, 0, 2, 1, 3))


def causal_mask(n: int) -> NDArray[np.float16]:
    """For `attention`, numpy [n, n]: no token sees one that follows it."""
    return np.triu(np.full((n, n), -np.inf, np.float16), 1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, headroom: float = 1.0) -> Tensor:
    """softmax(q k^T / sqrt(head_dim) + mask) v for each head.

    q: ne [head_dim, n_heads, n_tokens, n_batch]; k, v: ne [head_dim, n_kv_heads, n_tokens, n_batch], n_heads a multiple
    of n_kv_heads, consecutive heads sharing one; mask: f16, ne [n_tokens, n_tokens].
    Returns ne [head_dim * n_heads, n_tokens * n_batch].
    `headroom`: where v is rounded to f16, it is divided by this power of two, and the result multiplied.

    One operation that never holds all scores, where the backend has one for these shapes and `flash_attention` is on.
    """
    head_dim, n_heads, n_tokens, n_batch = q.ne
    graph = q.ctx
    assert isinstance(graph, Graph)
    flash = graph.backend.flash_attention
    if flash and mask is None and head_dim % 32 == 0 and n_batch == 1 and on_cpu(q):
        return ops.reshape(ops.attention(q, k, v, head_dim**-0.5), head_dim * n_heads, n_tokens)
    guarded = headroom != 1 and not on_cpu(q)
    if guarded:
        v = ops.scale(v, 1 / headroom)
    q, k, v = (ops.permute(t, 0, 2, 1, 3) for t in (q, k, v))  # ne [head_dim, n_tokens, n_heads]
    y = None
    if flash:
        y = ops.flash_attn_ext(q, k, v, mask, scale=head_dim**-0.5, prec=_sums_in(q))
    if y is None or not graph.backend.supports(y):
        y = _plain_attention(q, k, v, mask)  # ne [head_dim, n_heads, n_tokens]
    if guarded:
        y = ops.scale(y, headroom)
    return ops.reshape(y, head_dim * n_heads, n_tokens * n_batch)
