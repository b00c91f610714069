from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy

from loader import describe, describe_path, open_checkpoint
from loader.describe import SIGNATURES, find_components

ROW = np.zeros((1, 4), np.float16)


def save(path: Path, names: list[str], shapes: dict[str, tuple[int, ...]] | None = None) -> Path:
    arrays = {name: np.zeros((shapes or {}).get(name, (1, 4)), np.float16) for name in names}
    safetensors.numpy.save_file(arrays, path)
    return path


LAYOUTS = [
    ("diffusion model", "Z-Image", ["cap_pad_token", "context_refiner.0.attention.qkv.weight", "x_pad_token"]),
    ("diffusion model", "Z-Image", ["cap_pad_token", "context_refiner.0.attention.to_q.weight", "x_pad_token"]),
    ("diffusion model", "Lumina 2", ["cap_embedder.0.weight", "context_refiner.0.attention.qkv.weight"]),
    ("diffusion model", "Qwen-Image", ["transformer_blocks.0.img_mod.1.weight", "txt_norm.weight", "img_in.weight"]),
    ("diffusion model", "Qwen-Image Layered", ["time_text_embed.addition_t_embedding.weight", "txt_norm.weight",
                                               "transformer_blocks.0.img_mod.1.weight"]),
    ("text encoder", "Qwen3", ["model.layers.0.self_attn.q_norm.weight", "model.embed_tokens.weight"]),
    ("text encoder", "Qwen3", ["layers.0.self_attn.q_norm.weight", "embed_tokens.weight"]),
    ("text encoder", "Qwen3", ["blk.0.attn_q_norm.weight", "token_embd.weight"]),
    ("text encoder", "Qwen2.5-VL", ["visual.patch_embed.proj.weight", "model.layers.0.self_attn.q_proj.bias",
                                    "visual.merger.ln_q.weight"]),
    ("text encoder", "Qwen2 or Qwen2.5-VL", ["blk.0.attn_q.bias", "token_embd.weight"]),
    ("vision tower", "Qwen2.5-VL vision tower", ["v.patch_embd.weight", "mm.0.weight"]),
    ("autoencoder", "Flux autoencoder", ["decoder.conv_in.weight", "decoder.mid.block_1.norm1.weight"]),
    ("autoencoder", "Flux autoencoder", ["decoder.conv_in.weight", "decoder.mid_block.resnets.0.norm1.weight"]),
    ("autoencoder", "Qwen-Image (Wan) autoencoder", ["decoder.middle.0.residual.0.gamma", "conv1.weight"]),
    ("autoencoder", "Qwen-Image (Wan) autoencoder", ["decoder.mid_block.resnets.0.norm1.gamma", "quant_conv.weight"]),
    ("tiny autoencoder", "TAESD", ["decoder.3.conv.4.weight", "decoder.19.weight", "decoder.7.weight"]),
    ("tiny autoencoder", "TAESD", ["decoder.layers.2.conv.4.weight", "decoder.layers.18.weight", "encoder.layers.0"]),
    ("tiny autoencoder", "TAESD", ["3.conv.4.weight", "19.weight"]),
    ("tiny autoencoder", "TAEHV", ["decoder.7.conv.weight", "decoder.3.conv.4.weight", "decoder.22.bias"]),
    ("lora", "LoRA for Z-Image", ["diffusion_model.layers.0.attention.qkv.lora_A.weight"]),
    ("lora", "LoRA for Z-Image", ["lora_unet_layers_0_attention_qkv.lora_down.weight", "x.alpha"]),
    ("lora", "LoRA for Z-Image", ["transformer.layers.0.attention.to_q.lokr_w1"]),
    ("lora", "LoRA for Qwen-Image", ["transformer_blocks.0.attn.to_q.lora_down.weight",
                                     "transformer_blocks.0.img_mlp.net.2.alpha"]),
    ("lora", "LoRA", ["transformer_blocks.0.attn.to_q.lora_A.weight"]),
]  # fmt: skip


@pytest.mark.parametrize("role, architecture, names", LAYOUTS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "first_stage_model."])
def test_known_layouts(tmp_path: Path, role: str, architecture: str, names: list[str], prefix: str) -> None:
    found = describe_path(save(tmp_path / "x.safetensors", [prefix + name for name in names]))
    assert (found.role, found.architecture) == (role, architecture)
    assert found.evidence == prefix + names[0]


