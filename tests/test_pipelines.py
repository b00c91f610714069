"""The whole pipeline: against recorded runs of diffusers', and what it promises beside numbers."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_models import golden, weight, write_tiny_models

import models
from loader.errors import LoadError
from models.guidance import ZImageGuidance
from models.qwen3 import Qwen3
from models.rng import make_rng
from models.sampler import SAMPLERS
from models.schedule import SCHEDULES, after_strength, sigmas
from models.z_image import ZImagePipeline
from pyggml import Backend, Cancelled, NonFinite

TOLERANCE = 1e-4  # relative to the largest value
RECORDED = golden("pipeline")
RUNS: dict[str, dict[str, Any]] = json.loads(str(RECORDED["runs"]))
SMALL: dict[str, Any] = {"width": 32, "height": 32, "num_inference_steps": 2, "output_type": "np"}


@pytest.fixture(scope="module")
def pipe(z_image_files: dict[str, Path], backend: Backend) -> Iterator[ZImagePipeline]:
    with models.load(**z_image_files, backend=backend, encoder=True) as pipe:
        yield pipe


@pytest.fixture
def fresh(z_image_files: dict[str, Path], backend: Backend) -> Iterator[ZImagePipeline]:
    """A pipeline that no other test has used."""
    with models.load(**z_image_files, backend=backend) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def sd_cpp(z_image_files: dict[str, Path], backend: Backend) -> Iterator[ZImagePipeline]:
    with models.load(**z_image_files, backend=backend, compat="sd.cpp", encoder=True) as pipe:
        yield pipe


def close_to(actual: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    error = np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"relative error {error:.2e}"


def arguments(run: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {"steps": "num_inference_steps"}
    return {renamed.get(k, k): v for k, v in run.items()} | {"output_type": "np"}


# -- against diffusers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_equals_diffusers(pipe: ZImagePipeline, name: str) -> None:
    run = arguments(RUNS[name])
    taken: list[np.ndarray[Any, Any]] = []
    times: list[float] = []

    def look(_: ZImagePipeline, step: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
        assert step == len(taken)
        taken.append(tensors["latents"].copy())
        times.append(timestep)
        return {}

    if "strength" in run:
        run["init_image"] = Image.fromarray(RECORDED[f"{name}/init_image"])
    if run.pop("mask", None):
        run["mask_image"] = Image.fromarray(RECORDED[f"{name}/mask"])
    result = pipe(**run, callback_on_step_end=look)

    close_to(pipe.encode(run["prompt"]).features, RECORDED[f"{name}/prompt_embeds"])
    if f"{name}/negative_embeds" in RECORDED:
        close_to(pipe.encode(run.get("negative_prompt", "")).features, RECORDED[f"{name}/negative_embeds"])
    expected = [RECORDED[k] for k in sorted(RECORDED) if k.startswith(f"{name}/latents_")]
    assert len(taken) == len(expected) > 0
    for ours, theirs in zip(taken, expected, strict=True):
        close_to(ours, theirs)
    np.testing.assert_allclose(times, 1000 * RECORDED[f"{name}/sigmas"][-len(times) - 1 : -1], rtol=1e-6)
    if f"{name}/image" in RECORDED:
        picture = RECORDED[f"{name}/image"]
        assert np.abs(result.images[0] / 255 - picture).max() <= 0.5 / 255 + 1e-4 * picture.max()


def test_decoded_picture_before_rounding(pipe: ZImagePipeline) -> None:
    for name in ("turbo", "base", "img2img"):
        last = max(k for k in RECORDED if k.startswith(f"{name}/latents_"))
        picture = pipe.vae.module.decode(pipe.vae.backend, RECORDED[last]).transpose(1, 2, 0)
        close_to(np.clip(picture, 0, 1), RECORDED[f"{name}/image"])


def test_initial_latents(pipe: ZImagePipeline) -> None:
    """Noise of torch's CPU generator; for img2img the posterior's draw first, from the same generator."""
    for name in ("turbo", "base"):
        start = RECORDED[f"{name}/start"]
        np.testing.assert_allclose(make_rng("cpu", RUNS[name]["seed"]).randn(start.shape), start, atol=1e-6)
    run, start = RUNS["img2img"], RECORDED["img2img/start"]
    levels = after_strength(sigmas("diffusers", run["steps"], shift=run["shift"]), run["strength"])
    rng = make_rng("cpu", run["seed"])
    image = pipe.encode_image(RECORDED["img2img/init_image"], rng)
    close_to(levels[0] * rng.randn(start.shape) + (1 - levels[0]) * image, start)


def test_default_strength_is_that_of_each_pipeline(pipe: ZImagePipeline) -> None:
    run = SMALL | {"init_image": Image.fromarray(RECORDED["img2img/init_image"]), "num_inference_steps": 5}
    for more, steps in (({}, 3), ({"mask_image": Image.fromarray(RECORDED["inpaint/mask"])}, 5)):
        assert len(pipe("a red circle", **run, **more).report.step_seconds) == steps


def test_stages_one_by_one_equal_the_whole(pipe: ZImagePipeline) -> None:
    whole = pipe("a red circle", **SMALL, seed=5, guidance_scale=2.0, negative_prompt=" blue").images[0]
    cond, uncond = pipe.encode("a red circle"), pipe.encode(" blue")
    noise = make_rng("cpu", 5).randn((16, 4, 4))
    latents = pipe.denoise(noise, sigmas("diffusers", 2), cond, uncond, guidance=ZImageGuidance(2.0))
    np.testing.assert_array_equal(pipe.decode(latents), whole)
    # embeddings and latents as plain arrays
    arrays = cond.features.copy(), uncond.features.copy()
    again = pipe.denoise(noise, sigmas("diffusers", 2), *arrays, guidance=ZImageGuidance(2.0))
    np.testing.assert_array_equal(again, latents)
    for given in (cond, cond.features.copy()):
        result = pipe(
            "never read", **SMALL | {"output_type": "latent"}, prompt_embeds=given,
            negative_prompt_embeds=uncond.features, guidance_scale=2.0, latents=noise,
        )  # fmt: skip
        np.testing.assert_array_equal(result.images[0], latents)


# -- batches, sizes, schedules, methods ------------------------------------------------------------------------------


def test_batch(pipe: ZImagePipeline) -> None:
    seen: list[tuple[int, int]] = []
    look = lambda i, seed, _: seen.append((i, seed))  # noqa: E731
    result = pipe("a red circle", **SMALL, seed=7, num_images_per_prompt=3, on_image=look)
    assert result.seeds == [7, 8, 9] and seen == [(0, 7), (1, 8), (2, 9)]
    for seed, picture in zip(result.seeds, result.images, strict=True):
        np.testing.assert_array_equal(picture, pipe("a red circle", **SMALL, seed=seed).images[0])
    assert len(result.report.step_seconds) == 6 and result.report.seconds["decode"] > 0


@pytest.mark.parametrize("compat", ["diffusers", "sd.cpp"])
def test_batch_from_a_picture(pipe: ZImagePipeline, sd_cpp: ZImagePipeline, compat: str) -> None:
    """Every picture of diffusers has a posterior of its own; stable-diffusion.cpp encodes once, with the first seed."""
    used = pipe if compat == "diffusers" else sd_cpp
    image = Image.fromarray(RECORDED["img2img/init_image"][:32, :32])
    run = SMALL | {"output_type": "latent", "init_image": image, "strength": 0.5, "num_inference_steps": 4}
    both = used("a red circle", **run, seed=7, num_images_per_prompt=2).images
    np.testing.assert_array_equal(both[0], used("a red circle", **run, seed=7).images[0])
    second = used("a red circle", **run, seed=8).images[0]
    assert np.array_equal(both[1], second) is (compat == "diffusers")
    assert not np.array_equal(both[0], both[1])


@pytest.mark.parametrize(("width", "height"), [(24, 40), (72, 32), (32, 120)])
def test_sizes_that_are_no_multiple_of_16(pipe: ZImagePipeline, width: int, height: int) -> None:
    run = SMALL | {"width": width, "height": height}
    picture = pipe("a red circle", **run).images[0]
    assert picture.shape == (height, width, 3)
    # the network sees a picture padded with zeros
    x = make_rng("cpu", 3).randn((16, height // 8, width // 8))
    h, w = x.shape[1:]
    larger = np.pad(x, ((0, 0), (0, h % 2), (0, w % 2)))
    context = pipe._context(pipe.encode("a red circle"))
    np.testing.assert_array_equal(pipe._velocity(x, 0.5, context), pipe._velocity(larger, 0.5, context)[:, :h, :w])


@pytest.mark.parametrize(
    ("name", "value"), [("width", 30), ("height", 8), ("width", 8192), ("height", 0), ("width", -32), ("width", 32.0)]
)
def test_bad_sizes(pipe: ZImagePipeline, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a multiple of 8 in 16..4096"):
        pipe("a red circle", **SMALL | {name: value})


def test_explicit_sigmas(pipe: ZImagePipeline, sd_cpp: ZImagePipeline) -> None:
    """As each program takes them: before the shift and without the 0, or as they are and with it."""
    times: list[float] = []

    def look(_: ZImagePipeline, step: int, timestep: float, tensors: Mapping[str, Any]) -> dict[str, Any]:
        times.append(timestep / 1000)
        return {}

    pipe("a red circle", **SMALL, sigmas=[1.0, 0.5, 0.25], callback_on_step_end=look)
    np.testing.assert_allclose(times, [1.0, 0.75, 0.5], rtol=1e-6)
    times.clear()
    sd_cpp("a red circle", **SMALL, sigmas=[1.0, 0.5, 0.25, 0.0], callback_on_step_end=look)
    np.testing.assert_allclose(times, [1.0, 0.5, 0.25], rtol=1e-6)
    for used, bad in ((pipe, [1.0, 0.5, 0.0]), (pipe, [0.5, 0.7]), (pipe, []), (sd_cpp, [1.0, 0.5]), (pipe, [2.0])):
        with pytest.raises(ValueError, match="sigmas must"):
            used("never encoded", **SMALL, sigmas=bad)
    assert ("diffusers", "never encoded", ()) not in pipe._prompts


@pytest.mark.parametrize("method", SAMPLERS)
def test_every_method_draws(pipe: ZImagePipeline, method: str) -> None:
    run = SMALL | {"num_inference_steps": 3, "method": method}
    first, again, other = (pipe("a red circle", **run, seed=seed).images[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_draws(pipe: ZImagePipeline, name: str) -> None:
    """With two steps, some schedules are the default one."""
    picture = pipe("a red circle", **SMALL, scheduler=name).images[0]
    same = name in ("diffusers", "lightning", "simple", "lcm")
    assert np.array_equal(picture, pipe("a red circle", **SMALL).images[0]) is same


def test_cfg_plus_plus_uses_the_unguided_estimate(pipe: ZImagePipeline) -> None:
    """x = guided + (x - unguided) * s_next / s, also with guidance off: then cond is the guided one."""
    cond, uncond = pipe.encode("a red circle"), pipe.encode(" blue")
    x, levels = make_rng("cpu", 0).randn((16, 4, 4)), sigmas("diffusers", 2)
    for g in (0.0, 1.5):
        expected = x
        for s, s_next in pairwise(levels):
            v = [pipe._velocity(expected, float(s), pipe._context(c)) for c in (cond, uncond)]
            unguided = expected - s * v[1]
            expected = expected - s * (v[0] + np.float32(g) * (v[0] - v[1])) + (expected - unguided) * (s_next / s)
        guidance = ZImageGuidance(g) if g else None
        latents = pipe.denoise(x, levels, cond, uncond, guidance=guidance, method="euler_cfg_pp")
        close_to(latents, expected, 1e-5)
    with pytest.raises(ValueError, match="negative prompt"):
        pipe.denoise(x, levels, cond, method="euler_cfg_pp")
    with pytest.raises(ValueError, match="negative prompt"):
        pipe.denoise(x, levels, cond, guidance=ZImageGuidance(1.0))


def test_guidance_in_both_dialects(pipe: ZImagePipeline, sd_cpp: ZImagePipeline) -> None:
    run = SMALL | {"output_type": "latent", "negative_prompt": " blue"}
    free = pipe("a red circle", **run).images[0]
    assert np.array_equal(free, pipe("a red circle", **run, guidance_scale=-0.5).images[0])  # off, as in diffusers
    assert not np.array_equal(free, pipe("a red circle", **run, guidance_scale=0.5).images[0])
    # --cfg-scale 0.5 and 0 mix in stable-diffusion.cpp: at 0 only the negative prompt counts
    half, none = (sd_cpp("a red circle", **run, guidance_scale=g).images[0] for g in (-0.5, -1.0))
    assert not np.array_equal(half, sd_cpp("a red circle", **run).images[0])
    close_to(none, sd_cpp(" blue", **run).images[0], 1e-5)


def test_defaults_of_stable_diffusion_cpp(pipe: ZImagePipeline, sd_cpp: ZImagePipeline) -> None:
    assert pipe.transformer.module.config.qk_norm_eps == 1e-5 and sd_cpp.transformer.module.config.qk_norm_eps == 1e-6
    whole = sd_cpp("a red circle", **SMALL, seed=3).images[0]
    same = sd_cpp("a red circle", **SMALL, seed=3, scheduler="discrete", rng="cuda", shift=3.0).images[0]
    np.testing.assert_array_equal(whole, same)
    for other in ({"scheduler": "simple"}, {"rng": "cpu"}, {"shift": 6.0, "scheduler": "simple"}):
        assert not np.array_equal(whole, sd_cpp("a red circle", **SMALL, seed=3, **other).images[0])
    # only there do brackets weigh words, and are long prompts kept whole
    plain, weighted = sd_cpp.encode("a red circle").features, sd_cpp.encode("a( red circle:1.5)").features
    assert weighted.shape == plain.shape and not np.allclose(weighted, plain)
    assert len(pipe.encode("a( red circle:1.5)").features) > len(plain)
    assert len(sd_cpp.encode("x" * 600).features) > 512 == len(pipe.encode("x" * 600).features)


# -- callbacks, cancelling, caching ----------------------------------------------------------------------------------


def test_callback_replaces_latents(pipe: ZImagePipeline) -> None:
    other = make_rng("cpu", 99).randn((16, 4, 4))

    def replace(_: ZImagePipeline, step: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
        assert set(tensors) == {"latents"} and tensors["latents"].shape == (16, 4, 4)
        return {"latents": other} if step == 0 else tensors

    replaced = pipe("a red circle", **SMALL, callback_on_step_end=replace).images[0]
    cond = pipe.encode("a red circle")
    by_hand = pipe.decode(pipe.denoise(other, sigmas("diffusers", 2)[1:], cond))
    np.testing.assert_array_equal(replaced, by_hand)


@pytest.mark.parametrize(
    ("returned", "message"),
    [(None, "must return a dict"), ([1], "must return a dict"), ({"prompt_embeds": 1}, "must return a dict"),
     ({"latents": np.zeros((16, 2, 2))}, "shape")],
)  # fmt: skip
def test_callback_must_return_a_dict(pipe: ZImagePipeline, returned: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe("a red circle", **SMALL, callback_on_step_end=lambda *_: returned)
    assert pipe("a red circle", **SMALL).images  # and goes on being usable


def test_not_finite_latents_from_a_callback(pipe: ZImagePipeline) -> None:
    poison = np.full((16, 4, 4), np.nan, np.float32)
    with pytest.raises(NonFinite, match="the transformer at sigma"):
        pipe("a red circle", **SMALL, callback_on_step_end=lambda *_: {"latents": poison})


@pytest.mark.parametrize("step", [0, 1])
def test_cancel_from_the_callback(pipe: ZImagePipeline, step: int) -> None:
    """After the last step too: decoding takes long."""
    before = pipe("a red circle", **SMALL).images[0]
    steps: list[int] = []

    def stop(pipe: ZImagePipeline, i: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(i)
        if i == step:
            pipe.cancel()
        return tensors

    with pytest.raises(Cancelled):
        pipe("a red circle", **SMALL, callback_on_step_end=stop)
    assert steps == list(range(step + 1))
    np.testing.assert_array_equal(pipe("a red circle", **SMALL).images[0], before)


@pytest.mark.parametrize("phase", ["text encoder", "step", "decode"])
def test_cancel_at_the_beginning_of_a_phase(fresh: ZImagePipeline, phase: str) -> None:
    seen: list[str] = []

    def progress(name: str, done: int, total: int) -> None:
        seen.append(name)
        if name == phase and done == 0:
            fresh.cancel()

    with pytest.raises(Cancelled):
        fresh("a red circle", **SMALL, progress=progress)
    assert seen[-1] == phase
    assert fresh("a red circle", **SMALL).images


def test_cancel_from_another_thread(pipe: ZImagePipeline) -> None:
    started, stopped = threading.Event(), []

    def progress(name: str, done: int, total: int) -> None:
        if name == "step":
            started.set()

    def stop() -> None:
        started.wait(10)
        time.sleep(0.05)
        stopped.append(time.perf_counter())
        pipe.cancel()

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Cancelled):
        pipe("a red circle", **SMALL | {"width": 256, "height": 256, "num_inference_steps": 500}, progress=progress)
    took = time.perf_counter() - stopped[0]
    thread.join()
    assert took < 2, f"{took:.2f} s"  # 500 such steps take a minute
    assert pipe("a red circle", **SMALL).images


def test_cancel_when_nothing_runs_does_nothing(pipe: ZImagePipeline) -> None:
    pipe.cancel()
    latents = pipe.denoise(make_rng("cpu", 0).randn((16, 4, 4)), sigmas("diffusers", 2), pipe.encode("a red circle"))
    pipe.cancel()
    assert pipe.decode(latents).shape == (32, 32, 3)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of the text encoder had."""
    calls: list[int] = []
    encode = Qwen3.encode

    def counted(self: Qwen3, backend: Backend, ids: Any, *more: Any) -> Any:
        calls.append(len(ids))
        return encode(self, backend, ids, *more)

    monkeypatch.setattr(Qwen3, "encode", counted)
    return calls


