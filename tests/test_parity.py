"""Pictures of ours and of stable-diffusion.cpp; see tests/peer/parity.py for what it needs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from peer import checkpoints, parity


@pytest.mark.peer
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("settings", [parity.SETTINGS, parity.QWEN_IMAGE_SETTINGS], ids=["z_image", "qwen_image"])
def test_pictures_agree(settings: tuple[parity.Setting, ...]) -> None:
    python, folder = os.environ.get("PYGGML_PEER_PYTHON"), os.environ.get("PYGGML_PEER_CKPT")
    if not python or not folder:
        pytest.skip("needs PYGGML_PEER_PYTHON and PYGGML_PEER_CKPT")
    files = parity.checkpoint_files(Path(folder), settings)
    rows = parity.compare_all(python, files, settings, Path(folder) / "pictures", n_threads=1)
    assert len(rows) >= 12
    assert all(r.std > 10 and r.clipped < 0.25 for r in rows), "these pictures show little"
    assert {r.setting.name: r.psnr for r in rows if r.psnr < r.setting.enough} == {}


# -- without the peer ------------------------------------------------------------------------------------------------


def test_settings_cover_what_they_must() -> None:
    s = parity.SETTINGS
    assert len(s) >= 12 and len({x.name for x in s}) == len(s)
    assert len({x.method for x in s}) >= 6
    assert {x.rng for x in s} == {"cuda", "cpu"} and {x.weights for x in s} == {"f16", "q8_0"}
    assert any(x.init for x in s) and any(not x.prompt.isascii() for x in s)
    assert {x.lora_mode for x in s if x.loras} == {"auto", "at_runtime", "immediately"}
    assert {name for x in s for name, _ in x.loras} == set(checkpoints.LORAS)
    assert any(x.width % 16 or x.height % 16 for x in s) and any(x.cfg > 1 and x.negative for x in s)


def test_settings_of_qwen_image_cover_what_they_must() -> None:
    s = parity.QWEN_IMAGE_SETTINGS
    assert len(s) >= 8 and len({x.name for x in s}) == len(s) and {x.model for x in s} == {"qwen_image"}
    assert {x.weights for x in s} == {"f16", "q8_0"} and {len(x.references) for x in s} == {0, 1, 2}
    assert any(x.zero_cond_t for x in s if x.references) and any(not x.tower for x in s if x.references)
    assert any(x.init for x in s) and any(x.cfg > 1 and x.negative for x in s if x.references)
    assert any(x.width % 16 or x.height % 16 for x in s) and all(x.enough >= 38 for x in s)


def test_psnr() -> None:
    a = np.zeros((4, 4, 3), np.uint8)
    assert parity.psnr(a, a) == 99
    assert parity.psnr(a, a + 255) == 0
    assert parity.psnr(a, a + 1) == pytest.approx(20 * np.log10(255))
