"""Two ways to decode in tiles, against decoding whole: decibels, steps across tile borders, seconds, memory.

    python benchmarks/tiled_decoding.py [--vae ae.safetensors] [--picture docs/demo.png] [--size 512] [--tile 32]

"blended": the finished decoder on tiles that overlap by half and are blended with smooth ramps, each tile with group
norms of its own. "exact": models/tiles.py.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.autoencoder_kl import FACTOR, scale_latents
from models.devices import Place
from models.z_image.components import open_autoencoder
from pyggml import Backend, Graph

ROOT = Path(__file__).parents[1]


def blended(decode: Callable[[Any], Any], latents: Any, tile: int) -> Any:
    """Tiles that overlap by half, weighted by 6x^5 - 15x^4 + 10x^3 of the distance from their border."""
    _, height, width = latents.shape
    total, weight = np.zeros((3, FACTOR * height, FACTOR * width)), np.zeros((FACTOR * height, FACTOR * width))
    x = np.minimum(np.arange(FACTOR * tile) + 0.5, np.arange(FACTOR * tile)[::-1] + 0.5) / (FACTOR * tile / 2)
    ramp = 6 * x**5 - 15 * x**4 + 10 * x**3
    for top in range(0, height - tile // 2, tile // 2):
        for left in range(0, width - tile // 2, tile // 2):
            piece = decode(latents[:, top : top + tile, left : left + tile])
            rows, columns = (slice(FACTOR * start, FACTOR * (start + tile)) for start in (top, left))
            total[:, rows, columns] += piece * np.outer(ramp, ramp)
            weight[rows, columns] += np.outer(ramp, ramp)
    return total / weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", default=str(ROOT / "studio/demo/ae_demo.safetensors"))
    parser.add_argument("--picture", default=str(ROOT / "docs/demo.png"))
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--tile", type=int, default=32)
    args = parser.parse_args()
    with Image.open(args.picture) as image:
        resized = image.convert("RGB").resize((args.size, args.size), Image.Resampling.BICUBIC)
    picture = np.asarray(resized, np.float32).transpose(2, 0, 1) / 255
    backend = Backend.cpu()
    module = open_autoencoder(args.vae, Place(backend), encoder=True).module
    latents = scale_latents(module.encode(backend, picture)[0])
    largest = [0]

    def compute(graph: Graph, **inputs: Any) -> dict[str, Any]:
        result = graph.compute(**inputs)
        largest[0] = max(largest[0], graph.buffer_size)
        return result

    ways: dict[str, Callable[[], Any]] = {
        "whole": lambda: module.decode(backend, latents, compute),
        "blended": lambda: blended(lambda z: module.decode(backend, z, compute), latents, args.tile),
        "exact": lambda: module.decode(backend, latents, compute, tile=(args.tile, args.tile)),
    }
    rows: dict[str, dict[str, float]] = {}
    print(f"{'':8} {'dB':>6} {'step across borders / elsewhere':>32} {'seconds':>8} {'device MiB':>11}")
    for name, run in ways.items():
        largest[0], start = 0, time.perf_counter()
        result = run()
        row = {"seconds": time.perf_counter() - start, "device_mib": largest[0] / 2**20}
        if name == "whole":
            whole = result
        else:
            error = result - whole
            steps = np.abs(np.diff(error, axis=2))
            # where tiles begin: of the overlapping ones, every half tile
            every = FACTOR * args.tile // (2 if name == "blended" else 1)
            border = np.zeros(steps.shape[2], bool)
            border[every - 1 :: every] = True
            row["psnr"] = float(10 * np.log10(np.ptp(whole) ** 2 / np.mean(error.astype(np.float64) ** 2)))
            row["seam"] = float(steps[:, :, border].mean() / steps[:, :, ~border].mean())
        rows[name] = row
        quality = f"{row.get('psnr', 0):6.1f} {row.get('seam', 0):32.2f}"
        print(f"{name:8} {quality} {row['seconds']:8.2f} {row['device_mib']:11.0f}")
    print(json.dumps({"size": args.size, "tile": args.tile, **rows}))


if __name__ == "__main__":
    main()
