"""Qwen3 as a text encoder: the hidden state before the last layer, without the final norm (Z-Image's choice).

- grouped-query attention, q and k normalised for each head before rope
- SiLU-gated feed-forward, no biases
- the tensor names are llama.cpp's; `RENAMES` turns Hugging Face's into them
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from loader.checkpoint import Checkpoint
from pyggml import Backend, Graph, Tensor, Type, ops

from .compute import Compute
from .detected import detected, n_blocks, shape
from .lora import Naming, extra_nodes
from .nn import Embedding, Linear, Module, RMSNorm, attention, causal_mask
from .rope import apply_rope

RENAMES: list[tuple[str, str | None]] = [
    (r"^(?:language_model\.)?model\.", ""),
    (r"^embed_tokens\.", "token_embd."),
    (r"^layers\.(\d+)\.self_attn\.([qkv])_proj\.", r"blk.\1.attn_\2."),
    (r"^layers\.(\d+)\.self_attn\.o_proj\.", r"blk.\1.attn_output."),
    (r"^layers\.(\d+)\.self_attn\.([qk])_norm\.", r"blk.\1.attn_\2_norm."),
    (r"^layers\.(\d+)\.mlp\.(gate|up|down)_proj\.", r"blk.\1.ffn_\2."),
    (r"^layers\.(\d+)\.input_layernorm\.", r"blk.\1.attn_norm."),
    (r"^layers\.(\d+)\.post_attention_layernorm\.", r"blk.\1.ffn_norm."),
    # The last layer, the final norm and the output projection take no part in a text encoder.
    (r"^(?:norm|output_norm|lm_head|output)\..*$", None),
]
# The other way round, for LoRA files: what Hugging Face calls our modules.
ALIASES: list[tuple[str, str]] = [
    (r"^token_embd$", "embed_tokens"),
    (r"^blk\.(\d+)\.attn_([qkv])$", r"layers.\1.self_attn.\2_proj"),
    (r"^blk\.(\d+)\.attn_output$", r"layers.\1.self_attn.o_proj"),
    (r"^blk\.(\d+)\.attn_([qk])_norm$", r"layers.\1.self_attn.\2_norm"),
    (r"^blk\.(\d+)\.ffn_(gate|up|down)$", r"layers.\1.mlp.\2_proj"),
    (r"^blk\.(\d+)\.attn_norm$", r"layers.\1.input_layernorm"),
    (r"^blk\.(\d+)\.ffn_norm$", r"layers.\1.post_attention_layernorm"),
]


@dataclass(frozen=True)
class Qwen3Config:
    """Sizes of a Qwen3, from the shapes in its file; rope base and eps from its metadata, else Qwen3's own."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ff_dim: int
    n_vocab: int
    rope_theta: float = 1e6
    norm_eps: float = 1e-6

    @classmethod
    @detected("Qwen3 text encoder")
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Qwen3Config:
        """`checkpoint` under llama.cpp's names. LoadError when it is no Qwen3."""
        ne = partial(shape, "Qwen3 text encoder", checkpoint)
        dim, n_vocab = ne("token_embd.weight")[:2]
        head_dim = ne("blk.0.attn_q_norm.weight")[0]
        meta = {**checkpoint.metadata, **_from_config_json(checkpoint)}
        return cls(
            dim=dim,
            n_layers=n_blocks(checkpoint, "blk"),
            n_heads=ne("blk.0.attn_q.weight")[1] // head_dim,
            n_kv_heads=ne("blk.0.attn_k.weight")[1] // head_dim,
            head_dim=head_dim,
            ff_dim=ne("blk.0.ffn_gate.weight")[1],
            n_vocab=n_vocab,
            rope_theta=float(meta.get("qwen3.rope.freq_base", cls.rope_theta)),
            norm_eps=float(meta.get("qwen3.attention.layer_norm_rms_epsilon", cls.norm_eps)),
        )


