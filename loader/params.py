"""Parameters of a model: declared by the model, filled from a checkpoint, pointed into its files where possible."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import lcm
from types import TracebackType
from typing import Any, Final

import numpy as np

from pyggml import Backend, Buffer, BufferType, Context, Device, GGMLError, Tensor, Type
from pyggml.lib import ffi, lib
from pyggml.types import BufferUsage

from .checkpoint import Checkpoint
from .convert import STAGING, convert, is_same
from .dtypes import GGML_TYPES, SAFETENSORS_BITS
from .errors import LoadError, printable
from .mapped import MappedFile, TensorInfo
from .placement import Placement, Plan, device_of, plan_params

log = logging.getLogger("pyggml.loader")

_MB: Final = 1 << 20
_BLOCK: Final = {name: (block, n_bytes) for name, block, n_bytes in GGML_TYPES.values()}

Progress = Callable[[int, int], None]


class Param:
    """A tensor that a model wants: `ne` fastest dimension first; `type` None takes what the file has.

    `tensor` is there once `load_params` has run, unless it is optional and the checkpoint lacks it: see `loaded`.
    """

    __slots__ = ("_tensor", "ne", "optional", "type")

    def __init__(self, ne: Sequence[int], type: Type | None = None, optional: bool = False) -> None:
        self.ne = tuple(ne)
        self.type = type
        self.optional = optional
        self._tensor: Tensor | None = None

    @property
    def loaded(self) -> bool:
        return self._tensor is not None

    @property
    def tensor(self) -> Tensor:
        """The tensor with the parameter's data. GGMLError before it is loaded."""
        if self._tensor is None:
            raise GGMLError(f"{self!r} has no tensor: load_params gives it one")
        return self._tensor

    @tensor.setter
    def tensor(self, tensor: Tensor | None) -> None:
        self._tensor = tensor

    def __repr__(self) -> str:
        kind = "as in the file" if self.type is None else self.type.name
        return f"Param(ne={list(self.ne)}, {kind}{', optional' if self.optional else ''})"


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading one component did. `not_mapped`: reason -> number of tensors."""

    component: str
    n_tensors: int
    n_mapped: int
    mapped_bytes: int
    n_mapped_files: int
    n_copied: int
    n_converted: int
    allocated_bytes: int
    read_bytes: int
    seconds: float
    not_mapped: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Weights:
    """Owner of a component's parameters: their context, their buffers, and the files that they point into.

    Close it when nothing computes with them any more; a tensor used afterwards raises ClosedError.
    """

    def __init__(
        self, context: Context, files: Sequence[MappedFile], params: Mapping[str, Param], report: LoadReport
    ) -> None:
        self.context = context
        self.files = tuple(files)
        self.params = params
        self.report = report

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of a parameter. KeyError for an unknown name or an optional one that is absent."""
        param = self.params[name]
        if not param.loaded:
            raise KeyError(name)
        return param.tensor

    @property
    def closed(self) -> bool:
        return self.context.closed

    def changed(self) -> str | None:
        """Which file changed since it was opened, and how; None when none did. ClosedError after close()."""
        for file in self.files:
            what = file.changed()
            if what:
                return f"{printable(file.path)}: {what}"
        return None

    def close(self) -> None:
        """Free the buffers and let go of the mappings; twice is fine. GGMLError while numpy views of tensors live."""
        if self.context.closed:
            return
        for buffer in list(self.context.buffers):
            buffer.close()  # raises while views are alive
            buffer.owner = None
        self.context.buffers.clear()
        self.context.close()
        for file in self.files:
            file.close()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        r = self.report
        state = "closed" if self.closed else f"{r.n_mapped} of {r.n_tensors} tensors mapped"
        return f"<Weights of {r.component}, {state}>"


