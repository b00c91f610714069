"""LoRA files: which module of a model each tensor is about, and what it adds to that module's weight.

W' = W + weight * scale * delta. The delta of a matrix [n_out, n_in] is, by the tensors that the file has for a module:

    lora    up [mid] down                          down [r, n_in], mid [r, r], up [n_out, r]
    loha    (w1_a w1_b) * (w2_a w2_b)              each pair as up and down, multiplied element by element
    lokr    kron(w1 or w1_a w1_b, w2 or w2_a w2_b)
    diff    the matrix, or the vector, itself

`scale` is the module's `scale` tensor, else alpha / r where there is an alpha, else 1. Names are compared with the
model's own after dots have become underscores, so that one table serves the dotted forms and the underscored ones, and
no list of protected words is needed (stable-diffusion.cpp has one, in which parts of Z-Image are missing).

Reading is strict: what a file has for a module that the model has must be whole, of the right shape and finite, or the
file is refused. Keys of modules that the model has not are counted and reported.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Final, Literal, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Checkpoint, open_checkpoint
from .convert import INTEGERS, scaled_float32
from .describe import describe, model_of_lora
from .dtypes import QUANTISED
from .errors import Kind as ErrorKind
from .errors import LoadError, printable, quoted
from .limits import DEFAULT_LIMITS, Limits
from .mapped import TensorInfo
from .strict_json import parse_json, read_json

Kind: TypeAlias = Literal["lora", "loha", "lokr", "diff"]
Float32: TypeAlias = NDArray[np.float32]
Rows: TypeAlias = Callable[[int, int], Float32]

_FACTORS: Final = frozenset({"F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2"}) | QUANTISED
MAX_RANK: Final = 4096
MAX_HADAMARD_RANK: Final = 256  # its two products make a product of rank r * r
_PIECE: Final = 4 << 20

# What follows the module's name. `lora_A.default`: PEFT puts the name of the adapter there.
_SUFFIX: Final = re.compile(
    r"""(?P<module>.+?)(?:
        (?:\.weight)?\.(?P<pair>lora_(?:down|up|mid|[ABab]))(?:\.(?!weight$|bias$)[^.]+)?(?P<bias>\.bias)?(?:\.weight)?
      | [._]lora(?:_linear_layer)?\.(?P<dotted>down|up|mid)(?:\.weight)?
      | \.(?P<other>hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|alpha|scale|diff|diff_b)
      | \.(?P<refused>dora_scale|lora_magnitude_vector|lora_embedding_[AB]|oft_\w+|boft_\w+)(?:\..+)?
    )$""",
    re.VERBOSE,
)
_PAIR: Final = {"lora_A": "down", "lora_a": "down", "lora_down": "down", "lora_B": "up", "lora_b": "up",
                "lora_up": "up", "lora_mid": "mid"}  # fmt: skip
_REFUSED: Final = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_t1": "a Tucker form", "hada_t2": "a Tucker form",
    "lokr_t2": "a Tucker form", "lora_embedding_A": "an embedding's LoRA", "lora_embedding_B": "an embedding's LoRA",
    "bias": "a LoRA with a bias",
}  # fmt: skip

# Beginnings of names, with underscores for dots: whose module it is, or None where it does not say.
_PREFIXES: Final[tuple[tuple[str, str | None], ...]] = (
    ("diffusion_model_", "transformer"), ("unet_", "transformer"), ("transformer_", "transformer"),
    ("text_encoders_", "text_encoder"), ("text_encoder_", "text_encoder"), ("te1_", "text_encoder"),
    ("te_", "text_encoder"), ("qwen3_4b_", "text_encoder"), ("qwen25_7b_", "text_encoder"),
    ("llm_", "text_encoder"), ("lora_", None),
    ("lycoris_", None), ("base_model_", None), ("language_model_", None), ("model_", None),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Rows first..first+n of a delta go to rows at..at+n of the parameter of `module`. n None: all there are."""

    module: str
    at: int = 0
    first: int = 0
    n: int | None = None


