"""Rotary position embedding over several axes (Su et al. 2021; one section of each head for each axis)."""

from __future__ import annotations

from collections.abc import Sequence

from pyggml import Tensor, ops

INTERLEAVED, HALVES = 0, 2  # ggml's "normal" and "neox": element 2j turns with 2j+1, or j with j + n/2


def apply_rope_axes(
    x: Tensor, positions: Sequence[Tensor], widths: Sequence[int], theta: float, unit: float = 1.0
) -> Tensor:
    """Rotate pairs (2j, 2j+1) of each head: the first widths[0] elements by positions[0], the next by positions[1], ...

    x: ne [head_dim, n_heads, n_tokens], overwritten; positions: one i32 ne [n_tokens] for each axis;
    angle of pair j of an axis of width d: unit * position * theta^(-2j/d).
    """
    offset = 0
    for position, width in zip(positions, widths, strict=True):
        x = ops.rope_ext(x, position, n_dims=width, mode=INTERLEAVED, freq_base=theta, freq_scale=unit, inplace=True)
        x = ops.rope_offset(x, offset)
        offset += width
    return x


def apply_rope(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Rotate pairs (j, j + head_dim/2) of each head; x: ne [head_dim, n_heads, n_tokens], overwritten."""
    return ops.rope_ext(x, position, n_dims=x.ne[0], mode=HALVES, freq_base=theta, inplace=True)
