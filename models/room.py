"""How much memory is left: what the system says, and what the cgroups allow that this process is in (v1 and v2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 1 << 60  # what v1 writes for "no limit" is above it
# (limits, usage, prefix of the statistics' names that include child groups)
_Files = tuple[tuple[str, ...], str, str]
_V1: _Files = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_")
_V2: _Files = (("memory.max", "memory.high"), "memory.current", "")


@dataclass(frozen=True)
class Room:
    """Bytes that can be had without pushing anything out but cached files, and what says so."""

    n_bytes: int
    source: str

    def __str__(self) -> str:
        return f"{self.n_bytes / 1e9:.2f} GB ({self.source})"


def free_memory(root: str = "/") -> Room:
    """The smallest of what is available on this machine and what each memory cgroup above us still gives.

    A cgroup counts cached pages of files as used; they are given up on demand, and so they count as free here.
    `root`: where /proc and the mount points are found, for tests.
    """
    rooms = [_available(Path(root)), *_cgroups(Path(root))]
    return min(rooms, key=lambda room: room.n_bytes)


def _available(root: Path) -> Room:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return Room(int(line.split()[1]) * 1024, "available memory")
    import psutil

    return Room(int(psutil.virtual_memory().available), "available memory")


def _cgroups(root: Path) -> Iterator[Room]:
    mounts: dict[str, tuple[str, str]] = {}
    for line in _lines(root / "proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) > 4 and kind and (kind[0] == "cgroup2" or (kind[0] == "cgroup" and "memory" in _options(kind))):
            mounts[kind[0]] = (fields[3], fields[4])
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            version, files = "cgroup", _V1
        elif number == "0" and not controllers:
            version, files = "cgroup2", _V2
        else:
            continue
        if version not in mounts:
            continue
        top, point = mounts[version]
        # A container's mount may begin at its own group; a path that is not below it is the mount itself.
        below = path[len(top.rstrip("/")) :] if f"{path}/".startswith(f"{top.rstrip('/')}/") else ""
        parts = [part for part in below.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            name = "/" + "/".join(parts[:depth])
            room = _headroom(root / point.lstrip("/") / "/".join(parts[:depth]), *files)
            if room is not None:
                yield Room(room, f"memory cgroup {name}")


def _headroom(folder: Path, limits: tuple[str, ...], usage: str, prefix: str) -> int | None:
    numbers = [int(text) for name in limits for text in _lines(folder / name)[:1] if text.isdigit()]
    used = [int(text) for text in _lines(folder / usage)[:1] if text.isdigit()]
    if not used or not numbers or min(numbers) > _UNLIMITED:
        return None
    stat = dict(line.split(maxsplit=1) for line in _lines(folder / "memory.stat") if " " in line)
    cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    return max(0, min(numbers) - max(0, used[0] - cached))


def _options(kind: list[str]) -> list[str]:
    return kind[-1].split(",")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
