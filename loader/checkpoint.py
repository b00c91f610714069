"""A checkpoint: one file, several shards, or a component's folder, as one table of tensors."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from .dtypes import NUMPY_NAMES
from .errors import LoadError, printable, quoted
from .gguf import MAGIC, read_gguf
from .limits import DEFAULT_LIMITS, Limits
from .mapped import MappedFile, TensorInfo
from .safetensors import read_safetensors
from .scales import attach_scales
from .shards import read_index, sibling_parts
from .strict_json import parse_json, read_json

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger("pyggml.loader")

Format: TypeAlias = Literal["gguf", "safetensors"]
CONFIG_KEY: Final = "pyggml.config"  # a metadata key: the config.json of a checkpoint that was written as one file
Rules: TypeAlias = Iterable[tuple["str | re.Pattern[str]", "str | None"]]

# Beginnings of files that people hand us in place of a checkpoint, and what to say.
_NOT_WEIGHTS: Final[tuple[tuple[bytes, str, str], ...]] = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself", "fetch it with: git lfs pull"),
    (b"<!DOCTYPE", "a web page", "the download went wrong: was a login or a licence asked for?"),
    (b"<!doctype", "a web page", "the download went wrong: was a login or a licence asked for?"),
    (b"<html", "a web page", "the download went wrong: was a login or a licence asked for?"),
    (b"\x89HDF", "an HDF5 file", "gguf and safetensors are read"),
    (b"\x93NUMPY", "a numpy array", "gguf and safetensors are read"),
    (b"\x89PNG", "a PNG picture", "gguf and safetensors are read"),
)
_NO_PICKLE: Final = "a file that can run code when read; it is never opened"
_CONVERT: Final = "use the safetensors version of the model, or convert it on a machine that you trust it with"


class Checkpoint(Mapping[str, TensorInfo]):
    """Tensors of one or several files, by name; no data is read until somebody asks for it.

    `metadata` is what the file says of itself (gguf keys, safetensors' `__metadata__`), `config` the config.json beside
    it, or what `pyggml convert` kept of one, or {}, `files` the open files, `warnings` what was odd but harmless. The
    checkpoint keeps its files open; `close()` closes them, also for the checkpoints made from it by `renamed` and
    `without_prefix`.
    """

    def __init__(
        self,
        path: str,
        format: Format,
        tensors: dict[str, TensorInfo],
        *,
        files: Sequence[MappedFile],
        metadata: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        warnings: Sequence[str] = (),
    ) -> None:
        self.path = path
        self.format: Format = format
        self.files = tuple(files)
        self.metadata: Mapping[str, Any] = MappingProxyType(dict(metadata or {}))
        self.config: Mapping[str, Any] = MappingProxyType(dict(config or {}))
        self.warnings = tuple(warnings)
        self._tensors = tensors

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def renamed(self, rules: Rules) -> Checkpoint:
        """The same tensors under other names. Each (regex, replacement) is applied with `re.sub`, in order, to what the
        ones before it left; a replacement of None leaves out the tensors that match. Raises `LoadError`
        (DuplicateTensor) when two tensors end under one name.
        """
        compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
        tensors: dict[str, TensorInfo] = {}
        for info in self._tensors.values():
            name = _rename(info.name, compiled)
            if name is None:
                continue
            if name in tensors:
                raise LoadError(
                    f"both {quoted(tensors[name].name_in_file)} and {quoted(info.name_in_file)} are this tensor",
                    kind="DuplicateTensor",
                    path=info.file.path,
                    tensor=name,
                    offset=info.offset,
                )
            tensors[name] = info if name == info.name else _named(info, name)
        return self._with(tensors)

    def without_prefix(self, prefix: str) -> Checkpoint:
        """The tensors under `prefix`, without it; the checkpoint as it is when no tensor has it.

        A file that holds several models names each under a prefix: the others are left out.
        """
        under = [info for info in self._tensors.values() if info.name.startswith(prefix)]
        if not under:
            return self
        if len(under) < len(self):
            log.debug("%s: %d tensors are not under '%s'", printable(self.path), len(self) - len(under), prefix)
        return self._with({info.name[len(prefix) :]: _named(info, info.name[len(prefix) :]) for info in under})

    def _with(self, tensors: dict[str, TensorInfo]) -> Checkpoint:
        return Checkpoint(
            self.path,
            self.format,
            tensors,
            files=self.files,
            metadata=self.metadata,
            config=self.config,
            warnings=self.warnings,
        )

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """A copy of one tensor, in numpy's order of dimensions. BF16 comes as float32 (exactly), as do 8-bit weights
        that have a scale, multiplied by it; quantised and other 8-bit float types as the raw bytes, uint8 of one
        dimension. `loader.convert.read_float32` has the values of every type. Raises `LoadError`, `KeyError`.
        """
        import numpy as np

        info = self[name]
        if info.scale is not None:
            from .convert import read_float32

            return read_float32(info).reshape(info.shape)
        data = info.file.read_at(info.offset, info.n_bytes)
        if info.dtype == "BF16":
            return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").reshape(info.shape)
        if info.dtype in NUMPY_NAMES:
            return np.frombuffer(bytearray(data), NUMPY_NAMES[info.dtype]).reshape(info.shape)
        return np.frombuffer(bytearray(data), np.uint8)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.n_bytes for info in self._tensors.values())

    def changed(self) -> str | None:
        """Which file changed since it was opened, and how; None when none did."""
        for file in self.files:
            what = file.changed()
            if what:
                return f"{printable(file.path)}: {what}"
        return None

    def close(self) -> None:
        """Close the files; twice is fine. Views of their mappings stay valid, see `MappedFile.close`."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({self.path!r}, {self.format}, {len(self)} tensors in {len(self.files)} files)"


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    limits: Limits = DEFAULT_LIMITS,
    roots: Sequence[str | os.PathLike[str]] = (),
    raw: bool = False,
) -> Checkpoint:
    """Open a gguf or safetensors file, one part of a split file, a shard index, or the folder of one component.

    What a file is, its bytes decide, not its name. `roots` are folders, besides the index's own, that shards may be
    links into; the blobs of a Hugging Face cache are allowed without. Scale tensors of 8-bit weights belong to their
    weight (`TensorInfo.scale`), are multiplied in when it is read, and are no tensors of their own: `raw` shows them
    as the file has them. Raises `LoadError`.
    """
    checkpoint = _open(os.fspath(path), limits, roots)
    if raw:
        return checkpoint
    try:
        return _scaled(checkpoint)
    except BaseException:
        checkpoint.close()
        raise


