from __future__ import annotations

import json
import logging
import os
import pickle
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy
from hostile.gguf_cases import STR, kv, text, with_kv
from hostile.safetensors_cases import GOOD

from loader import Checkpoint, Limits, LoadError, open_checkpoint
from pyggml.errors import ClosedError, GGMLError

A, B, C = (np.full((2, 3), i, np.float32) for i in range(3))


def save(path: Path, metadata: dict[str, str] | None = None, **arrays: np.ndarray) -> Path:
    safetensors.numpy.save_file(arrays, path, metadata)
    return path


def index(folder: Path, weight_map: Any, **more: Any) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map, **more}))
    return path


def refusal(path: Path | str, **options: Any) -> LoadError:
    with pytest.raises(LoadError) as caught:
        open_checkpoint(path, **options)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, GGMLError)
    return caught.value


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save(tmp_path / "s1.safetensors", {"format": "pt"}, a=A, b=B)
    save(tmp_path / "s2.safetensors", c=C)
    return tmp_path


# what a file is


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(GOOD)
    assert open_checkpoint(tmp_path / "x.gguf").format == "safetensors"
    writer = gguf.GGUFWriter(tmp_path / "y.safetensors", "test")
    writer.add_tensor("a", A)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert open_checkpoint(str(tmp_path / "y.safetensors")).format == "gguf"


class Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".gguf", ""])
def test_pickle_is_refused_and_not_run(tmp_path: Path, protocol: int, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps(Exploit(tmp_path / "owned"), protocol))
    error = refusal(path)
    assert error.kind == "PickleRefused" and "safetensors" in str(error.hint)
    assert not (tmp_path / "owned").exists()


def test_zip_is_refused_by_its_magic(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    assert refusal(tmp_path / "x.safetensors").kind == "PickleRefused"


@pytest.mark.parametrize(
    "content, words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pull|git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "PNG"),
        (b"\1\2\3\4 no format at all", "neither gguf nor safetensors"),
    ],
)
def test_what_people_hand_in_instead(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    error = refusal(tmp_path / "x.bin")
    assert error.kind == "BadMagic"
    assert re.search(words, str(error))


def test_missing_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nothing.gguf").kind == "CannotOpen"


# a checkpoint


def test_mapping_of_tensors(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "x.safetensors", {"k": "v"}, a=A, b=B))
    assert set(checkpoint) == {"a", "b"} and len(checkpoint) == 2 and "a" in checkpoint
    assert checkpoint["a"].ne == (3, 2) and checkpoint["a"].shape == (2, 3) and checkpoint["a"].n_elements == 6
    assert checkpoint.metadata == {"k": "v"} and checkpoint.config == {} and checkpoint.n_bytes == 48
    np.testing.assert_array_equal(checkpoint.read("b"), B)
    with pytest.raises(KeyError):
        checkpoint["c"]
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(ClosedError):
        checkpoint.read("a")


def test_read_gives_memory_of_its_own(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", a=A)
    with open_checkpoint(path) as checkpoint:
        array = checkpoint.read("a")
        array += 1
        np.testing.assert_array_equal(checkpoint.read("a"), A)


def test_renaming(tmp_path: Path) -> None:
    x = {"blk.0.attn_q.weight": A, "blk.1.attn_q.weight": B, "token_embd.weight": C}
    with open_checkpoint(save(tmp_path / "x.safetensors", **x)) as checkpoint:
        renamed = checkpoint.renamed(
            [(r"^blk\.(\d+)\.", r"layers.\1."), (r"attn_q", "self_attn.q_proj"), ("^token", None)]
        )
        assert set(renamed) == {"layers.0.self_attn.q_proj.weight", "layers.1.self_attn.q_proj.weight"}
        info = renamed["layers.1.self_attn.q_proj.weight"]
        assert (info.name, info.name_in_file) == ("layers.1.self_attn.q_proj.weight", "blk.1.attn_q.weight")
        np.testing.assert_array_equal(renamed.read("layers.1.self_attn.q_proj.weight"), B)
        again = renamed.renamed([("layers", "x")])
        assert again["x.1.self_attn.q_proj.weight"].name_in_file == "blk.1.attn_q.weight"
        assert set(checkpoint) == set(x)  # the original is as it was
        with pytest.raises(LoadError, match=r"'blk\.0\.attn_q\.weight' and 'blk\.1\.attn_q\.weight'") as caught:
            checkpoint.renamed([(r"^blk\.\d+", "layer")])
        assert caught.value.kind == "DuplicateTensor"


def test_prefix(tmp_path: Path) -> None:
    x = {"model.diffusion_model.a": A, "model.diffusion_model.b": B, "first_stage_model.c": C}
    with open_checkpoint(save(tmp_path / "x.safetensors", **x)) as checkpoint:
        dit = checkpoint.without_prefix("model.diffusion_model.")
        assert set(dit) == {"a", "b"} and dit["a"].name_in_file == "model.diffusion_model.a"
        assert checkpoint.without_prefix("other.") is checkpoint


def test_close_of_a_renamed_one_closes_the_files(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "x.safetensors", a=A))
    with checkpoint.renamed([("a", "b")]):
        pass
    assert all(file.closed for file in checkpoint.files)


