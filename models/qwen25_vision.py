"""Qwen2.5-VL's vision tower: a still picture to rows that stand in a prompt, one for each 28 x 28 pixels.

- patches of 14 x 14 pixels; four that lie in a square make one row at the end
- most blocks attend within windows of 8 x 8 patches, every eighth to all patches; rope over rows and columns
- tokens are ordered by windows, windows of one size together, so that attention within them is one batch without a mask
- the model is made for videos, two frames at a time: a still picture is both of them
- the tensor names are llama.cpp's (mmproj files); `RENAMES` turns Hugging Face's into them
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil, floor, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loader.checkpoint import Checkpoint
from loader.errors import LoadError
from loader.params import Param
from pyggml import Backend, Graph, Tensor, Type, ops

from .compute import Compute
from .detected import detected, n_blocks, shape
from .nn import Linear, Module, RMSNorm, attention, graph_use, linear, linear_gelu

MERGE = 2  # patches along a side of what becomes one row
ROPE_THETA = 10000.0
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # of CLIP's pictures
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

RENAMES: list[tuple[str, str | None]] = [
    (r"^(?:model\.)?visual\.patch_embed\.proj\.", "v.patch_embd."),
    (r"^v\.patch_embd\.weight\.1$", "v.patch_embd_1.weight"),
    (r"^(?:model\.)?visual\.blocks\.(\d+)\.norm([12])\.", r"v.blk.\1.ln\2."),
    (r"^(?:model\.)?visual\.blocks\.(\d+)\.attn\.qkv\.", r"v.blk.\1.attn_qkv."),
    (r"^(?:model\.)?visual\.blocks\.(\d+)\.attn\.proj\.", r"v.blk.\1.attn_out."),
    (r"^(?:model\.)?visual\.blocks\.(\d+)\.mlp\.(gate|up|down)_proj\.", r"v.blk.\1.ffn_\2."),
    (r"^(?:model\.)?visual\.merger\.ln_q\.", "v.post_ln."),
    (r"^(?:model\.)?visual\.merger\.mlp\.", "mm."),
    (r"^(?!v\.|mm\.).*$", None),  # the language model, in files that have both
]


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the tower, from the shapes in its file, its metadata or its config.json."""

    dim: int
    n_layers: int
    n_heads: int
    ff_dim: int
    out_dim: int
    patch: int  # pixels
    window: int  # pixels
    full_blocks: tuple[int, ...]  # blocks that attend to all patches
    fused_qkv: bool
    split_frames: bool  # a kernel for each of the two frames
    norm_eps: float = 1e-6
    tanh_gelu: bool = False  # behind the first of the last two layers, as stable-diffusion.cpp has it

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def multiple(self) -> int:
        """What the sides of a picture must be multiples of, in pixels."""
        return self.patch * MERGE

    @classmethod
    @detected("vision tower of Qwen2.5-VL")
    def from_checkpoint(cls, checkpoint: Checkpoint) -> VisionConfig:
        """`checkpoint` under llama.cpp's names. LoadError when it is no vision tower of Qwen2.5-VL."""
        ne = partial(shape, "Qwen2.5-VL vision tower", checkpoint)
        meta, config = checkpoint.metadata, checkpoint.config.get("vision_config") or {}
        n_layers = n_blocks(checkpoint, "v.blk")
        every = int(meta.get("clip.vision.n_wa_pattern") or 8)
        full = config.get("fullatt_block_indexes")
        found = cls(
            dim=ne("v.post_ln.weight")[0],
            n_layers=n_layers,
            n_heads=int(meta.get("clip.vision.attention.head_count") or config.get("num_heads") or 16),
            ff_dim=ne("v.blk.0.ffn_gate.weight")[1],
            out_dim=ne("mm.2.weight")[1],
            patch=ne("v.patch_embd.weight")[0],
            window=int(config.get("window_size") or 112),
            full_blocks=tuple(full if full is not None else range(every - 1, n_layers, every)),
            fused_qkv="v.blk.0.attn_qkv.weight" in checkpoint,
            split_frames="v.patch_embd_1.weight" in checkpoint,
        )
        if found.dim % found.n_heads or found.head_dim % 4 or found.window % found.multiple:
            problem = f"{found.dim} features, {found.n_heads} heads and windows of {found.window} pixels do not divide"
            raise LoadError(problem, path=checkpoint.path)
        return found


