"""The golden files are what their script makes, and are what their readers rely on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"
NAMES = (
    "z_image_transformer", "qwen3", "autoencoder_kl", "autoencoder_tiny", "qwen_image_transformer", "qwen25_vl",
    "autoencoder_qwen", "schedules", "qwen_schedules", "qwen_references", "noise", "pipeline",
    "qwen_pipeline",
)  # fmt: skip


def load_script() -> ModuleType:
    for package in ("torch", "diffusers", "transformers"):
        pytest.importorskip(package, reason=f"needs {package}: pip install -e '.[goldens]'")
    spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_derives_again(name: str) -> None:
    derived = load_script().derive(name)
    with np.load(GOLDEN / f"{name}.npz") as stored:
        assert sorted(stored.files) == sorted(derived)
        for key in stored.files:
            old, new = stored[key], np.asarray(derived[key])
            assert (old.shape, old.dtype.kind) == (new.shape, new.dtype.kind), key
            if old.dtype.kind == "U":
                assert json.loads(str(old)) == json.loads(str(new)), key
            elif old.dtype.kind != "f" or key.startswith("weights/"):
                np.testing.assert_array_equal(old, new, err_msg=key)
            elif name in ("schedules", "qwen_schedules", "noise"):
                # torch's builds for other processors fuse and round otherwise, see models.rng
                np.testing.assert_allclose(old, new, rtol=0, atol=3e-6 if name == "noise" else 2e-7, err_msg=key)
            else:
                # other versions and machines round differently; a change of meaning is far larger
                assert np.abs(old - new).max() <= 1e-5 * np.abs(old).max(), key


@pytest.mark.parametrize("name", NAMES)
def test_is_small_and_finite(name: str) -> None:
    path = GOLDEN / f"{name}.npz"
    assert path.stat().st_size < 600_000
    with np.load(path) as stored:
        for key in stored.files:
            if stored[key].dtype.kind == "f":
                assert np.isfinite(stored[key]).all() and stored[key].dtype == np.float32, key


@pytest.mark.parametrize("name", NAMES[:6])
def test_weights_are_exact_in_f16_and_bf16(name: str) -> None:
    with np.load(GOLDEN / f"{name}.npz") as stored:
        keys = [k for k in stored.files if k.startswith("weights/")]
        assert keys
        for key in keys:
            w = stored[key]
            np.testing.assert_array_equal(w.astype(np.float16).astype(np.float32), w, err_msg=key)
            assert not (w.view(np.uint32) & 0xFFFF).any(), key
            assert np.unique(w).size > 1, f"{key} is constant"
