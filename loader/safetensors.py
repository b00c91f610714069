"""safetensors: a strict reader of the header.

A little-endian u64, that many bytes of JSON, then the data, without holes. Written from the format's
description; where that and the reference reader differ, see docs/loading.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .collector import collector_paused
from .dtypes import SAFETENSORS_BITS
from .errors import Kind, LoadError, quoted
from .extents import check_extents, check_name, shape_problem
from .limits import DEFAULT_LIMITS, Limits
from .mapped import MappedFile, TensorInfo
from .strict_json import parse_json


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """What a safetensors file says about itself; `data_offset` is the byte at which tensor data begins."""

    metadata: Mapping[str, str]
    tensors: dict[str, TensorInfo]
    data_offset: int


def read_safetensors(file: MappedFile, limits: Limits = DEFAULT_LIMITS) -> SafetensorsHeader:
    """Read and check the header of an open safetensors file. Touches no tensor data. Raises `LoadError`."""
    n = int.from_bytes(file.read_at(0, 8), "little")
    if n > limits.safetensors_header:
        raise LoadError(
            f"{n} bytes, at most {limits.safetensors_header} are allowed",
            kind="LimitExceeded",
            path=file.path,
            offset=0,
            field="header length",
            hint="is this a safetensors file?",
        )
    with collector_paused():
        return _parse(file, n, limits)


def _parse(file: MappedFile, n: int, limits: Limits) -> SafetensorsHeader:
    text = file.read_at(8, n)
    header = parse_json(text, file.path, 8, padding=b" ")
    data_offset = 8 + n
    if type(header) is not dict:
        raise LoadError("the header is not a JSON object", kind="BadHeader", path=file.path, offset=8)
    metadata = _metadata(header.pop("__metadata__", {}), file)
    if len(header) > limits.n_tensors:
        raise LoadError(
            f"{len(header)} tensors, at most {limits.n_tensors} are allowed",
            kind="LimitExceeded",
            path=file.path,
            offset=8,
        )
    tensors = {name: _tensor(name, entry, file, data_offset, limits) for name, entry in header.items()}
    check_extents(tensors.values(), file, data_offset, 1, limits)
    return SafetensorsHeader(metadata, tensors, data_offset)


def _metadata(entry: object, file: MappedFile) -> dict[str, str]:
    if type(entry) is dict and all(type(value) is str for value in entry.values()):
        return entry
    raise LoadError("must map strings to strings", kind="BadHeader", path=file.path, offset=8, field="__metadata__")


def _tensor(name: str, entry: Any, file: MappedFile, data_offset: int, limits: Limits) -> TensorInfo:
    check_name(name, file, 8, limits)
    if type(entry) is not dict:
        raise _fail(file, name, "BadHeader", None, "its entry is not a JSON object")
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except KeyError as e:
        raise _fail(file, name, "BadHeader", e.args[0], "missing") from None
    if len(entry) != 3:
        field = sorted(set(entry) - {"dtype", "shape", "data_offsets"})[0]
        raise _fail(file, name, "BadHeader", None, f"unknown field {quoted(field)}")
    if type(dtype) is not str or dtype not in SAFETENSORS_BITS:
        shown = quoted(dtype) if type(dtype) is str else json.dumps(dtype)[:40]
        raise _fail(file, name, "BadType", "dtype", f"{shown} is none of {', '.join(SAFETENSORS_BITS)}")
    if type(shape) is not list:
        raise _fail(file, name, "BadShape", "shape", "must be a list of integers")
    if len(shape) > limits.safetensors_rank:  # before they are multiplied: of a million the product takes hours
        message = f"{len(shape)} dimensions, at most {limits.safetensors_rank} are allowed"
        raise _fail(file, name, "BadShape", "shape", message)
    bits = n_bits = SAFETENSORS_BITS[dtype]
    for d in shape:
        if type(d) is not int:  # a bool is an int to isinstance
            raise _fail(file, name, "BadShape", "shape", "must be a list of integers")
        n_bits *= d
    problem = shape_problem(shape, bits, 8, limits)
    if problem:
        raise _fail(file, name, problem[0], "shape", problem[1])
    if type(offsets) is not list or len(offsets) != 2 or type(offsets[0]) is not int or type(offsets[1]) is not int:
        raise _fail(file, name, "BadHeader", "data_offsets", "must be two integers, begin and end")
    begin, end = offsets
    if not 0 <= begin <= end < 1 << 64:  # with more digits sums of it are no text any more
        raise _fail(file, name, "OutOfBounds", "data_offsets", f"{quoted(str(offsets))} is no range")
    if data_offset + end > file.n_bytes:
        raise LoadError(
            f"its data ends at byte {data_offset + end}, the file at {file.n_bytes}",
            kind="TruncatedFile",
            path=file.path,
            tensor=name,
            offset=data_offset + begin,
            hint="is the download complete?",
        )
    if n_bits % 8:
        raise _fail(file, name, "Misaligned", "shape", f"{shape} of {dtype} is not a whole number of bytes")
    if end - begin != n_bits // 8:
        message = f"{end - begin} bytes, but {shape} of {dtype} takes {n_bits // 8}"
        raise _fail(file, name, "SizeMismatch", "data_offsets", message)
    return TensorInfo(name, tuple(shape[::-1]), dtype, file, data_offset + begin, end - begin, name)


def _fail(file: MappedFile, tensor: str, kind: Kind, field: str | None, message: str) -> LoadError:
    return LoadError(message, kind=kind, path=file.path, tensor=tensor, offset=8, field=field)
