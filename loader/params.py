"""Parameters of a model: declared by the model, filled from a checkpoint, pointed into its files where possible."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from math import lcm
from types import TracebackType
from typing import Any, Final

import numpy as np

from pyggml import Backend, Buffer, BufferType, Context, Device, GGMLError, Tensor, Type
from pyggml.backend import check_server
from pyggml.lib import ffi, lib
from pyggml.types import BufferUsage, DeviceType

from .checkpoint import Checkpoint
from .convert import STAGING, block_of, convert
from .errors import LoadError, printable
from .mapped import MappedFile, TensorInfo
from .options import LoadOptions
from .pages import Lock, read_ahead
from .placement import Placement, Plan, device_of, plan_params
from .upload import Uploader, take

log = logging.getLogger("pyggml.loader")

_MB: Final = 1 << 20
_N_READERS: Final = 4  # copying waits for page faults and the disk more than for the processor
_PIECE: Final = 4 * _MB  # what one of them copies at a time

Progress = Callable[[int, int], None]


class Param:
    """A tensor that a model wants: `ne` fastest dimension first; `type` None takes what the file has.

    `product`: it is only ever the first argument of mul_mat, so it may be kept in the layout of a faster kernel.

    `tensor` is there once `load_params` has run, unless it is optional and the checkpoint lacks it: see `loaded`.
    """

    __slots__ = ("_tensor", "ne", "optional", "product", "type")

    def __init__(
        self, ne: Sequence[int], type: Type | None = None, optional: bool = False, *, product: bool = False
    ) -> None:
        self.ne = tuple(ne)
        self.type = type
        self.optional = optional
        self.product = product
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
    locked_bytes: int = 0
    n_repacked: int = 0
    repacked_bytes: int = 0
    uploaded_bytes: int = 0  # to a device, in upload_seconds, in which they were also read
    upload_seconds: float = 0.0
    upload_gb_per_second: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Weights:
    """Owner of a component's parameters: their context, their buffers, and the files that they point into.

    Close it when nothing computes with them any more; a tensor used afterwards raises ClosedError.
    """

    def __init__(
        self, context: Context, files: Sequence[MappedFile], params: Mapping[str, Param], report: LoadReport, *,
        lock: Lock | None = None, drop_cache: bool = False,
    ) -> None:  # fmt: skip
        self.context = context
        self.files = tuple(files)
        self.params = params
        self.report = report
        self._lock = lock
        self._drop_cache = drop_cache

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
        """Which of the files that tensors point into changed since it was opened, and how; None when none did.

        ClosedError after close().
        """
        _ = self.context.ptr
        for file in self.files:
            if file.mapped and (what := file.changed()):
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
        if self._lock is not None:
            self._lock.release()
        for file in self.files:
            if self._drop_cache:
                file.drop_cache()
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
    options: LoadOptions | None = None,
    buffer_type: BufferType | None = None,
    progress: Progress | None = None,
) -> Weights:
    """Give every parameter its tensor: in the mapped file where type, alignment and device allow, else copied.

    `options` choose otherwise; without them the environment's hints count (LoadOptions.from_environment).
    `buffer_type` is where copies go, the backend's own unless given. `progress(done, total)` is called with bytes of
    copies. The checkpoint may be closed afterwards. Raises `LoadError` for a checkpoint of another model (before
    anything is allocated), for values that the wanted type cannot hold, for a file that changes meanwhile
    (WeightsChanged), when memory cannot be locked (CannotLock); `OutOfMemory`.
    """
    start = time.perf_counter()
    options = LoadOptions.from_environment() if options is None else options
    buffer_type = buffer_type or backend.buffer_type
    device = device_of(buffer_type) or backend.device
    wanted = {name: (param.ne, param.type, param.optional) for name, param in params.items()}
    plan = plan_params(
        wanted, checkpoint, device=device, buffer_type=buffer_type, component=component, options=options,
        products={name for name, param in params.items() if param.product},
    )  # fmt: skip
    if options.mode == "auto":
        _say_why_not(plan)
    context = Context(len(plan.placements))
    files: dict[MappedFile, MappedFile] = {}  # the checkpoint's -> ours
    lock = Lock(component) if options.mlock else None
    try:
        tensors = {p.name: context.new_tensor(p.ne or (1,), p.type, p.name) for p in plan.placements}
        n_mapped_files = _place_in_files(plan, tensors, device, files, options)
        seconds = time.perf_counter() - start
        if n_mapped_files:
            n, size = plan.n_tensors("map"), plan.n_bytes("map") / _MB
            log.info("memory-mapped %d tensors in %d files (%.2f MB), taking %.2fs", n, n_mapped_files, size, seconds)
        repacked = _place_in_layouts(plan, tensors, component)
        n_mapped_buffers = len(context.buffers)
        alloc_params_buffer(context, buffer_type, component=component)
        allocated = repacked + sum(buffer.n_bytes for buffer in context.buffers[n_mapped_buffers:])
        where = "RAM" if buffer_type.is_host else "VRAM"
        shown = f"{allocated / _MB:.2f} MB({where}) ({len(tensors)} tensors)"
        log.info("%s params backend buffer size = %s", component, shown)
        # A server takes one thing after the other: nothing is gained there.
        uploader = None if device.type == DeviceType.CPU or device.is_remote else Uploader(device)
        with uploader or nullcontext():
            read = _copy(plan, tensors, files, progress, uploader, reclaim=options.reclaim and lock is None)
        for original, placements in plan.by_file().items():
            files[original].check()
            for p in placements:
                if p.info.scale is not None and p.info.scale.file is not original:
                    p.info.scale.file.check()
            if all(p.action != "map" for p in placements):
                files[original].unmap()
        if lock is not None:
            if device.type != DeviceType.CPU:
                why = f"memory of {device.name} cannot be locked"
                raise LoadError(why, kind="CannotLock", hint="leave --mlock out")
            lock.hold((int(ffi.cast("uintptr_t", tensors[p.name].ptr.data)), p.n_bytes) for p in plan.placements)
        report = LoadReport(
            component=component,
            n_tensors=len(tensors),
            n_mapped=plan.n_tensors("map"),
            mapped_bytes=plan.n_bytes("map"),
            n_mapped_files=n_mapped_files,
            n_copied=plan.n_tensors("copy", "convert", "repack"),
            n_converted=plan.n_tensors("convert"),
            allocated_bytes=allocated,
            read_bytes=read,
            seconds=time.perf_counter() - start,
            not_mapped=plan.reasons(),
            locked_bytes=lock.n_bytes if lock else 0,
            n_repacked=plan.n_tensors("repack"),
            repacked_bytes=repacked,
            uploaded_bytes=uploader.n_bytes if uploader else 0,
            upload_seconds=uploader.seconds if uploader else 0.0,
            upload_gb_per_second=uploader.gb_per_second if uploader else 0.0,
        )
        if read:
            rate = f"{read / _MB:.2f} MB read, {read / _MB / max(report.seconds, 1e-9):.0f} MB/s"
            log.info("loading tensors completed, taking %.2fs (%s)", report.seconds, rate)
        if uploader:
            log.info("%s: %s", printable(component), uploader.sentence())
        weights = Weights(
            context, list(files.values()), params, report, lock=lock, drop_cache="dontneed" in options.hints
        )
    except BaseException:
        for buffer in list(context.buffers):
            buffer.close()
            buffer.owner = None
        context.buffers.clear()
        context.close()
        if lock is not None:
            lock.release()
        for file in files.values():
            file.close()
        raise
    for name, param in params.items():
        param.tensor = tensors.get(name)
    return weights


def _say_why_not(plan: Plan) -> None:
    for file, placements in plan.by_file().items():
        if placements[0].reading == "off" and (remote := file.remote):
            log.info(
                "%s is on %s: read into memory, since there a page that cannot be fetched stops whoever needs it, and "
                "pages come one by one; --mmap maps it all the same", printable(file.path), remote,
            )  # fmt: skip


def _place_in_files(
    plan: Plan, tensors: Mapping[str, Tensor], device: Device, files: dict[MappedFile, MappedFile],
    options: LoadOptions,
) -> int:  # fmt: skip
    """Point tensors into their files; adds to `files` a handle of each file. Returns how many of them are mapped."""
    n_mapped = 0
    for original, placements in plan.by_file().items():
        files[original] = file = original.duplicate()
        read_ahead(file, placements, options.hints)
        mapped = [p for p in placements if p.action == "map"]
        if not mapped:
            continue
        n_mapped += 1
        buffer = Buffer.from_memory(
            device, file.address, file.n_bytes, owner=file.view(), largest=max(p.n_bytes for p in mapped),
            check=file.check,
        )
        lib.ggml_backend_buffer_set_usage(buffer.ptr, BufferUsage.WEIGHTS)
        for p in mapped:
            buffer.place(tensors[p.name], p.info.offset)
    return n_mapped


def _place_in_layouts(plan: Plan, tensors: Mapping[str, Tensor], component: str) -> int:
    """Memory in the extra buffer types for what is repacked; nothing is written yet. Returns its bytes."""
    by_layout: dict[BufferType, list[Tensor]] = {}
    for p in plan.placements:
        if p.layout is not None:
            by_layout.setdefault(p.layout, []).append(tensors[p.name])
    total = 0
    for layout, members in by_layout.items():
        offsets, end = [], 0
        for tensor in members:
            offsets.append(end)
            size = int(lib.ggml_backend_buft_get_alloc_size(layout.ptr, tensor.ptr))
            end += -(-size // layout.alignment) * layout.alignment
        buffer = Buffer.of_size(layout, end, name=component)
        lib.ggml_backend_buffer_set_usage(buffer.ptr, BufferUsage.WEIGHTS)
        for tensor, offset in zip(members, offsets, strict=True):
            buffer.place(tensor, offset)
        log.info("%s: %d tensors repacked for %s (%.2f MB)", component, len(members), layout.name, end / _MB)
        total += end
    return total


def _copy(
    plan: Plan, tensors: Mapping[str, Tensor], files: Mapping[MappedFile, MappedFile], progress: Progress | None,
    uploader: Uploader | None, *, reclaim: bool,
) -> int:  # fmt: skip
    """Fill the tensors that are not mapped, in the order of the file. Returns the number of bytes read."""
    todo = [p for p in plan.placements if p.action != "map" and p.info.n_bytes]
    todo.sort(key=lambda p: (p.info.file.path, p.info.offset))
    total = sum(p.info.n_bytes for p in todo)
    done = 0
    # Whatever happens, no thread writes any more once this is left: the memory may be given back then.
    with ThreadPoolExecutor(_N_READERS, "pyggml-read") as pool:
        copy = partial(_copy_tensor, pool) if uploader is None else partial(_upload_tensor, uploader)
        fill: dict[str, Callable[..., Any]] = {"copy": copy, "convert": partial(_convert_tensor, uploader)}
        fill["repack"] = _repack_tensor
        for p in todo:
            tensor, file = tensors[p.name], files[p.info.file]
            for n in fill[p.action](p, file, tensor):
                done += n
                if progress:
                    progress(done, total)
            if reclaim and (p.reading == "io" or (p.action == "repack" and p.reading == "map")):
                file.advise("dontneed", p.info.offset, p.info.n_bytes)
    return done


def _copy_tensor(pool: ThreadPoolExecutor, p: Placement, file: MappedFile, tensor: Tensor) -> Any:
    """Bytes as they are: by several threads into host memory, else through a bounded buffer. Yields bytes read."""
    if lib.ggml_backend_buffer_is_host(tensor.ptr.buffer):
        yield from pool.map(partial(_copy_piece, p, file, tensor), range(0, p.info.n_bytes, _PIECE))
        return
    staging = None if p.reading == "io" else bytearray(min(STAGING, p.info.n_bytes))
    for at in range(0, p.info.n_bytes, STAGING):
        n = min(STAGING, p.info.n_bytes - at)
        if staging is None:
            source = ffi.from_buffer(file.view(p.info.offset + at, n))
        else:
            file.read_into(p.info.offset + at, memoryview(staging)[:n])
            source = ffi.from_buffer(staging)
        lib.ggml_backend_tensor_set(tensor.ptr, source, at, n)
        check_server(tensor.ptr)
        yield n


def _copy_piece(p: Placement, file: MappedFile, tensor: Tensor, at: int) -> int:
    """One piece, into host memory."""
    n = min(_PIECE, p.info.n_bytes - at)
    if p.reading == "io":
        lib.ggml_backend_tensor_set(tensor.ptr, ffi.from_buffer(file.view(p.info.offset + at, n)), at, n)
    else:
        file.read_into(p.info.offset + at, ffi.buffer(ffi.cast("char *", tensor.ptr.data) + at, n))
    return n


def _upload_tensor(uploader: Uploader, p: Placement, file: MappedFile, tensor: Tensor) -> Any:
    """Bytes as they are, to a device. Yields bytes read."""
    for start in range(0, p.info.n_bytes, STAGING):
        n = min(STAGING, p.info.n_bytes - start)
        uploader.put(tensor, start, n, partial(_read, p, file, p.info.offset + start))
        yield n


def _read(p: Placement, file: MappedFile, start: int, at: int, memory: memoryview) -> None:
    """Fill `memory` with the bytes of the file from `start + at` on."""
    if p.reading == "io":
        memory[:] = file.view(start + at, len(memory))
    else:
        file.read_into(start + at, memory)


def _convert_tensor(uploader: Uploader | None, p: Placement, file: MappedFile, tensor: Tensor) -> Any:
    """Bytes of another type, by pieces that are whole blocks of both types. Yields bytes read."""
    info, n_per_row = p.info, p.ne[0] if p.ne else 1
    source_block, source_bytes = block_of(info.dtype)
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
        start = info.offset + first // source_block * source_bytes
        _read(p, file, start, 0, raw.data)
        try:
            out = convert(raw, info, p.type, min(n_per_row, n), first=first)
        except OverflowError as e:
            raise _not_representable(info, str(e)) from None
        offset = first // p.type.block_size * p.type.type_size
        if uploader is not None:
            uploader.put(tensor, offset, out.nbytes, partial(take, out.reshape(-1).view(np.uint8).data))
        else:
            lib.ggml_backend_tensor_set(tensor.ptr, ffi.from_buffer(out), offset, out.nbytes)
            check_server(tensor.ptr)
        yield n_bytes


def _repack_tensor(p: Placement, file: MappedFile, tensor: Tensor) -> Any:
    """Bytes into another layout: ggml takes a whole tensor at once, straight out of the mapping if there may be one."""
    if p.reading == "off":
        raw = np.empty(p.info.n_bytes, np.uint8)
        file.read_into(p.info.offset, raw.data)
        lib.ggml_backend_tensor_set(tensor.ptr, ffi.from_buffer(raw), 0, raw.nbytes)
    else:
        view = file.view(p.info.offset, p.info.n_bytes)
        lib.ggml_backend_tensor_set(tensor.ptr, ffi.from_buffer(view), 0, len(view))
    yield p.info.n_bytes


def _not_representable(info: TensorInfo, message: str) -> LoadError:
    return LoadError(message, kind="Overflow", path=info.file.path, tensor=info.name_in_file, offset=info.offset)
