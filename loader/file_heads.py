"""Headers of gguf and safetensors files to be written: what stands before the data, and where each tensor's data goes.

The gguf package could write such files too, but it wants the tensors or their sizes one call at a time, builds metadata
arrays of numpy scalars (seconds for a vocabulary), and is not needed for anything else. Tests compare byte for byte.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from .dtypes import GGML_TYPES, SAFETENSORS_BITS
from .errors import LoadError, quoted
from .gguf import MAGIC

ALIGNMENT: Final = 32
_TYPE_IDS: Final = {name: number for number, (name, _, _) in GGML_TYPES.items()}
_U32, _F32, _BOOL, _STRING = 4, 6, 7, 8


class Entry(NamedTuple):
    """A tensor to be written; ne fastest dimension first."""

    name: str
    ne: tuple[int, ...]
    dtype: str

    @property
    def n_elements(self) -> int:
        return math.prod(self.ne)


class Head(NamedTuple):
    """A file's header, padding included; the byte at which each tensor begins, in the order of the file; its size."""

    data: bytes
    offsets: dict[str, int]
    n_bytes: int


def n_bytes_of(entry: Entry, format: str) -> int:
    """Bytes of a tensor's data."""
    if format == "gguf":
        _, block, size = GGML_TYPES[_TYPE_IDS[entry.dtype]]
        return entry.n_elements // block * size
    return entry.n_elements * SAFETENSORS_BITS[entry.dtype] // 8


def gguf_pair(key: str, value: bool | int | float | str) -> bytes:
    """A key and its value: bool, u32, f32 or a string."""
    if isinstance(value, bool):
        return _text(key) + struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return _text(key) + struct.pack("<II", _U32, value)
    if isinstance(value, float):
        return _text(key) + struct.pack("<If", _F32, value)
    return _text(key) + struct.pack("<I", _STRING) + _text(value)


def gguf_head(entries: Sequence[Entry], pairs: Sequence[bytes]) -> Head:
    """GGUF version 3, little endian, aligned to 32; `pairs` are keys and values as the format has them."""
    infos: list[bytes] = []
    relative: dict[str, int] = {}
    at = 0
    for entry in entries:
        if len(entry.ne) > 4:
            raise LoadError("gguf has at most 4 dimensions", kind="BadShape", tensor=entry.name)
        relative[entry.name] = at
        dims = struct.pack(f"<I{len(entry.ne)}Q", len(entry.ne), *entry.ne)
        infos.append(_text(entry.name) + dims + struct.pack("<IQ", _TYPE_IDS[entry.dtype], at))
        at += _padded(n_bytes_of(entry, "gguf"))
    start = MAGIC + struct.pack("<IQQ", 3, len(entries), len(pairs))
    data = b"".join((start, *pairs, *infos))
    data += bytes(-len(data) % ALIGNMENT)
    return Head(data, {name: len(data) + offset for name, offset in relative.items()}, len(data) + at)


def safetensors_head(entries: Iterable[Entry], metadata: Mapping[str, str]) -> Head:
    """As the reference writes it: wide types first, then by name, so that all data is aligned; padded with spaces."""
    order = sorted(entries, key=lambda entry: (-_RANK[entry.dtype], entry.name))
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    relative: dict[str, int] = {}
    at = 0
    for entry in order:
        if entry.name == "__metadata__":
            raise LoadError(f"{quoted(entry.name)} can be no tensor's name in safetensors", tensor=entry.name)
        relative[entry.name] = at
        end = at + n_bytes_of(entry, "safetensors")
        table[entry.name] = {"dtype": entry.dtype, "shape": entry.ne[::-1], "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = struct.pack("<Q", len(text)) + text
    return Head(data, {name: len(data) + offset for name, offset in relative.items()}, len(data) + at)


# the reference's order of types: it sorts by this, largest first
_RANK: Final = {name: i for i, name in enumerate(SAFETENSORS_BITS)}


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _padded(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT
