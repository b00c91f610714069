"""Draw the same pictures with stable-diffusion.cpp and with ours (compat="sd.cpp"), and say how far they are apart.

    PYGGML_PEER_PYTHON=~/peer/bin/python PYGGML_PEER_CKPT=~/peer/ckpt python -m tests.peer.parity

PYGGML_PEER_PYTHON: the interpreter of a virtual environment with stable-diffusion-cpp-python==0.4.7 (pip builds it from
its source distribution). PYGGML_PEER_CKPT: a folder for the random checkpoints, 8.1 GB for Z-Image and 5.3 GB for
Qwen-Image, written when they are missing. Prints a table for each model and one line of JSON; exit status 1 when a
setting is below 40 dB (38 with a LoRA, and for Qwen-Image). --model draws the settings of one, --only NAME ... some,
--update puts the tables into docs/parity.md. Half an hour for a model with one thread; the peer's pictures are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from . import checkpoints, qwen_checkpoints

PEER = "stable-diffusion-cpp-python 0.4.7"
ENOUGH = 40.0  # dB
ENOUGH_WITH_LORA = ENOUGH_QWEN_IMAGE = 38.0
DOCS = Path(__file__).parents[2] / "docs" / "parity.md"
MARKS = {
    "z_image": ("<!-- table of tests/peer/parity.py -->", "<!-- end of table -->"),
    "qwen_image": ("<!-- table of tests/peer/parity.py for Qwen-Image -->", "<!-- end of Qwen-Image's table -->"),
}

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Setting:
    """What to draw; names and values are those of sd-cli. `init`: begin with the test picture; `references`: sizes of
    test pictures to edit, with a vision tower or without.
    """

    name: str
    prompt: str = "a red circle on a blue background"
    negative: str = ""
    weights: str = "q8_0"
    width: int = 64
    height: int = 64
    steps: int = 3
    cfg: float = 1.0
    method: str = "euler"
    scheduler: str | None = None
    sigmas: tuple[float, ...] = ()
    shift: float | None = None
    rng: str = "cuda"
    seed: int = 42
    init: bool = False
    strength: float = 0.75
    loras: tuple[tuple[str, float], ...] = ()  # names of checkpoints.LORAS
    lora_mode: str = "auto"  # ours
    model: str = "z_image"
    references: tuple[tuple[int, int], ...] = ()
    tower: bool = True
    zero_cond_t: bool = False

    @property
    def enough(self) -> float:
        if self.model == "qwen_image":
            return ENOUGH_QWEN_IMAGE
        return ENOUGH_WITH_LORA if self.loras else ENOUGH

    def parts(self) -> dict[str, str]:
        """The role of each file that is needed, and its key."""
        prefix = "" if self.model == "z_image" else f"{self.model}_"
        roles = ["diffusion", "llm", "vae"] + (["vision"] if self.references and self.tower else [])
        return {role: prefix + role + (f"_{self.weights}" if role in ("diffusion", "llm") else "") for role in roles}

    def show(self) -> str:
        """The options that are not the usual ones, in a few words."""
        parts = [f"{self.method}, {self.steps} steps, {self.width}x{self.height}, {self.weights}, --rng {self.rng}"]
        parts += [f"scheduler {self.scheduler}"] if self.scheduler else []
        parts += [f"sigmas {', '.join(map(str, self.sigmas))}"] if self.sigmas else []
        parts += [f"flow shift {self.shift:g}"] if self.shift else []
        parts += [f"cfg {self.cfg:g}"] if self.cfg != 1 else []
        parts += ["negative prompt"] if self.negative else []
        parts += [f"strength {self.strength:g}"] if self.init else []
        parts += [f"-r {' -r '.join(f'{w}x{h}' for w, h in self.references)}"] if self.references else []
        parts += ["zero_cond_t"] if self.zero_cond_t else []
        parts += ["no vision tower"] if self.references and not self.tower else []
        parts += [f"{' '.join(f'<lora:{n}:{w:g}>' for n, w in self.loras)}, {self.lora_mode}"] if self.loras else []
        return ", ".join(parts)


SETTINGS: tuple[Setting, ...] = (
    Setting("plain, q8_0"),
    Setting("plain, f16", weights="f16", steps=2),
    Setting("odd size, wide", width=120, height=72, seed=1),
    Setting("odd size, high, f16", width=72, height=104, weights="f16", steps=2),
    Setting("guidance", cfg=4.5, negative="blurry, low quality", seed=7, steps=2),
    Setting("guidance, f16, cpu", cfg=3.0, weights="f16", rng="cpu", seed=8, steps=2),
    Setting("guidance below 1", cfg=0.5, negative="a green square", seed=9, steps=2),
    Setting("heun", method="heun", seed=2),
    Setting("dpm2", method="dpm2", seed=123456789, rng="cpu"),
    Setting("dpm++2m karras", method="dpm++2m", scheduler="karras", seed=4),
    Setting("dpm++2s_a", method="dpm++2s_a", seed=2**32 + 5, steps=2, rng="cpu"),
    Setting("euler_a", method="euler_a", seed=6),
    Setting("lcm", method="lcm", seed=10, steps=2, rng="cpu"),
    Setting("ipndm sgm_uniform", method="ipndm", scheduler="sgm_uniform", seed=11),
    Setting("res_multistep simple", method="res_multistep", scheduler="simple", seed=12),
    Setting("er_sde", method="er_sde", seed=14),
    Setting("img2img", init=True, strength=0.6, seed=17),
    Setting("img2img, f16, cpu, odd", init=True, weights="f16", rng="cpu", width=88, seed=18),
    Setting("not ASCII, flow shift", prompt="un café noir à côté d'une fenêtre — 红色的圆 🎨 на столе, ünïcödé",
            shift=6.0, scheduler="simple", seed=20, steps=2),
    Setting("not ASCII, f16, cpu", prompt="赤い円と青い背景、水彩画 🦊", weights="f16", rng="cpu", seed=21, steps=2),
    Setting("weights", prompt="a (red:1.6) circle, [[blue]] background, ((watercolour))", seed=22, steps=2),
    Setting("weights, odd ones", prompt=r"a \(real\) [photo:0.4) of (a cat BREAK with (hats:-0.5)", seed=23, steps=2),
    Setting("punctuation, sigmas", prompt="It's 1234 o'clock:  \"HELLO\"\n\n\tworld...  (almost",
            sigmas=(1.0, 0.6, 0.0), seed=24, steps=2),
    Setting("LoRA", loras=(("of-all", 0.8),), seed=25, steps=2),
    Setting("LoRA, f16, beside", loras=(("of-all", 0.8),), lora_mode="at_runtime", weights="f16", seed=26, steps=2),
    Setting("LoRA, f16, merged", loras=(("of-all", -0.6),), lora_mode="immediately", weights="f16", seed=27,
            steps=2),
    Setting("two LoRAs, alpha", loras=(("of-qkv", 1.2), ("of-all", 0.3)), seed=28, steps=2),
    Setting("LoRA of the text", loras=(("of-text", 1.5),), seed=29, steps=2),
)  # fmt: skip
QWEN_IMAGE_SETTINGS: tuple[Setting, ...] = tuple(
    Setting(name, model="qwen_image", **{"steps": 2, **options}) for name, options in {
        "plain, q8_0": {},
        "plain, f16": {"weights": "f16"},
        "odd grid": {"width": 120, "height": 72, "seed": 1},
        "odd grid, f16, cpu": {"width": 72, "height": 88, "weights": "f16", "rng": "cpu", "seed": 2},
        "guidance": {"cfg": 2.5, "negative": "blurry, low quality", "seed": 3},
        "guidance, f16": {"cfg": 4.0, "negative": "blurry, low quality", "weights": "f16", "seed": 4},
        "dpm++2m karras": {"method": "dpm++2m", "scheduler": "karras", "steps": 3, "seed": 5},
        "euler_a simple, flow shift": {"method": "euler_a", "scheduler": "simple", "shift": 5.0, "seed": 6},
        "img2img": {"init": True, "strength": 0.6, "steps": 3, "seed": 7},
        "weights": {"prompt": "a (red:1.6) circle, [[blue]] background, ((watercolour)) (hats:-0.5)", "seed": 8},
        "long, not ASCII": {
            "prompt": 20 * "un café noir à côté d'une fenêtre — 红色的圆 🎨 на столе, ünïcödé; ", "seed": 9,
        },
        "edit": {"width": 96, "references": ((130, 70),), "seed": 10},
        "edit, two": {"references": ((130, 70), (60, 100)), "seed": 13},
        "edit, zero_cond_t": {"references": ((64, 96),), "zero_cond_t": True, "height": 72, "seed": 14},
        "edit, f16": {"references": ((64, 64),), "weights": "f16", "seed": 11},
        "edit, guidance": {"references": ((64, 64),), "cfg": 2.5, "negative": "blurry", "seed": 12},
        "edit, no tower": {"references": ((130, 70),), "tower": False, "seed": 16},
    }.items()
)  # fmt: skip


# -- pictures --------------------------------------------------------------------------------------------------------


def psnr(a: Pixels, b: Pixels) -> float:
    """Peak signal-to-noise ratio of two pictures of bytes, dB."""
    mse = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 99.0 if mse == 0 else min(10 * float(np.log10(255**2 / mse)), 99.0)


def start_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Something to begin with: gradients, a disc, some noise. The seed decides the colours, too."""
    y, x = np.mgrid[0:height, 0:width]
    disc = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(width, height) / 3) ** 2
    channels = np.stack([255 * x / width, 255 * y / height, np.where(disc, 220, 40)], axis=-1)
    noisy = np.roll(channels, seed, -1) + np.random.default_rng(seed).normal(0, 10, channels.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def reference_pictures(s: Setting) -> list[Image.Image]:
    return [start_picture(width, height, 1 + i) for i, (width, height) in enumerate(s.references)]


def read(path: Path) -> Pixels:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), np.uint8)


