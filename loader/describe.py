"""What a checkpoint is: role and architecture by the names of its tensors, sizes and types by their headers.

For `pyggml inspect`, and for messages such as "this is a text encoder (Qwen3), not a diffusion model". The signatures
are data about files in circulation, not about networks that we can run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, TypeAlias

from .checkpoint import Checkpoint, open_checkpoint
from .errors import printable
from .gguf import GGUFArray
from .mapped import TensorInfo

Role: TypeAlias = Literal[
    "diffusion model", "text encoder", "autoencoder", "tiny autoencoder", "vision tower", "lora", "several models",
    "unknown",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Signature:
    """A file is of `architecture` when it has all the tensors of `names`; the first is the one shown as evidence.

    `without` are tensors that a relative has and this one has not. `ne` is what the first tensor's shape must be, None
    for dimensions that may vary.
    """

    role: Role
    architecture: str
    names: tuple[str, ...]
    without: tuple[str, ...] = ()
    ne: tuple[int | None, ...] | None = None


_DIT: Final = "diffusion model"
_TEXT: Final = "text encoder"
_VAE: Final = "autoencoder"
_TINY: Final = "tiny autoencoder"

# Order matters within a role: the first that fits is taken.
SIGNATURES: Final[tuple[Signature, ...]] = (
    Signature(_DIT, "Z-Image Omni", ("siglip_pad_token", "cap_pad_token")),
    Signature(_DIT, "Z-Image", ("cap_pad_token", "context_refiner.0.attention.qkv.weight")),
    Signature(_DIT, "Z-Image", ("cap_pad_token", "context_refiner.0.attention.to_q.weight")),
    Signature(_DIT, "Lumina 2", ("cap_embedder.0.weight", "context_refiner.0.attention.qkv.weight")),
    Signature(_DIT, "Qwen-Image 2.1", ("txt_in.text_norm.weight",)),
    Signature(
        _DIT,
        "Qwen-Image Layered",
        ("time_text_embed.addition_t_embedding.weight", "transformer_blocks.0.img_mod.1.weight"),
    ),
    Signature(_DIT, "Mage-Flow", ("img_in.weight", "transformer_blocks.0.img_mod.1.weight"), ne=(128, None)),
    Signature(_DIT, "Qwen-Image", ("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight")),
    Signature(_DIT, "Flux", ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight")),
    Signature(_DIT, "Flux", ("single_transformer_blocks.0.proj_mlp.weight", "x_embedder.weight")),
    Signature(_DIT, "Stable Diffusion 3", ("joint_blocks.0.x_block.attn.qkv.weight",)),
    Signature(_DIT, "Wan", ("blocks.0.cross_attn.k.weight", "patch_embedding.weight")),
    Signature(_DIT, "Stable Diffusion U-Net", ("input_blocks.0.0.weight",)),
    Signature(_DIT, "Stable Diffusion U-Net", ("down_blocks.0.resnets.0.time_emb_proj.weight", "conv_in.weight")),
    Signature(_TEXT, "Qwen2.5-VL", ("visual.patch_embed.proj.weight", "model.layers.0.self_attn.q_proj.bias")),
    Signature(
        _TEXT,
        "Qwen2.5-VL",
        ("model.visual.patch_embed.proj.weight", "model.language_model.layers.0.self_attn.q_proj.bias"),
    ),
    Signature(
        _TEXT,
        "Qwen3-VL",
        ("model.visual.patch_embed.proj.weight", "model.language_model.layers.0.self_attn.q_norm.weight"),
    ),
    Signature(_TEXT, "Qwen3 MoE", ("model.layers.0.self_attn.q_norm.weight", "model.layers.0.mlp.gate.weight")),
    Signature(_TEXT, "Qwen3", ("model.layers.0.self_attn.q_norm.weight",)),
    Signature(_TEXT, "Qwen3", ("layers.0.self_attn.q_norm.weight", "embed_tokens.weight")),
    Signature(
        _TEXT, "Qwen3", ("blk.0.attn_q_norm.weight", "token_embd.weight"), without=("blk.0.ffn_gate_inp.weight",)
    ),
    Signature(_TEXT, "Qwen2 or Qwen2.5-VL", ("model.layers.0.self_attn.q_proj.bias",)),
    Signature(_TEXT, "Qwen2 or Qwen2.5-VL", ("model.language_model.layers.0.self_attn.q_proj.bias",)),
    Signature(_TEXT, "Qwen2 or Qwen2.5-VL", ("blk.0.attn_q.bias", "token_embd.weight")),
    Signature(_TEXT, "Llama-like", ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight")),
    Signature(_TEXT, "Llama-like", ("blk.0.attn_q.weight", "token_embd.weight")),
    Signature(_TEXT, "T5", ("encoder.block.0.layer.0.SelfAttention.q.weight",)),
    Signature(_TEXT, "T5", ("enc.blk.0.attn_q.weight", "token_embd.weight")),
    Signature(_TEXT, "CLIP", ("text_model.encoder.layers.0.self_attn.q_proj.weight",)),
    Signature(_VAE, "Qwen-Image (Wan) autoencoder", ("decoder.middle.0.residual.0.gamma",)),
    Signature(_VAE, "Qwen-Image (Wan) autoencoder", ("decoder.mid_block.resnets.0.norm1.gamma",)),
    Signature(_VAE, "Stable Diffusion autoencoder", ("decoder.conv_in.weight",), ne=(3, 3, 4, None)),
    Signature(_VAE, "Flux 2 autoencoder", ("decoder.conv_in.weight",), ne=(3, 3, 32, None)),
    Signature(_VAE, "Flux autoencoder", ("decoder.conv_in.weight", "decoder.mid.block_1.norm1.weight")),
    Signature(_VAE, "Flux autoencoder", ("decoder.conv_in.weight", "decoder.mid_block.resnets.0.norm1.weight")),
    Signature(_TINY, "TAEHV", ("decoder.7.conv.weight", "decoder.3.conv.4.weight")),
    Signature(_TINY, "TAEHV", ("7.conv.weight", "3.conv.4.weight")),
    Signature(_TINY, "TAESD", ("decoder.layers.2.conv.4.weight", "decoder.layers.18.weight")),
    Signature(_TINY, "TAESD", ("decoder.3.conv.4.weight", "decoder.19.weight")),
    Signature(_TINY, "TAESD", ("3.conv.4.weight", "19.weight")),
    Signature("vision tower", "Qwen2.5-VL vision tower", ("v.patch_embd.weight", "mm.0.weight")),
    Signature(
        "vision tower",
        "Qwen2.5-VL vision tower",
        ("visual.patch_embed.proj.weight", "visual.merger.ln_q.weight"),
    ),
)

# Prefixes under which files that hold one or several models keep them.
PREFIXES: Final = (
    "",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "first_stage_model.",
    "vae.",
    "text_encoders.llm.",
    "text_encoders.qwen3_4b.transformer.",
    "text_encoders.qwen25_7b.transformer.",
    "text_encoders.t5xxl.transformer.",
    "text_encoders.clip_l.transformer.",
    "text_encoder.",
    "cond_stage_model.transformer.",
)

_LORA: Final = re.compile(
    r"\.(lora_(down|up|mid|A|B)|lora\.(down|up)|hada_w[12]_[ab]|lokr_w[12](_[ab])?|dora_scale)(\.|$)"
)
# Names that only the LoRAs of one model have.
LORA_MODELS: Final = (
    (r"(^|[._])(double|single)_(transformer_)?blocks[._]", "Flux"),
    (r"(^|[._])transformer_blocks[._]\d+[._](attn[._](add_|to_add_out)|img_m|txt_m)", "Qwen-Image"),
    (r"(^|[._])(down|input|up|output)_blocks[._]|te[12]?_text_model", "Stable Diffusion"),
    (r"(^|[._])blocks[._]\d+[._](cross|self)_attn[._]", "Wan"),
    (r"(^|[._])joint_blocks[._]", "Stable Diffusion 3"),
    (r"(^|[._])(layers|noise_refiner|context_refiner)[._]\d+[._](attention[._]|feed_forward[._]|adaLN_)", "Z-Image"),
)
_BLOCK: Final = re.compile(r"^(?:.*?\.)??((?:transformer_|double_|single_|joint_)?(?:blocks|layers|blk))\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Component:
    """One model of a file: what it is, the prefix of its names, and the tensor that decided it."""

    role: Role
    architecture: str
    prefix: str
    evidence: str


@dataclass(frozen=True, slots=True)
class TypeCount:
    """How much of a checkpoint is of one type."""

    n_tensors: int
    n_parameters: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Description:
    """What a checkpoint is; made by `describe`. `n_blocks` counts the repeated blocks by their group's name, `n_scaled`
    the 8-bit weights that have a scale tensor.
    """

    path: str
    format: str
    role: Role
    architecture: str
    evidence: str | None
    components: tuple[Component, ...]
    n_tensors: int
    n_parameters: int
    n_bytes: int
    n_files: int
    file_bytes: int
    types: dict[str, TypeCount]
    n_scaled: int
    n_blocks: dict[str, int]
    metadata: dict[str, str]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, for JSON."""
        return asdict(self) | {"components": [asdict(c) for c in self.components], "warnings": list(self.warnings)}

    def sentence(self) -> str:
        """One clause for an error message: "this is a text encoder (Qwen3)"."""
        if self.role == "unknown":
            return "nothing here is known by its tensor names"
        if self.role == "several models":
            return "this file holds several models: " + ", ".join(
                f"{c.role} ({c.architecture})" for c in self.components
            )
        article = "an" if self.role[0] in "aeiou" else "a"
        return f"this is {article} {self.role} ({self.architecture})"

    def __str__(self) -> str:
        lines = [
            printable(self.path),
            f"  format        {self.format}, {_plural(self.n_files, 'file')}, {_size(self.file_bytes)}",
            f"  role          {self.role}",
            f"  architecture  {self.architecture}" + (f" (by {printable(self.evidence)})" if self.evidence else ""),
        ]
        if len(self.components) > 1:
            lines += [
                f"                {c.role}: {c.architecture}, under '{printable(c.prefix)}'" for c in self.components
            ]
        lines.append(f"  tensors       {self.n_tensors}, {_count(self.n_parameters)} parameters, {_size(self.n_bytes)}")
        if self.n_blocks:
            lines.append("  blocks        " + ", ".join(f"{n} {name}" for name, n in self.n_blocks.items()))
        for name, t in self.types.items():
            sizes = f"{_count(t.n_parameters)} parameters, {_size(t.n_bytes)}"
            lines.append(f"  {name:<12}  {_plural(t.n_tensors, 'tensor')}, {sizes}")
        if self.n_scaled:
            lines.append(f"  scaled        {_plural(self.n_scaled, 'tensor')} with a scale")
        if self.metadata:
            lines.append("  metadata")
            lines += [f"    {printable(key)} = {value}" for key, value in self.metadata.items()]
        lines += [f"  warning       {printable(warning)}" for warning in self.warnings]
        return "\n".join(lines)


