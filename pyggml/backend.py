"""Devices, backends that compute on them, and buffers of their memory."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from . import rpc
from .context import Context
from .errors import DeviceLost, GGMLError, OutOfMemory
from .handle import Handle
from .lib import check_call, ffi, lib, take_log
from .types import BufferUsage, DeviceType

log = logging.getLogger("pyggml.backend")


def _text(pointer: Any) -> str:
    return "" if pointer == ffi.NULL else str(ffi.string(pointer).decode(errors="replace"))


class BufferType:
    """A kind of memory: where a buffer lies and which layout tensors have in it. Lives as long as its device."""

    __slots__ = ("ptr",)

    def __init__(self, ptr: Any) -> None:
        self.ptr = ptr

    @property
    def name(self) -> str:
        return _text(lib.ggml_backend_buft_name(self.ptr))

    @property
    def is_host(self) -> bool:
        """True when the processor can read and write the tensors' data directly."""
        return bool(lib.ggml_backend_buft_is_host(self.ptr))

    @property
    def alignment(self) -> int:
        """Bytes that a tensor's data is aligned to."""
        return int(lib.ggml_backend_buft_get_alignment(self.ptr))

    @property
    def max_size(self) -> int:
        """Bytes of the largest single buffer."""
        return int(lib.ggml_backend_buft_get_max_size(self.ptr))

    @property
    def memory_free(self) -> int:
        """Bytes that are free where buffers of this type lie."""
        device = lib.ggml_backend_buft_get_device(self.ptr)
        if device != ffi.NULL and not self.is_host:
            return Device(device).memory[0]
        import psutil  # ggml says the total for the processor, and knows no device of its plain buffer type

        return int(psutil.virtual_memory().available)

    def check(self) -> None:
        """ServerLost when such memory is on an RPC server that is gone."""
        device = lib.ggml_backend_buft_get_device(self.ptr)
        if device != ffi.NULL:
            Device(device).check()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BufferType) and bool(self.ptr == other.ptr)

    def __hash__(self) -> int:
        return hash(self.ptr)

    def __repr__(self) -> str:
        return f"<BufferType {self.name}>"


class Device:
    """One device that ggml can compute on. Devices are never freed."""

    __slots__ = ("ptr",)

    def __init__(self, ptr: Any) -> None:
        self.ptr = ptr

    @classmethod
    def by_name(cls, name: str) -> Device:
        """The device of that name, as `devices()` lists it; upper and lower case are the same. GGMLError if none."""
        for device in devices():
            if device.name.lower() == name.lower():
                return device
        raise GGMLError(f"there is no device {name!r}: this build has {', '.join(d.name for d in devices())}")

    @property
    def name(self) -> str:
        return _text(lib.ggml_backend_dev_name(self.ptr))

    @property
    def description(self) -> str:
        """What it is; host:port of a device on an RPC server."""
        text = _text(lib.ggml_backend_dev_description(self.ptr))
        return rpc.server_of(text) or text

    @property
    def type(self) -> Any:
        """A DeviceType: CPU, GPU, IGPU, ACCEL."""
        return DeviceType(lib.ggml_backend_dev_type(self.ptr))

    @property
    def memory(self) -> tuple[int, int]:
        """(free, total) bytes."""
        free, total = ffi.new("size_t *"), ffi.new("size_t *")
        lib.ggml_backend_dev_memory(self.ptr, free, total)
        return int(free[0]), int(total[0])

    @property
    def maps_host_memory(self) -> bool:
        """True when a buffer can be made of memory that already exists, such as a mapped file."""
        props = ffi.new("struct ggml_backend_dev_props *")
        lib.ggml_backend_dev_get_props(self.ptr, props)
        return bool(props.caps.buffer_from_host_ptr)

    @property
    def buffer_type(self) -> BufferType:
        return BufferType(lib.ggml_backend_dev_buffer_type(self.ptr))

    @property
    def extra_buffer_types(self) -> list[BufferType]:
        """Buffer types with layouts of their own, such as CPU_REPACK."""
        registry = lib.ggml_backend_dev_backend_reg(self.ptr)
        found = lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if found == ffi.NULL:
            return []
        types = ffi.cast("ggml_backend_dev_get_extra_bufts_t", found)(self.ptr)
        result: list[BufferType] = []
        while types != ffi.NULL and types[len(result)] != ffi.NULL:
            result.append(BufferType(types[len(result)]))
        return result

    @property
    def is_remote(self) -> bool:
        """True when it is on an RPC server."""
        return bool(rpc.server_of(_text(lib.ggml_backend_dev_description(self.ptr))))

    def check(self) -> None:
        """ServerLost when the device is on an RPC server that is gone."""
        if rpc.any_servers():
            rpc.check(_text(lib.ggml_backend_dev_description(self.ptr)))

    def open(self, n_threads: int | None = None) -> Backend:
        """A backend on this device; `n_threads` is for the processor."""
        return Backend(self, n_threads)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and bool(self.ptr == other.ptr)

    def __hash__(self) -> int:
        return hash(self.ptr)

    def __repr__(self) -> str:
        return f"<Device {self.name}: {self.description}>"