def checkpoint_files(folder: Path, settings: Sequence[Setting]) -> dict[str, Path]:
    """The random checkpoints that these settings need, by their keys."""
    wanted = {key for s in settings for key in s.parts().values()}
    files = {**checkpoints.FILES, **qwen_checkpoints.FILES}
    makers = {**checkpoints.MAKERS, **qwen_checkpoints.MAKERS}
    return checkpoints.make(folder, sorted(wanted), files=files, makers=makers)


# -- the peer --------------------------------------------------------------------------------------------------------


def draw_theirs(
    python: str, files: Mapping[str, Path], settings: Sequence[Setting], folder: Path, n_threads: int
) -> dict[Setting, Path]:
    """Pictures by stable-diffusion.cpp, kept in `folder` from one call to the next."""
    pictures: dict[Setting, Path] = {}
    groups: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    loras = checkpoints.make_loras(folder / "loras") if any(s.loras for s in settings) else {}
    for s in settings:
        run = _their_arguments(s, folder)
        paths = {role: files[key] for role, key in s.parts().items()}
        times = [path.stat().st_mtime_ns for path in (*paths.values(), *(loras[name] for name, _ in s.loras))]
        key = json.dumps([run, s.weights, s.rng, times] + ["zero_cond_t"] * s.zero_cond_t, sort_keys=True)
        path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.png"
        pictures[s] = path
        if not path.exists():
            model = {
                "diffusion_model_path": str(paths["diffusion"]), "llm_path": str(paths["llm"]),
                "vae_path": str(paths["vae"]), "rng_type": s.rng, "sampler_rng_type": s.rng, "n_threads": n_threads,
                "verbose": True, "image_resize_method": "resize", "lora_model_dir": str(folder / "loras"),
                "lora_apply_mode": "at_runtime",  # runs in which it merged ended in an assertion of its ggml
                "llm_vision_path": str(paths.get("vision", "")), "qwen_image_zero_cond_t": s.zero_cond_t,
            }  # fmt: skip
            _, runs = groups.setdefault(json.dumps(model), (model, []))
            runs.append({**run, "output": str(path)})
    for model, runs in groups.values():
        script = Path(__file__).with_name("draw.py")
        with open(folder / "peer.log", "a", encoding="utf-8") as log:
            command = [python, str(script), json.dumps({"model": model, "runs": runs})]
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            raise RuntimeError(f"the peer failed with status {done.returncode}; see {folder / 'peer.log'}")
    return pictures


