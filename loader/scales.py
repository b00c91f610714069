"""Scale tensors of 8-bit weights: found beside their weight, attached to it, multiplied in wherever it is read.

In the wild, for the weight LAYER.weight:

- LAYER.scale_weight, LAYER.weight_scale, LAYER.weight_scale_inv (times it, in spite of the name): one number, one for
  each row, or one for each block of rows and columns
- LAYER.scale_input, LAYER.input_scale: scales of activations, for multiplying in 8 bits; of no use in 16 or 32
- PREFIX.scaled_fp8, an almost empty marker; LAYER.comfy_quant, or `_quantization_metadata` of the whole file, which
  name a format in JSON
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from .dtypes import NUMPY_NAMES
from .errors import LoadError, quoted
from .mapped import TensorInfo
from .strict_json import parse_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# the largest value of each type that can have a scale
LARGEST: Final = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0, "I8": 127.0}
QUANTIZATION_METADATA: Final = "_quantization_metadata"

_OF_WEIGHT: Final = (".scale_weight", ".weight_scale", ".weight_scale_inv")
_OF_INPUT: Final = (".scale_input", ".input_scale")
_MARKER: Final = "scaled_fp8"
_QUANT: Final = ".comfy_quant"
_SCALE_TYPES: Final = ("F32", "F16", "BF16")
_FORMATS: Final = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8_tensorwise": "I8"}
_BLOCK: Final = 128  # of rows and columns, the usual one
_MAX_SCALE: Final = 1e30  # times the largest value it is still far from the end of float32


def attach_scales(
    tensors: dict[str, TensorInfo], metadata: Mapping[str, Any]
) -> tuple[dict[str, TensorInfo], list[TensorInfo]]:
    """(weights with `TensorInfo.scale` and all other tensors, those that nothing needs any more).

    A scale whose weight is missing or is no 8-bit type stays a tensor of its own, for a model to refuse. Raises
    `LoadError` for formats that need more than a multiplication, and for a scale whose shape does not fit.
    """
    if not any(name.endswith((*_OF_WEIGHT, _QUANT, _MARKER)) for name in tensors):
        return tensors, []
    formats = _formats_of_file(tensors, metadata)
    out = dict(tensors)
    unused: list[TensorInfo] = []
    for name, info in tensors.items():
        suffix = next((s for s in (*_OF_WEIGHT, *_OF_INPUT, _QUANT) if name.endswith(s)), None)
        if suffix is None:
            if name == _MARKER or name.endswith("." + _MARKER):
                unused.append(out.pop(name))
            continue
        layer = name[: -len(suffix)]
        weight = out.get(f"{layer}.weight")
        if suffix == _QUANT:
            formats[layer] = _parse_format(info)
            unused.append(out.pop(name))
            continue
        if suffix in _OF_INPUT:
            if any(layer + s in tensors for s in _OF_WEIGHT):
                unused.append(out.pop(name))
            continue
        if weight is None or weight.dtype not in (*LARGEST, "U8") or info.dtype not in (*_SCALE_TYPES, "F8_E8M0", "U8"):
            continue
        if weight.scale is not None:
            message = f"{quoted(weight.scale.name)} and {quoted(name)} are both scales of it"
            raise LoadError(message, kind="DuplicateTensor", path=info.file.path, tensor=weight.name)
        _check_shape(weight, info)
        out[weight.name] = _with_scale(weight, weight.dtype, info)
        del out[name]
    for layer, table in formats.items():
        _apply_format(out, layer, table)
    for info in out.values():
        if info.scale is not None and (info.dtype == "U8" or info.scale.dtype not in _SCALE_TYPES):
            raise _unreadable(info, f"{info.dtype} with a scale of {info.scale.dtype} in a format that is not named")
        if info.scale is not None and info.dtype == "I8" and _layer(info) not in formats:
            raise _unreadable(info, "I8 with a scale in a format that is not named: it may be rotated")
    return out, unused


def read_scale(info: TensorInfo) -> NDArray[np.float32]:
    """The scale of a weight, float32 [row blocks, column blocks]. LoadError when it is not finite or endless."""
    import numpy as np

    scale = info.scale
    assert scale is not None
    data = np.frombuffer(scale.file.read_at(scale.offset, scale.n_bytes), np.uint8)
    if scale.dtype == "BF16":
        values = (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = data.view(NUMPY_NAMES[scale.dtype]).astype(np.float32)
    if not (np.abs(values) <= _MAX_SCALE).all():
        message = f"a scale that is not finite, or above {_MAX_SCALE:g}"
        raise LoadError(message, kind="BadValue", path=scale.file.path, tensor=scale.name_in_file, offset=scale.offset)
    n_rows = info.ne[-1] if info.ne else 1
    if values.size == 1:
        return values.reshape(1, 1)
    return values.reshape(n_rows, 1) if _is_by_row(scale, n_rows) else values.reshape(scale.shape)


def multiply(values: NDArray[np.float32], info: TensorInfo, scale: NDArray[np.float32], first: int) -> None:
    """Multiply flat values, in place, which begin at element `first` of the weight, by what `read_scale` gave."""
    import numpy as np

    if scale.size == 1:
        values *= scale[0, 0]
        return
    n_columns = info.n_elements // info.ne[-1]
    rows, columns = _block(info, scale.shape)
    if first % n_columns == 0 and values.size % n_columns == 0:
        i = np.arange(first // n_columns, (first + values.size) // n_columns) // rows
        matrix = values.reshape(-1, n_columns)
        matrix *= scale[i] if scale.shape[1] == 1 else np.repeat(scale[i], columns, axis=1)[:, :n_columns]
    else:
        position = np.arange(first, first + values.size)
        values *= scale[position // n_columns // rows, position % n_columns // columns]


def fits_f16(info: TensorInfo) -> bool:
    """True when f16 holds the scaled weight: its largest value, and its smallest step to half of it.

    Otherwise BF16 is the type to take. Reads the scale.
    """
    import numpy as np

    largest = LARGEST[info.dtype] * float(np.abs(read_scale(info)).max(initial=0))
    return largest == 0 or 2**-6 <= largest <= 65504


def _block(info: TensorInfo, blocks: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns that share a scale, for `blocks` = [row blocks, column blocks]."""
    n_rows = info.ne[-1]
    n_columns = info.n_elements // n_rows
    if blocks == (n_rows, 1):
        return 1, n_columns
    if blocks == (-(-n_rows // _BLOCK), -(-n_columns // _BLOCK)):
        return _BLOCK, _BLOCK
    return n_rows // blocks[0], n_columns // blocks[1]


def _is_by_row(scale: TensorInfo, n_rows: int) -> bool:
    return scale.n_elements == n_rows and n_rows in scale.ne


def _check_shape(weight: TensorInfo, scale: TensorInfo) -> None:
    """Raises LoadError unless it is one number, one for each row, or one for each block of a matrix."""
    n_rows = weight.ne[-1] if weight.ne else 1
    if scale.n_elements == 1 or _is_by_row(scale, n_rows):
        return
    if weight.dtype == "U8" or scale.dtype not in _SCALE_TYPES:
        return  # refused by its format, which says more
    if len(weight.ne) == 2 and len(scale.ne) == 2:
        n_columns, (n_column_blocks, n_row_blocks) = weight.ne[0], scale.ne
        if (n_row_blocks, n_column_blocks) == (-(-n_rows // _BLOCK), -(-n_columns // _BLOCK)):
            return
        if n_row_blocks and n_column_blocks and n_rows % n_row_blocks == 0 and n_columns % n_column_blocks == 0:
            return
    raise LoadError(
        f"the scale has ne {list(scale.ne)}, which does not divide a weight of ne {list(weight.ne)}",
        kind="BadShape",
        path=scale.file.path,
        tensor=scale.name_in_file,
        offset=scale.offset,
    )


def _formats_of_file(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """layer -> its table in the file's `_quantization_metadata`; the prefix of the tensors may be missing there."""
    text = metadata.get(QUANTIZATION_METADATA)
    if not isinstance(text, str):
        return {}
    path = next(iter(tensors.values())).file.path
    table = parse_json(text.encode(), path)
    layers = table.get("layers", {}) if type(table) is dict else None
    if type(layers) is not dict or not all(type(entry) is dict for entry in layers.values()):
        raise LoadError("must map layers to their formats", kind="BadHeader", path=path, field=QUANTIZATION_METADATA)
    found: dict[str, dict[str, Any]] = {}
    by_end: dict[str, str] = {}
    for name in tensors:
        if name.endswith(".weight"):
            parts = name.removesuffix(".weight").split(".")
            by_end |= {".".join(parts[i:]): name.removesuffix(".weight") for i in range(min(4, len(parts)))}
    for layer, entry in layers.items():
        if layer in by_end:
            found[by_end[layer]] = entry
    return found


def _parse_format(info: TensorInfo) -> dict[str, Any]:
    """The table in a `comfy_quant` tensor: JSON as bytes."""
    if info.dtype not in ("U8", "I8") or info.n_bytes > 4096:
        raise LoadError(
            f"{info.n_bytes} bytes of {info.dtype}, not a short JSON as U8",
            kind="BadHeader",
            path=info.file.path,
            tensor=info.name_in_file,
            offset=info.offset,
        )
    table = parse_json(info.file.read_at(info.offset, info.n_bytes), info.file.path, info.offset)
    if type(table) is not dict:
        raise LoadError("not a JSON object", kind="BadHeader", path=info.file.path, tensor=info.name_in_file)
    return table


def _apply_format(tensors: dict[str, TensorInfo], layer: str, table: Mapping[str, Any]) -> None:
    """Check that a multiplication is all that the layer's format asks for."""
    weight = tensors.get(f"{layer}.weight")
    if weight is None:
        return
    name = table.get("format")
    dtype = _FORMATS.get(name) if isinstance(name, str) else None
    params = table.get("params")
    rotated = table.get("convrot") or (params.get("convrot") if isinstance(params, dict) else None)
    if dtype is None or rotated:
        what = f"quantised as {json.dumps(name)[:60]}" + (" and rotated (convrot)" if rotated else "")
        raise _unreadable(weight, what)
    if weight.dtype not in (dtype, "U8") or weight.scale is None:
        has = "no scale" if weight.scale is None else f"type {weight.dtype}"
        raise _unreadable(weight, f"{name}, but has {has}")
    tensors[weight.name] = _with_scale(weight, dtype, weight.scale)  # fp8 is sometimes stored as U8


def _layer(info: TensorInfo) -> str:
    return info.name.removesuffix(".weight")


def _with_scale(info: TensorInfo, dtype: str, scale: TensorInfo) -> TensorInfo:
    return TensorInfo(info.name, info.ne, dtype, info.file, info.offset, info.n_bytes, info.name_in_file, scale)


def _unreadable(info: TensorInfo, what: str) -> LoadError:
    return LoadError(
        f"is {what}",
        kind="BadType",
        path=info.file.path,
        tensor=info.name_in_file,
        offset=info.offset,
        hint="fp8 with a scale, plain int8_tensorwise, f16, bf16 and gguf files are read",
    )
