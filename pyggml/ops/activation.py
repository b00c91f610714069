"""Activation functions, and their gated variants. f32 or f16; rows must be contiguous.

`inplace=True` overwrites the data of the argument; the result is a view of it.
"""

from __future__ import annotations

from ..lib import lib
from ..tensor import Tensor
from .node import binary, one, two, unary


def relu(x: Tensor, *, inplace: bool = False) -> Tensor:
    """max(x, 0)."""
    return unary("relu", lib.py_ggml_relu_inplace if inplace else lib.py_ggml_relu, x)


def leaky_relu(x: Tensor, negative_slope: float, *, inplace: bool = False) -> Tensor:
    """x where x > 0, else negative_slope·x."""
    return one("leaky_relu", lib.py_ggml_leaky_relu, x, negative_slope, inplace)


def elu(x: Tensor, *, inplace: bool = False) -> Tensor:
    """x where x > 0, else eˣ - 1."""
    return unary("elu", lib.py_ggml_elu_inplace if inplace else lib.py_ggml_elu, x)


def tanh(x: Tensor, *, inplace: bool = False) -> Tensor:
    """tanh x, the hyperbolic tangent."""
    return unary("tanh", lib.py_ggml_tanh_inplace if inplace else lib.py_ggml_tanh, x)


def sigmoid(x: Tensor, *, inplace: bool = False) -> Tensor:
    """1 / (1 + e⁻ˣ)."""
    return unary("sigmoid", lib.py_ggml_sigmoid_inplace if inplace else lib.py_ggml_sigmoid, x)


def silu(x: Tensor, *, inplace: bool = False) -> Tensor:
    """x·sigmoid(x), also called swish."""
    return unary("silu", lib.py_ggml_silu_inplace if inplace else lib.py_ggml_silu, x)


def gelu(x: Tensor, *, inplace: bool = False) -> Tensor:
    """The tanh approximation of x·Φ(x): 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))).

    On the CPU it is read from a table of f16 values; see gelu_erf for more digits.
    """
    return unary("gelu", lib.py_ggml_gelu_inplace if inplace else lib.py_ggml_gelu, x)


def gelu_erf(x: Tensor, *, inplace: bool = False) -> Tensor:
    """x·Φ(x) = 0.5·x·(1 + erf(x/√2)), exactly."""
    return unary("gelu_erf", lib.py_ggml_gelu_erf_inplace if inplace else lib.py_ggml_gelu_erf, x)


def gelu_quick(x: Tensor, *, inplace: bool = False) -> Tensor:
    """x·sigmoid(1.702·x); on the CPU from a table of f16 values."""
    return unary("gelu_quick", lib.py_ggml_gelu_quick_inplace if inplace else lib.py_ggml_gelu_quick, x)


def hardswish(x: Tensor) -> Tensor:
    """x·min(max(x + 3, 0), 6) / 6."""
    return unary("hardswish", lib.py_ggml_hardswish, x)


def hardsigmoid(x: Tensor) -> Tensor:
    """min(max(x + 3, 0), 6) / 6."""
    return unary("hardsigmoid", lib.py_ggml_hardsigmoid, x)


def softplus(x: Tensor, *, inplace: bool = False) -> Tensor:
    """log(1 + eˣ)."""
    return unary("softplus", lib.py_ggml_softplus_inplace if inplace else lib.py_ggml_softplus, x)


def xielu(x: Tensor, alpha_n: float, alpha_p: float, beta: float, eps: float) -> Tensor:
    """xIELU (arXiv 2411.13010): with p = softplus(alpha_p) and n = beta + softplus(alpha_n),

    p·x² + beta·x where x > 0, else n·(expm1(min(x, eps)) - x) + beta·x.
    """
    return one("xielu", lib.py_ggml_xielu, x, alpha_n, alpha_p, beta, eps)


# -- gated: one half of the row, or one tensor, through an activation, times the other ------------------------------


def reglu(x: Tensor, *, swapped: bool = False) -> Tensor:
    """relu(first half of each row) · (second half); `swapped`: the other way round. x: [2n, ...] -> [n, ...]."""
    return unary("reglu", lib.py_ggml_reglu_swapped if swapped else lib.py_ggml_reglu, x)


def geglu(x: Tensor, *, swapped: bool = False) -> Tensor:
    """gelu(first half of each row) · (second half); `swapped`: the other way round. x: [2n, ...] -> [n, ...]."""
    return unary("geglu", lib.py_ggml_geglu_swapped if swapped else lib.py_ggml_geglu, x)


def geglu_erf(x: Tensor, *, swapped: bool = False) -> Tensor:
    """gelu_erf(first half of each row) · (second half); `swapped`: the other way round. x: [2n, ...] -> [n, ...]."""
    return unary("geglu_erf", lib.py_ggml_geglu_erf_swapped if swapped else lib.py_ggml_geglu_erf, x)


def geglu_quick(x: Tensor, *, swapped: bool = False) -> Tensor:
    """gelu_quick(first half of each row) · (second half); `swapped`: the other way round. x: [2n, ...] -> [n, ...]."""
    return unary("geglu_quick", lib.py_ggml_geglu_quick_swapped if swapped else lib.py_ggml_geglu_quick, x)


def swiglu(x: Tensor, *, swapped: bool = False) -> Tensor:
    """silu(first half of each row) · (second half); `swapped`: the other way round. x: [2n, ...] -> [n, ...]."""
    return unary("swiglu", lib.py_ggml_swiglu_swapped if swapped else lib.py_ggml_swiglu, x)


def reglu_split(gate: Tensor, up: Tensor) -> Tensor:
    """relu(gate) · up; same shape and type."""
    return binary("reglu_split", lib.py_ggml_reglu_split, gate, up)


def geglu_split(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) · up; same shape and type."""
    return binary("geglu_split", lib.py_ggml_geglu_split, gate, up)


def geglu_erf_split(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_erf(gate) · up; same shape and type."""
    return binary("geglu_erf_split", lib.py_ggml_geglu_erf_split, gate, up)


def geglu_quick_split(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_quick(gate) · up; same shape and type."""
    return binary("geglu_quick_split", lib.py_ggml_geglu_quick_split, gate, up)


def swiglu_split(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up; same shape and type."""
    return binary("swiglu_split", lib.py_ggml_swiglu_split, gate, up)


def swiglu_oai(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """g·sigmoid(alpha·g) · (u + 1) with g = min(gate, limit), u = up within ±limit; f32."""
    return two("swiglu_oai", lib.py_ggml_swiglu_oai, gate, up, alpha, limit)


def swiglu_clamp(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) · (up within ±limit); f32."""
    return two("swiglu_clamp", lib.py_ggml_swiglu_clamp, gate, up, limit)
