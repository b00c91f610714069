"""Values of a file's type as values of the type that a model wants, a bounded piece at a time."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pyggml import Type, dequantize
from pyggml.quantize import to_bytes

from .dtypes import NUMPY_NAMES, QUANTISED

STAGING: Final = 16 << 20  # bytes of a piece in all its forms: as read, as float32, as wanted

# What a model gets that leaves the choice to the file, for types that ggml lacks or has no kernels for.
_NATIVE: Final = {
    "F8_E4M3": Type.F16,  # every value of both 8-bit types is one of f16
    "F8_E5M2": Type.F16,
    "F64": Type.F32,
    "I64": Type.I32,
    "U8": Type.I32,
    "BOOL": Type.I32,
    "U16": Type.I32,
    "U32": Type.I32,
    "U64": Type.I32,
}
_INTEGERS: Final = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})
_FLOATS: Final = frozenset({"F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2"})


def native_type(dtype: str) -> Type | None:
    """ggml's type for a file's dtype: the same where ggml has it, else the nearest; None where nothing fits."""
    if dtype in _NATIVE:
        return _NATIVE[dtype]
    return Type.__members__.get(dtype)


def is_same(dtype: str, wanted: Type) -> bool:
    """True when bytes of the file's dtype are bytes of the wanted type."""
    return dtype == wanted.name


def can_convert(dtype: str, wanted: Type) -> bool:
    """True when `convert` turns one into the other."""
    if dtype in _INTEGERS and wanted in (Type.I8, Type.I16, Type.I32, Type.I64):
        return True
    if dtype not in _INTEGERS | _FLOATS | QUANTISED:
        return False
    return wanted in (Type.F32, Type.F16, Type.BF16) or (wanted.is_quantized and dtype not in _INTEGERS)


def convert(raw: NDArray[np.uint8], dtype: str, wanted: Type, n_per_row: int) -> NDArray[np.uint8]:
    """Bytes of `dtype` as bytes of `wanted`; quantised types in rows of `n_per_row`.

    OverflowError when a finite value is too large for f16, or an integer for its type: never a silent infinity.
    """
    if wanted in (Type.I8, Type.I16, Type.I32, Type.I64):
        values = raw.view(NUMPY_NAMES[dtype])
        assert wanted.dtype is not None
        bounds = np.iinfo(wanted.dtype)
        if values.size and (int(values.min()) < bounds.min or int(values.max()) > bounds.max):
            raise OverflowError(f"holds integers that {wanted.name} cannot hold")
        return values.astype(wanted.dtype).view(np.uint8)
    floats = to_float32(raw, dtype)
    if wanted is Type.F16:
        with np.errstate(over="ignore", under="ignore"):
            halves = floats.astype(np.float16)
        if np.isinf(halves).any() and not np.array_equal(np.isinf(halves), np.isinf(floats)):
            raise OverflowError("holds values over 65504, which F16 cannot hold")
        return halves.view(np.uint8)
    return to_bytes(floats, wanted, n_per_row)


def to_float32(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Bytes of `dtype` as float32, flat. F64 is rounded; OverflowError when that makes a finite value infinite."""
    if dtype in ("F8_E4M3", "F8_E5M2"):
        return _float8_values(dtype)[raw]
    if dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype in QUANTISED:
        return dequantize(raw, Type[dtype])
    values: NDArray[Any] = raw.view(NUMPY_NAMES[dtype])
    with np.errstate(over="ignore"):
        floats = values.astype(np.float32)
    if dtype == "F64" and not np.array_equal(np.isinf(floats), np.isinf(values)):
        raise OverflowError("holds values that F32 cannot hold")
    return floats


@cache
def _float8_values(dtype: str) -> NDArray[np.float32]:
    """The 256 values of an 8-bit float. E4M3 has no infinity: all ones is NaN; E5M2 is laid out as IEEE (OCP, 2023)."""
    n_exponent, bias = (4, 7) if dtype == "F8_E4M3" else (5, 15)
    n_mantissa = 7 - n_exponent
    codes = np.arange(256)
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent = (codes >> n_mantissa) & ((1 << n_exponent) - 1)
    mantissa = (codes & ((1 << n_mantissa) - 1)) / (1 << n_mantissa)
    values = sign * np.where(
        exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - float(bias))
    )
    if dtype == "F8_E4M3":
        values[codes & 0x7F == 0x7F] = np.nan
    else:
        top = exponent == 31
        values[top] = np.where(mantissa[top] == 0, sign[top] * np.inf, np.nan)
    return values.astype(np.float32)
