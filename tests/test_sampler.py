"""models.sampler against stable-diffusion.cpp, diffusers, known solutions and arithmetic by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from models.rng import MersenneTwisterRNG, PhiloxRNG
from models.sampler import SAMPLERS, ancestral, sample
from models.schedule import sigmas

GOLDEN = Path(__file__).parent / "golden"
STOCHASTIC = [name for name, s in SAMPLERS.items() if s.noise or s.eta is not None]


class Gaussian:
    """The exact denoiser of data N(mean, std^2): E[x0 | x_sigma], and the exact path of its ODE."""

    mean, std = 0.7, 0.5

    def spread(self, s: float) -> float:
        return math.hypot((1 - s) * self.std, s)

    def __call__(self, x: np.ndarray, s: float) -> np.ndarray:
        pull = (1 - s) * self.std**2 / self.spread(s) ** 2
        return np.float32(self.mean) + np.float32(pull) * (x - np.float32((1 - s) * self.mean))

    def path(self, z: np.ndarray, s: float) -> np.ndarray:
        return (1 - s) * self.mean + self.spread(s) * z


class GaussianPair(Gaussian):
    """For methods that want the unguided estimate too; here it is the same."""

    def __call__(self, x: np.ndarray, s: float) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[override]
        return (super().__call__(x, s),) * 2


def denoiser(name: str) -> Gaussian:
    return GaussianPair() if SAMPLERS[name].both else Gaussian()


# -- against other implementations -----------------------------------------------------------------------------------


def toy(x: np.ndarray, s: float) -> np.ndarray:
    return np.float32(0.5) * np.tanh(x) * np.float32(2 - s) + np.float32(0.3 * s)


def toy_pair(x: np.ndarray, s: float) -> tuple[np.ndarray, np.ndarray]:
    return toy(x, s), np.float32(0.2) * x / np.float32(1 + s)


SIGMAS = ((1.0, 0.95, 0.85, 0.7, 0.5, 0.3, 0.1, 0.0), (0.6, 0.35, 0.1, 0.0), (1.0, 0.0))


def test_stable_diffusion_cpp() -> None:
    """Every sampler, with 7, 3 and 1 steps and eta 0, 0.5 and 1, on a nonlinear model (golden/make_sd_cpp.py)."""
    seen = set()
    with np.load(GOLDEN / "sd_cpp.npz") as golden:
        for key in golden.files:
            version, kind, method, *rest = key.split("/")
            if kind != "sample":
                continue
            eta = float(rest[1])
            if method == "ddim_trailing" and eta and version == "0.4.7":
                continue  # Stable Diffusion's form there; see the next test
            levels = np.array(SIGMAS[int(rest[0])], np.float32)
            rng = PhiloxRNG(42)
            x = levels[0] * rng.randn(16) + (1 - levels[0]) * np.float32(0.5)
            sampler = SAMPLERS[method]
            ours = sample(
                method,
                toy_pair if sampler.both else toy,
                x,
                levels,
                rng=rng,
                eta=None if sampler.eta is None else eta,
            )
            np.testing.assert_allclose(ours, golden[key], rtol=0, atol=2e-6, err_msg=key)
            seen.add(method)
    assert seen == SAMPLERS.keys()


def test_ddim_trailing_is_euler_a() -> None:
    x = PhiloxRNG(1).randn((2, 3))
    levels = sigmas("simple", 5)
    for eta in (0.0, 0.7):
        np.testing.assert_array_equal(
            sample("ddim_trailing", toy, x, levels, eta=eta, rng=PhiloxRNG(2)),
            sample("euler_a", toy, x, levels, eta=eta, rng=PhiloxRNG(2)),
        )


def test_euler_is_the_step_of_diffusers() -> None:
    """x + (next - sigma) * v, with v read off two latents of a recorded run."""
    with np.load(GOLDEN / "pipeline.npz") as golden:
        levels = golden["turbo/sigmas"]
        track = [golden["turbo/start"], *(golden[f"turbo/latents_{i}"] for i in range(4))]
    velocity = [(b - a) / np.float32(t - s) for a, b, s, t in zip(track, track[1:], levels, levels[1:], strict=False)]
    asked: list[float] = []

    def denoise(x: np.ndarray, s: float) -> np.ndarray:
        asked.append(s)
        return x - np.float32(s) * velocity[len(asked) - 1]

    seen: dict[int, np.ndarray] = {}
    sample("euler", denoise, track[0], levels, callback=lambda i, s, x: seen.update({i: x}))
    assert asked == levels[:-1].tolist()
    for i in range(4):
        np.testing.assert_allclose(seen[i], track[i + 1], rtol=0, atol=2e-6)


# -- against known solutions -----------------------------------------------------------------------------------------

ORDERS = {
    "euler": 1, "euler_a": 1, "ddim_trailing": 1, "euler_cfg_pp": 1, "euler_ge": 1, "lms": 1,
    "heun": 2, "dpm2": 2, "dpm++2s_a": 2, "dpm++2m": 2, "dpm++2mv2": 2, "res_2s": 2, "res_multistep": 2,
    "ipndm": 2, "ipndm_v": 2,
}  # fmt: skip


def error(name: str, n: int) -> float:
    """The error after n steps from sigma 0.9 to 0.1, without noise."""
    model = denoiser(name)
    # steps that shrink with sigma suit the exponential integrators; Adams-Bashforth wants equal ones
    grid = np.linspace(0.9, 0.1, n + 1) if name.startswith(("ipndm", "lms")) else np.geomspace(0.9, 0.1, n + 1)
    z = np.array([-1.5, 0.2, 1.0])
    options = {} if SAMPLERS[name].eta is None else {"eta": 0.0, "noise": None}
    x = model.path(z, 0.9).astype(np.float64)  # double precision, to see small errors
    steps = SAMPLERS[name].steps(lambda x, s: float64(model, x, s), x, grid.tolist(), **options)
    x = next(steps)
    for _ in range(n - 1):
        x = steps.send(x)
    return float(np.abs(x - model.path(z, 0.1)).max())


def float64(model: Gaussian, x: np.ndarray, s: float) -> object:
    pull = (1 - s) * model.std**2 / model.spread(s) ** 2
    denoised = model.mean + pull * (x - (1 - s) * model.mean)
    return (denoised, denoised) if isinstance(model, GaussianPair) else denoised


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name: str) -> None:
    coarse, fine = error(name, 80), error(name, 160)
    assert coarse < 0.03
    order = math.log2(coarse / fine)
    assert ORDERS[name] - 0.15 < order < ORDERS[name] + (0.3 if ORDERS[name] == 1 else 1.2), order


def test_every_sampler_without_noise_is_tested_for_its_order() -> None:
    assert ORDERS.keys() | {"lcm", "er_sde"} == SAMPLERS.keys()


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_result_has_the_distribution_of_the_data(name: str) -> None:
    model = denoiser(name)
    x = MersenneTwisterRNG(1).randn(20_000)
    out = sample(name, model, x, sigmas("simple", 250), rng=MersenneTwisterRNG(2))
    assert out.dtype == np.float32
    if name == "dpm++2mv2":  # biased by design on uneven steps: the picture comes out darker and flatter
        assert 0.3 < out.std() < 0.45 and 0.5 < out.mean() < 0.6
        return
    assert out.mean() == pytest.approx(model.mean, abs=0.02)
    if name == "lcm":  # forgets x at every step: right in the mean, too narrow
        assert 0.3 < out.std() < 0.4
    else:
        assert out.std() == pytest.approx(model.std, abs=0.02)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_jumps_to_the_estimate(name: str) -> None:
    model = denoiser(name)
    x = PhiloxRNG(3).randn((4, 2, 3))
    out = sample(name, model, x, np.array([1, 0], np.float32), rng=PhiloxRNG(4))
    np.testing.assert_allclose(out, model.mean, atol=1e-6)  # at pure noise the best guess is the mean


# -- by hand ---------------------------------------------------------------------------------------------------------


def test_euler_by_hand() -> None:
    # D = 1 everywhere; from 3 at sigma 0.8 to 0.2: x = 1 + (3 - 1) * 0.2 / 0.8
    track: list[float] = []
    sample("euler", lambda x, s: np.ones_like(x), np.array([3.0]), np.array([0.8, 0.2, 0]),
           callback=lambda i, s, x: track.append(float(x[0])))  # fmt: skip
    assert track == pytest.approx([1.5, 1.0])


def test_ancestral_by_hand() -> None:
    # eta 1, 0.8 -> 0.4: down = 0.4 * 0.4 / 0.8, alpha = 0.6 / 0.8, up = 0.4 * sqrt(1 - (0.5 * 0.75)^2)
    assert ancestral(0.8, 0.4, 1.0) == pytest.approx((0.2, 0.4 * math.sqrt(1 - 0.375**2), 0.75))
    assert ancestral(0.8, 0.4, 7.0) == ancestral(0.8, 0.4, 1.0)
    assert ancestral(0.8, 0.4, 0.0) == (0.4, 0.0, 1.0)
    assert ancestral(0.8, 0.0, 1.0) == (0.0, 0.0, 1.0)


def test_ancestral_steps_keep_the_noise_level() -> None:
    down, up, alpha = ancestral(0.8, 0.4, 0.6)
    assert alpha * (1 - down) == pytest.approx(1 - 0.4)  # the picture's share
    assert math.hypot(alpha * down, up) == pytest.approx(0.4)  # the noise's


def test_cfg_pp_by_hand() -> None:
    track: list[float] = []
    sample("euler_cfg_pp", lambda x, s: (np.full_like(x, 1.0), np.full_like(x, 2.0)), np.array([4.0]),
           np.array([1.0, 0.5, 0]), callback=lambda i, s, x: track.append(float(x[0])))  # fmt: skip
    assert track == pytest.approx([1 + (4 - 2) * 0.5, 1.0])


def test_adams_bashforth_is_exact_for_cubics() -> None:
    """From its fourth step on, ipndm integrates a slope that is a cubic of sigma without error."""
    grid = np.linspace(1, 0.1, 10)
    primitive = np.polynomial.Polynomial([1, -2, 3, 0.5, -1])
    slope = primitive.deriv()
    steps = SAMPLERS["ipndm"].steps(lambda x, s: x - s * slope(s), np.zeros(1), grid.tolist())
    x = next(steps)
    for i in range(1, 9):
        change = steps.send(x) - x
        x = x + change
        if i >= 3:
            assert change[0] == pytest.approx(primitive(grid[i + 1]) - primitive(grid[i]), rel=1e-12)


def test_lms_with_shift_0_is_the_method_of_the_books() -> None:
    """On equal steps its coefficients are Adams-Bashforth's."""
    grid = np.linspace(0.9, 0.2, 15).tolist()
    results = []
    for name, options in (("lms", {"shift": 0}), ("ipndm", {})):
        steps = SAMPLERS[name].steps(toy, np.array([0.3, -1.0]), grid, **options)
        x = next(steps)
        for _ in range(13):
            x = steps.send(x)
        results.append(x)
    np.testing.assert_allclose(*results, rtol=1e-6)


