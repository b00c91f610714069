"""Z-Image from a prompt to a picture: encode, denoise, decode, each of which can be called alone.

The call is diffusers' (`guidance_scale` 0 is off; the first step is at sigma 1), and so are the defaults, those of
Z-Image-Turbo: 8 steps, no guidance, shift 3. `compat="sd.cpp"` follows stable-diffusion.cpp where the two differ;
docs/parity.md lists where.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from loader.errors import LoadError
from loader.lora import LoraReport
from loader.options import LoadOptions
from loader.params import load_params
from pyggml import Backend, Cancelled, Graph, NonFinite, SplitBackend

from .. import autoencoder_kl, image, prompt_weights, schedule, sd_cpp_words, tiles
from ..autoencoder_kl import AutoencoderKL
from ..component import Component, Load
from ..compute import first_bad_op
from ..devices import Module, places
from ..guidance import guidance_at, z_image_guidance
from ..lora import MAX_LORAS, ApplyMode, Loras, Naming, Target, check_weight
from ..memory import Report
from ..prediction import Phase, all_spans
from ..qwen3 import Qwen3
from ..residency import Residency
from ..rng import RNG, make_rng
from ..sampler import find_sampler, sample
from ..tokenizer import TEMPLATE, Tokenizer
from . import transformer as net
from .components import Compat, Path, open_autoencoder, open_text_encoder, open_transformer
from .transformer import ZImageTransformer

if TYPE_CHECKING:
    from PIL import Image

Float32 = NDArray[np.float32]
Progress = Callable[[str, int, int], None]

MAX_TOKENS = 512  # the reference cuts longer prompts; compat="sd.cpp" does not
CACHED_PROMPTS = 32
STRENGTH: Mapping[Compat, float] = {"diffusers": 0.6, "sd.cpp": 0.75}  # of img2img, when none is given
SIZE_MULTIPLE = autoencoder_kl.FACTOR
MAX_SIDE = 4096


@dataclass(frozen=True)
class Conditioning:
    """What the text encoder made of a prompt: `features` float32 [n_tokens, caption_dim]."""

    features: Float32
    # what a transformer's refiner makes of them, by the pipeline's key, and with which LoRAs on it
    _refined: dict[object, tuple[object, Float32]] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Result:
    """Pictures (Pillow images, or arrays as `output_type` asked), the seeds they were drawn from, and the report."""

    images: list[Any]
    seeds: list[int]
    report: Report


Method = TypeVar("Method", bound=Callable[..., Any])
T = TypeVar("T")


def _cancellable(method: Method) -> Method:
    """A method that cancel() stops. The outermost of nested calls begins with no cancellation pending."""

    @wraps(method)
    def run(self: ZImagePipeline, *args: Any, **kwargs: Any) -> Any:
        if not self._depth:
            self._cancelled.clear()
        self._depth += 1
        try:
            return method(self, *args, **kwargs)
        finally:
            self._depth -= 1

    return cast(Method, run)


class ZImagePipeline:
    """Text encoder, transformer and autoencoder of Z-Image, each on its own backend or all on one.

    Use `ZImagePipeline.load`, or `models.load`. It may be used by one thread at a time; `cancel()` may come from any.
    """

    default_steps = 8
    default_guidance_scale = 0.0
    default_shift = 3.0

    def __init__(
        self, text_encoder: Component, transformer: Component, vae: Component, tokenizer: Tokenizer, *,
        compat: Compat = "diffusers", default_size: int = 1024, lora_apply_mode: ApplyMode = "auto",
        memory_limit: int | None = None,
    ) -> None:  # fmt: skip
        self.text_encoder = text_encoder
        self.transformer = transformer
        self.vae = vae
        self.tokenizer = tokenizer
        self.compat = compat
        self.default_size = default_size
        self.find_bad_op = False  # compute again, operation by operation, when a result is not finite
        # The autoencoder's tiles, (height, width) in latent pixels: those to use always, and those for want of memory.
        self.vae_tile: tuple[int, int] | None = None
        self.smaller_vae_tile = tiles.DEFAULT
        self._tiles: dict[str, tuple[int, int]] = {}
        self.loras = Loras(
            {
                "text_encoder": self._target(text_encoder, text_encoder.module.naming),
                "transformer": self._target(transformer, net.NAMING),
            }, lora_apply_mode, self._drop_graphs,
        )  # fmt: skip
        self._prompts: OrderedDict[tuple[object, ...], Conditioning] = OrderedDict()
        self._key = object()
        self._cancelled = threading.Event()
        self._depth = 0  # of nested calls
        self._opened: tuple[Backend, ...] = ()  # by `load`: what it was given stays its giver's
        # What is split over devices computes in one piece: its pages are left to the system.
        single = [c for c in self._components() if not isinstance(c.backend, SplitBackend)]
        self.residency = Residency({c.weights.report.component: c.weights for c in single}, limit=memory_limit)

    # -- loading ------------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls, diffusion_model: Path, llm: Path, vae: Path, *,
        backend: Backend | str | Mapping[Module, Backend] | None = None, params_backend: str | None = None,
        n_threads: int | None = None, options: LoadOptions | None = None, compat: Compat = "diffusers",
        tokenizer: Tokenizer | None = None, encoder: bool = False, lora_apply_mode: ApplyMode = "auto",
        memory_limit: int | None = None, load: Load = load_params,
    ) -> ZImagePipeline:  # fmt: skip
        """Load from three files (or diffusers folders). `encoder`: also the half of the autoencoder that img2img needs.
        `lora_apply_mode`: "auto", "at_runtime" or "immediately", see models.lora.

        `backend`: what computes, one for all, one for each module, or a text such as "te=cpu,diffusion=vulkan0"
        (models.devices); the processor unless given. A backend that is passed stays open when the pipeline is closed.
        `params_backend`: where weights rest, such as "*=cpu,te=disk"; at what computes, unless given. Weights stay in
        the mapped files where the backend can use them there, unless `options` say otherwise. LoadError, before any
        computation, when a file is broken, is not what it is given as, or lacks a tensor; OutOfMemory when what must be
        copied has no room.

        `memory_limit`: bytes that weights and the process's own memory may take, beside what the system allows; see
        models.residency for what is done when weights do not fit. `load`: models.prediction.stand_in makes a pipeline
        that only says what it would do, by `phases`.
        """
        if compat not in ("diffusers", "sd.cpp"):
            raise ValueError(f"compat is 'diffusers' or 'sd.cpp', not {compat!r}")
        place = places(backend, params_backend, n_threads)
        opened: list[Component] = []
        try:
            opened.append(open_text_encoder(llm, place["te"], options=options, load=load))
            dit_place = place["diffusion"]
            opened.append(open_transformer(diffusion_model, dit_place, options=options, compat=compat, load=load))
            opened.append(open_autoencoder(vae, place["vae"], options=options, encoder=encoder, load=load))
            llm_component, dit, autoencoder = opened
            width = llm_component.module.config.dim
            if dit.module.config.caption_dim != width:
                raise LoadError(
                    f"the text encoder's features have {width} numbers, the transformer wants "
                    f"{dit.module.config.caption_dim}: they do not belong together", path=os.fspath(llm),
                )  # fmt: skip
            tokenizer = tokenizer or Tokenizer.for_checkpoint(llm_component.checkpoint)
            if compat == "sd.cpp":
                tokenizer = tokenizer.with_split(sd_cpp_words.split)
            default_size = int(dit.checkpoint.metadata.get("z_image.default_size", 1024))
            pipe = cls(
                llm_component, dit, autoencoder, tokenizer, compat=compat, default_size=default_size,
                lora_apply_mode=lora_apply_mode, memory_limit=memory_limit,
            )  # fmt: skip
        except BaseException:
            for component in opened:
                component.close()
            for one in place["te"].opened:
                one.close()
            raise
        pipe._opened = place["te"].opened  # for all three
        return pipe

    def close(self) -> None:
        """Give back graphs, LoRAs, weights, mappings, and the backends that `load` opened."""
        self.loras.close()
        for component in (self.text_encoder, self.transformer, self.vae):
            component.close()
        for backend in self._opened:
            backend.close()

    def __enter__(self) -> ZImagePipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cancel(self) -> None:
        """Stop the running call within one operation; it raises Cancelled. From any thread."""
        self._cancelled.set()
        for component in self._components():
            component.backend.cancel()

    # -- LoRAs --------------------------------------------------------------------------------------------------------

    @_cancellable
    def set_loras(
        self, loras: Mapping[Path, float] | Sequence[tuple[Path, float]], *, progress: Progress | None = None
    ) -> list[LoraReport]:  # fmt: skip
        """Make these LoRA files, each with its weight in -8..8, the only active ones; one that comes twice counts with
        the sum. The ones that stay are not read again. Returns what became of each file's keys.

        LoadError for a broken file, for one of another model or size, or when none of its keys is this model's; the
        LoRAs are then as they were before. progress("lora", done, total), in bytes, as tensors are merged.
        """
        weights: dict[str, float] = {}
        for path, weight in loras.items() if isinstance(loras, Mapping) else loras:
            name = os.path.realpath(path)
            weights[name] = check_weight(weights.get(name, 0.0) + check_weight(weight))
        if len(weights) > MAX_LORAS:
            raise ValueError(f"{len(weights)} LoRAs at once; {MAX_LORAS} are the most")
        self.loras.forget_replaced()
        before = list(self.loras.loaded)
        try:
            reports = [self.loras.load(name, name) for name in weights]
            self._activate(weights, progress)
        except BaseException:
            for name in [name for name in self.loras.loaded if name not in before]:
                self.loras.unload(name)
            raise
        for name in [name for name in self.loras.loaded if name not in weights]:
            self.loras.unload(name)
        return reports

    @_cancellable
    def load_lora_weights(self, path: Path, adapter_name: str | None = None) -> LoraReport:
        """diffusers' way: open a LoRA and add it to the active ones, with weight 1, under `adapter_name` (the file's
        name without its ending). Raises as set_loras; ValueError for a name that is taken.
        """
        name = os.path.splitext(os.path.basename(os.fspath(path)))[0] if adapter_name is None else adapter_name
        if name in self.loras.loaded:
            raise ValueError(f"there is a LoRA {name!r} already: give another adapter_name")
        report = self.loras.load(path, name)
        try:
            self._activate({**self.loras.active, name: 1.0})
        except BaseException:
            if name not in self.loras.active:
                self.loras.unload(name)
            raise
        return report

    @_cancellable
    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Make exactly these loaded LoRAs active, with these weights (1 where none is given, one for all)."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if adapter_weights is None or isinstance(adapter_weights, (int, float)):
            weights: list[float] = [1.0 if adapter_weights is None else adapter_weights] * len(names)
        else:
            weights = list(adapter_weights)
        if len(weights) != len(names) or len(set(names)) != len(names):
            raise ValueError(f"{len(weights)} weights for the LoRAs {', '.join(names)}: one for each, each named once")
        self._activate(dict(zip(names, weights, strict=True)))

    def unload_lora_weights(self) -> None:
        """Forget all LoRAs."""
        self.loras.clear()
        for name in list(self.loras.loaded):
            self.loras.unload(name)

    def _activate(self, weights: Mapping[str, float], progress: Progress | None = None) -> None:
        def check(done: int, total: int) -> None:
            if progress:
                progress("lora", done, total)
            self._check_cancelled()

        if weights and "disk" in (self.text_encoder.place.rest, self.transformer.place.rest):
            raise ValueError("LoRAs want weights that stay: let those of te and diffusion rest on cpu, not on disk")
        self.loras.activate(weights, check)

    def _target(self, component: Component, naming: Naming) -> Target:
        c = component
        return Target(c.module, c.weights, c.checkpoint, c.backend, naming, c.options)

    def _drop_graphs(self) -> None:
        for component in self._components():
            component.close_graphs()

    # -- the three parts ----------------------------------------------------------------------------------------------

    @_cancellable
    def encode(self, prompt: str) -> Conditioning:
        """The conditioning of a prompt; the last ones are remembered, so that no prompt is encoded twice.

        ValueError for a prompt that is no text, NonFinite when the encoder's output is not.
        """
        key = self._prompt_key(prompt)
        if key in self._prompts:
            self._prompts.move_to_end(key)
            return self._prompts[key]
        ids, weights = self._tokens(prompt)
        compute = partial(self._compute, "the text encoder")
        encoder: Qwen3
        with self.text_encoder.in_use() as encoder:
            features = encoder.encode(self.text_encoder.backend, np.array(ids, np.int32), compute)
        if weights:
            features = prompt_weights.apply_weights(features, weights)
        conditioning = Conditioning(features)
        self._prompts[key] = conditioning
        while len(self._prompts) > CACHED_PROMPTS:
            self._prompts.popitem(last=False)
        return conditioning

    def _tokens(self, prompt: str) -> tuple[list[int], list[float]]:
        """Numbers of a prompt's tokens, and with compat="sd.cpp" their weights."""
        if self.compat != "sd.cpp":
            return self.tokenizer.apply_template(prompt)[:MAX_TOKENS], []
        before, after = TEMPLATE
        return self.tokenizer.encode_weighted([(before, 1.0), *prompt_weights.parse(prompt), (after, 1.0)])

    @_cancellable
    def denoise(
        self, latents: Float32, sigmas: Float32, cond: Conditioning | Float32,
        uncond: Conditioning | Float32 | None = None, *, guidance_scale: float = 0.0,
        cfg_normalization: float = 0.0, cfg_truncation: float = 1.0, method: str = "euler",
        eta: float | None = None, rng: RNG | None = None,
        callback: Callable[[int, float, Float32], Float32 | None] | None = None,
    ) -> Float32:  # fmt: skip
        """Latents [16, h, w] at noise level sigmas[0] to clean ones. Conditionings may be arrays [n_tokens, dim].

        NonFinite naming the step when latents stop being finite; Cancelled; ValueError for bad sigmas or method, and
        for guidance without `uncond`.
        """
        both = find_sampler(method, eta).both
        guided = self._guided(guidance_scale, both)
        if guided and uncond is None:
            raise ValueError("guidance needs the conditioning of a negative prompt, `uncond`")
        conds = [_conditioning(c, self) for c in ((cond, uncond) if guided else (cond,)) if c is not None]
        contexts: list[Float32] = []

        def estimate(x: Float32, sigma: float) -> Any:
            self._check_cancelled()
            v = first = self._velocity(x, sigma, contexts[0])
            scale = guidance_scale
            if scale > 0:
                scale = guidance_at(sigma, scale, cfg_truncation=cfg_truncation)
            if guided and (scale != 0 or both):
                second = self._velocity(x, sigma, contexts[1])
                v = z_image_guidance(first, second, scale, cfg_normalization=cfg_normalization)
                if both:
                    return x - np.float32(sigma) * v, x - np.float32(sigma) * second
            return x - np.float32(sigma) * v

        def after(i: int, sigma: float, x: Float32) -> Float32 | None:
            if not np.isfinite(x).all():
                raise NonFinite(f"step {i + 1} (sigma {sigmas[i]:.4f}): the latents are not finite")
            changed = callback(i, sigma, x) if callback else None
            self._check_cancelled()
            return None if changed is None else _latents(changed, latents.shape)

        with self.transformer.in_use():
            contexts += [self._context(c) for c in conds]
            return np.asarray(sample(method, estimate, latents, sigmas, rng=rng, eta=eta, callback=after), np.float32)

    @_cancellable
    def decode(self, latents: Float32) -> NDArray[np.uint8]:
        """Latents [16, h, w] to a picture, uint8 [8 h, 8 w, 3]; in tiles when `vae_tile` says so, or memory is short.

        NonFinite when the decoder's output is not finite, or is a picture of one colour.
        """
        compute, latents = partial(self._compute, "the decoder"), np.asarray(latents, np.float32)
        with self.vae.in_use() as vae:
            picture = self._tiled("decode", partial(vae.decode, self.vae.backend, latents, compute))
        result = image.to_bytes(picture)
        if (result == result[0, 0]).all():
            raise NonFinite(f"the decoder made a picture of one colour, {result[0, 0].tolist()}: nothing was drawn")
        return result

    @_cancellable
    def encode_image(self, picture: NDArray[np.uint8], rng: RNG | None = None) -> Float32:
        """A picture, uint8 [H, W, 3], to scaled latents [16, H/8, W/8]: drawn from the posterior, or its mean.

        The mean when there is no rng. ValueError when the encoder was not loaded.
        """
        mean, deviation = self._posterior(picture)
        return autoencoder_kl.scale_latents(mean) if rng is None else _draw((mean, deviation), rng)

    def _posterior(self, picture: NDArray[np.uint8]) -> tuple[Float32, Float32]:
        """Mean and standard deviation of a picture's latents, as the autoencoder has them."""
        module: AutoencoderKL = self.vae.module
        if module.encoder is None:
            raise ValueError("the autoencoder was loaded without its encoder: load with encoder=True for img2img")
        compute, pixels = partial(self._compute, "the encoder"), image.to_float(picture)
        with self.vae.in_use():
            return self._tiled("encode_image", partial(module.encode, self.vae.backend, pixels, compute))

    def _tiled(self, phase: str, run: Callable[..., T]) -> T:
        """run(tile=...) with such tiles as there is room for; remembers them."""
        result, tile = tiles.with_less_memory(phase, lambda t: run(tile=t), self.vae_tile, self.smaller_vae_tile)
        if tile:
            self._tiles[phase] = tile
        return result

    # -- everything at once -------------------------------------------------------------------------------------------

    @_cancellable
    def __call__(
        self, prompt: str, *, negative_prompt: str = "", height: int | None = None, width: int | None = None,
        num_inference_steps: int | None = None, guidance_scale: float | None = None,
        sigmas: Sequence[float] | None = None, scheduler: str | None = None, shift: float | None = None,
        method: str = "euler", eta: float | None = None, seed: int = 42, num_images_per_prompt: int = 1,
        rng: str | None = None, cfg_normalization: float = 0.0, cfg_truncation: float = 1.0,
        latents: Float32 | None = None,
        prompt_embeds: Conditioning | Float32 | None = None,
        negative_prompt_embeds: Conditioning | Float32 | None = None, init_image: Path | Image.Image | None = None,
        strength: float | None = None, output_type: str = "pil", progress: Progress | None = None,
        callback_on_step_end: Callable[[ZImagePipeline, int, float, dict[str, Any]], Mapping[str, Any]] | None = None,
        on_image: Callable[[int, int, NDArray[np.uint8]], None] | None = None,
    ) -> Result:  # fmt: skip
        """Draw `num_images_per_prompt` pictures; image i has seed + i.

        height, width: pixels, multiples of 8; a prompt or `prompt_embeds` float32 [n_tokens, dim]; `latents` float32
        [16, height/8, width/8] replace the noise. `guidance_scale` is diffusers': 0 is off, sd-cli's --cfg-scale is one
        more. `sigmas`: the noise levels before the shift, as in diffusers; `scheduler`: a name of models.schedule.
        `strength` (with `init_image`): 1 keeps nothing of it. output_type: "pil", "np" (uint8 [H, W, 3]) or "latent".
        progress(phase, done, total) is called as phases go on; callback_on_step_end(pipe, step, timestep, {"latents":
        ...}) after each step returns a dict whose "latents" replace the live ones; on_image(i, seed, picture) as each
        picture is ready.

        Raises ValueError for a bad argument, Cancelled after cancel(), NonFinite instead of a blank picture.
        """
        # 1. what is asked for
        width = self.default_size if width is None else width
        height = self.default_size if height is None else height
        check_size(width, height)
        shape = (self.transformer.module.config.in_channels, height // SIZE_MULTIPLE, width // SIZE_MULTIPLE)
        steps = self.default_steps if num_inference_steps is None else num_inference_steps
        guidance = self.default_guidance_scale if guidance_scale is None else guidance_scale
        both = find_sampler(method, eta).both
        if not math.isfinite(guidance):
            raise ValueError(f"guidance_scale must be a finite number, not {guidance}")
        if not 1 <= num_images_per_prompt <= 1000:
            raise ValueError(f"num_images_per_prompt must be in 1..1000, not {num_images_per_prompt}")
        if output_type not in ("pil", "np", "latent"):
            raise ValueError(f"output_type is 'pil', 'np' or 'latent', not {output_type!r}")
        name = rng or ("cuda" if self.compat == "sd.cpp" else "cpu")
        for used in (seed, seed + num_images_per_prompt - 1):
            make_rng(name, used)  # refuses what it must before any work is done
        noise = None if latents is None else _latents(latents, shape)
        levels = self._sigmas(steps, sigmas, scheduler, shift, width, height, method)
        pixels = None
        if init_image is not None:
            levels = schedule.after_strength(
                levels, STRENGTH[self.compat] if strength is None else strength,
                compat="sd.cpp" if self.compat == "sd.cpp" else None,
            )  # fmt: skip
            pixels = image.read_image(init_image, width, height)
        self._check_unchanged()
        self._tiles = {}
        self.residency.begin()
        report = Report(residency=self.residency.report)
        report.loras = self.loras.report()
        tell = progress or (lambda phase, done, total: None)

        # 2. prompts
        with report.phase("text_encoder"), self.text_encoder.kept():
            report.prompt_cached = prompt_embeds is None and self._prompt_key(prompt) in self._prompts
            tell("text encoder", 0, 1)
            cond = self.encode(prompt) if prompt_embeds is None else _conditioning(prompt_embeds, self)
            uncond = None
            if self._guided(guidance, both):
                uncond = (self.encode(negative_prompt) if negative_prompt_embeds is None
                          else _conditioning(negative_prompt_embeds, self))  # fmt: skip
            tell("text encoder", 1, 1)

        # 3. the picture to start from
        posterior: tuple[Float32, Float32] | None = None
        if pixels is not None:
            with report.phase("encode_image"):
                posterior = self._posterior(pixels)

        images: list[Any] = []
        for i in range(num_images_per_prompt):
            # 4. noise
            generator = make_rng(name, seed + i)
            start = None
            if posterior is not None:
                # diffusers goes on with one generator; stable-diffusion.cpp begins it anew for the noise.
                start = _draw(posterior, make_rng(name, seed) if self.compat == "sd.cpp" else generator)
            x = generator.randn(shape) if noise is None else noise
            if start is not None:
                x = schedule.add_noise(start, x, float(levels[0]))

            # 5. denoise
            clock = [time.perf_counter()]

            def after(step: int, sigma: float, x: Float32, clock: list[float] = clock) -> Float32 | None:
                tell("step", step + 1, len(levels) - 1)
                report.step_seconds.append(_since(clock))
                if callback_on_step_end is None:
                    return None
                changed = callback_on_step_end(self, step, 1000 * float(levels[step]), {"latents": x})
                if not isinstance(changed, Mapping) or set(changed) - {"latents"}:
                    raise ValueError(f"callback_on_step_end must return a dict, of latents or empty: {changed!r:.80}")
                live = changed.get("latents")
                return None if live is x else live

            tell("step", 0, len(levels) - 1)
            with report.phase("denoise"):
                x = self.denoise(
                    x, levels, cond, uncond, guidance_scale=guidance, cfg_normalization=cfg_normalization,
                    cfg_truncation=cfg_truncation, method=method, eta=eta, rng=generator, callback=after,
                )  # fmt: skip

            # 6. decode
            if output_type == "latent":
                images.append(x)
                continue
            tell("decode", 0, 1)
            with report.phase("decode"):
                picture = self.decode(x)
            tell("decode", 1, 1)
            self._check_unchanged()
            if on_image:
                on_image(i, seed + i, picture)
            images.append(image.to_pil(picture) if output_type == "pil" else picture)
        report.tiles = self._tiles
        self._check_unchanged()
        report.components = {c.weights.report.component: c.weights.report for c in self._components()}
        return Result(images, [seed + i for i in range(num_images_per_prompt)], report)

    # -- before anything is computed -----------------------------------------------------------------------------------

    def phases(
        self, prompt: str, *, negative_prompt: str = "", height: int | None = None, width: int | None = None,
        guidance_scale: float | None = None, method: str = "euler", num_images_per_prompt: int = 1,
        encode_image: bool = False,
    ) -> list[Phase]:  # fmt: skip
        """The graphs that a call with these arguments computes, in order, measured; for models.prediction.predict."""
        width = self.default_size if width is None else width
        height = self.default_size if height is None else height
        check_size(width, height)
        guidance = self.default_guidance_scale if guidance_scale is None else guidance_scale
        guided = self._guided(guidance, find_sampler(method, None).both)
        spans = all_spans([component.weights for component in self._components()])
        lengths = [len(self._tokens(text)[0]) for text in ([prompt, negative_prompt] if guided else [prompt])]
        h, w = height // SIZE_MULTIPLE, width // SIZE_MULTIPLE
        n_patches = -(-h // net.PATCH) * -(-w // net.PATCH)
        dit: ZImageTransformer = self.transformer.module
        vae: AutoencoderKL = self.vae.module
        found = [Phase.of("text encoder", self.text_encoder.module.graph(self.text_encoder.backend, n), spans, n_rows=n)
                 for n in lengths]  # fmt: skip
        pixels = 16 * height * width  # bytes: three floats, and whether each is finite
        if encode_image:
            graph = vae.encoder_graph(self.vae.backend, height, width)
            found.append(Phase.of("image encoder", graph, spans, extra=pixels))
        found += [Phase.of("caption refiner", dit.context_graph(self.transformer.backend, n), spans) for n in lengths]
        picture = [
            Phase.of("steps", dit.step_graph(self.transformer.backend, n_patches, net.padded(n)), spans, stays=True)
            for n in dict.fromkeys(lengths)
        ]
        if self.vae_tile:  # and the widest layers of the whole picture in memory of our own
            narrow, wide = vae.config.channels[:2]
            pixels += 4 * (wide + 2 * narrow) * height * width
            h, w = min(h, self.vae_tile[0]), min(w, self.vae_tile[1])
        picture.append(Phase.of("decoder", vae.decoder_graph(self.vae.backend, h, w), spans, extra=pixels))
        again = [replace(phase, buffer=0, stays=False) if phase.stays else phase for phase in picture]
        return found + picture + (again if num_images_per_prompt > 1 else [])

    # -- inside -------------------------------------------------------------------------------------------------------

    def _prompt_key(self, prompt: str) -> tuple[object, ...]:
        return self.compat, prompt, self.loras.state("text_encoder")

    def _components(self) -> tuple[Component, ...]:
        return self.text_encoder, self.transformer, self.vae

    def _sigmas(
        self, n: int, explicit: Sequence[float] | None, name: str | None, shift: float | None, width: int, height: int,
        method: str,
    ) -> Float32:  # fmt: skip
        shift = self.default_shift if shift is None else shift
        if explicit is not None:
            if self.compat == "sd.cpp":
                return schedule.explicit(explicit)
            return schedule.shifted(explicit, shift)
        if name is None:
            name = schedule.sd_cpp_default(method) if self.compat == "sd.cpp" else "diffusers"
        return schedule.sigmas(name, n, shift=shift, n_positions=(height // 8) * (width // 8))

    def _context(self, cond: Conditioning) -> Float32:
        """The refined caption, once for each conditioning."""
        module: ZImageTransformer = self.transformer.module
        state = self.loras.state("transformer")
        if cond._refined.get(self._key, (None,))[0] != state:
            n = len(cond.features)
            with module.context_graph(self.transformer.backend, n) as graph:
                inputs = dict(caption=cond.features, position=net.context_positions(n))
                context = self._compute("the caption's refiner", graph, **inputs)["context"]
                cond._refined[self._key] = state, context
        return cond._refined[self._key][1]

    def _velocity(self, x: Float32, sigma: float, context: Float32) -> Float32:
        """noise - x0 as the network sees it, [16, h, w]."""
        _, h, w = x.shape
        padded_x = np.pad(x, ((0, 0), (0, h % 2), (0, w % 2)))  # sizes that are no multiple of 16
        rows, columns = padded_x.shape[1] // net.PATCH, padded_x.shape[2] // net.PATCH
        graph = self._step_graph(rows * columns, len(context))
        position = np.concatenate(
            [net.image_positions(rows, columns, len(context)), net.context_positions(len(context))], axis=1
        )
        t = np.array([net.T_SCALE * (1 - sigma)], np.float32)
        inputs = dict(patches=net.patchify(padded_x), t=t, context=context, position=position)
        out = self._compute(f"the transformer at sigma {sigma:.4f}", graph, **inputs)["out"]
        return -net.unpatchify(out, *padded_x.shape[1:])[:, :h, :w]

    def _step_graph(self, n_patches: int, n_context: int) -> Graph:
        transformer = self.transformer  # keeps two graphs: prompt and negative prompt
        build = partial(transformer.module.step_graph, transformer.backend, n_patches, n_context)
        return transformer.graph((n_patches, n_context), build)

    def _compute(self, stage: str, graph: Graph, **inputs: Any) -> dict[str, Any]:
        """Graph.compute; Cancelled when asked to stop, NonFinite naming the stage when a result is not finite."""
        graph.set(**inputs)
        self._check_cancelled()  # right before the backend, which from here on is stopped within one operation
        self.residency.run(graph, stage.partition(" at ")[0])
        self._check_cancelled()
        outputs = {name: tensor.numpy() for name, tensor in graph.outputs.items()}
        for array in outputs.values():
            if n_bad := array.size - int(np.isfinite(array).sum()):
                self._check_unchanged()
                bad = f"; the first bad operation is {first_bad_op(graph)}" if self.find_bad_op else ""
                raise NonFinite(f"{stage}: {n_bad} of {array.size} values are not finite{bad}")
        return outputs

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled("the run was cancelled")

    def _check_unchanged(self) -> None:
        for component in self._components():
            if changed := (component.checkpoint if component.weights.closed else component.weights).changed():
                raise LoadError(f"a file of weights changed while it was used: {changed}", kind="WeightsChanged")
        if changed := self.loras.file_changed():
            raise LoadError(f"a LoRA changed while it was used: {changed}", kind="WeightsChanged")

    def _guided(self, guidance_scale: float, both: bool) -> bool:
        """Whether the negative prompt takes part. Below 0, cfg below 1, stable-diffusion.cpp mixes the two as well."""
        return both or (guidance_scale != 0 if self.compat == "sd.cpp" else guidance_scale > 0)


def check_size(width: int, height: int) -> None:
    """ValueError unless both sides are multiples of 8 in 16..4096."""
    for name, side in (("width", width), ("height", height)):
        if not isinstance(side, int) or not 16 <= side <= MAX_SIDE or side % SIZE_MULTIPLE:
            raise ValueError(f"{name} must be a multiple of {SIZE_MULTIPLE} in 16..{MAX_SIDE}, not {side}")


def _draw(posterior: tuple[Float32, Float32], rng: RNG) -> Float32:
    """A sample of the posterior, scaled as the transformer takes it."""
    mean, deviation = posterior
    return autoencoder_kl.scale_latents(mean + deviation * rng.randn(mean.shape))


def _conditioning(values: Conditioning | Float32, pipe: ZImagePipeline) -> Conditioning:
    if isinstance(values, Conditioning):
        return values
    array, dim = np.asarray(values, np.float32), pipe.transformer.module.config.caption_dim
    if array.ndim != 2 or array.shape[1] != dim or not len(array):
        raise ValueError(f"prompt embeddings have shape [n_tokens, {dim}], not {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("prompt embeddings hold values that are not finite")
    return Conditioning(array)


def _latents(values: Float32, shape: tuple[int, int, int]) -> Float32:
    array = np.asarray(values, np.float32)
    if array.shape != shape:
        raise ValueError(f"latents for this size have shape {shape}, not {array.shape}")
    return array


def _since(clock: list[float]) -> float:
    """Seconds since the last call with the same clock."""
    last, clock[0] = clock[0], time.perf_counter()
    return clock[0] - last
