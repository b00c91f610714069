"""What the models take, by `pyggml plan`'s reckoning: the table of docs/models.md.

    python benchmarks/memory_of_models.py [--size 1024] [--update]

Files of the models' real shapes are made for it that hold nothing: they take no room on the disk (sparse), and planning
reads headers alone. --update puts the table into docs/models.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.constants import GGML_QUANT_SIZES

import models
from models.autoencoder_kl import AutoencoderConfig, AutoencoderKL
from models.autoencoder_qwen import QwenAutoencoder, QwenAutoencoderConfig
from models.nn import Module
from models.prediction import stand_in
from models.qwen3 import Qwen3, Qwen3Config
from models.qwen25_vision import Qwen25Vision, VisionConfig
from models.qwen25_vl import Qwen25VL, Qwen25VLConfig
from models.qwen_image.transformer import QwenImageConfig, QwenImageTransformer
from models.z_image.transformer import ZImageConfig, ZImageTransformer
from studio.plan import predict_run

DOCS = Path(__file__).parents[1] / "docs" / "models.md"
MARKS = ("<!-- table of benchmarks/memory_of_models.py -->", "<!-- end of table -->")

Z_IMAGE = ZImageConfig(
    dim=3840, n_heads=30, head_dim=128, n_layers=30, n_noise_refiners=2, n_context_refiners=2, ff_dim=10240,
    text_dim=2560, patch_dim=64, t_hidden=1024, adaln_dim=256, axes_dims=(32, 48, 48), fused_qkv=True,
)  # fmt: skip
QWEN3 = Qwen3Config(
    dim=2560, n_layers=36, n_heads=32, n_kv_heads=8, head_dim=128, ff_dim=9728, n_vocab=151936
)  # fmt: skip
FLUX_VAE = AutoencoderConfig(channels=(128, 256, 512, 512), n_blocks=2, latent_channels=16)
QWEN_IMAGE = QwenImageConfig(
    dim=3072, n_heads=24, head_dim=128, n_layers=60, ff_dim=12288, text_dim=3584, patch_dim=64, axes_dims=(16, 56, 56)
)
QWEN25_VL = Qwen25VLConfig(
    dim=3584, n_layers=28, n_heads=28, n_kv_heads=4, head_dim=128, ff_dim=18944, n_vocab=152064, sections=(16, 24, 24)
)
TOWER = VisionConfig(
    dim=1280, n_layers=32, n_heads=16, ff_dim=3420, out_dim=3584, patch=14, window=112, full_blocks=(7, 15, 23, 31),
    fused_qkv=False, split_frames=True,
)  # fmt: skip
QWEN_VAE = QwenAutoencoderConfig(channels=(96, 192, 384, 384), latent_channels=16, picture_channels=3, n_frames=3)


def write_empty(path: Path, module: Module, matrices: Kind, metadata: dict[str, int] | None = None) -> int:
    """A file of the module's shapes without data: matrices in that type where their rows divide into its blocks, else
    in f16; vectors in f32. Returns its size in bytes.
    """
    writer = gguf.GGUFWriter(None, "none")
    for key, value in (metadata or {}).items():
        writer.add_uint32(key, value)
    total = 0
    for name, param in module.named_params():
        fits = param.ne[0] % GGML_QUANT_SIZES[matrices][0] == 0
        kind = Kind.F32 if len(param.ne) == 1 else matrices if fits else Kind.F16
        block, n_bytes = GGML_QUANT_SIZES[kind]
        size = int(np.prod(param.ne)) // block * n_bytes
        writer.add_tensor_info(name, param.ne[::-1], np.dtype(np.float32), size, raw_dtype=kind)
        total += -(-size // 32) * 32
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, -(-path.stat().st_size // 32) * 32 + total)
    return path.stat().st_size


def row(name: str, files: dict[str, Path], size: int, **call: Any) -> list[str]:
    """One line of the table."""
    encoder = bool(call.get("reference_images"))
    with models.load(**files, load=stand_in, encoder=encoder) as pipe:
        made = predict_run(pipe, "a photo of a red fox in the snow", width=size, height=size, **call)
    weights = max(p.weights for p in made.phases)
    figures = [sum(p.stat().st_size for p in files.values()), weights, made.private_peak, weights + made.private_peak]
    return [name, *(f"{n / 1e9:.1f} GB" for n in figures)]


def table(folder: Path, size: int) -> str:
    lines = [
        f"| {size}x{size} | files | weights in the largest phase | private memory | at full speed from |",
        "|---|---|---|---|---|",
    ]
    reference = folder / "reference.png"
    from PIL import Image

    Image.new("RGB", (size, size)).save(reference)
    for kind in (Kind.Q4_K, Kind.Q8_0):
        names: dict[str, tuple[Module, Kind, dict[str, int]]] = {
            "z_image": (ZImageTransformer(Z_IMAGE), kind, {}),
            "qwen3": (Qwen3(QWEN3), kind, {}),
            "ae": (AutoencoderKL(FLUX_VAE), Kind.F16, {}),
            "qwen_image": (QwenImageTransformer(QWEN_IMAGE), kind, {}),
            "qwen25_vl": (Qwen25VL(QWEN25_VL), kind, {"qwen2vl.attention.head_count": 28}),
            "tower": (Qwen25Vision(TOWER), Kind.F16, {"clip.vision.attention.head_count": 16}),
            "qwen_vae": (QwenAutoencoder(QWEN_VAE), Kind.F16, {}),
        }
        paths = {name: folder / f"{name}-{kind.name}.gguf" for name in names}
        for name, (module, matrices, metadata) in names.items():
            write_empty(paths[name], module, matrices, metadata)
        z_image = {"diffusion_model": paths["z_image"], "llm": paths["qwen3"], "vae": paths["ae"]}
        qwen = {"diffusion_model": paths["qwen_image"], "llm": paths["qwen25_vl"], "vae": paths["qwen_vae"]}
        edit = {**qwen, "llm_vision": paths["tower"]}
        label = {Kind.Q4_K: "q4_K", Kind.Q8_0: "q8_0"}[kind]
        rows = [
            row(f"Z-Image, {label}", z_image, size),
            row(f"Qwen-Image, {label}", qwen, size),
            row(f"Qwen-Image-Edit, {label}, one reference", edit, size, reference_images=[reference]),
        ]
        lines += [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--update", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = table(Path(folder), args.size)
    print(text)
    if args.update:
        page = DOCS.read_text(encoding="utf-8")
        before, rest = page.split(MARKS[0])
        DOCS.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
