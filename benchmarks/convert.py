"""Speed and memory of `pyggml convert`: parameters per second by type and threads, on a random bf16 model.

Linux only. The peak is what converting adds to that of the interpreter with the loader imported.

python benchmarks/convert.py [--million 400] [--types q8_0,q4_K,f16] [--threads 1,2] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from loader.file_heads import Entry, safetensors_head

N_COLUMNS, N_ROWS = 3840, 10240  # the largest of Z-Image

ONE = """
import json, re, sys, time
from loader import open_checkpoint
from loader.save import save_checkpoint
from loader.save_plan import parse_type
source, target, kind, threads = sys.argv[1:]
kind = parse_type(kind)
def peak():  # not getrusage's, which begins with that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before = peak()
start = time.perf_counter()
with open_checkpoint(source) as checkpoint:
    report = save_checkpoint(checkpoint, target, type=kind, n_threads=int(threads))
    n = sum(info.n_elements for info in checkpoint.values())
print(json.dumps({"million": n / 1e6, "seconds": report.seconds, "compare": report.seconds_compared,
                  "bytes": report.n_bytes, "peak_mb": peak() - before}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--million", type=int, default=400, help="parameters")
    parser.add_argument("--types", default="q8_0,q4_K,f16")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--folder", default=None)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder) / "source.safetensors"
        entries = [Entry(f"layers.{i}.weight", (N_COLUMNS, N_ROWS), "BF16")
                   for i in range(max(1, args.million * 10**6 // (N_COLUMNS * N_ROWS)))]  # fmt: skip
        values = np.random.default_rng(0).normal(0, 0.05, N_COLUMNS * N_ROWS).astype(np.float32)
        with source.open("wb") as file:
            file.write(safetensors_head(entries, {}).data)
            for _ in entries:
                file.write((values.view(np.uint32) >> 16).astype("<u2").data)
        print(f"{'type':8} {'threads':>7} {'seconds':>8} {'compare':>8} {'M param/s':>10} {'peak MB':>8}")
        for kind in args.types.split(","):
            for threads in args.threads.split(","):
                out = subprocess.run(
                    [sys.executable, "-c", ONE, str(source), str(Path(folder) / "out.gguf"), kind, threads],
                    check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
                ).stdout  # fmt: skip
                row = json.loads(out) | {"type": kind, "threads": int(threads)}
                rows.append(row)
                seconds, rate = row["seconds"], row["million"] / row["seconds"]
                shown = f"{kind:8} {threads:>7} {seconds:8.1f} {row['compare']:8.1f} {rate:10.0f} {row['peak_mb']:8.0f}"
                print(shown, flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