def devices() -> list[Device]:
    """Every device of every backend that this build has."""
    return [Device(lib.ggml_backend_dev_get(i)) for i in range(lib.ggml_backend_dev_count())]


def add_rpc_server(endpoint: str) -> list[Device]:
    """Connect to an rpc-server at host:port; its devices, which `devices()` lists from now on as RPC0, RPC1, ...

    ValueError when it is no host:port, ServerLost when nobody answers, GGMLError when it speaks another protocol or
    this build has no RPC.
    """
    registry = lib.ggml_backend_reg_by_name(b"RPC")
    if registry == ffi.NULL:
        raise GGMLError("this build has no RPC: build it with `python build.py --rpc`")
    found = lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_rpc_add_server")
    address = rpc.relay_to(endpoint)
    added = ffi.cast("ggml_backend_reg_t(*)(const char *)", found)(address.encode())
    rpc.check(address)
    if added == ffi.NULL:
        raise GGMLError(f"the RPC server at {endpoint} has no devices")
    lib.ggml_backend_register(added)
    return [Device(lib.ggml_backend_reg_dev_get(added, i)) for i in range(lib.ggml_backend_reg_dev_count(added))]


def check_server(tensor_ptr: Any) -> None:
    """ServerLost when the raw tensor's data is on an RPC server that is gone: what was read from there is no data."""
    if rpc.any_servers():
        owner = tensor_ptr if tensor_ptr.view_src == ffi.NULL else tensor_ptr.view_src
        BufferType(lib.ggml_backend_buffer_get_type(owner.buffer)).check()


def physical_cores() -> int:
    """Cores this process may use, hyper-threads not counted; what the CPU backend takes by default."""
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))


