from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hostile import Case
from hostile.safetensors_cases import ACCEPTED, GOOD, MALFORMED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loader import Limits, LoadError, MappedFile, open_checkpoint
from loader.dtypes import NUMPY_NAMES
from loader.safetensors import SafetensorsHeader, read_safetensors


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def read(path: Path, limits: Limits | None = None) -> SafetensorsHeader:
    with MappedFile(path) as file:
        return read_safetensors(file, limits or Limits())


@pytest.mark.parametrize("case", MALFORMED, ids=lambda case: case.name)
def test_malformed_is_refused(tmp_path: Path, case: Case) -> None:
    path = write(tmp_path / "bad.safetensors", case.data)
    with pytest.raises(LoadError) as caught:
        open_checkpoint(path)
    assert caught.value.kind == case.kind, caught.value
    assert caught.value.path == str(path)
    assert caught.value.offset is not None
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ACCEPTED)
def test_borderline_is_accepted(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "good.safetensors", ACCEPTED[name])
    with open_checkpoint(path) as checkpoint:
        assert all(info.offset + info.n_bytes <= len(ACCEPTED[name]) for info in checkpoint.values())


@pytest.mark.parametrize("name", [name for name in ACCEPTED if name not in ("f4_even",)])
def test_the_reference_accepts_these_too(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "good.safetensors", ACCEPTED[name])
    with safetensors.safe_open(path, "np") as theirs, open_checkpoint(path) as ours:
        assert set(theirs.keys()) == set(ours)


def test_misaligned_data_is_really_misaligned(tmp_path: Path) -> None:
    header = read(write(tmp_path / "odd.safetensors", ACCEPTED["S62_data_misaligned"]))
    assert header.data_offset % 4


def test_trailing_bytes_on_request(tmp_path: Path) -> None:
    path = write(tmp_path / "long.safetensors", GOOD + b"more")
    assert list(read(path, Limits(trailing_bytes=True)).tensors) == ["t"]


def test_header_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", GOOD)
    with pytest.raises(LoadError, match="header length"):
        read(path, Limits(safetensors_header=10))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    for n in range(len(GOOD)):
        with pytest.raises(LoadError):
            open_checkpoint(write(tmp_path / "cut.safetensors", GOOD[:n]))


ARRAYS = {
    f"{dtype}.{len(shape)}": np.random.default_rng(0).integers(0, 2 if dtype == "?" else 100, shape).astype(dtype)
    for dtype in NUMPY_NAMES.values()
    for shape in ((), (7,), (3, 0), (2, 3, 4), (1, 2, 1, 3, 2))
}


def test_reads_what_the_reference_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(ARRAYS, path, {"format": "np", "größe": "ja"})
    with open_checkpoint(path) as checkpoint:
        assert dict(checkpoint.metadata) == {"format": "np", "größe": "ja"}
        assert set(checkpoint) == set(ARRAYS)
        for name, array in ARRAYS.items():
            ours = checkpoint.read(name)
            assert ours.dtype == array.dtype and ours.shape == array.shape
            np.testing.assert_array_equal(ours, array)
            assert checkpoint[name].ne == array.shape[::-1]


def test_bfloat16_and_float8_bytes(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 3e38, np.inf, 1e-40], np.float32)
    halves = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    table = {
        "bf16": {"dtype": "BF16", "shape": [5], "data_offsets": [0, 10]},
        "f8": {"dtype": "F8_E4M3", "shape": [2, 3], "data_offsets": [10, 16]},
    }
    header = json.dumps(table).encode()
    path = write(
        tmp_path / "x.safetensors", struct.pack("<Q", len(header)) + header + halves + b"\0\x38\x7e\x81\xb8\x08"
    )
    with open_checkpoint(path) as checkpoint:
        expected = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
        np.testing.assert_array_equal(checkpoint.read("bf16"), expected)
        assert checkpoint.read("f8").tobytes() == b"\0\x38\x7e\x81\xb8\x08"


def test_many_tensors_take_linear_time(tmp_path: Path) -> None:
    n = 100_000
    table = {f"t{i}": {"dtype": "F32", "shape": [8], "data_offsets": [32 * i, 32 * i + 32]} for i in range(n)}
    header = json.dumps(table).encode()
    path = write(tmp_path / "x.safetensors", struct.pack("<Q", len(header)) + header + bytes(32 * n))
    start = time.perf_counter()
    assert len(read(path).tensors) == n
    assert time.perf_counter() - start < 8


SEEDS = [*ACCEPTED.values(), *(case.data for case in MALFORMED if 8 < len(case.data) < 1000)]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutations_load_or_raise_load_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(SEEDS)))
    snippets = [b"\"", b"{", b"}", b"[", b"]", b",", b":", b"-1", b"1e5", b"9" * 30, b"null", b"true", b"\\ud800",
                b'"dtype":"BF16",', b'"__metadata__":{},', b"NaN", b" ", b"\0"]  # fmt: skip
    for _ in range(data.draw(st.integers(1, 4))):
        i = data.draw(st.integers(0, len(content)))
        n = data.draw(st.integers(0, 4))
        content[i : i + n] = data.draw(st.sampled_from(snippets))
    if data.draw(st.booleans()) and len(content) >= 8:  # keep the length right, so that the JSON is reached
        end = bytes(content).rfind(b"}") + 1
        content[:8] = struct.pack("<Q", max(0, end - 8))
    path = write(tmp_path_factory.getbasetemp() / "fuzz.safetensors", bytes(content))
    try:
        checkpoint = open_checkpoint(path)
    except LoadError as e:
        assert "\n" not in str(e)
        return
    with checkpoint:
        for name, info in checkpoint.items():
            assert 0 <= info.offset <= info.offset + info.n_bytes <= len(content)
            checkpoint.read(name)