def test_shapes_tell_autoencoders_apart(tmp_path: Path) -> None:
    names = ["decoder.conv_in.weight", "decoder.mid.block_1.norm1.weight"]
    for channels, architecture in (
        (4, "Stable Diffusion autoencoder"),
        (16, "Flux autoencoder"),
        (32, "Flux 2 autoencoder"),
    ):
        path = save(tmp_path / "x.safetensors", names, {"decoder.conv_in.weight": (8, channels, 3, 3)})
        assert describe_path(path).architecture == architecture


def test_several_models_in_one_file(tmp_path: Path) -> None:
    dit = ["cap_pad_token", "context_refiner.0.attention.qkv.weight"]
    names = ["model.diffusion_model." + name for name in dit]
    names += ["first_stage_model.decoder.conv_in.weight", "first_stage_model.decoder.mid.block_1.norm1.weight"]
    found = describe_path(save(tmp_path / "x.safetensors", names))
    assert found.role == "several models"
    assert [(c.role, c.prefix) for c in found.components] == [
        ("diffusion model", "model.diffusion_model."),
        ("autoencoder", "first_stage_model."),
    ]
    assert "diffusion model (Z-Image)" in found.sentence() and "Flux autoencoder" in str(found)


def test_sentence_for_messages(tmp_path: Path) -> None:
    te = save(tmp_path / "te.safetensors", ["model.layers.0.self_attn.q_norm.weight"])
    vae = save(tmp_path / "vae.safetensors", ["decoder.conv_in.weight", "decoder.mid.block_1.norm1.weight"])
    assert describe_path(te).sentence() == "this is a text encoder (Qwen3)"
    assert describe_path(vae).sentence() == "this is an autoencoder (Flux autoencoder)"
    unknown = describe_path(save(tmp_path / "x.safetensors", ["a"]))
    assert unknown.role == "unknown" and unknown.evidence is None


def test_sizes_types_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_uint32("qwen3.block_count", 2)
    writer.add_token_list(["a"] * 1000)
    writer.add_string("general.description", "x\x1b[31m" + "y" * 500)
    writer.add_tensor("token_embd.weight", np.zeros((4, 64), np.float32))
    for i in range(2):
        raw = gguf.quants.quantize(np.zeros((2, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"blk.{i}.attn_q.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"blk.{i}.attn_q_norm.weight", np.zeros(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = describe_path(path)
    assert (found.format, found.role, found.architecture) == ("gguf", "text encoder", "Qwen3")
    assert found.n_tensors == 5 and found.n_parameters == 256 + 2 * 128 + 2 * 8
    assert found.types["F32"].n_tensors == 3 and found.types["Q8_0"].n_bytes == 2 * 2 * 2 * 34
    assert found.n_blocks == {"blk": 2}
    assert found.metadata["tokenizer.ggml.tokens"] == "str[1000]"
    assert found.metadata["qwen3.block_count"] == "2"
    assert "\x1b" not in str(found) and "characters" in found.metadata["general.description"]
    assert found.file_bytes == path.stat().st_size
    table = json.loads(json.dumps(found.to_dict()))
    assert table["types"]["Q8_0"] == {"n_tensors": 2, "n_parameters": 256, "n_bytes": 272}
    assert table["components"][0]["evidence"] == "blk.0.attn_q_norm.weight"


def test_unknown_gguf_says_what_it_says_of_itself(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.add_tensor("a", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "mamba" in describe_path(tmp_path / "x.gguf").architecture


def test_inspecting_maps_nothing(tmp_path: Path) -> None:
    with open_checkpoint(save(tmp_path / "x.safetensors", ["a"])) as checkpoint:
        str(describe(checkpoint))
        assert "mapped" not in repr(checkpoint.files[0])


def test_every_signature_can_be_reached(tmp_path: Path) -> None:
    """No signature is hidden behind an earlier one."""
    for signature in SIGNATURES:
        ne = {signature.names[0]: tuple(d or 5 for d in signature.ne[::-1])} if signature.ne else {}
        with open_checkpoint(save(tmp_path / "x.safetensors", list(signature.names), ne)) as checkpoint:
            found = find_components(checkpoint)
            assert [c.architecture for c in found if c.role == signature.role] == [signature.architecture], signature