def test_changed_names_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", a=A)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.changed() is None
        os.truncate(path, 100)
        assert str(path) in str(checkpoint.changed())


# an index of shards


def test_shards(sharded: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = index(sharded, {"a": "s1.safetensors", "b": "s1.safetensors", "c": "s2.safetensors"},
                 metadata={"total_size": 72})  # fmt: skip
    (sharded / "config.json").write_text('{"hidden_size": 8}')
    for place in (path, sharded):
        with open_checkpoint(place) as checkpoint:
            assert set(checkpoint) == {"a", "b", "c"} and len(checkpoint.files) == 2
            assert checkpoint.config == {"hidden_size": 8} and checkpoint.metadata == {"format": "pt"}
            np.testing.assert_array_equal(checkpoint.read("c"), C)
            assert checkpoint.warnings == ()
    assert not caplog.records


@pytest.mark.parametrize("text", ["{", "[]", "null", "1", '"x"'])
def test_x1_index_is_not_an_object(sharded: Path, text: str) -> None:
    path = sharded / "x.safetensors.index.json"
    path.write_text(text)
    assert refusal(path).kind == "BadHeader"


@pytest.mark.parametrize(
    "table", [{}, {"weight_map": []}, {"weight_map": None}, {"weight_map": {"a": 1}}, {"weight_map": {}}]
)
def test_x2_no_weight_map(sharded: Path, table: Any) -> None:
    path = sharded / "x.safetensors.index.json"
    path.write_text(json.dumps(table))
    assert refusal(path).kind == "BadHeader"


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../s1.safetensors", "x/../../s1.safetensors", "a\0b", "..\\s1.safetensors", "C:s1.safetensors",
     "\\\\host\\x", "//host/x", "s1.safetensors.", "s1.safetensors ", "", " ", ".", "x/", "a\nb", "https://host/x"],
)  # fmt: skip
def test_x3_x4_x6_unsafe_names(sharded: Path, name: str) -> None:
    error = refusal(index(sharded, {"a": name}))
    assert error.kind == "UnsafePath" and error.tensor == "a"


def test_x5_link_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside").mkdir()
    save(tmp_path / "outside" / "s.safetensors", a=A)
    (tmp_path / "inside" / "s.safetensors").symlink_to(tmp_path / "outside" / "s.safetensors")
    path = index(tmp_path / "inside", {"a": "s.safetensors"})
    assert refusal(path).kind == "UnsafePath"
    with open_checkpoint(path, roots=[tmp_path / "outside"]) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("a"), A)
    (tmp_path / "outside2").mkdir()
    assert refusal(path, roots=[tmp_path / "out"]).kind == "UnsafePath"  # a prefix of a name is not a parent


def test_x5_the_hugging_face_cache_is_allowed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "0123" / "transformer"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save(blobs / "aaaa", a=A)
    (snapshot / "s1.safetensors").symlink_to("../../../blobs/aaaa")
    index(blobs, {"a": "s1.safetensors"}).rename(blobs / "bbbb")
    (snapshot / "diffusion_pytorch_model.safetensors.index.json").symlink_to("../../../blobs/bbbb")
    with open_checkpoint(snapshot) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("a"), A)


def test_x7_all_missing_shards_are_named(sharded: Path) -> None:
    error = refusal(index(sharded, {"a": "s1.safetensors", "b": "s8.safetensors", "c": "s9.safetensors"}))
    assert error.kind == "MissingFile" and "s8" in str(error) and "s9" in str(error) and "s1" not in error.message


def test_x8_tensor_not_in_its_shard(sharded: Path) -> None:
    error = refusal(index(sharded, {"a": "s1.safetensors", "b": "s1.safetensors", "z": "s2.safetensors"}))
    assert error.kind == "MissingTensor" and error.tensor == "z" and str(error.path).endswith("s2.safetensors")


