"""Qwen-Image's pipeline: against recorded runs of diffusers' six, and what it promises beside numbers."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_models import as_options, golden, write_tiny_models, write_tiny_qwen

import models
from loader.errors import LoadError
from models.qwen25_vision import Qwen25Vision
from models.qwen25_vl import Qwen25VL
from models.qwen_image import QwenImagePipeline, references
from models.qwen_image import pipeline as qwen
from models.rng import make_rng
from models.schedule import after_strength
from pyggml import Backend, Cancelled
from studio import cli

TOLERANCE = 1e-4  # relative to the largest value
RECORDED = golden("qwen_pipeline")
RUNS: dict[str, dict[str, Any]] = json.loads(str(RECORDED["runs"]))
SMALL: dict[str, Any] = {"width": 32, "height": 32, "num_inference_steps": 2, "output_type": "np"}


@pytest.fixture(autouse=True)
def small_areas(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reference is scaled to, as where the runs were recorded."""
    for (module, name), area in zip(
        ((references, "AUTOENCODER_AREA"), (references, "TOWER_AREA"), (qwen, "LAYERED_AREA")),
        RECORDED["areas"].tolist(), strict=True,
    ):  # fmt: skip
        monkeypatch.setattr(module, name, area)


@pytest.fixture(scope="module")
def layered_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_tiny_qwen(tmp_path_factory.mktemp("layered"), layered=True)


@pytest.fixture(scope="module")
def pipes(
    qwen_files: dict[str, Path], layered_files: dict[str, Path], backend: Backend
) -> Iterator[Mapping[str, QwenImagePipeline]]:
    """By variant, and "layered"."""
    made: dict[str, Any] = {
        variant: models.load(**qwen_files, backend=backend, encoder=True, variant=variant)
        for variant in ("edit", "2509", "2511")
    }
    made["layered"] = models.load(**layered_files, backend=backend, encoder=True)
    yield made
    for pipe in made.values():
        pipe.close()


@pytest.fixture
def pipe(pipes: Mapping[str, QwenImagePipeline]) -> QwenImagePipeline:
    return pipes["2509"]


