"""8-bit weights with scale tensors, as files in circulation have them: multiplied in, or refused, never ignored."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loader import LoadError, Param, Weights, describe, load_params, open_checkpoint
from loader import convert as conversion
from loader.convert import read_float32, to_float32
from loader.merge import merged_pieces
from pyggml import Backend, Type, dequantize

RNG = np.random.default_rng(3)
CODES = RNG.integers(0, 0x7E, (6, 64)).astype(np.uint8)  # neither NaN nor infinity in either type
CODES[::2] |= 0x80
MARKER = ("F8_E4M3", (0,), b"")


Table = dict[str, tuple[str, tuple[int, ...], bytes]]


def save(path: Path, table: Table, metadata: dict[str, str] | None = None) -> Path:
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, (dtype, shape, raw) in table.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def f8(codes: np.ndarray = CODES, dtype: str = "F8_E4M3") -> tuple[str, tuple[int, ...], bytes]:
    return dtype, codes.shape, codes.tobytes()


def f32(values: Any) -> tuple[str, tuple[int, ...], bytes]:
    array = np.asarray(values, "<f4")
    return "F32", array.shape, array.tobytes()


def quant(**table: Any) -> tuple[str, tuple[int, ...], bytes]:
    text = json.dumps(table).encode()
    return "U8", (len(text),), text


def load(path: Path, backend: Backend, kind: Type | None = None, ne: tuple[int, ...] = (64, 6)) -> Weights:
    with open_checkpoint(path) as checkpoint:
        return load_params({"a.weight": Param(ne, kind)}, checkpoint, backend=backend, component="test")


def plain(dtype: str = "F8_E4M3") -> np.ndarray:
    return to_float32(CODES.reshape(-1), dtype).reshape(6, 64)


ROWS = np.linspace(0.01, 0.03, 6)


@pytest.mark.parametrize("name", ["a.scale_weight", "a.weight_scale", "a.weight_scale_inv"])
@pytest.mark.parametrize("scale", [0.02, [0.02], ROWS, ROWS.reshape(6, 1), [[0.01, 0.02], [0.03, 0.05], [0.04, 0.07]]],
                         ids=["number", "one", "rows", "column", "blocks"])  # fmt: skip
def test_scales_are_multiplied_in(tmp_path: Path, backend: Backend, name: str, scale: Any) -> None:
    path = save(tmp_path / "x.safetensors", {"a.weight": f8(), name: f32(scale)})
    s = np.asarray(scale, np.float32)
    s = np.repeat(np.repeat(s, 2, 0), 32, 1) if s.shape == (3, 2) else s.reshape(-1, 1)
    expected = plain() * s
    with load(path, backend, Type.F32) as weights:
        np.testing.assert_array_equal(weights["a.weight"].numpy(), expected)
    with load(path, backend) as weights:
        assert weights["a.weight"].type is Type.F16 and weights.report.n_mapped == 0
        assert weights.report.not_mapped == {"F8_E4M3 with a scale becomes F16": 1}
        np.testing.assert_array_equal(weights["a.weight"].numpy(), expected.astype(np.float16))
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint) == ["a.weight"]
        np.testing.assert_array_equal(checkpoint.read("a.weight"), expected)
        np.testing.assert_array_equal(read_float32(checkpoint["a.weight"], 70, 20), expected.reshape(-1)[70:90])
        info = checkpoint.renamed([("^a", "b")]).without_prefix("b.")["weight"]
        assert info.scale is not None and info.scale.name == name
    with open_checkpoint(path, raw=True) as checkpoint:
        assert set(checkpoint) == {"a.weight", name} and checkpoint["a.weight"].scale is None


def test_blocks_of_128_at_the_edge_are_smaller(tmp_path: Path, backend: Backend) -> None:
    codes = RNG.integers(0, 0x7E, (130, 300)).astype(np.uint8)
    scale = RNG.uniform(0.01, 0.02, (2, 3)).astype(np.float32)
    path = save(tmp_path / "x.safetensors", {"a.weight": f8(codes), "a.weight_scale_inv": f32(scale)})
    expected = to_float32(codes.reshape(-1), "F8_E4M3").reshape(130, 300)
    expected = expected * np.repeat(np.repeat(scale, 128, 0), 128, 1)[:130, :300]
    with load(path, backend, Type.F32, (300, 130)) as weights:
        np.testing.assert_array_equal(weights["a.weight"].numpy(), expected)


def test_pieces_do_not_show(tmp_path: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "x.safetensors", {"a.weight": f8(), "a.weight_scale": f32(ROWS)})
    with load(path, backend, Type.F32) as weights:
        expected = weights["a.weight"].numpy()
    for staging in (13 * 64, 13 * 20):  # a row at a time, and parts of rows
        monkeypatch.setattr("loader.params.STAGING", staging)
        with load(path, backend, Type.F32) as weights:
            np.testing.assert_array_equal(weights["a.weight"].numpy(), expected)


def test_merging_a_lora_begins_with_the_scaled_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loader.merge.STAGING", 1000)  # a row at a time
    path = save(tmp_path / "x.safetensors", {"a.weight": f8(), "a.weight_scale": f32(ROWS)})
    with open_checkpoint(path) as checkpoint:
        pieces = dict(merged_pieces(checkpoint["a.weight"], (64, 6), Type.F32, []))
    merged = b"".join(pieces[at].tobytes() for at in sorted(pieces))
    np.testing.assert_array_equal(
        np.frombuffer(merged, np.float32).reshape(6, 64), plain() * ROWS.astype(np.float32).reshape(6, 1)
    )


def test_quantised_on_request(tmp_path: Path, backend: Backend) -> None:
    path = save(tmp_path / "x.safetensors", {"a.weight": f8(), "a.scale_weight": f32(0.02)})
    with load(path, backend, Type.Q8_0) as weights:
        raw = np.frombuffer(weights["a.weight"].raw(), np.uint8)
        far = np.abs(dequantize(raw, Type.Q8_0).reshape(6, 64) - plain() * np.float32(0.02)).max()
        assert 0 < far < 448 * 0.02 / 127


@pytest.mark.parametrize("dtype, scale, kind", [
    ("F8_E4M3", 1.0, Type.F16), ("F8_E4M3", 146.0, Type.F16), ("F8_E4M3", 147.0, Type.BF16),
    ("F8_E5M2", 1.1, Type.F16), ("F8_E5M2", 1.2, Type.BF16), ("F8_E4M3", 1e-6, Type.BF16), ("F8_E4M3", 0.0, Type.F16),
])  # fmt: skip
def test_the_type_is_wide_enough(tmp_path: Path, backend: Backend, dtype: str, scale: float, kind: Type) -> None:
    """Never an infinity for want of range, and no small value lost."""
    path = save(tmp_path / "x.safetensors", {"a.weight": f8(dtype=dtype), "a.weight_scale": f32(scale)})
    with load(path, backend) as weights:
        assert weights["a.weight"].type is kind
        expected = plain(dtype) * np.float32(scale)
        np.testing.assert_allclose(weights["a.weight"].numpy(), expected, rtol=2.0**-8, atol=3e-8 * (kind is Type.F16))


def test_f16_that_cannot_hold_them_is_an_error(tmp_path: Path, backend: Backend) -> None:
    codes = np.full((6, 64), 0x7E, np.uint8)  # 448
    path = save(tmp_path / "x.safetensors", {"a.weight": f8(codes), "a.weight_scale": f32(200)})
    with pytest.raises(LoadError, match=r"tensor 'a\.weight'.*65504"):
        load(path, backend, Type.F16)


def test_what_comfy_writes(tmp_path: Path, backend: Backend) -> None:
    table = {"p.scaled_fp8": MARKER, "p.a.weight": f8(), "p.a.scale_weight": f32(0.02), "p.a.scale_input": f32(3),
             "p.a.bias": f32(np.arange(6)), "p.b.weight": f8(dtype="F8_E5M2")}  # fmt: skip
    path = save(tmp_path / "x.safetensors", table)
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint) == ["p.a.weight", "p.a.bias", "p.b.weight"]
        assert checkpoint["p.b.weight"].scale is None
        note = checkpoint.warnings[0]
        assert note.startswith("1 weights have a scale") and "1 scales of activations are not needed" in note
        assert note in str(describe(checkpoint)) and "1 tensor with a scale" in str(describe(checkpoint))
        assert describe(checkpoint).to_dict()["n_scaled"] == 1


@pytest.mark.parametrize("where", ["tensor", "file"])
def test_named_formats(tmp_path: Path, backend: Backend, where: str) -> None:
    """comfy_quant tensors, and one table in the metadata; fp8 stored as U8; plain int8."""

    def write(codes: tuple[str, tuple[int, ...], bytes], scale: Any, **format: Any) -> Path:
        table = {"x.a.weight": codes, "x.a.weight_scale": f32(scale)}
        if where == "tensor":
            return save(tmp_path / "x.safetensors", table | {"x.a.comfy_quant": quant(**format)})
        text = json.dumps({"format_version": "1.0", "layers": {"a": format}})
        return save(tmp_path / "x.safetensors", table, {"_quantization_metadata": text})

    def values(path: Path) -> np.ndarray:
        with open_checkpoint(path) as checkpoint:
            assert list(checkpoint) == ["x.a.weight"]
            return np.asarray(checkpoint.read("x.a.weight"))

    expected = plain() * np.float32(0.02)
    np.testing.assert_array_equal(values(write(f8(), 0.02, format="float8_e4m3fn")), expected)
    np.testing.assert_array_equal(values(write(f8(dtype="U8"), 0.02, format="float8_e4m3fn")), expected)
    int8 = CODES.view(np.int8)
    by_row = int8.astype(np.float32) * ROWS.astype(np.float32).reshape(6, 1)
    written = write(("I8", (6, 64), int8.tobytes()), ROWS, format="int8_tensorwise")
    np.testing.assert_array_equal(values(written), by_row)
    with open_checkpoint(written) as checkpoint:
        params = {"x.a.weight": Param((64, 6))}
        with load_params(params, checkpoint, backend=backend, component="test") as weights:
            assert weights["x.a.weight"].type is Type.F16
            np.testing.assert_allclose(weights["x.a.weight"].numpy(), by_row, rtol=2e-3)

    refused: list[tuple[str, dict[str, Any], str]] = [
        ("I8", {"format": "int8_tensorwise", "convrot": True}, "rotated"),
        ("I8", {"format": "int8_tensorwise", "params": {"convrot": True}}, "rotated"),
        ("U8", {"format": "nvfp4"}, "nvfp4"),
        ("F8_E4M3", {"format": "mxfp8"}, "mxfp8"),
        ("F8_E4M3", {"format": "float8_e5m2"}, "F8_E4M3"),
        ("F8_E4M3", {"fmt": 3}, "null"),
    ]
    for dtype, format, words in refused:
        with pytest.raises(LoadError, match=words) as caught:
            open_checkpoint(write(f8(dtype=dtype), ROWS, **format))
        assert caught.value.kind == "BadType" and caught.value.tensor == "x.a.weight"


@pytest.mark.parametrize("scale, words", [
    (f32(np.ones(5)), "does not divide"), (f32(np.ones((4, 2))), "does not divide"), (f32(np.ones((0, 2))), "divide"),
    (f32(np.nan), "not finite"), (f32(np.inf), "not finite"), (f32(1e31), "1e.30"),
    (("F8_E8M0", (6, 2), bytes(12)), "not named"),
])  # fmt: skip
def test_scales_that_cannot_be(tmp_path: Path, backend: Backend, scale: Any, words: str) -> None:
    path = save(tmp_path / "x.safetensors", {"a.weight": f8(), "a.weight_scale": scale})
    with pytest.raises(LoadError, match=words):
        load(path, backend)


def test_scales_that_are_not_attached_stay_to_be_refused(tmp_path: Path, backend: Backend) -> None:
    table = {"a.weight": f32(np.ones((6, 64))), "a.scale_weight": f32(2)}
    with pytest.raises(LoadError, match=r"1 surplus: 'a\.scale_weight'"):
        load(save(tmp_path / "x.safetensors", table), backend)
    with pytest.raises(LoadError, match=r"both scales"):
        load(save(tmp_path / "x.safetensors", {"a.weight": f8(), "a.scale_weight": f32(2), "a.weight_scale": f32(2)}),
             backend)  # fmt: skip
    with pytest.raises(LoadError, match="I8 with a scale in a format that is not named"):
        load(save(tmp_path / "x.safetensors", {"a.weight": f8(dtype="I8"), "a.weight_scale": f32(2)}), backend)


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"format": NaN}', bytes(5000)])
def test_a_format_that_is_no_json(tmp_path: Path, text: bytes) -> None:
    table = {"a.weight": f8(), "a.weight_scale": f32(1), "a.comfy_quant": ("U8", (len(text),), text)}
    with pytest.raises(LoadError) as caught:
        open_checkpoint(save(tmp_path / "x.safetensors", table))
    assert caught.value.kind == "BadHeader"
    if len(text) < 100:
        text = text.replace(b"NaN", b"{")
        with pytest.raises(LoadError):
            open_checkpoint(save(tmp_path / "x.safetensors", {"a.weight": f8(), "a.weight_scale": f32(1)},
                                 {"_quantization_metadata": text.decode()}))  # fmt: skip


def test_scales_in_another_shard(tmp_path: Path, backend: Backend) -> None:
    save(tmp_path / "s1.safetensors", {"a.weight": f8()})
    save(tmp_path / "s2.safetensors", {"a.weight_scale": f32(0.02)})
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a.weight": "s1.safetensors", "a.weight_scale": "s2.safetensors"}}))
    with load(path, backend, Type.F32) as weights:
        np.testing.assert_array_equal(weights["a.weight"].numpy(), plain() * np.float32(0.02))


def test_fp8_values_are_those_of_the_formats(tmp_path: Path) -> None:
    """Against the definition (OCP 8-bit floats, 2023), code by code."""
    for dtype, exponent_bits, bias in (("F8_E4M3", 4, 7), ("F8_E5M2", 5, 15)):
        ours = conversion._float8_values(dtype)
        for code in range(256):
            mantissa_bits = 7 - exponent_bits
            e, m = code >> mantissa_bits & (1 << exponent_bits) - 1, code & (1 << mantissa_bits) - 1
            top = e == (1 << exponent_bits) - 1
            if top and (m > 0 if dtype == "F8_E5M2" else m == 7):
                assert np.isnan(ours[code])
                continue
            if top and dtype == "F8_E5M2":
                value = float("inf")
            else:
                value = (m / 2**mantissa_bits + (e > 0)) * 2.0 ** (max(e, 1) - bias)
            assert ours[code] == (-value if code & 128 else value), re.escape(hex(code))


def test_a_scale_in_another_file_that_changes_during_the_load(tmp_path: Path, backend: Backend) -> None:
    save(tmp_path / "1.safetensors", {"a.weight": f8()})
    scales = save(tmp_path / "2.safetensors", {"a.weight_scale": f32([0.02])})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": "1.safetensors", "a.weight_scale": scales.name}}))
    with open_checkpoint(index) as checkpoint, load_params(
        {"a.weight": Param((64, 6), Type.F32)}, checkpoint, backend=backend, component="test"
    ) as weights:
        assert np.allclose(weights["a.weight"].numpy(), plain() * 0.02, rtol=1e-6)
    with open_checkpoint(index) as checkpoint, pytest.raises(LoadError, match=r"2\.safetensors") as error:
        load_params(
            {"a.weight": Param((64, 6))}, checkpoint, backend=backend, component="test",
            progress=lambda done, total: scales.write_bytes(scales.read_bytes()),
        )  # fmt: skip
    assert error.value.kind == "WeightsChanged"