def _scaled(checkpoint: Checkpoint) -> Checkpoint:
    tensors, unused = attach_scales(checkpoint._tensors, checkpoint.metadata)
    if tensors is checkpoint._tensors:
        return checkpoint
    n_scaled = sum(1 for info in tensors.values() if info.scale is not None)
    n_inputs = sum(1 for info in unused if "input" in info.name)
    note = f"{n_scaled} weights have a scale, which is multiplied in when they are read"
    if n_inputs:
        note += f"; {n_inputs} scales of activations are not needed, computing is in 16 or 32 bits"
    log.info("%s: %s", printable(checkpoint.path), note)
    scaled = checkpoint._with(tensors)
    scaled.warnings = (*checkpoint.warnings, note)
    return scaled


def _open(place: str, limits: Limits, roots: Sequence[str | os.PathLike[str]]) -> Checkpoint:
    if os.path.isdir(place):
        return _open_folder(place, limits, roots)
    file = MappedFile(place)
    try:
        kind = _format(file)
        parts = [] if kind == "index" else sibling_parts(place, limits)
        if kind != "index" and not parts:
            return _open_file(file, kind, limits)
    except BaseException:
        file.close()
        raise
    file.close()
    return _open_index(place, limits, roots) if kind == "index" else _open_parts(place, parts, kind, limits)


def _open_file(file: MappedFile, kind: Format, limits: Limits) -> Checkpoint:
    tensors, metadata = _read(file, kind, limits)
    if kind == "gguf" and metadata.get("split.count", 1) not in (0, 1):
        raise LoadError(
            f"this is one part of {_named_value(metadata['split.count'])}, "
            "and its name does not say where the others are",
            kind="MissingFile",
            path=file.path,
            field="split.count",
            hint="keep the names that end in -00001-of-0000N.gguf",
        )
    return Checkpoint(file.path, kind, tensors, files=[file], metadata=metadata, config=_kept_config(metadata, file))


def _kept_config(metadata: Mapping[str, Any], file: MappedFile) -> Mapping[str, Any]:
    text = metadata.get(CONFIG_KEY)
    if text is None:
        return {}
    config = parse_json(text.encode(), file.path) if isinstance(text, str) else None
    if type(config) is not dict:
        raise LoadError("not a JSON object", kind="BadHeader", path=file.path, field=CONFIG_KEY)
    return config


