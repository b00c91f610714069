"""Prompt weighting as stable-diffusion.cpp does it, for `--compat sd.cpp`; diffusers has none.

AUTOMATIC1111's syntax, with the peculiarities of stable-diffusion.cpp 0.4.7:

    (x)       times 1.1, nested ones multiply         [x]    divided by 1.1
    (x:1.3)   times 1.3                               \\(    a literal (
    BREAK     the word, with weight -1                \\) \\[ \\] \\\\ keep their backslash

A bracket left open counts to the end; a `:1.2)` without an opening bracket disappears, a `)` or `]` without one stays.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_TOKEN = re.compile(
    r"\\\(|\\\)|\\\[|\\\]|\\\\|\\|\(|\[|:([+-]?[.\d]+)\)|\)|\]|\bBREAK\b|[^\\()\[\]:B]+|:|\bB", re.ASCII
)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)", re.ASCII)
_ROUND = np.float32(1.1)
_SQUARE = np.float32(1) / np.float32(1.1)


def parse(prompt: str) -> list[tuple[str, float]]:
    """The prompt in pieces with their weights; neighbours differ in weight. An empty prompt is [("", 1.0)].

    Raises ValueError for a weight that is no number, such as in "(x:.)".
    """
    texts: list[str] = []
    weights: list[np.float32] = []
    open_round: list[int] = []
    open_square: list[int] = []

    def multiply(start: int, factor: np.float32) -> None:
        weights[start:] = [w * factor for w in weights[start:]]

    rest = prompt
    # each search begins on a string of its own, so the start of what is left counts as the start of a word
    while match := _TOKEN.search(rest):
        rest = rest[match.end() :]
        token, weight = match[0], match[1]
        if token == "(":
            open_round.append(len(texts))
        elif token == "[":
            open_square.append(len(texts))
        elif weight:
            if open_round:
                if not (number := _NUMBER.match(weight)):
                    raise ValueError(f"the prompt gives the weight {weight!r}, which is no number")
                multiply(open_round.pop(), np.float32(number[0]))
        elif token == ")" and open_round:
            multiply(open_round.pop(), _ROUND)
        elif token == "]" and open_square:
            multiply(open_square.pop(), _SQUARE)
        else:
            texts.append("(" if token == r"\(" else token)
            weights.append(np.float32(-1 if token == "BREAK" else 1))
    for start in open_round:
        multiply(start, _ROUND)
    for start in open_square:
        multiply(start, _SQUARE)

    pieces: list[tuple[str, float]] = []
    for text, w in zip(texts, weights, strict=True):
        if pieces and pieces[-1][1] == float(w):
            pieces[-1] = (pieces[-1][0] + text, float(w))
        else:
            pieces.append((text, float(w)))
    return pieces or [("", 1.0)]


def apply_weights(hidden: NDArray[np.float32], weights: Sequence[float]) -> NDArray[np.float32]:
    """Text features [n_tokens, dim] with each row times its token's weight, then all scaled back to the old mean.

    With all weights 1 the result equals the input. Raises ValueError when the lengths differ.
    """
    if len(hidden) != len(weights):
        raise ValueError(f"{len(hidden)} rows of text features, but {len(weights)} weights")
    if all(w == 1 for w in weights):
        return hidden
    weighted: NDArray[np.float32] = hidden * np.asarray(weights, np.float32)[:, None]
    mean, new_mean = hidden.mean(dtype=np.float64), weighted.mean(dtype=np.float64)
    return weighted * np.float32(mean / new_mean) if new_mean else weighted
