"""Which device computes which part of a model: the grammar, and that each part computes where it was told to."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import write_tiny_models

import models
from loader.errors import LoadError
from loader.offload import Visit
from loader.upload import Uploader, take
from models.component import Component
from models.devices import MODULES, Place, find_device, parse, places
from pyggml import Backend, Buffer, BufferType, Context, Device, Graph, OutOfMemory, SplitBackend, devices
from pyggml.lib import ffi, lib
from pyggml.types import DeviceType

SMALL: dict[str, Any] = {"width": 32, "height": 32, "num_inference_steps": 2, "output_type": "np"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_tiny_models(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def two() -> Iterator[tuple[Backend, Backend]]:
    with Backend.cpu(1) as a, Backend.cpu(2) as b:
        yield a, b


@pytest.mark.parametrize(
    "text, expected",
    [
        ("cpu", {"te": "cpu", "diffusion": "cpu", "vae": "cpu"}),
        ("te=cpu,diffusion=vulkan0,vae=cpu", {"te": "cpu", "diffusion": "vulkan0", "vae": "cpu"}),
        ("*=cpu", {"te": "cpu", "diffusion": "cpu", "vae": "cpu"}),
        ("diffusion=vulkan0,*=cpu", {"te": "cpu", "diffusion": "vulkan0", "vae": "cpu"}),
        ("clip=disk", {"te": "disk"}),
        (" llm = cpu , vae=disk", {"te": "cpu", "vae": "disk"}),
    ],
)
def test_grammar(text: str, expected: dict[str, str]) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is no name and no MODULE=NAME"),
        ("te=", "is no name and no MODULE=NAME"),
        ("te=cpu,,vae=cpu", "is no name and no MODULE=NAME"),
        ("unet=cpu", "no module 'unet', only te, clip, llm, diffusion, vae and *"),
        ("te=cpu,clip=vulkan0", "te is given twice, as 'cpu' and 'vulkan0'"),
        ("cpu,*=vulkan0", "all modules are given twice, as 'cpu' and 'vulkan0'"),
    ],
)
def test_what_the_grammar_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert message in str(caught.value)


def test_devices_by_name() -> None:
    assert find_device("cPu").type == DeviceType.CPU
    kinds = {device.type for device in devices() if not device.is_remote}
    expected = next(k for k in (DeviceType.GPU, DeviceType.IGPU, DeviceType.CPU) if k in kinds)
    assert find_device("auto").type == expected
    with pytest.raises(ValueError, match=r"--backend: there is no device 'cuda7': this build has .*CPU"):
        find_device("cuda7", "--backend")


def test_a_device_is_opened_once(two: tuple[Backend, Backend]) -> None:
    placed = places("*=cpu,vae=CPU", n_threads=1)
    assert len({id(place.backend) for place in placed.values()}) == 1
    assert placed["te"].backend.n_threads == 1
    assert [place.backend for place in places({"te": two[0], "diffusion": two[1], "vae": two[0]}).values()] == [
        two[0], two[1], two[0],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="none is given for diffusion"):
        places({"te": two[0], "vae": two[0]})
    with pytest.raises(ValueError, match="there is no module clip, only te, diffusion, vae"):
        places({"te": two[0], "diffusion": two[0], "vae": two[0], "clip": two[1]})  # type: ignore[dict-item]


def test_places_of_parameters(two: tuple[Backend, Backend]) -> None:
    rests = {m: p.rest for m, p in places(two[0], "te=cpu,vae=disk").items()}
    assert rests == {"te": "cpu", "diffusion": "device", "vae": "disk"}
    assert [p.offloads for p in places(two[0], "te=cpu,vae=disk").values()] == [False, False, True]
    with pytest.raises(ValueError, match="params_backend: there is no device 'vulkan9'"):
        places(two[0], "vulkan9")


@pytest.mark.parametrize("rest", ["disk", "cpu", "te=disk"])
def test_parameters_of_several_devices_rest_there(two: tuple[Backend, Backend], rest: str) -> None:
    said = f"te computes on CPU&CPU, so its parameters rest there, not on {rest.removeprefix('te=')}$"
    with SplitBackend(two) as both, pytest.raises(ValueError, match=said):
        places(both, rest)


def test_each_module_computes_on_its_own(
    files: dict[str, Path], two: tuple[Backend, Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two
    with models.load(**files, backend=one) as pipe:
        expected = pipe("a red circle", **SMALL).images[0]
    used: list[Backend] = []
    run = Graph.run
    monkeypatch.setattr(Graph, "run", lambda graph: (used.append(graph.backend), run(graph))[1])
    for module in MODULES:
        used.clear()
        chosen = dict.fromkeys(MODULES, one) | {module: other}
        with models.load(**files, backend=chosen) as pipe:
            picture = pipe("a red circle", **SMALL).images[0]
        where = {"te": used[:1], "diffusion": used[1:-1], "vae": used[-1:]}
        assert {m: {id(b) for b in backends} for m, backends in where.items()} == {
            m: {id(chosen[m])} for m in MODULES
        }
        np.testing.assert_array_equal(picture, expected)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Backend]:
    """The backends that are opened in a test."""
    result: list[Backend] = []
    real = Device.open

    def watched(device: Device, n_threads: int | None = None) -> Backend:
        result.append(real(device, n_threads))
        return result[-1]

    monkeypatch.setattr(Device, "open", watched)
    return result


@pytest.mark.parametrize("backend", [None, "te=cpu,diffusion=cpu,vae=cpu"])
def test_close_closes_what_load_opened(files: dict[str, Path], opened: list[Backend], backend: str | None) -> None:
    with models.load(**files, backend=backend) as pipe:
        assert opened and not any(part.closed for part in opened)
        assert {component.backend for component in (pipe.text_encoder, pipe.transformer, pipe.vae)} <= set(opened)
    assert all(part.closed for part in opened)


def test_a_load_that_fails_closes_what_it_opened(
    files: dict[str, Path], opened: list[Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LoadError, match="wants a text encoder"):
        models.load(files["diffusion_model"], files["vae"], files["vae"])
    assert opened and all(part.closed for part in opened)
    opened.clear()

    def refuse(parts: object) -> SplitBackend:
        raise OutOfMemory("no room")

    monkeypatch.setattr("models.devices.SplitBackend", refuse)
    monkeypatch.setattr("models.devices.find_devices", lambda *_: (find_device("cpu"), find_device("cpu")))
    with pytest.raises(OutOfMemory, match="no room"):
        places("cpu&cpu")
    assert opened and all(part.closed for part in opened)


def test_close_leaves_what_was_passed(
    files: dict[str, Path], two: tuple[Backend, Backend], opened: list[Backend]
) -> None:
    for given in (two[0], dict.fromkeys(MODULES, two[0])):
        models.load(**files, backend=given).close()
    assert not opened and not two[0].closed


def test_cancel_reaches_every_backend(files: dict[str, Path], two: tuple[Backend, Backend]) -> None:
    cancelled: list[int] = []

    class Watched(Backend):
        def cancel(self) -> None:
            cancelled.append(self.n_threads)
            super().cancel()

    cpu = two[0].device
    with Watched(cpu, 1) as a, Watched(cpu, 2) as b, Watched(cpu, 3) as c:
        with models.load(**files, backend={"te": a, "diffusion": b, "vae": c}) as pipe:
            pipe.cancel()
    assert sorted(cancelled) == [1, 2, 3]


def test_weights_on_disk_are_read_for_each_use(
    files: dict[str, Path], two: tuple[Backend, Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    with models.load(**files, backend=two[0]) as pipe:
        expected = pipe("a red circle", **SMALL, num_images_per_prompt=2).images
    loads: list[str] = []
    load = Component._load

    def counted(self: Component, at_backend: bool) -> Any:
        loads.append(self._name)
        return load(self, at_backend)

    monkeypatch.setattr(Component, "_load", counted)
    with models.load(**files, backend=two[0], params_backend="disk,vae=cpu") as pipe:
        assert loads == ["qwen3", "z_image", "vae"]  # opened: what is wrong with a file is said now
        assert pipe.text_encoder.weights.closed and pipe.transformer.weights.closed and not pipe.vae.weights.closed
        loads.clear()
        result = pipe("a red circle", negative_prompt="a blue one", guidance_scale=0.5, **SMALL)
        assert loads == ["qwen3", "z_image"]  # both prompts, all steps: one use each
        loads.clear()
        result = pipe("a red circle", **SMALL, num_images_per_prompt=2)
        assert loads == ["z_image", "z_image"]  # the prompt is remembered; each picture is a use
        assert pipe.transformer.weights.closed and not pipe.transformer._graphs
        assert result.report.components["z_image"].n_tensors
    np.testing.assert_array_equal(result.images, expected)


def test_loras_want_weights_that_stay(files: dict[str, Path], two: tuple[Backend, Backend], tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    factors = {"lora_A": np.zeros((1, 64), np.float32), "lora_B": np.zeros((64, 1), np.float32)}
    save_file({f"layers.0.attention.to_q.{k}.weight": v for k, v in factors.items()}, path)
    with models.load(**files, backend=two[0], params_backend="diffusion=disk") as pipe:
        with pytest.raises(ValueError, match="LoRAs want weights that stay"):
            pipe.load_lora_weights(path)


def test_offloaded_weights_visit_the_backend(
    files: dict[str, Path], two: tuple[Backend, Backend], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with models.load(**files, backend=two[0]) as pipe:
        expected = pipe("a red circle", **SMALL).images[0]
    monkeypatch.setattr(Place, "offloads", True)  # as if the backend's memory were another
    caplog.set_level("INFO", "pyggml.loader")
    with models.load(**files, backend=two[0], params_backend="*=cpu") as pipe:
        resting = {name: p.tensor.ptr for name, p in pipe.transformer.module.params().items()}
        picture = pipe("a red circle", **SMALL).images[0]
        np.testing.assert_array_equal(picture, expected)
        with pipe.transformer.in_use() as module:
            assert all(p.tensor.ptr != resting[name] for name, p in module.params().items())
        assert resting == {name: p.tensor.ptr for name, p in pipe.transformer.module.params().items()}
        assert not pipe.transformer.weights.closed
    assert [r.getMessage().split(":")[0] for r in caplog.records if "GB/s" in r.getMessage()] == [
        "qwen3", "z_image", "vae", "z_image",
    ]  # fmt: skip


def test_a_visit_that_fails_leaves_weights_as_they_were(
    files: dict[str, Path], two: tuple[Backend, Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    with models.load(**files, backend=two[0]) as pipe:
        resting = {name: p.tensor.ptr for name, p in pipe.vae.module.params().items()}
        put, count = Uploader.put, iter(range(100))

        def fail(self: Uploader, *args: Any) -> None:
            if next(count) == 5:
                raise OutOfMemory("no room")
            put(self, *args)

        monkeypatch.setattr(Uploader, "put", fail)
        with pytest.raises(OutOfMemory, match="no room"):
            Visit(pipe.vae.weights, two[1])
        assert resting == {name: p.tensor.ptr for name, p in pipe.vae.module.params().items()}
        assert pipe("a red circle", **SMALL).images[0].shape == (32, 32, 3)


@pytest.mark.parametrize("stage", [256, 4096, 1 << 20])
def test_uploads_arrive_whole_in_any_staging(stage: int, two: tuple[Backend, Backend]) -> None:
    """Tensors that fill a staging buffer several times, share one, or end with it."""
    rng = np.random.default_rng(0)
    sizes = [1, 64, 63, 1024, 5000, 3, 4096, 7]
    context = Context(len(sizes))
    tensors = [context.new_tensor((n,), name=str(i)) for i, n in enumerate(sizes)]
    Buffer.allocate(context, two[0].buffer_type)
    values = [rng.normal(size=n).astype(np.float32) for n in sizes]
    with Uploader(two[0].device, stage) as uploader:
        for tensor, value in zip(tensors, values, strict=True):
            uploader.put(tensor, 0, value.nbytes, partial(take, value.view(np.uint8).data))
    assert uploader.n_bytes == sum(v.nbytes for v in values) and uploader.seconds > 0
    for tensor, value in zip(tensors, values, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), value)


def test_nothing_waits_for_a_single_tensor(two: tuple[Backend, Backend], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, int] = {}

    class Counting:
        def __getattr__(self, name: str) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return getattr(lib, name)

    monkeypatch.setattr("loader.upload.lib", Counting())
    context = Context(500)
    tensors = [context.new_tensor((64,), name=str(i)) for i in range(500)]
    Buffer.allocate(context, two[0].buffer_type)
    value = np.arange(64, dtype=np.float32)
    with Uploader(two[0].device, 4096) as uploader:
        for tensor in tensors:
            uploader.put(tensor, 0, value.nbytes, partial(take, value.view(np.uint8).data))
    n_stages = 500 * 256 // 4096 + 1
    assert calls["pyggml_tensor_set_async"] == 500
    assert calls.get("pyggml_synchronize", 0) + calls.get("pyggml_event_synchronize", 0) <= n_stages + 2
    assert uploader.gb_per_second == pytest.approx(uploader.n_bytes / 1e9 / uploader.seconds)
    assert uploader.sentence().startswith("0.00 GB to CPU in ")


@pytest.mark.parametrize("maps", [True, False])
def test_a_device_that_takes_memory_of_the_host_gets_the_mapping(
    files: dict[str, Path], two: tuple[Backend, Backend], monkeypatch: pytest.MonkeyPatch, maps: bool
) -> None:
    """`buffer_from_host_ptr`: nothing is copied, wherever weights are told to rest; else nothing is mapped."""
    monkeypatch.setattr(Device, "maps_host_memory", maps)
    assert Place(two[0], "cpu").offloads == (not maps) and not Place(two[0]).offloads
    with models.load(**files, backend=two[0]) as pipe:
        report = pipe.transformer.weights.report
    assert (report.n_mapped > 0) == maps and (report.n_copied < report.n_tensors) == maps
    assert maps or any("cannot point into a file" in reason for reason in report.not_mapped)


@pytest.mark.parametrize("limit, n_buffers", [(40_000, 1), (25_000, 3), (8192, 6), (8191, 0)])
def test_a_device_that_refuses_one_large_buffer_gets_several(
    limit: int, n_buffers: int, two: tuple[Backend, Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing:
        """The library of a device that gives no buffer larger than `limit`."""

        def __getattr__(self, name: str) -> Any:
            return getattr(lib, name)

        def pyggml_alloc_tensors(self, context: Any, kind: Any) -> Any:
            small = lib.ggml_backend_alloc_ctx_tensors_from_buft_size(context, kind) <= limit
            return lib.pyggml_alloc_tensors(context, kind) if small else ffi.NULL

        def pyggml_alloc_buffer(self, kind: Any, n_bytes: int) -> Any:
            return lib.pyggml_alloc_buffer(kind, n_bytes) if n_bytes <= limit else ffi.NULL

    monkeypatch.setattr("pyggml.backend.lib", Refusing())
    monkeypatch.setattr(BufferType, "is_host", False)
    context = Context(16)
    tensors = [context.new_tensor((n,), name=str(n)) for n in (2048, 1024, 2048, 512, 2048, 2040)]  # 38,912 bytes
    if not n_buffers:
        with pytest.raises(OutOfMemory, match=r"could not allocate 38\d\d\d bytes for 6 tensors"):
            Buffer.allocate(context, two[0].buffer_type)
        assert not any(t.has_data for t in tensors) and not context.buffers
        return
    Buffer.allocate(context, two[0].buffer_type)
    assert len(context.buffers) == n_buffers
    for tensor in tensors:
        tensor.set(np.arange(tensor.ne[0]) + tensor.ne[0])
    for tensor in tensors:
        np.testing.assert_array_equal(tensor.numpy(), np.arange(tensor.ne[0]) + tensor.ne[0])


def cli(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "studio.cli", *args], capture_output=True, text=True, timeout=240)


def test_list_devices_as_sd_cli() -> None:
    run = cli("generate", "--list-devices")
    assert run.returncode == 0, run.stderr
    rows = [line.split("\t") for line in run.stdout.splitlines()]
    assert rows == [[device.name, device.description] for device in devices() if not device.is_remote]


def test_backend_on_the_command_line(tmp_path: Path) -> None:
    bad = cli("generate", "x", "--backend", "te=cpu,diffusion=cuda7", "-o", str(tmp_path / "a.png"))
    assert bad.returncode == 2 and bad.stderr.startswith("error: --backend: there is no device 'cuda7'")
    args = ("generate", "a red circle", "--steps", "1", "-W", "64", "-H", "64")
    good = cli(*args, "--backend", "diffusion=cpu", "--clip-on-cpu", "--vae-on-cpu",
               "--params-backend", "te=Disk,*=CPU", "-o", str(tmp_path / "b.png"))  # fmt: skip
    assert good.returncode == 0, good.stderr
    assert (tmp_path / "b.png").exists()
    for options, message in (
        (("--params-backend", "unet=cpu"), "error: --params-backend 'unet=cpu': there is no module 'unet'"),
        (("--params-backend", "cuda7"), "error: --params-backend: there is no device 'cuda7'"),
        (("--params-backend", "disk", "--offload-to-cpu"), "error: --offload-to-cpu is --params-backend cpu"),
    ):
        bad = cli("generate", "x", *options, "-o", str(tmp_path / "a.png"))
        assert bad.returncode == 2 and bad.stderr.startswith(message), bad.stderr