def _read(file: MappedFile, kind: Format, limits: Limits) -> tuple[dict[str, TensorInfo], Mapping[str, Any]]:
    if kind == "gguf":
        gguf = read_gguf(file, limits)
        return gguf.tensors, gguf.metadata
    header = read_safetensors(file, limits)
    return header.tensors, header.metadata


def _format(file: MappedFile) -> Format | Literal["index"]:
    """What a file is by its first bytes; by its name only to choose which reader shall say what is wrong with it."""
    start = file.read_at(0, min(32, file.n_bytes))
    if start[:4] == MAGIC:
        return "gguf"
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        message = f"a zip archive, as torch.save writes: {_NO_PICKLE}"
        raise LoadError(message, kind="PickleRefused", path=file.path, offset=0, hint=_CONVERT)
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise LoadError(f"a Python pickle: {_NO_PICKLE}", kind="PickleRefused", path=file.path, offset=0, hint=_CONVERT)
    for magic, what, hint in _NOT_WEIGHTS:
        if start.startswith(magic):
            raise LoadError(f"this is {what}", kind="BadMagic", path=file.path, offset=0, hint=hint)
    name = file.path.lower()
    if name.endswith(".json"):
        return "index"
    if len(start) > 8 and start[4:8] == b"\0\0\0\0" and start[8:].lstrip()[:1] == b"{":
        return "safetensors"
    if start.lstrip()[:1] in (b"{", b"[") and not name.endswith((".safetensors", ".sft", ".gguf")):
        return "index"
    if name.endswith((".safetensors", ".sft")):
        return "safetensors"
    if name.endswith(".gguf"):
        return "gguf"
    raise LoadError(
        f"neither gguf nor safetensors: it begins with {start[:8]!r}", kind="BadMagic", path=file.path, offset=0
    )


def _open_parts(path: str, parts: Sequence[str], kind: Format, limits: Limits) -> Checkpoint:
    """Parts of a split file, which carry their number and count in their names; all of them were found."""
    files: list[MappedFile] = []
    tensors: dict[str, TensorInfo] = {}
    first: Mapping[str, Any] = {}
    try:
        for i, part in enumerate(parts):
            file = MappedFile(part)
            files.append(file)
            found, metadata = _read(file, kind, limits)
            if i == 0:
                first = metadata
            if kind == "gguf":
                for field, expected in (("split.no", i), ("split.count", len(parts))):
                    if metadata.get(field, expected) != expected:
                        raise LoadError(
                            f"{_named_value(metadata[field])}, but the file's name says {expected}",
                            path=part,
                            field=field,
                        )
            _merge(tensors, found)
        expected = first.get("split.tensors.count", len(tensors))
        if expected != len(tensors):
            raise LoadError(
                f"{_named_value(expected)} tensors are announced, the parts hold {len(tensors)}",
                kind="MissingTensor",
                path=parts[0],
                field="split.tensors.count",
            )
    except BaseException:
        for file in files:
            file.close()
        raise
    return Checkpoint(path, kind, tensors, files=files, metadata=first)


def _named_value(value: object) -> str:
    """A number of the metadata in a message; what is none may be any text."""
    return str(value) if isinstance(value, int | float) else quoted(str(value))


def _merge(tensors: dict[str, TensorInfo], more: Mapping[str, TensorInfo]) -> None:
    for name, info in more.items():
        if name in tensors:
            raise LoadError(
                f"is also in {printable(tensors[name].file.path)}",
                kind="DuplicateTensor",
                path=info.file.path,
                tensor=name,
                offset=info.offset,
            )
        tensors[name] = info