# role of a component -> name with underscores -> where its delta goes
Names: TypeAlias = Mapping[str, Mapping[str, Sequence[Place]]]
# role of a component -> parameter -> ne
Shapes: TypeAlias = Mapping[str, Mapping[str, Sequence[int]]]


@dataclass(frozen=True)
class Delta:
    """What a file adds to one weight, without the user's weight: `scale` times what `rows` computes from `parts`.

    `shape`: numpy's order, [n_out, n_in], or [n] for a vector.
    """

    module: str
    kind: Kind
    parts: Mapping[str, TensorInfo]
    scale: float
    shape: tuple[int, ...]

    def rows(self) -> Rows:
        """rows(first, last): those rows of the delta, `scale` included, float32 [last - first, n_in] or [n].

        Factors are read now, a `diff` as rows are asked for. LoadError when the file became shorter.
        """
        if self.kind == "diff":
            info = self.parts["diff"]
            return lambda first, last: self._scaled(_read_rows(info, self.shape, first, last))
        parts = {name: _read_rows(info, _matrix(info), 0, _matrix(info)[0]) for name, info in self.parts.items()}
        if self.kind == "lora":
            down: Float32 = parts["mid"] @ parts["down"] if "mid" in parts else parts["down"]
            return lambda first, last: self._scaled(parts["up"][first:last] @ down)
        if self.kind == "loha":
            return lambda first, last: self._scaled(
                (parts["w1_a"][first:last] @ parts["w1_b"]) * (parts["w2_a"][first:last] @ parts["w2_b"])
            )
        w1, w2 = (parts[w] if w in parts else parts[f"{w}_a"] @ parts[f"{w}_b"] for w in ("w1", "w2"))

        def kronecker(first: int, last: int) -> Float32:
            a, b = np.divmod(np.arange(first, last), len(w2))
            product: Float32 = w1[a][:, :, None] * w2[b][:, None, :]
            return self._scaled(product.reshape(last - first, -1))

        return kronecker

    def _scaled(self, values: NDArray[Any]) -> Float32:
        values *= np.float32(self.scale)
        return values


@dataclass(frozen=True)
class Change:
    """A delta and the parameter that it changes: rows at..at+n by the delta's rows first..first+n."""

    param: str
    delta: Delta
    at: int
    first: int
    n: int


@dataclass
class LoraReport:
    """What became of the keys of one file.

    `applied`: component -> (keys applied, keys of the file for it). `ignored`: keys of modules that the model has but
    never computes. `unknown`: names of keys that belong to nothing here. `warnings`: odd but harmless.
    """

    path: str
    n_keys: int
    applied: dict[str, tuple[int, int]] = field(default_factory=dict)
    ignored: int = 0
    unknown: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def n_applied(self) -> int:
        return sum(n for n, _ in self.applied.values())

    def sentence(self) -> str:
        """n of m keys for each component, then what was left out."""
        text = ", ".join(f"{n} of {m} keys applied to {component}" for component, (n, m) in self.applied.items())
        if self.ignored:
            text += f"; {self.ignored} are of parts that are not used"
        if self.unknown:
            text += f"; {len(self.unknown)} are unknown: {_first(self.unknown)}"
        return f"{printable(self.path)}: {text}"


