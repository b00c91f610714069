"""`pyggml plan` and `generate --dry-run`: what would be loaded, how, and whether it fits; from headers alone."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.lora import Held
    from models.pipeline import Pipeline
    from models.prediction import Prediction, StandIn

_NAMES = {
    "qwen3": "text encoder", "qwen25_vl": "text encoder", "vision": "vision tower", "z_image": "transformer",
    "qwen_image": "transformer", "vae": "autoencoder", "tae": "tiny autoencoder",
}  # fmt: skip


def predict_run(pipe: Pipeline, prompt: str, **options: Any) -> Prediction:
    """What pipe(prompt, **options) will take; `pipe` may be one of stand-ins. Options as Pipeline.phases."""
    from models.memory import Memory
    from models.prediction import MergedStandIn, StandIn, predict
    from models.room import Room, free_memory

    phases = pipe.phases(prompt, **options)
    parts = pipe.components()
    now, room = Memory.now(), free_memory()
    there = locked = to_come = 0  # copies that are in memory already; what a load would still lock, and copy
    kept = load_peak = 0  # pages of mappings that were copied from
    held = pipe.loras.held()
    for what, on_host in [*((p.weights, p.backend.is_cpu) for p in parts), *((h.what, h.on_host) for h in held)]:
        report = what.report
        if isinstance(what, StandIn | MergedStandIn):
            to_come += report.allocated_bytes if on_host else 0
            locked += report.mapped_bytes if report.locked_bytes else 0
            if isinstance(what, StandIn):
                load_peak = max(load_peak, now.rss + to_come + locked + kept + what.source_bytes)
                kept += what.source_kept
        elif on_host:
            there += report.allocated_bytes
    if not any(isinstance(part.weights, StandIn) for part in parts):
        load_peak = now.peak_rss
    # Mapped factors of LoRAs stay once they have been used.
    factors = sum(h.what.report.mapped_bytes for h in held if not h.what.report.locked_bytes)
    return predict(
        phases, mapped=sum(part.weights.report.mapped_bytes for part in parts if not part.weights.report.locked_bytes),
        copied=there + to_come, private=now.anonymous - there, from_files=now.file_backed + locked + factors + kept,
        room=Room(max(0, room.n_bytes + there - locked), room.source), limit=pipe.residency.limit,
        load_peak=load_peak,
    )  # fmt: skip


def show(pipe: Pipeline, prediction: Prediction, heading: str, as_json: bool) -> None:
    """Print the plan of a pipeline of stand-ins."""
    from models.prediction import StandIn

    parts = [c for c in pipe.components() if isinstance(c.weights, StandIn)]
    components = [_component(c.weights, c.checkpoint.path) for c in parts if isinstance(c.weights, StandIn)]
    components += [_of_loras(held) for held in pipe.loras.held()]
    if as_json:
        print(json.dumps({"components": components, **prediction.to_dict()}, indent=1, ensure_ascii=False))
    else:
        print("\n".join([heading, "", *_components_table(components), "", *_phases_table(prediction)]))


def _component(weights: StandIn, path: str) -> dict[str, Any]:
    plan = weights.plan
    actions = {action: plan.n_bytes(action) for action in dict.fromkeys(("map", *(p.action for p in plan.placements)))}
    return {
        "component": plan.component, "path": path, "tensors": plan.n_tensors(), "bytes": actions,
        "device": weights.where, "reasons": plan.reasons(),
    }  # fmt: skip


def _of_loras(held: Held) -> dict[str, Any]:
    """The factors of a LoRA beside a component's weights, or the copies of these that LoRAs are merged into."""
    from models.prediction import StandIn

    role = held.role.replace("_", " ")
    if isinstance(held.what, StandIn):
        return _component(held.what, held.paths[0]) | {"component": f"LoRA, {role}"}
    report, n = held.what.report, len(held.paths)
    return {
        "component": f"merged, {role}", "path": held.paths[0] if n == 1 else f"{n} LoRAs", "tensors": report.n_tensors,
        "bytes": {"map": 0, "merge": report.allocated_bytes}, "device": held.device, "reasons": {},
    }  # fmt: skip


def _components_table(components: Sequence[dict[str, Any]]) -> list[str]:
    copies = list(dict.fromkeys(action for c in components for action in c["bytes"] if action != "map"))
    words = {"copy": "copied", "convert": "converted", "repack": "repacked", "merge": "merged"}
    rows = [["weights", "file", "tensors", "mapped", *(words.get(action, action) for action in copies), "on"]]
    for c in components:
        sizes = [shown(c["bytes"].get(action, 0)) for action in ("map", *copies)]
        name = _NAMES.get(c["component"], c["component"])
        rows.append([name, os.path.basename(c["path"]) or c["path"], str(c["tensors"]), *sizes, c["device"]])
    lines = _aligned(rows, left={0, 1, len(rows[0]) - 1})
    for c in components:
        for reason, n in c["reasons"].items():
            name = _NAMES.get(c["component"], c["component"])
            lines.append(f"  {name}: {n} tensor{'s' * (n != 1)} not mapped: {reason}")
    return lines


def _phases_table(prediction: Prediction) -> list[str]:
    rows = [["phase", "weights", "private", "in memory", "", "from the disk"]]
    peak = max(prediction.phases, key=lambda phase: phase.rss)
    for phase in prediction.phases:
        notes = []
        if phase.given_back:
            notes.append(f"first gives back {shown(phase.given_back)} of others")
        if phase.per_pass:
            notes.append(f"{shown(phase.per_pass)} in each pass, do not fit")
        mark = "< peak" if phase is peak and phase.rss == prediction.peak_rss else ""
        rows.append([phase.name, shown(phase.weights), shown(phase.private), shown(phase.rss), mark, "; ".join(notes)])
    if all(not row[5] for row in rows[1:]):
        rows = [row[:5] for row in rows]
    return [
        *_aligned(rows, left={0, 4, 5}), "",
        f"peak  {shown(prediction.peak_rss)}, of it {shown(prediction.private_peak)} private"
        + (", while loading" if prediction.peak_rss > peak.rss else ""),
        f"free  {shown(prediction.room)} ({prediction.room_source}): {verdict(prediction)}",
    ]  # fmt: skip


def verdict(prediction: Prediction) -> str:
    """Whether it fits, in words."""
    if not prediction.fits:
        return "does not fit, what is private alone is too much or leaves no room to read weights through"
    if any(phase.per_pass for phase in prediction.phases):
        return "fits, with weights that are read again in each pass"
    if any(phase.given_back for phase in prediction.phases):
        return "fits, with one component at a time"
    return "fits"


def shown(n_bytes: int) -> str:
    """Bytes for people: 4.17 GB, 12.3 MB, -."""
    if n_bytes >= 1e9:
        return f"{n_bytes / 1e9:.2f} GB"
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes else "-"


def _aligned(rows: Sequence[Sequence[str]], left: set[int]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines
