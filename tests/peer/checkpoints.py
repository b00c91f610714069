"""Random checkpoints that stable-diffusion.cpp 0.4.7 takes, and in which a difference of formula shows.

It knows one size of Z-Image: 30 layers of 3840. Most of ours are all zeros, which makes them the identity: there they
have the smallest type there is. The active ones are scaled as a trained model's: gates around a half, branches as large
as the stream they are added to, attention that looks at some tokens more than at others. What goes into a norm whose
epsilon differs between implementations is small.

    python -m tests.peer.checkpoints FOLDER      writes 8.1 GB in a minute or two, and nothing where files exist
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from pyggml import Type
from pyggml.quantize import quantize

FILES: Mapping[str, str] = {
    "diffusion_f16": "parity-z_image-F16.gguf",
    "diffusion_q8_0": "parity-z_image-Q8_0.gguf",
    "llm_f16": "parity-qwen3-F16.gguf",
    "llm_q8_0": "parity-qwen3-Q8_0.gguf",
    "vae": "parity-ae.safetensors",
}
DIM, CAPTION, FF, HEAD, N_LAYERS = 3840, 2560, 10240, 128, 30
LLM_LAYERS, LLM_HEADS, LLM_KV_HEADS, LLM_FF, VOCAB = 36, 32, 8, 256, 151936
ACTIVE = (0, N_LAYERS - 1)
LLM_ACTIVE = (0, 1, 34, 35)  # the last one is not to be read: it would show

Values = NDArray[np.float32]
Tensors = Iterator[tuple[str, NDArray[np.float16]]]


class Writer:
    """One gguf file: random tensors in `type`, zeros in a small one."""

    ZERO = Type.TQ2_0

    def __init__(self, path: Path, architecture: str, type: Type, seed: int) -> None:
        self.file = gguf.GGUFWriter(path, architecture)
        self.type = type
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int, std: float = 1.0, mean: float = 0.0) -> Values:
        values: Values = self.rng.standard_normal(shape, np.float32) * np.float32(std) + np.float32(mean)
        return values

    def vector(self, name: str, n: int, mean: float = 0.0, std: float = 0.2) -> None:
        self.file.add_tensor(name, self.normal(n, std=std, mean=mean))

    def matrix(self, name: str, n_out: int, n_in: int, gain: float = 1.0, *, zero: bool = False) -> None:
        """[n_out, n_in] with standard deviation gain / sqrt(n_in)."""
        if zero:
            raw = np.zeros((n_out, self.ZERO.row_size(n_in)), np.uint8)
            self.file.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType(self.ZERO))
            return
        values = self.normal(n_out, n_in, std=gain / math.sqrt(n_in))
        if self.type is Type.F16:
            self.file.add_tensor(name, values.astype(np.float16))
        else:
            raw = quantize(values, self.type).reshape(n_out, -1)
            self.file.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType(self.type))

    def table(self, name: str, n_rows: int, n: int, std: float) -> None:
        """[n_rows, n], not around zero."""
        parts = []
        for start in range(0, n_rows, 16384):
            rows = self.normal(min(16384, n_rows - start), n, std=std, mean=std / 4)
            parts.append(rows.astype(np.float16) if self.type is Type.F16 else quantize(rows, self.type))
        if self.type is Type.F16:
            self.file.add_tensor(name, np.concatenate(parts))
        else:
            raw = np.concatenate([part.ravel() for part in parts]).reshape(n_rows, -1)
            self.file.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType(self.type))

    def close(self) -> None:
        self.file.write_header_to_file()
        self.file.write_kv_data_to_file()
        self.file.write_tensors_to_file()
        self.file.close()


def write_z_image(path: Path, type: Type, seed: int = 1) -> None:
    w = Writer(path, "lumina2", type, seed)
    w.matrix("x_embedder.weight", DIM, 64)
    w.vector("x_embedder.bias", DIM)
    w.matrix("t_embedder.mlp.0.weight", 1024, 256, 1.5)
    w.vector("t_embedder.mlp.0.bias", 1024)
    w.matrix("t_embedder.mlp.2.weight", 256, 1024, 1.5)
    w.vector("t_embedder.mlp.2.bias", 256)
    w.vector("cap_embedder.0.weight", CAPTION, 1.0)
    w.matrix("cap_embedder.1.weight", DIM, CAPTION)
    w.vector("cap_embedder.1.bias", DIM)
    w.vector("x_pad_token", DIM, std=1.0)
    w.vector("cap_pad_token", DIM, std=1.0)
    blocks = [(f"context_refiner.{i}.", False, True) for i in range(2)]
    blocks += [(f"noise_refiner.{i}.", True, True) for i in range(2)]
    blocks += [(f"layers.{i}.", True, i in ACTIVE) for i in range(N_LAYERS)]
    for prefix, modulated, active in blocks:
        # q and k of about 0.01: their norm's epsilon, 1e-5 or 1e-6, counts
        w.matrix(prefix + "attention.qkv.weight", 3 * DIM, DIM, 0.01, zero=not active)
        w.matrix(prefix + "attention.out.weight", DIM, DIM, zero=not active)
        w.vector(prefix + "attention.q_norm.weight", HEAD, 1.5)
        w.vector(prefix + "attention.k_norm.weight", HEAD, 1.5)
        w.matrix(prefix + "feed_forward.w1.weight", FF, DIM, zero=not active)
        w.matrix(prefix + "feed_forward.w2.weight", DIM, FF, zero=not active)
        w.matrix(prefix + "feed_forward.w3.weight", FF, DIM, zero=not active)
        for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            w.vector(f"{prefix}{norm}.weight", DIM, 1.0)
        if modulated:
            w.matrix(prefix + "adaLN_modulation.0.weight", 4 * DIM, 256, 0.5, zero=not active)
            w.vector(prefix + "adaLN_modulation.0.bias", 4 * DIM, std=0.5 if active else 0.0)
    w.matrix("final_layer.linear.weight", 64, DIM)
    w.vector("final_layer.linear.bias", 64)
    w.matrix("final_layer.adaLN_modulation.1.weight", DIM, 256, 0.5)
    w.vector("final_layer.adaLN_modulation.1.bias", DIM)
    w.close()


def write_qwen3(path: Path, type: Type, seed: int = 2) -> None:
    """Features of about 0.003 and not around zero, so that weights of words show through the norm that follows."""
    w = Writer(path, "qwen3", type, seed)
    small = 0.003
    w.table("token_embd.weight", VOCAB, CAPTION, small)
    w.vector("output_norm.weight", CAPTION, 1.0)
    for i in range(LLM_LAYERS):
        p, zero = f"blk.{i}.", i not in LLM_ACTIVE
        w.vector(p + "attn_norm.weight", CAPTION, 1.0)
        w.vector(p + "ffn_norm.weight", CAPTION, 1.0)
        w.matrix(p + "attn_q.weight", LLM_HEADS * HEAD, CAPTION, zero=zero)
        w.matrix(p + "attn_k.weight", LLM_KV_HEADS * HEAD, CAPTION, zero=zero)
        w.matrix(p + "attn_v.weight", LLM_KV_HEADS * HEAD, CAPTION, zero=zero)
        w.matrix(p + "attn_output.weight", CAPTION, LLM_HEADS * HEAD, 2 * small, zero=zero)
        w.vector(p + "attn_q_norm.weight", HEAD, 1.0)
        w.vector(p + "attn_k_norm.weight", HEAD, 1.0)
        w.matrix(p + "ffn_gate.weight", LLM_FF, CAPTION, zero=zero)
        w.matrix(p + "ffn_up.weight", LLM_FF, CAPTION, zero=zero)
        w.matrix(p + "ffn_down.weight", CAPTION, LLM_FF, 2 * small, zero=zero)
    w.close()


def write_autoencoder(path: Path, seed: int = 3) -> None:
    """Flux's autoencoder under its original names, f16; its pictures neither clip nor are flat."""
    save_file(dict(_autoencoder(np.random.default_rng(seed))), path)


