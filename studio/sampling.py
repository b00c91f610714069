"""What the command line says about the steps: guidance, step caches, previews."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

APG = {
    "apg_eta": "eta", "apg_momentum": "momentum", "apg_norm_threshold": "norm_threshold",
    "apg_norm_threshold_smoothing": "smoothing",
}  # fmt: skip
CFG_ZERO = {"cfg_zero_steps": "zero_steps"}
_BLOCKS = {"Fn": "front", "fn": "front", "Bn": "back", "bn": "back", "threshold": "threshold", "warmup": "warmup"}
CACHES = {  # by the names of --cache-mode, the keys of --cache-option
    "easycache": {"threshold": "threshold", "start": "start", "end": "end"},
    "dbcache": _BLOCKS,
    "taylorseer": {"warmup": "warmup", "order": "order", "interval": "interval"},
    "cache-dit": {**_BLOCKS, "order": "order"},
}
_REAL = ("threshold", "start", "end")  # the others are whole numbers


def key_values(option: str, text: str | None, known: Mapping[str, str]) -> dict[str, float]:
    """Of "key=value,...", by the name that `known` gives the key. ValueError for other keys, and what is no number."""
    found: dict[str, float] = {}
    for pair in text.split(",") if text else []:
        key, _, value = (part.strip() for part in pair.partition("="))
        if key not in known:
            raise ValueError(f"{option} {pair.strip()!r}: choose from {', '.join(known)}, each with =NUMBER")
        try:
            found[known[key]] = float(value)
        except ValueError:
            raise ValueError(f"{option} {pair.strip()!r}: {value!r} is no number") from None
    return found


def controls(args: argparse.Namespace, family: Any) -> dict[str, Any]:
    """What a pipeline is called with for them, beside or instead of the rest; ValueError for what cannot be."""
    found: dict[str, Any] = {}
    if (guide := guidance(args, family)) is not None:
        found |= {"guidance": guide, "cfg_scale": None}  # which has it
    if args.preview != "none":
        found |= {"on_preview": _writes(Path(args.preview_path)), "preview": args.preview,
                  "preview_interval": args.preview_interval}  # fmt: skip
    if (kept := cache(args)) is not None:
        found["cache"] = kept
    return found


def _writes(path: Path) -> Callable[[int, int, Any], None]:
    """Writes each preview over the one before. What can no longer be written is said: the picture still counts."""
    from models.image import write_png

    def write(i: int, step: int, picture: Any) -> None:
        try:
            write_png(path, picture)
        except OSError as error:
            print(f"warning: preview {path} cannot be written: {error.strerror}", file=sys.stderr)

    return write


def cache(args: argparse.Namespace) -> Any:
    """Settings of models.step_cache, or None."""
    from models import step_cache

    if args.cache_mode is None:
        if args.cache_option or args.scm_mask:
            raise ValueError("--cache-option and --scm-mask need --cache-mode, the cache that they are about")
        return None
    keys = CACHES[args.cache_mode]
    more: dict[str, Any] = {}
    for name, value in key_values("--cache-option", args.cache_option, keys).items():
        if name not in _REAL and not value.is_integer():
            raise ValueError(f"--cache-option: {name} is a whole number, not {value}")
        more[name] = value if name in _REAL else int(value)
    if args.scm_mask:
        more |= {"mask": step_cache.parse_mask(args.scm_mask), "static": args.scm_policy == "static"}
    if args.cache_mode == "easycache":
        return step_cache.EasyCache(**more)
    if args.cache_mode == "taylorseer":
        return step_cache.TaylorSeer(**more)
    return step_cache.DBCache(**{"order": 1 if args.cache_mode == "cache-dit" else 0, **more})


def guidance(args: argparse.Namespace, family: Any) -> Any:
    """A guidance of models.guidance that replaces the model's own, or None."""
    from models.guidance import APG as Projected
    from models.guidance import CFGZero

    more = key_values("--extra-sample-args", args.extra_sample_args, {**APG, **CFG_ZERO})
    name = args.guidance
    if name is None and more.keys() & set(APG.values()):  # as in sd-cli, whose defaults are those of plain guidance
        name, more = "apg", {"eta": 1.0, "momentum": 0.0, **more}
    elif name not in (None, "apg", "cfg-zero"):
        try:
            float(name)
        except ValueError:
            raise ValueError(f"--guidance {name!r}: choose from apg, cfg-zero") from None
        print("warning: --guidance with a number is for distilled models and has no effect here", file=sys.stderr)
        name = None
    if name is None:
        if more:
            raise ValueError("--extra-sample-args: cfg_zero_steps needs --guidance cfg-zero")
        return None
    keys = APG if name == "apg" else CFG_ZERO
    if other := more.keys() - set(keys.values()):
        raise ValueError(f"--extra-sample-args: {', '.join(sorted(other))}: --guidance {name} has {', '.join(keys)}")
    scale = family.default_cfg_scale if args.cfg_scale is None else args.cfg_scale
    if scale == 1:
        raise ValueError(f"--guidance {name} needs --cfg-scale above 1; at 1 guidance is off")
    if name == "apg":
        return Projected(scale, **more, per_value=args.compat == "sd.cpp")
    steps = more.get("zero_steps", 1.0)
    if steps != int(steps):
        raise ValueError(f"cfg_zero_steps is a whole number, not {steps}")
    return CFGZero(scale, int(steps))
