"""Classifier-free guidance in two dialects: sd-cli's `cfg` (1 = off) and diffusers' guidance scale (0 = off).

The two mean the same with cfg = guidance_scale + 1. The functions do not care for a common sign or offset, so they may
be given velocities, the raw network outputs (their negatives) or denoised estimates at the same x; only normalization,
which looks at the length of the prediction, and Qwen-Image's guidance, want velocities or raw outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


class Guidance(Protocol):
    """How the predictions with the prompt and with the negative prompt become one, velocities [..., C, H, W] all."""

    def wanted(self, sigma: float) -> bool:
        """Whether the second prediction makes a difference at this noise level."""

    def __call__(self, cond: Float32, uncond: Float32, sigma: float) -> Float32:
        """The prediction to go on with."""


@dataclass(frozen=True)
class ZImageGuidance:
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
class QwenImageGuidance:
    """`qwen_image_guidance` with a scale (1 is off), or plain `cfg` where `rescale` is off."""

    scale: float
    rescale: bool = True

    def wanted(self, sigma: float) -> bool:
        return self.scale != 1

    def __call__(self, cond: Float32, uncond: Float32, sigma: float) -> Float32:
        return (qwen_image_guidance if self.rescale else cfg)(cond, uncond, self.scale)


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
