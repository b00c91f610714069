"""Vulkan, on Mesa's lavapipe and with `-m gpu` on a true GPU: pictures as the processor's, uploads, what goes wrong."""

from __future__ import annotations

import ctypes
import functools
import inspect
import json
import os
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
from test_streaming import limit_each

import models
from loader.checkpoint import open_checkpoint
from loader.save import save_checkpoint
from models.nn import Module, linear
from models.qwen3 import Qwen3, Qwen3Config
from models.tokenizer import Tokenizer
from models.z_image.transformer import ZImageConfig, ZImageTransformer
from pyggml import Backend, Buffer, Context, Device, GGMLError, Graph, Op, Type, devices, ops
from pyggml.lib import FOLDER

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
pytestmark = pytest.mark.timeout(1500)  # lavapipe compiles shaders again and again


def device() -> Device:
    """The first of Vulkan's devices."""
    return next(d for d in devices() if d.name.startswith("Vulkan"))


def description() -> str:
    return next((d.description for d in devices() if d.name.startswith("Vulkan")), "")


def start(environment: Mapping[str, str]) -> tuple[ProcessPoolExecutor, str]:
    """A process with other variables, and what its first Vulkan device is."""
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    with pytest.MonkeyPatch.context() as patch:
        for key in ("VK_LOADER_DRIVERS_DISABLE", "GGML_VK_VISIBLE_DEVICES"):  # tests/conftest.py hides all devices
            patch.delenv(key, raising=False)
        for key, value in environment.items():
            patch.setenv(key, value)
        return pool, pool.submit(description).result()


@pytest.fixture(scope="module")
def lavapipe() -> dict[str, str]:
    """The variables of a process that has lavapipe as its one device. Before Mesa 23.3 it wants vulkan_loader.c."""
    if sys.platform != "linux":
        pytest.skip("lavapipe is tested on Linux")
    return {"GGML_VK_VISIBLE_DEVICES": "0", "VK_LOADER_DRIVERS_SELECT": "*lvp*"}