def _open_index(path: str, limits: Limits, roots: Sequence[str | os.PathLike[str]]) -> Checkpoint:
    index = read_index(path, limits, roots)
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, Any] = {}
    warnings: list[str] = []
    surplus: list[str] = []
    opened: dict[tuple[int, int], tuple[MappedFile, list[str]]] = {}  # a file that has two names is opened once
    try:
        for shard, names in index.shards.items():
            file = MappedFile(os.path.join(os.path.dirname(path), shard))
            known = opened.setdefault(file.identity[:2], (file, []))
            known[1].extend(names)
            if known[0] is not file:
                file.close()
                if known[0].path.casefold() == file.path.casefold():
                    raise LoadError(
                        f"{quoted(known[0].path)} and {quoted(shard)} are one file here",
                        kind="DuplicateTensor",
                        path=path,
                    )
            if file.identity[:2] == index.identity:
                raise LoadError(f"{quoted(shard)} is the index itself", kind="UnsafePath", path=path)
        for file, names in opened.values():
            header = read_safetensors(file, limits)
            missing = [name for name in names if name not in header.tensors]
            if missing:
                raise LoadError(
                    f"{len(missing)} tensors that the index places here are not here: "
                    + ", ".join(quoted(name) for name in missing[:5]),
                    kind="MissingTensor",
                    path=file.path,
                    tensor=missing[0],
                    hint="are index and shards of the same version?",
                )
            for name in header.tensors.keys() - set(names):
                if name in index.shard_of:
                    message = f"the index places it in {quoted(index.shard_of[name])}, and it is here too"
                    raise LoadError(message, kind="DuplicateTensor", path=file.path, tensor=name)
                surplus.append(name)
            tensors.update((name, header.tensors[name]) for name in names)
            for key, value in header.metadata.items():
                metadata.setdefault(key, value)
        config = _config(path, limits)
    except BaseException:
        for file, _ in opened.values():
            file.close()
        raise
    if surplus:
        shown = ", ".join(quoted(name) for name in sorted(surplus)[:5])
        warnings.append(f"{len(surplus)} tensors of the shards are not in the index and are ignored: {shown}")
    n_bytes = sum(info.n_bytes for info in tensors.values())
    if index.total_size not in (None, n_bytes):
        warnings.append(f"the index says {index.total_size} bytes in all, its tensors have {n_bytes}")
    for warning in warnings:
        log.warning("%s: %s", printable(path), warning)
    files = [file for file, _ in opened.values()]
    return Checkpoint(path, "safetensors", tensors, files=files, metadata=metadata, config=config, warnings=warnings)


def _open_folder(folder: str, limits: Limits, roots: Sequence[str | os.PathLike[str]]) -> Checkpoint:
    """The folder of one component, as diffusers and transformers save it."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as e:
        raise LoadError(e.strerror or str(e), kind="CannotOpen", path=folder) from e
    if "model_index.json" in names:
        parts = [name for name in names if os.path.isdir(os.path.join(folder, name))]
        raise LoadError(
            "this folder holds a whole pipeline, not one component",
            kind="CannotOpen",
            path=folder,
            hint=f"give one of its folders: {', '.join(map(printable, parts))}",
        )
    path = os.path.join(folder, _choose(folder, names, limits))
    checkpoint = _open(path, limits, roots)
    try:
        config = _config(path, limits)
    except BaseException:
        checkpoint.close()
        raise
    return Checkpoint(
        folder,
        checkpoint.format,
        dict(checkpoint),
        files=checkpoint.files,
        metadata=checkpoint.metadata,
        config=config,
        warnings=checkpoint.warnings,
    )


def _choose(folder: str, names: Sequence[str], limits: Limits) -> str:
    """The file that a folder's weights begin with: the usual names first, else the only one there is."""
    for stem in ("diffusion_pytorch_model", "model"):
        for usual in (f"{stem}.safetensors.index.json", f"{stem}.safetensors"):
            if usual in names:
                return usual
    found = [name for name in names if name.endswith(".safetensors.index.json")]
    found = found or [name for name in names if name.lower().endswith((".safetensors", ".gguf"))]
    if len(found) > 1:
        parts = {os.path.basename(part) for part in sibling_parts(os.path.join(folder, found[0]), limits)}
        found = found[:1] if parts == set(found) else found
    if len(found) == 1:
        return found[0]
    if found:
        message, hint = f"which of these? {', '.join(map(printable, found))}", "give the path of the file"
    else:
        seen = ", ".join(map(printable, names[:10])) or "nothing"
        message, hint = f"no safetensors or gguf file is here (found: {seen})", "is this the right folder?"
    raise LoadError(message, kind="MissingFile", path=folder, hint=hint)


def _config(beside: str, limits: Limits) -> Mapping[str, Any]:
    path = os.path.join(os.path.dirname(beside), "config.json")
    if not os.path.exists(path):
        return {}
    config = read_json(path, limits)
    if type(config) is not dict:
        raise LoadError("not a JSON object", kind="BadHeader", path=path, offset=0)
    return config


def _rename(name: str, rules: Sequence[tuple[re.Pattern[str], str | None]]) -> str | None:
    for pattern, replacement in rules:
        if replacement is not None:
            name = pattern.sub(replacement, name)
        elif pattern.search(name):
            return None
    return name


def _named(info: TensorInfo, name: str) -> TensorInfo:
    return TensorInfo(name, info.ne, info.dtype, info.file, info.offset, info.n_bytes, info.name_in_file, info.scale)
