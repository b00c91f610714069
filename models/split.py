"""The parameters of one network on several backends: a run of layers for each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from itertools import groupby
from math import prod
from typing import Any

from loader.checkpoint import Checkpoint
from loader.options import LoadOptions
from loader.params import LoadReport, Param, Weights, load_params
from pyggml import SplitBackend


class SplitWeights(Weights):
    """The weights of each part as those of one network. It has no context of its own: `parts` have theirs."""

    def __init__(self, parts: list[Weights]) -> None:
        self.parts = parts
        self.files = tuple(file for part in parts for file in part.files)
        self.params = {name: param for part in parts for name, param in part.params.items()}
        self.report = self._sum()

    @property
    def closed(self) -> bool:
        return all(part.closed for part in self.parts)

    def changed(self) -> str | None:
        return next(filter(None, (part.changed() for part in self.parts)), None)

    def _sum(self) -> LoadReport:
        reports = [asdict(part.report) for part in self.parts]
        total: dict[str, Any] = reports[0]
        for report in reports[1:]:
            for key, value in report.items():
                if isinstance(value, dict):
                    total[key] = dict(Counter(total[key]) + Counter(value))
                elif isinstance(value, (int, float)):
                    total[key] += value
        return LoadReport(**total)

    def close(self) -> None:
        for part in self.parts:
            part.close()


def load_split(
    params: Mapping[str, Param], checkpoint: Checkpoint, *, backend: SplitBackend, component: str,
    options: LoadOptions | None = None,
) -> SplitWeights:  # fmt: skip
    """As `load_params`, for a backend of several parts: each gets about as many bytes of whole layers, in order."""
    loaded: list[Weights] = []
    try:
        for part, names in zip(backend.parts, shares(params, checkpoint, len(backend.parts)), strict=True):
            mine = {name: params[name] for name in names}
            # what the other parts hold is no surplus
            others = "|".join(re.escape(name) for name in params if name not in mine)
            rest = checkpoint.renamed([(rf"^(?:{others})$", None)]) if others else checkpoint
            loaded.append(load_params(mine, rest, backend=part, component=component, options=options))
    except BaseException:
        for weights in loaded:
            weights.close()
        raise
    return SplitWeights(loaded)


def shares(params: Mapping[str, Param], checkpoint: Checkpoint, n: int) -> list[list[str]]:
    """Names for each of n parts, in the order of the network; a numbered layer is never divided."""

    def layer(name: str) -> str:
        match = re.match(r"(.*?\.\d+)\.", name)
        return match[1] if match else name

    def size(name: str) -> int:
        return checkpoint[name].n_bytes if name in checkpoint else 4 * prod(params[name].ne)

    total, done = sum(map(size, params)), 0
    result: list[list[str]] = [[] for _ in range(n)]
    for _, group in groupby(params, layer):
        names = list(group)
        n_bytes = sum(map(size, names))
        # where the middle of the layer falls
        result[min((2 * done + n_bytes) * n // (2 * total), n - 1)] += names
        done += n_bytes
    return result