# -- the interface ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_callback_sees_every_step_and_may_replace(name: str) -> None:
    x = PhiloxRNG(5).randn((2, 3))
    levels = sigmas("simple", 5)
    calls: list[tuple[int, float]] = []
    kwargs = {"rng": PhiloxRNG(6)}
    model = denoiser(name)
    plain = sample(name, model, x, levels, rng=PhiloxRNG(6))
    out = sample(name, model, x, levels, callback=lambda i, s, x: calls.append((i, s)), **kwargs)
    np.testing.assert_array_equal(out, plain)
    assert calls == [(i, float(s)) for i, s in enumerate(levels[1:])]
    zeroed = sample(name, model, x, levels, rng=PhiloxRNG(6), callback=lambda i, s, x: x * 0 if i == 4 else None)
    assert not zeroed.any() and zeroed.shape == (2, 3)
    moved = sample(name, model, x, levels, rng=PhiloxRNG(6), callback=lambda i, s, x: x + 1 if i == 0 else None)
    if name != "lcm":  # which keeps nothing of x but what the model says
        assert np.abs(moved - plain).max() > 1e-3


@pytest.mark.parametrize("name", SAMPLERS)
def test_does_not_touch_its_input(name: str) -> None:
    x = PhiloxRNG(7).randn((2, 3))
    levels = sigmas("simple", 4)
    copies = x.copy(), levels.copy()
    sample(name, denoiser(name), x, levels, rng=PhiloxRNG(8))
    np.testing.assert_array_equal(x, copies[0])
    np.testing.assert_array_equal(levels, copies[1])


