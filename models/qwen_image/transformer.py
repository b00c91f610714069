"""Qwen-Image's diffusion transformer: a stream of text tokens and one of image tokens that meet in attention.

- the image stream holds the patches of the picture that is made, then those of the references, clean
- each block shifts, scales and gates its streams by vectors that depend on the time alone: `modulation` computes them
  for all times of a run at once, a third of the weights, which the steps then never touch
- positions have three axes: (number of the picture, row, column) with rows and columns counted from the middle;
  text token i is at (p + i, p + i, p + i), behind the largest picture
- with `zero_cond_t` (Edit-2511) references are modulated as at time 0
- it takes sigma as time and predicts the velocity, noise - x0

Facts: diffusers' QwenImageTransformer2DModel, whose tensor names all files use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from loader.checkpoint import Checkpoint
from loader.errors import LoadError
from loader.params import Param
from pyggml import Backend, Graph, Tensor, Type, ops

from ..compute import Compute
from ..detected import detected, n_blocks, shape
from ..lora import Naming, extra_nodes
from ..nn import Linear, Module, RMSNorm, attention, graph_use, linear_gelu, side_by_side, tokens
from ..rope import apply_rope_axes
from ..sizes import PATCH
from ..step_cache import Cut

Compat = Literal["diffusers", "sd.cpp"]

T_EMBED = 256  # width of the time sinusoid
T_SCALE = 1000.0
ROPE_THETA = 10000.0
EPS = 1e-6
N_MOD = 6  # vectors of a block and stream: shift, scale, gate of attention, then of the feed-forward
TIMES_AT_ONCE = 16  # times that are modulated in one go: 9 MB each for the real model

# Activations that go into these layers have been seen beyond 65504. Powers of two: exact.
OUT_HEADROOM, DOWN_HEADROOM = 32.0, 128.0

ZERO_COND_T = "__index_timestep_zero__"  # an empty tensor in single files of Edit-2511
RENAMES: list[tuple[str, str | None]] = [
    (rf"^{ZERO_COND_T}$", None),  # a mark, which the config has read
]


@dataclass(frozen=True)
class QwenImageConfig:
    """Sizes, detected from the shapes in a file."""

    dim: int
    n_heads: int
    head_dim: int
    n_layers: int
    ff_dim: int
    text_dim: int
    patch_dim: int  # PATCH * PATCH * latent channels
    axes_dims: tuple[int, int, int]
    zero_cond_t: bool = False  # references are modulated as at time 0
    layered: bool = False  # several pictures at once, and an embedding beside the time's
    compat: Compat = "diffusers"  # whose positions: see joint_positions

    @property
    def in_channels(self) -> int:
        return self.patch_dim // PATCH**2

    @classmethod
    @detected("Qwen-Image transformer")
    def from_checkpoint(cls, checkpoint: Checkpoint) -> QwenImageConfig:
        """`checkpoint` before RENAMES, which drop a mark. LoadError when it is no Qwen-Image transformer."""
        ne = partial(shape, "Qwen-Image transformer", checkpoint)
        patch_dim, dim = ne("img_in.weight")[:2]
        head_dim = ne("transformer_blocks.0.attn.norm_q.weight")[0]
        config = cls(
            dim=dim,
            n_heads=dim // head_dim,
            head_dim=head_dim,
            n_layers=n_blocks(checkpoint, "transformer_blocks"),
            ff_dim=ne("transformer_blocks.0.img_mlp.net.0.proj.weight")[1],
            text_dim=ne("txt_norm.weight")[0],
            patch_dim=patch_dim,
            axes_dims=tuple(
                checkpoint.config.get("axes_dims_rope") or (head_dim // 8, head_dim // 16 * 7, head_dim // 16 * 7)
            ),
            zero_cond_t=ZERO_COND_T in checkpoint or bool(checkpoint.config.get("zero_cond_t")),
            layered="time_text_embed.addition_t_embedding.weight" in checkpoint,
        )
        if len(config.axes_dims) != 3 or sum(config.axes_dims) != head_dim or any(d % 2 for d in config.axes_dims):
            raise LoadError(f"heads of {head_dim} do not divide into axes {config.axes_dims}", path=checkpoint.path)
        return config


@dataclass(frozen=True)
class Run:
    """`n` tokens of a stream from `start`, and the vectors that modulate them in all blocks: ne [dim, n_vectors]."""

    start: int
    n: int
    vectors: Tensor

    def tokens(self, x: Tensor) -> Tensor:
        """These tokens of a stream, ne [dim, n]."""
        return tokens(x, self.start, self.n)

    def vector(self, i: int) -> Tensor:
        return ops.view(self.vectors, (self.vectors.ne[0],), offset=i * self.vectors.nb[1])


@dataclass(frozen=True)
class Positions:
    """Where tokens are on each axis: i32 ne [n_tokens] each, in units of `unit`."""

    axes: Sequence[Tensor]
    unit: float


def modulated(x: Tensor, runs: Sequence[Run], i: int) -> Tensor:
    """LayerNorm without weights, then vectors i (shift) and i + 1 (scale) of each token's run."""
    h = ops.norm(x, EPS)
    return _joined(runs, lambda run: ops.add(ops.mul(run.tokens(h), run.vector(i + 1)), run.vector(i)))


