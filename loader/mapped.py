"""One open file of weights: read by `pread`, mapped read-only and shared, watched for changes.

The file is opened once. Headers are read from that descriptor and the mapping is made from it, so that no
other file can slip in between checking and using.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import sys
import threading
import weakref
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from pyggml.errors import ClosedError

from .errors import LoadError

Advice: TypeAlias = Literal["normal", "sequential", "random", "willneed", "dontneed", "populate_read"]

_HAS_PREAD: Final = hasattr(os, "pread")
_HAS_PREADV: Final = hasattr(os, "preadv")
_SEEK_LOCK: Final = threading.Lock()


class FileIdentity(NamedTuple):
    """What `fstat` said when the file was opened; `ctime_ns` and `n_links` are compared together, see
    `changed`.
    """

    dev: int
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int
    n_links: int


class MappedFile:
    """A regular, non-empty file, open for reading; mapped when first asked for.

    `close()` may be called at any time and as often as one likes: it closes the descriptor and drops the
    mapping. Views that somebody still holds stay valid, the pages go with the last of them. A raw address
    (`address`) pins nothing: whoever gives it to C keeps the `view()` as long as C may read.

    Raises `LoadError` (CannotOpen, TruncatedFile) when the file cannot be opened, is not regular or is empty.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        if not isinstance(self.path, str):
            raise TypeError(f"path must be str, not {type(self.path).__name__}")
        if "\0" in self.path:
            raise LoadError("a path cannot hold a NUL", kind="UnsafePath", path=self.path)
        # O_NONBLOCK: opening a FIFO must not wait for a writer; it changes nothing for regular files
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            fd = os.open(self.path, flags)
        except OSError as e:
            hint = "is the path right?" if e.errno == errno.ENOENT else None
            raise LoadError(e.strerror or str(e), kind="CannotOpen", path=self.path, hint=hint) from e
        self._finalizer = weakref.finalize(self, os.close, fd)
        self._fd = fd
        self._map: mmap.mmap | None = None
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise LoadError("not a regular file", kind="CannotOpen", path=self.path)
            if info.st_size == 0:
                raise LoadError("the file is empty", kind="TruncatedFile", path=self.path, offset=0)
            self.identity = _identity(info)
        except BaseException:
            self.close()
            raise

    @property
    def n_bytes(self) -> int:
        """Size of the file when it was opened."""
        return self.identity.size

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    @property
    def fd(self) -> int:
        """The descriptor, for advice to the kernel. Raises `ClosedError` after close()."""
        if self.closed:
            raise ClosedError(f"{self.path}: the file was closed")
        return self._fd

    def read_at(self, offset: int, n_bytes: int) -> bytes:
        """Exactly `n_bytes` from byte `offset`, into memory of our own. Raises `LoadError` when the file is
        shorter.
        """
        fd = self.fd
        if offset < 0 or n_bytes < 0 or offset + n_bytes > self.n_bytes:
            raise self._short(offset, n_bytes)
        parts: list[bytes] = []
        try:
            while n_bytes:
                part = _pread(fd, min(n_bytes, 1 << 30), offset)
                if not part:
                    raise LoadError("the file became shorter", kind="TruncatedFile", path=self.path, offset=offset)
                parts.append(part)
                offset += len(part)
                n_bytes -= len(part)
        except OSError as e:
            raise LoadError(e.strerror or str(e), kind="CannotOpen", path=self.path, offset=offset) from e
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, offset: int, target: Any) -> None:
        """Fill `target`, a writable buffer, from byte `offset`. Raises `LoadError` when the file is shorter."""
        view = memoryview(target).cast("B")
        if not _HAS_PREADV:
            view[:] = self.read_at(offset, len(view))
            return
        fd = self.fd
        if offset < 0 or offset + len(view) > self.n_bytes:
            raise self._short(offset, len(view))
        try:
            while len(view):
                n = os.preadv(fd, [view[: 1 << 30]], offset)
                if not n:
                    raise LoadError("the file became shorter", kind="TruncatedFile", path=self.path, offset=offset)
                view = view[n:]
                offset += n
        except OSError as e:
            raise LoadError(e.strerror or str(e), kind="CannotOpen", path=self.path, offset=offset) from e

    def _short(self, offset: int, n_bytes: int) -> LoadError:
        message = f"{n_bytes} bytes are wanted, the file ends at byte {self.n_bytes}"
        return LoadError(message, kind="TruncatedFile", path=self.path, offset=offset)

    def duplicate(self) -> MappedFile:
        """A second handle to the same open file, and to its mapping if there is one, with a life of its own."""
        twin = MappedFile.__new__(MappedFile)
        twin.path, twin.identity, twin._map = self.path, self.identity, self._map
        twin._fd = os.dup(self.fd)
        twin._finalizer = weakref.finalize(twin, os.close, twin._fd)
        return twin

    def map(self) -> mmap.mmap:
        """The whole file, mapped read-only and shared; the same object at every call. Raises `LoadError`,
        `ClosedError`.
        """
        if self._map is None:
            fd = self.fd
            if os.fstat(fd).st_size < self.n_bytes:
                raise LoadError(
                    "the file became shorter since it was opened",
                    kind="TruncatedFile",
                    path=self.path,
                    offset=0,
                )
            if self.n_bytes > sys.maxsize:
                raise LoadError(
                    f"{self.n_bytes} bytes do not fit into this machine's address space",
                    kind="CannotOpen",
                    path=self.path,
                    hint="use a 64-bit Python, or --no-mmap",
                )
            try:
                self._map = mmap.mmap(fd, self.n_bytes, access=mmap.ACCESS_READ)
            except (OSError, OverflowError) as e:
                raise LoadError(
                    f"cannot be mapped: {e}",
                    kind="CannotOpen",
                    path=self.path,
                    hint="--no-mmap reads it instead",
                ) from e
        return self._map

    def view(self, offset: int = 0, n_bytes: int | None = None) -> memoryview:
        """Bytes of the mapping, read-only, without a copy; the view keeps the pages mapped."""
        end = self.n_bytes if n_bytes is None else offset + n_bytes
        if not 0 <= offset <= end <= self.n_bytes:
            raise LoadError(f"no bytes {offset} to {end} here", kind="OutOfBounds", path=self.path, offset=offset)
        return memoryview(self.map())[offset:end]

    @property
    def address(self) -> int:
        """Where byte 0 of the mapping is, for C; page-aligned. It pins nothing: keep a `view()`."""
        import numpy as np

        return int(np.frombuffer(self.map(), np.uint8, 1).ctypes.data)

    def advise(self, advice: Advice, offset: int = 0, n_bytes: int | None = None) -> bool:
        """Tell the kernel how bytes of the mapping will be used. False where this system has no such advice.

        Whole pages only: a page that the range covers in part is included, except for "dontneed", which
        leaves it.
        """
        option = getattr(
            mmap,
            f"MADV_{advice.upper()}",
            22 if advice == "populate_read" and sys.platform == "linux" else None,
        )
        mapping = self.map()
        if option is None or not hasattr(mapping, "madvise"):
            return False
        end = self.n_bytes if n_bytes is None else min(offset + n_bytes, self.n_bytes)
        page = mmap.PAGESIZE
        if advice == "dontneed":
            offset = -(-offset // page) * page
            end = end if end == self.n_bytes else end // page * page
        else:
            offset = offset // page * page
        if offset >= end:
            return True
        try:
            mapping.madvise(option, offset, end - offset)
        except OSError as e:
            if e.errno == errno.EINVAL:  # an older kernel
                return False
            raise LoadError(f"madvise {advice}: {e.strerror}", kind="CannotOpen", path=self.path, offset=offset) from e
        return True

    def changed(self) -> str | None:
        """What is different from when the file was opened, as a sentence; None when nothing is.

        Replaced (renamed over) or unlinked is not changed: the open inode keeps its bytes. Both alter ctime
        together with the number of links, which is why ctime counts only while that number is the same.
        """
        now = _identity(os.fstat(self.fd))
        was = self.identity
        if now.size != was.size:
            return f"the size was {was.size} bytes and is {now.size}"
        if now.mtime_ns != was.mtime_ns:
            return "the file was written to"
        if now.ctime_ns != was.ctime_ns and now.n_links == was.n_links:
            return "the file's status changed"
        return None

    def close(self) -> None:
        """Close the descriptor and drop the mapping; twice is fine."""
        self._finalizer()
        self._map = None  # not mapping.close(): views and duplicates may be alive, the pages go with the last of them

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "mapped" if self._map is not None else "open"
        return f"MappedFile({self.path!r}, {self.n_bytes} bytes, {state})"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor is and what it is; no data.

    `ne` is the shape in ggml's order, fastest dimension first, with as many dimensions as the file gives
    (safetensors: up to 8). `dtype` is ggml's type name ("F16", "Q4_K") or, for what ggml does not have,
    safetensors' ("F8_E4M3", "U8"). `offset` is from the start of the file. `name_in_file` differs from `name`
    after renaming.
    """

    name: str
    ne: tuple[int, ...]
    dtype: str
    file: MappedFile
    offset: int
    n_bytes: int
    name_in_file: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in numpy's order, slowest dimension first."""
        return self.ne[::-1]

    @property
    def n_elements(self) -> int:
        n = 1
        for d in self.ne:
            n *= d
        return n


def _identity(info: os.stat_result) -> FileIdentity:
    return FileIdentity(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_nlink)


def _pread(fd: int, n_bytes: int, offset: int) -> bytes:
    if _HAS_PREAD:
        return os.pread(fd, n_bytes, offset)
    with _SEEK_LOCK:  # Windows
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, n_bytes)
