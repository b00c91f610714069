"""Qwen-Image's autoencoder, Wan 2.1's for one frame: pictures to latents of 16 channels at an eighth of the size, and
back.

- made for videos: 3-D convolutions see frames before theirs, of which a still picture has none; so each is the 2-D
  convolution of its last time step, and those that double or halve the number of frames never run
- residual blocks with a norm over each pixel's channels; one attention in the middle
- each channel of a latent is scaled: model = (vae - MEAN) / DEVIATION
- names are the original ones (`qwen_image_vae.safetensors`); `RENAMES` turns diffusers' into them

Pictures and latents have ne [width, height, channels].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from loader.checkpoint import Checkpoint
from loader.errors import LoadError
from pyggml import Backend, Graph, Tensor, ops

from .compute import Compute
from .detected import detected, shape
from .nn import ChannelNorm, Conv2d, Module, PixelLinear, attention
from .tiles import Map, Tiles

FACTOR = 8  # picture pixels along a side of a latent pixel
MEAN = np.array(
    [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
     0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921], np.float32,
)[:, None, None]  # fmt: skip
DEVIATION = np.array(
    [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
     3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160], np.float32,
)[:, None, None]  # fmt: skip

_LEVELS = range(4)
_N_BLOCKS = 2  # in a level of the encoder; the decoder has one more
RENAMES: list[tuple[str, str | None]] = [
    (r"\.time_conv\..*$", None),  # doubles or halves the number of frames: not for the first
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.head.0."),
    (r"^(encoder|decoder)\.conv_out\.", r"\1.head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.", ".downsamples."),
    *((rf"\.up_blocks\.{i}\.resnets\.{j}\.", f".upsamples.{4 * i + j}.") for i in _LEVELS for j in range(3)),
    *((rf"\.up_blocks\.{i}\.upsamplers\.0\.", f".upsamples.{4 * i + 3}.") for i in _LEVELS),
    (r"\.norm1\.gamma$", ".residual.0.gamma"),
    (r"\.(downsamples|upsamples|middle)\.(\d+)\.conv1\.", r".\1.\2.residual.2."),
    (r"\.norm2\.gamma$", ".residual.3.gamma"),
    (r"\.(downsamples|upsamples|middle)\.(\d+)\.conv2\.", r".\1.\2.residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
]


def without(half: Literal["encoder", "decoder"]) -> list[tuple[str, str | None]]:
    """Renames that leave out one half of the file, under original names."""
    return [(rf"^(?:{half}|{'conv1' if half == 'encoder' else 'conv2'})\..*$", None)]


@dataclass(frozen=True)
class QwenAutoencoderConfig:
    """Channels at each level, finest first."""

    channels: tuple[int, int, int, int]
    latent_channels: int
    picture_channels: int  # 3, or 4 with transparency
    n_frames: int  # time steps of a kernel; 1 in files that hold the last alone

    @classmethod
    @detected("autoencoder of Qwen-Image")
    def from_checkpoint(cls, checkpoint: Checkpoint) -> QwenAutoencoderConfig:
        """`checkpoint` under original names. LoadError when it is no autoencoder of Qwen-Image."""
        ne = partial(shape, "Qwen-Image autoencoder", checkpoint)
        channels = tuple(max(ne(f"decoder.upsamples.{4 * (3 - i)}.residual.3.gamma")) for i in _LEVELS)
        config = cls(
            channels=channels,  # type: ignore[arg-type]
            latent_channels=ne("conv2.bias")[0],
            picture_channels=ne("decoder.head.2.bias")[0],
            n_frames=ne("decoder.conv1.weight")[2] if ne("decoder.conv1.weight")[2] == 3 else 1,
        )
        if config.latent_channels != MEAN.size:
            problem = f"latents of {config.latent_channels} channels: Qwen-Image's have {MEAN.size}"
            raise LoadError(problem, path=checkpoint.path)
        return config


class Residual(Module):
    """shortcut(x) + conv(silu(norm(conv(silu(norm(x)))))); the shortcut is there where the channels change."""

    def __init__(self, n_in: int, n_out: int, n_frames: int) -> None:
        self.residual = (
            ChannelNorm(n_in), None, Conv2d(n_in, n_out, n_frames=n_frames),
            ChannelNorm(n_out), None, None, Conv2d(n_out, n_out, n_frames=n_frames),
        )  # fmt: skip
        self.shortcut = PixelLinear(n_in, n_out) if n_in != n_out else None

    def __call__(self, x: Tensor) -> Tensor:
        h = self._first(x)
        if self.shortcut is not None:
            x = self.shortcut(x)
        return self._second(h, x)

    def _first(self, x: Tensor) -> Tensor:
        norm, _, conv = self.residual[:3]
        return conv(norm(x, silu=True))

    def _second(self, h: Tensor, x: Tensor) -> Tensor:
        norm, _, _, conv = self.residual[3:]
        return conv(norm(h, silu=True), residual=x)

    def tiled(self, x: Map, tiles: Tiles) -> Map:
        """The same on maps. `x` is overwritten."""
        h = tiles(self._first, x)
        if self.shortcut is not None:
            x = tiles(self.shortcut, x, halo=0, in_place=True)
        return tiles(self._second, h, residual=x, in_place=True)


class Attention(Module):
    """Self-attention over all pixels, one head."""

    def __init__(self, n: int) -> None:
        self.norm = ChannelNorm(n)
        self.to_qkv = PixelLinear(n, 3 * n)
        self.proj = PixelLinear(n, n)

    def __call__(self, x: Tensor) -> Tensor:
        w, h, c, _ = x.ne
        pixels = ops.cont(ops.transpose(ops.reshape(self.norm(x), w * h, c)))  # ne [c, w * h]
        qkv = self.to_qkv.tokens(pixels)  # ne [3 * c, w * h]
        q, k, v = (ops.view(qkv, (c, 1, w * h), (c * 4, qkv.nb[1]), i * c * 4) for i in range(3))
        y = self.proj.tokens(attention(q, k, v))  # ne [c, w * h]
        return x + ops.reshape(ops.cont(ops.transpose(y)), w, h, c)


class Resample(Module):
    """A convolution before which the picture is doubled (then with half the channels), or with which it is halved."""

    def __init__(self, n: int, down: bool) -> None:
        self.resample = (None, Conv2d(n, n, stride=2) if down else Conv2d(n, n // 2))
        self.down = down

    def __call__(self, x: Tensor) -> Tensor:
        _, conv = self.resample
        return conv(x) if self.down else conv(ops.upscale(x, 2))

    def tiled(self, x: Map, tiles: Tiles) -> Map:
        """The same on maps."""
        return tiles(self, x, halo=2 if self.down else 1)  # halved, a window begins at an even pixel


def _middle(n: int, n_frames: int) -> tuple[Residual, Attention, Residual]:
    return Residual(n, n, n_frames), Attention(n), Residual(n, n, n_frames)


class Encoder(Module):
    """Picture in -1..1, ne [W, H, 3], to mean and log-variance, ne [W/8, H/8, 2 * latent], before the last layer."""

    def __init__(self, config: QwenAutoencoderConfig) -> None:
        c, n = config.channels, config.n_frames
        self.conv1 = Conv2d(config.picture_channels, c[0], n_frames=n)
        self.downsamples: list[Residual | Resample] = []
        for i in _LEVELS:
            self.downsamples.append(Residual(c[max(i - 1, 0)], c[i], n))
            self.downsamples += [Residual(c[i], c[i], n) for _ in range(_N_BLOCKS - 1)]
            if i < 3:
                self.downsamples.append(Resample(c[i], down=True))
        self.middle = _middle(c[3], n)
        self.head = (ChannelNorm(c[3]), None, Conv2d(c[3], 2 * config.latent_channels, n_frames=n))

    def __call__(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for step in self.downsamples:
            x = step(x)
        return self._end(x)

    def _end(self, x: Tensor) -> Tensor:
        for step in self.middle:
            x = step(x)
        norm, _, conv = self.head
        return conv(norm(x, silu=True))

    def tiled(self, picture: NDArray[np.float32], tiles: Tiles) -> NDArray[np.float32]:
        """The same on a picture [3 or 4, H, W], all but its small end in tiles."""
        x = tiles(self.conv1, Map(picture))
        for step in self.downsamples:
            x = step.tiled(x, tiles)
        return tiles.whole(self._end, x.data).data


class Decoder(Module):
    """Latents ne [W, H, latent] to a picture in -1..1, ne [8 W, 8 H, 3]."""

    def __init__(self, config: QwenAutoencoderConfig) -> None:
        c, n = config.channels, config.n_frames
        self.conv1 = Conv2d(config.latent_channels, c[3], n_frames=n)
        self.middle = _middle(c[3], n)
        self.upsamples: list[Residual | Resample] = []
        for i in reversed(_LEVELS):
            self.upsamples.append(Residual(c[3] if i == 3 else c[i + 1] // 2, c[i], n))
            self.upsamples += [Residual(c[i], c[i], n) for _ in range(_N_BLOCKS)]
            if i > 0:
                self.upsamples.append(Resample(c[i], down=False))
        self.head = (ChannelNorm(c[0]), None, Conv2d(c[0], config.picture_channels, n_frames=n))

    def __call__(self, x: Tensor) -> Tensor:
        x = self._begin(x)
        for step in self.upsamples:
            x = step(x)
        return self._end(x)

    def _begin(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for step in self.middle:
            x = step(x)
        return x

    def _end(self, x: Tensor) -> Tensor:
        norm, _, conv = self.head
        return conv(norm(x, silu=True))

    def tiled(self, latents: NDArray[np.float32], tiles: Tiles) -> NDArray[np.float32]:
        """The same on latents [C, h, w], all but its small beginning in tiles."""
        x = tiles.whole(self._begin, latents)
        for step in self.upsamples:
            x = step.tiled(x, tiles)
        return tiles(self._end, x).data


class QwenAutoencoder(Module):
    """Both halves; either may be left out, so that a run loads what it needs."""

    def __init__(self, config: QwenAutoencoderConfig, *, encoder: bool = True, decoder: bool = True) -> None:
        n = config.latent_channels
        self.encoder = Encoder(config) if encoder else None
        self.conv1 = PixelLinear(2 * n, 2 * n) if encoder else None
        self.conv2 = PixelLinear(n, n) if decoder else None
        self.decoder = Decoder(config) if decoder else None
        self.config = config

    def decoder_graph(self, backend: Backend, height: int, width: int) -> Graph:
        """For latents of height x width: input latents, output picture, both numpy [channels, height, width]."""
        assert self.decoder is not None and self.conv2 is not None
        graph = Graph(backend, n_nodes=1024)
        latents = graph.input((width, height, self.config.latent_channels), name="latents")
        graph.output(self.decoder(self.conv2(latents)), name="picture")
        return graph

    def decoder_tiled_bytes(self, height: int, width: int) -> int:
        """Of the widest maps when a picture of that size is decoded in tiles."""
        return 4 * 2 * self.config.channels[0] * height * width

    def encoder_graph(self, backend: Backend, height: int, width: int) -> Graph:
        """For a picture of height x width: input picture, output moments, both numpy [channels, height, width]."""
        assert self.encoder is not None and self.conv1 is not None
        graph = Graph(backend, n_nodes=1024)
        picture = graph.input((width, height, self.config.picture_channels), name="picture")
        graph.output(self.conv1(self.encoder(picture)), name="moments")
        return graph

    def encoder_tiled_bytes(self, height: int, width: int) -> int:
        """Of the widest maps when a picture of that size is encoded in tiles."""
        return 4 * 2 * self.config.channels[0] * height * width

    def decode(
        self, backend: Backend, latents: NDArray[np.float32], compute: Compute = Graph.compute,
        *, tile: tuple[int, int] | None = None,
    ) -> NDArray[np.float32]:  # fmt: skip
        """Scaled latents [C, h, w] to a picture [3 or 4, 8 h, 8 w] in 0..1, not clipped.

        tile: (height, width) of a tile in latent pixels; None does it all at once. OutOfMemory when that has no room.
        """
        assert self.decoder is not None and self.conv2 is not None
        latents = latents * DEVIATION + MEAN
        if tile:
            tiles = Tiles(backend, tile, latents.shape[1:], compute)
            picture = self.decoder.tiled(tiles.whole(self.conv2, latents).data, tiles)
        else:
            with self.decoder_graph(backend, *latents.shape[1:]) as graph:
                picture = compute(graph, latents=latents)["picture"]
        return np.asarray((picture + 1) / 2, np.float32)

    def encode(
        self, backend: Backend, picture: NDArray[np.float32], compute: Compute = Graph.compute,
        *, tile: tuple[int, int] | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:  # fmt: skip
        """A picture [3 or 4, H, W] in 0..1, sides multiples of 8, to mean and standard deviation of its scaled latents,
        [C, H/8, W/8] both. tile: as in `decode`.
        """
        assert self.encoder is not None and self.conv1 is not None
        height, width = picture.shape[1:]
        moments: Any
        if tile:
            tiles = Tiles(backend, tile, (height // FACTOR, width // FACTOR), compute)
            moments = tiles.whole(self.conv1, self.encoder.tiled(2 * picture - 1, tiles)).data
        else:
            with self.encoder_graph(backend, height, width) as graph:
                moments = compute(graph, picture=2 * picture - 1)["moments"]
        mean, log_variance = np.split(moments, 2)
        deviation = np.exp(np.clip(log_variance, -30, 20) / 2) / DEVIATION
        return np.asarray((mean - MEAN) / DEVIATION, np.float32), np.asarray(deviation, np.float32)
