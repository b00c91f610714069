"""Weights that rest in memory of the host, or in mapped files, and visit a device while it computes with them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from pyggml import Backend, Context, Tensor
from pyggml.lib import ffi, lib

from .errors import printable
from .params import Param, Weights, alloc_params_buffer
from .upload import Uploader, take

log = logging.getLogger("pyggml.loader")


class Visit:
    """A copy of weights in a device's memory. Until it is closed, their parameters have the tensors of the copy.

    `chosen`: which of the weights, all unless given. OutOfMemory when the device lacks room, LoadError (WeightsChanged)
    when a mapped file turns out to be shorter; then parameters are as they were. Weights are not to be closed, and
    graphs that use the copy not to be computed, after.
    """

    def __init__(
        self, weights: Weights, backend: Backend, chosen: Callable[[Tensor], bool] = lambda tensor: True
    ) -> None:
        name = weights.report.component
        loaded = [(p, p.tensor) for p in weights.params.values() if p.loaded]
        # What was made at the device, such as the sum of a weight and a LoRA, is there already.
        self._rest: list[tuple[Param, Tensor]] = [(p, t) for p, t in loaded if is_host(t) and chosen(t)]
        self.context = Context(len(self._rest) + 1)
        try:
            copies = [self.context.new_tensor(t.ne, t.type, t.name) for _, t in self._rest]
            alloc_params_buffer(self.context, backend.buffer_type, component=name)
            with Uploader(backend.device) as uploader:
                for i in sorted(range(len(copies)), key=lambda i: address_of(self._rest[i][1])):  # as in the file
                    source = self._rest[i][1]
                    uploader.put(copies[i], 0, source.n_bytes, partial(take, bytes_of(source)))
            for buffer in weights.context.buffers:
                if buffer.check is not None:
                    buffer.check()
        except BaseException:
            self._close_context()
            raise
        self.n_bytes, self.seconds = uploader.n_bytes, uploader.seconds
        log.info("%s: %s", printable(name), uploader.sentence())
        for (param, _), copy in zip(self._rest, copies, strict=True):
            param.tensor = copy

    @property
    def device_bytes(self) -> int:
        """What it takes of the device's memory."""
        return sum(buffer.n_bytes for buffer in self.context.buffers)

    def close(self) -> None:
        """Free the copy; parameters have their own tensors again. Twice is fine."""
        if not self.context.closed:
            for param, tensor in self._rest:
                param.tensor = tensor
            self._close_context()

    def _close_context(self) -> None:
        for buffer in self.context.buffers:
            buffer.close()
        self.context.buffers.clear()
        self.context.close()


def is_host(tensor: Tensor) -> bool:
    """Whether its data is in memory of the host."""
    return bool(lib.ggml_backend_buffer_is_host(tensor.ptr.buffer))


def address_of(tensor: Tensor) -> int:
    """Of its data."""
    return int(ffi.cast("uintptr_t", tensor.ptr.data))


def bytes_of(tensor: Tensor) -> memoryview:
    """Of its data, which is in memory of the host. ClosedError when that is gone."""
    tensor.ctx.check_open()
    return memoryview(ffi.buffer(ffi.cast("char *", tensor.ptr.data), tensor.n_bytes)).cast("B")
