"""Files that are truncated, rewritten, regrown, replaced or unlinked while they are used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_params import f32, save
from tiny_models import write_tiny_models

import models
from loader import LoadError, LoadOptions, MappedFile, Param, load_params, open_checkpoint
from pyggml import Backend, Graph, Type, ops

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="mapped files cannot shrink there")

SIDE = 1024


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


def truncate_elsewhere(path: Path) -> None:
    """By another process."""
    subprocess.run([sys.executable, "-c", f"import os; os.truncate({str(path)!r}, 5000)"], check=True)


def rewrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(os.urandom(64))


def write_anew(path: Path) -> None:
    size = path.stat().st_size
    with open(path, "wb") as file:
        file.write(bytes(size))


def regrow(path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, 0)
    os.truncate(path, size)


def replace(path: Path) -> None:
    other = path.with_suffix(".other")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)


def unlink(path: Path) -> None:
    path.unlink()


CHANGES = (truncate, truncate_elsewhere, rewrite, write_anew, regrow)
HARMLESS = (replace, unlink)
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with Backend.cpu(2) as backend:
        yield backend


@pytest.fixture
def path(tmp_path: Path) -> Path:
    w = np.random.default_rng(3).standard_normal((SIDE, SIDE)) / SIDE**0.5
    path = save(tmp_path / "w.safetensors", {"w": f32(w), "v": f32(w)})
    os.utime(path, ns=(0, 0))  # written long ago: clocks of file systems are coarse
    return path


def power(backend: Backend, w: Any, n: int) -> Graph:
    """W^n x: reads W n times."""
    graph = Graph(backend, n + 8)
    y = graph.input((SIDE, 1), name="x")
    for _ in range(n):
        y = ops.mul_mat(w, y)
    graph.output(y, name="y")
    return graph


@pytest.mark.parametrize("change", [*CHANGES, *HARMLESS])
def test_while_a_graph_computes(path: Path, backend: Backend, change: Change) -> None:
    x = np.random.default_rng(4).standard_normal((1, SIDE)).astype(np.float32)
    with open_checkpoint(path) as checkpoint:
        params = {"w": Param((SIDE, SIDE)), "v": Param((SIDE, SIDE))}
        weights = load_params(params, checkpoint, backend=backend, component="t")
    graph = power(backend, weights["w"], 400)
    expected = graph.compute(x=x)["y"]
    changer = threading.Thread(target=lambda: (time.sleep(0.02), change(path)))
    changer.start()
    try:
        for _ in range(3):  # the change falls into one of these, most likely into the first
            if change in HARMLESS:
                assert graph.compute(x=x)["y"].tobytes() == expected.tobytes()
                continue
            try:
                assert graph.compute(x=x)["y"].tobytes() == expected.tobytes()
            except LoadError as error:
                assert error.kind == "WeightsChanged" and error.path == str(path)
                break
        changer.join()
        if change not in HARMLESS:
            for run in (lambda: graph.compute(x=x), graph.run, graph.profile):
                with pytest.raises(LoadError, match="a file of weights changed while it was used") as caught:
                    run()
                assert caught.value.kind == "WeightsChanged"
            assert str(path) in str(weights.changed())
    finally:
        changer.join()
        graph.close()
        weights.close()


def test_lost_pages_are_zeros_and_remembered(path: Path, backend: Backend) -> None:
    """numpy's reads, and our own of the mapping, are guarded as well."""
    with open_checkpoint(path) as checkpoint, MappedFile(path) as file:
        params = {"w": Param((SIDE, SIDE)), "v": Param((SIDE, SIDE))}
        with load_params(params, checkpoint, backend=backend, component="t") as weights:
            view = weights["v"].view()
            assert view.any() and weights.changed() is None
            size = file.n_bytes
            os.truncate(path, 10000)
            assert view[:-1].any(axis=1).sum() <= 1 and not view[-1].any()
            lost = next(int(word) for word in str(weights.changed()).split() if word.isdigit())
            assert lost == size - (SIDE * SIDE * 4) - (size - SIDE * SIDE * 4) % 4096
            assert f"its size was {size} bytes and is 10000" in str(weights.changed())
            os.truncate(path, size)  # grown again: what was lost is not forgotten
            assert "could not be read" in str(weights.changed())
            del view
        whole = file.view()
        os.truncate(path, 4096)
        assert bytes(whole[4096:]) == bytes(size - 4096)
        with pytest.raises(LoadError) as caught:
            file.check()
        assert caught.value.kind == "WeightsChanged"
        whole.release()


