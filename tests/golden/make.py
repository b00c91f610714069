"""Make the golden files of this folder: tiny random models of the reference implementations, and what they compute.

    python tests/golden/make.py [FOLDER [NAME...]]  needs torch, diffusers, transformers; takes seconds, no network

Each file is an .npz of plain arrays; `json` arrays hold settings. Models share their sizes, so that the pipeline file
stores no weights: it runs the three models of the other files.

    z_image_transformer.npz   config, weights/<diffusers name>, and two cases a (pads everywhere), b (no pads):
                              <case>/{latents [16,H,W], t, cap [L,64], out [16,H,W]}, a/block/<name> [tokens, 64]
                              (image tokens first, then caption, as diffusers joins them)
    qwen3.npz                 config, weights/<HF name>, <case>/{ids [L], hidden_2, hidden_3 [L,64]};
                              hidden_k is HF's hidden_states[-k]
    autoencoder_kl.npz        config, weights/<diffusers name>, {latents [16,h,w], decoded [3,H,W]} (latents as the
                              decoder takes them, unscaled) and {pixels [3,H,W] in [-1,1], mean, logvar [16,h,w]}
    qwen_image_transformer.npz  config, weights/<name>, layered/weights/<name> (what the layered model has besides), and
                              cases t2i, edit (two references), zero (edit with zero_cond_t), layered (two targets, one
                              reference): <case>/{targets [n,16,H,W], reference_<i> [16,H,W], t, text [L,48],
                              out [n,16,H,W]}
    qwen25_vl.npz             config, weights/<HF name> of language model and vision tower, and cases: text/{ids [L],
                              hidden [L,64]}, picture/{pixels [3,H,W], grid, tower [n,64], ids, hidden (positions one
                              after the other), hidden_grid (positions of the grid)}
    autoencoder_qwen.npz      config, weights/<diffusers name>, {latents [16,h,w] (unscaled), decoded [3,H,W]} and
                              {pixels [3,H,W] in [-1,1], mean [16,h,w]}
    autoencoder_tiny.npz      of taesd and taehv: weights/<kind>/<name> (diffusers' names; the original), <kind>/{
                              latents [16,h,w], decoded [3,H,W] in 0..1, not clipped}
    schedules.npz             shift_<s>/<n>: the n+1 sigmas of the Z-Image pipelines
    qwen_schedules.npz        text/<patches>/<n>: the n+1 sigmas of the Qwen-Image pipelines; layered/<patches>/<n>
    qwen_references.npz       <case>/{picture [H,W,3] uint8, autoencoder [3,H',W'] in -1..1, tower [n,1176]}: what the
                              pipeline of Edit-2509 makes of a reference, with smaller areas than the real
    noise.npz                 seed_<s>/<n>: torch.randn of a fresh CPU generator; mixed/<i>: calls on one generator
    pipeline.npz              tokenizer (a tokenizer.json), runs: settings and results of whole pipelines
    qwen_pipeline.npz         the same of the Qwen-Image pipelines, with smaller areas than the real: tokenizer, areas,
                              runs; weights/<name> and layered/weights/<name> replace some of the transformer's,
                              layered/vae/<name> some of the autoencoder's; <run>/{picture_<i> [H,W,3 or 4] uint8, mask
                              [H,W] uint8, ids, negative_ids, latents_<i> [16,h,w] or of layers [n+1,16,h,w], sigmas},
                              and of some runs prompt_embeds, start, image

Weights are multiples of a power of two with few bits: the same in f16 and bf16, and the files stay small.
Norms, biases and pad tokens are random too, so that a forgotten one shows; what goes into q/k norms and into the second
norms of the autoencoder is small, so that a wrong epsilon shows.
"""

from __future__ import annotations

import io
import json
import math
import sys
import zipfile
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImageLayeredPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.transformers.transformer_z_image import TimestepEmbedder
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_plus,
    pipeline_qwenimage_layered,
)
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift, retrieve_timesteps
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.nn import functional
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2_5_VLProcessor,
    Qwen3Config,
    Qwen3Model,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

Arrays = dict[str, np.ndarray]

DIM = 64
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = ("user", "assistant", " red", " circle", " blue")
# The tokenizer of Qwen2.5-VL has fewer words, so that its special tokens have the numbers of make_vl_encoder.
VL_SPECIAL = (*SPECIAL, "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
VL_WORDS = tuple(word for word in WORDS if word != " red")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STEPS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 25, 28, 30, 40, 50)
SEEDS = (0, 42, 123456789, 2**32 + 5)
SIZES = (1, 2, 7, 15, 16, 17, 31, 64, 100, 2240)
AUTOENCODER_AREA, TOWER_AREA = 96 * 96, 80 * 80
MIXED = (7, 16, 3, 33, 1, 2)


# -- weights ---------------------------------------------------------------------------------------------------------


