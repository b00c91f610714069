"""Conversion between numpy and ggml's element types, by ggml's own kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import GGMLError, ShapeError
from .lib import ffi, lib
from .types import Type

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

# ggml looks for the nearest point of a grid, and ends the process when it finds none: as with sums that are infinite.
_OF_GRIDS = ("IQ1", "IQ2", "IQ3")
_LARGEST = 2.0**26  # a block's scale is f16


def quantize(values: ArrayLike, type: Type, importance: ArrayLike | None = None) -> NDArray[np.uint8]:
    """The bytes of `values` (numpy shape [..., n_per_row]) in `type`, one row after another.

    `importance`: float32 [n_per_row], a weight for each column, of which only the proportions count; some types
    (iq2_xxs, ...) cannot do without. ShapeError when a row is no multiple of the type's block; GGMLError when the type
    needs `importance`, or it is negative or not finite; OverflowError for values too large for iq1, iq2 and iq3 types.
    """
    array = np.ascontiguousarray(values, np.float32)
    n_per_row = array.shape[-1] if array.ndim else 1
    n_rows = array.size // n_per_row if n_per_row else 0
    out = np.empty(n_rows * type.row_size(n_per_row), np.uint8)
    weights = ffi.NULL
    if type.name.startswith(_OF_GRIDS) and array.size and not float(np.abs(array).max()) <= _LARGEST:
        raise OverflowError(f"holds values over {_LARGEST:g} or not finite, which {type.name} cannot hold")
    if importance is not None:
        column = np.ascontiguousarray(importance, np.float32)
        if column.shape != (n_per_row,):
            raise ShapeError(f"importance has shape {column.shape}, a row has {n_per_row} elements")
        largest = float(column.max(initial=0))
        if not (np.isfinite(largest) and float(column.min(initial=0)) >= 0):
            raise GGMLError("importance holds values that are negative or not finite")
        if largest and not 2.0**-20 < largest < 2.0**20:  # sums of its products must be numbers of float32
            column = np.ldexp(column, -np.frexp(largest)[1])
        weights = ffi.cast("float *", ffi.from_buffer(column))
    elif lib.ggml_quantize_requires_imatrix(type):
        raise GGMLError(f"{type.name} needs an importance for each column")
    if out.size:
        source = ffi.cast("float *", ffi.from_buffer(array))
        lib.ggml_quantize_chunk(type, source, ffi.from_buffer(out), 0, n_rows, n_per_row, weights)
    return out


def dequantize(raw: NDArray[np.uint8] | bytes, type: Type) -> NDArray[np.float32]:
    """float32 values of bytes in `type`, flat. ShapeError when the bytes are no whole number of blocks."""
    data = np.frombuffer(raw, np.uint8) if isinstance(raw, bytes) else np.ascontiguousarray(raw)
    if data.nbytes % type.type_size:
        raise ShapeError(f"{data.nbytes} bytes are no whole number of {type.name} blocks of {type.type_size}")
    n = data.nbytes // type.type_size * type.block_size
    if type.dtype is not None:
        return data.view(type.dtype).astype(np.float32)
    to_float = lib.ggml_get_type_traits(type).to_float
    if to_float == ffi.NULL:
        raise GGMLError(f"ggml has no kernel that turns {type.name} into f32")
    out = np.empty(n, np.float32)
    if n:
        to_float(ffi.from_buffer(data), ffi.cast("float *", ffi.from_buffer(out)), n)
    return out


def to_bytes(array: NDArray[Any], type: Type, n_per_row: int) -> NDArray[np.uint8]:
    """`array` as contiguous bytes in `type`, converted where its type differs."""
    if type.dtype is not None:
        if array.dtype.kind == "f" and type.dtype.kind == "i":
            raise ShapeError(f"float values would be cut to {type.name}: convert them yourself")
        return np.ascontiguousarray(array, type.dtype).reshape(-1).view(np.uint8)
    if type is Type.BF16:
        source = np.ascontiguousarray(array, np.float32).reshape(-1)
        out = np.empty(source.size, np.uint16)
        if source.size:
            lib.ggml_fp32_to_bf16_row(
                ffi.cast("float *", ffi.from_buffer(source)), ffi.cast("ggml_bf16_t *", ffi.from_buffer(out)), out.size
            )
        return out.view(np.uint8)
    return quantize(np.asarray(array, np.float32).reshape(-1, n_per_row), type)
