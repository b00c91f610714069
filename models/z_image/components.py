"""Open the three files of a Z-Image: what each must be, and under which names its tensors go."""

from __future__ import annotations

from dataclasses import replace

from loader.checkpoint import Checkpoint, open_checkpoint
from loader.describe import describe
from loader.options import LoadOptions
from loader.params import load_params

from .. import autoencoder_kl, qwen3
from ..autoencoder_kl import AutoencoderConfig, AutoencoderKL
from ..component import Component, Load, require
from ..devices import Place
from ..family import Compat, Path
from ..lora import Naming
from ..qwen3 import Qwen3, Qwen3Config
from . import transformer as net
from .transformer import ZImageConfig, ZImageTransformer


def open_text_encoder(
    path: Path, place: Place, *, options: LoadOptions | None = None, load: Load = load_params
) -> Component:
    """Qwen3, without its last layer. LoadError when the file is broken or is something else."""
    checkpoint = open_checkpoint(path)
    require(checkpoint, "text encoder", ("Qwen3",), "--llm")
    checkpoint = checkpoint.without_prefix("text_encoders.llm.").renamed(qwen3.RENAMES)
    config = Qwen3Config.from_checkpoint(checkpoint)
    # The hidden state before the last layer is what is read: that layer stays in the file.
    last = rf"^blk\.{config.n_layers - 1}\..*$"
    return Component("qwen3", Qwen3(config), checkpoint.renamed([(last, None)]), place, options, load)


def open_transformer(
    path: Path, place: Place, *, options: LoadOptions | None = None, compat: Compat = "diffusers",
    load: Load = load_params,
) -> Component:  # fmt: skip
    """Z-Image's transformer; `compat` decides the epsilon of its q and k norms. LoadError as above."""
    checkpoint = open_checkpoint(path)
    require(checkpoint, "diffusion model", ("Z-Image",), "--diffusion-model")
    checkpoint = checkpoint.without_prefix("model.diffusion_model.").renamed(net.RENAMES)
    config = ZImageConfig.from_checkpoint(checkpoint)
    if compat == "sd.cpp":
        config = replace(config, qk_norm_eps=1e-6)
    return Component("z_image", ZImageTransformer(config), checkpoint, place, options, load)


def open_autoencoder(
    path: Path, place: Place, *, options: LoadOptions | None = None, encoder: bool = False, load: Load = load_params
) -> Component:
    """The Flux autoencoder: its decoder, and its encoder when asked for. LoadError as above."""
    checkpoint = open_checkpoint(path)
    require(checkpoint, "autoencoder", ("Flux autoencoder",), "--vae")
    for prefix in ("first_stage_model.", "vae."):
        checkpoint = checkpoint.without_prefix(prefix)
    checkpoint = checkpoint.renamed(autoencoder_kl.RENAMES)
    config = AutoencoderConfig.from_checkpoint(checkpoint)
    if not encoder:
        checkpoint = checkpoint.renamed([(r"^encoder\..*$", None)])
    return Component("vae", AutoencoderKL(config, encoder=encoder), checkpoint, place, options, load)


def for_merging(checkpoint: Checkpoint) -> tuple[Checkpoint, str, Naming] | None:
    """A file under the model's names, its role, and how LoRA files name its modules. None for other models."""
    found = describe(checkpoint)
    if (found.role, found.architecture) == ("diffusion model", "Z-Image"):
        return checkpoint.without_prefix("model.diffusion_model.").renamed(net.RENAMES), "transformer", net.NAMING
    if (found.role, found.architecture) == ("text encoder", "Qwen3"):
        # the last layer takes part here: what is not computed in Z-Image is in the file all the same
        naming = Naming(qwen3.ALIASES, unused=r"(norm|output_norm|lm_head|output)$")
        return checkpoint.without_prefix("text_encoders.llm.").renamed(qwen3.RENAMES), "text_encoder", naming
    return None