def describe(checkpoint: Checkpoint) -> Description:
    """Say what a checkpoint is; reads headers only. See `Description`."""
    components = find_components(checkpoint)
    role: Role = "unknown"
    architecture, evidence = "unknown", None
    if len(components) == 1:
        role, architecture, evidence = components[0].role, components[0].architecture, components[0].evidence
    elif components:
        role, architecture = "several models", " + ".join(c.architecture for c in components)
    else:
        named = checkpoint.metadata.get("general.architecture")
        if type(named) is str:
            architecture = f"{printable(named[:60])} (as general.architecture says)"
    types: dict[str, list[int]] = {}
    for info in checkpoint.values():
        counts = types.setdefault(info.dtype, [0, 0, 0])
        counts[0] += 1
        counts[1] += info.n_elements
        counts[2] += info.n_bytes
    by_size = sorted(types.items(), key=lambda item: -item[1][2])
    return Description(
        path=checkpoint.path,
        format=checkpoint.format,
        role=role,
        architecture=architecture,
        evidence=evidence,
        components=components,
        n_tensors=len(checkpoint),
        n_parameters=sum(counts[1] for counts in types.values()),
        n_bytes=checkpoint.n_bytes,
        n_files=len(checkpoint.files),
        file_bytes=sum(file.n_bytes for file in checkpoint.files),
        types={name: TypeCount(*counts) for name, counts in by_size},
        n_scaled=sum(1 for info in checkpoint.values() if info.scale is not None),
        n_blocks=_count_blocks(checkpoint),
        metadata={key: _shown(value) for key, value in checkpoint.metadata.items()},
        warnings=checkpoint.warnings,
    )


