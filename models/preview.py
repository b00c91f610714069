"""Pictures of a run that is under way, of what each step takes the clean latents to be.

`Projection` makes a colour of the channels of each latent pixel by a matrix. The matrix is found, once for a pipeline,
by least squares from what its own decoder makes of smooth random latents, so that it needs no table of a model's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Mode = Literal["proj", "vae"]
# preview(i, step, picture): of picture i after that step, both from 0, uint8 [H, W, 3]
Show = Callable[[int, int, Pixels], object]

_SIDE, _COARSE, _N_PICTURES = 16, 4, 4  # latent pixels of a side, of one colour; pictures that the matrix is found with
_SCALE = 8  # pixels along a side of a latent pixel


class Projection:
    """Latents to colours: `matrix` [n_channels + 1, 3], the last row for a constant; 0 is black and 1 white."""

    def __init__(self, matrix: NDArray[np.float64]) -> None:
        self.matrix = matrix

    @classmethod
    def of_decoder(cls, decode: Callable[[Float32], Pixels], n_channels: int) -> Projection:
        """The matrix that fits best to `decode`, latents [n_channels, h, w] to uint8 [8 h, 8 w, 3 or 4]."""
        rng = np.random.default_rng(0)
        rows, colours = [], []
        for _ in range(_N_PICTURES):
            coarse = rng.standard_normal((n_channels, _SIDE // _COARSE, _SIDE // _COARSE)).astype(np.float32)
            latents = coarse.repeat(_COARSE, 1).repeat(_COARSE, 2)
            picture = decode(latents)[..., :3].reshape(_SIDE, _SCALE, _SIDE, _SCALE, 3).mean((1, 3)) / 255
            rows.append(latents.reshape(n_channels, -1).T)
            colours.append(picture.reshape(-1, 3))
        known = np.concatenate(rows).astype(np.float64)
        known = np.concatenate([known, np.ones((len(known), 1))], axis=1)
        return cls(np.linalg.lstsq(known, np.concatenate(colours), rcond=None)[0])

    def __call__(self, latents: Float32) -> Pixels:
        """[n_channels, h, w] to uint8 [8 h, 8 w, 3], each latent pixel a square of one colour."""
        colours = np.tensordot(latents.astype(np.float64), self.matrix[:-1], axes=(0, 0)) + self.matrix[-1]
        small = np.rint(255 * np.clip(colours, 0, 1)).astype(np.uint8)
        return small.repeat(_SCALE, 0).repeat(_SCALE, 1)


def check(mode: str, interval: int) -> None:
    """ValueError for what cannot be."""
    if mode not in ("proj", "vae"):
        raise ValueError(f"a preview is by 'proj' or 'vae', not {mode!r}")
    if interval < 1:
        raise ValueError(f"previews come every n steps, n at least 1, not {interval}")
