"""Writing checkpoints: bytes, types, rules, metadata, and what happens when something goes wrong."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import namedtuple
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy
from tiny_models import write_tiny_models

import models
from loader import Checkpoint, LoadError, Param, load_params, open_checkpoint
from loader import save as saving
from loader.convert import encode, read_float32
from loader.dtypes import SAFETENSORS_BITS
from loader.file_heads import Entry, safetensors_head
from loader.imatrix import read_importance
from loader.save import SaveReport, save_checkpoint
from loader.save_plan import TYPES, parse_rules, parse_type
from pyggml import Backend, GGMLError, Type
from pyggml.quantize import quantize
from studio import cli

ROOT = Path(__file__).parents[1]
RNG = np.random.default_rng(5)
W = RNG.normal(0, 0.1, (8, 512)).astype(np.float32)
V = RNG.normal(0, 1, 512).astype(np.float32)


def bf16(values: np.ndarray) -> bytes:
    return (np.ascontiguousarray(values, "<f4").view("<u4") >> 16).astype("<u2").tobytes()


def store(path: Path, table: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of arrays, or of (dtype, shape, bytes)."""
    names = {"float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64", "int32": "I32", "bool": "BOOL"}
    raw = {
        name: value if isinstance(value, tuple) else (names[str(value.dtype)], value.shape, value.tobytes())
        for name, value in table.items()
    }
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, (dtype, shape, content) in raw.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def convert(source: Path, target: Path, *, raw: bool = False, **options: Any) -> SaveReport:
    with open_checkpoint(source, raw=raw) as checkpoint:
        return save_checkpoint(checkpoint, target, **options)


def dtypes(path: Path) -> dict[str, str]:
    with open_checkpoint(path, raw=True) as checkpoint:
        return {name: info.dtype for name, info in checkpoint.items()}


def values(path: Path, name: str) -> np.ndarray:
    with open_checkpoint(path) as checkpoint:
        return read_float32(checkpoint[name]).reshape(checkpoint[name].shape)


def content(checkpoint: Checkpoint, name: str) -> bytes:
    info = checkpoint[name]
    return info.file.read_at(info.offset, info.n_bytes)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return store(tmp_path / "in.safetensors", {"a.weight": ("BF16", W.shape, bf16(W)), "norm.weight": V},
                 {"modelspec.title": "größe", "format": "pt"})  # fmt: skip


# the formats, byte by byte


