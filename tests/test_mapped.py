from __future__ import annotations

import ctypes
import gc
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from loader import LoadError, MappedFile
from pyggml.errors import ClosedError

DATA = bytes(range(256)) * 64  # 4 pages


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(DATA)
    return path


def n_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_reads_and_maps_the_same_bytes(path: Path) -> None:
    with MappedFile(path) as file:
        assert file.n_bytes == len(DATA)
        assert file.read_at(100, 50) == DATA[100:150]
        assert file.read_at(len(DATA), 0) == b""
        assert bytes(file.view(100, 50)) == DATA[100:150]
        assert file.map() is file.map()
        assert ctypes.string_at(file.address + 100, 50) == DATA[100:150]
        assert file.address % 4096 == 0


def test_views_are_read_only(path: Path) -> None:
    with MappedFile(path) as file:
        assert file.view().readonly
        assert not np.frombuffer(file.map(), np.uint8).flags.writeable


@linux
def test_mapping_is_shared_and_read_only_to_the_kernel(path: Path) -> None:
    with MappedFile(path) as file:
        file.map()
        lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
        assert len(lines) == 1 and " r--s " in lines[0]


@pytest.mark.parametrize("offset, n", [(0, len(DATA) + 1), (len(DATA), 1), (-1, 1), (1 << 70, 1)])
def test_reading_outside_is_refused(path: Path, offset: int, n: int) -> None:
    with MappedFile(path) as file:
        with pytest.raises(LoadError) as caught:
            file.read_at(offset, n)
        assert caught.value.kind == "TruncatedFile"
        with pytest.raises(LoadError):
            file.view(offset, n)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    def kind(path: Path | str) -> str:
        with pytest.raises(LoadError) as caught:
            MappedFile(path)
        return caught.value.kind

    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert kind(tmp_path / "missing") == "CannotOpen"
    assert kind(tmp_path) == "CannotOpen"
    assert kind(tmp_path / "fifo") == "CannotOpen"  # and does not wait for a writer
    assert kind(tmp_path / "dangling") == "CannotOpen"
    assert kind("/dev/zero") == "CannotOpen"
    assert kind(tmp_path / "empty") == "TruncatedFile"
    assert kind("a\0b") == "UnsafePath"


@linux
def test_refusal_leaks_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    before = n_fds()
    for _ in range(10):
        with pytest.raises(LoadError):
            MappedFile(tmp_path / "empty")
    assert n_fds() == before


@linux
def test_close_is_idempotent_and_final(path: Path) -> None:
    before = n_fds()
    file = MappedFile(path)
    file.map()
    file.close()
    file.close()
    assert file.closed and n_fds() == before
    for use in (
        lambda: file.read_at(0, 1),
        file.map,
        file.changed,
        lambda: file.address,
        lambda: file.advise("normal"),
    ):
        with pytest.raises(ClosedError):
            use()


@linux
def test_dropping_the_object_closes_it(path: Path) -> None:
    before = n_fds()
    file = MappedFile(path)
    file.map()
    del file
    gc.collect()
    assert n_fds() == before


@linux
def test_views_outlive_close(path: Path) -> None:
    file = MappedFile(path)
    view = file.view(10, 5)
    array = np.frombuffer(file.map(), np.uint8)
    file.close()
    assert bytes(view) == DATA[10:15] and array[20] == 20
    assert str(path) in Path("/proc/self/maps").read_text()
    del view, array
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_advice_never_changes_bytes(path: Path) -> None:
    with MappedFile(path) as file:
        view = file.view()
        for advice in ("normal", "sequential", "random", "willneed", "populate_read", "dontneed"):
            file.advise(advice)
            file.advise(advice, 4097, 4096 + 5)
            file.advise(advice, 5, 3)
            assert bytes(view) == DATA


@linux
def test_dontneed_drops_whole_pages_inside_the_range_only(tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(bytes(1 << 20))
    with MappedFile(path) as file:
        view = np.frombuffer(file.map(), np.uint8)
        page = 4096

        def resident() -> int:
            text = Path("/proc/self/smaps").read_text()
            entry = text[text.index(str(path)) :]
            return int(entry[entry.index("Rss:") + 4 :].split()[0]) * 1024

        view[::page].sum()
        assert resident() == 1 << 20
        file.advise("dontneed", 1, 3 * page - 2)  # pages 0 and 2 are covered in part
        assert resident() == (1 << 20) - page


def touch(path: Path) -> None:
    time.sleep(0.02)  # the clock of the file system ticks every 4 to 10 ms


def test_unchanged_file_is_unchanged(path: Path) -> None:
    with MappedFile(path) as file:
        touch(path)
        path.read_bytes()
        assert file.changed() is None


def test_changes_are_noticed(path: Path) -> None:
    with MappedFile(path) as file:
        touch(path)
        os.truncate(path, 100)
        assert "size" in str(file.changed())
    path.write_bytes(DATA)
    with MappedFile(path) as file:
        touch(path)
        path.write_bytes(DATA)  # truncated and grown again
        assert file.changed()
    with MappedFile(path) as file:
        touch(path)
        stat = path.stat()
        with open(path, "r+b") as out:
            out.write(b"x")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as rsync --times does
        assert file.changed()


def test_replaced_or_unlinked_is_not_changed(path: Path, tmp_path: Path) -> None:
    with MappedFile(path) as file:
        view = file.view()
        touch(path)
        (tmp_path / "new").write_bytes(b"other" * 10)
        os.replace(tmp_path / "new", path)
        assert file.changed() is None
        assert bytes(view) == DATA
        path.unlink()
        assert file.changed() is None
        assert file.read_at(0, 4) == DATA[:4]


def test_file_that_shrank_is_not_mapped(path: Path) -> None:
    with MappedFile(path) as file:
        os.truncate(path, 100)
        with pytest.raises(LoadError) as caught:
            file.map()
        assert caught.value.kind == "WeightsChanged"
        with pytest.raises(LoadError):
            file.read_at(0, len(DATA))


def test_read_at_without_pread(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loader.mapped._HAS_PREAD", False)
    with MappedFile(path) as file:
        assert file.read_at(77, 1000) == DATA[77:1077]


def test_nothing_can_be_read_anywhere(path: Path) -> None:
    """Found by mutation: a tensor without elements behind padding that was cut off."""
    with MappedFile(path) as file:
        assert file.read_at(len(DATA) + 1, 0) == b""