def test_x9_tensor_not_in_the_index(sharded: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_checkpoint(index(sharded, {"a": "s1.safetensors"})) as checkpoint:
        assert set(checkpoint) == {"a"}
        assert len(checkpoint.warnings) == 1 and "'b'" in checkpoint.warnings[0]
    assert [r.levelno for r in caplog.records] == [logging.WARNING]


def test_x10_tensor_in_two_shards(sharded: Path) -> None:
    save(sharded / "s2.safetensors", c=C, a=A)
    error = refusal(index(sharded, {"a": "s1.safetensors", "b": "s1.safetensors", "c": "s2.safetensors"}))
    assert error.kind == "DuplicateTensor" and error.tensor == "a"
    path = sharded / "model.safetensors.index.json"
    path.write_text('{"weight_map": {"a": "s1.safetensors", "a": "s2.safetensors"}}')
    assert refusal(path).kind == "DuplicateTensor"


def test_x11_one_file_by_two_names(sharded: Path) -> None:
    (sharded / "link.safetensors").symlink_to("s1.safetensors")
    weight_map = {"a": "s1.safetensors", "b": "./s1.safetensors", "c": "s2.safetensors"}
    with open_checkpoint(index(sharded, weight_map)) as checkpoint:
        assert len(checkpoint.files) == 2
    weight_map["b"] = "link.safetensors"
    with open_checkpoint(index(sharded, weight_map)) as checkpoint:
        assert len(checkpoint.files) == 2 and set(checkpoint) == {"a", "b", "c"}


def test_x11_index_naming_itself(sharded: Path) -> None:
    assert refusal(index(sharded, {"a": "model.safetensors.index.json"})).kind == "UnsafePath"


def test_x12_wrong_total_size(sharded: Path, caplog: pytest.LogCaptureFixture) -> None:
    for total in (0, 10**30, -1):
        weight_map = {"a": "s1.safetensors", "b": "s1.safetensors"}
        with open_checkpoint(index(sharded, weight_map, metadata={"total_size": total})) as checkpoint:
            assert "48" in checkpoint.warnings[0]
    assert len(caplog.records) == 3


def test_x13_too_many_shards(sharded: Path) -> None:
    error = refusal(index(sharded, {f"t{i}": f"s{i}.safetensors" for i in range(100_000)}))
    assert error.kind == "LimitExceeded"
    assert refusal(index(sharded, {"a": "s1.safetensors", "c": "s2.safetensors"}), limits=Limits(n_shards=1))


def test_x14_parts_by_number(tmp_path: Path) -> None:
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for name, (key, array) in zip(names, [("a", A), ("b", B), ("c", C)], strict=True):
        save(tmp_path / name, **{key: array})
    for place in (*(tmp_path / name for name in names), tmp_path):
        with open_checkpoint(place) as checkpoint:
            assert set(checkpoint) == {"a", "b", "c"}
    (tmp_path / names[1]).unlink()
    error = refusal(tmp_path / names[0])
    assert error.kind == "MissingFile" and names[1] in str(error) and names[2] not in error.message
    save(tmp_path / names[1], a=A)
    assert refusal(tmp_path / names[0]).kind == "DuplicateTensor"


@pytest.mark.skipif(sys.platform == "win32", reason="hard links")
def test_x15_names_that_differ_in_case_only(sharded: Path) -> None:
    os.link(sharded / "s1.safetensors", sharded / "S1.safetensors")  # as a case-insensitive file system shows it
    assert refusal(index(sharded, {"a": "s1.safetensors", "b": "S1.safetensors"})).kind == "DuplicateTensor"


def test_a_bad_shard_is_named(sharded: Path) -> None:
    data = (sharded / "s2.safetensors").read_bytes()
    (sharded / "s2.safetensors").write_bytes(data[:-1])
    error = refusal(index(sharded, {"a": "s1.safetensors", "c": "s2.safetensors"}))
    assert error.kind == "TruncatedFile" and str(error.path).endswith("s2.safetensors")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_refusal_leaks_descriptors(sharded: Path) -> None:
    (sharded / "bad.safetensors").write_bytes(GOOD[:-1])
    before = len(os.listdir("/proc/self/fd"))
    for weight_map in (
        {"a": "s1.safetensors", "c": "bad.safetensors"},
        {"a": "s1.safetensors", "z": "s2.safetensors"},
        {"a": "s1.safetensors", "c": "missing"},
    ):
        refusal(index(sharded, weight_map))
    refusal(sharded / "bad.safetensors")
    assert len(os.listdir("/proc/self/fd")) == before


# folders


def test_folders(tmp_path: Path) -> None:
    assert refusal(tmp_path).kind == "MissingFile"
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    save(tmp_path / "any.safetensors", a=A)
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint) == {"a"} and checkpoint.config["_class_name"] == "AutoencoderKL"
    save(tmp_path / "other.safetensors", b=B)
    error = refusal(tmp_path)
    assert "any.safetensors" in str(error) and "other.safetensors" in str(error)
    save(tmp_path / "model.safetensors", c=C)
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint) == {"c"} and checkpoint.path == str(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert refusal(tmp_path).kind == "BadHeader"


def test_folder_of_a_pipeline_names_its_parts(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "transformer").mkdir()
    assert "transformer" in str(refusal(tmp_path))


# gguf in parts


def split(
    folder: Path, n: int, *, count: int | None = None, total: int = 3, numbers: list[int] | None = None
) -> list[Path]:
    paths = [folder / f"big-{i + 1:05d}-of-{n:05d}.gguf" for i in range(n)]
    for i, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "test")
        if i == 0:
            writer.add_string("general.name", "big")
        writer.add_uint16("split.no", numbers[i] if numbers else i)
        writer.add_uint16("split.count", n if count is None else count)
        writer.add_int32("split.tensors.count", total)
        for key in "abc"[i : i + 1] if i < n - 1 else "abc"[i:]:
            writer.add_tensor(key, A)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_gguf_parts(tmp_path: Path) -> None:
    paths = split(tmp_path, 2)
    for path in (*paths, tmp_path):
        with open_checkpoint(path) as checkpoint:
            assert set(checkpoint) == {"a", "b", "c"} and checkpoint.metadata["general.name"] == "big"
            assert len(checkpoint.files) == 2
    paths[0].rename(tmp_path / "renamed.gguf")
    assert refusal(tmp_path / "renamed.gguf").kind == "MissingFile"
    assert refusal(paths[1]).kind == "MissingFile"