def test_gguf_files_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    """Read by our reader, written by our writer: the same file again."""
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "lumina2")
    writer.add_uint32("k.u32", 7)
    writer.add_float64("k.f64", 0.5)
    writer.add_array("k.strs", ["a", "größe"] * 2000)
    writer.add_array("k.bools", [True, False])
    for i, dtype in enumerate((np.float32, np.float16, np.int8, np.int32, np.int64, np.float64)):
        for shape in ((5,), (3, 64), (2, 1, 3, 5)):
            writer.add_tensor(f"t{i}.{len(shape)}", RNG.normal(0, 50, shape).astype(dtype))
    quantised = gguf.quants.quantize(W, gguf.GGMLQuantizationType.Q5_1)
    writer.add_tensor("q", quantised, raw_dtype=gguf.GGMLQuantizationType.Q5_1)
    writer.add_quantization_version(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = convert(path, tmp_path / "ours.gguf")
    assert (tmp_path / "ours.gguf").read_bytes() == path.read_bytes()
    assert report.notes == () and report.types["Q5_1"].n_converted == 0


def test_safetensors_files_are_those_of_the_reference(tmp_path: Path) -> None:
    names = ("?", "u1", "i1", "<i2", "<u2", "<f2", "<i4", "<u4", "<f4", "<f8", "<i8", "<u8", "<c8")
    arrays = {f"größe.{name}.{len(shape)}": RNG.integers(0, 2, shape).astype(name)
              for name in names for shape in ((), (7,), (3, 0), (2, 3, 4))}  # fmt: skip
    safetensors.numpy.save_file(arrays, tmp_path / "theirs.safetensors", {"k": 'quoted "ü" \\ \n'})
    convert(tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors")
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_all_data_is_aligned_in_safetensors() -> None:
    entries = [Entry(f"t{i}", (3,) if bits >= 8 else (8,), dtype) for i, (dtype, bits) in
               enumerate(SAFETENSORS_BITS.items())]  # fmt: skip
    head = safetensors_head(entries, {})
    for entry in entries:
        assert head.offsets[entry.name] % max(1, SAFETENSORS_BITS[entry.dtype] // 8) == 0, entry


@pytest.mark.parametrize("name", [name for name, kind in TYPES.items()
                                  if not name.startswith(("iq1", "iq2"))])  # seconds for their tables  # fmt: skip
def test_every_type_is_what_ggml_makes_of_the_values(tmp_path: Path, source: Path, name: str) -> None:
    report = convert(source, tmp_path / "x.gguf", type=parse_type(name.upper()))
    kind = TYPES[name]
    exact = values(source, "a.weight")
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        assert content(checkpoint, "a.weight") == encode(exact.reshape(-1), kind, 512).tobytes()
        assert checkpoint["norm.weight"].dtype == "F32"
    if kind.name in gguf.GGMLQuantizationType.__members__:
        theirs = {t.name: t for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
        assert theirs["a.weight"].tensor_type.name == kind.name and theirs["a.weight"].shape.tolist() == [512, 8]
    far = values(tmp_path / "x.gguf", "a.weight") - exact
    error = np.sqrt(np.sum(far.astype(np.float64) ** 2) / np.sum(exact.astype(np.float64) ** 2))
    assert report.types[kind.name].error == pytest.approx(error, rel=1e-3, abs=1e-9)
    assert error < {"q8_0": 0.01, "q4_k": 0.09, "q6_k": 0.03, "f16": 1e-3, "bf16": 0, "f32": 0}.get(name, 0.95) + 1e-12
    assert report.kept == {"a vector": 1}


def test_threads_and_pieces_do_not_show(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(source, tmp_path / "1.gguf", type=Type.Q4_K, n_threads=1)
    monkeypatch.setattr(saving, "STAGING", 10_000)
    convert(source, tmp_path / "2.gguf", type=Type.Q4_K, n_threads=4)
    monkeypatch.setattr(saving, "STAGING", 5_000)  # less than a row
    convert(source, tmp_path / "3.gguf", type=Type.Q4_K, n_threads=4)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "3.gguf").read_bytes()


def test_memory_is_a_few_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = store(tmp_path / "big.safetensors", {f"{i}.weight": np.tile(W, (128, 1)) for i in range(8)})  # 2 MB each
    convert(big, tmp_path / "warm.gguf", type=Type.Q8_0)
    monkeypatch.setattr(saving, "STAGING", 1 << 17)
    tracemalloc.start()
    convert(big, tmp_path / "x.gguf", type=Type.Q8_0, n_threads=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * (1 << 17)


# which type


def test_rules(tmp_path: Path, source: Path) -> None:
    path = store(tmp_path / "m.safetensors", {name: W for name in (
        "a.x.weight", "b.x.weight", "img_in.weight", "c.weight", "a.x.bias")})  # fmt: skip
    rules = parse_rules(r"^a\.=Q5_0,x=q4_K,_in=bf16,,img=f16")
    convert(path, tmp_path / "x.gguf", type=Type.Q8_0, rules=rules)
    assert dtypes(tmp_path / "x.gguf") == {
        "a.x.weight": "Q5_0", "b.x.weight": "Q4_K", "img_in.weight": "BF16", "c.weight": "Q8_0", "a.x.bias": "F32",
    }  # fmt: skip
    convert(path, tmp_path / "y.gguf", rules=rules)
    assert dtypes(tmp_path / "y.gguf")["c.weight"] == "F32"
    for text in ("q8_0", "=q8_0", "a=", "a=q9", "(=f16"):
        with pytest.raises(ValueError, match=r"rule|unknown type|regular"):
            parse_rules(text)
    with pytest.raises(ValueError, match=r"known are f32, f16, q4_0"):
        parse_type("q9")


@pytest.mark.parametrize("name", [
    "x.bias", "x.scale", "x.weight_scale", "img_in.weight", "txt_in.weight", "time_in.a.weight", "vector_in.b",
    "guidance_in.c", "final_layer.linear.weight", "all_final_layer.2-1.linear.weight", "x_embedder.weight",
    "t_embedder.mlp.0.weight", "y_embedder.w", "pos_embed", "context_embedder.weight", "time_embed.0.weight",
    "label_emb.0.0.weight", "time_text_embed.addition_t_embedding.weight",
])  # fmt: skip
def test_names_that_keep_their_type(tmp_path: Path, name: str) -> None:
    store(tmp_path / "m.safetensors", {name: W, "blk.0.attn_q.weight": W, "embed_tokens.weight": W})
    report = convert(tmp_path / "m.safetensors", tmp_path / "x.gguf", type=Type.Q8_0)
    assert dtypes(tmp_path / "x.gguf") == {name: "F32", "blk.0.attn_q.weight": "Q8_0", "embed_tokens.weight": "Q8_0"}
    assert report.kept == {"sensitive, by its name": 1}


def test_shapes_that_keep_their_type(tmp_path: Path) -> None:
    store(tmp_path / "m.safetensors", {
        "row": W[:, :500], "vector": V.astype(np.float16), "pad_token": V[None], "number": np.array(3, np.float32),
        "conv": np.ones((4, 3, 3, 3), np.float16), "ids": np.arange(512).reshape(1, 512).repeat(2, 0),
    })  # fmt: skip
    report = convert(tmp_path / "m.safetensors", tmp_path / "x.gguf", type=Type.Q4_K)
    assert dtypes(tmp_path / "x.gguf") == {
        "row": "F32", "vector": "F32", "pad_token": "F32", "number": "F32", "conv": "F16", "ids": "I64",
    }  # fmt: skip
    assert report.kept == {"rows are no multiple of Q4_K's 256": 2, "a vector": 3, "no floating-point values": 1}
    convert(tmp_path / "m.safetensors", tmp_path / "y.safetensors", type=Type.F16)
    assert dtypes(tmp_path / "y.safetensors") == {
        "row": "F16", "vector": "F16", "pad_token": "F32", "number": "F32", "conv": "F16", "ids": "I64",
    }  # fmt: skip


def test_what_gguf_lacks(tmp_path: Path) -> None:
    codes = np.arange(64, dtype=np.uint8).reshape(2, 32)
    table = {
        "f8": ("F8_E4M3", (2, 32), codes.tobytes()), "u8": ("U8", (2, 32), codes.tobytes()),
        "f64": W.astype(np.float64), "bool": np.ones((2, 2), bool), "u64": ("U64", (2,), struct.pack("<QQ", 1, 2)),
        "conv3d": np.ones((2, 3, 1, 3, 3), np.float32), "empty": np.ones((0, 4), np.float32),
    }  # fmt: skip
    report = convert(store(tmp_path / "m.safetensors", table), tmp_path / "x.gguf")
    assert dtypes(tmp_path / "x.gguf") == {"f8": "F16", "u8": "I32", "f64": "F32", "bool": "I32", "u64": "I64",
                                           "conv3d": "F32", "empty": "F32"}  # fmt: skip
    assert any("more than gguf's 4 dimensions" in note for note in report.notes)
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        assert checkpoint["conv3d"].ne == (3, 3, 1, 6) and checkpoint["empty"].ne == (4, 0)
        np.testing.assert_array_equal(checkpoint.read("u8"), codes)
    np.testing.assert_array_equal(values(tmp_path / "x.gguf", "f8"), values(tmp_path / "m.safetensors", "f8"))
    for bad in (("U64", (1,), struct.pack("<Q", 1 << 63)), ("C64", (1,), bytes(8))):
        with pytest.raises(LoadError):
            convert(store(tmp_path / "bad.safetensors", {"x": bad}), tmp_path / "bad.gguf")
    assert not (tmp_path / "bad.gguf").exists()


def test_what_safetensors_lacks(tmp_path: Path, source: Path) -> None:
    with pytest.raises(LoadError, match=r"safetensors has no q8_0.*gguf"):
        convert(source, tmp_path / "x.safetensors", type=Type.Q8_0)
    convert(source, tmp_path / "q.gguf", type=Type.Q8_0, rules=parse_rules("norm=f32"))
    with pytest.raises(LoadError, match=r"Q8_0, which safetensors has not; give a type"):
        convert(tmp_path / "q.gguf", tmp_path / "x.safetensors")
    report = convert(tmp_path / "q.gguf", tmp_path / "x.safetensors", type=Type.F16)
    assert dtypes(tmp_path / "x.safetensors") == {"a.weight": "F16", "norm.weight": "F32"}
    np.testing.assert_allclose(values(tmp_path / "x.safetensors", "a.weight"), W, atol=0.01)
    assert report.types["F16"].error < 1e-3
    report = convert(tmp_path / "q.gguf", tmp_path / "q4.gguf", type=Type.Q4_K)
    assert "quantised already" in report.notes[0]


@pytest.mark.parametrize("name, number, size", [("Q8_1", 9, 36 * 16), ("Q8_K", 15, 292 * 2)])
def test_types_that_ggml_cannot_read(tmp_path: Path, name: str, number: int, size: int) -> None:
    """Q8_1 and Q8_K are formats of activations: copied, never converted. (Found by the fuzzer.)"""
    head = b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQQIQ", 2, 512, 1, number, 0)
    (tmp_path / "q.gguf").write_bytes(head + bytes(-len(head) % 32) + bytes(-size % 32 + size))
    convert(tmp_path / "q.gguf", tmp_path / "x.gguf", type=Type.F32)
    assert dtypes(tmp_path / "x.gguf") == {"t": name}
    with pytest.raises(LoadError, match=f"is {name}, which safetensors has not"):
        convert(tmp_path / "q.gguf", tmp_path / "x.safetensors", type=Type.F16)
    with open_checkpoint(tmp_path / "q.gguf") as checkpoint, Backend.cpu(1) as backend:
        params = {"t": Param((512, 1), Type.F32)}
        with pytest.raises(LoadError, match=f"is {name}, which cannot become F32"):
            load_params(params, checkpoint, backend=backend, component="test")


# metadata


def test_metadata_of_gguf_stays_byte_for_byte(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "in.gguf", "qwen3")
    writer.add_uint16("qwen3.odd", 3)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(5000)])
    writer.add_array("tokenizer.ggml.token_type", [1] * 5000)
    writer.add_file_type(1)
    writer.add_custom_alignment(64)
    writer.add_tensor("blk.0.attn_q.weight", W)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    convert(tmp_path / "in.gguf", tmp_path / "out.gguf", type=Type.Q8_0)
    ours, theirs = gguf.GGUFReader(tmp_path / "out.gguf"), gguf.GGUFReader(tmp_path / "in.gguf")
    kept = [k for k in theirs.fields if not k.startswith("GGUF.") and k != "general.alignment"]
    assert [k for k in ours.fields if not k.startswith("GGUF.")] == [*kept, "general.quantization_version"]
    for key in kept:
        if key != "general.file_type":
            assert [p.tobytes() for p in ours.fields[key].parts] == [p.tobytes() for p in theirs.fields[key].parts]
    assert ours.fields["general.file_type"].contents() == 7
    assert ours.fields["general.quantization_version"].contents() == 2
    report = convert(tmp_path / "out.gguf", tmp_path / "back.safetensors", type=Type.F32)
    assert "tokenizer.ggml.tokens" in report.notes[0]
    with open_checkpoint(tmp_path / "back.safetensors") as checkpoint:
        assert dict(checkpoint.metadata) == {
            "general.architecture": "qwen3", "qwen3.odd": "3", "general.quantization_version": "2"}  # fmt: skip


def test_metadata_of_safetensors_goes_along(tmp_path: Path, source: Path) -> None:
    report = convert(source, tmp_path / "x.gguf")
    assert "architecture is not known" in report.notes[0]
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        assert dict(checkpoint.metadata) == {"general.file_type": 32, "modelspec.title": "größe"}
    convert(tmp_path / "x.gguf", tmp_path / "y.safetensors")
    with open_checkpoint(tmp_path / "y.safetensors") as back, open_checkpoint(source) as first:
        assert content(back, "a.weight") == content(first, "a.weight") and back.metadata["modelspec.title"] == "größe"


@pytest.mark.parametrize("part, name, change", [
    ("diffusion_model", "lumina2", ()), ("llm", "qwen3", ()), ("vae", None, ()),
])  # fmt: skip
def test_architecture_by_the_tensors(tmp_path: Path, part: str, name: str | None, change: Any) -> None:
    path = write_tiny_models(tmp_path)[part]
    convert(path, tmp_path / "x.gguf")
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        assert checkpoint.metadata.get("general.architecture") == name


def test_config_json_goes_along(tmp_path: Path) -> None:
    folder = write_tiny_models(tmp_path)["llm"].parent
    config = json.loads((folder / "config.json").read_text())
    convert(folder, tmp_path / "x.gguf")
    convert(tmp_path / "x.gguf", tmp_path / "y.safetensors")
    convert(tmp_path / "y.safetensors", tmp_path / "z.gguf")
    for name in ("x.gguf", "y.safetensors", "z.gguf"):
        with open_checkpoint(tmp_path / name) as checkpoint:
            assert checkpoint.config == config
    store(tmp_path / "bad.safetensors", {"a": V}, {"pyggml.config": "[]"})
    with pytest.raises(LoadError, match=r"pyggml\.config: not a JSON object"):
        open_checkpoint(tmp_path / "bad.safetensors")


# 8-bit weights with scales


def test_scaled_fp8(tmp_path: Path) -> None:
    codes = RNG.integers(0, 0x7E, (8, 512)).astype(np.uint8)
    table = {"a.weight": ("F8_E4M3", codes.shape, codes.tobytes()), "a.scale_weight": np.array(0.01, np.float32),
             "a.scale_input": np.array(1.5, np.float32), "scaled_fp8": ("F8_E4M3", (0,), b""),
             "img_in.weight": ("F8_E4M3", codes.shape, codes.tobytes()),
             "img_in.scale_weight": np.array([500], np.float32)}  # fmt: skip
    path = store(tmp_path / "in.safetensors", table, {"_quantization_metadata": "{}", "k": "v"})
    exact = values(path, "a.weight")
    convert(path, tmp_path / "same.safetensors", raw=True)
    assert dtypes(tmp_path / "same.safetensors") == dtypes(path)
    np.testing.assert_array_equal(values(tmp_path / "same.safetensors", "a.weight"), exact)

    convert(path, tmp_path / "f32.safetensors", type=Type.F32)
    with open_checkpoint(tmp_path / "f32.safetensors") as checkpoint:
        assert {name: i.dtype for name, i in checkpoint.items()} == {"a.weight": "F32", "img_in.weight": "BF16"}
        assert dict(checkpoint.metadata) == {"k": "v"}
        np.testing.assert_array_equal(checkpoint.read("a.weight"), exact)
    convert(path, tmp_path / "x.gguf")
    assert dtypes(tmp_path / "x.gguf") == {"a.weight": "F16", "img_in.weight": "BF16"}
    np.testing.assert_array_equal(values(tmp_path / "x.gguf", "a.weight"), exact.astype(np.float16))
    convert(path, tmp_path / "q.gguf", type=Type.Q8_0)
    np.testing.assert_allclose(values(tmp_path / "q.gguf", "a.weight"), exact, atol=448 * 0.01 / 127)
    with pytest.raises(LoadError, match=r"tensor 'img_in\.weight'.*65504.*--tensor-type-rules"):
        convert(path, tmp_path / "o.gguf", rules=parse_rules("img=f16"))
    assert not (tmp_path / "o.gguf").exists()


# sources of several files


def test_several_files_become_one(tmp_path: Path) -> None:
    for i in (1, 2):
        writer = gguf.GGUFWriter(tmp_path / f"m-0000{i}-of-00002.gguf", "qwen3")
        writer.add_uint16("split.no", i - 1)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", 2)
        writer.add_tensor(f"t{i}", W * i)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    convert(tmp_path / "m-00001-of-00002.gguf", tmp_path / "one.gguf")
    with open_checkpoint(tmp_path / "one.gguf") as checkpoint:
        assert set(checkpoint) == {"t1", "t2"} and dict(checkpoint.metadata) == {"general.architecture": "qwen3"}
        np.testing.assert_array_equal(checkpoint.read("t2"), W * 2)
    for place in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf"):
        with pytest.raises(ValueError, match="is the source itself"):
            convert(tmp_path / "m-00001-of-00002.gguf", tmp_path / place)
    store(tmp_path / "s1.safetensors", {"a": W})
    store(tmp_path / "s2.safetensors", {"b": V})
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "s1.safetensors", "b": "s2.safetensors"}}))
    convert(index, tmp_path / "two.safetensors")
    assert dtypes(tmp_path / "two.safetensors") == {"a": "F32", "b": "F32"}


