"""How much a header may ask for before it is refused. Real files stay far below; forged ones do not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what a file may claim. Sizes are bytes, `n_*` counts. Pass another one to `open_checkpoint`
    to relax.

    `trailing_bytes` accepts a file that goes on after its last tensor (some safetensors in the wild do).
    """

    n_tensors: int = 1 << 17
    n_keys: int = 1 << 17
    key: int = 65_535
    string: int = 64 << 20
    name: int = 4096
    dim: int = 1 << 31
    gguf_rank: int = 4
    safetensors_rank: int = 8
    alignment: int = 65_536
    gguf_header: int = 128 << 20
    safetensors_header: int = 32 << 20
    json: int = 32 << 20
    n_shards: int = 1024
    trailing_bytes: bool = False


DEFAULT_LIMITS = Limits()
