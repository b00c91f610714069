"""What a preview costs: seconds of a projection, of a tiny autoencoder and of the whole one, memory of their graphs.

    python benchmarks/previews.py                             # how near projections of the demo come to its pictures
    python benchmarks/previews.py --vae ae.safetensors [--tae taef1.safetensors] [--size 512]
    python benchmarks/previews.py --vae qwen_image_vae.safetensors

Without --tae the tiny autoencoder has random weights of the usual sizes, which take as long as any.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

import models
from loader import describe_path
from models import image, qwen_image, z_image
from models.autoencoder_tiny import TinyAutoencoder, TinyConfig, open_tiny_autoencoder
from models.devices import Place
from models.preview import Projection
from pyggml import Backend, Graph
from studio.generate import DEMO, DEMO_FILES

PROMPTS = ("a large red circle on a blue background", "a green square on a white background")
CONFIGS = {"TAESD": TinyConfig("TAESD", (64,) * 4, 16), "TAEHV": TinyConfig("TAEHV", (64, 64, 128, 256), 16, (1, 2, 2))}


def write_random(path: Path, config: TinyConfig) -> Path:
    rng = np.random.default_rng(0)
    params = TinyAutoencoder(config).params()
    save_file({name: (rng.standard_normal(p.ne[::-1]) / 30).astype(np.float16) for name, p in params.items()}, path)
    return path


def show_quality() -> None:
    """Of projections of the demo's steps against the finished pictures, scaled down to their size."""
    with models.load(*(str(DEMO / name) for name in DEMO_FILES)) as pipe:
        print(f"{'':42} {'after half':>16} {'at the end':>16}")
        for seed, prompt in enumerate(PROMPTS):
            found: list[Any] = []
            small = {"width": 64, "height": 64, "seed": seed, "output_type": "np"}
            picture = pipe(prompt, **small, on_preview=lambda i, step, p, found=found: found.append(p)).images[0]
            wanted = picture.reshape(8, 8, 8, 8, 3).mean((1, 3))
            cells = []
            for preview in (found[len(found) // 2 - 1], found[-1]):
                psnr = 10 * np.log10(255**2 / np.square(preview - wanted).mean())
                cells.append(f"{psnr:5.1f} dB, r {np.corrcoef(preview.ravel(), wanted.ravel())[0, 1]:.3f}")
            print(f"{prompt:42} {cells[0]:>16} {cells[1]:>16}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae")
    parser.add_argument("--tae")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.vae is None:
        show_quality()
        return
    qwen = describe_path(args.vae).architecture.startswith("Qwen")
    open_vae = qwen_image.components.open_autoencoder if qwen else z_image.components.open_autoencoder
    kind: Any = "TAEHV" if qwen else "TAESD"
    latents = np.random.default_rng(1).standard_normal((16, args.size // 8, args.size // 8)).astype(np.float32)
    largest = [0]

    def compute(graph: Graph, **inputs: Any) -> dict[str, Any]:
        result = graph.compute(**inputs)
        largest[0] = max(largest[0], graph.buffer_size)
        return result

    with Backend.cpu() as backend, tempfile.TemporaryDirectory() as folder:
        path = Path(args.tae) if args.tae else write_random(Path(folder) / "tiny.safetensors", CONFIGS[kind])
        vae = open_vae(args.vae, Place(backend))
        tae = open_tiny_autoencoder(path, kind, 16, Place(backend))

        def decoded(part: Any, z: Any) -> Any:
            return image.to_bytes(part.module.decode(backend, z, compute))

        projection = Projection.of_decoder(lambda z: decoded(tae, z), latents)
        ways: dict[str, Callable[[], Any]] = {
            "proj, found by vae": lambda: Projection.of_decoder(lambda z: decoded(vae, z), latents),
            "proj, found by tae": lambda: Projection.of_decoder(lambda z: decoded(tae, z), latents),
            "proj": lambda: projection(latents),
            "tae": lambda: decoded(tae, latents),
            "vae": lambda: decoded(vae, latents),
        }
        rows: dict[str, dict[str, float]] = {}
        print(f"{args.size}x{args.size}, {backend.n_threads} threads")
        print(f"{'':20} {'seconds':>8} {'MiB':>7}")
        for name, run in ways.items():
            largest[0], seconds = 0, []
            for _ in range(args.rounds):
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
            rows[name] = {"seconds": min(seconds), "mib": largest[0] / 2**20}
            print(f"{name:20} {min(seconds):8.3f} {largest[0] / 2**20:7.0f}", flush=True)
        print(json.dumps(rows))
        tae.close()
        vae.close()


if __name__ == "__main__":
    main()
