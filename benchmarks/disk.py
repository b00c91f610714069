"""What this process has had from the disk, by the counts of Linux; for the benchmarks beside this file."""

from __future__ import annotations

from pathlib import Path


def disk_bytes() -> int:
    """Bytes that were read from a disk for it."""
    rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(rows["read_bytes"])


def computing_faults() -> int:
    """Major faults of all threads but the one that reads ahead: it is there to have them."""
    n = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
        except OSError:  # it has ended since
            continue
        if not name.startswith("pyggml weights"):
            n += int(rest.split()[9])
    return n
