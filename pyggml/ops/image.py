"""Resizing, padding, rolling, windows; and the sinusoids of time steps."""

from __future__ import annotations

from ..lib import lib
from ..tensor import Tensor
from ..types import ScaleMode
from .node import one

ALIGN_CORNERS = 1 << 8
ANTIALIAS = 1 << 9


def upscale(x: Tensor, factor: int, mode: int = ScaleMode.NEAREST) -> Tensor:
    """Width and height times `factor` (at least 2).

    f32 [W, H, C, N] -> [W·factor, H·factor, C, N]; mode: a ScaleMode.
    """
    return one("upscale", lib.py_ggml_upscale, x, factor, mode)


def interpolate(x: Tensor, ne: tuple[int, int, int, int], mode: int = ScaleMode.NEAREST) -> Tensor:
    """x resized to `ne`, up or down. f32.

    mode: a ScaleMode, with ALIGN_CORNERS or (BILINEAR only) ANTIALIAS added; all but NEAREST resize width and height
    only.
    """
    return one("interpolate", lib.py_ggml_interpolate, x, *ne, mode)


def pad(x: Tensor, p0: int, p1: int = 0, p2: int = 0, p3: int = 0, *, circular: bool = False) -> Tensor:
    """p_i zeros after dimension i; `circular`: the values from its beginning. f32."""
    return one("pad", lib.py_ggml_pad_circular if circular else lib.py_ggml_pad, x, p0, p1, p2, p3)


def pad_ext(
    x: Tensor, dim0: tuple[int, int] = (0, 0), dim1: tuple[int, int] = (0, 0), dim2: tuple[int, int] = (0, 0),
    dim3: tuple[int, int] = (0, 0), *, circular: bool = False,
) -> Tensor:  # fmt: skip
    """(before, after) zeros in each dimension; `circular`: the values from the other side. f32."""
    call = lib.py_ggml_pad_ext_circular if circular else lib.py_ggml_pad_ext
    return one("pad_ext", call, x, *dim0, *dim1, *dim2, *dim3)


def pad_reflect_1d(x: Tensor, before: int, after: int) -> Tensor:
    """Rows continued by their mirror image, the edge not repeated: [b, a, b, c, b] is (1, 1) of [a, b, c]. f32."""
    return one("pad_reflect_1d", lib.py_ggml_pad_reflect_1d, x, before, after)


def roll(x: Tensor, shift0: int, shift1: int = 0, shift2: int = 0, shift3: int = 0) -> Tensor:
    """Elements moved by shift_i along dimension i; what leaves at the end comes in at the beginning. f32."""
    return one("roll", lib.py_ggml_roll, x, shift0, shift1, shift2, shift3)


def win_part(x: Tensor, w: int) -> Tensor:
    """Windows of w × w, padded with zeros: f32 [C, W, H] -> [C, w, w, ⌈W/w⌉·⌈H/w⌉]."""
    return one("win_part", lib.py_ggml_win_part, x, w)


def win_unpart(x: Tensor, width: int, height: int, w: int) -> Tensor:
    """What win_part took apart: f32 [C, w, w, n] -> [C, width, height]."""
    return one("win_unpart", lib.py_ggml_win_unpart, x, width, height, w)


def timestep_embedding(t: Tensor, dim: int, max_period: int = 10000) -> Tensor:
    """cos(t·f), then sin(t·f), with f_i = max_period^(-i / (dim/2)). f32 [n] -> [dim, n]; an odd dim ends in a zero."""
    return one("timestep_embedding", lib.py_ggml_timestep_embedding, t, dim, max_period)