class Backend(Handle):
    """Computes graphs on one device. A CPU backend has a pool of `n_threads` threads that lives as long as it does.

    GGMLError when the device cannot be opened.
    """

    flash_attention = True  # for who builds graphs: attention as one operation, where there is one for the device

    def __init__(self, device: Device, n_threads: int | None = None) -> None:
        ptr = _open(device)
        self.device = device
        self.n_threads = 0
        pool = ffi.NULL
        if device.type == DeviceType.CPU:
            self.n_threads = n_threads or physical_cores()
            if not 1 <= self.n_threads <= lib.GGML_MAX_N_THREADS:
                lib.ggml_backend_free(ptr)
                raise GGMLError(f"n_threads must be in 1..{lib.GGML_MAX_N_THREADS}, not {self.n_threads}")
            params = ffi.new("struct ggml_threadpool_params *")
            lib.ggml_threadpool_params_init(params, self.n_threads)
            pool = lib.ggml_threadpool_new(params)
            lib.ggml_backend_cpu_set_n_threads(ptr, self.n_threads)
            lib.ggml_backend_cpu_set_threadpool(ptr, pool)
        # The flag that cancel() raises and the compute threads read; lives as long as the C side may look at it.
        self.cancel_flag = ffi.new("int *", 0)
        self.lost: list[str] = []  # why nothing can be computed any more; shared with what frees the backend
        self._own(ptr, _free_backend, ptr, pool, self.cancel_flag, self.lost)
        self._watch_flag()

    @classmethod
    def cpu(cls, n_threads: int | None = None) -> Backend:
        """A backend on the processor; `n_threads`: physical cores unless said."""
        ptr = lib.ggml_backend_dev_by_type(DeviceType.CPU)
        if ptr == ffi.NULL:
            raise GGMLError("this build has no CPU backend: build again with `python build.py`")
        return cls(Device(ptr), n_threads)

    def _watch_flag(self) -> None:
        registry = lib.ggml_backend_dev_backend_reg(self.device.ptr)
        found = lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_abort_callback")
        self.can_cancel = found != ffi.NULL
        if self.can_cancel:
            callback = ffi.addressof(lib_of("pyggml_is_cancelled"), "pyggml_is_cancelled")
            ffi.cast("ggml_backend_set_abort_callback_t", found)(self.ptr, callback, self.cancel_flag)

    def reopen(self) -> None:
        """Open the device anew, after a computation that an exception ended. Graphs and buffers stay as they are."""
        if not self.is_cpu and self._finalizer.detach():
            lib.pyggml_backend_free(self.ptr)
            ptr = _open(self.device)
            self._own(ptr, _free_backend, ptr, ffi.NULL, self.cancel_flag, self.lost)
            self._watch_flag()

    def check_usable(self) -> None:
        """DeviceLost when the device stopped working earlier."""
        if self.lost:
            raise DeviceLost(f"{self.device.name} was lost before: {self.lost[0]}")

    def supports(self, node: Any) -> bool:
        """Whether the device has a kernel for a node as it was built."""
        return bool(lib.ggml_backend_supports_op(self.ptr, node.ptr))

    def cancel(self) -> None:
        """Stop the running computation, from any thread; it raises Cancelled within one operation.

        A graph started after this is not affected; where nothing runs nothing happens.
        """
        lib.pyggml_set_flag(self.cancel_flag, 1)

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called since the last computation began."""
        return bool(self.cancel_flag[0])

    def check(self) -> None:
        """ServerLost when it computes on an RPC server that is gone."""
        self.device.check()

    @property
    def is_cpu(self) -> bool:
        return self.n_threads > 0

    @property
    def name(self) -> str:
        return _text(lib.ggml_backend_name(self.ptr))

    @property
    def buffer_type(self) -> BufferType:
        return BufferType(lib.ggml_backend_get_default_buffer_type(self.ptr))

    def __repr__(self) -> str:
        return f"<Backend {self.device.name}{' closed' if self.closed else f', {self.n_threads} threads'}>"


class SplitBackend(Backend):
    """Several backends that compute one graph: each operation runs where its weights are, by ggml's scheduler.

    What has no weights goes with its neighbours; the last one, `fallback`, is the processor, where inputs rest. It
    owns `fallback`, not the others.
    """

    def __init__(self, parts: Sequence[Backend]) -> None:
        self.parts = tuple(parts)
        self.fallback = Backend.cpu(1)
        self.ptr = parts[0].ptr
        self.device = parts[0].device
        self.n_threads = 0
        self.can_cancel = False
        self.cancel_flag = ffi.new("int *", 0)
        self.lost: list[str] = []

    @property
    def name(self) -> str:
        return "&".join(part.name for part in self.parts)

    def close(self) -> None:
        """Close the fallback; the parts are their owner's."""
        self.__dict__.pop("ptr", None)
        self.fallback.close()

    def reopen(self) -> None:
        """A scheduler holds on to what it was made for: what an exception ended is not computed with again."""
        self.lost.append("a computation of several devices was ended by an exception")

    def check(self) -> None:
        """ServerLost when one of the parts is on an RPC server that is gone."""
        for part in self.parts:
            part.check()

    def __repr__(self) -> str:
        return f"<SplitBackend {'&'.join(part.device.name for part in self.parts)}>"


def lib_of(name: str) -> Any:
    """The opened library that has `name`: what ffi.addressof wants."""
    for library in getattr(lib, "_opened", [lib]):
        try:
            getattr(library, name)
        except (AttributeError, ffi.error):
            continue
        return library
    raise AttributeError(name)


def _open(device: Device) -> Any:
    ptr = check_call(lib.pyggml_dev_init(device.ptr), f"opening {device.name}")
    device.check()
    if ptr == ffi.NULL:
        raise GGMLError(f"{device.name} cannot be opened: {take_log() or 'no reason given'}")
    return ptr


def _free_backend(ptr: Any, pool: Any, flag: Any, lost: list[str]) -> None:
    if not lost:  # else it may wait for ever for what it started
        lib.pyggml_backend_free(ptr)
    if pool != ffi.NULL:
        lib.ggml_threadpool_free(pool)