@pytest.fixture(scope="module")
def failing(lavapipe: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same, behind vulkan_shim.c."""
    shim = tmp_path_factory.mktemp("shim") / "vulkan_shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, Path(__file__).with_name("vulkan_shim.c")], check=True)
    return lavapipe | {"LD_PRELOAD": str(shim)}


@pytest.fixture(scope="module", params=["lavapipe", pytest.param("gpu", marks=pytest.mark.gpu)])
def process(request: pytest.FixtureRequest) -> Iterator[ProcessPoolExecutor]:
    """A process that has one Vulkan device: ggml looks for them once, when it is loaded."""
    if not json.loads((FOLDER / "build.json").read_text())["vulkan"]:
        pytest.skip("built without --vulkan: python build.py --vulkan")
    pool, found = start(request.getfixturevalue("lavapipe") if request.param == "lavapipe" else {})
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
            text_dim=256, patch_dim=64, t_hidden=512, adaln_dim=256, axes_dims=(16, 24, 24), fused_qkv=True,
        )
    )  # fmt: skip
    encoder = Qwen3(Qwen3Config(dim=256, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=64, ff_dim=768, n_vocab=399))
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
    with open_checkpoint(DEMO["llm"]) as checkpoint:
        tokenizer = Tokenizer.for_checkpoint(checkpoint)
    with models.load(**files, backend=backend, tokenizer=tokenizer, **options) as pipe:
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
                    ops_used = {node.op for node in next(iter(pipe.transformer._graphs.values())).nodes}
                    assert (Op.FLASH_ATTN_EXT in ops_used) == flash
    assert pictures[0].std() > 10
    difference = decibels(pictures[1], pictures[0])
    print(f"{kind.name}, flash {flash}: {difference:.1f} dB")
    assert difference > 40, difference


@on_vulkan
def test_a_lora_at_run_time_and_merged(folder: Path) -> None:
    """The same picture either way, of f16 weights: 45 dB and better."""
    rng = np.random.default_rng(3)
    tensors = {}
    for layer, (n_in, n_out) in {"attention.out": (256, 256), "feed_forward.w2": (768, 256)}.items():
        for i in range(2):
            name = f"diffusion_model.layers.{i}.{layer}"
            tensors[f"{name}.lora_A.weight"] = rng.standard_normal((8, n_in), np.float32) / np.sqrt(np.float32(n_in))
            tensors[f"{name}.lora_B.weight"] = rng.standard_normal((n_out, 8), np.float32) / 4
    lora = folder / "lora.safetensors"
    save_file(tensors, lora)
    pictures = []
    with device().open() as gpu:
        for mode in ("at_runtime", "immediately"):
            with loaded(files_of(folder, Type.F16), gpu, lora_apply_mode=mode) as pipe:
                if not pictures:
                    pictures.append(pipe(**DRAW).images[0])
                pipe.set_loras({lora: 1.0})
                pictures.append(pipe(**DRAW).images[0])
    without, at_runtime, merged = pictures
    assert decibels(without, merged) < 35, "the LoRA does nothing"
    assert decibels(at_runtime, merged) > 45, decibels(at_runtime, merged)


# -- weights ---------------------------------------------------------------------------------------------------------


@on_vulkan
def test_uploads_arrive_and_their_rate_is_reported() -> None:
    with Backend.cpu(1) as cpu, device().open() as gpu:
        with models.load(**DEMO, backend=cpu) as here, models.load(**DEMO, backend=gpu) as there:
            for part in ("text_encoder", "transformer", "vae"):
                ours, theirs = (getattr(pipe, part).module.params() for pipe in (here, there))
                report = getattr(there, part).weights.report
                loaded_here = {name: p.tensor for name, p in ours.items() if p.loaded}
                assert report.uploaded_bytes == sum(t.n_bytes for t in loaded_here.values())
                assert report.to_dict()["upload_gb_per_second"] > 0 and report.n_mapped == 0
                for name, tensor in loaded_here.items():
                    assert np.array_equal(tensor.numpy(), theirs[name].tensor.numpy()), name


@on_vulkan
def test_a_third_of_the_weights_fits(folder: Path) -> None:
    """`--max-vram`: the picture of all of them on the device, and never more bytes there than allowed."""
    files = files_of(folder, Type.F16)
    with Backend.cpu(2) as cpu, device().open() as gpu:
        with loaded(files, cpu) as pipe:
            expected = pipe(**DRAW).images[0]
        with loaded(files, gpu, params_backend="cpu", max_vram=1 << 30) as pipe:
            roomy = pipe(**DRAW)
            limit_each(pipe, roomy.report.vram, lambda weights: weights // 3)
            tight = pipe(**DRAW)
    for name, seen in tight.report.vram.items():
        assert seen.peak <= seen.limit < roomy.report.vram[name].peak, name
        assert seen.uploaded_bytes >= seen.per_pass > 0, name
        print(f"{name}: {seen.weights} bytes, {seen.peak} of {seen.limit} taken, {seen.uploaded_bytes} uploaded")
    differences = [decibels(picture, expected) for picture in (roomy.images[0], tight.images[0])]
    print(", ".join(f"{difference:.1f} dB" for difference in differences))
    assert min(differences) > 40, differences


@pytest.mark.parametrize("kind", TYPES, ids=lambda t: t.name)
@on_vulkan
def test_long_products(kind: Type) -> None:
    """10,240 terms, as in a feed-forward layer of full size: 55 dB and better; 37 dB when sums are in f16."""
    rng = np.random.default_rng(0)
    n_in, n_out, n_tokens = 10240, 64, 33
    w, x = rng.standard_normal((n_out, n_in), np.float32) / 100, rng.standard_normal((n_tokens, n_in), np.float32)
    with device().open() as gpu, Context(n_tensors=1) as context, Graph(gpu, 16) as graph:
        weight = context.new_tensor((n_in, n_out), kind)
        Buffer.allocate(context, gpu.buffer_type)
        weight.set(w)
        graph.output(linear(weight, graph.input((n_in, n_tokens), name="x")), "y")
        y = graph.compute(x=x)["y"]
        exact = x.astype(np.float64) @ weight.numpy().astype(np.float64).T
    assert decibels(y, exact) > 55, decibels(y, exact)


# -- what goes wrong -------------------------------------------------------------------------------------------------


def lose(how: int) -> str:
    """What is raised when the device fails in a computation, and then in another one that should succeed."""
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    said = []
    with device().open() as gpu, Graph(gpu, 16) as graph:
        graph.output(ops.scale(graph.input((64,), name="x"), 2.0), "y")
        graph.compute(x=np.ones(64))
        for value in (how, 0):
            library.fail(value)
            try:
                if how == OUT_OF_DEVICE_MEMORY:
                    with Context(n_tensors=1) as context:
                        context.new_tensor((1 << 20,))
                        Buffer.allocate(context, gpu.buffer_type)
                        for buffer in context.buffers:
                            buffer.close()
                        context.buffers.clear()
                said.append(f"{graph.compute(x=np.ones(64))['y'].sum()}")
            except GGMLError as error:
                said.append(f"{type(error).__name__}: {error}")
    return "\n".join(said)


OUT_OF_DEVICE_MEMORY, DEVICE_LOST = -2, -4


@pytest.mark.parametrize(
    ("how", "first", "then"),
    [
        (OUT_OF_DEVICE_MEMORY, "OutOfMemory: a context: Vulkan0 could not allocate 4194304 bytes", "128.0"),
        (DEVICE_LOST, "DeviceLost: Vulkan0, computing", "DeviceLost: Vulkan0 was lost before: Vulkan0, computing"),
    ],
)
def test_a_device_that_fails(process: Any, failing: dict[str, str], how: int, first: str, then: str) -> None:
    """An exception of Vulkan's is one of ours: without memory the device stays usable, a lost one does not."""
    pool, found = start(failing)
    with pool:
        if not found:
            pytest.skip("Vulkan finds no lavapipe")
        said = pool.submit(lose, how).result().splitlines()
    assert said[0].startswith(first) and said[1].startswith(then), said
