"""Shapes, views, copies, rows. All shapes are in `ne` order, fastest dimension first.

Reshape, view, permute, transpose and narrow copy nothing: the result is the same data, and writes to one are seen in
the
other. Most operations want contiguous rows; `cont` makes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

from ..context import Context
from ..errors import ShapeError
from ..lib import lib
from ..tensor import Tensor
from ..types import BLOCK_SIZE, Type
from .node import binary, graph_of, one, refuse, several, two, unary

_RESHAPE = (lib.py_ggml_reshape_1d, lib.py_ggml_reshape_2d, lib.py_ggml_reshape_3d, lib.py_ggml_reshape_4d)
_CONT = (lib.py_ggml_cont_1d, lib.py_ggml_cont_2d, lib.py_ggml_cont_3d, lib.py_ggml_cont_4d)
_VIEW = (lib.py_ggml_view_1d, lib.py_ggml_view_2d, lib.py_ggml_view_3d, lib.py_ggml_view_4d)


def _sizes(call: str, x: Tensor, ne: Sequence[int]) -> list[int]:
    """`ne` as ints, with a -1 replaced by what is left over."""
    sizes = [index(n) for n in ne]
    if not 1 <= len(sizes) <= 4:
        raise ShapeError(f"{call} takes 1 to 4 sizes, not {len(sizes)}: {sizes}")
    if -1 in sizes:
        known = 1
        for n in sizes:
            known *= n if n != -1 else 1
        if sizes.count(-1) > 1 or known <= 0 or x.n_elements % known:
            raise ShapeError(f"{call}: {sizes} leaves no whole size for the -1 in {x!r} of {x.n_elements} elements")
        sizes[sizes.index(-1)] = x.n_elements // known
    return sizes


def reshape(x: Tensor, *ne: int) -> Tensor:
    """The same data in another shape; one size may be -1. x: any type, contiguous.

    ShapeError when the number of elements differs or x is not contiguous.
    """
    sizes = [index(n) for n in ne]
    if -1 in sizes or not 1 <= len(sizes) <= 4:
        sizes = _sizes("reshape", x, sizes)
    return one("reshape", _RESHAPE[len(sizes) - 1], x, *sizes)


def view(x: Tensor, ne: Sequence[int], nb: Sequence[int] | None = None, offset: int = 0) -> Tensor:
    """A window onto x's data: `ne` elements, `nb` the strides in bytes of dimensions 1.., from `offset` bytes on.

    Without `nb` the window is dense. ShapeError when it reaches beyond x's data. See narrow for the usual case.
    """
    sizes = [index(n) for n in ne]
    if not 1 <= len(sizes) <= 4:
        raise ShapeError(f"a view has 1 to 4 dimensions, not {len(sizes)}: {sizes}")
    if nb is None:
        strides = [x.type.row_size(sizes[0])]
        for n in sizes[1:-1]:
            strides.append(strides[-1] * n)
        strides = strides[: len(sizes) - 1]
    else:
        strides = [index(n) for n in nb]
        if len(strides) != len(sizes) - 1:
            raise ShapeError(f"a view of {len(sizes)} dimensions takes {len(sizes) - 1} strides, not {len(strides)}")
    if offset < 0 or min(sizes) < 0 or (strides and min(strides) < 0):
        raise ShapeError(f"a view takes no negative size, stride or offset: {sizes}, {strides}, {offset}")
    return one("view", _VIEW[len(sizes) - 1], x, *sizes, *strides, offset)


def narrow(x: Tensor, dim: int, start: int, n: int) -> Tensor:
    """Elements start..start+n-1 along dimension `dim`: a view, not contiguous unless `dim` is the last.

    For quantised x and dim 0, both numbers are multiples of the block size. ShapeError when it reaches beyond x.
    """
    ne, nb = list(x.ne), x.nb
    if not 0 <= dim < 4:
        raise ShapeError(f"narrow: dimension {dim} is not in 0..3")
    if not 0 <= start <= start + n <= ne[dim]:
        raise ShapeError(f"narrow: {start}..{start + n} is not within dimension {dim} of {x!r}")
    return _window(x, ne, nb, dim, start, n)


def _window(x: Tensor, ne: list[int], nb: tuple[int, ...], dim: int, start: int, n: int) -> Tensor:
    plain = dim or BLOCK_SIZE[x.ptr.type] == 1
    offset = start * nb[dim] if plain else x.type.row_size(start)
    if not dim and ne[1] == ne[2] == ne[3] == 1:
        return one("narrow", lib.py_ggml_view_1d, x, n, offset)
    sizes = [*ne[:dim], n, *ne[dim + 1 :]]
    return one("narrow", lib.py_ggml_view_4d, x, *sizes, nb[1], nb[2], nb[3], offset)


def chunk(x: Tensor, n: int, dim: int = 0) -> list[Tensor]:
    """`n` views of equal size along dimension `dim`. ShapeError when `n` does not divide it."""
    ne, nb = list(x.ne), x.nb
    size, rest = divmod(ne[dim], n)
    if rest:
        raise ShapeError(f"chunk: dimension {dim} of {x!r} is no multiple of {n}")
    return [_window(x, ne, nb, dim, i * size, size) for i in range(n)]


def permute(x: Tensor, axis0: int, axis1: int, axis2: int, axis3: int) -> Tensor:
    """Dimensions in another order, as a view: dimension i of x becomes dimension axis_i of the result.

    Mind that this is the inverse of numpy's convention: with (1, 2, 0, 3), [a, b, c] becomes [c, a, b].
    """
    return one("permute", lib.py_ggml_permute, x, axis0, axis1, axis2, axis3)


def transpose(x: Tensor) -> Tensor:
    """Dimensions 0 and 1 exchanged, as a view: [a, b, c, d] -> [b, a, c, d]."""
    return unary("transpose", lib.py_ggml_transpose, x)


def cont(x: Tensor, *ne: int) -> Tensor:
    """A contiguous copy, in another shape if one is given (a size may be -1). x: any type, see cpy."""
    if not ne:
        return unary("cont", lib.py_ggml_cont, x)
    sizes = _sizes("cont", x, ne)
    return one("cont", _CONT[len(sizes) - 1], x, *sizes)


def dup(x: Tensor, *, inplace: bool = False) -> Tensor:
    """A copy, contiguous. `inplace`: no copy at all but a view that later operations may overwrite."""
    return unary("dup", lib.py_ggml_dup_inplace if inplace else lib.py_ggml_dup, x)


def cast(x: Tensor, type: Type) -> Tensor:
    """A contiguous copy as `type`; f32 to i32 drops the fraction. See cpy for which types go together."""
    return one("cast", lib.py_ggml_cast, x, type)


def cpy(x: Tensor, to: Tensor) -> Tensor:
    """Write x into `to`, which has as many elements; the result is a view of `to`. Converts between types:

    f32, f16, bf16 into each other and into quantised types; i32 to and from f32; quantised types into f32; any type
    into
    itself. Add it with graph.add when nothing depends on the result.
    """
    return binary("cpy", lib.py_ggml_cpy, x, to)


def concat(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """a, then b, along dimension `dim`; all other sizes and the type are equal.

    Plain types only, not quantised ones.
    """
    return two("concat", lib.py_ggml_concat, a, b, dim)


def repeat(x: Tensor, like: Tensor | Sequence[int]) -> Tensor:
    """x repeated to the shape of `like`, a tensor or 1 to 4 sizes. f32, f16, bf16, i32, i16.

    ShapeError when a size is no multiple of x's.
    """
    if isinstance(like, Tensor):
        return binary("repeat", lib.py_ggml_repeat, x, like)
    sizes = [index(n) for n in like]
    if not 1 <= len(sizes) <= 4:
        raise ShapeError(f"repeat takes 1 to 4 sizes, not {len(sizes)}: {sizes}")
    if 0 in x.ne:
        raise ShapeError(f"repeat: {x!r} is empty")
    return one("repeat", lib.py_ggml_repeat_4d, x, *sizes, *[1] * (4 - len(sizes)))


def set(
    a: Tensor, b: Tensor, offset: int, nb1: int = 0, nb2: int = 0, nb3: int = 0, *, inplace: bool = False
) -> Tensor:
    """a with b written into a part of it: the view of a with b's shape, strides nb1..nb3 and `offset`, in bytes.

    A stride of 0 means a's own. a, b: f32 or i32, contiguous, b not larger than a. Result: as a.
    """
    strides = x1, x2, x3 = nb1 or a.nb[1], nb2 or a.nb[2], nb3 or a.nb[3]
    if offset < 0 or min(strides) < 0:
        raise ShapeError(f"set takes no negative stride or offset: {strides}, {offset}")
    return two("set", lib.py_ggml_set_inplace if inplace else lib.py_ggml_set, a, b, x1, x2, x3, offset)


def get_rows(x: Tensor, ids: Tensor) -> Tensor:
    """Rows of x picked by number: an embedding table.

    x: [n, n_rows, a, b], any type; ids: i32 [m, a, b]. Result: [n, m, a, b], f32 (i32 for an i32 x).
    Numbers outside 0..n_rows-1 are refused when they are given to an input of the graph.
    """
    return binary("get_rows", lib.py_ggml_get_rows, x, ids)


def get_rows_back(grad: Tensor, ids: Tensor, like: Tensor) -> Tensor:
    """The gradient of get_rows' table, in the shape of `like`: each row of `grad` added at its number. f32, f16."""
    return several("get_rows_back", lib.py_ggml_get_rows_back, (grad, ids, like))


