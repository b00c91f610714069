"""Random checkpoints of Qwen-Image that stable-diffusion.cpp 0.4.7 takes, scaled as those of `checkpoints` are.

It reads the depth of the transformer and of the text encoder, and the latter's feed-forward, from the files: two and
three layers, all random. The vision tower has 32 layers whatever the file says: most are zeros. The rest is as wide as
the real model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from pyggml import Type

from .checkpoints import Tensors, Writer

FILES: Mapping[str, str] = {
    "qwen_image_diffusion_f16": "parity-qwen_image-F16.gguf",
    "qwen_image_diffusion_q8_0": "parity-qwen_image-Q8_0.gguf",
    "qwen_image_llm_f16": "parity-qwen25vl-F16.gguf",
    "qwen_image_llm_q8_0": "parity-qwen25vl-Q8_0.gguf",
    "qwen_image_vision": "parity-qwen25vl-mmproj-F16.gguf",
    "qwen_image_vae": "parity-qwen_image_vae.safetensors",
}
DIM, HEAD, FF, N_LAYERS = 3072, 128, 12288, 2
TEXT, LLM_LAYERS, LLM_KV, LLM_FF, VOCAB = 3584, 3, 512, 256, 152064
TOWER, TOWER_LAYERS, TOWER_FF, PATCH = 1280, 32, 3420, 14
TOWER_ACTIVE = (0, 7, 31)  # within windows, to all patches, the last
SMALL = 0.003  # of features before the norm that follows: its epsilon, and weights of words, show


def write_qwen_image(path: Path, type: Type, seed: int = 11) -> None:
    w = Writer(path, "qwen_image", type, seed)

    def linear(name: str, n_out: int, n_in: int, gain: float = 1.0, bias: float = 0.2) -> None:
        w.matrix(f"{name}.weight", n_out, n_in, gain)
        w.vector(f"{name}.bias", n_out, std=bias)

    linear("img_in", DIM, 64)
    w.vector("txt_norm.weight", TEXT, 1.0)
    linear("txt_in", DIM, TEXT)
    linear("time_text_embed.timestep_embedder.linear_1", DIM, 256, 1.5)
    linear("time_text_embed.timestep_embedder.linear_2", DIM, DIM, 1.5)
    for i in range(N_LAYERS):
        p = f"transformer_blocks.{i}."
        for stream in ("img", "txt"):
            linear(f"{p}{stream}_mod.1", 6 * DIM, DIM, 0.5, bias=0.5)
            linear(f"{p}{stream}_mlp.net.0.proj", FF, DIM)
            linear(f"{p}{stream}_mlp.net.2", DIM, FF)
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"):
            linear(f"{p}attn.{name}", DIM, DIM)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            w.vector(f"{p}attn.{name}.weight", HEAD, 1.5)
    linear("norm_out.linear", 2 * DIM, DIM, 0.5, bias=0.5)
    linear("proj_out", 64, DIM)
    w.close()


def write_qwen25_vl(path: Path, type: Type, seed: int = 12) -> None:
    w = Writer(path, "qwen2vl", type, seed)
    w.table("token_embd.weight", VOCAB, TEXT, SMALL)
    w.vector("output_norm.weight", TEXT, SMALL, SMALL / 5)
    for i in range(LLM_LAYERS):
        p = f"blk.{i}."
        w.vector(p + "attn_norm.weight", TEXT, 1.0)
        w.vector(p + "ffn_norm.weight", TEXT, 1.0)
        for name, n_out in (("attn_q", TEXT), ("attn_k", LLM_KV), ("attn_v", LLM_KV)):
            w.matrix(f"{p}{name}.weight", n_out, TEXT)
            w.vector(f"{p}{name}.bias", n_out)
        w.matrix(p + "attn_output.weight", TEXT, TEXT, 2 * SMALL)
        w.matrix(p + "ffn_gate.weight", LLM_FF, TEXT)
        w.matrix(p + "ffn_up.weight", LLM_FF, TEXT)
        w.matrix(p + "ffn_down.weight", TEXT, LLM_FF, 2 * SMALL)
    w.close()


def write_vision(path: Path, seed: int = 13) -> None:
    """An mmproj file, f16; rows as large as the text encoder's embeddings."""
    w = Writer(path, "clip", Type.F16, seed)
    for end in ("", ".1"):
        kernel = w.normal(TOWER, 3, PATCH, PATCH, std=0.7 / math.sqrt(3 * PATCH**2))
        w.file.add_tensor(f"v.patch_embd.weight{end}", kernel.astype(np.float16))
    for i in range(TOWER_LAYERS):
        p, zero = f"v.blk.{i}.", i not in TOWER_ACTIVE
        std = 0.0 if zero else 0.2
        w.vector(p + "ln1.weight", TOWER, 1.0)
        w.vector(p + "ln2.weight", TOWER, 1.0)
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            w.matrix(f"{p}{name}.weight", TOWER, TOWER, zero=zero)
            w.vector(f"{p}{name}.bias", TOWER, std=std)
        for name in ("ffn_gate", "ffn_up"):
            w.matrix(f"{p}{name}.weight", TOWER_FF, TOWER, zero=zero)
            w.vector(f"{p}{name}.bias", TOWER_FF, std=std)
        w.matrix(p + "ffn_down.weight", TOWER, TOWER_FF, gain=0.0 if zero else 1.0)  # rows of no whole blocks
        w.vector(p + "ffn_down.bias", TOWER, std=std)
    w.vector("v.post_ln.weight", TOWER, 1.0)
    for name, n_out, gain in (("mm.0", 4 * TOWER, 1.0), ("mm.2", TEXT, 2 * SMALL)):
        w.matrix(f"{name}.weight", n_out, 4 * TOWER, gain)
        w.vector(f"{name}.bias", n_out, std=0.2 * gain)
    w.close()


