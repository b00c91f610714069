"""Parameters with LoRAs merged into them: values from the file, changes added in f32, back to the parameter's type."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from math import prod
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pyggml import Buffer, BufferType, Context, ServerLost, Tensor, Type
from pyggml.backend import check_server
from pyggml.lib import ffi, lib

from .checkpoint import Checkpoint
from .convert import STAGING, encode, is_same, scaled_float32
from .errors import LoadError
from .lora import Change, add_rows
from .mapped import TensorInfo
from .params import LoadReport, Param, Weights

Changes = Mapping[str, Sequence[tuple[Change, float]]]

_PER_VALUE: Final = 16  # bytes of a value in all its forms: as read, as f32, the change's, as written


class Merged:
    """Copies of some parameters, with changes merged into them: the parameters' tensors from write() to close().

    copies: memory for them. in_place: parameters that lie in memory of ours are overwritten instead, until restore().
    Mapped ones are never written to. OutOfMemory when there is no room for the copies.
    """

    def __init__(
        self, weights: Weights, names: Iterable[str], checkpoint: Checkpoint, copies: BufferType, in_place: bool
    ) -> None:
        self.params: dict[str, Param] = {name: weights.params[name] for name in names}
        self._infos = {name: checkpoint[name] for name in self.params}
        self._originals = {name: param.tensor for name, param in self.params.items()}
        for name, tensor in self._originals.items():
            _check_type(tensor.type, self._infos[name])
        self._in_place = [name for name, t in self._originals.items() if in_place and not self._is_read_only(t)]
        copied = {name: t for name, t in self._originals.items() if name not in self._in_place}
        self.context = Context(max(len(copied), 1))
        self._tensors = dict(self._originals)
        for name, t in copied.items():
            self._tensors[name] = self.context.new_tensor(t.ne, t.type, name)
        self._allocate(copies)

    @property
    def n_bytes(self) -> int:
        """Bytes of the copies."""
        return sum(t.n_bytes for name, t in self._tensors.items() if name not in self._in_place)

    @property
    def report(self) -> LoadReport:
        """As of weights that were loaded: the copies."""
        n = len(self.params) - len(self._in_place)
        return LoadReport(
            component="merged", n_tensors=n, n_mapped=0, mapped_bytes=0, n_mapped_files=0, n_copied=n, n_converted=n,
            allocated_bytes=self.n_bytes, read_bytes=0, seconds=0.0,
        )  # fmt: skip

    def write(self, changes: Changes, check: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Give each parameter its file's values plus weight * delta for each of its changes.

        check(done, total), in bytes, is called after each piece and may raise; the values are then to be had by
        another write() or by restore(). LoadError when a value does not fit the parameter's type, or when the file
        changed since it was opened; ServerLost.
        """
        total, done = sum(t.n_bytes for t in self._tensors.values()), 0
        check(0, total)
        for name, param in self.params.items():
            for n in self._fill(name, changes[name]):
                done += n
                check(done, total)
            param.tensor = self._tensors[name]

    def _is_read_only(self, tensor: Tensor) -> bool:
        return any(b.read_only and b.ptr == tensor.ptr.buffer for b in tensor.ctx.buffers)

    def _allocate(self, memory: BufferType) -> None:
        Buffer.allocate(self.context, memory, weights=True, name="merged")

    def _fill(self, name: str, changes: Sequence[tuple[Change, float]]) -> Iterable[int]:
        """Write a tensor; yields bytes."""
        tensor, info = self._tensors[name], self._infos[name]
        pieces = merged_pieces(info, self.params[name].ne, tensor.type, changes)
        if lib.pyggml_is_repacked(tensor.ptr):  # ggml lays out a whole tensor at once
            pieces = [(0, np.concatenate([piece for _, piece in pieces]))]
        for at, piece in pieces:
            lib.ggml_backend_tensor_set(tensor.ptr, ffi.from_buffer(piece), at, piece.nbytes)
            check_server(tensor.ptr)
            yield piece.nbytes
        info.file.check()

    def restore(self) -> None:
        """Give what was overwritten its file's values. What was on a server that is gone is gone too."""
        for name in self._in_place:
            with suppress(ServerLost):
                for _ in self._fill(name, ()):
                    pass

    def close(self) -> None:
        """Give the parameters their own tensors, and free the copies."""
        for name, param in self.params.items():
            param.tensor = self._originals[name]
        for buffer in self.context.buffers:
            buffer.close()
        self.context.close()


def merged_pieces(
    info: TensorInfo, ne: Sequence[int], type: Type, changes: Sequence[tuple[Change, float]]
) -> Iterable[tuple[int, NDArray[np.uint8]]]:
    """(offset, bytes) of a tensor in `type`, changes merged in, a bounded number of rows at a time.

    `ne`: the parameter's, which the file's may differ from by dimensions of one. A vector comes in one piece.
    Rows that nothing changes keep their bytes where the file has the same type. Raises LoadError.
    """
    is_vector = len(ne) == 1
    n_rows, width = (prod(ne), 1) if is_vector else (prod(ne[1:]), ne[0])
    applied = [(change, change.delta.rows(), weight) for change, weight in changes if weight]
    ends = {0, n_rows} | {end for c, _, _ in applied if not is_vector for end in (c.at, c.at + c.n)}
    step = n_rows if is_vector else max(1, STAGING // (_PER_VALUE * width))
    for first, end in pairwise(sorted(ends)):
        here = [a for a in applied if is_vector or a[0].at <= first < a[0].at + a[0].n]
        for at in range(first, end, step):
            n = min(step, end - at)
            size = info.n_bytes // n_rows
            raw = np.frombuffer(info.file.read_at(info.offset + at * size, n * size), np.uint8)
            if here or info.scale is not None or not is_same(info.dtype, type):
                raw = _converted(raw, info, type, (n,) if is_vector else (n, width), at, here)
            yield at * (raw.nbytes // n), raw


def _converted(
    raw: NDArray[np.uint8], info: TensorInfo, type: Type, shape: tuple[int, ...], at: int, here: Sequence[Any]
) -> NDArray[np.uint8]:
    try:
        values = scaled_float32(raw, info, at * (1 if len(shape) == 1 else shape[1]))
        if here:
            values = np.array(values, np.float32).reshape(shape)
            add_rows(values, at, here)
            if not np.isfinite(values).all():
                raise OverflowError("holds values that are not finite with the LoRA merged in")
        return encode(values.reshape(-1), type, shape[-1])
    except OverflowError as error:
        raise LoadError(str(error), kind="Overflow", path=info.file.path, tensor=info.name_in_file,
                        hint="at_runtime adds it beside the weight instead") from None  # fmt: skip


def _check_type(type: Type, info: TensorInfo) -> None:
    if type.is_quantized and lib.ggml_quantize_requires_imatrix(type):
        raise LoadError(f"{type.name} cannot be written without an importance matrix, so that nothing can be merged",
                        kind="Unsupported", path=info.file.path, tensor=info.name_in_file,
                        hint="at_runtime needs no merging")  # fmt: skip