class LoraFile:
    """An open LoRA file, its tensors grouped by module. Nothing but the header has been read."""

    def __init__(self, path: str, checkpoint: Checkpoint) -> None:
        self.path = path
        self.checkpoint = checkpoint
        self.groups: dict[str, dict[str, list[TensorInfo]]] = {}
        self.strange: list[str] = []  # keys that no suffix is known for
        self._alpha = _alphas(checkpoint)
        for name, info in checkpoint.items():
            match = _SUFFIX.match(name)
            if match is None:
                self.strange.append(name)
                continue
            part = "bias" if match["bias"] else (
                _PAIR.get(match["pair"] or "") or match["dotted"] or match["other"] or match["refused"]
            )  # fmt: skip
            self.groups.setdefault(match["module"], {}).setdefault(part, []).append(info)

    def match(
        self, names: Names, shapes: Shapes, unused: Mapping[str, str], *, values: bool = True
    ) -> tuple[dict[str, list[Change]], LoraReport]:
        """What the file changes: role -> changes, and the report. All of it is checked, all values are read once; or
        none but numbers (alpha), where `values` is False.

        names, shapes: of the model's components. unused: role -> regex for names, with underscores and without
        prefixes, of parts that the model has but does not compute. Raises LoadError when no key belongs to the model,
        when a module is not whole or does not fit its weight, and for values that are not finite.
        """
        report = LoraReport(self.path, len(self.checkpoint))
        found: list[tuple[str, str, Sequence[Place]]] = []
        total: dict[str, int] = {}
        groups = {module: [i.name for infos in parts.values() for i in infos] for module, parts in self.groups.items()}
        for module, keys in [*groups.items(), *((name, [name]) for name in self.strange)]:
            role, places, skipped = _find(module, names, unused)
            if places and module in groups:
                assert role
                found.append((module, role, places))
            elif skipped:
                report.ignored += len(keys)
            else:
                report.unknown += keys
            if role:
                total[role] = total.get(role, 0) + len(keys)
        if not found:
            raise self._stranger()
        changes: dict[str, list[Change]] = {}
        applied = dict.fromkeys(total, 0)
        for module, role, places in found:
            parts = self._single(module)
            for which, delta in self._deltas(module, parts, report.warnings):
                if values:
                    self._check_finite(delta)
                changes.setdefault(role, []).extend(self._place(delta, which, places, shapes[role]))
            applied[role] += len(parts)
        for role, listed in changes.items():
            self._check_overlap(role, listed)
        report.applied = {role: (applied[role], n) for role, n in total.items()}
        return changes, report

    def close(self) -> None:
        self.checkpoint.close()

    def __enter__(self) -> LoraFile:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    # -- one module ---------------------------------------------------------------------------------------------------

    def _single(self, module: str) -> dict[str, TensorInfo]:
        """The parts of a module, one tensor for each. LoadError for two, and for kinds that are not applied."""
        parts = {}
        for part, infos in self.groups[module].items():
            if len(infos) > 1:
                both = " and ".join(quoted(info.name) for info in infos[:2])
                self._refuse(infos[0], f"{both} are the same part of one module", "DuplicateTensor")
            if what := _REFUSED.get(part) or (part.startswith(("oft_", "boft_")) and "OFT"):
                self._refuse(infos[0], f"{what} is not supported, and leaving it out would draw something else",
                             "Unsupported")  # fmt: skip
            info = parts[part] = infos[0]
            number = part in ("alpha", "scale")
            if info.scale is None and info.dtype not in (_FACTORS | INTEGERS if number else _FACTORS):
                self._refuse(info, f"is {info.dtype}: factors are floating-point numbers, or have a scale", "BadType")
        return parts

    def _deltas(
        self, module: str, parts: Mapping[str, TensorInfo], warnings: list[str]
    ) -> Iterable[tuple[str, Delta]]:
        """("weight" or "bias", delta) for what the parts make together."""
        if "diff_b" in parts:
            info = parts["diff_b"]
            yield "bias", Delta(module, "diff", {"diff": info}, 1.0, _matrix(info, vector=True))
        kinds: dict[Kind, Mapping[str, TensorInfo]] = {
            "lora": {name: parts[name] for name in ("down", "mid", "up") if name in parts},
            "loha": {name[5:]: info for name, info in parts.items() if name.startswith("hada_")},
            "lokr": {name[5:]: info for name, info in parts.items() if name.startswith("lokr_")},
            "diff": {"diff": parts["diff"]} if "diff" in parts else {},
        }
        present: list[Kind] = [kind for kind, of_kind in kinds.items() if of_kind]
        any_part = next(iter(parts.values()))
        if not present:
            if "diff_b" not in parts:
                self._refuse(any_part, f"module {quoted(module)} has {' and '.join(parts)} and nothing to scale by it",
                             "MissingTensor")  # fmt: skip
            return
        if len(present) > 1:
            self._refuse(any_part, f"module {quoted(module)} is both {present[0]} and {present[1]}", "DuplicateTensor")
        kind = present[0]
        shape_of = {"lora": self._shape_of_lora, "loha": self._shape_of_loha, "lokr": self._shape_of_lokr,
                    "diff": self._shape_of_diff}  # fmt: skip
        shape, rank = shape_of[kind](module, kinds[kind])
        scale = self._scale(module, parts, rank)
        if scale == 0:
            warnings.append(f"module {quoted(module)} has the scale 0, which changes nothing")
        yield "weight", Delta(module, kind, kinds[kind], scale, shape)

    def _shape_of_lora(self, module: str, parts: Mapping[str, TensorInfo]) -> tuple[tuple[int, ...], int | None]:
        self._whole(module, parts, ("down", "up"))
        (rank, n_in), (n_out, r) = _matrix(parts["down"]), _matrix(parts["up"])
        self._check_rank(parts["down"], rank, MAX_RANK)
        if r != rank or ("mid" in parts and _matrix(parts["mid"]) != (rank, rank)):
            self._refuse(parts["up"], f"module {quoted(module)}: the ranks differ: {_shapes(parts)}", "BadShape")
        return (n_out, n_in), rank

    def _shape_of_loha(self, module: str, parts: Mapping[str, TensorInfo]) -> tuple[tuple[int, ...], int | None]:
        self._whole(module, parts, ("w1_a", "w1_b", "w2_a", "w2_b"))
        shapes = {name: _matrix(info) for name, info in parts.items()}
        for w in ("w1", "w2"):
            rank = shapes[f"{w}_b"][0]
            self._check_rank(parts[f"{w}_b"], rank, MAX_HADAMARD_RANK)
            if shapes[f"{w}_a"][1] != rank:
                self._refuse(parts[f"{w}_a"], f"module {quoted(module)}: the ranks differ: {_shapes(parts)}",
                             "BadShape")  # fmt: skip
        n_out, n_in = shapes["w1_a"][0], shapes["w1_b"][1]
        if (shapes["w2_a"][0], shapes["w2_b"][1]) != (n_out, n_in):
            self._refuse(parts["w1_a"], f"module {quoted(module)}: the products differ in shape: {_shapes(parts)}",
                         "BadShape")  # fmt: skip
        return (n_out, n_in), shapes["w1_b"][0]

    def _shape_of_lokr(self, module: str, parts: Mapping[str, TensorInfo]) -> tuple[tuple[int, ...], int | None]:
        shape, rank = (1, 1), None
        for w in ("w1", "w2"):
            if w in parts:
                if f"{w}_a" in parts or f"{w}_b" in parts:
                    self._refuse(parts[w], f"module {quoted(module)} has {w} whole and in factors", "DuplicateTensor")
                n_out, n_in = _matrix(parts[w])
            else:
                self._whole(module, parts, (f"{w}_a", f"{w}_b"))
                (n_out, r), (rank, n_in) = _matrix(parts[f"{w}_a"]), _matrix(parts[f"{w}_b"])
                self._check_rank(parts[f"{w}_b"], rank, MAX_RANK)
                if r != rank:
                    self._refuse(parts[f"{w}_a"], f"module {quoted(module)}: the ranks differ: {_shapes(parts)}",
                                 "BadShape")  # fmt: skip
            shape = shape[0] * n_out, shape[1] * n_in
        return shape, rank

    def _shape_of_diff(self, module: str, parts: Mapping[str, TensorInfo]) -> tuple[tuple[int, ...], int | None]:
        return _matrix(parts["diff"], vector=True), None

    def _scale(self, module: str, parts: Mapping[str, TensorInfo], rank: int | None) -> float:
        """The module's factor. `rank` None: a whole matrix, to which alpha does not apply."""
        if "scale" in parts:
            return self._number(parts["scale"])
        if rank is None:
            return 1.0
        if "alpha" in parts:
            return self._number(parts["alpha"]) / rank
        return self._alpha(module, rank)

    def _number(self, info: TensorInfo) -> float:
        if info.n_elements != 1:
            self._refuse(info, f"has {info.n_elements} elements where one number is wanted", "BadShape")
        value = float(_values(info, info.file.read_at(info.offset, info.n_bytes))[0])
        if not math.isfinite(value):
            self._refuse(info, f"is {value}, which is no factor", "BadValue")
        return value

    def _place(
        self, delta: Delta, which: str, places: Sequence[Place], shapes: Mapping[str, Sequence[int]]
    ) -> Iterable[Change]:
        covered = 0
        for place in places:
            # A parameter without a field (a learned token) is its module's weight.
            name = next((n for n in (f"{place.module}.{which}", place.module) if n in shapes), None)
            info = next(iter(delta.parts.values()))
            if name is None or (name == place.module and which == "bias"):
                self._refuse(info, f"the model has no {which} at {quoted(place.module)}", "WrongTensors")
            wanted = tuple(reversed(shapes[name]))
            if len(wanted) == 1 and delta.kind == "diff" and math.prod(delta.shape) == max(delta.shape):
                delta = replace(delta, shape=(math.prod(delta.shape),))  # [1, n] for a vector
            n = wanted[0] - place.at if place.n is None else place.n
            covered += n
            fits = wanted[1:] == delta.shape[1:] and place.first + n <= delta.shape[0]
            if not fits or (place is places[-1] and covered != delta.shape[0]):
                wanted = (covered if place is places[-1] else n, *wanted[1:])
                self._refuse(info, f"the delta of {quoted(delta.module)} is {list(delta.shape)}, and "
                             f"{quoted(place.module)} wants {list(wanted)}", "WrongTensors",
                             hint="is this LoRA for a model of another size?")  # fmt: skip
            yield Change(name, delta, place.at, place.first, n)

    # -- refusals -----------------------------------------------------------------------------------------------------

    def _refuse(self, info: TensorInfo, message: str, kind: ErrorKind, hint: str | None = None) -> NoReturn:
        raise LoadError(message, kind=kind, path=self.path, tensor=info.name_in_file, hint=hint)

    def _whole(self, module: str, parts: Mapping[str, TensorInfo], wanted: Sequence[str]) -> None:
        if missing := [name for name in wanted if name not in parts]:
            have = ", ".join(parts)
            self._refuse(next(iter(parts.values())), f"module {quoted(module)} has {have} but no {missing[0]}",
                         "MissingTensor")  # fmt: skip

    def _check_rank(self, info: TensorInfo, rank: int, limit: int) -> None:
        if not 1 <= rank <= limit:
            self._refuse(info, f"the rank is {rank}, it must be in 1..{limit}", "LimitExceeded")

    def _check_finite(self, delta: Delta) -> None:
        for info in delta.parts.values():
            per_block = _PIECE // 4 // 256 * 256
            size = info.n_bytes * per_block // max(info.n_elements, 1) or 1
            for at in range(0, info.n_bytes, size):
                raw = info.file.read_at(info.offset + at, min(size, info.n_bytes - at))
                if not _finite(raw, info, at * info.n_elements // info.n_bytes):
                    self._refuse(info, "holds values that are not finite", "BadValue")

    def _check_overlap(self, role: str, changes: Sequence[Change]) -> None:
        taken: dict[str, list[Change]] = {}
        for change in changes:
            for other in taken.setdefault(change.param, []):
                if change.at < other.at + other.n and other.at < change.at + change.n:
                    info = next(iter(change.delta.parts.values()))
                    both = f"{quoted(other.delta.module)} and {quoted(change.delta.module)}"
                    self._refuse(info, f"{both} both change {quoted(change.param)} of the {role}", "DuplicateTensor")
            taken[change.param].append(change)

    def _stranger(self) -> LoadError:
        keys = list(self.checkpoint)
        if not self.groups:
            what = f"{describe(self.checkpoint).sentence()}, and no LoRA"
            return LoadError(what, kind="WrongTensors", path=self.path)
        other = model_of_lora(keys)
        guess = f"; it looks like one for {other}" if other else ""
        return LoadError(
            f"none of its {len(keys)} keys belongs to this model{guess}: {_first(keys)}", kind="WrongTensors",
            path=self.path, hint="is this LoRA for another model?",
        )  # fmt: skip


def open_lora(path: str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS) -> LoraFile:
    """Open a LoRA: safetensors, gguf, or a folder with one (PEFT's). LoadError when it is neither."""
    checkpoint = open_checkpoint(path, limits=limits)
    try:
        return LoraFile(os.fspath(path), checkpoint)
    except BaseException:
        checkpoint.close()
        raise


def underscored(name: str) -> str:
    """A name as `Names` has it."""
    return name.replace(".", "_")


def add_rows(values: Float32, first: int, changes: Sequence[tuple[Change, Rows, float]]) -> None:
    """Add to `values`, rows first.. of a parameter (float32 [n, n_in] or [n]), what (change, its rows, weight) say."""
    last = first + len(values)
    for change, rows, weight in changes:
        a, b = max(first, change.at), min(last, change.at + change.n)
        if a < b and weight:
            offset = change.first - change.at
            with np.errstate(over="ignore", invalid="ignore"):  # who calls looks at the sum
                values[a - first : b - first] += rows(a + offset, b + offset) * np.float32(weight)


# -- names ------------------------------------------------------------------------------------------------------------


def _find(
    module: str, names: Names, unused: Mapping[str, str]
) -> tuple[str | None, Sequence[Place], bool]:
    """(role, places, False); (role, (), whether it is of a part that is not used) for a name without a place, where
    the role is what its prefix says, None when that says nothing.
    """
    name, said = underscored(module), None
    while True:
        for role, table in names.items():
            if said in (None, role) and name in table:
                return role, table[name], False
        for role, pattern in unused.items():
            if said in (None, role) and re.match(pattern, name):
                return role, (), True
        for prefix, role_of in _PREFIXES:
            if name.startswith(prefix):
                name, said = name[len(prefix) :], said or role_of
                break
        else:
            return said, (), False


def _first(names: Sequence[str], n: int = 3) -> str:
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return ", ".join(quoted(name) for name in names[:n]) + more


# -- alpha outside the tensors ----------------------------------------------------------------------------------------


def _alphas(checkpoint: Checkpoint) -> Callable[[str, int], float]:
    """scale(module, rank) for modules without an alpha of their own: from what PEFT, diffusers and llama.cpp write."""
    alpha = checkpoint.metadata.get("adapter.lora.alpha")  # llama.cpp
    if isinstance(alpha, (int, float)):
        return lambda module, rank: _finite_alpha(checkpoint, alpha) / rank
    config: Any = None
    where = os.path.join(os.path.dirname(checkpoint.files[0].path), "adapter_config.json")
    text = checkpoint.metadata.get("lora_adapter_metadata")  # diffusers
    if isinstance(text, str):
        config = parse_json(text.encode(), checkpoint.path)
    elif os.path.basename(checkpoint.files[0].path) == "adapter_model.safetensors" and os.path.exists(where):
        config = read_json(where, DEFAULT_LIMITS)  # PEFT
    else:
        return lambda module, rank: 1.0
    if not isinstance(config, dict):
        raise LoadError("what says how strong the LoRA is must be a JSON object", kind="BadHeader",
                        path=checkpoint.path, field="lora_adapter_metadata")  # fmt: skip

    def scale(module: str, rank: int) -> float:
        role = module.split(".")[0]
        prefix = f"{role}." if f"{role}.lora_alpha" in config else ""
        if config.get(f"{prefix}use_dora"):
            raise LoadError("DoRA is not supported, and leaving it out would draw something else", kind="Unsupported",
                            path=checkpoint.path, field="use_dora")  # fmt: skip
        alpha = config.get(f"{prefix}lora_alpha")
        patterns = config.get(f"{prefix}alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise LoadError("must map ends of names to numbers", kind="BadHeader", path=checkpoint.path,
                            field="alpha_pattern")  # fmt: skip
        for ending, special in patterns.items():
            # PEFT takes a regex; one from a file can run for ever, and what trainers write are ends of names.
            if not re.fullmatch(r"[\w.-]+", ending):
                raise LoadError(f"{quoted(ending)} is a pattern, only ends of names are taken", kind="Unsupported",
                                path=checkpoint.path, field="alpha_pattern")  # fmt: skip
            if f".{module}".endswith(f".{ending}"):
                alpha = special
                break  # the first counts, as in PEFT
        if alpha is None:
            return 1.0
        root = math.sqrt(rank) if config.get(f"{prefix}use_rslora") else rank
        return _finite_alpha(checkpoint, alpha) / root

    return scale


def _finite_alpha(checkpoint: Checkpoint, alpha: object) -> float:
    if type(alpha) not in (int, float) or not abs(alpha) < 1e30:  # type: ignore[arg-type]
        raise LoadError(f"{alpha!r:.80} is no factor", path=checkpoint.path, field="lora_alpha")
    return float(alpha)  # type: ignore[arg-type]


# -- values -----------------------------------------------------------------------------------------------------------


def _matrix(info: TensorInfo, vector: bool = False) -> tuple[int, ...]:
    """Numpy's shape as a matrix [rows, columns]: of a 1x1 convolution the last two are left out. vector: or [n]."""
    shape = info.shape
    if len(shape) > 2 and all(d == 1 for d in shape[2:]):
        shape = shape[:2]
    if len(shape) == 2 or (vector and len(shape) == 1):
        return shape
    raise LoadError(f"has the shape {list(info.shape)}, which is no matrix", kind="BadShape", path=info.file.path,
                    tensor=info.name_in_file)  # fmt: skip


def _shapes(parts: Mapping[str, TensorInfo]) -> str:
    return ", ".join(f"{name} {list(info.shape)}" for name, info in parts.items())


def _read_rows(info: TensorInfo, shape: Sequence[int], first: int, last: int) -> Float32:
    """Rows of a tensor as float32, a copy: [n, columns] or [n]."""
    per_row = info.n_bytes // shape[0] if len(shape) == 2 else info.n_bytes // info.n_elements
    raw = info.file.read_at(info.offset + first * per_row, (last - first) * per_row)
    return _values(info, raw, first * math.prod(shape[1:])).reshape(last - first, *shape[1:])


def _values(info: TensorInfo, raw: bytes, first: int = 0) -> Float32:
    """Bytes of a tensor, from element `first` on, as float32, a copy; times its scale where it has one."""
    try:
        return np.array(scaled_float32(np.frombuffer(raw, np.uint8), info, first), np.float32)
    except (KeyError, OverflowError) as error:
        raise LoadError(f"{info.dtype} cannot be read as float32: {error}", kind="BadType", path=info.file.path,
                        tensor=info.name_in_file) from None  # fmt: skip


def _finite(raw: bytes, info: TensorInfo, first: int) -> bool:
    """Whether all values, from element `first` on, are finite. For the common types by their bits, which is several
    times faster.
    """
    bits: NDArray[Any]
    if info.dtype in ("F16", "BF16"):
        bits = np.frombuffer(raw, "<u2") & np.uint16(0x7FFF)
        return not bits.size or int(bits.max()) < (0x7C00 if info.dtype == "F16" else 0x7F80)
    if info.dtype == "F32":
        bits = np.frombuffer(raw, "<u4") & np.uint32(0x7FFFFFFF)
        return not bits.size or int(bits.max()) < 0x7F800000
    return bool(np.isfinite(_values(info, raw, first)).all())