def _from_config_json(checkpoint: Checkpoint) -> Mapping[str, object]:
    config = checkpoint.config
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta")
    found = {"qwen3.rope.freq_base": theta, "qwen3.attention.layer_norm_rms_epsilon": config.get("rms_norm_eps")}
    return {key: value for key, value in found.items() if value is not None}


class Block(Module):
    """One layer: x += attention(norm x); x += feed_forward(norm x)."""

    def __init__(self, config: Qwen3Config) -> None:
        c = config
        self.attn_norm = RMSNorm(c.dim, c.norm_eps)
        self.attn_q = Linear(c.dim, c.n_heads * c.head_dim, bias=False)
        self.attn_k = Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.attn_v = Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.attn_q_norm = RMSNorm(c.head_dim, c.norm_eps)
        self.attn_k_norm = RMSNorm(c.head_dim, c.norm_eps)
        self.attn_output = Linear(c.n_heads * c.head_dim, c.dim, bias=False)
        self.ffn_norm = RMSNorm(c.dim, c.norm_eps)
        self.ffn_gate = Linear(c.dim, c.ff_dim, bias=False)
        self.ffn_up = Linear(c.dim, c.ff_dim, bias=False)
        self.ffn_down = Linear(c.ff_dim, c.dim, bias=False)
        self.config = config

    def __call__(self, x: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        c = self.config
        h = self.attn_norm(x)
        q = ops.reshape(self.attn_q(h), c.head_dim, c.n_heads, -1)  # ne [head_dim, n_heads, n_tokens]
        k = ops.reshape(self.attn_k(h), c.head_dim, c.n_kv_heads, -1)
        v = ops.reshape(self.attn_v(h), c.head_dim, c.n_kv_heads, -1)
        q = apply_rope(self.attn_q_norm(q), position, c.rope_theta)
        k = apply_rope(self.attn_k_norm(k), position, c.rope_theta)
        x = x + self.attn_output(attention(q, k, v, mask))  # ne [dim, n_tokens]
        h = self.ffn_norm(x)
        return x + self.ffn_down(ops.swiglu_split(self.ffn_gate(h), self.ffn_up(h)))


class Qwen3(Module):
    """The text encoder: token ids to hidden states."""

    def __init__(self, config: Qwen3Config) -> None:
        self.token_embd = Embedding(config.n_vocab, config.dim)
        # Z-Image reads the hidden state that goes into the last layer: that layer is never loaded.
        self.blk = [Block(config) for _ in range(config.n_layers - 1)]
        self.config = config

    def __call__(self, ids: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        x = self.token_embd(ids)  # ne [dim, n_tokens]
        for block in self.blk:
            x = block(x, position, mask)
        return x

    @property
    def naming(self) -> Naming:
        """Names of LoRA files. The last layer, the final norm and the output projection are not computed."""
        return Naming(ALIASES, unused=rf"(layers|blk)_{len(self.blk)}_|(norm|output_norm|lm_head|output)$")

    def graph(self, backend: Backend, n_tokens: int) -> Graph:
        """The graph for `n_tokens`: inputs ids, position (i32) and mask (f16), output hidden."""
        graph = Graph(backend, n_nodes=64 + 40 * len(self.blk) + extra_nodes(self))
        ids = graph.input((n_tokens,), Type.I32, name="ids")
        position = graph.input((n_tokens,), Type.I32, name="position")
        mask = graph.input((n_tokens, n_tokens), Type.F16, name="mask")
        graph.output(self(ids, position, mask), name="hidden")
        return graph

    def encode(
        self, backend: Backend, ids: NDArray[np.int32], compute: Compute = Graph.compute
    ) -> NDArray[np.float32]:
        """Hidden states of token `ids` [n_tokens]: float32 [n_tokens, dim]. ValueError for an id outside the table."""
        ids = self.token_embd.checked(ids)
        n = len(ids)
        with self.graph(backend, n) as graph:
            hidden = compute(graph, ids=ids, position=np.arange(n, dtype=np.int32), mask=causal_mask(n))["hidden"]
        return np.asarray(hidden).reshape(n, self.config.dim)  # numpy shapes lose a leading one
