"""Pictures and prompts of the demo checkpoint, and the check that a picture shows what its prompt says.

The world: one or two flat shapes on a flat background. Eight colours, five shapes, three sizes, five places.

* Nothing said means: medium size, in the centre, on a grey background (grey is no colour that a prompt can name).
* Two objects: the first one named is on the left, the second on the right, both half-way down.
* A combination is (colour, shape, background) of an object, and for two objects also the pair on its background. One in
  eight is left out of training, decided by a CRC of its words (`is_held_out`), so the split is the same everywhere.

The check is classic image processing and knows nothing of the model: background = median of the rim; objects =
connected regions that differ from it; colour = nearest in the palette; place = middle of the bounding box; shape = best
overlap with the five masks, stretched to that box.

    python tools/demo_pictures.py prompts -n 200 --seed 1        held-out prompts, one a line
    python tools/demo_pictures.py check --pictures DIR           DIR/0000.png ... against DIR/prompts.txt (line by line)
    python tools/demo_pictures.py evaluate                       held-out prompts through our pipeline and the check
    python tools/demo_pictures.py selftest                       the check on freshly drawn pictures
    python tools/demo_pictures.py sheet OUT.png                  a contact sheet of drawn pictures
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
SIZE = 64  # pixels; everything below is given for this size and scales with the picture

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 38, 38),
    "green": (34, 160, 62),
    "blue": (36, 74, 222),
    "yellow": (248, 222, 44),
    "orange": (248, 136, 20),
    "purple": (142, 48, 186),
    "black": (16, 16, 16),
    "white": (250, 250, 250),
}
GREY = "grey"  # the background when the prompt names none
PALETTE = {**COLOURS, GREY: (142, 146, 150)}
SHAPES = ("circle", "square", "triangle", "star", "ring")
SIZES = ("small", "medium", "large")
PLACES: dict[str, tuple[int, int]] = {  # offset of the object's centre from the picture's, in units of PLACE_STEP
    "centre": (0, 0),
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
}
PLACE_STEP = 13.0
PAIR_STEP = 15.5
RADIUS = {"small": 8.0, "medium": 12.0, "large": 17.0}  # pixels, of an object alone
PAIR_RADIUS = {"small": 7.5, "medium": 10.5, "large": 13.5}
ATTRIBUTES = ("count", "background", "colour", "place", "shape")  # what must be right for a picture to be right


@dataclass(frozen=True)
class Thing:
    """One object. `size` and `place` are None when the prompt does not mention them."""

    shape: str
    colour: str
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Scene:
    """What a prompt says: one or two things; `background` is None when the prompt names none."""

    things: tuple[Thing, ...]
    background: str | None = None

    @property
    def ground(self) -> str:
        return self.background or GREY


# --- scenes and their split ------------------------------------------------------------------------------------------


def is_held_out(scene: Scene) -> bool:
    """True when a combination of the scene was left out of training."""
    one = [f"{t.colour} {t.shape} on {scene.ground}" for t in scene.things]
    keys = one if len(one) == 1 else [*one, " and ".join(one)]
    return any(zlib.crc32(key.encode()) % 8 == 0 for key in keys)


def draw_scene(rng: random.Random) -> Scene:
    """A random scene, held out or not."""
    ground = rng.choice([*COLOURS, None])
    colours = [c for c in COLOURS if c != ground]

    def thing(place: str | None) -> Thing:
        return Thing(rng.choice(SHAPES), rng.choice(colours), rng.choice([None, *SIZES]), place)

    if rng.random() < 0.6:
        return Scene((thing(rng.choice([None, *PLACES])),), ground)
    return Scene((thing(None), thing(None)), ground)


def draw_split(rng: random.Random, held_out: bool) -> Scene:
    """A random scene of one side of the split."""
    while True:
        scene = draw_scene(rng)
        if is_held_out(scene) == held_out:
            return scene


# --- prompts ---------------------------------------------------------------------------------------------------------


def write_prompt(scene: Scene, rng: random.Random) -> str:
    """One of many phrasings of a scene. `read_prompt` undoes it."""

    def noun(thing: Thing) -> str:
        words = [w for w in (thing.size, thing.colour, thing.shape) if w]
        article = rng.choice(["a", "a", "a", "a", "one"])
        return " ".join(["an" if article == "a" and words[0][0] in "aeiou" else article, *words])

    first, *rest = scene.things
    text = noun(first)
    if rest:
        text += rng.choice([" and ", " and ", " next to ", " left of "]) + noun(rest[0])
    place = ""
    if first.place == "centre":
        place = rng.choice([" in the centre", " in the center", " in the middle"])
    elif first.place:
        place = rng.choice([" at the {}", " at the {}", " in the {}", " in the {} corner"]).format(first.place)
    ground = scene.background
    if ground:
        ground = rng.choice([" on a {} background", " on a {} background", " on {}", " on {}"]).format(ground)
        ground = ground.replace(" a orange", " an orange")
    start = rng.choice(["", "", "", "", "a picture of ", "a drawing of "])
    return start + text + place + (ground or "")


def read_prompt(prompt: str) -> Scene:
    """The scene that a prompt in the demo's language describes. ValueError when it is in no such language."""
    words = re.findall(r"[a-z]+", prompt.lower())
    things: list[Thing] = []
    ground: str | None = None
    place: str | None = None
    size: str | None = None
    colour: str | None = None
    for i, word in enumerate(words):
        if word in SIZES:
            size = word
        elif word in COLOURS:
            colour = word
            if words[max(0, i - 2) : i] in (["on", "a"], ["on", "an"]) or words[i - 1] == "on":
                ground, colour = word, None
        elif word in SHAPES:
            if colour is None:
                raise ValueError(f"no colour for the {word} in {prompt!r}")
            things.append(Thing(word, colour, size))
            size = colour = None
        elif word in ("centre", "center", "middle"):
            place = "centre"
        elif word in ("top", "bottom") and words[i + 1 : i + 2] in (["left"], ["right"]):
            place = f"{word} {words[i + 1]}"
    if not 1 <= len(things) <= 2 or (place and len(things) == 2):
        raise ValueError(f"not one or two shapes with a place for at most one: {prompt!r}")
    if place:
        things = [Thing(things[0].shape, things[0].colour, things[0].size, place)]
    return Scene(tuple(things), ground)


