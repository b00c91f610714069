"""Each network against the reference implementation's output on a tiny random model (tests/golden)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loader.checkpoint import Checkpoint, open_checkpoint
from loader.errors import LoadError
from loader.params import load_params
from models import autoencoder_kl, autoencoder_tiny, qwen3
from models.autoencoder_kl import AutoencoderConfig, AutoencoderKL
from models.autoencoder_tiny import TinyAutoencoder, TinyConfig
from models.qwen3 import Qwen3, Qwen3Config
from models.z_image import transformer as net
from models.z_image.transformer import ZImageConfig, ZImageTransformer
from pyggml import Backend

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-4  # relative to the largest value


@pytest.fixture(scope="module")
def backend() -> Backend:
    return Backend.cpu(2)


def golden(name: str) -> Mapping[str, Any]:
    return np.load(GOLDEN / f"{name}.npz")


def weights_of(arrays: Mapping[str, Any], folder: Path, rename: Callable[[str], str] = str) -> Checkpoint:
    """The golden's weights as a file, through the loader like any other."""
    prefix = "weights/"
    save_file(
        {rename(k.removeprefix(prefix)): np.ascontiguousarray(arrays[k]) for k in arrays if k.startswith(prefix)},
        folder / "model.safetensors",
    )
    return open_checkpoint(folder / "model.safetensors")


