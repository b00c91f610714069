"""The check of the demo checkpoint must tell right pictures from wrong ones, whatever drew them."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_pictures", ROOT / "tools" / "demo_pictures.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("size", [64, 128])
def test_drawn_pictures_are_right(world: ModuleType, size: int) -> None:
    rng = random.Random(size)
    right = 0
    for _ in range(200):
        scene = world.draw_scene(rng)
        prompt = world.write_prompt(scene, rng)
        assert world.read_prompt(prompt) == scene
        right += world.check(prompt, world.draw_picture(scene, rng, size))["all"]
    assert right >= 198


def test_pictures_of_something_else_are_wrong(world: ModuleType) -> None:
    rng = random.Random(1)
    for _ in range(200):
        scene, other = world.draw_scene(rng), world.draw_scene(rng)
        result = world.check(world.write_prompt(scene, rng), world.draw_picture(other, rng))
        same = [(t.shape, t.colour, t.place or "centre") for t in scene.things] == [
            (t.shape, t.colour, t.place or "centre") for t in other.things
        ] and scene.ground == other.ground
        assert result["all"] == same


@pytest.mark.parametrize(
    ("prompt", "drawn", "wrong"),
    [
        ("a red circle on blue", "a red circle on green", {"background"}),
        ("a red circle on blue", "an orange circle on blue", {"colour"}),
        ("a red circle on blue", "a red ring on blue", {"shape"}),
        ("a red circle on blue", "a red circle at the top left on blue", {"place"}),
        ("a red star and a white square", "a white square and a red star", {"colour", "shape"}),
        ("a red star", "a red star and a red star", {"count", "colour", "shape", "place", "size"}),
    ],
)
def test_what_is_wrong_is_named(world: ModuleType, prompt: str, drawn: str, wrong: set[str]) -> None:
    picture = world.draw_picture(world.read_prompt(drawn), random.Random(0))
    result = world.check(prompt, picture)
    assert {name for name, right in result.items() if not right} - {"all"} == wrong
    assert not result["all"]


def test_noise_and_blank_pictures_are_wrong(world: ModuleType) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for picture in (noise, np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)):
        assert not world.check("a white circle on black", picture)["all"]
        assert not world.check("a black star on white", picture)["all"]


def test_held_out_prompts_are_held_out_and_stable(world: ModuleType) -> None:
    prompts = world.heldout_prompts(50, seed=3)
    assert len(set(prompts)) == 50 and prompts == world.heldout_prompts(50, seed=3)
    assert all(world.is_held_out(world.read_prompt(p)) for p in prompts)
    rng = random.Random(0)
    share = np.mean([world.is_held_out(world.draw_scene(rng)) for _ in range(4000)])
    assert 0.1 < share < 0.3


def test_text_that_is_no_scene_is_refused(world: ModuleType) -> None:
    for prompt in ("a cat", "a circle", "", "a red circle and a blue star and a green ring"):
        with pytest.raises(ValueError):
            world.read_prompt(prompt)
