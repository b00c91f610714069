"""Networks, tokenizers, samplers and pipelines; `load` opens the pipeline that a file belongs to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .z_image.pipeline import ZImagePipeline

__all__ = ["load"]


def load(
    diffusion_model: str | os.PathLike[str], llm: str | os.PathLike[str], vae: str | os.PathLike[str], **options: Any
) -> ZImagePipeline:
    """The pipeline for three files or diffusers folders: diffusion model, text encoder, autoencoder.

    Options are those of the pipeline's own `load`, for Z-Image `models.z_image.pipeline.ZImagePipeline.load`:
    backend, n_threads, options (a loader.LoadOptions), compat, encoder. Raises LoadError when a file is broken or is of
    a model that is not known.
    """
    from .z_image.pipeline import ZImagePipeline

    return ZImagePipeline.load(diffusion_model, llm, vae, **options)
