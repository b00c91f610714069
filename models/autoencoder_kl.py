"""The Flux autoencoder: pictures to latents of 16 channels at an eighth of the size, and back.

- residual blocks of 3x3 convolutions with group norm; one attention in the middle
- a latent is scaled: model = (vae - SHIFT) * SCALE
- names are the original ones (`ae.safetensors`); `RENAMES` turns diffusers' into them

Pictures and latents have ne [width, height, channels].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loader.checkpoint import Checkpoint
from loader.errors import LoadError
from pyggml import Backend, Graph, Tensor, ops

from .compute import Compute
from .detected import detected, shape
from .nn import Conv2d, GroupNorm, Module, PixelLinear, attention
from .tiles import Map, Tiles

SCALE, SHIFT = 0.3611, 0.1159
FACTOR = 8  # picture pixels along a side of a latent pixel

_LEVELS = range(4)
RENAMES: list[tuple[str, str | None]] = [
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    *((rf"\.up_blocks\.{3 - i}\.resnets\.", f".up.{i}.block.") for i in _LEVELS),
    *((rf"\.up_blocks\.{3 - i}\.upsamplers\.0\.", f".up.{i}.upsample.") for i in _LEVELS),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
]


@dataclass(frozen=True)
class AutoencoderConfig:
    """Channels at each level, finest first, and blocks in a level of the encoder (the decoder has one more)."""

    channels: tuple[int, int, int, int]
    n_blocks: int
    latent_channels: int

    @classmethod
    @detected("Flux autoencoder")
    def from_checkpoint(cls, checkpoint: Checkpoint) -> AutoencoderConfig:
        """`checkpoint` under original names. LoadError when it is no Flux autoencoder."""
        ne = partial(shape, "Flux autoencoder", checkpoint)
        blocks = [n.split(".")[4] for n in checkpoint if n.startswith("decoder.up.0.block.")]
        config = cls(
            channels=tuple(ne(f"decoder.up.{i}.block.0.conv1.weight")[3] for i in _LEVELS),  # type: ignore[arg-type]
            n_blocks=len(set(blocks)) - 1,
            latent_channels=ne("decoder.conv_in.weight")[2],
        )
        if any(c % GroupNorm.N_GROUPS for c in config.channels):
            problem = f"channels {config.channels} are no multiples of {GroupNorm.N_GROUPS}"
            raise LoadError(problem, path=checkpoint.path)
        return config


class ResnetBlock(Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))); a 1x1 convolution for x where the channels change."""

    def __init__(self, n_in: int, n_out: int) -> None:
        self.norm1 = GroupNorm(n_in)
        self.conv1 = Conv2d(n_in, n_out)
        self.norm2 = GroupNorm(n_out)
        self.conv2 = Conv2d(n_out, n_out)
        self.nin_shortcut = PixelLinear(n_in, n_out) if n_in != n_out else None

    def __call__(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x, silu=True))
        if self.nin_shortcut is not None:
            x = self.nin_shortcut(x)
        return self.conv2(self.norm2(h, silu=True), residual=x)

    def tiled(self, x: Map, tiles: Tiles) -> Map:
        """The same on maps. `x` is overwritten."""
        h = tiles(self.conv1, x, norm=self.norm1)
        if self.nin_shortcut is not None:
            x = tiles(self.nin_shortcut, x, halo=0, in_place=True)
        return tiles(self.conv2, h, norm=self.norm2, residual=x, in_place=True)


class AttnBlock(Module):
    """Self-attention over all pixels, one head."""

    def __init__(self, n: int) -> None:
        self.norm = GroupNorm(n)
        self.q = PixelLinear(n, n)
        self.k = PixelLinear(n, n)
        self.v = PixelLinear(n, n)
        self.proj_out = PixelLinear(n, n)

    def __call__(self, x: Tensor) -> Tensor:
        w, h, c, _ = x.ne
        pixels = ops.cont(ops.transpose(ops.reshape(self.norm(x), w * h, c)))  # ne [c, w * h]
        q, k, v = (ops.reshape(layer.tokens(pixels), c, 1, w * h) for layer in (self.q, self.k, self.v))
        y = self.proj_out.tokens(attention(q, k, v))  # ne [c, w * h]
        return x + ops.reshape(ops.cont(ops.transpose(y)), w, h, c)


