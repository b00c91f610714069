"""The command line: options, exit codes, files, interruption. It draws with the demo model, small and few steps."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import select
import signal
import statistics
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import models
from loader import LoadOptions
from studio import cli
from studio.generate import DEMO, DEMO_FILES

ROOT = Path(__file__).parents[1]
MODEL = [str(DEMO / name) for name in DEMO_FILES]
SMALL = ["-W", "64", "-H", "64", "--steps", "1", "-t", "1"]
START = [sys.executable, "-c", "import sys; from studio.cli import main; sys.exit(main())"]  # what the script does
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
PROMPT = "a red circle on a blue background"


def run(*argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command, in this process."""
    try:
        code = cli.main(argv)
    except SystemExit as end:  # argparse's
        code = int(end.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


def start(*argv: str | bytes, **options: Any) -> subprocess.Popen[bytes]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([*START, *argv], env=ENVIRONMENT, **pipes)


def finish(*argv: str | bytes) -> tuple[int, str, str]:
    """The same in a process of its own, its output in pipes."""
    process = start(*argv)
    out, err = process.communicate(timeout=240)
    return process.returncode, out.decode(), err.decode()


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image)


def text_of(path: Path) -> str:
    with Image.open(path) as image:
        return str(image.info["parameters"])  # type: ignore[index]


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- drawing ----------------------------------------------------------------------------------------------------------


