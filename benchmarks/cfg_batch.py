"""Both predictions of guidance in one graph or one after the other: the seconds of a step of Qwen-Image, in turn.

    python benchmarks/cfg_batch.py MODEL.gguf [--size 256] [--steps 3] [--max-ram 6G] [--threads 2]

MODEL may be random, and have fewer blocks: `--write MODEL.gguf --layers 4 --type q4_K` writes one of the real widths.
--max-ram: for weights that do not fit and are read from the disk in each pass; disk bytes are those of /proc/self/io.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import numpy as np

from loader.checkpoint import open_checkpoint
from loader.params import load_params
from models.qwen_image import transformer as net
from models.qwen_image.transformer import QwenImageConfig, QwenImageTransformer
from models.residency import Residency
from pyggml import Backend
from studio.cli import _size

N_TEXT = 26, 6  # tokens of a prompt, and of a negative one


def write(path: str, n_layers: int, type: str) -> None:
    """A random transformer of the real widths."""
    import gguf

    from loader.save_plan import parse_type
    from pyggml.quantize import quantize

    kind, rng = parse_type(type), np.random.default_rng(0)
    module = QwenImageTransformer(QwenImageConfig(
        dim=3072, n_heads=24, head_dim=128, n_layers=n_layers, ff_dim=12288, text_dim=3584, patch_dim=64,
        axes_dims=(16, 56, 56),
    ))  # fmt: skip
    writer = gguf.GGUFWriter(path, "qwen_image")
    for name, param in module.params().items():
        shape = tuple(reversed(param.ne))
        if len(shape) == 1 or param.type is not None or shape[1] % 256:
            writer.add_tensor(name, rng.standard_normal(shape, np.float32) / 50 + (name.endswith("norm.weight")))
            continue
        rows = quantize(rng.standard_normal((64, shape[1]), np.float32) / 50, kind).reshape(64, -1)
        raw = rows[rng.integers(0, 64, shape[0])]
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def disk_bytes() -> int:
    text = Path("/proc/self/io").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("read_bytes")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--type", default="q4_K")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-ram", type=_size)
    args = parser.parse_args()
    if args.write:
        write(args.model, args.layers, args.type)
        return
    backend, rng, side = Backend.cpu(args.threads), np.random.default_rng(0), args.size // 16
    checkpoint = open_checkpoint(args.model).renamed(net.RENAMES)
    module = QwenImageTransformer(QwenImageConfig.from_checkpoint(checkpoint))
    weights = load_params(module.params(), checkpoint, backend=backend, component="qwen_image")
    residency = Residency({"qwen_image": weights}, limit=args.max_ram)
    c, n = module.config, side * side
    vectors = rng.standard_normal((net.N_MOD * c.n_layers + 2, c.dim), np.float32) / 10
    contexts = [rng.standard_normal((k, c.dim), np.float32) for k in N_TEXT]
    positions = [net.joint_positions(k, (side, side)) for k in N_TEXT]
    shared = {"patches": rng.standard_normal((n, c.patch_dim), np.float32), "modulation_image": vectors,
              "modulation_text": vectors[:-2]}  # fmt: skip
    graphs = {"one after the other": [module.step_graph(backend, n, [k]) for k in N_TEXT],
              "both in one graph": [module.step_graph(backend, n, N_TEXT)]}  # fmt: skip
    inputs = {"one after the other": [(contexts[i], positions[i]) for i in (0, 1)],
              "both in one graph": [(np.concatenate(contexts), np.concatenate(positions, axis=1))]}  # fmt: skip

    def step(how: str) -> tuple[float, int]:
        start, read = time.perf_counter(), disk_bytes()
        for graph, (context, position) in zip(graphs[how], inputs[how], strict=True):
            graph.set(**shared, context=context, position=position)
            residency.run(graph, how)
        return time.perf_counter() - start, disk_bytes() - read

    found: dict[str, list[tuple[float, int]]] = {how: [] for how in graphs}
    for _ in range(args.steps + 1):
        for how in graphs:
            found[how].append(step(how))
    for how, steps in found.items():
        seconds, read = zip(*steps[1:], strict=True)
        buffers = sum(graph.measure()[0] for graph in graphs[how])
        print(f"{how:20} {median(seconds):7.2f} s a step ({min(seconds):.2f} to {max(seconds):.2f}), "
              f"{median(read) / 1e9:.2f} GB read, buffers {buffers / 1e6:.0f} MB")  # fmt: skip
    for line in residency.report.decisions:
        print("  ", line)


if __name__ == "__main__":
    main()
