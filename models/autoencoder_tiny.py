"""Tiny decoders that stand in for an autoencoder's: a rough picture of the same latents, for a fraction of the work.

- TAESD (`taef1` for Flux's latents, which are Z-Image's): nothing but 3x3 convolutions and ReLU
- TAEHV (`taew2_1` for Wan 2.1's latents, which are Qwen-Image's): made for videos. A block sees the frame before its
  own, zeros before the first, and a layer may make two frames of one. One latent becomes four frames, of which the last
  is the picture; of the others only what it needs is computed
- both take latents as the transformer has them, without scaling, and make pictures in 0..1
- names are the original ones, in which a layer's number is its place in `decoder`; `RENAMES` turns diffusers' and those
  of files with one half alone into them

Pictures and latents have ne [width, height, channels].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from loader.checkpoint import Checkpoint, open_checkpoint
from loader.errors import LoadError
from loader.options import LoadOptions
from loader.params import load_params
from pyggml import Backend, Graph, Tensor, ops

from .component import Component, Load, require
from .compute import Compute
from .detected import detected, shape
from .devices import Place
from .nn import Conv2d, Module, PixelLinear, graph_use
from .tiles import Map, Tiles

Kind = Literal["TAESD", "TAEHV"]
Frame = Any  # a Tensor of a graph, or the Map of a whole picture

_N_BLOCKS = 3  # of a level
_N_LAYERS = {"TAESD": 20, "TAEHV": 23}
_GROWS = (7, 13, 19)  # places in TAEHV of the layers that make frames
RENAMES: list[tuple[str, str | None]] = [
    (r"^encoder\..*$", None),  # pictures are read by the whole autoencoder
    *((rf"^decoder\.layers\.{i}\.", f"decoder.{i + 1}.") for i in range(_N_LAYERS["TAESD"])),  # the first is no layer
    (r"^(\d+)\.", r"decoder.\1."),
]


@dataclass(frozen=True)
class TinyConfig:
    """`channels` of the levels, finest first; `n_frames` that TAEHV makes of one after each level but the finest."""

    kind: Kind
    channels: tuple[int, int, int, int]
    latent_channels: int
    n_frames: tuple[int, int, int] = (1, 1, 1)

    @classmethod
    @detected("tiny autoencoder")
    def from_checkpoint(cls, checkpoint: Checkpoint) -> TinyConfig:
        """`checkpoint` under original names. LoadError when it is no tiny decoder of pictures."""
        ne = partial(shape, "tiny autoencoder with a decoder", checkpoint)
        latent_channels, first = ne("decoder.1.weight", 4)[2:]
        kind: Kind = "TAEHV" if f"decoder.{_GROWS[0]}.conv.weight" in checkpoint else "TAESD"
        (n_out,) = ne(f"decoder.{_N_LAYERS[kind] - 1}.bias", 1)
        if n_out != 3:
            problem = f"it makes {n_out} channels, a picture has 3: it is for another model"
            raise LoadError(problem, path=checkpoint.path)
        if kind == "TAESD":
            return cls(kind, (first,) * 4, latent_channels)
        second, third, last = (ne(f"decoder.{i + 1}.weight", 4)[3] for i in _GROWS)
        made = [ne(f"decoder.{i}.conv.weight", 4)[3] for i in _GROWS]
        n_frames = tuple(n // c for n, c in zip(made, (first, second, third), strict=True))
        if not all(1 <= n <= 2 for n in n_frames):
            raise LoadError(f"it makes {n_frames} frames of one, 1 or 2 are expected", path=checkpoint.path)
        return cls(kind, (last, third, second, first), latent_channels, n_frames)  # type: ignore[arg-type]


class FirstConv2d(Conv2d):
    """Of x and of the frame before it, x's channels first; the other half of the kernel counts for x alone."""

    def _kernel(self, x: Tensor) -> Tensor:
        w = self.weight.tensor
        n_in = x.ne[2]
        return w if w.ne[2] == n_in else ops.view(graph_use(x, w), (3, 3, n_in, w.ne[3]), w.nb[1:4])


