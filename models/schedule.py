"""Noise levels of flow-matching models: which sigmas a run of n steps visits.

sigma runs from 1 (noise) to 0 (picture), x_sigma = (1 - sigma) * x0 + sigma * noise. A schedule is a float32 array of
n + 1 values that fall strictly and end in 0; n is the number of steps.

    diffusers      1, 1 - 1/n, ..., 1/n, then the static shift: the reference pipeline of Z-Image
    qwen_image     the same, with a shift from the picture's size, then stretched to end at 0.02: that of Qwen-Image
    lightning      the same with a static shift and not stretched: that of Qwen-Image's Lightning models
    the others     as stable-diffusion.cpp names and computes them, in float32; checked against version 0.4.7, and beta,
                   ltx2, logit_normal, flux2 and flux, which 0.4.7 does not have, against its source of August 2026

Left out of stable-diffusion.cpp's list: `ays` and `gits`, tables for Stable Diffusion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Schedule = Callable[[int, float, int], Float32]

QWEN_TERMINAL = 0.02  # where Qwen-Image's sigmas end
N_TRAIN = 1000  # the models were trained on a table of 1000 noise levels


def sigmas(name: str, n: int, *, shift: float = 3.0, n_positions: int = 4096) -> Float32:
    """The schedule `name` with n steps: float32 [n + 1], falling from about 1 to 0.

    shift: the static timestep shift s of s*u / (1 + (s - 1)*u); 3 for Z-Image-Turbo, 6 for Z-Image. flux, flux2, ltx2,
    logit_normal and qwen_image take a shift from the size of the picture instead.
    n_positions: latent height times latent width, in pixels of the latent; only those five ask for it.

    `beta` may have fewer than n steps: it drops repeated noise levels. Raises ValueError for an unknown name, n < 1, a
    shift that is not positive, and an n for which the schedule would visit a noise level twice.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: choose from {', '.join(SCHEDULES)}")
    if n < 1:
        raise ValueError(f"a schedule needs at least 1 step, not {n}")
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"flow shift must be a positive number, not {shift}")
    if n_positions < 1:
        raise ValueError(f"a latent has at least one position, not {n_positions}")
    values = np.append(SCHEDULES[name](n, shift, n_positions), 0).astype(np.float32)
    if not (np.diff(values) < 0).all():
        raise ValueError(f"schedule {name!r} cannot make {n} different noise levels: ask for fewer steps")
    return values


def explicit(values: Sequence[float]) -> Float32:
    """Sigmas given by hand (`--sigmas 1,0.7,0.3,0`): at least two, from (0, 1], falling strictly, ending in 0."""
    out = np.array(values, np.float32)
    if out.size < 2 or not np.isfinite(out).all():
        raise ValueError(f"sigmas must be at least two numbers, got {list(values)}")
    if out[0] > 1 or out[-1] != 0 or not (np.diff(out) < 0).all():
        raise ValueError(f"sigmas must fall strictly, start at 1 or below and end in 0, got {list(values)}")
    return out


def shifted(u: Sequence[float] | Float32, shift: float) -> Float32:
    """Sigmas as diffusers' scheduler makes them from its `sigmas` argument: shifted, then 0 appended.

    ValueError unless they fall strictly within 1 ... 0, 0 left out, and for a shift that is not positive.
    """
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"flow shift must be a positive number, not {shift}")
    return np.append(_shift(_falling(u), shift), np.float32(0))


def _falling(u: Sequence[float] | NDArray[np.float64] | Float32) -> Float32:
    values = np.asarray(u, np.float32)
    if values.ndim != 1 or not values.size or not (np.diff(values) < 0).all() or not 0 < values[-1] <= values[0] <= 1:
        raise ValueError(f"sigmas must fall strictly from 1 or below, without the 0 at the end, got {list(u)}")
    return values


def shifted_by_size(
    u: Sequence[float] | NDArray[np.float64] | Float32, mu: float, terminal: float | None = None
) -> Float32:
    """`shifted` as diffusers does it with a dynamic shift, e^mu, and stretched so that the last sigma before the 0 is
    `terminal`. ValueError for sigmas that do not fall strictly within 1 ... 0.
    """
    values = _exponential_shift(_falling(u), mu)
    if terminal is not None and values[-1] < 1:
        distance = 1 - values
        values = _float32(1 - distance / (distance[-1] / np.float32(1 - terminal)))
    return np.append(values, np.float32(0))


