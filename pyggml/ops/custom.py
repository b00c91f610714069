"""Operations written in C elsewhere. Such functions run on the compute threads of a CPU backend, without Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ShapeError
from ..lib import ffi, lib
from ..tensor import Tensor
from ..types import Type
from .node import NULL, graph_of, refuse

N_TASKS_MAX = -1
_MOST = 9


def custom_4d(
    type: Type, ne: Sequence[int], args: Sequence[Tensor], function: Any, *, n_tasks: int = N_TASKS_MAX,
    userdata: Any = None,
) -> Tensor:  # fmt: skip
    """A node that `function`, a C ggml_custom_op_t (dst, ith, nth, userdata), computes; dst->src[i] is args[i].

    `function`: a cffi pointer such as ffi.addressof(library, "name"); never a Python callback, which every thread would
    have to wait for. `userdata`: a cffi pointer, kept alive by the graph. 1 to 9 arguments.
    """
    if not 1 <= len(args) <= _MOST:
        raise ShapeError(f"a custom operation has 1 to {_MOST} arguments, not {len(args)}")
    graph = graph_of(*args)
    four = [*ne, 1, 1, 1][:4]
    sources = ffi.new("struct ggml_tensor *[]", [t.ptr for t in args])
    pointer = NULL if userdata is None else ffi.cast("void *", userdata)
    ptr = lib.py_ggml_custom_4d(graph.ptr, type, *four, sources, len(args), function, n_tasks, pointer)
    if not ptr:
        refuse("custom_4d", tuple(args), (type.name, four))
    graph.held.append((function, userdata))
    return Tensor(ptr, graph)


def custom_inplace(
    x: Tensor, args: Sequence[Tensor], function: Any, *, n_tasks: int = N_TASKS_MAX, userdata: Any = None
) -> Tensor:
    """custom_4d that writes into x, which is dst->src[0]; args follow it, at most 8. The result is a view of x."""
    if len(args) > _MOST - 1:
        raise ShapeError(f"a custom operation in place has at most {_MOST - 1} further arguments, not {len(args)}")
    graph = graph_of(x, *args)
    sources = ffi.new("struct ggml_tensor *[]", [t.ptr for t in args])
    pointer = NULL if userdata is None else ffi.cast("void *", userdata)
    ptr = lib.py_ggml_custom_inplace(graph.ptr, x.ptr, sources, len(args), function, n_tasks, pointer)
    if not ptr:
        refuse("custom_inplace", (x, *args))
    graph.held.append((function, userdata))
    return Tensor(ptr, graph)
