"""Classifier-free guidance in two dialects: sd-cli's `cfg` (1 = off) and diffusers' guidance scale (0 = off).

The two mean the same with cfg = guidance_scale + 1. The functions do not care for a common sign or offset, so they may
be given velocities, the raw network outputs (their negatives) or denoised estimates at the same x; only what looks at
the length or direction of a prediction (normalization, Qwen-Image's guidance, APG, CFG-Zero*) wants velocities or raw
outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


class Guidance(Protocol):
    """How the predictions with the prompt and with the negative prompt become one, velocities [..., C, H, W] all.

    It may be used for many pictures, one after the other or at once: what is to be remembered from one step to the next
    belongs to what `begin` returns.
    """

    def begin(self, sigmas: Float32) -> Guidance:
        """What guides one picture that is drawn at these noise levels; itself, where nothing is remembered."""
        return self

    def wanted(self, sigma: float) -> bool:
        """Whether the second prediction makes a difference at this noise level."""

    def __call__(self, cond: Float32, uncond: Float32, sigma: float) -> Float32:
        """The prediction to go on with."""


@dataclass(frozen=True)
class ZImageGuidance(Guidance):
    """`z_image_guidance` with a scale (0 is off) that `guidance_at` switches off on the way. A negative scale, which
    only stable-diffusion.cpp's dialect has, stays.
    """

    scale: float
    normalization: float = 0.0
    truncation: float = 1.0

    def _scale(self, sigma: float) -> float:
        return guidance_at(sigma, self.scale, cfg_truncation=self.truncation) if self.scale > 0 else self.scale

    def wanted(self, sigma: float) -> bool:
        return self._scale(sigma) != 0

    def __call__(self, cond: Float32, uncond: Float32, sigma: float) -> Float32:
        return z_image_guidance(cond, uncond, self._scale(sigma), cfg_normalization=self.normalization)


@dataclass(frozen=True)
class QwenImageGuidance(Guidance):
    """`qwen_image_guidance` with a scale (1 is off), or plain `cfg` where `rescale` is off."""

    scale: float
    rescale: bool = True

    def wanted(self, sigma: float) -> bool:
        return self.scale != 1

    def __call__(self, cond: Float32, uncond: Float32, sigma: float) -> Float32:
        return (qwen_image_guidance if self.rescale else cfg)(cond, uncond, self.scale)


@dataclass
class APG(Guidance):
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416), on the network's prediction, as in diffusers.

    scale: as `cfg`'s, 1 is off. The difference of the two predictions takes `momentum` times the one before along, once
    for each evaluation; it is shortened to `norm_threshold` where it is longer (0: never); and of its part
    along the prediction with the prompt, which saturates colours, a share of `eta` stays. eta 1, no momentum and no
    threshold give `cfg`. `smoothing` above 0 shortens gradually. `per_value`: stable-diffusion.cpp's length, which does
    not grow with the picture: 256 times the root of the mean square.
    """

    scale: float
    eta: float = 0.0
    momentum: float = -0.5
    norm_threshold: float = 0.0
    smoothing: float = 0.0
    per_value: bool = False
    _average: Float32 | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        numbers = (self.scale, self.eta, self.momentum, self.norm_threshold, self.smoothing)
        if not all(math.isfinite(x) for x in numbers) or self.norm_threshold < 0 or self.smoothing < 0:
            raise ValueError(f"APG wants finite numbers, threshold and smoothing not below 0: {self}")

    def begin(self, sigmas: Float32) -> APG:
        return replace(self)

    def wanted(self, sigma: float) -> bool:
        return self.scale != 1

    def __call__(self, cond: Float32, uncond: Float32, sigma: float) -> Float32:
        delta = (cond - uncond).astype(np.float64)
        if self.momentum:
            if self._average is not None:
                delta += self.momentum * self._average
            self._average = delta.astype(np.float32)
        direction = cond.astype(np.float64)
        length, squared = math.sqrt(np.vdot(delta, delta)), float(np.vdot(direction, direction))
        if self.per_value:
            length *= 256 / math.sqrt(delta.size)
        if self.norm_threshold and length:
            delta *= _shortened(self.norm_threshold / length, self.smoothing)
        if squared:
            delta += (self.eta - 1) * (np.vdot(direction, delta) / squared) * direction
        return np.asarray(direction + (self.scale - 1) * delta, np.float32)


