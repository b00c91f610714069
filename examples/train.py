"""Train a small network with ggml: gradients by a backward graph, steps by AdamW, all in one graph.

Two layers learn y = sin(3x) from 256 points. ggml has gradients for the operations that such networks are made of, not
for all: `graph.backward` raises ShapeError for one that has none (floor, flash_attn_ext, group_norm, ...).
"""

import numpy as np

from pyggml import Backend, Buffer, Context, Graph, Tensor, ops

HIDDEN, STEPS = 32, 500
rng = np.random.default_rng(0)
backend = Backend.cpu(1)


def zeros_and_weights() -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Weights with random values, and AdamW's two moments for each, which start as zeros."""
    context = Context(n_tensors=12)
    shapes = {"w1": (1, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, 1), "b2": (1,)}
    weights = {name: context.new_tensor(ne, name=name) for name, ne in shapes.items()}
    moments = {n: (context.new_tensor(ne), context.new_tensor(ne)) for n, ne in shapes.items()}
    Buffer.allocate(context, backend.buffer_type)
    for name, ne in shapes.items():
        weights[name].set(rng.normal(0, 1.0 if name == "w1" else 0.3, ne[::-1]))
        for moment in moments[name]:
            moment.set(np.zeros(ne[::-1]))
    return weights, moments


weights, moments = zeros_and_weights()
points = rng.uniform(-1, 1, (256, 1))
graph = Graph(backend, 512, grads=True)
params = {name: graph.param(w) for name, w in weights.items()}
x, y = graph.input((1, 256), name="x"), graph.input((1, 256), name="y")
hidden = (ops.mul_mat(params["w1"], x) + params["b1"]).silu()
predicted = ops.mul_mat(params["w2"], hidden) + params["b2"]
loss = (predicted - y).sqr().sum() * (1 / 256)
grads = graph.backward(loss, list(params.values()))
settings = graph.input((7,), name="settings")
for (name, param), grad in zip(params.items(), grads, strict=True):
    graph.add(ops.opt_step_adamw(param, grad, *moments[name], settings))
graph.output(loss, name="loss")

first = None
for step in range(1, STEPS + 1):
    # rate, β₁, β₂, ε, weight decay, and the two corrections for moments that start at zero
    adamw = [0.02, 0.9, 0.999, 1e-8, 0.0, 1 / (1 - 0.9**step), 1 / (1 - 0.999**step)]
    value = float(graph.compute(x=points, y=np.sin(3 * points), settings=adamw)["loss"][0])
    first = value if first is None else first
print(f"loss {first:.4f} -> {value:.6f} in {STEPS} steps")
