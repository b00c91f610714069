"""Drawing a part of a picture anew: the rest stays as it is. Two rules, which give different pictures.

diffusers puts the picture's latents, with as much noise as is left, back after each step; stable-diffusion.cpp puts
them, clean, into each estimate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .schedule import add_noise

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Inpainting:
    """`mask` float32 [h, w]: 1 where something new is drawn, 0 where `picture`, latents [C, h, w], stays; `noise`: what
    the run began with.
    """

    mask: Float32
    picture: Float32
    noise: Float32
    compat: Literal["diffusers", "sd.cpp"] = "diffusers"

    def estimate(self, x0: Float32) -> Float32:
        """What a denoised estimate becomes."""
        return self._blended(x0, self.picture) if self.compat == "sd.cpp" else x0

    def after_step(self, x: Float32, sigma: float) -> Float32:
        """What latents become that have come to noise level sigma."""
        return x if self.compat == "sd.cpp" else self._blended(x, add_noise(self.picture, self.noise, sigma))

    def _blended(self, new: Float32, old: Float32) -> Float32:
        return np.asarray(self.mask * new + (np.float32(1) - self.mask) * old, np.float32)


def latent_mask(
    mask: NDArray[np.uint8], factor: int, compat: Literal["diffusers", "sd.cpp"] = "diffusers"
) -> Float32:
    """Grey pixels [H, W], white where something new is drawn, to 0 and 1 for each factor x factor of them.

    diffusers takes the first pixel of each square, stable-diffusion.cpp the brightest. ValueError when nothing is
    white.
    """
    h, w = (side // factor for side in mask.shape)
    squares = (mask[: h * factor, : w * factor] >= 128).reshape(h, factor, w, factor)
    found = np.asarray(squares.any((1, 3)) if compat == "sd.cpp" else squares[:, 0, :, 0], np.float32)
    if not found.any():
        raise ValueError("the mask has nothing white: nothing would be drawn")
    return found
