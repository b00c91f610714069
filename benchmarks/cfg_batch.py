"""Both predictions of guidance in one graph or one after the other: the seconds of a step, in turn.

    python benchmarks/cfg_batch.py MODEL.gguf --llm LLM.gguf --vae VAE.safetensors [--size 256] [--steps 3] [--rounds 3]
                                   [--max-ram 5G] [--threads 2]

--max-ram: for weights that do not fit and are read from the disk in each pass; bytes are those of /proc/self/io.
Medians of all steps but each round's first, which reads what stays.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

from disk import disk_bytes

import models
from studio.cli import _size

PROMPTS = {"prompt": "a photo of a red fox in the snow, early morning light, film grain", "negative_prompt": "blurry"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--llm", required=True)
    parser.add_argument("--vae", required=True)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-ram", type=_size)
    args = parser.parse_args()
    found: dict[bool, list[tuple[float, int]]] = {False: [], True: []}
    with models.load(args.model, args.llm, args.vae, n_threads=args.threads, memory_limit=args.max_ram) as pipe:
        last = time.perf_counter(), disk_bytes()

        def progress(phase: str, done: int, total: int) -> None:
            nonlocal last
            if phase != "step":
                return
            now = time.perf_counter(), disk_bytes()
            if done > 1:
                found[pipe.cfg_batch is True].append((now[0] - last[0], now[1] - last[1]))
            last = now

        for _ in range(args.rounds):
            for both in (False, True):
                pipe.cfg_batch = both
                pipe(**PROMPTS, width=args.size, height=args.size, num_inference_steps=args.steps, cfg_scale=4.0,
                     output_type="latent", progress=progress)  # fmt: skip
    for both, steps in found.items():
        seconds, read = zip(*steps, strict=True)
        print(f"{'both in one graph' if both else 'one after the other':20} {median(seconds):7.2f} s a step "
              f"({min(seconds):.2f} to {max(seconds):.2f}), {median(read) / 1e9:.2f} GB read")  # fmt: skip
    one, two = (median(seconds for seconds, _ in found[both]) for both in (True, False))
    print(f"{two / one:.3f}x")


if __name__ == "__main__":
    main()
