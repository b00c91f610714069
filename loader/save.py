"""Write a checkpoint as one gguf or safetensors file, in other types if asked for: streamed, renamed when complete.

A piece of a tensor at a time is read, converted on several threads, measured against what it was made from, and
written; then the file is opened again with the readers that everybody uses, and every byte is compared by checksum.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import lcm, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml import Type
from pyggml.lib import lib

from .checkpoint import Checkpoint, Format, open_checkpoint
from .convert import STAGING, block_of, convert, encode, read_float32, to_float32
from .dtypes import QUANTISED
from .errors import LoadError, printable, quoted
from .file_heads import Head, n_bytes_of
from .limits import Limits
from .mapped import MappedFile, TensorInfo
from .save_metadata import head_of
from .save_plan import Output, Rule, format_of, plan_save

Change = Callable[[NDArray[np.float32]], NDArray[np.float32]]
Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class TypeSummary:
    """Tensors of one type in the file written. `error` is the root of the mean square of the differences to the
    source, by that of the source; `worst` the tensor in which it is largest.
    """

    n_tensors: int = 0
    n_bytes: int = 0
    n_converted: int = 0
    error: float = 0.0
    worst: str = ""
    worst_error: float = 0.0


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What `save_checkpoint` did. `kept`: reason -> number of tensors that kept their type."""

    path: str
    n_bytes: int
    types: dict[str, TypeSummary]
    kept: dict[str, int]
    notes: tuple[str, ...]
    seconds: float
    seconds_compared: float


@dataclass(slots=True)
class _Sums:
    error: float = 0.0
    values: float = 0.0


@dataclass(slots=True)
class _Piece:
    """Some elements of one tensor, from the source or, for a changed tensor, from `values`."""

    output: Output
    first: int
    n: int
    offset: int  # in the file to be
    n_read: int
    values: NDArray[np.float32] | None = None


@dataclass(slots=True)
class _Done:
    data: NDArray[np.uint8]
    checksum: int
    error: float = 0.0
    values: float = 0.0


def save_checkpoint(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    type: Type | None = None,
    rules: Sequence[Rule] = (),
    importance: Mapping[str, NDArray[np.float32]] | None = None,
    changes: Mapping[str, Change] | None = None,
    n_threads: int | None = None,
    progress: Progress | None = None,
) -> SaveReport:
    """Write all tensors of a checkpoint to one `.gguf` or `.safetensors` file, with their names and metadata.

    `type` is for all tensors but those that keep theirs (docs/convert.md), `rules` come first; None keeps types.
    `importance`: name -> float32 [n_per_row], for the quantised types (`loader.imatrix`). `changes`: name -> what turns
    the tensor's values, float32 in numpy's shape, into other ones of that shape; a whole tensor is in memory for that.
    `progress(phase, done, total)` counts bytes, in the phases "convert" and "compare".

    The file is written beside its place under another name, read back, compared, and renamed; an exception leaves
    nothing behind. Raises `LoadError` for what cannot be written or read, for values that a type cannot hold
    (Overflow), and for a source that changed (WeightsChanged); ValueError for a path that is one of the source's
    files; OSError, for one when the disk is full.
    """
    start = time.perf_counter()
    target = os.fspath(path)
    format = format_of(target)
    _refuse_source(checkpoint, target)
    changes = changes or {}
    if unknown := [name for name in changes if name not in checkpoint]:
        raise ValueError(f"there is no tensor {quoted(unknown[0])} to change ({len(unknown)} such names)")
    outputs = plan_save(checkpoint, format, type=type, rules=rules, changed=changes)
    notes: list[str] = []
    columns = _columns(outputs, importance, notes)
    head = head_of(checkpoint, format, outputs, type, notes)
    _check_space(target, head.n_bytes)
    n_threads = n_threads or os.cpu_count() or 1
    with _replacing(target) as (file, temporary):
        checksums, sums = _write(file, outputs, head, columns, changes, n_threads, progress)
        what = checkpoint.changed()
        if what:
            raise LoadError(what, kind="WeightsChanged", path=checkpoint.path, hint="the output was not written")
        half = time.perf_counter()
        _compare(temporary, format, outputs, head, checksums, progress)
    types, kept = _summary(outputs, format, sums)
    return SaveReport(target, head.n_bytes, types, kept, tuple(notes), half - start, time.perf_counter() - half)


