"""Graph: one shape of one computation, built once and computed many times."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .backend import Backend, Buffer, SplitBackend
from .context import Context
from .errors import Cancelled, DeviceLost, GGMLError, OutOfMemory, ShapeError
from .handle import Handle
from .lib import check_call, ffi, guard_error, lib, take_log
from .tensor import Tensor
from .types import Op, Status, Type

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class OpTime:
    """How long one node took."""

    name: str
    op: str
    ne: tuple[int, int, int, int]
    seconds: float


class _Allocation(Handle):
    """ggml's graph allocator and the compute buffer that it owns."""

    def __init__(self, backend: Backend) -> None:
        ptr = lib.ggml_gallocr_new(backend.buffer_type.ptr)
        self._own(ptr, lib.ggml_gallocr_free, ptr)

    def alloc(self, graph: Any) -> bool:
        return bool(lib.pyggml_alloc_graph(self.ptr, graph))

    @property
    def n_bytes(self) -> int:
        return int(lib.ggml_gallocr_get_buffer_size(self.ptr, 0))


class _Schedule(Handle):
    """ggml's scheduler: the compute buffers of several backends, and who computes which node."""

    def __init__(self, backend: SplitBackend, n_nodes: int) -> None:
        self.backends = (*backend.parts, backend.fallback)
        pointers = ffi.new("ggml_backend_t[]", [b.ptr for b in self.backends])
        ptr = lib.ggml_backend_sched_new(pointers, ffi.NULL, len(self.backends), n_nodes, False, False)
        self._own(ptr, lib.ggml_backend_sched_free, ptr)

    def alloc(self, graph: Any) -> bool:
        return bool(lib.pyggml_sched_alloc(self.ptr, graph))

    def compute(self, graph: Any) -> int:
        return int(lib.pyggml_sched_compute(self.ptr, graph))

    @property
    def n_bytes(self) -> int:
        return sum(int(lib.ggml_backend_sched_get_buffer_size(self.ptr, b.ptr)) for b in self.backends)


