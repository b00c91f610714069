"""LoRAs as a command line names them: `<lora:name:weight>` in the prompt, found in a folder, and --lora FILE:WEIGHT."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

TAG = re.compile(r"<lora:([^<>]*)>")
_BROKEN = re.compile(r"<\s*lora\s*:.{,20}", re.IGNORECASE)  # it would be drawn as words, and change nothing else
_NUMBER = re.compile(r"\s*[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?\s*")  # float() takes more: 0_5 is 5
ENDINGS = (".safetensors", ".gguf", ".sft")
PICKLES = (".pt", ".ckpt", ".bin", ".pth")  # found, so that what is said is that they are not opened


def take_tags(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """The prompt without its tags, and (name, weight) of each. A tag without a weight has 1.

    Nothing but the tag is taken away: spaces around it stay, as in stable-diffusion.cpp. ValueError for a tag that
    could not be meant.
    """
    found: list[tuple[str, float]] = []
    for match in TAG.finditer(prompt):
        name, colon, text = match[1].rpartition(":")
        if not colon:
            name, text = match[1], "1"
        if name.startswith("|high_noise|"):
            raise ValueError(f"{match[0]}: this model has one set of weights, and no other for high noise")
        found.append((name.strip(), _weight(text, match[0])))
    rest = TAG.sub("", prompt)
    if broken := _BROKEN.search(rest):
        raise ValueError(f"{broken[0]!r} in the prompt is no tag: they have the form <lora:NAME:WEIGHT>")
    return rest, found


def parse_option(text: str) -> tuple[str, float]:
    """FILE:WEIGHT, or FILE alone, whose weight is 1. What follows the last colon is a weight when it is a number, so
    that `C:\\x.safetensors` is a file; so is whatever there is a file of.
    """
    path, colon, weight = text.rpartition(":")
    if not colon or os.path.exists(text):
        return text, 1.0
    if re.fullmatch(r"[^/\\]*[/\\].*|.*\.(safetensors|gguf|sft)", weight):  # the colon belongs to the path
        return text, 1.0
    if not path:
        raise ValueError(f"--lora {text}: no file is named")
    return path, _weight(weight, f"--lora {text}")


def find_lora(folder: str, name: str) -> str:
    """The file of a name, with or without its ending, in `folder` or, as "style/name", in a folder below.

    Each part is looked up in the listing of its folder; no path is made of what a prompt says. ValueError when there is
    none, with the names that are like it.
    """
    place = Path(folder)
    *folders, last = name.split("/")
    for part in folders:
        if part not in _listing(place) or not (place / part).is_dir():
            raise ValueError(f"<lora:{name}>: there is no folder {part!r} in {place} (--lora-model-dir)")
        place = place / part
    names = [entry for entry in _listing(place) if entry.lower().endswith(ENDINGS + PICKLES)]
    for wanted in (last, *(last + ending for ending in (*ENDINGS, *PICKLES))):
        if wanted in names:
            return str(place / wanted)
    like = get_close_matches(last, [os.path.splitext(entry)[0] for entry in names], 3, 0.5)
    known = f"; there is {', '.join(like)}" if like else f"; it has {len(names)} LoRAs"
    raise ValueError(f"<lora:{name}>: no such file in {place} (--lora-model-dir){known}")


def find_all(tags: Sequence[tuple[str, float]], options: Sequence[str], folder: str) -> list[tuple[str, float]]:
    """(file, weight) of what tags and options name; each file's header is read. ValueError, LoadError."""
    from loader.lora import open_lora
    from models.lora import check_weight

    found = [(find_lora(folder, name), weight) for name, weight in tags] + [parse_option(text) for text in options]
    for path, weight in found:
        check_weight(weight)
        open_lora(path).close()
    return found


def lightning(path: str) -> int | None:
    """The steps of a Lightning LoRA, None for another one. LoadError."""
    from loader.lora import open_lora
    from models.lora import lightning_steps

    with open_lora(path) as lora:
        return lightning_steps(path, lora.checkpoint.metadata)


def _listing(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise ValueError(f"--lora-model-dir {folder}: {error.strerror}") from None


def _weight(text: str, where: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{where}: the weight {text!r} is no number")
    return float(text)
