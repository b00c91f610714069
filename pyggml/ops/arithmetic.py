"""Element by element: sums, products, powers, rounding.

Where two tensors meet, the second is repeated to the first's shape: each of its dimensions must divide the first's.
The result has the shape and, if nothing else is said, the type of the first. `inplace=True` overwrites the data of the
first argument; the result is a view of it.
"""

from __future__ import annotations

from ..lib import lib
from ..tensor import Tensor
from ..types import Type
from .node import binary, one, several, two, unary


def add(a: Tensor, b: Tensor, *, inplace: bool = False) -> Tensor:
    """a + b, b repeated to a's shape.

    a: f32, f16, bf16 or quantised; b: f32, or a's type (for a quantised a: f32). ShapeError when b does not repeat
    to a.
    """
    return binary("add", lib.py_ggml_add_inplace if inplace else lib.py_ggml_add, a, b)


def add_cast(a: Tensor, b: Tensor, type: Type) -> Tensor:
    """a + b in `type`, which is f32; a: f16, bf16 or quantised. b is repeated to a's shape."""
    return two("add_cast", lib.py_ggml_add_cast, a, b, type)


def add_id(a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
    """a[:, i1, i2] + b[:, ids[i1, i2]]: a row of b, picked by number, for each row of a.

    a: f32 [n, n1, n2]; b: f32 [n, n_rows]; ids: i32 [n1, n2]. Result: f32 as a.
    """
    return several("add_id", lib.py_ggml_add_id, (a, b, ids))


def sub(a: Tensor, b: Tensor, *, inplace: bool = False) -> Tensor:
    """a - b, b repeated to a's shape. f32, f16, bf16; b: f32 or a's type. ShapeError when b does not repeat to a."""
    return binary("sub", lib.py_ggml_sub_inplace if inplace else lib.py_ggml_sub, a, b)


def mul(a: Tensor, b: Tensor, *, inplace: bool = False) -> Tensor:
    """a · b by elements, b repeated to a's shape. f32, f16, bf16; b: f32 or a's type.

    ShapeError when b does not repeat to a. For the product of matrices see mul_mat.
    """
    return binary("mul", lib.py_ggml_mul_inplace if inplace else lib.py_ggml_mul, a, b)


def div(a: Tensor, b: Tensor, *, inplace: bool = False) -> Tensor:
    """a / b, b repeated to a's shape. f32, f16, bf16; b: f32 or a's type. ShapeError when b does not repeat to a."""
    return binary("div", lib.py_ggml_div_inplace if inplace else lib.py_ggml_div, a, b)


def acc(a: Tensor, b: Tensor, nb1: int, nb2: int, nb3: int, offset: int, *, inplace: bool = False) -> Tensor:
    """a with b added to a part of it: the view of a with b's shape, strides nb1..nb3 and `offset`, all in bytes.

    a, b: f32, contiguous, b not larger than a. Result: f32 as a.
    """
    return two("acc", lib.py_ggml_acc_inplace if inplace else lib.py_ggml_acc, a, b, nb1, nb2, nb3, offset)


def scale(x: Tensor, s: float, bias: float = 0.0, *, inplace: bool = False) -> Tensor:
    """s·x + bias. x: f32, contiguous rows."""
    if bias:
        call = lib.py_ggml_scale_bias_inplace if inplace else lib.py_ggml_scale_bias
        return one("scale", call, x, s, bias)
    return one("scale", lib.py_ggml_scale_inplace if inplace else lib.py_ggml_scale, x, s)


def fill(x: Tensor, value: float, *, inplace: bool = False) -> Tensor:
    """`value` everywhere, in the shape and type of x. x: f32 or f16, contiguous."""
    return one("fill", lib.py_ggml_fill_inplace if inplace else lib.py_ggml_fill, x, value)


def clamp(x: Tensor, low: float, high: float, *, inplace: bool = False) -> Tensor:
    """x, but at least `low` and at most `high`. x: f32 or f16."""
    return one("clamp", lib.py_ggml_clamp_inplace if inplace else lib.py_ggml_clamp, x, low, high)


def sqr(x: Tensor, *, inplace: bool = False) -> Tensor:
    """x². f32, f16, bf16; contiguous rows."""
    return unary("sqr", lib.py_ggml_sqr_inplace if inplace else lib.py_ggml_sqr, x)


def sqrt(x: Tensor, *, inplace: bool = False) -> Tensor:
    """√x; NaN below zero. f32, f16, bf16; contiguous rows."""
    return unary("sqrt", lib.py_ggml_sqrt_inplace if inplace else lib.py_ggml_sqrt, x)


def exp(x: Tensor, *, inplace: bool = False) -> Tensor:
    """eˣ. f32, f16, bf16; contiguous rows."""
    return unary("exp", lib.py_ggml_exp_inplace if inplace else lib.py_ggml_exp, x)


def expm1(x: Tensor, *, inplace: bool = False) -> Tensor:
    """eˣ - 1. f32, f16, bf16; contiguous rows."""
    return unary("expm1", lib.py_ggml_expm1_inplace if inplace else lib.py_ggml_expm1, x)


def log(x: Tensor, *, inplace: bool = False) -> Tensor:
    """The natural logarithm. f32, f16, bf16; contiguous rows."""
    return unary("log", lib.py_ggml_log_inplace if inplace else lib.py_ggml_log, x)


def sin(x: Tensor, *, inplace: bool = False) -> Tensor:
    """sin x, in radians. f32, f16, bf16; contiguous rows."""
    return unary("sin", lib.py_ggml_sin_inplace if inplace else lib.py_ggml_sin, x)


def cos(x: Tensor, *, inplace: bool = False) -> Tensor:
    """cos x, in radians. f32, f16, bf16; contiguous rows."""
    return unary("cos", lib.py_ggml_cos_inplace if inplace else lib.py_ggml_cos, x)


def neg(x: Tensor, *, inplace: bool = False) -> Tensor:
    """-x. f32, f16, bf16; contiguous rows."""
    return unary("neg", lib.py_ggml_neg_inplace if inplace else lib.py_ggml_neg, x)


def abs(x: Tensor, *, inplace: bool = False) -> Tensor:
    """|x|. f32, f16, bf16; contiguous rows."""
    return unary("abs", lib.py_ggml_abs_inplace if inplace else lib.py_ggml_abs, x)


def sgn(x: Tensor, *, inplace: bool = False) -> Tensor:
    """-1, 0 or 1, the sign of x. f32, f16, bf16; contiguous rows."""
    return unary("sgn", lib.py_ggml_sgn_inplace if inplace else lib.py_ggml_sgn, x)


def step(x: Tensor, *, inplace: bool = False) -> Tensor:
    """1 where x > 0, else 0. f32, f16, bf16; contiguous rows."""
    return unary("step", lib.py_ggml_step_inplace if inplace else lib.py_ggml_step, x)


def floor(x: Tensor, *, inplace: bool = False) -> Tensor:
    """x rounded down. f32, f16, bf16; contiguous rows."""
    return unary("floor", lib.py_ggml_floor_inplace if inplace else lib.py_ggml_floor, x)


def ceil(x: Tensor, *, inplace: bool = False) -> Tensor:
    """x rounded up. f32, f16, bf16; contiguous rows."""
    return unary("ceil", lib.py_ggml_ceil_inplace if inplace else lib.py_ggml_ceil, x)


def round(x: Tensor, *, inplace: bool = False) -> Tensor:
    """x rounded to the nearest whole number, halves away from zero. f32, f16, bf16; contiguous rows."""
    return unary("round", lib.py_ggml_round_inplace if inplace else lib.py_ggml_round, x)


def trunc(x: Tensor, *, inplace: bool = False) -> Tensor:
    """x rounded towards zero. f32, f16, bf16; contiguous rows."""
    return unary("trunc", lib.py_ggml_trunc_inplace if inplace else lib.py_ggml_trunc, x)