def heldout_prompts(n: int, seed: int = 1) -> list[str]:
    """`n` different prompts whose combination was left out of training."""
    rng = random.Random(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < n:
        prompts[write_prompt(draw_split(rng, held_out=True), rng)] = None
    return list(prompts)


# --- drawing ---------------------------------------------------------------------------------------------------------


def _outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    if shape == "square":
        r *= 0.88
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)]
    points = []
    for i in range(10):  # a star
        radius = 1.12 * r * (1.0 if i % 2 == 0 else 0.46)
        points.append((x + radius * math.sin(i * math.pi / 5), y - radius * math.cos(i * math.pi / 5)))
    return points


def _paint(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: object, ground: object) -> None:
    if shape in ("circle", "ring"):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)  # type: ignore[arg-type]
        if shape == "ring":
            r *= 0.52
            draw.ellipse((x - r, y - r, x + r, y + r), fill=ground)  # type: ignore[arg-type]
    else:
        draw.polygon(_outline(shape, x, y, r), fill=fill)  # type: ignore[arg-type]


def draw_picture(scene: Scene, rng: random.Random, size: int = SIZE) -> NDArray[np.uint8]:
    """The scene as [size, size, 3] uint8, anti-aliased; centre and size of an object vary a little."""
    up = 4
    scale = up * size / SIZE
    ground = PALETTE[scene.ground]
    image = Image.new("RGB", (size * up, size * up), ground)
    draw = ImageDraw.Draw(image)
    middle = SIZE / 2
    for i, thing in enumerate(scene.things):
        x = middle + rng.uniform(-1, 1)
        y = middle + rng.uniform(-1, 1)
        if len(scene.things) == 2:
            x += PAIR_STEP * (2 * i - 1)
            r = PAIR_RADIUS[thing.size or "medium"]
        else:
            dx, dy = PLACES[thing.place or "centre"]
            x, y = x + PLACE_STEP * dx, y + PLACE_STEP * dy
            r = RADIUS[thing.size or "medium"]
        r *= rng.uniform(0.95, 1.05)
        _paint(draw, thing.shape, x * scale, y * scale, r * scale, COLOURS[thing.colour], ground)
    return np.asarray(image.reduce(up))


