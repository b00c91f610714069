"""Values of a file's type as values of the type that a model wants, a bounded piece at a time."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pyggml import Type, dequantize
from pyggml.lib import ffi, lib
from pyggml.quantize import quantize, to_bytes

from .dtypes import GGML_TYPES, NUMPY_NAMES, QUANTISED, SAFETENSORS_BITS
from .mapped import TensorInfo
from .scales import fits_f16, multiply, read_scale

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
# what ggml has no kernel for that would give the values
_OPAQUE: Final = frozenset(
    name for name in QUANTISED if lib.ggml_get_type_traits(Type[name]).to_float == ffi.NULL
)
INTEGERS: Final = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})
_FLOATS: Final = frozenset({"F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2"})


_BLOCK: Final = {name: (block, n_bytes) for name, block, n_bytes in GGML_TYPES.values()}


def native_type(info: TensorInfo) -> Type | None:
    """ggml's type for a tensor of a file: the same where ggml has it, else the nearest; None where nothing fits.

    8-bit weights with a scale become F16, or BF16 where F16 could not hold them: that takes a look at the scale.
    """
    if info.scale is not None:
        return Type.F16 if fits_f16(info) else Type.BF16
    if info.dtype in _NATIVE:
        return _NATIVE[info.dtype]
    return Type.__members__.get(info.dtype)


def block_of(dtype: str) -> tuple[int, int]:
    """(elements, bytes) of the smallest piece of a file's dtype that can be read alone."""
    return _BLOCK.get(dtype) or (1, SAFETENSORS_BITS[dtype] // 8)


def read_float32(info: TensorInfo, first: int = 0, n: int | None = None) -> NDArray[np.float32]:
    """`n` values of a tensor from element `first` on (all by default; whole blocks of its type) as float32, flat,
    multiplied by the tensor's scale if it has one. Raises `LoadError`; OverflowError for F64 that float32 cannot hold.
    """
    n = info.n_elements - first if n is None else n
    block, n_bytes = block_of(info.dtype)
    raw = np.empty(n // block * n_bytes, np.uint8)
    info.file.read_into(info.offset + first // block * n_bytes, raw.data)
    return scaled_float32(raw, info, first)


def scaled_float32(raw: NDArray[np.uint8], info: TensorInfo, first: int) -> NDArray[np.float32]:
    """Bytes of a tensor, from element `first` on, as its values: as `to_float32`, and times the scale."""
    floats = to_float32(raw, info.dtype)
    if info.scale is not None and floats.size:
        multiply(floats, info, read_scale(info), first)
    return floats


def is_same(dtype: str, wanted: Type) -> bool:
    """True when bytes of the file's dtype are bytes of the wanted type."""
    return dtype == wanted.name


def can_convert(info: TensorInfo, wanted: Type) -> bool:
    """True when `convert` turns the tensor's type into the other."""
    dtype = info.dtype
    if info.scale is not None:
        return wanted in (Type.F32, Type.F16, Type.BF16) or wanted.is_quantized
    if dtype in INTEGERS and wanted in (Type.I8, Type.I16, Type.I32, Type.I64):
        return True
    if dtype not in INTEGERS | _FLOATS | QUANTISED or dtype in _OPAQUE:
        return False
    return wanted in (Type.F32, Type.F16, Type.BF16) or (wanted.is_quantized and dtype not in INTEGERS)


def convert(
    raw: NDArray[np.uint8], info: TensorInfo, wanted: Type, n_per_row: int, *, first: int = 0
) -> NDArray[np.uint8]:
    """Bytes of a tensor, from element `first` on, as bytes of `wanted`; quantised types in rows of `n_per_row`.

    OverflowError when a finite value is too large for f16, or an integer for its type: never a silent infinity; and
    when a value to be quantised is not finite.
    """
    if wanted in (Type.I8, Type.I16, Type.I32, Type.I64):
        values = raw.view(NUMPY_NAMES[info.dtype])
        assert wanted.dtype is not None
        bounds = np.iinfo(wanted.dtype)
        if values.size and (int(values.min()) < bounds.min or int(values.max()) > bounds.max):
            raise OverflowError(f"holds integers that {wanted.name} cannot hold")
        return values.astype(wanted.dtype).view(np.uint8)
    return encode(scaled_float32(raw, info, first), wanted, n_per_row)


def encode(
    floats: NDArray[np.float32], wanted: Type, n_per_row: int, importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Flat float32 values as bytes of a float or quantised type; OverflowError as `convert`.

    `importance`: a weight for each of the `n_per_row` columns, for the quantised types.
    """
    if wanted is Type.F16:
        with np.errstate(over="ignore", under="ignore"):
            halves = floats.astype(np.float16)
        if np.isinf(halves).any() and not np.array_equal(np.isinf(halves), np.isinf(floats)):
            raise OverflowError("holds values over 65504, which F16 cannot hold")
        return halves.view(np.uint8)
    if wanted.is_quantized:
        if not np.isfinite(floats).all():
            raise OverflowError(f"holds values that are not finite, which {wanted.name} cannot hold")
        return quantize(floats.reshape(-1, n_per_row), wanted, importance)
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
