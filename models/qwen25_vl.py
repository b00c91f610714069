"""Qwen2.5-VL's language model as a text encoder: the last hidden state, after the final norm (Qwen-Image's choice).

- grouped-query attention with biases, rope over three axes: time, row and column, which are the same for text
- SiLU-gated feed-forward, no biases
- rows of the vision tower stand in the places of <|image_pad|> tokens
- the tensor names are llama.cpp's; `RENAMES` turns Hugging Face's into them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loader.checkpoint import Checkpoint
from loader.errors import LoadError
from pyggml import Backend, Graph, Tensor, Type, ops

from .compute import Compute
from .detected import detected, n_blocks, shape
from .lora import Naming, extra_nodes
from .nn import Embedding, Linear, Module, RMSNorm, attention, causal_mask
from .qwen3 import ALIASES

IMAGE_PAD = 151655  # <|image_pad|>

RENAMES: list[tuple[str, str | None]] = [
    (r"^(?:model\.)?visual\..*$", None),  # the vision tower is a network of its own
    (r"^(?:model\.language_model|language_model\.model|model)\.", ""),
    (r"^embed_tokens\.", "token_embd."),
    (r"^norm\.", "output_norm."),
    (r"^layers\.(\d+)\.self_attn\.([qkv])_proj\.", r"blk.\1.attn_\2."),
    (r"^layers\.(\d+)\.self_attn\.o_proj\.", r"blk.\1.attn_output."),
    (r"^layers\.(\d+)\.mlp\.(gate|up|down)_proj\.", r"blk.\1.ffn_\2."),
    (r"^layers\.(\d+)\.input_layernorm\.", r"blk.\1.attn_norm."),
    (r"^layers\.(\d+)\.post_attention_layernorm\.", r"blk.\1.ffn_norm."),
    (r"^(?:lm_head|output)\..*$", None),  # a text encoder predicts no words
]


@dataclass(frozen=True)
class Qwen25VLConfig:
    """Sizes of a Qwen2.5-VL's language model, from the shapes in its file, its metadata or its config.json."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ff_dim: int
    n_vocab: int
    sections: tuple[int, int, int]  # pairs of a head that turn with time, row and column
    rope_theta: float = 1e6
    norm_eps: float = 1e-6

    @classmethod
    @detected("Qwen2.5-VL text encoder")
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Qwen25VLConfig:
        """`checkpoint` under llama.cpp's names. LoadError when it is no Qwen2.5-VL.

        Shapes do not tell the size of a head: the metadata or config.json does, else it is 128 as in every Qwen2.5-VL.
        """
        ne = partial(shape, "Qwen2.5-VL text encoder", checkpoint)
        dim, n_vocab = ne("token_embd.weight")[:2]
        n_q, n_kv = (ne(f"blk.0.attn_{x}.bias")[0] for x in "qk")
        found = _settings(checkpoint)
        head_dim = n_q // int(found["n_heads"]) if found.get("n_heads") else 128
        usual = (head_dim // 8, head_dim // 16 * 3, head_dim // 16 * 3)
        sections = tuple(int(n) for n in found.get("sections") or usual)
        if not head_dim or n_q % head_dim or n_kv % head_dim or len(sections) < 3 or sum(sections) != head_dim // 2:
            problem = f"{n_q} and {n_kv} do not divide into heads of {head_dim} with rope sections {sections}"
            raise LoadError(problem, path=checkpoint.path)
        return cls(
            dim=dim,
            n_layers=n_blocks(checkpoint, "blk"),
            n_heads=n_q // head_dim,
            n_kv_heads=n_kv // head_dim,
            head_dim=head_dim,
            ff_dim=ne("blk.0.ffn_gate.weight")[1],
            n_vocab=n_vocab,
            sections=(sections[0], sections[1], sections[2]),
            rope_theta=float(found.get("rope_theta") or cls.rope_theta),
            norm_eps=float(found.get("norm_eps") or cls.norm_eps),
        )


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a GGUF's metadata or a config.json says that shapes do not."""
    meta = checkpoint.metadata
    config = checkpoint.config.get("text_config") or checkpoint.config
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    sections = meta.get("qwen2vl.rope.dimension_sections")
    return {
        "n_heads": meta.get("qwen2vl.attention.head_count") or config.get("num_attention_heads"),
        "sections": rope.get("mrope_section") if sections is None else list(sections)[:3],
        "rope_theta": meta.get("qwen2vl.rope.freq_base") or config.get("rope_theta") or rope.get("rope_theta"),
        "norm_eps": meta.get("qwen2vl.attention.layer_norm_rms_epsilon") or config.get("rms_norm_eps"),
    }


class Block(Module):
    """One layer: x += attention(norm x); x += feed_forward(norm x)."""

    def __init__(self, config: Qwen25VLConfig) -> None:
        c = config
        self.attn_norm = RMSNorm(c.dim, c.norm_eps)
        self.attn_q = Linear(c.dim, c.n_heads * c.head_dim)
        self.attn_k = Linear(c.dim, c.n_kv_heads * c.head_dim)
        self.attn_v = Linear(c.dim, c.n_kv_heads * c.head_dim)
        self.attn_output = Linear(c.n_heads * c.head_dim, c.dim, bias=False)
        self.ffn_norm = RMSNorm(c.dim, c.norm_eps)
        self.ffn_gate = Linear(c.dim, c.ff_dim, bias=False)
        self.ffn_up = Linear(c.dim, c.ff_dim, bias=False)
        self.ffn_down = Linear(c.ff_dim, c.dim, bias=False)
        self.config = c

    def __call__(self, x: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        c = self.config
        h = self.attn_norm(x)
        q = ops.reshape(self.attn_q(h), c.head_dim, c.n_heads, -1)  # ne [head_dim, n_heads, n_tokens]
        k = ops.reshape(self.attn_k(h), c.head_dim, c.n_kv_heads, -1)
        v = ops.reshape(self.attn_v(h), c.head_dim, c.n_kv_heads, -1)
        q, k = (
            ops.rope_multi(t, position, c.head_dim, c.sections, ops.ROPE_MROPE, freq_base=c.rope_theta, inplace=True)
            for t in (q, k)
        )
        x = x + self.attn_output(attention(q, k, v, mask))  # ne [dim, n_tokens]
        h = self.ffn_norm(x)
        return x + self.ffn_down(ops.swiglu_split(self.ffn_gate(h), self.ffn_up(h)))


class Qwen25VL(Module):
    """The text encoder: token ids, and rows of the vision tower, to hidden states."""

    naming = Naming([*ALIASES, (r"^output_norm$", "norm")], unused=r"(visual_.*|lm_head|output)$")

    def __init__(self, config: Qwen25VLConfig) -> None:
        self.token_embd = Embedding(config.n_vocab, config.dim)
        self.blk = [Block(config) for _ in range(config.n_layers)]
        self.output_norm = RMSNorm(config.dim, config.norm_eps)
        self.config = config

    def __call__(
        self, ids: Tensor, position: Tensor, mask: Tensor, images: Tensor | None = None, places: Tensor | None = None,
        n_dropped: int = 0,
    ) -> Tensor:  # fmt: skip
        """Tokens ne [n], positions ne [4 n]; images ne [dim, m] take the `places` ne [m]. ne [dim, n - n_dropped]."""
        x = self.token_embd(ids)  # ne [dim, n_tokens]
        if images is not None and places is not None:
            x = ops.set_rows(x, images, places)
        for block in self.blk:
            x = block(x, position, mask)
        dim, n = x.ne[:2]
        return self.output_norm(ops.view(x, (dim, n - n_dropped), offset=n_dropped * x.nb[1]))

    def graph(self, backend: Backend, n_tokens: int, n_image_tokens: int = 0, n_dropped: int = 0) -> Graph:
        """Inputs ids [n], position [4 n] (i32), mask [n, n] (f16), and, where there are image tokens, images [m, dim]
        and places [m] (i32); output hidden, numpy [n_tokens - n_dropped, dim].
        """
        graph = Graph(backend, n_nodes=64 + 48 * len(self.blk) + extra_nodes(self))
        ids = graph.input((n_tokens,), Type.I32, name="ids")
        position = graph.input((4 * n_tokens,), Type.I32, name="position")
        mask = graph.input((n_tokens, n_tokens), Type.F16, name="mask")
        images = places = None
        if n_image_tokens:
            images = graph.input((self.config.dim, n_image_tokens), name="images")
            places = graph.input((n_image_tokens,), Type.I32, name="places")
        graph.output(self(ids, position, mask, images, places, n_dropped), name="hidden")
        return graph

    def encode(
        self, backend: Backend, ids: NDArray[np.int32], images: NDArray[np.float32] | None = None, *,
        position: NDArray[np.int32] | None = None, image_pad: int = IMAGE_PAD, n_dropped: int = 0,
        compute: Compute = Graph.compute,
    ) -> NDArray[np.float32]:  # fmt: skip
        """Hidden states of token `ids` [n]: float32 [n - n_dropped, dim], the first n_dropped left out.

        images: float32 [m, dim] for the m tokens `image_pad`, in their order; position: [3, n], one after the other
        unless given (see `grid_positions`). ValueError for an id outside the table, another number of images' rows, or
        too little left.
        """
        ids = self.token_embd.checked(ids)
        if not 0 <= n_dropped < len(ids):
            raise ValueError(f"{n_dropped} of {len(ids)} tokens cannot be dropped")
        n, places = len(ids), np.flatnonzero(ids == image_pad) if images is not None else np.zeros(0)
        if images is not None and images.shape != (len(places), self.config.dim):
            wanted = f"[{len(places)}, {self.config.dim}]"
            raise ValueError(f"the prompt has {len(places)} image tokens: images are {wanted}, not {images.shape}")
        axes = np.tile(np.arange(n), (3, 1)) if position is None else position
        inputs: dict[str, Any] = {
            "ids": ids,
            "position": np.concatenate([*axes, np.zeros(n)]).astype(np.int32),
            "mask": causal_mask(n),
        }
        if len(places):
            inputs |= {"images": images, "places": places.astype(np.int32)}
        with self.graph(backend, n, len(places), n_dropped) as graph:
            hidden = compute(graph, **inputs)["hidden"]
        return np.asarray(hidden).reshape(n - n_dropped, self.config.dim)  # numpy shapes lose a leading one


def grid_positions(
    ids: NDArray[np.int32], grids: Sequence[tuple[int, int]], image_pad: int = IMAGE_PAD
) -> NDArray[np.int32]:
    """[3, n]: time, row and column of each token, as the model was trained: an image's tokens share their time and
    count rows and columns from there; what follows begins behind the longer side.

    grids: rows and columns of each image's tokens. ValueError when they do not fit the runs of `image_pad`.
    """
    ids = np.asarray(ids)
    parts, start, at = [], 0, 0
    for rows, columns in grids:
        places = np.flatnonzero(ids[at:] == image_pad)
        first = at + int(places[0]) if places.size else len(ids)
        n = rows * columns
        if not (ids[first : first + n] == image_pad).all() or first + n > len(ids):
            raise ValueError(f"the prompt has no {n} image tokens for an image of {rows} x {columns}")
        parts.append(np.tile(start + np.arange(first - at), (3, 1)))
        start += first - at
        row, column = np.divmod(np.arange(n), columns)
        parts.append(start + np.stack([np.zeros_like(row), row, column]))
        start, at = start + max(rows, columns), first + n
    if (ids[at:] == image_pad).any():
        raise ValueError(f"the prompt has more image tokens than its {len(grids)} images")
    parts.append(np.tile(start + np.arange(len(ids) - at), (3, 1)))
    return np.concatenate(parts, axis=1).astype(np.int32)