def randomize(module: torch.nn.Module, seed: int, levels: float = 4.0) -> None:
    """Fill every parameter: matrices with std 1/sqrt(fan in), norms around 1, biases and tokens around 0.

    `levels` is how many steps of the grid one standard deviation spans: fewer make smaller files.
    """
    rng = np.random.default_rng(seed)
    for name, p in module.named_parameters():
        shape = tuple(p.shape)
        if name.endswith("pad_token"):
            mean, std = 0.0, 1.0
        elif len(shape) >= 2 and "embed_tokens" not in name and not name.endswith("gamma"):
            mean, std = 0.0, 1.0 / math.sqrt(math.prod(shape[1:]))
        elif name.endswith("bias"):
            mean, std = 0.0, 0.2
        elif "norm" in name or name.endswith("gamma") or name.startswith("cap_embedder.0"):
            mean, std = 1.0, 0.25
        else:
            mean, std = 0.0, 1.0
        step = 2.0 ** round(math.log2(std / levels))
        values = np.clip(np.rint(rng.standard_normal(shape) * std / step), -4 * levels, 4 * levels)
        p.data = torch.from_numpy((mean + values * step).astype(np.float32))


def weights(module: torch.nn.Module) -> Arrays:
    return {f"weights/{name}": t.detach().numpy() for name, t in module.state_dict().items()}


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def shrink(module: torch.nn.Module, endings: tuple[str, ...], factor: float) -> None:
    """Scale parameters by a power of two, to bring the variance before a norm near that norm's epsilon."""
    for name, p in module.named_parameters():
        if name.endswith(endings):
            p.data *= factor


def text(value: Mapping[str, object]) -> np.ndarray:
    return np.array(json.dumps({k: v for k, v in value.items() if not k.startswith("_")}, sort_keys=True))


# -- the models ------------------------------------------------------------------------------------------------------


def make_transformer() -> ZImageTransformer2DModel:
    model = ZImageTransformer2DModel(
        in_channels=16,
        dim=DIM,
        n_layers=2,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=DIM,
        axes_dims=[8, 12, 12],
        axes_lens=[128, 32, 32],
    )
    # diffusers fixes the hidden width of the time MLP to 1024, a megabyte; the width is no part of the arithmetic
    model.t_embedder = TimestepEmbedder(DIM, mid_size=128)
    randomize(model, seed=1)
    shrink(model, ("to_q.weight", "to_k.weight"), 2**-5)
    return model.eval()


def make_qwen_transformer(
    zero_cond_t: bool = False, layered: bool = False, text_dim: int = 48
) -> QwenImageTransformer2DModel:
    sizes = dict(
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(4, 14, 14),
    )
    model = QwenImageTransformer2DModel(**sizes)
    randomize(model, seed=4, levels=2.0)
    if text_dim != 48:  # the same weights but for those that take the text
        sizes["joint_attention_dim"] = text_dim
        other = QwenImageTransformer2DModel(**sizes)
        randomize(other, seed=8, levels=2.0)
        same = {k: v for k, v in model.state_dict().items() if not k.startswith(("txt_norm.", "txt_in.weight"))}
        other.load_state_dict(same, strict=False)
        model = other
    shrink(model, ("to_q.weight", "to_k.weight", "add_q_proj.weight", "add_k_proj.weight"), 2**-5)
    if zero_cond_t or layered:  # the same weights
        other = QwenImageTransformer2DModel(
            **sizes, zero_cond_t=zero_cond_t, use_additional_t_cond=layered, use_layer3d_rope=layered
        )
        randomize(other, seed=5, levels=2.0)
        other.load_state_dict(model.state_dict(), strict=False)
        model = other
    return model.eval()


def make_text_encoder() -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=288,
        hidden_size=DIM,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        max_position_embeddings=1024,
    )
    config._attn_implementation = "eager"
    model = Qwen3Model(config)
    randomize(model, seed=2)
    shrink(model, ("q_proj.weight", "k_proj.weight"), 2**-8)
    return model.eval()


def make_vl_encoder() -> Qwen2_5_VLModel:
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=288,
            hidden_size=DIM,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            max_position_embeddings=1024,
            tie_word_embeddings=False,
        ),
        vision_config=dict(
            depth=3, hidden_size=48, intermediate_size=40, num_heads=2, out_hidden_size=DIM, fullatt_block_indexes=[1]
        ),
        image_token_id=280,
        video_token_id=281,
        vision_start_token_id=282,
        vision_end_token_id=283,
    )
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation = "eager"
    model = Qwen2_5_VLModel(config)
    randomize(model, seed=6, levels=2.0)
    return model.eval()


def make_autoencoder() -> AutoencoderKL:
    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(64, 32, 32, 32),
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=True,
    )
    randomize(model, seed=3, levels=1.5)
    shrink(model, ("conv1.weight", "conv1.bias"), 2**-7)
    shrink(model.decoder, ("conv_out.weight",), 2**-2)  # clamping to [-1, 1] would hide differences
    return model.eval()


