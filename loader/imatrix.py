"""Importance matrices: how much each column of a weight matters, measured by others, for a better quantisation.

Both forms that llama.cpp's tool writes: gguf (sums of squares and counts), and the older binary one without a magic.
"""

from __future__ import annotations

import os
import struct

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Checkpoint
from .errors import LoadError, quoted
from .gguf import MAGIC, read_gguf
from .limits import DEFAULT_LIMITS
from .mapped import MappedFile

_SUMS, _COUNTS = ".in_sum2", ".counts"


def read_importance(path: str | os.PathLike[str]) -> dict[str, NDArray[np.float32]]:
    """Name of a weight -> mean square of what its columns are multiplied by, float32 [n_per_row].

    Weights that were never used are left out, as are those that are several matrices (experts). Raises `LoadError`.
    """
    with MappedFile(path) as file:
        found = _read_gguf(file) if file.read_at(0, min(4, file.n_bytes)) == MAGIC else _read_old(file)
        if not found:
            raise LoadError("holds no importance of any weight", kind="MissingTensor", path=file.path)
        for name, values in found.items():
            if not (np.isfinite(values).all() and (values >= 0).all()):
                message = "the importance holds values that are negative or not finite"
                raise LoadError(message, path=file.path, tensor=name)
        return found


def _read_gguf(file: MappedFile) -> dict[str, NDArray[np.float32]]:
    header = read_gguf(file)
    if header.metadata.get("general.type") != "imatrix":
        message = "this gguf file is no importance matrix"
        raise LoadError(message, kind="BadHeader", path=file.path, field="general.type")
    checkpoint = Checkpoint(file.path, "gguf", header.tensors, files=[file])
    found = {}
    for sums in header.tensors:
        if not sums.endswith(_SUMS):
            continue
        name = sums.removesuffix(_SUMS)
        counts = header.tensors.get(name + _COUNTS)
        if counts is None or counts.dtype != "F32" or header.tensors[sums].dtype != "F32":
            message = f"{quoted(name + _COUNTS)} is missing, or one of the two is not F32"
            raise LoadError(message, kind="MissingTensor", path=file.path, tensor=sums)
        if counts.n_elements == 1 and (count := float(checkpoint.read(counts.name).reshape(-1)[0])) > 0:
            found[name] = (checkpoint.read(sums).reshape(-1) / count).astype(np.float32)
    return found


def _read_old(file: MappedFile) -> dict[str, NDArray[np.float32]]:
    at = 0

    def take(n: int, field: str) -> bytes:
        nonlocal at
        if not 0 <= n <= file.n_bytes - at:
            message = f"{n} bytes are needed, {file.n_bytes - at} are left"
            hint = "is this an importance matrix?"
            raise LoadError(message, kind="TruncatedFile", path=file.path, offset=at, field=field, hint=hint)
        at += n
        return file.read_at(at - n, n)

    def number(field: str) -> int:
        return int(struct.unpack("<i", take(4, field))[0])

    n_entries = number("number of entries")
    if not 0 < n_entries <= DEFAULT_LIMITS.n_tensors:
        message = f"{n_entries} entries: this is no importance matrix"
        raise LoadError(message, kind="BadMagic", path=file.path, offset=0)
    found = {}
    for _ in range(n_entries):
        start = at
        length = number("length of a name")
        if length > DEFAULT_LIMITS.name:
            raise LoadError(f"a name of {length} bytes", kind="LimitExceeded", path=file.path, offset=start)
        name = take(length, "name").decode(errors="replace")
        n_calls, n_values = number("calls"), number("values")
        values = np.frombuffer(take(4 * n_values, "values"), "<f4")
        if n_calls > 0 and n_values:
            found[name] = (values / np.float32(n_calls)).astype(np.float32)
    return found
