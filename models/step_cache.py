"""Step caches: evaluations of the transformer that are not made, because those before them say nearly as much.

- `EasyCache` (Zhou et al. 2025, arXiv 2507.02860) looks at the whole network: how much its output moves for each
  movement of its input is measured when it is computed; until the sum of the movements since then reaches a threshold,
  the output less the input of that time is added to the input.
- `DBCache` (Dual Block Cache, of the project cache-dit) computes the first blocks always. When what they add to their
  input has hardly changed since the blocks behind them were computed, what those added then is added again, or, with
  `order`, extrapolated.
- `TaylorSeer` (Liu et al. 2025, arXiv 2503.06923) asks nothing: after some steps that are all computed, a fixed number
  is extrapolated between two that are computed; here it extrapolates the network's output.

The settings are frozen and may be used for many pictures; `begin` makes what remembers one picture. An evaluation with
the prompt and one with the negative prompt are two branches. Methods with several evaluations a step ask for each.
Extrapolation goes over the noise level, so that uneven schedules and evaluations within a step come out right; on even
ones it is the paper's, which counts steps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Velocity = Callable[["Blocks | None"], Float32]  # computes, the middle blocks as `Blocks` says


@dataclass(frozen=True, kw_only=True)
class StepCache(ABC):
    """What the settings have in common. `mask`: for each step, whether it is computed whatever else says; the others
    may be skipped, or with `static` are, wherever there is something to go on. Steps beyond it are as without.
    """

    mask: tuple[bool, ...] = ()
    static: bool = False

    def check(self, n_blocks: int) -> None:
        """ValueError unless it works with a network of that many blocks."""
        return

    @abstractmethod
    def begin(self, n_steps: int) -> CacheRun:
        """What remembers one picture that takes `n_steps`."""


@dataclass(frozen=True)
class EasyCache(StepCache):
    """threshold: relative movement of the output, summed up; 0 skips nothing. start, end: the share of the steps before
    which, and from which on, all are computed.
    """

    threshold: float = 0.2
    start: float = 0.15
    end: float = 0.95

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"start and end of the cache must be 0 <= start < end <= 1, not {self.start}, {self.end}")

    def begin(self, n_steps: int) -> CacheRun:
        return _EasyRun(self, n_steps)


@dataclass(frozen=True)
class DBCache(StepCache):
    """front, back: blocks at the beginning and at the end that are always computed; warmup: steps that are, at first;
    threshold: mean change of what the front blocks add, relative to its mean size; 0 skips nothing. order: of the
    extrapolation, 0 for none.
    """

    front: int = 8
    back: int = 0
    threshold: float = 0.08
    warmup: int = 8
    order: int = 0

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)
        _check_steps(self.warmup, self.order)
        if self.front < 1 or self.back < 0:
            raise ValueError(f"the cache wants at least one front block (Fn), no fewer than 0 back blocks (Bn): {self}")

    def check(self, n_blocks: int) -> None:
        if self.front + self.back >= n_blocks:
            raise ValueError(
                f"the network has {n_blocks} blocks: {self.front} at the front (Fn) and {self.back} at the back (Bn), "
                "which are always computed, leave none to skip; give fewer"
            )

    def begin(self, n_steps: int) -> CacheRun:
        return _BlockRun(self, n_steps)

    def cuts(self, n_blocks: int) -> tuple[Cut, Cut, Cut]:
        """Front, middle and back of a network of that many blocks."""
        front, back = self.front, n_blocks - self.back
        return (Cut(0, front, first=True, last=False), Cut(front, back, first=False, last=False),
                Cut(back, n_blocks, first=False, last=True))  # fmt: skip

    def n_bytes(self, fronts: Sequence[Mapping[str, int]]) -> int:
        """What is held at most: what each branch remembers, and what one of them is about to learn.

        fronts: for each branch, bytes of each output of the front blocks.
        """
        changes = [front["change"] for front in fronts]
        states = [sum(front.values()) - front["change"] for front in fronts]
        remembered = sum(changes) + (self.order + 1) * sum(states)
        return remembered + max(changes) + (self.order + 3) * max(states)  # also where middle blocks begin and end


@dataclass(frozen=True)
class TaylorSeer(StepCache):
    """order: of the extrapolation; warmup: steps that are all computed at first; interval: steps that are extrapolated
    after each one that is computed. The last step is computed.
    """

    order: int = 1
    warmup: int = 8
    interval: int = 1

    def __post_init__(self) -> None:
        _check_steps(self.warmup, self.order)
        if self.interval < 1:
            raise ValueError(f"the cache's interval must be at least 1, not {self.interval}")

    def begin(self, n_steps: int) -> CacheRun:
        return _TaylorRun(self, n_steps)


class CacheRun(ABC):
    """A cache during one picture. `step` counts the steps that are done; `counts` is for the report."""

    def __init__(self, settings: StepCache, n_steps: int) -> None:
        self._mask, self._static, self.n_steps = settings.mask, settings.static, n_steps
        self.step = 0
        self.counts = dict.fromkeys(("steps", "steps_skipped", "evaluations", "evaluations_skipped"), 0)
        self._in_step: list[bool] = []  # of each evaluation, whether it was skipped

    @abstractmethod
    def evaluate(self, branch: int, x: Float32, sigma: float, compute: Velocity) -> Float32:
        """The velocity at x, of x's shape, computed or not. Branch 0 is asked first wherever others are asked too."""

    def end_step(self) -> None:
        """Called after each step."""
        self.step += 1
        self.counts["steps"] += 1
        self.counts["steps_skipped"] += bool(self._in_step) and all(self._in_step)
        self._in_step.clear()

    def count(self, skipped: bool) -> None:
        """An evaluation was made, or not."""
        self.counts["evaluations"] += 1
        self.counts["evaluations_skipped"] += skipped
        self._in_step.append(skipped)

    def by_mask(self) -> bool | None:
        """Whether the mask has this step computed (False) or skipped (True); None where it leaves that open."""
        if self.step >= len(self._mask):
            return None
        return False if self._mask[self.step] else True if self._static else None


