"""Pictures of a run that is under way, of what each step takes the clean latents to be.

`Projection` makes a colour of the channels of each latent pixel by a matrix. It needs no table of a model's: the matrix
is the one that fits best to what the decoder at hand makes of a few small random latents, which are drawn with the mean
and the covariance of those that are looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Mode = Literal["proj", "tae", "vae"]
# on_preview(i, step, picture): picture i as that step takes it to become, both from 0; uint8 [H, W, 3]
Show = Callable[[int, int, Pixels], object]

MODES: tuple[Mode, ...] = ("proj", "tae", "vae")
SIDE = 16  # latent pixels of a side of the pictures that a projection is found with
_COLOUR, _N_PICTURES = 4, 4  # latent pixels of one colour along a side; how many pictures
_OTHERWISE = 0.25  # share of variance in all directions: a first step knows few colours


class Projection:
    """Latents to colours: `matrix` [n_channels + 1, 3], the last row for a constant; 0 is black and 1 white."""

    def __init__(self, matrix: NDArray[np.float64]) -> None:
        self.matrix = matrix

    @classmethod
    def of_decoder(cls, decode: Callable[[Float32], Pixels], latents: Float32) -> Projection:
        """The matrix for latents like these, [n_channels, h, w]; `decode` makes uint8 [F h, F w, 3 or 4] of others."""
        n = len(latents)
        values = latents.reshape(n, -1).astype(np.float64)
        covariance = np.cov(values) + (_OTHERWISE * values.var(axis=1).mean() + 1e-6) * np.eye(n)
        mix, mean = np.linalg.cholesky(covariance), values.mean(axis=1)[:, None, None]
        rng, cells = np.random.default_rng(0), SIDE // _COLOUR
        rows, colours = [], []
        for _ in range(_N_PICTURES):
            drawn = mean + np.tensordot(mix, rng.standard_normal((n, cells, cells)), axes=1)
            drawn = drawn.repeat(_COLOUR, axis=1).repeat(_COLOUR, axis=2).astype(np.float32)
            picture = decode(drawn)
            factor = picture.shape[0] // SIDE
            small = picture[..., :3].reshape(SIDE, factor, SIDE, factor, 3).mean(axis=(1, 3)) / 255
            rows.append(drawn.reshape(n, -1).T)
            colours.append(small.reshape(-1, 3))
        known = np.pad(np.concatenate(rows).astype(np.float64), ((0, 0), (0, 1)), constant_values=1)
        return cls(np.linalg.lstsq(known, np.concatenate(colours), rcond=None)[0])

    def __call__(self, latents: Float32) -> Pixels:
        """[n_channels, h, w] to uint8 [h, w, 3]: a pixel for each latent pixel."""
        colours = np.tensordot(latents.astype(np.float64), self.matrix[:-1], axes=(0, 0)) + self.matrix[-1]
        picture: Pixels = np.rint(255 * np.clip(colours, 0, 1)).astype(np.uint8)
        return picture


class View:
    """Latents of the steps of one picture as pictures; of a model's layers the first, which is the whole."""

    def __init__(self, decode: Callable[[Float32], Pixels], mode: Mode) -> None:
        self.decode = decode
        self.projection: Projection | None = None  # found when the first latents are there
        self.mode = mode

    def __call__(self, latents: Float32) -> Pixels:
        """[n_channels, h, w], or of layers [n, n_channels, h, w], to uint8 [H, W, 3]."""
        one = latents if latents.ndim == 3 else latents[0]
        if self.mode != "proj":
            return np.ascontiguousarray(self.decode(one)[..., :3])
        if self.projection is None:
            self.projection = Projection.of_decoder(self.decode, one)
        return self.projection(one)


def check_preview(mode: str, interval: int, has_tiny: bool) -> None:
    """ValueError for a preview that cannot be. `has_tiny`: there is a tiny autoencoder."""
    if mode not in MODES:
        raise ValueError(f"a preview is by {', '.join(map(repr, MODES[:-1]))} or {MODES[-1]!r}, not {mode!r}")
    if mode == "tae" and not has_tiny:
        raise ValueError("a preview by 'tae' needs a tiny autoencoder: load with tae=FILE (--tae)")
    if interval < 1:
        raise ValueError(f"previews come every n steps, n at least 1, not {interval}")
