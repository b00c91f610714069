"""Draw with weights that are larger than the memory there is, beside the same without a limit.

    sudo python benchmarks/larger_than_memory.py --llm qwen3-q8_0.gguf --vae ae.safetensors \
        q4_K=zimage-q4_K.gguf q8_0=zimage-q8_0.gguf

Each run is a process of its own. Limited ones are in a memory cgroup, v1 or v2, that is made for them (this needs root)
with a share of the diffusion model's file as its limit: --limit, 0.5 unless said. The page cache is dropped before each
of them, because pages that others have read are not counted; it is warm for the unlimited ones. Prints a table and one
JSON line.

Rows: seconds of a step (median, without the first), the disk's rate while nothing computes, bytes read and major faults
of the computing threads in a step, the share of a step that was spent waiting for the reader, the peak of what the
cgroup was charged with, and whether the picture is the same, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
PROMPT = "a photo of a red fox in the snow, early morning light, film grain"


def computing_faults() -> int:
    """Major faults of all threads but the one that reads ahead: it is there to have them."""
    n = 0
    for task in Path("/proc/self/task").iterdir():
        name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
        if not name.startswith("pyggml weights"):
            n += int(rest.split()[9])
    return n


def read_bytes() -> int:
    rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(rows["read_bytes"])


def child(settings: dict[str, Any]) -> None:
    """One picture, in this process; figures as JSON on the last line."""
    import models

    rows: list[dict[str, float]] = []
    start = time.perf_counter()
    with models.load(settings["dit"], settings["llm"], settings["vae"], n_threads=settings["threads"]) as pipe:
        last = [0.0, 0.0, 0.0, 0.0]

        def look() -> list[float]:
            waited = sum(s.waited_seconds for s in pipe.residency.report.streams)
            return [time.perf_counter(), read_bytes(), computing_faults(), waited]

        def progress(phase: str, done: int, total: int) -> None:
            if phase == "step":
                now = look()
                if done:
                    rows.append(dict(zip(("seconds", "read", "faults", "waited"),
                                         (b - a for a, b in zip(last, now, strict=True)), strict=True)))  # fmt: skip
                last[:] = now

        size = settings["size"]
        result = pipe(PROMPT, width=size, height=size, num_inference_steps=settings["steps"], output_type="np",
                      progress=progress)  # fmt: skip
    report = result.report.to_dict()
    print(json.dumps({
        "picture": hashlib.sha256(result.images[0].tobytes()).hexdigest(), "steps": rows,
        "seconds": report["seconds"], "total": time.perf_counter() - start, "peak_rss": report["memory"]["peak_rss"],
        "residency": report["residency"],
    }))  # fmt: skip


class Cgroup:
    """A memory cgroup with a limit, below the root of the controller."""

    def __init__(self, limit: int) -> None:
        v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
        self.is_v1 = (v1 / "memory.limit_in_bytes").exists() or v1.is_dir()
        self.path = (v1 if self.is_v1 else v2) / f"pyggml-{os.getpid()}"
        self.path.mkdir()
        (self.path / ("memory.limit_in_bytes" if self.is_v1 else "memory.max")).write_text(str(limit))

    def peak(self) -> int:
        return int((self.path / ("memory.max_usage_in_bytes" if self.is_v1 else "memory.peak")).read_text())

    def __enter__(self) -> Cgroup:
        return self

    def __exit__(self, *_: object) -> None:
        (self.path / ("memory.force_empty" if self.is_v1 else "memory.reclaim")).write_text("0" if self.is_v1 else "1G")
        self.path.rmdir()


def run(settings: dict[str, Any], limit: int | None) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", json.dumps(settings)]
    if limit is None:
        return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1]))
    with Cgroup(limit) as group:
        join = ["sh", "-c", f'echo $$ > {group.path}/cgroup.procs && exec "$@"', "sh"]
        done = subprocess.run([*join, *command], check=False, stdout=subprocess.PIPE)
        peak = group.peak()
    if done.returncode:
        raise SystemExit(f"the limited run ended with {done.returncode}")
    return {**json.loads(done.stdout.splitlines()[-1]), "charged": peak}


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def disk_rate(path: str, n_bytes: int = 1 << 30) -> float:
    """Bytes a second of cold pages of a file, read as a run reads them, by an otherwise idle process."""
    from loader.mapped import MappedFile
    from models.residency import read_pages

    with MappedFile(path) as file:
        os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        file.map()
        n = min(n_bytes, file.n_bytes)
        start = time.perf_counter()
        for at in range(0, n, 64 << 20):
            read_pages(file.address + at, min(64 << 20, n - at))
        return n / (time.perf_counter() - start)


def typical(runs: list[Any]) -> dict[str, float]:
    """Medians over the steps of all runs but each one's first, which reads what stays."""
    rows = [row for run in runs for row in run["steps"][1:] or run["steps"]]
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--llm", required=True)
    parser.add_argument("--vae", required=True)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=float, default=0.5, help="of the diffusion model's size")
    args = parser.parse_args()
    results: dict[str, Any] = {"size": args.size, "steps": args.steps, "threads": args.threads}
    print(f"{args.size}x{args.size}, {args.threads} threads, {args.rounds} rounds of {args.steps} steps, medians")
    for pair in args.models:
        name, _, path = pair.partition("=")
        settings = {"dit": os.path.abspath(path), "llm": os.path.abspath(args.llm), "vae": os.path.abspath(args.vae),
                    "size": args.size, "steps": args.steps, "threads": args.threads}  # fmt: skip
        limit = int(os.path.getsize(path) * args.limit)
        free, limited, rates = [], [], []
        for _ in range(args.rounds):
            for file in (settings["llm"], settings["vae"], settings["dit"]):
                with open(file, "rb", buffering=0) as data:
                    while data.read(1 << 24):
                        pass
            free.append(run(settings, None))
            rates.append(disk_rate(path))
            drop_caches()
            limited.append(run(settings, limit))
        results[name] = {"limit": limit, "disk": rates, "free": free, "limited": limited}
        _print_table(name, os.path.getsize(path), limit, rates, free, limited)
    print(json.dumps(results))


