"""Samplers: how the steps of a schedule turn noise into a picture.

Every sampler is a generator over the steps of k-diffusion's ODE dx = (x - D(x, sigma)) / sigma dsigma, where D is the
denoised estimate x - sigma * v of a flow-matching model. It yields x after each step and takes back the x to go on
from, so a caller can look at it or change it. Coefficients are computed in double precision, latents stay float32.

Names and rules are those of stable-diffusion.cpp for flow models: the code of version 0.4.7 was run and agrees to 2e-6
(tests/golden/make_sd_cpp.py), and so does its source of August 2026 for `lms`, `euler_ge` and `euler_cfg_pp`, which
came later. One difference: `ddim_trailing` is euler_a with eta 0, as it is now; with eta > 0, 0.4.7 adds noise in the
way of Stable Diffusion.

Left out: `tcd`, `dpm++2m_sde`, `dpm++2m_sde_bt` and `euler_a_cfg_pp`. They add noise without shrinking the picture to
make room for it, which is right for Stable Diffusion and wrong for flow models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .rng import RNG, make_rng

Array = NDArray[Any]  # float32; mypy cannot follow its dtype through arithmetic with floats
Denoise = Callable[[Array, float], Array]
DenoiseBoth = Callable[[Array, float], tuple[Array, Array]]
Noise = Callable[[], Array]
Steps = Generator[Array, Array, None]
Callback = Callable[[int, float, Array], "Array | None"]


class Sampler(NamedTuple):
    """A row of the table SAMPLERS."""

    steps: Callable[..., Steps]
    eta: float | None = None  # the default share of noise put back at each step; None: the sampler has no such choice
    noise: bool = False  # draws noise whatever eta is
    both: bool = False  # wants the unguided estimate too


def find_sampler(method: str, eta: float | None = None) -> Sampler:
    """The row of the table; ValueError for an unknown method, or an eta for a method without one."""
    if method not in SAMPLERS:
        raise ValueError(f"unknown sampling method {method!r}: choose from {', '.join(SAMPLERS)}")
    if eta and SAMPLERS[method].eta is None:
        raise ValueError(f"sampling method {method!r} takes no eta")
    return SAMPLERS[method]


def sample(
    method: str,
    denoise: Denoise | DenoiseBoth,
    x: Array,
    sigmas: Array,
    *,
    rng: RNG | None = None,
    eta: float | None = None,
    callback: Callback | None = None,
) -> Array:
    """Run the sampler `method` from x at noise level sigmas[0] down to sigmas[-1] = 0, and return the latents.

    denoise(x, sigma): the denoised estimate, float32 like x; for methods with `both` the pair (guided, unguided).
    rng: draws the noise of stochastic methods, one call of x's shape per step. eta: 0 makes them deterministic.
    callback(i, sigma, x): called after step i with the noise level that x has now; an array it returns replaces x.

    Raises ValueError for an unknown method, sigmas that do not fall to 0, an eta for a method without one, and a
    missing rng.
    """
    sampler = find_sampler(method, eta)
    levels: list[float] = np.asarray(sigmas, np.float32).tolist()
    if len(levels) < 2 or levels[-1] != 0 or not all(a > b for a, b in pairwise(levels)):
        raise ValueError(f"sigmas must fall strictly and end in 0, got {levels}")
    options: dict[str, object] = {}
    if sampler.eta is not None:
        options["eta"] = sampler.eta if eta is None else eta
    if sampler.noise or sampler.eta is not None:
        if rng is None and (sampler.noise or options["eta"]):
            raise ValueError(f"sampling method {method!r} draws noise and needs an rng")
        shape = x.shape
        options["noise"] = lambda: rng.randn(shape)  # type: ignore[union-attr]

    steps = sampler.steps(denoise, np.asarray(x, np.float32), levels, **options)
    x = next(steps)
    for i, sigma in enumerate(levels[1:]):
        replaced = callback(i, sigma, x) if callback else None
        x = x if replaced is None else np.asarray(replaced, np.float32)
        if sigma:
            x = steps.send(x)
    steps.close()
    return x


def evaluated(method: str, sigmas: Array, eta: float | None = None) -> list[float]:
    """The noise levels at which a run of `sample` asks for an estimate, in order. They depend on no latents."""
    asked: list[float] = []
    both = find_sampler(method, eta).both

    def denoise(x: Array, sigma: float) -> Any:
        asked.append(float(sigma))
        return (x, x) if both else x

    sample(method, denoise, np.ones((1, 2, 2), np.float32), sigmas, rng=make_rng("cpu", 0), eta=eta)
    return asked


# -- one evaluation per step -----------------------------------------------------------------------------------------


def euler(denoise: Denoise, x: Array, sigmas: list[float]) -> Steps:
    for s, s_next in pairwise(sigmas):
        x = yield x + (x - denoise(x, s)) * ((s_next - s) / s)


def euler_a(denoise: Denoise, x: Array, sigmas: list[float], *, noise: Noise, eta: float) -> Steps:
    for s, s_next in pairwise(sigmas):
        down, up, alpha = ancestral(s, s_next, eta)
        ratio = down / s
        x = ratio * x + (1 - ratio) * denoise(x, s)
        x = yield alpha * x + up * noise() if up else x


def euler_ge(denoise: Denoise, x: Array, sigmas: list[float], *, noise: Noise, eta: float, gamma: float = 2.0) -> Steps:
    """Gradient estimation (Permenter and Yuan 2023): Euler along gamma * d + (1 - gamma) * previous d."""
    previous: Array | None = None
    for s, s_next in pairwise(sigmas):
        denoised = denoise(x, s)
        if s_next == 0:
            yield denoised
            return
        down, up, alpha = ancestral(s, s_next, eta)
        d = (x - denoised) / s
        x = x + (down - s) * (d if previous is None else gamma * d + (1 - gamma) * previous)
        previous = d
        x = yield alpha * x + up * noise() if up else x


def euler_cfg_pp(denoise: DenoiseBoth, x: Array, sigmas: list[float]) -> Steps:
    """CFG++ (Chung et al. 2024): the guided estimate, renoised along the unguided direction."""
    for s, s_next in pairwise(sigmas):
        denoised, unguided = denoise(x, s)
        x = yield denoised + (x - unguided) * (s_next / s)


def lcm(denoise: Denoise, x: Array, sigmas: list[float], *, noise: Noise) -> Steps:
    """Consistency sampling (Luo et al. 2023): jump to the end, add fresh noise."""
    for s, s_next in pairwise(sigmas):
        denoised = denoise(x, s)
        x = yield (1 - s_next) * denoised + s_next * noise() if s_next else denoised


# -- several evaluations per step ------------------------------------------------------------------------------------


def heun(denoise: Denoise, x: Array, sigmas: list[float]) -> Steps:
    """Karras et al. 2022, algorithm 1."""
    for s, s_next in pairwise(sigmas):
        d = (x - denoise(x, s)) / s
        if s_next:
            end = x + d * (s_next - s)
            d = (d + (end - denoise(end, s_next)) / s_next) / 2
        x = yield x + d * (s_next - s)


def dpm2(denoise: Denoise, x: Array, sigmas: list[float]) -> Steps:
    """The midpoint rule, at the geometric mean of the two noise levels."""
    for s, s_next in pairwise(sigmas):
        d = (x - denoise(x, s)) / s
        if s_next:
            s_mid = math.sqrt(s * s_next)
            mid = x + d * (s_mid - s)
            d = (mid - denoise(mid, s_mid)) / s_mid
        x = yield x + d * (s_next - s)


def dpmpp_2s_a(denoise: Denoise, x: Array, sigmas: list[float], *, noise: Noise, eta: float) -> Steps:
    """DPM-Solver++(2S) (Lu et al. 2022), ancestral, with the midpoint in the log signal-to-noise ratio of a flow."""
    for s, s_next in pairwise(sigmas):
        denoised = denoise(x, s)
        if s_next == 0:
            yield denoised
            return
        down, up, alpha = ancestral(s, s_next, eta)
        if 1 - s >= 1e-6:  # at pure noise the midpoint is the start
            s_mid = 1 / (1 + math.sqrt((1 - s) / s * (1 - down) / down))
            denoised = denoise(s_mid / s * x + (1 - s_mid / s) * denoised, s_mid)
        x = down / s * x + (1 - down / s) * denoised
        x = yield alpha * x + up * noise() if up else x


def res_2s(denoise: Denoise, x: Array, sigmas: list[float], *, noise: Noise, eta: float) -> Steps:
    """Second order exponential Runge-Kutta (Zhang et al. 2023) with its second node at the middle."""
    c2 = 0.5
    for s, s_next in pairwise(sigmas):
        denoised = denoise(x, s)
        down, up, alpha = ancestral(s, s_next, eta)
        if down == 0:
            yield denoised
            return
        h = math.log(s / down)
        b2 = _phi2(-h) / c2
        b1 = _phi1(-h) - b2
        first = denoised - x
        s_mid = s * math.exp(-h * c2)
        second = denoise(x + h * c2 * _phi1(-h * c2) * first, s_mid) - x
        x = x + h * (b1 * first + b2 * second)
        x = yield alpha * x + up * noise() if up else x


# -- multistep -------------------------------------------------------------------------------------------------------


def dpmpp_2m(denoise: Denoise, x: Array, sigmas: list[float], *, mean_step: bool = False) -> Steps:
    """DPM-Solver++(2M) (Lu et al. 2022).

    mean_step: dpm++2mv2, which damps the correction where steps change size. It is biased then, however many the steps:
    with 250 steps of `simple` a mean of 0.7 comes out as 0.53. With equal steps in log sigma the two are the same.
    """
    previous, h_last = x, 0.0
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, s)
        if s_next == 0:
            yield denoised
            return
        h = h_exp = math.log(s / s_next)
        estimate = denoised
        if i > 0:
            r = h_last / h
            if mean_step:
                r, h_exp = max(r, 1 / r), (h + h_last) / 2
            estimate = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * previous
        previous, h_last = denoised, h
        x = yield s_next / s * x - math.expm1(-h_exp) * estimate


def dpmpp_2mv2(denoise: Denoise, x: Array, sigmas: list[float]) -> Steps:
    return dpmpp_2m(denoise, x, sigmas, mean_step=True)


_ADAMS_BASHFORTH = ((1.0,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def ipndm(denoise: Denoise, x: Array, sigmas: list[float], *, variable: bool = False) -> Steps:
    """Adams-Bashforth of order up to 4 (Zhang and Chen 2022). variable: ipndm_v, whose order 2 knows the step sizes."""
    history: list[Array] = []  # newest first
    last = 0.0
    for s, s_next in pairwise(sigmas):
        history = [(x - denoise(x, s)) / s, *history[:3]]
        weights = _ADAMS_BASHFORTH[len(history) - 1]
        step = s_next - s
        if variable and len(history) == 2:
            weights = (1 + step / last / 2, -step / last / 2)
        last = step
        x = yield x + step * _weighted(weights, history)


def ipndm_v(denoise: Denoise, x: Array, sigmas: list[float]) -> Steps:
    return ipndm(denoise, x, sigmas, variable=True)


def lms(denoise: Denoise, x: Array, sigmas: list[float], *, order: int = 4, shift: int = 1) -> Steps:
    """Linear multistep, coefficients integrated over the true step sizes.

    With shift 1, stable-diffusion.cpp's default, each older slope is replaced by the one after it: first order, but
    smoother with few steps. 0 is the method of the books.
    """
    history: list[Array] = []  # newest first
    order = min(order, len(sigmas) - 1)
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        history = [(x - denoise(x, s)) / s, *history[: order - 1]]
        nodes = sigmas[i::-1][: len(history)]
        weights = [_lagrange_integral(nodes, j, s, s_next) for j in range(len(nodes))]
        used = [history[0]] + [history[max(j - shift, 1)] for j in range(1, len(nodes))]
        x = yield x + _weighted(weights, used)


def res_multistep(denoise: Denoise, x: Array, sigmas: list[float], *, noise: Noise, eta: float) -> Steps:
    """Second order exponential multistep (Zhang et al. 2023, "refined exponential solver")."""
    previous: Array | None = None
    down_last = s_last = 0.0
    for s, s_next in pairwise(sigmas):
        denoised = denoise(x, s)
        down, up, alpha = ancestral(s, s_next, eta)
        if down == 0 or previous is None:
            x = x + (x - denoised) * ((down - s) / s)
        else:
            h = math.log(s / down)
            b2 = _phi2(-h) * h / math.log(down_last / s_last)
            x = down / s * x + h * ((_phi1(-h) - b2) * denoised + b2 * previous)
        previous, down_last, s_last = denoised, down, s
        x = yield alpha * x + up * noise() if up else x


def er_sde(denoise: Denoise, x: Array, sigmas: list[float], *, noise: Noise, eta: float, n_points: int = 200) -> Steps:
    """Extended reverse-time SDE, third order (Cui et al. 2023), in lambda = sigma / (1 - sigma).

    eta only says whether noise is added, not how much; the drift is that of the SDE either way, as in sd.cpp.
    """

    def scale(z: float) -> float:
        return z * (math.exp(z**0.3) + 10)

    levels = [min(max(s, 1e-6), 1 - 1e-4) for s in sigmas]
    lambdas = [s / (1 - s) for s in levels]
    previous = previous_slope = x
    for i, s in enumerate(sigmas[:-1]):
        denoised = denoise(x, s)
        if sigmas[i + 1] == 0:
            yield denoised
            return
        l_s, l_t, alpha_t = lambdas[i], lambdas[i + 1], 1 - levels[i + 1]
        r = scale(l_t) / scale(l_s)
        x = alpha_t / (1 - levels[i]) * r * x + alpha_t * (1 - r) * denoised
        dt = l_t - l_s
        step = -dt / n_points
        points = [l_t + p * step for p in range(n_points)]
        if i >= 1:
            integral = step * sum(1 / scale(p) for p in points)
            slope = (denoised - previous) / (l_s - lambdas[i - 1])
            x = x + alpha_t * (dt + integral * scale(l_t)) * slope
            if i >= 2:
                integral = step * sum((p - l_s) / scale(p) for p in points)
                bend = (slope - previous_slope) / ((l_s - lambdas[i - 2]) / 2)
                x = x + alpha_t * (dt * dt / 2 + integral * scale(l_t)) * bend
            previous_slope = slope
        previous = denoised
        variance = l_t * l_t - l_s * l_s * r * r
        x = yield x + alpha_t * math.sqrt(variance) * noise() if eta > 0 and variance > 0 else x


# -- the parts -------------------------------------------------------------------------------------------------------


def ancestral(s: float, s_next: float, eta: float) -> tuple[float, float, float]:
    """(sigma_down, sigma_up, alpha) of an ancestral step of a flow from noise level s to s_next.

    The step goes down below s_next; alpha * x + sigma_up * noise brings it back up to s_next. eta is clamped to 1.
    """
    if eta <= 0 or s_next <= 0:
        return s_next, 0.0, 1.0
    down = s_next * (1 + (s_next / s - 1) * min(eta, 1.0))
    alpha = (1 - s_next) / (1 - down)
    return down, s_next * math.sqrt(max(1 - (down / s_next * alpha) ** 2, 0.0)), alpha


def _phi1(t: float) -> float:
    return math.expm1(t) / t if abs(t) > 1e-6 else 1 + t / 2


def _phi2(t: float) -> float:
    return (_phi1(t) - 1) / t if abs(t) > 1e-4 else 0.5 + t / 6 + t * t / 24


def _weighted(weights: list[float] | tuple[float, ...], arrays: list[Array]) -> Array:
    total = weights[0] * arrays[0]
    for weight, array in zip(weights[1:], arrays[1:], strict=True):
        total += weight * array
    return total


def _lagrange_integral(nodes: list[float], j: int, start: float, end: float) -> float:
    """The integral from start to end of the polynomial that is 1 at nodes[j] and 0 at the others."""
    polynomial = np.polynomial.Polynomial([1.0])
    for k, node in enumerate(nodes):
        if k != j:
            polynomial *= np.polynomial.Polynomial([-node, 1.0]) / (nodes[j] - node)
    integral = polynomial.integ()
    return float(integral(end) - integral(start))


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(euler),
    "euler_a": Sampler(euler_a, eta=1.0),
    "heun": Sampler(heun),
    "dpm2": Sampler(dpm2),
    "dpm++2s_a": Sampler(dpmpp_2s_a, eta=1.0),
    "dpm++2m": Sampler(dpmpp_2m),
    "dpm++2mv2": Sampler(dpmpp_2mv2),
    "ipndm": Sampler(ipndm),
    "ipndm_v": Sampler(ipndm_v),
    "lcm": Sampler(lcm, noise=True),
    "ddim_trailing": Sampler(euler_a, eta=0.0),
    "res_multistep": Sampler(res_multistep, eta=0.0),
    "res_2s": Sampler(res_2s, eta=0.0),
    "er_sde": Sampler(er_sde, eta=1.0),
    "euler_cfg_pp": Sampler(euler_cfg_pp, both=True),
    "euler_ge": Sampler(euler_ge, eta=0.0),
    "lms": Sampler(lms),
}
