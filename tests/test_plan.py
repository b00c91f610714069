"""`pyggml plan`, `--dry-run`, and what a run predicts of itself, beside what it then took."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import write_tiny_qwen

import models
from loader.checkpoint import open_checkpoint
from loader.lora import LoraFile
from loader.merge import Merged
from loader.repack import layout_for
from models.prediction import Phase, predict, stand_in
from models.residency import Use
from models.room import Room
from pyggml import Backend, ClosedError, Type
from studio.cli import main
from studio.generate import DEMO
from studio.plan import shown

MB = 1 << 20
LLM, VAE = DEMO / "qwen3_demo.gguf", DEMO / "ae_demo.safetensors"
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is looked at by Linux's means")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Z-Image transformer of 210 MB, f16, that takes the demo's captions and makes the demo's latents."""
    dim, ff, head, adaln, layers = 1024, 2816, 128, 256, 6
    noise = np.random.default_rng(1).standard_normal(4 << 20).astype(np.float16)

    def matrix(n_out: int, n_in: int) -> Any:
        return np.resize(noise, (n_out, n_in)) * np.float16(n_in**-0.5)

    tensors = {
        "x_embedder.weight": matrix(dim, 64), "t_embedder.mlp.0.weight": matrix(1024, 256),
        "t_embedder.mlp.2.weight": matrix(adaln, 1024), "cap_embedder.0.weight": np.ones(128, np.float16),
        "cap_embedder.1.weight": matrix(dim, 128), "final_layer.linear.weight": matrix(64, dim),
        "final_layer.adaLN_modulation.1.weight": matrix(dim, adaln),
    }  # fmt: skip
    sizes = {"x_embedder": dim, "t_embedder.mlp.0": 1024, "t_embedder.mlp.2": adaln, "cap_embedder.1": dim,
             "final_layer.linear": 64, "final_layer.adaLN_modulation.1": dim}  # fmt: skip
    tensors |= {f"{name}.bias": np.zeros(n, np.float16) for name, n in sizes.items()}
    tensors |= {f"{name}_pad_token": np.zeros(dim, np.float16) for name in ("x", "cap")}
    blocks = ["context_refiner.0.", "noise_refiner.0.", *(f"layers.{i}." for i in range(layers))]
    for p in blocks:
        tensors |= {f"{p}attention.qkv.weight": matrix(3 * dim, dim), f"{p}attention.out.weight": matrix(dim, dim),
                    f"{p}feed_forward.w1.weight": matrix(ff, dim), f"{p}feed_forward.w2.weight": matrix(dim, ff),
                    f"{p}feed_forward.w3.weight": matrix(ff, dim)}  # fmt: skip
        tensors |= {f"{p}attention.{x}_norm.weight": np.ones(head, np.float16) for x in "qk"}
        norms = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
        tensors |= {f"{p}{norm}.weight": np.ones(dim, np.float16) for norm in norms}
        if p != "context_refiner.0.":
            tensors[f"{p}adaLN_modulation.0.weight"] = matrix(4 * dim, adaln)
            tensors[f"{p}adaLN_modulation.0.bias"] = np.zeros(4 * dim, np.float16)
    path = tmp_path_factory.mktemp("large") / "z_image.safetensors"
    save_file(tensors, path)
    return path


def run(folder: Path, *options: str) -> dict[str, Any]:
    """The report of `pyggml generate` in a process of its own, and the picture's bytes as "png"."""
    picture, report = folder / "out.png", folder / "report.json"
    command = [sys.executable, "-m", "studio.cli", "generate", "a red circle", "-o", str(picture), "--report",
               str(report), "-W", "64", "-H", "64", "--steps", "2", "-t", "1", *options]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parent.parent)
    return {**json.loads(report.read_text()), "png": picture.read_bytes()}


def files(diffusion_model: Path) -> list[str]:
    return ["--diffusion-model", str(diffusion_model), "--llm", str(LLM), "--vae", str(VAE)]