def write_autoencoder(path: Path, seed: int = 14) -> None:
    """Under its original names, f16, with all three time steps; its pictures neither clip nor are flat."""
    save_file(dict(_autoencoder(np.random.default_rng(seed))), path)


def _autoencoder(rng: np.random.Generator) -> Tensors:
    def values(*shape: int, std: float, mean: float = 0.0) -> NDArray[np.float16]:
        return (rng.standard_normal(shape, np.float32) * np.float32(std) + np.float32(mean)).astype(np.float16)

    def conv(name: str, n_in: int, n_out: int, *kernel: int, gain: float = 1.0) -> Tensors:
        of_a_frame = n_in * math.prod(kernel[-2:])
        yield f"{name}.weight", values(n_out, n_in, *kernel, std=gain / math.sqrt(of_a_frame))
        yield f"{name}.bias", values(n_out, std=0.05)

    def block(name: str, n_in: int, n_out: int) -> Tensors:
        yield f"{name}.residual.0.gamma", values(n_in, 1, 1, 1, std=0.2, mean=1)
        yield from conv(f"{name}.residual.2", n_in, n_out, 3, 3, 3)
        yield f"{name}.residual.3.gamma", values(n_out, 1, 1, 1, std=0.2, mean=1)
        yield from conv(f"{name}.residual.6", n_out, n_out, 3, 3, 3)
        if n_in != n_out:
            yield from conv(f"{name}.shortcut", n_in, n_out, 1, 1, 1)

    def middle(name: str, n: int) -> Tensors:
        yield from block(f"{name}.0", n, n)
        yield f"{name}.1.norm.gamma", values(n, 1, 1, std=0.2, mean=1)
        yield from conv(f"{name}.1.to_qkv", n, 3 * n, 1, 1)
        yield from conv(f"{name}.1.proj", n, n, 1, 1)
        yield from block(f"{name}.2", n, n)

    channels = (96, 192, 384, 384)
    yield from conv("encoder.conv1", 3, channels[0], 3, 3, 3)
    n, at = channels[0], 0
    for level, width in enumerate(channels):
        for _ in range(2):
            yield from block(f"encoder.downsamples.{at}", n, width)
            n, at = width, at + 1
        if level < 3:
            yield from conv(f"encoder.downsamples.{at}.resample.1", n, n, 3, 3)
            if level:
                yield from conv(f"encoder.downsamples.{at}.time_conv", n, n, 3, 1, 1)
            at += 1
    yield from middle("encoder.middle", n)
    yield "encoder.head.0.gamma", values(n, 1, 1, 1, std=0.2, mean=1)
    yield from conv("encoder.head.2", n, 32, 3, 3, 3, gain=3.5)
    yield from conv("conv1", 32, 32, 1, 1, 1)
    yield from conv("conv2", 16, 16, 1, 1, 1, gain=0.5)
    yield from conv("decoder.conv1", 16, n, 3, 3, 3)
    yield from middle("decoder.middle", n)
    at = 0
    for level, width in reversed(list(enumerate(channels))):
        for _ in range(3):
            yield from block(f"decoder.upsamples.{at}", n, width)
            n, at = width, at + 1
        if level:
            yield from conv(f"decoder.upsamples.{at}.resample.1", n, n // 2, 3, 3)
            if level > 1:
                yield from conv(f"decoder.upsamples.{at}.time_conv", n, 2 * n, 3, 1, 1)
            n, at = n // 2, at + 1
    yield "decoder.head.0.gamma", values(n, 1, 1, 1, std=0.2, mean=1)
    yield from conv("decoder.head.2", n, 3, 3, 3, 3, gain=0.6)


MAKERS: Mapping[str, Callable[[Path], None]] = {
    "qwen_image_diffusion_f16": lambda path: write_qwen_image(path, Type.F16),
    "qwen_image_diffusion_q8_0": lambda path: write_qwen_image(path, Type.Q8_0),
    "qwen_image_llm_f16": lambda path: write_qwen25_vl(path, Type.F16),
    "qwen_image_llm_q8_0": lambda path: write_qwen25_vl(path, Type.Q8_0),
    "qwen_image_vision": write_vision,
    "qwen_image_vae": write_autoencoder,
}
