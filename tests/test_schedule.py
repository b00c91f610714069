"""models.schedule against diffusers, stable-diffusion.cpp and arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.schedule import (
    SCHEDULES,
    _beta_quantile,
    add_noise,
    after_strength,
    explicit,
    qwen_image_mu,
    qwen_layered,
    sd_cpp_default,
    shifted,
    shifted_by_size,
    sigmas,
)

GOLDEN = Path(__file__).parent / "golden"


def test_diffusers_to_the_bit() -> None:
    with np.load(GOLDEN / "schedules.npz") as golden:
        assert len(golden.files) >= 30
        for key in golden.files:
            shift, n = key.split("/")
            ours = sigmas("diffusers", int(n), shift=float(shift.removeprefix("shift_")))
            np.testing.assert_array_equal(ours, golden[key], err_msg=key)


def test_qwen_image_to_the_bit() -> None:
    with np.load(GOLDEN / "qwen_schedules.npz") as golden:
        assert len(golden.files) >= 30
        for key in golden.files:
            kind, n_tokens, n = key.split("/")
            if kind == "layered":
                ours = qwen_layered(int(n), int(n_tokens))
            else:
                ours = sigmas("qwen_image", int(n), n_positions=4 * int(n_tokens))
            np.testing.assert_array_equal(ours, golden[key], err_msg=key)


def test_qwen_image_worked_values() -> None:
    for n_tokens, mu in ((1024, 0.538710), (4096, 0.693548), (6889, 0.834325)):
        assert qwen_image_mu(n_tokens) == pytest.approx(mu, abs=1e-6)
    expected = [1, 0.766709, 0.455614, 0.02, 0]
    np.testing.assert_allclose(sigmas("qwen_image", 4, n_positions=128 * 128), expected, atol=6e-7)
    # without a terminal, and with ln 3: the schedule of the Lightning models
    np.testing.assert_allclose(
        shifted_by_size(np.linspace(1, 1 / 8, 8), np.log(3)), sigmas("diffusers", 8, shift=3), rtol=0, atol=2e-7
    )
    with pytest.raises(ValueError, match="fall strictly"):
        shifted_by_size([1, 1, 0.5], 0.5)
    with pytest.raises(ValueError, match="at least 1 step"):
        qwen_layered(0, 1024)


def test_stable_diffusion_cpp() -> None:
    seen = set()
    with np.load(GOLDEN / "sd_cpp.npz") as golden:
        for key in golden.files:
            _, kind, name, *rest = key.split("/")
            if kind == "schedule":
                n, shift, n_positions = map(int, rest)
                ours = sigmas(name, n, shift=shift, n_positions=n_positions)
                # libm's exp and atan in float32 differ from numpy's in the last place
                np.testing.assert_allclose(ours, golden[key], rtol=0, atol=5e-7, err_msg=key)
                seen.add(name)
    assert seen == SCHEDULES.keys() - {"diffusers", "normal", "qwen_image", "lightning"}


@pytest.mark.parametrize(
    ("name", "shift", "expected"),
    [
        ("diffusers", 3, [1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3]),
        ("simple", 3, [1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3]),
        ("discrete", 3, [1, 0.947427, 0.882498, 0.800280, 0.692804, 0.546322, 0.334887, 0.002994]),
        ("normal", 3, [1, 0.947427, 0.882498, 0.800280, 0.692804, 0.546322, 0.334887, 0.002994]),
        ("sgm_uniform", 3, [1, 0.954595, 0.900120, 0.833555, 0.750375, 0.643469, 0.500999, 0.301678]),
        ("diffusers", 6, [1, 0.976744, 0.947368, 0.909091, 0.857143, 0.782609, 0.666667, 0.461538]),
    ],
)
def test_worked_values(name: str, shift: float, expected: list[float]) -> None:
    np.testing.assert_allclose(sigmas(name, 8, shift=shift), [*expected, 0], atol=6e-7)


@pytest.mark.parametrize("n", [1, 2, 4, 5, 8, 10, 20, 40])
def test_simple_is_diffusers_where_steps_divide_a_thousand(n: int) -> None:
    np.testing.assert_allclose(sigmas("simple", n), sigmas("diffusers", n), rtol=0, atol=2e-7)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 50])
def test_every_schedule_falls_to_zero(name: str, n: int) -> None:
    values = sigmas(name, n)
    assert values.dtype == np.float32 and values.ndim == 1
    assert len(values) == n + 1 or (name == "beta" and len(values) <= n + 1)
    assert values[-1] == 0 and (np.diff(values) < 0).all()
    assert 0.99 < values[0] <= 1 or (name, n) == ("bong_tangent", 1)  # which starts in the middle


@pytest.mark.parametrize("name", ["flux", "flux2", "ltx2", "logit_normal", "qwen_image"])
def test_larger_pictures_stay_noisy_longer(name: str) -> None:
    small, large = sigmas(name, 8, n_positions=1024), sigmas(name, 8, n_positions=4096)
    assert (small[1:-2] < large[1:-2]).all()
    np.testing.assert_array_equal(sigmas("simple", 8, n_positions=1024), sigmas("simple", 8, n_positions=4096))


def test_beta_quantiles() -> None:
    # scipy.stats.beta.ppf(p, 0.6, 0.6) and (p, 2, 5)
    for p, expected in ((0.001, 1.855873851745e-05), (0.1, 0.03958440558879), (0.25, 0.17568037865270), (0.5, 0.5)):
        assert _beta_quantile(p, 0.6, 0.6) == pytest.approx(expected, rel=1e-9)
        assert _beta_quantile(1 - p, 0.6, 0.6) == pytest.approx(1 - expected, rel=1e-9)
    assert _beta_quantile(0.579825, 2, 5) == pytest.approx(0.3, rel=1e-12)  # a polynomial, by hand
    assert _beta_quantile(1.0, 0.6, 0.6) == 1


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (("linear", 8), {}, "unknown schedule 'linear': choose from diffusers"),
        (("simple", 0), {}, "at least 1 step, not 0"),
        (("simple", 8), {"shift": 0.0}, "flow shift must be a positive number, not 0.0"),
        (("simple", 8), {"shift": float("nan")}, "flow shift must be"),
        (("flux", 8), {"n_positions": 0}, "at least one position"),
        (("lcm", 51), {}, "'lcm' cannot make 51 different noise levels"),
        (("simple", 1001), {}, "cannot make 1001 different"),
    ],
)
def test_refusals(args: tuple[str, int], kwargs: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sigmas(*args, **kwargs)  # type: ignore[arg-type]


def test_explicit() -> None:
    np.testing.assert_array_equal(explicit([1, 0.5, 0]), np.array([1, 0.5, 0], np.float32))
    for bad in ([], [0], [1, 0.5], [1, 1, 0], [0.5, 0.7, 0], [2, 1, 0], [1, float("nan"), 0]):
        with pytest.raises(ValueError, match="sigmas must"):
            explicit(bad)


def test_shifted_is_the_argument_of_diffusers() -> None:
    np.testing.assert_array_equal(shifted(np.linspace(1, 0.25, 4), 3.0), sigmas("diffusers", 4))


def test_strength_of_the_reference() -> None:
    values = sigmas("diffusers", 8)
    for strength, left in ((1.0, 8), (0.6, 5), (0.5, 4), (0.99, 8), (0.125, 1), (0.2, 2)):
        np.testing.assert_array_equal(after_strength(values, strength), values[8 - left :])
    tiny = sigmas("diffusers", 2)
    np.testing.assert_array_equal(after_strength(tiny, 0.001), tiny[1:])  # int(1.998) steps are skipped


def test_strength_of_stable_diffusion_cpp() -> None:
    values = sigmas("discrete", 8)
    # t_enc = int(8 * strength), one less if that is all 8; t_enc + 1 steps
    for strength, left in ((1.0, 8), (0.99, 8), (0.75, 7), (0.5, 5), (0.124, 1), (0.125, 2)):
        np.testing.assert_array_equal(after_strength(values, strength, compat="sd.cpp"), values[8 - left :])
    # 20 * 0.35f is 7.0000001 in C: the product is taken in float32
    assert len(after_strength(sigmas("simple", 20), 0.35, compat="sd.cpp")) - 1 == 8


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.5, float("nan")])
@pytest.mark.parametrize("compat", [None, "sd.cpp"])
def test_strength_is_a_share(strength: float, compat: str | None) -> None:
    with pytest.raises(ValueError, match="strength must be"):
        after_strength(sigmas("simple", 8), strength, compat=compat)


def test_the_start_of_img2img_is_the_pipelines() -> None:
    with np.load(GOLDEN / "pipeline.npz") as golden:
        left = after_strength(sigmas("diffusers", 5), 0.6)
        np.testing.assert_array_equal(left, golden["img2img/sigmas"][2:])
    latents, noise = np.ones(3, np.float32), np.full(3, 5, np.float32)
    np.testing.assert_allclose(add_noise(latents, noise, 0.25), 2)
    assert add_noise(latents, noise, left[0]).dtype == np.float32


def test_defaults_of_stable_diffusion_cpp() -> None:
    assert [sd_cpp_default(m) for m in ("euler", "lcm", "ddim_trailing")] == ["discrete", "lcm", "simple"]
