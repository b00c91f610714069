"""Computing a graph, and looking at what comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pyggml import Cancelled, Graph, Tensor
from pyggml.lib import ffi

# compute(graph, **inputs) -> outputs: Graph.compute, or a function around it
Compute = Callable[..., dict[str, Any]]


def first_bad_op(graph: Graph) -> str:
    """The first node whose result is not finite, and the names of what it was made of.

    Found by computing the graph again, node by node, with the inputs it has.
    """
    found: list[str] = []

    def look(node: Tensor) -> bool:
        if not np.isfinite(node.numpy()).all():
            names = [Tensor(source, graph).name or "?" for source in node.ptr.src if source != ffi.NULL]
            found.append(f"{node!r} of {', '.join(names)}")
        return not found

    try:
        graph.each(look)
    except Cancelled:
        if not found:
            raise
    return found[0] if found else "none when they are computed one by one"
