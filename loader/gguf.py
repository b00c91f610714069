"""GGUF, version 2 and 3, little endian: a strict reader of the header.

Everything that a file claims is compared with what it holds before it is believed: counts and lengths with
the bytes that are left, extents with the size of the file. Python's integers do not wrap, so a product that
overflows 64 bits is seen as what it is. Written from the format's description (ggml's docs/gguf.md).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeAlias, TypeVar, overload

from .collector import collector_paused
from .dtypes import GGML_REMOVED_TYPES, GGML_TYPES
from .errors import Kind, LoadError, quoted
from .extents import check_extents, check_name, shape_problem
from .limits import DEFAULT_LIMITS, Limits
from .mapped import MappedFile, TensorInfo

MAGIC: Final = b"GGUF"
_LEGACY: Final = {b"lmgg": "GGML", b"fmgg": "GGMF", b"tjgg": "GGJT", b"algg": "GGLA"}

_BOOL, _STRING, _ARRAY = 7, 8, 9
# value type -> (name, struct code); what is not here is a bool, a string, an array, or unknown
_SCALARS: Final = {
    0: ("u8", "B"),
    1: ("i8", "b"),
    2: ("u16", "H"),
    3: ("i16", "h"),
    4: ("u32", "I"),
    5: ("i32", "i"),
    6: ("f32", "f"),
    10: ("u64", "Q"),
    11: ("i64", "q"),
    12: ("f64", "d"),
}
_TYPE_NAMES: Final = {t: name for t, (name, _) in _SCALARS.items()} | {_BOOL: "bool", _STRING: "str", _ARRAY: "array"}
_SCALAR_STRUCTS: Final = {t: struct.Struct("<" + code) for t, (_, code) in _SCALARS.items()}
_ELEMENT_SIZE: Final = {t: s.size for t, s in _SCALAR_STRUCTS.items()} | {_BOOL: 1}
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_KEY_MIN: Final = 8 + 1 + 4 + 1  # length, a character, type, a byte of value
_INFO_MIN: Final = 8 + 1 + 4 + 4 + 8  # length, a character, rank, type, offset
_WINDOW: Final = 1 << 18

_DIMS: Final = [struct.Struct(f"<{rank}Q") for rank in range(9)]
_TYPE_AND_OFFSET: Final = struct.Struct("<IQ")

T = TypeVar("T", bool, int, float, str)


class GGUFArray(Sequence[T], Generic[T]):
    """An array of the metadata, decoded when it is first looked at.

    `type` is the element's type ("u32", "str", ...); `n_bytes` what it takes in the file, from byte `offset`.
    Text is UTF-8, checked when decoded. Raises `LoadError` (BadText, BadValue) at the first look,
    `ClosedError` when the file was closed before it.
    """

    __slots__ = ("_file", "_n", "_type_id", "_values", "key", "n_bytes", "offset", "type")

    def __init__(self, file: MappedFile, key: str, type_id: int, n: int, offset: int, n_bytes: int) -> None:
        self.key = key
        self.type = _TYPE_NAMES[type_id]
        self.offset = offset
        self.n_bytes = n_bytes
        self._file = file
        self._type_id = type_id
        self._n = n
        self._values: list[T] | None = None

    def tolist(self) -> list[T]:
        """The values; one list, kept: treat it as read-only."""
        if self._values is None:
            data = self._file.read_at(self.offset, self.n_bytes)
            self._values = self._decode(data)
        return self._values

    def _decode(self, data: bytes) -> list[T]:
        values: list[object]
        if self._type_id == _STRING:
            values = []
            append = values.append
            unpack = _U64.unpack_from
            i = 0
            try:
                for _ in range(self._n):
                    start = i + 8
                    i = start + unpack(data, i)[0]
                    append(str(data[start:i], "utf-8"))
            except (UnicodeDecodeError, struct.error) as e:
                raise LoadError(
                    f"element {len(values)} of {quoted(self.key)} is not UTF-8",
                    kind="BadText",
                    path=self._file.path,
                    offset=self.offset + i,
                    field=self.type,
                ) from e
            if i != len(data):
                raise LoadError("the array changed", path=self._file.path, offset=self.offset + i, field=self.key)
        elif self._type_id == _BOOL:
            if data.strip(b"\0\1"):
                raise LoadError(
                    f"{quoted(self.key)} holds a bool that is neither 0 nor 1", path=self._file.path, offset=self.offset
                )
            values = [b != 0 for b in data]
        else:
            values = list(struct.unpack(f"<{self._n}{_SCALARS[self._type_id][1]}", data))
        return values  # type: ignore[return-value]

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        return self.tolist()[index]

    def __iter__(self) -> Iterator[T]:
        return iter(self.tolist())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, GGUFArray):
            return self.tolist() == other.tolist()
        return isinstance(other, list) and self.tolist() == other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{self.type}[{self._n}]"


Value: TypeAlias = bool | int | float | str | GGUFArray[bool] | GGUFArray[int] | GGUFArray[float] | GGUFArray[str]


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What a GGUF file says about itself; `data_offset` is the byte at which tensor data may begin, `pairs` the bytes,
    (begin, end), of each key with its value.
    """

    version: int
    alignment: int
    metadata: Mapping[str, Value]
    tensors: dict[str, TensorInfo]
    data_offset: int
    pairs: Mapping[str, tuple[int, int]]