def off(report: dict[str, Any]) -> float:
    """Predicted over measured peak, minus one."""
    return float(report["predicted"]["peak_rss"] / report["memory"]["peak_rss"] - 1)


@linux
@pytest.mark.parametrize("options", [
    [], ["-W", "256", "-H", "256"], ["--cfg-scale", "3"], ["--no-mmap"], ["--mlock"],
    ["-W", "256", "-H", "256", "--vae-tiling", "--vae-tile-size", "8"],
])  # fmt: skip
def test_the_demos_peak_is_predicted(tmp_path: Path, options: list[str]) -> None:
    report = run(tmp_path, *options)
    assert abs(off(report)) < 0.1, report["predicted"]
    assert report["predicted"]["fits"]


@linux
def test_a_larger_models_peak_is_predicted_and_kept_within_a_limit(tmp_path: Path, large: Path) -> None:
    free = run(tmp_path, *files(large))
    assert abs(off(free)) < 0.1, free["predicted"]
    assert free["memory"]["peak_rss"] > large.stat().st_size
    assert free["residency"]["decisions"] == ["room for all weights"]

    limit = 200 * MB  # less than the transformer
    tight = run(tmp_path, *files(large), "--max-ram", "200M")
    assert tight["png"] == free["png"]
    assert abs(off(tight)) < 0.1, tight["predicted"]
    assert tight["memory"]["peak_rss"] < limit
    stream = tight["residency"]["streams"][-1]
    assert stream["passes"] == 2
    assert stream["kept"] + stream["per_pass"] == stream["weights"] == tight["predicted"]["phases"][2]["weights"]
    assert tight["predicted"]["phases"][2]["per_pass"] == pytest.approx(stream["per_pass"], rel=0.1)
    assert tight["predicted"]["room_source"] == tight["residency"]["room_source"] == "the limit that was set"


@linux
def test_repacked_weights_are_predicted_closely(tmp_path: Path, large: Path) -> None:
    """Linux maps up to 2 MB around a page: mapped norms between repacked weights brought 15 to 20 MB of these back."""
    model = tmp_path / "q4_0.gguf"
    assert main(["convert", str(large), "-o", str(model), "--type", "q4_0"]) == 0
    report = run(tmp_path, *files(model), "--mmap", "--repack", "on")
    if not report["components"]["z_image"]["n_repacked"]:
        pytest.skip("this processor has no layout of its own for q4_0")
    assert abs(off(report)) < 0.05, report["predicted"]


