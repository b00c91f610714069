"""What Python costs: processor seconds to build and allocate a graph of Z-Image's size, once per shape.

    python benchmarks/bench_bindings.py

34 blocks as Z-Image's transformer has them (dim 3840, 30 heads, 4,128 tokens): 1,530 nodes. Nothing is computed
and the weights have no memory behind them; the compute buffer is allocated. Best of 200, in processor seconds: on a
busy machine other processes take it away for longer than a run lasts. Ends with one line of JSON.
"""

from __future__ import annotations

import gc
import json
import platform
import time

from pyggml import Backend, Context, Graph, Tensor, Type, ops
from pyggml.lib import ffi, lib

DIM, HEADS, TOKENS, HIDDEN, BLOCKS = 3840, 30, 4128, 10240, 34
GOAL = 3e-3
N_RUNS = 200


def parameters() -> list[dict[str, Tensor]]:
    """Weights of all blocks; their data points at a few bytes that nobody reads."""
    context = Context(BLOCKS * 16)
    shapes = {
        "q": (DIM, DIM), "k": (DIM, DIM), "v": (DIM, DIM), "out": (DIM, DIM), "w1": (DIM, HIDDEN), "w2": (HIDDEN, DIM),
        "w3": (DIM, HIDDEN), "modulation": (256, 4 * DIM),
    }  # fmt: skip
    norms = {"norm1": DIM, "norm2": DIM, "norm3": DIM, "norm4": DIM, "q_norm": DIM // HEADS, "k_norm": DIM // HEADS}
    blocks = []
    for _ in range(BLOCKS):
        block = {name: context.new_tensor(ne, Type.Q4_K) for name, ne in shapes.items()}
        block |= {name: context.new_tensor((n,)) for name, n in norms.items()}
        blocks.append(block)
    for tensor in context.tensors():
        tensor.ptr.data = ffi.cast("void *", 64)
    return blocks


def attention(p: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    heads = []
    for name in "qk":
        h = ops.reshape(ops.mul_mat(p[name], x), DIM // HEADS, HEADS, TOKENS)
        h = ops.mul(ops.rms_norm(h, 1e-5), p[f"{name}_norm"])
        heads.append(ops.permute(ops.rope_ext(h, positions, DIM // HEADS), 0, 2, 1, 3))
    v = ops.permute(ops.reshape(ops.mul_mat(p["v"], x), DIM // HEADS, HEADS, TOKENS), 0, 2, 1, 3)
    out = ops.flash_attn_ext(*(ops.cast(t, Type.F16) if i else t for i, t in enumerate([*heads, v])), scale=0.088)
    return ops.mul_mat(p["out"], ops.reshape(out, DIM, TOKENS))


def block(p: dict[str, Tensor], x: Tensor, t: Tensor, positions: Tensor) -> Tensor:
    scale1, gate1, scale2, gate2 = ops.chunk(ops.mul_mat(p["modulation"], t), 4)
    h = ops.mul(ops.mul(ops.rms_norm(x, 1e-5), p["norm1"]), scale1)
    x = ops.add(x, ops.mul(ops.mul(ops.rms_norm(attention(p, h, positions), 1e-5), p["norm2"]), ops.tanh(gate1)))
    h = ops.mul(ops.mul(ops.rms_norm(x, 1e-5), p["norm3"]), scale2)
    h = ops.mul_mat(p["w2"], ops.swiglu_split(ops.mul_mat(p["w1"], h), ops.mul_mat(p["w3"], h)))
    return ops.add(x, ops.mul(ops.mul(ops.rms_norm(h, 1e-5), p["norm4"]), ops.tanh(gate2)))


def measure(backend: Backend, params: list[dict[str, Tensor]]) -> dict[str, float]:
    times = {}
    start = time.thread_time()
    graph = Graph(backend, 2048)
    x, t = graph.input((DIM, TOKENS), name="x"), graph.input((256,), name="t")
    positions = graph.input((TOKENS,), Type.I32, name="positions")
    for p in params:
        x = block(p, x, t, positions)
    times["nodes"] = time.thread_time() - start
    graph.output(x, name="y")
    times["graph"] = time.thread_time() - start
    graph.alloc()
    times["allocated"] = time.thread_time() - start
    times["count"] = lib.ggml_graph_n_nodes(graph.graph_ptr)
    times["bytes"] = graph.buffer_size
    graph.close()
    return times


def main() -> None:
    backend, params = Backend.cpu(1), parameters()
    gc.disable()
    runs = [measure(backend, params) for _ in range(N_RUNS)]
    best = {key: min(run[key] for run in runs) for key in runs[0]}
    build, expand = best["nodes"], best["graph"] - best["nodes"]
    alloc = best["allocated"] - best["graph"]
    n = int(best["count"])
    print(f"{n} nodes, compute buffer {best['bytes'] / 2**20:.0f} MiB; best of {len(runs)}")
    print(f"{'making nodes':24} {build * 1e3:7.2f} ms  {build / n * 1e6:6.2f} us a node")
    print(f"{'ordering them':24} {expand * 1e3:7.2f} ms")
    print(f"{'checking, allocating':24} {alloc * 1e3:7.2f} ms")
    print(f"{'together':24} {best['allocated'] * 1e3:7.2f} ms  goal {GOAL * 1e3:.0f} ms")
    reached = best["allocated"] <= GOAL
    result = {"benchmark": "bindings", "nodes": n, "seconds": best["allocated"], "build": build, "order": expand}
    result |= {"alloc": alloc, "goal": GOAL, "reached": reached}
    result |= {"python": platform.python_version(), "machine": platform.machine()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
