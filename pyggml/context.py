"""Context: the arena that holds the metadata of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import index
from typing import TYPE_CHECKING, Any

from .errors import OutOfMemory, ShapeError
from .handle import Handle
from .lib import ffi, guard_error, lib
from .types import Type

if TYPE_CHECKING:
    from .backend import Buffer
    from .tensor import Tensor

MAX_DIMS = 4
_LARGEST = 2**31  # of a dimension: beyond it ggml's own products may wrap


class Context(Handle):
    """Metadata of up to `n_tensors` tensors: names, types, shapes, and where their data is.

    It allocates no tensor data: `Buffer.allocate(context, buffer_type)` or `loader.alloc_params_buffer` does.
    A tensor keeps its context alive. Raises OutOfMemory when the arena itself cannot be allocated.
    """

    is_graph = False  # a Graph is a context too; ops allocate in graphs only

    def __init__(self, n_tensors: int = 1024) -> None:
        self._init_arena(n_tensors * (lib.ggml_tensor_overhead() + 16) + 1024)

    def _init_arena(self, n_bytes: int) -> None:
        if not 0 < n_bytes < 2**40:
            raise OutOfMemory(f"a context of {n_bytes} bytes was asked for")
        params = ffi.new("struct ggml_init_params *", {"mem_size": n_bytes, "mem_buffer": ffi.NULL, "no_alloc": True})
        ptr = lib.ggml_init(params[0])
        if ptr == ffi.NULL:
            raise OutOfMemory(f"ggml could not allocate a context of {n_bytes} bytes")
        self._own(ptr, lib.ggml_free)
        self.buffers: list[Buffer] = []  # what the tensors' data lies in; kept as long as the tensors

    def new_tensor(self, ne: Sequence[int], type: Type = Type.F32, name: str = "") -> Tensor:
        """A tensor without data. `ne`: 1 to 4 dimensions, fastest first.

        ShapeError for a bad shape, or rows that are no multiple of the type's block; GGMLError for a full context.
        """
        from .tensor import Tensor

        shape = check_ne(ne, type)
        ptr = lib.py_ggml_new_tensor(self.ptr, type, len(shape), shape)
        if ptr == ffi.NULL:
            raise guard_error(f"new_tensor(ne={list(ne)}, {type.name})")
        tensor = Tensor(ptr, self)
        if name:
            tensor.name = name
        return tensor

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the context, in the order they were made."""
        from .tensor import Tensor

        ptr = lib.ggml_get_first_tensor(self.ptr)
        while ptr != ffi.NULL:
            yield Tensor(ptr, self)
            ptr = lib.ggml_get_next_tensor(self.ptr, ptr)

    def check_open(self) -> None:
        """ClosedError when the context, or a buffer that its tensors point into, is closed."""
        _ = self.ptr
        for buffer in self.buffers:
            _ = buffer.ptr


def check_ne(ne: Sequence[int], type: Type) -> list[int]:
    """`ne` as plain ints. ShapeError for a wrong rank, a negative or absurd size, or rows of broken blocks."""
    try:
        shape: list[int] = [index(n) for n in ne]
    except TypeError as error:
        raise ShapeError(f"a shape holds whole numbers, not {list(ne)!r}") from error
    if not 1 <= len(shape) <= MAX_DIMS:
        raise ShapeError(f"ggml's tensors have 1 to {MAX_DIMS} dimensions, not {len(shape)}: {shape}")
    n_elements = 1
    for n in shape:
        if not 0 <= n < _LARGEST:
            raise ShapeError(f"each dimension must be in 0..{_LARGEST - 1}: {shape}")
        n_elements *= max(n, 1)
    if n_elements >= 2**48:
        raise ShapeError(f"a tensor of {n_elements} elements: {shape}")
    type.row_size(shape[0])
    return shape


def ne_of(ptr: Any) -> tuple[int, int, int, int]:
    """The four sizes of a raw ggml tensor, fastest first."""
    return tuple(ptr.ne)  # type: ignore[return-value]