def read_gguf(file: MappedFile, limits: Limits = DEFAULT_LIMITS) -> GGUFHeader:
    """Read and check the header of an open GGUF file. Touches no tensor data. Raises `LoadError`."""
    with collector_paused():
        return _Reader(file, limits).header()


class _Reader:
    """A position in the file and a window of its bytes; all reading goes through `take` and the window's
    refill.
    """

    def __init__(self, file: MappedFile, limits: Limits) -> None:
        self.file = file
        self.limits = limits
        self.size = file.n_bytes
        self.data = b""
        self.base = 0  # file offset of data[0]
        self.i = 0  # position in data
        # where general.alignment stands, and the type that it is stored as
        self.alignment_offset = self.alignment_type = 0

    @property
    def offset(self) -> int:
        return self.base + self.i

    @property
    def left(self) -> int:
        return self.size - self.base - self.i

    def fail(
        self,
        kind: Kind,
        message: str,
        *,
        field: str | None = None,
        tensor: str | None = None,
        offset: int | None = None,
        hint: str | None = None,
    ) -> LoadError:
        at = self.offset if offset is None else offset
        return LoadError(message, kind=kind, path=self.file.path, tensor=tensor, offset=at, field=field, hint=hint)

    def need(self, n: int, field: str) -> int:
        """Make `n` bytes available from the position on; returns the index of the first in `data`."""
        if self.i + n > len(self.data):
            if n > self.left:
                raise self.fail("TruncatedFile", f"{n} bytes are needed, {self.left} are left", field=field)
            at = self.offset
            if at + n > self.limits.gguf_header:
                raise self.fail(
                    "LimitExceeded", f"the header is larger than {self.limits.gguf_header} bytes", field=field
                )
            self.data = self.file.read_at(at, min(max(n, _WINDOW), self.left))
            self.base, self.i = at, 0
        return self.i

    def u32(self, field: str) -> int:
        i = self.need(4, field)
        self.i = i + 4
        return int(_U32.unpack_from(self.data, i)[0])

    def u64(self, field: str) -> int:
        i = self.need(8, field)
        self.i = i + 8
        return int(_U64.unpack_from(self.data, i)[0])

    def skip(self, n: int) -> None:
        """Move on by `n` bytes that are known to be in the file."""
        self.i += n
        if self.i > len(self.data):
            self.base += self.i
            self.data, self.i = b"", 0
        if self.offset > self.limits.gguf_header:
            raise self.fail("LimitExceeded", f"the header is larger than {self.limits.gguf_header} bytes")

    def text(self, field: str, cap: int, *, present: bool = True) -> str:
        """A string; one that is too long is an unfinished file when it is not all there, unless `present` is
        False.
        """
        at = self.offset
        n = self.u64(field)
        if n >= 1 << 63 or (n > cap and (n <= self.left or not present)):
            raise self.fail(
                "LimitExceeded", f"a length of {n} bytes, at most {cap} are allowed", field=field, offset=at
            )
        i = self.need(n, field)
        self.i = i + n
        try:
            return self.data[i : i + n].decode()
        except UnicodeDecodeError as e:
            raise self.fail("BadText", f"not UTF-8: {self.data[i : i + 40]!r}", field=field, offset=at) from e

    def header(self) -> GGUFHeader:
        version = self.version()
        n_tensors = self.count("number of tensors", self.limits.n_tensors, _INFO_MIN)
        n_keys = self.count("number of keys", self.limits.n_keys, _KEY_MIN)
        metadata: dict[str, Value] = {}
        pairs: dict[str, tuple[int, int]] = {}
        for _ in range(n_keys):
            at = self.offset
            key = self.key()
            if key in metadata:
                raise self.fail("DuplicateKey", f"{quoted(key)} stands here twice", field="key", offset=at)
            metadata[key] = self.value(key)
            pairs[key] = (at, self.offset)
        alignment = self.alignment(metadata)
        infos = [self.tensor_info(alignment) for _ in range(n_tensors)]
        data_offset = -(-self.offset // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, ne, dtype, n_bytes, relative, at in infos:
            if name in tensors:
                raise self.fail("DuplicateTensor", "two tensors have this name", tensor=name, offset=at)
            tensors[name] = TensorInfo(name, ne, dtype, self.file, data_offset + relative, n_bytes, name)
        check_extents(tensors.values(), self.file, data_offset, alignment, self.limits)
        return GGUFHeader(version, alignment, metadata, tensors, data_offset, pairs)

    def version(self) -> int:
        i = self.need(4, "magic")
        magic = self.data[i : i + 4]
        if magic != MAGIC:
            if magic in _LEGACY:
                raise self.fail(
                    "BadMagic",
                    f"this is a file of the old {_LEGACY[magic]} format, not GGUF",
                    field="magic",
                    hint="convert it to GGUF",
                )
            raise self.fail("BadMagic", f"not a GGUF file: it begins with {magic!r}", field="magic")
        self.i += 4
        at = self.offset
        version = self.u32("version")
        if version & 0xFFFF == 0 and version:
            raise self.fail(
                "WrongEndianness",
                "this GGUF file is big endian",
                field="version",
                offset=at,
                hint="convert it with gguf-convert-endian",
            )
        if version not in (2, 3):
            raise self.fail(
                "UnsupportedVersion", f"GGUF version {version}; versions 2 and 3 are read", field="version", offset=at
            )
        return version

    def count(self, field: str, limit: int, n_bytes_each: int) -> int:
        at = self.offset
        n = self.u64(field)
        if n > limit:
            raise self.fail("LimitExceeded", f"{n}, at most {limit} are allowed", field=field, offset=at)
        if n * n_bytes_each > self.left:
            raise self.fail(
                "TruncatedFile",
                f"{n} of them need {n * n_bytes_each} bytes or more, {self.left} are left",
                field=field,
                offset=at,
            )
        return n

    def key(self) -> str:
        at = self.offset
        key = self.text("key", self.limits.key)
        if not key:
            raise self.fail("BadText", "the key is empty", field="key", offset=at)
        if not (key.isascii() and key.isprintable()):
            raise self.fail("BadText", f"{quoted(key)} is not printable ASCII", field="key", offset=at)
        return key

    def value(self, key: str) -> Value:
        where = self.offset
        type_id = self.u32("value type")
        if key == "general.alignment":
            self.alignment_offset, self.alignment_type = where, type_id
        if type_id in _SCALAR_STRUCTS:
            number = _SCALAR_STRUCTS[type_id]
            i = self.need(number.size, "value")
            self.i = i + number.size
            value: int | float = number.unpack_from(self.data, i)[0]
            return value
        if type_id == _STRING:
            return self.text("value", self.limits.string)
        if type_id == _BOOL:
            i = self.need(1, "value")
            self.i = i + 1
            if self.data[i] > 1:
                raise self.fail(
                    "BadValue", f"{quoted(key)} is a bool of {self.data[i]}", field="value", offset=where + 4
                )
            return self.data[i] == 1
        if type_id == _ARRAY:
            return self.array(key)
        raise self.fail("BadType", f"{quoted(key)} is of unknown type {type_id}", field="value type", offset=where)

    def array(self, key: str) -> Value:
        at = self.offset
        type_id = self.u32("element type")
        if type_id == _ARRAY:
            raise self.fail("BadType", f"{quoted(key)} is an array of arrays", field="element type", offset=at)
        if type_id != _STRING and type_id not in _ELEMENT_SIZE:
            raise self.fail(
                "BadType", f"{quoted(key)} is an array of unknown type {type_id}", field="element type", offset=at
            )
        n = self.u64("array length")
        n_min = n * _ELEMENT_SIZE.get(type_id, 8)
        if n_min > self.left:
            raise self.fail(
                "TruncatedFile",
                f"{quoted(key)} claims {n} elements of {n_min} bytes or more together, {self.left} are left",
                field="array length",
                offset=at + 4,
            )
        start = self.offset
        if type_id == _STRING:
            self.skip_strings(n, key)
        else:
            self.skip(n_min)
        array: GGUFArray[str] = GGUFArray(self.file, key, type_id, n, start, self.offset - start)
        if array.n_bytes <= 1024:
            array.tolist()  # small ones are checked now and outlive the file
        return array

    def skip_strings(self, n: int, key: str) -> None:
        """Walk over `n` strings by their lengths; a vocabulary has 150,000, so this loop is kept tight."""
        unpack = _U64.unpack_from
        cap = self.limits.string
        data, i = self.data, self.i
        end = len(data) - 8
        for _ in range(n):
            if i > end:
                self.skip(i - self.i)
                self.need(8, key)
                data, i = self.data, self.i
                end = len(data) - 8
            length = unpack(data, i)[0]
            i += 8 + length
            if length > cap or self.base + i > self.size:
                self.i = i - 8 - length
                if length >= 1 << 63 or self.base + i <= self.size:
                    raise self.fail(
                        "LimitExceeded", f"a string of {length} bytes, at most {cap} are allowed", field=key
                    )
                raise self.fail("TruncatedFile", f"a string of {length} bytes, {self.left - 8} are left", field=key)
        self.skip(i - self.i)

    def alignment(self, metadata: Mapping[str, Value]) -> int:
        if "general.alignment" not in metadata:
            return 32
        alignment = metadata["general.alignment"]
        if type(alignment) is not int or self.alignment_type != 4:
            raise self.fail("BadType", "must be a u32", field="general.alignment", offset=self.alignment_offset)
        if not 8 <= alignment <= self.limits.alignment or alignment & (alignment - 1):
            raise self.fail(
                "BadValue",
                f"{alignment} is not a power of two from 8 to {self.limits.alignment}",
                field="general.alignment",
                offset=self.alignment_offset,
            )
        return alignment

    def tensor_info(self, alignment: int) -> tuple[str, tuple[int, ...], str, int, int, int]:
        """One tensor's name, ne, type name, size in bytes, offset within the data; and the byte where this stands."""
        at = self.offset
        name = self.text("tensor name", self.limits.name, present=False)
        check_name(name, self.file, at, self.limits)
        rank = self.u32("number of dimensions")
        if rank > self.limits.gguf_rank:
            message = f"{rank} dimensions, at most {self.limits.gguf_rank} are allowed"
            raise self.fail("BadShape", message, tensor=name, offset=at)
        i = self.need(8 * rank + 12, "tensor info")
        self.i = i + 8 * rank + 12
        ne = _DIMS[rank].unpack_from(self.data, i)
        type_id, relative = _TYPE_AND_OFFSET.unpack_from(self.data, i + 8 * rank)
        if type_id not in GGML_TYPES:
            what = "removed from ggml" if type_id in GGML_REMOVED_TYPES else "unknown"
            raise self.fail("BadType", f"type {type_id} is {what}", tensor=name, offset=at)
        dtype, block, block_bytes = GGML_TYPES[type_id]
        problem = shape_problem(ne, block_bytes, block, self.limits)
        if problem:
            raise self.fail(*problem, tensor=name, offset=at)
        n = 1
        for d in ne:
            n *= d
        if block > 1 and (ne[0] if ne else 1) % block:
            message = f"rows of {ne[0] if ne else 1} elements are no multiple of {dtype}'s {block}"
            raise self.fail("BadShape", message, tensor=name, offset=at)
        if relative > self.size:
            message = f"its data begins at {relative} of a file of {self.size} bytes"
            raise self.fail("OutOfBounds", message, tensor=name, offset=at)
        if relative % alignment:
            raise self.fail("Misaligned", f"offset {relative} is no multiple of {alignment}", tensor=name, offset=at)
        return name, ne, dtype, n // block * block_bytes, relative, at