def _their_arguments(s: Setting, folder: Path) -> dict[str, Any]:
    tags = "".join(f"<lora:{name}:{weight}>" for name, weight in s.loras)
    run: dict[str, Any] = {
        "prompt": s.prompt + tags, "negative_prompt": s.negative, "width": s.width, "height": s.height,
        "cfg_scale": s.cfg, "sample_method": s.method, "sample_steps": s.steps, "seed": s.seed, "eta": float("inf"),
        "scheduler": s.scheduler or "default",
    }  # fmt: skip
    if s.sigmas:
        run["sigmas"] = ",".join(map(str, s.sigmas))
    if s.shift:
        run["flow_shift"] = s.shift
    if s.init:
        path = folder / f"init-{s.width}x{s.height}.png"
        start_picture(s.width, s.height).save(path)
        run |= {"init_image": str(path), "strength": s.strength}
    if s.references:
        paths = [folder / f"reference-{i}-{w}x{h}.png" for i, (w, h) in enumerate(s.references)]
        for path, picture in zip(paths, reference_pictures(s), strict=True):
            picture.save(path)
        # increase_ref_index: pictures are numbered, as they were in training
        run |= {"ref_images": [str(path) for path in paths], "increase_ref_index": True}
    return run


# -- ours ------------------------------------------------------------------------------------------------------------


