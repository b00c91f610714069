"""What a file to be written says about itself: metadata kept, or carried over into the other format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

from pyggml import Type

from .checkpoint import CONFIG_KEY, Checkpoint, Format
from .describe import describe
from .dtypes import QUANTISED
from .errors import printable, quoted
from .file_heads import Head, gguf_head, gguf_pair, safetensors_head
from .gguf import GGUFArray, read_gguf
from .save_plan import Output
from .scales import QUANTIZATION_METADATA

_Own: TypeAlias = Mapping[str, "bool | int | float | str"]

# general.file_type of a file that is mostly of one type, as llama.cpp numbers them
_FILE_TYPES: Final = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15,
    "Q5_K": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26,
    "IQ2_S": 28, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38,
}  # fmt: skip
# general.architecture as files in circulation have it
_ARCHITECTURES: Final = {
    "Z-Image": "lumina2", "Z-Image Omni": "lumina2", "Lumina 2": "lumina2", "Qwen-Image": "qwen_image",
    "Qwen-Image Layered": "qwen_image", "Flux": "flux", "Stable Diffusion 3": "sd3", "Wan": "wan", "Qwen3": "qwen3",
    "Qwen3 MoE": "qwen3moe", "Qwen2.5-VL": "qwen2vl", "Qwen3-VL": "qwen3vl", "T5": "t5", "Llama-like": "llama",
}  # fmt: skip
_GGML_NAME: Final = 63  # bytes of a name that ggml keeps
_OWN_KEYS: Final = ("general.alignment", "split.no", "split.count", "split.tensors.count")


def head_of(
    checkpoint: Checkpoint, format: Format, outputs: Sequence[Output], type: Type | None, notes: list[str]
) -> Head:
    """The header of the file to be, with what of the metadata its format can hold; adds to `notes` what is lost.

    `type` is the one asked for, None when the tensors keep theirs.
    """
    entries = [output.entry for output in outputs]
    converted = any(not output.copied for output in outputs)
    if again := sum(1 for o in outputs if not o.copied and o.info.dtype in QUANTISED and o.entry.dtype in QUANTISED):
        notes.append(f"{again} tensors were quantised already: quantising twice loses more than once from the original")
    if format == "safetensors":
        metadata, lost = _strings(checkpoint, converted)
        if lost:
            notes.append(f"metadata that safetensors cannot hold: {', '.join(map(printable, lost))}")
        return safetensors_head(entries, metadata)
    if folded := sum(1 for o in outputs if len(o.info.ne) > 4):
        notes.append(f"{folded} tensors have more than gguf's 4 dimensions: the last ones became one")
    long = [e.name for e in entries if len(e.name.encode()) > _GGML_NAME]
    if long:
        notes.append(f"{len(long)} names have over {_GGML_NAME} bytes, as other programs want: {quoted(long[0])}")
    counts: dict[str, int] = {}
    for entry in entries:
        counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.n_elements
    most = max(counts, key=lambda dtype: counts[dtype], default="F32")
    own: dict[str, bool | int | float | str] = {}
    if most in _FILE_TYPES and (type is not None or checkpoint.format != "gguf"):
        own["general.file_type"] = _FILE_TYPES[most]
    if any(dtype in QUANTISED for dtype in counts):
        own["general.quantization_version"] = 2
    if checkpoint.format == "gguf":
        return gguf_head(entries, _pairs_of_gguf(checkpoint, own))
    return gguf_head(entries, _pairs(checkpoint, own, converted, notes))


def _strings(checkpoint: Checkpoint, converted: bool) -> tuple[dict[str, str], list[str]]:
    """(metadata as strings, keys that were left out)."""
    metadata: dict[str, str] = {}
    lost = []
    for key, value in checkpoint.metadata.items():
        if key == QUANTIZATION_METADATA and converted:
            continue  # it describes tensors that are no more
        if isinstance(value, GGUFArray):
            lost.append(key)
        elif key not in _OWN_KEYS and key != "general.file_type":
            metadata[key] = value if isinstance(value, str) else json.dumps(value)
    if checkpoint.config:
        metadata[CONFIG_KEY] = json.dumps(dict(checkpoint.config))
    return metadata, lost


def _pairs_of_gguf(checkpoint: Checkpoint, own: _Own) -> list[bytes]:
    """Keys and values byte for byte as in the source's first file, but for those that we know better."""
    file = checkpoint.files[0]
    pairs = []
    left = dict(own)
    for key, (begin, end) in read_gguf(file).pairs.items():
        if key in left:
            pairs.append(gguf_pair(key, left.pop(key)))
        elif key not in _OWN_KEYS:
            pairs.append(file.read_at(begin, end - begin))
    return pairs + [gguf_pair(key, value) for key, value in left.items()]


def _pairs(
    checkpoint: Checkpoint, own: _Own, converted: bool, notes: list[str]
) -> list[bytes]:
    """Keys and values for what was no gguf file: the architecture, ours, the metadata's strings."""
    values: dict[str, bool | int | float | str] = {}
    name = _ARCHITECTURES.get(describe(checkpoint).architecture)
    if name:
        values["general.architecture"] = name
    else:
        notes.append("the architecture is not known by its tensors: general.architecture is left out")
    values |= own
    strings, _ = _strings(checkpoint, converted)
    lost = []
    for key, value in strings.items():
        if not (key and key.isascii() and key.isprintable() and len(key) < 65536):
            lost.append(key)
        elif key != "format":  # safetensors' own: which library wrote it
            values.setdefault(key, value)
    if lost:
        notes.append(f"metadata that gguf cannot hold: {', '.join(map(printable, lost))}")
    return [gguf_pair(key, value) for key, value in values.items()]