@pytest.mark.parametrize("mode", ["map", "io", "off"])
@pytest.mark.parametrize("change", [truncate, rewrite])
def test_while_it_is_loaded(path: Path, backend: Backend, mode: Any, change: Change) -> None:
    """The first tensor is converted, then the file changes, then the second is read."""
    calls: list[int] = []

    def progress(done: int, total: int) -> None:
        if not calls:
            change(path)
        calls.append(done)

    params = {"w": Param((SIDE, SIDE), Type.F16), "v": Param((SIDE, SIDE), Type.F16)}
    with open_checkpoint(path) as checkpoint, pytest.raises(LoadError) as caught:
        load_params(
            params, checkpoint, backend=backend, component="t", options=LoadOptions(mode=mode), progress=progress
        )
    assert caught.value.kind == "WeightsChanged" and calls


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_tiny_models(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def files(tiny: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    copies = {}
    for key, source in tiny.items():
        copies[key] = Path(shutil.copytree(source.parent, tmp_path / key)) / source.name
        os.utime(copies[key], ns=(0, 0))
    return copies


@pytest.mark.parametrize("mode", ["map", "off"])
@pytest.mark.parametrize("which", ["diffusion_model", "llm", "vae"])
@pytest.mark.parametrize("change", [truncate, regrow, replace, unlink])
def test_no_picture_from_changed_files(
    files: dict[str, Path], backend: Backend, which: str, change: Change, mode: Any
) -> None:
    pictures: list[bytes] = []
    steps: list[int] = []

    def after_step(pipe: Any, step: int, timestep: float, live: Any) -> Any:
        if steps == [0]:
            change(files[which])
        steps.append(step)
        return live

    def draw() -> None:
        pipe(
            "x", num_inference_steps=2, height=32, width=32, output_type="np",
            callback_on_step_end=after_step, on_image=lambda i, seed, picture: pictures.append(picture.tobytes()),
        )  # fmt: skip

    with models.load(**files, backend=backend, options=LoadOptions(mode=mode)) as pipe:
        pipe(
            "x", num_inference_steps=2, height=32, width=32, output_type="np",
            on_image=lambda i, seed, picture: pictures.append(picture.tobytes()),
        )  # fmt: skip
        if mode == "map" and change not in HARMLESS:
            with pytest.raises(LoadError) as caught:
                draw()
            assert caught.value.kind == "WeightsChanged" and str(files[which]) in str(caught.value)
            assert len(pictures) == 1
        else:
            draw()
            assert pictures[0] == pictures[1]


OUTSIDE = """
import mmap, os, signal, sys
from loader import MappedFile
def caught(): return int(next(x for x in open("/proc/self/status") if x.startswith("SigCgt")).split()[1], 16) >> 6 & 1
path, how = sys.argv[1:]
print(caught())
ours = MappedFile(path)
ours.map()
print(caught())
if how == "close":
    ours.close()
    print(caught(), flush=True)
    sys.exit()
print(flush=True)
theirs = mmap.mmap(os.open(path, os.O_RDONLY), 0, access=mmap.ACCESS_READ)
os.truncate(path, 1)
assert ours.view()[-1] == 0
if how == "send":
    os.kill(os.getpid(), signal.SIGBUS)
else:
    theirs[-1]
print("alive")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", ["close", "send", "fault", "faulthandler"])
def test_other_bus_errors_are_not_ours(path: Path, how: str) -> None:
    """They do what they did before: here they end the process, after faulthandler's report where it is on."""
    options = ["-X", "faulthandler"] if how == "faulthandler" else []
    run = subprocess.run(
        [sys.executable, *options, "-c", OUTSIDE, str(path), how], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}, check=False,
    )  # fmt: skip
    if how == "close":
        assert (run.returncode, run.stdout.split()) == (0, ["0", "1", "0"]), run.stderr
        return
    assert run.returncode == -7 and "alive" not in run.stdout
    assert ("Bus error" in run.stderr) == (how == "faulthandler")
