"""Time one picture with pyggml and with stable-diffusion-cpp-python on the same files, alternating, in one run.

    python benchmarks/compare.py --llm qwen3-q8_0.gguf --vae ae.safetensors q4_K=zimage-q4_K.gguf q8_0=zimage-q8_0.gguf

Each run is a process of its own. Phases are each program's own report of them; `rest` is the process from start to end
minus the phases. Medians over the rounds; ratio is theirs / ours, from the medians. Prints a table and one JSON line.
The peer's interpreter (with stable-diffusion-cpp-python==0.4.7) is --peer-python or $PYGGML_PEER_PYTHON; without one
only pyggml is timed. Shares of the machine's peaks come from benchmarks/peak.c, compiled and run beside.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PROMPT = "a photo of a red fox in the snow, early morning light, film grain"
PHASES = ("text encoder", "step", "decode", "rest", "peak RSS", "anonymous")
SECONDS = PHASES[:4]

# Runs inside the peer's interpreter. Its phases are read from its own log.
PEER = r"""
import json, os, sys
a = json.loads(sys.argv[1])
from stable_diffusion_cpp import StableDiffusion
sd = StableDiffusion(diffusion_model_path=a["dit"], llm_path=a["llm"], vae_path=a["vae"], n_threads=a["threads"],
                     enable_mmap=True, verbose=True)
sd.generate_image(prompt=a["prompt"], width=a["size"], height=a["size"], cfg_scale=1.0, sample_steps=a["steps"],
                  seed=42, sample_method="euler", scheduler="simple")
rows = dict(line.split(":", 1) for line in open("/proc/self/status"))
print("@@" + json.dumps({k: int(rows[k].split()[0]) * 1024 for k in ("VmHWM", "RssAnon")}), flush=True)
os._exit(0)
"""

Figures = dict[str, float]


def time_ours(dit: str, args: argparse.Namespace) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [
            sys.executable, "-m", "studio.cli", "generate", PROMPT, "-o", str(Path(folder, "out.png")),
            "--diffusion-model", dit, "--llm", args.llm, "--vae", args.vae, "-W", str(args.size), "-H", str(args.size),
            "--steps", str(args.steps), "-t", str(args.threads), "--report", str(report),
        ]  # fmt: skip
        start = time.perf_counter()
        subprocess.run(command, check=True, cwd=HERE.parent, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - start
        data = json.loads(report.read_text())
    seconds = data["seconds"]
    steps = sum(data["step_seconds"])
    return {
        "text encoder": seconds["text_encoder"], "step": statistics.median(data["step_seconds"]),
        "decode": seconds["decode"], "rest": wall - seconds["text_encoder"] - steps - seconds["decode"],
        "peak RSS": data["memory"]["peak_rss"], "anonymous": data["anonymous_peak"], "wall": wall,
    }  # fmt: skip


def time_peer(dit: str, args: argparse.Namespace) -> Figures:
    settings = {"dit": dit, "llm": args.llm, "vae": args.vae, "threads": args.threads, "size": args.size,
                "steps": args.steps, "prompt": PROMPT}  # fmt: skip
    start = time.perf_counter()
    run = subprocess.run(
        [args.peer_python, "-c", PEER, json.dumps(settings)], capture_output=True, text=True, check=False
    )
    wall, log = time.perf_counter() - start, run.stdout + run.stderr
    if not (memory := re.search(r"@@(\{.*\})", log)):
        raise SystemExit(f"the peer failed:\n{log[-2000:]}")

    def seconds(pattern: str) -> float:
        found = re.findall(pattern + r" ([\d.]+) ?(ms|s)", log)
        return sum(float(n) / (1000 if unit == "ms" else 1) for n, unit in found)

    text = seconds("get_learned_condition completed, taking")
    sampling = seconds("] sampling completed, taking") or seconds("sampling completed, taking")
    decode = seconds("decode_first_stage completed, taking")
    found = json.loads(memory[1])
    return {"text encoder": text, "step": sampling / args.steps, "decode": decode,
            "rest": wall - text - sampling - decode, "peak RSS": found["VmHWM"], "anonymous": found["RssAnon"],
            "wall": wall}  # fmt: skip


def warm(*files: str) -> None:
    """Read the files, so that both programs find them in the page cache: a run may push out what the other needs."""
    for file in files:
        with open(file, "rb", buffering=0) as f:
            while f.read(1 << 24):
                pass


def machine_peaks(threads: int) -> dict[str, float]:
    """GFLOP/s (f32 multiply-adds) and Gop/s (int8 multiply-adds) of `threads` cores, by benchmarks/peak.c."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        binary = str(Path(folder, "peak"))
        subprocess.run([compiler, "-O2", "-march=native", "-o", binary, str(HERE / "peak.c")], check=True)
        # Each on a core of its own: left alone, two that end within a second may share one.
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        pin = ["taskset", "-c"] if shutil.which("taskset") and len(cores) >= threads else []
        commands = [[*pin, str(cores[i]), binary] if pin else [binary] for i in range(threads)]
        runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
        rows = [json.loads(run.communicate()[0]) for run in runs]
    return {key: sum(row[key] for row in rows) for key in rows[0]}


