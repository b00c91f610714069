"""Products of matrices."""

from __future__ import annotations

from typing import Any

from ..lib import lib
from ..tensor import Tensor
from .node import binary, several, two


def mul_mat(w: Tensor, x: Tensor, *, prec: int | None = None, hint: int | None = None) -> Tensor:
    """x @ wᵀ in numpy's terms: each row of the result holds the products of a row of x with all rows of w.

    w: [k, n, a, b], any type that ggml multiplies with, f32 to 1-bit; x: f32 [k, m, a·i, b·j] (i, j whole numbers:
    w is repeated), or f16/bf16 beside a w of the same type. Result: f32 [n, m, a·i, b·j].

    On the CPU x is rounded to the type that w's kernel multiplies with: f16 for an f16 w, 8-bit blocks for a quantised
    one. `prec=Prec.F32` asks a backend that would accumulate in less for f32; `hint`: an OpHint.
    ShapeError when k differs, the batches do not repeat, or w is transposed.
    """
    result = binary("mul_mat", lib.py_ggml_mul_mat, w, x)
    if prec is not None:
        lib.ggml_prec_set_acc(result.ptr, prec)
    if hint is not None:
        lib.ggml_mul_mat_set_hint(result.ptr, hint)
    return result


def mul_mat_id(ws: Tensor, x: Tensor, ids: Tensor, *, prec: int | None = None) -> Tensor:
    """mul_mat with a matrix picked by number for each row of x: a mixture of experts.

    ws: [k, n, n_experts]; x: f32 [k, n_used or 1, n_tokens]; ids: i32 [n_used, n_tokens], 0..n_experts-1.
    Result: f32 [n, n_used, n_tokens].
    """
    result = several("mul_mat_id", lib.py_ggml_mul_mat_id, (ws, x, ids))
    if prec is not None:
        lib.ggml_prec_set_acc(result.ptr, prec)
    return result


def out_prod(a: Tensor, b: Tensor) -> Tensor:
    """Σₖ a[:, k] · b[:, k]ᵀ: bᵀ @ a in numpy's terms.

    a: [m, k, p, q], f32 or quantised; b: f32 [n, k, p·i, q·j]. Result: f32 [m, n, p·i, q·j].
    """
    return binary("out_prod", lib.py_ggml_out_prod, a, b)


def solve_tri(a: Tensor, b: Tensor, *, left: bool = True, lower: bool = True, unit: bool = False) -> Tensor:
    """x of a @ x = b with a lower triangular (numpy's terms). a: f32 [n, n, ...]; b: f32 [m, n, ...] -> as b.

    ggml has only left=True, lower=True, unit=False; anything else is a ShapeError.
    """
    call: Any = lib.py_ggml_solve_tri
    return two("solve_tri", call, a, b, left, lower, unit)