class _EasyRun(CacheRun):
    def __init__(self, settings: EasyCache, n_steps: int) -> None:
        super().__init__(settings, n_steps)
        self._threshold = settings.threshold
        self._active = range(int(settings.start * n_steps), int(settings.end * n_steps))
        self._offsets: dict[int, Float32] = {}  # output less input, of each branch when it was computed last
        self._computed: tuple[Float32, Float32] | None = None  # input and output of branch 0 then
        self._last: tuple[Float32, Float32] | None = None  # and of the evaluation before this one
        self._rate: float | None = None  # movement of the output for each of the input
        self._moved = 0.0
        self._skip = False

    def evaluate(self, branch: int, x: Float32, sigma: float, compute: Velocity) -> Float32:
        if branch == 0:
            self._skip = self._decide(x)
        skipped = self._skip and branch in self._offsets
        self.count(skipped)
        if skipped:
            v = x + self._offsets[branch]
        else:
            v = compute(None)
            self._offsets[branch] = v - x
        if branch == 0:
            if not skipped:
                self._measure(x, v)
            self._last = x, v
        return v

    def _decide(self, x: Float32) -> bool:
        by_mask = self.by_mask()
        if by_mask is not None:
            return by_mask
        if self._last is None or self._rate is None or self.step not in self._active:
            return False
        size = _mean(self._last[1])
        self._moved += self._rate * _mean(x - self._last[0]) / size if size else math.inf
        return self._moved < self._threshold

    def _measure(self, x: Float32, v: Float32) -> None:
        self._moved = 0.0
        if self._computed is not None and (moved := _mean(x - self._computed[0])):
            self._rate = _mean(v - self._computed[1]) / moved
        self._computed = x, v


class _TaylorRun(CacheRun):
    def __init__(self, settings: TaylorSeer, n_steps: int) -> None:
        super().__init__(settings, n_steps)
        self._settings = settings
        self._series: dict[int, Taylor] = {}

    def evaluate(self, branch: int, x: Float32, sigma: float, compute: Velocity) -> Float32:
        series = self._series.setdefault(branch, Taylor(self._settings.order))
        skipped = series.known and self._decide()
        self.count(skipped)
        if skipped:
            return series.at(sigma)
        v = compute(None)
        series.learn(v, sigma)
        return v

    def _decide(self) -> bool:
        by_mask, of = self.by_mask(), self._settings
        if by_mask is not None:
            return by_mask
        after = self.step - of.warmup
        return after >= 0 and after % (of.interval + 1) < of.interval and self.step < self.n_steps - 1


