"""Mapped, mapped to be read, read: the ways in which weights come to rest, and what the kernel is told."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from test_params import f32, save

import models
from loader import LoadError, LoadOptions, MappedFile, Param, Weights, load_params, open_checkpoint
from loader.options import ENVIRONMENT, Hint, Mode, hints_from_environment
from loader.pages import joined
from pyggml import Backend, Type
from studio import cli
from studio.generate import DEMO, DEMO_FILES

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
PAGE = 4096


@pytest.fixture(scope="module")
def backend() -> Backend:
    return Backend.cpu(2)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = np.random.default_rng(5).standard_normal((256, 1024)).astype(np.float32)
    halves = ("BF16", (64, 1024), (values[:64].view(np.uint32) >> 16).astype("<u2").tobytes())
    return save(tmp_path_factory.mktemp("modes") / "x.safetensors", {"a": f32(values), "b": halves})


def load(path: Path, backend: Backend, options: LoadOptions | None) -> Weights:
    params = {"a": Param((1024, 256)), "b": Param((1024, 64), Type.F32)}
    with open_checkpoint(path) as checkpoint:
        return load_params(params, checkpoint, backend=backend, component="x", options=options)


def mappings(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(f"{path}\n")


def resident(path: Path) -> int:
    """Bytes of a file that this process has mapped and in memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = line.endswith(f" {path}")
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@linux
@pytest.mark.parametrize("mode", get_args(Mode))
def test_every_mode_gives_the_same_weights(path: Path, backend: Backend, mode: Mode) -> None:
    with load(path, backend, LoadOptions(mode="off")) as expected, load(path, backend, LoadOptions(mode=mode)) as w:
        for name in ("a", "b"):
            assert w[name].numpy().tobytes() == expected[name].numpy().tobytes()
        mapped = mode in ("map", "auto")
        assert (w.report.n_mapped, mappings(path)) == ((1, 1) if mapped else (0, 0))
        why = {"io": "mapped to be read only", "off": "mapping is off"}.get(mode)
        assert w.report.not_mapped == {"BF16 becomes F32": 1} | ({why: 1} if why else {})
        # only what lives in a file can be spoilt by it
        os.utime(path, ns=(1, 1))
        assert (w.changed() is not None) == mapped
    gc.collect()
    assert mappings(path) == 0


@linux
@pytest.mark.parametrize("reclaim", [True, False])
def test_io_gives_pages_back_as_it_copies(tmp_path: Path, backend: Backend, reclaim: bool) -> None:
    path = save(tmp_path / "x.safetensors", {"a": f32(np.ones((256, 1024))), "b": f32(np.ones((64, 1024)))})
    seen = []
    with open_checkpoint(path) as checkpoint:
        load_params(
            {"a": Param((1024, 256)), "b": Param((1024, 64))}, checkpoint, backend=backend, component="x",
            options=LoadOptions(mode="io", reclaim=reclaim), progress=lambda done, total: seen.append(resident(path)),
        ).close()  # fmt: skip
    a, b = 1 << 20, 1 << 18
    assert seen[0] >= a and (seen[1] < b + 4 * PAGE if reclaim else seen[1] >= a + b)