def make_qwen_autoencoder(layered: bool = False) -> AutoencoderKLQwenImage:
    model = AutoencoderKLQwenImage(base_dim=8, z_dim=16)
    randomize(model, seed=7, levels=1.5)
    if layered:  # the same weights but for those of the picture's channels
        other = AutoencoderKLQwenImage(base_dim=8, z_dim=16, input_channels=4)
        randomize(other, seed=9, levels=1.5)
        state = other.state_dict()
        other.load_state_dict({k: v for k, v in model.state_dict().items() if v.shape == state[k].shape}, strict=False)
        model = other
    shrink(model, ("time_conv.weight",), 0.0)  # they do not run; as zeros they take no room
    for name, p in model.named_parameters():
        if name.endswith("time_conv.weight"):
            p.data.view(-1)[0] = 1
    return model.eval()


class TinyVideoDecoder(torch.nn.Module):
    """TAEHV's decoder for Wan 2.1 as its author describes it: no package has it. All frames at once, none left out."""

    def __init__(self, channels: tuple[int, ...] = (24, 16, 8, 8), n_frames: tuple[int, ...] = (1, 2, 2)) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterDict()
        self.n_out = 4  # frames made of one, of which the last is the picture of a single latent
        self._add(1, 16, channels[0])
        for level, (n, n_next) in enumerate(pairwise(channels)):
            first = 3 + 6 * level
            for i in range(first, first + 3):
                for j, n_in in ((0, 2 * n), (2, n), (4, n)):
                    self._add(f"{i}.conv.{j}", n_in, n)
            self._add(f"{first + 4}.conv", n, n * n_frames[level], size=1, bias=False)
            self._add(f"{first + 5}", n, n_next, bias=False)
        self._add(22, channels[-1], 3)

    def _add(self, name: object, n_in: int, n_out: int, size: int = 3, bias: bool = True) -> None:
        self.weights[f"{name}/weight".replace(".", "-")] = torch.nn.Parameter(torch.zeros(n_out, n_in, size, size))
        if bias:
            self.weights[f"{name}/bias".replace(".", "-")] = torch.nn.Parameter(torch.zeros(n_out))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"decoder." + k.replace("/", ".").replace("-", "."): p.data for k, p in self.weights.items()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Latents [n, 16, h, w] of the frames of a video to its pictures [4 n - 3, 3, 8 h, 8 w]."""
        w = self.tensors()

        def conv(name: str, x: torch.Tensor) -> torch.Tensor:
            kernel = w[f"decoder.{name}.weight"]
            return functional.conv2d(x, kernel, w.get(f"decoder.{name}.bias"), padding=kernel.shape[-1] // 2)

        x = conv("1", 3 * torch.tanh(x / 3)).relu()
        for first in (3, 9, 15):
            for i in range(first, first + 3):
                before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
                h = conv(f"{i}.conv.0", torch.cat([x, before], dim=1)).relu()
                x = (x + conv(f"{i}.conv.4", conv(f"{i}.conv.2", h).relu())).relu()
            x = functional.interpolate(x, scale_factor=2)
            grown = conv(f"{first + 4}.conv", x)
            x = conv(f"{first + 5}", grown.reshape(-1, *x.shape[1:]))
        return conv("22", x.relu())[self.n_out - 1 :]


def make_tiny_autoencoder() -> AutoencoderTiny:
    model = AutoencoderTiny(
        latent_channels=16, encoder_block_out_channels=(4, 4, 4, 4), decoder_block_out_channels=(16, 16, 16, 16)
    )
    randomize(model, seed=10, levels=1.5)
    return model.eval()


def make_tiny_video_decoder() -> TinyVideoDecoder:
    model = TinyVideoDecoder()
    randomize(model, seed=11, levels=1.5)
    return model.eval()


def make_scheduler(shift: float) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, use_dynamic_shifting=False, shift=shift)


def make_qwen_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192,
        shift=1.0, shift_terminal=0.02, time_shift_type="exponential", num_train_timesteps=1000,
    )  # fmt: skip


def make_tokenizer(words: Iterable[str] = WORDS, special: Iterable[str] = SPECIAL) -> PreTrainedTokenizerFast:
    """A byte-level BPE in the form of Qwen2's, with 256 bytes, the merges of `words` and some special tokens."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word in words:
        left = ""
        for c in word.replace(" ", "\u0120"):
            if left and left + c not in vocab:
                merges.append((left, c))
                vocab[left + c] = len(vocab)
            left += c
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        padding_side="right",
    )


# -- the files -------------------------------------------------------------------------------------------------------


