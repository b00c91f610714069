"""Pictures: between float arrays, bytes and Pillow, and the text that travels inside a PNG."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

MIN_SIDE = 16
MAX_SIDE = 8192
MAX_PIXELS = 16 * 1024 * 1024  # before it is scaled: a file of 100 kB can hold a picture that takes a gigabyte
_FORMATS = ("PNG", "JPEG", "WEBP")  # of pictures that we open: Pillow's other decoders stay out of reach


def to_bytes(picture: NDArray[np.float32]) -> NDArray[np.uint8]:
    """[3 or 4, H, W] in 0..1 (clipped to it) to uint8 [H, W, 3 or 4], rounded."""
    return np.ascontiguousarray(np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0))


def to_float(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 [H, W, 3 or 4] to float32 [3 or 4, H, W] in 0..1."""
    planes: NDArray[np.float32] = np.ascontiguousarray(picture.transpose(2, 0, 1), np.float32)
    planes /= np.float32(255)
    return planes


def to_pil(picture: NDArray[np.uint8]) -> Image.Image:
    """uint8 [H, W, 3 or 4] as a Pillow image."""
    from PIL import Image

    return Image.fromarray(picture)


def fingerprint(picture: NDArray[np.uint8]) -> tuple[tuple[int, ...], bytes]:
    """What tells a picture from others."""
    return picture.shape, hashlib.sha256(picture.tobytes()).digest()


def read_image(
    source: str | os.PathLike[str] | IO[bytes] | Image.Image, width: int | None = None, height: int | None = None, *,
    alpha: bool = False,
) -> NDArray[np.uint8]:  # fmt: skip
    """A picture as uint8 [height, width, 3]: turned upright, on white where it is transparent, scaled (Lanczos) if a
    size is given. `alpha`: [height, width, 4] instead, its transparency kept.

    ValueError, naming the file, for what is no PNG, JPEG or WebP, is broken, has a side that is not in
    MIN_SIDE..MAX_SIDE, or more than MAX_PIXELS; of such a file only the header is read.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return _read(source, "the picture", width, height, alpha)
    name = repr(os.fspath(source)) if isinstance(source, str | os.PathLike) else "the picture"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            image = Image.open(source, formats=_FORMATS)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read {name}: {error}") from error
    with image:
        return _read(image, name, width, height, alpha)


def read_mask(source: str | os.PathLike[str] | IO[bytes] | Image.Image, width: int, height: int) -> NDArray[np.uint8]:
    """A picture's brightness, uint8 [height, width], white where it is transparent. Raises as `read_image`."""
    from PIL import Image

    grey = to_pil(read_image(source)).convert("L")
    return np.asarray(grey.resize((width, height), Image.Resampling.LANCZOS), np.uint8)


def _read(image: Image.Image, name: str, width: int | None, height: int | None, alpha: bool) -> NDArray[np.uint8]:
    from PIL import Image, ImageOps

    try:
        small, large = min(image.size), max(image.size)
        if small < MIN_SIDE or large > MAX_SIDE or image.width * image.height > MAX_PIXELS:
            wanted = f"{MIN_SIDE} to {MAX_SIDE} each way, {MAX_PIXELS} in all at most"
            raise ValueError(f"it has {image.width} x {image.height} pixels; {wanted}, can be used")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip
            image = Image.fromarray(np.rint(np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))
        if not alpha and (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGBA" if alpha else "RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"cannot read {name}: {error}") from error
    size = width or image.width, height or image.height
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(image, np.uint8)


def resized(picture: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """uint8 [H, W, 3 or 4] scaled (Lanczos) to [height, width, ...]."""
    from PIL import Image

    return np.asarray(to_pil(picture).resize((width, height), Image.Resampling.LANCZOS), np.uint8)


def write_png(path: str | os.PathLike[str], picture: NDArray[np.uint8], parameters: str = "") -> None:
    """Write uint8 [H, W, 3 or 4] as PNG with a `parameters` text; whole or not at all, as `write_whole` does."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    text, data = PngInfo(), io.BytesIO()
    if parameters:
        text.add_itxt("parameters", parameters) if not parameters.isascii() else text.add_text("parameters", parameters)
    Image.fromarray(picture).save(data, format="PNG", pnginfo=text)
    write_whole(path, data.getbuffer())


def write_whole(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Write a file under a temporary name and rename it: never half a file, whatever interrupts. OSError."""
    target = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        # mkstemp makes private files; this one gets what the user's umask allows.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
