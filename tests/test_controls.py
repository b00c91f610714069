"""Controls of the steps, on tiny models of both families: guidance that remembers, step caches, previews."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_models import write_tiny_models, write_tiny_qwen

import models
from models.guidance import APG, CFGZero, Guidance
from models.image import read_image
from models.pipeline import Pipeline
from models.preview import Mode, Projection
from models.room import Room
from models.step_cache import Blocks, DBCache, EasyCache, StepCache, TaylorSeer
from pyggml import Backend, Cancelled
from studio import cli, sampling
from studio.generate import DEMO, DEMO_FILES
from studio.plan import predict_run

RUN: dict[str, Any] = {"width": 32, "height": 32, "num_inference_steps": 4, "output_type": "latent"}


@pytest.fixture(scope="module", params=["z_image", "qwen_image"])
def pipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    write = {"z_image": write_tiny_models, "qwen_image": write_tiny_qwen}[request.param]
    with Backend.cpu(1) as backend:
        with models.load(**write(tmp_path_factory.mktemp(request.param)), backend=backend) as pipe:
            yield pipe


# -- guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [APG(3.0), APG(3.0, norm_threshold=2.0), CFGZero(3.0)], ids=str)
def test_guidance_begins_anew_for_each_picture(pipe: Pipeline, guidance: Guidance) -> None:
    both = pipe("a red circle", **RUN, guidance=guidance, seed=5, num_images_per_prompt=2).images
    for seed, picture in zip((5, 6), both, strict=True):
        again = pipe("a red circle", **RUN, guidance=guidance, seed=seed).images[0]
        np.testing.assert_array_equal(picture, again)
    plain = pipe("a red circle", **RUN, guidance=APG(3.0, eta=1, momentum=0), seed=5).images[0]
    assert np.abs(plain - both[0]).max() > 1e-3


def test_plain_apg_is_cfg_and_cfg_zero_stands_still_first(pipe: Pipeline) -> None:
    seen: list[Any] = []

    def look(pipe: Pipeline, step: int, timestep: float, live: dict[str, Any]) -> dict[str, Any]:
        seen.append(live["latents"])
        return {}

    noise = np.random.default_rng(1).standard_normal((16, 4, 4)).astype(np.float32)
    pipe("a cat", **RUN, guidance=CFGZero(3.0, zero_steps=2), latents=noise, callback_on_step_end=look)
    np.testing.assert_array_equal(seen[1], noise)
    assert np.abs(seen[2] - noise).max() > 1e-3
    with pytest.raises(ValueError, match="guidance is given, and numbers"):
        pipe("a cat", **RUN, guidance=CFGZero(3.0), cfg_scale=2.0)


def test_no_negative_prompt_is_an_empty_one(pipe: Pipeline) -> None:
    """None, "" and nothing given: guided all the same."""
    drawn = [pipe("a cat", **RUN, cfg_scale=3.0, **more).images[0] for more in
             ({}, {"negative_prompt": ""}, {"negative_prompt": None}, {"negative_prompt": "a dog"})]  # fmt: skip
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert np.abs(drawn[0] - drawn[3]).max() > 1e-3
    assert np.abs(drawn[0] - pipe("a cat", **RUN, cfg_scale=1.0, negative_prompt=None).images[0]).max() > 1e-3
    size = {"width": 32, "height": 32, "cfg_scale": 3.0}
    assert pipe.phases("a cat", **size, negative_prompt=None) == pipe.phases("a cat", **size)


def test_guidance_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["-W", "64", "-H", "64", "--steps", "3", "-t", "1", "--cfg-scale", "4"]
    found = {}
    for name, options in {
        "plain": [], "apg": ["--guidance", "apg"], "zero": ["--guidance", "cfg-zero"],
        "args": ["--extra-sample-args", "apg_eta=0,apg_momentum=-0.5"],
        "eta": ["--extra-sample-args", "apg_eta=0"], "number": ["--guidance", "3.5"],
    }.items():  # fmt: skip
        assert cli.main(["generate", "a red circle on blue", *small, *options, "-o", f"{name}.png"]) == 0
        with Image.open(f"{name}.png") as picture:
            found[name] = np.asarray(picture).tobytes(), str(picture.info["parameters"])
    assert "has no effect" in capsys.readouterr().err
    assert found["apg"][0] == found["args"][0] and found["number"][0] == found["plain"][0]
    assert len({picture for picture, _ in found.values()}) == 4
    assert "Guidance: cfg-zero" in found["zero"][1]


@pytest.mark.parametrize(("options", "message"), [
    (["--guidance", "apg"], "needs --cfg-scale above 1"),
    (["--guidance", "best"], "choose from apg, cfg-zero"),
    (["--guidance", "cfg-zero", "--extra-sample-args", "apg_eta=1"], "--guidance cfg-zero has cfg_zero_steps"),
    (["--extra-sample-args", "cfg_zero_steps=1"], "needs --guidance cfg-zero"),
    (["--extra-sample-args", "apg_et=1"], "choose from apg_eta"),
    (["--extra-sample-args", "apg_eta=x"], "'x' is no number"),
    (["--guidance", "cfg-zero", "--cfg-scale", "4", "--extra-sample-args", "cfg_zero_steps=1.5"], "whole number"),
    (["--guidance", "apg", "--cfg-scale", "4", "--extra-sample-args", "apg_norm_threshold=nan"], "finite numbers"),
])  # fmt: skip
def test_bad_options_of_guidance(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    assert cli.main(["generate", "x", *options]) == 2
    assert message in capsys.readouterr().err


# -- step caches ------------------------------------------------------------------------------------------------------

LONG: dict[str, Any] = {**RUN, "num_inference_steps": 10, "cfg_scale": 3.0, "seed": 3}
NEVER = [EasyCache(threshold=0), DBCache(front=1, threshold=0, warmup=0), DBCache(front=1, threshold=0, order=2)]


def drawn(pipe: Pipeline, cache: StepCache | None, **more: Any) -> tuple[Any, dict[str, int]]:
    result = pipe("a red circle", **{**LONG, **more}, cache=cache)
    return result.images[0], result.report.cache


@pytest.mark.parametrize("cache", NEVER, ids=str)
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_a_threshold_of_0_changes_no_byte(pipe: Pipeline, cache: StepCache, method: str) -> None:
    exact, nothing = drawn(pipe, None, method=method)
    kept, counts = drawn(pipe, cache, method=method)
    np.testing.assert_array_equal(kept, exact)
    evaluations = 2 * (10 if method == "euler" else 19)
    assert nothing == {}
    assert counts == {"steps": 10, "steps_skipped": 0, "evaluations": evaluations, "evaluations_skipped": 0}


def test_more_is_skipped_and_errs_more_with_the_threshold(pipe: Pipeline) -> None:
    exact, _ = drawn(pipe, None)
    for make in (
        lambda t: EasyCache(threshold=t, start=0, end=1),
        lambda t: DBCache(front=1, threshold=t, warmup=2),
        lambda t: DBCache(front=1, threshold=t, warmup=2, order=1),
    ):
        skipped, errors = [], []
        for threshold in (0.0, 0.1, 100.0):
            found, counts = drawn(pipe, make(threshold))
            assert counts["steps"] == 10 and counts["evaluations"] == 20
            skipped.append(counts["evaluations_skipped"])
            errors.append(float(np.abs(found - exact).mean()))
        assert skipped == sorted(skipped) and skipped[-1] == 16, skipped
        assert errors == sorted(errors) and errors[-1] > errors[0] == 0, errors


def test_skipped_evaluations_do_not_run_the_network(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    compute = pipe._compute

    def counted(stage: str, graph: Any, **inputs: Any) -> Any:
        ran.append(stage)
        return compute(stage, graph, **inputs)

    pipe("a red circle", **LONG)  # prompts and what is made of them once
    monkeypatch.setattr(pipe, "_compute", counted)
    for cache, per_computed, per_skipped in (
        (EasyCache(threshold=100.0), 1, 0), (TaylorSeer(warmup=2), 1, 0),
        (DBCache(front=1, warmup=2, threshold=100.0), 3, 2),
    ):  # fmt: skip
        ran.clear()
        _, counts = drawn(pipe, cache)
        skipped = counts["evaluations_skipped"]
        stages = [stage for stage in ran if "transformer" in stage]
        assert skipped > 0 and len(stages) == per_computed * (20 - skipped) + per_skipped * skipped


def test_nothing_leaks_into_the_next_picture(pipe: Pipeline) -> None:
    for cache in (EasyCache(threshold=2), TaylorSeer(warmup=2), DBCache(front=1, warmup=2, threshold=2, order=1)):
        result = pipe("a red circle", **LONG, cache=cache, num_images_per_prompt=2)
        apart = [drawn(pipe, cache, seed=seed) for seed in (3, 4)]
        for picture, (again, _) in zip(result.images, apart, strict=True):
            np.testing.assert_array_equal(picture, again)
        assert result.report.cache == {key: sum(counts[key] for _, counts in apart) for key in apart[0][1]}
        assert result.report.cache["evaluations_skipped"] > 0


def test_taylorseer_and_masks_say_which_steps_run(pipe: Pipeline) -> None:
    _, counts = drawn(pipe, TaylorSeer(warmup=2, interval=2))  # 0 1 - - 4 - - 7 - 9
    assert (counts["steps_skipped"], counts["evaluations_skipped"]) == (5, 10)
    mask = tuple(step % 2 == 0 for step in range(10))
    _, counts = drawn(pipe, TaylorSeer(warmup=2, interval=9, mask=mask))  # 0 1 2 - 4 - 6 - 8 9
    assert counts["steps_skipped"] == 3
    for cache in (EasyCache(0, mask=mask, static=True), DBCache(front=1, threshold=0, mask=mask, static=True)):
        assert drawn(pipe, cache)[1]["steps_skipped"] == 5


def test_several_evaluations_a_step(pipe: Pipeline) -> None:
    """Each is asked for on its own; a step is skipped when all of its evaluations are."""
    _, counts = drawn(pipe, TaylorSeer(warmup=2, interval=1), method="heun")  # 0 1 - 3 - 5 - 7 - 9
    assert counts == {"steps": 10, "steps_skipped": 4, "evaluations": 38, "evaluations_skipped": 16}
    _, counts = drawn(pipe, EasyCache(threshold=100.0, start=0.5), method="heun")
    assert counts["steps_skipped"] == 4 and counts["evaluations_skipped"] == 16


def test_as_the_formulas_say(pipe: Pipeline) -> None:
    """EasyCache and TaylorSeer once more, in numpy and double precision, around an Euler loop."""
    cond, levels = pipe.encode("a red circle"), np.linspace(1, 0, 13, dtype=np.float32)
    noise = np.random.default_rng(2).standard_normal((16, 4, 4)).astype(np.float32)

    def mean(a: Any) -> float:
        return float(np.abs(np.asarray(a, np.float64)).mean())

    def easy(threshold: float) -> tuple[Any, int]:
        x, moved, k, n = noise, 0.0, None, 0
        x_last = v_last = x_full = v_full = None
        for i, (s, s_next) in enumerate(pairwise(levels)):
            skip = False
            if k is not None and 1 <= i < 11:
                moved += k * mean(x - x_last) / mean(v_last)
                skip = moved < threshold
            if skip:
                v, n = x + (v_full - x_full), n + 1
            else:
                v = pipe._velocity(x, float(s), context, ())
                k = None if x_full is None else mean(v - v_full) / mean(x - x_full)
                x_full, v_full, moved = x, v, 0.0
            x_last, v_last = x, v
            x = x + v * (s_next - s)
        return x, n

    def taylor() -> Any:
        x, values = noise, []  # type: ignore[var-annotated]
        for i, (s, s_next) in enumerate(pairwise(levels)):
            if i in (4, 5, 7, 8, 10):
                (s0, f0), (s1, f1), (s2, f2) = values[:-4:-1]
                first, second = (f0 - f1) / (s0 - s1), (f1 - f2) / (s1 - s2)
                v = f0 + first * (s - s0) + (first - second) / (s0 - s1) * (s - s0) ** 2 / 2
            else:
                v = pipe._velocity(x, float(s), context, ())
                values.append((s, v))
            x = x + v * (s_next - s)
        return x

    with pipe.transformer.in_use():
        context = pipe._context(cond)
        expected = {t: easy(t) for t in (0.6, 2.0, 6.0)}
        extrapolated = taylor()
    for threshold, (latents, n) in expected.items():
        run = EasyCache(threshold, start=0.1).begin(12)
        np.testing.assert_allclose(pipe.denoise(noise, levels, cond, cache=run), latents, rtol=1e-4, atol=1e-4)
        assert run.counts["evaluations_skipped"] == n
    assert len({n for _, n in expected.values()}) > 1
    run = TaylorSeer(order=2, warmup=4, interval=2).begin(12)
    np.testing.assert_allclose(pipe.denoise(noise, levels, cond, cache=run), extrapolated, rtol=1e-3, atol=1e-3)


def test_dbcache_adds_what_the_middle_added_last(pipe: Pipeline) -> None:
    """A skipped step by hand: the graph's own parts, with the sum of the step before."""
    settings = DBCache(front=1, warmup=1, threshold=1e9)
    run = settings.begin(2)
    context = pipe._context(pipe.encode("a red circle"))
    x = np.random.default_rng(4).standard_normal((16, 4, 4)).astype(np.float32)
    seen: list[dict[str, Any]] = []
    compute = pipe._compute

    def keep(stage: str, graph: Any, **inputs: Any) -> Any:
        seen.append({**inputs, **(out := compute(stage, graph, **inputs))})
        return out

    pipe._compute = keep  # type: ignore[method-assign]
    try:
        for sigma in (0.9, 0.8):
            run.evaluate(0, x, sigma, lambda blocks, s=sigma: pipe._velocity(x, s, context, (), blocks))  # type: ignore[misc]
            run.end_step()
    finally:
        del pipe._compute  # type: ignore[method-assign]
    parts = [one for one in seen if "patches" in one or "x" in one]
    front, middle, _, front2, back2 = parts
    np.testing.assert_allclose(back2["x"], front2["x"] + (middle["x"] - front["x"]), rtol=1e-5, atol=1e-5)
    assert np.abs(front2["x"] - front["x"]).max() > 0


