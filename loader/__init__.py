"""From bytes on disk to tensors on a backend; knows files and places, no model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint, open_checkpoint
from .describe import Description, describe, describe_path
from .errors import LoadError
from .limits import Limits
from .mapped import MappedFile, TensorInfo
from .options import LoadOptions

if TYPE_CHECKING:
    from .params import LoadReport, Param, Weights, alloc_params_buffer, load_params
    from .placement import Plan, plan_params

__all__ = [
    "Checkpoint",
    "Description",
    "Limits",
    "LoadError",
    "LoadOptions",
    "LoadReport",
    "MappedFile",
    "Param",
    "Plan",
    "TensorInfo",
    "Weights",
    "alloc_params_buffer",
    "describe",
    "describe_path",
    "load_params",
    "open_checkpoint",
    "plan_params",
]

# These use ggml and numpy; reading headers does not, and `pyggml inspect` should start at once.
_LAZY = {name: ".params" for name in ("LoadReport", "Param", "Weights", "alloc_params_buffer", "load_params")}
_LAZY |= {name: ".placement" for name in ("Plan", "plan_params")}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value
