"""Load a model in every mode, and with stable-diffusion-cpp-python, each in a process of its own: seconds and memory.

    python benchmarks/bench_load.py zimage-q4_K.gguf qwen3-q8_0.gguf ae.safetensors [--modes mmap,io] [--cold]

Ours is timed from `models.load` to the moment where the first operation of the text encoder would run (graph built and
allocated, tokens in place); the peer's is its constructor, which loads. Warm: every file is read once before; --cold
drops the files from the page cache before each run. RSS, private (anonymous) and file-backed memory are those of
/proc/self/smaps_rollup at that moment, peak is VmHWM; major faults are those of the load. Medians over alternating
rounds. The peer's interpreter (with stable-diffusion-cpp-python==0.4.7) is --peer-python or $PYGGML_PEER_PYTHON;
without one only ours is measured. Prints a table in GB and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

MODES: dict[str, dict[str, object]] = {
    "mmap": {},
    "populate": {"hints": ["populate"]},
    "io": {"mode": "io"},
    "io, no reclaim": {"mode": "io", "reclaim": False},
    "no-mmap": {"mode": "off"},
    "mlock": {"mlock": True},
}
PEER_MODES = {"peer mmap": True, "peer no-mmap": False}
COLUMNS = ("seconds", "major", "peak", "rss", "private", "file")

MEASURE = r"""
import json, os, resource, sys, time
def figures(seconds, faults):
    rows = dict(line.split(":", 1) for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    kb = {key: int(value.split()[0]) * 1024 for key, value in rows.items()}
    peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return {"seconds": seconds, "major": resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults, "peak": peak,
            "rss": kb["Rss"], "private": kb["Anonymous"], "file": kb["Rss"] - kb["Anonymous"]}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
a = json.loads(sys.argv[1])
"""
OURS = MEASURE + r"""
import models, models.z_image.pipeline
from loader import LoadOptions
from pyggml import Graph
class Ready(Exception): pass
def stop(self): raise Ready
options = a["options"]
if "hints" in options: options["hints"] = frozenset(options["hints"])
Graph.run = stop
before, start = faults(), time.perf_counter()
pipe = models.load(*a["files"], n_threads=a["threads"], options=LoadOptions(**options))
loaded = time.perf_counter() - start
try: pipe.encode("a photo of a red fox in the snow")
except Ready: pass
print("@@" + json.dumps(figures(time.perf_counter() - start, before) | {"loaded": loaded}), flush=True)
os._exit(0)
"""
PEER = MEASURE + r"""
from stable_diffusion_cpp import StableDiffusion
dit, llm, vae = a["files"]
before, start = faults(), time.perf_counter()
sd = StableDiffusion(diffusion_model_path=dit, llm_path=llm, vae_path=vae, n_threads=a["threads"],
                     enable_mmap=a["mmap"], verbose=False)
print("@@" + json.dumps(figures(time.perf_counter() - start, before)), flush=True)
os._exit(0)
"""


def run(python: str, code: str, given: dict[str, object]) -> dict[str, float]:
    env = {**os.environ, "PYTHONPATH": str(HERE.parent)} if code is OURS else None
    done = subprocess.run([python, "-c", code, json.dumps(given)], capture_output=True, text=True, env=env, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("@@"):
            result: dict[str, float] = json.loads(line[2:])
            return result
    raise SystemExit(f"it ended with {done.returncode}:\n{done.stderr[-2000:]}")


def forget(path: str) -> None:
    """Drop a file from the page cache."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: str) -> None:
    with open(path, "rb") as file:
        while file.read(1 << 24):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs=3, help="transformer, text encoder, autoencoder")
    parser.add_argument("--modes", help=f"with commas between them, of: {', '.join([*MODES, *PEER_MODES])} (all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each run")
    parser.add_argument("--peer-python", default=os.environ.get("PYGGML_PEER_PYTHON"))
    args = parser.parse_args()
    names = args.modes.split(",") if args.modes else [*MODES, *PEER_MODES]
    if unknown := set(names) - set(MODES) - set(PEER_MODES):
        parser.error(f"no such modes: {', '.join(sorted(unknown))}")
    if not args.peer_python:
        names = [name for name in names if name in MODES]
    for path in args.files:
        read(path)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    given: dict[str, object] = {"files": args.files, "threads": args.threads}
    for _ in range(args.rounds):
        for name in names:
            if args.cold:
                for path in args.files:
                    forget(path)
            if name in MODES:
                figures = run(sys.executable, OURS, given | {"options": MODES[name]})
            else:
                figures = run(args.peer_python, PEER, given | {"mmap": PEER_MODES[name]})
            results[name].append(figures)
    medians = {n: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for n, rows in results.items()}
    sizes = " + ".join(f"{os.path.getsize(path) / 1e9:.2f}" for path in args.files)
    print(f"{sizes} GB, {'cold' if args.cold else 'warm'}, medians of {args.rounds}\n")
    print("| | seconds | major faults | peak RSS | RSS | private | file-backed |\n|---|---|---|---|---|---|---|")
    for name, m in medians.items():
        memory = " | ".join(f"{m[key] / 1e9:.2f}" for key in COLUMNS[2:])
        print(f"| {name} | {m['seconds']:.2f} | {m['major']:.0f} | {memory} |")
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