class Resample(Module):
    """A convolution before which the picture is doubled, or with which it is halved."""

    def __init__(self, n: int, down: bool) -> None:
        self.conv = Conv2d(n, n, stride=2 if down else 1)
        self.down = down

    def __call__(self, x: Tensor) -> Tensor:
        return self.conv(x) if self.down else self.conv(ops.upscale(x, 2))

    def tiled(self, x: Map, tiles: Tiles) -> Map:
        """The same on maps."""
        return tiles(self, x, halo=2 if self.down else 1)  # halved, a window begins at an even pixel


class Level(Module):
    """Blocks of one resolution, and the step to the next."""

    def __init__(
        self, n_in: int, n_out: int, n_blocks: int, *, downsample: bool = False, upsample: bool = False
    ) -> None:
        self.block = [ResnetBlock(n_in if i == 0 else n_out, n_out) for i in range(n_blocks)]
        if downsample:
            self.downsample = Resample(n_out, down=True)
        if upsample:
            self.upsample = Resample(n_out, down=False)

    def __call__(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for step in ("downsample", "upsample"):
            if hasattr(self, step):
                x = getattr(self, step)(x)
        return x

    def tiled(self, x: Map, tiles: Tiles) -> Map:
        """The same on maps. `x` is overwritten."""
        for block in self.block:
            x = block.tiled(x, tiles)
        for step in ("downsample", "upsample"):
            if hasattr(self, step):
                x = getattr(self, step).tiled(x, tiles)
        return x


class Middle(Module):
    """Block, attention, block."""

    def __init__(self, n: int) -> None:
        self.block_1 = ResnetBlock(n, n)
        self.attn_1 = AttnBlock(n)
        self.block_2 = ResnetBlock(n, n)

    def __call__(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(Module):
    """Picture in -1..1, ne [W, H, 3], to mean and log-variance, ne [W/8, H/8, 2 * latent]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        c = config.channels
        self.conv_in = Conv2d(3, c[0])
        self.down = [Level(c[max(i - 1, 0)], c[i], config.n_blocks, downsample=i < 3) for i in _LEVELS]
        self.mid = Middle(c[-1])
        self.norm_out = GroupNorm(c[-1])
        self.conv_out = Conv2d(c[-1], 2 * config.latent_channels)

    def __call__(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self._end(x)

    def _end(self, x: Tensor) -> Tensor:
        x = self.mid(x)
        return self.conv_out(self.norm_out(x, silu=True))

    def tiled(self, picture: NDArray[np.float32], tiles: Tiles) -> NDArray[np.float32]:
        """The same on a picture [3, H, W], all but its small end in tiles."""
        x = tiles(self.conv_in, Map(picture))
        for level in self.down:
            x = level.tiled(x, tiles)
        return tiles.whole(self._end, x.data).data


class Decoder(Module):
    """Latents ne [W, H, latent] to a picture in -1..1, ne [8 W, 8 H, 3]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        c = config.channels
        self.conv_in = Conv2d(config.latent_channels, c[-1])
        self.mid = Middle(c[-1])
        self.up = [Level(c[min(i + 1, 3)], c[i], config.n_blocks + 1, upsample=i > 0) for i in _LEVELS]
        self.norm_out = GroupNorm(c[0])
        self.conv_out = Conv2d(c[0], 3)

    def __call__(self, x: Tensor) -> Tensor:
        x = self._begin(x)
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(self.norm_out(x, silu=True))

    def _begin(self, x: Tensor) -> Tensor:
        return self.mid(self.conv_in(x))

    def tiled(self, latents: NDArray[np.float32], tiles: Tiles) -> NDArray[np.float32]:
        """The same on latents [C, h, w], all but its small beginning in tiles."""
        x = tiles.whole(self._begin, latents)
        for level in reversed(self.up):
            x = level.tiled(x, tiles)
        return tiles(self.conv_out, x, norm=self.norm_out).data


class AutoencoderKL(Module):
    """Both halves; either may be left out, so that a run loads what it needs."""

    def __init__(self, config: AutoencoderConfig, *, encoder: bool = True, decoder: bool = True) -> None:
        self.encoder = Encoder(config) if encoder else None
        self.decoder = Decoder(config) if decoder else None
        self.config = config

    def decoder_graph(self, backend: Backend, height: int, width: int) -> Graph:
        """For latents of height x width: input latents, output picture, both numpy [channels, height, width]."""
        assert self.decoder is not None
        return _graph(backend, self.decoder, "latents", "picture", (width, height, self.config.latent_channels))

    def decoder_tiled_bytes(self, height: int, width: int) -> int:
        """Of the widest maps when a picture of that size is decoded in tiles."""
        narrow, wide = self.config.channels[:2]
        return 4 * (wide + 2 * narrow) * height * width

    def encoder_graph(self, backend: Backend, height: int, width: int) -> Graph:
        """For a picture of height x width: input picture, output moments, both numpy [channels, height, width]."""
        assert self.encoder is not None
        return _graph(backend, self.encoder, "picture", "moments", (width, height, 3))

    def encoder_tiled_bytes(self, height: int, width: int) -> int:
        """Of the widest maps when a picture of that size is encoded in tiles."""
        return 4 * 2 * self.config.channels[0] * height * width

    def decode(
        self, backend: Backend, latents: NDArray[np.float32], compute: Compute = Graph.compute,
        *, tile: tuple[int, int] | None = None,
    ) -> NDArray[np.float32]:  # fmt: skip
        """Scaled latents [C, h, w] to a picture [3, 8 h, 8 w] in 0..1, not clipped.

        tile: (height, width) of a tile in latent pixels; None does it all at once. OutOfMemory when that has no room.
        """
        assert self.decoder is not None
        latents = latents / np.float32(SCALE) + np.float32(SHIFT)
        if tile:
            picture = self.decoder.tiled(latents, Tiles(backend, tile, latents.shape[1:], compute))
        else:
            with self.decoder_graph(backend, *latents.shape[1:]) as graph:
                picture = compute(graph, latents=latents)["picture"]
        return np.asarray((picture + 1) / 2, np.float32)

    def encode(
        self, backend: Backend, picture: NDArray[np.float32], compute: Compute = Graph.compute,
        *, tile: tuple[int, int] | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:  # fmt: skip
        """A picture [3, H, W] in 0..1, sides multiples of 8, to mean and deviation of its *unscaled* latents.

        tile: as in `decode`.
        """
        assert self.encoder is not None
        height, width = picture.shape[1:]
        if tile:
            tiles = Tiles(backend, tile, (height // FACTOR, width // FACTOR), compute)
            moments = self.encoder.tiled(2 * picture - 1, tiles)
        else:
            with self.encoder_graph(backend, height, width) as graph:
                moments = compute(graph, picture=2 * picture - 1)["moments"]
        mean, log_variance = np.split(moments, 2)
        return mean, np.exp(np.clip(log_variance, -30, 20) / 2)


def scale_latents(latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """The autoencoder's latents as the transformer takes them."""
    return np.asarray((latents - np.float32(SHIFT)) * np.float32(SCALE), np.float32)


def _graph(backend: Backend, half: Any, source: str, result: str, ne: tuple[int, int, int]) -> Graph:
    graph = Graph(backend, n_nodes=2048)
    graph.output(half(graph.input(ne, name=source)), name=result)
    return graph
