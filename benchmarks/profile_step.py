"""Where the time of a step, an encoding or a decoding goes: seconds per operation, computed one by one.

    python benchmarks/profile_step.py zimage-q4_K.gguf [--size 256] [--threads 2]
    python benchmarks/profile_step.py qwen3-q8_0.gguf [--tokens 25]
    python benchmarks/profile_step.py ae.safetensors
    python benchmarks/profile_step.py qwen-image-q4_K.gguf [--references 1]; so the other files of Qwen-Image

Prints a table and ends with one line of JSON. Weights may be random: the time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loader.checkpoint import open_checkpoint
from loader.describe import describe
from loader.params import load_params
from models import autoencoder_kl, autoencoder_qwen, qwen3, qwen25_vl
from models.qwen_image import transformer as qwen_net
from models.z_image import transformer as net
from pyggml import Backend, Graph, summarise


def transformer_graph(path: str, backend: Backend, args: argparse.Namespace) -> tuple[Graph, dict[str, Any], object]:
    checkpoint = open_checkpoint(path).without_prefix("model.diffusion_model.").renamed(net.RENAMES)
    config = net.ZImageConfig.from_checkpoint(checkpoint)
    module = net.ZImageTransformer(config)
    weights = load_params(module.params(), checkpoint, backend=backend, component="z_image")
    side, n = args.size // 16, net.padded(args.tokens)
    rng = np.random.default_rng(0)
    graph = module.step_graph(backend, side * side, [n])
    position = np.concatenate([net.image_positions(side, side, n), net.context_positions(n)], axis=1)
    return graph, {
        "patches": rng.standard_normal((side * side, config.patch_dim), np.float32), "t": np.float32([300.0]),
        "context": rng.standard_normal((n, config.dim), np.float32), "position": position,
    }, weights  # fmt: skip


def qwen_image_graph(path: str, backend: Backend, args: argparse.Namespace) -> tuple[Graph, dict[str, Any], object]:
    checkpoint = open_checkpoint(path).without_prefix("model.diffusion_model.")
    config = qwen_net.QwenImageConfig.from_checkpoint(checkpoint)
    module = qwen_net.QwenImageTransformer(config)
    checkpoint = checkpoint.renamed(qwen_net.RENAMES)
    weights = load_params(module.params(), checkpoint, backend=backend, component="qwen_image")
    rng, n, n_vectors = np.random.default_rng(0), args.tokens, qwen_net.N_MOD * config.n_layers
    times = np.linspace(1, 0.05, 20)
    with module.modulation_graph(backend, qwen_net.TIMES_AT_ONCE) as graph:
        graph.compute(t=np.zeros(qwen_net.TIMES_AT_ONCE))  # the file is read
    start = time.perf_counter()
    module.modulate(backend, times)
    print(f"modulation, once for {len(times)} steps: {time.perf_counter() - start:.2f} s")
    side = args.size // 16
    grid = (side, side)
    references = [grid] * args.references
    n_patches, n_references = side * side, side * side * args.references
    vectors = rng.standard_normal((n_vectors + 2, config.dim), np.float32) / 10
    inputs = {
        "patches": rng.standard_normal((n_patches + n_references, config.patch_dim), np.float32),
        "context": rng.standard_normal((n, config.dim), np.float32),
        "position": qwen_net.joint_positions(n, grid, references, layered=config.layered),
        "modulation_image": vectors, "modulation_text": vectors[:n_vectors],
    }  # fmt: skip
    graph = module.step_graph(backend, n_patches, [n], n_references)
    return graph, {name: value for name, value in inputs.items() if name in graph.inputs}, weights


def qwen_encoder_graph(path: str, backend: Backend, args: argparse.Namespace) -> tuple[Graph, dict[str, Any], object]:
    checkpoint = open_checkpoint(path).renamed(qwen25_vl.RENAMES)
    config = qwen25_vl.Qwen25VLConfig.from_checkpoint(checkpoint)
    module = qwen25_vl.Qwen25VL(config)
    weights = load_params(module.params(), checkpoint, backend=backend, component="qwen25_vl")
    n = args.tokens
    mask = np.triu(np.full((n, n), -np.inf, np.float16), 1)
    ids = np.random.default_rng(0).integers(0, config.n_vocab, n).astype(np.int32)
    position = np.concatenate([*np.tile(np.arange(n), (3, 1)), np.zeros(n)]).astype(np.int32)
    return module.graph(backend, n), {"ids": ids, "position": position, "mask": mask}, weights


def qwen_decoder_graph(path: str, backend: Backend, args: argparse.Namespace) -> tuple[Graph, dict[str, Any], object]:
    checkpoint = open_checkpoint(path).renamed([*autoencoder_qwen.RENAMES, *autoencoder_qwen.without("encoder")])
    config = autoencoder_qwen.QwenAutoencoderConfig.from_checkpoint(checkpoint)
    module = autoencoder_qwen.QwenAutoencoder(config, encoder=False)
    weights = load_params(module.params(), checkpoint, backend=backend, component="vae")
    side = args.size // autoencoder_qwen.FACTOR
    latents = np.random.default_rng(0).standard_normal((config.latent_channels, side, side), np.float32)
    return module.decoder_graph(backend, side, side), {"latents": latents}, weights


def encoder_graph(path: str, backend: Backend, args: argparse.Namespace) -> tuple[Graph, dict[str, Any], object]:
    checkpoint = open_checkpoint(path).renamed(qwen3.RENAMES)
    config = qwen3.Qwen3Config.from_checkpoint(checkpoint)
    module = qwen3.Qwen3(config)
    checkpoint = checkpoint.renamed([(rf"^blk\.{config.n_layers - 1}\..*$", None)])
    weights = load_params(module.params(), checkpoint, backend=backend, component="qwen3")
    n = args.tokens
    ids = np.random.default_rng(0).integers(0, config.n_vocab, n).astype(np.int32)
    mask = np.triu(np.full((n, n), -np.inf, np.float16), 1)
    return module.graph(backend, n), {"ids": ids, "position": np.arange(n, dtype=np.int32), "mask": mask}, weights


def decoder_graph(path: str, backend: Backend, args: argparse.Namespace) -> tuple[Graph, dict[str, Any], object]:
    checkpoint = open_checkpoint(path).renamed([*autoencoder_kl.RENAMES, (r"^encoder\..*$", None)])
    config = autoencoder_kl.AutoencoderConfig.from_checkpoint(checkpoint)
    module = autoencoder_kl.AutoencoderKL(config, encoder=False)
    weights = load_params(module.params(), checkpoint, backend=backend, component="vae")
    side = args.size // autoencoder_kl.FACTOR
    latents = np.random.default_rng(0).standard_normal((config.latent_channels, side, side), np.float32)
    return module.decoder_graph(backend, side, side), {"latents": latents}, weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=25)
    parser.add_argument("--references", type=int, default=0, help="pictures of the same size, for Qwen-Image")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with open_checkpoint(args.file) as checkpoint:
        found = describe(checkpoint)
    build = {
        "Z-Image": transformer_graph, "Qwen3": encoder_graph, "Flux autoencoder": decoder_graph,
        "Qwen-Image": qwen_image_graph, "Qwen-Image Layered": qwen_image_graph,
        "Qwen2.5-VL": qwen_encoder_graph, "Qwen2 or Qwen2.5-VL": qwen_encoder_graph,
        "Qwen-Image (Wan) autoencoder": qwen_decoder_graph,
    }[found.architecture]  # fmt: skip
    backend = Backend.cpu(args.threads)
    graph, inputs, weights = build(args.file, backend, args)
    graph.compute(**inputs)
    seconds = []
    for _ in range(args.rounds):
        start = time.perf_counter()
        graph.run()
        seconds.append(time.perf_counter() - start)
    table = summarise(graph.profile())
    total = sum(s for _, s in table.values())
    print(f"{args.file}: {sorted(seconds)[len(seconds) // 2]:.2f} s (median of {args.rounds}), {args.threads} threads, "
          f"compute buffer {graph.buffer_size / 1e6:.0f} MB")  # fmt: skip
    print("| operation | nodes | seconds | share |\n|---|---|---|---|")
    for name, (count, s) in table.items():
        if s >= 0.001 * total:
            print(f"| {name} | {count} | {s:.3f} | {100 * s / total:.1f} % |")
    print(json.dumps({"file": args.file, "seconds": seconds, "operations": table, "buffer": graph.buffer_size}))
    del weights


if __name__ == "__main__":
    main()
