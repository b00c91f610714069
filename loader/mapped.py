"""One open file of weights: read by `pread`, mapped read-only and shared, watched for changes.

The file is opened once. Headers are read from that descriptor and the mapping is made from it, so that no
other file can slip in between checking and using.
"""

from __future__ import annotations

import errno
import math
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
        self._watch = 0
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
    def mapped(self) -> bool:
        """True while this handle holds a mapping."""
        return self._map is not None

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
        shorter; no bytes are there wherever they are said to be.
        """
        fd = self.fd
        if n_bytes == 0:  # a tensor without elements may stand where the padding behind the last one was cut off
            return b""
        if offset < 0 or n_bytes < 0 or offset + n_bytes > self.n_bytes:
            raise self._short(offset, n_bytes)
        parts: list[bytes] = []
        try:
            while n_bytes:
                part = _pread(fd, min(n_bytes, 1 << 30), offset)
                if not part:
                    raise LoadError("the file became shorter", kind="WeightsChanged", path=self.path, offset=offset)
                parts.append(part)
                offset += len(part)
                n_bytes -= len(part)
        except OSError as e:
            raise LoadError(e.strerror or str(e), kind="CannotOpen", path=self.path, offset=offset) from e
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, offset: int, target: Any) -> None:
        """Fill `target`, a writable buffer, from byte `offset`. Raises `LoadError` when the file is shorter."""
        view = memoryview(target).cast("B")
        if not len(view):
            return
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
                    raise LoadError("the file became shorter", kind="WeightsChanged", path=self.path, offset=offset)
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
        twin.path, twin.identity, twin._map, twin._watch = self.path, self.identity, self._map, self._watch
        twin._fd = os.dup(self.fd)
        twin._finalizer = weakref.finalize(twin, os.close, twin._fd)
        return twin

    def map(self) -> mmap.mmap:
        """The whole file, mapped read-only and shared; the same object at every call. Raises `LoadError`,
        `ClosedError`.

        Should the file become shorter, what lay there reads as zeros, and `changed()` says so: no signal, no crash
        (not on Windows, which does not let a mapped file shrink).
        """
        if self._map is None:
            from pyggml.lib import ffi, lib

            fd = self.fd
            if os.fstat(fd).st_size < self.n_bytes:
                raise LoadError(
                    "the file became shorter since it was opened",
                    kind="WeightsChanged",
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
            self._watch = lib.pyggml_watch_pages(ffi.cast("void *", self.address), self.n_bytes)
            if self._watch:
                # Runs after the pages are unmapped. Not at exit: threads may still read then.
                weakref.finalize(self._map, lib.pyggml_unwatch_pages, self._watch).atexit = False
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
            if e.errno == errno.EFAULT:  # pages that cannot be read
                self.check()
            raise LoadError(f"madvise {advice}: {e.strerror}", kind="CannotOpen", path=self.path, offset=offset) from e
        return True

    def advise_reading(
        self, advice: Literal["sequential", "willneed", "dontneed"], offset: int = 0, n_bytes: int | None = None
    ) -> bool:
        """Tell the kernel how bytes of the file will be read, mapped or not. False where there is no such
        advice.

        "dontneed" drops them from the page cache, but for pages that somebody has mapped; see `drop_cache`.
        """
        if not hasattr(os, "posix_fadvise"):
            return False
        n = self.n_bytes - offset if n_bytes is None else n_bytes
        os.posix_fadvise(self.fd, offset, n, getattr(os, f"POSIX_FADV_{advice.upper()}"))
        return True

    def drop_cache(self, offset: int = 0, n_bytes: int | None = None) -> bool:
        """Let the system forget these bytes of the file, all unless said: they are read from the disk the next time.

        False where the system has no such advice. Pages that other processes have mapped, or that are locked, stay.
        """
        if self._map is not None:
            self.advise("dontneed", offset, n_bytes)  # else they are in use, by us
        return self.advise_reading("dontneed", offset, n_bytes)

    @property
    def remote(self) -> str | None:
        """Name of the file system when it is a network's or FUSE: "NFS", "FUSE", ...; None when it is another."""
        from pyggml.lib import ffi, lib

        name = lib.pyggml_remote_file_system(self.fd)
        return None if name == ffi.NULL else str(ffi.string(name).decode())

    def check(self) -> None:
        """LoadError (WeightsChanged) when `changed()` has something to say."""
        if what := self.changed():
            raise LoadError(
                f"a file of weights changed while it was used: {what}",
                kind="WeightsChanged",
                path=self.path,
                hint="load the model again",
            )

    def changed(self) -> str | None:
        """What is different from when the file was opened, as a sentence; None when nothing is.

        Replaced (renamed over) or unlinked is not changed: the open inode keeps its bytes. Both alter ctime
        together with the number of links, which is why ctime counts only while that number is the same.
        """
        now = _identity(os.fstat(self.fd))
        was = self.identity
        if self._watch:
            from pyggml.lib import lib

            if (lost := lib.pyggml_lost_page(self._watch)) >= 0:
                return f"from byte {lost} on it could not be read, its size was {was.size} bytes and is {now.size}"
        if now.size != was.size:
            return f"the size was {was.size} bytes and is {now.size}"
        if now.mtime_ns != was.mtime_ns:
            return "the file was written to"
        if now.ctime_ns != was.ctime_ns and now.n_links == was.n_links:
            return "the file's status changed"
        return None

    def unmap(self) -> None:
        """Drop the mapping; `map()` makes a new one."""
        self._map = None  # not mapping.close(): views and duplicates may be alive, the pages go with the last of them
        self._watch = 0

    def close(self) -> None:
        """Close the descriptor and drop the mapping; twice is fine."""
        self._finalizer()
        self.unmap()

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
    after renaming. `scale` is the tensor that the values must be multiplied by (`loader.scales`).
    """

    name: str
    ne: tuple[int, ...]
    dtype: str
    file: MappedFile
    offset: int
    n_bytes: int
    name_in_file: str
    scale: TensorInfo | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in numpy's order, slowest dimension first."""
        return self.ne[::-1]

    @property
    def n_elements(self) -> int:
        return math.prod(self.ne)


def _identity(info: os.stat_result) -> FileIdentity:
    return FileIdentity(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_nlink)


def _pread(fd: int, n_bytes: int, offset: int) -> bytes:
    if _HAS_PREAD:
        return os.pread(fd, n_bytes, offset)
    with _SEEK_LOCK:  # Windows
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, n_bytes)
