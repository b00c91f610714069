"""What runs predict of their memory, beside what they then take.

    python benchmarks/predicted_memory.py --llm qwen3-q8_0.gguf --vae ae.safetensors \
        q4_K=zimage-q4_K.gguf q8_0=zimage-q8_0.gguf [--max-ram 3G]

Each run is a process of its own, one step at 256x256 unless said. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def run(dit: str, args: argparse.Namespace, options: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [
            sys.executable, "-m", "studio.cli", "generate", "a red fox in the snow", "--diffusion-model", dit,
            "--llm", os.path.abspath(args.llm), "--vae", os.path.abspath(args.vae), "-W", str(args.size), "-H",
            str(args.size), "--steps", str(args.steps), "-t", str(args.threads), "-o", str(Path(folder, "out.png")),
            "--cfg-scale", str(args.cfg_scale),
            "--report", str(report), *options,
        ]  # fmt: skip
        subprocess.run(command, check=True, cwd=HERE.parent, stdout=subprocess.DEVNULL)
        return dict(json.loads(report.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--llm", required=True)
    parser.add_argument("--vae", required=True)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cfg-scale", type=float, default=1.0)
    parser.add_argument("--max-ram", action="append", default=[], help="also with this limit; may be repeated")
    args = parser.parse_args()
    results = []
    print(f"| {args.size}x{args.size} | limit | predicted | measured | off | of it private | read in each step |")
    print("|---|---|---|---|---|---|---|")
    for pair in args.models:
        name, _, path = pair.partition("=")
        for limit in (None, *args.max_ram):
            report = run(os.path.abspath(path), args, ["--max-ram", limit] if limit else [])
            predicted, measured = report["predicted"]["peak_rss"], report["memory"]["peak_rss"]
            off = predicted / measured - 1
            steps = next(p for p in report["predicted"]["phases"] if p["name"] == "steps")
            private = report["predicted"]["private_peak"]
            sizes = [f"{n / 1e9:.2f} GB" for n in (predicted, measured, private, steps["per_pass"])]
            row = [name, limit or "-", *sizes[:2], f"{100 * off:+.1f} %", *sizes[2:]]
            print(f"| {' | '.join(row)} |", flush=True)
            results.append({"name": name, "limit": limit, "predicted": predicted, "measured": measured})
    print(json.dumps({"size": args.size, "runs": results}))


if __name__ == "__main__":
    main()
