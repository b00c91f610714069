"""models.guidance: the two dialects of classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from models.guidance import APG, CFGZero, cfg, guidance_at, qwen_image_guidance, z_image_guidance
from models.qwen_image.transformer import patchify, unpatchify

Float64 = NDArray[np.float64]
SIGMAS = np.array([1.0, 0.75, 0.5, 0.25, 0.0], np.float32)
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


# -- APG and CFG-Zero*: the papers' formulas in double precision ----------------------------------------------------


def apg_by_the_paper(
    conds: list[Float64], unconds: list[Float64], w: float, eta: float, beta: float, r: float
) -> list[Float64]:  # fmt: skip
    """Algorithm 1 of arXiv 2410.02416: a running difference, its length at most r, its parallel part times eta."""
    average, found = 0.0, []
    for cond, uncond in zip(conds, unconds, strict=True):
        average = average * beta + (cond - uncond)
        delta = average * min(1, r / np.linalg.norm(average)) if r > 0 else average
        unit = cond / np.linalg.norm(cond)
        parallel = (delta * unit).sum() * unit
        found.append(cond + (w - 1) * ((delta - parallel) + eta * parallel))
    return found


@pytest.mark.parametrize(("eta", "momentum", "threshold"), [(0, -0.5, 0), (0.3, -0.75, 5), (1, 0, 2.5), (0, 0, 1e9)])
def test_apg_is_the_papers_algorithm(eta: float, momentum: float, threshold: float) -> None:
    conds, unconds = rng.standard_normal((2, 4, 16, 4, 6)).astype(np.float32)
    guidance = APG(4.0, eta=eta, momentum=momentum, norm_threshold=threshold)
    expected = apg_by_the_paper([*conds.astype(float)], [*unconds.astype(float)], 4.0, eta, momentum, threshold)
    for _ in range(2):  # what is remembered is the picture's, not the object's
        run = guidance.begin(np.array([1.0, 0.5, 0.0], np.float32))
        for cond, uncond, wanted in zip(conds, unconds, expected, strict=True):
            guided = run(cond, uncond, 0.5)
            assert guided.dtype == np.float32
            np.testing.assert_allclose(guided, wanted, rtol=1e-5, atol=1e-5)


def test_apg_without_its_three_parts_is_cfg() -> None:
    plain = APG(5.0, eta=1.0, momentum=0.0)
    np.testing.assert_allclose(plain.begin(SIGMAS)(COND, UNCOND, 0.5), cfg(COND, UNCOND, 5.0), rtol=1e-5, atol=1e-5)
    assert not APG(1.0).wanted(0.5) and APG(2.0).wanted(0.5)
    zeros = np.zeros_like(COND)
    np.testing.assert_array_equal(APG(3.0).begin(SIGMAS)(zeros, zeros, 0.5), zeros)


def test_apg_in_stable_diffusion_cpps_measure() -> None:
    """Its length is 256 times the root mean square; smoothing s of a ratio x is x / (1 + x^(1/s))^s."""
    delta = COND - UNCOND
    length = 256 * np.sqrt(np.square(delta).mean())
    for smoothing in (0.0, 0.5, 1.0, 1e-3):
        x = 40 / length
        wanted = min(1, x) if smoothing < 0.1 else x / (1 + x ** (1 / smoothing)) ** smoothing
        guidance = APG(4.0, eta=1.0, momentum=0.0, norm_threshold=40, smoothing=smoothing, per_value=True)
        np.testing.assert_allclose(guidance(COND, UNCOND, 0.5), COND + 3 * wanted * delta, rtol=1e-4, atol=1e-4)


def test_cfg_zero_star() -> None:
    """s* = <cond, uncond> / |uncond|^2 makes |cond - s* uncond| smallest; the first steps stand still."""
    c, u = COND.astype(float), UNCOND.astype(float)
    s = (c * u).sum() / (u * u).sum()
    assert all(np.linalg.norm(c - s * u) < np.linalg.norm(c - (s + d) * u) for d in (-0.01, 0.01))
    guidance = CFGZero(4.0)
    run = guidance.begin(SIGMAS)
    assert not run(COND, UNCOND, float(SIGMAS[0])).any()
    assert not run(COND, UNCOND, 0.9).any()  # a second evaluation in the first step
    for sigma in map(float, SIGMAS[1:-1]):
        np.testing.assert_allclose(run(COND, UNCOND, sigma), s * u + 4 * (c - s * u), rtol=1e-5, atol=1e-5)
    assert CFGZero(4.0, zero_steps=0).begin(SIGMAS)(COND, UNCOND, 1.0).any()
    assert CFGZero(4.0, zero_steps=9).begin(SIGMAS)(COND, UNCOND, float(SIGMAS[-2])).any()  # never all of them
    assert guidance.wanted(0.5) and not CFGZero(1.0).wanted(0.5)
    np.testing.assert_array_equal(run(COND, np.zeros_like(COND), 0.5), 4 * COND)


@pytest.mark.parametrize("make", [
    lambda: APG(float("nan")), lambda: APG(4.0, norm_threshold=-1), lambda: APG(4.0, smoothing=-1),
    lambda: CFGZero(float("inf")), lambda: CFGZero(4.0, zero_steps=-1),
])  # fmt: skip
def test_numbers_that_cannot_be(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="wants"):
        make()
