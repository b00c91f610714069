"""What a process uses, and how long things take: the figures that a run reports."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from loader.params import LoadReport

from .streaming import VramReport

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Memory:
    """Bytes of this process: resident at its peak and now, and of what is resident now, private and from files."""

    peak_rss: int
    rss: int
    anonymous: int
    file_backed: int

    @classmethod
    def now(cls) -> Memory:
        """Read from /proc where there is one; elsewhere from psutil, which tells no kinds apart (then 0)."""
        try:
            with open("/proc/self/status", encoding="ascii", errors="replace") as file:
                rows = dict(line.split(":", 1) for line in file if ":" in line)
        except OSError:
            import psutil

            info = psutil.Process().memory_info()
            return cls(getattr(info, "peak_wset", info.rss), info.rss, 0, 0)

        def n_bytes(key: str) -> int:
            return int(rows.get(key, "0 kB").split()[0]) * 1024

        return cls(n_bytes("VmHWM"), n_bytes("VmRSS"), n_bytes("RssAnon"), n_bytes("RssFile"))


@dataclass
class Stage:
    """What graphs of one kind took together: `major_faults` are the whole process's, 0 where the system counts none."""

    runs: int = 0
    seconds: float = 0.0
    major_faults: int = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Count the `with` body as a run."""
        start, faults = time.perf_counter(), major_faults()
        try:
            yield
        finally:
            self.runs += 1
            self.seconds += time.perf_counter() - start
            self.major_faults += major_faults() - faults


def major_faults() -> int:
    """Pages that this process has had to wait for the disk for, so far; 0 where the system does not say."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_majflt


@dataclass
class Report:
    """What a run did: seconds per phase, each step's seconds, how the weights came to rest, memory. What previews
    take between the steps is a phase of its own, "preview", and part of no step.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)
    preview_seconds: list[float] = field(default_factory=list)  # each with what was done with it
    stages: dict[str, Stage] = field(default_factory=dict)  # "the transformer", ...: what was computed in the phases
    components: dict[str, LoadReport] = field(default_factory=dict)
    memory: Memory | None = None
    anonymous_peak: int = 0
    prompt_cached: bool = False
    # "decode", "encode_image" -> height and width in latent pixels of the tiles it was done in; else absent
    tiles: dict[str, tuple[int, int]] = field(default_factory=dict)
    loras: list[dict[str, Any]] = field(default_factory=list)  # as models.lora.Loras.report has them
    # component -> what it took of a device's memory, where its weights came piece by piece (models.streaming)
    vram: dict[str, VramReport] = field(default_factory=dict)
    lightning: str | None = None  # why a run had the steps, the guidance and the schedule of Lightning models
    # steps and evaluations of the transformer, and how many of them a step cache skipped; empty without one
    cache: dict[str, int] = field(default_factory=dict)
    cfg_batch: str | None = None  # how both predictions of guidance were computed, and why
    residency: Any = None  # a ResidencyReport: what was done about memory

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the `with` body to a phase, and look at the memory after it."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.memory = Memory.now()
            self.anonymous_peak = max(self.anonymous_peak, self.memory.anonymous)

    def count(self, counts: Mapping[str, int]) -> None:
        """Add what a step cache skipped of a picture's steps and evaluations."""
        for key, n in counts.items():
            self.cache[key] = self.cache.get(key, 0) + n

    def previewed(self, seconds: float) -> None:
        """Add the time of a preview, and take it from the phase it came in."""
        self.preview_seconds.append(seconds)
        self.seconds["preview"] = self.seconds.get("preview", 0.0) + seconds
        self.seconds["denoise"] = self.seconds.get("denoise", 0.0) - seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return asdict(self)
