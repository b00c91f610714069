"""Convolutional networks on pictures that are too large for a device: operation by operation, tile by tile.

The activations of the whole picture lie in the host's memory, and the device sees a window of them at a time: a tile,
and around it the pixels that the operation looks at. A group norm takes its mean and variance from the whole picture,
not from a tile. So the result is that of the whole picture up to rounding, no pixel is computed twice, and there are no
seams to blend; tiles of the finished network would overlap, differ in their norms, and have to be blended.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import product
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pyggml import Backend, Graph, OutOfMemory, Tensor, ops

from .compute import Compute
from .nn import GroupNorm

log = logging.getLogger("pyggml.models")

Float32 = NDArray[np.float32]
DEFAULT = (32, 32)  # height and width of a tile in latent pixels, of which a picture's are FACTOR times as many
LEAST = 4

T = TypeVar("T")
Size = tuple[int, int]


class Map:
    """One layer's activations of the whole picture, `data` float32 [n_channels, height, width].

    Also the sums of each channel's values and of their squares, float64 [n_channels], which group norms ask for.
    """

    def __init__(self, data: Float32) -> None:
        self.data = data
        self.sums = np.zeros(len(data))
        self.squares = np.zeros(len(data))

    def store(self, rows: slice, columns: slice, values: Float32) -> None:
        """Put one tile, float32 [n_channels, ...], in its place."""
        self.data[:, rows, columns] = values
        # A row is short enough to be summed in float32, as fast as the memory; rows are many.
        self.sums += values.sum(axis=2).sum(axis=1, dtype=np.float64)
        self.squares += np.einsum("chw,chw->ch", values, values).sum(axis=1, dtype=np.float64)

    def affine(self, norm: GroupNorm) -> tuple[Float32, Float32]:
        """What the norm multiplies each channel by, and what it then adds: float32 [n_channels] each."""
        groups = (norm.N_GROUPS, -1)
        n = self.data[0].size * (len(self.data) // norm.N_GROUPS)
        mean = self.sums.reshape(groups).sum(axis=1, keepdims=True) / n
        variance = np.maximum(self.squares.reshape(groups).sum(axis=1, keepdims=True) / n - mean**2, 0)
        scale = norm.weight.tensor.numpy().reshape(groups) / np.sqrt(variance + norm.eps)
        shift = norm.bias.tensor.numpy().reshape(groups) - mean * scale
        return scale.astype(np.float32).ravel(), shift.astype(np.float32).ravel()


class Tiles:
    """Computes operations on maps. `tile`: (height, width) of a tile in pixels of a latent; `latent`: of the latent."""

    def __init__(
        self, backend: Backend, tile: Size, latent: Size, compute: Compute = Graph.compute
    ) -> None:
        self.backend = backend
        self.tile = tile
        self.latent = latent
        self.compute = compute

    def whole(self, operation: Callable[[Tensor], Tensor], data: Float32) -> Map:
        """An operation on all of a small map at once."""
        with Graph(self.backend, n_nodes=2048) as graph:
            graph.output(operation(graph.input(data.shape[::-1], name="x")), name="y")
            y = self.compute(graph, x=data)["y"]
        result = Map(np.empty_like(y))
        result.store(slice(None), slice(None), y)
        return result

    def __call__(
        self, operation: Callable[..., Tensor], x: Map, *, norm: GroupNorm | None = None, residual: Map | None = None,
        halo: int = 1, in_place: bool = False,
    ) -> Map:  # fmt: skip
        """operation(x, residual) on all tiles of the map, or maps, of one size.

        norm: normalise x over the whole map and apply SiLU first. halo: how many pixels around a tile the operation
        looks at, in x; in `residual` it may look at none. in_place: the result replaces the last map where it has its
        size and no more channels. The result may be twice or half as large as the maps.
        """
        maps = {"x": x} if residual is None else {"x": x, "residual": residual}
        constants = dict(zip(("scale", "shift"), x.affine(norm), strict=True)) if norm else {}
        height, width = x.data.shape[1:]
        spans = [
            list(_spans(size, tile * size // whole, halo))
            for size, tile, whole in zip((height, width), self.tile, self.latent, strict=True)
        ]
        h, w = (span[0][2].stop - span[0][2].start for span in spans)  # all windows have one size
        with Graph(self.backend, n_nodes=256) as graph:
            given = [graph.input((w, h, len(m.data)), name=name) for name, m in maps.items()]
            if constants:
                scale, shift = (graph.input((1, 1, len(c)), name=name) for name, c in constants.items())
                given[0] = ops.silu(ops.add(ops.mul(given[0], scale), shift))
            y = graph.output(operation(*given), name="y")
            n_out, zoom = y.ne[2], y.ne[0] / w
            last = x if residual is None else residual
            fits = in_place and n_out <= len(last.data)
            shape = (n_out, int(height * zoom), int(width * zoom))
            result = Map(last.data[:n_out] if fits else np.empty(shape, np.float32))
            constants = {name: c.reshape(-1, 1, 1) for name, c in constants.items()}
            for (top, bottom, rows), (left, right, columns) in product(*spans):
                windows = {name: m.data[:, rows, columns] for name, m in maps.items()}
                tile = self.compute(graph, **windows, **constants)["y"]
                here = [
                    slice(int((lo - window.start) * zoom), int((hi - window.start) * zoom))
                    for lo, hi, window in ((top, bottom, rows), (left, right, columns))
                ]
                there = [slice(int(lo * zoom), int(hi * zoom)) for lo, hi in ((top, bottom), (left, right))]
                result.store(there[0], there[1], tile[:, here[0], here[1]])
        return result


def with_less_memory(
    what: str, run: Callable[[Size | None], T], tile: Size | None, smaller: Size = DEFAULT
) -> tuple[T, Size | None]:
    """run(tile), and the tile that had room: when `tile` has none, `smaller`, then halves of it down to LEAST.

    None is no tiles at all. OutOfMemory when the least ones have no room.
    """
    while True:
        following = smaller if tile is None else (max(tile[0] // 2, LEAST), max(tile[1] // 2, LEAST))
        try:
            return run(tile), tile
        except OutOfMemory as error:
            if following == tile:
                raise
            height, width = tile = following
            log.warning("%s: %s: trying tiles of %dx%d latent pixels", what, error, width, height)


def _spans(size: int, tile: int, halo: int) -> Iterator[tuple[int, int, slice]]:
    """(begin, end, window) of each tile along a side. All windows have one length."""
    length = min(size, tile + 2 * halo)
    for begin in range(0, size, tile):
        start = min(max(begin - halo, 0), size - length)
        yield begin, min(begin + tile, size), slice(start, start + length)
