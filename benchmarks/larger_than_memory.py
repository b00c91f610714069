"""Draw with weights that are larger than the memory there is, beside the same without a limit.

    sudo python benchmarks/larger_than_memory.py --llm qwen3-q8_0.gguf --vae ae.safetensors \
        q4_K=zimage-q4_K.gguf q8_0=zimage-q8_0.gguf

Two processes draw the same picture, one step of the one after one step of the other: what a neighbour on the machine
does to steps, it does to both. One is in a memory cgroup, v1 or v2, that is made for it (this needs root) with a share
of the diffusion model's file as its limit: --limit, 0.5 unless said. Pages that the other has read are not counted
there, and not given back, so it draws from copies of the files (in the folder --copy; beside the diffusion model unless
said). It begins with an empty page cache, the other with a warm one. Prints a table and one JSON line.

--apart: one process after the other, and no copies: for models that leave no room for both, as Qwen-Image's q8_0 in
24 GB. Each begins with an empty page cache; the one without a limit takes what memory there is.

Rows: seconds of a step (median, without the first), and of what each limited step took of the one before it; bytes read
and major faults of the computing threads in a step, the disk's rate while nothing computes, the time in a step that was
spent waiting for the reader, the peak of what the cgroup was charged with, and whether the picture is the same, byte by
byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from disk import computing_faults, disk_bytes

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
FILES = ("dit", "llm", "vae")
PROMPT = "a photo of a red fox in the snow, early morning light, film grain"


def child(settings: dict[str, Any]) -> None:
    """One picture, in this process, a step for each line of stdin; figures as JSON on the last line."""
    import models

    rows: list[dict[str, float]] = []
    start = time.perf_counter()
    with models.load(settings["dit"], settings["llm"], settings["vae"], n_threads=settings["threads"]) as pipe:
        last = [0.0, 0.0, 0.0, 0.0]

        def look() -> list[float]:
            waited = sum(s.waited_seconds for s in pipe.residency.report.streams)
            return [time.perf_counter(), disk_bytes(), computing_faults(), waited]

        def progress(phase: str, done: int, total: int) -> None:
            if phase != "step":
                return
            if done:
                rows.append(dict(zip(("seconds", "read", "faults", "waited"),
                                     (b - a for a, b in zip(last, look(), strict=True)), strict=True)))  # fmt: skip
            if done < total:
                print("your turn", flush=True)
                sys.stdin.readline()
            last[:] = look()

        size = settings["size"]
        result = pipe(PROMPT, width=size, height=size, num_inference_steps=settings["steps"], output_type="np",
                      cfg_scale=settings["cfg_scale"], progress=progress)  # fmt: skip
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


class Run:
    """A process that draws one picture; made, it is before its first step. Ends with its `with` block."""

    def __init__(self, settings: dict[str, Any], group: Cgroup | None = None) -> None:
        command = [sys.executable, __file__, "--child", json.dumps(settings)]
        if group is not None:
            command = ["sh", "-c", f'echo $$ > {group.path}/cgroup.procs && exec "$@"', "sh", *command]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.line = self._read()

    def step(self) -> None:
        """The next step; after the last one, all that follows."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.line = self._read()

    def _read(self) -> str:
        assert self.process.stdout
        if line := self.process.stdout.readline():
            return line
        raise SystemExit(f"a run ended with {self.process.wait()}")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def both(settings: dict[str, Any], copies: dict[str, str], limit: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of a run without a limit, and of one with it, which draw in turn."""
    drop_caches()
    with Cgroup(limit) as group, Run(settings | copies, group) as limited:
        for key in FILES:
            with open(settings[key], "rb", buffering=0) as data:
                while data.read(1 << 24):
                    pass
        with Run(settings) as free:
            for _ in range(settings["steps"]):
                free.step()
                limited.step()
        return json.loads(free.line), {**json.loads(limited.line), "charged": group.peak()}


def apart(settings: dict[str, Any], limit: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of two runs one after the other."""
    drop_caches()
    with Cgroup(limit) as group, Run(settings, group) as limited:
        for _ in range(settings["steps"]):
            limited.step()
        found = {**json.loads(limited.line), "charged": group.peak()}
    drop_caches()
    with Run(settings) as free:
        for _ in range(settings["steps"]):
            free.step()
        return json.loads(free.line), found


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
    parser.add_argument("--steps", type=int, default=4, help="at least 2; the first is not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=float, default=0.5, help="of the diffusion model's size")
    parser.add_argument("--cfg-scale", type=float, help="guidance; 1 for one evaluation in a step")
    parser.add_argument("--apart", action="store_true", help="one process after the other, without copies")
    parser.add_argument("--copy", metavar="FOLDER", help="where copies of the files are kept meanwhile")
    args = parser.parse_args()
    results: dict[str, Any] = {"size": args.size, "steps": args.steps, "threads": args.threads}
    print(f"{args.size}x{args.size}, {args.threads} threads, {args.rounds} rounds of {args.steps} steps, medians")
    for pair in args.models:
        name, _, path = pair.partition("=")
        settings = {"dit": os.path.abspath(path), "llm": os.path.abspath(args.llm), "vae": os.path.abspath(args.vae),
                    "size": args.size, "steps": args.steps, "threads": args.threads,
                    "cfg_scale": args.cfg_scale}  # fmt: skip
        limit = int(os.path.getsize(path) * args.limit)
        free, limited, rates = [], [], []
        with tempfile.TemporaryDirectory(dir=args.copy or os.path.dirname(settings["dit"])) as folder:
            copies = {}
            for key in () if args.apart else FILES:
                copies[key] = os.path.join(folder, key + os.path.splitext(settings[key])[1])
                shutil.copyfile(settings[key], copies[key])
            for _ in range(args.rounds):
                drop_caches()
                rates.append(disk_rate(copies.get("dit", settings["dit"])))
                pair_of_runs = apart(settings, limit) if args.apart else both(settings, copies, limit)
                free.append(pair_of_runs[0])
                limited.append(pair_of_runs[1])
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
    pairs = [y["seconds"] / x["seconds"] for f, g in zip(free, limited, strict=True)
             for x, y in zip(f["steps"][1:], g["steps"][1:], strict=True)]  # fmt: skip
    encoder = [statistics.median(r["seconds"]["text_encoder"] for r in runs) for runs in (free, limited)]
    rows = [
        ("step", f"{a['seconds']:.2f} s", f"{b['seconds']:.2f} s ({b['seconds'] / a['seconds']:.2f}x)"),
        ("of the step before it", "", f"{statistics.median(pairs):.2f}x, {min(pairs):.2f} to {max(pairs):.2f}"),
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