def test_no_prompt_is_encoded_twice(fresh: ZImagePipeline, encoded: list[int]) -> None:
    first = fresh("a red circle", **SMALL)
    assert len(encoded) == 1 and not first.report.prompt_cached
    second = fresh("a red circle", **SMALL, num_images_per_prompt=2)
    assert len(encoded) == 1 and second.report.prompt_cached
    np.testing.assert_array_equal(first.images[0], second.images[0])
    fresh("a red circle", **SMALL, guidance_scale=1.0)
    assert len(encoded) == 2  # the negative prompt, with guidance alone
    fresh("a red circle", **SMALL, guidance_scale=1.0)
    fresh.encode("a red circle"), fresh.encode("")
    assert len(encoded) == 2
    fresh("something else", **SMALL, prompt_embeds=fresh.encode("a red circle"))
    assert len(encoded) == 2
    # a cancelled or failed run does not spoil what is remembered
    with pytest.raises(ValueError, match="must return a dict"):
        fresh("a red circle", **SMALL, callback_on_step_end=lambda *_: None)  # type: ignore[arg-type, return-value]
    np.testing.assert_array_equal(fresh("a red circle", **SMALL).images[0], first.images[0])


def test_the_cache_of_prompts_is_bounded(fresh: ZImagePipeline, encoded: list[int]) -> None:
    from models.pipeline import CACHED_PROMPTS

    for i in range(CACHED_PROMPTS + 5):
        fresh.encode(f"prompt {i}")
        fresh.encode("prompt 0")  # used again and again: stays
    assert len(encoded) == CACHED_PROMPTS + 5 and len(fresh._prompts) == CACHED_PROMPTS
    fresh.encode("prompt 1")
    assert len(encoded) == CACHED_PROMPTS + 6