def step_operations(dit: str, size: int) -> float:
    """Multiplications and additions of the matrix products of one step: 2 x parameters x tokens they see."""
    from loader.checkpoint import open_checkpoint
    from models.z_image.transformer import padded

    n_image, n_caption = padded((size // 16) ** 2), 32
    total = 0.0
    for name, info in open_checkpoint(dit).items():
        if len(info.ne) == 2 and min(info.ne) > 1 and "adaLN" not in name and "t_embedder" not in name:
            tokens = n_image + n_caption if name.startswith("layers.") else n_image
            if not name.startswith(("context_refiner.", "cap_embedder.")):
                total += 2.0 * info.ne[0] * info.ne[1] * tokens
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FILE", help="diffusion models to time")
    parser.add_argument("--llm", required=True)
    parser.add_argument("--vae", required=True)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peer-python", default=os.environ.get("PYGGML_PEER_PYTHON"))
    args = parser.parse_args()
    args.llm, args.vae = os.path.abspath(args.llm), os.path.abspath(args.vae)

    result: dict[str, Any] = {"size": args.size, "threads": args.threads, "rounds": args.rounds,
                              "peaks": machine_peaks(args.threads)}  # fmt: skip
    print(f"{args.size}x{args.size}, {args.threads} threads, {args.rounds} rounds, medians")
    for pair in args.models:
        name, _, path = pair.partition("=")
        path = os.path.abspath(path)
        ours: list[Figures] = []
        peer: list[Figures] = []
        for _ in range(args.rounds):
            for runs, run in ((ours, time_ours), (peer, time_peer)):
                if run is time_ours or args.peer_python:
                    warm(path, args.llm, args.vae)
                    runs.append(run(path, args))
        row = {"ours": {k: statistics.median(r[k] for r in ours) for k in ours[0]}}
        if peer:
            row["peer"] = {k: statistics.median(r[k] for r in peer) for k in peer[0]}
        rate = step_operations(path, args.size) / row["ours"]["step"] / 1e9
        # On a shared machine a peak is what it was at its best moment.
        again = machine_peaks(args.threads)
        result["peaks"] = {kind: max(peak, again[kind]) for kind, peak in result["peaks"].items()}
        result[name] = {**row, "gops": rate, "runs": {"ours": ours, "peer": peer}}
        _print_table(name, row)
        for kind, peak in result["peaks"].items():
            print(f"   a step does {rate:.0f} Gop/s, {100 * rate / peak:.0f} % of the {kind} peak of {peak:.0f}")
    print(json.dumps(result))


def _print_table(name: str, row: dict[str, Figures]) -> None:
    print(f"\n| {name} | pyggml | stable-diffusion.cpp | ratio |\n|---|---|---|---|")
    for phase in PHASES:
        ours, peer = row["ours"][phase], row.get("peer", {}).get(phase)
        unit, scale = ("s", 1.0) if phase in SECONDS else ("GB", 1e9)
        theirs = "" if peer is None else f"{peer / scale:.2f} {unit}"
        ratio = "" if peer is None or not ours else f"{peer / ours:.1f}x"
        print(f"| {phase} | {ours / scale:.2f} {unit} | {theirs} | {ratio} |")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    main()