def close_to(actual: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"relative error {error:.2e}"


def test_text_encoder(backend: Backend, tmp_path: Path) -> None:
    arrays = golden("qwen3")
    reference = json.loads(str(arrays["config"]))
    checkpoint = weights_of(arrays, tmp_path).renamed(qwen3.RENAMES)
    config = Qwen3Config.from_checkpoint(checkpoint)
    assert (config.dim, config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim) == (
        reference["hidden_size"], reference["num_hidden_layers"], reference["num_attention_heads"],
        reference["num_key_value_heads"], reference["head_dim"],
    )  # fmt: skip
    config = replace(
        config, rope_theta=reference.get("rope_theta", config.rope_theta), norm_eps=reference["rms_norm_eps"]
    )
    module = Qwen3(config)
    last = rf"^blk\.{config.n_layers - 1}\..*$"
    with load_params(module.params(), checkpoint.renamed([(last, None)]), backend=backend, component="qwen3"):
        for case in sorted({k.split("/")[0] for k in arrays if k.endswith("/ids")}):
            close_to(module.encode(backend, arrays[f"{case}/ids"]), arrays[f"{case}/hidden_2"])


def transformer(arrays: Mapping[str, Any], folder: Path, backend: Backend, single_file: bool) -> Any:
    checkpoint = weights_of(arrays, folder).renamed(net.RENAMES)
    if single_file:
        # The other layout: q, k and v in one matrix.
        tensors = {name: checkpoint.read(name) for name in checkpoint}
        for block in {n.split(".attention.to_q")[0] for n in tensors if ".attention.to_q" in n}:
            parts = [tensors.pop(f"{block}.attention.to_{x}.weight") for x in "qkv"]
            tensors[f"{block}.attention.qkv.weight"] = np.concatenate(parts)
        save_file(tensors, folder / "fused.safetensors")
        checkpoint = open_checkpoint(folder / "fused.safetensors")
    config = ZImageConfig.from_checkpoint(checkpoint)
    reference = json.loads(str(arrays["config"]))
    assert config.axes_dims == tuple(reference["axes_dims"]) and config.n_layers == reference["n_layers"]
    assert config.fused_qkv is single_file
    module = ZImageTransformer(config)
    return module, load_params(module.params(), checkpoint, backend=backend, component="z_image")


@pytest.mark.parametrize("case", ["a", "b"])
@pytest.mark.parametrize("single_file", [False, True], ids=["diffusers", "single-file"])
def test_transformer(backend: Backend, tmp_path: Path, case: str, single_file: bool) -> None:
    arrays = golden("z_image_transformer")
    module, weights = transformer(arrays, tmp_path, backend, single_file)
    with weights:
        latents, cap = arrays[f"{case}/latents"], arrays[f"{case}/cap"]
        position = net.context_positions(len(cap))
        with module.context_graph(backend, len(cap)) as graph:
            context = graph.compute(caption=cap, position=position)["context"]
        h, w = latents.shape[1:]
        with module.step_graph(backend, h // 2 * (w // 2), [len(context)]) as graph:
            joint = np.concatenate([net.image_positions(h // 2, w // 2, len(context)), position], axis=1)
            t = np.float32([1000 * float(arrays[f"{case}/t"].item())])
            out = graph.compute(patches=net.patchify(latents), t=t, context=context, position=joint)["out"]
            again = graph.compute(t=t)["out"]  # inputs are kept from one computation to the next
        assert np.array_equal(out, again)
        close_to(net.unpatchify(out, h, w), arrays[f"{case}/out"])


def test_patches() -> None:
    x = np.arange(16 * 6 * 4, dtype=np.float32).reshape(16, 6, 4)
    patches = net.patchify(x)
    assert patches.shape == (6, 64)
    assert patches[1, 2 * 16 + 5] == x[5, 1, 2]  # second patch: row 0, columns 2..3; feature (1, 0, channel 5)
    assert np.array_equal(net.unpatchify(patches, 6, 4), x)


@pytest.mark.parametrize("names", ["diffusers", "original"])
def test_autoencoder(backend: Backend, tmp_path: Path, names: str) -> None:
    arrays = golden("autoencoder_kl")
    checkpoint = weights_of(arrays, tmp_path).renamed(autoencoder_kl.RENAMES)
    if names == "original":
        tensors = {n: checkpoint.read(n) for n in checkpoint}
        tensors = {n: t[:, :, None, None] if ".attn_1." in n and t.ndim == 2 else t for n, t in tensors.items()}
        save_file(tensors, tmp_path / "ae.safetensors")
        checkpoint = open_checkpoint(tmp_path / "ae.safetensors")
    module = AutoencoderKL(AutoencoderConfig.from_checkpoint(checkpoint))
    with load_params(module.params(), checkpoint, backend=backend, component="vae"):
        z = (arrays["latents"] - autoencoder_kl.SHIFT) * autoencoder_kl.SCALE
        close_to(module.decode(backend, z) * 2 - 1, arrays["decoded"])
        mean, deviation = module.encode(backend, (arrays["pixels"] + 1) / 2)
        close_to(mean, arrays["mean"])
        close_to(2 * np.log(deviation), np.clip(arrays["logvar"], -30, 20))


def tiny(folder: Path, kind: str, names: str = "as made", changed: Mapping[str, Any] | None = None) -> Checkpoint:
    """The golden's tiny autoencoder as a file; `names`: as made, original, or of a file with the decoder alone."""
    arrays = golden("autoencoder_tiny")
    prefix = f"weights/{kind}/"
    tensors = {k.removeprefix(prefix): np.ascontiguousarray(arrays[k]) for k in arrays if k.startswith(prefix)}
    if names != "as made":
        tensors = {re.sub(r"^decoder\.layers\.(\d+)", lambda m: f"decoder.{int(m[1]) + 1}", k): v
                   for k, v in tensors.items() if k.startswith("decoder.")}  # fmt: skip
    if names == "alone":
        tensors = {k.removeprefix("decoder."): v for k, v in tensors.items()}
    save_file(tensors | dict(changed or {}), folder / "tiny.safetensors")
    return open_checkpoint(folder / "tiny.safetensors").renamed(autoencoder_tiny.RENAMES)


@pytest.mark.parametrize("names", ["as made", "original", "alone"])
@pytest.mark.parametrize("kind", ["taesd", "taehv"])
def test_tiny_autoencoders(backend: Backend, tmp_path: Path, kind: str, names: str) -> None:
    arrays, checkpoint = golden("autoencoder_tiny"), tiny(tmp_path, kind, names)
    module = TinyAutoencoder(TinyConfig.from_checkpoint(checkpoint))
    with load_params(module.params(), checkpoint, backend=backend, component="tae"):
        latents = arrays[f"{kind}/latents"]
        close_to(module.decode(backend, latents), arrays[f"{kind}/decoded"])
        close_to(module.decode(backend, latents, tile=(2, 3)), arrays[f"{kind}/decoded"])


@pytest.mark.parametrize("kind", ["taesd", "taehv"])
def test_tiny_autoencoders_elsewhere(
    backend: Backend, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.nn.on_cpu", lambda x: False)  # the operations of other devices
    arrays, checkpoint = golden("autoencoder_tiny"), tiny(tmp_path, kind)
    module = TinyAutoencoder(TinyConfig.from_checkpoint(checkpoint))
    with load_params(module.params(), checkpoint, backend=backend, component="tae"):
        close_to(module.decode(backend, arrays[f"{kind}/latents"]), arrays[f"{kind}/decoded"])


def test_what_is_no_tiny_autoencoder_of_pictures(tmp_path: Path) -> None:
    config = TinyConfig.from_checkpoint(tiny(tmp_path, "taehv"))
    assert config == TinyConfig("TAEHV", (8, 8, 16, 24), 16, (1, 2, 2))
    with pytest.raises(LoadError, match="it makes 12 channels, a picture has 3"):
        TinyConfig.from_checkpoint(tiny(tmp_path, "taehv", changed={"decoder.22.bias": np.zeros(12, np.float32)}))
    checkpoint = tiny(tmp_path, "taesd")
    with pytest.raises(LoadError, match="no tiny autoencoder with a decoder"):
        TinyConfig.from_checkpoint(checkpoint.renamed([("^decoder.1\\.", None)]))
    shapes = {"1.weight": (24, 16), "22.bias": (), "7.conv.weight": (24, 24), "8.weight": (0, 24, 3, 3),
              "13.conv.weight": (64, 16, 1, 1)}  # fmt: skip
    for name, shape in shapes.items():
        changed = {f"decoder.{name}": np.zeros(shape, np.float32)}
        with pytest.raises(LoadError):
            TinyConfig.from_checkpoint(tiny(tmp_path, "taehv", changed=changed))
