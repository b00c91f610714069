"""Open the files of a Qwen-Image: what each must be, and under which names its tensors go."""

from __future__ import annotations

from dataclasses import replace

from loader.checkpoint import Checkpoint, open_checkpoint
from loader.describe import describe
from loader.errors import LoadError
from loader.options import LoadOptions
from loader.params import load_params

from .. import autoencoder_qwen, qwen25_vision, qwen25_vl
from ..autoencoder_qwen import QwenAutoencoder, QwenAutoencoderConfig
from ..component import Component, Load, check_width, require
from ..devices import Place
from ..family import Compat, Path
from ..lora import Naming
from ..qwen25_vision import Qwen25Vision, VisionConfig
from ..qwen25_vl import Qwen25VL, Qwen25VLConfig
from . import transformer as net
from .transformer import QwenImageConfig, QwenImageTransformer

ARCHITECTURES = ("Qwen-Image", "Qwen-Image Layered")
LANGUAGE_MODELS = ("Qwen2.5-VL", "Qwen2 or Qwen2.5-VL")
_PREFIXES = ("text_encoders.llm.", "text_encoders.qwen25_7b.transformer.")
_TOWER = r"^(?:v|mm|(?:model\.)?visual)\..*$"  # tensors of the vision tower


def open_text_encoder(
    path: Path, place: Place, *, options: LoadOptions | None = None, load: Load = load_params
) -> Component:
    """Qwen2.5-VL's language model. LoadError when the file is broken or is something else."""
    checkpoint = _open_llm(path).renamed([(_TOWER, None)]).renamed(qwen25_vl.RENAMES)
    config = Qwen25VLConfig.from_checkpoint(checkpoint)
    return Component("qwen25_vl", Qwen25VL(config), checkpoint, place, options, load)


def open_vision_tower(
    path: Path | None, llm: Path, place: Place, *, options: LoadOptions | None = None, compat: Compat = "diffusers",
    load: Load = load_params,
) -> Component | None:  # fmt: skip
    """The tower of an mmproj file or, when none is given, of the text encoder's; None when that has none. `compat`
    decides which GELU it has. LoadError as above.
    """
    if path is None:
        checkpoint = _open_llm(llm)
        if not any(name.startswith(("visual.", "model.visual.", "v.")) for name in checkpoint):
            checkpoint.close()
            return None
    else:
        checkpoint = open_checkpoint(path)
        if describe(checkpoint).architecture != "Qwen2.5-VL":  # of a file with both
            require(checkpoint, "vision tower", ("Qwen2.5-VL vision tower",), "--llm-vision")
        checkpoint = _without_prefixes(checkpoint, *_PREFIXES)
    checkpoint = checkpoint.renamed(qwen25_vision.RENAMES)
    config = replace(VisionConfig.from_checkpoint(checkpoint), tanh_gelu=compat == "sd.cpp")
    return Component("vision", Qwen25Vision(config), checkpoint, place, options, load)


def open_transformer(
    path: Path, place: Place, *, options: LoadOptions | None = None, zero_cond_t: bool | None = None,
    compat: Compat = "diffusers", load: Load = load_params,
) -> Component:  # fmt: skip
    """Qwen-Image's transformer. `zero_cond_t`: whether references are modulated as at time 0, as Edit-2511 wants it;
    the file says so, unless given. `compat` decides where its text is. LoadError as above.
    """
    checkpoint = open_checkpoint(path)
    require(checkpoint, "diffusion model", ARCHITECTURES, "--diffusion-model")
    checkpoint = checkpoint.without_prefix("model.diffusion_model.")
    config = replace(QwenImageConfig.from_checkpoint(checkpoint), compat=compat)
    if zero_cond_t is not None:
        config = replace(config, zero_cond_t=zero_cond_t)
    return Component(
        "qwen_image", QwenImageTransformer(config), checkpoint.renamed(net.RENAMES), place, options, load
    )


def open_autoencoder(
    path: Path, place: Place, *, options: LoadOptions | None = None, encoder: bool = False, load: Load = load_params
) -> Component:
    """The autoencoder: its decoder, and its encoder when asked for. LoadError as above."""
    checkpoint = open_checkpoint(path)
    require(checkpoint, "autoencoder", ("Qwen-Image (Wan) autoencoder",), "--vae")
    checkpoint = _without_prefixes(checkpoint, "first_stage_model.", "vae.").renamed(autoencoder_qwen.RENAMES)
    config = QwenAutoencoderConfig.from_checkpoint(checkpoint)
    if not encoder:
        checkpoint = checkpoint.renamed(autoencoder_qwen.without("encoder"))
    return Component("vae", QwenAutoencoder(config, encoder=encoder), checkpoint, place, options, load)


def check_together(
    text_encoder: Component, transformer: Component, vae: Component | None, vision: Component | None
) -> None:
    """LoadError when parts are of different models."""
    llm, dit = text_encoder.module.config, transformer.module.config
    check_width(text_encoder, transformer)
    if vision is not None and vision.module.config.out_dim != llm.dim:
        raise LoadError(
            f"the vision tower's rows have {vision.module.config.out_dim} numbers, the text encoder's {llm.dim}: they "
            "do not belong together", path=vision.checkpoint.path,
        )  # fmt: skip
    if vae is None:
        return
    channels = vae.module.config.picture_channels
    if dit.layered != (channels == 4):
        wanted = "pictures with transparency" if dit.layered else "plain pictures"
        problem = f"it is an autoencoder of {channels} channels, and the transformer makes {wanted}"
        raise LoadError(problem, path=vae.checkpoint.path)


def for_merging(checkpoint: Checkpoint) -> tuple[Checkpoint, str, Naming] | None:
    """A file under the model's names, its role, and how LoRA files name its modules. None for other models."""
    found = describe(checkpoint)
    if found.role == "diffusion model" and found.architecture in ARCHITECTURES:
        named = checkpoint.without_prefix("model.diffusion_model.").renamed(net.RENAMES)
        return named, "transformer", QwenImageTransformer.naming
    if found.role == "text encoder" and found.architecture in LANGUAGE_MODELS:
        named = _without_prefixes(checkpoint, *_PREFIXES).renamed(qwen25_vl.RENAMES)
        return named, "text_encoder", Qwen25VL.naming
    return None


def _open_llm(path: Path) -> Checkpoint:
    checkpoint = open_checkpoint(path)
    require(checkpoint, "text encoder", LANGUAGE_MODELS, "--llm")
    return _without_prefixes(checkpoint, *_PREFIXES)


def _without_prefixes(checkpoint: Checkpoint, *prefixes: str) -> Checkpoint:
    for prefix in prefixes:
        checkpoint = checkpoint.without_prefix(prefix)
    return checkpoint
