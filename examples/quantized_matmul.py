"""Multiply by 4-bit weights: they stay q4_K in memory, a seventh of f32."""

import numpy as np

from pyggml import Backend, Buffer, Context, Graph, Type, ops

rng = np.random.default_rng(0)
weights, inputs = rng.normal(size=(512, 1024)), rng.normal(size=(16, 1024))

backend = Backend.cpu()
params = Context(n_tensors=1)
w = params.new_tensor((1024, 512), Type.Q4_K, name="w")  # ne [n_in, n_out]
Buffer.allocate(params, backend.buffer_type)
w.set(weights)  # quantised by ggml's kernels

graph = Graph(backend)
x = graph.input((1024, 16), name="x")  # ne [n_in, n_rows]
graph.output(ops.mul_mat(w, x), name="y")
y = graph.compute(x=inputs)["y"]  # numpy shape (16, 512)

exact = inputs @ weights.T
error = np.sqrt(np.mean((y - exact) ** 2) / np.mean(exact**2))
print(f"{w.n_bytes} bytes instead of {weights.size * 4}, relative error {error:.3f}")
