"""Products with quantised weights, our kernel (pyggml/gemm.c) beside ggml's, in Gop/s (a multiply-add is two).

    python benchmarks/bench_matmul.py [--threads 2] [--tokens 4 25 288 1056]

Weights are 3840x10240 and 10240x3840, Z-Image's feed-forward, eight of each in one graph: none stays in a
cache. Best of five. Prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from pyggml import Backend, Buffer, Context, Graph, Type, ops
from pyggml.lib import ffi, lib

SHAPES = ((3840, 10240), (10240, 3840))
N_WEIGHTS, N_RUNS = 8, 5


def measure(backend: Backend, type: Type, ne: tuple[int, int], tokens: int) -> dict[str, float]:
    """Gop/s of both kernels; no "pyggml" where ours does not apply."""
    rng = np.random.default_rng(0)
    context = Context(N_WEIGHTS)
    weights = [context.new_tensor(ne, type) for _ in range(N_WEIGHTS)]
    Buffer.allocate(context, backend.buffer_type)
    weights[0].set((rng.standard_normal(ne[::-1]) * 0.02).astype(np.float32))
    for other in weights[1:]:
        ffi.memmove(other.ptr.data, weights[0].ptr.data, lib.ggml_nbytes(other.ptr))
    x_values = rng.standard_normal((tokens, ne[0])).astype(np.float32)
    rates = {}
    for name, product in (("pyggml", ops.mul_mat_fast), ("ggml", ops.mul_mat)):
        with Graph(backend, 64) as graph:
            x = graph.input((ne[0], tokens), name="x")
            for i, w in enumerate(weights):
                if (y := product(w, x)) is not None:
                    graph.output(y, name=f"y{i}")
            if not graph.outputs:
                continue
            graph.set(x=x_values)
            seconds = []
            for _ in range(N_RUNS):
                start = time.perf_counter()
                graph.run()
                seconds.append(time.perf_counter() - start)
            rates[name] = 2e-9 * N_WEIGHTS * ne[0] * ne[1] * tokens / min(seconds)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 25, 288, 1056])
    args = parser.parse_args()
    backend = Backend.cpu(args.threads)
    rows = []
    print("| type | weight | tokens | pyggml | ggml | ratio |\n|---|---|---|---|---|---|")
    for type in (Type.Q4_K, Type.Q8_0):
        for ne in SHAPES:
            for tokens in args.tokens:
                rates = measure(backend, type, ne, tokens)
                ours = rates.get("pyggml", float("nan"))
                print(f"| {type.name.lower()} | {ne[0]}x{ne[1]} | {tokens} | {ours:.0f} | {rates['ggml']:.0f} | "
                      f"{ours / rates['ggml']:.1f}x |", flush=True)  # fmt: skip
                rows.append({"type": type.name, "ne": ne, "tokens": tokens, **rates})
    print(json.dumps({"benchmark": "matmul", "unit": "Gop/s", "threads": args.threads, "rows": rows}))


if __name__ == "__main__":
    main()
