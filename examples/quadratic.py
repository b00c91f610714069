"""a·x·x + b: a graph is built once and computed for many inputs."""

import numpy as np

from pyggml import Backend, Graph

with Graph(Backend.cpu()) as graph:
    x = graph.input((8,), name="x")
    a = graph.input((1,), name="a")
    b = graph.input((1,), name="b")
    graph.output(a * x * x + b, name="y")

    for scale in (1.0, 3.0):
        y = graph.compute(x=np.arange(8), a=[scale], b=[4.0])["y"]
        print(y)
