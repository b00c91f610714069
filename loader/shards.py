"""Files that belong together: the shards that an index names, the parts that carry a number in their names."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from .errors import Kind, LoadError, printable, quoted
from .limits import Limits
from .mapped import MappedFile
from .strict_json import parse_json_file

_PART: Final = re.compile(r"(?P<stem>.+)-(?P<i>\d{5})-of-(?P<n>\d{5})(?P<suffix>\.(gguf|safetensors))", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Index:
    """A `*.safetensors.index.json`: shards, as paths relative to its folder, and the tensors that each holds.

    `total_size` is what it says of itself, not to be relied on; `identity` its own (device, inode).
    """

    shards: dict[str, list[str]]
    shard_of: dict[str, str]
    total_size: int | None
    identity: tuple[int, int]


def read_index(path: str, limits: Limits, roots: Sequence[str | os.PathLike[str]] = ()) -> Index:
    """Read a shard index. Every shard is a file below the index's folder, or below one of `roots` after links.

    Raises `LoadError` (BadHeader, DuplicateTensor, UnsafePath, LimitExceeded, MissingFile), before opening any shard.
    """

    def fail(kind: Kind, message: str, field: str | None = None, tensor: str | None = None) -> LoadError:
        return LoadError(message, kind=kind, path=path, field=field, tensor=tensor)

    with MappedFile(path) as file:
        identity = file.identity[:2]
        try:
            table = parse_json_file(file, limits)
        except LoadError as e:
            if e.kind == "DuplicateKey":
                raise fail("DuplicateTensor", e.message) from e
            raise
    if type(table) is not dict:
        raise fail("BadHeader", "not a JSON object")
    weight_map = table.get("weight_map")
    if type(weight_map) is not dict:
        if "weight_map" not in table:
            raise fail("BadHeader", "there is no weight_map: this JSON is not a shard index", "weight_map")
        raise fail("BadHeader", "must map names of tensors to names of files", "weight_map")
    if len(weight_map) > limits.n_tensors:
        raise fail("LimitExceeded", f"{len(weight_map)} tensors, at most {limits.n_tensors} are allowed", "weight_map")
    given: dict[str, str] = {}  # a shard as it is written -> as a path
    shards: dict[str, list[str]] = {}
    shard_of: dict[str, str] = {}
    for tensor, name in weight_map.items():
        if type(name) is not str:
            raise fail("BadHeader", "its shard is not a string", "weight_map", tensor)
        if name not in given:
            if len(given) >= limits.n_shards:
                raise fail("LimitExceeded", f"more than {limits.n_shards} shards", "weight_map")
            reason = _unsafe(name)
            if reason:
                raise fail("UnsafePath", f"the shard {quoted(name)} {reason}", "weight_map", tensor)
            given[name] = os.path.normpath(name)
        shard = given[name]
        shards.setdefault(shard, []).append(tensor)
        shard_of[tensor] = shard
    if not shards:
        raise fail("BadHeader", "names no tensor at all", "weight_map")
    folder = os.path.dirname(os.path.abspath(path))
    allowed = [os.path.realpath(root) for root in (folder, *_cache_blobs(folder), *roots)]
    for shard in shards:
        real = os.path.realpath(os.path.join(folder, shard))
        if not any(real.startswith(os.path.join(root, "")) for root in allowed):
            raise fail("UnsafePath", f"the shard {quoted(shard)} is a link out of the folder, to {quoted(real)}")
    _refuse_missing([shard for shard in shards if not os.path.lexists(os.path.join(folder, shard))], path)
    metadata = table.get("metadata")
    total = metadata.get("total_size") if type(metadata) is dict else None
    return Index(shards, shard_of, total if type(total) is int else None, identity)


def sibling_parts(path: str, limits: Limits) -> list[str]:
    """All parts of a split file, in order, when `path` is named `STEM-00001-of-00003.gguf` or `.safetensors`; else [].

    Raises `LoadError` (MissingFile) naming every part that is not there.
    """
    folder, name = os.path.split(path)
    match = _PART.fullmatch(name)
    if match is None:
        return []
    i, n = int(match["i"]), int(match["n"])
    if not 1 <= i <= n:
        raise LoadError(f"its name says part {i} of {n}", path=path)
    if n > limits.n_shards:
        raise LoadError(f"{n} parts, at most {limits.n_shards} are allowed", kind="LimitExceeded", path=path)
    names = [f"{match['stem']}-{k:05d}-of-{n:05d}{match['suffix']}" for k in range(1, n + 1)]
    _refuse_missing([part for part in names if not os.path.lexists(os.path.join(folder, part))], path)
    return [os.path.join(folder, part) for part in names]


def _refuse_missing(names: Sequence[str], path: str) -> None:
    if names:
        raise LoadError(
            "missing: " + ", ".join(map(printable, names)),
            kind="MissingFile",
            path=path,
            hint="they belong in the same folder",
        )


def _unsafe(name: str) -> str | None:
    """Why the name of a shard is refused, on every system alike; None when it is not."""
    if not name.strip() or not name.isprintable():
        return "has a name that is empty or not printable"
    if "\\" in name or ":" in name:
        return "is not a plain relative path"
    if name.startswith("/"):
        return "is an absolute path"
    parts = name.split("/")
    if ".." in parts:
        return "leads out of the folder"
    if any(part != "." and part != part.rstrip(". ") for part in parts):
        return "ends in a dot or a blank, which some systems drop"
    if parts[-1] in ("", "."):
        return "is a folder"
    return None


def _cache_blobs(folder: str) -> list[str]:
    """Where the links of a Hugging Face cache point: REPO/snapshots/REVISION/... -> REPO/blobs."""
    head, middle, _ = folder.rpartition(os.sep + "snapshots" + os.sep)
    return [os.path.join(head, "blobs")] if middle else []
