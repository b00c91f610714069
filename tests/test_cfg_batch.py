"""Both predictions of guidance in one graph: the same numbers, and when that is done."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tiny_models import as_options, write_tiny_models, write_tiny_qwen

import models
from models.devices import Place
from models.residency import Residency
from models.step_cache import EasyCache
from pyggml import Backend, OutOfMemory
from studio import cli

SMALL: dict[str, Any] = {"width": 48, "height": 32, "num_inference_steps": 2, "output_type": "latent"}
PROMPTS: dict[str, Any] = {"prompt": "a red circle on blue", "negative_prompt": "red"}  # of different lengths


@pytest.fixture
def pipe(qwen_files: dict[str, Path], backend: Backend) -> Iterator[Any]:
    with models.load(**qwen_files, backend=backend) as pipe:
        yield pipe


def drawn(pipe: Any, cfg_batch: bool | Literal["auto"], **more: Any) -> tuple[NDArray[Any], str | None]:
    pipe.cfg_batch = cfg_batch
    result = pipe(**{**PROMPTS, **SMALL, **more})
    return result.images[0], result.report.cfg_batch


def error(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(
    "case", ["text", "odd sides", "references", "at time 0", "layers", "LoRA", "cfg++", "inpainting"]
)
def test_the_same_numbers(
    qwen_files: dict[str, Path], backend: Backend, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.qwen_image.references.AUTOENCODER_AREA", 64 * 64)
    monkeypatch.setattr("models.qwen_image.references.TOWER_AREA", 56 * 56)
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)) for h, w in ((64, 96), (80, 48))]
    more: dict[str, Any] = {
        "odd sides": {"width": 40, "height": 24}, "references": {"reference_images": pictures},
        "at time 0": {"reference_images": pictures[:1]}, "layers": {"reference_images": pictures[:1], "layers": 2},
        "cfg++": {"method": "euler_cfg_pp"}, "inpainting": {"init_image": pictures[0], "mask_image": pictures[1]},
    }.get(case, {})  # fmt: skip
    if case == "layers":
        qwen_files = write_tiny_qwen(tmp_path, layered=True)
    variant = {"at time 0": "2511", "references": "2509"}.get(case)
    options = {"variant": variant} if variant else {}
    with models.load(**qwen_files, backend=backend, encoder=True, **options) as pipe:
        if case == "LoRA":
            from test_lora_qwen import BLOCK, simple

            pipe.set_loras({simple(tmp_path / "x.safetensors", f"{BLOCK}.attn.to_q", f"{BLOCK}.txt_mlp.net.2"): 1})
        expected, how = drawn(pipe, False, **more)
        assert how == "one after the other: as asked"
        actual, how = drawn(pipe, True, **more)
        assert how == "both in one graph: as asked"
        assert error(actual, expected) <= 1e-5
        assert error(drawn(pipe, False, **more | {"negative_prompt": "blue"})[0], expected) > 1e-4  # it takes part


def test_each_prompt_attends_to_itself_alone(pipe: Any) -> None:
    """The order of the two does not matter, nor what the other one is."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((16, 4, 6)).astype(np.float32)
    a, b, c = (rng.standard_normal((n, 64)).astype(np.float32) for n in (5, 3, 9))
    with pipe.transformer.in_use():
        first, second = pipe._velocities(x, 0.5, [a, b])
        assert error(first, pipe._velocity(x, 0.5, a)) <= 1e-5 and error(second, pipe._velocity(x, 0.5, b)) <= 1e-5
        np.testing.assert_array_equal(pipe._velocities(x, 0.5, [c, a])[1], first)
        assert len(pipe._velocities(x, 0.5, [a, b, c])) == 3


