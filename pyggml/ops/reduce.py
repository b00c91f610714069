"""Sums, means, maxima and orders along rows (dimension 0)."""

from __future__ import annotations

from ..lib import lib
from ..tensor import Tensor
from ..types import SortOrder
from .node import binary, one, unary


def sum(x: Tensor) -> Tensor:
    """The sum of all elements. f32, f16, bf16; any shape -> [1], x's type."""
    return unary("sum", lib.py_ggml_sum, x)


def sum_rows(x: Tensor) -> Tensor:
    """The sum of each row. f32 [n, a, b, c] -> [1, a, b, c]."""
    return unary("sum_rows", lib.py_ggml_sum_rows, x)


def mean(x: Tensor) -> Tensor:
    """The mean of each row. f32 [n, a, b, c] -> f32 [1, a, b, c]."""
    return unary("mean", lib.py_ggml_mean, x)


def cumsum(x: Tensor) -> Tensor:
    """The running sum along each row. f32, same shape."""
    return unary("cumsum", lib.py_ggml_cumsum, x)


def argmax(x: Tensor) -> Tensor:
    """The index of the largest element of each row. f32 [n, a] -> i32 [a]."""
    return unary("argmax", lib.py_ggml_argmax, x)


def count_equal(a: Tensor, b: Tensor) -> Tensor:
    """How many elements of a and b are equal. i32, same shape -> i64 [1]."""
    return binary("count_equal", lib.py_ggml_count_equal, a, b)


def argsort(x: Tensor, order: int = SortOrder.ASC) -> Tensor:
    """The indices that sort each row. f32 [n, ...] -> i32 [n, ...]; order: a SortOrder."""
    return one("argsort", lib.py_ggml_argsort, x, order)


def top_k(x: Tensor, k: int) -> Tensor:
    """The indices of the k largest elements of each row, in no particular order. f32 [n, ...] -> i32 [k, ...]."""
    return one("top_k", lib.py_ggml_top_k, x, k)


def argsort_top_k(x: Tensor, k: int) -> Tensor:
    """The indices of the k largest elements of each row, largest first: a view of argsort.

    f32 [n, ...] -> i32 [k, ...].
    """
    return one("argsort_top_k", lib.py_ggml_argsort_top_k, x, k)