def z_image_transformer() -> Arrays:
    model = make_transformer()
    out = {"config": text(dict(model.config)), **weights(model)}
    blocks: Arrays = {}
    for name, module in model.named_modules():
        if name in ("t_embedder", "cap_embedder") or name.rsplit(".", 1)[0] in (
            "noise_refiner",
            "context_refiner",
            "layers",
        ):

            def keep(_m: object, _i: object, output: torch.Tensor, name: str = name) -> None:
                blocks[name] = output.detach().reshape(-1, output.shape[-1]).numpy()

            module.register_forward_hook(keep)
    cases = {"a": (10, 14, 21, 0.3), "b": (8, 16, 32, 0.85)}
    for i, (case, (height, width, length, t)) in enumerate(cases.items()):
        x, cap = gaussian(10 + i, 16, height, width), gaussian(20 + i, length, DIM)
        sample = model([x[:, None]], torch.tensor([t]), [cap], return_dict=False)[0][0][:, 0]
        arrays = {"latents": x.numpy(), "t": np.float32(t), "cap": cap.numpy(), "out": sample.numpy()}
        out.update({f"{case}/{k}": np.asarray(v) for k, v in arrays.items()})
        if case == "a":
            out.update({f"a/block/{k}": v for k, v in blocks.items()})
    return out


def qwen3() -> Arrays:
    model = make_text_encoder()
    keep = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "rms_norm_eps")  # fmt: skip
    config = {k: getattr(model.config, k) for k in keep} | {"rope_theta": 1e6}
    out = {"config": text(config), **weights(model)}
    for case, length in (("a", 37), ("b", 1)):
        ids = np.random.default_rng(30 + length).integers(0, model.config.vocab_size, length)
        states = model(torch.from_numpy(ids)[None], output_hidden_states=True).hidden_states
        out[f"{case}/ids"] = ids.astype(np.int32)
        out[f"{case}/hidden_2"] = states[-2][0].numpy()
        out[f"{case}/hidden_3"] = states[-3][0].numpy()
    return out