def test_a_picture_with_its_parameters(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "ein roter Kreis, 赤い円 🔴\nzweite Zeile"
    code, out, err = run("generate", prompt, "-n", "blau", "--cfg-scale", "1.5", "-s", "7", *SMALL, capsys=capsys)
    assert (code, out, err) == (0, "output.png\n", "")
    assert pixels(in_folder / "output.png").shape == (64, 64, 3)
    *first, last = text_of(in_folder / "output.png").split("\n")
    assert first == [*prompt.split("\n"), "Negative prompt: blau"]
    # how AUTOMATIC1111's tools take the last line apart
    found = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    assert found == {
        "Steps": "1", "CFG scale": "1.5", "Seed": "7", "Size": "64x64", "Model": "z_image_demo", "RNG": "cpu",
        "Sampler": "euler", "TE": MODEL[1].rsplit("/", 1)[-1], "Unet": "z_image_demo.gguf",
        "VAE": "ae_demo.safetensors", "Version": "pyggml 0.1.0",
    }  # fmt: skip
    assert os.listdir(in_folder) == ["output.png"]
    mask = os.umask(0)
    os.umask(mask)
    assert (in_folder / "output.png").stat().st_mode & 0o777 == 0o666 & ~mask


def test_the_first_command_of_the_readme(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without any option but the prompt: the demo model, at its own size, draws what is asked."""
    assert run("generate", PROMPT, capsys=capsys) == (0, "output.png\n", "")
    drawn = pixels(in_folder / "output.png").astype(int)
    assert drawn.shape == (64, 64, 3)
    red = (drawn[..., 0] > 150) & (drawn[..., 2] < 120)
    blue = (drawn[..., 2] > 120) & (drawn[..., 0] < 120)
    assert 0.02 < red.mean() < 0.6 and blue.mean() > 0.3
    assert blue[0, 0] and blue[0, -1] and blue[-1, 0] and blue[-1, -1]
    assert "Steps: 8," in text_of(in_folder / "output.png")


def test_every_option_in_sd_clis_spelling_reaches_the_pipeline(
    in_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: dict[str, Any] = {}

    class Pipe:
        default_steps = 8
        default_cfg_scale = 1.0
        edits = False
        has_lightning = True
        check_asked = staticmethod(lambda **asked: called.update(asked=asked))

        def components(self) -> tuple[Any, ...]:
            return ()

        def __call__(self, prompt: str, **options: Any) -> Any:
            called.update(options, prompt=prompt)
            raise ValueError("enough")

        def __enter__(self) -> Pipe:
            return self

        def __exit__(self, *_: object) -> None:
            called["closed"] = True

    def load(*files: str, **options: Any) -> Pipe:
        called.update(options, files=files)
        return Pipe()

    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(models, "pipeline_for", lambda file: Pipe)
    monkeypatch.setattr(models, "is_layered", lambda file: False)
    Image.new("RGB", (64, 64), "red").save("start.png")
    code, _, err = run(
        "generate", "-p", "p", "--negative-prompt", "n", "--diffusion-model", "d", "--llm", "l", "--vae", "v",
        "--width", "60", "--height", "128", "--cfg-scale", "3", "--seed", "5", "--sampling-method", "euler_a",
        "--sigmas", "1,0.5,0", "--flow-shift", "4", "--rng", "cuda", "--init-img", "start.png", "--strength", "0.9",
        "--batch-count", "2", "--threads", "2", "--no-mmap", "--compat", "sd.cpp", "--eta", "0.5",
        "--backend", "*=cpu", "--vae-on-cpu", "--lora-apply-mode", "at_runtime", "--max-ram", "6G",
        "--params-backend", "clip=disk", "--mask", "start.png", "--max-vram", "4G", "--lightning", "off",
        "--taesd", "t", "--taesd-preview-only", "--preview", "tae", "--preview-path", "p.png",
        "--preview-interval", "3", capsys=capsys,
    )  # fmt: skip
    assert err == "warning: width 60 is no multiple of 8, 64 is used\nerror: enough\n" and code == 2
    assert called.pop("progress") and called.pop("on_image") and called.pop("on_preview")
    assert called == {
        "files": ("d", "l", "v"), "backend": "te=cpu,diffusion=cpu,vae=cpu",
        "params_backend": "te=disk,diffusion=auto,vae=auto",
        "n_threads": 2, "options": LoadOptions(mode="off"), "compat": "sd.cpp",
        "encoder": True, "prompt": "p", "negative_prompt": "n", "width": 64, "height": 128, "num_inference_steps": None,
        "cfg_scale": 3.0, "reference_images": [], "layers": None, "mask_image": "start.png",
        "sigmas": [1.0, 0.5, 0.0], "scheduler": None, "shift": 4.0, "method": "euler_a",
        "eta": 0.5, "seed": 5, "num_images_per_prompt": 2, "rng": "cuda", "init_image": "start.png", "strength": 0.9,
        "output_type": "np", "closed": True, "lora_apply_mode": "at_runtime", "memory_limit": 6 << 30,
        "max_vram": 4 << 30, "lightning": 0, "tae": "t", "tae_preview_only": True, "preview": "tae",
        "preview_interval": 3, "asked": {
            "n_pictures": 0, "layers": None, "starts": True, "layered": False, "variant": None, "compat": "sd.cpp"
        },
    }  # fmt: skip
    run("generate", "p", "-t", "-1", "--steps", "3", "--scheduler", "karras", "--sigmas", "", capsys=capsys)
    assert called["n_threads"] is None and called["scheduler"] == "karras" and called["num_inference_steps"] == 3
    assert called["options"] == LoadOptions() and called["files"] == tuple(MODEL) and called["cfg_scale"] is None


def test_a_batch_has_seeds_in_a_row_and_numbered_files(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("generate", PROMPT, "-b", "2", "-s", "3", "-o", "p_%03d.png", *SMALL, capsys=capsys)
    assert (code, out) == (0, "p_000.png\np_001.png\n")
    assert "Seed: 3," in text_of(in_folder / "p_000.png") and "Seed: 4," in text_of(in_folder / "p_001.png")
    run("generate", PROMPT, "-s", "4", "-o", "alone.png", *SMALL, capsys=capsys)
    np.testing.assert_array_equal(pixels(in_folder / "alone.png"), pixels(in_folder / "p_001.png"))
    assert (pixels(in_folder / "alone.png") != pixels(in_folder / "p_000.png")).any()
    run("generate", PROMPT, "-b", "2", "-o", "q.png", "-s", "-1", *SMALL, capsys=capsys)
    assert {"q_0.png", "q_1.png"} <= set(os.listdir())
    assert not [name for name in os.listdir() if name.startswith(".")]


def test_mapped_or_read_the_picture_is_the_same(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("mmap", "no-mmap"):
        extra = [f"--{name}", "-o", f"{name}.png", "--report", f"{name}.json", "--disable-image-metadata"]
        assert run("generate", "-p", PROMPT, *extra, *SMALL, capsys=capsys)[0] == 0
    assert Path("mmap.png").read_bytes() == Path("no-mmap.png").read_bytes()
    mapped, read = (json.loads(Path(f"{name}.json").read_text())["components"] for name in ("mmap", "no-mmap"))
    assert sum(c["mapped_bytes"] for c in mapped.values()) > 8e6
    assert sum(c["mapped_bytes"] for c in read.values()) == 0
    assert sum(c["read_bytes"] for c in read.values()) > 8e6


def test_img2img_keeps_more_of_the_picture_with_less_strength(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (80, 100), "#ff0000").save("red.png")
    red = np.array([255, 0, 0])
    far = []
    for strength in ("0.2", "1"):
        more = ["-i", "red.png", "--strength", strength, "--steps", "5", "-o", "x.png"]
        assert run("generate", "a white square on green", *SMALL, *more, capsys=capsys)[0] == 0
        assert f"Denoising strength: {float(strength)}" in text_of(in_folder / "x.png")
        far.append(np.abs(pixels(in_folder / "x.png") - red).mean())
    assert far[0] < far[1]


def test_the_report(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", PROMPT, "--report", "r.json", *SMALL, "--steps", "2", capsys=capsys)[0] == 0
    report = json.loads(Path("r.json").read_text())
    seconds = report["seconds"]
    assert list(seconds) == ["load", "text_encoder", "denoise", "decode", "total"]
    assert 0 < sum(seconds.values()) - seconds["total"] <= seconds["total"] * 1.001
    assert len(report["step_seconds"]) == 2 and sum(report["step_seconds"]) <= seconds["denoise"] + 0.01
    stages = report["stages"]
    assert {name: stage["runs"] for name, stage in stages.items()} == {
        "the text encoder": 1, "the caption's refiner": 1, "the transformer": 2, "the decoder": 1
    }  # fmt: skip
    assert 0 < sum(stage["seconds"] for stage in stages.values()) < seconds["total"]
    assert stages["the transformer"]["seconds"] <= sum(report["step_seconds"]) + 0.01
    assert all(stage["major_faults"] >= 0 for stage in stages.values())
    assert set(report["components"]) == {"qwen3", "z_image", "vae"}
    for component in report["components"].values():
        assert component["n_mapped"] + component["n_copied"] == component["n_tensors"] > 30
        assert component["mapped_bytes"] > 0 and component["allocated_bytes"] >= component["read_bytes"] >= 0
    memory = report["memory"]
    if sys.platform == "linux":
        assert memory["peak_rss"] >= memory["rss"] > max(memory["anonymous"], memory["file_backed"]) > 1e6
        assert report["anonymous_peak"] >= memory["anonymous"]
    assert (report["images"], report["seeds"]) == (["output.png"], [42])
    # what the files hold is what was mapped, up to headers and what had to be converted
    mapped = sum(c["mapped_bytes"] for c in report["components"].values())
    assert mapped < sum(os.path.getsize(path) for path in MODEL)


@pytest.mark.parametrize("prompt", ["", " ", "'; \\ \" $(x)", "x" * 100_000, "a red\tcircle\n"])
def test_odd_prompts_draw(prompt: str, in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", prompt, *SMALL, capsys=capsys) == (0, "output.png\n", "")
    assert text_of(in_folder / "output.png").startswith(prompt + "\nSteps: 1")


def test_log_lines_are_those_that_people_grep(in_folder: Path) -> None:
    code, out, err = finish("generate", PROMPT, "-v", *SMALL)
    assert (code, out) == (0, "output.png\n")
    lines = err.splitlines()
    assert all(re.match(r"\[(INFO |DEBUG|WARN )\] \w+\.py:\d+ +- ", line) for line in lines)
    shown = [re.sub(r"^.*? - ", "", line) for line in lines]
    size = r"\d+\.\d\d MB"
    mapped = re.compile(rf"memory-mapped \d+ tensors in \d+ files \({size}\), taking \d+\.\d\ds")
    assert sum(bool(mapped.fullmatch(s)) for s in shown) == 3
    for name in ("qwen3", "z_image", "vae"):
        buffer = re.compile(rf"{name} params backend buffer size = +{size}\(RAM\) \(\d+ tensors\)")
        assert any(buffer.fullmatch(s) for s in shown)


# -- refusals ---------------------------------------------------------------------------------------------------------

BAD_OPTIONS = {
    "no prompt": ([], "what to draw? Give a prompt, such as: pyggml generate 'a red circle"),
    "two prompts": (["a", "-p", "b"], "given twice"),
    "three prompts": (["a", "b"], "unrecognized arguments: b"),
    "prompt of bytes": (["\udcff"], "the prompt is no valid UTF-8 text"),
    "negative prompt of bytes": (["x", "-n", "\udcff", "--cfg-scale", "2"], "the negative prompt is no valid UTF-8"),
    "unknown option": (["x", "--stpes", "3"], "--stpes"),
    "abbreviation": (["x", "--step", "3"], "--step"),
    "no number": (["x", "-W", "wide"], "invalid int value: 'wide'"),
    "one file of three": (["x", "--vae", "v"], "--diffusion-model and --llm missing"),
    "steps": (["x", "--steps", "0"], "--steps must be in 1..1000, not 0"),
    "cfg": (["x", "--cfg-scale", "0.5"], "--cfg-scale must be in 1..1000"),
    "cfg nan": (["x", "--cfg-scale", "nan"], "--cfg-scale must be in 1..1000"),
    "count": (["x", "-b", "0"], "--batch-count must be in 1..1000, not 0"),
    "threads": (["x", "-t", "513"], "--threads must be at most 512, not 513"),
    "seed": (["x", "-s", str(2**63)], "--seed must be below 2^63"),
    "width": (["x", "-W", "8"], "width must be a multiple of 8 in 16..4096, not 8"),
    "height": (["x", "-H", "-64"], "height must be a multiple of 8 in 16..4096, not -64"),
    "huge": (["x", "-W", "100000"], "width must be a multiple of 8 in 16..4096, not 100000"),
    "strength alone": (["x", "--strength", "0.5"], "--strength needs --init-img"),
    "strength 0": (["x", "-i", "PICTURE", "--strength", "0"], "strength must be above 0 and at most 1"),
    "strength nan": (["x", "-i", "PICTURE", "--strength", "nan"], "strength must be above 0 and at most 1"),
    "shift": (["x", "--flow-shift", "inf"], "--flow-shift must be above 0 and below 1000"),
    "sampler": (["x", "--sampling-method", "plms"], "choose from euler"),
    "scheduler": (["x", "--scheduler", "turbo"], "choose from diffusers"),
    "sigmas text": (["x", "--sigmas", "1,x"], "--sigmas wants numbers with commas between them"),
    "sigmas rising": (["x", "--sigmas", "0.5,0.7,0"], "sigmas must fall strictly"),
    "sigmas open": (["x", "--sigmas", "1,0.5"], "end in 0"),
    "rng": (["x", "--rng", "mt"], "invalid choice: 'mt'"),
    "suffix": (["x", "-o", "x.jpg"], "--output must end in .png"),
    "folder missing": (["x", "-o", "missing/x.png"], "missing/x.png cannot be written: No such file or directory"),
    "folder in the way": (["x", "-o", "folder.png"], "folder.png cannot be written: it is a folder"),
    "name too long": (["x", "-o", "x" * 250 + ".png"], "cannot be written: File name too long"),
    "not writable": (["x", "-o", "/proc/x.png"], "/proc/x.png cannot be written"),
    "report": (["x", "--report", "missing/r.json"], "missing/r.json cannot be written"),
    "picture missing": (["x", "-i", "missing.png"], "No such file or directory"),
    "picture broken": (["x", "-i", "BROKEN"], "cannot read 'broken.png'"),
}


def one_line(code: int, out: str, err: str) -> str:
    """The message of a refusal: exit code 2, nothing on stdout, one line on stderr."""
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_one_line_before_models_load(
    case: str, in_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    (in_folder / "folder.png").mkdir()
    Image.new("RGB", (64, 64), "red").save("picture.png")
    (in_folder / "broken.png").write_bytes(Path("picture.png").read_bytes()[:-30])
    before = set(os.listdir())
    options, message = BAD_OPTIONS[case]
    options = [{"PICTURE": "picture.png", "BROKEN": "broken.png"}.get(o, o) for o in options]
    assert message in one_line(*run("generate", *options, capsys=capsys))
    assert set(os.listdir()) == before


def test_the_same_from_outside(in_folder: Path) -> None:
    """With bytes that are no UTF-8, and messages that hold them."""
    assert "no valid UTF-8" in one_line(*finish("generate", b"a \xff circle"))
    assert r"nothing\udcff.gguf" in one_line(*finish("inspect", b"nothing\xff.gguf"))
    assert "invalid choice: 'draw'" in one_line(*finish("draw"))


def wrong_files() -> dict[str, tuple[int, Any, str]]:
    """case: (which of the three files, what to put in its place, what the message says)."""
    dit, llm, vae = MODEL
    return {
        "text encoder as diffusion model": (0, llm, "this is a text encoder (Qwen3); --diffusion-model wants"),
        "autoencoder as diffusion model": (0, vae, "this is an autoencoder (Flux autoencoder); --diffusion-model"),
        "diffusion model as text encoder": (1, dit, "this is a diffusion model (Z-Image); --llm wants"),
        "diffusion model as autoencoder": (2, dit, "this is a diffusion model (Z-Image); --vae wants"),
        "missing": (0, "missing.gguf", "missing.gguf"),
        "empty": (0, b"", "bad.bin"),
        "text": (1, b"<!DOCTYPE html><html>404: Not Found</html>", "bad.bin"),
        "pickle": (2, b"PK\x03\x04" + b"x" * 100, "bad.bin"),
        "cut": (0, Path(dit).read_bytes()[:-1000], "bad.bin"),
        "cut in the header": (1, Path(llm).read_bytes()[:700], "bad.bin"),
        "a folder": (2, "folder", "folder"),
    }


@pytest.mark.parametrize("case", wrong_files())
def test_a_wrong_file_is_one_line(case: str, in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    which, content, message = wrong_files()[case]
    Path("folder").mkdir()
    if isinstance(content, bytes):
        Path("bad.bin").write_bytes(content)
        content = "bad.bin"
    files = [*MODEL[:which], content, *MODEL[which + 1 :]]
    named = [x for pair in zip(("--diffusion-model", "--llm", "--vae"), files, strict=True) for x in pair]
    assert message in one_line(*run("generate", PROMPT, *named, *SMALL, capsys=capsys))
    assert not Path("output.png").exists()


def png(width: int, height: int, *, data: bytes = b"", depth: int = 8, colour: int = 2, more: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def packed(kind: bytes, start: bytes) -> bytes:
    """A good picture with a chunk that is 100 MB when unpacked."""
    content = start + zlib.compress(bytes(100_000_000), 9)
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return png(64, 64, data=bytes(64 * 193), more=chunk)


RED = Image.new("RGB", (64, 48), "red")
BAD_PICTURES = {
    "empty": b"",
    "three bytes": b"\x89PN",
    "text": b"a red circle",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>',
    "html": b"<!DOCTYPE html><html></html>",
    "gif": saved(RED, "GIF"),
    "no pixels": png(0, 0),
    "no rows": png(64, 0),
    "2^31 - 1 square": png(2**31 - 1, 2**31 - 1),
    "65535 square, 1 bit": png(65535, 65535, depth=1, colour=0),
    "12000 square": png(12000, 12000, data=bytes(12000 * (1 + 1500)), depth=1, colour=0),
    "one row": saved(Image.new("RGB", (60000, 1)), "JPEG"),
    "one pixel": saved(Image.new("RGB", (1, 1))),
    "cut png": saved(Image.effect_noise((64, 64), 50))[:-200],
    "cut jpeg": saved(Image.effect_noise((64, 64), 50), "JPEG")[:-200],
    "damaged": saved(RED).replace(b"IDAT", b"IDAT\xff", 1),
    "text that grows to 100 MB": packed(b"zTXt", b"Comment\0\0"),
    "profile that grows to 100 MB": packed(b"iCCP", b"name\0\0"),
    "tall and narrow": saved(Image.new("RGB", (15, 6000)), "JPEG"),
    "too many pixels": png(4097, 4096, data=bytes(4096 * 514), depth=1, colour=0),
    "one side too long": png(8193, 16, data=bytes(16 * 1026), depth=1, colour=0),
}


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_a_bad_init_picture_is_one_line(
    case: str, in_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    Path("in.png").write_bytes(BAD_PICTURES[case])
    assert "'in.png'" in one_line(*run("generate", PROMPT, "-i", "in.png", *SMALL, capsys=capsys))


def test_pictures_up_to_16_megapixels_are_taken() -> None:
    from models.image import read_image

    for width, height in ((4096, 4096), (8192, 2048)):
        data = png(width, height, data=bytes(height * (1 + width // 8)), depth=1, colour=0)
        assert not read_image(io.BytesIO(data), 16, 16).any()


def test_pictures_with_a_damaged_end_are_taken() -> None:
    """All pixels are there; that the end is missing or its checksum is wrong changes none of them."""
    from models.image import read_image

    good = saved(RED)
    red = np.broadcast_to(np.array([255, 0, 0]), (48, 64, 3))
    for data in (good[:-12], good[:-1] + b"\0"):
        np.testing.assert_array_equal(read_image(io.BytesIO(data), 64, 48), red)


def test_pictures_of_every_kind_are_read_as_they_look() -> None:
    from models.image import read_image

    def read(image: Image.Image, kind: str = "PNG", **options: Any) -> Any:
        return read_image(io.BytesIO(saved(image, kind, **options)), 64, 48)  # type: ignore[arg-type]

    red = np.broadcast_to(np.array([255, 0, 0]), (48, 64, 3))
    np.testing.assert_array_equal(read(RED), red)
    np.testing.assert_array_equal(read(RED.convert("P")), red)
    np.testing.assert_array_equal(read(RED, "WEBP", lossless=True), red)
    assert np.abs(read(RED.convert("CMYK"), "JPEG").astype(int) - red).max() < 8
    clear = Image.new("RGBA", (64, 48), (255, 0, 0, 0))
    np.testing.assert_array_equal(read(clear), np.full((48, 64, 3), 255))  # nothing on white
    indexed = RED.convert("P")
    np.testing.assert_array_equal(read(indexed, transparency=indexed.getpixel((0, 0))), read(clear))
    grey = Image.fromarray(np.full((48, 64), 0x8080, np.uint16))
    np.testing.assert_array_equal(read(grey), np.full((48, 64, 3), 0x80))  # 16 bits
    blue = Image.new("RGB", (64, 48), "blue")
    np.testing.assert_array_equal(read(RED, save_all=True, append_images=[blue]), red)  # the first of several
    upright = Image.new("RGB", (48, 64), "red")
    upright.paste((0, 0, 255), (0, 0, 48, 32))
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned left
    turned = read(upright, "PNG", exif=exif)
    assert turned[24, 0].tolist() == [0, 0, 255] and turned[24, 63].tolist() == [255, 0, 0]


# -- our own failure, and the end ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RuntimeError("two\nlines"), 1, "error: RuntimeError: two lines (this is a fault of pyggml; -v shows where)"),
        (MemoryError("Unable to allocate 1 GiB"), 1, "error: out of memory: Unable to allocate 1 GiB"),
        (OSError(28, "No space left on device"), 1, "error: No space left on device"),
        (ImportError("not built:\nrun build.py"), 1, "error: not built: run build.py"),
        (PermissionError(13, "Permission denied", "x.gguf"), 2, "error: x.gguf: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, message: str, in_folder: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(models, "load", fail)
    assert run("generate", PROMPT, capsys=capsys) == (code, "", message + "\n")


def test_out_of_memory_and_blank_pictures_are_our_failures(
    in_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.z_image import ZImagePipeline
    from pyggml import Cancelled, NonFinite, OutOfMemory

    for error, code in ((OutOfMemory("no room"), 1), (NonFinite("step 1: not finite"), 1), (Cancelled("stop"), 130)):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(ZImagePipeline, "denoise", fail)
        assert run("generate", PROMPT, *SMALL, capsys=capsys) == (code, "", f"error: {error}\n")
        assert os.listdir(in_folder) == []


def test_verbose_shows_where_it_failed(
    in_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = list(logging.getLogger("pyggml").handlers)
    code, _, err = run("generate", PROMPT, "-v", "-o", "missing/x.png", capsys=capsys)
    assert logging.getLogger("pyggml").handlers == before  # ours went with the command
    assert code == 2 and err.startswith("Traceback") and err.splitlines()[-1].startswith("error: missing/x.png")


def read_until(terminal: int, wanted: bytes, seconds: float = 120) -> bytes:
    """What came from a terminal until `wanted` did, or until its other end was closed."""
    data, end = b"", time.monotonic() + seconds
    while wanted not in data and time.monotonic() < end:
        if select.select([terminal], [], [], 1)[0]:
            try:
                more = os.read(terminal, 4096)
            except OSError:  # Linux's way to say that the other end is closed
                return data
            if not more:
                return data
            data += more
    return data


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_gets_a_bar_for_each_phase(in_folder: Path) -> None:
    import pty

    terminal, other = pty.openpty()
    process = start("generate", PROMPT, "-b", "2", *SMALL, "--steps", "2", stderr=other)
    os.close(other)
    shown = read_until(terminal, b"never", 240).decode()
    out, _ = process.communicate(timeout=60)
    os.close(terminal)
    assert (process.returncode, out) == (0, b"output_0.png\noutput_1.png\n")
    # of each line what was drawn last
    last = [line.split("\r")[-1] for line in shown.replace("\r\n", "\n").split("\n")]
    bars = [re.fullmatch(r"(.+?) +█+ (\d+)/(\d+) \[.*s/it\] *", line) for line in last if line]
    assert all(bars), shown
    found = [(bar[1], bar[2], bar[3]) for bar in bars if bar]
    assert found == [
        ("load", "1", "1"), ("text encoder", "1", "1"), ("step 1/2", "2", "2"), ("decode", "1", "1"),
        ("step 2/2", "2", "2"), ("decode", "1", "1"),
    ]  # fmt: skip


def test_a_pipe_gets_no_bars(in_folder: Path) -> None:
    assert finish("generate", PROMPT, *SMALL) == (0, "output.png\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_in_the_middle_leaves_nothing_behind(in_folder: Path) -> None:
    """The second picture of two is under way, in a step of seconds, when the signal comes."""
    import pty

    terminal, other = pty.openpty()
    options = ["-W", "512", "-H", "512", "--steps", "1", "-t", "1", "-b", "1000", "--report", "r.json"]
    process = start("generate", PROMPT, *options, stderr=other, stdout=subprocess.PIPE)
    os.close(other)
    shown = read_until(terminal, b"step 2/1000")
    assert b"step 2/1000" in shown and process.poll() is None
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    shown = read_until(terminal, b"interrupted\r\n", 60)
    assert process.wait(timeout=60) == 130
    assert time.monotonic() - sent < 30  # 998 pictures would take minutes on any machine
    os.close(terminal)
    assert process.stdout and process.stdout.read() == b""
    process.stdout.close()
    assert shown.endswith(b"interrupted\r\n") and b"Traceback" not in shown
    assert [name for name in os.listdir(in_folder) if not re.fullmatch(r"output_\d+\.png", name)] == []
    for name in os.listdir(in_folder):
        assert pixels(in_folder / name).shape == (512, 512, 3)  # whole, as it can be decoded


def test_a_reader_that_goes_away_is_no_traceback(in_folder: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    process = start("inspect", *MODEL, stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, b"")


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from models.image import write_whole

    target = tmp_path / "x.png"
    write_whole(target, b"first")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_whole(target, b"second")
    assert os.listdir(tmp_path) == ["x.png"] and target.read_bytes() == b"first"


# -- what there is ----------------------------------------------------------------------------------------------------


def test_inspect_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("inspect", *MODEL, capsys=capsys)
    assert (code, err) == (0, "")
    dit, llm, vae = out.split("\n\n")
    assert dit.startswith(MODEL[0])
    for text, facts in (
        (dit, ["gguf, 1 file", "diffusion model", "Z-Image (by cap_pad_token)", "F16", "general.name = Z-Image demo"]),
        (llm, ["text encoder", "Qwen3", "tokenizer.ggml.tokens = str["]),
        (vae, ["safetensors, 1 file", "autoencoder", "Flux autoencoder", "240, 1.42 M parameters"]),
    ):
        assert all(fact in text for fact in facts)


def test_inspect_for_programs(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("inspect", "--json", *MODEL, capsys=capsys)
    assert (code, err) == (0, "")
    dit, _, vae = json.loads(out)
    assert (dit["format"], dit["role"], dit["architecture"]) == ("gguf", "diffusion model", "Z-Image")
    assert vae["types"]["F16"]["n_tensors"] == vae["n_tensors"] == 240
    assert dit["file_bytes"] == os.path.getsize(MODEL[0]) and dit["metadata"]["general.architecture"]
    Path("x.gguf").write_bytes(b"GGUF")
    assert "x.gguf" in one_line(*run("inspect", "--json", MODEL[0], "x.gguf", capsys=capsys))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_inspect_does_not_load(capsys: pytest.CaptureFixture[str]) -> None:
    check = (
        "import sys; from studio.cli import main; code = main(sys.argv[1:]);"
        "maps = open('/proc/self/maps').read();"
        "sys.exit('mapped' if '_demo' in maps else 'models' if 'models' in sys.modules else code)"
    )
    command = [sys.executable, "-c", check, "inspect", *MODEL]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_devices(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("devices", capsys=capsys)
    assert (code, err) == (0, "")
    assert any(re.fullmatch(r"CPU\t.+", line) for line in out.splitlines())
    listed = json.loads(run("devices", "--json", capsys=capsys)[1])
    cpu = next(device for device in listed if device["name"] == "CPU")
    assert cpu["maps_files"] is True and cpu["memory_total"] > 1e8 and "CPU" in cpu["buffer_types"]
    assert [f"{d['name']}\t{d['description']}" for d in listed] == out.splitlines()


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("--version", capsys=capsys)
    assert code == 0 and re.match(r"pyggml 0\.1\.0, ggml 0\.25\.3, Python 3\.", out)


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys=capsys)
    assert code == 0 and all(command in out for command in ("generate", "inspect", "devices"))
    for command in ("generate", "inspect", "devices"):
        code, out, err = run(command, "--help", capsys=capsys)
        assert (code, err) == (0, "") and out.startswith(f"usage: pyggml {command}")


@pytest.mark.skipif(sys.platform == "win32", reason="asks the system for processor time")
def test_help_starts_in_a_moment_and_imports_nothing_heavy() -> None:
    """Processor time, as this machine may be busy: the clock says the same on an idle one."""
    seconds = []
    for _ in range(5):
        process = subprocess.Popen([*START, "--help"], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        seconds.append(usage.ru_utime + usage.ru_stime)
    assert statistics.median(seconds) < 0.3, seconds
    check = "import sys; from studio.cli import make_parser; make_parser().format_help(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    heavy = {"numpy", "pyggml", "loader", "models", "cffi", "_cffi_backend", "PIL", "tqdm", "logging", "psutil", "json"}
    assert not heavy & set(done.stdout.split())
