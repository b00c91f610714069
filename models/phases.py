"""The graphs that the parts of a run compute, built and measured: what `Pipeline.phases` puts together to a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .component import Component
from .prediction import Phase
from .residency import Span
from .sizes import SIZE_MULTIPLE
from .step_cache import DBCache, StepCache

Tile = tuple[int, int] | None  # height and width in latent pixels
# What a transformer's `step_graph`, for lengths of contexts, or `part_graph`, for one, is built for.
Sizes = Callable[[Any], Sequence[Any]]


def step_phases(
    transformer: Component, sizes: Sizes, lengths: Sequence[int], spans: Sequence[Span], *, cache: StepCache | None,
    at_once: bool, extra: int = 0,
) -> list[Phase]:  # fmt: skip
    """Of a step. lengths: of the prompt's context and, with guidance, of the negative one's; at_once: in one graph."""
    dit, at = transformer.module, transformer.backend
    if not isinstance(cache, DBCache):
        together = [tuple(lengths)] if at_once and cache is None else [(n,) for n in dict.fromkeys(lengths)]
        graphs = (dit.step_graph(at, *sizes(several)) for several in together)
        return [Phase.of("steps", graph, spans, stays=True, extra=extra) for graph in graphs]
    cache.check(dit.config.n_layers)
    cuts = cache.cuts(dit.config.n_layers)
    fronts, found = [], []
    for n in lengths:  # each has what it remembers, also where they are of one size
        with dit.part_graph(at, *sizes(n), cuts[0]) as graph:
            fronts.append({name: tensor.n_bytes for name, tensor in graph.outputs.items()})
    extra += cache.n_bytes(fronts)
    for n in dict.fromkeys(lengths):
        for name, cut in zip(("front blocks", "middle blocks", "back blocks"), cuts, strict=True):
            found.append(Phase.of(name, dit.part_graph(at, *sizes(n), cut), spans, stays=True, extra=extra))
    return found


def decoder_phase(name: str, part: Component, size: tuple[int, int], tile: Tile, spans: Sequence[Span]) -> Phase:
    """Of latents of that (height, width)."""
    h, w = size
    extra = 16 * SIZE_MULTIPLE**2 * h * w  # bytes: three floats, and whether each is finite
    if tile:  # and the widest layers of the whole picture in memory of our own
        extra += part.module.decoder_tiled_bytes(SIZE_MULTIPLE * h, SIZE_MULTIPLE * w)
        h, w = min(h, tile[0]), min(w, tile[1])
    return Phase.of(name, part.module.decoder_graph(part.backend, h, w), spans, extra=extra)


def encoder_phase(part: Component, width: int, height: int, tile: Tile, spans: Sequence[Span]) -> Phase:
    """Of a picture of that size."""
    h, w = height, width
    extra = 28 * h * w  # bytes: three floats, twice, and what was read
    if tile:  # as when decoding
        extra += part.module.encoder_tiled_bytes(h, w)
        h, w = min(h, SIZE_MULTIPLE * tile[0]), min(w, SIZE_MULTIPLE * tile[1])
    return Phase.of("image encoder", part.module.encoder_graph(part.backend, h, w), spans, extra=extra)


def once_more(phases: Sequence[Phase]) -> list[Phase]:
    """The same graphs as before: what stays is there."""
    return [replace(phase, buffer=0, stays=False) if phase.stays else phase for phase in phases]