def qwen25_vl() -> Arrays:
    model = make_vl_encoder()
    c = model.config
    keep = {
        "text_config": ("num_attention_heads", "rms_norm_eps", "rope_parameters"),
        "vision_config": ("num_heads", "fullatt_block_indexes", "window_size"),
    }
    config = {part: {k: getattr(getattr(c, part), k) for k in keys} for part, keys in keep.items()}
    out = {"config": text(config), **weights(model)}
    ids = np.random.default_rng(90).integers(0, 270, 29)
    hidden = model(torch.from_numpy(ids)[None], output_hidden_states=True).hidden_states[-1][0]
    out |= {"text/ids": ids.astype(np.int32), "text/hidden": hidden.numpy()}
    # 12 x 10 patches: four windows of different sizes. A processor's order: by squares of 2 x 2 patches, frames inside.
    rows, columns = 12, 10
    pixels = torch.round(3 * gaussian(91, 3, 14 * rows, 14 * columns)) / 4
    blocks = pixels.reshape(3, rows // 2, 2, 14, columns // 2, 2, 14).permute(1, 4, 2, 5, 0, 3, 6)
    patches = blocks.unsqueeze(5).expand(*blocks.shape[:5], 2, 14, 14).reshape(rows * columns, -1)
    grid = torch.tensor([[1, rows, columns]])
    n = rows * columns // 4
    before, after = (np.random.default_rng(s).integers(0, 270, k) for s, k in ((92, 5), (93, 7)))
    ids = np.concatenate([before, [c.vision_start_token_id], [c.image_token_id] * n, [c.vision_end_token_id], after])
    tokens = torch.from_numpy(ids)[None]
    arrays = {"pixels": pixels, "grid": grid[0].int(), "ids": tokens[0].int()}
    arrays["tower"] = model.get_image_features(patches, grid).pooler_output[0]
    for name, kinds in (("hidden", None), ("hidden_grid", (tokens == c.image_token_id).int())):
        result = model(
            tokens, pixel_values=patches, image_grid_thw=grid, mm_token_type_ids=kinds, output_hidden_states=True
        )
        arrays[name] = result.hidden_states[-1][0]
    return out | {f"picture/{k}": v.numpy() for k, v in arrays.items()}


def autoencoder_kl() -> Arrays:
    model = make_autoencoder()
    out = {"config": text(dict(model.config)), **weights(model)}
    latents = gaussian(40, 16, 5, 7)
    out["latents"] = latents.numpy()
    out["decoded"] = model.decode(latents[None], return_dict=False)[0][0].numpy()
    pixels = torch.tanh(gaussian(41, 3, 40, 56))
    posterior = model.encode(pixels[None]).latent_dist
    out["pixels"] = pixels.numpy()
    out["mean"] = posterior.mean[0].numpy()
    out["logvar"] = posterior.logvar[0].numpy()
    return out


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[16, H, W] to tokens [H/2 * W/2, 64], by the pipeline's own function."""
    c, h, w = latents.shape
    return QwenImagePipeline._pack_latents(latents[None], 1, c, h, w)[0]


def qwen_image_transformer() -> Arrays:
    model = make_qwen_transformer()
    out = {"config": text(dict(model.config)), **weights(model)}
    grids = {  # latents of the targets, then of the references
        "t2i": ([(10, 14)], [], 21, 0.3),
        "edit": ([(10, 14)], [(6, 8), (12, 18)], 9, 0.85),
        "zero": ([(10, 14)], [(6, 8), (12, 18)], 9, 0.85),
        "layered": ([(8, 6)] * 6, [(8, 6)], 5, 0.6),
    }
    for case, (targets, references, length, t) in grids.items():
        model = make_qwen_transformer(zero_cond_t=case == "zero", layered=case == "layered")
        x = torch.stack([gaussian(60 + i, 16, *size) for i, size in enumerate(targets)])
        refs = [gaussian(70 + i, 16, *size) for i, size in enumerate(references)]
        features = gaussian(80, length, 48)
        tokens = torch.cat([pack(y) for y in (*x, *refs)])
        n = sum(h * w // 4 for h, w in targets)
        velocity = model(
            tokens[None],
            encoder_hidden_states=features[None],
            timestep=torch.tensor([t]),
            img_shapes=[[(1, h // 2, w // 2) for h, w in (*targets, *references)]],
            additional_t_cond=torch.tensor([0]) if case == "layered" else None,
            return_dict=False,
        )[0][0, :n]
        h, w = targets[0]
        parts = velocity.reshape(len(targets), -1, 64)
        pictures = [QwenImagePipeline._unpack_latents(p[None], 8 * h, 8 * w, 8)[0, :, 0] for p in parts]
        arrays = {"targets": x, "t": torch.tensor(t), "text": features, "out": torch.stack(pictures)}
        arrays |= {f"reference_{i}": y for i, y in enumerate(refs)}
        out |= {f"{case}/{k}": v.numpy() for k, v in arrays.items()}
        if case == "layered":
            out |= {f"layered/{k}": v for k, v in weights(model).items() if "addition" in k}
    return out


def autoencoder_qwen() -> Arrays:
    model = make_qwen_autoencoder()
    out = {"config": text(dict(model.config)), **weights(model)}
    latents = gaussian(100, 16, 5, 7)
    blocks: list[torch.Tensor] = []  # the decoder clamps its last layer's output
    model.decoder.conv_out.register_forward_hook(lambda _m, _i, output: blocks.append(output))
    model.decode(latents[None, :, None], return_dict=False)
    pixels = torch.round(8 * torch.tanh(gaussian(101, 3, 40, 56))) / 8
    mean = model.encode(pixels[None, :, None]).latent_dist.mean[0, :, 0]
    arrays = {"latents": latents, "decoded": blocks[0][0, :, 0], "pixels": pixels, "mean": mean}
    return out | {k: v.numpy() for k, v in arrays.items()}


def autoencoder_tiny() -> Arrays:
    image, video = make_tiny_autoencoder(), make_tiny_video_decoder()
    latents = 2 * gaussian(110, 16, 5, 7)  # beyond 3 too, where they are bent
    out = {f"weights/taesd/{name}": t.numpy() for name, t in image.state_dict().items()}
    out |= {f"weights/taehv/{name}": t.numpy() for name, t in video.tensors().items()}
    out["taesd/latents"] = out["taehv/latents"] = latents.numpy()
    out["taesd/decoded"] = (image.decode(latents[None]).sample[0].numpy() + 1) / 2  # diffusers' are in -1..1
    out["taehv/decoded"] = video(latents[None])[0].numpy()
    return out


def schedules() -> Arrays:
    out: Arrays = {}
    for shift in (3.0, 6.0):
        for n in STEPS:
            scheduler = make_scheduler(shift)
            scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(n), mu=0.5)
            out[f"shift_{shift:g}/{n}"] = scheduler.sigmas.numpy()
    return out


def qwen_schedules() -> Arrays:
    out: Arrays = {}
    for n in STEPS[1:]:  # the stretch divides by zero for one step
        for n_tokens in (256, 1024, 4096, 6889):
            scheduler = make_qwen_scheduler()
            mu = calculate_shift(n_tokens, 256, 8192, 0.5, 0.9)
            retrieve_timesteps(scheduler, n, "cpu", sigmas=np.linspace(1.0, 1 / n, n), mu=mu)
            out[f"text/{n_tokens}/{n}"] = scheduler.sigmas.numpy()
            if n_tokens == 1024:
                levels = np.linspace(1.0, 0, n + 1)[:-1]
                retrieve_timesteps(scheduler, n, "cpu", sigmas=levels, mu=(n_tokens / 256) ** 0.5)
                out[f"layered/{n_tokens}/{n}"] = scheduler.sigmas.numpy()
    return out


def qwen_references() -> Arrays:
    out: Arrays = {"areas": np.array([AUTOENCODER_AREA, TOWER_AREA], np.int32)}
    resize = VaeImageProcessor(vae_scale_factor=16)
    processor = Qwen2VLImageProcessorPil()
    for i, (height, width) in enumerate([(40, 61), (150, 90)]):
        wave = np.sin(np.arange(height)[:, None] / 5) + np.cos(np.arange(width) / 7)
        picture = np.rint(60 * np.stack([wave, wave[::-1], -wave], -1) + 128).astype(np.uint8)
        image = Image.fromarray(picture)
        w, h = calculate_dimensions(AUTOENCODER_AREA, width / height)
        seen = resize.resize(image, *calculate_dimensions(TOWER_AREA, width / height)[::-1])
        out[f"{i}/picture"] = picture
        out[f"{i}/autoencoder"] = resize.preprocess(image, h, w)[0].numpy()
        out[f"{i}/tower"] = np.asarray(processor(seen, return_tensors="np")["pixel_values"], np.float32)
    return out


def noise() -> Arrays:
    out: Arrays = {}
    for seed in SEEDS:
        for n in SIZES:
            out[f"seed_{seed}/{n}"] = torch.randn(n, generator=torch.Generator().manual_seed(seed)).numpy()
    generator = torch.Generator().manual_seed(7)
    for i, n in enumerate(MIXED):
        out[f"mixed/{i}"] = torch.randn(n, generator=generator).numpy()
    return out


RUNS: dict[str, dict[str, Any]] = {
    "turbo": {"shift": 3.0, "steps": 4, "guidance_scale": 0.0, "seed": 42, "prompt": "a red circle"},
    "base": {"shift": 6.0, "steps": 4, "guidance_scale": 2.0, "seed": 7, "prompt": "a red circle",
             "negative_prompt": "d\u00e9j\u00e0 vu"},
    "normalized": {"shift": 6.0, "steps": 3, "guidance_scale": 2.0, "seed": 7, "prompt": " blue",
                   "cfg_normalization": 1.0},
    "truncated": {"shift": 3.0, "steps": 4, "guidance_scale": 2.0, "seed": 7, "prompt": " blue",
                  "cfg_truncation": 0.2},
    "img2img": {"shift": 3.0, "steps": 5, "guidance_scale": 0.0, "seed": 3, "prompt": " blue", "strength": 0.6},
    "inpaint": {"shift": 3.0, "steps": 5, "guidance_scale": 2.0, "seed": 4, "prompt": " blue", "strength": 0.8,
                "negative_prompt": "a red circle", "mask": "L 61 40"},
}  # fmt: skip
WITH_PICTURE = ("turbo", "base", "img2img")
HEIGHT, WIDTH = 48, 80


def pipeline() -> Arrays:
    parts = {
        "transformer": make_transformer(),
        "text_encoder": make_text_encoder(),
        "vae": make_autoencoder(),
        "tokenizer": make_tokenizer(),
    }
    picture = np.rint((np.tanh(gaussian(50, HEIGHT, WIDTH, 3).numpy()) + 1) / 2 * 255).astype(np.uint8)
    out: Arrays = {
        "tokenizer": np.array(parts["tokenizer"].backend_tokenizer.to_str()),
        "runs": text({name: run | {"height": HEIGHT, "width": WIDTH} for name, run in RUNS.items()}),
        "img2img/init_image": picture,
        "inpaint/init_image": picture,
    }
    for name, settings in RUNS.items():
        run = dict(settings)
        img2img, mask = "strength" in run, run.pop("mask", None)
        make = ZImageImg2ImgPipeline if img2img else ZImagePipeline
        make = ZImageInpaintPipeline if mask else make
        pipe = make(scheduler=make_scheduler(run.pop("shift")), **parts)
        pipe.set_progress_bar_config(disable=True)
        tape: Arrays = {}
        record(pipe, "prepare_latents", tape, lambda r: {"start": r[0].numpy()})
        record(
            pipe,
            "encode_prompt",
            tape,
            lambda r: {"prompt_embeds": r[0][0].numpy(), **({"negative_embeds": r[1][0].numpy()} if r[1] else {})},
        )

        def on_step(
            _p: object, i: int, _t: object, kwargs: dict[str, torch.Tensor], tape: Arrays = tape
        ) -> dict[str, Any]:
            tape[f"latents_{i}"] = kwargs["latents"][0].numpy().copy()
            return {}

        if img2img:
            run |= {"image": torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255}
        if mask:
            tape["mask"] = waves(mask)
            run["mask_image"] = Image.fromarray(tape["mask"])
        result = pipe(
            run.pop("prompt"),
            num_inference_steps=run.pop("steps"),
            generator=torch.Generator().manual_seed(run.pop("seed")),
            height=HEIGHT,
            width=WIDTH,
            output_type="np",
            callback_on_step_end=on_step,
            **run,
        )
        tape["sigmas"] = pipe.scheduler.sigmas.numpy()
        if name in WITH_PICTURE:
            tape["image"] = result.images[0]
        out.update({f"{name}/{k}": v for k, v in tape.items()})
    return out


QWEN_RUNS: dict[str, dict[str, Any]] = {
    "text": {"pipeline": "QwenImagePipeline", "height": 48, "width": 80, "steps": 4, "true_cfg_scale": 4.0, "seed": 42,
             "prompt": "a red circle", "negative_prompt": "d\u00e9j\u00e0 vu"},
    "unguided": {"pipeline": "QwenImagePipeline", "height": 64, "width": 32, "steps": 3, "true_cfg_scale": 1.0,
                 "seed": 2, "prompt": " blue"},
    "img2img": {"pipeline": "QwenImageImg2ImgPipeline", "pictures": ["RGB 61 40"], "height": 48, "width": 80,
                "steps": 5, "strength": 0.6, "true_cfg_scale": 3.0, "seed": 3, "prompt": " blue",
                "negative_prompt": ""},
    "inpaint": {"pipeline": "QwenImageInpaintPipeline", "pictures": ["RGB 80 48"], "mask": "L 61 40", "height": 48,
                "width": 80, "steps": 5, "strength": 0.8, "true_cfg_scale": 2.0, "seed": 4, "prompt": " blue",
                "negative_prompt": " "},
    "edit": {"pipeline": "QwenImageEditPipeline", "pictures": ["RGB 120 80"], "steps": 3, "true_cfg_scale": 4.0,
             "seed": 5, "prompt": "a red circle", "negative_prompt": " "},
    "edit_2509": {"pipeline": "QwenImageEditPlusPipeline", "pictures": ["RGB 61 40"], "height": 64, "width": 48,
                  "steps": 3, "true_cfg_scale": 1.0, "seed": 6, "prompt": "a red circle"},
    "edit_2509_two": {"pipeline": "QwenImageEditPlusPipeline", "pictures": ["RGB 61 40", "RGB 90 150"], "steps": 3,
                      "true_cfg_scale": 4.0, "seed": 7, "prompt": "a red circle", "negative_prompt": " "},
    "edit_2511": {"pipeline": "QwenImageEditPlusPipeline", "pictures": ["RGB 61 40", "RGB 90 150"], "steps": 3,
                  "true_cfg_scale": 4.0, "seed": 8, "prompt": " blue circle", "negative_prompt": ""},
    "layered": {"pipeline": "QwenImageLayeredPipeline", "pictures": ["RGBA 90 60"], "layers": 2, "steps": 3,
                "true_cfg_scale": 4.0, "seed": 9, "prompt": "a red circle", "negative_prompt": " "},
}  # fmt: skip
QWEN_PIPELINES = {
    make.__name__: make
    for make in (QwenImagePipeline, QwenImageImg2ImgPipeline, QwenImageInpaintPipeline, QwenImageEditPipeline,
                 QwenImageEditPlusPipeline, QwenImageLayeredPipeline)
}  # fmt: skip
LAYERED_AREA = 64 * 64


class Processor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's, without the part for videos."""

    def check_argument_for_proper_class(self, argument_name: str, argument: object) -> type:
        return type(argument)


def waves(kind: str) -> np.ndarray:
    """A smooth picture, "MODE WIDTH HEIGHT"."""
    mode, *sides = kind.split()
    width, height = map(int, sides)
    wave = np.sin(np.arange(height)[:, None] / 5) + np.cos(np.arange(width) / 7)
    planes = [wave, wave[::-1], -wave, wave[:, ::-1]]
    picture = np.rint(60 * np.stack(planes, -1) + 128).astype(np.uint8)
    return picture[..., 0] if mode == "L" else picture[..., : len(mode)]


def qwen_pipeline() -> Arrays:
    small = {1024 * 1024: AUTOENCODER_AREA, 384 * 384: TOWER_AREA, 640 * 640: LAYERED_AREA}
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus, pipeline_qwenimage_layered):
        def smaller(area: int, ratio: float, real: Any = module.calculate_dimensions) -> Any:
            return real(small.get(area, area), ratio)

        module.calculate_dimensions = smaller  # type: ignore[attr-defined]
    tokenizer = make_tokenizer(VL_WORDS, VL_SPECIAL)
    processor = Processor(Qwen2VLImageProcessorPil(), tokenizer, None)
    encoder = make_vl_encoder()
    base = weights(make_qwen_transformer(text_dim=DIM))
    vae, plain = weights(make_qwen_autoencoder(layered=True)), make_qwen_autoencoder().state_dict()
    out: Arrays = {
        "tokenizer": np.array(tokenizer.backend_tokenizer.to_str()),
        "areas": np.array([AUTOENCODER_AREA, TOWER_AREA, LAYERED_AREA], np.int32),
        "runs": text(QWEN_RUNS),
        **{k: base[k] for k in ("weights/txt_norm.weight", "weights/txt_in.weight")},
        **{f"layered/{k}": v for k, v in weights(make_qwen_transformer(layered=True, text_dim=DIM)).items()
           if "addition" in k},
        **{f"layered/vae/{k.removeprefix('weights/')}": v for k, v in vae.items()
           if v.shape != plain[k.removeprefix("weights/")].shape},
    }  # fmt: skip
    for name, settings in QWEN_RUNS.items():
        run = dict(settings)
        make = QWEN_PIPELINES[run.pop("pipeline")]
        layered = make is QwenImageLayeredPipeline
        parts: dict[str, Any] = {
            "transformer": make_qwen_transformer(name == "edit_2511", layered, DIM),
            "vae": make_qwen_autoencoder(layered), "text_encoder": encoder, "tokenizer": tokenizer,
            "scheduler": make_qwen_scheduler(),
        }  # fmt: skip
        if layered or "edit" in name:
            parts["processor"] = processor
        pipe = make(**parts)
        pipe.set_progress_bar_config(disable=True)
        tape: Arrays = {}
        pictures = [waves(kind) for kind in run.pop("pictures", [])]
        tape |= {f"picture_{i}": picture for i, picture in enumerate(pictures)}
        images = [Image.fromarray(picture) for picture in pictures]
        if images:
            run["image"] = images if len(images) > 1 else images[0]
        if "mask" in run:
            tape["mask"] = waves(run.pop("mask"))
            run["mask_image"] = Image.fromarray(tape["mask"])
        ids: list[np.ndarray] = []
        hook = encoder.register_forward_pre_hook(
            lambda _m, _a, kwargs, ids=ids: ids.append(kwargs["input_ids"][0].numpy().astype(np.int32)),
            with_kwargs=True,
        )
        embeds: list[np.ndarray] = []
        packed: list[torch.Tensor] = []
        record(pipe, "encode_prompt", tape, lambda r, embeds=embeds: embeds.append(r[0][0].numpy()) or {})
        record(pipe, "prepare_latents", tape,
               lambda r, packed=packed: packed.append(r[0] if isinstance(r, tuple) else r) or {})  # fmt: skip

        def on_step(
            _p: object, i: int, _t: object, kwargs: dict[str, torch.Tensor], packed: list[torch.Tensor] = packed
        ) -> dict[str, Any]:
            packed.append(kwargs["latents"].clone())
            return {}

        result = pipe(
            prompt=run.pop("prompt"),
            num_inference_steps=run.pop("steps"),
            generator=torch.Generator().manual_seed(run.pop("seed")),
            output_type="np",
            callback_on_step_end=on_step,
            **run,
        )
        hook.remove()
        image = result.images[0]
        tape |= {f"{k}ids": v for k, v in zip(("", "negative_"), ids, strict=False)}
        if name in ("text", "edit_2509_two"):
            tape["prompt_embeds"] = embeds[0]
        for i, tokens in enumerate(packed):
            n = run["layers"] + 1 if layered else 1
            frames = [QwenImagePipeline._unpack_latents(part, *image.shape[-3:-1], 8)[0, :, 0]
                      for part in tokens.chunk(n, 1)]  # fmt: skip
            if i or "strength" in settings:  # else it is plain noise
                tape[f"latents_{i - 1}" if i else "start"] = (torch.stack(frames) if layered else frames[0]).numpy()
        tape["sigmas"] = pipe.scheduler.sigmas.numpy()
        if name in ("text", "img2img", "layered"):
            tape["image"] = image
        out.update({f"{name}/{k}": v for k, v in tape.items()})
    return out


def record(owner: object, method: str, tape: Arrays, pick: Any) -> None:
    """Keep on `tape` what a method of the pipeline returns."""
    call = getattr(owner, method)

    def recorded(*args: object, **kwargs: object) -> object:
        result = call(*args, **kwargs)
        tape.update(pick(result))
        return result

    setattr(owner, method, recorded)


FILES = {
    "z_image_transformer": z_image_transformer,
    "qwen3": qwen3,
    "qwen25_vl": qwen25_vl,
    "autoencoder_qwen": autoencoder_qwen,
    "qwen_image_transformer": qwen_image_transformer,
    "autoencoder_kl": autoencoder_kl,
    "autoencoder_tiny": autoencoder_tiny,
    "schedules": schedules,
    "qwen_schedules": qwen_schedules,
    "qwen_references": qwen_references,
    "noise": noise,
    "pipeline": pipeline,
    "qwen_pipeline": qwen_pipeline,
}


def derive(name: str) -> Arrays:
    """The arrays of one golden file, computed now."""
    with torch.no_grad():
        return FILES[name]()


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """np.savez_compressed without the time of day in it: the same arrays give the same bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for key, value in arrays.items():
            data = io.BytesIO()
            np.lib.format.write_array(data, np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value))
            info = zipfile.ZipInfo(f"{key}.npy")
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, data.getvalue(), compresslevel=9)


def main(argv: Iterable[str]) -> None:
    folder, *names = [*argv] or [Path(__file__).parent]
    folder = Path(folder)
    torch.set_num_threads(1)
    for name in names or FILES:
        path = folder / f"{name}.npz"
        arrays = derive(name)
        save(path, arrays)
        print(f"{path}: {len(arrays)} arrays, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
