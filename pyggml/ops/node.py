"""How an operation becomes a node: which graph it belongs to, and what is said when ggml refuses it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import GGMLError
from ..lib import ffi, guard_error
from ..tensor import Tensor

if TYPE_CHECKING:
    from ..graph import Graph

NULL = ffi.NULL


def graph_of(*args: Tensor | None) -> Graph:
    """The graph that the arguments belong to; weights among them are kept alive by it. None stands for no argument.

    GGMLError when none of them belongs to a graph, they belong to two, or a weight has no data.
    """
    graph: Any = None
    foreign = False
    for tensor in args:
        try:
            ctx = tensor.ctx  # type: ignore[union-attr]
        except AttributeError:
            if tensor is None:
                continue
            raise TypeError(f"an operation takes tensors, not {type(tensor).__name__}: make it an input") from None
        if ctx is graph:
            continue
        if not ctx.is_graph:
            foreign = True
        elif graph is None:
            graph = ctx
        else:
            raise GGMLError(f"{tensor!r} belongs to another graph than the other arguments")
    if graph is None:
        raise GGMLError("none of the arguments belongs to a graph: pass one of them through graph.use(tensor)")
    if foreign:
        for tensor in args:
            if tensor is not None and tensor.ctx is not graph:
                graph.keep(tensor)
    return graph  # type: ignore[no-any-return]


def refuse(call: str, args: tuple[Tensor | None, ...], params: tuple[Any, ...] = ()) -> NoReturn:
    """Raise what ggml's refusal of `call` means."""
    shown = [f"{t.name or 'unnamed'}: {t.type.name} {list(t.ne)}" if t is not None else "None" for t in args]
    raise guard_error(f"{call}({', '.join(shown + [str(p) for p in params])})")


# The next four are on the path of every node: the usual case, all arguments of one graph, is told apart first.


def unary(call: str, function: Any, x: Tensor) -> Tensor:
    """A node of one argument and nothing else."""
    try:
        graph: Any = x.ctx
        if not graph.is_graph:
            graph = graph_of(x)
    except AttributeError:
        graph = graph_of(x)
    ptr = function(graph.ptr, x.ptr)
    return Tensor(ptr, graph) if ptr else refuse(call, (x,))


def one(call: str, function: Any, x: Tensor, *params: Any) -> Tensor:
    """A node of one argument and plain numbers."""
    try:
        graph: Any = x.ctx
        if not graph.is_graph:
            graph = graph_of(x)
    except AttributeError:
        graph = graph_of(x)
    ptr = function(graph.ptr, x.ptr, *params)
    return Tensor(ptr, graph) if ptr else refuse(call, (x,), params)


def binary(call: str, function: Any, a: Tensor, b: Tensor) -> Tensor:
    """A node of two arguments and nothing else."""
    try:
        graph: Any = a.ctx
        other = b.ctx
        if graph is other and graph.is_graph:
            pass
        elif graph.is_graph and not other.is_graph:
            graph.keep(b)
        elif other.is_graph and not graph.is_graph:
            graph = other
            graph.keep(a)
        else:
            graph = graph_of(a, b)
    except AttributeError:
        graph = graph_of(a, b)
    ptr = function(graph.ptr, a.ptr, b.ptr)
    return Tensor(ptr, graph) if ptr else refuse(call, (a, b))


def two(call: str, function: Any, a: Tensor, b: Tensor, *params: Any) -> Tensor:
    """A node of two arguments and plain numbers."""
    graph = graph_of(a, b)
    ptr = function(graph.ptr, a.ptr, b.ptr, *params)
    return Tensor(ptr, graph) if ptr else refuse(call, (a, b), params)


def several(call: str, function: Any, args: tuple[Tensor | None, ...], *params: Any) -> Tensor:
    """A node of any number of arguments, None for a missing one, and plain numbers."""
    graph = graph_of(*args)
    ptr = function(graph.ptr, *[NULL if t is None else t.ptr for t in args], *params)
    return Tensor(ptr, graph) if ptr else refuse(call, args, params)
