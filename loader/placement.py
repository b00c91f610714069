"""Where each parameter's bytes will rest, decided before anything is allocated: left in the file, or copied.

A `Plan` is made from headers alone, so that it can be shown (`pyggml plan`) without loading anything.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Literal, TypeAlias

from pyggml import BufferType, Device, Type, devices

from .checkpoint import Checkpoint
from .convert import can_convert, is_same, native_type
from .describe import describe
from .dtypes import QUANTISED
from .errors import LoadError, printable, quoted
from .mapped import MappedFile, TensorInfo
from .options import LoadOptions
from .repack import layout_for

Ne: TypeAlias = tuple[int, ...]
Action: TypeAlias = Literal["map", "copy", "convert", "repack"]
Reading: TypeAlias = Literal["map", "io", "off"]

_SMALL = 64 << 10  # bytes


@dataclass(frozen=True, slots=True)
class Placement:
    """One parameter: where it comes from, the type it will have, what is done with its bytes, and why not mapped.

    `reading`: the mode of its file, "auto" resolved; what is not mapped is copied out of a mapping in mode "io", what
    is repacked also in mode "map". `layout`: the buffer type that it is repacked for.
    """

    name: str
    info: TensorInfo
    ne: Ne
    type: Type
    action: Action
    reason: str = ""
    reading: Reading = "map"
    layout: BufferType | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of the parameter once it is loaded."""
        n = self.type.row_size(self.ne[0]) if self.ne else self.type.type_size
        for d in self.ne[1:]:
            n *= d
        return n


@dataclass(frozen=True, slots=True)
class Plan:
    """Placements of a component's parameters; `absent` are the optional ones that the checkpoint lacks."""

    component: str
    placements: tuple[Placement, ...]
    absent: tuple[str, ...]

    def n_bytes(self, *actions: Action) -> int:
        """Bytes after loading of the parameters with one of these actions; of all without any."""
        return sum(p.n_bytes for p in self.placements if not actions or p.action in actions)

    def n_tensors(self, *actions: Action) -> int:
        return sum(1 for p in self.placements if not actions or p.action in actions)

    def by_file(self) -> dict[MappedFile, list[Placement]]:
        """The placements of each file, in the order of the parameters."""
        files: dict[MappedFile, list[Placement]] = {}
        for p in self.placements:
            files.setdefault(p.info.file, []).append(p)
        return files

    def reasons(self) -> dict[str, int]:
        """Why tensors are not mapped -> how many."""
        counts: dict[str, int] = {}
        for p in self.placements:
            if p.reason:
                counts[p.reason] = counts.get(p.reason, 0) + 1
        return counts


def maps_files(device: Device, buffer_type: BufferType) -> bool:
    """True when tensors of this buffer type may point into a mapped file: the device computes on memory of the host
    as it is, and this is its plain buffer type, not one with a layout of its own (CPU_REPACK).
    """
    return device.maps_host_memory and buffer_type == device.buffer_type


def device_of(buffer_type: BufferType) -> Device | None:
    """The device that a buffer type belongs to; ggml does not say it for the processor's own."""
    for device in devices():
        if buffer_type == device.buffer_type or buffer_type in device.extra_buffer_types:
            return device
    return None


def plan_params(
    wanted: Mapping[str, tuple[Ne, Type | None, bool]],
    checkpoint: Checkpoint,
    *,
    device: Device,
    buffer_type: BufferType,
    component: str,
    options: LoadOptions | None = None,
    products: Container[str] = (),
) -> Plan:
    """Match parameters, as name -> (ne, type or None for the file's own, optional), with the tensors of a checkpoint.

    `products`: names of those that are only ever multiplied with, which may have a layout of their own.

    Raises `LoadError` (WrongTensors) that lists every tensor which is missing, surplus, of another shape, or of a type
    that cannot be converted; its `problems` has them all, the message the first.
    """
    options = options or LoadOptions()
    cannot = "" if maps_files(device, buffer_type) else f"{buffer_type.name} cannot point into a file"
    readings: dict[MappedFile, tuple[Reading, str]] = {}
    placements: list[Placement] = []
    absent: list[str] = []
    missing: list[str] = []
    wrong: list[str] = []
    for name, (ne, type, optional) in wanted.items():
        info = checkpoint.get(name)
        if info is None:
            (absent if optional else missing).append(name)
            continue
        kind = native_type(info) if type is None else type
        if kind is None or not (is_same(info.dtype, kind) or can_convert(info, kind)):
            target = "a type of ggml" if kind is None else kind.name
            wrong.append(f"{_shown(info)} is {info.dtype}, which cannot become {target}")
        elif not _fits(ne, info, kind):
            wrong.append(f"{_shown(info)} has ne {list(info.ne)}, wanted is {list(ne)}")
        else:
            if info.file not in readings:
                readings[info.file] = _reading(info.file, options)
            reading, chosen = readings[info.file]
            reason = _why_not_mapped(info, kind) or chosen or cannot
            action: Action = "convert" if not is_same(info.dtype, kind) else "copy" if reason else "map"
            layout = None
            if name in products and action != "convert" and buffer_type == device.buffer_type:
                layout = layout_for(device, tuple(ne), kind, options.repack)
            if layout is not None:
                action, reason = "repack", f"repacked for {layout.name}"
            placements.append(Placement(name, info, tuple(ne), kind, action, reason, reading, layout))
    if options.reclaim and not options.mlock:
        placements = _copy_small(placements)
    surplus = [_shown(info) for name, info in checkpoint.items() if name not in wanted]
    if missing or surplus or wrong:
        raise _wrong_tensors(component, checkpoint, len(wanted), missing, surplus, wrong)
    return Plan(component, tuple(placements), tuple(absent))