@pytest.mark.parametrize(
    ("argument", "message"),
    [({"method": "nonsense"}, "unknown sampling method"), ({"rng": "dice"}, "unknown random generator"),
     ({"scheduler": "nonsense"}, "unknown schedule"), ({"num_inference_steps": 0}, "at least 1 step"),
     ({"guidance_scale": float("nan")}, "finite"), ({"seed": -1}, "seed"), ({"seed": 2**64}, "seed"),
     ({"num_images_per_prompt": 0}, "num_images"), ({"output_type": "tiff"}, "output_type"),
     ({"method": "euler", "eta": 0.5}, "takes no eta"), ({"latents": np.zeros((16, 3, 3))}, "latents"),
     ({"shift": -1.0}, "shift"), ({"init_image": "/nonexistent.png"}, "cannot read"),
     ({"init_image": Image.new("RGB", (32, 32)), "strength": 0.0}, "strength")],
)  # fmt: skip
def test_bad_arguments_are_refused_before_work(
    fresh: ZImagePipeline, encoded: list[int], argument: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fresh("a red circle", **SMALL | argument)
    assert not encoded


@pytest.mark.parametrize("bad", [np.zeros((4, 63)), np.zeros(64), np.zeros((0, 64)), np.full((4, 64), np.inf)])
def test_bad_embeddings(pipe: ZImagePipeline, bad: Any) -> None:
    with pytest.raises(ValueError, match="prompt embeddings"):
        pipe("", **SMALL, prompt_embeds=bad)


def test_img2img_needs_the_encoder(fresh: ZImagePipeline) -> None:
    with pytest.raises(ValueError, match="encoder=True"):
        fresh("a red circle", **SMALL, init_image=Image.new("RGB", (32, 32)))


# -- never a silent blank picture ------------------------------------------------------------------------------------

NAN = np.float32("nan")
FF = "context_refiner.1.feed_forward.w1.weight"
POISONED = [
    ("llm", "layers.1.mlp.up_proj.weight", "blk.1.ffn_up.weight", "the text encoder"),
    ("diffusion_model", FF, FF, "the caption's refiner"),
    ("diffusion_model", "layers.0.attention.to_out.0.weight", "layers.0.attention.out.weight",
     "the transformer at sigma 1.0000"),
    ("vae", "decoder.up_blocks.1.resnets.0.conv1.weight", "decoder.up.2.block.0.conv1.", "the decoder"),
    ("vae", "encoder.conv_in.weight", "encoder.conv_in.", "the encoder"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "tensor", "named", "stage"), POISONED)
def test_poisoned_weights_are_named_by_stage(
    tmp_path: Path, backend: Backend, part: str, tensor: str, named: str, stage: str
) -> None:
    bad = weight(part, tensor)
    bad.flat[7] = NAN
    image = Image.fromarray(RECORDED["img2img/init_image"]) if "encoder" in tensor else None
    with models.load(**write_tiny_models(tmp_path, {f"{part}/{tensor}": bad}), backend=backend, encoder=True) as pipe:
        with pytest.raises(NonFinite, match=f"^{stage}: [0-9]+ of [0-9]+ values are not finite$"):
            pipe("a red circle", **SMALL, init_image=image)
        pipe.find_bad_op = True
        # the first bad operation is the one that the poisoned weight, or a convolution's bias, goes into
        with pytest.raises(NonFinite, match=f"^{stage}: .* the first bad operation is <.* of .*{re.escape(named)}"):
            pipe("a red circle", **SMALL, init_image=image)


def test_overflow_in_the_latents(pipe: ZImagePipeline) -> None:
    with pytest.raises(NonFinite, match=r"step 1|the transformer"):
        pipe.denoise(np.full((16, 4, 4), 3e38, np.float32), sigmas("diffusers", 2), pipe.encode("a red circle"))


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_a_constant_picture_is_refused(tmp_path: Path, backend: Backend, value: float) -> None:
    changed = {
        "vae/decoder.conv_out.weight": np.zeros_like(weight("vae", "decoder.conv_out.weight")),
        "vae/decoder.conv_out.bias": np.full(3, value, np.float32),
    }
    with models.load(**write_tiny_models(tmp_path, changed), backend=backend) as pipe:
        with pytest.raises(NonFinite, match="one colour"):
            pipe("a red circle", **SMALL)
        assert pipe("a red circle", **SMALL | {"output_type": "latent"}).images


# -- files -----------------------------------------------------------------------------------------------------------

WHAT = {"diffusion_model": r"diffusion model \(Z-Image\)", "llm": r"text encoder \(Qwen3\)",
        "vae": r"autoencoder \(Flux autoencoder\)"}  # fmt: skip


@pytest.mark.parametrize("given", WHAT)
@pytest.mark.parametrize("option", WHAT)
def test_swapped_files_say_what_they_are(
    z_image_files: dict[str, Path], backend: Backend, option: str, given: str
) -> None:
    if option == given:
        return
    flag = {"diffusion_model": "--diffusion-model"}.get(option, f"--{option}")
    with pytest.raises(LoadError, match=f"this is an? {WHAT[given]}.*{flag} wants") as error:
        models.load(**z_image_files | {option: z_image_files[given]}, backend=backend)
    assert error.value.path == os.fspath(z_image_files[given])


def test_parts_that_do_not_belong_together(z_image_files: dict[str, Path], tmp_path: Path, backend: Backend) -> None:
    narrow = {f"diffusion_model/{name}": weight("diffusion_model", name)[..., :32]
              for name in ("cap_embedder.0.weight", "cap_embedder.1.weight")}  # fmt: skip
    other = write_tiny_models(tmp_path, narrow)
    with pytest.raises(LoadError, match="have 64 numbers, the transformer wants 32"):
        models.load(**z_image_files | {"diffusion_model": other["diffusion_model"]}, backend=backend)


def rewrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\0")


@pytest.mark.parametrize("part", WHAT)
@pytest.mark.parametrize("change", [rewrite, append])
def test_weights_that_change_during_a_run(
    tmp_path: Path, backend: Backend, part: str, change: Callable[[Path], None]
) -> None:
    paths = write_tiny_models(tmp_path)

    def touch(_: ZImagePipeline, step: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            time.sleep(0.02)  # file systems tell times apart in steps of some milliseconds
            change(paths[part])
        return tensors

    with models.load(**paths, backend=backend) as pipe:
        assert pipe("a red circle", **SMALL).images
        with pytest.raises(LoadError, match="changed while it was used") as error:
            pipe("a red circle", **SMALL, callback_on_step_end=touch)
        assert error.value.kind == "WeightsChanged" and str(paths[part]) in str(error.value)
        steps: list[int] = []
        with pytest.raises(LoadError, match="changed while it was used"):
            pipe("a red circle", **SMALL, callback_on_step_end=lambda _p, i, _t, x: steps.append(i) or x)  # type: ignore[func-returns-value]
        assert not steps  # and the next run does not even begin


def test_a_replaced_file_is_not_a_changed_one(tmp_path: Path, backend: Backend) -> None:
    """A download that moves a new file over the old one leaves ours as it was."""
    paths = write_tiny_models(tmp_path / "used")
    others = write_tiny_models(tmp_path / "other")
    with models.load(**paths, backend=backend) as pipe:
        before = pipe("a red circle", **SMALL).images[0]
        others["vae"].rename(paths["vae"])
        np.testing.assert_array_equal(pipe("a red circle", **SMALL).images[0], before)


def test_close_twice(z_image_files: dict[str, Path], backend: Backend) -> None:
    pipe = models.load(**z_image_files, backend=backend)
    pipe("a red circle", **SMALL)
    pipe.close()
    pipe.close()
    with pytest.raises(Exception, match="closed"):
        pipe("a red circle", **SMALL)
