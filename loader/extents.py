"""What both formats demand of names, shapes and places of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter

from .errors import Kind, LoadError, quoted
from .limits import Limits
from .mapped import MappedFile, TensorInfo


def check_name(name: str, file: MappedFile, offset: int, limits: Limits) -> None:
    """A tensor's name is not empty, not endless, printable and encodable. Raises `LoadError` (BadText,
    LimitExceeded).
    """
    if name and len(name) <= limits.name // 4 and name.isprintable():  # no lone surrogate is printable
        return
    if not name:
        raise LoadError("a tensor's name is empty", kind="BadText", path=file.path, offset=offset, field="name")
    n_bytes = len(name.encode("utf-8", "surrogatepass"))
    if n_bytes > limits.name:
        raise LoadError(
            f"{quoted(name)} has {n_bytes} bytes, at most {limits.name} are allowed",
            kind="LimitExceeded",
            path=file.path,
            offset=offset,
            field="name",
        )
    if not name.isprintable():
        raise LoadError(
            f"{quoted(name)} holds control characters or broken Unicode",
            kind="BadText",
            path=file.path,
            offset=offset,
            field="name",
        )


def shape_problem(dims: Sequence[int], n_bytes: int, n_elements: int, limits: Limits) -> tuple[Kind, str] | None:
    """What is wrong with a shape whose type takes `n_bytes` per `n_elements`; None when it is sound.

    A zero dimension counts as one here: a product must not decide by being zero whether it is looked at.
    """
    n = 1
    for d in dims:
        n *= d or 1
    if n <= limits.dim and (not dims or min(dims) >= 0):  # then no single dimension is too large either
        return None
    shape = list(dims)
    if any(not 0 <= d < 1 << 63 for d in dims):
        return "BadShape", f"shape {shape} is out of range"
    if n * n_bytes // n_elements > 1 << 62:
        return ("BadShape" if 0 in dims else "Overflow"), f"shape {shape} has more bytes than 64 bits can count"
    if max(dims) > limits.dim:
        return "BadShape", f"shape {shape} has a dimension over {limits.dim}"
    return None


def check_extents(
    tensors: Iterable[TensorInfo], file: MappedFile, data_offset: int, alignment: int, limits: Limits
) -> None:
    """Tensors lie inside the file, one after the other, with nothing between them but padding to `alignment`.

    Raises `LoadError`: TruncatedFile, OutOfBounds, Gap, Overlap, TrailingBytes.
    """
    size = file.n_bytes
    end = expected = data_offset
    previous: TensorInfo | None = None
    for tensor in sorted(tensors, key=attrgetter("offset", "n_bytes")):
        offset, n_bytes = tensor.offset, tensor.n_bytes
        if n_bytes == 0:
            if offset > max(size, expected):
                raise _misplaced("OutOfBounds", tensor, f"begins behind the file's end at {size}")
            continue
        if offset + n_bytes > size:
            raise LoadError(
                f"its {n_bytes} bytes end at {offset + n_bytes}, the file at {size}",
                kind="TruncatedFile",
                path=file.path,
                tensor=tensor.name,
                offset=offset,
                hint="is the download complete?",
            )
        if offset != expected:
            after = "" if previous is None else f" of tensor {quoted(previous.name)}"
            if offset < end:
                raise _misplaced("Overlap", tensor, f"begins before the end{after} at {end}")
            if offset > expected:
                raise _misplaced("Gap", tensor, f"begins {offset - end} bytes behind the end{after} at {end}")
        end = offset + n_bytes
        expected = -(-end // alignment) * alignment
        previous = tensor
    if size > expected and not limits.trailing_bytes:
        raise LoadError(
            f"{size - end} bytes follow the last tensor",
            kind="TrailingBytes",
            path=file.path,
            offset=end,
            hint="Limits(trailing_bytes=True) accepts them",
        )


def _misplaced(kind: Kind, tensor: TensorInfo, message: str) -> LoadError:
    return LoadError(message, kind=kind, path=tensor.file.path, tensor=tensor.name, offset=tensor.offset)