def _refuse_source(checkpoint: Checkpoint, target: str) -> None:
    try:
        there = os.stat(target)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(there.st_mode):
        raise ValueError(f"{printable(target)} is a folder; give the name of a file")
    for file in checkpoint.files:
        if (there.st_dev, there.st_ino) == file.identity[:2]:
            raise ValueError(f"{printable(target)} is the source itself; write to another file")


def _columns(
    outputs: Sequence[Output], importance: Mapping[str, NDArray[np.float32]] | None, notes: list[str]
) -> dict[str, NDArray[np.float32]]:
    """Importance for each tensor that is quantised and has one. Raises LoadError when one cannot do without."""
    columns: dict[str, NDArray[np.float32]] = {}
    n_quantised = 0
    for output in outputs:
        name, ne, dtype = output.entry
        if output.copied or dtype not in QUANTISED:
            continue
        n_quantised += 1
        column = None if importance is None else importance.get(name)
        if column is not None:
            if column.shape != (ne[0],):
                message = f"the importance matrix has {column.shape[0]} columns, the tensor {ne[0]}"
                raise LoadError(message, kind="BadShape", path=output.info.file.path, tensor=name)
            columns[name] = column
        elif lib.ggml_quantize_requires_imatrix(Type[dtype]):
            raise LoadError(
                f"{dtype.lower()} cannot be made without an importance for each column",
                kind="BadType",
                path=output.info.file.path,
                tensor=name,
                hint="give an importance matrix that has it, or choose another type",
            )
    if importance is not None:
        if not columns:
            raise ValueError(f"the importance matrix fits none of the {n_quantised} tensors that are quantised")
        notes.append(f"importance known for {len(columns)} of {n_quantised} quantised tensors")
    return columns


def _check_space(target: str, n_bytes: int) -> None:
    folder = os.path.dirname(os.path.abspath(target))
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        message = f"no space: {n_bytes} bytes are to be written, {free} are free in {printable(folder)}"
        raise OSError(errno.ENOSPC, message)


@contextmanager
def _replacing(target: str) -> Iterator[tuple[Any, str]]:
    """(a file open for writing beside `target`, its name); renamed at the end, removed after an exception."""
    folder, name = os.path.split(os.path.abspath(target))
    # cut: a name may have as many bytes as the file system takes, 255 as a rule
    temporary = os.path.join(folder, f".{os.fsdecode(os.fsencode(name)[:200])}.{secrets.token_hex(4)}.part")
    try:  # from before the file is there: an interrupt may come at any line
        with open(temporary, "xb", buffering=0) as file:
            yield file, temporary
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _write(
    file: Any,
    outputs: Sequence[Output],
    head: Head,
    columns: Mapping[str, NDArray[np.float32]],
    changes: Mapping[str, Change],
    n_threads: int,
    progress: Progress | None,
) -> tuple[list[tuple[int, int, int]], dict[str, _Sums]]:
    """Write header and data. Returns (offset, length, checksum) of every piece, and the errors of each tensor."""
    checksums = [(0, len(head.data), zlib.crc32(head.data))]
    sums: dict[str, _Sums] = {}
    total = sum(output.info.n_bytes for output in outputs)
    done = 0
    end = len(head.data)
    ordered = sorted(outputs, key=lambda output: (head.offsets[output.entry.name], output.entry.n_elements))
    _put(file, 0, head.data, head.n_bytes)
    if progress:
        progress("convert", 0, total)
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="convert")
    waiting: deque[tuple[_Piece, Future[_Done]]] = deque()
    try:
        pieces = _pieces(ordered, head, changes)
        while True:
            for piece in pieces:
                column = columns.get(piece.output.entry.name)
                waiting.append((piece, pool.submit(_convert_piece, piece, column)))
                if len(waiting) > 2 * n_threads:
                    break
            if not waiting:
                break
            piece, future = waiting.popleft()
            result = future.result()
            if piece.offset > end:
                _put(file, end, bytes(piece.offset - end), head.n_bytes)
            _put(file, piece.offset, result.data, head.n_bytes)
            end = piece.offset + result.data.nbytes
            checksums.append((piece.offset, result.data.nbytes, result.checksum))
            if not piece.output.copied:
                at = sums.setdefault(piece.output.entry.name, _Sums())
                at.error += result.error
                at.values += result.values
            done += piece.n_read
            if progress:
                progress("convert", done, total)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if end < head.n_bytes:
        _put(file, end, bytes(head.n_bytes - end), head.n_bytes)
    os.fsync(file.fileno())
    _check_errors(ordered, sums)
    return checksums, sums


