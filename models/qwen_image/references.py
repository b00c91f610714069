"""Pictures that are edited: scaled for the autoencoder and for the vision tower, as diffusers' pipelines do it."""

from __future__ import annotations

from math import sqrt

import numpy as np
from numpy.typing import NDArray

from .. import qwen25_vision

MULTIPLE = 32  # of the sides of a scaled picture
AUTOENCODER_AREA = 1024 * 1024
TOWER_AREA = 384 * 384  # of Edit-2509 and later; the first Edit shows the tower what it shows the autoencoder


def size_of_area(width: int, height: int, area: int, multiple: int = MULTIPLE) -> tuple[int, int]:
    """(width, height) of a picture of about `area` pixels with the same proportions, each the nearest multiple.

    ValueError for a picture so long and thin that nothing would be left of its shorter side.
    """
    ratio = width / height
    wide = sqrt(area * ratio)
    size = round(wide / multiple) * multiple, round(wide / ratio / multiple) * multiple
    if not all(size):
        raise ValueError(f"a picture of {width} x {height} is too thin to be scaled to {area} pixels")
    return size


def for_autoencoder(picture: NDArray[np.uint8], area: int) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] to uint8 [H', W', 3] of about `area` pixels."""
    return _scaled(picture, *_size_of(picture, area), lanczos=True)


def for_tower(picture: NDArray[np.uint8], area: int, multiple: int = 28) -> NDArray[np.float32]:
    """uint8 [H, W, 3] to float32 [3, H', W'] for `Qwen25Vision.encode`: scaled to about `area` pixels, then to sides
    that the tower can take.
    """
    picture = _scaled(picture, *_size_of(picture, area), lanczos=True)
    height, width = picture.shape[:2]
    return qwen25_vision.normalise(_scaled(picture, *qwen25_vision.size_for(width, height, multiple), lanczos=False))


def tower_grid(width: int, height: int, area: int, multiple: int = 28) -> tuple[int, int]:
    """Rows and columns of the tower's rows for a picture of that size, as `for_tower` scales it."""
    wide, high = qwen25_vision.size_for(*size_of_area(width, height, area), multiple)
    return high // multiple, wide // multiple


def _size_of(picture: NDArray[np.uint8], area: int) -> tuple[int, int]:
    height, width = picture.shape[:2]
    return size_of_area(width, height, area)


def _scaled(picture: NDArray[np.uint8], width: int, height: int, *, lanczos: bool) -> NDArray[np.uint8]:
    from PIL import Image

    method = Image.Resampling.LANCZOS if lanczos else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(picture).resize((width, height), method), np.uint8)