def gated(x: Tensor, y: Tensor, runs: Sequence[Run], i: int) -> Tensor:
    """x + gate * y, the gate being vector i of each token's run."""
    return ops.add(x, _joined(runs, lambda run: ops.mul(run.tokens(y), run.vector(i))))


def _joined(runs: Sequence[Run], part: Callable[[Run], Tensor]) -> Tensor:
    return side_by_side([part(run) for run in runs])


class JointAttention(Module):
    """Attention over the tokens of both streams, text first; each stream has projections and norms of its own."""

    def __init__(self, config: QwenImageConfig) -> None:
        c = config
        self.to_q = Linear(c.dim, c.dim)
        self.to_k = Linear(c.dim, c.dim)
        self.to_v = Linear(c.dim, c.dim)
        self.add_q_proj = Linear(c.dim, c.dim)
        self.add_k_proj = Linear(c.dim, c.dim)
        self.add_v_proj = Linear(c.dim, c.dim)
        self.norm_q = RMSNorm(c.head_dim, EPS)
        self.norm_k = RMSNorm(c.head_dim, EPS)
        self.norm_added_q = RMSNorm(c.head_dim, EPS)
        self.norm_added_k = RMSNorm(c.head_dim, EPS)
        self.to_out = [Linear(c.dim, c.dim, headroom=OUT_HEADROOM)]
        self.to_add_out = Linear(c.dim, c.dim, headroom=OUT_HEADROOM)
        self.config = c

    def __call__(self, x: Tensor, text: Tensor, prompts: Sequence[Positions]) -> tuple[Tensor, Tensor]:
        """prompts: for each of them, the positions of its tokens in `text`, then of its share of `x`."""
        c, n_image, start = self.config, x.ne[1] // len(prompts), 0
        q_text, k_text, v_text = (self._heads(to(text)) for to in (self.add_q_proj, self.add_k_proj, self.add_v_proj))
        q_image, k_image, v_image = (self._heads(to(x)) for to in (self.to_q, self.to_k, self.to_v))
        q_text, k_text = self.norm_added_q(q_text), self.norm_added_k(k_text)
        q_image, k_image = self.norm_q(q_image), self.norm_k(k_image)
        of_text, of_image = [], []
        for i, positions in enumerate(prompts):
            n_text = positions.axes[0].ne[0] - n_image
            q, k, v = (  # ne [head_dim, n_heads, n_text + n_image]
                ops.concat(tokens(a, start, n_text, 2), tokens(b, i * n_image, n_image, 2), dim=2)
                for a, b in ((q_text, q_image), (k_text, k_image), (v_text, v_image))
            )
            q, k = (apply_rope_axes(x, positions.axes, c.axes_dims, ROPE_THETA, positions.unit) for x in (q, k))
            y = attention(q, k, v, headroom=DOWN_HEADROOM)  # ne [dim, n_text + n_image]
            of_text.append(tokens(y, 0, n_text))
            of_image.append(tokens(y, n_text, n_image))
            start += n_text
        return self.to_out[0](side_by_side(of_image)), self.to_add_out(side_by_side(of_text))

    def _heads(self, x: Tensor) -> Tensor:
        return ops.reshape(x, self.config.head_dim, self.config.n_heads, -1)  # ne [head_dim, n_heads, n_tokens]