def set_rows(to: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """Write rows into `to` by number; the result is a view of `to`. Two rows for one number: undefined.

    to: [n, n_rows, a, b], any type that f32 converts to; rows: f32 [n, m, a, b]; ids: i64 or i32 [m, a', b'], a' and b'
    divide a and b.
    """
    return several("set_rows", lib.py_ggml_set_rows, (to, rows, ids))


def diag(x: Tensor) -> Tensor:
    """A matrix with x on its diagonal and zeros elsewhere. f32 [n, 1, a, b] -> [n, n, a, b]."""
    return unary("diag", lib.py_ggml_diag, x)


def tri(x: Tensor, kind: int) -> Tensor:
    """x with zeros outside a triangle; kind: a TriType. f32, square in dimensions 0 and 1, contiguous."""
    return one("tri", lib.py_ggml_tri, x, kind)


def arange(where: Tensor | Context, start: float, stop: float, step: float = 1.0) -> Tensor:
    """start, start + step, ... below stop: f32 [⌈(stop - start) / step⌉]. `where`: the graph, or a tensor of it."""
    graph: Any = where if isinstance(where, Context) else graph_of(where)
    if step == 0 or (stop - start) / step <= 0:
        raise ShapeError(f"arange({start}, {stop}, {step}) is empty")
    ptr = lib.py_ggml_arange(graph.ptr, start, stop, step)
    return Tensor(ptr, graph) if ptr else refuse("arange", (), (start, stop, step))
