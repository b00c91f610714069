"""The tiny random models of tests/golden as files, so that tests go through the loader like everybody else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent / "golden"
PARTS = {"diffusion_model": "z_image_transformer", "llm": "qwen3", "vae": "autoencoder_kl"}


@cache
def golden(name: str) -> Mapping[str, Any]:
    """The arrays of tests/golden/<name>.npz."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def write_tiny_models(folder: Path, changed: Mapping[str, NDArray[np.float32]] | None = None) -> dict[str, Path]:
    """A model of three files, as keyword arguments of `models.load`; its tokenizer lies beside the text encoder.

    changed: "part/tensor" -> what that tensor holds instead.
    """
    changed = dict(changed or {})
    paths = {}
    for part, name in PARTS.items():
        tensors = {k.removeprefix("weights/"): v for k, v in golden(name).items() if k.startswith("weights/")}
        for key in [k for k in changed if k.startswith(f"{part}/")]:
            tensor = key.removeprefix(f"{part}/")
            assert tensor in tensors, key
            tensors[tensor] = changed.pop(key)
        paths[part] = folder / part / "model.safetensors"
        paths[part].parent.mkdir(parents=True, exist_ok=True)
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, paths[part])
    assert not changed, f"no such parts: {list(changed)}"
    config = json.loads(str(golden("qwen3")["config"]))
    (folder / "llm" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "llm" / "tokenizer.json").write_text(str(golden("pipeline")["tokenizer"]), encoding="utf-8")
    return paths


def weight(part: str, tensor: str) -> NDArray[np.float32]:
    """A copy of one tensor of the tiny models."""
    return np.array(golden(PARTS[part])[f"weights/{tensor}"], np.float32)


def write_tiny_qwen(
    folder: Path, *, layered: bool = False, tower: bool = True, more: Mapping[str, NDArray[Any]] | None = None
) -> dict[str, Path]:
    """The Qwen-Image that tests/golden/qwen_pipeline.npz recorded, as keyword arguments of `models.load`. `tower`:
    with the vision tower beside the language model. more: tensors of the transformer's file besides.
    """
    recorded = golden("qwen_pipeline")

    def taken(arrays: Mapping[str, Any], prefix: str = "weights/") -> dict[str, Any]:
        return {k.removeprefix(prefix): np.ascontiguousarray(v) for k, v in arrays.items() if k.startswith(prefix)}

    dit = taken(golden("qwen_image_transformer")) | taken(recorded) | dict(more or {})
    vae, vl = taken(golden("autoencoder_qwen")), taken(golden("qwen25_vl"))
    if layered:
        dit |= taken(recorded, "layered/weights/")
        vae |= taken(recorded, "layered/vae/")
    vl = {k: v for k, v in vl.items() if tower or not k.startswith("visual.")}
    parts = {"diffusion_model": dit, "llm": {f"model.{k}": v for k, v in vl.items()}, "vae": vae}
    paths = {part: folder / part / "model.safetensors" for part in parts}
    for part, tensors in parts.items():
        paths[part].parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, paths[part])
    (folder / "llm" / "config.json").write_text(str(golden("qwen25_vl")["config"]), encoding="utf-8")
    (folder / "llm" / "tokenizer.json").write_text(str(recorded["tokenizer"]), encoding="utf-8")
    return paths | {"llm": folder / "llm"}  # with its config.json


def as_options(files: Mapping[str, Path]) -> list[str]:
    """Such files on the command line."""
    return [x for name, path in files.items() for x in (f"--{name.replace('_', '-')}", str(path))]


def write_tiny_decoder(path: Path, kind: str) -> Path:
    """The tiny autoencoder "taesd" or "taehv" of tests/golden as a file."""
    prefix = f"weights/{kind}/"
    tensors = {k.removeprefix(prefix): v for k, v in golden("autoencoder_tiny").items() if k.startswith(prefix)}
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)
    return path
