"""Networks, tokenizers, samplers and pipelines; `load` opens the pipeline that a file belongs to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loader.checkpoint import Checkpoint

    from .lora import Naming
    from .pipeline import Pipeline
    from .qwen_image import QwenImagePipeline
    from .z_image import ZImagePipeline

__all__ = ["for_merging", "is_layered", "load", "n_blocks", "pipeline_for"]


def load(
    diffusion_model: str | os.PathLike[str], llm: str | os.PathLike[str], vae: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Pipeline:  # fmt: skip
    """The pipeline for three files or diffusers folders: diffusion model, text encoder, autoencoder (or a tiny one, as
    the option `tae`).

    Options are those of the pipeline's own `load`: `models.z_image.ZImagePipeline.load` has those that all share
    (backend, n_threads, options (a loader.LoadOptions), compat, encoder, ...), and
    `models.qwen_image.QwenImagePipeline.load` some more. Raises LoadError when a file is broken or is of a model that
    is not known.
    """
    return pipeline_for(diffusion_model).load(diffusion_model, llm, vae, **options)


def pipeline_for(diffusion_model: str | os.PathLike[str]) -> type[ZImagePipeline] | type[QwenImagePipeline]:
    """The kind of pipeline that a diffusion model's file is for; only its header is read. LoadError as `load`."""
    if _architecture(diffusion_model) in ("Qwen-Image", "Qwen-Image Layered"):
        from .qwen_image import QwenImagePipeline

        return QwenImagePipeline
    from .z_image import ZImagePipeline  # which says what is wrong with anything else

    return ZImagePipeline


def is_layered(diffusion_model: str | os.PathLike[str]) -> bool:
    """Whether a diffusion model takes pictures apart into layers; only its header is read. LoadError as `load`."""
    return _architecture(diffusion_model) == "Qwen-Image Layered"


def n_blocks(diffusion_model: str | os.PathLike[str]) -> int | None:
    """How many blocks a diffusion model has, as step caches count them; only its header is read. None when it is of a
    model that is not known, LoadError as `load`.
    """
    from loader.checkpoint import open_checkpoint

    from . import detected
    from .qwen_image import components as qwen_image
    from .z_image import components as z_image

    with open_checkpoint(diffusion_model) as checkpoint:
        found = z_image.for_merging(checkpoint) or qwen_image.for_merging(checkpoint)
        if found is None or found[1] != "transformer":
            return None
        return max(detected.n_blocks(found[0], prefix) for prefix in ("layers", "transformer_blocks"))


def _architecture(diffusion_model: str | os.PathLike[str]) -> str:
    from loader.checkpoint import open_checkpoint
    from loader.describe import describe

    with open_checkpoint(diffusion_model) as checkpoint:
        return describe(checkpoint).architecture


def for_merging(checkpoint: Checkpoint) -> tuple[Checkpoint, str, Naming]:
    """A model's file under the names that we have for its tensors, its role, and how LoRA files name its modules.
    LoadError for a file that LoRAs are not merged into.
    """
    from loader.describe import describe
    from loader.errors import LoadError

    from .qwen_image import components as qwen_image
    from .z_image import components as z_image

    found = z_image.for_merging(checkpoint) or qwen_image.for_merging(checkpoint)
    if found is None:
        into = "LoRAs are merged into transformers and text encoders of Z-Image and Qwen-Image"
        raise LoadError(f"{describe(checkpoint).sentence()}: {into}", kind="Unsupported", path=checkpoint.path)
    return found
