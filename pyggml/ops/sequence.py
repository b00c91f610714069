"""Recurrences over tokens: state-space models, RWKV, gated linear attention, delta nets, hyper-connections.

All tensors are f32. These operations pack two results into one tensor: what the tokens give, then the states; each
docstring says where they are, `narrow` or `view` takes them apart.
"""

from __future__ import annotations

from ..lib import lib
from ..tensor import Tensor
from .node import binary, several, two


def ssm_conv(x: Tensor, kernel: Tensor) -> Tensor:
    """Each channel of x convolved with its own kernel, as Mamba does.

    x: [n_tokens + k - 1, channels, n_seqs]; kernel: [k, channels]. Result: [channels, n_tokens, n_seqs].
    """
    return binary("ssm_conv", lib.py_ggml_ssm_conv, x, kernel)


def ssm_scan(
    state: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, ids: Tensor, n_states: int = 1
) -> Tensor:
    """The selective scan of Mamba: for each token, s = s·exp(softplus(dt)·a) + softplus(dt)·x·b and y = s·c.

    state: [d_state, head_dim, heads, n]; x: [head_dim, heads, n_tokens, n_seqs]; dt: [heads, n_tokens, n_seqs];
    a: [1 (Mamba-2) or d_state (Mamba-1), heads]; b, c: [d_state, groups, n_tokens, n_seqs]; ids: i32 [n_seqs], the
    state that each sequence starts from. Result, flat: y in x's shape, then the last `n_states` states of each
    sequence.
    """
    return several("ssm_scan", lib.py_ggml_ssm_scan, (state, x, dt, a, b, c, ids), n_states)


def rwkv_wkv6(k: Tensor, v: Tensor, r: Tensor, first: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    """The time mixing of RWKV-6: y = r·(first·kvᵀ + s), then s = decay·s + kvᵀ, for each head and token.

    k, v, r, decay: [S, heads, n_tokens]; first: [S, heads]; state: [S·S·heads, n_seqs]. All contiguous.
    Result: [S·heads, n_tokens + S·n_seqs]: n_tokens rows of y, then the states.
    """
    return several("rwkv_wkv6", lib.py_ggml_rwkv_wkv6, (k, v, r, first, decay, state))


def rwkv_wkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> Tensor:
    """The time mixing of RWKV-7: s = s·diag(w) + (s·a)·bᵀ + v·kᵀ, then y = s·r, for each head and token.

    r, w, k, v, a, b: [S, heads, n_tokens], S a multiple of 64; state: [S·S·heads, n_seqs]. All contiguous.
    Result: [S·heads, n_tokens + S·n_seqs]: n_tokens rows of y, then the states.
    """
    return several("rwkv_wkv7", lib.py_ggml_rwkv_wkv7, (r, w, k, v, a, b, state))


def gated_linear_attn(k: Tensor, v: Tensor, q: Tensor, gate: Tensor, state: Tensor, scale: float) -> Tensor:
    """Gated linear attention: s = gate·s + k·vᵀ, then y = scale·q·s, for each head and token.

    k, v, q, gate: [S, heads, n_tokens]; state: [S·S·heads, n_seqs]. All contiguous.
    Result: [S·heads, n_tokens + S·n_seqs]: n_tokens rows of y, then the states.
    """
    return several("gated_linear_attn", lib.py_ggml_gated_linear_attn, (k, v, q, gate, state), scale)


def gated_delta_net(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor, state: Tensor, n_states: int = 1
) -> Tensor:
    """The gated delta rule: s = e^gate·s, s = s + beta·k·(v - s·k)ᵀ, y = s·q / √S, for each head and token.

    q, k: [S, heads_k, n_tokens, n_seqs]; v: [S, heads, n_tokens, n_seqs], heads_k divides heads; gate: [1 or S, heads,
    n_tokens, n_seqs]; beta: [1, heads, n_tokens, n_seqs]; state: [S, S, heads, n_seqs].
    Result: [S·heads, n_tokens·n_seqs + n_states·S·n_seqs]: the rows of y, then the last `n_states` states, newest
    first.
    """
    return several("gated_delta_net", lib.py_ggml_gated_delta_net, (q, k, v, gate, beta, state), n_states)


def dsv4_hc_comb(mixes: Tensor, scale: Tensor, base: Tensor, eps: float, n_iter: int) -> Tensor:
    """The mixing matrices of DeepSeek's hyper-connections (arXiv 2512.24880), made doubly stochastic by Sinkhorn steps.

    mixes: [24, n_tokens]; scale: [≥ 3]; base: [24]; logits are mixes[8 + dst + 4·src]·scale[2] + base[8 + dst + 4·src];
    soft-max over dst, plus eps, divided by its sum over src; then n_iter - 1 times by both sums. -> [dst 4, src 4,
    n_tokens].
    """
    return several("dsv4_hc_comb", lib.py_ggml_dsv4_hc_comb, (mixes, scale, base), eps, n_iter)


def dsv4_hc_pre(x: Tensor, weights: Tensor) -> Tensor:
    """Σ_h x[:, h]·weights[h]: streams joined. x: [n, h, n_tokens]; weights: [h, n_tokens]. -> [n, n_tokens]."""
    return binary("dsv4_hc_pre", lib.py_ggml_dsv4_hc_pre, x, weights)


def dsv4_hc_pre_gated(x: Tensor, gate: Tensor, scale: float) -> Tensor:
    """scale·Σ_h x[:, h]·sigmoid(gate[:, h]). x, gate: [n, h, n_tokens]. -> [n, n_tokens]."""
    return two("dsv4_hc_pre_gated", lib.py_ggml_dsv4_hc_pre_gated, x, gate, scale)


def dsv4_hc_post(x: Tensor, residual: Tensor, post: Tensor, comb: Tensor | None = None) -> Tensor:
    """Streams parted again: x·post[dst] + Σ_src residual[src]·comb[dst, src]; without comb, + residual[dst].

    x: [n, n_tokens]; residual: [n, h, n_tokens]; post: [h, n_tokens]; comb: [h, h, n_tokens]. -> [n, h, n_tokens].
    """
    return several("dsv4_hc_post", lib.py_ggml_dsv4_hc_post, (x, residual, post, comb))
