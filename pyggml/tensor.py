"""Tensor: a ggml tensor and the context that keeps it alive."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from . import quantize
from .backend import check_server
from .context import Context, ne_of
from .errors import GGMLError, ShapeError
from .lib import check_call, ffi, lib
from .types import Op, Type

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_MAX_NAME = 63


class Tensor:
    """A view of one ggml tensor. It owns nothing; its context keeps it alive, and closing that makes it unusable.

    `ne` is ggml's shape, fastest first; `shape` is numpy's of the same data. Operators and methods such as `a + b`,
    `x.reshape(...)` add a node to the graph that `a` or `b` belongs to; see pyggml.ops.
    """

    __slots__ = ("ctx", "ptr")

    # numpy must not take `array * tensor` apart into elements.
    __array_priority__ = 1000
    __array_ufunc__ = None

    def __init__(self, ptr: Any, ctx: Context) -> None:
        self.ptr = ptr
        self.ctx = ctx

    # -- what it is ---------------------------------------------------------------------------------------------------

    def _open(self) -> Any:
        self.ctx.ptr  # noqa: B018  raises ClosedError
        return self.ptr

    @property
    def ne(self) -> tuple[int, int, int, int]:
        """Elements along each dimension, fastest first; always four."""
        return ne_of(self._open())

    @property
    def nb(self) -> tuple[int, int, int, int]:
        """Stride in bytes along each dimension, fastest first."""
        return tuple(self._open().nb)  # type: ignore[return-value]

    @property
    def n_dims(self) -> int:
        return int(lib.ggml_n_dims(self._open()))

    @property
    def shape(self) -> tuple[int, ...]:
        """numpy's shape: slowest first, without leading ones."""
        return self.ne[: self.n_dims][::-1]

    @property
    def type(self) -> Type:
        return Type(self._open().type)

    @property
    def op(self) -> Any:
        """The operation that computes it (an Op); Op.NONE for inputs and weights."""
        return Op(self._open().op)

    @property
    def name(self) -> str:
        return str(ffi.string(self._open().name).decode(errors="replace"))

    @name.setter
    def name(self, text: str) -> None:
        # ggml cuts longer names silently; two long names must not become one.
        raw = text.encode()
        if len(raw) > _MAX_NAME:
            ends = raw[:20].decode(errors="ignore"), raw[-(_MAX_NAME - 22) :].decode(errors="ignore")
            raw = "..".join(ends).encode()
        lib.ggml_set_name(self._open(), raw)

    @property
    def n_elements(self) -> int:
        return int(lib.ggml_nelements(self._open()))

    @property
    def n_bytes(self) -> int:
        return int(lib.ggml_nbytes(self._open()))

    @property
    def is_contiguous(self) -> bool:
        return bool(lib.ggml_is_contiguous(self._open()))

    @property
    def has_data(self) -> bool:
        """True once the tensor's data is somewhere: allocated, mapped, or in a computed graph."""
        return bool(self._open().data != ffi.NULL)

    def __repr__(self) -> str:
        if self.ctx.closed:
            return "<Tensor of a closed context>"
        op = "" if self.op == Op.NONE else f" = {self.op.name.lower()}"
        return f"<Tensor {self.name or '?'} {self.type.name} ne {list(self.ne[: self.n_dims])}{op}>"

    # -- numpy in and out ---------------------------------------------------------------------------------------------

    def _data(self) -> Any:
        self.ctx.check_open()
        if self.ptr.data == ffi.NULL:
            raise GGMLError(f"{self!r} has no data: allocate it, or compute the graph that makes it, first")
        return self.ptr

    def set(self, values: ArrayLike) -> None:
        """Copy `values` in. Their shape is numpy's (see `shape`); sizes of one may be left out or added.

        Values are converted to the tensor's type; for quantised types by ggml's own kernels. ShapeError when the shapes
        differ or the tensor is not contiguous; GGMLError when the tensor has no data yet.
        """
        array = np.asarray(values)
        ptr = self._data()
        if _squeeze(array.shape) != _squeeze(self.ne[::-1]):
            raise ShapeError(f"an array of shape {array.shape} does not fit {self!r} of numpy shape {self.shape}")
        if not self.is_contiguous:
            raise ShapeError(f"{self!r} is not contiguous: set its source instead")
        if lib.pyggml_is_repacked(ptr) and ptr.extra == ffi.NULL:
            raise GGMLError(f"{self!r}: its buffer type has no layout for this type and shape")
        raw = quantize.to_bytes(array, self.type, self.ne[0])
        if raw.nbytes:
            check_call(lib.pyggml_tensor_set(ptr, ffi.from_buffer(raw), 0, raw.nbytes), f"writing {self!r}")
            check_server(ptr)

    def _readable(self) -> Any:
        ptr = self._data()
        if lib.pyggml_is_repacked(ptr):
            raise GGMLError(f"{self!r} is repacked: its values are in the file, or load with repack off")
        return ptr

    def numpy(self) -> NDArray[Any]:
        """A copy of the data, in numpy's shape; bf16 and quantised types come as float32. Strides are followed."""
        ptr = self._readable()
        type_, ne, nb = self.type, self.ne, self.nb
        raw = np.empty(self.n_bytes, np.uint8)
        if raw.nbytes:
            check_call(lib.pyggml_tensor_get(ptr, ffi.from_buffer(raw), 0, raw.nbytes), f"reading {self!r}")
            check_server(ptr)
        dtype = np.dtype(np.uint16) if type_ is Type.BF16 else type_.dtype
        if dtype is not None:
            strided = np.ndarray(ne[::-1], dtype, buffer=raw if raw.nbytes else bytes(1), strides=nb[::-1])
            array = np.ascontiguousarray(strided)
            if type_ is Type.BF16:
                array = quantize.dequantize(array.view(np.uint8).reshape(-1), Type.BF16).reshape(array.shape)
        else:
            # Blocks can be strided by rows, never inside a row.
            n_row = type_.row_size(ne[0])
            if nb[0] != type_.type_size:
                raise ShapeError(f"{self!r} has its blocks out of order: make it contiguous first")
            rows = np.ndarray((*ne[:0:-1], n_row), np.uint8, buffer=raw, strides=(*nb[:0:-1], 1))
            array = quantize.dequantize(np.ascontiguousarray(rows).reshape(-1), type_).reshape(ne[::-1])
        return array.reshape(self.shape)

    def view(self) -> NDArray[Any]:
        """The data itself as a numpy array, without a copy; writes go through to the tensor.

        For tensors in host memory whose type numpy has; GGMLError otherwise. The array keeps the buffer alive, and the
        buffer cannot be closed while the array lives. Weights mapped from a file are read-only.
        """
        ptr = self._data()
        dtype = self.type.dtype
        if dtype is None:
            raise GGMLError(f"numpy has no type for {self.type.name}: use .numpy() for a copy, .raw() for the bytes")
        if ptr.buffer == ffi.NULL or not lib.ggml_backend_buffer_is_host(ptr.buffer):
            raise GGMLError(f"{self!r} is not in host memory: use .numpy() for a copy")
        n = self.n_dims
        interface = {
            "version": 3, "typestr": dtype.str, "shape": self.ne[:n][::-1], "strides": self.nb[:n][::-1],
            "data": (int(ffi.cast("uintptr_t", ptr.data)), self._is_read_only()),
        }  # fmt: skip
        return np.asarray(_Owner(self.ctx, interface))

    def _is_read_only(self) -> bool:
        return any(b.read_only for b in self.ctx.buffers if b.holds(self.ptr))

    def raw(self) -> bytes:
        """The bytes as ggml has them; for contiguous tensors."""
        ptr = self._readable()
        if not self.is_contiguous:
            raise ShapeError(f"{self!r} is not contiguous")
        data = bytearray(self.n_bytes)
        if data:
            check_call(lib.pyggml_tensor_get(ptr, ffi.from_buffer(data), 0, len(data)), f"reading {self!r}")
            check_server(ptr)
        return bytes(data)

    def item(self) -> float:
        """The only element, as a Python number."""
        array = self.numpy()
        if array.size != 1:
            raise ShapeError(f"item() wants one element, {self!r} has {array.size}")
        return float(array.reshape(-1)[0])

    def op_param(self, i: int, fmt: str = "i") -> int | float:
        """Parameter `i` (4 bytes each) of the operation; fmt "i" or "f"."""
        raw = struct.pack("<i", self._open().op_params[i])
        value: int | float = struct.unpack(f"<{fmt}", raw)[0]
        return value

    # -- operations ---------------------------------------------------------------------------------------------------

    def __add__(self, other: Tensor | float) -> Tensor:
        """Sum by elements; of two tensors, the smaller is repeated to the shape of the other."""
        if isinstance(other, Tensor):
            try:
                return ops.add(self, other)
            except ShapeError:
                if _repeats(self, other) and not _repeats(other, self):
                    return ops.add(other, self)
                raise
        if isinstance(other, Real):
            return ops.scale(self, 1.0, float(other))
        return NotImplemented

    __radd__ = __add__

    def __mul__(self, other: Tensor | float) -> Tensor:
        """Product by elements; of two tensors, the smaller is repeated to the shape of the other."""
        if isinstance(other, Tensor):
            try:
                return ops.mul(self, other)
            except ShapeError:
                if _repeats(self, other) and not _repeats(other, self):
                    return ops.mul(other, self)
                raise
        if isinstance(other, Real):
            return ops.scale(self, float(other))
        return NotImplemented

    __rmul__ = __mul__

    def __sub__(self, other: Tensor | float) -> Tensor:
        """Difference by elements, `other` repeated to this shape."""
        if isinstance(other, Tensor):
            return ops.sub(self, other)
        if isinstance(other, Real):
            return ops.scale(self, 1.0, -float(other))
        return NotImplemented

    def __rsub__(self, other: float) -> Tensor:
        if isinstance(other, Real):
            return ops.scale(self, -1.0, float(other))
        return NotImplemented

    def __truediv__(self, other: Tensor | float) -> Tensor:
        """Quotient by elements, `other` repeated to this shape."""
        if isinstance(other, Tensor):
            return ops.div(self, other)
        if isinstance(other, Real):
            return ops.scale(self, 1.0 / float(other))
        return NotImplemented

    def __rtruediv__(self, other: float) -> Tensor:
        if isinstance(other, Real):
            return ops.div(ops.fill(self, float(other)), self)
        return NotImplemented

    def __neg__(self) -> Tensor:
        return ops.neg(self)

    def reshape(self, *ne: int) -> Tensor:
        """The same data in another shape, `ne` fastest first; one size may be -1. See ops.reshape."""
        return ops.reshape(self, *ne)

    def narrow(self, dim: int, start: int, n: int) -> Tensor:
        """A view of n elements from `start` on along dimension `dim` of `ne`."""
        return ops.narrow(self, dim, start, n)

    def chunk(self, n: int, dim: int = 0) -> list[Tensor]:
        """`n` views of equal size along dimension `dim` of `ne`."""
        return ops.chunk(self, n, dim)

    def permute(self, axis0: int, axis1: int, axis2: int, axis3: int) -> Tensor:
        """A view in which dimension i has become dimension axis_i (numpy's transpose is the inverse)."""
        return ops.permute(self, axis0, axis1, axis2, axis3)

    def transpose(self) -> Tensor:
        """A view with dimensions 0 and 1 exchanged."""
        return ops.transpose(self)

    def cont(self, *ne: int) -> Tensor:
        """A contiguous copy, in another shape if one is given."""
        return ops.cont(self, *ne)

    def cast(self, type: Type) -> Tensor:
        """A contiguous copy as `type`."""
        return ops.cast(self, type)

    def repeat(self, like: Tensor | Sequence[int]) -> Tensor:
        """Repeated to the shape of `like`, a tensor or sizes."""
        return ops.repeat(self, like)

    def sum(self) -> Tensor:
        """The sum of all elements, [1]."""
        return ops.sum(self)

    def sum_rows(self) -> Tensor:
        """The sum of each row, [1, ...]."""
        return ops.sum_rows(self)

    def mean(self) -> Tensor:
        """The mean of each row, [1, ...]."""
        return ops.mean(self)

    def sqr(self) -> Tensor:
        """The square of each element."""
        return ops.sqr(self)

    def sqrt(self) -> Tensor:
        """The square root of each element."""
        return ops.sqrt(self)

    def exp(self) -> Tensor:
        """e to the power of each element."""
        return ops.exp(self)

    def log(self) -> Tensor:
        """The natural logarithm of each element."""
        return ops.log(self)

    def clamp(self, low: float, high: float) -> Tensor:
        """Each element, but at least `low` and at most `high`."""
        return ops.clamp(self, low, high)

    def relu(self) -> Tensor:
        """max(x, 0)."""
        return ops.relu(self)

    def tanh(self) -> Tensor:
        """The hyperbolic tangent."""
        return ops.tanh(self)

    def sigmoid(self) -> Tensor:
        """1 / (1 + e⁻ˣ)."""
        return ops.sigmoid(self)

    def silu(self) -> Tensor:
        """x·sigmoid(x)."""
        return ops.silu(self)

    def gelu(self) -> Tensor:
        """x·Φ(x) by the tanh approximation; see ops.gelu_erf for the exact one."""
        return ops.gelu(self)

    def norm(self, eps: float = 1e-5) -> Tensor:
        """Each row with its mean taken off and divided by its standard deviation."""
        return ops.norm(self, eps)

    def rms_norm(self, eps: float = 1e-6) -> Tensor:
        """Each row divided by the root of its mean square."""
        return ops.rms_norm(self, eps)

    def soft_max(self) -> Tensor:
        """eˣ / Σeˣ over each row."""
        return ops.soft_max(self)


def _repeats(a: Tensor, b: Tensor) -> bool:
    """True when a can be repeated to b's shape."""
    return bool(lib.ggml_can_repeat(a._open(), b._open()))


class _Owner:
    """Base of a zero-copy array: keeps the context and its buffers alive as long as the array is."""

    def __init__(self, ctx: Context, interface: dict[str, Any]) -> None:
        self.ctx = ctx
        self.__array_interface__ = interface
        for buffer in ctx.buffers:
            buffer.views.add(self)


def _squeeze(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


from . import ops  # noqa: E402  at the end: the operations are written in terms of Tensor