def draw_ours(files: Mapping[str, Path], drawings: Sequence[tuple[Setting, Path]], n_threads: int) -> None:
    """Pictures of settings by this package, each written as soon as it is there."""
    import models
    from pyggml import Backend

    backend = Backend.cpu(n_threads)
    groups: dict[str, tuple[dict[str, Any], list[tuple[Setting, Path]]]] = {}
    for s, path in drawings:
        paths = {role: files[key] for role, key in s.parts().items()}
        options: dict[str, Any] = {"lora_apply_mode": s.lora_mode}
        if s.model == "qwen_image":
            options |= {"llm_vision": paths.get("vision"), "variant": "2511" if s.zero_cond_t else "2509"}
        options |= {"diffusion_model": paths["diffusion"], "llm": paths["llm"], "vae": paths["vae"]}
        groups.setdefault(repr(options), (options, []))[1].append((s, path))
    for options, group in groups.values():
        with models.load(**options, backend=backend, compat="sd.cpp", encoder=True) as pipe:
            for s, path in group:
                loras = checkpoints.make_loras(path.parent / "loras") if s.loras else {}
                pipe.set_loras([(loras[name], weight) for name, weight in s.loras])
                result = pipe(
                    s.prompt, negative_prompt=s.negative, width=s.width, height=s.height, num_inference_steps=s.steps,
                    cfg_scale=s.cfg, sigmas=s.sigmas or None, scheduler=s.scheduler, shift=s.shift,
                    method=s.method, seed=s.seed, rng=s.rng,
                    init_image=start_picture(s.width, s.height) if s.init else None,
                    strength=s.strength if s.init else None, reference_images=reference_pictures(s), output_type="np",
                )  # fmt: skip
                Image.fromarray(result.images[0]).save(path)
                print(f"ours: {s.name}, {sum(result.report.seconds.values()):.1f} s", file=sys.stderr)


# -- comparing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One comparison. `std`: of the peer's bytes; `clipped`: the share of them that are 0 or 255."""

    setting: Setting
    psnr: float
    std: float
    clipped: float
    theirs: Pixels


