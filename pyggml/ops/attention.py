"""Soft-max, masks, rotary embeddings and attention."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ShapeError
from ..lib import ffi, lib
from ..tensor import Tensor
from .node import NULL, graph_of, one, refuse, several, two, unary

ROPE_NORMAL = 0
ROPE_NEOX = 2
ROPE_MROPE = 8
ROPE_VISION = 24
ROPE_IMROPE = 40


def soft_max(x: Tensor, *, inplace: bool = False) -> Tensor:
    """eˣ / Σeˣ over each row. f32, contiguous."""
    return unary("soft_max", lib.py_ggml_soft_max_inplace if inplace else lib.py_ggml_soft_max, x)


def soft_max_ext(
    x: Tensor, mask: Tensor | None = None, scale: float = 1.0, max_bias: float = 0.0, *,
    sinks: Tensor | None = None, inplace: bool = False,
) -> Tensor:  # fmt: skip
    """soft_max(scale·x + slope·mask) over each row; slope is 1, or ALiBi's for the head when max_bias > 0.

    x: f32 [n_kv, n_q, heads, batch], contiguous; mask: f16 or f32 [n_kv, ≥ n_q, h, b], h and b divide heads and batch,
    contiguous; sinks: f32 [heads], a logit for each head that takes part in the sum only.
    """
    call = lib.py_ggml_soft_max_ext_inplace if inplace else lib.py_ggml_soft_max_ext
    result = several("soft_max_ext", call, (x, mask), scale, max_bias)
    if sinks is not None:
        graph_of(result, sinks)
        if sinks.ne != (x.ne[2], 1, 1, 1) or sinks.type.name != "F32":
            raise ShapeError(f"soft_max_ext: the sinks are F32 [{x.ne[2]}], one for each head of {x!r}, not {sinks!r}")
        lib.py_ggml_soft_max_add_sinks(result.ptr, sinks.ptr)
    return result


def soft_max_ext_back(
    grad: Tensor, y: Tensor, scale: float = 1.0, max_bias: float = 0.0, *, inplace: bool = False
) -> Tensor:
    """The gradient of soft_max_ext's x from that of its result `y`. f32, contiguous; max_bias is 0."""
    call = lib.py_ggml_soft_max_ext_back_inplace if inplace else lib.py_ggml_soft_max_ext_back
    return two("soft_max_ext_back", call, grad, y, scale, max_bias)


def diag_mask_inf(x: Tensor, n_past: int, *, inplace: bool = False) -> Tensor:
    """x with -inf where the column is beyond n_past + row: a causal mask. f32."""
    call = lib.py_ggml_diag_mask_inf_inplace if inplace else lib.py_ggml_diag_mask_inf
    return one("diag_mask_inf", call, x, n_past)


def diag_mask_zero(x: Tensor, n_past: int, *, inplace: bool = False) -> Tensor:
    """x with 0 where the column is beyond n_past + row. f32."""
    call = lib.py_ggml_diag_mask_zero_inplace if inplace else lib.py_ggml_diag_mask_zero
    return one("diag_mask_zero", call, x, n_past)


def flash_attn_ext(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float = 1.0, max_bias: float = 0.0,
    logit_softcap: float = 0.0, *, sinks: Tensor | None = None, prec: int | None = None, n_kv_max: int | None = None,
) -> Tensor:  # fmt: skip
    """soft_max(scale·q·kᵀ + mask)·v for each head, without storing the scores.

    q: f32 [d, n_q, heads, b]; k: [d, n_kv, heads_kv, b]; v: [dv, n_kv, heads_kv, b], f32, f16, bf16 or quantised, not
    transposed; heads_kv divides heads. mask: f16 [n_kv, ≥ n_q, m, n], contiguous, m divides heads, n divides b.
    Result: f32 [dv, heads, n_q, b], heads and queries exchanged, ready to be reshaped to [dv·heads, n_q, b].

    max_bias > 0: ALiBi slopes on the mask; logit_softcap c > 0: c·tanh(score / c); sinks: f32 [heads];
    prec=Prec.F32: accumulate in f32; n_kv_max: at most that many finite entries in each row of the mask.
    """
    result = several("flash_attn_ext", lib.py_ggml_flash_attn_ext, (q, k, v, mask), scale, max_bias, logit_softcap)
    if sinks is not None:
        graph_of(result, sinks)
        if sinks.ne != (q.ne[2], 1, 1, 1) or sinks.type.name != "F32":
            raise ShapeError(f"flash_attn_ext: the sinks are F32 [{q.ne[2]}], one for each head, not {sinks!r}")
        lib.py_ggml_flash_attn_ext_add_sinks(result.ptr, sinks.ptr)
    if prec is not None:
        lib.ggml_prec_set_acc(result.ptr, prec)
    if n_kv_max is not None:
        lib.py_ggml_flash_attn_ext_set_n_kv_max(result.ptr, n_kv_max)
    return result




def rope(x: Tensor, positions: Tensor, n_dims: int, mode: int = ROPE_NORMAL, *, inplace: bool = False) -> Tensor:
    """rope_ext with its defaults."""
    return two("rope", lib.py_ggml_rope_inplace if inplace else lib.py_ggml_rope, x, positions, n_dims, mode)