class Buffer(Handle):
    """A piece of a device's memory that tensors' data lies in.

    `Buffer.allocate` makes one for all tensors of a context that have none; `Buffer.from_memory` wraps memory that
    exists. The buffer keeps `owner` (a mapping, an array) alive. It cannot be closed while numpy views of it live.
    `check` is called after each computation that used it, and raises when its bytes were not what they should be.
    """

    def __init__(
        self, ptr: Any, *, owner: object = None, read_only: bool = False, check: Callable[[], None] | None = None
    ) -> None:
        self.owner = owner
        self.check = check
        self.read_only = read_only
        self.views: weakref.WeakSet[Any] = weakref.WeakSet()
        self._own(ptr, lib.ggml_backend_buffer_free, ptr)

    @classmethod
    def allocate(
        cls, context: Context, buffer_type: BufferType, *, weights: bool = False, name: str = "a context"
    ) -> Buffer | None:
        """Memory for every tensor of `context` that has no data and is no view; None when nothing is left to allocate.

        Views of tensors placed after them are completed either way. `weights=True` tells ggml's scheduler that
        operations should run where this buffer is. A device that refuses the memory in one piece is asked for several
        smaller ones, which `context.buffers` then has; the first is returned. OutOfMemory naming `name`, the number of
        tensors, bytes asked and bytes free; then no tensor points into memory that was given back.
        """
        # ggml answers NULL both when nothing is left to allocate and when an allocation failed: ask for the size first.
        n_bytes = int(lib.ggml_backend_alloc_ctx_tensors_from_buft_size(context.ptr, buffer_type.ptr))
        if n_bytes == 0:
            _complete_views(context)
            return None
        missing = [t for t in context.tensors() if t.ptr.data == ffi.NULL and t.ptr.view_src == ffi.NULL]
        take_log()
        ptr = lib.pyggml_alloc_tensors(context.ptr, buffer_type.ptr)
        if ptr == ffi.NULL:
            for tensor in missing:  # an earlier piece of the memory may have been given out, and is freed again
                tensor.ptr.data = tensor.ptr.buffer = ffi.NULL
            reason = take_log() or "no reason given"
            buffers = [] if buffer_type.is_host else cls._in_pieces(missing, buffer_type, n_bytes)
            if buffers:
                log.info("%s: %s gives %d bytes in %d pieces", name, buffer_type.name, n_bytes, len(buffers))
                context.buffers += buffers
                for buffer in buffers if weights else ():
                    lib.ggml_backend_buffer_set_usage(buffer.ptr, BufferUsage.WEIGHTS)
                _complete_views(context)
                return buffers[0]
            for tensor in context.tensors():
                if tensor.ptr.view_src != ffi.NULL and tensor.ptr.view_src.data == ffi.NULL:
                    tensor.ptr.data = tensor.ptr.buffer = ffi.NULL
            buffer_type.check()
            raise OutOfMemory(
                f"{name}: {buffer_type.name} could not allocate {n_bytes} bytes for {len(missing)} tensors, "
                f"{buffer_type.memory_free} bytes are free; {reason}"
            )
        buffer = cls(ptr)
        context.buffers.append(buffer)
        if weights:
            lib.ggml_backend_buffer_set_usage(buffer.ptr, BufferUsage.WEIGHTS)
        _complete_views(context)
        return buffer

    @classmethod
    def of_size(cls, buffer_type: BufferType, n_bytes: int, *, name: str = "a buffer") -> Buffer:
        """A buffer that `place` puts tensors into, such as those of a layout of its own. OutOfMemory naming `name`."""
        take_log()
        ptr = lib.pyggml_alloc_buffer(buffer_type.ptr, n_bytes)
        if ptr == ffi.NULL:
            raise OutOfMemory(
                f"{name}: {buffer_type.name} could not allocate {n_bytes} bytes, {buffer_type.memory_free} bytes are "
                f"free; {take_log() or 'no reason given'}"
            )
        return cls(ptr)

    @classmethod
    def _in_pieces(cls, tensors: Sequence[Any], buffer_type: BufferType, n_bytes: int) -> list[Buffer]:
        """Memory for tensors in ever smaller buffers, down to one for each tensor; empty when there is too little."""
        step = buffer_type.alignment
        sizes = [
            -(-int(lib.ggml_backend_buft_get_alloc_size(buffer_type.ptr, t.ptr)) // step) * step for t in tensors
        ]
        limit = n_bytes
        while limit > max(sizes):
            limit = max(limit // 2, max(sizes))
            buffers: list[Buffer] = []
            first = 0
            while first < len(tensors):
                end, size = first, 0
                while end < len(tensors) and size + sizes[end] <= limit:
                    size += sizes[end]
                    end += 1
                ptr = lib.pyggml_alloc_buffer(buffer_type.ptr, size)
                if ptr == ffi.NULL:
                    break
                buffers.append(cls(ptr))
                offset = 0
                for i in range(first, end):
                    buffers[-1]._put(tensors[i], offset)
                    offset += sizes[i]
                first = end
            if first == len(tensors):
                return buffers
            for tensor in tensors:
                tensor.ptr.data = tensor.ptr.buffer = ffi.NULL
            for buffer in buffers:
                buffer.close()
        return []

    @classmethod
    def from_memory(
        cls, device: Device, address: int, n_bytes: int, *, owner: object, largest: int = 0, read_only: bool = True,
        check: Callable[[], None] | None = None,
    ) -> Buffer:  # fmt: skip
        """A buffer of `n_bytes` that exist at `address` and belong to `owner`; `largest`: bytes of the largest tensor.

        GGMLError when the device cannot use host memory (see Device.maps_host_memory) or the address is not aligned.
        """
        if not device.maps_host_memory:
            raise GGMLError(f"{device.name} cannot use memory of the host as its own")
        if address % 32:
            raise GGMLError(f"memory at {address:#x} is not aligned to 32 bytes")
        ptr = lib.ggml_backend_dev_buffer_from_host_ptr(
            device.ptr, ffi.cast("void *", address), n_bytes, largest or n_bytes
        )
        if ptr == ffi.NULL:
            reason = take_log() or "no reason given"
            raise OutOfMemory(f"{device.name} could not take {n_bytes} bytes of host memory: {reason}")
        return cls(ptr, owner=owner, read_only=read_only, check=check)

    def place(self, tensor: Any, offset: int) -> None:
        """Point `tensor` (without data) at `offset` bytes into the buffer. GGMLError when it does not fit in there."""
        from .tensor import Tensor

        assert isinstance(tensor, Tensor)
        if tensor.has_data:
            raise GGMLError(f"{tensor!r} has data already")
        if not 0 <= offset <= self.n_bytes - tensor.n_bytes:
            raise GGMLError(f"{tensor!r}: {tensor.n_bytes} bytes at {offset} leave a buffer of {self.n_bytes}")
        self._put(tensor, offset)
        if self not in tensor.ctx.buffers:
            tensor.ctx.buffers.append(self)

    def _put(self, tensor: Any, offset: int) -> None:
        base = int(ffi.cast("uintptr_t", lib.ggml_backend_buffer_get_base(self.ptr)))
        status = lib.ggml_backend_tensor_alloc(self.ptr, tensor.ptr, ffi.cast("void *", base + offset))
        if status != 0:
            raise GGMLError(f"{tensor!r} could not be placed: {_text(lib.ggml_status_to_string(status))}")

    def holds(self, tensor_ptr: Any) -> bool:
        """True when the raw tensor's data lies in this buffer."""
        return not self.closed and bool(tensor_ptr.buffer == self.ptr)

    @property
    def n_bytes(self) -> int:
        return int(lib.ggml_backend_buffer_get_size(self.ptr))

    @property
    def is_host(self) -> bool:
        return bool(lib.ggml_backend_buffer_is_host(self.ptr))

    def close(self) -> None:
        """Free the memory. GGMLError while numpy views of it live."""
        if not self.closed and len(self.views):
            raise GGMLError(f"{len(self.views)} numpy views of this buffer are alive: drop them first")
        super().close()


def _complete_views(context: Context) -> None:
    """Give data to views whose source has been placed since they were made."""
    for tensor in context.tensors():
        source = tensor.ptr.view_src
        if source != ffi.NULL and tensor.ptr.buffer == ffi.NULL and source.buffer != ffi.NULL:
            status = lib.ggml_backend_view_init(tensor.ptr)
            if status != 0:
                raise GGMLError(f"the view {tensor.name!r} could not be completed: status {status}")