@dataclass(frozen=True)
class Layout:
    """The order of a picture's tokens: `order[i]` is the merged unit (row by row) whose four patches are tokens
    4 i ... 4 i + 3; `windows` are (patches of a window, how many such windows there are), in the order of the tokens.
    """

    rows: int  # of merged units
    columns: int
    order: NDArray[np.int64]
    windows: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, rows: int, columns: int, side: int) -> Layout:
        """Windows of side x side merged units from the top left; those at the right and the bottom may be smaller."""
        row, column = np.divmod(np.arange(rows * columns), columns)
        window = row // side * -(-columns // side) + column // side
        size = np.bincount(window)[window]
        order = np.lexsort((window, size))
        sizes, counts = np.unique(np.bincount(window)[np.unique(window)], return_counts=True)
        windows = tuple((MERGE**2 * int(n), int(count)) for n, count in zip(sizes, counts, strict=True))
        return cls(rows, columns, order, windows)

    def positions(self) -> NDArray[np.int32]:
        """[4 * n_tokens]: row and column of each patch, as rope takes them."""
        row, column = np.divmod(self.order, self.columns)
        inner_row, inner_column = np.divmod(np.arange(MERGE**2), MERGE)
        rows = (row[:, None] * MERGE + inner_row).ravel()
        columns = (column[:, None] * MERGE + inner_column).ravel()
        # ggml wants four kinds of positions, of which two are counted
        return np.concatenate([rows, columns, np.zeros(2 * rows.size, np.int64)]).astype(np.int32)

    def patches(self, picture: NDArray[np.float32], patch: int) -> NDArray[np.float32]:
        """A picture [3, H, W] as tokens [n_tokens, 3 * patch * patch]."""
        blocks = picture.reshape(3, self.rows, MERGE, patch, self.columns, MERGE, patch)
        units = blocks.transpose(1, 4, 2, 5, 0, 3, 6).reshape(self.rows * self.columns, -1)
        return np.ascontiguousarray(units[self.order]).reshape(-1, 3 * patch * patch)


