"""How weights come to rest, as the user chooses it; which file gets which treatment is decided in placement.py."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

Mode: TypeAlias = Literal["auto", "map", "io", "off"]
Hint: TypeAlias = Literal["sequential", "populate", "willneed", "dontneed"]
Repack: TypeAlias = Literal["auto", "on", "off"]

ENVIRONMENT: Final = ("PYGGML_MMAP_FLAGS", "SD_MMAP_FLAGS")  # the first that is set counts


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Choices of `load_params`. ValueError for a word that is none of those below.

    mode      "map": weights live in the mapped files where type, alignment and device allow; "io": files are mapped
              only to be read, and copied; "off": read into memory of our own. "auto" is "map", but "off" for files
              on network and FUSE file systems.
    mlock     weights are locked in memory, so that they are never paged out.
    hints     advice to the kernel: "sequential"; "willneed", read ahead in the background; "populate", read before the
              load returns; "dontneed", drop the files' pages from the page cache when the weights are closed.
    repack    weights that are only multiplied with are copied into the layout of a faster kernel: "auto" where that was
              measured to be faster, "on" wherever there is such a layout.
    reclaim   pages of a mapping that were copied from are given back as the copy goes; not with mlock.
    """

    mode: Mode = "auto"
    mlock: bool = False
    hints: frozenset[Hint] = frozenset()
    repack: Repack = "auto"
    reclaim: bool = True

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode is one of {', '.join(get_args(Mode))}, not {self.mode!r}")
        if self.repack not in get_args(Repack):
            raise ValueError(f"repack is one of {', '.join(get_args(Repack))}, not {self.repack!r}")
        unknown = sorted(set(self.hints) - set(get_args(Hint)))
        if unknown:
            raise ValueError(f"hints are {', '.join(get_args(Hint))}, not {', '.join(map(repr, unknown))}")

    @classmethod
    def from_environment(cls) -> LoadOptions:
        """The defaults, with the hints that PYGGML_MMAP_FLAGS or SD_MMAP_FLAGS asks for."""
        return cls(hints=hints_from_environment(os.environ))


def hints_from_environment(environment: Mapping[str, str]) -> frozenset[Hint]:
    """Hints of the first variable that is set. ValueError naming it when a word is unknown."""
    for name in ENVIRONMENT:
        if text := environment.get(name):
            return parse_hints(text, name)
    return frozenset()


def parse_hints(text: str, source: str) -> frozenset[Hint]:
    """Words with commas between them; `source` is what the message names. ValueError for an unknown one."""
    words = {word.strip() for word in text.split(",")} - {""}
    unknown = sorted(words - set(get_args(Hint)))
    if unknown:
        raise ValueError(f"{source}: hints are {', '.join(get_args(Hint))}, not {', '.join(map(repr, unknown))}")
    return frozenset(hint for hint in get_args(Hint) if hint in words)
