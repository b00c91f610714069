"""Attention without a mask: our kernel (pyggml/attention.c, f32) beside ggml's flash_attn_ext (keys and values in f16).

    python benchmarks/bench_attention.py [--threads 2] [--heads 30] [--tokens 288 1056 4128]

Heads of 128, as in Z-Image; 256x256, 512x512 and 1024x1024 pixels have that many tokens. GFLOP/s, of 4 x tokens² x 128
for each head, the median of three runs after one, the two kernels in turn; and the share of what benchmarks/peak.c
measures the same cores to be able to in f32. Prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
from compare import machine_peaks

from pyggml import Backend, Graph, Type, ops

HEAD_DIM, N_RUNS = 128, 4


def graphs(backend: Backend, n_heads: int, n: int) -> dict[str, Graph]:
    """Of both kernels, with their inputs set."""
    x = np.random.default_rng(0).standard_normal((3, n, n_heads, HEAD_DIM), np.float32)
    made = {}
    for name in ("pyggml", "ggml"):
        graph = made[name] = Graph(backend, 64)
        ne = (HEAD_DIM, n_heads, n) if name == "pyggml" else (HEAD_DIM, n, n_heads)
        types = (Type.F32, Type.F32, Type.F32) if name == "pyggml" else (Type.F32, Type.F16, Type.F16)
        q, k, v = (graph.input(ne, type, name=key) for key, type in zip("qkv", types, strict=True))
        scale = HEAD_DIM**-0.5
        y = ops.attention(q, k, v, scale) if name == "pyggml" else ops.flash_attn_ext(q, k, v, scale=scale)
        graph.output(y, name="y")
        graph.set(**dict(zip("qkv", x if name == "pyggml" else x.transpose(0, 2, 1, 3), strict=True)))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--heads", type=int, default=30)
    parser.add_argument("--tokens", type=int, nargs="+", default=[288, 1056, 4128])
    args = parser.parse_args()
    backend = Backend.cpu(args.threads)
    peak, rows = machine_peaks(args.threads)["f32"], []
    print("| tokens | pyggml | of the f32 peak | ggml | ratio |\n|---|---|---|---|---|")
    for n in args.tokens:
        made = graphs(backend, args.heads, n)
        seconds: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(N_RUNS):
            for name, graph in made.items():
                start = time.perf_counter()
                graph.run()
                seconds[name].append(time.perf_counter() - start)
        work = 4e-9 * n**2 * HEAD_DIM * args.heads
        ours, theirs = (work / statistics.median(seconds[name][1:]) for name in ("pyggml", "ggml"))
        print(f"| {n} | {ours:.0f} | {ours / peak:.0%} | {theirs:.0f} | {ours / theirs:.1f}x |", flush=True)
        rows.append({"tokens": n, "pyggml": ours, "ggml": theirs})
        for graph in made.values():
            graph.close()
    print(json.dumps({"benchmark": "attention", "unit": "GFLOP/s", "peak": peak, "rows": rows}))


if __name__ == "__main__":
    main()