def test_gguf_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    assert refusal(split(tmp_path, 2, count=3)[0]).field == "split.count"
    assert refusal(split(tmp_path, 2, numbers=[1, 0])[0]).field == "split.no"
    assert refusal(split(tmp_path, 2, total=7)[0]).kind == "MissingTensor"
    (tmp_path / "x-00003-of-00002.gguf").write_bytes((tmp_path / "big-00001-of-00002.gguf").read_bytes())
    assert "part 3 of 2" in str(refusal(tmp_path / "x-00003-of-00002.gguf"))


def test_a_split_count_that_is_text_stays_one_line(tmp_path: Path) -> None:
    """What a file says of itself may be anything, a terminal's commands too. (Found by the fuzzer.)"""
    (tmp_path / "x.gguf").write_bytes(with_kv(kv("split.count", STR, text("2\n\x1b[2J"))))
    error = refusal(tmp_path / "x.gguf")
    assert error.kind == "MissingFile" and str(error).isprintable() and r"one part of '2\n\x1b[2J'" in str(error)


def test_every_word_of_a_refusal_is_escaped(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[2Jb\nc\udcff.gguf"
    path.write_bytes(b"GGUF")
    text = str(refusal(path))
    assert text.isprintable() and r"a\x1b[2Jb\nc\udcff.gguf" in text
    error = LoadError("bad \x1b[1m", path="x\n", tensor="t\r", field="f\x00", offset=3, hint="see \u202ey")
    assert str(error) == r"x\n, tensor 't\r', f\x00, byte 3: bad \x1b[1m; see \u202ey" == error.args[0]
    assert error.message == "bad \x1b[1m" and error.path == "x\n"  # as they are, for programs
    assert str(LoadError("keine Übergröße, 中文")) == "keine Übergröße, 中文"


def test_package_holds_no_pickle() -> None:
    """What cannot run code is shown by absence."""
    folder = Path(open_checkpoint.__code__.co_filename).parent
    for path in folder.glob("*.py"):
        source = path.read_text()
        for word in ("import pickle", "torch.load", "eval(", "exec(", "trust_remote_code"):
            assert word not in source, f"{path.name}: {word}"


def test_repr_says_what_it_is(sharded: Path) -> None:
    with open_checkpoint(sharded / "s1.safetensors") as checkpoint:
        assert isinstance(checkpoint, Checkpoint) and "2 tensors in 1 files" in repr(checkpoint)
