"""What the pipelines of all models have in common: encode a prompt, denoise, decode, each of which can be called alone.

A family of models says what is its own in a subclass, by the methods of models.family. `compat="sd.cpp"` follows
stable-diffusion.cpp where it differs from diffusers; docs/parity.md lists where.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np

from loader.errors import LoadError
from loader.lora import LoraReport
from pyggml import Backend, Cancelled, Graph, NonFinite, OutOfMemory, SplitBackend

from . import image, schedule, sd_cpp_words, tiles
from .asked import Asked, as_latents, read_asked
from .component import Component
from .compute import first_bad_op
from .family import Compat, Family, Float32, Path, Pixels
from .guidance import Guidance
from .inpainting import Inpainting
from .lora import MAX_LORAS, ApplyMode, Loras, Target, check_weight
from .memory import Report, Stage
from .phases import decoder_phase, encoder_phase, once_more, step_phases
from .prediction import Phase, all_spans
from .preview import SIDE, Mode, Show, View
from .residency import Residency
from .rng import RNG, make_rng
from .sampler import evaluated, find_sampler, sample
from .sizes import latent_size
from .step_cache import Blocks, CacheRun, Cut, StepCache
from .streaming import Stream
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger("pyggml.models")

Progress = Callable[[str, int, int], None]

CACHED_PROMPTS = 32


@dataclass(frozen=True)
class Conditioning:
    """What the text encoder made of a prompt: `features` float32 [n_tokens, dim]."""

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
P = TypeVar("P", bound="Pipeline")
StepCallback = Callable[[Any, int, float, dict[str, Any]], Mapping[str, Any]]


def _cancellable(method: Method) -> Method:
    """A method that cancel() stops. The outermost of nested calls begins with no cancellation pending."""

    @wraps(method)
    def run(self: Pipeline, *args: Any, **kwargs: Any) -> Any:
        if not self._depth:
            self._cancelled.clear()
        self._depth += 1
        try:
            return method(self, *args, **kwargs)
        finally:
            self._depth -= 1

    return cast(Method, run)


class Pipeline(Family):
    """The networks of a model, each where it computes, and everything that a run needs around them.

    It may be used by one thread at a time; `cancel()` may come from any.
    """

    def __init__(
        self, text_encoder: Component, transformer: Component, vae: Component | None, tokenizer: Tokenizer, *,
        tae: Component | None = None, tae_preview_only: bool = False, compat: Compat = "diffusers",
        default_size: int = 1024, lora_apply_mode: ApplyMode = "auto", memory_limit: int | None = None,
        opened: Sequence[Backend] = (),
    ) -> None:  # fmt: skip
        decoder = vae if tae is None or tae_preview_only else tae
        assert decoder is not None
        self.text_encoder = text_encoder
        self.transformer = transformer
        self.vae = vae
        self.tae = tae
        self.decoder = decoder  # what makes the pictures, one of these two
        self.tokenizer = tokenizer.with_split(sd_cpp_words.split) if compat == "sd.cpp" else tokenizer
        self.compat: Compat = compat
        self._opened = opened  # backends to close with it: what was given stays its giver's
        self.default_size = default_size
        # Both predictions of guidance in one graph; "auto": where weights are read in each step (docs/performance.md).
        self.cfg_batch: bool | Literal["auto"] = "auto"
        self.guided_how: str | None = None  # what was done in the last run, and why
        self.find_bad_op = False  # compute again, operation by operation, when a result is not finite
        # Computes a graph that is set, in place of the pipeline: look(stage, graph), for who looks at each operation.
        self.look: Callable[[str, Graph], object] | None = None
        # The autoencoder's tiles, (height, width) in latent pixels: those to use always, and those for want of memory.
        self.vae_tile: tuple[int, int] | None = None
        self.smaller_vae_tile = tiles.DEFAULT
        self._tiles: dict[str, tuple[int, int]] = {}
        self._stages: dict[str, Stage] = {}
        named = {"text_encoder": text_encoder, "transformer": transformer}
        targets = {
            name: Target(c.module, c.weights, c.checkpoint, c.backend, c.module.naming, c.place.resting, c.options)
            for name, c in named.items()
        }
        self.loras = Loras(targets, lora_apply_mode, self._drop_graphs, lambda role: named[role].rest())
        self._prompts: OrderedDict[tuple[object, ...], Conditioning] = OrderedDict()
        self._key = object()
        self._cancelled = threading.Event()
        self._depth = 0  # of nested calls
        # What is split over devices computes in one piece: its pages are left to the system.
        single = [c for c in self.components() if not isinstance(c.backend, SplitBackend)]
        self.residency = Residency({c.weights.report.component: c.weights for c in single}, limit=memory_limit)

    def components(self) -> tuple[Component, ...]:
        """All networks."""
        decoders = [part for part in (self.vae, self.tae) if part is not None]
        return self.text_encoder, self.transformer, *decoders

    def close(self) -> None:
        """Give back graphs, LoRAs, weights, mappings, and the backends that `load` opened."""
        self.loras.close()
        for component in self.components():
            component.close()
        for backend in self._opened:
            backend.close()

    def __enter__(self: P) -> P:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cancel(self) -> None:
        """Stop the running call within one operation; it raises Cancelled. From any thread."""
        self._cancelled.set()
        for component in self.components():
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
        given: dict[str, Path] = {}  # what a link is called may say what it is
        for path, weight in loras.items() if isinstance(loras, Mapping) else loras:
            name = os.path.realpath(path)
            given.setdefault(name, path)
            weights[name] = check_weight(weights.get(name, 0.0) + check_weight(weight))
        if len(weights) > MAX_LORAS:
            raise ValueError(f"{len(weights)} LoRAs at once; {MAX_LORAS} are the most")
        self.loras.forget_replaced()
        before = list(self.loras.loaded)
        try:
            reports = [self.loras.load(given[name], name) for name in weights]
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

    # -- the three parts ----------------------------------------------------------------------------------------------

    @_cancellable
    def encode(self, prompt: str, pictures: Sequence[Pixels] = ()) -> Conditioning:
        """The conditioning of a prompt, and of the `pictures`, uint8 [H, W, 3], that it speaks of in models that edit;
        the last ones are remembered, so that no prompt is encoded twice.

        ValueError for a prompt that is no text, NonFinite when the encoder's output is not.
        """
        key = self._prompt_key(prompt, pictures)
        if key in self._prompts:
            self._prompts.move_to_end(key)
            return self._prompts[key]
        conditioning = Conditioning(self._features(prompt, pictures))
        self._prompts[key] = conditioning
        while len(self._prompts) > CACHED_PROMPTS:
            self._prompts.popitem(last=False)
        return conditioning

    @_cancellable
    def denoise(
        self, latents: Float32, sigmas: Float32, cond: Conditioning | Float32,
        uncond: Conditioning | Float32 | None = None, *, guidance: Guidance | None = None,
        references: Sequence[Float32] = (), inpainting: Inpainting | None = None, cache: CacheRun | None = None,
        method: str = "euler", eta: float | None = None, rng: RNG | None = None,
        callback: Callable[[int, float, Float32], Float32 | None] | None = None,
        on_estimate: Callable[[int, Float32], object] | None = None,
    ) -> Float32:  # fmt: skip
        """Latents [16, h, w] at noise level sigmas[0] to clean ones. Conditionings may be arrays [n_tokens, dim].
        `cache`: for this picture alone, as `EasyCache().begin(n_steps)` of models.step_cache makes it. on_estimate(i,
        latents) after step i: what the network last took the clean latents to be.

        NonFinite naming the step when latents stop being finite; Cancelled; ValueError for bad sigmas or method, and
        for guidance without `uncond`.
        """
        both = find_sampler(method, eta).both
        guided = guidance is not None or both
        if guided and uncond is None:
            raise ValueError("guidance needs the conditioning of a negative prompt, `uncond`")
        conds = [self._conditioning(c) for c in ((cond, uncond) if guided else (cond,)) if c is not None]
        contexts: list[Float32] = []
        latest: list[Float32] = []
        guide = None if guidance is None else guidance.begin(sigmas)

        def velocity(branch: int, x: Float32, sigma: float) -> Float32:
            compute = partial(self._velocity, x, sigma, contexts[branch], references)
            return compute() if cache is None else cache.evaluate(branch, x, sigma, compute)

        at_once = False

        def estimate(x: Float32, sigma: float) -> Any:
            self._check_cancelled()
            guided = both or (guide is not None and guide.wanted(sigma))
            with self.transformer.in_use():  # a callback may have changed weights
                if guided and at_once:
                    v, second = self._velocities(x, sigma, contexts, references)
                else:
                    v = second = velocity(0, x, sigma)
                    second = velocity(1, x, sigma) if guided else second
            if guided and guide is not None:
                v = guide(v, second, sigma)
            found = [x - np.float32(sigma) * y for y in ((v, second) if both else (v,))]
            if inpainting:
                found = [inpainting.estimate(x0) for x0 in found]
            latest[:] = found[:1]
            return (found[0], found[1]) if both else found[0]

        def after(i: int, sigma: float, x: Float32) -> Float32 | None:
            if not np.isfinite(x).all():
                raise NonFinite(f"step {i + 1} (sigma {sigmas[i]:.4f}): the latents are not finite")
            if cache is not None:
                cache.end_step()
            if on_estimate is not None:
                on_estimate(i, latest[0])
            mixed = inpainting.after_step(x, sigma) if inpainting else x
            changed = callback(i, sigma, mixed) if callback else None
            self._check_cancelled()
            if changed is None:
                return None if mixed is x else mixed
            return as_latents(changed, latents.shape)

        with self.transformer.in_use():
            contexts += [self._context(c) for c in conds]
            at_once = len(contexts) == 2 and self._at_once(latents, contexts, references, cached=cache is not None)
            self._foresee(evaluated(method, sigmas, eta))
            return np.asarray(sample(method, estimate, latents, sigmas, rng=rng, eta=eta, callback=after), np.float32)

    @_cancellable
    def decode(self, latents: Float32) -> Pixels:
        """Latents [16, h, w] to a picture, uint8 [8 h, 8 w, 3]; in tiles when `vae_tile` says so, or memory is short.

        NonFinite when the decoder's output is not finite, or is a picture of one colour.
        """
        result = self._decoded(latents)
        if (result == result[0, 0]).all():
            raise NonFinite(f"the decoder made a picture of one colour, {result[0, 0].tolist()}: nothing was drawn")
        return result

    def _pictures(self, latents: Float32) -> Pixels | list[Pixels]:
        """What a run's latents are: a picture, or the layers of one."""
        return self.decode(latents)

    def _decoded(self, latents: Float32, preview: Mode | None = None) -> Pixels:
        """`preview`: decoded as one of that kind."""
        what, stage = ("preview", "the preview") if preview else ("decode", "the decoder")
        part, latents = self._decoder_for(preview), np.asarray(latents, np.float32)
        with part.in_use() as network:
            run = partial(network.decode, part.backend, latents, partial(self._compute, stage))
            return image.to_bytes(self._tiled(what, run))

    def _decoder_for(self, preview: Mode | None) -> Component:
        """What decodes the pictures, or previews: the tiny autoencoder also finds a projection faster."""
        return self.decoder if preview in (None, "vae") or self.tae is None else self.tae

    @_cancellable
    def encode_image(self, picture: Pixels, rng: RNG | None = None) -> Float32:
        """A picture, uint8 [H, W, 3], to latents [16, H/8, W/8] as the transformer takes them: their mean or, where the
        model's pipelines draw from the posterior and there is an rng, a sample.

        ValueError when the encoder was not loaded.
        """
        return self._drawn(*self._posterior(picture), rng)

    def _posterior(self, picture: Pixels) -> tuple[Float32, Float32]:
        """Mean and standard deviation of a picture's latents, as the autoencoder's encoder makes them."""
        reader, compute, pixels = self._reader(), partial(self._compute, "the encoder"), image.to_float(picture)
        with reader.in_use() as module:
            run = partial(module.encode, reader.backend, pixels, compute)
            mean, deviation = self._tiled("encode_image", run)
        return mean, deviation

    def _reader(self) -> Component:
        """The autoencoder with its encoder; ValueError when there is none."""
        if self.vae is None:
            raise ValueError("there is only a tiny autoencoder, which reads no pictures: load with a vae too (--vae)")
        if self.vae.module.encoder is None:
            raise ValueError("the autoencoder was loaded without its encoder: load with encoder=True for img2img")
        return self.vae

    def _tiled(self, phase: str, run: Callable[..., T]) -> T:
        """run(tile=...) with such tiles as there is room for; remembers them."""
        result, tile = tiles.with_less_memory(phase, lambda t: run(tile=t), self.vae_tile, self.smaller_vae_tile)
        if tile:
            self._tiles[phase] = tile
        return result

    # -- everything at once -------------------------------------------------------------------------------------------

    @_cancellable
    def __call__(
        self, prompt: str, *, negative_prompt: str | None = "", height: int | None = None, width: int | None = None,
        num_inference_steps: int | None = None, cfg_scale: float | None = None, guidance_scale: float | None = None,
        true_cfg_scale: float | None = None, cfg_normalization: float | None = None,
        cfg_truncation: float | None = None, guidance: Guidance | None = None, sigmas: Sequence[float] | None = None,
        scheduler: str | None = None, shift: float | None = None, lightning: int | None = None,
        method: str = "euler", eta: float | None = None, seed: int = 42, num_images_per_prompt: int = 1,
        rng: str | None = None, latents: Float32 | None = None,
        prompt_embeds: Conditioning | Float32 | None = None,
        negative_prompt_embeds: Conditioning | Float32 | None = None, init_image: Path | Image.Image | None = None,
        strength: float | None = None, mask_image: Path | Image.Image | None = None, cache: StepCache | None = None,
        reference_images: Sequence[Path | Image.Image] = (), layers: int | None = None, output_type: str = "pil",
        progress: Progress | None = None, callback_on_step_end: StepCallback | None = None,
        on_image: Callable[[int, int, Any], None] | None = None, on_preview: Show | None = None,
        preview: Mode = "proj", preview_interval: int = 1,
    ) -> Result:  # fmt: skip
        """Draw `num_images_per_prompt` pictures; image i has seed + i.

        height, width: pixels, multiples of 8; a prompt or `prompt_embeds` float32 [n_tokens, dim]; `latents` float32
        [16, height/8, width/8] replace the noise. Guidance: `cfg_scale` is sd-cli's for every model, 1 is off; or
        diffusers' own: `guidance_scale` of Z-Image, 0 is off, with `cfg_normalization` and `cfg_truncation`, and
        `true_cfg_scale` of Qwen-Image, 1 is off; or any `guidance` of models.guidance. Without `negative_prompt`, None
        or "", guidance is away from an empty one, where diffusers' Qwen-Image pipelines use none.

        `sigmas`: the noise levels before the shift, as in diffusers; `scheduler`: a name of models.schedule.
        `lightning`: the model is a Lightning one of so many steps: they, no guidance and the schedule "lightning" are
        then the defaults. Unless given, an active LoRA says it, by its title or its file's name; 0: it is none.
        `strength` (with `init_image`): 1 keeps nothing of it; `mask_image`: white where something new is drawn, the
        rest of `init_image` stays. `reference_images`: the pictures that a model edits, or of which it makes `layers`.
        `cache`: settings of models.step_cache; what it skipped stands in the report.
        output_type: "pil", "np" (uint8 [H, W, 3]) or "latent"; a model of layers gives a list of them for each picture.
        progress(phase, done, total) is called as phases go on; callback_on_step_end(pipe, step, timestep, {"latents":
        ...}) after each step returns a dict whose "latents" replace the live ones; on_image(i, seed, picture) as each
        picture is ready.

        on_preview(i, step, picture): after every `preview_interval` steps, what the step takes the clean picture to be,
        uint8 [h, w, 3]; by a `preview` of "proj", a projection of its colours at an eighth of the size, "tae", the tiny
        autoencoder, or "vae", as the picture is decoded at the end. What is drawn does not change, and the report has
        the seconds.

        Raises ValueError for a bad argument, Cancelled after cancel(), NonFinite instead of a blank picture.
        """
        # 1. what is asked for
        scales = cfg_scale, guidance_scale, true_cfg_scale, cfg_normalization, cfg_truncation
        asked = read_asked(
            self, height=height, width=width, num_inference_steps=num_inference_steps, scales=scales, guidance=guidance,
            sigmas=sigmas, scheduler=scheduler, shift=shift, lightning=lightning, method=method, eta=eta, seed=seed,
            num_images_per_prompt=num_images_per_prompt, rng=rng, latents=latents, init_image=init_image,
            strength=strength, mask_image=mask_image, cache=cache, reference_images=reference_images, layers=layers,
            output_type=output_type, preview=preview, preview_interval=preview_interval,
        )  # fmt: skip
        report, levels, n_steps = self._new_report(asked), asked.levels, len(asked.levels) - 1
        tell, sd_cpp = progress or (lambda phase, done, total: None), self.compat == "sd.cpp"

        # 2. prompts
        with report.phase("text_encoder"), self.text_encoder.kept():
            report.prompt_cached = prompt_embeds is None and self._prompt_key(prompt, asked.pictures) in self._prompts
            tell("text encoder", 0, 1)
            if prompt_embeds is None:
                self._note_prompt(prompt)
            cond = self._conditioning(prompt_embeds, prompt, asked.pictures)
            uncond = None
            if asked.guided:
                uncond = self._conditioning(negative_prompt_embeds, negative_prompt or "", asked.pictures)
            tell("text encoder", 1, 1)

        # 3. the picture to start from, and those that are edited
        posterior, references = None, []
        if asked.start is not None or asked.pictures:
            with report.phase("encode_image"), self._reader().kept():
                posterior = None if asked.start is None else self._posterior(asked.start)
                references = self._references(asked.pictures, asked.width, asked.height)

        def draw(i: int, seed: int) -> Any:
            # 4. noise
            generator = make_rng(asked.rng, seed)
            inpainting = start = None
            if posterior is not None:
                # diffusers goes on with one generator; stable-diffusion.cpp begins it anew for the noise.
                start = self._drawn(*posterior, make_rng(asked.rng, asked.seeds[0]) if sd_cpp else generator)
            x = generator.randn(asked.shape) if asked.noise is None else asked.noise
            if start is not None:
                if asked.mask is not None:
                    inpainting = Inpainting(asked.mask, start, x, self.compat)
                x = schedule.add_noise(start, x, float(levels[0]))

            # 5. denoise
            view = View(partial(self._decoded, preview=preview), preview)
            last = time.perf_counter()

            def look(step: int, x0: Float32) -> None:
                nonlocal last
                if on_preview is not None and (step + 1) % preview_interval == 0:
                    begin = time.perf_counter()
                    with self._decoder_for(preview).kept():
                        on_preview(i, step, view(x0))
                    report.previewed(time.perf_counter() - begin)
                    last += report.preview_seconds[-1]  # no part of a step

            def after(step: int, sigma: float, x: Float32) -> Float32 | None:
                nonlocal last
                tell("step", step + 1, n_steps)
                now = time.perf_counter()
                report.step_seconds.append(now - last)
                last = now
                if callback_on_step_end is None:
                    return None
                return _changed(callback_on_step_end(self, step, 1000 * float(levels[step]), {"latents": x}), x)

            remembered = None if cache is None else cache.begin(n_steps)
            tell("step", 0, n_steps)
            with report.phase("denoise"):
                x = self.denoise(
                    x, levels, cond, uncond, guidance=asked.guidance, references=references, inpainting=inpainting,
                    cache=remembered, method=method, eta=eta, rng=generator, callback=after,
                    on_estimate=look if on_preview else None,
                )  # fmt: skip
            report.cfg_batch = self.guided_how if asked.guided else None
            if remembered is not None:
                report.count(remembered.counts)
                log.info("%s", "step cache: {steps_skipped} of {steps} steps skipped, {evaluations_skipped} of "
                         "{evaluations} evaluations".format(**remembered.counts))  # fmt: skip
                remembered = None  # memory for the decoder

            # 6. decode
            if output_type == "latent":
                return x
            tell("decode", 0, 1)
            with report.phase("decode"):
                made: Any = self._pictures(x)
            tell("decode", 1, 1)
            self._check_unchanged()
            if on_image:
                on_image(i, seed, made)
            if output_type == "np":
                return made
            return [image.to_pil(layer) for layer in made] if isinstance(made, list) else image.to_pil(made)

        images = [draw(i, seed) for i, seed in enumerate(asked.seeds)]
        report.tiles = self._tiles
        self._check_unchanged()
        report.vram = {c.weights.report.component: c.vram for c in self.components() if c.vram}
        report.components = {c.weights.report.component: c.weights.report for c in self.components()}
        return Result(images, asked.seeds, report)

    def size(
        self, width: int | None = None, height: int | None = None, reference_images: Sequence[Path | Image.Image] = ()
    ) -> tuple[int, int]:
        """Width and height of what a call with these arguments draws. ValueError as the call."""
        return self._target(width, height, reference_images)[1:]

    def phases(
        self, prompt: str, *, negative_prompt: str | None = "", height: int | None = None, width: int | None = None,
        cfg_scale: float | None = None, method: str = "euler", num_images_per_prompt: int = 1,
        encode_image: bool = False, reference_images: Sequence[Path | Image.Image] = (), layers: int | None = None,
        preview: Mode | None = None, cache: StepCache | None = None, num_inference_steps: int | None = None,
    ) -> list[Phase]:  # fmt: skip
        """The graphs that a call with these arguments computes, in order, measured; for models.prediction.predict.
        `preview`: None for none.
        """
        pictures, width, height = self._target(width, height, reference_images, layers, encode_image)
        guided = self._guidance(cfg_scale) is not None or find_sampler(method).both
        spans = all_spans([component.weights for component in self.components()])
        dit, shape = self.transformer, self._latent_shape(width, height, layers)

        texts = [prompt, negative_prompt or ""] if guided else [prompt]
        before, lengths = self._prompt_phases(texts, pictures, spans)
        sizes = self._reference_sizes(pictures, width, height)
        references = [latent_size(*size) for size in sizes]
        for size in [*sizes, *([(width, height)] if encode_image else [])]:
            before.append(encoder_phase(self._reader(), *size, self.vae_tile, spans))
        contexts = []
        for n in lengths:
            graph = dit.module.context_graph(dit.backend, n)
            contexts.append(graph.outputs["context"].ne[1])
            before.append(Phase.of(self.refiner, graph, spans))
        n_steps = self.default_steps if num_inference_steps is None else num_inference_steps
        n_levels = len(set(evaluated(method, np.linspace(1, 0, n_steps + 1, dtype=np.float32))))
        at_levels = self._levels_phase(n_levels, spans)

        picture = step_phases(
            dit, lambda n: self._step_sizes(shape, n, references), contexts, spans, cache=cache,
            at_once=self.cfg_batch is True, extra=at_levels[0].extra if at_levels else 0,
        )  # fmt: skip
        if at_levels:
            before.append(at_levels[0])
            if at_levels[1]:
                picture += [at_levels[0], *once_more(picture)]
        size = shape[-2], shape[-1]
        if preview:
            small = (SIDE, SIDE) if preview == "proj" else size
            picture.append(decoder_phase("preview", self._decoder_for(preview), small, self.vae_tile, spans))
        picture.append(decoder_phase("decoder", self.decoder, size, self.vae_tile, spans))
        # What stays is there from the first picture on.
        return before + picture + (once_more(picture) if num_images_per_prompt > 1 else [])

    # -- inside -------------------------------------------------------------------------------------------------------

    def _new_report(self, asked: Asked) -> Report:
        """Begin a run: nothing is left of the one before."""
        self._check_unchanged()
        self._tiles, self._stages = {}, {}
        self.residency.begin()
        for component in self.components():
            component.vram = None
        if asked.lightning:
            log.info("%s", asked.lightning)
        return Report(
            residency=self.residency.report, stages=self._stages, loras=self.loras.report(), lightning=asked.lightning
        )

    def _prompt_key(self, prompt: str, pictures: Sequence[Pixels]) -> tuple[object, ...]:
        return self.compat, prompt, self.loras.state("text_encoder"), tuple(map(image.fingerprint, pictures))

    def _at_once(
        self, x: Float32, contexts: Sequence[Float32], references: Sequence[Float32], *, cached: bool
    ) -> bool:
        """Whether both predictions of guidance are computed in one graph, as `cfg_batch` says; `guided_how` is why."""
        why = None
        if self.cfg_batch is False:
            why = "as asked"
        elif cached:
            why = "a step cache decides for each"
        elif self.cfg_batch == "auto" and not self._reads_again(x, contexts, references):
            why = "the weights stay in memory"
        else:
            try:
                both = self._graph_for(x, contexts, references)
                if stream := self._stream(both):
                    stream.prepare(both)
                both.alloc()
            except OutOfMemory as error:
                self.transformer.close_graphs()
                why = f"no memory for both at once ({error})"
                log.warning("guidance: %s", why)
        asked = "as asked" if self.cfg_batch is True else "the weights are read in each step"
        self.guided_how = f"both in one graph: {asked}" if why is None else f"one after the other: {why}"
        return why is None

    def _reads_again(self, x: Float32, contexts: Sequence[Float32], references: Sequence[Float32]) -> bool:
        """Whether weights are read for each prediction: from the disk, or from the host into a smaller device."""
        found = False
        for context in contexts:  # each of them: a device has to hold what all of them compute with
            graph = self._graph_for(x, [context], references)
            stream = self._stream(graph)
            found |= self.residency.reads_again(graph) if stream is None else stream.comes_again(graph)
        if found:
            self.transformer.close_graphs()  # room for the larger one
        return found

    def _conditioning(
        self, values: Conditioning | Float32 | None, prompt: str = "", pictures: Sequence[Pixels] = ()
    ) -> Conditioning:
        """What is given as one or, where nothing is, that of a prompt."""
        if values is None:
            return self.encode(prompt, pictures)
        if isinstance(values, Conditioning):
            return values
        array, dim = np.asarray(values, np.float32), self.transformer.module.config.text_dim
        if array.ndim != 2 or array.shape[1] != dim or not len(array):
            raise ValueError(f"prompt embeddings have shape [n_tokens, {dim}], not {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError("prompt embeddings hold values that are not finite")
        return Conditioning(array)

    def _context(self, cond: Conditioning) -> Float32:
        """The refined conditioning, once for each."""
        state = self.loras.state("transformer")
        if cond._refined.get(self._key, (None,))[0] != state:
            cond._refined[self._key] = state, self._refined(cond.features)
        return cond._refined[self._key][1]

    def _velocity(
        self, x: Float32, sigma: float, context: Float32, references: Sequence[Float32] = (),
        blocks: Blocks | None = None,
    ) -> Float32:  # fmt: skip
        return self._velocities(x, sigma, [context], references, blocks)[0]

    def _graph_for(self, x: Float32, contexts: Sequence[Float32], references: Sequence[Float32]) -> Graph:
        """The graph of a step with these contexts."""
        dit = self.transformer  # keeps two graphs: prompt and negative prompt
        sizes = self._step_sizes(x.shape, tuple(map(len, contexts)), [latents.shape for latents in references])
        return dit.graph(sizes, partial(dit.module.step_graph, dit.backend, *sizes))

    def _step(
        self, x: Float32, sigma: float, contexts: Sequence[Float32], references: Sequence[Float32],
        blocks: Blocks | None, inputs: Mapping[str, Any],
    ) -> Float32:  # fmt: skip
        """The output of a step, for `_velocities`; `inputs` are of all parts together."""
        stage = f"the transformer at sigma {sigma:.4f}"
        if blocks is None:
            return np.asarray(self._compute(stage, self._graph_for(x, contexts, references), **inputs)["out"])
        dit = self.transformer
        sizes = self._step_sizes(x.shape, len(contexts[0]), [latents.shape for latents in references])
        cuts = blocks.settings.cuts(dit.module.config.n_layers)
        known = dict(inputs)

        def run(cut: Cut) -> dict[str, Any]:
            build = partial(dit.module.part_graph, dit.backend, *sizes, cut)
            part = dit.graph((*sizes, cut), build, n_kept=6)  # three parts, for prompt and negative prompt
            return self._compute(stage, part, **{name: known[name] for name in part.inputs})

        front, middle, back = cuts
        state = run(front)
        change = state.pop("change")
        known |= state
        added = blocks.added(change, sigma)
        if added is None:
            after = run(middle)
            blocks.learn(change, {name: value - known[name] for name, value in after.items()}, sigma)
            known |= after
        else:
            known |= {name: known[name] + value for name, value in added.items()}
        return np.asarray(run(back)["out"])

    def _compute(self, stage: str, graph: Graph, **inputs: Any) -> dict[str, Any]:
        """Graph.compute; Cancelled when asked to stop, NonFinite naming the stage when a result is not finite."""
        stream = self._stream(graph)
        if stream is not None:
            stream.prepare(graph)
        graph.set(**inputs)
        self._check_cancelled()  # right before the backend, which from here on is stopped within one operation
        kind = stage.partition(" at ")[0]
        with self._stages.setdefault(kind, Stage()).one():
            if stream is not None and self.look is not None:
                raise ValueError(f"{stage}: weights come piece by piece, so no operation can be looked at by itself")
            if stream is not None:
                stream.run(graph)
            elif self.look is not None:
                self.look(stage, graph)
            else:
                self.residency.run(graph, kind)
        self._check_cancelled()
        outputs = {name: tensor.numpy() for name, tensor in graph.outputs.items()}
        for array in outputs.values():
            if n_bad := array.size - int(np.isfinite(array).sum()):
                self._check_unchanged()
                bad = f"; the first bad operation is {first_bad_op(graph)}" if self.find_bad_op and not stream else ""
                if self.find_bad_op and stream:
                    bad = "; the first bad operation cannot be looked for where weights come piece by piece"
                raise NonFinite(f"{stage}: {n_bad} of {array.size} values are not finite{bad}")
        return outputs

    def _stream(self, graph: Graph) -> Stream | None:
        """What the weights of a graph come by, if they come piece by piece."""
        return next(filter(None, (component.stream(graph) for component in self.components())), None)

    def _drop_graphs(self) -> None:
        for component in self.components():
            component.close_graphs()

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled("the run was cancelled")

    def _check_unchanged(self) -> None:
        for component in self.components():
            if changed := (component.checkpoint if component.weights.closed else component.weights).changed():
                raise LoadError(f"a file of weights changed while it was used: {changed}", kind="WeightsChanged")
        if changed := self.loras.file_changed():
            raise LoadError(f"a LoRA changed while it was used: {changed}", kind="WeightsChanged")


def _changed(found: Any, x: Float32) -> Float32 | None:
    """The latents that a callback returned, None when they are still `x`; ValueError for anything else."""
    if not isinstance(found, Mapping) or set(found) - {"latents"}:
        raise ValueError(f"callback_on_step_end must return a dict, of latents or empty: {found!r:.80}")
    live = found.get("latents")
    return None if live is x else live
