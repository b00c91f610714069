"""Z-Image from a prompt to a picture.

The call is diffusers' (`guidance_scale` 0 is off; the first step is at sigma 1), and so are the defaults, those of
Z-Image-Turbo: 8 steps, no guidance, shift 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from loader.options import LoadOptions
from loader.params import load_params
from pyggml import Backend

from .. import autoencoder_kl, prompt_weights, schedule
from ..component import Load, check_width, opening
from ..decoders import check_decoders, open_decoders
from ..devices import Module, places
from ..family import Compat, Float32, Path, Pixels
from ..guidance import Guidance, ZImageGuidance
from ..lora import ApplyMode
from ..pipeline import Pipeline
from ..prediction import Phase
from ..qwen3 import Qwen3
from ..residency import Span
from ..rng import RNG
from ..sizes import PATCH, n_patches, whole_patches
from ..step_cache import Blocks
from ..tokenizer import TEMPLATE, Tokenizer
from . import transformer as net
from .components import open_autoencoder, open_text_encoder, open_transformer
from .transformer import ZImageTransformer

MAX_TOKENS = 512  # the reference cuts longer prompts; compat="sd.cpp" does not


class ZImagePipeline(Pipeline):
    """Text encoder, transformer and autoencoder of Z-Image, each on its own backend or all on one.

    Use `ZImagePipeline.load`, or `models.load`.
    """

    default_steps = 8
    default_cfg_scale = 1.0
    default_strength = 0.6, 1.0
    tiny = "TAESD"
    refiner = "caption refiner"

    @classmethod
    def load(
        cls, diffusion_model: Path, llm: Path, vae: Path | None = None, *, tae: Path | None = None,
        tae_preview_only: bool = False,
        backend: Backend | str | Mapping[Module, Backend] | None = None, params_backend: str | None = None,
        n_threads: int | None = None, options: LoadOptions | None = None, compat: Compat = "diffusers",
        tokenizer: Tokenizer | None = None, encoder: bool = False, lora_apply_mode: ApplyMode = "auto",
        memory_limit: int | None = None, max_vram: int | None = None, load: Load = load_params,
    ) -> ZImagePipeline:  # fmt: skip
        """Load from three files (or diffusers folders). `encoder`: also the half of the autoencoder that img2img needs.
        `lora_apply_mode`: "auto", "at_runtime" or "immediately", see models.lora.

        `tae`: a tiny autoencoder. It makes the pictures, and `vae` may be left out where none are read; with
        `tae_preview_only` it makes previews.

        `backend`: what computes, one for all, one for each module, or a text such as "te=cpu,diffusion=vulkan0"
        (models.devices); the processor unless given. A backend that is passed stays open when the pipeline is closed.
        `params_backend`: where weights rest, such as "*=cpu,te=disk"; at what computes, unless given. Weights stay in
        the mapped files where the backend can use them there, unless `options` say otherwise. LoadError, before any
        computation, when a file is broken, is not what it is given as, or lacks a tensor; OutOfMemory when what must be
        copied has no room.

        `memory_limit`: bytes that weights and the process's own memory may take, beside what the system allows; see
        models.residency for what is done when weights do not fit. `max_vram`: bytes of a device's memory that a module
        may take while it is in use, its parameters resting on the host; see models.streaming. `load`:
        models.prediction.stand_in makes a pipeline that only says what it would do, by `phases`.
        """
        if compat not in ("diffusers", "sd.cpp"):
            raise ValueError(f"compat is 'diffusers' or 'sd.cpp', not {compat!r}")
        check_decoders(vae, tae, tae_preview_only, encoder)
        place = places(backend, params_backend, n_threads, max_vram)
        with opening(place) as parts:
            parts.append(open_text_encoder(llm, place["te"], options=options, load=load))
            dit_place = place["diffusion"]
            parts.append(open_transformer(diffusion_model, dit_place, options=options, compat=compat, load=load))
            text_encoder, transformer = parts
            autoencoder, tiny = open_decoders(
                parts, vae, tae, place["vae"], cls.tiny, open_autoencoder, encoder=encoder, options=options, load=load
            )
            check_width(text_encoder, transformer)
            tokenizer = tokenizer or Tokenizer.for_checkpoint(text_encoder.checkpoint)
            default_size = int(transformer.checkpoint.metadata.get("z_image.default_size", 1024))
            return cls(
                text_encoder, transformer, autoencoder, tokenizer, tae=tiny, tae_preview_only=tae_preview_only,
                compat=compat, default_size=default_size, lora_apply_mode=lora_apply_mode, memory_limit=memory_limit,
                opened=place["te"].opened,
            )  # fmt: skip

    # -- prompts ------------------------------------------------------------------------------------------------------

    def _tokens(self, prompt: str) -> tuple[list[int], list[float]]:
        """Numbers of a prompt's tokens, and with compat="sd.cpp" their weights."""
        if self.compat != "sd.cpp":
            return self.tokenizer.apply_template(prompt)[:MAX_TOKENS], []
        before, after = TEMPLATE
        return self.tokenizer.encode_weighted([(before, 1.0), *prompt_weights.parse(prompt), (after, 1.0)])

    def _features(self, prompt: str, pictures: Sequence[Pixels]) -> Float32:
        ids, weights = self._tokens(prompt)
        compute = partial(self._compute, "the text encoder")
        encoder: Qwen3
        with self.text_encoder.in_use() as encoder:
            features = encoder.encode(self.text_encoder.backend, np.array(ids, np.int32), compute)
        return prompt_weights.apply_weights(features, weights) if weights else features

    def _refined(self, features: Float32) -> Float32:
        module: ZImageTransformer = self.transformer.module
        n = len(features)
        with module.context_graph(self.transformer.backend, n) as graph:
            inputs = dict(caption=features, position=net.context_positions(n))
            return np.asarray(self._compute("the caption's refiner", graph, **inputs)["context"])

    # -- steps --------------------------------------------------------------------------------------------------------

    def _velocities(
        self, x: Float32, sigma: float, contexts: Sequence[Float32], references: Sequence[Float32] = (),
        blocks: Blocks | None = None,
    ) -> list[Float32]:  # fmt: skip
        padded = whole_patches(x)
        grid, n_context = (padded.shape[1] // PATCH, padded.shape[2] // PATCH), tuple(map(len, contexts))
        positions = [part for n in n_context
                     for part in (net.image_positions(*grid, n), net.context_positions(n))]  # fmt: skip
        t = np.array([net.T_SCALE * (1 - sigma)], np.float32)
        inputs = dict(patches=net.patchify(padded), t=t, context=np.concatenate(contexts),
                      position=np.concatenate(positions, axis=1))  # fmt: skip
        out = self._step(x, sigma, contexts, references, blocks, inputs)
        _, h, w = x.shape
        return [-net.unpatchify(part, *padded.shape[1:])[:, :h, :w] for part in np.split(out, len(contexts))]

    def _step_sizes(self, shape: Sequence[int], n_context: Any, references: Sequence[Sequence[int]]) -> tuple[Any, ...]:
        return n_patches(shape), n_context

    def _sigmas(
        self, n: int, explicit: Sequence[float] | None, name: str | None, shift: float | None, method: str,
        width: int, height: int,
    ) -> Float32:  # fmt: skip
        shift = self.default_shift if shift is None else shift
        if explicit is not None:
            if self.compat == "sd.cpp":
                return schedule.explicit(explicit)
            return schedule.shifted(explicit, shift)
        if name is None:
            name = schedule.sd_cpp_default(method) if self.compat == "sd.cpp" else "diffusers"
        return schedule.sigmas(name, n, shift=shift, n_positions=(height // 8) * (width // 8))

    def _guidance(
        self, cfg_scale: float | None, guidance_scale: float | None = None, true_cfg_scale: float | None = None,
        cfg_normalization: float | None = None, cfg_truncation: float | None = None,
    ) -> Guidance | None:  # fmt: skip
        if true_cfg_scale is not None:
            raise ValueError("true_cfg_scale is Qwen-Image's: Z-Image's is guidance_scale, one less")
        if cfg_scale is not None and guidance_scale is not None:
            raise ValueError("cfg_scale and guidance_scale are both given: they mean the same, give one of them")
        scale = (self.default_cfg_scale if cfg_scale is None else cfg_scale) - 1
        scale = scale if guidance_scale is None else guidance_scale
        if not math.isfinite(scale):
            raise ValueError(f"guidance_scale must be a finite number, not {scale}")
        # Below 0, cfg below 1, stable-diffusion.cpp mixes the two as well.
        if scale == 0 or (scale < 0 and self.compat != "sd.cpp"):
            return None
        truncation = 1.0 if cfg_truncation is None else cfg_truncation
        return ZImageGuidance(scale, cfg_normalization or 0.0, truncation)

    # -- pictures -----------------------------------------------------------------------------------------------------

    def _drawn(self, mean: Float32, deviation: Float32, rng: RNG | None) -> Float32:
        return autoencoder_kl.scale_latents(super()._drawn(mean, deviation, rng))

    # -- before anything is computed ----------------------------------------------------------------------------------

    def _prompt_phases(
        self, texts: Sequence[str], pictures: Sequence[Pixels], spans: Sequence[Span]
    ) -> tuple[list[Phase], list[int]]:
        graph = partial(self.text_encoder.module.graph, self.text_encoder.backend)
        ids = [self._tokens(text)[0] for text in texts]
        found = [Phase.of("text encoder", graph(len(x)), spans, n_rows=len(set(x))) for x in ids]
        return found, [*map(len, ids)]