class Block(Module):
    """relu(x + conv(relu(conv(relu(conv(x)))))), the first of x and, in videos, the frame before it."""

    def __init__(self, n: int, video: bool) -> None:
        self.conv = (FirstConv2d(2 * n, n) if video else Conv2d(n, n), None, Conv2d(n, n), None, Conv2d(n, n))

    def __call__(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        first, _, second, _, third = self.conv
        h = ops.relu(first(x if past is None else ops.concat(x, past, dim=2)))
        return ops.relu(third(ops.relu(second(h)), residual=x))


class Grow(Module):
    """Frames of one, by a 1x1 convolution, each of them doubled in size."""

    def __init__(self, n: int, n_frames: int) -> None:
        self.conv = PixelLinear(n, n * n_frames, bias=False)
        self.n_frames = n_frames

    def __call__(self, x: Tensor, i: int) -> Tensor:
        """Frame i. The reference doubles x first, which is the same with four times the work."""
        y = self.conv(x)  # ne [width, height, n * n_frames]
        w, h, n, _ = x.ne
        return _double(ops.view(y, (w, h, n), y.nb[1:3], offset=i * n * y.nb[2]))


def _clamp(x: Tensor) -> Tensor:
    """Softly to -3..3."""
    return ops.scale(ops.tanh(ops.scale(x, 1 / 3)), 3)


def _double(x: Tensor) -> Tensor:
    return ops.upscale(x, 2)


Layer = Module | Callable[[Tensor], Tensor] | None


class TinyAutoencoder(Module):
    """The decoder. There is no encoder: pictures are read by the whole autoencoder."""

    encoder = None

    def __init__(self, config: TinyConfig) -> None:
        self.decoder = _taesd(config) if config.kind == "TAESD" else _taehv(config)
        self.config = config

    def _frames(self, latents: Frame, apply: Callable[..., Frame]) -> Frame:
        """The picture, the last frame, by apply(operation, frames..., halo=pixels that it looks at around each)."""
        frames = [latents]
        last_block = max(i for i, layer in enumerate(self.decoder) if isinstance(layer, Block))
        for i, layer in enumerate(self.decoder):
            if i > last_block:
                frames = frames[-1:]  # nothing more passes from one to the next
            if isinstance(layer, Block):
                before = [(frames[0],), *((x, past) for past, x in pairwise(frames))]
                frames = [apply(layer, *given, halo=3) for given in before]
            elif isinstance(layer, Grow):
                frames = [apply(partial(layer, i=k), x, halo=0) for x in frames for k in range(layer.n_frames)]
            elif layer is not None:
                frames = [apply(layer, x, halo=1 if isinstance(layer, Conv2d) else 0) for x in frames]
        return frames[-1]

    def decoder_graph(self, backend: Backend, height: int, width: int) -> Graph:
        """For latents of height x width: input latents, output picture, both numpy [channels, height, width]."""
        graph = Graph(backend, n_nodes=1024)
        latents = graph.input((width, height, self.config.latent_channels), name="latents")
        graph.output(self._frames(latents, lambda operation, *frames, halo: operation(*frames)), name="picture")
        return graph

    def decoder_tiled_bytes(self, height: int, width: int) -> int:
        """Of the widest maps when a picture of that size is decoded in tiles."""
        return 4 * 2 * self.config.channels[0] * height * width

    def decode(
        self, backend: Backend, latents: NDArray[np.float32], compute: Compute = Graph.compute,
        *, tile: tuple[int, int] | None = None,
    ) -> NDArray[np.float32]:  # fmt: skip
        """Scaled latents [C, h, w] to a picture [3, 8 h, 8 w] in 0..1, not clipped.

        tile: (height, width) of a tile in latent pixels; None does it all at once. OutOfMemory when that has no room.
        """
        if tile:
            tiles = Tiles(backend, tile, latents.shape[1:], compute)

            def apply(operation: Callable[..., Tensor], x: Map, past: Map | None = None, *, halo: int) -> Map:
                return tiles(operation, x, residual=past, halo=halo)

            picture = self._frames(Map(latents), apply).data
        else:
            with self.decoder_graph(backend, *latents.shape[1:]) as graph:
                picture = compute(graph, latents=latents)["picture"]
        return np.asarray(picture, np.float32)


def _taesd(config: TinyConfig) -> list[Layer]:
    n = config.channels[0]
    layers: list[Layer] = [_clamp, Conv2d(config.latent_channels, n), ops.relu]
    for _ in range(3):
        layers += [*(Block(n, video=False) for _ in range(_N_BLOCKS)), _double, Conv2d(n, n, bias=False)]
    return [*layers, Block(n, video=False), Conv2d(n, 3)]


def _taehv(config: TinyConfig) -> list[Layer]:
    channels = config.channels[::-1]
    layers: list[Layer] = [_clamp, Conv2d(config.latent_channels, channels[0]), ops.relu]
    for (n, n_next), n_frames in zip(pairwise(channels), config.n_frames, strict=True):
        layers += [Block(n, video=True) for _ in range(_N_BLOCKS)]
        layers += [None, Grow(n, n_frames), Conv2d(n, n_next, bias=False)]  # None: Grow doubles
    return [*layers, ops.relu, Conv2d(channels[-1], 3)]


def open_tiny_autoencoder(
    path: Any, kind: Kind, latent_channels: int, place: Place, *, options: LoadOptions | None = None,
    load: Load = load_params,
) -> Component:  # fmt: skip
    """A tiny autoencoder of that kind, for latents of so many channels. LoadError when the file is broken or is
    something else.
    """
    checkpoint = open_checkpoint(path)
    require(checkpoint, "tiny autoencoder", (kind,), "--tae")
    for prefix in ("first_stage_model.", "vae."):
        checkpoint = checkpoint.without_prefix(prefix)
    checkpoint = checkpoint.renamed(RENAMES)
    config = TinyConfig.from_checkpoint(checkpoint)
    if (config.kind, config.latent_channels) != (kind, latent_channels):
        problem = f"a {config.kind} for latents of {config.latent_channels} channels; this model wants a {kind} for"
        raise LoadError(f"{problem} {latent_channels}", path=checkpoint.path)
    return Component("tae", TinyAutoencoder(config), checkpoint, place, options, load)