def compare_all(
    python: str, files: Mapping[str, Path], settings: Sequence[Setting], folder: Path, n_threads: int, *,
    reuse: bool = False,
) -> list[Row]:  # fmt: skip
    """Draw everything twice; the pictures stay in `folder`. reuse: also take those of ours that are there."""
    folder.mkdir(exist_ok=True)
    theirs = draw_theirs(python, files, settings, folder, n_threads)
    ours = {s: path.with_suffix(".ours.png") for s, path in theirs.items()}
    missing = [(s, ours[s]) for s in settings if not (reuse and ours[s].exists())]
    draw_ours(files, missing, n_threads)
    rows = []
    for s in settings:
        a, b = read(ours[s]), read(theirs[s])
        if a.shape != b.shape:
            raise ValueError(f"{s.name}: ours has shape {a.shape}, theirs {b.shape}")
        rows.append(Row(s, psnr(a, b), float(b.std()), float(np.isin(b, (0, 255)).mean()), b))
    return rows


def most_alike(rows: Sequence[Row]) -> tuple[float, str]:
    """The largest PSNR between pictures of different settings: how alike two pictures are that should differ."""
    pairs = [
        (psnr(a.theirs, b.theirs), f"{a.setting.name} / {b.setting.name}")
        for a, b in combinations(rows, 2) if a.theirs.shape == b.theirs.shape
    ]  # fmt: skip
    return max(pairs, default=(0.0, "none"))


def table(rows: Sequence[Row]) -> str:
    lines = ["| setting | options | PSNR, dB | std | clipped |", "|---|---|---|---|---|"]
    lines += [
        f"| {r.setting.name} | {r.setting.show()} | {r.psnr:.1f} | {r.std:.0f} | {100 * r.clipped:.0f} % |"
        for r in rows
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.peer.parity", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--python", default=os.environ.get("PYGGML_PEER_PYTHON"))
    parser.add_argument("--checkpoints", type=Path, default=os.environ.get("PYGGML_PEER_CKPT"))
    parser.add_argument("--model", choices=tuple(MARKS), help="draw the settings of this one alone")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="names of settings")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reuse", action="store_true", help="do not draw again what an interrupted call has drawn")
    parser.add_argument("--update", action="store_true", help="put the table into docs/parity.md")
    args = parser.parse_args(argv)
    if not args.python or not args.checkpoints:
        parser.error("say where the peer is: PYGGML_PEER_PYTHON and PYGGML_PEER_CKPT, or --python and --checkpoints")
    settings = [s for s in (*SETTINGS, *QWEN_IMAGE_SETTINGS) if args.model in (None, s.model)]
    settings = [s for s in settings if not args.only or s.name in args.only]

    start = time.perf_counter()
    files = checkpoint_files(args.checkpoints, settings)
    folder = args.checkpoints / "pictures"
    rows = compare_all(args.python, files, settings, folder, args.threads, reuse=args.reuse)
    alike = 0.0
    for model, (begin, end) in MARKS.items():
        found = [r for r in rows if r.setting.model == model]
        if not found:
            continue
        text, (value, pair) = table(found), most_alike(found)
        alike = max(alike, value)
        control = f"Pictures of two different settings: {value:.1f} dB at most ({pair})."
        print(text, control, sep="\n\n")
        if args.update:
            page = DOCS.read_text(encoding="utf-8")
            before, after = page.split(begin)[0], page.split(end)[1]
            lowest = min(r.psnr for r in found)
            measured = f"{date.today()}, {PEER}, {len(found)} settings, lowest {lowest:.1f} dB."
            DOCS.write_text(f"{before}{begin}\n{measured} {control}\n\n{text}\n{end}{after}", encoding="utf-8")
    print(json.dumps({
        "benchmark": "parity", "peer": PEER, "settings": len(rows), "min_psnr": round(min(r.psnr for r in rows), 2),
        "below": [r.setting.name for r in rows if r.psnr < r.setting.enough], "most_alike": round(alike, 2),
        "psnr": {f"{r.setting.model}: {r.setting.name}": round(r.psnr, 2) for r in rows},
        "std": {f"{r.setting.model}: {r.setting.name}": round(r.std, 1) for r in rows},
        "seconds": round(time.perf_counter() - start, 1),
    }))  # fmt: skip
    return int(any(r.psnr < r.setting.enough for r in rows))


if __name__ == "__main__":
    sys.exit(main())