class Projection(Module):
    """A linear layer under the name `proj`."""

    def __init__(self, n_in: int, n_out: int) -> None:
        self.proj = Linear(n_in, n_out)


class FeedForward(Module):
    """W2 GELU(W1 x), GELU by its tanh formula."""

    def __init__(self, config: QwenImageConfig) -> None:
        c = config
        self.net = (Projection(c.dim, c.ff_dim), None, Linear(c.ff_dim, c.dim, headroom=DOWN_HEADROOM))

    def __call__(self, x: Tensor) -> Tensor:
        up, _, down = self.net
        return down(linear_gelu(up.proj, x))


@dataclass(frozen=True)
class Modulation:
    """What the time decides in a step: float32 vectors for both streams, block after block, in the order shift,
    1 + scale, gate of attention, the same of the feed-forward; and behind the image's the last norm's shift, 1 + scale.
    """

    image: NDArray[np.float32]  # [N_MOD * n_layers + 2, dim]
    text: NDArray[np.float32]  # [N_MOD * n_layers, dim]


class Block(Module):
    """Both streams: x += gate attention(modulated x); x += gate feed_forward(modulated x)."""

    def __init__(self, config: QwenImageConfig) -> None:
        c = config
        self.img_mod = (None, Linear(c.dim, N_MOD * c.dim))  # SiLU before them
        self.txt_mod = (None, Linear(c.dim, N_MOD * c.dim))
        self.attn = JointAttention(c)
        self.img_mlp = FeedForward(c)
        self.txt_mlp = FeedForward(c)

    def __call__(
        self, x: Tensor, text: Tensor, runs: Sequence[Run], text_run: Sequence[Run], i: int,
        prompts: Sequence[Positions],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Vectors i ... i + 5 of the runs are this block's."""
        h, h_text = self.attn(modulated(x, runs, i), modulated(text, text_run, i), prompts)
        x, text = gated(x, h, runs, i + 2), gated(text, h_text, text_run, i + 2)
        x = gated(x, self.img_mlp(modulated(x, runs, i + 3)), runs, i + 5)
        text = gated(text, self.txt_mlp(modulated(text, text_run, i + 3)), text_run, i + 5)
        return x, text


class TimestepEmbedder(Module):
    """Sinusoid of 1000 sigma, two linear layers."""

    def __init__(self, config: QwenImageConfig) -> None:
        self.linear_1 = Linear(T_EMBED, config.dim)
        self.linear_2 = Linear(config.dim, config.dim)

    def __call__(self, t: Tensor) -> Tensor:
        return self.linear_2(ops.silu(self.linear_1(ops.timestep_embedding(t, T_EMBED, 10000))))  # ne [dim, n_times]


class AdditionalEmbedding(Module):
    """A table of two vectors, of which the published pipeline takes the first."""

    def __init__(self, n: int) -> None:
        self.weight = Param((n, 2), Type.F32)

    def __call__(self, x: Tensor) -> Tensor:
        w = graph_use(x, self.weight.tensor)
        return ops.add(x, ops.view(w, (w.ne[0],)))


class TimeTextEmbed(Module):
    """The time's embedding; in the layered model a vector is added to it."""

    def __init__(self, config: QwenImageConfig) -> None:
        self.timestep_embedder = TimestepEmbedder(config)
        self.addition_t_embedding = AdditionalEmbedding(config.dim) if config.layered else None

    def __call__(self, t: Tensor) -> Tensor:
        y = self.timestep_embedder(t)  # ne [dim, n_times]
        return y if self.addition_t_embedding is None else self.addition_t_embedding(y)


class NormOut(Module):
    """What the last norm is modulated by: scale first, then shift."""

    def __init__(self, config: QwenImageConfig) -> None:
        self.linear = Linear(config.dim, 2 * config.dim)


class QwenImageTransformer(Module):
    """The network. `modulate` runs once for all times of a run, `context` once a prompt, `__call__` once a step."""

    naming = Naming()  # files have our names

    def __init__(self, config: QwenImageConfig) -> None:
        c = config
        self.img_in = Linear(c.patch_dim, c.dim, type=Type.F32)
        self.txt_norm = RMSNorm(c.text_dim, EPS)
        self.txt_in = Linear(c.text_dim, c.dim)
        self.time_text_embed = TimeTextEmbed(c)
        self.transformer_blocks = [Block(c) for _ in range(c.n_layers)]
        self.norm_out = NormOut(c)
        self.proj_out = Linear(c.dim, c.patch_dim, type=Type.F32)
        self.config = c

    def context(self, features: Tensor) -> Tensor:
        """The text encoder's features ne [text_dim, n] as tokens ne [dim, n]."""
        return self.txt_in(self.txt_norm(features))

    def modulation(self, t: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Times 1000 sigma ne [n_times] to each block's vectors for image and for text, ne [N_MOD * dim, n_times], and
        the last norm's, ne [2 * dim, n_times].
        """
        t = ops.silu(self.time_text_embed(t))  # ne [dim, n_times]
        image = [block.img_mod[1](t) for block in self.transformer_blocks]
        text = [block.txt_mod[1](t) for block in self.transformer_blocks]
        return image, text, self.norm_out.linear(t)

    def __call__(
        self, x: Tensor, text: Tensor, runs: Sequence[Run], text_run: Run, prompts: Sequence[Positions],
        n_target: int,
    ) -> Tensor:  # fmt: skip
        """Patches ne [patch_dim, n], the target's first; text of `context`, that of several prompts side by side; the
        runs of both streams; for each prompt the positions of its text tokens, then of the image tokens. Returns the
        velocity of the target's patches, ne [patch_dim, n_prompts * n_target].
        """
        x = side_by_side([self.img_in(x)] * len(prompts))  # ne [dim, n_prompts * n_image]
        x, _ = self._blocks(x, text, runs, text_run, prompts, 0, len(self.transformer_blocks))
        return self._out(x, runs, n_target, len(prompts))

    def _blocks(
        self, x: Tensor, text: Tensor, runs: Sequence[Run], text_run: Run, prompts: Sequence[Positions],
        begin: int, end: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Both streams through blocks begin ... end - 1."""
        for i in range(begin, end):
            x, text = self.transformer_blocks[i](x, text, runs, [text_run], N_MOD * i, prompts)
        return x, text

    def _out(self, x: Tensor, runs: Sequence[Run], n_target: int, n_prompts: int = 1) -> Tensor:
        n = x.ne[1] // n_prompts
        x = side_by_side([tokens(x, i * n, n_target) for i in range(n_prompts)])
        target = Run(0, n_prompts * n_target, runs[0].vectors)
        return self.proj_out(modulated(x, [target], N_MOD * len(self.transformer_blocks)))

    # -- graphs -------------------------------------------------------------------------------------------------------

    def context_graph(self, backend: Backend, n_text: int) -> Graph:
        """Input features, numpy [n_text, text_dim]; output context, numpy [n_text, dim]."""
        graph = Graph(backend, n_nodes=32 + extra_nodes(self))
        features = graph.input((self.config.text_dim, n_text), name="features")
        graph.output(self.context(features), name="context")
        return graph

    def modulation_graph(self, backend: Backend, n_times: int) -> Graph:
        """Input t; outputs image.<block> and text.<block>, numpy [n_times, N_MOD * dim], and last, [n_times, 2 dim]."""
        graph = Graph(backend, n_nodes=64 + 8 * self.config.n_layers + extra_nodes(self))
        image, text, last = self.modulation(graph.input((n_times,), name="t"))
        for name, tensors in (("image", image), ("text", text)):
            for i, tensor in enumerate(tensors):
                graph.output(tensor, name=f"{name}.{i}")
        graph.output(last, name="last")
        return graph

    def step_graph(
        self, backend: Backend, n_patches: int, n_text: Sequence[int], n_references: int = 0
    ) -> Graph:
        """For `n_patches` of the target, then `n_references` of all references; `n_text` of each prompt.

        Inputs patches [n_patches + n_references, patch_dim], context [sum of n_text, dim], position, [3, n_text + all
        patches] for each prompt side by side, modulation_image and modulation_text as `Modulation` has them; with
        references and `zero_cond_t` also modulation_zero. Output out, numpy [n_prompts * n_patches, patch_dim].
        """
        c = self.config
        graph, runs, text_run, prompts = self._step_inputs(backend, n_patches, n_text, n_references, c.n_layers)
        patches = graph.input((c.patch_dim, n_patches + n_references), name="patches")
        context = graph.input((c.dim, sum(n_text)), name="context")
        assert text_run
        graph.output(self(patches, context, runs, text_run, prompts, n_patches), name="out")
        return graph

    def part_graph(self, backend: Backend, n_patches: int, n_text: int, n_references: int, cut: Cut) -> Graph:
        """A part of `step_graph`, with the inputs that it needs; parts hand on x, numpy [all patches, dim], and, where
        blocks follow, text, [n_text, dim].
        """
        c, n, n_blocks = self.config, n_patches + n_references, cut.end - cut.begin
        graph, runs, text_run, prompts = self._step_inputs(backend, n_patches, [n_text], n_references, n_blocks)
        if cut.first:
            x = self.img_in(graph.input((c.patch_dim, n), name="patches"))
        else:
            x = graph.input((c.dim, n), name="x")
        before = x
        if text_run:
            text = graph.input((c.dim, n_text), name="context" if cut.first else "text")
            x, text = self._blocks(x, text, runs, text_run, prompts, cut.begin, cut.end)
            if cut.end < c.n_layers:
                graph.output(text, name="text")
        if cut.last:
            graph.output(self._out(x, runs, n_patches), name="out")
            return graph
        graph.output(x, name="x")
        if cut.first:
            graph.output(ops.sub(x, before), name="change")
        return graph

    def _step_inputs(
        self, backend: Backend, n_patches: int, n_text: Sequence[int], n_references: int, n_blocks: int
    ) -> tuple[Graph, list[Run], Run | None, list[Positions]]:
        """A graph with the inputs that say where and when tokens are: runs of image and text, each prompt's positions.
        Those that no block would read are not there.
        """
        c, n, n_prompts = self.config, n_patches + n_references, len(n_text)
        apart = c.zero_cond_t and n_references > 0
        nodes = 50 + 30 * n_prompts + (20 * n_prompts if apart else 0)
        graph = Graph(backend, n_nodes=128 + nodes * n_blocks + extra_nodes(self))
        n_vectors = N_MOD * c.n_layers
        image = graph.input((c.dim, n_vectors + 2), name="modulation_image")
        if not n_blocks:
            return graph, [Run(0, n, image)], None, []
        position = graph.input((sum(n_text) + n_prompts * n, 3), Type.I32, name="position")
        prompts, start = [], 0
        for n_one in n_text:
            offsets = (start * position.nb[0] + axis * position.nb[1] for axis in range(3))
            axes = [ops.view(position, (n_one + n,), offset=offset) for offset in offsets]
            prompts.append(Positions(axes, 1 / position_steps(n_one, c.compat)))
            start += n_one + n
        text = graph.input((c.dim, n_vectors), name="modulation_text")
        runs = [Run(0, n_prompts * n, image)]
        if apart:
            zero = graph.input((c.dim, n_vectors), name="modulation_zero")
            runs = [run for first in range(0, n_prompts * n, n)
                    for run in (Run(first, n_patches, image), Run(first + n_patches, n_references, zero))]  # fmt: skip
        return graph, runs, Run(0, sum(n_text), text), prompts

    def modulate(
        self, backend: Backend, sigmas: Sequence[float] | NDArray[np.float32], compute: Compute = Graph.compute
    ) -> list[Modulation]:
        """The modulation at each noise level; reads its weights once for TIMES_AT_ONCE of them."""
        c, found = self.config, []
        times = np.asarray(sigmas, np.float32) * np.float32(T_SCALE)
        for part in np.split(times, range(TIMES_AT_ONCE, len(times), TIMES_AT_ONCE)):
            with self.modulation_graph(backend, len(part)) as graph:
                out = {name: y.reshape(len(part), -1, c.dim) for name, y in compute(graph, t=part).items()}
            last = out["last"][:, ::-1]  # shift, scale, as everywhere else
            blocks = range(c.n_layers)
            image = np.concatenate([*(out[f"image.{i}"] for i in blocks), last], axis=1)
            text = np.concatenate([out[f"text.{i}"] for i in blocks], axis=1)
            for vectors in (image, text):
                vectors[:, 1::3] += 1  # every scale, the last norm's too: 1 + what was learned
            found += [Modulation(*pair) for pair in zip(image, text, strict=True)]
        return found


# -- what goes in and comes out ---------------------------------------------------------------------------------------


Grid = tuple[int, int]  # rows and columns of patches


def joint_positions(
    n_text: int, target: Grid, references: Sequence[Grid] = (), *, n_targets: int = 1, layered: bool = False,
    compat: Compat = "diffusers",
) -> NDArray[np.int32]:  # fmt: skip
    """[3, n_tokens] of the text tokens, then of `n_targets` pictures of the same grid, then of the references.

    Pictures are numbered from 0, in the layered model the reference is -1. The middle row of an odd number is -1 in
    diffusers, 0 with compat "sd.cpp", which also places the text by the target alone, twice as far away, and its n
    tokens n / (n - 1) apart: see `position_steps`.
    """
    numbers = [*range(n_targets), *((-1 - i if layered else n_targets + i) for i in range(len(references)))]
    grids = [target] * n_targets + list(references)
    parts = [np.zeros((3, n_text), np.int32)]
    for number, (rows, columns) in zip(numbers, grids, strict=True):
        row, column = np.divmod(np.arange(rows * columns), columns)
        up = 0 if compat == "sd.cpp" else 1
        parts.append(np.stack([np.full_like(row, number), row - (rows + up) // 2, column - (columns + up) // 2]))
    if compat == "sd.cpp":
        steps = position_steps(n_text, compat)
        parts = [part * steps for part in parts]
        parts[0] += (max(target) * steps + np.arange(n_text) * n_text).astype(np.int32)
    else:
        first = max(side // 2 for grid in grids for side in grid)
        parts[0] += max(first, n_targets if layered else 0) + np.arange(n_text, dtype=np.int32)
    return np.concatenate(parts, axis=1).astype(np.int32)


def position_steps(n_text: int, compat: Compat = "diffusers") -> int:
    """How many of `joint_positions` make 1: stable-diffusion.cpp's text tokens have fractional ones."""
    return max(n_text - 1, 1) if compat == "sd.cpp" else 1


def patchify(latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """[C, H, W] to [H/2 * W/2, 4 C]: patches row by row, features in the order (channel, row, column)."""
    c, h, w = latents.shape
    blocks = latents.reshape(c, h // PATCH, PATCH, w // PATCH, PATCH)
    return np.ascontiguousarray(blocks.transpose(1, 3, 0, 2, 4)).reshape(-1, PATCH * PATCH * c)


def unpatchify(patches: NDArray[np.float32], h: int, w: int) -> NDArray[np.float32]:
    """The inverse of `patchify` for latents [C, h, w]."""
    blocks = patches.reshape(h // PATCH, w // PATCH, -1, PATCH, PATCH)
    return np.ascontiguousarray(blocks.transpose(2, 0, 3, 1, 4)).reshape(-1, h, w)
