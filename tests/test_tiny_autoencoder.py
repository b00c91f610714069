"""Tiny autoencoders in pipelines and on the command line; tests/test_networks.py has their numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import write_tiny_decoder, write_tiny_models, write_tiny_qwen

import models
from loader.errors import LoadError
from models.image import read_image, to_bytes, to_pil
from models.prediction import stand_in
from studio import cli
from studio.generate import DEMO, DEMO_FILES

RUN: dict[str, Any] = {"width": 32, "height": 48, "num_inference_steps": 4, "output_type": "np", "seed": 3}
KINDS = {"z_image": "taesd", "qwen_image": "taehv"}
WRITE = {"z_image": write_tiny_models, "qwen_image": write_tiny_qwen}


@pytest.fixture(params=list(KINDS))
def files(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Path]:
    """All four, as keyword arguments of `models.load`."""
    tae = write_tiny_decoder(tmp_path / "tiny.safetensors", KINDS[request.param])
    return WRITE[request.param](tmp_path) | {"tae": tae}


def test_it_makes_the_picture_in_the_place_of_the_autoencoder(files: dict[str, Path]) -> None:
    without = {name: path for name, path in files.items() if name != "vae"}
    with models.load(**files, n_threads=1) as pipe:
        result = pipe("a red circle", **RUN)
        latents = pipe("a red circle", **{**RUN, "output_type": "latent"}).images[0]
        assert pipe.tae is not None
        with pipe.tae.in_use() as module:
            exact = to_bytes(module.decode(pipe.tae.backend, latents))
        np.testing.assert_array_equal(result.images[0], exact)
        assert result.report.stages["the decoder"].runs == 1 and "tae" in result.report.components
    with models.load(**without, n_threads=1) as pipe:
        np.testing.assert_array_equal(pipe("a red circle", **RUN).images[0], exact)
        assert pipe.vae is None and list(pipe("a red circle", **RUN).report.components)[-1] == "tae"
        pipe.vae_tile = (2, 2)
        assert np.abs(pipe("a red circle", **RUN).images[0].astype(int) - exact).max() <= 1
        with pytest.raises(ValueError, match="reads no pictures"):
            pipe("a red circle", **RUN, init_image=to_pil(exact))


def test_previews_by_it_change_nothing(files: dict[str, Path]) -> None:
    found: list[Any] = []
    with models.load(**files, tae_preview_only=True, n_threads=1) as pipe:
        result = pipe("a red circle", **RUN, preview="tae", on_preview=lambda i, step, p: found.append(p))
        latents = pipe("a red circle", **{**RUN, "output_type": "latent"}).images[0]
        assert pipe.tae is not None
        with pipe.tae.in_use() as module:
            np.testing.assert_array_equal(found[-1], to_bytes(module.decode(pipe.tae.backend, latents)))
        pipe("a red circle", **RUN, preview="proj", on_preview=lambda i, step, p: found.append(p))
        projected = found[-1]
    assert len(found) == 8 and (found[0] != found[3]).any()
    del files["tae"]
    with models.load(**files, n_threads=1) as pipe:
        np.testing.assert_array_equal(pipe("a red circle", **RUN).images[0], result.images[0])
        pipe("a red circle", **RUN, preview="proj", on_preview=lambda i, step, p: found.append(p))
        assert (projected != found[-1]).any()  # found with the tiny one, which is faster
        with pytest.raises(ValueError, match="needs a tiny autoencoder"):
            pipe("a red circle", **RUN, preview="tae")


@pytest.mark.parametrize("how", [{"params_backend": "*=disk"}, {"memory_limit": 1}])
def test_previews_between_steps_whose_weights_come_and_go(files: dict[str, Path], how: dict[str, Any]) -> None:
    found: list[Any] = []
    with models.load(**files, tae_preview_only=True, n_threads=1) as pipe:
        exact = pipe("a red circle", **RUN, preview="tae", on_preview=lambda i, step, p: found.append(p)).images[0]
    with models.load(**files, tae_preview_only=True, n_threads=1, **how) as pipe:
        for mode in ("tae", "vae", "proj"):
            result = pipe("a red circle", **RUN, preview=mode, on_preview=lambda i, step, p: found.append(p))
            np.testing.assert_array_equal(result.images[0], exact)
    np.testing.assert_array_equal(found[:4], found[4:8])
    np.testing.assert_array_equal(found[11], exact)


def test_a_plan_counts_it(files: dict[str, Path]) -> None:
    def phases(**more: Any) -> dict[str, Any]:
        return {phase.name: phase for phase in pipe.phases("a red circle", width=256, height=256, **more)}

    with models.load(**files, tae_preview_only=True, load=stand_in) as pipe:
        by_tiny, by_vae = phases(preview="tae"), phases(preview="vae")
        names = [component.weights.report.component for component in pipe.components()]
    assert by_tiny["preview"].buffer not in (0, by_vae["preview"].buffer) and names[2:] == ["vae", "tae"]
    assert by_tiny["decoder"].buffer == by_vae["decoder"].buffer
    n_bytes = sum(n for _, ranges in by_tiny["preview"].uses for _, n in ranges)
    assert n_bytes > 10_000
    with models.load(**files, load=stand_in) as pipe:
        assert phases()["decoder"].buffer == by_tiny["preview"].buffer


def test_files_that_do_not_fit(files: dict[str, Path], tmp_path: Path) -> None:
    family = models.pipeline_for(files["diffusion_model"])
    kind = {"TAESD": "taehv", "TAEHV": "taesd"}[family.tiny]
    other = write_tiny_decoder(tmp_path / "other.safetensors", kind)
    wrong = rf"this is a tiny autoencoder \({kind.upper()}\); --tae wants a tiny autoencoder \({family.tiny}\)"
    with pytest.raises(LoadError, match=wrong):
        models.load(**{**files, "tae": other})
    with pytest.raises(LoadError, match=r"this is an autoencoder .*--tae wants"):
        models.load(**{**files, "tae": files["vae"]})
    with pytest.raises(LoadError, match=r"this is a tiny autoencoder .*; --vae wants"):
        models.load(**{**files, "vae": files["tae"]})
    tensors = load_file(files["tae"])
    key = next(name for name in ("decoder.1.weight", "decoder.layers.0.weight") if name in tensors)
    save_file(tensors | {key: np.ascontiguousarray(tensors[key][:, :4])}, other)
    with pytest.raises(LoadError, match=r"latents of 4 channels; this model wants a \w+ for 16"):
        models.load(**{**files, "tae": other})


def test_loads_without_what_they_need(files: dict[str, Path]) -> None:
    tae = files.pop("tae")
    vae = files.pop("vae")
    for more, problem in (
        ({}, "what makes the pictures"), ({"tae": tae, "encoder": True}, "reads no pictures"),
        ({"tae": tae, "tae_preview_only": True}, "for previews only"),
        ({"vae": vae, "tae_preview_only": True}, "for previews only"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=problem):
            models.load(**files, **more)


def test_layers_are_not_made_by_it(tmp_path: Path) -> None:
    files = write_tiny_qwen(tmp_path, layered=True) | {"tae": write_tiny_decoder(tmp_path / "t.safetensors", "taehv")}
    with pytest.raises(ValueError, match="makes no layers"):
        models.load(**files, encoder=True)
    picture = to_pil(np.random.default_rng(1).integers(0, 255, (32, 32, 3), np.uint8))
    found: list[Any] = []
    with models.load(**files, encoder=True, tae_preview_only=True, n_threads=1) as pipe:
        pipe("", width=32, height=32, num_inference_steps=2, reference_images=[picture], layers=2, preview="tae",
             on_preview=lambda i, step, p: found.append(p))  # fmt: skip
    assert [p.shape for p in found] == [(32, 32, 3)] * 2


def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = str(write_tiny_decoder(tmp_path / "taef1.safetensors", "taesd"))
    dit, llm, vae = (str(DEMO / name) for name in DEMO_FILES)
    options = ["a red circle on blue", "-W", "64", "-H", "64", "-t", "1", "--steps", "2"]
    three = ["--diffusion-model", dit, "--llm", llm]

    def drawn(*more: str) -> bytes:
        assert cli.main(["generate", *options, *more]) == 0
        return Path("output.png").read_bytes()

    plain = drawn()
    preview = ["--preview", "tae", "--taesd-preview-only", "--report", "report.json"]
    assert drawn("--tae", tiny, *preview) == plain
    assert "tae" in json.loads(Path("report.json").read_text())["components"]
    rough = drawn(*three, "--taesd", tiny)  # the picture, without the whole autoencoder
    np.testing.assert_array_equal(read_image("output.png"), read_image("preview.png"))
    assert rough != plain and b"VAE: taef1.safetensors" in rough and b"VAE: ae_demo.safetensors" in plain
    assert drawn("--tae", tiny) != plain  # with --vae, the demo's, too
    capsys.readouterr()
    assert cli.main(["plan", *options, *three, "--tae", tiny, "--preview", "tae"]) == 0
    table = capsys.readouterr().out
    assert "\ntiny autoencoder  taef1.safetensors" in table and "\npreview " in table
    for bad, problem in (
        (["--preview", "tae"], "needs a tiny autoencoder"), (["--taesd-preview-only"], "for previews only"),
        ([*three, "--tae", tiny, "--taesd-preview-only"], "for previews only"),
        ([*three, "--tae", tiny, "-i", "output.png"], "reads no pictures"),
        ([*three, "--vae", tiny], "this is a tiny autoencoder (TAESD); --vae wants"), (three, "--vae missing"),
        (["--tae", vae], "this is an autoencoder (Flux autoencoder); --tae wants"),
    ):  # fmt: skip
        capsys.readouterr()
        assert cli.main(["generate", *options, *bad]) == 2
        assert problem in capsys.readouterr().err
