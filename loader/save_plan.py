"""Which type each tensor gets in a file to be written, by sd-cli's names, rules and exceptions."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from pyggml import Type

from .checkpoint import Checkpoint, Format
from .convert import INTEGERS, can_convert, is_same, native_type
from .dtypes import QUANTISED, SAFETENSORS_BITS
from .errors import LoadError, printable
from .file_heads import Entry
from .mapped import TensorInfo

# types that ggml's quantiser writes, by the names that sd-cli uses
TYPES: Final = {
    kind.name.lower(): kind
    for kind in Type
    if kind.name in ("F32", "F16", "BF16") or (kind.name in QUANTISED and kind.name not in ("Q8_1", "Q8_K"))
}
# Not quantised, as stable-diffusion.cpp: small, and what everything after them depends on.
_KEPT_ENDS: Final = (".bias", ".scale", ".weight_scale")
_KEPT_PARTS: Final = (
    "img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in.", "final_layer.", "x_embedder.", "t_embedder.",
    "y_embedder.", "pos_embed", "context_embedder.", "time_embed.", "label_emb.", "embedding",
)  # fmt: skip


class Rule(NamedTuple):
    """Tensors whose name the pattern is found in get this type; the first rule that fits counts."""

    pattern: re.Pattern[str]
    type: Type


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the file to be: where it comes from, its type there, and why it keeps its type if it does."""

    info: TensorInfo
    entry: Entry
    changed: bool
    kept: str = ""

    @property
    def copied(self) -> bool:
        """True when its bytes stay as they are."""
        return self.info.scale is None and self.entry.dtype == self.info.dtype and not self.changed


def format_of(target: str) -> Format:
    """The format that a file's name asks for, as sd-cli reads it. ValueError for other suffixes."""
    suffix = os.path.splitext(target)[1].lower()
    if suffix == ".gguf":
        return "gguf"
    if suffix in (".safetensors", ".sft"):
        return "safetensors"
    raise ValueError(f"{printable(target)}: the output's name must end in .gguf or .safetensors")


def parse_type(name: str) -> Type:
    """A type by sd-cli's name, in any case. ValueError that lists them."""
    try:
        return TYPES[name.lower()]
    except KeyError:
        raise ValueError(f"unknown type {name!r}: known are {', '.join(TYPES)}") from None


def parse_rules(text: str) -> list[Rule]:
    """sd-cli's `--tensor-type-rules`: "regex=type,regex=type". ValueError for what is none."""
    rules = []
    for part in filter(None, text.split(",")):
        pattern, equals, name = part.partition("=")
        if not equals or not pattern:
            raise ValueError(f"{part!r} is no rule: they have the form regex=type,regex=type")
        try:
            rules.append(Rule(re.compile(pattern), parse_type(name)))
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return rules


def plan_save(
    checkpoint: Checkpoint,
    format: Format,
    *,
    type: Type | None = None,
    rules: Sequence[Rule] = (),
    changed: Container[str] = (),
) -> list[Output]:
    """The type that each tensor will have; `changed` are the names of those whose values will be others.

    Raises `LoadError` for a type that the format cannot hold.
    """
    outputs = []
    for info in checkpoint.values():
        dtype, kept = _choose(info, checkpoint.format, format, type, rules, info.name in changed)
        ne = info.ne
        if format == "gguf" and len(ne) > 4:  # the loader takes it as the same
            last = 1
            for d in ne[3:]:
                last *= d
            ne = (*ne[:3], last)
        outputs.append(Output(info, Entry(info.name, ne, dtype), info.name in changed, kept))
    return outputs


def _choose(
    info: TensorInfo, source: Format, format: Format, type: Type | None, rules: Sequence[Rule], changed: bool
) -> tuple[str, str]:
    """(dtype in the file to be, why it is not the one asked for)."""
    rule = next((rule.type for rule in rules if rule.pattern.search(info.name)), None)
    wanted = type if rule is None else rule
    kept = ""
    if wanted is not None:
        kept = _why_kept(info, wanted, by_rule=rule is not None)
        if not kept:
            if format == "safetensors" and wanted.is_quantized:
                raise LoadError(
                    f"safetensors has no {wanted.name.lower()}",
                    kind="BadType",
                    path=info.file.path,
                    tensor=info.name,
                    hint="write a .gguf file, or choose f16, bf16 or f32",
                )
            return wanted.name, ""
    if format == "safetensors":
        return _in_safetensors(info, wanted, changed), kept
    return _in_gguf(info, source), kept


def _why_kept(info: TensorInfo, wanted: Type, *, by_rule: bool) -> str:
    """Why a tensor keeps its type although another is asked for; "" when it does not."""
    if info.scale is None and (
        info.dtype in INTEGERS or not (is_same(info.dtype, wanted) or can_convert(info, wanted))
    ):
        return "no floating-point values"
    if _is_vector(info):
        return "a vector"
    if wanted.is_quantized and info.ne[0] % wanted.block_size:
        return f"rows are no multiple of {wanted.name}'s {wanted.block_size}"
    # A float type that a rule gives is meant for what the rule names: nothing is lost by it.
    if by_rule and not wanted.is_quantized:
        return ""
    if info.name.endswith(_KEPT_ENDS) or any(part in info.name for part in _KEPT_PARTS):
        return "sensitive, by its name"
    return ""


def _in_safetensors(info: TensorInfo, wanted: Type | None, changed: bool) -> str:
    """The type of a tensor that keeps its own as far as safetensors has it."""
    if info.scale is not None or (changed and info.dtype in ("F8_E4M3", "F8_E5M2", "F64")):
        native = native_type(info)
        assert native is not None
        return native.name
    if info.dtype in SAFETENSORS_BITS:
        return info.dtype
    if wanted is not None and not wanted.is_quantized and can_convert(info, wanted):
        return wanted.name
    raise LoadError(
        f"is {info.dtype}, which safetensors has not",
        kind="BadType",
        path=info.file.path,
        tensor=info.name,
        hint="give a type: f32, f16 or bf16",
    )


def _is_vector(info: TensorInfo) -> bool:
    return max(info.ne, default=1) == info.n_elements


def _in_gguf(info: TensorInfo, source: Format) -> str:
    """The type of a tensor that keeps its own as far as gguf has it; vectors are f32 in gguf files."""
    if source == "gguf":
        return info.dtype
    if _is_vector(info) and info.dtype in ("F16", "BF16", "F8_E4M3", "F8_E5M2"):
        return "F32"
    native = native_type(info)
    if info.dtype in ("U32", "U64", "I64"):
        native = Type.I64
    if native is None:
        message = f"is {info.dtype}, which gguf has not"
        raise LoadError(message, kind="BadType", path=info.file.path, tensor=info.name)
    return native.name