def test_a_cache_that_leaves_nothing_is_refused(pipe: Pipeline) -> None:
    n = pipe.transformer.module.config.n_layers
    with pytest.raises(ValueError, match=f"the network has {n} blocks: 8 at the front"):
        drawn(pipe, DBCache())


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_a_plan_counts_the_graphs_of_a_cache(pipe: Pipeline, cfg_scale: float) -> None:
    """Three for each branch, which all stay, with the buffers that they are then given."""
    cache = DBCache(front=1, warmup=1, threshold=0, order=1)
    prompts: dict[str, Any] = {"negative_prompt": "something else that is a good deal longer, and longer again than it"}
    size, steps = {"width": 64, "height": 64}, {"num_inference_steps": 2, "output_type": "latent"}
    pipe.transformer.close_graphs()
    held, learn = [], Blocks.learn

    def watched(self: Blocks, change: Any, added: Any, sigma: float) -> None:
        learn(self, change, added, sigma)
        kept = [self._change, *(factor for series in self._added.values() for factor in series._factors)]
        held.append(sum(array.nbytes for array in kept if array is not None))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Blocks, "learn", watched)
        pipe("a red circle", **prompts, **size, **steps, cfg_scale=cfg_scale, cache=cache)
    graphs = pipe.transformer._graphs.values()
    assert len(graphs) == (3 if cfg_scale == 1 else 6)
    phases = [x for x in pipe.phases("a red circle", **prompts, **size, cfg_scale=cfg_scale, cache=cache) if x.stays]
    assert [phase.name for phase in phases] == ["front blocks", "middle blocks", "back blocks"] * (len(graphs) // 3)
    assert sorted(phase.buffer for phase in phases) == sorted(graph.buffer_size for graph in graphs)
    n = len(graphs) // 3
    assert max(phase.extra for phase in phases) > sum(held[-n:]) > 0
    plain = [x for x in pipe.phases("a red circle", **prompts, **size, cfg_scale=cfg_scale) if x.stays]
    assert {phase.name for phase in plain} == {"steps"} and plain[0].extra < phases[0].extra
    with pytest.raises(ValueError, match="leave none to skip"):
        pipe.phases("a red circle", **size, cache=DBCache())


def test_a_cache_with_back_blocks_and_weights_that_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the demo, which has three blocks. With too little memory for the weights the bytes are the same."""
    run: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 8, "output_type": "latent"}
    with models.load(*(DEMO / name for name in DEMO_FILES), n_threads=1) as pipe:
        exact = pipe("a red circle", **run).images[0]
        never, often = (DBCache(front=1, back=1, threshold=t, warmup=2, order=1) for t in (0, 0.3))
        np.testing.assert_array_equal(pipe("a red circle", **run, cache=never).images[0], exact)
        skipped = pipe("a red circle", **run, cache=often)
        assert 0 < skipped.report.cache["steps_skipped"] <= 6
        monkeypatch.setattr(pipe.residency, "_find_room", lambda: Room(1 << 20, "a test"))
        again = pipe("a red circle", **run, cache=often)
        np.testing.assert_array_equal(again.images[0], skipped.images[0])
        assert again.report.cache == skipped.report.cache
        if sys.platform == "linux":
            assert any(s.stage == "the transformer" and s.passes for s in again.report.residency.streams)


@pytest.mark.parametrize("make", [
    lambda: EasyCache(threshold=-1), lambda: EasyCache(threshold=float("nan")), lambda: EasyCache(start=0.5, end=0.5),
    lambda: DBCache(front=0), lambda: DBCache(back=-1), lambda: DBCache(warmup=-1), lambda: DBCache(order=5),
    lambda: TaylorSeer(interval=0), lambda: TaylorSeer(order=-1),
])  # fmt: skip
def test_settings_that_cannot_be(make: Any) -> None:
    with pytest.raises(ValueError, match="cache"):
        make()


def test_caches_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["-W", "64", "-H", "64", "--steps", "8", "-t", "1"]
    counts = {}
    for mode, option in {
        "easycache": "threshold=0.5,start=0,end=1", "dbcache": "Fn=1,Bn=1,threshold=0.5,warmup=2",
        "taylorseer": "warmup=2,order=2,interval=1", "cache-dit": "fn=1,threshold=0.5,warmup=2",
    }.items():  # fmt: skip
        options = ["--cache-mode", mode, "--cache-option", option, "--report", "r.json", "-o", f"{mode}.png"]
        assert cli.main(["generate", "a red circle on blue", *small, *options]) == 0
        counts[mode] = json.loads(Path("r.json").read_text())["cache"]
        with Image.open(f"{mode}.png") as picture:
            assert "Cache: " in picture.info["parameters"]
    assert all(c["steps"] == 8 and 0 < c["steps_skipped"] < 8 for c in counts.values()), counts
    assert counts["taylorseer"]["steps_skipped"] == 3


@pytest.mark.parametrize(("options", "message"), [
    (["--cache-option", "threshold=1"], "need --cache-mode"),
    (["--cache-mode", "tea"], "invalid choice: 'tea'"),
    (["--cache-mode", "easycache", "--cache-option", "Fn=1"], "choose from threshold, start, end"),
    (["--cache-mode", "easycache", "--cache-option", "threshold"], "'' is no number"),
    (["--cache-mode", "dbcache", "--cache-option", "Fn=1.5"], "front is a whole number"),
    (["--cache-mode", "dbcache", "--cache-option", "Fn=inf"], "front is a whole number"),
    (["--cache-mode", "dbcache", "--scm-mask", "1,2"], "0s and 1s"),
    (["--cache-mode", "dbcache"], "the network has 3 blocks: 8 at the front"),
    (["--cache-mode", "cache-dit", "--cache-option", "Fn=1,Bn=2"], "the network has 3 blocks: 1 at the front"),
    (["--cache-mode", "easycache", "--cache-option", "threshold=-1"], "not below 0"),
])  # fmt: skip
def test_bad_options_of_caches(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    try:
        code = cli.main(["generate", "x", *options])
    except SystemExit as error:  # argparse's
        code = int(str(error.code))
    assert code == 2 and message in capsys.readouterr().err


# -- previews ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["proj", "vae"])
def test_previews_come_every_n_steps_and_change_nothing(pipe: Pipeline, mode: Mode) -> None:
    found: list[tuple[int, int, Any]] = []
    run = {**RUN, "num_inference_steps": 5, "seed": 3, "height": 48, "num_images_per_prompt": 2, "method": "euler_a"}
    plain = pipe("a red circle", **run)
    shown = pipe("a red circle", **run, preview=mode, preview_interval=2, on_preview=lambda *p: found.append(p))
    for picture, exact in zip(shown.images, plain.images, strict=True):
        np.testing.assert_array_equal(picture, exact)
    assert [(i, step) for i, step, _ in found] == [(0, 1), (0, 3), (1, 1), (1, 3)]
    shape = (6, 4, 3) if mode == "proj" else (48, 32, 3)
    assert all(p.shape == shape and p.dtype == np.uint8 and p.std() > 0 for _, _, p in found)
    report, before = shown.report, plain.report
    assert len(report.preview_seconds) == 4 and min(report.preview_seconds) > 0 and not before.preview_seconds
    assert report.seconds["preview"] == pytest.approx(sum(report.preview_seconds)) and "preview" not in before.seconds
    assert report.seconds["denoise"] > 0 and report.stages["the preview"].runs == (8 if mode == "proj" else 4)


def test_the_seconds_of_a_preview_are_in_no_step(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    for module in ("pipeline", "memory"):
        monkeypatch.setattr(f"models.{module}.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def show(i: int, step: int, picture: Any) -> None:
        now[0] += 100

    report = pipe("a red circle", **RUN, on_preview=show).report
    assert report.preview_seconds == [100] * 4 and report.step_seconds == [0] * 4
    assert (report.seconds["preview"], report.seconds["denoise"]) == (400, 0)


def test_the_last_preview_is_the_picture(pipe: Pipeline) -> None:
    found: list[Any] = []
    latents = pipe("a red circle", **RUN, preview="vae", on_preview=lambda i, step, p: found.append(p)).images[0]
    np.testing.assert_array_equal(found[-1], pipe.decode(latents))
    assert len(found) == 4 and (found[0] != found[-1]).any()


def test_previews_of_layers_are_of_the_whole_picture(tmp_path: Path) -> None:
    found: list[Any] = []
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (32, 32, 3), np.uint8))
    run = {**RUN, "num_inference_steps": 2, "reference_images": [picture], "layers": 2}
    with models.load(**write_tiny_qwen(tmp_path, layered=True), n_threads=1, encoder=True) as pipe:
        latents = pipe("", **run, preview="vae", on_preview=lambda i, step, p: found.append(p)).images[0]
        np.testing.assert_array_equal(found[-1], pipe._decoded(latents[0])[..., :3])
        pipe("", **run, on_preview=lambda i, step, p: found.append(p))
    assert found[-1].shape == (4, 4, 3)


def test_previews_that_cannot_be(pipe: Pipeline) -> None:
    for bad in ({"preview": "none"}, {"preview_interval": 0}):
        with pytest.raises(ValueError, match="preview"):
            pipe("a red circle", **RUN, **bad)

    def fail(i: int, step: int, picture: Any) -> None:
        raise RuntimeError("no more of this")

    with pytest.raises(RuntimeError, match="no more of this"):
        pipe("a red circle", **RUN, on_preview=fail)

    with pytest.raises(Cancelled):
        pipe("a red circle", **RUN, on_preview=lambda i, step, picture: pipe.cancel())
    pipe("a red circle", **RUN)  # as before


def test_a_projection_finds_a_linear_decoder_again() -> None:
    rng = np.random.default_rng(1)
    matrix = np.pad(rng.standard_normal((16, 3)) / 50, ((0, 1), (0, 0)), constant_values=0.5)
    latents = rng.standard_normal((16, 6, 9)).astype(np.float32)

    def decode(drawn: Any) -> Any:
        return Projection(matrix)(drawn).repeat(8, 0).repeat(8, 1)

    found = Projection.of_decoder(decode, latents)
    np.testing.assert_allclose(found.matrix, matrix, atol=2e-3)  # bytes are rounded
    flat = Projection.of_decoder(decode, np.ones((16, 2, 2), np.float32))  # no variance at all
    assert np.isfinite(flat.matrix).all()


def test_projections_of_the_demo_resemble_the_picture() -> None:
    found: list[Any] = []
    small = {"width": 64, "height": 64, "seed": 0, "output_type": "np"}
    with models.load(*(str(DEMO / name) for name in DEMO_FILES), n_threads=1) as pipe:
        prompt = "a large red circle on a blue background"
        picture = pipe(prompt, **small, on_preview=lambda i, step, preview: found.append(preview)).images[0]
    wanted = picture.reshape(8, 8, 8, 8, 3).mean((1, 3))

    def psnr(preview: Any) -> float:
        return float(10 * np.log10(255**2 / np.square(preview - wanted).mean()))

    assert len(found) == 8
    for preview in found[3], found[-1]:  # half of the steps show it already
        assert psnr(preview) > 17
        assert np.corrcoef(preview.ravel(), wanted.ravel())[0, 1] > 0.96
        assert psnr(preview[..., ::-1]) < 10 and psnr(preview.mean((0, 1))) < 13.5  # what these bounds tell apart


def test_previews_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["a large red circle on a blue background", "-W", "64", "-H", "64", "-t", "1", "--steps", "4"]
    found = {}
    for mode in ("none", "proj", "vae"):
        more = ["--preview", mode, "--preview-path", f"{mode}.png", "-o", f"of-{mode}.png", "--report", "report.json"]
        assert cli.main(["generate", *options, *more, "--preview-interval", "2"]) == 0
        found[mode] = Path(f"of-{mode}.png").read_bytes()
        n_previews = len(json.loads(Path("report.json").read_text())["preview_seconds"])
        assert n_previews == (0 if mode == "none" else 2) and Path(f"{mode}.png").exists() == (mode != "none")
    assert found["none"] == found["proj"] == found["vae"]
    pixels = {name: read_image(f"{name}.png", alpha=True) for name in ("vae", "of-vae")}
    np.testing.assert_array_equal(pixels["vae"], pixels["of-vae"])
    with Image.open("proj.png") as picture:
        assert picture.size == (8, 8)
    assert not list(tmp_path.glob(".*"))  # no temporary file
    capsys.readouterr()
    assert cli.main(["plan", *options, "--preview", "proj"]) == 0 and "\npreview " in capsys.readouterr().out
    for bad in (["--preview-path", "x.jpg"], ["--preview-interval", "0"], ["--preview-path", "missing/x.png"],
                ["--preview-path", "output.png"]):  # fmt: skip
        capsys.readouterr()
        assert cli.main(["generate", *options, "--preview", "proj", *bad]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_a_preview_that_cannot_be_written_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def full(path: Path, picture: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("models.image.write_png", full)
    write = sampling._writes(tmp_path / "preview.png")
    write(0, 0, np.zeros((8, 8, 3), np.uint8))
    assert "preview.png cannot be written: No space left on device" in capsys.readouterr().err


def test_a_plan_counts_previews(pipe: Pipeline) -> None:
    def phases(**more: Any) -> dict[str, Any]:
        return {phase.name: phase for phase in pipe.phases("a red circle", width=256, height=256, **more)}

    plain, by_vae, by_colours = phases(), phases(preview="vae"), phases(preview="proj")
    assert [name for name in by_vae if name not in plain] == ["preview"] == list(set(by_colours) - set(plain))
    assert by_vae["preview"].buffer == plain["decoder"].buffer > by_colours["preview"].buffer > 0
    names = [phase.name for phase in predict_run(pipe, "a red circle", width=256, height=256, preview="vae").phases]
    assert names[-3:] == ["steps", "preview", "decoder"]
