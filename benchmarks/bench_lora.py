"""How long it takes to switch LoRAs and their weights, what they add to a step, and how much memory they need.

    python benchmarks/bench_lora.py --diffusion-model z.gguf --llm qwen3.gguf --vae ae.safetensors

Writes two random LoRAs of every matrix of the transformer's blocks into a temporary folder. `switch` is the time from
the call to the point where the next step's graph is allocated; nothing is left for later but the step itself. Prints a
table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from safetensors.numpy import save_file

import models
from models.memory import Memory
from models.z_image import ZImagePipeline


def write_lora(path: Path, pipe: ZImagePipeline, rank: int, seed: int) -> int:
    """A random LoRA in f16, of every matrix of the blocks, q, k and v each its own. Returns the bytes written."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, param in pipe.transformer.weights.params.items():
        if len(param.ne) != 2 or not name.startswith(("layers.", "noise_refiner.", "context_refiner.")):
            continue
        module = name.removesuffix(".weight")
        parts = [module]
        if module.endswith(".qkv"):
            parts = [module.removesuffix("qkv") + part for part in ("to_q", "to_k", "to_v")]
        n_in, n_out = param.ne[0], param.ne[1] // len(parts)
        for part in parts:
            down = rng.standard_normal((rank, n_in), np.float32) * n_in**-0.5
            up = rng.standard_normal((n_out, rank), np.float32) * 0.01
            tensors[f"diffusion_model.{part}.lora_A.weight"] = down.astype(np.float16)
            tensors[f"diffusion_model.{part}.lora_B.weight"] = up.astype(np.float16)
    save_file(tensors, path)
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--diffusion-model", required=True)
    parser.add_argument("--llm", required=True)
    parser.add_argument("--vae", required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("-t", "--threads", type=int)
    args = parser.parse_args()

    files = (args.diffusion_model, args.llm, args.vae)
    with tempfile.TemporaryDirectory() as folder, models.load(
        *files, n_threads=args.threads, lora_apply_mode="at_runtime"
    ) as pipe:
        a, b = Path(folder) / "a.safetensors", Path(folder) / "b.safetensors"
        write_lora(a, pipe, args.rank, seed=1)
        n_bytes = write_lora(b, pipe, args.rank, seed=2)
        side = args.size // 8
        context = np.random.default_rng(3).standard_normal((32, pipe.transformer.module.config.dim), np.float32)
        x = np.random.default_rng(4).standard_normal((16, side, side), np.float32)

        def switch(loras: dict[Path, float]) -> float:
            start = time.perf_counter()
            pipe.set_loras(loras)
            pipe._graph_for(x, [context], ()).alloc()
            return time.perf_counter() - start

        def step() -> float:
            start = time.perf_counter()
            pipe._velocity(x, 0.5, context)
            return time.perf_counter() - start

        def timed(take: Callable[[], Any]) -> float:
            return median(take() for _ in range(args.repeat))

        switch({})
        step()
        step_without = median(step() for _ in range(2))
        before = Memory.now()
        switch({a: 1.0})
        step()
        step_with = median(step() for _ in range(2))
        after = Memory.now()

        def on() -> float:
            switch({})
            return switch({a: 1.0})

        weights = iter(np.linspace(0.1, 0.9, args.repeat))
        rows = {
            "on: files opened, checked, placed, graph built": timed(on),
            "another weight": timed(lambda: switch({a: float(next(weights))})),
            "to another LoRA": timed(lambda: max(switch({b: 1.0}), switch({a: 1.0}))),
            "off": timed(lambda: (switch({a: 1.0}), switch({}))[1]),
        }  # fmt: skip
        report = pipe.set_loras({a: 1.0})[0]

    print(f"rank {args.rank}, {n_bytes / 1e6:.0f} MB of f16, {report.n_applied} keys, {args.size}x{args.size}\n")
    print("| | seconds |\n|---|---|")
    for name, seconds in rows.items():
        print(f"| {name} | {seconds:.4f} |")
    print(f"| a step without | {step_without:.2f} |\n| a step with | {step_with:.2f} |")
    more = after.anonymous - before.anonymous
    print(f"\nanonymous memory: {more / 1e6:.0f} MB more")
    print(json.dumps({
        "benchmark": "lora", "rank": args.rank, "seconds": rows, "step_without": step_without, "step_with": step_with,
        "anonymous_bytes": more,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