@dataclass(frozen=True)
class CFGZero(Guidance):
    """CFG-Zero* (Fan et al. 2025, arXiv 2503.18886): `cfg`, with the prediction without the prompt scaled to lie as
    near as it can to the one with it, and no movement at all in the first `zero_steps` steps (never in the last).

    scale: as `cfg`'s, 1 is off.
    """

    scale: float
    zero_steps: int = 1
    _until: float = field(default=math.inf, init=False, repr=False, compare=False)  # above it, nothing moves

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.zero_steps < 0:
            raise ValueError(f"CFG-Zero* wants a finite scale and zero_steps not below 0: {self}")

    def begin(self, sigmas: Float32) -> CFGZero:
        run = replace(self)
        object.__setattr__(run, "_until", float(sigmas[min(self.zero_steps, len(sigmas) - 2)]))
        return run

    def wanted(self, sigma: float) -> bool:
        return self.scale != 1

    def __call__(self, cond: Float32, uncond: Float32, sigma: float) -> Float32:
        if sigma > self._until:
            return np.zeros_like(cond)
        a, b = cond.astype(np.float64), uncond.astype(np.float64)
        squared = float(np.vdot(b, b))
        best = b * (np.vdot(a, b) / squared) if squared else b
        return np.asarray(best + self.scale * (a - best), np.float32)


def _shortened(ratio: float, smoothing: float) -> float:
    """What a length is multiplied by that is to be `ratio` times as long at most; never more than 1."""
    if not smoothing:
        return min(1.0, ratio)
    log = math.log(ratio) / smoothing  # ratio / (1 + ratio^(1 / smoothing))^smoothing, without overflow
    return math.exp(smoothing * (log - np.logaddexp(0.0, log)))


def cfg(cond: Float32, uncond: Float32, scale: float) -> Float32:
    """uncond + scale * (cond - uncond): `--cfg-scale` of sd-cli. 1 gives cond, and uncond need not be computed."""
    guided: Float32 = uncond + np.float32(scale) * (cond - uncond)
    return guided


def z_image_guidance(
    cond: Float32, uncond: Float32, guidance_scale: float, *, cfg_normalization: float = 0.0
) -> Float32:
    """cond + guidance_scale * (cond - uncond): what diffusers' Z-Image pipeline calls guidance.

    cfg_normalization: above 0, the result is shortened to that multiple of cond's length where it is longer; length is
    the Euclidean norm of a whole picture, so the arrays must hold one picture each: [16, H, W].
    """
    prediction: Float32 = cond + np.float32(guidance_scale) * (cond - uncond)
    if cfg_normalization > 0:
        longest = np.linalg.norm(cond) * np.float32(cfg_normalization)
        length = np.linalg.norm(prediction)
        if length > longest:
            prediction = prediction * np.float32(longest / length)
    return prediction


def qwen_image_guidance(cond: Float32, uncond: Float32, scale: float) -> Float32:
    """`cfg`, then each patch's result scaled to the length of its cond: diffusers' true_cfg_scale for Qwen-Image.

    cond, uncond: velocities [..., C, H, W]; a patch is the C x 2 x 2 values that are one token of the transformer, cut
    where H or W is odd. scale 1 gives cond.
    """
    guided = cfg(cond, uncond, scale)
    wanted, length = _patch_lengths(cond), _patch_lengths(guided)
    ratio = np.divide(wanted, length, out=np.zeros_like(length), where=length > 0)
    h, w = cond.shape[-2:]
    return np.asarray(guided * ratio.repeat(2, -2).repeat(2, -1)[..., None, :h, :w], np.float32)


def _patch_lengths(x: Float32) -> Float32:
    """The Euclidean norm of each patch: [..., C, H, W] to [..., H/2, W/2], rounded up."""
    squares = np.square(x).sum(-3)
    *batch, h, w = squares.shape
    squares = np.pad(squares, [(0, 0)] * len(batch) + [(0, h % 2), (0, w % 2)])
    blocks = squares.reshape(*batch, (h + 1) // 2, 2, (w + 1) // 2, 2)
    return np.asarray(np.sqrt(blocks.sum((-3, -1))), np.float32)


def guidance_at(sigma: float, guidance_scale: float, *, cfg_truncation: float = 1.0) -> float:
    """The guidance scale at noise level sigma: 0 once the time 1 - sigma has passed cfg_truncation, as in diffusers."""
    timestep = np.float32(sigma) * np.float32(1000)
    time = (np.float32(1000) - timestep) / np.float32(1000)
    return 0.0 if cfg_truncation <= 1 and float(time) > cfg_truncation else max(guidance_scale, 0.0)