@linux
@pytest.mark.parametrize("tile", [None, 8])
def test_reading_a_picture_is_predicted_in_tiles_too(tile: int | None) -> None:
    code = f"""
import numpy as np, models
from models.memory import Memory
with models.load({str(DEMO / "z_image_demo.gguf")!r}, {str(LLM)!r}, {str(VAE)!r}, encoder=True, n_threads=1) as pipe:
    pipe.vae_tile = {tile and (tile, tile)}
    pipe.encode_image(np.zeros((64, 64, 3), np.uint8))
    phases = pipe.phases("x", width=768, height=640, encode_image=True)
    phase = next(phase for phase in phases if phase.name == "image encoder")
    before, picture = Memory.now().rss, np.zeros((640, 768, 3), np.uint8)
    pipe.encode_image(picture)
    print(phase.buffer + phase.work + phase.extra, Memory.now().peak_rss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent)  # fmt: skip
    predicted, measured = map(int, done.stdout.split())
    assert predicted == pytest.approx(measured, rel=0.1)


def test_a_plan_of_many_steps_has_the_modulation_again(tmp_path: Path) -> None:
    with models.load(**write_tiny_qwen(tmp_path), load=stand_in) as pipe:
        def names(n: int, method: str = "euler") -> list[str]:
            found = pipe.phases("x", width=64, height=64, num_inference_steps=n, cfg_scale=1, method=method)
            return [phase.name for phase in found][2:]

        few = ["modulation", "steps", "decoder"]
        many = ["modulation", "steps", "modulation", "steps", "decoder"]
        assert [names(1), names(15), names(16), names(50)] == [few, few, many, many]
        assert [names(8, "dpm2"), names(9, "dpm2")] == [few, many]  # which asks twice in a step


@linux
@pytest.mark.parametrize("options", [
    ["--no-mmap"], ["--mmap", "--no-reclaim-mmap-source"], ["--mmap=io"], ["--mmap=io", "--no-reclaim-mmap-source"],
    ["--mmap=io", "--mlock"],
])  # fmt: skip
def test_repacked_weights_are_in_the_plan(tmp_path: Path, large: Path, options: list[str]) -> None:
    """Also what stays of the mappings that they are copied from, as long as the load takes or longer."""
    q4 = large.parent / "q4_0.gguf"
    if not q4.exists():
        assert main(["convert", str(large), "--type", "q4_0", "-o", str(q4)]) == 0
    if not layout_for(Backend.cpu(1).device, (1024, 1024), Type.Q4_0, "on"):
        pytest.skip("this processor has no such layout")
    common = ["a red circle", *files(q4), "-W", "64", "-H", "64", "--steps", "2", "-t", "1", "--repack", "on", *options]
    plan = subprocess.run([sys.executable, "-m", "studio.cli", "plan", "--json", *common], check=True,
                          capture_output=True, cwd=Path(__file__).parent.parent)  # fmt: skip
    planned = json.loads(plan.stdout)
    report = run(tmp_path, *files(q4), "--repack", "on", *options)
    transformer = next(c for c in planned["components"] if c["component"] == "z_image")
    assert transformer["bytes"]["repack"] == pytest.approx(report["components"]["z_image"]["repacked_bytes"], rel=0.01)
    assert planned["peak_rss"] == pytest.approx(report["memory"]["peak_rss"], rel=0.1)
    assert abs(off(report)) < 0.1


@pytest.fixture(scope="module")
def lora(large: Path) -> Path:
    """For the matrices of all blocks, of rank 128 and f32: 72 MB."""
    tensors = {}
    with open_checkpoint(large) as checkpoint:
        for name, info in checkpoint.items():
            if re.match(r"layers|\w+_refiner", name) and len(info.shape) == 2 and min(info.shape) >= 1024:
                (n_out, n_in), module = info.shape, f"diffusion_model.{name.removesuffix('.weight')}"
                tensors[f"{module}.lora_A.weight"] = np.full((128, n_in), 1e-3, np.float32)
                tensors[f"{module}.lora_B.weight"] = np.full((n_out, 128), 1e-3, np.float32)
    path = large.parent / "style.safetensors"
    save_file(tensors, path)
    return path


@linux
@pytest.mark.parametrize("mode", ["at_runtime", "immediately"])
def test_loras_are_in_the_prediction(tmp_path: Path, large: Path, lora: Path, mode: str) -> None:
    plain = run(tmp_path, *files(large))
    report = run(tmp_path, *files(large), "--lora", f"{lora}:0.5", "--lora-apply-mode", mode)
    assert report["png"] != plain["png"]
    assert abs(off(report)) < 0.1, report["predicted"]
    assert report["predicted"]["private_peak"] == pytest.approx(report["anonymous_peak"], rel=0.1)
    growth = {name: report[part][name] - plain[part][name] for part, name in
              (("memory", "peak_rss"), ("predicted", "peak_rss"), ("predicted", "private_peak"))}  # fmt: skip
    bytes_of = "private_peak" if mode == "immediately" else "peak_rss"
    assert growth[bytes_of] > (150 if mode == "immediately" else 60) * MB


@pytest.mark.parametrize("way", ["--lora", "in the prompt"])
@pytest.mark.parametrize("mode", ["at_runtime", "immediately"])
def test_a_plan_counts_loras(
    capsys: pytest.CaptureFixture[str], large: Path, lora: Path, way: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, options = "a red circle", ["--lora", f"{lora}:0.5"]
    if way != "--lora":
        prompt, options = f"{prompt} <lora:style:0.5>", ["--lora-model-dir", str(lora.parent)]
    options += ["--lora-apply-mode", mode]
    monkeypatch.setattr(LoraFile, "_check_finite", None)  # headers are enough
    monkeypatch.setattr(Merged, "_fill", None)

    def planned(prompt: str, *more: str) -> dict[str, Any]:
        assert main(["plan", prompt, *files(large), *more, "--json"]) == 0
        return dict(json.loads(capsys.readouterr().out))

    plain, plan = planned("a red circle"), planned(prompt, *options)
    limit = ("--max-ram", f"{plain['private_peak'] // MB + 100}M")
    assert planned("a red circle", *limit)["fits"]
    assert planned(prompt, *options, *limit)["fits"] is (mode == "at_runtime")
    assert plain["components"] == plan["components"][:3] and len(plan["components"]) == 4
    added = plan["components"][3]
    assert added["path"] == str(lora) and added["device"] == "CPU"
    with open_checkpoint(lora) as checkpoint:
        size, modules = sum(info.n_bytes for info in checkpoint.values()), len(checkpoint) // 2
    if mode == "at_runtime":
        assert (added["component"], added["tensors"]) == ("LoRA, transformer", 2 * modules)
        assert added["bytes"] == {"map": size}
        assert plan["peak_rss"] - plain["peak_rss"] == pytest.approx(size, rel=0.1)
    else:
        copies = added["bytes"]["merge"]
        assert (added["component"], added["tensors"], added["bytes"]["map"]) == ("merged, transformer", modules, 0)
        assert 0.8 * large.stat().st_size < copies < large.stat().st_size
        assert plan["private_peak"] - plain["private_peak"] == pytest.approx(copies, rel=0.1)
    assert main(["plan", prompt, *files(large), *options]) == 0
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith(added["component"]))
    assert "style.safetensors" in line and shown(max(added["bytes"].values())) in line


@linux
def test_a_plan_reads_no_weights(large: Path) -> None:
    fd = os.open(large, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    code = ("import sys; from studio.cli import main; from models.memory import Memory; code = main(sys.argv[1:]);"
            "print(code, Memory.now().peak_rss, "
            "*[l.split()[1] for l in open('/proc/self/io') if l.startswith('read_bytes')])")  # fmt: skip
    command = [sys.executable, "-c", code, "plan", "a red circle", *files(large), "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    code_, peak, n_read = map(int, done.stdout.splitlines()[-1].split())
    assert code_ == 0
    assert peak < large.stat().st_size / 2
    assert n_read < large.stat().st_size / 2


def test_plan_and_dry_run_print_the_same_and_draw_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    texts = []
    for command in (["plan"], ["generate", "--dry-run"]):
        assert main([*command, "a red circle", "-W", "128", "-t", "1"]) == 0
        texts.append(capsys.readouterr().out)
        assert not list(tmp_path.iterdir())
    plan, dry = (text.splitlines() for text in texts)
    assert plan[0] == "128x64, 1 thread"
    table = plan.index("")
    words = {line.split("  ")[0] for line in plan}
    assert {"text encoder", "transformer", "autoencoder", "caption refiner", "steps", "decoder"} <= words
    assert sum("< peak" in line for line in plan) == 1
    assert plan[-1].endswith("(available memory): fits") or "cgroup" in plan[-1]
    assert plan[: table + 8] == dry[: table + 8]


def test_plan_as_json(capsys: pytest.CaptureFixture[str], large: Path) -> None:
    assert main(["plan", "a red circle", *files(large), "--json", "--no-mmap"]) == 0
    plan = json.loads(capsys.readouterr().out)
    by_name = {c["component"]: c for c in plan["components"]}
    assert list(by_name) == ["qwen3", "z_image", "vae"]
    assert by_name["z_image"]["bytes"]["map"] == 0
    assert by_name["z_image"]["bytes"]["copy"] > 150 * MB
    assert by_name["z_image"]["reasons"]["mapping is off"] > 40
    assert plan["private_peak"] > large.stat().st_size
    assert plan["fits"] and plan["room"] > 0


def test_a_plan_knows_a_step_cache(capsys: pytest.CaptureFixture[str]) -> None:
    peaks = {}
    for mode in ("easycache", "dbcache"):
        options = ["--cache-option", "Fn=1"] if mode == "dbcache" else []
        assert main(["plan", "x", "-W", "256", "-H", "256", "--cache-mode", mode, *options, "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        peaks[mode] = plan["private_peak"]
        names = ["front blocks", "middle blocks", "back blocks"] if mode == "dbcache" else ["steps"]
        assert [phase["name"] for phase in plan["phases"]] == ["text encoder", "caption refiner", *names, "decoder"]
    assert peaks["dbcache"] > peaks["easycache"]


def test_a_plan_refuses_what_a_run_would(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", "x", "--diffusion-model", str(VAE), "--llm", str(LLM), "--vae", str(VAE)]) == 2
    assert "diffusion model" in capsys.readouterr().err
    assert main(["plan", "x", "-W", "5000"]) == 2
    capsys.readouterr()
    assert main(["plan"]) == 2
    assert "such as: pyggml plan 'a red circle on a blue background'" in capsys.readouterr().err
    for size in ("0", "x", "-3G", "4Q", "inf"):
        with pytest.raises(SystemExit) as end:
            main(["plan", "x", f"--max-ram={size}"])
        assert end.value.code == 2
        assert "no size" in capsys.readouterr().err


def test_a_pipeline_of_stand_ins_computes_nothing() -> None:
    with models.load(DEMO / "z_image_demo.gguf", LLM, VAE, load=stand_in) as pipe:
        assert [phase.name for phase in pipe.phases("a red circle", width=64, height=64, num_images_per_prompt=2)] == [
            "text encoder", "caption refiner", "steps", "decoder", "steps", "decoder"]  # fmt: skip
        with pytest.raises(ClosedError):
            pipe("a red circle", width=64, height=64)


# -- the arithmetic ----------------------------------------------------------------------------------------------------


def uses(n: int, start: int) -> tuple[Use, ...]:
    return tuple((i, ((start + i * MB, MB),)) for i in range(n))


def test_a_prediction_follows_the_phases() -> None:
    phases = [Phase("a", uses(400, 1 << 40), 50 * MB, 1), Phase("b", uses(600, 1 << 41), 80 * MB, MB, stays=True),
              Phase("c", uses(100, 1 << 42), 70 * MB, 0)]  # fmt: skip

    def predicted(room: int) -> Any:
        return predict(phases, mapped=1100 * MB, copied=30 * MB, private=20 * MB, from_files=10 * MB,
                       room=Room(room * MB, "a test"))  # fmt: skip

    p = predicted(4000)
    assert [x.from_files // MB for x in p.phases] == [410, 1010, 1110]
    assert [x.private // MB for x in p.phases] == [100, 131, 201]  # the larger work buffer stays, and b's graph
    assert p.peak_rss == p.phases[2].rss and p.fits and not any(x.given_back or x.per_pass for x in p.phases)

    p = predicted(1000)  # b needs what a took
    assert p.phases[1].given_back > 0 and not p.phases[1].per_pass and p.fits

    p = predicted(500)
    assert p.phases[1].per_pass > 200 * MB and p.fits
    assert p.peak_rss < 500 * MB + 30 * MB

    assert not predicted(150).fits