def close_to(actual: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    error = np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"relative error {error:.2e}"


def arguments(name: str) -> dict[str, Any]:
    """A recorded run as this pipeline is asked for it."""
    run = dict(RUNS[name])
    edits = "Edit" in run["pipeline"] or "Layered" in run["pipeline"]
    pictures = [Image.fromarray(RECORDED[f"{name}/picture_{i}"]) for i in range(len(run.pop("pictures", [])))]
    if "mask" in run:
        run["mask_image"] = Image.fromarray(RECORDED[f"{name}/{'mask'}"])
    run |= {"reference_images": pictures} if edits else {"init_image": pictures[0]} if pictures else {}
    run["num_inference_steps"] = run.pop("steps")
    return {k: v for k, v in run.items() if k not in ("pipeline", "mask")} | {"output_type": "np"}


def variant_of(name: str) -> str:
    return {"edit": "edit", "edit_2511": "2511", "layered": "layered"}.get(name, "2509")


# -- against diffusers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_equals_diffusers(
    pipes: Mapping[str, QwenImagePipeline], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, run = pipes[variant_of(name)], arguments(name)
    encoder, encode = type(pipe.text_encoder.module), pipe.text_encoder.module.encode
    ids: list[Any] = []

    def look_at_ids(self: Any, backend: Backend, numbers: Any, *more: Any, **named: Any) -> Any:
        ids.append((numbers, named["n_dropped"]))
        return encode(backend, numbers, *more, **named)

    monkeypatch.setattr(encoder, "encode", look_at_ids)
    pipe._prompts.clear()
    taken: list[np.ndarray[Any, Any]] = []
    times: list[float] = []

    def look(_: Any, step: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
        taken.append(tensors["latents"].copy())
        times.append(timestep)
        return {}

    result = pipe(**run, callback_on_step_end=look)

    wanted = [RECORDED[k] for k in (f"{name}/ids", f"{name}/negative_ids") if k in RECORDED]
    assert len(ids) == len(wanted)
    for (ours, n_dropped), theirs in zip(ids, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert n_dropped == (64 if "edit" in name else 34)
    if f"{name}/prompt_embeds" in RECORDED:
        pictures = [np.asarray(x, np.uint8) for x in run.get("reference_images", [])]
        close_to(pipe.encode(run["prompt"], pictures).features, RECORDED[f"{name}/prompt_embeds"])
        assert len(ids) == len(wanted)  # it was remembered
    expected = [RECORDED[k] for k in sorted(RECORDED) if k.startswith(f"{name}/latents_")]
    assert len(taken) == len(expected) > 0
    np.testing.assert_allclose(times, 1000 * RECORDED[f"{name}/sigmas"][-len(times) - 1 : -1], rtol=1e-6)
    for ours, theirs in zip(taken, expected, strict=True):
        close_to(ours, theirs)
    if f"{name}/image" in RECORDED:
        made = np.stack(result.images[0]) if name == "layered" else result.images[0]
        picture = RECORDED[f"{name}/image"]
        assert made.shape == picture.shape
        assert np.abs(made / 255 - picture).max() <= 0.5 / 255 + 1e-4 * picture.max()


@pytest.mark.parametrize("name", ["img2img", "inpaint"])
def test_noise_begins_after_the_draw_of_the_picture(pipe: QwenImagePipeline, name: str) -> None:
    """Both of one generator, as there."""
    run, start = arguments(name), RECORDED[f"{name}/start"]
    levels = after_strength(RECORDED[f"{name}/sigmas"], run["strength"])
    rng = make_rng("cpu", run["seed"])
    picture = run["init_image"].resize((run["width"], run["height"]), Image.Resampling.LANCZOS)
    latents = pipe.encode_image(np.asarray(picture, np.uint8), rng)
    close_to(levels[0] * rng.randn(start.shape) + (1 - levels[0]) * latents, start)
    assert not np.array_equal(latents, pipe.encode_image(np.asarray(picture, np.uint8)))  # which is the mean


def test_the_recorded_mask_has_both_kinds() -> None:
    assert {*(RECORDED["inpaint/mask"] >= 128).ravel().tolist()} == {True, False}


# -- editing ---------------------------------------------------------------------------------------------------------


def picture(i: int = 0) -> Image.Image:
    return Image.fromarray(RECORDED[f"edit_2509_two/picture_{i}"])


def test_pictures_are_as_large_as_the_last_reference(pipe: QwenImagePipeline) -> None:
    run = {k: v for k, v in SMALL.items() if k not in ("width", "height")} | {"num_inference_steps": 1}
    assert pipe("a red circle", **run, reference_images=[picture(1), picture(0)]).images[0].shape == (64, 128, 3)
    assert pipe("a red circle", **run, reference_images=[picture(0), picture(1)]).images[0].shape == (128, 64, 3)
    taller = pipe("a red circle", **run, reference_images=[picture(0)], height=32).images[0]
    assert taller.shape == (32, 128, 3)


def test_editing_without_a_vision_tower(
    pipe: QwenImagePipeline, tmp_path: Path, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    """The transformer sees the picture, the text encoder does not: that is said, once."""
    run = SMALL | {"reference_images": [picture()], "cfg_scale": 2.0, "seed": 1}
    with models.load(**write_tiny_qwen(tmp_path, tower=False), backend=backend, encoder=True) as blind:
        assert blind.vision is None
        made = blind("a red circle", **run).images[0]
        blind(" blue", **run)
        assert [record.message for record in caplog.records if "no vision tower" in record.message] == [
            "there is no vision tower: the text encoder does not see the pictures that are edited, the transformer "
            "does. Give an mmproj file (--llm-vision), or a text encoder that has the tower."
        ]
        other = blind("a red circle", **run | {"reference_images": [picture(1)]}).images[0]
        features = blind.encode("a red circle", [np.asarray(picture())]).features
    assert not np.array_equal(made, other)
    assert not np.array_equal(made, pipe("a red circle", **run).images[0])
    # the template of edits all the same, of which 64 tokens are dropped
    ids = pipe._tokens("a red circle", edit=True)[0]
    assert len(features) == len(ids) - 64


def test_editing_as_stable_diffusion_cpp_does(
    qwen_files: dict[str, Path], tmp_path: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """References have the area of what is drawn; without a tower the prompt is one of text to picture."""
    monkeypatch.setattr(references, "TOWER_AREAS", (56 * 56, 84 * 84))
    wide = Image.fromarray(np.random.default_rng(3).integers(0, 256, (60, 100, 3), np.uint8))
    pixels = np.asarray(wide)
    seen: list[Any] = []
    encode = Qwen25Vision.encode

    def noted(self: Qwen25Vision, backend: Backend, picture: Any, *more: Any) -> Any:
        seen.append(picture)
        return encode(self, backend, picture, *more)

    monkeypatch.setattr(Qwen25Vision, "encode", noted)
    with models.load(**qwen_files, backend=backend, encoder=True, compat="sd.cpp") as pipe:
        encode_image = pipe.encode_image
        monkeypatch.setattr(pipe, "encode_image", lambda x, *more: seen.append(x) or encode_image(x, *more))
        pipe("a red circle", **SMALL, reference_images=[wide], cfg_scale=1.0)
        phases = pipe.phases("a red circle", width=32, height=32, reference_images=[wide], cfg_scale=1.0)
    tower, autoencoder = seen
    assert np.array_equal(tower, references.for_tower(pixels, 0, compat="sd.cpp")) and tower.shape == (3, 56, 112)
    assert np.array_equal(autoencoder, references.for_autoencoder(pixels, 32 * 32, compat="sd.cpp"))
    assert autoencoder.shape == (32, 32, 3)
    assert {"vision tower", "image encoder"} <= {phase.name for phase in phases}
    with models.load(**write_tiny_qwen(tmp_path, tower=False), backend=backend, encoder=True, compat="sd.cpp") as blind:
        plain = blind.encode("a red circle").features
        assert np.array_equal(blind.encode("a red circle", [pixels]).features, plain)


@pytest.mark.parametrize("variant", ["2509", "layered"])
def test_a_plan_measures_the_graphs_of_the_run(
    pipes: Mapping[str, QwenImagePipeline], monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """Also where sides are no whole patches."""
    pipe, built = pipes[variant], []
    build = pipe.transformer.module.step_graph

    def noted(at: Backend, *sizes: Any) -> Any:
        built.append(sizes)
        return build(at, *sizes)

    monkeypatch.setattr(pipe.transformer.module, "step_graph", noted)
    pipe.transformer.close_graphs()
    options: dict[str, Any] = {"width": 40, "height": 24, "reference_images": [picture()], "cfg_scale": 1.0}
    pipe("a red circle", **SMALL | options)
    of_run = built.copy()
    pipe.phases("a red circle", **options)
    assert of_run and built == 2 * of_run


def test_the_vision_tower_of_another_file(qwen_files: dict[str, Path], tmp_path: Path, backend: Backend) -> None:
    blind = write_tiny_qwen(tmp_path, tower=False)
    run = SMALL | {"reference_images": [picture()], "cfg_scale": 1.0}
    with models.load(**qwen_files, backend=backend, encoder=True) as whole:
        expected = whole("a red circle", **run).images[0]
    with models.load(**blind, llm_vision=qwen_files["llm"], backend=backend, encoder=True) as pipe:
        np.testing.assert_array_equal(pipe("a red circle", **run).images[0], expected)


def test_which_edit_model_a_file_is(pipes: Mapping[str, QwenImagePipeline], tmp_path: Path, backend: Backend) -> None:
    """2511's files are marked; what is asked for counts more."""
    marked = write_tiny_qwen(tmp_path, more={"__index_timestep_zero__": np.zeros(1, np.float32)})
    run = SMALL | {"reference_images": [picture()], "cfg_scale": 1.0}
    made = {name: pipe("a red circle", **run).images[0] for name, pipe in pipes.items() if name != "layered"}
    assert not np.array_equal(made["edit"], made["2509"]) and not np.array_equal(made["2509"], made["2511"])
    for asked, found in ((None, "2511"), ("2511", "2511"), ("2509", "2509"), ("edit", "edit")):
        with models.load(**marked, backend=backend, encoder=True, variant=asked) as pipe:
            assert pipe.variant == found
            np.testing.assert_array_equal(pipe("a red circle", **run).images[0], made[found])
    with pytest.raises(ValueError, match="variant is 'edit', '2509' or '2511', not '2510'"):
        models.load(**marked, backend=backend, variant="2510")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often text encoder and vision tower ran."""
    calls = {"Qwen25VL": 0, "Qwen25Vision": 0}
    for kind in (Qwen25VL, Qwen25Vision):
        def count(self: Any, *more: Any, encode: Any = kind.encode, name: str = kind.__name__, **named: Any) -> Any:
            calls[name] += 1
            return encode(self, *more, **named)

        monkeypatch.setattr(kind, "encode", count)
    return calls


def test_what_was_encoded_is_remembered(
    qwen_files: dict[str, Path], backend: Backend, counted: dict[str, int]
) -> None:
    with models.load(**qwen_files, backend=backend, encoder=True) as pipe:
        run = SMALL | {"reference_images": [picture()], "cfg_scale": 2.0}
        first = pipe("a red circle", **run)
        assert counted == {"Qwen25VL": 2, "Qwen25Vision": 1} and not first.report.prompt_cached
        second = pipe("a red circle", **run, num_images_per_prompt=2)
        assert counted == {"Qwen25VL": 2, "Qwen25Vision": 1} and second.report.prompt_cached
        np.testing.assert_array_equal(first.images[0], second.images[0])
        pipe("a red circle", **run | {"reference_images": [picture(), picture(1)]})  # other pictures, other prompts
        assert counted == {"Qwen25VL": 4, "Qwen25Vision": 2}
        pipe("a red circle", **SMALL, cfg_scale=1.0)
        assert counted == {"Qwen25VL": 5, "Qwen25Vision": 2}


# -- layers, img2img, batches ----------------------------------------------------------------------------------------


def test_layers(pipes: Mapping[str, QwenImagePipeline]) -> None:
    run = {"reference_images": [picture()], "num_inference_steps": 1, "cfg_scale": 1.0}
    layers = pipes["layered"]("a red circle", **run, layers=3).images[0]
    assert [(layer.mode, layer.size) for layer in layers] == [("RGBA", (64, 64))] * 3
    arrays = pipes["layered"]("a red circle", **run, layers=3, output_type="np").images[0]
    for layer, array in zip(layers, arrays, strict=True):
        np.testing.assert_array_equal(np.asarray(layer), array)
    assert len(pipes["layered"]("a red circle", **run).images[0]) == 4  # unless asked otherwise
    latents = pipes["layered"]("a red circle", **run, layers=1, output_type="latent").images[0]
    assert latents.shape == (2, 16, 8, 8)


def test_layers_of_a_picture_that_no_prompt_describes(
    pipes: Mapping[str, QwenImagePipeline], caplog: pytest.LogCaptureFixture
) -> None:
    run = {"reference_images": [picture()], "num_inference_steps": 1, "cfg_scale": 2.0, "layers": 1}
    pipes["layered"]("a red circle", **run)  # with an empty negative one
    assert "prompt is empty" not in caplog.text
    pipes["layered"]("  ", **run, num_images_per_prompt=2)
    found = [r.levelno for r in caplog.records if r.message.startswith("the prompt is empty: say what is in")]
    assert found == [logging.WARNING]
    pipes["2509"]("", **SMALL)
    assert caplog.text.count("prompt is empty") == 1


def test_explicit_sigmas_are_shifted_as_the_model_wants(pipes: Mapping[str, QwenImagePipeline]) -> None:
    for name, settings in (("text", "2509"), ("layered", "layered")):
        run, sigmas = arguments(name), RECORDED[f"{name}/sigmas"]
        n = run["num_inference_steps"]
        levels = np.linspace(1, 0, n + 1)[:-1] if name == "layered" else np.linspace(1, 1 / n, n)
        made = pipes[settings]._sigmas(n, levels.tolist(), None, None, "euler",
                                       *((64, 64) if name == "layered" else (80, 48)))  # fmt: skip
        np.testing.assert_allclose(made, sigmas, rtol=1e-6)


@pytest.mark.parametrize("more", ["nothing", "init_image", "mask", "reference_images"])
def test_two_pictures_at_once(pipe: QwenImagePipeline, more: str) -> None:
    given: dict[str, Any] = {"reference_images": [picture()]} if more == "reference_images" else {}
    if more in ("init_image", "mask"):
        given = {"init_image": picture(), "strength": 0.7}
    if more == "mask":
        given["mask_image"] = Image.fromarray(RECORDED["inpaint/mask"])
    run = SMALL | given | {"num_inference_steps": 3}
    both = pipe("a red circle", **run, seed=7, num_images_per_prompt=2)
    assert both.seeds == [7, 8] and not np.array_equal(*both.images)
    for seed, made in zip(both.seeds, both.images, strict=True):
        np.testing.assert_array_equal(made, pipe("a red circle", **run, seed=seed).images[0])


@pytest.mark.parametrize(("width", "height"), [(40, 56), (24, 32)])
def test_sizes_that_are_no_multiple_of_16(pipe: QwenImagePipeline, width: int, height: int) -> None:
    assert pipe("a red circle", **SMALL | {"width": width, "height": height}).images[0].shape == (height, width, 3)


def test_what_the_mask_leaves_stays(pipe: QwenImagePipeline) -> None:
    """To the last bit of the latents, where the rest is drawn anew."""
    half = np.zeros((32, 32), np.uint8)
    half[:, 16:] = 255
    run = SMALL | {"init_image": picture(), "strength": 1.0, "seed": 3, "output_type": "latent"}
    made = pipe("a red circle", **run, mask_image=Image.fromarray(half)).images[0]
    small = picture().resize((32, 32), Image.Resampling.LANCZOS)
    kept = pipe.encode_image(np.asarray(small, np.uint8), make_rng("cpu", 3))
    np.testing.assert_array_equal(made[:, :, :2], kept[:, :, :2])
    assert (made[:, :, 2:] != kept[:, :, 2:]).all()


def test_default_strength(pipe: QwenImagePipeline) -> None:
    run = SMALL | {"init_image": picture(), "num_inference_steps": 5}
    mask = Image.fromarray(RECORDED["inpaint/mask"])
    for more in ({}, {"mask_image": mask}):
        made = pipe("a red circle", **run, **more)
        np.testing.assert_array_equal(made.images[0], pipe("a red circle", **run, **more, strength=0.6).images[0])
        assert len(made.report.step_seconds) == 3


def test_decoding_in_tiles(qwen_files: dict[str, Path], backend: Backend) -> None:
    with models.load(**qwen_files, backend=backend, encoder=True) as pipe:
        run = SMALL | {"width": 64, "height": 48, "reference_images": [picture()]}
        whole = pipe("a red circle", **run).images[0]
        pipe.vae_tile = 4, 4
        tiled = pipe("a red circle", **run)
        assert tiled.report.tiles == {"decode": (4, 4), "encode_image": (4, 4)}
        assert np.abs(tiled.images[0].astype(int) - whole).max() <= 1


# -- what is refused -------------------------------------------------------------------------------------------------

THIN = Image.new("RGB", (16, 8192))
BLACK = Image.new("L", (32, 32))


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [("2509", {"layers": 2}, "makes no layers"), ("layered", {}, "give it as a reference image"),
     ("2509", {"reference_images": [picture()] * 17}, "17 reference pictures; this model takes 16 at most"),
     ("edit", {"reference_images": [picture()] * 2}, "2 reference pictures; this model takes 1 at most"),
     ("layered", {"reference_images": [picture()] * 2}, "2 reference pictures; this model takes 1 at most"),
     ("layered", {"reference_images": [picture()], "layers": 0}, r"layers must be in 1\.\.16, not 0"),
     ("layered", {"reference_images": [picture()], "layers": 17}, r"layers must be in 1\.\.16, not 17"),
     ("layered", {"reference_images": [picture()], "init_image": picture()}, "starts from no picture"),
     ("2509", {"reference_images": [THIN, picture()]}, "16 x 8192 is too thin"),
     ("2509", {"mask_image": BLACK}, "mask_image needs init_image"),
     ("2509", {"mask_image": BLACK, "init_image": picture()}, "the mask has nothing white"),
     ("2509", {"mask_image": "/nonexistent.png", "init_image": picture()}, "cannot read '/nonexistent.png'"),
     ("2509", {"reference_images": ["/nonexistent.png"]}, "cannot read '/nonexistent.png'"),
     ("2509", {"guidance_scale": 2.0}, "Qwen-Image's is true_cfg_scale"),
     ("2509", {"true_cfg_scale": 2.0, "cfg_scale": 2.0}, "give one of them"),
     ("2509", {"latents": np.zeros((16, 3, 3))}, "latents for this size")],
)  # fmt: skip
def test_bad_arguments_are_refused_before_work(
    pipes: Mapping[str, QwenImagePipeline], counted: dict[str, int], name: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipes[name]("never encoded", **SMALL | given)
    assert not any(counted.values())


@pytest.mark.parametrize("given", [{"init_image": picture()}, {"reference_images": [picture()]}])
def test_pictures_need_the_encoder(qwen_files: dict[str, Path], backend: Backend, given: dict[str, Any]) -> None:
    with models.load(**qwen_files, backend=backend) as pipe, pytest.raises(ValueError, match="encoder=True"):
        pipe("a red circle", **SMALL | given)


def test_parts_of_different_models(
    qwen_files: dict[str, Path], layered_files: dict[str, Path], backend: Backend, tmp_path: Path
) -> None:
    with pytest.raises(LoadError, match="an autoencoder of 3 channels, and the transformer makes pictures with trans"):
        models.load(**layered_files | {"vae": qwen_files["vae"]}, backend=backend)
    with pytest.raises(LoadError, match="an autoencoder of 4 channels, and the transformer makes plain pictures"):
        models.load(**qwen_files | {"vae": layered_files["vae"]}, backend=backend)
    other = write_tiny_models(tmp_path)
    with pytest.raises(LoadError, match=r"this is a text encoder \(Qwen3\).*--llm wants a text encoder \(Qwen2.5-VL"):
        models.load(**qwen_files | {"llm": other["llm"]}, backend=backend)
    with pytest.raises(LoadError, match="--vae wants"):
        models.load(**qwen_files | {"vae": other["vae"]}, backend=backend)
    with pytest.raises(ValueError, match="edits no pictures"), models.load(**other, backend=backend) as pipe:
        pipe("a red circle", **SMALL, reference_images=[picture()])
    with pytest.raises(ValueError, match="no layers"), models.load(**other, backend=backend) as pipe:
        pipe("a red circle", **SMALL, layers=2)


# -- memory, cancelling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"params_backend": "te=disk"}, {"params_backend": "*=disk"}, {"memory_limit": 1 << 20}]
)
def test_weights_that_do_not_stay(
    pipe: QwenImagePipeline, qwen_files: dict[str, Path], options: dict[str, Any]
) -> None:
    run = SMALL | {"reference_images": [picture()], "cfg_scale": 2.0, "num_images_per_prompt": 2}
    expected = pipe("a red circle", **run).images
    with models.load(**qwen_files, n_threads=1, encoder=True, variant="2509", **options) as frugal:
        for _ in range(2):
            for ours, theirs in zip(frugal("a red circle", **run).images, expected, strict=True):
                np.testing.assert_array_equal(ours, theirs)
        if "te=disk" in options.values():
            assert frugal.vision and frugal.text_encoder.weights.closed and frugal.vision.weights.closed


@pytest.mark.parametrize("phase", ["text encoder", "step", "decode"])
def test_cancel_at_the_beginning_of_a_phase(pipe: QwenImagePipeline, phase: str) -> None:
    seen: list[str] = []
    pipe._prompts.clear(), pipe._seen.clear()

    def progress(name: str, done: int, total: int) -> None:
        seen.append(name)
        if name == phase and done == 0:
            pipe.cancel()

    run = SMALL | {"reference_images": [picture()]}
    with pytest.raises(Cancelled):
        pipe("a red circle", **run, progress=progress)
    assert seen[-1] == phase
    assert pipe("a red circle", **run).images


@pytest.mark.parametrize("stage", ["the vision tower", "the text encoder", "the encoder", "the modulation",
                                   "the text's projection", "the transformer"])  # fmt: skip
def test_cancel_in_a_stage(qwen_files: dict[str, Path], backend: Backend, stage: str) -> None:
    with models.load(**qwen_files, backend=backend, encoder=True) as pipe:
        run, compute, begun = SMALL | {"reference_images": [picture()]}, pipe._compute, []

        def cancelled(name: str, *more: Any, **inputs: Any) -> Any:
            begun.append(name)
            if name.startswith(stage):
                pipe.cancel()
            return compute(name, *more, **inputs)

        pipe._compute = cancelled
        with pytest.raises(Cancelled):
            pipe("a red circle", **run)
        assert begun[-1].startswith(stage)
        pipe._compute = compute
        again = pipe("a red circle", **run).images[0]
    with models.load(**qwen_files, backend=backend, encoder=True) as fresh:
        np.testing.assert_array_equal(fresh("a red circle", **run).images[0], again)


# -- the command line ------------------------------------------------------------------------------------------------


def run(*argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command, in this process."""
    try:
        code = cli.main(["generate", "a red circle", "-t", "1", *argv])
    except SystemExit as end:  # argparse's
        code = int(end.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


SIZE = ["-W", "32", "-H", "32", "--steps", "2"]


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With 0.png and 1.png, pictures, mask.png and black.png, masks, in it."""
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        picture(i).save(f"{i}.png")
    Image.fromarray(RECORDED["inpaint/mask"]).save("mask.png")
    BLACK.save("black.png")
    return tmp_path


def pixels(name: str) -> Any:
    with Image.open(name) as image:
        return np.asarray(image)


def test_generate(
    pipes: Mapping[str, QwenImagePipeline], qwen_files: dict[str, Path], in_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """From text, from two pictures to edit, and a part of a picture: what the pipeline draws, in a file."""
    edit = pipes["2509"], {"reference_images": ["0.png", "1.png"]}
    mask = pipes["2509"], {"init_image": "0.png", "mask_image": "mask.png", "strength": 0.75}
    for argv, (pipe, given) in {
        (): (pipes["2509"], {}),
        ("-r", "0.png", "-r", "1.png"): edit,
        ("--ref-image", "0.png", "--ref-image", "1.png", "--edit-model", "2509"): edit,
        ("-r", "0.png", "--edit-model", "edit"): (pipes["edit"], {"reference_images": ["0.png"]}),
        ("-r", "0.png", "--edit-model", "2511"): (pipes["2511"], {"reference_images": ["0.png"]}),
        ("-r", "0.png", "--model-args", "qwen_image_zero_cond_t=true"): (
            pipes["2511"], {"reference_images": ["0.png"]}
        ),
        ("-i", "0.png", "--mask", "mask.png"): mask,
    }.items():  # fmt: skip
        code, out, err = run(*as_options(qwen_files), *SIZE, "--cfg-scale", "2", "-s", "3", *argv, capsys=capsys)
        assert (code, out, err) == (0, "output.png\n", ""), argv
        expected = pipe("a red circle", **SMALL, cfg_scale=2.0, seed=3, **given).images[0]
        np.testing.assert_array_equal(pixels("output.png"), expected, err_msg=str(argv))
        with Image.open("output.png") as image:
            text = str(image.info["parameters"])
        assert "Steps: 2" in text and "CFG scale: 2" in text and "Size: 32x32" in text


def test_layers_are_files(layered_files: dict[str, Path], in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*as_options(layered_files), "-r", "0.png", "--steps", "1", "--cfg-scale", "1"]
    code, out, err = run(*argv, "-o", "l.png", "--layers", "2", capsys=capsys)
    assert (code, out.split(), err) == (0, ["l_layer0.png", "l_layer1.png"], "")
    assert [pixels(name).shape for name in out.split()] == [(64, 64, 4)] * 2
    code, out, err = run(*argv, "-o", "b.png", "-b", "2", "--qwen-image-layers", "2", capsys=capsys)
    assert (code, out.split()) == (0, [f"b_{i}_layer{k}.png" for i in range(2) for k in range(2)])
    np.testing.assert_array_equal(pixels("b_0_layer1.png"), pixels("l_layer1.png"))
    code, out, err = run(*argv, "-o", "%02d.png", "--layers", "1", capsys=capsys)
    assert (code, out.split()) == (0, ["00.png"])


def test_a_plan_says_what_edits_take(
    qwen_files: dict[str, Path], in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(*as_options(qwen_files), "-r", "0.png", "--dry-run", capsys=capsys)
    assert (code, err) == (0, "") and sorted(x.name for x in in_folder.glob("output*")) == []
    lines = out.splitlines()
    assert lines[0] == "128x64, 1 thread"  # as large as the picture
    words = [line.split("  ")[0] for line in lines]
    assert words.count("vision tower") == 2  # weights, and a phase
    phases = words[words.index("phase") :]
    assert phases[1:9] == ["vision tower", "text encoder", "text encoder", "image encoder", "text's projection",
                           "text's projection", "modulation", "steps"]  # fmt: skip


REFUSED = [
    (["--layers", "2"], "this model makes no layers"),
    (["-r", "missing.png"], "missing.png"),
    (["--mask", "mask.png"], "--mask needs --init-img"),
    (["-i", "0.png", "--mask", "black.png"], "the mask has nothing white"),
    (["-i", "0.png", "--mask", "missing.png"], "missing.png"),
    (["-r", "0.png", *["-r", "1.png"] * 16], "17 reference pictures; this model takes 16 at most"),
    (["-r", "0.png", "-r", "1.png", "--edit-model", "edit"], "2 reference pictures; this model takes 1 at most"),
    (["--edit-model", "2510"], "invalid choice: '2510'"),
    (["--model-args", "qwen_image_zero_cond_t=maybe"], "only qwen_image_zero_cond_t=true is known"),
    (["--model-args", "qwen_image_zero_cond_t=true", "--edit-model", "2509"], "contradicts --edit-model 2509"),
    (["-r", "0.png", "--llm-vision", "0.png"], "0.png"),
]


@pytest.mark.parametrize(("argv", "message"), REFUSED)
def test_what_the_command_line_refuses(
    qwen_files: dict[str, Path], in_folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    code, out, err = run(*as_options(qwen_files), *SIZE, *argv, capsys=capsys)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith("error: ") and message in err
    assert not (in_folder / "output.png").exists()


def test_what_is_another_models(
    qwen_files: dict[str, Path], layered_files: dict[str, Path], in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    z_image: list[str] = []  # the demo
    for argv, message in (
        ([*z_image, "-r", "0.png"], "this model edits no pictures: there is img2img"),
        ([*z_image, "--layers", "2"], "makes no layers"),
        ([*z_image, "--edit-model", "2509"], "are for Qwen-Image"),
        (as_options(layered_files), "give it as a reference image (-r)"),
        ([*as_options(layered_files | {"vae": qwen_files["vae"]}), "-r", "0.png"], "an autoencoder of 3 channels"),
    ):
        code, out, err = run(*SIZE, *argv, capsys=capsys)
        assert (code, out, len(err.splitlines())) == (2, "", 1) and message in err, err


@pytest.mark.parametrize(("model", "argv", "message"), [
    ("plain", ["--layers", "2"], "this model makes no layers"),
    ("plain", ["-r", "0.png", *["-r", "1.png"] * 16], "this model takes 16 at most"),
    ("plain", ["-r", "0.png", "-r", "1.png", "--edit-model", "edit"], "this model takes 1 at most"),
    ("layered", [], "give it as a reference image (-r)"),
    ("layered", ["-r", "0.png", "-r", "1.png"], "this model takes 1 at most"),
    ("layered", ["-r", "0.png", "--layers", "17"], "layers must be in 1..16, not 17"),
    ("layered", ["-r", "0.png", "-i", "0.png"], "starts from no picture"),
    ("z_image", ["-r", "0.png"], "edits no pictures"), ("z_image", ["--layers", "2"], "makes no layers"),
    ("z_image", ["--llm-vision", "0.png"], "are for Qwen-Image"),
])  # fmt: skip
@pytest.mark.parametrize("command", ["generate", "plan"])
def test_what_a_model_does_not_take_is_refused_before_it_is_loaded(
    qwen_files: dict[str, Path], layered_files: dict[str, Path], in_folder: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, command: str, model: str, argv: list[str], message: str,
) -> None:  # fmt: skip
    """By the head of the diffusion model's file."""
    monkeypatch.setattr(models, "load", None)
    given = {"plain": as_options(qwen_files), "layered": as_options(layered_files), "z_image": []}[model]
    size = [] if model == "layered" else SIZE[:4]
    assert cli.main([command, "a red circle", *given, *size, *argv]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and message in err, err


@pytest.mark.skipif(sys.platform != "linux", reason="memory is looked at by Linux's means")
@pytest.mark.parametrize("more", [
    ["-r", "0.png", "--edit-model", "edit", "-W", "32", "-H", "32"],
    ["-W", "512", "-H", "512", "--vae-tiling", "--vae-tile-size", "16"],
], ids=["edit", "tiles"])  # fmt: skip
def test_the_peak_is_predicted(qwen_files: dict[str, Path], in_folder: Path, more: list[str]) -> None:
    """With references as large as they really are, which tower and autoencoder want the most for; and of tiles."""
    command = [sys.executable, "-m", "studio.cli", "generate", "a red circle", *more, *as_options(qwen_files),
               "--steps", "1", "-t", "1", "--cfg-scale", "1", "--report", "r.json"]  # fmt: skip
    root = str(Path(__file__).parent.parent)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": root})
    report = json.loads(Path("r.json").read_text())
    assert abs(report["predicted"]["peak_rss"] / report["memory"]["peak_rss"] - 1) < 0.1, report["predicted"]
