"""Decoding and encoding in tiles: the same picture, no seams, and by itself when memory is short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tiny_models import write_tiny_models

import models
from models import tiles
from models.devices import Place
from models.z_image.components import Component, open_autoencoder
from pyggml import Backend, Cancelled, OutOfMemory
from studio import cli

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "studio" / "demo"


@pytest.fixture(scope="module")
def tiny(backend: Backend, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Component]:
    files = write_tiny_models(tmp_path_factory.mktemp("tiny"))
    component = open_autoencoder(files["vae"], Place(backend), encoder=True)
    yield component
    component.close()


@pytest.fixture(scope="module")
def demo(backend: Backend) -> Iterator[Component]:
    component = open_autoencoder(DEMO / "ae_demo.safetensors", Place(backend), encoder=True)
    yield component
    component.close()


def psnr(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Decibels, the peak being the range of `a`."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(np.ptp(a) ** 2 / error)) if error else np.inf


@pytest.mark.parametrize(
    ("latent", "tile"), [((16, 16), (4, 4)), ((9, 13), (4, 6)), ((13, 9), (5, 9)), ((6, 5), (32, 32))], ids=str
)
def test_tiles_change_nothing_but_rounding(
    tiny: Component, backend: Backend, latent: tuple[int, int], tile: tuple[int, int]
) -> None:
    rng = np.random.default_rng(1)
    z = rng.standard_normal((16, *latent), np.float32)
    assert psnr(tiny.module.decode(backend, z), tiny.module.decode(backend, z, tile=tile)) > 80
    picture = rng.random((3, 8 * latent[0], 8 * latent[1]), np.float32)
    mean, deviation = tiny.module.encode(backend, picture)
    tiled_mean, tiled_deviation = tiny.module.encode(backend, picture, tile=tile)
    assert psnr(mean, tiled_mean) > 80
    assert psnr(np.log(deviation), np.log(tiled_deviation)) > 80


def test_no_seams(demo: Component, backend: Backend) -> None:
    """A large picture of shapes: what the decoded one differs by does not jump from one tile to the next."""
    with Image.open(ROOT / "docs" / "demo.png") as image:
        picture = np.asarray(image.convert("RGB").resize((384, 320)), np.float32).transpose(2, 0, 1) / 255
    z = (demo.module.encode(backend, picture)[0] - 0.1159) * 0.3611
    whole, tiled = demo.module.decode(backend, z), demo.module.decode(backend, z, tile=(8, 16))
    assert np.ptp(whole) > 0.5
    assert psnr(whole, tiled) > 80  # far beyond what is asked, 35
    across = np.abs(np.diff(tiled - whole, axis=2))  # steps of the error from a pixel to its right neighbour
    at_border = np.zeros(across.shape[2], bool)
    at_border[127::128] = True
    assert across[:, :, at_border].mean() < 3 * across[:, :, ~at_border].mean()
    assert across[:, :, at_border].max() < 1e-4  # a 40th of what a byte of the picture can show


def test_a_tile_needs_less_memory_than_the_picture(demo: Component, backend: Backend) -> None:
    sizes: list[int] = []

    def compute(graph: Any, **inputs: Any) -> Any:
        result = graph.compute(**inputs)
        sizes.append(graph.buffer_size)
        return result

    z = np.zeros((16, 32, 32), np.float32)
    demo.module.decode(backend, z, compute)
    whole = sizes.pop()
    demo.module.decode(backend, z, compute, tile=(8, 8))
    assert max(sizes) < whole / 5


def test_short_memory_is_met_with_tiles(tmp_path: Path) -> None:
    """With 250 MB left, the decoder's 285 MB cannot be had: the picture comes all the same, and the log says how."""
    resource = pytest.importorskip("resource", reason="limits of memory are Unix's")
    if not hasattr(resource, "RLIMIT_AS") or not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux")
    np.save(tmp_path / "z.npy", np.random.default_rng(0).standard_normal((16, 96, 96), np.float32))
    code = f"""
import json, logging, resource, sys
import numpy as np
import models
logging.basicConfig(level=logging.WARNING)
files = [f"{DEMO}/{{name}}" for name in ("z_image_demo.gguf", "qwen3_demo.gguf", "ae_demo.safetensors")]
with models.load(*files, n_threads=1) as pipe:
    z = np.load("{tmp_path}/z.npy")
    pipe.decode(z[:, :8, :8])
    room = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 250 * 2**20
    if sys.argv[1] == "limited":
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
    np.save(sys.argv[2], pipe.decode(z))
"""
    for case in ("limited", "free"):
        command = [sys.executable, "-c", code, case, str(tmp_path / f"{case}.npy")]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        assert run.returncode == 0, run.stderr
        assert ("trying tiles of 32x32 latent pixels" in run.stderr) is (case == "limited"), run.stderr
    limited, free = (np.load(tmp_path / f"{case}.npy").astype(int) for case in ("limited", "free"))
    assert np.abs(limited - free).max() <= 1


def test_smaller_and_smaller_tiles() -> None:
    tried: list[Any] = []

    def run(tile: tiles.Size | None) -> str:
        tried.append(tile)
        if tile is None or max(tile) > 5:
            raise OutOfMemory("no room")
        return "done"

    assert tiles.with_less_memory("decode", run, None, (18, 10)) == ("done", (4, 4))
    assert tried == [None, (18, 10), (9, 5), (4, 4)]
    with pytest.raises(OutOfMemory, match="no room"):
        tiles.with_less_memory("decode", lambda tile: run(None), (4, 4))


def test_cancel_between_tiles(demo: Component, backend: Backend) -> None:
    done: list[int] = []

    def compute(graph: Any, **inputs: Any) -> Any:
        done.append(1)
        if len(done) == 5:
            raise Cancelled("the run was cancelled")
        return graph.compute(**inputs)

    with pytest.raises(Cancelled):
        demo.module.decode(backend, np.zeros((16, 16, 16), np.float32), compute, tile=(8, 8))
    assert len(done) == 5


def test_pipeline_reports_tiles(backend: Backend, tmp_path: Path) -> None:
    with models.load(**write_tiny_models(tmp_path), backend=backend, encoder=True) as pipe:
        small: dict[str, Any] = dict(
            prompt="a", height=64, width=48, num_inference_steps=1, output_type="np",
            init_image=Image.new("RGB", (48, 64), "red"),
        )  # fmt: skip
        whole = pipe(**small)
        assert whole.report.tiles == {}
        pipe.vae_tile = (4, 5)
        tiled = pipe(**small)
        assert tiled.report.tiles == {"encode_image": (4, 5), "decode": (4, 5)}
        assert np.abs(tiled.images[0].astype(int) - whole.images[0]).max() <= 1


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*more: str) -> tuple[int, str]:
        arguments = ["generate", "a red circle", "-W", "64", "-H", "64", "--steps", "1", "-t", "1", *more]
        code = cli.main([*arguments, "-o", str(tmp_path / "a.png"), "--report", str(tmp_path / "a.json")])
        return code, capsys.readouterr().err

    code, err = run("--vae-tiling", "--vae-tile-size", "6x4", "--vae-tile-overlap", "0.25")
    assert code == 0 and "--vae-tile-overlap has no effect" in err
    assert json.loads((tmp_path / "a.json").read_text())["tiles"] == {"decode": [4, 6]}
    for wrong in ("3x8", "8x", "x", "0", "٣٢", "-4"):
        code, err = run(f"--vae-tile-size={wrong}")
        assert code == 2 and err.startswith("error: --vae-tile-size must be latent pixels such as 32x32"), err
    assert run("--vae-tile-overlap", "0.7")[0] == 2
