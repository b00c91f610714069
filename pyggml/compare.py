"""Two backends, operation by operation: which of them comes to another result from the same inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .backend import Backend, Buffer, SplitBackend
from .context import Context
from .errors import GGMLError
from .lib import check_call, ffi, guard_error, lib, take_log
from .tensor import Tensor
from .types import Op, Status, Type

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .graph import Graph

_VIEWS = frozenset({Op.NONE, Op.VIEW, Op.RESHAPE, Op.PERMUTE, Op.TRANSPOSE})  # they compute nothing


@dataclass(frozen=True)
class OpDifference:
    """What an operation of a graph comes to on the graph's backend, and on another one from the same inputs.

    error: length of the difference by the length of the result on the other (as vectors); inf when one of them is
    not finite where the other is; None when it was not compared, and `reason` says why.
    """

    node: str
    sources: tuple[str, ...]
    error: float | None
    reason: str = ""

    def __str__(self) -> str:
        said = self.reason if self.error is None else f"differs by {self.error:.3g}"
        return f"{self.node} of ({', '.join(self.sources)}): {said}"


def compare_ops(graph: Graph, other: Backend) -> Iterator[OpDifference]:
    """Compute `graph` node by node, with the inputs it was set to, and each node on `other` from the same sources.

    So an error does not go on to what follows: the first that is large belongs to the operation that made it. Views are
    left out. The memory of one operation at a time is needed twice. GGMLError for a SplitBackend.
    """
    if isinstance(other, SplitBackend):
        raise GGMLError(f"{other!r} computes whole graphs, no single nodes")
    for node, run_one in graph._single_nodes():
        if node.op in _VIEWS:
            continue
        sources = tuple(repr(Tensor(s, graph)) for s in node.ptr.src if s != ffi.NULL)
        if node.type is Type.I8:
            run_one()
            yield OpDifference(repr(node), sources, None, "bytes packed for the next operation, not numbers")
            continue
        with Context(n_tensors=64) as context:
            try:
                twin = _Twin(node, context, other)
            except GGMLError as error:
                run_one()
                yield OpDifference(repr(node), sources, None, str(error))
                continue
            run_one()
            result = node.numpy()
            yield OpDifference(repr(node), sources, relative_error(result, twin.compute()))


def first_difference(graph: Graph, other: Backend, tolerance: float) -> OpDifference | None:
    """The first operation whose `error` is above `tolerance`; None when there is none."""
    return next((d for d in compare_ops(graph, other) if d.error is not None and d.error > tolerance), None)


def relative_error(a: NDArray[Any], b: NDArray[Any]) -> float:
    """|a - b| / |b|, as vectors. Values that are not finite count as equal when they are the same in both, else inf."""
    same = (a == b) | ((a != a) & (b != b))
    if same.all():
        return 0.0
    x, y = (np.where(same & ~np.isfinite(b), 0, v).astype(np.float64) for v in (a, b))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = float(np.linalg.norm(x - y) / np.linalg.norm(y))
    return error if np.isfinite(error) else np.inf


class _Twin:
    """A node with copies of its sources as they are now, in the memory of another backend."""

    def __init__(self, node: Tensor, context: Context, other: Backend) -> None:
        self._context, self._other = context, other
        self._made: dict[int, tuple[Any, Any]] = {}  # address of an original -> the original, its twin
        ptr = self._node = self._twin(node.ptr)
        ptr.op, ptr.flags = node.ptr.op, node.ptr.flags  # without its flag ggml does not compute it
        ffi.memmove(ptr.op_params, node.ptr.op_params, ffi.sizeof(ptr.op_params))
        for i, source in enumerate(node.ptr.src):
            if source != ffi.NULL:
                ptr.src[i] = self._twin(source)
        self._graph = lib.py_ggml_new_graph_custom(context.ptr, 8, False)
        if self._graph == ffi.NULL:
            raise guard_error("a graph of one node")
        lib.py_ggml_graph_add_node(self._graph, ptr)
        Buffer.allocate(context, other.buffer_type, name=repr(node))
        why = ffi.new("const char **")
        if lib.pyggml_first_refused(other.ptr, self._graph, why) >= 0:
            wanted = "has no such kernel" if why[0] == ffi.NULL else f"wants {ffi.string(why[0]).decode()}"
            raise GGMLError(f"{other.device.name} {wanted}")
        for original, twin in self._made.values():
            if original.view_src == ffi.NULL and original != node.ptr:
                self._copy(original, twin)

    def _twin(self, ptr: Any) -> Any:
        address = int(ffi.cast("uintptr_t", ptr))
        if address not in self._made:
            # Before its views: ggml gives tensors their memory in the order in which they were made.
            whole = ffi.NULL if ptr.view_src == ffi.NULL else self._twin(ptr.view_src)
            twin = self._context.new_tensor(tuple(ptr.ne), Type(ptr.type)).ptr
            twin.nb, twin.view_src, twin.view_offs = ptr.nb, whole, ptr.view_offs
            lib.ggml_set_name(twin, ptr.name)
            self._made[address] = ptr, twin
        return self._made[address][1]

    def _copy(self, original: Any, twin: Any) -> None:
        if lib.pyggml_is_repacked(original):
            raise GGMLError("a source is repacked, which cannot be read back")
        n_bytes = int(lib.ggml_nbytes(original))
        if n_bytes:
            raw = np.empty(n_bytes, np.uint8)
            check_call(lib.pyggml_tensor_get(original, ffi.from_buffer(raw), 0, n_bytes), "reading a source")
            check_call(lib.pyggml_tensor_set(twin, ffi.from_buffer(raw), 0, n_bytes), "copying a source")

    def compute(self) -> NDArray[Any]:
        """Its result on the other backend, in numpy's shape."""
        lib.pyggml_set_flag(self._other.cancel_flag, 0)
        status = lib.pyggml_compute(self._other.ptr, self._graph)
        if status != Status.SUCCESS:
            check_call(False, f"{self._other.device.name}, computing one node")
            raise GGMLError(f"{self._other.device.name} failed with status {status}. {take_log()}".strip())
        return Tensor(self._node, self._context).numpy()
