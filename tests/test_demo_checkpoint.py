"""The demo checkpoint draws what its prompts say, also in combinations that its training did not contain."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.timeout(1200)  # 60 pictures: 15 s, but minutes on a busy machine
def test_held_out_prompts_are_drawn_right() -> None:
    spec = importlib.util.spec_from_file_location("demo_pictures", ROOT / "tools" / "demo_pictures.py")
    assert spec and spec.loader
    world = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = world
    spec.loader.exec_module(world)
    result = world.evaluate(60, seed=1)
    assert result["all"] >= 0.9, result


def test_recorded_result_and_size() -> None:
    result = json.loads((ROOT / "tools" / "demo_check.json").read_text(encoding="utf-8"))
    assert result["pictures"] == 200 and result["all"] >= 0.9
    files = [p for p in (ROOT / "studio" / "demo").iterdir() if p.suffix in (".gguf", ".safetensors")]
    assert len(files) == 3 and sum(p.stat().st_size for p in files) <= 24e6