def find_components(tensors: Mapping[str, TensorInfo]) -> tuple[Component, ...]:
    """The models of a checkpoint, at most one of a role under a prefix."""
    for name in tensors:
        if _LORA.search(name):
            model = model_of_lora(tensors)
            return (Component("lora", f"LoRA for {model}" if model else "LoRA", "", name),)
    found: list[Component] = []
    for prefix in PREFIXES:
        roles: set[Role] = set()
        for signature in SIGNATURES:
            if signature.role not in roles and _fits(signature, prefix, tensors):
                roles.add(signature.role)
                found.append(Component(signature.role, signature.architecture, prefix, prefix + signature.names[0]))
    if any(c.architecture == "Qwen2.5-VL" for c in found):  # the tower is part of it
        found = [c for c in found if c.role != "vision tower"]
    return tuple(found)


def model_of_lora(names: Iterable[str]) -> str | None:
    """The model that a LoRA with these keys is for, where a key says so."""
    return next((model for name in names for pattern, model in LORA_MODELS if re.search(pattern, name)), None)


def _fits(signature: Signature, prefix: str, tensors: Mapping[str, TensorInfo]) -> bool:
    if any(prefix + name not in tensors for name in signature.names):
        return False
    if any(prefix + name in tensors for name in signature.without):
        return False
    if signature.ne is None:
        return True
    ne = tensors[prefix + signature.names[0]].ne
    return len(ne) == len(signature.ne) and all(
        want in (None, have) for want, have in zip(signature.ne, ne, strict=True)
    )


def _count_blocks(tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in tensors:
        match = _BLOCK.match(name)
        if match:
            group = name[: match.start(2) - 1]
            counts[group] = max(counts.get(group, 0), int(match[2]) + 1)
    return dict(sorted(counts.items()))


def _shown(value: object) -> str:
    """A metadata value on one short line."""
    if isinstance(value, GGUFArray):
        if len(value) > 8 or value.type == "str":
            return repr(value)
        return f"{value.type}{value.tolist()}"
    text = printable(str(value))
    return text if len(text) <= 100 else f"{text[:97]}... ({len(text)} characters)"


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _size(n_bytes: int) -> str:
    return (
        f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.2f} MB" if n_bytes >= 1e6 else f"{n_bytes} B"
    )


def _count(n: int) -> str:
    return f"{n / 1e9:.3f} B" if n >= 1e9 else f"{n / 1e6:.2f} M" if n >= 1e6 else str(n)


def describe_path(path: str | os.PathLike[str]) -> Description:
    """Open, describe, close. Raises `LoadError`."""
    with open_checkpoint(path) as checkpoint:
        return describe(checkpoint)