# --- the check -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """An object found in a picture; x, y from -1 to 1 across the picture, radius as a share of half its width."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@cache
def _mask(shape: str, width: int, height: int) -> NDArray[np.float64]:
    """How much of each pixel a shape covers that is stretched to a box of width x height pixels."""
    image = Image.new("L", (400, 400), 0)
    _paint(ImageDraw.Draw(image), shape, 200, 200, 150, 255, 0)
    image = image.crop(image.getbbox()).resize((width, height), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float64) / 255


def _nearest_colour(rgb: NDArray[np.float64]) -> str:
    return min(PALETTE, key=lambda name: float(np.sum((rgb - PALETTE[name]) ** 2)))


def _regions(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Connected regions (8 neighbours) of a mask, largest first."""
    left = mask.copy()
    regions = []
    while left.any():
        region = np.zeros_like(mask)
        region.flat[int(np.argmax(left))] = True
        while True:
            padded = np.pad(region, 1)
            rows = padded[:-2] | padded[1:-1] | padded[2:]
            grown = (rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]) & left
            if (grown == region).all():
                break
            region = grown
        regions.append(region)
        left &= ~region
    return sorted(regions, key=lambda r: -int(r.sum()))


def look(image: NDArray[np.uint8]) -> tuple[str, list[Found]]:
    """Background colour and objects, left to right, of a picture [H, W, 3] of any size."""
    pixels = image.astype(np.float64)
    height, width = pixels.shape[:2]
    rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(rim, axis=0)
    distance = np.sqrt(((pixels - ground) ** 2).sum(axis=2))
    found = []
    smallest = 0.006 * height * width  # less is a speck, not an object: the smallest star covers 1.3 %
    for region in _regions(distance > 45):
        if region.sum() < smallest:
            continue
        inside = pixels[region]
        far = distance[region]
        colour = np.median(inside[far >= np.quantile(far, 0.5)], axis=0)
        axis = colour - ground
        cover = np.clip((pixels - ground) @ axis / float(axis @ axis), 0, 1) * region
        solid = cover > 0.5
        if not solid.any():
            continue
        rows, columns = np.flatnonzero(solid.any(axis=1)), np.flatnonzero(solid.any(axis=0))
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        box = cover[top:bottom, left:right]
        overlap = {}
        for shape in SHAPES:
            mask = _mask(shape, right - left, bottom - top)
            overlap[shape] = float(np.minimum(box, mask).sum() / np.maximum(box, mask).sum())
        found.append(
            Found(
                max(overlap, key=lambda s: overlap[s]),
                _nearest_colour(colour),
                (left + right) / width - 1,
                (top + bottom) / height - 1,
                max(right - left, bottom - top) / width,
            )
        )
    return _nearest_colour(ground), sorted(found, key=lambda f: f.x)


def check(prompt: str, image: NDArray[np.uint8]) -> dict[str, bool]:
    """What of `prompt` the picture [H, W, 3] uint8 gets right: `ATTRIBUTES`, then "size" (not counted) and "all"."""
    scene = read_prompt(prompt)
    ground, found = look(image)
    right = {
        "count": len(found) == len(scene.things),
        "background": ground == scene.ground,
    }
    pairs = list(zip(scene.things, found, strict=False)) if right["count"] else []
    right["colour"] = bool(pairs) and all(t.colour == f.colour for t, f in pairs)
    right["shape"] = bool(pairs) and all(t.shape == f.shape for t, f in pairs)
    right["place"] = bool(pairs)
    right["size"] = bool(pairs)
    for i, (thing, seen) in enumerate(pairs):
        if len(pairs) == 2:
            x, y, radius = PAIR_STEP * (2 * i - 1), 0.0, PAIR_RADIUS
        else:
            dx, dy = PLACES[thing.place or "centre"]
            x, y, radius = PLACE_STEP * dx, PLACE_STEP * dy, RADIUS
        half = SIZE / 2
        right["place"] &= bool(max(abs(seen.x * half - x), abs(seen.y * half - y)) < PLACE_STEP / 2)
        nearest = min(SIZES, key=lambda s: abs(radius[s] / half - seen.radius))
        right["size"] &= nearest == (thing.size or "medium")
    right["all"] = all(right[name] for name in ATTRIBUTES)
    return right


def summarise(results: list[dict[str, bool]]) -> dict[str, float]:
    """Share of pictures that are right, for each attribute."""
    return {name: sum(r[name] for r in results) / len(results) for name in results[0]} if results else {}


# --- command line ----------------------------------------------------------------------------------------------------


def _check_folder(folder: Path) -> dict[str, float]:
    prompts = (folder / "prompts.txt").read_text(encoding="utf-8").splitlines()
    pictures = sorted(folder.glob("*.png"))
    if len(prompts) != len(pictures):
        sys.exit(f"error: {folder} holds {len(pictures)} pictures for {len(prompts)} prompts")
    results = []
    for prompt, path in zip(prompts, pictures, strict=True):
        result = check(prompt, np.asarray(Image.open(path).convert("RGB")))
        results.append(result)
        if not result["all"]:
            print(f"{path.name}: {prompt}: wrong {', '.join(n for n in ATTRIBUTES if not result[n])}")
    return {"pictures": len(results), **summarise(results)}


def _selftest(n: int, seed: int, size: int) -> dict[str, float]:
    rng = random.Random(seed)
    results = []
    for _ in range(n):
        scene = draw_scene(rng)
        prompt = write_prompt(scene, rng)
        if read_prompt(prompt) != scene:
            raise AssertionError(f"{prompt!r} reads as {read_prompt(prompt)}, not as {scene}")
        results.append(check(prompt, draw_picture(scene, rng, size)))
        if not results[-1]["all"]:
            print(f"{prompt}: {results[-1]}")
    return {"pictures": n, **summarise(results)}


def evaluate(n: int, seed: int) -> dict[str, int | float]:
    """`n` held-out prompts through the demo model, with the pipeline's defaults. Picture i has the seed `seed + i`."""
    sys.path.append(str(ROOT))
    import models

    files = [
        ROOT / "studio" / "demo" / name for name in ("z_image_demo.gguf", "qwen3_demo.gguf", "ae_demo.safetensors")
    ]
    results = []
    with models.load(*files) as pipe:
        for i, prompt in enumerate(heldout_prompts(n, seed)):
            picture = pipe(prompt, seed=seed + i, height=SIZE, width=SIZE).images[0]
            results.append(check(prompt, np.asarray(picture)))
            if not results[-1]["all"]:
                print(f"{prompt}: wrong {', '.join(a for a in ATTRIBUTES if not results[-1][a])}")
    return {"pictures": n, **summarise(results)}


def main() -> None:
    parser = argparse.ArgumentParser(description="pictures, prompts and the check of the demo checkpoint")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prompts", help="print held-out prompts")
    command.add_argument("-n", type=int, default=200)
    command.add_argument("--seed", type=int, default=1)
    command = commands.add_parser("check", help="check a folder of pictures against its prompts.txt")
    command.add_argument("--pictures", type=Path, required=True)
    command = commands.add_parser("evaluate", help="draw held-out prompts with the demo model and check them")
    command.add_argument("-n", type=int, default=200)
    command.add_argument("--seed", type=int, default=1)
    command.add_argument("--report", type=Path, help="write the result there, too")
    command = commands.add_parser("selftest", help="check drawn pictures")
    command.add_argument("-n", type=int, default=1000)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--size", type=int, default=SIZE)
    command = commands.add_parser("sheet", help="write a contact sheet of drawn pictures")
    command.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.command == "prompts":
        print("\n".join(heldout_prompts(args.n, args.seed)))
    elif args.command == "check":
        print(json.dumps(_check_folder(args.pictures)))
    elif args.command == "evaluate":
        result = evaluate(args.n, args.seed)
        print(json.dumps(result))
        if args.report:
            what = {"runtime": "pyggml", "prompts": f"heldout_prompts({args.n}, {args.seed})"}
            args.report.write_text(json.dumps({**what, **result}, indent=1) + "\n", encoding="utf-8")
    elif args.command == "selftest":
        print(json.dumps(_selftest(args.n, args.seed, args.size)))
    else:
        rng = random.Random(0)
        rows = [np.concatenate([draw_picture(draw_scene(rng), rng) for _ in range(10)], axis=1) for _ in range(6)]
        Image.fromarray(np.concatenate(rows, axis=0)).save(args.out)


if __name__ == "__main__":
    main()
