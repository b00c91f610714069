"""Normalisation. None of these has a weight: multiply, and add, afterwards.

`inplace=True` overwrites the data of the argument; the result is a view of it.
"""

from __future__ import annotations

from ..lib import lib
from ..tensor import Tensor
from .node import one


def norm(x: Tensor, eps: float = 1e-5, *, inplace: bool = False) -> Tensor:
    """(x - mean) / √(var + eps) over each row: layer norm. f32, rows contiguous."""
    return one("norm", lib.py_ggml_norm_inplace if inplace else lib.py_ggml_norm, x, eps)


def rms_norm(x: Tensor, eps: float = 1e-6, *, inplace: bool = False) -> Tensor:
    """x / √(mean(x²) + eps) over each row. f32, rows contiguous."""
    return one("rms_norm", lib.py_ggml_rms_norm_inplace if inplace else lib.py_ggml_rms_norm, x, eps)


def group_norm(x: Tensor, n_groups: int, eps: float = 1e-6, *, inplace: bool = False) -> Tensor:
    """(x - mean) / √(var + eps) over width, height and a group of ⌈C / n_groups⌉ channels.

    x: f32 [W, H, C, N], rows contiguous.
    """
    return one("group_norm", lib.py_ggml_group_norm_inplace if inplace else lib.py_ggml_group_norm, x, n_groups, eps)


def l2_norm(x: Tensor, eps: float = 1e-6, *, inplace: bool = False) -> Tensor:
    """x / max(√(Σx²), eps) over each row. f32, rows contiguous."""
    return one("l2_norm", lib.py_ggml_l2_norm_inplace if inplace else lib.py_ggml_l2_norm, x, eps)
