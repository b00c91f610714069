"""Time one picture with pyggml and with stable-diffusion-cpp-python on the same files, alternating, in one run.

    python benchmarks/compare.py --llm qwen3-q8_0.gguf --vae ae.safetensors q4_K=zimage-q4_K.gguf q8_0=zimage-q8_0.gguf
    python benchmarks/compare.py --llm qwen25vl-q4_K.gguf --vae qwen-vae.safetensors q4_K=qwen-image-q4_K.gguf

Each run is a process of its own. Phases are each program's own report of them; `before the steps` is what pyggml
computes of the prompt and of all noise levels once, where the peer does so in each step; `rest` is the process from
start to end minus the phases. Major faults are pages that the process has waited for the disk for; `stolen` is the
share of the time of all processors that the host gave to other machines. Medians over the rounds; ratio is theirs /
ours, from the medians. Prints a table, what was done about memory, and one JSON line.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PROMPT = "a photo of a red fox in the snow, early morning light, film grain"
PHASES = ("load", "text encoder", "before the steps", "step", "decode", "rest", "wall", "major faults", "peak RSS",
          "predicted", "anonymous", "stolen")  # fmt: skip
SECONDS = PHASES[:7]
ENCODER_STEP_DECODER = ("the text encoder", "the transformer", "the decoder")  # stages of a report

# Runs inside the peer's interpreter. Its phases are read from its own log.
PEER = r"""
import json, os, resource, sys
a = json.loads(sys.argv[1])
from stable_diffusion_cpp import StableDiffusion
sd = StableDiffusion(diffusion_model_path=a["dit"], llm_path=a["llm"], vae_path=a["vae"], n_threads=a["threads"],
                     enable_mmap=True, verbose=True)
sd.generate_image(prompt=a["prompt"], width=a["size"], height=a["size"], cfg_scale=a["cfg"], sample_steps=a["steps"],
                  seed=42, sample_method="euler", scheduler="simple")
rows = dict(line.split(":", 1) for line in open("/proc/self/status"))
found = {k: int(rows[k].split()[0]) * 1024 for k in ("VmHWM", "RssAnon")}
print("@@" + json.dumps({**found, "faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt}), flush=True)
os._exit(0)
"""

Figures = dict[str, float]


def time_ours(dit: str, args: argparse.Namespace) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [
            sys.executable, "-m", "studio.cli", "generate", PROMPT, "-o", str(Path(folder, "out.png")),
            "--diffusion-model", dit, "--llm", args.llm, "--vae", args.vae, "-W", str(args.size), "-H", str(args.size),
            "--steps", str(args.steps), "--cfg-scale", str(args.cfg_scale), "-t", str(args.threads), "--report",
            str(report),
        ]  # fmt: skip
        start = time.perf_counter()
        subprocess.run(command, check=True, cwd=HERE.parent, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - start
        data = json.loads(report.read_text())
    seconds, stages, steps = data["seconds"], data["stages"], data["step_seconds"]
    print("\n".join(data["residency"]["decisions"]), flush=True)
    # The first step's time has what is computed before it.
    before = sum(s["seconds"] for name, s in stages.items() if name not in ENCODER_STEP_DECODER)
    phases = {"load": seconds["load"], "text encoder": seconds["text_encoder"], "before the steps": before,
              "decode": seconds["decode"]}  # fmt: skip
    return {
        **phases, "step": statistics.median([steps[0] - before, *steps[1:]]),
        "rest": wall - sum(phases.values()) - sum(steps) + before, "wall": wall,
        "major faults": sum(s["major_faults"] for s in stages.values()),
        "peak RSS": data["memory"]["peak_rss"], "predicted": data["predicted"]["peak_rss"],
        "anonymous": data["anonymous_peak"],
    }  # fmt: skip


def time_peer(dit: str, args: argparse.Namespace) -> Figures:
    settings = {"dit": dit, "llm": args.llm, "vae": args.vae, "threads": args.threads, "size": args.size,
                "steps": args.steps, "prompt": PROMPT, "cfg": args.cfg_scale}  # fmt: skip
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
            "rest": wall - text - sampling - decode, "wall": wall, "major faults": found["faults"],
            "peak RSS": found["VmHWM"], "anonymous": found["RssAnon"]}  # fmt: skip


def host_time() -> tuple[float, float]:
    """Ticks of all processors so far that the host gave to others, and all ticks; zeros where no system says so."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            ticks = [float(n) for n in file.readline().split()[1:9]]
    except OSError:
        return 0.0, 0.0
    return ticks[7], sum(ticks)


def watched(run: Callable[[str, argparse.Namespace], Figures], dit: str, args: argparse.Namespace) -> Figures:
    """A run, and the share of the processors' time in it that the host gave to other machines."""
    stolen, ticks = host_time()
    figures = run(dit, args)
    after = host_time()
    return {**figures, "stolen": (after[0] - stolen) / max(1.0, after[1] - ticks)}


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

    total = 0.0
    checkpoint = open_checkpoint(dit)
    n_text = 25
    for name, info in checkpoint.items():
        if len(info.ne) != 2 or min(info.ne) <= 1:
            continue
        if "txt_in.weight" in checkpoint:  # Qwen-Image
            n_image = (size // 16) ** 2
            tokens = n_text if "txt" in name or ".add_" in name or "to_add_out" in name else n_image
            once = "_mod." in name or name.startswith(("txt_in.", "time_text_embed.", "norm_out."))
        else:
            n_image = padded((size // 16) ** 2)
            tokens = n_image + padded(n_text) if name.startswith("layers.") else n_image
            once = "adaLN" in name or "t_embedder" in name or name.startswith(("context_refiner.", "cap_embedder."))
        total += 0.0 if once else 2.0 * info.ne[0] * info.ne[1] * tokens
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FILE", help="diffusion models to time")
    parser.add_argument("--llm", required=True)
    parser.add_argument("--vae", required=True)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cfg-scale", type=float, default=1.0)
    parser.add_argument("--no-warm", action="store_true", help="do not read the files before each run")
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
                    if not args.no_warm:
                        warm(path, args.llm, args.vae)
                    runs.append(watched(run, path, args))
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
        ours, peer = row["ours"].get(phase), row.get("peer", {}).get(phase)
        ratio = f"{peer / ours:.1f}x" if peer is not None and ours else ""
        print(f"| {phase} | {_shown(phase, ours)} | {_shown(phase, peer)} | {ratio} |")


def _shown(phase: str, value: float | None) -> str:
    if value is None:
        return ""
    if phase in SECONDS:
        return f"{value:.2f} s"
    if phase == "stolen":
        return f"{100 * value:.0f} %"
    return f"{value:,.0f}" if phase == "major faults" else f"{value / 1e9:.2f} GB"


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    main()
