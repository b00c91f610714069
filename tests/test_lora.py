"""LoRAs: names, arithmetic against numpy, bad files, switching, both ways of applying them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tiny_models import PARTS, golden, weight, write_tiny_models

import models
from loader.convert import to_float32
from loader.errors import LoadError
from loader.lora import Delta, Place, open_lora
from loader.options import LoadOptions
from loader.params import Param
from models import qwen3
from models.lora import NODES, Naming
from models.tokenizer import Tokenizer
from models.z_image import ZImagePipeline
from models.z_image import transformer as net
from pyggml import Backend, BufferType, Cancelled, ServerLost, Type
from pyggml.quantize import dequantize, quantize
from studio import cli

Arrays = dict[str, NDArray[Any]]
Files = dict[str, Path]

SMALL: dict[str, Any] = {"width": 32, "height": 32, "num_inference_steps": 2, "output_type": "latent"}
PROMPT = "a red circle"
RANK = 4
# of the tiny models, by their diffusers and Hugging Face names: matrix -> (n_out, n_in)
MATRICES = {
    "layers.0.attention.to_q": (64, 64),
    "layers.0.attention.to_v": (64, 64),
    "layers.1.attention.to_out.0": (64, 64),
    "layers.0.feed_forward.w1": (170, 64),
    "layers.1.feed_forward.w2": (64, 170),
    "noise_refiner.1.adaLN_modulation.0": (256, 64),
    "context_refiner.0.feed_forward.w3": (170, 64),
    "cap_embedder.1": (64, 64),
    "t_embedder.mlp.0": (128, 256),
    "all_x_embedder.2-1": (64, 64),
    "all_final_layer.2-1.linear": (64, 64),
}
TEXT = {"layers.0.self_attn.q_proj": (128, 64), "layers.0.mlp.down_proj": (64, 96)}


def native(name: str) -> str:
    """A name of diffusers or Hugging Face as the model has it."""
    for pattern, other in [*net.RENAMES, *(qwen3.RENAMES if "self_attn" in name or ".mlp." in name else [])]:
        name = re.sub(pattern, other or "", name + ".").removesuffix(".")
    return name


def fuse(tensors: Mapping[str, NDArray[Any]]) -> Arrays:
    """A transformer of diffusers' names as a single-file one: other names, q, k and v in one matrix."""
    result: Arrays = {}
    for name, values in tensors.items():
        if ".to_q." in name:
            stem = name.replace(".to_q.weight", "")
            parts = [tensors[f"{stem}.to_{part}.weight"] for part in "qkv"]
            result[f"{stem}.qkv.weight"] = np.concatenate(parts)
        elif ".to_k." not in name and ".to_v." not in name:
            result[native(name)] = values
    return result