class Graph(Context):
    """Nodes, their graph and their compute buffer, for one backend.

    Declare inputs, build nodes with pyggml.ops, declare outputs; then `compute` with numpy arrays as often as you like.
    `n_nodes` is how many nodes and inputs it has room for. It keeps alive whatever its nodes use: the backend, and the
    contexts of weights.
    """

    is_graph = True

    def __init__(self, backend: Backend, n_nodes: int = 2048, *, grads: bool = False) -> None:
        self.backend = backend
        self.n_nodes = n_nodes
        overhead = int(lib.ggml_tensor_overhead()) + 16
        self._init_arena(2 * n_nodes * overhead + int(lib.ggml_graph_overhead_custom(2 * n_nodes, grads)) + 4096)
        self.graph_ptr = lib.py_ggml_new_graph_custom(self.ptr, 2 * n_nodes, grads)
        if self.graph_ptr == ffi.NULL:
            raise guard_error(f"a graph of {n_nodes} nodes")
        self.uses: dict[int, Context] = {}
        self.held: list[object] = []  # what C code of custom operations points to
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self._allocation: _Allocation | _Schedule | None = None

    # -- building -----------------------------------------------------------------------------------------------------

    def input(self, ne: Sequence[int], type: Type = Type.F32, name: str = "") -> Tensor:
        """A tensor that `compute` is given by `name`; its data is kept from one computation to the next."""
        self._check_building()
        tensor = self.new_tensor(ne, type, name or f"input{len(self.inputs)}")
        if tensor.name in self.inputs:
            raise GGMLError(f"there is an input {tensor.name!r} already")
        lib.ggml_set_input(tensor.ptr)
        lib.ggml_set_output(tensor.ptr)  # else its memory would be used again once its last reader has run
        self.inputs[tensor.name] = tensor
        return tensor

    def output(self, tensor: Tensor, name: str = "") -> Tensor:
        """Mark a node as a result of `compute`, under `name`, and add what leads to it to the graph."""
        self._check_building()
        name = name or tensor.name or f"output{len(self.outputs)}"
        if name in self.outputs:
            raise GGMLError(f"there is an output {name!r} already")
        if tensor.op == Op.NONE:
            raise GGMLError(f"{tensor!r} is computed by nothing: it cannot be an output")
        tensor.name = name
        lib.ggml_set_output(tensor.ptr)
        self.outputs[name] = tensor
        self.add(tensor)
        return tensor

    def add(self, tensor: Tensor) -> Tensor:
        """Add a node, and what leads to it, without making it an output (side effects such as `ops.cpy`)."""
        self._check_building()
        if not lib.py_ggml_build_forward_expand(self.graph_ptr, tensor._open()):
            raise guard_error(f"adding {tensor!r} to a graph of {self.n_nodes} nodes")
        return tensor

    def use(self, tensor: Tensor) -> Tensor:
        """A handle to a weight that counts as this graph's own, for ops whose arguments are all weights."""
        self.keep(tensor)
        return Tensor(tensor.ptr, self)

    def keep(self, tensor: Tensor) -> None:
        """Keep the context of a foreign tensor alive, and check it before each computation."""
        ctx = tensor.ctx
        if ctx is not self:
            _ = ctx.ptr  # raises ClosedError
            if not tensor.ptr.data:
                raise GGMLError(f"{tensor!r} is used in a graph but has no data: load or allocate it first")
            self.uses[id(ctx)] = ctx

    def param(self, tensor: Tensor) -> Tensor:
        """Mark a weight (f32, with data) as one that `backward` finds the gradient of; before nodes are added.

        Returns a handle that counts as this graph's own.
        """
        self._check_building()
        handle = self.use(tensor)
        if not lib.py_ggml_set_param(handle.ptr):
            raise guard_error(f"{tensor!r} as a parameter")
        return handle

    def backward(self, loss: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
        """Add the backward pass of `loss` (one f32 element) and return the gradients of `params`, nodes of this graph.

        The graph is made with grads=True, with room for about three times the forward nodes. GGMLError when the loss
        does
        not depend on a parameter; ShapeError for an operation that ggml has no gradient of.
        """
        self._check_building()
        if loss.n_elements != 1 or loss.type is not Type.F32:
            raise ShapeError(f"the loss is one f32 element, not {loss!r}")
        if not lib.py_ggml_set_loss(loss.ptr):
            raise guard_error(f"{loss!r} as a loss")
        self.add(loss)
        one = Context(n_tensors=1)
        seed = one.new_tensor((1,), name="loss gradient")
        Buffer.allocate(one, self.backend.buffer_type)
        seed.set([1.0])
        self.uses[id(one)] = one
        n = lib.ggml_graph_n_nodes(self.graph_ptr)
        nodes = [lib.ggml_graph_node(self.graph_ptr, i) for i in range(n)]
        given = ffi.new("struct ggml_tensor *[]", [seed.ptr if ptr == loss.ptr else ffi.NULL for ptr in nodes])
        if not lib.py_ggml_build_backward_expand(self.ptr, self.graph_ptr, given):
            raise guard_error(f"the backward pass of {loss!r}")
        grads = []
        for tensor in params:
            ptr = lib.ggml_graph_get_grad(self.graph_ptr, tensor.ptr)
            if ptr == ffi.NULL:
                raise GGMLError(f"{loss!r} does not depend on {tensor!r}")
            grads.append(Tensor(ptr, self))
        return grads

    def _check_building(self) -> None:
        if self._allocation is not None:
            raise GGMLError("the graph is allocated: build a new one for another computation")

    # -- computing ----------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[Tensor]:
        """The nodes in the order they are computed."""
        n = lib.ggml_graph_n_nodes(self.graph_ptr)
        return [Tensor(lib.ggml_graph_node(self.graph_ptr, i), self) for i in range(n)]

    @property
    def buffer_size(self) -> int:
        """Bytes of the compute buffer; 0 before it is allocated."""
        return self._allocation.n_bytes if self._allocation else 0

    def measure(self) -> tuple[int, int]:
        """Bytes that the compute buffer has, or would have, and that the processor's backend needs while it computes.

        Nothing is allocated, and weights are not looked at: any address does as their data.
        """
        size = ffi.new("size_t *", self.buffer_size)
        if self._allocation is None:
            with _Allocation(self.backend) as allocation:
                lib.ggml_gallocr_reserve_n_size(allocation.ptr, self.graph_ptr, ffi.NULL, ffi.NULL, size)
        n_threads = self.backend.n_threads
        work = lib.ggml_graph_plan(self.graph_ptr, n_threads, ffi.NULL).work_size if n_threads else 0
        return int(size[0]), int(work)

    def alloc(self) -> None:
        """Allocate the compute buffer; `compute` does it when it has not been done. OutOfMemory with bytes."""
        _ = self.ptr
        if self._allocation is not None:
            return
        if not self.outputs and not lib.ggml_graph_n_nodes(self.graph_ptr):
            raise GGMLError("the graph is empty: declare an output first")
        for ctx in self.uses.values():
            ctx.check_open()
        # Inputs that no output depends on have no place in ggml's graph, and so no memory: say so now.
        self._check_nodes()
        allocation: _Allocation | _Schedule
        if isinstance(self.backend, SplitBackend):
            allocation = _Schedule(self.backend, 2 * self.n_nodes)
        else:
            allocation = _Allocation(self.backend)
        if not allocation.alloc(self.graph_ptr):
            free = self.backend.device.memory[0]
            n = lib.ggml_graph_n_nodes(self.graph_ptr)
            allocation.close()
            self.backend.check()
            raise OutOfMemory(
                f"no memory for a graph of {n} nodes on {self.backend.device.name}; "
                f"{free} bytes are free. {take_log()}".strip()
            )
        unused = [name for name, t in self.inputs.items() if t.ptr.data == ffi.NULL]
        if unused:
            allocation.close()
            raise GGMLError(f"no output depends on the input {', '.join(map(repr, unused))}")
        self._allocation = allocation

    def _check_nodes(self) -> None:
        """Raise for what would end the process, or write into a mapped file, while it is computed."""
        why = ffi.new("const char **")
        i = lib.pyggml_first_refused(self.backend.ptr, self.graph_ptr, why)
        if i >= 0:
            node = Tensor(lib.ggml_graph_node(self.graph_ptr, i), self)
            sources = ", ".join(repr(Tensor(s, self)) for s in node.ptr.src if s != ffi.NULL)
            reason = "the backend has no such kernel"
            if why[0] != ffi.NULL:
                reason = f"it wants {ffi.string(why[0]).decode()}"
            raise ShapeError(f"{self.backend.device.name} cannot compute {node!r} of ({sources}): {reason}")
        for ctx in self.uses.values():
            for buffer in ctx.buffers:
                if buffer.read_only and (i := lib.pyggml_first_write(self.graph_ptr, buffer.ptr)) >= 0:
                    node = Tensor(lib.ggml_graph_node(self.graph_ptr, i), self)
                    raise GGMLError(f"{node!r} would overwrite read-only weights")

    def _check_rows(self) -> None:
        """Raise for a row number, in an input or a weight, that would end the process."""
        value, n_rows = ffi.new("int64_t *"), ffi.new("int64_t *")
        i = lib.pyggml_first_bad_row(self.graph_ptr, value, n_rows)
        if i >= 0:
            node = Tensor(lib.ggml_graph_node(self.graph_ptr, i), self)
            raise ShapeError(f"{node!r} is told to take row {value[0]} of {n_rows[0]}")

    def set(self, **inputs: ArrayLike) -> None:
        """Copy arrays into inputs (numpy shapes). GGMLError for an unknown name, ShapeError for a wrong shape."""
        self.alloc()
        for name, values in inputs.items():
            if name not in self.inputs:
                known = ", ".join(map(repr, self.inputs)) or "none"
                raise GGMLError(f"there is no input {name!r}: the graph has {known}")
            self.inputs[name].set(values)

    def compute(self, **inputs: ArrayLike) -> dict[str, NDArray[Any]]:
        """Set `inputs`, run every node, and return the outputs as numpy arrays (float32 for quantised types).

        Raises Cancelled after `backend.cancel()`, ClosedError when weights it uses are closed, what their buffers'
        `check` raises (for mapped weights: loader.LoadError when the file changed), GGMLError when the backend fails,
        DeviceLost when it cannot be used any more. After Ctrl-C the computation stops within one operation and
        KeyboardInterrupt is raised.
        """
        self.set(**inputs)
        self.run()
        return {name: tensor.numpy() for name, tensor in self.outputs.items()}

    def run(self) -> None:
        """`compute` without copies: inputs as they were set, outputs to be read from their tensors."""
        self._begin()
        schedule = self._allocation
        if isinstance(schedule, _Schedule):
            self._run(lambda _, graph: schedule.compute(graph), self.graph_ptr)
        else:
            self._run(lib.pyggml_compute, self.graph_ptr)

    def run_pieces(self, ends: Sequence[int], before: Callable[[int], object]) -> None:
        """`run` in pieces: nodes up to `ends[0]`, up to `ends[1]`, ... and the rest; before(i) is called before each.

        Results are those of `run` unless a piece ends between operations that ggml fuses. GGMLError when `ends` do not
        ascend, or leave the graph. Cancelled also between pieces, where the backend itself cannot be stopped.
        """
        if isinstance(self.backend, SplitBackend):
            raise GGMLError(f"{self.backend!r} computes whole graphs, no pieces")
        self._begin()
        n = lib.ggml_graph_n_nodes(self.graph_ptr)
        edges = [0, *ends, n]
        if sorted(edges) != edges:
            raise GGMLError(f"pieces of a graph of {n} nodes cannot end at {list(ends)}")
        for i, (first, end) in enumerate(pairwise(edges)):
            before(i)
            if self.backend.is_cancelled:
                raise Cancelled("the computation was cancelled")
            self._run(lib.pyggml_compute_nodes, self.graph_ptr, first, end)

    def _begin(self) -> None:
        self.alloc()
        for ctx in self.uses.values():
            ctx.check_open()
        self._check_rows()
        self.backend.check_usable()
        lib.pyggml_set_flag(self.backend.cancel_flag, 0)

    def _run(self, compute: Any, *args: Any) -> None:
        status = compute(self.backend.ptr, *args)
        for ctx in self.uses.values():
            for buffer in ctx.buffers:
                if buffer.check is not None:
                    buffer.check()
        self._check(status)

    def _check(self, status: int) -> None:
        self.backend.check()
        if status == Status.SUCCESS:
            return
        if status == Status.ABORTED:
            raise Cancelled("the computation was cancelled")
        try:
            check_call(False, f"{self.backend.device.name}, computing {self!r}")
        except DeviceLost as error:
            self.backend.lost.append(str(error))
            raise
        except GGMLError:
            self.backend.reopen()  # ggml left it in the middle of a computation
            raise
        name = ffi.string(lib.ggml_status_to_string(status)).decode()
        raise GGMLError(f"{self.backend.device.name} failed: {name}. {take_log()}".strip())

    def each(self, callback: Callable[[Tensor], bool | None]) -> None:
        """Compute one node at a time and show it to `callback`; its data may be read, and is reused afterwards.

        A callback that returns False stops the computation with Cancelled.
        """
        for node, run_one in self._single_nodes():
            run_one()
            if callback(node) is False:
                raise Cancelled(f"stopped after {node!r}")

    def profile(self) -> list[OpTime]:
        """Compute one node at a time and say how long each took. Fused operations run unfused here."""
        times = []
        for node, run_one in self._single_nodes():
            start = time.perf_counter()
            run_one()
            times.append(OpTime(node.name, _op_name(node), node.ne, time.perf_counter() - start))
        return times

    def _single_nodes(self) -> Any:
        if isinstance(self.backend, SplitBackend):
            raise GGMLError(f"{self.backend!r} computes whole graphs, no single nodes")
        self._begin()
        nodes = self.nodes
        with Context(n_tensors=8 * len(nodes) + 64) as arena:
            for node in nodes:
                graph = lib.py_ggml_new_graph_custom(arena.ptr, 8, False)
                if graph == ffi.NULL:
                    raise guard_error("a graph of one node")
                lib.py_ggml_graph_add_node(graph, node.ptr)
                yield node, lambda graph=graph: self._run(lib.pyggml_compute, graph)

    def close(self) -> None:
        """Free the compute buffer and the nodes."""
        if self._allocation is not None:
            self._allocation.close()
        self.uses.clear()
        super().close()

    def __repr__(self) -> str:
        if self.closed:
            return "<Graph closed>"
        return f"<Graph {list(self.inputs)} -> {list(self.outputs)}, {lib.ggml_graph_n_nodes(self.graph_ptr)} nodes>"


def _op_name(node: Tensor) -> str:
    if node.op == Op.CUSTOM and node.name.endswith("()"):  # pyggml.ops.own
        return node.name[:-2]
    return str(ffi.string(lib.ggml_op_desc(node.ptr)).decode()).lower()


def summarise(times: Sequence[OpTime]) -> Mapping[str, tuple[int, float]]:
    """op -> (count, seconds), longest first."""
    table: dict[str, tuple[int, float]] = {}
    for t in times:
        count, seconds = table.get(t.op, (0, 0.0))
        table[t.op] = (count + 1, seconds + t.seconds)
    return dict(sorted(table.items(), key=lambda item: -item[1][1]))