class _BlockRun(CacheRun):
    def __init__(self, settings: DBCache, n_steps: int) -> None:
        super().__init__(settings, n_steps)
        self._settings = settings
        self._branches: dict[int, Blocks] = {}

    def evaluate(self, branch: int, x: Float32, sigma: float, compute: Velocity) -> Float32:
        return compute(self._branches.setdefault(branch, Blocks(self, self._settings)))


class Blocks:
    """What one branch remembers of the blocks in the middle of the network.

    Where the blocks are cut, the network is a few arrays by name, tokens of its streams.
    """

    def __init__(self, run: CacheRun, settings: DBCache) -> None:
        self._run, self.settings = run, settings
        self._change: Float32 | None = None  # what the front blocks added when the middle was computed last
        self._added: dict[str, Taylor] = {}

    def added(self, change: Float32, sigma: float) -> Mapping[str, Float32] | None:
        """What the middle blocks would add, after the front ones added `change`; None when they are to be computed."""
        skipped = self._decide(change)
        self._run.count(skipped)
        return {name: series.at(sigma) for name, series in self._added.items()} if skipped else None

    def learn(self, change: Float32, added: Mapping[str, Float32], sigma: float) -> None:
        """They were computed."""
        self._change = change
        for name, value in added.items():
            self._added.setdefault(name, Taylor(self.settings.order)).learn(value, sigma)

    def _decide(self, change: Float32) -> bool:
        if self._change is None:
            return False
        by_mask = self._run.by_mask()
        if by_mask is not None:
            return by_mask
        if self._run.step < self.settings.warmup:
            return False
        return _mean(change - self._change) < self.settings.threshold * _mean(self._change)


class Cut(NamedTuple):
    """A part of a network: its blocks begin ... end - 1, and as the `first` or `last` part what is around the blocks.

    A first part gives what a next one takes, and `change`, what the blocks added to the tokens.
    """

    begin: int
    end: int
    first: bool
    last: bool


class Taylor:
    """A Taylor polynomial over the noise level, whose derivatives are differences of the values it has learned."""

    def __init__(self, order: int) -> None:
        self._order = order
        self._factors: list[Float32] = []  # the value, and its first derivatives
        self._sigma = 0.0

    @property
    def known(self) -> bool:
        return bool(self._factors)

    def learn(self, value: Float32, sigma: float) -> None:
        """A value that comes at the noise level of the one before takes its place."""
        if self._factors and sigma == self._sigma:
            self._factors[0] = value
            return
        factors = [value]
        for old in self._factors[: self._order]:
            factors.append((factors[-1] - old) / np.float32(sigma - self._sigma))
        self._factors, self._sigma = factors, sigma

    def at(self, sigma: float) -> Float32:
        """The value at a noise level, of what was learned."""
        total, h = self._factors[0], sigma - self._sigma
        for k, factor in enumerate(self._factors[1:], start=1):
            total = total + factor * np.float32(h**k / math.factorial(k))
        return total


def parse_mask(text: str) -> tuple[bool, ...]:
    """"1,0,0,1": 1 for steps that are computed. ValueError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if set(parts) - {"0", "1"}:
        raise ValueError(f"a mask of steps is 0s and 1s with commas between them, not {text!r}")
    return tuple(part == "1" for part in parts)


def _mean(x: Float32) -> float:
    return float(np.abs(x).mean(dtype=np.float64))


def _check_threshold(threshold: float) -> None:
    if not 0 <= threshold < math.inf:
        raise ValueError(f"the cache's threshold must be a finite number, not below 0: {threshold}")


def _check_steps(warmup: int, order: int) -> None:
    if warmup < 0 or not 0 <= order <= 4:
        raise ValueError(f"the cache wants warmup not below 0 and an order of 0..4, not {warmup}, {order}")