def qwen_image_mu(n_tokens: int) -> float:
    """Qwen-Image's dynamic shift for a picture of so many patches, references not counted."""
    slope = (0.9 - 0.5) / (8192 - 256)
    return n_tokens * slope + (0.5 - slope * 256)


def qwen_layered_mu(n_tokens: int) -> float:
    """Qwen-Image-Layered's: of the patches of the condition picture."""
    return math.sqrt(n_tokens / 256)


def qwen_layered(n: int, n_tokens: int) -> Float32:
    """The schedule of Qwen-Image-Layered's pipeline: float32 [n + 1]; n_tokens: patches of the condition picture."""
    if n < 1 or n_tokens < 1:
        raise ValueError(f"a schedule needs at least 1 step and 1 patch, not {n} and {n_tokens}")
    return shifted_by_size(np.linspace(1, 0, n + 1)[:-1], qwen_layered_mu(n_tokens), QWEN_TERMINAL)


def sd_cpp_default(method: str) -> str:
    """The schedule that stable-diffusion.cpp takes for a sampling method when none is named."""
    return {"lcm": "lcm", "ddim_trailing": "simple"}.get(method, "discrete")


# -- img2img ---------------------------------------------------------------------------------------------------------


def after_strength(values: Float32, strength: float, *, compat: str | None = None) -> Float32:
    """The part of a schedule that img2img runs: little of it for a small strength, all of it for 1.

    The reference (diffusers) skips the first int(n - min(n * strength, n)) steps. compat="sd.cpp" keeps one step more:
    int(n * strength) + 1, but n at most.
    Raises ValueError when strength is not in (0, 1], or so small that no step is left.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, not {strength}")
    n = len(values) - 1
    if compat == "sd.cpp":
        kept = int(np.float32(n) * np.float32(strength)) + 1
        return values[n - min(kept, n) :]
    if compat is not None:
        raise ValueError(f"unknown compat {compat!r}: None or 'sd.cpp'")
    skipped = int(max(n - min(n * strength, n), 0))
    if skipped >= n:
        raise ValueError(f"strength {strength} leaves none of {n} steps to run")
    return values[skipped:]


def add_noise(latents: Float32, noise: Float32, sigma: float) -> Float32:
    """(1 - sigma) * latents + sigma * noise: where a run that starts at noise level sigma begins."""
    s = np.float32(sigma)
    noisy: Float32 = s * noise + (np.float32(1) - s) * latents
    return noisy


# -- the schedules, without their final 0 ----------------------------------------------------------------------------


def _shift(u: Float32, shift: float) -> Float32:
    return _float32(shift * u / (1 + (shift - 1) * u))


def _float32(x: object) -> Float32:
    return np.asarray(x, np.float32)


def _level(t: Sequence[float] | Float32, shift: float) -> Float32:
    """Sigma of table entry t in 0 ... 999; t may be fractional."""
    return _shift((np.asarray(t, np.float32) + 1) / np.float32(N_TRAIN), shift)


def _ends(shift: float) -> tuple[np.float32, np.float32]:
    """The smallest and the largest sigma of the table."""
    low, high = _level([0, N_TRAIN - 1], shift)
    return low, high


def _ramp(n: int) -> Float32:
    """0, 1/(n-1), ..., 1; [0] for n = 1."""
    return _float32(np.arange(n, dtype=np.float32) / np.float32(max(n - 1, 1)))


def _uniform(n: int) -> Float32:
    """1, 1 - 1/n, ..., 1/n in float32 as sd.cpp computes it."""
    return _float32(np.float32(1) - np.arange(n, dtype=np.float32) / np.float32(n))


def diffusers(n: int, shift: float, _: int) -> Float32:
    """The reference pipeline's: n times evenly from 1 to 1/n, shifted."""
    # torch.linspace(1, 1/n, n): from both ends to the middle, fused multiply-adds; a double holds the exact product
    end = np.float32(1 / n)
    step = np.float64((end - np.float32(1)) / np.float32(max(n - 1, 1)))
    i = np.arange(n)
    u = np.where((i < n // 2) | (n == 1), 1 + step * i, end - step * (n - 1 - i)).astype(np.float32)
    return _shift(u, shift)


def qwen_image(n: int, _: float, n_positions: int) -> Float32:
    """The pipeline's of Qwen-Image: a shift from the number of patches, then stretched."""
    return shifted_by_size(np.linspace(1, 1 / n, n), qwen_image_mu(n_positions // 4), QWEN_TERMINAL)[:-1]


def lightning(n: int, shift: float, _: int) -> Float32:
    """What Qwen-Image's Lightning models were distilled with: a shift of 3 whatever the size, and no stretching."""
    return shifted_by_size(np.linspace(1, 1 / n, n), math.log(shift))[:-1]


def discrete(n: int, shift: float, _: int) -> Float32:
    """Entries of the table, evenly from the last to the first."""
    step = np.float32(N_TRAIN - 1) / np.float32(max(n - 1, 1))
    return _level(np.float32(N_TRAIN - 1) - step * np.arange(n, dtype=np.float32), shift)


def simple(n: int, shift: float, _: int) -> Float32:
    """Every (1000/n)-th entry of the table, from the last."""
    skipped = np.arange(n, dtype=np.float32) * (np.float32(N_TRAIN) / np.float32(n))
    return _level(np.maximum(N_TRAIN - 1 - np.trunc(skipped), 0), shift)


def sgm_uniform(n: int, shift: float, _: int) -> Float32:
    """Entries of the table, evenly, as if there were one more than n."""
    increment = np.float32(1 - N_TRAIN) / np.float32(n)
    t = np.cumsum(np.append(np.float32(N_TRAIN - 1), np.full(n - 1, increment)), dtype=np.float32)
    return _level(t, shift)


def karras(n: int, shift: float, _: int, rho: float = 7.0) -> Float32:
    """Karras et al. 2022, equation 5."""
    low, high = (s ** np.float32(1 / rho) for s in _ends(shift))
    return _float32((high + _ramp(n) * (low - high)) ** np.float32(rho))


def exponential(n: int, shift: float, _: int) -> Float32:
    """Evenly in the logarithm of sigma."""
    low, high = np.log(_ends(shift))
    return _float32(np.exp(high + _ramp(n) * (low - high)))


def kl_optimal(n: int, shift: float, _: int) -> Float32:
    """Evenly in the arctangent of sigma."""
    low, high = np.arctan(_ends(shift))
    t = _ramp(n)
    return _float32(np.tan(t * low + (1 - t) * high))


def smoothstep(n: int, shift: float, _: int) -> Float32:
    """Entries of the table at u u (3 - 2 u), u evenly from 1."""
    u = _uniform(n)
    return _level(_round(u * u * (3 - 2 * u) * (N_TRAIN - 1)), shift)


def beta(n: int, shift: float, _: int, a: float = 0.6, b: float = 0.6) -> Float32:
    """Lee et al. 2024: noise levels at the quantiles of a beta distribution."""
    t = [math.floor(_beta_quantile(1 - i / n, a, b) * (N_TRAIN - 1) + 0.5) for i in range(n)]
    return _level(sorted(set(t), reverse=True), shift)


def lcm(n: int, shift: float, _: int, n_original: int = 50) -> Float32:
    """The levels on which a latent consistency model was distilled: every 20th."""
    return _level([(n_original - i * n_original // n) * (N_TRAIN // n_original) - 1 for i in range(n)], shift)


def bong_tangent(n: int, shift: float, _: int, pivot: float = 0.6, slope: float = 0.2) -> Float32:
    """Two arctangents, joined at the middle sigma."""
    low, high = _ends(shift)
    middle = low + (high - low) * np.float32(0.5)
    n_all = n + 2
    at = int(np.float32(n_all) * np.float32(pivot))
    slope /= n_all / 40
    first = _arctangent(at, slope, at, high, middle)[:-1]
    second = _arctangent(n_all - at, slope, 0, middle, low)
    joined = np.concatenate([first, second])
    return np.append(joined, np.full(max(n - len(joined), 0), low))[:n]


def flux(n: int, _: float, n_positions: int) -> Float32:
    return _exponential_shift(_uniform(n), _linear_mu(n_positions, 256, 0.5, 4096, 1.15))


def flux2(n: int, _: float, n_positions: int) -> Float32:
    """The empirical shift of FLUX.2: between lines fitted at 10 and at 200 steps."""
    at_200 = 0.00016927 * n_positions + 0.45666666
    at_10 = 8.73809524e-05 * n_positions + 1.89833333
    slope = (at_200 - at_10) / 190
    mu = at_200 if n_positions > 4300 else at_200 - 200 * slope + slope * n
    return _exponential_shift(_uniform(n), mu)


def ltx2(n: int, _: float, n_positions: int, terminal: float = 0.1) -> Float32:
    """LTX-2's: shifted by the picture's size, then stretched to end at `terminal`."""
    values = _exponential_shift(_uniform(n), _linear_mu(n_positions, 1024, 0.95, 4096, 2.05))
    if n > 1:  # stretched so that the last one is `terminal`
        values = 1 - (1 - values) * np.float32((1 - terminal) / (1 - values[-1]))
    return values


def logit_normal(n: int, _: float, n_positions: int, std: float = 1.75) -> Float32:
    """Quantiles of a logit-normal distribution whose middle depends on the picture's size."""
    mu = 0.5 * math.log(n_positions / 1024)
    normal = NormalDist(mu, std)
    logits = [math.inf] + [normal.inv_cdf(1 - i / n) for i in range(1, n)]
    # log SNR is kept within -15 ... 18
    return np.array([1 / (1 + math.exp(-min(max(y, -7.5), 9))) for y in logits], np.float32)


def _exponential_shift(u: Float32, mu: float) -> Float32:
    e = np.float32(math.exp(mu))
    return _float32(e / (e + (1 / u - 1)))


def _linear_mu(x: int, x0: float, y0: float, x1: float, y1: float) -> float:
    return y0 + (x - x0) * (y1 - y0) / (x1 - x0)


def _arctangent(n: int, slope: float, pivot: int, start: np.float32, end: np.float32) -> Float32:
    if n <= 1:
        return np.full(n, start)
    v = np.arctan(-slope * (np.arange(n) - pivot))
    return _float32((v - v[-1]) / (v[0] - v[-1]) * float(start - end) + float(end))


def _round(x: Float32) -> Float32:
    """To the nearest integer, halves up; numpy's rint takes halves to even."""
    return _float32(np.floor(x + np.float32(0.5)))


def _beta_quantile(p: float, a: float, b: float) -> float:
    """The x where the regularised incomplete beta function I_x(a, b) is p, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        x = (low + high) / 2
        low, high = (x, high) if _beta_cdf(x, a, b) < p else (low, x)
    return high


def _beta_cdf(x: float, a: float, b: float) -> float:
    """I_x(a, b) by its continued fraction (Lentz), which converges fast below (a + 1) / (a + b + 2)."""
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta_cdf(1 - x, b, a)
    fraction, c, d = 1.0, 1.0, 0.0
    for i in range(200):
        m = i // 2
        if i == 0:
            numerator = 1.0
        elif i % 2 == 0:
            numerator = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            numerator = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / (1 + numerator * d)
        c = 1 + numerator / c
        fraction *= c * d
        if abs(c * d - 1) < 1e-12:
            break
    front: float = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)) * x**a * (1 - x) ** b / a
    return front * (fraction - 1)


SCHEDULES: dict[str, Schedule] = {
    "diffusers": diffusers,
    "qwen_image": qwen_image,
    "lightning": lightning,
    "discrete": discrete,
    "normal": discrete,
    "karras": karras,
    "exponential": exponential,
    "sgm_uniform": sgm_uniform,
    "simple": simple,
    "smoothstep": smoothstep,
    "kl_optimal": kl_optimal,
    "lcm": lcm,
    "bong_tangent": bong_tangent,
    "ltx2": ltx2,
    "logit_normal": logit_normal,
    "flux2": flux2,
    "flux": flux,
    "beta": beta,
}
