"""Gaussian noise as the reference implementations draw it, so that a seed means the same picture everywhere.

    PhiloxRNG           `--rng cuda`: torch on a CUDA device, as AUTOMATIC1111 and stable-diffusion.cpp imitate it
    MersenneTwisterRNG  `--rng cpu`: torch on the CPU, as diffusers scripts and ComfyUI use it

Both fill an array in memory order (last axis fastest), so a latent of shape [16, H, W] gets the numbers that torch
gives to one of shape (1, 16, H, W).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Shape = int | tuple[int, ...]


class RNG(Protocol):
    """A source of noise. Calls advance it: the second call gives other numbers than the first."""

    def randn(self, shape: Shape) -> Float32:
        """Independent standard normal values, float32."""
        ...


def make_rng(name: str, seed: int) -> RNG:
    """The generator called `name` on the command line ("cuda" or "cpu"), seeded with 0 <= seed < 2**64."""
    if name not in RNGS:
        raise ValueError(f"unknown random generator {name!r}: choose from {', '.join(RNGS)}")
    return RNGS[name](seed)


# -- cuda ------------------------------------------------------------------------------------------------------------

_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)
_BLOCK = 8192  # counters at a time: the working set stays in the cache
_INV_2_32 = np.float32(2.3283064e-10)
_INV_2_32_TAU = np.float32(2.3283064e-10) * np.float32(6.2831855)


class PhiloxRNG:
    """Philox 4x32-10 (Salmon et al. 2011) with one counter per value and Box-Muller.

    Value i of call c is made from the counter (c, 0, i, 0) and the key `seed`, whatever was drawn before; so the values
    do not depend on the size of a call. Real CUDA devices agree while a tensor has at most one value per thread.
    """

    def __init__(self, seed: int) -> None:
        self.seed = _checked(seed)
        self.calls = 0

    def randn(self, shape: Shape) -> Float32:
        """Independent standard normal values, float32."""
        n = math.prod(shape) if isinstance(shape, tuple) else shape
        values = np.empty(n, np.float32)
        for start in range(0, n, _BLOCK):
            g0, g1 = self._words(start, min(_BLOCK, n - start))
            u = g0.astype(np.float32) * _INV_2_32 + _INV_2_32 / 2
            v = g1.astype(np.float32) * _INV_2_32_TAU + _INV_2_32_TAU / 2
            values[start : start + _BLOCK] = np.sqrt(np.float32(-2) * np.log(u)) * np.sin(v)
        self.calls += 1
        return values.reshape(shape)

    def _words(self, start: int, n: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """The first two of the four output words of the counters start ... start + n - 1."""
        k0, k1 = self.seed & 0xFFFFFFFF, self.seed >> 32
        # round 1, in which three of the four counter words are the same for all
        p = (self.calls & 0xFFFFFFFF) * _PHILOX_M[0]
        q = np.arange(start, start + n, dtype=np.uint64) * np.uint64(_PHILOX_M[1])
        c0, c1 = (q >> _HIGH) ^ np.uint64(k0), q & _LOW
        c2, c3 = np.full(n, p >> 32 ^ k1, np.uint64), np.full(n, p & 0xFFFFFFFF, np.uint64)
        high = np.empty(n, np.uint64)
        for _ in range(8):
            k0, k1 = (k0 + _PHILOX_W[0]) & 0xFFFFFFFF, (k1 + _PHILOX_W[1]) & 0xFFFFFFFF
            c0 *= np.uint64(_PHILOX_M[0])
            c2 *= np.uint64(_PHILOX_M[1])
            c1 ^= np.right_shift(c2, _HIGH, out=high)
            c1 ^= np.uint64(k0)
            c3 ^= np.right_shift(c0, _HIGH, out=high)
            c3 ^= np.uint64(k1)
            c0 &= _LOW
            c2 &= _LOW
            c0, c1, c2, c3 = c1, c2, c3, c0
        # round 10, of which only half is wanted
        c2 *= np.uint64(_PHILOX_M[1])
        return (c2 >> _HIGH) ^ c1 ^ np.uint64((k0 + _PHILOX_W[0]) & 0xFFFFFFFF), c2 & _LOW


# -- cpu -------------------------------------------------------------------------------------------------------------


class MersenneTwisterRNG:
    """MT19937 (Matsumoto and Nishimura 1998), turned into normal values in the way of torch's CPU generator.

    The words and, below 16 values, the results are torch's to the bit. From 16 values on they are within 5e-7 (3 units
    in the last place, 86 % equal) of torch on AVX2, measured over 262,144 values: torch has its own vector log, sin and
    cos, and its plain build (2e-6 away, it rounds the angle elsewhere) disagrees with its AVX2 build on 38 % of them.
    Only the low 32 bits of the seed count.
    """

    def __init__(self, seed: int) -> None:
        # RandomState's integer seeding is Knuth's initialisation, the one torch uses
        self._words = np.random.RandomState(_checked(seed) & 0xFFFFFFFF)
        self._spare: float | None = None

    def randn(self, shape: Shape) -> Float32:
        """Independent standard normal values, float32."""
        n = math.prod(shape) if isinstance(shape, tuple) else shape
        if n < 16:
            return np.array([self._one() for _ in range(n)], np.float32).reshape(shape)
        uniform = self._uniform(n)
        blocks = n // 16 * 16
        values = np.empty(n, np.float32)
        values[:blocks] = _box_muller_16(uniform[:blocks])
        if n > blocks:
            # torch draws the last sixteen again rather than drawing a short block
            values[-16:] = _box_muller_16(self._uniform(16))
        return values.reshape(shape)

    def _draw(self, n: int) -> NDArray[np.uint32]:
        return self._words.randint(0, 2**32, n, dtype=np.uint32)

    def _uniform(self, n: int) -> Float32:
        uniform: Float32 = np.ldexp((self._draw(n) & np.uint32(0xFFFFFF)).astype(np.float32), -24)
        return uniform

    def _one(self) -> float:
        """One value of the double precision path that torch takes below 16 values; the partner waits for the next."""
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        high1, low1, high2, low2 = (int(word) for word in self._draw(4))
        u1 = ((high1 << 32 | low1) & (2**53 - 1)) / 2**53
        u2 = ((high2 << 32 | low2) & (2**53 - 1)) / 2**53
        r, theta = math.sqrt(-2 * math.log1p(-u2)), 2 * math.pi * u1
        self._spare = r * math.sin(theta)
        return r * math.cos(theta)


def _box_muller_16(uniform: Float32) -> Float32:
    """Box-Muller on blocks of sixteen: the first eight of a block give radii, the last eight angles."""
    u1, u2 = uniform.reshape(-1, 2, 8)[:, 0], uniform.reshape(-1, 2, 8)[:, 1]
    r = np.sqrt(np.float32(-2) * np.log(np.float32(1) - u1))
    theta = np.float32(2 * math.pi) * u2
    values: Float32 = np.stack([r * np.cos(theta), r * np.sin(theta)], 1).reshape(-1)
    return values


def _checked(seed: int) -> int:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed} is outside 0 ... 2**64 - 1")
    return seed


RNGS: dict[str, Callable[[int], RNG]] = {"cuda": PhiloxRNG, "cpu": MersenneTwisterRNG}