def write_models(
    folder: Path, changed: Mapping[str, NDArray[Any]] | None = None, *, fused: bool = False, dtype: str = "f4"
) -> Files:
    """The tiny models; `changed` as write_tiny_models has it, dtype f4 or f2 for matrices of the transformer."""
    paths = write_tiny_models(folder, changed)
    tensors = {k[8:]: v for k, v in golden(PARTS["diffusion_model"]).items() if k.startswith("weights/")}
    for key, values in (changed or {}).items():
        if key.startswith("diffusion_model/"):
            tensors[key.removeprefix("diffusion_model/")] = values
    tensors = fuse(tensors) if fused else tensors
    tensors = {k: np.ascontiguousarray(v, dtype if v.ndim == 2 and len(v) > 1 else "f4") for k, v in tensors.items()}
    save_file(tensors, paths["diffusion_model"])
    return paths


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_models(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_models(tmp_path_factory.mktemp("fused"), fused=True)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_models(tmp_path_factory.mktemp("halves"), fused=True, dtype="f2")


@pytest.fixture(scope="module")
def pipe(files: Files, backend: Backend) -> Iterator[ZImagePipeline]:
    with models.load(**files, backend=backend, lora_apply_mode="at_runtime") as pipe:
        yield pipe


@pytest.fixture(scope="module")
def pipes(files: Files, fused: Files, backend: Backend) -> Iterator[dict[tuple[str, str], ZImagePipeline]]:
    """(layout, mode) -> pipeline."""
    opened = {
        (layout, mode): models.load(**paths, backend=backend, lora_apply_mode=mode)
        for layout, paths in (("split", files), ("fused", fused)) for mode in ("at_runtime", "immediately")
    }  # fmt: skip
    yield opened
    for pipe in opened.values():
        pipe.close()


def latents(pipe: ZImagePipeline) -> NDArray[Any]:
    result: NDArray[Any] = pipe(PROMPT, **SMALL).images[0]
    return result


def error(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def normal(seed: int, *shape: int, std: float = 0.2) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(std)


def pair(name: str, n_out: int, n_in: int, rank: int = RANK) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(down, up), the same for a name each time."""
    seed = sum(map(ord, name))
    return normal(seed, rank, n_in), normal(seed + 1, n_out, rank)


def merged_models(folder: Path, deltas: Mapping[str, NDArray[Any]]) -> Files:
    """The tiny models with "part/tensor" -> delta added by numpy, in float64."""
    changed = {}
    for key, delta in deltas.items():
        part, tensor = key.split("/", 1)
        changed[key] = (weight(part, tensor).astype(np.float64) + delta).astype(np.float32)
    return write_models(folder, changed)


def expected(folder: Path, deltas: Mapping[str, NDArray[Any]], backend: Backend) -> NDArray[Any]:
    with models.load(**merged_models(folder, deltas), backend=backend) as pipe:
        return latents(pipe)


def write(path: Path, tensors: Mapping[str, NDArray[Any]], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, path, metadata)
    return path


# -- names -----------------------------------------------------------------------------------------------------------

Scheme = tuple[Callable[[str], str], Callable[[str], str], str, str, bool]


def dots(prefix: str, own: bool = False) -> Callable[[str], str]:
    return lambda name: prefix + (native(name) if own else name)


def flat(prefix: str, own: bool = False) -> Callable[[str], str]:
    return lambda name: prefix + (native(name) if own else name).replace(".", "_")


# transformer's names, text encoder's names, endings of down and up, whether there is an alpha
SCHEMES: dict[str, Scheme] = {
    "diffusers": (dots("transformer."), dots("text_encoder.model."), ".lora_A.weight", ".lora_B.weight", False),
    "diffusers, old": (dots("transformer."), dots("text_encoder."), ".lora.down.weight", ".lora.up.weight", True),
    "diffusers, older": (
        dots("unet."), dots("te."), ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", False
    ),
    "peft": (
        dots("base_model.model."), dots("base_model.model.model."), ".lora_A.default.weight",
        ".lora_B.default.weight", False,
    ),
    "comfy": (
        dots("diffusion_model.", True), dots("text_encoders.qwen3_4b.transformer.model."), ".lora_A.weight",
        ".lora_B.weight", True,
    ),
    "comfy, diffusers": (
        dots("diffusion_model."), dots("text_encoders.llm."), ".lora_down.weight", ".lora_up.weight", True,
    ),
    "kohya": (flat("lora_unet_", True), flat("lora_te_"), ".lora_down.weight", ".lora_up.weight", True),
    "kohya, diffusers": (flat("lora_unet_"), flat("lora_te1_model_"), ".lora_down.weight", ".lora_up.weight", True),
    "lycoris": (flat("lycoris_"), flat("lora_te_", True), ".lora_down.weight", ".lora_up.weight", True),
    "single file": (
        dots("model.diffusion_model.", True), dots("text_encoders.llm.", True), ".lora_down", ".lora_up", False
    ),
    "bare": (dots(""), dots("", True), ".lora_A", ".lora_B", False),
}  # fmt: skip


def lora_of(scheme: Scheme) -> tuple[Arrays, Arrays]:
    """(tensors of the file, deltas by "part/tensor") for all matrices above; alpha is 2 where there is one."""
    of_transformer, of_text, down_ending, up_ending, has_alpha = scheme
    tensors, deltas = {}, {}
    for part, table, rename in (("diffusion_model", MATRICES, of_transformer), ("llm", TEXT, of_text)):
        for name, (n_out, n_in) in table.items():
            down, up = pair(name, n_out, n_in)
            tensors[rename(name) + down_ending] = down
            tensors[rename(name) + up_ending] = up
            if has_alpha:
                tensors[rename(name) + ".alpha"] = np.array(2.0, np.float32)
            deltas[f"{part}/{name}.weight"] = (2 / RANK if has_alpha else 1) * up.astype(np.float64) @ down
    return tensors, deltas


@pytest.fixture(scope="module")
def by_numpy(tmp_path_factory: pytest.TempPathFactory, backend: Backend) -> dict[bool, NDArray[Any]]:
    """Whether there is an alpha -> latents with the weights merged by numpy, LoRA weight 0.5."""
    result = {}
    for has_alpha, name in ((False, "diffusers"), (True, "kohya")):
        deltas = {key: 0.5 * delta for key, delta in lora_of(SCHEMES[name])[1].items()}
        result[has_alpha] = expected(tmp_path_factory.mktemp("merged"), deltas, backend)
    return result


@pytest.mark.parametrize("name", SCHEMES)
def test_every_naming_scheme_equals_numpy(
    pipes: dict[tuple[str, str], ZImagePipeline], by_numpy: dict[bool, NDArray[Any]], tmp_path: Path, name: str
) -> None:
    """Also: q and v without k, into one matrix or into three."""
    tensors, _ = lora_of(SCHEMES[name])
    path = write(tmp_path / "x.safetensors", tensors)
    for (layout, mode), pipe in pipes.items():
        before = latents(pipe)
        [report] = pipe.set_loras({path: 0.5})
        of_text = len(tensors) * len(TEXT) // len(MATRICES | TEXT)
        assert report.applied == {
            "transformer": (len(tensors) - of_text,) * 2, "text_encoder": (of_text,) * 2
        } and report.unknown == [], (layout, mode)
        after = latents(pipe)
        assert error(after, by_numpy[SCHEMES[name][4]]) < 1e-5, (layout, mode)
        assert error(before, by_numpy[SCHEMES[name][4]]) > 0.01
        pipe.unload_lora_weights()
        np.testing.assert_array_equal(latents(pipe), before)


def test_own_names_and_foreign_names_agree() -> None:
    """Every alias leads back to the module that it is an alias of, by the rules that rename checkpoints."""
    for names, aliases, rules in (
        ([native(k[8:]) for k in golden("z_image_transformer") if k.startswith("weights/")], net.NAMING.aliases,
         net.RENAMES),
        (["token_embd.weight", *(f"blk.1.{x}.weight" for x in (
            "attn_q", "attn_k", "attn_v", "attn_output", "attn_q_norm", "attn_k_norm", "ffn_gate", "ffn_up",
            "ffn_down", "attn_norm", "ffn_norm"))], qwen3.ALIASES, qwen3.RENAMES),
    ):  # fmt: skip
        table = Naming(aliases).table({name: Param((2, 2)) for name in names})
        n_aliases = 0
        for pattern, other in aliases:
            for name in names:
                module = name.removesuffix(".weight").removesuffix(".bias")
                if re.search(pattern, module):
                    alias = re.sub(pattern, other, module)
                    back = f"{alias}.weight"
                    for p, r in rules:
                        back = re.sub(p, r or "", back)
                    assert back == f"{module}.weight"
                    assert [place.module for place in table[alias.replace(".", "_")]] == [module]
                    n_aliases += 1
        assert n_aliases >= len(aliases)


def test_native_qkv_into_three_matrices(
    pipes: dict[tuple[str, str], ZImagePipeline], tmp_path: Path, backend: Backend
) -> None:
    down, up = pair("qkv", 192, 64)
    path = write(tmp_path / "x.safetensors", {
        "diffusion_model.layers.0.attention.qkv.lora_A.weight": down,
        "diffusion_model.layers.0.attention.qkv.lora_B.weight": up,
    })  # fmt: skip
    deltas = {f"diffusion_model/layers.0.attention.to_{p}.weight": (up.astype(np.float64) @ down)[64 * i : 64 * i + 64]
              for i, p in enumerate("qkv")}  # fmt: skip
    wanted = expected(tmp_path, deltas, backend)
    for pipe in pipes.values():
        pipe.set_loras({path: 1})
        assert error(latents(pipe), wanted) < 1e-5
        pipe.unload_lora_weights()


# -- arithmetic ------------------------------------------------------------------------------------------------------


def number(value: float) -> NDArray[np.float32]:
    return np.array(value, np.float32)


def forms() -> dict[str, tuple[Arrays, Arrays]]:
    """Tensors of a file, and the deltas they mean; by formulas of numpy that share nothing with the package."""
    q, w1 = "layers.0.attention.to_q", "layers.0.feed_forward.w1"
    m = f"diffusion_model.{q}"
    at, at_w1 = f"diffusion_model/{q}.weight", f"diffusion_model/{w1}.weight"
    down, up, mid = normal(1, 4, 64), normal(2, 64, 4), normal(3, 4, 4, std=1.0)
    f8 = np.float64
    plain = up.astype(f8) @ down
    a1, b1, a2, b2 = normal(4, 64, 4), normal(5, 4, 64), normal(6, 64, 3), normal(7, 3, 64)
    hada = (a1.astype(f8) @ b1) * (a2.astype(f8) @ b2)
    k1, k2 = normal(8, 8, 4), normal(9, 8, 16)
    k1a, k1b, k2a, k2b = normal(10, 8, 2), normal(11, 2, 4), normal(12, 8, 2), normal(13, 2, 16)
    wide = normal(14, 10, 8), normal(15, 17, 8)
    bias = normal(16, 256)
    lora = {f"{m}.lora_down.weight": down, f"{m}.lora_up.weight": up}
    loha = {f"{m}.hada_w1_a": a1, f"{m}.hada_w1_b": b1, f"{m}.hada_w2_a": a2, f"{m}.hada_w2_b": b2}
    return {
        "alpha": (lora | {f"{m}.alpha": number(6)}, {at: plain * 6 / 4}),
        "alpha of one element, f16": (lora | {f"{m}.alpha": np.array([6], np.float16)}, {at: plain * 6 / 4}),
        "scale, which wins": (lora | {f"{m}.alpha": number(6), f"{m}.scale": number(0.3)}, {at: plain * 0.3}),
        "no alpha": (lora, {at: plain}),
        "f16": ({k: v.astype(np.float16) for k, v in lora.items()},
                {at: up.astype(np.float16).astype(f8) @ down.astype(np.float16)}),
        "mid": (lora | {f"{m}.lora_mid.weight": mid, f"{m}.alpha": number(2)}, {at: up.astype(f8) @ mid @ down / 2}),
        "1x1 convolution": ({f"{m}.lora_down.weight": down[:, :, None, None],
                             f"{m}.lora_up.weight": up[:, :, None, None]}, {at: plain}),
        "rank 1": ({f"{m}.lora_down.weight": down[:1], f"{m}.lora_up.weight": up[:, :1]},
                   {at: up[:, :1].astype(f8) @ down[:1]}),
        "loha": (loha, {at: hada}),
        "loha, alpha": (loha | {f"{m}.alpha": number(2)}, {at: hada * 2 / 4}),
        "lokr, whole": ({f"{m}.lokr_w1": k1.T[:, :], f"{m}.lokr_w2": normal(9, 16, 8), f"{m}.alpha": number(9)},
                        {at: np.kron(k1.T.astype(f8), normal(9, 16, 8))}),
        "lokr, w2 in factors": ({f"{m}.lokr_w1": k1, f"{m}.lokr_w2_a": k2a, f"{m}.lokr_w2_b": k2b,
                                 f"{m}.alpha": number(1)}, {at: np.kron(k1.astype(f8), k2a.astype(f8) @ k2b) / 2}),
        "lokr, w1 in factors": ({f"{m}.lokr_w1_a": k1a, f"{m}.lokr_w1_b": k1b, f"{m}.lokr_w2": k2},
                                {at: np.kron(k1a.astype(f8) @ k1b, k2)}),
        "lokr, both in factors": ({f"{m}.lokr_w1_a": k1a, f"{m}.lokr_w1_b": k1b, f"{m}.lokr_w2_a": k2a,
                                   f"{m}.lokr_w2_b": k2b}, {at: np.kron(k1a.astype(f8) @ k1b, k2a.astype(f8) @ k2b)}),
        "lokr, not square": ({f"diffusion_model.{w1}.lokr_w1": wide[0], f"diffusion_model.{w1}.lokr_w2": wide[1]},
                             {at_w1: np.kron(wide[0].astype(f8), wide[1])}),
        "diff": ({f"{m}.diff": normal(17, 64, 64)}, {at: normal(17, 64, 64)}),
        "diff of a norm": ({"diffusion_model.layers.0.attention_norm2.diff": normal(18, 64)},
                           {"diffusion_model/layers.0.attention_norm2.weight": normal(18, 64)}),
        "diff of a head's norm": ({"lora_unet_layers_0_attention_k_norm.diff": normal(18, 32)},
                                  {"diffusion_model/layers.0.attention.norm_k.weight": normal(18, 32)}),
        "diff of a token": ({"diffusion_model.cap_pad_token.diff": normal(19, 1, 64)},
                            {"diffusion_model/cap_pad_token": normal(19, 1, 64)}),
        "diff_b": ({"lora_unet_layers_0_adaLN_modulation_0.diff_b": bias},
                   {"diffusion_model/layers.0.adaLN_modulation.0.bias": bias}),
        "lora and diff_b": (
            {"diffusion_model.cap_embedder.1.lora_A.weight": down, "diffusion_model.cap_embedder.1.lora_B.weight": up,
             "diffusion_model.cap_embedder.1.diff_b": bias[:64]},
            {"diffusion_model/cap_embedder.1.weight": plain, "diffusion_model/cap_embedder.1.bias": bias[:64]}),
        "a norm of the text encoder": ({"lora_te_layers_0_input_layernorm.diff": normal(20, 64)},
                                       {"llm/layers.0.input_layernorm.weight": normal(20, 64)}),
    }  # fmt: skip


@pytest.mark.parametrize("name", forms())
def test_every_form_equals_numpy(
    pipes: dict[tuple[str, str], ZImagePipeline], tmp_path: Path, backend: Backend, name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tensors, deltas = forms()[name]
    path = write(tmp_path / "x.safetensors", tensors)
    wanted = expected(tmp_path, {key: -1.5 * delta for key, delta in deltas.items()}, backend)
    for (layout, mode), pipe in pipes.items():
        pipe.set_loras([(path, -1.5)])
        after = latents(pipe)
        assert error(after, wanted) < 1e-5, (layout, mode)
        assert error(latents_without(pipe), after) > 1e-4
    monkeypatch.setattr("models.lora.on_cpu", lambda x: False)  # the operations of other devices
    pipe = pipes["fused", "at_runtime"]
    pipe.set_loras([(path, -1.5)])
    assert error(latents(pipe), wanted) < 1e-5
    pipe.set_loras({})


def latents_without(pipe: ZImagePipeline) -> NDArray[Any]:
    pipe.set_loras({})
    return latents(pipe)


def test_rows_of_a_delta_by_pieces(tmp_path: Path) -> None:
    """What is merged piece by piece is the whole."""
    for name, (tensors, deltas) in forms().items():
        path = write(tmp_path / "x.safetensors", tensors)
        (target, wanted), *_ = deltas.items()
        module = target.split("/")[1].removesuffix(".weight").removesuffix(".bias")
        alias = native(module).replace(".", "_")
        role = "text_encoder" if target.startswith("llm") else "transformer"
        ne = [d for d in wanted.shape[::-1] if d > 1]
        shapes = {role: {f"{module}.weight": ne, f"{module}.bias": ne}}
        if len(deltas) > 1:
            continue
        table = {role: {a: [Place(module)] for a in (alias, module.replace(".", "_"))}}
        with open_lora(path) as lora:
            changes, _ = lora.match(table, shapes, {})
            [change] = changes[role]
            rows = change.delta.rows()
            pieces = [rows(i, min(i + 7, change.n)) for i in range(0, change.n, 7)]
        whole = np.concatenate(pieces).reshape(wanted.shape)
        np.testing.assert_allclose(whole, wanted, rtol=1e-4, atol=1e-5, err_msg=name)


def test_alpha_of_a_configuration(pipe: ZImagePipeline, tmp_path: Path, backend: Backend) -> None:
    """PEFT and diffusers write alpha beside the tensors, llama.cpp into the metadata."""
    down, up = pair("q", 64, 64)
    q = "layers.0.attention.to_q"
    plain = up.astype(np.float64) @ down

    def check(path: Path, scale: float) -> None:
        pipe.set_loras({path: 1})
        folder = tmp_path / f"merged {scale}"
        assert error(latents(pipe), expected(folder, {f"diffusion_model/{q}.weight": scale * plain}, backend)) < 1e-5

    peft = {f"base_model.model.{q}.lora_A.weight": down, f"base_model.model.{q}.lora_B.weight": up}
    write(tmp_path / "adapter_model.safetensors", peft)
    config = tmp_path / "adapter_config.json"
    for scale, written in (
        (3.0, {"lora_alpha": 12, "r": 4}), (6.0, {"lora_alpha": 12, "r": 4, "use_rslora": True}),
        (0.5, {"lora_alpha": 12, "r": 4, "alpha_pattern": {"to_q": 2, "to_k": 100}}),
    ):  # fmt: skip
        config.write_text(json.dumps(written))
        check(tmp_path / "adapter_model.safetensors" if scale > 1 else tmp_path, scale)
        pipe.unload_lora_weights()
    for wrong, message in (
        ([1], "must be a JSON object"), ({"lora_alpha": 12, "alpha_pattern": ["to_q"]}, "must map ends of names"),
        ({"lora_alpha": 10**400}, "is no factor"),
    ):  # fmt: skip
        config.write_text(json.dumps(wrong))
        with pytest.raises(LoadError, match=message):
            pipe.set_loras({tmp_path: 1})
    config.write_text(json.dumps({"lora_alpha": 12, "alpha_pattern": {".*(a+)+$": 2}}))
    with pytest.raises(LoadError, match="pattern"):
        pipe.set_loras({tmp_path / "adapter_model.safetensors": 1})
    config.write_text(json.dumps({"lora_alpha": 12, "use_dora": True}))
    with pytest.raises(LoadError, match="DoRA"):
        pipe.set_loras({tmp_path / "adapter_model.safetensors": 1})
    config.write_text(json.dumps({"lora_alpha": "12"}))
    with pytest.raises(LoadError, match="no factor"):
        pipe.set_loras({tmp_path / "adapter_model.safetensors": 1})

    tensors = {f"transformer.{q}.lora_A.weight": down, f"transformer.{q}.lora_B.weight": up}
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})}
    check(write(tmp_path / "x.safetensors", tensors, metadata), 2.0)


def test_gguf(pipe: ZImagePipeline, tmp_path: Path, backend: Backend) -> None:
    """As llama.cpp's converter names them, with f16 factors and quantised ones."""
    down, up = pair("gguf", 128, 64)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen3")
    writer.add_float32("adapter.lora.alpha", 8.0)
    raw = quantize(down, Type.Q8_0).reshape(RANK, -1)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_q.weight.lora_b", up.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    delta = 2 * up.astype(np.float16).astype(np.float64) @ dequantize(raw.reshape(-1), Type.Q8_0).reshape(RANK, -1)
    wanted = expected(tmp_path, {"llm/layers.0.self_attn.q_proj.weight": delta}, backend)
    [report] = pipe.set_loras({tmp_path / "x.gguf": 1})
    assert report.applied == {"text_encoder": (2, 2)}
    assert error(latents(pipe), wanted) < 1e-3  # a quantised factor is taken as f16


# -- several, switching ----------------------------------------------------------------------------------------------


def simple(path: Path, *modules: str, seed: int = 0, std: float = 0.2) -> Path:
    tensors = {}
    for i, module in enumerate(modules):
        n_out, n_in = (MATRICES | TEXT)[module]
        tensors[f"{module}.lora_A.weight"] = normal(seed + 2 * i, RANK, n_in, std=std)
        tensors[f"{module}.lora_B.weight"] = normal(seed + 2 * i + 1, n_out, RANK, std=std)
    return write(path, tensors)


@pytest.mark.parametrize("mode", ["at_runtime", "immediately"])
def test_several_add_up_and_switch(files: Files, backend: Backend, tmp_path: Path, mode: str) -> None:
    q, out = "layers.0.attention.to_q", "layers.1.attention.to_out.0"
    a, b = simple(tmp_path / "a.safetensors", q, out), simple(tmp_path / "b.safetensors", q, seed=50)
    text = simple(tmp_path / "t.safetensors", *TEXT, seed=60)
    with models.load(**files, backend=backend, lora_apply_mode=mode) as pipe:
        base = latents(pipe)
        alone = {}
        for path in (a, b, text):
            pipe.set_loras({path: 0.5})
            alone[path] = latents(pipe)
            assert error(alone[path], base) > 1e-3
        pipe.set_loras([(a, 0.25), (b, 0.5), (a, 0.25)])  # one that comes twice counts with the sum
        both = latents(pipe)
        deltas = {}
        for path, seed in ((a, 0), (b, 50)):
            for i, module in enumerate((q, out) if path == a else (q,)):
                n_out, n_in = MATRICES[module]
                down, up = normal(seed + 2 * i, RANK, n_in), normal(seed + 2 * i + 1, n_out, RANK)
                key = f"diffusion_model/{module}.weight"
                deltas[key] = deltas.get(key, 0) + 0.5 * up.astype(np.float64) @ down
        assert error(both, expected(tmp_path, deltas, backend)) < 1e-5
        # back and forth, in any order, is the same bytes as at the first time
        for path in (b, text, a):
            pipe.set_loras({path: 0.5})
            np.testing.assert_array_equal(latents(pipe), alone[path])
        pipe.set_loras({a: 0.0})
        assert error(latents(pipe), base) < 1e-6
        pipe.set_loras({})
        np.testing.assert_array_equal(latents(pipe), base)


def test_another_weight_rebuilds_nothing(files: Files, backend: Backend, tmp_path: Path) -> None:
    """The same graph, and the same bytes as when it is built for that weight at once."""
    path = simple(tmp_path / "a.safetensors", *MATRICES)
    with models.load(**files, backend=backend, lora_apply_mode="at_runtime") as pipe:
        pipe.set_loras({path: 0.3})
        wanted = latents(pipe)
        pipe.set_loras({path: 1})
        pointers = {name: p.tensor.ptr for name, p in pipe.transformer.weights.params.items()}
        assert error(latents(pipe), wanted) > 1e-3
        graphs = dict(pipe.transformer._graphs)
        pipe.set_loras({path: 0.3})
        np.testing.assert_array_equal(latents(pipe), wanted)
        assert dict(pipe.transformer._graphs) == graphs and len(graphs) == 1
        assert pointers == {name: p.tensor.ptr for name, p in pipe.transformer.weights.params.items()}


def test_caches_know_the_loras(files: Files, backend: Backend, tmp_path: Path) -> None:
    text = simple(tmp_path / "t.safetensors", *TEXT, std=0.5)
    image = simple(tmp_path / "i.safetensors", "context_refiner.0.feed_forward.w3", std=0.5)
    with models.load(**files, backend=backend, lora_apply_mode="at_runtime") as pipe:
        plain = pipe.encode(PROMPT)
        context = pipe._context(plain)
        pipe.set_loras({image: 1})
        assert pipe.encode(PROMPT) is plain  # the text encoder is as it was
        assert pipe(PROMPT, **SMALL).report.prompt_cached
        assert error(pipe._context(plain), context) > 1e-3
        pipe.set_loras({text: 1})
        changed = pipe.encode(PROMPT)
        assert error(changed.features, plain.features) > 1e-3
        np.testing.assert_array_equal(pipe._context(plain), context)
        pipe.set_loras({text: 0.5})
        assert error(pipe.encode(PROMPT).features, changed.features) > 1e-4
        pipe.set_loras({})
        assert pipe.encode(PROMPT) is plain
        assert len(plain._refined) == 1  # a sweep over weights does not fill the memory


def test_diffusers_way(files: Files, backend: Backend, tmp_path: Path) -> None:
    a = simple(tmp_path / "a.safetensors", "layers.0.attention.to_q")
    b = simple(tmp_path / "b.safetensors", "layers.0.attention.to_v", seed=9)
    with models.load(**files, backend=backend) as pipe:
        base = latents(pipe)
        pipe.load_lora_weights(a)
        with pytest.raises(ValueError, match="'a' already"):
            pipe.load_lora_weights(b, "a")
        pipe.load_lora_weights(b, adapter_name="second")
        both = latents(pipe)
        pipe.set_adapters(["a", "second"], [1.0, 0.0])
        first = latents(pipe)
        pipe.set_adapters("a")
        assert error(latents(pipe), first) < 1e-6 and error(first, both) > 1e-3 and error(first, base) > 1e-3
        assert [(x["name"], x["weight"]) for x in pipe(PROMPT, **SMALL).report.loras] == [("a", 1.0)]
        pipe.set_adapters(["a", "second"])
        np.testing.assert_array_equal(latents(pipe), both)
        for names, weights, message in (
            (["a", "none"], None, "no LoRA 'none'"), (["a"], [1.0, 2.0], "one for each"),
            (["a", "a"], None, "each named"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                pipe.set_adapters(names, weights)
        np.testing.assert_array_equal(latents(pipe), both)
        pipe.unload_lora_weights()
        np.testing.assert_array_equal(latents(pipe), base)


# -- both ways, and where the bytes are ------------------------------------------------------------------------------


def test_both_ways_agree_on_f16(halves: Files, backend: Backend, tmp_path: Path) -> None:
    path = simple(tmp_path / "a.safetensors", *MATRICES, *TEXT)
    pictures = {}
    for mode in ("at_runtime", "immediately"):
        with models.load(**halves, backend=backend, lora_apply_mode=mode) as pipe:
            base = pipe(PROMPT, **SMALL | {"output_type": "np"}).images[0]
            pipe.set_loras({path: 0.8})
            pictures[mode] = pipe(PROMPT, **SMALL | {"output_type": "np"}).images[0]
    assert psnr(*pictures.values()) >= 45
    assert psnr(base, pictures["at_runtime"]) < 30


def psnr(a: NDArray[Any], b: NDArray[Any]) -> float:
    mse = np.mean((a.astype(np.float64) - b) ** 2)
    return float(99 if mse == 0 else 10 * np.log10(255**2 / mse))


def test_immediately_copies_out_only_what_changes(halves: Files, backend: Backend, tmp_path: Path) -> None:
    path = simple(tmp_path / "a.safetensors", "layers.0.attention.to_v", "layers.1.feed_forward.w2")
    content = halves["diffusion_model"].read_bytes()
    with models.load(**halves, backend=backend, lora_apply_mode="immediately") as pipe:
        params = pipe.transformer.weights.params
        before = {name: p.tensor.ptr for name, p in params.items()}
        pipe.set_loras({path: 1})
        moved = {name for name, p in params.items() if p.tensor.ptr != before[name]}
        assert moved == {"layers.0.attention.qkv.weight", "layers.1.feed_forward.w2.weight"}
        merged = pipe.loras._merged["transformer"]
        assert merged.n_bytes == 2 * (3 * 64 * 64 + 64 * 170)
        assert params["layers.0.attention.qkv.weight"].tensor.type is Type.F16
        # the rows of q and k are those of the file
        rows = params["layers.0.attention.qkv.weight"].tensor.numpy()
        original = np.concatenate([weight("diffusion_model", f"layers.0.attention.to_{p}.weight") for p in "qkv"])
        np.testing.assert_array_equal(rows[:128], original[:128].astype(np.float16))
        assert np.abs(rows[128:] - original[128:]).max() > 0.01
        latents(pipe)
    assert halves["diffusion_model"].read_bytes() == content


def test_immediately_in_memory_of_ours(halves: Files, backend: Backend, tmp_path: Path) -> None:
    """Weights that were read into memory are overwritten, and have their own bytes again afterwards."""
    path = simple(tmp_path / "a.safetensors", *MATRICES)
    with models.load(**halves, backend=backend, lora_apply_mode="immediately") as mapped:
        mapped.set_loras({path: 1})
        wanted = latents(mapped)
    with models.load(**halves, backend=backend, options=LoadOptions(mode="off")) as pipe:
        assert pipe.loras.modes == {"text_encoder": "immediately", "transformer": "immediately"}  # auto
        base = latents(pipe)
        params = pipe.transformer.weights.params
        before = {name: p.tensor.ptr for name, p in params.items()}
        pipe.set_loras({path: 1})
        assert before == {name: p.tensor.ptr for name, p in params.items()}
        assert pipe.loras._merged["transformer"].n_bytes == 0
        np.testing.assert_array_equal(latents(pipe), wanted)
        pipe.set_loras({path: 0.5})
        pipe.set_loras({path: 1})
        np.testing.assert_array_equal(latents(pipe), wanted)
        pipe.set_loras({})
        np.testing.assert_array_equal(latents(pipe), base)


def quantised_models(folder: Path, files: Files, type: Type) -> Files:
    """The text encoder with matrices of `type`, under llama.cpp's names."""
    tensors = {k[8:]: v for k, v in golden(PARTS["llm"]).items() if k.startswith("weights/")}
    config = json.loads(str(golden("qwen3")["config"]))
    writer = gguf.GGUFWriter(folder / "llm.gguf", "qwen3")
    writer.add_float32("qwen3.rope.freq_base", float(config.get("rope_theta", 1e6)))
    writer.add_float32("qwen3.attention.layer_norm_rms_epsilon", float(config["rms_norm_eps"]))
    for name, values in tensors.items():
        for pattern, other in qwen3.RENAMES[:-1]:
            name = re.sub(pattern, other or "", name)
        if values.ndim == 2:
            raw = quantize(values, type).reshape(len(values), -1)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType(type))
        else:
            writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {**files, "llm": folder / "llm.gguf"}


def test_immediately_requantises_only_what_changes(files: Files, backend: Backend, tmp_path: Path) -> None:
    paths = quantised_models(tmp_path, files, Type.Q8_0)
    tokenizer = Tokenizer.from_files(files["llm"].parent)
    path = simple(tmp_path / "a.safetensors", "layers.0.self_attn.q_proj")
    options: dict[str, Any] = {"backend": backend, "tokenizer": tokenizer}
    features = {}
    for mode in ("auto", "immediately"):
        with models.load(**paths, lora_apply_mode=mode, **options) as pipe:
            assert pipe.loras.modes["text_encoder"] == {"auto": "at_runtime"}.get(mode, mode)
            params = pipe.text_encoder.weights.params
            q = params["blk.0.attn_q.weight"].tensor
            original = q.numpy()
            pipe.set_loras({path: 1})
            features[mode] = pipe.encode(PROMPT).features
            now = params["blk.0.attn_q.weight"].tensor
            assert (now.ptr == q.ptr) == (mode == "auto")
            delta = normal(1, 128, RANK) @ normal(0, RANK, 64)
            if mode == "immediately":
                assert now.type is Type.Q8_0
                again = dequantize(quantize(original + delta, Type.Q8_0), Type.Q8_0).reshape(original.shape)
                np.testing.assert_allclose(now.numpy(), again, atol=1e-6 + np.abs(again).max() / 127 * 1.01)
                assert (now.numpy() == again).mean() > 0.99  # f32 sums differ in a last bit here and there
                assert len(pipe.loras._merged["text_encoder"].params) == 1
    assert error(features["immediately"], features["auto"]) < 0.05


def test_immediately_into_repacked_weights(files: Files, backend: Backend, tmp_path: Path) -> None:
    """They are in memory of ours: overwritten, and laid out anew as a whole."""
    paths = quantised_models(tmp_path, files, Type.Q4_0)
    options: dict[str, Any] = {"backend": backend, "tokenizer": Tokenizer.from_files(files["llm"].parent)}
    path = simple(tmp_path / "a.safetensors", "layers.0.self_attn.q_proj")
    features: dict[str, list[Any]] = {}
    for repack in ("off", "on"):
        how = LoadOptions(repack=repack)
        with models.load(**paths, lora_apply_mode="immediately", options=how, **options) as pipe:
            if repack == "on" and not pipe.text_encoder.weights.report.n_repacked:
                pytest.skip("this processor repacks nothing")
            features[repack] = [pipe.encode(PROMPT).features]
            pipe.set_loras({path: 1})
            assert bool(pipe.loras._merged["text_encoder"].n_bytes) == (repack == "off")
            features[repack].append(pipe.encode(PROMPT).features)
            pipe.set_loras({})
            pipe._prompts.clear()
            np.testing.assert_array_equal(pipe.encode(PROMPT).features, features[repack][0])
    for plain, repacked in zip(*features.values(), strict=True):
        assert error(repacked, plain) < 0.02  # the kernels round activations in other ways
    assert error(features["on"][1], features["on"][0]) > 0.1


def test_merging_notices_that_the_weights_changed(halves: Files, backend: Backend, tmp_path: Path) -> None:
    copy = tmp_path / "x.safetensors"
    copy.write_bytes(halves["diffusion_model"].read_bytes())
    path = simple(tmp_path / "a.safetensors", "layers.0.attention.to_v")
    files = {**halves, "diffusion_model": copy}
    with models.load(**files, backend=backend, lora_apply_mode="immediately") as pipe:
        with open(copy, "r+b") as file:
            file.seek(-4, 2)
            file.write(b"\1\1\1\1")
        with pytest.raises(LoadError, match="changed while it was used"):
            pipe.set_loras({path: 1})
        assert pipe.loras.active == {}


def test_auto_takes_what_needs_no_memory(files: Files, backend: Backend) -> None:
    with models.load(**files, backend=backend) as pipe:
        assert pipe.loras.modes == {"text_encoder": "at_runtime", "transformer": "at_runtime"}  # mapped
    with pytest.raises(ValueError, match="lora_apply_mode is one of auto, at_runtime, immediately"):
        models.load(**files, backend=backend, lora_apply_mode="later")


def test_factors_stay_in_their_file(pipe: ZImagePipeline, tmp_path: Path) -> None:
    path = simple(tmp_path / "a.safetensors", *MATRICES)
    pipe.set_loras({path: 1})
    [lora] = pipe.loras.loaded.values()
    report = lora.on_backend["transformer"].weights.report
    assert report.n_mapped == report.n_tensors == 2 * len(MATRICES) and report.allocated_bytes == 0


def test_a_graph_has_room_for_all_kinds(pipe: ZImagePipeline, tmp_path: Path) -> None:
    """NODES is an upper bound for each form."""
    for name, (tensors, _) in forms().items():
        pipe.set_loras({})
        n_before = len(pipe.transformer.module.step_graph(pipe.transformer.backend, 16, [32]).nodes)
        pipe.set_loras({write(tmp_path / "x.safetensors", tensors): 1})
        n_after = len(pipe.transformer.module.step_graph(pipe.transformer.backend, 16, [32]).nodes)
        assert n_after - n_before <= NODES, name


def test_cancel_and_progress_while_merging(halves: Files, backend: Backend, tmp_path: Path) -> None:
    path = simple(tmp_path / "a.safetensors", *MATRICES)
    with models.load(**halves, backend=backend, lora_apply_mode="immediately") as pipe:
        base = latents(pipe)
        seen: list[tuple[str, int, int]] = []

        def stop(phase: str, done: int, total: int) -> None:
            seen.append((phase, done, total))
            if done > total / 2:
                pipe.cancel()

        with pytest.raises(Cancelled):
            pipe.set_loras({path: 1}, progress=stop)
        assert {phase for phase, _, _ in seen} == {"lora"} and pipe.loras.active == {}
        np.testing.assert_array_equal(latents(pipe), base)
        seen.clear()
        pipe.set_loras({path: 1}, progress=lambda *a: seen.append(a))
        assert seen[-1][1] == seen[-1][2] and [s[1] for s in seen] == sorted(s[1] for s in seen)


def test_what_f16_cannot_hold(halves: Files, backend: Backend, tmp_path: Path) -> None:
    q = "layers.0.attention.to_q"
    big = write(tmp_path / "a.safetensors", {
        f"{q}.lora_A.weight": np.full((1, 64), 300, np.float32), f"{q}.lora_B.weight": np.full((64, 1), 300, np.float32)
    })  # fmt: skip
    for options in ({}, {"options": LoadOptions(mode="off")}):
        with models.load(**halves, backend=backend, lora_apply_mode="immediately", **options) as pipe:
            base = latents(pipe)
            with pytest.raises(LoadError, match=r"values over 65504.*at_runtime"):
                pipe.set_loras({big: 1})
            assert pipe.loras.active == {}
            np.testing.assert_array_equal(latents(pipe), base)


# -- into a new file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["split", "fused"])
def test_convert_merges(
    files: Files, fused: Files, backend: Backend, tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, deltas = lora_of(SCHEMES["comfy"])
    tensors["diffusion_model.layers.0.attention_norm1.diff"] = normal(18, 64)
    deltas["diffusion_model/layers.0.attention_norm1.weight"] = normal(18, 64)
    path = write(tmp_path / "x.safetensors", tensors)
    sources, paths = files if layout == "split" else fused, {}
    for part in ("diffusion_model", "llm"):
        paths[part] = tmp_path / part / "model.safetensors"
        paths[part].parent.mkdir()
        for beside in ("config.json", "tokenizer.json"):
            if (sources[part].parent / beside).exists():
                (paths[part].parent / beside).write_bytes((sources[part].parent / beside).read_bytes())
        source = str(sources[part])
        twice = ["--lora", f"{path}:0.25"] * 2
        assert cli.main(["convert", source, "-o", str(paths[part]), *twice]) == 0
        n = len(tensors) - 3 * len(TEXT) if part == "diffusion_model" else 3 * len(TEXT)
        assert f"{n} of {n} keys applied" in capsys.readouterr().err
    wanted = expected(tmp_path / "numpy", {key: 0.5 * delta for key, delta in deltas.items()}, backend)
    with models.load(**paths, vae=sources["vae"], backend=backend) as pipe:
        assert error(latents(pipe), wanted) < 1e-5


def test_convert_refuses(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    q = simple(tmp_path / "a.safetensors", "layers.0.attention.to_q")
    out = tmp_path / "out.gguf"
    for source, option, message in (
        (files["vae"], str(q), "Flux autoencoder.*LoRAs are merged into"),
        (files["llm"], str(q), "none of its 2 keys belongs"),
        (files["diffusion_model"], f"{q}:9", "number in -8..8"),
        (files["diffusion_model"], "none.safetensors", "No such file"),
        (files["diffusion_model"], "a\n\x1b[2J/none.safetensors", r"a\\n\\x1b\[2J/none"),
    ):
        assert cli.main(["convert", str(source), "-o", str(out), "--lora", option]) == 2
        error_line = capsys.readouterr().err
        assert re.search(message, error_line) and error_line.count("\n") == 1
        assert not out.exists()
    before = q.read_bytes()
    assert cli.main(["convert", str(files["diffusion_model"]), "-o", str(q), "--lora", str(q)]) == 2
    assert "is read for it; write to another file" in capsys.readouterr().err and q.read_bytes() == before


def test_convert_merges_nothing_by_zero(files: Files, tmp_path: Path) -> None:
    """Nor does it round what is quantised once more."""
    q = simple(tmp_path / "a.safetensors", "layers.0.attention.to_q")
    assert cli.main(["convert", str(files["diffusion_model"]), "-o", str(tmp_path / "b.gguf"), "--type", "q4_0"]) == 0
    assert cli.main(["convert", str(tmp_path / "b.gguf"), "-o", str(tmp_path / "c.gguf"), "--lora", f"{q}:0"]) == 0
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()


def test_a_lora_that_changes_while_it_is_merged(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    q = simple(tmp_path / "a.safetensors", "layers.0.attention.to_q")
    read = Delta.rows

    def late(self: Delta) -> Any:
        os.utime(q, ns=(1, 1))
        return read(self)

    monkeypatch.setattr(Delta, "rows", late)
    out = tmp_path / "out.gguf"
    assert cli.main(["convert", str(files["diffusion_model"]), "-o", str(out), "--lora", str(q)]) == 2
    assert "a.safetensors: a file of weights changed while it was used" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_scales_of_8_bit_weights_count(files: Files, backend: Backend, tmp_path: Path, dtype: str) -> None:
    """What is merged is the weight times its scale, not the bytes."""
    name, scale = "layers.0.attention.to_q", np.float32(0.03)
    raw = np.random.default_rng(0).integers(0, 0x60, (64, 64)).astype(np.uint8)
    tensors = {k[8:]: v for k, v in golden(PARTS["diffusion_model"]).items() if k.startswith("weights/")}
    paths = {**files, "diffusion_model": tmp_path / "x.safetensors"}
    write_typed(paths["diffusion_model"], {
        **{k: ("F32", v.astype("<f4")) for k, v in tensors.items()}, f"{name}.weight": (dtype, raw),
        f"{name}.scale_weight": ("F32", np.array([scale], "<f4")),
    })  # fmt: skip
    lora = simple(tmp_path / "a.safetensors", name)
    delta = normal(1, 64, RANK).astype(np.float64) @ normal(0, RANK, 64)
    with models.load(**paths, backend=backend, lora_apply_mode="immediately") as pipe:
        param = pipe.transformer.weights.params[f"{name}.weight"]
        before = param.tensor.numpy().astype(np.float64)
        pipe.set_loras({lora: 1})
        after = param.tensor.numpy()
    assert 0 < np.abs(before).max() and error(after, before + delta) < 4e-3
    assert np.abs(before + delta - before / scale).max() > 1


def write_typed(path: Path, tensors: Mapping[str, tuple[str, NDArray[Any]]]) -> Path:
    """A safetensors file of (dtype, bytes or numbers in the shape that it has)."""
    entries, data = {}, b""
    for name, (dtype, values) in tensors.items():
        content = np.ascontiguousarray(values).tobytes()
        entries[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [len(data), len(data + content)]}
        data += content
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize("scale_name", ["weight_scale", "scale_weight"])
@pytest.mark.parametrize("mode", ["at_runtime", "immediately", "convert"])
def test_scales_of_8_bit_loras_count(
    files: Files, backend: Backend, tmp_path: Path, mode: str, scale_name: str
) -> None:
    """A LoRA that is itself scaled: one number for down, one for each row of up."""
    name, random = "layers.0.feed_forward.w1", np.random.default_rng(0)
    codes = np.array([*range(0x50), *range(0x80, 0xD0)], np.uint8)
    down, up = (random.choice(codes, shape) for shape in ((RANK, 64), (170, RANK)))
    up_scale = random.uniform(0.01, 0.2, (170, 1)).astype(np.float32)
    path = write_typed(tmp_path / "a.safetensors", {
        f"{name}.lora_A.weight": ("F8_E4M3", down), f"{name}.lora_B.weight": ("F8_E4M3", up),
        f"{name}.lora_A.{scale_name}": ("F32", np.array(0.25, np.float32)),
        f"{name}.lora_B.{scale_name}": ("F32", up_scale),
    })  # fmt: skip
    floats = [to_float32(raw.reshape(-1), "F8_E4M3").reshape(raw.shape).astype(float) for raw in (down, up)]
    delta = (floats[1] * up_scale) @ (floats[0] * 0.25)
    assert 0.1 < np.abs(delta).max() < 10
    wanted = expected(tmp_path / "numpy", {f"diffusion_model/{name}.weight": delta}, backend)
    if mode == "convert":
        out = tmp_path / "out" / "model.safetensors"
        out.parent.mkdir()
        assert cli.main(["convert", str(files["diffusion_model"]), "-o", str(out), "--lora", str(path)]) == 0
        with models.load(**files | {"diffusion_model": out}, backend=backend) as pipe:
            assert error(latents(pipe), wanted) < 1e-3
        return
    with models.load(**files, backend=backend, lora_apply_mode=mode) as pipe:
        [report] = pipe.set_loras({path: 1})
        assert report.applied == {"transformer": (2, 2)} and not report.unknown
        assert error(latents(pipe), wanted) < 1e-3  # at_runtime the products of code and scale are rounded to f16


@pytest.mark.parametrize("mode", ["at_runtime", "immediately"])
def test_a_server_that_goes_away_as_loras_are_merged(
    files: Files, backend: Backend, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing says so when bytes are sent to it: it is asked. (Norms are merged in both modes.)"""
    path = write(tmp_path / "a.safetensors", {"layers.0.attention_norm1.diff": normal(18, 64)})

    def gone(memory: BufferType) -> None:
        raise ServerLost("the RPC server is gone")

    with models.load(**files, backend=backend, lora_apply_mode=mode) as pipe:
        before = latents(pipe)
        with monkeypatch.context() as patch:
            patch.setattr("pyggml.rpc.any_servers", lambda: True)
            patch.setattr(BufferType, "check", gone)
            with pytest.raises(ServerLost, match="is gone"):
                pipe.set_loras({path: 1})
        assert not pipe.loras.active and not pipe.loras._merged
        np.testing.assert_array_equal(latents(pipe), before)


# -- files that are refused (reliability.md, catalogue C) ------------------------------------------------------------


def bad() -> dict[str, tuple[Arrays, str]]:
    m = "diffusion_model.layers.0.attention.to_q"
    down, up = pair("q", 64, 64)
    lora = {f"{m}.lora_A.weight": down, f"{m}.lora_B.weight": up}
    nan = up.copy()
    nan[3, 2] = np.nan
    big = np.full((64, 4), np.inf, np.float16)
    return {
        "L1 down alone": ({f"{m}.lora_A.weight": down}, "has down but no up"),
        "L1 up alone": ({f"{m}.lora_B.weight": up}, "has up but no down"),
        "L1 alpha alone": ({f"{m}.alpha": number(1)}, "has alpha and nothing to scale"),
        "L1 loha": ({f"{m}.hada_w1_a": up, f"{m}.hada_w1_b": down, f"{m}.hada_w2_a": up}, "but no w2_b"),
        "L1 lokr": ({f"{m}.lokr_w1": up, f"{m}.lokr_w2_a": up}, "but no w2_b"),
        "L2 ranks differ": ({f"{m}.lora_A.weight": down, f"{m}.lora_B.weight": normal(0, 64, 8)}, "ranks differ"),
        "L2 mid": (lora | {f"{m}.lora_mid.weight": normal(0, 4, 5)}, "ranks differ"),
        "L2 loha": ({f"{m}.hada_w1_a": up, f"{m}.hada_w1_b": down, f"{m}.hada_w2_a": up,
                     f"{m}.hada_w2_b": normal(0, 3, 64)}, "ranks differ"),
        "L3 another size": ({f"{m}.lora_A.weight": down[:, :63], f"{m}.lora_B.weight": up},
                            r"is \[64, 63\].*wants \[64, 64\].*another size"),
        "L3 more rows": ({f"{m}.lora_A.weight": down, f"{m}.lora_B.weight": normal(0, 65, 4)}, r"is \[65, 64\]"),
        "L3 less of qkv": ({f"{m[:-4]}qkv.lora_A.weight": down, f"{m[:-4]}qkv.lora_B.weight": normal(0, 128, 4)},
                           r"is \[128, 64\]"),
        "L3 a norm": ({"diffusion_model.layers.0.attention_norm1.diff": normal(0, 32)}, r"is \[32\].*wants \[64\]"),
        "L3 a 3x3 convolution": ({f"{m}.lora_A.weight": normal(0, 4, 64, 3, 3), f"{m}.lora_B.weight": up}, "no matrix"),
        "L3 a LoRA of a norm": ({"layers.0.attention_norm1.lora_A.weight": down,
                                 "layers.0.attention_norm1.lora_B.weight": up}, r"wants \[64\]"),
        "L3 no bias there": ({f"{m}.diff_b": normal(0, 64)}, "the model has no bias"),
        "L4 rank 0": ({f"{m}.lora_A.weight": down[:0], f"{m}.lora_B.weight": up[:, :0]}, "the rank is 0"),
        "L4 too large a rank": ({f"{m}.lora_A.weight": normal(0, 5000, 64), f"{m}.lora_B.weight": normal(0, 64, 5000)},
                                r"the rank is 5000, it must be in 1\.\.4096"),
        "L5 alpha nan": (lora | {f"{m}.alpha": number(np.nan)}, "is nan"),
        "L5 alpha inf": (lora | {f"{m}.alpha": number(np.inf)}, "is inf"),
        "L5 alpha array": (lora | {f"{m}.alpha": np.ones(4, np.float32)}, "4 elements where one"),
        "a factor of integers": ({f"{m}.lora_A.weight": down.astype(np.int8), f"{m}.lora_B.weight": up},
                                 "is I8: factors are floating-point"),
        "a diff of integers": ({f"{m}.diff": np.ones((64, 64), np.int64)}, "is I64: factors are floating-point"),
        "a complex alpha": (lora | {f"{m}.alpha": np.ones((), np.complex64)}, "is C64: factors are floating-point"),
        "L6 nan": ({f"{m}.lora_A.weight": down, f"{m}.lora_B.weight": nan}, "not finite"),
        "L6 inf in f16": ({f"{m}.lora_A.weight": down, f"{m}.lora_B.weight": big}, "not finite"),
        "L6 nan in diff_b": ({"layers.0.adaLN_modulation.0.diff_b": np.full(256, np.nan, np.float32)}, "not finite"),
        "L7 Stable Diffusion": ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": down,
                                 "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": down},
                                "none of its 2 keys.*looks like one for Stable Diffusion.*another model"),
        "L7 Flux": ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": down}, "one for Flux"),
        "L7 Qwen-Image": ({"transformer_blocks.0.attn.add_q_proj.lora_A.weight": down}, "one for Qwen-Image"),
        "L7 blocks that are not there": ({k.replace("layers.0", "layers.77"): v for k, v in lora.items()},
                                         "none of its 2"),
        "L7 no LoRA at all": ({"layers.0.attention.to_q.weight": normal(0, 64, 64)}, "and no LoRA"),
        "L8 two styles": (lora | {"lora_unet_layers_0_attention_to_q.lora_down.weight": down,
                                  "lora_unet_layers_0_attention_to_q.lora_up.weight": up}, "both change"),
        "L8 qkv and q": (lora | {"layers.0.attention.qkv.lora_A.weight": down,
                                 "layers.0.attention.qkv.lora_B.weight": normal(0, 192, 4)}, "both change"),
        "L8 two endings": (lora | {f"{m}.lora_down.weight": down}, "the same part of one module"),
        "L8 lora and diff": (lora | {f"{m}.diff": normal(0, 64, 64)}, "both lora and diff"),
        "L9 DoRA": (lora | {f"{m}.dora_scale": normal(0, 1, 64)}, "DoRA is not supported"),
        "L9 DoRA of PEFT": (lora | {f"{m}.lora_magnitude_vector.weight": normal(0, 64)}, "DoRA is not supported"),
        "L9 Tucker": ({f"{m}.hada_w1_a": up, f"{m}.hada_t1": normal(0, 4, 4, 3, 3)}, "Tucker"),
        "L9 bias of PEFT": (lora | {f"{m}.lora_B.bias": normal(0, 64)}, "with a bias is not supported"),
    }  # fmt: skip


@pytest.mark.parametrize("name", bad())
def test_bad_files(
    pipes: dict[tuple[str, str], ZImagePipeline], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before anything is computed, by name; what was active stays."""
    tensors, message = bad()[name]
    good = simple(tmp_path / "good.safetensors", "layers.0.attention.to_v")
    path = write(tmp_path / "x.safetensors", tensors)
    for pipe in pipes.values():
        pipe.set_loras({good: 1})
        with monkeypatch.context() as m:
            m.setattr("pyggml.Graph.run", lambda self: pytest.fail("something was computed"))
            with pytest.raises(LoadError, match=message) as info:
                pipe.set_loras({good: 1, path: 1})
        assert "x.safetensors" in str(info.value) and "\n" not in str(info.value)
        assert list(pipe.loras.active) == list(pipe.loras.loaded) == [str(good.resolve())]
        pipe.set_loras({})


def test_alpha_of_zero_is_said(pipe: ZImagePipeline, tmp_path: Path) -> None:
    q = "layers.0.attention.to_q"
    down, up = pair("q", 64, 64)
    path = write(tmp_path / "x.safetensors", {
        f"{q}.lora_A.weight": down, f"{q}.lora_B.weight": up, f"{q}.alpha": number(0)
    })  # fmt: skip
    [report] = pipe.set_loras({path: 1})
    assert report.warnings == [f"module '{q}' has the scale 0, which changes nothing"]
    with_it = latents(pipe)
    assert error(with_it, latents_without(pipe)) < 1e-6


def test_report_of_unknown_and_unused_keys(
    pipe: ZImagePipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    down, up = pair("q", 64, 64)
    n_layers = json.loads(str(golden("qwen3")["config"]))["num_hidden_layers"]
    path = write(tmp_path / "x.safetensors", {
        "transformer.layers.0.attention.to_q.lora_A.weight": down,
        "transformer.layers.0.attention.to_q.lora_B.weight": up,
        "transformer.layers.0.attention.to_x.lora_A.weight": down,
        "transformer.layers.0.attention.to_x.lora_B.weight": up,
        f"text_encoder.model.layers.{n_layers - 1}.self_attn.q_proj.lora_A.weight": down,
        f"text_encoder.model.layers.{n_layers - 1}.self_attn.q_proj.lora_B.weight": normal(0, 128, 4),
        "what.is.this": number(1),
    })  # fmt: skip
    with caplog.at_level("INFO", "pyggml"):
        [report] = pipe.set_loras({path: 1})
    assert report.applied == {"transformer": (2, 4), "text_encoder": (0, 2)}
    assert report.ignored == 2 and len(report.unknown) == 3 and report.n_keys == 7
    assert "(2 / 7) LoRA tensors have been applied" in caplog.text
    assert "2 of 4 keys applied to transformer" in caplog.text and "3 are unknown: 'transformer.layers.0" in caplog.text
    shown = pipe(PROMPT, **SMALL).report.to_dict()["loras"][0]
    assert shown["applied"]["transformer"] == {"keys": 2, "of": 4, "mode": "at_runtime"} and shown["unknown"] == 3
    json.dumps(shown)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 8.5, -9, True, "1", None])
def test_weights_that_are_none(pipe: ZImagePipeline, tmp_path: Path, value: Any) -> None:
    path = simple(tmp_path / "a.safetensors", "layers.0.attention.to_v")
    with pytest.raises(ValueError, match=r"number in -8\.\.8"):
        pipe.set_loras({path: value})


def test_too_many(pipe: ZImagePipeline, tmp_path: Path) -> None:
    paths = [simple(tmp_path / f"{i}.safetensors", "layers.0.attention.to_v") for i in range(17)]
    with pytest.raises(ValueError, match="17 LoRAs at once; 16"):
        pipe.set_loras([(path, 0.1) for path in paths])
    pipe.set_loras([(path, 0.1) for path in paths[:16]])
    with pytest.raises(ValueError, match="17 LoRAs"):
        pipe.load_lora_weights(paths[16])
    assert len(pipe.loras.active) == len(pipe.loras.loaded) == 16
    with pytest.raises(ValueError, match="number in"):
        pipe.set_loras([(paths[0], 5), (paths[0], 5)])


@pytest.mark.parametrize("mode", ["at_runtime", "immediately"])
def test_an_embedding(files: Files, backend: Backend, tmp_path: Path, mode: str) -> None:
    """Merged, or refused: rows that are taken by number have no product to add to."""
    down, up = normal(1, 4, 64), normal(2, 288, 4)
    path = write(tmp_path / "x.safetensors", {
        "model.embed_tokens.lora_A.weight": down, "model.embed_tokens.lora_B.weight": up
    })  # fmt: skip
    with models.load(**files, backend=backend, lora_apply_mode=mode) as pipe:
        if mode == "at_runtime":
            with pytest.raises(ValueError, match=r"no linear layer.*'immediately'"):
                pipe.set_loras({path: 1})
            assert pipe.loras.active == {}
            return
        pipe.set_loras({path: 1})
        wanted = expected(tmp_path, {"llm/embed_tokens.weight": up.astype(np.float64) @ down}, backend)
        assert error(latents(pipe), wanted) < 1e-5


def test_the_file_changes(files: Files, backend: Backend, tmp_path: Path) -> None:
    """Written to while it is used: an error, no picture. Replaced: the old one until it is asked for again."""
    path = simple(tmp_path / "a.safetensors", "layers.0.attention.to_v")
    with models.load(**files, backend=backend) as pipe:
        pipe.set_loras({path: 1})
        first = latents(pipe)
        other = simple(tmp_path / "b.safetensors", "layers.0.attention.to_v", seed=5)
        other.replace(path)
        np.testing.assert_array_equal(latents(pipe), first)
        pipe.set_loras({path: 1})
        assert error(latents(pipe), first) > 1e-3
        with open(path, "r+b") as file:
            file.seek(-4, 2)
            file.write(b"\0\0\0\0")
        with pytest.raises(LoadError, match="a LoRA changed while it was used"):
            latents(pipe)


def test_pickles_are_refused(pipe: ZImagePipeline, tmp_path: Path) -> None:
    for name, start in (("a.safetensors", b"\x80\x02}q\x00."), ("a.pt", b"PK\x03\x04" + bytes(40))):
        (tmp_path / name).write_bytes(start + bytes(64))
        with pytest.raises(LoadError) as info:
            pipe.set_loras({tmp_path / name: 1})
        assert info.value.kind == "PickleRefused"
    with pytest.raises(LoadError, match="No such file"):
        pipe.set_loras({tmp_path / "none.safetensors": 1})