def alloc_params_buffer(context: Context, buffer_type: BufferType, *, component: str = "model") -> Buffer | None:
    """Memory for the tensors of `context` that have none; those that have data, and views, stay as they are.

    None, and a debug line, when nothing is left to allocate: ggml returns NULL for that as it does for a failure. Views
    of tensors that were placed after them are completed either way. Raises `OutOfMemory` naming the component, the
    number of tensors, bytes asked and bytes free; then no tensor points into memory that was given back.
    """
    buffer = Buffer.allocate(context, buffer_type, weights=True, name=component)
    if buffer is None:
        log.debug("%s params: nothing to allocate, 0 bytes (%d tensors)", component, sum(1 for _ in context.tensors()))
    return buffer


def load_params(
    params: Mapping[str, Param],
    checkpoint: Checkpoint,
    *,
    backend: Backend,
    component: str,
    mmap: bool = True,
    buffer_type: BufferType | None = None,
    progress: Progress | None = None,
) -> Weights:
    """Give every parameter its tensor: in the mapped file where type, alignment and device allow, else copied.

    `buffer_type` is where copies go, the backend's own unless given. `progress(done, total)` is called with bytes of
    copies. The checkpoint may be closed afterwards. Raises `LoadError` for a checkpoint of another model (before
    anything is allocated), for values that the wanted type cannot hold, for a file that became shorter; `OutOfMemory`.
    """
    start = time.perf_counter()
    buffer_type = buffer_type or backend.buffer_type
    device = device_of(buffer_type) or backend.device
    wanted = {name: (param.ne, param.type, param.optional) for name, param in params.items()}
    plan = plan_params(wanted, checkpoint, device=device, buffer_type=buffer_type, component=component, mmap=mmap)
    context = Context(len(plan.placements))
    files: list[MappedFile] = []
    try:
        tensors = {p.name: context.new_tensor(p.ne or (1,), p.type, p.name) for p in plan.placements}
        n_mapped_files = _place_in_files(plan, tensors, device, files)
        seconds = time.perf_counter() - start
        if n_mapped_files:
            n, size = plan.n_tensors("map"), plan.n_bytes("map") / _MB
            log.info("memory-mapped %d tensors in %d files (%.2f MB), taking %.2fs", n, n_mapped_files, size, seconds)
        buffer = alloc_params_buffer(context, buffer_type, component=component)
        allocated = 0 if buffer is None else buffer.n_bytes
        where = "RAM" if buffer_type.is_host else "VRAM"
        shown = f"{allocated / _MB:.2f} MB({where}) ({len(tensors)} tensors)"
        log.info("%s params backend buffer size = %s", component, shown)
        read = _copy(plan, tensors, progress)
        report = LoadReport(
            component=component,
            n_tensors=len(tensors),
            n_mapped=plan.n_tensors("map"),
            mapped_bytes=plan.n_bytes("map"),
            n_mapped_files=n_mapped_files,
            n_copied=plan.n_tensors("copy", "convert"),
            n_converted=plan.n_tensors("convert"),
            allocated_bytes=allocated,
            read_bytes=read,
            seconds=time.perf_counter() - start,
            not_mapped=plan.reasons(),
        )
        if read:
            rate = f"{read / _MB:.2f} MB read, {read / _MB / max(report.seconds, 1e-9):.0f} MB/s"
            log.info("loading tensors completed, taking %.2fs (%s)", report.seconds, rate)
        weights = Weights(context, files, params, report)
    except BaseException:
        for buffer in list(context.buffers):
            buffer.close()
            buffer.owner = None
        context.buffers.clear()
        context.close()
        for file in files:
            file.close()
        raise
    for name, param in params.items():
        param.tensor = tensors.get(name)
    return weights