def test_auto_is_for_weights_that_are_read_in_each_step(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, how = drawn(pipe, "auto")
    assert how == "one after the other: the weights stay in memory"
    monkeypatch.setattr(Residency, "reads_again", lambda self, graph: True)
    actual, how = drawn(pipe, "auto")
    assert how == "both in one graph: the weights are read in each step" and error(actual, expected) <= 1e-5
    actual, how = drawn(pipe, "auto", cache=EasyCache(threshold=0))
    assert how == "one after the other: a step cache decides for each"
    assert drawn(pipe, "auto", cfg_scale=1)[1] is None


def test_without_memory_for_both(pipe: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    expected, _ = drawn(pipe, False)
    build = pipe._graph_for

    def graph_for(x: Any, contexts: Any, references: Any) -> Any:
        graph = build(x, contexts, references)
        if len(contexts) == 2:
            monkeypatch.setattr(graph, "alloc", lambda: (_ for _ in ()).throw(OutOfMemory("9 GB wanted")))
        return graph

    monkeypatch.setattr(pipe, "_graph_for", graph_for)
    actual, how = drawn(pipe, True)
    assert how == "one after the other: no memory for both at once (9 GB wanted)" and "9 GB wanted" in caplog.text
    np.testing.assert_array_equal(actual, expected)


def test_on_a_device_that_weights_come_to_in_each_step(
    qwen_files: dict[str, Path], backend: Backend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The device is a second backend of the processor that is treated as if its memory were another."""
    monkeypatch.setattr(Place, "offloads", True)
    with Backend.cpu(1) as device, models.load(
        **qwen_files, backend=device, max_vram=1 << 30, params_backend="cpu"
    ) as pipe:  # fmt: skip
        pipe.cfg_batch = "auto"
        roomy = pipe(**PROMPTS, **SMALL)
        assert roomy.report.cfg_batch == "one after the other: the weights stay in memory"
        first = roomy.report.vram["qwen_image"]

        def drawn_within(n_bytes: int, cfg_batch: bool | Literal["auto"]) -> Any:
            pipe.transformer.place = replace(pipe.transformer.place, max_vram=n_bytes)
            pipe.cfg_batch = cfg_batch
            result = pipe(**PROMPTS, **SMALL)
            seen = result.report.vram["qwen_image"]
            assert 0 < seen.peak <= n_bytes
            assert error(result.images[0], roomy.images[0]) <= 1e-5
            return result.report.cfg_batch, seen.passes, seen.uploaded_bytes

        # Room for buffers and a share of the weights.
        tight = first.compute + first.weights // 2
        how, passes, uploaded = drawn_within(tight, "auto")
        assert how == "both in one graph: the weights are read in each step"
        how, more_passes, more_uploaded = drawn_within(tight, False)
        assert how == "one after the other: as asked" and more_passes > passes and more_uploaded > uploaded


@pytest.mark.parametrize("size", [(48, 32), (40, 24)])
def test_z_image(tmp_path: Path, backend: Backend, size: tuple[int, int]) -> None:
    # Contexts of 32 and of 64 tokens.
    more = {"cfg_scale": 3.0, "width": size[0], "height": size[1], "negative_prompt": "red " * 40}
    with models.load(**write_tiny_models(tmp_path), backend=backend) as pipe:
        expected, how = drawn(pipe, False, **more)
        assert how == "one after the other: as asked"
        actual, how = drawn(pipe, True, **more)
        assert how == "both in one graph: as asked"
        assert error(actual, expected) <= 1e-5
        assert error(drawn(pipe, False, **more | {"negative_prompt": "blue"})[0], expected) > 1e-4  # it takes part
        x = np.random.default_rng(1).standard_normal((16, 4, 6)).astype(np.float32)
        contexts = [np.random.default_rng(n).standard_normal((n, 64)).astype(np.float32) for n in (32, 64, 96)]
        with pipe.transformer.in_use():
            for i, found in enumerate(pipe._velocities(x, 0.5, contexts)):
                assert error(found, pipe._velocity(x, 0.5, contexts[i])) <= 1e-5


def test_on_the_command_line(qwen_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    model = as_options(qwen_files)
    for option, how in (("on", "both in one graph: as asked"), ("off", "one after the other: as asked")):
        code = cli.main(["generate", "a", "-o", str(tmp_path / "x.png"), "--report", str(report), "-W", "32",
                         "-H", "32", "--steps", "1", "-t", "1", "--cfg-batch", option, *model])  # fmt: skip
        assert code == 0, capsys.readouterr().err
        assert json.loads(report.read_text())["cfg_batch"] == how
