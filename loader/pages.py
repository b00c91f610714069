"""Pages of memory: those of files read ahead, those of weights locked."""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Iterable, Sequence

from pyggml.lib import ffi, lib

from .errors import LoadError, printable
from .mapped import MappedFile
from .options import Hint
from .placement import Placement

log = logging.getLogger("pyggml.loader")

_PIECE = 256 << 20  # bytes of one call that waits for the disk: between two, Ctrl-C is heard


def joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, number of bytes) of ranges as those of runs of whole pages, in order."""
    page, result = mmap.PAGESIZE, list[tuple[int, int]]()
    for start, n in sorted(ranges):
        first, end = start // page * page, -(-(start + n) // page) * page
        if result and first <= sum(result[-1]):
            result[-1] = (result[-1][0], max(end, sum(result[-1])) - result[-1][0])
        elif n:
            result.append((first, end - first))
    return result


def read_ahead(file: MappedFile, placements: Sequence[Placement], hints: frozenset[Hint]) -> None:
    """Give the kernel the hints about a file; "populate" waits until what the placements need is in memory."""
    mapped = any(p.action == "map" or p.reading == "io" for p in placements)
    refused: set[Hint] = set()
    if "sequential" in hints and not (
        file.advise_reading("sequential") and (not mapped or file.advise("sequential"))
    ):
        refused.add("sequential")
    for start, n in joined((p.info.offset, p.info.n_bytes) for p in placements):
        if "willneed" in hints and not (
            file.advise("willneed", start, n) if mapped else file.advise_reading("willneed", start, n)
        ):
            refused.add("willneed")
        for at in range(start, start + n, _PIECE) if "populate" in hints and "populate" not in refused else ():
            if not mapped or not file.advise("populate_read", at, min(_PIECE, start + n - at)):
                refused.add("populate")
                break
    if refused:
        why = "this system has no such advice" if mapped else "that needs a mapping, or a system that has such advice"
        log.warning("%s: the hint %s has no effect: %s", printable(file.path), ", ".join(sorted(refused)), why)


class Lock:
    """Ranges of a component's memory that are never paged out, until `release`."""

    def __init__(self, component: str) -> None:
        self.component = component
        self.n_bytes = 0
        self._ranges: list[tuple[int, int]] = []

    def hold(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Lock ranges of (address, number of bytes), reading what is not in memory yet.

        Raises LoadError (CannotLock) with what is needed and what is allowed.
        """
        runs = joined(ranges)
        total = sum(n for _, n in runs)
        for start, n in runs:
            for at in range(start, start + n, _PIECE):
                piece = min(_PIECE, start + n - at)
                if error := lib.pyggml_lock_pages(ffi.cast("void *", at), piece):
                    raise LoadError(
                        f"{self.component}: {total} bytes cannot be locked in memory ({os.strerror(error)}); "
                        f"{_allowance(total)}",
                        kind="CannotLock",
                        hint="leave --mlock out, or raise the limit (ulimit -l, LimitMEMLOCK= of systemd)",
                    )
                self._ranges.append((at, piece))
                self.n_bytes += piece
        log.info("%s: %.2f MB locked in memory", self.component, self.n_bytes / (1 << 20))

    def release(self) -> None:
        """Unlock; twice is fine."""
        while self._ranges:
            start, n = self._ranges.pop()
            lib.pyggml_unlock_pages(ffi.cast("void *", start), n)


def _allowance(n_bytes: int) -> str:
    try:
        import resource
    except ImportError:  # Windows
        return f"needed are {n_bytes} bytes"
    locked = 0
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            locked = next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmLck:")), 0)
    except OSError:
        pass
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    had = "no limit" if limit == resource.RLIM_INFINITY else f"{limit} bytes"
    return f"needed are {n_bytes} bytes and {locked} are locked already, RLIMIT_MEMLOCK is {had}"
