"""Pictures that are edited: scaled for the autoencoder and for the vision tower, as diffusers' pipelines do it, or as
stable-diffusion.cpp 0.4.7 does.
"""

from __future__ import annotations

from collections.abc import Callable
from math import floor, sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .. import qwen25_vision

MULTIPLE = 32  # of the sides of a scaled picture
AUTOENCODER_AREA = 1024 * 1024
TOWER_AREA = 384 * 384  # of Edit-2509 and later; the first Edit shows the tower what it shows the autoencoder
TOWER_AREAS = 384 * 384, 560 * 560  # stable-diffusion.cpp: pictures between the two are not scaled but rounded

Compat = Literal["diffusers", "sd.cpp"]


def size_of_area(
    width: int, height: int, area: int, multiple: int = MULTIPLE, *, compat: Compat = "diffusers"
) -> tuple[int, int]:
    """(width, height) of a picture of about `area` pixels with the same proportions, each the nearest multiple.

    ValueError for a picture so long and thin that nothing would be left of its shorter side.
    """
    nearest: Callable[[float], int] = round
    if compat == "sd.cpp":
        wide = sqrt(area * width // height)
        high, nearest = wide * height / width, _half_up
    else:
        wide = sqrt(area * (width / height))
        high = wide / (width / height)
    size = nearest(wide / multiple) * multiple, nearest(high / multiple) * multiple
    if not all(size):
        raise ValueError(f"a picture of {width} x {height} is too thin to be scaled to {area} pixels")
    return size


def for_autoencoder(picture: NDArray[np.uint8], area: int, *, compat: Compat = "diffusers") -> NDArray[np.uint8]:
    """uint8 [H, W, 3] to uint8 [H', W', 3] of about `area` pixels."""
    height, width = picture.shape[:2]
    size = size_of_area(width, height, area, compat=compat)
    return _nearest(picture, *size) if compat == "sd.cpp" else _scaled(picture, *size, lanczos=True)


def for_tower(
    picture: NDArray[np.uint8], area: int, multiple: int = 28, *, compat: Compat = "diffusers"
) -> NDArray[np.float32]:
    """uint8 [H, W, 3] to float32 [3, H', W'] for `Qwen25Vision.encode`: scaled to about `area` pixels, then to sides
    that the tower can take. stable-diffusion.cpp has an area of its own, and cuts off at the sides what is too much.
    """
    height, width = picture.shape[:2]
    rows, columns = tower_grid(width, height, area, multiple, compat=compat)
    size = columns * multiple, rows * multiple
    if compat == "sd.cpp":
        return qwen25_vision.normalise(_covering(picture, *size))
    picture = _scaled(picture, *size_of_area(width, height, area), lanczos=True)
    return qwen25_vision.normalise(_scaled(picture, *size, lanczos=False))


def tower_grid(
    width: int, height: int, area: int, multiple: int = 28, *, compat: Compat = "diffusers"
) -> tuple[int, int]:
    """Rows and columns of the tower's rows for a picture of that size, as `for_tower` scales it."""
    if compat == "sd.cpp":
        wide, high = qwen25_vision.size_for(width, height, multiple, *TOWER_AREAS, nearest=_half_up)
    else:
        wide, high = qwen25_vision.size_for(*size_of_area(width, height, area), multiple)
    return high // multiple, wide // multiple


def _scaled(picture: NDArray[np.uint8], width: int, height: int, *, lanczos: bool) -> NDArray[np.uint8]:
    from PIL import Image

    method = Image.Resampling.LANCZOS if lanczos else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(picture).resize((width, height), method), np.uint8)


def _nearest(picture: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """Each pixel is the one of the original whose place, rounded down, is its own."""
    h, w = picture.shape[:2]
    rows, columns = np.arange(height) * h // height, np.arange(width) * w // width
    return np.ascontiguousarray(picture[rows][:, columns])


def _covering(picture: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """The middle of the picture, scaled so that it just covers this size."""
    h, w = picture.shape[:2]
    scale = max(np.float32(width) / np.float32(w), np.float32(height) / np.float32(h))
    # in float32, which may miss a pixel: it is then short of one, where the original reads past its end
    wide, high = max(int(scale * np.float32(w)), width), max(int(scale * np.float32(h)), height)
    left, top = (wide - width) // 2, (high - height) // 2
    return _nearest(picture, wide, high)[top : top + height, left : left + width]


def _half_up(x: float) -> int:
    return floor(x + 0.5)
