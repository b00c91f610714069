"""Vulkan, on Mesa's lavapipe and with `-m gpu` on a true GPU: pictures as the processor's, uploads, what goes wrong."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

import models
from loader.checkpoint import open_checkpoint
from loader.save import save_checkpoint
from loader.upload import Uploader
from models.devices import find_device
from models.nn import Module, linear
from models.qwen3 import Qwen3, Qwen3Config
from models.tokenizer import Tokenizer
from models.z_image.transformer import ZImageConfig, ZImageTransformer
from pyggml import Backend, Buffer, Context, Device, Graph, Op, Type, devices, ops, quantize
from pyggml.compare import first_difference
from pyggml.lib import FOLDER, lib

ROOT = Path(__file__).parents[1]
DEMO = {
    key: ROOT / "studio" / "demo" / name
    for key, name in (
        ("diffusion_model", "z_image_demo.gguf"), ("llm", "qwen3_demo.gguf"), ("vae", "ae_demo.safetensors")
    )
}  # fmt: skip
DRAW: dict[str, Any] = dict(
    prompt="a red circle on a blue background", height=32, width=32, num_inference_steps=2, output_type="np"
)
TYPES = [Type.F16, Type.Q8_0, Type.Q4_K]
# The rest of the suite is to compute on the processor, also where `auto` is asked for: only here is lavapipe shown.
LAVAPIPE = {"GGML_VK_VISIBLE_DEVICES": "0", "VK_LOADER_DRIVERS_SELECT": "*lvp*"}


def device() -> Device:
    """The first of Vulkan's devices."""
    return next(d for d in devices() if d.name.startswith("Vulkan"))


def description() -> str:
    return next((d.description for d in devices() if d.name.startswith("Vulkan")), "")


def start(environment: Mapping[str, str]) -> tuple[ProcessPoolExecutor, str]:
    """A process with other variables, and what its first Vulkan device is."""
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        return pool, pool.submit(description).result()


@pytest.fixture(scope="module", params=["lavapipe", pytest.param("gpu", marks=pytest.mark.gpu)])
def process(request: pytest.FixtureRequest) -> Iterator[ProcessPoolExecutor]:
    """A process that has one Vulkan device: ggml looks for them once, when it is loaded."""
    if not json.loads((FOLDER / "build.json").read_text())["vulkan"]:
        pytest.skip("built without --vulkan: python build.py --vulkan")
    pool, found = start(LAVAPIPE if request.param == "lavapipe" else {})
    with pool:
        if not found:
            pytest.skip(f"Vulkan finds no {request.param}")
        assert request.param != "lavapipe" or "llvmpipe" in found
        yield pool


def call(name: str, arguments: dict[str, Any]) -> None:
    try:
        globals()[name].__wrapped__(**arguments)
    except AssertionError as error:  # pytest rewrites none there
        raise AssertionError(f"{error}") from None


def on_vulkan(test: Callable[..., None]) -> Callable[..., None]:
    """A test whose body runs in the process of `process`; its other arguments are sent there."""

    def run(process: ProcessPoolExecutor, **arguments: Any) -> None:
        process.submit(call, test.__name__, arguments).result()

    functools.update_wrapper(run, test)
    import inspect

    wanted = inspect.signature(test).parameters.values()
    extra = inspect.Parameter("process", inspect.Parameter.KEYWORD_ONLY)
    run.__signature__ = inspect.Signature([*wanted, extra])  # type: ignore[attr-defined]
    return run


def decibels(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The peak being the range of `b`."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(np.ptp(b.astype(np.float64)) ** 2 / error)) if error else np.inf


# -- pictures --------------------------------------------------------------------------------------------------------


def write_random(module: Module, path: Path, seed: int) -> Path:
    """A network of random weights, f32: matrices that keep the length of vectors, everything else near 1 or 0."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, param in module.named_params():
        shape = param.ne[::-1]
        values = rng.standard_normal(shape, np.float32)
        tensors[name] = values / np.sqrt(param.ne[0]) if len(shape) > 1 else values * 0.1 + ("norm" in name)
    save_file({k: np.ascontiguousarray(v, np.float32) for k, v in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models wide enough for q4_K, in each type: transformer_q4_k.gguf, encoder_q4_k.gguf and so on."""
    folder = tmp_path_factory.mktemp("wide")
    transformer = ZImageTransformer(
        ZImageConfig(
            dim=256, n_heads=4, head_dim=64, n_layers=2, n_noise_refiners=1, n_context_refiners=1, ff_dim=768,
            caption_dim=256, patch_dim=64, t_hidden=512, adaln_dim=256, axes_dims=(16, 24, 24), fused_qkv=True,
        )
    )  # fmt: skip
    encoder = Qwen3(Qwen3Config(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64, ff_dim=768, n_vocab=399))
    for name, module in (("transformer", transformer), ("encoder", encoder)):
        whole = write_random(module, folder / f"{name}.safetensors", len(name))
        with open_checkpoint(whole) as checkpoint:
            for kind in TYPES:
                save_checkpoint(checkpoint, folder / f"{name}_{kind.name.lower()}.gguf", type=kind)
    return folder


def files_of(folder: Path, kind: Type) -> dict[str, Path]:
    name = kind.name.lower()
    return {
        "diffusion_model": folder / f"transformer_{name}.gguf", "llm": folder / f"encoder_{name}.gguf",
        "vae": DEMO["vae"],
    }  # fmt: skip


@contextmanager
def loaded(files: Mapping[str, Path], backend: Backend, **options: Any) -> Iterator[Any]:
    """A pipeline on one backend. On lavapipe it computes each graph operation by operation.

    Mesa 22.3.6, Debian 12's, ends the process now and then in command buffers of several dispatches: its thread calls a
    function that is none, or the heap is broken. With one operation at a time that was never seen.
    """
    with open_checkpoint(DEMO["llm"]) as checkpoint:
        tokenizer = Tokenizer.for_checkpoint(checkpoint)
    with models.load(**files, backend=backend, tokenizer=tokenizer, **options) as pipe:
        if "llvmpipe" in backend.device.description:
            pipe.look = lambda _, graph: graph.run_pieces(range(1, len(graph.nodes)), lambda i: None)
        yield pipe


@pytest.mark.parametrize("flash", [True, False], ids=["flash", "plain"])
@pytest.mark.parametrize("kind", TYPES, ids=lambda t: t.name)
@on_vulkan
def test_pictures_as_the_processors(folder: Path, kind: Type, flash: bool) -> None:
    """All three modules there, of one checkpoint: 40 dB and better."""
    pictures = []
    with Backend.cpu(2) as cpu, device().open() as gpu:
        gpu.flash_attention = flash
        for backend in (cpu, gpu):
            with loaded(files_of(folder, kind), backend) as pipe:
                pictures.append(pipe(**DRAW).images[0])
                if backend is gpu:
                    ops_used = {node.op for node in list(pipe.transformer._graphs.values())[0].nodes}
                    assert (Op.FLASH_ATTN_EXT in ops_used) == flash
    assert pictures[0].std() > 10
    difference = decibels(pictures[1], pictures[0])
    print(f"{kind.name}, flash {flash}: {difference:.1f} dB")
    assert difference > 40, difference