# importance


def write_imatrix(path: Path, columns: dict[str, np.ndarray], *, old: bool = False, count: int = 4) -> Path:
    if old:
        data = struct.pack("<i", len(columns))
        for name, column in columns.items():
            data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", count, column.size)
            data += (column * count).astype("<f4").tobytes()
        path.write_bytes(data + struct.pack("<i", 7) + struct.pack("<i", 3) + b"set")
        return path
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_string("general.type", "imatrix")
    for name, column in columns.items():
        writer.add_tensor(f"{name}.in_sum2", (column * count).astype(np.float32)[None])
        writer.add_tensor(f"{name}.counts", np.array([[count]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("old", [False, True])
def test_importance(tmp_path: Path, source: Path, old: bool) -> None:
    column = RNG.uniform(0, 2, 512).astype(np.float32)
    path = write_imatrix(tmp_path / "imatrix", {"a.weight": column, "unknown": column}, old=old)
    importance = read_importance(path)
    np.testing.assert_allclose(importance["a.weight"], column, rtol=1e-6)
    for name in ("q4_k", *(["iq2_xxs"] if old else [])):
        report = convert(source, tmp_path / "x.gguf", type=TYPES[name], importance=importance)
        assert "importance known for 1 of 1 quantised tensors" in report.notes
        with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
            exact = values(source, "a.weight").reshape(-1)
            assert content(checkpoint, "a.weight") == encode(exact, TYPES[name], 512, importance["a.weight"]).tobytes()
            if name == "q4_k":
                assert content(checkpoint, "a.weight") != encode(exact, TYPES[name], 512).tobytes()
    with pytest.raises(LoadError, match="cannot be made without an importance"):
        convert(source, tmp_path / "y.gguf", type=TYPES["iq2_xxs"])
    with pytest.raises(ValueError, match="fits none of the 1 tensors"):
        convert(source, tmp_path / "y.gguf", type=Type.Q4_K, importance={"other": column})
    with pytest.raises(LoadError, match="511 columns, the tensor 512"):
        convert(source, tmp_path / "y.gguf", type=Type.Q4_K, importance={"a.weight": column[1:]})


@pytest.mark.parametrize("name", ["iq2_xxs", "q4_k"])  # the tables of the others take seconds each
def test_importance_of_any_size(name: str) -> None:
    """ggml ends the process when a sum is infinite; only proportions count."""
    column = RNG.uniform(0.5, 2, 512).astype(np.float32)
    expected = encode(W, TYPES[name], 512, column).tobytes()
    for factor in (2.0**120, 2.0**-90):
        assert encode(W, TYPES[name], 512, column * np.float32(factor)).tobytes() == expected
    if name.startswith("iq"):
        with pytest.raises(OverflowError, match=r"holds values over 6\.71089e"):
            encode(np.full((1, 512), 3e38, np.float32), TYPES[name], 512, column)
    for wrong in (-column, column * np.float32(np.inf), column * np.float32(np.nan)):
        with pytest.raises(GGMLError, match="negative or not finite"):
            quantize(W, TYPES[name], wrong)


def test_importance_files_that_are_none(tmp_path: Path, source: Path) -> None:
    bad = [b"\0" * 4, b"\1\0\0\0", b"abcdefgh", struct.pack("<ii", 1, 1 << 30), struct.pack("<ii", 1, -1),
           struct.pack("<ii1sii", 1, 1, b"x", 1, 1 << 30), struct.pack("<ii1siif", 1, 1, b"x", 1, 1, np.nan),
           struct.pack("<ii1siif", 1, 1, b"x", 0, 1, 1.0)]  # fmt: skip
    for data in bad:
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(LoadError):
            read_importance(tmp_path / "x")
    convert(source, tmp_path / "x.gguf")
    with pytest.raises(LoadError, match="no importance matrix"):
        read_importance(tmp_path / "x.gguf")


# changed tensors


def test_changed_values(tmp_path: Path, source: Path) -> None:
    exact = values(source, "a.weight")
    convert(source, tmp_path / "x.gguf", type=Type.Q8_0, changes={"a.weight": lambda v: v + 1})
    np.testing.assert_allclose(values(tmp_path / "x.gguf", "a.weight"), exact + 1, atol=0.02)
    convert(tmp_path / "x.gguf", tmp_path / "y.gguf", changes={"a.weight": lambda v: v - 1})
    assert dtypes(tmp_path / "y.gguf")["a.weight"] == "Q8_0"
    np.testing.assert_allclose(values(tmp_path / "y.gguf", "a.weight"), exact, atol=0.03)
    with pytest.raises(ValueError, match=r"shape \(8, 512\), what it was changed to \(512, 8\)"):
        convert(source, tmp_path / "z.gguf", changes={"a.weight": lambda v: v.T})
    with pytest.raises(ValueError, match="no tensor 'b' to change"):
        convert(source, tmp_path / "z.gguf", changes={"b": lambda v: v})
    assert not (tmp_path / "z.gguf").exists()


# what can go wrong


def leftovers(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name not in ("in.safetensors",))


def test_the_source_is_never_written_to(tmp_path: Path, source: Path) -> None:
    before = source.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(source)
    for target in (source, tmp_path / "link.safetensors"):
        with pytest.raises(ValueError, match="is the source itself"):
            convert(source, target)
    assert source.read_bytes() == before
    with pytest.raises(ValueError, match=r"must end in \.gguf or \.safetensors"):
        convert(source, tmp_path / "x.bin")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(ValueError, match=r"folder\.gguf is a folder"):
        convert(source, tmp_path / "folder.gguf")


def test_names_as_long_as_they_may_be(tmp_path: Path, source: Path) -> None:
    for name in ("n" * 250 + ".gguf", "\u00e4" * 125 + ".gguf"):
        convert(source, tmp_path / name)
        assert leftovers(tmp_path) == [name]
        (tmp_path / name).unlink()


@pytest.mark.parametrize("phase", ["convert", "compare"])
def test_cancelling_leaves_what_was_there(tmp_path: Path, source: Path, phase: str) -> None:
    (tmp_path / "x.gguf").write_bytes(b"old")

    def stop(now: str, done: int, total: int) -> None:
        if now == phase and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "x.gguf", type=Type.Q8_0, progress=stop)
    assert leftovers(tmp_path) == ["x.gguf"] and (tmp_path / "x.gguf").read_bytes() == b"old"
    assert not [t for t in threading.enumerate() if t.name.startswith("convert")]


def test_progress_is_complete(tmp_path: Path, source: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    convert(source, tmp_path / "x.gguf", type=Type.Q8_0, progress=lambda *now: seen.append(now))
    for phase in ("convert", "compare"):
        now = [entry for entry in seen if entry[0] == phase]
        assert now[0][1] == 0 and now[-1][1] == now[-1][2] and [e[1] for e in now] == sorted(e[1] for e in now)
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "x.gguf").stat().st_mode & 0o777 == 0o666 & ~mask


def test_too_little_space_is_known_before(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(OSError, match="are to be written, 1000 are free in "):
        convert(source, tmp_path / "x.gguf")
    assert leftovers(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of file sizes")
def test_a_disk_that_gets_full(tmp_path: Path, source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By a limit on the size of files, which fails as a full disk does: in the middle of a write."""
    code = "import sys; from studio.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "convert", str(source), "-o", str(tmp_path / "x.gguf")],
                          capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)))  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("error: File too large: ") and lines[-1].endswith("bytes were written"), lines
    assert leftovers(tmp_path) == []


def test_a_source_that_changes(tmp_path: Path, source: Path) -> None:
    def touch(phase: str, done: int, total: int) -> None:
        os.utime(source, ns=(1, time.time_ns()))

    with pytest.raises(LoadError, match=r"written to.*the output was not written") as caught:
        convert(source, tmp_path / "x.gguf", progress=touch)
    assert caught.value.kind == "WeightsChanged" and leftovers(tmp_path) == []


def test_what_is_read_back_must_be_what_was_written(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = saving._put

    def flip(file: Any, offset: int, data: Any, n_bytes: int) -> None:
        changed = bytearray(memoryview(data).cast("B"))
        if offset and len(changed) > 100:
            changed[50] ^= 1
        put(file, offset, changed, n_bytes)

    monkeypatch.setattr(saving, "_put", flip)
    with pytest.raises(LoadError, match="not what was written"):
        convert(source, tmp_path / "x.gguf")
    assert leftovers(tmp_path) == []
    monkeypatch.setattr(saving, "_put", put)
    head_of = saving.head_of
    monkeypatch.setattr(saving, "head_of", lambda *args: (h := head_of(*args))._replace(
        data=h.data.replace(b"norm.weight", b"norm.weighs")))  # fmt: skip
    with pytest.raises(LoadError, match=r"'norm\.weight': was written as .*, is read as None"):
        convert(source, tmp_path / "x.gguf")


def test_values_that_do_not_fit(tmp_path: Path) -> None:
    big = W.copy()
    big[3, 7] = 1e5
    path = store(tmp_path / "in.safetensors", {"a.weight": big})
    with pytest.raises(LoadError, match=r"65504.*'\^a\\\.weight\$=f32'") as caught:
        convert(path, tmp_path / "x.gguf", type=Type.F16)
    assert caught.value.kind == "Overflow"
    convert(path, tmp_path / "x.gguf", type=Type.F16, rules=parse_rules(r"^a\.weight$=f32"))
    (tmp_path / "x.gguf").unlink()
    big[3, 7] = np.nan
    store(path, {"a.weight": big})
    with pytest.raises(LoadError, match="not finite"):
        convert(path, tmp_path / "x.gguf", type=Type.Q8_0)
    convert(path, tmp_path / "y.gguf", type=Type.F16)  # which has NaN
    assert np.isnan(values(tmp_path / "y.gguf", "a.weight")[3, 7])
    big[3, 7] = 3e38  # its block's scale is infinite as f16
    store(path, {"a.weight": big})
    with pytest.raises(LoadError, match="farther from itself than zeros"):
        convert(path, tmp_path / "x.gguf", type=Type.Q8_0)
    assert leftovers(tmp_path) == ["y.gguf"]


# the command line


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        code = cli.main(argv)
    except SystemExit as end:
        code = int(end.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


def test_command(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "convert", "in.safetensors", "--type", "q4_K")
    assert (code, out) == (0, "output.gguf\n") and dtypes(tmp_path / "output.gguf")["a.weight"] == "Q4_K"
    assert "q4_k" in err and "a.weight)" in err and "1 kept their type: a vector" in err and "warning: " in err
    code, out, _ = run(capsys, "convert", "-m", "in.safetensors", "-o", "x.gguf", "--tensor-type-rules", "^a=F16",
                       "-t", "1")  # fmt: skip
    assert (code, out) == (0, "x.gguf\n") and dtypes(tmp_path / "x.gguf")["a.weight"] == "F16"
    write_imatrix(tmp_path / "i.gguf", {"a.weight": np.ones(512, np.float32)})
    assert run(capsys, "convert", "in.safetensors", "--type", "q4_K", "--imat-in", "i.gguf")[0] == 0
    for argv, words in [
        ([], "what to convert?"), (["nothing.gguf"], "No such file"),
        (["in.safetensors", "--type", "q9"], "known are"), (["in.safetensors", "-m", "x"], "Give one file"),
        (["in.safetensors", "-o", "x.bin"], "must end in"),
        (["in.safetensors", "-o", "in.safetensors"], "source itself"),
        (["in.safetensors", "--typ", "f16"], "--typ"), (["in.safetensors", "-o", "no/x.gguf"], "/no: No such"),
        (["in.safetensors", "--tensor-type-rules", "x"], "rule"),
        (["in.safetensors", "--type", "iq1_s"], "importance"), (["in.safetensors", "--imat-in", "x.gguf"], "imp"),
    ]:  # fmt: skip
        code, out, err = run(capsys, "convert", *argv)
        assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err, err


def test_interrupting_the_command(tmp_path: Path) -> None:
    big = store(tmp_path / "in.safetensors", {f"{i}.weight": np.tile(W, (1000, 1)) for i in range(4)})
    code = "import sys; from studio.cli import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", code, "convert", str(big), "-o", str(tmp_path / "x.gguf"),
                                "--type", "iq3_s"], stderr=subprocess.PIPE,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    end = time.monotonic() + 120
    while not leftovers(tmp_path) and time.monotonic() < end:
        time.sleep(0.01)
    err = b""
    while not err and time.monotonic() < end:
        process.send_signal(signal.SIGINT)  # again, as one would: Python loses one that hits a callback of an import
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, err = process.communicate(timeout=3)
    assert process.returncode == cli.INTERRUPTED and err.endswith(b"interrupted\n"), err
    assert leftovers(tmp_path) == []


def test_converted_models_draw_the_same_picture(tmp_path: Path) -> None:
    """All three files, to gguf and back, and f16 close to f32."""
    files = write_tiny_models(tmp_path)

    def draw(paths: dict[str, Path]) -> np.ndarray:
        (tmp_path / "tok").mkdir(exist_ok=True)
        with models.load(**paths) as pipe:
            return np.asarray(pipe("red", width=32, height=32, num_inference_steps=2, output_type="np").images[0])

    expected = draw(files)
    for name, kind in (("gguf", Type.F32), ("safetensors", Type.F32), ("gguf", Type.F16)):
        out = {}
        for part, path in files.items():
            out[part] = tmp_path / f"{name}_{kind.name}" / part / f"model.{name}"
            out[part].parent.mkdir(parents=True)
            convert(path.parent if part == "llm" else path, out[part], type=kind)
        tokenizer = files["llm"].parent / "tokenizer.json"
        (out["llm"].parent / "tokenizer.json").write_text(tokenizer.read_text())
        picture = draw(out)
        if kind is Type.F32:
            np.testing.assert_array_equal(picture, expected)
        else:
            assert np.abs(picture.astype(np.float64) - expected).mean() < 3