def _put(file: Any, offset: int, data: Any, n_bytes: int) -> None:
    """Write all of `data` at `offset`. OSError with what is missing when the disk is full."""
    view = memoryview(data).cast("B")
    try:
        file.seek(offset)
        while len(view):
            view = view[file.write(view) :]
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(e.errno, f"{e.strerror}: {offset} of {n_bytes} bytes were written") from e
        raise


def _pieces(outputs: Sequence[Output], head: Head, changes: Mapping[str, Change]) -> Iterator[_Piece]:
    """All data in the order of the file, in pieces that are whole rows, or whole blocks of both types."""
    for output in outputs:
        info, (name, ne, dtype) = output.info, output.entry
        n_elements = info.n_elements
        if not n_elements:
            continue
        source_block, source_bytes = block_of(info.dtype)
        target_block, target_bytes = block_of(dtype)
        offset = head.offsets[name]
        values = _changed(info, changes[name]) if output.changed else None
        per_row = ne[0] if ne else 1
        block = lcm(source_block, target_block)
        n = int(STAGING / (source_bytes / source_block + 12 + target_bytes / target_block))
        n = n // per_row * per_row if n >= per_row else max(1, n // block) * block
        for first in range(0, n_elements, n):
            count = min(n, n_elements - first)
            yield _Piece(
                output,
                first,
                count,
                offset + first // target_block * target_bytes,
                count // source_block * source_bytes,
                None if values is None else values[first : first + count],
            )


def _changed(info: TensorInfo, change: Change) -> NDArray[np.float32]:
    values = read_float32(info).reshape(info.shape)
    changed = np.ascontiguousarray(change(values), np.float32)
    if changed.shape != info.shape:
        raise ValueError(f"{quoted(info.name)} has shape {info.shape}, what it was changed to {changed.shape}")
    return changed.reshape(-1)


def _convert_piece(piece: _Piece, column: NDArray[np.float32] | None) -> _Done:
    """Read, convert, measure. On a thread of its own; reading, numpy and ggml let others run meanwhile."""
    output, info, dtype = piece.output, piece.output.info, piece.output.entry.dtype
    if output.copied:
        data = _read(info, piece)
        return _Done(data, zlib.crc32(data.data))
    per_row = min(output.entry.ne[0] if output.entry.ne else 1, piece.n)
    try:
        if info.dtype not in ("F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64", *QUANTISED) and info.scale is None:
            wanted = Type[dtype]  # integers
            data = convert(_read(info, piece), info, wanted, per_row)
            return _Done(data, zlib.crc32(data.data))
        values = read_float32(info, piece.first, piece.n) if piece.values is None else piece.values
        data = encode(values, Type[dtype], per_row, column)
    except OverflowError as e:
        raise LoadError(
            str(e),
            kind="Overflow",
            path=info.file.path,
            tensor=info.name_in_file,
            offset=info.offset,
            hint=f"--tensor-type-rules '^{re.escape(info.name)}$=f32' writes it as it is",
        ) from None
    error, size = _difference(values, to_float32(data, dtype))
    return _Done(data, zlib.crc32(data.data), error, size)