def _autoencoder(rng: np.random.Generator) -> Tensors:
    def conv(name: str, n_in: int, n_out: int, k: int = 3, gain: float = 1.0) -> Tensors:
        weight = rng.standard_normal((n_out, n_in, k, k), np.float32) * np.float32(gain / math.sqrt(n_in * k * k))
        yield f"{name}.weight", weight.astype(np.float16)
        yield f"{name}.bias", (rng.standard_normal(n_out, np.float32) * np.float32(0.05)).astype(np.float16)

    def norm(name: str, n: int) -> Tensors:
        yield f"{name}.weight", (1 + rng.standard_normal(n, np.float32) * np.float32(0.2)).astype(np.float16)
        yield f"{name}.bias", (rng.standard_normal(n, np.float32) * np.float32(0.2)).astype(np.float16)

    def block(name: str, n_in: int, n_out: int) -> Tensors:
        yield from norm(f"{name}.norm1", n_in)
        yield from conv(f"{name}.conv1", n_in, n_out)
        yield from norm(f"{name}.norm2", n_out)
        yield from conv(f"{name}.conv2", n_out, n_out)
        if n_in != n_out:
            yield from conv(f"{name}.nin_shortcut", n_in, n_out, 1)

    def middle(name: str, n: int) -> Tensors:
        yield from block(f"{name}.block_1", n, n)
        yield from norm(f"{name}.attn_1.norm", n)
        for part in ("q", "k", "v", "proj_out"):
            yield from conv(f"{name}.attn_1.{part}", n, n, 1)
        yield from block(f"{name}.block_2", n, n)

    channels = (128, 256, 512, 512)
    yield from conv("encoder.conv_in", 3, channels[0])
    n = channels[0]
    for level, width in enumerate(channels):
        for i in range(2):
            yield from block(f"encoder.down.{level}.block.{i}", n, width)
            n = width
        if level < 3:
            yield from conv(f"encoder.down.{level}.downsample.conv", n, n)
    yield from middle("encoder.mid", n)
    yield from norm("encoder.norm_out", n)
    yield from conv("encoder.conv_out", n, 32, gain=2.0)
    yield from conv("decoder.conv_in", 16, n)
    yield from middle("decoder.mid", n)
    for level, width in reversed(list(enumerate(channels))):
        for i in range(3):
            yield from block(f"decoder.up.{level}.block.{i}", n, width)
            n = width
        if level > 0:
            yield from conv(f"decoder.up.{level}.upsample.conv", n, n)
    yield from norm("decoder.norm_out", n)
    yield from conv("decoder.conv_out", n, 3, gain=0.6)


