"""How large pictures, their latents and patches of these are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SIZE_MULTIPLE = 8  # pixels along a side of a latent pixel
MAX_SIDE = 4096  # pixels
PATCH = 2  # latent pixels along a side of a patch


def check_size(width: int, height: int) -> None:
    """ValueError unless both sides are multiples of 8 in 16..4096."""
    for name, side in (("width", width), ("height", height)):
        if not isinstance(side, int) or not 16 <= side <= MAX_SIDE or side % SIZE_MULTIPLE:
            raise ValueError(f"{name} must be a multiple of {SIZE_MULTIPLE} in 16..{MAX_SIDE}, not {side}")


def latent_size(width: int, height: int) -> tuple[int, int]:
    """(h, w) of the latents of a picture: latents are numpy arrays [C, h, w]."""
    return height // SIZE_MULTIPLE, width // SIZE_MULTIPLE


def n_patches(shape: Sequence[int]) -> int:
    """Of latents [C, h, w], or of several, [n, C, h, w]; sides are rounded up to whole patches. C may be left out."""
    h, w = shape[-2:]
    return math.prod(shape[:-3]) * -(-h // PATCH) * -(-w // PATCH)


def whole_patches(latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """Latents [C, h, w], with zeros at the right and the bottom where a side is odd."""
    _, h, w = latents.shape
    return np.pad(latents, ((0, 0), (0, h % PATCH), (0, w % PATCH)))