def _read(info: TensorInfo, piece: _Piece) -> NDArray[np.uint8]:
    block, n_bytes = block_of(info.dtype)
    raw = np.empty(piece.n // block * n_bytes, np.uint8)
    info.file.read_into(info.offset + piece.first // block * n_bytes, raw.data)
    return raw


def _difference(values: NDArray[np.float32], written: NDArray[np.float32]) -> tuple[float, float]:
    """Sums of squares: of the difference, and of the values. Values that are not finite have none if they are equal."""
    with np.errstate(invalid="ignore", over="ignore"):
        size = float(np.vdot(values, values))
        far = values - written
        error = float(np.vdot(far, far))
    if np.isfinite(error) and np.isfinite(size):
        return error, size
    finite = np.isfinite(values)
    same = np.array_equal(values[~finite], written[~finite], equal_nan=True)
    if not same or not np.isfinite(written[finite]).all():
        return float("inf"), 0.0
    v, w = values[finite].astype(np.float64), written[finite].astype(np.float64)
    return float(np.sum((v - w) ** 2)), float(np.sum(v**2))


def _check_errors(outputs: Sequence[Output], sums: Mapping[str, _Sums]) -> None:
    """A tensor that came out as noise, or not finite, is no conversion."""
    for output in outputs:
        at = sums.get(output.entry.name)
        if at is not None and not at.error <= at.values:
            raise LoadError(
                f"as {output.entry.dtype} it would be farther from itself than zeros are",
                kind="Overflow",
                path=output.info.file.path,
                tensor=output.info.name_in_file,
                hint="its values do not fit that type: choose another for it with --tensor-type-rules",
            )


def _compare(
    path: str,
    format: Format,
    outputs: Sequence[Output],
    head: Head,
    checksums: Sequence[tuple[int, int, int]],
    progress: Progress | None,
) -> None:
    """Open what was written with our own reader; compare every tensor's place and every byte. Raises LoadError."""
    with MappedFile(path) as file:
        _drop_cache(file)
        done = 0
        if progress:
            progress("compare", 0, file.n_bytes)
        for offset, n_bytes, checksum in checksums:
            if zlib.crc32(file.read_at(offset, n_bytes)) != checksum:
                message = f"{n_bytes} bytes from byte {offset} on are not what was written: is the disk sound?"
                raise LoadError(message, kind="WeightsChanged", path=path, offset=offset)
            done += n_bytes
            if progress:
                progress("compare", done, file.n_bytes)
        if progress and done < file.n_bytes:  # padding
            progress("compare", file.n_bytes, file.n_bytes)
    with open_checkpoint(path, raw=True, limits=Limits(name=1 << 20)) as written:
        found = {info.name: (info.ne, info.dtype, info.offset) for info in written.values()}
    expected = {e.name: (e.ne, e.dtype, head.offsets[e.name]) for e in (output.entry for output in outputs)}
    if found != expected:
        wrong = next(name for name in (*expected, *found) if found.get(name) != expected.get(name))
        message = f"was written as {expected.get(wrong)}, is read as {found.get(wrong)}"
        raise LoadError(message, kind="SizeMismatch", path=path, tensor=wrong)


def _drop_cache(file: MappedFile) -> None:
    """So that the disk is read, not our own memory of what was written to it."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _summary(
    outputs: Sequence[Output], format: Format, sums: Mapping[str, _Sums]
) -> tuple[dict[str, TypeSummary], dict[str, int]]:
    types: dict[str, TypeSummary] = {}
    totals: dict[str, _Sums] = {}
    kept: dict[str, int] = {}
    for output in outputs:
        entry = output.entry
        summary = types.setdefault(entry.dtype, TypeSummary())
        summary.n_tensors += 1
        summary.n_bytes += n_bytes_of(entry, format)
        if output.kept:
            kept[output.kept] = kept.get(output.kept, 0) + 1
        at = sums.get(entry.name)
        if at is None:
            continue
        summary.n_converted += 1
        total = totals.setdefault(entry.dtype, _Sums())
        total.error += at.error
        total.values += at.values
        error = sqrt(at.error / at.values) if at.values else 0.0
        if error > summary.worst_error:
            summary.worst, summary.worst_error = entry.name, error
    for dtype, total in totals.items():
        types[dtype].error = sqrt(total.error / total.values) if total.values else 0.0
    return dict(sorted(types.items(), key=lambda item: -item[1].n_bytes)), kept
