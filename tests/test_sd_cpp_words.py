"""How stable-diffusion.cpp 0.4.7 divides prompts: expected are what its source says, and tests/peer draws some."""

from __future__ import annotations

import random

import pytest

from models.sd_cpp_words import split, split_words
from models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def qwen2() -> Tokenizer:
    return Tokenizer.qwen2()


@pytest.mark.parametrize(
    "text",
    ["a red circle on a blue background", "blurry, low quality", "赤い円と青い背景、水彩画 🦊", "un café noir — tables",
     "It's 1234 o'clock... (almost)", "x\n", "\ny", "a (red:1.6) [[blue]]", ""],
)  # fmt: skip
def test_plain_prompts_are_divided_as_by_qwen2(qwen2: Tokenizer, text: str) -> None:
    assert qwen2.with_split(split).encode(text) == qwen2.encode(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a  b", ["a", "  ", "b"]),
        ("IT'S I'VE we'd", ["IT", "'s", " I", "'ve", " we", "'d"]),
        ("a\n\n\tb", ["a", "\n\n\t", "\tb"]),
        ("a \n \n b", ["a", " \n ", " \n ", " b"]),
        ("12³", ["1", "2", "³"]),
        ("e\u0301", ["e", "\u0301"]),
        ("a ", ["a", " "]),
        ("wait...\n\nnow", ["wait", "...\n\n", "now"]),
        ("\u3000円", ["\u3000円"]),
    ],
)
def test_where_it_differs(text: str, words: list[str]) -> None:
    assert split_words(text) == words


def test_loses_no_character() -> None:
    """But doubles blanks after line breaks."""
    rng = random.Random(0)
    alphabet = "ab1 '\t.,-(é漢🦊\u0301\u00a0SsTtrevE"
    for _ in range(500):
        text = "".join(rng.choices(alphabet, k=rng.randrange(20)))
        assert "".join(split_words(text)).lower() == text.lower()