@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_comes_from_the_rng_in_calls_of_one_shape(name: str) -> None:
    shapes: list[object] = []

    class Spy(PhiloxRNG):
        def randn(self, shape):  # type: ignore[no-untyped-def]
            shapes.append(shape)
            return super().randn(shape)

    eta = None if SAMPLERS[name].noise else 1.0
    sample(name, toy, PhiloxRNG(0).randn((16, 2, 3)), sigmas("simple", 4), rng=Spy(1), eta=eta)
    assert shapes == [(16, 2, 3)] * 3  # the last step adds none
    if not SAMPLERS[name].noise:
        sample(name, toy, PhiloxRNG(0).randn((16, 2, 3)), sigmas("simple", 4), eta=0.0)  # needs no rng
    with pytest.raises(ValueError, match="needs an rng"):
        sample(name, toy, PhiloxRNG(0).randn((16, 2, 3)), sigmas("simple", 4), eta=eta)


def test_refusals() -> None:
    x, levels = np.zeros(2, np.float32), sigmas("simple", 4)
    with pytest.raises(ValueError, match="unknown sampling method 'plms': choose from euler, euler_a"):
        sample("plms", toy, x, levels)
    with pytest.raises(ValueError, match="'euler' takes no eta"):
        sample("euler", toy, x, levels, eta=0.5)
    for bad in ([1.0], [1.0, 0.5], [0.5, 0.7, 0.0], [0.5, 0.5, 0.0], [float("nan"), 0.0]):
        with pytest.raises(ValueError, match="fall strictly and end in 0"):
            sample("euler", toy, x, np.array(bad, np.float32))
