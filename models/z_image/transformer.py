"""Z-Image's diffusion transformer: one stream of caption and image tokens.

- learned tokens pad both sequences to a multiple of 32 and take part in attention
- positions have three axes: (1 + i, 0, 0) for caption token i, (L + 1, row, column) for image patches
- two blocks refine the caption alone, two the image alone; then all tokens go through the layers together
- a block is modulated by scale and tanh(gate), no shift, and normalises before and after each branch
- it takes 1 - sigma as time and predicts x0 - noise: minus the velocity

Facts: diffusers' ZImageTransformer2DModel. Tensor names are those of the single-file checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from loader.checkpoint import Checkpoint
from loader.errors import LoadError
from loader.params import Param
from pyggml import Backend, Graph, Tensor, Type, ops

from ..detected import detected, n_blocks, shape
from ..lora import Naming, extra_nodes
from ..nn import Linear, Module, RMSNorm, attention, graph_use, side_by_side, split_heads, tokens
from ..rope import apply_rope_axes
from ..sizes import PATCH
from ..step_cache import Cut

MULTIPLE = 32  # both sequences are padded to a multiple of it
T_EMBED = 256  # width of the time sinusoid
T_SCALE = 1000.0
ROPE_THETA = 256.0

RENAMES: list[tuple[str, str | None]] = [
    (r"^all_x_embedder\.2-1\.", "x_embedder."),
    (r"^all_final_layer\.2-1\.", "final_layer."),
    (r"\.attention\.to_out\.0\.", ".attention.out."),
    (r"\.attention\.norm_([qk])\.", r".attention.\1_norm."),
    (r"^norm_final\.weight$", None),  # in some files; nothing uses it
]
# The other way round, for LoRA files: what diffusers calls our modules.
NAMING = Naming(
    aliases=[
        (r"^x_embedder$", "all_x_embedder.2-1"),
        (r"^final_layer\.", "all_final_layer.2-1."),
        (r"\.attention\.out$", ".attention.to_out.0"),
        (r"\.attention\.([qk])_norm$", r".attention.norm_\1"),
    ],
    stacked=(".attention.qkv", (".attention.to_q", ".attention.to_k", ".attention.to_v")),
    unused=r"norm_final$",
)


@dataclass(frozen=True)
class ZImageConfig:
    """Sizes, detected from the shapes in a file."""

    dim: int
    n_heads: int
    head_dim: int
    n_layers: int
    n_noise_refiners: int
    n_context_refiners: int
    ff_dim: int
    text_dim: int
    patch_dim: int  # PATCH * PATCH * latent channels
    t_hidden: int
    adaln_dim: int
    axes_dims: tuple[int, int, int]
    fused_qkv: bool
    norm_eps: float = 1e-5
    qk_norm_eps: float = 1e-5

    @property
    def in_channels(self) -> int:
        return self.patch_dim // PATCH**2

    @classmethod
    @detected("Z-Image transformer")
    def from_checkpoint(cls, checkpoint: Checkpoint) -> ZImageConfig:
        """`checkpoint` under single-file names. LoadError when it is no Z-Image transformer."""
        ne = partial(shape, "Z-Image transformer", checkpoint)
        patch_dim, dim = ne("x_embedder.weight")[:2]
        head_dim = ne("layers.0.attention.q_norm.weight")[0]
        t_hidden = ne("t_embedder.mlp.0.weight")[1]
        config = cls(
            dim=dim,
            n_heads=dim // head_dim,
            head_dim=head_dim,
            n_layers=n_blocks(checkpoint, "layers"),
            n_noise_refiners=n_blocks(checkpoint, "noise_refiner"),
            n_context_refiners=n_blocks(checkpoint, "context_refiner"),
            ff_dim=ne("layers.0.feed_forward.w1.weight")[1],
            text_dim=ne("cap_embedder.0.weight")[0],
            patch_dim=patch_dim,
            t_hidden=t_hidden,
            adaln_dim=ne("t_embedder.mlp.2.weight")[1],
            axes_dims=(head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3),
            fused_qkv="layers.0.attention.qkv.weight" in checkpoint,
        )
        if axes := checkpoint.config.get("axes_dims"):
            config = replace(config, axes_dims=tuple(axes))
        if sum(config.axes_dims) != head_dim or any(d % 2 for d in config.axes_dims):
            raise LoadError(f"heads of {head_dim} do not divide into axes {config.axes_dims}", path=checkpoint.path)
        return config


class Attention(Module):
    """Self-attention with normalised q and k and rope over three axes."""

    def __init__(self, config: ZImageConfig) -> None:
        c = config
        if c.fused_qkv:
            self.qkv = Linear(c.dim, 3 * c.dim, bias=False)
        else:
            self.to_q = Linear(c.dim, c.dim, bias=False)
            self.to_k = Linear(c.dim, c.dim, bias=False)
            self.to_v = Linear(c.dim, c.dim, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.qk_norm_eps)
        self.k_norm = RMSNorm(c.head_dim, c.qk_norm_eps)
        self.out = Linear(c.dim, c.dim, bias=False)
        self.config = config

    def __call__(self, x: Tensor, positions: list[Tensor], lengths: Sequence[int]) -> Tensor:
        """lengths: of the sequences in `x` side by side, whose tokens attend to each other."""
        c = self.config
        if c.fused_qkv:
            qkv = self.qkv(x)  # ne [3 * dim, n_tokens]
            q, k, v = (split_heads(qkv, i, c.n_heads, c.head_dim) for i in range(3))
        else:
            q, k, v = (split_heads(to(x), 0, c.n_heads, c.head_dim) for to in (self.to_q, self.to_k, self.to_v))
        q = apply_rope_axes(self.q_norm(q), positions, c.axes_dims, ROPE_THETA)  # ne [head_dim, n_heads, n_tokens]
        k = apply_rope_axes(self.k_norm(k), positions, c.axes_dims, ROPE_THETA)
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        parts = [
            attention(tokens(q, start, n, 2), tokens(k, start, n, 2), tokens(v, start, n, 2))
            for start, n in zip(starts, lengths, strict=True)
        ]
        return self.out(side_by_side(parts))  # ne [dim, n_tokens]


class FeedForward(Module):
    """W2 (SiLU(W1 x) * W3 x)."""

    def __init__(self, dim: int, ff_dim: int) -> None:
        self.w1 = Linear(dim, ff_dim, bias=False)
        self.w2 = Linear(ff_dim, dim, bias=False)
        self.w3 = Linear(dim, ff_dim, bias=False)

    def __call__(self, x: Tensor) -> Tensor:
        return self.w2(ops.swiglu_split(self.w1(x), self.w3(x)))


class Block(Module):
    """x += gate norm(attention(scale norm x)); x += gate norm(feed_forward(scale norm x)).

    Without modulation (the caption's refiners) scales and gates are one.
    """

    def __init__(self, config: ZImageConfig, modulated: bool = True) -> None:
        c = config
        self.attention = Attention(c)
        self.feed_forward = FeedForward(c.dim, c.ff_dim)
        self.attention_norm1 = RMSNorm(c.dim, c.norm_eps)
        self.attention_norm2 = RMSNorm(c.dim, c.norm_eps)
        self.ffn_norm1 = RMSNorm(c.dim, c.norm_eps)
        self.ffn_norm2 = RMSNorm(c.dim, c.norm_eps)
        self.adaLN_modulation = [Linear(c.adaln_dim, 4 * c.dim)] if modulated else []
        self.eps = c.norm_eps

    def __call__(
        self, x: Tensor, positions: list[Tensor], lengths: Sequence[int], t: Tensor | None = None
    ) -> Tensor:
        norms = (self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2)
        weights = [norm.weight.tensor for norm in norms]
        if t is not None:
            # Norm weights times scales and gates: vectors of ne [dim], so that each big tensor is multiplied once.
            modulation = ops.reshape(self.adaLN_modulation[0](t), -1, 4)  # ne [dim, 4]: scale, gate, scale, gate
            for i, w in enumerate(weights):
                m = ops.view(modulation, (modulation.ne[0],), offset=i * modulation.nb[1])
                weights[i] = ops.mul(ops.tanh(m) if i % 2 else m + 1.0, w)
        scale_a, gate_a, scale_f, gate_f = weights
        h = self.attention(ops.mul(ops.rms_norm(x, self.eps), scale_a), positions, lengths)
        x = x + ops.mul(ops.rms_norm(h, self.eps), gate_a)  # ne [dim, n_tokens]
        h = self.feed_forward(ops.mul(ops.rms_norm(x, self.eps), scale_f))
        return x + ops.mul(ops.rms_norm(h, self.eps), gate_f)


class TimestepEmbedder(Module):
    """Sinusoid of 1000 t, two linear layers; held in f32, as small numbers steer every block."""

    def __init__(self, config: ZImageConfig) -> None:
        c = config
        self.mlp = [Linear(T_EMBED, c.t_hidden, type=Type.F32), None, Linear(c.t_hidden, c.adaln_dim, type=Type.F32)]

    def __call__(self, t: Tensor) -> Tensor:
        first, _, last = self.mlp
        assert first and last
        return last(ops.silu(first(ops.timestep_embedding(t, T_EMBED, 10000))))  # ne [adaln_dim, 1]


class FinalLayer(Module):
    """LayerNorm without weights, scaled by the time, and a projection to patches."""

    def __init__(self, config: ZImageConfig) -> None:
        self.linear = Linear(config.dim, config.patch_dim, type=Type.F32)
        self.adaLN_modulation = [None, Linear(config.adaln_dim, config.dim)]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        modulation = self.adaLN_modulation[1]
        assert modulation
        scale = modulation(ops.silu(t)) + 1.0  # ne [dim, 1]
        return self.linear(ops.mul(ops.norm(x, 1e-6), scale))  # ne [patch_dim, n_tokens]


class ZImageTransformer(Module):
    """The network. `context` runs once a prompt, `__call__` once a step."""

    naming = NAMING

    def __init__(self, config: ZImageConfig) -> None:
        c = config
        self.x_embedder = Linear(c.patch_dim, c.dim)
        self.t_embedder = TimestepEmbedder(c)
        self.cap_embedder = (RMSNorm(c.text_dim, c.norm_eps), Linear(c.text_dim, c.dim))
        self.x_pad_token = Param((c.dim,), Type.F32)
        self.cap_pad_token = Param((c.dim,), Type.F32)
        self.noise_refiner = [Block(c) for _ in range(c.n_noise_refiners)]
        self.context_refiner = [Block(c, modulated=False) for _ in range(c.n_context_refiners)]
        self.layers = [Block(c) for _ in range(c.n_layers)]
        self.final_layer = FinalLayer(c)
        self.config = c

    def context(self, caption: Tensor, positions: list[Tensor]) -> Tensor:
        """Caption features ne [text_dim, n] to refined tokens ne [dim, n_padded]."""
        norm, linear = self.cap_embedder
        c = pad_tokens(linear(norm(caption)), self.cap_pad_token.tensor)
        for block in self.context_refiner:
            c = block(c, positions, [c.ne[1]])
        return c

    def __call__(
        self, x: Tensor, t: Tensor, context: Tensor, positions: list[Tensor], n_context: Sequence[int]
    ) -> Tensor:
        """Patches ne [patch_dim, n], time 1000 (1 - sigma) ne [1], contexts side by side ne [dim, sum of n_context];
        positions, for each context, of the padded image tokens, then of its own. Returns x0 - noise for each patch,
        ne [patch_dim, n_prompts * n].
        """
        n_patches = x.ne[1]
        t = self.t_embedder(t)  # ne [adaln_dim, 1]
        x, lengths = self._joined(x, t, context, positions, n_context)
        for block in self.layers:
            x = block(x, positions, lengths, t)
        return self._out(x, t, n_patches, lengths)

    def _joined(
        self, x: Tensor, t: Tensor, context: Tensor, positions: list[Tensor], n_context: Sequence[int]
    ) -> tuple[Tensor, list[int]]:
        """For each context a sequence of patches, refined, and the context, side by side; and their lengths."""
        x = pad_tokens(self.x_embedder(x), self.x_pad_token.tensor)  # ne [dim, n_image]
        n_image, n_prompts = x.ne[1], len(n_context)
        lengths = [n_image + n for n in n_context]
        starts = [sum(lengths[:i]) for i in range(n_prompts)]
        image_positions = [
            side_by_side([tokens(p, start, n_image, 0) for start in starts], 0) for p in positions
        ]
        x = side_by_side([x] * n_prompts)
        for block in self.noise_refiner:
            x = block(x, image_positions, [n_image] * n_prompts, t)
        parts: list[Tensor] = []
        for i, n in enumerate(n_context):
            parts += [tokens(x, i * n_image, n_image), tokens(context, sum(n_context[:i]), n)]
        return side_by_side(parts), lengths  # ne [dim, sum of lengths]

    def _out(self, x: Tensor, t: Tensor, n_patches: int, lengths: Sequence[int]) -> Tensor:
        starts = (sum(lengths[:i]) for i in range(len(lengths)))
        return self.final_layer(side_by_side([tokens(x, start, n_patches) for start in starts]), t)

    # -- graphs -------------------------------------------------------------------------------------------------------

    def context_graph(self, backend: Backend, n_caption: int) -> Graph:
        """Inputs caption and position; output context, numpy [n_padded, dim]."""
        graph = Graph(backend, n_nodes=128 + 64 * len(self.context_refiner) + extra_nodes(self))
        caption = graph.input((self.config.text_dim, n_caption), name="caption")
        positions = input_positions(graph, padded(n_caption))
        graph.output(self.context(caption, positions), name="context")
        return graph

    def step_graph(self, backend: Backend, n_patches: int, n_context: Sequence[int]) -> Graph:
        """For each prompt `n_context` tokens. Inputs patches [n_patches, patch_dim], t, contexts and positions side by
        side, [n, dim] and [3, n]; output out, numpy [n_prompts * n_patches, patch_dim].
        """
        c = self.config
        n_nodes = 64 + 16 * len(n_context)
        graph = Graph(backend, n_nodes=256 + n_nodes * (c.n_layers + c.n_noise_refiners) + extra_nodes(self))
        patches = graph.input((c.patch_dim, n_patches), name="patches")
        t = graph.input((1,), name="t")
        context = graph.input((c.dim, sum(n_context)), name="context")
        positions = input_positions(graph, len(n_context) * padded(n_patches) + sum(n_context))
        graph.output(self(patches, t, context, positions, n_context), name="out")
        return graph

    def part_graph(self, backend: Backend, n_patches: int, n_context: int, cut: Cut) -> Graph:
        """A part of `step_graph`, with the inputs that it needs; parts hand on x, numpy [n_tokens, dim]."""
        c, n_tokens = self.config, padded(n_patches) + n_context
        n_blocks = cut.end - cut.begin + (c.n_noise_refiners if cut.first else 0)
        graph = Graph(backend, n_nodes=256 + 80 * n_blocks + extra_nodes(self))
        positions = input_positions(graph, n_tokens) if n_blocks else []
        t = self.t_embedder(graph.input((1,), name="t"))
        if cut.first:
            patches = graph.input((c.patch_dim, n_patches), name="patches")
            x, _ = self._joined(patches, t, graph.input((c.dim, n_context), name="context"), positions, [n_context])
        else:
            x = graph.input((c.dim, n_tokens), name="x")
        before = x
        for block in self.layers[cut.begin : cut.end]:
            x = block(x, positions, [n_tokens], t)
        if cut.last:
            graph.output(self._out(x, t, n_patches, [n_tokens]), name="out")
            return graph
        graph.output(x, name="x")
        if cut.first:
            graph.output(ops.sub(x, before), name="change")
        return graph


def padded(n: int) -> int:
    """`n` rounded up to the multiple that both sequences are padded to."""
    return -(-n // MULTIPLE) * MULTIPLE


def pad_tokens(x: Tensor, token: Tensor) -> Tensor:
    """Append a learned token until the number of tokens is a multiple of 32; x: ne [dim, n_tokens]."""
    dim, n = x.ne[:2]
    if n == padded(n):
        return x
    rows = ops.repeat(ops.reshape(graph_use(x, token), dim, 1), (dim, padded(n) - n))
    return ops.concat(x, rows, dim=1)


def input_positions(graph: Graph, n_tokens: int) -> list[Tensor]:
    """One i32 tensor for each axis, views of the input "position", numpy [3, n_tokens]."""
    position = graph.input((n_tokens, 3), Type.I32, name="position")
    return [ops.view(position, (n_tokens,), offset=axis * position.nb[1]) for axis in range(3)]


def context_positions(n_caption: int) -> NDArray[np.int32]:
    """[3, n_padded]: caption token i, pads included, is at (1 + i, 0, 0)."""
    position = np.zeros((3, padded(n_caption)), np.int32)
    position[0] = 1 + np.arange(padded(n_caption))
    return position


def image_positions(rows: int, columns: int, n_context: int) -> NDArray[np.int32]:
    """[3, n_padded]: the patch at (row, column) is at (n_context + 1, row, column), a pad at (0, 0, 0)."""
    n = rows * columns
    position = np.zeros((3, padded(n)), np.int32)
    position[0, :n] = n_context + 1
    position[1, :n], position[2, :n] = np.divmod(np.arange(n), columns)
    return position


def patchify(latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """[C, H, W] to [H/2 * W/2, 4 C]: patches row by row, features in the order (row, column, channel)."""
    c, h, w = latents.shape
    blocks = latents.reshape(c, h // PATCH, PATCH, w // PATCH, PATCH)
    return np.ascontiguousarray(blocks.transpose(1, 3, 2, 4, 0)).reshape(-1, PATCH * PATCH * c)


def unpatchify(patches: NDArray[np.float32], h: int, w: int) -> NDArray[np.float32]:
    """The inverse of `patchify` for latents [C, h, w]."""
    blocks = patches.reshape(h // PATCH, w // PATCH, PATCH, PATCH, -1)
    return np.ascontiguousarray(blocks.transpose(4, 0, 2, 1, 3)).reshape(-1, h, w)
