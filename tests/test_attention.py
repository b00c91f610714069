"""Attention as one operation: on by default, the same result as step by step, and off where there is no such thing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tiny_models import write_tiny_models, write_tiny_qwen

import models
from models import nn
from models.pipeline import Pipeline
from pyggml import Backend, Graph, ops
from pyggml.lib import lib
from pyggml.types import Op, Prec, Type
from studio.cli import main

TOLERANCE = 1e-5  # of latents, relative to the largest value
RUN: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 2, "cfg_scale": 2.0, "output_type": "latent"}

Drawn = tuple[NDArray[np.float32], list[Any]]


@pytest.fixture(scope="module", params=["z_image", "qwen_image"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    write = {"z_image": write_tiny_models, "qwen_image": write_tiny_qwen}[request.param]
    return write(tmp_path_factory.mktemp(request.param))


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend.cpu(1) as backend:
        yield backend


def drawn(files: dict[str, Path], backend: Backend, patch: pytest.MonkeyPatch) -> Drawn:
    """Latents, and the nodes of everything that was computed for them and then decoded."""
    nodes: list[Any] = []
    compute = Pipeline._compute

    def watched(self: Pipeline, stage: str, graph: Graph, **inputs: Any) -> Any:
        nodes.extend((node.op, lib.ggml_flash_attn_ext_get_prec(node.ptr) if node.op == Op.FLASH_ATTN_EXT else None)
                     for node in graph.nodes)  # fmt: skip
        return compute(self, stage, graph, **inputs)

    with patch.context() as inner, models.load(**files, backend=backend) as pipe:
        inner.setattr(Pipeline, "_compute", watched)
        latents = pipe("a red circle", **RUN).images[0]
        pipe.decode(latents)
    return latents, nodes


def close_to(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE, f"relative error {error:.2e}"


def test_it_is_on_unless_switched_off(
    files: dict[str, Path], backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the processor: our kernel where nothing is masked, ggml's in the text encoder."""
    assert Backend.flash_attention
    latents, nodes = drawn(files, backend, monkeypatch)
    assert not any(op == Op.SOFT_MAX for op, _ in nodes)
    assert any(op == Op.FLASH_ATTN_EXT for op, _ in nodes)  # the text encoder's is masked
    backend.flash_attention = False
    plain, nodes = drawn(files, backend, monkeypatch)
    assert any(op == Op.SOFT_MAX for op, _ in nodes) and not any(op == Op.FLASH_ATTN_EXT for op, _ in nodes)
    assert not np.array_equal(plain, latents)
    close_to(latents, plain)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs as for other devices, but for GELU: ggml's looks it up by a value in f16, and what is next to a border
    there moves by more than all of attention's sums.
    """
    monkeypatch.setattr(Backend, "is_cpu", False)
    monkeypatch.setattr(ops, "gelu", ops.silu)


@pytest.mark.usefixtures("elsewhere")
def test_other_devices_sum_in_f32(files: dict[str, Path], backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    latents, nodes = drawn(files, backend, monkeypatch)
    assert {prec for op, prec in nodes if op == Op.FLASH_ATTN_EXT} == {Prec.F32}
    assert not any(op == Op.SOFT_MAX for op, _ in nodes)
    backend.flash_attention = False
    close_to(latents, drawn(files, backend, monkeypatch)[0])


@pytest.mark.usefixtures("elsewhere")
def test_a_device_without_it(files: dict[str, Path], backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who builds a graph asks the device for each: step by step there."""
    supports = Backend.supports
    expected, _ = drawn(files, backend, monkeypatch)
    monkeypatch.setattr(Backend, "supports", lambda self, x: x.op != Op.FLASH_ATTN_EXT and supports(self, x))
    latents, nodes = drawn(files, backend, monkeypatch)
    assert any(op == Op.SOFT_MAX for op, _ in nodes) and not any(op == Op.FLASH_ATTN_EXT for op, _ in nodes)
    close_to(latents, expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("head_dim", "n_heads", "n_kv_heads"), [(128, 6, 6), (128, 6, 2), (80, 2, 2), (384, 1, 1)])
def test_shapes_of_all_models(backend: Backend, head_dim: int, n_heads: int, n_kv_heads: int, masked: bool) -> None:
    """Z-Image's and Qwen-Image's heads, the encoders' shared ones, the vision tower's, the autoencoder's one."""
    rng, n = np.random.default_rng(head_dim), 75
    values = {name: rng.standard_normal((n, heads, head_dim)).astype(np.float32) * size
              for name, heads, size in (("q", n_heads, 3), ("k", n_kv_heads, 3), ("v", n_kv_heads, 100))}  # fmt: skip
    future = np.triu(np.full((n, n), -np.inf, np.float16), 1)
    found = []
    for flash in (True, False):
        backend.flash_attention = flash
        with Graph(backend) as graph:
            q, k, v = (graph.input(x.shape[::-1], name=name) for name, x in values.items())
            mask = graph.input((n, n), Type.F16, name="mask") if masked else None
            graph.output(nn.attention(q, k, v, mask), name="y")
            assert any(node.op == Op.SOFT_MAX for node in graph.nodes) is not flash
            found.append(graph.compute(**values, **({"mask": future} if masked else {}))["y"])
    group = n_heads // n_kv_heads
    scores = np.einsum("qhd,khd->hqk", values["q"].astype(np.float64), np.repeat(values["k"], group, 1)) / head_dim**0.5
    scores = np.exp(scores + (future if masked else 0) - scores.max(-1, keepdims=True))
    exact = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), np.repeat(values["v"], group, 1))
    for y in found:
        close_to(y, exact.reshape(n, -1).astype(np.float32))


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["a red circle on blue", "-W", "64", "-H", "64", "--steps", "2", "-t", "1"]
    pictures = {}
    for name, options in {"default": [], "sd-cli's": ["--diffusion-fa"], "on": ["--fa"], "off": ["--no-fa"]}.items():
        assert main(["generate", *small, *options, "-o", str(tmp_path / "x.png")]) == 0
        with Image.open(tmp_path / "x.png") as picture:
            pictures[name] = np.asarray(picture).astype(int)
    assert (pictures["default"] == pictures["on"]).all() and (pictures["default"] == pictures["sd-cli's"]).all()
    assert np.abs(pictures["off"] - pictures["default"]).max() <= 1
    capsys.readouterr()
    private = {}
    for option in ("--flash-attention", "--no-flash-attention"):
        assert main(["plan", "x", "-W", "512", "-H", "512", option, "--json"]) == 0
        phases = json.loads(capsys.readouterr().out)["phases"]
        private[option] = next(phase["private"] for phase in phases if phase["name"] == "steps")
    n_heads, n_tokens = 4, 1024
    assert private["--no-flash-attention"] - private["--flash-attention"] > n_heads * n_tokens**2
