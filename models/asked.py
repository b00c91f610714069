"""What a run is asked for: the arguments of a pipeline's call, read and checked before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import image, schedule
from .family import Float32, Path, Pixels
from .guidance import Guidance
from .inpainting import latent_mask
from .preview import check_preview
from .rng import make_rng
from .sampler import find_sampler
from .sizes import SIZE_MULTIPLE
from .step_cache import StepCache

if TYPE_CHECKING:
    from PIL import Image

    from .pipeline import Pipeline

SD_CPP_STRENGTH = 0.75  # of img2img and inpainting, when none is given


@dataclass(frozen=True)
class Asked:
    """A run, as `Pipeline.__call__` was asked for it. A picture is a uint8 array [height, width, channels]."""

    shape: tuple[int, ...]  # of the latents
    seeds: list[int]  # of each picture
    rng: str
    levels: Float32  # of the noise: the first step begins at the first, the last one ends at the last
    guidance: Guidance | None
    guided: bool  # with a second prediction, by a negative prompt: for guidance, or because the sampler wants it
    lightning: str | None  # what was chosen for a Lightning model, and how it is known to be one
    noise: Float32 | None  # in place of what the generator draws
    start: Pixels | None  # the picture to start from
    mask: Float32 | None  # of the latents of `start`, as Inpainting has it
    width: int  # of what is drawn
    height: int
    pictures: list[Pixels]  # that are edited


def read_asked(
    pipe: Pipeline, *, height: int | None, width: int | None, num_inference_steps: int | None,
    scales: Sequence[float | None], guidance: Guidance | None, sigmas: Sequence[float] | None, scheduler: str | None,
    shift: float | None, lightning: int | None, method: str, eta: float | None, seed: int, num_images_per_prompt: int,
    rng: str | None, latents: Float32 | None, init_image: Path | Image.Image | None, strength: float | None,
    mask_image: Path | Image.Image | None, cache: StepCache | None, reference_images: Sequence[Path | Image.Image],
    layers: int | None, output_type: str, preview: str, preview_interval: int,
) -> Asked:  # fmt: skip
    """Arguments as those of `Pipeline.__call__`; scales: the numbers of the usual guidance, in the order in which
    `Pipeline._guidance` takes them. ValueError for what cannot be; LoadError for a picture that cannot be read.
    """
    pictures, width, height = pipe._target(width, height, reference_images, layers, init_image is not None)
    shape = pipe._latent_shape(width, height, layers)
    if not 1 <= num_images_per_prompt <= 1000:
        raise ValueError(f"num_images_per_prompt must be in 1..1000, not {num_images_per_prompt}")
    if output_type not in ("pil", "np", "latent"):
        raise ValueError(f"output_type is 'pil', 'np' or 'latent', not {output_type!r}")
    check_preview(preview, preview_interval, pipe.tae is not None)
    if cache is not None:
        cache.check(pipe.transformer.module.config.n_layers)
    rng = rng or ("cuda" if pipe.compat == "sd.cpp" else "cpu")
    seeds = [seed + i for i in range(num_images_per_prompt)]
    for used in (seeds[0], seeds[-1]):
        make_rng(rng, used)  # refuses what it must

    steps = pipe.default_steps if num_inference_steps is None else num_inference_steps
    few = _lightning(pipe, lightning)
    if few:
        steps = few[0] if num_inference_steps is None else num_inference_steps
        scheduler, shift = scheduler or "lightning", pipe.default_shift if shift is None else shift
        if guidance is None and all(x is None for x in scales[:3]):
            scales = (1.0, *scales[1:])
    if guidance is None:
        guidance = pipe._guidance(*scales)
    elif any(x is not None for x in scales):
        raise ValueError("guidance is given, and numbers for the usual one as well: give one of them")
    guided = guidance is not None or find_sampler(method, eta).both
    levels = pipe._sigmas(steps, sigmas, scheduler, shift, method, width, height)

    start = mask = None
    if init_image is not None:
        if strength is None:
            usual = pipe.default_strength[mask_image is not None]
            strength = SD_CPP_STRENGTH if pipe.compat == "sd.cpp" else usual
        levels = schedule.after_strength(levels, strength, compat="sd.cpp" if pipe.compat == "sd.cpp" else None)
        start = image.read_image(init_image, width, height)
    if mask_image is not None:
        if start is None:
            raise ValueError("mask_image needs init_image, the picture of which a part is drawn anew")
        mask = latent_mask(image.read_mask(mask_image, width, height), SIZE_MULTIPLE, pipe.compat)
    if start is not None or pictures:
        pipe._reader()

    said = None
    if few:
        chosen = f"{len(levels) - 1} steps, guidance {'off' if guidance is None else 'on'}"
        how = f"schedule {scheduler}" if sigmas is None else "sigmas as given"
        said = f"Lightning, {few[1]}: {chosen}, {how}"
    return Asked(
        shape, seeds, rng, levels, guidance, guided, said, None if latents is None else as_latents(latents, shape),
        start, mask, width, height, pictures,
    )  # fmt: skip


def as_latents(values: Float32, shape: tuple[int, ...]) -> Float32:
    """Latents that are given as a float32 array; ValueError unless they have that shape."""
    array = np.asarray(values, np.float32)
    if array.shape != shape:
        raise ValueError(f"latents for this size have shape {shape}, not {array.shape}")
    return array


def _lightning(pipe: Pipeline, steps: int | None) -> tuple[int, str] | None:
    """The steps of a Lightning model and how that is known, for the call's argument; None when it is none."""
    if steps and not pipe.has_lightning:
        raise ValueError("there are no Lightning models of this family")
    if steps is not None and not 0 <= steps <= 100:
        raise ValueError(f"lightning is a number of steps in 1..100, or 0 for off, not {steps}")
    if steps is not None:
        return (steps, "as asked") if steps else None
    found = pipe.loras.lightning() if pipe.has_lightning and pipe.compat != "sd.cpp" else None
    return (found[1], f"by {os.path.basename(found[0])}") if found else None
