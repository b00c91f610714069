"""What step caches skip, how long the steps take, and how far the pictures are from those without a cache.

    python benchmarks/step_caches.py                                    # the demo
    python benchmarks/step_caches.py --steps 28 DIFFUSION_MODEL LLM VAE

Each setting draws the same pictures; the PSNR is that of all of them together.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import models
from models.step_cache import DBCache, EasyCache, StepCache, TaylorSeer
from studio.generate import DEMO, DEMO_FILES

PROMPTS = ("a large red circle on a blue background", "a small yellow star at the top left on black",
           "a green square on white", "a white triangle on red")  # fmt: skip


def settings(front: int, warmup: int) -> dict[str, StepCache]:
    """By the options of the command line that mean the same."""
    found: dict[str, StepCache] = {}
    for t in (0.05, 0.2, 0.4):
        found[f"easycache, threshold={t}"] = EasyCache(t)
    for t in (0.08, 0.15, 0.3):
        found[f"dbcache, Fn={front}, warmup={warmup}, threshold={t}"] = DBCache(front, 0, t, warmup)
        found[f"cache-dit, Fn={front}, warmup={warmup}, threshold={t}"] = DBCache(front, 0, t, warmup, order=1)
    for interval in (1, 2):
        found[f"taylorseer, warmup={warmup}, interval={interval}"] = TaylorSeer(1, warmup, interval)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="the three files of a model; the demo's unless given")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, help="pixels of a side; the model's own unless given")
    parser.add_argument("--front", type=int, default=1, help="Fn; 8 for real models")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--pictures", type=int, default=4, help="of each setting, at most 4 prompts")
    args = parser.parse_args()
    files = args.files or [DEMO / name for name in DEMO_FILES]
    with models.load(*files) as pipe:

        def draw(cache: StepCache | None) -> tuple[np.ndarray, float, dict[str, int]]:
            pictures, seconds, counts = [], 0.0, dict.fromkeys(("steps", "steps_skipped"), 0)
            for seed, prompt in enumerate(PROMPTS[: args.pictures]):
                result = pipe(prompt, num_inference_steps=args.steps, width=args.size, height=args.size, seed=seed,
                              cache=cache, output_type="np")  # fmt: skip
                pictures.append(np.asarray(result.images[0], np.float64))
                seconds += sum(result.report.step_seconds)
                counts = {key: counts[key] + result.report.cache.get(key, 0) for key in counts}
            return np.stack(pictures), seconds, counts

        draw(None)
        exact, seconds, _ = draw(None)
        print(f"{args.steps} steps, {args.pictures} pictures of {exact.shape[2]}x{exact.shape[1]}\n")
        print("| cache | steps skipped | seconds of all steps | PSNR, dB |\n|---|---|---|---|")
        print(f"| none | 0 % | {seconds:.2f} | |")
        for name, cache in settings(args.front, args.warmup).items():
            draw(cache)  # builds its graphs
            pictures, seconds, counts = draw(cache)
            error = np.square(pictures - exact).mean()
            psnr = f"{10 * np.log10(255**2 / error):.1f}" if error else "the same bytes"
            print(f"| {name} | {counts['steps_skipped'] / counts['steps']:.0%} | {seconds:.2f} | {psnr} |")


if __name__ == "__main__":
    main()
