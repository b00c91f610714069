"""Which device each part of a model computes on, and where its weights rest meanwhile: sd-cli's grammar.

    vulkan0                                one device for all
    te=cpu,diffusion=vulkan0,vae=cpu       a device for each module; `clip` and `llm` are other names of `te`
    *=cpu,diffusion=vulkan0                `*` stands for the modules that are not named
    diffusion=rpc0&rpc1                    several devices for a module: each gets a share of its layers

Devices are named as `pyggml devices` lists them, upper and lower case alike. `auto` is the first GPU, else the
processor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pyggml import Backend, BufferType, Device, GGMLError, SplitBackend, devices
from pyggml.types import DeviceType

Module = Literal["te", "diffusion", "vae"]
# device: where the module computes; cpu: in memory of the host, mapped if it can be; disk: nowhere, read for each phase
Rest = Literal["device", "cpu", "disk"]

MODULES: tuple[Module, ...] = ("te", "diffusion", "vae")
_NAMES: dict[str, Module] = {"te": "te", "clip": "te", "llm": "te", "diffusion": "diffusion", "vae": "vae"}


@dataclass(frozen=True)
class Place:
    """What a module computes on, and where its parameters rest while it does not."""

    backend: Backend
    rest: Rest = "device"
    opened: tuple[Backend, ...] = ()  # by `places`, for this module and perhaps others: theirs to close who asked
    max_vram: int | None = None  # bytes that it may take of the device's memory; None: what is free

    @property
    def offloads(self) -> bool:
        """True when the parameters are at the backend only while they are in use."""
        return self.rest == "disk" or (self.rest == "cpu" and not self.backend.device.maps_host_memory)

    @property
    def resting(self) -> BufferType:
        """Memory for what rests where the parameters do."""
        return (host() if self.offloads else self.backend).buffer_type


def parse(text: str, option: str = "backend") -> dict[Module, str]:
    """Module -> name, as far as `text` says; ValueError for an unknown module or one that is named twice."""
    everywhere: str | None = None
    named: dict[Module, str] = {}
    for part in text.split(","):
        key, is_pair, value = (s.strip() for s in part.partition("="))
        if not is_pair:
            key, value = "*", key
        if not value or not key:
            raise ValueError(f"{option} {text!r}: {part!r} is no name and no MODULE=NAME")
        if key == "*":
            if everywhere is not None:
                raise ValueError(f"{option} {text!r}: all modules are given twice, as {everywhere!r} and {value!r}")
            everywhere = value
        elif key not in _NAMES:
            raise ValueError(f"{option} {text!r}: there is no module {key!r}, only {', '.join(_NAMES)} and *")
        elif (module := _NAMES[key]) in named:
            raise ValueError(f"{option} {text!r}: {module} is given twice, as {named[module]!r} and {value!r}")
        else:
            named[module] = value
    if everywhere is not None:
        return {module: named.get(module, everywhere) for module in MODULES}
    return named


def find_devices(name: str, option: str = "backend") -> tuple[Device, ...]:
    """The devices of a name, or of several with & between them, as `find_device`; each is named once."""
    found = tuple(find_device(part.strip(), option) for part in name.split("&"))
    if len(set(found)) < len(found):
        raise ValueError(f"{option}: {name!r} names a device twice")
    return found


def find_device(name: str, option: str = "backend") -> Device:
    """The device of that name; `auto` is this machine's first GPU, else its processor.

    ValueError naming those that there are.
    """
    found = devices()
    if name.lower() == "auto":
        kinds = (DeviceType.GPU, DeviceType.IGPU, DeviceType.CPU)
        return min((d for d in found if d.type in kinds and not d.is_remote), key=lambda d: kinds.index(d.type))
    try:
        return Device.by_name(name)
    except GGMLError as error:
        raise ValueError(f"{option}: {error}") from None


def host() -> Device:
    """The processor."""
    return find_device("cpu")


def places(
    backend: Backend | str | Mapping[Module, Backend] | None = None,
    params_backend: str | None = None,
    n_threads: int | None = None,
    max_vram: int | None = None,
) -> dict[Module, Place]:
    """Where each module computes and rests. One backend is opened for a device, however many modules it computes.

    backend: one for all, one for each module, or a text as above; None is the processor. params_backend: a text whose
    names are `cpu`, `disk`, or the device that the module computes on; modules that it leaves out rest where they
    compute. `n_threads` is for the processor. `max_vram`: bytes that each module may take of its device's memory while
    it is in use; parameters then rest on `cpu` unless they compute there. ValueError for what cannot be followed. What
    is opened here is in `Place.opened`, for the caller to close.
    """
    if max_vram is not None and max_vram < 1:
        raise ValueError(f"max_vram must be a number of bytes above 0, not {max_vram}")
    rests = parse(params_backend or "auto", "params_backend")
    given: Mapping[Module, Backend] = {}
    if isinstance(backend, Backend):
        given = dict.fromkeys(MODULES, backend)
    elif isinstance(backend, Mapping):
        given = backend
        if missing := [module for module in MODULES if module not in given]:
            raise ValueError(f"backend: none is given for {', '.join(missing)}")
        if unknown := [str(module) for module in given if module not in MODULES]:
            raise ValueError(f"backend: there is no module {', '.join(unknown)}, only {', '.join(MODULES)}")
    named = {} if given else parse("cpu" if backend is None else str(backend))
    chosen = {m: _devices_of(given[m]) if given else find_devices(named.get(m, "auto")) for m in MODULES}
    rest = {m: _rest(rests.get(m, "auto"), m, device) for m, device in chosen.items()}  # before anything is opened
    each = {} if given else dict.fromkeys(device for several in chosen.values() for device in several)
    single: dict[Device, Backend] = {}
    computing: dict[tuple[Device, ...], Backend] = {}
    try:
        for device in each:
            single[device] = device.open(n_threads)
        for several in {} if given else dict.fromkeys(chosen.values()):
            parts = [single[device] for device in several]
            computing[several] = SplitBackend(parts) if len(parts) > 1 else parts[0]
        opened = tuple(dict.fromkeys([*computing.values(), *single.values()]))  # what is split before its parts
        found = {m: Place(given[m] if given else computing[chosen[m]], rest[m], opened, max_vram) for m in MODULES}
        if max_vram is not None:
            found = {m: _limited(m, place, rests.get(m, "auto").lower() != "auto") for m, place in found.items()}
            if not any(place.offloads for place in found.values()):
                raise ValueError("max_vram: no module computes on a device with memory of its own")
    except BaseException:
        for one in (*computing.values(), *single.values()):
            one.close()
        raise
    return found


def _devices_of(backend: Backend) -> tuple[Device, ...]:
    return tuple(part.device for part in (backend.parts if isinstance(backend, SplitBackend) else (backend,)))


def _limited(module: Module, place: Place, is_explicit: bool) -> Place:
    """With parameters that can come to the device piece by piece."""
    if place.backend.is_cpu:
        return place
    if isinstance(place.backend, SplitBackend):
        raise ValueError(f"max_vram: {module} computes on several devices: let it compute on one")
    if place.backend.device.is_remote:
        raise ValueError(
            f"max_vram: {module} computes on {place.backend.device.name}, to which weights would go over the network "
            "in each pass: let it compute on a device of this machine"
        )
    if place.rest == "disk" or (place.rest == "device" and is_explicit):
        where = "disk" if place.rest == "disk" else place.backend.device.name
        raise ValueError(f"max_vram: parameters of {module} have to rest on cpu, not on {where}")
    return replace(place, rest="cpu")


def _rest(name: str, module: Module, computing: tuple[Device, ...]) -> Rest:
    if name.lower() == "auto":
        return "device"
    if name.lower() in ("disk", "cpu") and len(computing) == 1:
        return "disk" if name.lower() == "disk" else "cpu"
    if name.lower() == "disk" or find_devices(name, "params_backend") != computing:
        raise ValueError(
            f"params_backend: {module} computes on {'&'.join(d.name for d in computing)}, so its parameters rest "
            f"there{', on cpu or on disk' if len(computing) == 1 else ''}, not on {name}"
        )
    return "device"
