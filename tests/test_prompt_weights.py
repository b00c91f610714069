"""models.prompt_weights: what stable-diffusion.cpp makes of brackets in a prompt."""

from __future__ import annotations

import numpy as np
import pytest

from models.prompt_weights import apply_weights, parse


# All expectations were printed by parse_prompt_attention of stable-diffusion.cpp 0.4.7; 20,000 random prompts were
# compared with it in the same way.
@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("", [("", 1.0)]),
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("[[unbalanced", [("unbalanced", 1 / 1.21)]),
        (r"\(literal\]", [(r"(literal\]", 1.0)]),
        (r"a \) \[ \\ b", [(r"a \) \[ \\ b", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
        ("é:0.5)cat", [("écat", 1.0)]),
        ("a) b] c", [("a) b] c", 1.0)]),
        ("(x:+.5)", [("x", 0.5)]),
        ("(x:-2)", [("x", -2.0)]),
        ("(x:1.2.3)", [("x", 1.2)]),
        ("ratio 16:9 Bed", [("ratio 16:9 Bed", 1.0)]),
        ("(a BREAK b:1.3)", [("a ", 1.3), ("BREAK", -1.3), (" b", 1.3)]),
        ("aBREAK, BREAKS", [("a", 1.0), ("BREAK", -1.0), (", BREAKS", 1.0)]),
        ("(猫:1.3) ネコ", [("猫", 1.3), (" ネコ", 1.0)]),
    ],
)
def test_parse(prompt: str, pieces: list[tuple[str, float]]) -> None:
    ours = parse(prompt)
    assert [text for text, _ in ours] == [text for text, _ in pieces]
    assert [w for _, w in ours] == pytest.approx([w for _, w in pieces], rel=1e-6)


def test_a_weight_is_a_number() -> None:
    with pytest.raises(ValueError, match=r"weight '\.', which is no number"):
        parse("(x:.)")
    assert parse("x:.)") == [("x", 1.0)]


def test_weights_scale_rows_and_keep_the_mean() -> None:
    hidden = np.array([[1, 2], [3, 4], [5, 9]], np.float32)
    out = apply_weights(hidden, [1, 2, 0.5])
    assert out.dtype == np.float32
    assert out.mean() == pytest.approx(hidden.mean(), rel=1e-6)
    # by hand: rows (1, 2), (6, 8), (2.5, 4.5) sum to 24, as before
    np.testing.assert_allclose(out, [[1, 2], [6, 8], [2.5, 4.5]], rtol=1e-6)
    np.testing.assert_allclose(apply_weights(hidden, [2, 2, 2]), hidden, rtol=1e-6)


def test_weights_of_one_change_nothing() -> None:
    hidden = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    np.testing.assert_array_equal(apply_weights(hidden, [1.0] * 5), hidden)


def test_a_mean_of_zero_is_left_alone() -> None:
    hidden = np.array([[1], [1]], np.float32)
    np.testing.assert_array_equal(apply_weights(hidden, [1, -1]), [[1], [-1]])


def test_one_weight_for_each_row() -> None:
    with pytest.raises(ValueError, match="3 rows of text features, but 2 weights"):
        apply_weights(np.ones((3, 2), np.float32), [1, 2])
