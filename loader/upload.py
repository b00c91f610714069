"""Bytes on their way into a device's memory: reading and uploading overlap, in a bounded amount of host memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final

import numpy as np

from pyggml import Backend, Buffer, Device, Tensor
from pyggml.lib import check_call, ffi, lib

STAGE: Final = 8 << 20  # bytes of each of the two staging buffers
_ALIGNMENT: Final = 256  # of pieces in them; some devices copy aligned pieces faster

Fill = Callable[[int, memoryview], None]


def take(source: memoryview, at: int, memory: memoryview) -> None:
    """A `Fill`, with functools.partial, from bytes that exist."""
    # numpy's copy, unlike memoryview's, lets other threads run: the source may be a file that is read only now.
    np.copyto(np.frombuffer(memory, np.uint8), np.frombuffer(source, np.uint8, len(memory), at))


@dataclass
class _Stage:
    """Host memory that pieces are collected in, and what is to be done with each."""

    view: memoryview
    memory: object  # what owns it: a pinned buffer, or plain bytes
    event: Any  # recorded behind the uploads from here; NULL where the device has no events
    pieces: list[tuple[Any, int, int, int]] = field(default_factory=list)  # tensor, offset in it, offset here, bytes
    used: int = 0
    in_flight: bool = False


class Uploader:
    """Writes tensors that lie in a device's memory. While one staging buffer is uploaded, the other is filled.

    The buffers are pinned where the device has such memory. Uploads go through a backend of their own, so that they can
    run beside a computation; `finish` (or the end of a `with`) waits for them. One thread at a time.
    """

    def __init__(self, device: Device, n_bytes: int = STAGE) -> None:
        self.device = device
        self.n_bytes = 0  # put so far
        self._start = time.perf_counter()
        self.seconds = 0.0  # from here to the end of `finish`
        self._backend: Backend = device.open(1)
        self._stages = [self._make_stage(n_bytes) for _ in range(2)]

    def put(self, tensor: Tensor, offset: int, n_bytes: int, fill: Fill) -> None:
        """Write `n_bytes` at `offset` of the tensor. `fill(at, memory)` writes those from `at` bytes on.

        DeviceLost, ServerLost, OutOfMemory; and what `fill` raises.
        """
        done = 0
        while done < n_bytes:
            stage = self._stages[0]
            if stage.used >= len(stage.view):
                self._send()
                stage = self._stages[0]
            n = min(n_bytes - done, len(stage.view) - stage.used)
            fill(done, stage.view[stage.used : stage.used + n])
            stage.pieces.append((tensor.ptr, offset + done, stage.used, n))
            stage.used = -(-(stage.used + n) // _ALIGNMENT) * _ALIGNMENT
            done += n
        self.n_bytes += n_bytes

    def finish(self) -> None:
        """Wait until everything that was put has arrived."""
        self._send()
        check_call(lib.pyggml_synchronize(self._backend.ptr), f"uploading to {self.device.name}")
        for stage in self._stages:
            stage.in_flight = False
        self.seconds = time.perf_counter() - self._start

    def _send(self) -> None:
        """Start uploading what the current stage holds; then make the other one the current one, free to be filled."""
        self.device.check()  # what a server that is gone would be sent would be for nothing
        stage, other = self._stages
        what = f"uploading to {self.device.name}"
        if other.in_flight and other.event == ffi.NULL:
            check_call(lib.pyggml_synchronize(self._backend.ptr), what)  # without events: all that was started before
            other.in_flight = False
        for tensor, offset, at, n in stage.pieces:
            source = ffi.from_buffer(stage.view[at : at + n])
            check_call(lib.pyggml_tensor_set_async(self._backend.ptr, tensor, source, offset, n), what)
        if stage.pieces and stage.event != ffi.NULL:
            check_call(lib.pyggml_event_record(stage.event, self._backend.ptr), what)
        stage.in_flight = bool(stage.pieces)
        if other.in_flight:
            check_call(lib.pyggml_event_synchronize(other.event), what)
            other.in_flight = False
        other.pieces.clear()
        other.used = 0
        self._stages.reverse()

    def _make_stage(self, n_bytes: int) -> _Stage:
        event = lib.ggml_backend_event_new(self.device.ptr)
        pinned = lib.ggml_backend_dev_host_buffer_type(self.device.ptr)
        if pinned != ffi.NULL:
            ptr = check_call(lib.pyggml_alloc_buffer(pinned, n_bytes), f"pinned memory of {self.device.name}")
            if ptr != ffi.NULL:
                buffer = Buffer(ptr)
                view = memoryview(ffi.buffer(lib.ggml_backend_buffer_get_base(ptr), n_bytes)).cast("B")
                return _Stage(view, buffer, event)
        memory = bytearray(n_bytes)
        return _Stage(memoryview(memory), memory, event)

    @property
    def gb_per_second(self) -> float:
        """10^9 bytes a second, from the first byte read to the last one arrived; known after `finish`."""
        return self.n_bytes / 1e9 / max(self.seconds, 1e-9)

    def sentence(self) -> str:
        """What was done, for a log."""
        gb = self.n_bytes / 1e9
        return f"{gb:.2f} GB to {self.device.name} in {self.seconds:.2f}s ({self.gb_per_second:.2f} GB/s)"

    def close(self) -> None:
        """Give back the staging buffers; what was not finished may or may not have arrived."""
        if self._backend.closed:
            return
        lib.pyggml_synchronize(self._backend.ptr)  # they may be read still
        for stage in self._stages:
            stage.view.release()
            if stage.event != ffi.NULL:
                lib.ggml_backend_event_free(stage.event)
            if isinstance(stage.memory, Buffer):
                stage.memory.close()
        self._backend.close()

    def __enter__(self) -> Uploader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()
