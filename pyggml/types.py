"""ggml's enumerations, read from the declarations so that they cannot go stale, and the numpy types beside them."""

from __future__ import annotations

from enum import EnumMeta, IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ShapeError
from .lib import ffi, lib


def _members(name: str, prefix: str) -> dict[str, int]:
    """Members of a C enum without their prefix and without the *_COUNT member, which moves between versions."""
    pairs = sorted((value, key) for key, value in ffi.typeof(f"enum {name}").relements.items())
    return {key.removeprefix(prefix): value for value, key in pairs if not key.endswith("_COUNT")}


class _FromHeaders(EnumMeta):
    """Members come from ggml's declarations: type checkers take any name, Python does not."""

    if TYPE_CHECKING:

        def __getattr__(cls, name: str) -> Type: ...


class Type(IntEnum, metaclass=_FromHeaders):
    """Element type of a tensor, by ggml's name: F32, F16, BF16, I32, Q8_0, Q4_K, ..."""

    _ignore_ = ["key", "number"]  # noqa: RUF012  what IntEnum wants
    for key, number in _members("ggml_type", "GGML_TYPE_").items():
        locals()[key] = number

    @property
    def block_size(self) -> int:
        """Elements in a block: 1 for plain types, 32 or 256 for quantised ones."""
        return BLOCK_SIZE[self]

    @property
    def type_size(self) -> int:
        """Bytes of a block."""
        return _TYPE_SIZE[self]

    @property
    def is_quantized(self) -> bool:
        return bool(lib.ggml_is_quantized(self))

    def row_size(self, n: int) -> int:
        """Bytes of a row of `n` elements. ShapeError when `n` is no multiple of the block size."""
        if n % self.block_size:
            raise ShapeError(f"a row of {n} elements is no multiple of {self.name}'s block of {self.block_size}")
        return n // self.block_size * self.type_size

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """numpy's type for the same bytes; None for bf16 and the quantised types, which numpy lacks."""
        return _DTYPE.get(self.name)

    @classmethod
    def of(cls, dtype: np.dtype[Any]) -> Type:
        """The ggml type of a numpy type. ShapeError when there is none."""
        for name, known in _DTYPE.items():
            if known == dtype:
                return cls[name]
        raise ShapeError(f"ggml has no type for numpy's {dtype}; it has {', '.join(str(d) for d in _DTYPE.values())}")


_DTYPE: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "F64": np.dtype(np.float64), "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64),
}  # fmt: skip
BLOCK_SIZE: dict[int, int] = {t: int(lib.ggml_blck_size(t)) for t in Type}
_TYPE_SIZE = {t: int(lib.ggml_type_size(t)) for t in Type}


def _enum(name: str, prefix: str) -> Any:
    members = _members(name, prefix)
    return IntEnum(name.removeprefix("ggml_").title().replace("_", ""), members)  # type: ignore[misc]


Op = _enum("ggml_op", "GGML_OP_")
UnaryOp = _enum("ggml_unary_op", "GGML_UNARY_OP_")
GluOp = _enum("ggml_glu_op", "GGML_GLU_OP_")
Prec = _enum("ggml_prec", "GGML_PREC_")
ScaleMode = _enum("ggml_scale_mode", "GGML_SCALE_MODE_")
SortOrder = _enum("ggml_sort_order", "GGML_SORT_ORDER_")
PoolOp = _enum("ggml_op_pool", "GGML_OP_POOL_")
TriType = _enum("ggml_tri_type", "GGML_TRI_TYPE_")
Status = _enum("ggml_status", "GGML_STATUS_")
DeviceType = _enum("ggml_backend_dev_type", "GGML_BACKEND_DEVICE_TYPE_")
BufferUsage = _enum("ggml_backend_buffer_usage", "GGML_BACKEND_BUFFER_USAGE_")
