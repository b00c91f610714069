"""Bad files through every way in: the same verdict whether the weights would be mapped or read, loaded or converted."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hostile import Case, fuzz, gguf_cases, safetensors_cases

from loader import LoadError, open_checkpoint
from loader.save import save_checkpoint
from pyggml import Backend
from studio import cli

BAD = [("gguf", c) for c in gguf_cases.MALFORMED] + [("safetensors", c) for c in safetensors_cases.MALFORMED]
GOOD = {f"gguf {name}": data for name, data in gguf_cases.ACCEPTED.items()} | {
    f"safetensors {name}": data for name, data in safetensors_cases.ACCEPTED.items()
}
# the catalogue's rows that are files (docs/loading.md); letters after a number are cases that we added
GGUF_ROWS = {*range(1, 40), *range(41, 72)}
SAFETENSORS_ROWS = {*range(1, 62)}


def test_the_catalogue_is_complete() -> None:
    def rows(cases: list[Case]) -> set[int]:
        return {int(re.findall(r"\d+", case.name)[0]) for case in cases}

    assert GGUF_ROWS <= rows(gguf_cases.MALFORMED)
    assert SAFETENSORS_ROWS <= rows(safetensors_cases.MALFORMED)
    assert {"G40_name_64_bytes"} <= set(gguf_cases.ACCEPTED)
    assert {"S62_data_misaligned"} <= set(safetensors_cases.ACCEPTED)


@pytest.mark.parametrize("suffix, case", BAD, ids=lambda value: value.name if isinstance(value, Case) else value)
def test_mapped_or_read_the_verdict_is_the_same(
    tmp_path: Path, backend: Backend, capsys: Any, suffix: str, case: Case
) -> None:
    path = tmp_path / f"bad.{suffix}"
    path.write_bytes(case.data)
    mapped, by_io, read = (fuzz.verdict(path, backend, mode) for mode in fuzz.MODES)
    assert mapped == by_io == read and str(mapped).startswith(f"{case.kind} {path}")
    if len(case.data) > 5_000_000:
        return
    for argv in (["inspect", str(path)], ["convert", str(path), "-o", str(tmp_path / "out.gguf")]):
        assert cli.main(argv) == 2
        out = capsys.readouterr()
        assert out.out == "" and out.err == f"error: {str(mapped).removeprefix(case.kind + ' ')}\n"
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("name", GOOD)
def test_what_is_accepted_gives_the_same_bytes(tmp_path: Path, backend: Backend, name: str) -> None:
    suffix = name.split()[0]
    path = tmp_path / f"good.{suffix}"
    path.write_bytes(GOOD[name])
    mapped, by_io, read = (fuzz.verdict(path, backend, mode) for mode in fuzz.MODES)
    assert mapped == by_io == read and isinstance(mapped, str) == ("f4_even" in name)
    if "f4_even" not in name:  # which nothing but safetensors has
        with open_checkpoint(path) as checkpoint:
            save_checkpoint(checkpoint, tmp_path / f"again.{suffix}")
            with open_checkpoint(tmp_path / f"again.{suffix}") as again:
                assert {n: (i.ne, i.dtype) for n, i in again.items()} == {
                    n: (i.ne, i.dtype) for n, i in checkpoint.items()
                }
                assert all(again.read(n).tobytes() == checkpoint.read(n).tobytes() for n in checkpoint)


@pytest.mark.skipif(sys.platform == "win32", reason="no such files")
def test_shards_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").write_bytes(b"")
    for shard, kind in (("fifo", "CannotOpen"), ("folder", "CannotOpen"), ("empty", "TruncatedFile")):
        (tmp_path / "index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(LoadError) as caught:
            open_checkpoint(tmp_path / "index.json")
        assert caught.value.kind == kind and str(caught.value.path).endswith(shard)


def test_some_seconds_of_fuzzing(tmp_path: Path) -> None:
    n, counts = fuzz.fuzz(tmp_path, seed=7, first=0, step=1, seconds=float("inf"), n_max=300)
    assert n == 300 and {"gguf accepted", "safetensors accepted"} <= set(counts)
    assert len(counts) > 20, counts  # it comes to most of the rules


def test_the_fuzzer_finds(tmp_path: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thing that it looks for is seen when it is there."""
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_cases.GOOD)
    fuzz.tracemalloc.start()
    try:
        assert fuzz.try_file(path, backend) == "accepted"
        with monkeypatch.context() as patch:
            patch.setattr(fuzz, "describe", lambda checkpoint: len(bytearray(5_000_000)))
            with pytest.raises(fuzz.Finding, match=r"bytes were allocated for a file of \d+"):
                fuzz.try_file(path, backend)
        with monkeypatch.context() as patch:
            patch.setattr(fuzz, "verdict", lambda path, backend, mode: mode)
            with pytest.raises(fuzz.Finding, match="mapped: map; mapped to read: io; read: off"):
                fuzz.try_file(path, backend)
        with monkeypatch.context() as patch:
            patch.setattr(fuzz, "describe", lambda checkpoint: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                fuzz.try_file(path, backend)
    finally:
        fuzz.tracemalloc.stop()


def test_the_fuzzer_alone(tmp_path: Path) -> None:
    command = [sys.executable, fuzz.__file__, "--seconds", "4", "--processes", "1", "--seed", "3"]
    done = subprocess.run([*command, "--keep", str(tmp_path / "kept")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("seed 3\n") and "accepted" in done.stdout and " 0 findings\n" in done.stdout
    assert not (tmp_path / "kept").exists()


def test_cases_are_found_again_by_their_number() -> None:
    assert fuzz.make(5, 17) == fuzz.make(5, 17) != fuzz.make(6, 17)
    assert random.Random("5 17").random() != fuzz.Chance("5 18").random()