def test_options_refuse_unknown_words() -> None:
    with pytest.raises(ValueError, match="mode is one of auto, map, io, off, not 'mmap'"):
        LoadOptions(mode="mmap")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="repack is one of auto, on, off, not True"):
        LoadOptions(repack=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not 'populat'"):
        LoadOptions(hints=frozenset({"populat"}))  # type: ignore[arg-type]


def test_hints_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = ENVIRONMENT
    assert hints_from_environment({theirs: "sequential, willneed,"}) == {"sequential", "willneed"}
    assert hints_from_environment({theirs: "sequential", ours: "dontneed"}) == {"dontneed"}
    assert hints_from_environment({ours: ""}) == frozenset()
    with pytest.raises(ValueError, match=r"SD_MMAP_FLAGS: hints are sequential, .*, not 'hugepage'"):
        hints_from_environment({theirs: "hugepage,populate"})
    monkeypatch.setenv(ours, "populate")
    assert LoadOptions.from_environment() == LoadOptions(hints=frozenset({"populate"}))


@linux
def test_populate_reads_what_is_mapped(path: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(path, backend, LoadOptions()):
        assert resident(path) < 1 << 20
    gc.collect()
    monkeypatch.setenv("PYGGML_MMAP_FLAGS", "sequential,populate")
    with load(path, backend, None):
        assert resident(path) >= 1 << 20


@pytest.mark.parametrize("mode", ["map", "io", "off"])
def test_which_advice_is_given(path: Path, backend: Backend, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    mapping, reading = [], []
    monkeypatch.setattr(MappedFile, "advise", lambda self, advice, *a: mapping.append(advice) or True)
    monkeypatch.setattr(MappedFile, "advise_reading", lambda self, advice, *a: reading.append(advice) or True)
    load(path, backend, LoadOptions(mode=mode, reclaim=False)).close()
    assert (mapping, reading) == ([], [])
    hints: frozenset[Hint] = frozenset(get_args(Hint))
    load(path, backend, LoadOptions(mode=mode, reclaim=False, hints=hints)).close()
    mapped = {"map": ["sequential", "willneed", "populate_read", "dontneed"], "off": []}
    mapped["io"] = mapped["map"][:-1]  # nothing is mapped any more when it is closed
    assert (mapping, reading) == (
        mapped[mode], ["sequential", *(["willneed"] if mode == "off" else []), "dontneed"]
    )  # fmt: skip


def test_hint_without_effect_is_said(path: Path, backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    load(path, backend, LoadOptions(mode="off", hints=frozenset({"populate"}))).close()
    assert "the hint populate has no effect: that needs a mapping" in caplog.text


@linux
def test_dontneed_drops_the_cache_of_a_closed_component(tmp_path: Path, backend: Backend) -> None:
    """Seen by the next reader: pages that are not cached are major faults."""
    import resource

    path = save(tmp_path / "x.safetensors", {"a": f32(np.ones((256, 1024))), "b": f32(np.ones((64, 1024)))})
    with open(path) as file:
        os.fsync(file.fileno())  # dirty pages are not dropped

    def faults() -> int:
        with MappedFile(path) as file:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
            assert sum(bytes(file.view()[::PAGE])) >= 0
            return resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before

    for mode in ("map", "io", "off"):
        for hints in (frozenset[Hint](), frozenset[Hint](["dontneed"])):
            faults()  # cached now
            params = {"a": Param((1024, 256)), "b": Param((1024, 64), Type.F16)}
            with open_checkpoint(path) as checkpoint:
                weights = load_params(
                    params, checkpoint, backend=backend, component="x", options=LoadOptions(mode=mode, hints=hints)
                )
                weights["a"].numpy()
                weights.close()
            assert (faults() > 0) == bool(hints), (mode, hints)


@pytest.mark.parametrize("mode", get_args(Mode))
def test_network_file_systems(
    path: Path, backend: Backend, mode: Mode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pyggml.loader")
    monkeypatch.setattr(MappedFile, "remote", property(lambda self: "NFS"))
    with load(path, backend, LoadOptions(mode=mode)) as w:
        assert w.report.n_mapped == (mode == "map")
        assert (f"{path} is on NFS: read into memory, since" in caplog.text) == (mode == "auto")
        assert ("the file is on NFS" in w.report.not_mapped) == (mode == "auto")


def test_local_files_are_on_no_network(path: Path) -> None:
    with MappedFile(path) as file:
        assert file.remote is None


def test_runs_of_pages() -> None:
    assert joined([(5000, 10), (0, 1), (4100, 5), (20480, 4097), (50000, 0)]) == [(0, 8192), (20480, 8192)]


@linux
@pytest.mark.parametrize("mode", ["map", "io", "off"])
def test_mlock(path: Path, backend: Backend, mode: Mode) -> None:
    def locked() -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmLck"))
        return int(line.split()[1]) * 1024

    before = locked()
    with load(path, backend, LoadOptions(mode=mode, mlock=True)) as w:
        n = (256 + 64) * 1024 * 4
        assert n <= w.report.locked_bytes <= n + 4 * PAGE
        assert locked() - before == w.report.locked_bytes
    assert locked() == before


WITHOUT_PRIVILEGE = """
import ctypes, os, resource, sys
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
ctypes.CDLL(None).prctl(24, 14, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_IPC_LOCK: root's right to lock what it likes
os.execv(sys.executable, [sys.executable, "-m", "studio.cli", "generate", "p", "-o", sys.argv[1], "--mlock"])
"""


@linux
def test_mlock_beyond_the_limit_says_what_it_needs(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_PRIVILEGE, str(tmp_path / "x.png")], capture_output=True, text=True,
        timeout=120, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}, check=False,
    )  # fmt: skip
    assert run.returncode == 2, run.stderr
    assert "qwen3: " in run.stderr and "cannot be locked in memory" in run.stderr
    assert "RLIMIT_MEMLOCK is 65536 bytes" in run.stderr and "leave --mlock out" in run.stderr
    assert "needed are " in run.stderr and not (tmp_path / "x.png").exists()


# the command line


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `models.load` is given."""
    given: dict[str, Any] = {}

    def fake(*_: Any, **options: Any) -> Any:
        given.update(options)
        raise LoadError("enough")

    monkeypatch.setattr(models, "load", fake)
    return given


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], LoadOptions()),
        (["--mmap"], LoadOptions(mode="map")),
        (["--mmap=io"], LoadOptions(mode="io")),
        (["--no-mmap"], LoadOptions(mode="off")),
        (["--repack", "on"], LoadOptions(repack="on")),
        (["--mlock", "--no-reclaim-mmap-source"], LoadOptions(mlock=True, reclaim=False)),
        (["--mmap-flags", "populate,dontneed"], LoadOptions(hints=frozenset({"populate", "dontneed"}))),
        (["--mmap-flags", ""], LoadOptions()),
    ],
)
def test_options_of_the_command_line(
    words: list[str], expected: LoadOptions, loaded: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", "p", *words]) == 2
    assert loaded["options"] == expected
    if "--mmap-flags" not in words:
        monkeypatch.setenv("SD_MMAP_FLAGS", "sequential")
        cli.main(["generate", *words, "p"])
        assert loaded["options"].hints == {"sequential"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mmap-flags", "all"], "--mmap-flags: hints are sequential, populate, willneed, dontneed, not 'all'"),
        (["--mmap", "--no-mmap"], "not allowed with"),
        (["--repack", "yes"], "invalid choice: 'yes'"),
        (["--mmap=on"], "ignored explicit argument 'on'"),
    ],
)
def test_wrong_options(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(["generate", "p", *words])
    except SystemExit as stop:
        code = int(str(stop.code))
    assert code == 2 and message in capsys.readouterr().err


def test_pictures_are_the_same_in_every_mode(backend: Backend) -> None:
    pictures = set()
    for options in (LoadOptions(), LoadOptions(mode="io"), LoadOptions(mode="off"), LoadOptions(mlock=True)):
        with models.load(*(DEMO / name for name in DEMO_FILES), backend=backend, options=options) as pipe:
            result = pipe("a red circle", num_inference_steps=1, height=64, width=64, output_type="np")
            pictures.add(result.images[0].tobytes())
    assert len(pictures) == 1


@pytest.mark.parametrize("mode", ["io", "off"])
def test_large_tensors_are_copied_whole_and_nothing_goes_on_after_an_end(
    tmp_path: Path, backend: Backend, mode: Mode
) -> None:
    """Several threads copy: none may still write when the memory is given back."""
    values = np.arange(5 * (1 << 20) + 7, dtype=np.float32)
    path = save(tmp_path / "x.safetensors", {"a": f32(values)})
    params = {"a": Param((len(values),))}

    def refuse(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with open_checkpoint(path) as checkpoint:
        options = LoadOptions(mode=mode)
        with load_params(params, checkpoint, backend=backend, component="x", options=options) as weights:
            assert (weights["a"].view() == values).all()
        with pytest.raises(KeyboardInterrupt):
            load_params(params, checkpoint, backend=backend, component="x", options=options, progress=refuse)
    assert not [t for t in threading.enumerate() if t.name.startswith("pyggml-read")]