class Kernel(Module):
    """A kernel over a patch's pixels: ne [patch, patch, 3, n_out], or [patch, patch, 2, 3 * n_out] for two frames."""

    def __init__(self, patch: int, n_out: int, n_frames: int) -> None:
        self.weight = Param((patch, patch, 3, n_out) if n_frames == 1 else (patch, patch, n_frames, 3 * n_out))
        self.n_frames = n_frames
        self.n_out = n_out

    def __call__(self, x: Tensor) -> Tensor:
        """x: pixels of patches, ne [patch * patch * 3, n]; the two frames are the same."""
        if self.n_frames > 1:
            n_in, n = x.ne[:2]
            x = ops.reshape(x, n_in // 3, 1, 3, n)
            x = ops.repeat(x, (n_in // 3, self.n_frames, 3, n))
            x = ops.reshape(x, self.n_frames * n_in, n)
        return linear(ops.reshape(graph_use(x, self.weight.tensor), -1, self.n_out), x)  # ne [n_out, n]


class Block(Module):
    """x += attention(norm x); x += feed_forward(norm x)."""

    def __init__(self, config: VisionConfig) -> None:
        c = config
        self.ln1 = RMSNorm(c.dim, c.norm_eps)
        if c.fused_qkv:
            self.attn_qkv = Linear(c.dim, 3 * c.dim)
        else:
            self.attn_q = Linear(c.dim, c.dim)
            self.attn_k = Linear(c.dim, c.dim)
            self.attn_v = Linear(c.dim, c.dim)
        self.attn_out = Linear(c.dim, c.dim)
        self.ln2 = RMSNorm(c.dim, c.norm_eps)
        self.ffn_gate = Linear(c.dim, c.ff_dim)
        self.ffn_up = Linear(c.dim, c.ff_dim)
        self.ffn_down = Linear(c.ff_dim, c.dim)
        self.config = c

    def __call__(self, x: Tensor, position: Tensor, windows: tuple[tuple[int, int], ...]) -> Tensor:
        x = x + self.attn_out(self._attention(self.ln1(x), position, windows))
        h = self.ln2(x)
        return x + self.ffn_down(ops.swiglu_split(self.ffn_gate(h), self.ffn_up(h)))

    def _attention(self, x: Tensor, position: Tensor, windows: tuple[tuple[int, int], ...]) -> Tensor:
        c, n = self.config, x.ne[1]
        if c.fused_qkv:
            qkv = self.attn_qkv(x)  # ne [3 * dim, n_tokens]
            parts = [ops.cont(ops.view(qkv, (c.dim, n), (qkv.nb[1],), i * c.dim * 4)) for i in range(3)]
        else:
            parts = [to(x) for to in (self.attn_q, self.attn_k, self.attn_v)]
        q, k, v = (ops.reshape(part, c.head_dim, c.n_heads, n) for part in parts)
        q, k = self._turned(q, position), self._turned(k, position)
        results, start = [], 0
        for size, count in windows:
            offset = start * q.nb[2]
            ne, nb = (c.head_dim, c.n_heads, size, count), (q.nb[1], q.nb[2], size * q.nb[2])
            q_part, k_part, v_part = (ops.view(t, ne, nb, offset) for t in (q, k, v))
            results.append(attention(q_part, k_part, v_part))  # ne [dim, size * count]
            start += size * count
        y = results[0]
        for result in results[1:]:
            y = ops.concat(y, result, dim=1)
        return y  # ne [dim, n_tokens]

    def _turned(self, x: Tensor, position: Tensor) -> Tensor:
        n = self.config.head_dim // 2  # pairs: half of them turn with the row, half with the column
        return ops.rope_multi(x, position, n, (n // 2, n // 2), ops.ROPE_VISION, freq_base=ROPE_THETA, inplace=True)


class Tower(Module):
    """Patches to normalised features of patches."""

    def __init__(self, config: VisionConfig) -> None:
        c = config
        self.patch_embd = Kernel(c.patch, c.dim, 1 if c.split_frames else 2)
        if c.split_frames:
            self.patch_embd_1 = Kernel(c.patch, c.dim, 1)
        self.blk = [Block(c) for _ in range(c.n_layers)]
        self.post_ln = RMSNorm(c.dim, c.norm_eps)
        self.config = c

    def __call__(self, patches: Tensor, position: Tensor, windows: tuple[tuple[int, int], ...]) -> Tensor:
        x = self.patch_embd(patches)  # ne [dim, n_tokens]
        if self.config.split_frames:
            x = x + self.patch_embd_1(patches)
        everything = ((x.ne[1], 1),)
        for i, block in enumerate(self.blk):
            x = block(x, position, everything if i in self.config.full_blocks else windows)
        return self.post_ln(x)


class Qwen25Vision(Module):
    """The tower, and the two layers that make rows for the language model of it."""

    def __init__(self, config: VisionConfig) -> None:
        c = config
        merged = MERGE**2 * c.dim
        self.v = Tower(c)
        self.mm = (Linear(merged, merged), None, Linear(merged, c.out_dim))
        self.config = c

    def __call__(self, patches: Tensor, position: Tensor, windows: tuple[tuple[int, int], ...]) -> Tensor:
        x = self.v(patches, position, windows)  # ne [dim, n_tokens]
        first, _, last = self.mm
        x = ops.reshape(x, MERGE**2 * x.ne[0], -1)  # ne [4 * dim, n_tokens / 4]
        x = linear_gelu(first, x) if self.config.tanh_gelu else ops.gelu_erf(first(x))
        return last(x)  # ne [out_dim, n_tokens / 4]

    def layout(self, rows: int, columns: int) -> Layout:
        """Of a picture of so many rows and columns of merged units."""
        return Layout.of(rows, columns, self.config.window // self.config.multiple)

    def graph(self, backend: Backend, layout: Layout) -> Graph:
        """Inputs patches [n_tokens, 3 patch²] and position [4 n_tokens]; output rows, in the layout's order."""
        c, n = self.config, MERGE**2 * layout.order.size
        graph = Graph(backend, n_nodes=128 + (40 + 12 * len(layout.windows)) * c.n_layers)
        patches = graph.input((3 * c.patch**2, n), name="patches")
        position = graph.input((4 * n,), Type.I32, name="position")
        graph.output(self(patches, position, layout.windows), name="rows")
        return graph

    def encode(
        self, backend: Backend, picture: NDArray[np.float32], compute: Compute = Graph.compute
    ) -> NDArray[np.float32]:
        """A picture as `normalise` makes it, [3, H, W], sides multiples of 28, to rows [H/28 * W/28, out_dim], row by
        row of the picture. ValueError for other sides.
        """
        c = self.config
        (rows, rest), (columns, rest_2) = (divmod(side, c.multiple) for side in picture.shape[1:])
        if picture.shape[0] != 3 or rest or rest_2 or not rows or not columns:
            raise ValueError(f"the vision tower takes [3, H, W] with sides of {c.multiple} n, not {picture.shape}")
        layout = self.layout(rows, columns)
        with self.graph(backend, layout) as graph:
            patches = layout.patches(picture, c.patch)
            found: Any = compute(graph, patches=patches, position=layout.positions())["rows"]
        out = np.empty((rows * columns, c.out_dim), np.float32)
        out[layout.order] = found.reshape(-1, c.out_dim)
        return out


def size_for(
    width: int, height: int, multiple: int = 28, smallest: int = 56**2, largest: int = 3584**2, *,
    nearest: Callable[[float], int] = round,
) -> tuple[int, int]:  # fmt: skip
    """The size that a picture is scaled to: sides are the nearest multiples, fewer or more where the number of pixels
    would be out of bounds. The bounds, and `nearest`, halves to even, are those of Qwen2.5-VL's preprocessor.
    """
    w, h = (nearest(side / multiple) * multiple for side in (width, height))
    if w * h > largest:
        ratio = sqrt(width * height / largest)
        w, h = (max(multiple, floor(side / ratio / multiple) * multiple) for side in (width, height))
    elif w * h < smallest:
        ratio = sqrt(smallest / (width * height))
        w, h = (ceil(side * ratio / multiple) * multiple for side in (width, height))
    return w, h


def normalise(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 [H, W, 3] to float32 [3, H, W] with CLIP's mean and deviation taken out."""
    values = (picture.astype(np.float32) / np.float32(255) - MEAN) / DEVIATION
    return np.ascontiguousarray(values.transpose(2, 0, 1))
