"""Configs that are read from files: shapes, names and settings that do not fit are a LoadError, and found at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tiny_models import write_tiny_models, write_tiny_qwen

import models
from loader import LoadError
from pyggml import Backend

Tensors = dict[str, NDArray[Any]]
WRITERS: dict[str, Callable[[Path], dict[str, Path]]] = {"z_image": write_tiny_models, "qwen_image": write_tiny_qwen}


def loads(files: dict[str, Path], backend: Backend) -> str:
    """What becomes of them, within seconds: "loads" or the LoadError's text."""
    start = time.monotonic()
    try:
        models.load(**files, backend=backend, encoder=True).close()
        return "loads"
    except LoadError as error:
        return str(error)
    finally:
        assert time.monotonic() - start < 20


def flat(array: NDArray[Any]) -> NDArray[Any]:
    return array.reshape(-1)


def first(array: NDArray[Any]) -> NDArray[Any]:
    return array.reshape(-1)[:1]


@pytest.mark.parametrize("change", [flat, first], ids=["flat", "one number"])
@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize("part", ["diffusion_model", "llm", "vae"])
def test_shapes(family: str, part: str, change: Any, backend: Backend, tmp_path: Path) -> None:
    """Each tensor in turn, as a file of another model would have it."""
    files = WRITERS[family](tmp_path)
    path = files[part] if files[part].is_file() else files[part] / "model.safetensors"
    tensors = load_file(path)
    assert loads(files, backend) == "loads"
    for name in first_of_each_kind(tensors):
        changed = np.ascontiguousarray(change(tensors[name]))
        # Sides of 1 are nothing to ggml.
        used = ".time_conv." not in name and name != "norm.weight"
        if used and changed.shape != tensors[name].squeeze().shape:
            save_file({**tensors, name: changed}, path)
            assert loads(files, backend) != "loads", name


def first_of_each_kind(tensors: Tensors) -> list[str]:
    """Blocks are alike: of names that differ in a number only, the first."""
    kinds: dict[str, str] = {}
    for name in sorted(tensors):
        kinds.setdefault("".join(c for c in name if not c.isdigit()), name)
    return list(kinds.values())


@pytest.mark.parametrize("number", ["999999999999", "-1", "x", "7"])
@pytest.mark.parametrize(("family", "part"), [("z_image", "diffusion_model"), ("z_image", "llm"),
                                              ("qwen_image", "diffusion_model"), ("qwen_image", "llm")])  # fmt: skip
def test_numbers_of_blocks(family: str, part: str, number: str, backend: Backend, tmp_path: Path) -> None:
    """A name says that there are many more blocks than the file has: nothing is built for them."""
    files = WRITERS[family](tmp_path)
    path = files[part] if files[part].is_file() else files[part] / "model.safetensors"
    tensors = load_file(path)
    known = next(name for name in sorted(tensors) if "layers.0." in name or name.startswith("transformer_blocks.0."))
    save_file({**tensors, known.replace(".0.", f".{number}.", 1): tensors[known]}, path)
    found = loads(files, backend)
    assert found != "loads", known
    if number.isdigit():
        assert f"number {number}" in found, found