def rope_ext(
    x: Tensor, positions: Tensor, n_dims: int, mode: int = ROPE_NORMAL, *, freq_factors: Tensor | None = None,
    n_ctx_orig: int = 0, freq_base: float = 10000.0, freq_scale: float = 1.0, ext_factor: float = 0.0,
    attn_factor: float = 1.0, beta_fast: float = 0.0, beta_slow: float = 0.0, inplace: bool = False, back: bool = False,
) -> Tensor:  # fmt: skip
    """Rotary position embedding: pair i of the first n_dims elements of each head turned by an angle.

    x: f32 or f16 [head_dim, heads, n_tokens, batch]; positions: i32 [n_tokens]. The angle of pair i is
    position·freq_base^(-2i/n_dims)·freq_scale / freq_factors[i]; freq_factors: f32 [≥ n_dims / 2].
    A pair is elements (2i, 2i+1) in mode ROPE_NORMAL, (i, i + n_dims/2) in ROPE_NEOX.
    n_ctx_orig, ext_factor, attn_factor and the betas are YaRN's; the defaults switch it off.
    `back`: turn the other way, the gradient.
    """
    graph = graph_of(x, positions, freq_factors)
    call = lib.py_ggml_rope_ext_inplace if inplace else lib.py_ggml_rope_ext
    call = lib.py_ggml_rope_ext_back if back else call
    factors = NULL if freq_factors is None else freq_factors.ptr
    ptr = call(graph.ptr, x.ptr, positions.ptr, factors, n_dims, mode, n_ctx_orig, freq_base, freq_scale, ext_factor,
               attn_factor, beta_fast, beta_slow)  # fmt: skip
    return Tensor(ptr, graph) if ptr else refuse("rope_ext", (x, positions, freq_factors), (n_dims, mode))


def rope_multi(
    x: Tensor, positions: Tensor, n_dims: int, sections: Sequence[int], mode: int = ROPE_MROPE, *,
    freq_factors: Tensor | None = None, n_ctx_orig: int = 0, freq_base: float = 10000.0, freq_scale: float = 1.0,
    ext_factor: float = 0.0, attn_factor: float = 1.0, beta_fast: float = 0.0, beta_slow: float = 0.0,
    inplace: bool = False, back: bool = False,
) -> Tensor:  # fmt: skip
    """rope_ext with up to four positions a token (time, height, width, extra), one for each section of the pairs.

    positions: i32 [4·n_tokens], all of one kind after the other; sections: pairs in each of four sections, together
    n_dims / 2. mode: ROPE_MROPE (sections one after the other), ROPE_IMROPE (interleaved), ROPE_VISION (each section's
    frequencies start anew; n_dims is head_dim / 2). Pairs are as in ROPE_NEOX.
    """
    if len(sections) > 4:
        raise ShapeError(f"rope_multi has at most four sections, not {list(sections)}")
    graph = graph_of(x, positions, freq_factors)
    call = lib.py_ggml_rope_multi_inplace if inplace else lib.py_ggml_rope_multi
    call = lib.py_ggml_rope_multi_back if back else call
    four = [*sections, 0, 0, 0, 0][:4]
    factors = NULL if freq_factors is None else freq_factors.ptr
    ptr = call(graph.ptr, x.ptr, positions.ptr, factors, n_dims, ffi.new("int[4]", four), mode, n_ctx_orig, freq_base,
               freq_scale, ext_factor, attn_factor, beta_fast, beta_slow)  # fmt: skip
    if not ptr:
        refuse("rope_multi", (x, positions, freq_factors), (n_dims, four, mode))
    return Tensor(ptr, graph)


def rope_offset(x: Tensor, n: int) -> Tensor:
    """Let a rope node (not of ROPE_VISION) turn elements n..n+n_dims-1 of each head instead of the first; returns
    it.
    """
    graph = graph_of(x)
    if not lib.py_ggml_rope_set_offset(x.ptr, n):
        refuse("rope_offset", (x,), (n,))
    return Tensor(x.ptr, graph)


def get_rel_pos(x: Tensor, qh: int, kh: int) -> Tensor:
    """Rows of relative positions for windows of equal height and width, as SAM wants them.

    x: f16 [n, 2·max(qh, kh) - 1] -> f16 [n, kh, qh].
    """
    return one("get_rel_pos", lib.py_ggml_get_rel_pos, x, qh, kh)


def add_rel_pos(x: Tensor, pw: Tensor, ph: Tensor, *, inplace: bool = False) -> Tensor:
    """Attention scores plus the decomposed relative positions of SAM.

    x: f32 [kw·kh, qw·qh, heads·n]; pw, ph: f32 [kw, qw·..., ...] of equal shape with ne0·ne0 = x.ne[0].
    """
    call = lib.py_ggml_add_rel_pos_inplace if inplace else lib.py_ggml_add_rel_pos
    return several("add_rel_pos", call, (x, pw, ph))


def lightning_indexer(q: Tensor, k: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """Σ_heads weights·relu(q·k) + mask: the scores by which sparse attention picks its keys.

    q: f32 [d, heads, n_q, b]; k: f32, f16 or quantised [d, 1, n_kv, b]; weights: f32 [heads, n_q, 1, b], scaled;
    mask: f16 [n_kv, n_q, 1, b']. Result: f32 [n_kv, n_q, 1, b].
    """
    return several("lightning_indexer", lib.py_ggml_lightning_indexer, (q, k, weights, mask))
