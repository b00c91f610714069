"""What makes the pictures: an autoencoder, a tiny one, or a tiny one for previews beside the other."""

from __future__ import annotations

from collections.abc import Callable

from loader.options import LoadOptions

from .autoencoder_tiny import Kind, open_tiny_autoencoder
from .component import Component, Load
from .devices import Place
from .family import Path


def check_decoders(vae: Path | None, tae: Path | None, tae_preview_only: bool, encoder: bool) -> None:
    """ValueError unless these files, as `load` takes them, make pictures, and read them with `encoder`."""
    if vae is None and tae is None:
        raise ValueError("what makes the pictures? Give an autoencoder, vae (--vae), or a tiny one, tae (--tae)")
    if tae_preview_only and (vae is None or tae is None):
        raise ValueError("a tiny autoencoder for previews only: give it as tae (--tae), and vae (--vae) for pictures")
    if encoder and vae is None:
        raise ValueError("a tiny autoencoder reads no pictures: give vae (--vae) beside it")


def open_decoders(
    parts: list[Component], vae: Path | None, tae: Path | None, place: Place, kind: Kind,
    open_autoencoder: Callable[..., Component], *, encoder: bool, options: LoadOptions | None, load: Load,
) -> tuple[Component | None, Component | None]:  # fmt: skip
    """The autoencoder, with its encoder when asked for, and the tiny one of that kind, where they are given; added to
    `parts`, of which the second is the transformer. LoadError as `open_autoencoder` and `open_tiny_autoencoder`.
    """
    autoencoder = tiny = None
    if vae is not None:
        autoencoder = open_autoencoder(vae, place, options=options, encoder=encoder, load=load)
        parts.append(autoencoder)
    if tae is not None:
        n_channels = parts[1].module.config.in_channels
        tiny = open_tiny_autoencoder(tae, kind, n_channels, place, options=options, load=load)
        parts.append(tiny)
    return autoencoder, tiny
