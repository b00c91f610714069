"""`pyggml compare-backends`: the operations of a run on two devices."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.pipeline import Pipeline
    from pyggml import Graph


def check(other: str, tolerance: float) -> None:
    """ValueError for a device that there is not, or a tolerance that nothing or everything is within."""
    from models.devices import find_device

    find_device(other, "--with")
    if not 0 < tolerance < 1:
        raise ValueError(f"--tolerance must be above 0 and below 1, not {tolerance}")


def show(pipe: Pipeline, other: str, tolerance: float, **call: Any) -> int:
    """Draw in one step as `call` says, print what `other` makes of each part's operations; returns the exit code."""
    from models.devices import find_device
    from pyggml.compare import compare_ops

    n_wrong = 0
    with find_device(other, "--with").open() as backend:

        def look(stage: str, graph: Graph) -> None:
            nonlocal n_wrong
            n, left_out, largest, first = 0, 0, 0.0, ""
            for found in compare_ops(graph, backend):
                if found.error is None:
                    left_out += 1
                    continue
                n, largest = n + 1, max(largest, found.error)
                if found.error > tolerance and not first:
                    first = f"; the first above {tolerance:g} is {found}"
            n_wrong += bool(first)
            without = f", {left_out} left out" if left_out else ""
            devices = f"{graph.backend.device.name} and {backend.device.name}"
            print(f"{stage}: {n} operations on {devices}{without}, they differ by at most {_shown(largest)}{first}")

        pipe.look = look
        try:
            pipe(**call, num_inference_steps=1, output_type="np")
        finally:
            pipe.look = None
    return 1 if n_wrong else 0


def _shown(error: float) -> str:
    return f"{error:.2g}" if math.isfinite(error) else "values that are not finite"