MAKERS: Mapping[str, Callable[[Path], None]] = {
    "diffusion_f16": lambda path: write_z_image(path, Type.F16),
    "diffusion_q8_0": lambda path: write_z_image(path, Type.Q8_0),
    "llm_f16": lambda path: write_qwen3(path, Type.F16),
    "llm_q8_0": lambda path: write_qwen3(path, Type.Q8_0),
    "vae": write_autoencoder,
}


LORAS: Mapping[str, Callable[[Path], None]] = {
    "of-all": lambda path: write_lora(path),
    "of-qkv": lambda path: write_qkv_lora(path),
    "of-text": lambda path: write_text_lora(path),
}


def _factors(rng: np.random.Generator, n_out: int, n_in: int, rank: int = 16) -> tuple[Values, Values]:
    """(down, up) of a product with standard deviation 0.5 / sqrt(n_in), half of a weight's."""
    down = rng.standard_normal((rank, n_in), np.float32) / np.float32(math.sqrt(n_in))
    up = rng.standard_normal((n_out, rank), np.float32) * np.float32(0.5 / math.sqrt(rank))
    return down, up


def write_lora(path: Path, seed: int = 4) -> None:
    """diffusers' names, f16: every matrix of some blocks, q, k and v apart."""
    rng, tensors = np.random.default_rng(seed), {}
    matrices = {
        "attention.to_q": (DIM, DIM), "attention.to_k": (DIM, DIM), "attention.to_v": (DIM, DIM),
        "attention.to_out.0": (DIM, DIM), "feed_forward.w1": (FF, DIM), "feed_forward.w2": (DIM, FF),
        "feed_forward.w3": (FF, DIM),
    }  # fmt: skip
    for block in ("layers.0", "layers.7", "layers.29", "noise_refiner.1", "context_refiner.0"):
        for name, (n_out, n_in) in matrices.items():
            down, up = _factors(rng, n_out, n_in)
            tensors[f"transformer.{block}.{name}.lora_A.weight"] = down.astype(np.float16)
            tensors[f"transformer.{block}.{name}.lora_B.weight"] = up.astype(np.float16)
    save_file(tensors, path)


def write_qkv_lora(path: Path, seed: int = 5) -> None:
    """Single-file names, f32, with alpha: a fused qkv and a modulation."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, n_out, n_in in (("29.attention.qkv", 3 * DIM, DIM), ("0.adaLN_modulation.0", 4 * DIM, 256)):
        down, up = _factors(rng, n_out, n_in)
        stem = f"diffusion_model.layers.{name}"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": np.float32([12])}
    save_file(tensors, path)


def write_text_lora(path: Path, seed: int = 6) -> None:
    """Hugging Face's names behind stable-diffusion.cpp's prefix: two layers of the text encoder."""
    rng, tensors = np.random.default_rng(seed), {}
    for layer in (0, 34):
        for name, n_out, n_in in (("self_attn.q_proj", LLM_HEADS * HEAD, CAPTION), ("mlp.down_proj", CAPTION, LLM_FF)):
            down, up = _factors(rng, n_out, n_in)
            stem = f"text_encoders.llm.model.layers.{layer}.{name}"
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    save_file(tensors, path)


def make_loras(folder: Path) -> dict[str, Path]:
    """Name -> file of LORAS in `folder`, each written unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, maker in LORAS.items():
        paths[name] = folder / f"{name}.safetensors"
        if not paths[name].exists():
            maker(paths[name])
    return paths


def make(
    folder: Path, keys: Collection[str] = tuple(FILES), *, files: Mapping[str, str] = FILES,
    makers: Mapping[str, Callable[[Path], None]] = MAKERS,
) -> dict[str, Path]:  # fmt: skip
    """Those of `files` in `folder` that `keys` name, each written unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for key in keys:
        name = files[key]
        paths[key] = folder / name
        if not paths[key].exists():
            part = folder / f".{name}.part"
            makers[key](part)
            part.rename(paths[key])
            print(f"wrote {paths[key]}, {paths[key].stat().st_size / 1e9:.2f} GB", file=sys.stderr)
    return paths


if __name__ == "__main__":
    make(Path(sys.argv[1]))
