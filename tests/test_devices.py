"""Which device computes which part of a model: the grammar, and that each part computes where it was told to."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_tiny_models

import models
from models.devices import MODULES, find_device, parse, places
from pyggml import Backend, Graph, devices
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


def test_places_of_parameters(two: tuple[Backend, Backend]) -> None:
    rests = {m: p.rest for m, p in places(two[0], "te=cpu,vae=disk").items()}
    assert rests == {"te": "cpu", "diffusion": "device", "vae": "disk"}
    assert [p.offloads for p in places(two[0], "te=cpu,vae=disk").values()] == [False, False, True]
    with pytest.raises(ValueError, match="params_backend: there is no device 'vulkan9'"):
        places(two[0], "vulkan9")


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
    good = cli(*args, "--backend", "diffusion=cpu", "--clip-on-cpu", "--vae-on-cpu", "-o", str(tmp_path / "b.png"))
    assert good.returncode == 0, good.stderr
    assert (tmp_path / "b.png").exists()
