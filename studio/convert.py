"""`pyggml convert`: a checkpoint as one gguf or safetensors file, in other types."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from .bars import Bars
from .loras import parse_option

if TYPE_CHECKING:
    from loader.checkpoint import Checkpoint
    from loader.save import Change


def convert(args: argparse.Namespace) -> int:
    """Write what `args` asks for. Types, rules and names are checked before anything is read."""
    source = args.model if args.source is None else args.source
    if source is None or (args.source is not None and args.model is not None):
        raise ValueError("what to convert? Give one file: pyggml convert MODEL -o out.gguf --type q8_0")
    from loader.checkpoint import open_checkpoint
    from loader.imatrix import read_importance
    from loader.save import save_checkpoint
    from loader.save_plan import format_of, parse_rules, parse_type

    kind = None if args.type is None else parse_type(args.type)
    rules = parse_rules(args.tensor_type_rules or "")
    format = format_of(args.output)
    for path in [parse_option(text)[0] for text in args.lora] + ([args.imat_in] if args.imat_in else []):
        if os.path.exists(args.output) and os.path.exists(path) and os.path.samefile(args.output, path):
            raise ValueError(f"{args.output} is read for it; write to another file")
    importance = None if args.imat_in is None else read_importance(args.imat_in)
    # Without a change of types a safetensors file stays as it is, its scale tensors too.
    raw = format == "safetensors" and kind is None and not rules and not args.lora
    with open_checkpoint(source, raw=raw) as checkpoint, Bars(unit="B", unit_scale=True, leave=False) as bars:
        changes = _merged(checkpoint, args.lora) if args.lora else {}
        report = save_checkpoint(
            checkpoint, args.output, type=kind, rules=rules, importance=importance, changes=changes,
            n_threads=args.threads if args.threads and args.threads > 0 else None, progress=bars,
        )  # fmt: skip
        n_source = checkpoint.n_bytes
    print(report.path)
    for note in report.notes:
        print(f"warning: {note}", file=sys.stderr)
    seconds = f"{report.seconds:.1f} s, compared in {report.seconds_compared:.1f} s"
    print(f"{_size(n_source)} became {_size(report.n_bytes)} in {seconds}", file=sys.stderr)
    for name, summary in report.types.items():
        line = f"  {name.lower():8} {summary.n_tensors:5} tensors  {_size(summary.n_bytes):>9}"
        if summary.error:
            line += f"  error {summary.error:.2%} (at most {summary.worst_error:.2%}, {summary.worst})"
        print(line, file=sys.stderr)
    for reason, n in report.kept.items():
        print(f"  {n} kept their type: {reason}", file=sys.stderr)
    return 0


def _merged(checkpoint: Checkpoint, options: list[str]) -> dict[str, Change]:
    """What --lora does to the tensors; says on stderr how many keys of each file that were."""
    from models import for_merging
    from models.lora import changes_of

    named, role, naming = for_merging(checkpoint)
    changes, reports = changes_of(named, role, naming, [parse_option(text) for text in options])
    for report in reports:
        print("; ".join([report.sentence(), *report.warnings]), file=sys.stderr)
    return changes


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.2f} MB"