def _copy_small(placements: list[Placement]) -> list[Placement]:
    """Small tensors beside repacked ones copied too: Linux maps up to 2 MB around a page that is touched, and what was
    given back would come again with every norm between the weights.
    """
    repacked = {p.info.file for p in placements if p.action == "repack" and p.reading == "map"}
    reason = "small, beside repacked weights"
    return [
        replace(p, action="copy", reason=reason)
        if p.action == "map" and p.n_bytes <= _SMALL and p.info.file in repacked else p
        for p in placements
    ]  # fmt: skip


def _reading(file: MappedFile, options: LoadOptions) -> tuple[Reading, str]:
    """How a file is read, and why its tensors are not mapped when the mode is the reason."""
    if options.mode == "io":
        return "io", "mapped to be read only"
    if options.mode == "off":
        return "off", "mapping is off"
    if options.mode == "auto" and (remote := file.remote):
        return "off", f"the file is on {remote}"
    return "map", ""


def _why_not_mapped(info: TensorInfo, kind: Type) -> str:
    if not is_same(info.dtype, kind):
        scaled = "" if info.scale is None else " with a scale"
        return f"{info.dtype}{scaled} becomes {kind.name}"
    if info.n_bytes == 0:
        return "no elements"
    # What a load of one element needs. ggml's kernels on the processor use unaligned vector loads for weights.
    alignment = 8 if kind.is_quantized else kind.type_size
    if info.offset % alignment:
        return "not aligned in the file"
    return ""


def _fits(ne: Ne, info: TensorInfo, kind: Type) -> bool:
    """Same shape, or the same but for dimensions of one; of more dimensions than ggml's four, with or without those of
    one, the fourth and those beyond it count as one.
    """
    if info.dtype in QUANTISED or kind.is_quantized:
        if (ne[0] if ne else 1) != (info.ne[0] if info.ne else 1):
            return False
    return _squeezed(ne) in (_squeezed(_at_most_four(info.ne)), _at_most_four(_squeezed(info.ne)))


def _squeezed(ne: Ne) -> Ne:
    return tuple(d for d in ne if d != 1)


def _at_most_four(ne: Ne) -> Ne:
    return (*ne[:3], prod(ne[3:])) if len(ne) > 4 else ne


def _shown(info: TensorInfo) -> str:
    if info.name == info.name_in_file:
        return quoted(info.name)
    return f"{quoted(info.name)} ({quoted(info.name_in_file)} in the file)"


def _wrong_tensors(
    component: str, checkpoint: Checkpoint, n_wanted: int, missing: list[str], surplus: list[str], wrong: list[str]
) -> LoadError:
    groups = [(missing and [quoted(name) for name in missing], "missing"), (surplus, "surplus"), (wrong, "wrong")]
    parts = []
    problems = []
    for names, word in groups:
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            parts.append(f"{len(names)} {word}: {', '.join(names[:5])}{more}")
            problems += [name if word == "wrong" else f"{name} is {word}" for name in names]
    text = "; ".join(parts)
    if len(missing) * 2 > n_wanted:  # not this model at all
        text = f"{describe(checkpoint).sentence()}, not {printable(component)}; {text}"
    return LoadError(
        f"the tensors are not those of {printable(component)}: {text}",
        kind="WrongTensors",
        path=checkpoint.path,
        tensor=None if not missing else missing[0],
        problems=problems,
    )
