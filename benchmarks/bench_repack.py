"""Time matrix products with weights as the file has them and in the layouts of the extra buffer types.

    python benchmarks/bench_repack.py [--threads 2] [--types q4_0,q4_K] [--rounds 9]

`plain` is what `models.nn.linear` computes with: our kernels for q8_0 and q4_K where they fit, else ggml's. Weights
ne [3840, 10240] (Z-Image's feed-forward), 25 tokens (a prompt) and 288 (256x256 pixels and a prompt). Medians of
alternating rounds, in ms. The last column is plain / repacked at 25 and 288 tokens, `*` where both are above 1.05:
those are the types of loader.repack.FASTER. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from loader.repack import takes
from models.nn import linear
from pyggml import Backend, Buffer, BufferType, Context, Graph, Tensor, Type, quantize
from pyggml.lib import ffi, lib

NE = (3840, 10240)
TOKENS = (25, 288)
TYPES = ("f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "iq4_nl",
         "iq4_xs", "mxfp4")  # fmt: skip


def weight(buffer_type: BufferType, type: Type, raw: np.ndarray) -> Tensor:
    context = Context(1)
    tensor = context.new_tensor(NE, type)
    Buffer.allocate(context, buffer_type, weights=True)
    lib.ggml_backend_tensor_set(tensor.ptr, ffi.from_buffer(raw), 0, raw.nbytes)
    return tensor


def graph_of(backend: Backend, w: Tensor, n_tokens: int, x: np.ndarray) -> Graph:
    graph = Graph(backend, 16)
    graph.output(linear(w, graph.input((NE[0], n_tokens), name="x")), name="y")
    graph.compute(x=x[:n_tokens])
    return graph


def measure(backend: Backend, name: str, n_rounds: int) -> dict[str, list[float]]:
    """Layout -> median ms at each number of tokens."""
    rng = np.random.default_rng(1)
    type = Type[name.upper()]
    raw = quantize(rng.standard_normal(NE[::-1], np.float32) / 64, type)
    x = rng.standard_normal((max(TOKENS), NE[0]), np.float32)
    device = backend.device
    layouts = {"plain": device.buffer_type}
    layouts |= {b.name: b for b in device.extra_buffer_types if takes(device, b, NE, type)}
    if len(layouts) == 1:
        return {}
    graphs = {
        layout: [graph_of(backend, weight(b, type, raw), n, x) for n in TOKENS] for layout, b in layouts.items()
    }
    times: dict[str, list[list[float]]] = {layout: [[] for _ in TOKENS] for layout in layouts}
    for _ in range(n_rounds):
        for layout, pair in graphs.items():
            for i, graph in enumerate(pair):
                start = time.perf_counter()
                graph.run()
                times[layout][i].append(1e3 * (time.perf_counter() - start))
    return {layout: [statistics.median(t) for t in rows] for layout, rows in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="physical cores unless given")
    parser.add_argument("--types", default=",".join(TYPES), help="with commas between them")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    figures = {}
    with Backend.cpu(args.threads) as backend:
        print(f"{'type':8} {'layout':12} " + " ".join(f"{n:5} tokens" for n in TOKENS) + "   plain / repacked")
        for name in args.types.split(","):
            rows = measure(backend, name, args.rounds)
            figures[name] = rows
            if not rows:
                print(f"{name:8} no extra buffer type takes it")
            for layout, ms in rows.items():
                ratios = [p / m for p, m in zip(rows["plain"], ms, strict=True)]
                mark = "*" if min(ratios) > 1.05 else ""
                ratio = "" if layout == "plain" else " ".join(f"{r:.2f}" for r in ratios) + f" {mark}"
                print(f"{name:8} {layout:12} " + " ".join(f"{m:9.2f} ms" for m in ms) + f"   {ratio}", flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