def _place_in_files(plan: Plan, tensors: Mapping[str, Tensor], device: Device, files: list[MappedFile]) -> int:
    """Point tensors into their files; adds to `files` a handle of each file. Returns how many of them are mapped."""
    by_file: dict[MappedFile, list[Placement]] = {}
    for p in plan.placements:
        by_file.setdefault(p.info.file, []).append(p)
    n_mapped = 0
    for original, placements in by_file.items():
        mapped = [p for p in placements if p.action == "map"]
        if not mapped:
            files.append(original.duplicate())
            continue
        original.map()
        file = original.duplicate()
        files.append(file)
        n_mapped += 1
        buffer = Buffer.from_memory(
            device, file.address, file.n_bytes, owner=file.view(), largest=max(p.n_bytes for p in mapped)
        )
        lib.ggml_backend_buffer_set_usage(buffer.ptr, BufferUsage.WEIGHTS)
        for p in mapped:
            buffer.place(tensors[p.name], p.info.offset)
    return n_mapped


def _copy(plan: Plan, tensors: Mapping[str, Tensor], progress: Progress | None) -> int:
    """Fill the tensors that are not mapped, in the order of the file. Returns the number of bytes read."""
    todo = [p for p in plan.placements if p.action != "map" and p.info.n_bytes]
    todo.sort(key=lambda p: (p.info.file.path, p.info.offset))
    total = sum(p.info.n_bytes for p in todo)
    done = 0
    for p in todo:
        tensor = tensors[p.name]
        for n in _copy_tensor(p, tensor) if is_same(p.info.dtype, p.type) else _convert_tensor(p, tensor):
            done += n
            if progress:
                progress(done, total)
    return done


def _copy_tensor(p: Placement, tensor: Tensor) -> Any:
    """Bytes as they are: straight into host memory, through a bounded buffer into a device's. Yields bytes read."""
    host = bool(lib.ggml_backend_buffer_is_host(tensor.ptr.buffer))
    staging = None if host else bytearray(min(STAGING, p.info.n_bytes))
    for at in range(0, p.info.n_bytes, STAGING):
        n = min(STAGING, p.info.n_bytes - at)
        if staging is None:
            p.info.file.read_into(p.info.offset + at, ffi.buffer(ffi.cast("char *", tensor.ptr.data) + at, n))
        else:
            p.info.file.read_into(p.info.offset + at, memoryview(staging)[:n])
            lib.ggml_backend_tensor_set(tensor.ptr, ffi.from_buffer(staging), at, n)
        yield n


def _convert_tensor(p: Placement, tensor: Tensor) -> Any:
    """Bytes of another type, by pieces that are whole blocks of both types. Yields bytes read."""
    info, n_per_row = p.info, p.ne[0] if p.ne else 1
    source_block, source_bytes = _BLOCK.get(info.dtype) or (1, SAFETENSORS_BITS[info.dtype] // 8)
    block = lcm(source_block, p.type.block_size)
    # bytes of an element as read, as float32 twice, as set
    widest = source_bytes / source_block + 8 + p.type.type_size / p.type.block_size
    n_piece = int(STAGING / widest)
    # whole rows when a row fits, else whole blocks: rows are whole blocks of both types
    n_piece = n_piece // n_per_row * n_per_row if n_piece >= n_per_row else max(1, n_piece // block) * block
    n_elements = info.n_elements
    for first in range(0, n_elements, n_piece):
        n = min(n_piece, n_elements - first)
        n_bytes = n // source_block * source_bytes
        raw = np.empty(n_bytes, np.uint8)
        info.file.read_into(info.offset + first // source_block * source_bytes, raw.data)
        try:
            out = convert(raw, info.dtype, p.type, min(n_per_row, n))
        except OverflowError as e:
            raise _not_representable(info, str(e)) from None
        lib.ggml_backend_tensor_set(
            tensor.ptr, ffi.from_buffer(out), first // p.type.block_size * p.type.type_size, out.nbytes
        )
        yield n_bytes


def _not_representable(info: TensorInfo, message: str) -> LoadError:
    return LoadError(message, kind="Overflow", path=info.file.path, tensor=info.name_in_file, offset=info.offset)