def _print_table(
    name: str, size: int, limit: int, rates: list[float], free: list[Any], limited: list[Any]
) -> None:
    a, b = typical(free), typical(limited)
    stream = limited[-1]["residency"]["streams"][-1]
    rate = statistics.median(rates)
    same = {r["picture"] for r in [*free, *limited]}
    encoder = [statistics.median(r["seconds"]["text_encoder"] for r in runs) for runs in (free, limited)]
    rows = [
        ("step", f"{a['seconds']:.2f} s", f"{b['seconds']:.2f} s ({b['seconds'] / a['seconds']:.2f}x)"),
        ("read in a step", f"{a['read'] / 1e9:.2f} GB", f"{b['read'] / 1e9:.2f} GB"),
        ("what the plan reads", "", f"{stream['per_pass'] / 1e9:.2f} GB"),
        ("at the disk's rate", "", f"{b['read'] / rate:.2f} s of {rate / 1e9:.2f} GB/s"),
        ("waited for it in a step", "", f"{b['waited']:.2f} s"),
        ("major faults in a step", f"{a['faults']:.0f}", f"{b['faults']:.0f}"),
        ("text encoder", f"{encoder[0]:.2f} s", f"{encoder[1]:.2f} s"),
        ("peak RSS", *(f"{max(r['peak_rss'] for r in runs) / 1e9:.2f} GB" for runs in (free, limited))),
        ("charged to the cgroup, peak", "", f"{max(r['charged'] for r in limited) / 1e9:.2f} GB"),
        ("the picture", "", "the same bytes" if len(same) == 1 else "DIFFERS"),
    ]  # fmt: skip
    print(f"\n| {name}, {size / 1e9:.2f} GB | no limit | {limit / 1e9:.2f} GB |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
    else:
        main()
