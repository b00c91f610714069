"""Draw the same pictures with stable-diffusion.cpp and with ours (compat="sd.cpp"), and say how far they are apart.

    PYGGML_PEER_PYTHON=~/peer/bin/python PYGGML_PEER_CKPT=~/peer/ckpt python -m tests.peer.parity

PYGGML_PEER_PYTHON: the interpreter of a virtual environment with stable-diffusion-cpp-python==0.4.7 (pip builds it from
its source distribution). PYGGML_PEER_CKPT: a folder for the random checkpoints, 8.1 GB, written when they are missing.
Prints a table and one line of JSON; exit status 1 when a setting is below 40 dB (38 with a LoRA). --only NAME ... draws
some of the settings, --update puts the table into docs/parity.md. Half an hour with one thread; the peer's pictures are
kept.
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

from . import checkpoints

PEER = "stable-diffusion-cpp-python 0.4.7"
ENOUGH = 40.0  # dB
ENOUGH_WITH_LORA = 38.0
DOCS = Path(__file__).parents[2] / "docs" / "parity.md"
MARKS = ("<!-- table of tests/peer/parity.py -->", "<!-- end of table -->")

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Setting:
    """What to draw; names and values are those of sd-cli. `init`: begin with the test picture."""

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

    @property
    def enough(self) -> float:
        return ENOUGH_WITH_LORA if self.loras else ENOUGH

    def show(self) -> str:
        """The options that are not the usual ones, in a few words."""
        parts = [f"{self.method}, {self.steps} steps, {self.width}x{self.height}, {self.weights}, --rng {self.rng}"]
        parts += [f"scheduler {self.scheduler}"] if self.scheduler else []
        parts += [f"sigmas {', '.join(map(str, self.sigmas))}"] if self.sigmas else []
        parts += [f"flow shift {self.shift:g}"] if self.shift else []
        parts += [f"cfg {self.cfg:g}"] if self.cfg != 1 else []
        parts += ["negative prompt"] if self.negative else []
        parts += [f"strength {self.strength:g}"] if self.init else []
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


# -- pictures --------------------------------------------------------------------------------------------------------


def psnr(a: Pixels, b: Pixels) -> float:
    """Peak signal-to-noise ratio of two pictures of bytes, dB."""
    mse = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 99.0 if mse == 0 else min(10 * float(np.log10(255**2 / mse)), 99.0)


def start_picture(width: int, height: int) -> Image.Image:
    """Something to begin with: gradients, a disc, some noise."""
    y, x = np.mgrid[0:height, 0:width]
    disc = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(width, height) / 3) ** 2
    channels = np.stack([255 * x / width, 255 * y / height, np.where(disc, 220, 40)], axis=-1)
    noisy = channels + np.random.default_rng(0).normal(0, 10, channels.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def read(path: Path) -> Pixels:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), np.uint8)


# -- the peer --------------------------------------------------------------------------------------------------------


def draw_theirs(
    python: str, files: Mapping[str, Path], settings: Sequence[Setting], folder: Path, n_threads: int
) -> dict[str, Path]:
    """Pictures by stable-diffusion.cpp, kept in `folder` from one call to the next."""
    pictures: dict[str, Path] = {}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    loras = checkpoints.make_loras(folder / "loras")
    for s in settings:
        run = _their_arguments(s, folder)
        used = [files[f"diffusion_{s.weights}"], files[f"llm_{s.weights}"], files["vae"]]
        used += [loras[name] for name, _ in s.loras]
        times = [path.stat().st_mtime_ns for path in used]
        key = json.dumps([run, s.weights, s.rng, times], sort_keys=True)
        path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.png"
        pictures[s.name] = path
        if not path.exists():
            groups.setdefault((s.weights, s.rng), []).append({**run, "output": str(path)})
    for (weights, rng), runs in groups.items():
        model = {
            "diffusion_model_path": str(files[f"diffusion_{weights}"]), "llm_path": str(files[f"llm_{weights}"]),
            "vae_path": str(files["vae"]), "rng_type": rng, "sampler_rng_type": rng, "n_threads": n_threads,
            "verbose": True, "image_resize_method": "resize", "lora_model_dir": str(folder / "loras"),
            "lora_apply_mode": "at_runtime",  # runs in which it merged ended in an assertion of its ggml
        }  # fmt: skip
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
    return run


# -- ours ------------------------------------------------------------------------------------------------------------


def draw_ours(files: Mapping[str, Path], drawings: Sequence[tuple[Setting, Path]], n_threads: int) -> None:
    """Pictures of settings by this package, each written as soon as it is there."""
    import models
    from pyggml import Backend

    backend = Backend.cpu(n_threads)
    for weights, mode in sorted({(s.weights, s.lora_mode) for s, _ in drawings}):
        paths = files[f"diffusion_{weights}"], files[f"llm_{weights}"], files["vae"]
        with models.load(*paths, backend=backend, compat="sd.cpp", encoder=True, lora_apply_mode=mode) as pipe:
            for s, path in drawings:
                if (s.weights, s.lora_mode) != (weights, mode):
                    continue
                loras = checkpoints.make_loras(path.parent / "loras")
                pipe.set_loras([(loras[name], weight) for name, weight in s.loras])
                result = pipe(
                    s.prompt, negative_prompt=s.negative, width=s.width, height=s.height, num_inference_steps=s.steps,
                    guidance_scale=s.cfg - 1, sigmas=s.sigmas or None, scheduler=s.scheduler, shift=s.shift,
                    method=s.method, seed=s.seed, rng=s.rng,
                    init_image=start_picture(s.width, s.height) if s.init else None,
                    strength=s.strength if s.init else None, output_type="np",
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
    ours = {name: path.with_suffix(".ours.png") for name, path in theirs.items()}
    missing = [(s, ours[s.name]) for s in settings if not (reuse and ours[s.name].exists())]
    draw_ours(files, missing, n_threads)
    rows = []
    for s in settings:
        a, b = read(ours[s.name]), read(theirs[s.name])
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
    parser.add_argument("--only", nargs="*", metavar="NAME", help="names of settings")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reuse", action="store_true", help="do not draw again what an interrupted call has drawn")
    parser.add_argument("--update", action="store_true", help="put the table into docs/parity.md")
    args = parser.parse_args(argv)
    if not args.python or not args.checkpoints:
        parser.error("say where the peer is: PYGGML_PEER_PYTHON and PYGGML_PEER_CKPT, or --python and --checkpoints")
    settings = [s for s in SETTINGS if not args.only or s.name in args.only]

    start = time.perf_counter()
    wanted = {"vae"} | {f"{part}_{s.weights}" for s in settings for part in ("diffusion", "llm")}
    files = checkpoints.make(args.checkpoints, sorted(wanted))
    rows = compare_all(args.python, files, settings, args.checkpoints / "pictures", args.threads, reuse=args.reuse)
    alike = most_alike(rows)

    text = table(rows)
    control = f"Pictures of two different settings: {alike[0]:.1f} dB at most ({alike[1]})."
    print(text, control, sep="\n\n")
    if args.update:
        page = DOCS.read_text(encoding="utf-8")
        before, after = page.split(MARKS[0])[0], page.split(MARKS[1])[1]
        measured = f"{date.today()}, {PEER}, {len(rows)} settings, lowest {min(r.psnr for r in rows):.1f} dB."
        DOCS.write_text(f"{before}{MARKS[0]}\n{measured} {control}\n\n{text}\n{MARKS[1]}{after}", encoding="utf-8")
    print(json.dumps({
        "benchmark": "parity", "peer": PEER, "settings": len(rows), "min_psnr": round(min(r.psnr for r in rows), 2),
        "below": [r.setting.name for r in rows if r.psnr < r.setting.enough], "most_alike": round(alike[0], 2),
        "psnr": {r.setting.name: round(r.psnr, 2) for r in rows},
        "std": {r.setting.name: round(r.std, 1) for r in rows}, "seconds": round(time.perf_counter() - start, 1),
    }))  # fmt: skip
    return int(any(r.psnr < r.setting.enough for r in rows))


if __name__ == "__main__":
    sys.exit(main())
