"""models.guidance: the two dialects of classifier-free guidance."""

from __future__ import annotations

import numpy as np
import pytest

from models.guidance import cfg, guidance_at, qwen_image_guidance, z_image_guidance
from models.qwen_image.transformer import patchify, unpatchify

rng = np.random.default_rng(0)
COND, UNCOND = rng.standard_normal((2, 16, 4, 6)).astype(np.float32)


def test_cfg_one_is_off_and_zero_is_the_negative_prompt() -> None:
    np.testing.assert_allclose(cfg(COND, UNCOND, 1.0), COND, atol=1e-6)
    np.testing.assert_array_equal(cfg(COND, UNCOND, 0.0), UNCOND)
    assert cfg(COND, UNCOND, 3.0).dtype == np.float32


def test_by_hand() -> None:
    a, b = np.array([3.0], np.float32), np.array([1.0], np.float32)
    assert cfg(a, b, 5.0) == 11
    assert z_image_guidance(a, b, 5.0) == 13


@pytest.mark.parametrize("g", [0.5, 1.0, 4.0])
def test_guidance_scale_is_cfg_minus_one(g: float) -> None:
    np.testing.assert_allclose(z_image_guidance(COND, UNCOND, g), cfg(COND, UNCOND, g + 1), atol=1e-5)
    # and does not care for the sign convention of the network
    np.testing.assert_allclose(-z_image_guidance(-COND, -UNCOND, g), z_image_guidance(COND, UNCOND, g), atol=1e-6)


def test_normalization_shortens_and_never_lengthens() -> None:
    free = z_image_guidance(COND, UNCOND, 4.0)
    held = z_image_guidance(COND, UNCOND, 4.0, cfg_normalization=1.0)
    assert np.linalg.norm(held) == pytest.approx(np.linalg.norm(COND), rel=1e-5)
    np.testing.assert_allclose(held / np.linalg.norm(held), free / np.linalg.norm(free), atol=1e-6)
    np.testing.assert_array_equal(z_image_guidance(COND, UNCOND, 4.0, cfg_normalization=100.0), free)
    assert held.dtype == np.float32


def test_qwen_image_keeps_each_patchs_length() -> None:
    """diffusers' formula on the tokens of the transformer, [n, 64]."""
    pos, neg = patchify(COND), patchify(UNCOND)
    guided = neg + np.float32(4) * (pos - neg)
    norm = np.linalg.norm
    packed = guided * (norm(pos, axis=1, keepdims=True) / norm(guided, axis=1, keepdims=True))
    ours = qwen_image_guidance(COND, UNCOND, 4.0)
    np.testing.assert_allclose(ours, unpatchify(packed, 4, 6), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(qwen_image_guidance(COND, UNCOND, 1.0), COND, rtol=1e-5, atol=1e-6)
    both = np.stack([COND, -COND]), np.stack([UNCOND, -UNCOND])
    np.testing.assert_array_equal(qwen_image_guidance(*both, 4.0), np.stack([ours, -ours]))


def test_qwen_image_with_odd_sides_and_nothing_to_scale() -> None:
    odd = qwen_image_guidance(COND[:, :3, :5], UNCOND[:, :3, :5], 4.0)
    whole = qwen_image_guidance(COND, UNCOND, 4.0)
    np.testing.assert_array_equal(odd[:, :2, :4], whole[:, :2, :4])
    assert np.linalg.norm(odd[:, 2, 4]) == pytest.approx(np.linalg.norm(COND[:, 2, 4]), rel=1e-5)
    zeros = np.zeros_like(COND)
    assert not qwen_image_guidance(zeros, zeros, 4.0).any()


def test_truncation() -> None:
    assert guidance_at(0.7, 4.0) == 4.0
    assert guidance_at(0.0, 4.0) == 4.0  # the default, 1, never truncates
    assert guidance_at(0.7, 4.0, cfg_truncation=0.2) == 0.0
    assert guidance_at(0.75, 4.0, cfg_truncation=0.25) == 4.0  # only beyond, as in diffusers
    assert guidance_at(0.1, 4.0, cfg_truncation=2.0) == 4.0
    assert guidance_at(0.5, -1.0) == 0.0
