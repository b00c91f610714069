from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import re
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy

from loader import (
    Checkpoint,
    LoadError,
    LoadOptions,
    Param,
    Weights,
    alloc_params_buffer,
    load_params,
    open_checkpoint,
)
from loader.convert import convert, to_float32
from loader.dtypes import GGML_TYPES, QUANTISED
from loader.mapped import TensorInfo
from loader.placement import device_of, maps_files, plan_params
from pyggml import (
    Backend,
    Buffer,
    BufferType,
    ClosedError,
    Context,
    GGMLError,
    Graph,
    OutOfMemory,
    Type,
    dequantize,
    ops,
    quantize,
)  # fmt: skip
from pyggml.lib import ffi, lib

RNG = np.random.default_rng(7)


@pytest.fixture
def cpu(backend: Backend) -> BufferType:
    return backend.buffer_type


def save(path: Path, table: dict[str, tuple[str, tuple[int, ...], bytes]], *, shift: int = 0) -> Path:
    """A safetensors file of raw bytes, as name -> (dtype, numpy shape, bytes); data begins at 8 n + `shift`."""
    entries, data = {}, b""
    for name, (dtype, shape, raw) in table.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    header = json.dumps(entries).encode()
    header += b" " * ((shift - len(header)) % 32)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


UNMAPPED = LoadOptions(mode="off")
MODES = {True: LoadOptions(mode="map"), False: UNMAPPED}


def f32(values: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return "F32", values.shape, values.astype("<f4").tobytes()


def load(path: Path, backend: Backend, params: dict[str, Param], **options: Any) -> Weights:
    with open_checkpoint(path) as checkpoint:
        return load_params(params, checkpoint, backend=backend, component="test", **options)


# the table of types


def test_type_table_is_that_of_ggml() -> None:
    assert {name for name, _, _ in GGML_TYPES.values()} == set(Type.__members__)
    for i, (name, block, n_bytes) in GGML_TYPES.items():
        assert (Type(i).name, Type(i).block_size, Type(i).type_size) == (name, block, n_bytes)
        assert (name in QUANTISED) == Type(i).is_quantized


# alloc_params_buffer


def addresses(context: Context) -> list[int]:
    return [int(ffi.cast("uintptr_t", t.ptr.data)) for t in context.tensors()]


def test_no_tensors_at_all(cpu: BufferType, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "pyggml.loader")
    with Context(4) as context:
        assert alloc_params_buffer(context, cpu, component="empty") is None
    assert ["empty params: nothing to allocate, 0 bytes (0 tensors)"] == [r.message for r in caplog.records]
    assert caplog.records[0].levelno == logging.DEBUG


def test_all_are_allocated(cpu: BufferType) -> None:
    with Context(4) as context:
        tensors = [context.new_tensor((5, 3)), context.new_tensor((32, 2), Type.Q8_0)]
        buffer = alloc_params_buffer(context, cpu)
        assert buffer is not None and buffer.n_bytes >= 60 + 68
        assert lib.ggml_backend_buffer_get_usage(buffer.ptr) == 1
        for t in tensors:
            t.set(np.ones(t.ne[::-1], np.float32))
            np.testing.assert_allclose(t.numpy(), 1, rtol=1e-3)
        assert alloc_params_buffer(context, cpu) is None  # a second time nothing is left


def test_zero_elements_only(cpu: BufferType) -> None:
    with Context(4) as context:
        context.new_tensor((0, 3))
        context.new_tensor((4, 0), Type.F16)
        assert alloc_params_buffer(context, cpu) is None


def test_zero_elements_among_others(cpu: BufferType) -> None:
    with Context(4) as context:
        context.new_tensor((0,))
        a = context.new_tensor((4,))
        context.new_tensor((0,))
        assert alloc_params_buffer(context, cpu) is not None
        a.set([1, 2, 3, 4])
        assert a.numpy().tolist() == [1, 2, 3, 4]


def memory(backend: Backend, n_bytes: int) -> tuple[np.ndarray, Buffer]:
    raw = np.zeros(n_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 32
    raw = raw[start : start + n_bytes]
    return raw, Buffer.from_memory(backend.device, raw.ctypes.data, n_bytes, owner=raw, read_only=False)


def view_of(tensor: Any, ne: int, offset: int) -> Any:
    return lib.ggml_view_1d(tensor.ctx.ptr, tensor.ptr, ne, offset)


def test_all_mapped_with_views_made_before(backend: Backend, cpu: BufferType) -> None:
    with Context(8) as context:
        a = context.new_tensor((8,))
        view = view_of(a, 4, 16)
        raw, buffer = memory(backend, 64)
        raw[:32] = np.arange(8, dtype=np.float32).view(np.uint8)
        buffer.place(a, 0)
        assert view.data == ffi.NULL
        assert alloc_params_buffer(context, cpu) is None
        assert int(ffi.cast("uintptr_t", view.data)) == raw.ctypes.data + 16 and view.buffer == buffer.ptr
        assert a.numpy().tolist() == list(range(8))


def test_some_mapped_and_some_not(backend: Backend, cpu: BufferType) -> None:
    with Context(8) as context:
        mapped, free = context.new_tensor((8,), name="mapped"), context.new_tensor((6,), name="free")
        views = [view_of(mapped, 2, 8), view_of(free, 2, 8)]
        raw, buffer = memory(backend, 64)
        buffer.place(mapped, 32)
        allocated = alloc_params_buffer(context, cpu)
        assert allocated is not None and allocated.holds(free.ptr) and buffer.holds(mapped.ptr)
        assert int(ffi.cast("uintptr_t", mapped.ptr.data)) == raw.ctypes.data + 32
        assert allocated.n_bytes < 64  # only what was not mapped
        for source, view in zip((mapped, free), views, strict=True):
            assert view.data == ffi.cast("char *", source.ptr.data) + 8 and view.buffer == source.ptr.buffer


HUGE = (1 << 30, 1 << 16)  # 2^48 bytes as f32: more than an address space holds


def test_failing_allocation(cpu: BufferType) -> None:
    with Context(4) as context:
        context.new_tensor((8,))
        context.new_tensor((HUGE[0], 1 << 15))
        context.new_tensor((HUGE[0], 1 << 14))
        with pytest.raises(
            OutOfMemory, match=r"^z_image: CPU could not allocate (\d+) bytes for 3 tensors, \d+ bytes are free"
        ) as e:
            alloc_params_buffer(context, cpu, component="z_image")
        assert isinstance(e.value, MemoryError)
        assert int(str(e.value).split("allocate ")[1].split()[0]) == 32 + (3 << 46)
        assert addresses(context) == [0, 0, 0]
        assert context.buffers == []


class ChunkedType:
    """A buffer type of the real library with a small largest buffer, whose allocations can fail from the n-th on.

    ggml's own struct ggml_backend_buffer_type, the processor's, with two functions replaced.
    """

    FIELDS = (
        "get_name",
        "alloc_buffer",
        "get_alignment",
        "get_max_size",
        "get_alloc_size",
        "is_host",
        "device",
        "context",
    )

    def __init__(self, cpu: BufferType, max_size: int, n_good: int) -> None:
        self.n_allocated = 0
        original = ffi.cast("void **", cpu.ptr)
        assert original[3] == ffi.NULL and original[4] == ffi.NULL  # the processor's have no such limit
        self.fields = ffi.new(f"void *[{len(self.FIELDS)}]", [original[i] for i in range(len(self.FIELDS))])

        @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        def alloc_buffer(_: int, size: int) -> int | None:
            if self.n_allocated >= n_good:
                return None
            self.n_allocated += 1
            return int(ffi.cast("uintptr_t", lib.ggml_backend_buft_alloc_buffer(cpu.ptr, size)))

        @ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p)
        def get_max_size(_: int) -> int:
            return max_size

        self.keep = (alloc_buffer, get_max_size)
        for i, function in ((1, alloc_buffer), (3, get_max_size)):
            self.fields[i] = ffi.cast("void *", ctypes.cast(function, ctypes.c_void_p).value)
        self.type = BufferType(ffi.cast("ggml_backend_buffer_type_t", self.fields))


def test_several_chunks(cpu: BufferType) -> None:
    chunked = ChunkedType(cpu, max_size=1024, n_good=100)
    with Context(16) as context:
        tensors = [context.new_tensor((128,), name=str(i)) for i in range(5)]  # 512 bytes each, two to a chunk
        buffer = alloc_params_buffer(context, chunked.type)
        assert buffer is not None and chunked.n_allocated == 3
        for i, t in enumerate(tensors):
            t.set(np.full(128, i))
        assert [t.numpy()[0] for t in tensors] == [0, 1, 2, 3, 4]


def test_failing_second_chunk(cpu: BufferType, backend: Backend) -> None:
    chunked = ChunkedType(cpu, max_size=1024, n_good=1)
    with Context(16) as context:
        mapped = context.new_tensor((8,))
        _, buffer = memory(backend, 64)
        buffer.place(mapped, 0)
        tensors = [context.new_tensor((128,)) for _ in range(5)]
        view = view_of(tensors[0], 4, 0)
        with pytest.raises(OutOfMemory, match="te: CPU could not allocate 2560 bytes for 5 tensors"):
            alloc_params_buffer(context, chunked.type, component="te")
        assert chunked.n_allocated == 1
        # the first chunk was freed again: nothing may point into it
        assert [t.has_data for t in tensors] == [False] * 5 and view.data == ffi.NULL
        assert all(t.ptr.buffer == ffi.NULL for t in tensors)
        assert mapped.has_data
        assert alloc_params_buffer(context, cpu) is not None  # and it can be tried again elsewhere
        assert all(t.has_data for t in tensors) and view.data != ffi.NULL


# load_params


def test_everything_mapped(tmp_path: Path, backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pyggml.loader")
    x, y = RNG.normal(size=(3, 8)).astype(np.float32), RNG.normal(size=5).astype(np.float32)
    path = save(tmp_path / "x.safetensors", {"x": f32(x), "y": f32(y)})
    params = {"x": Param((8, 3)), "y": Param((5,), Type.F32)}
    with load(path, backend, params) as weights:
        report = weights.report
        assert (report.n_mapped, report.n_copied, report.allocated_bytes, report.read_bytes) == (2, 0, 0, 0)
        assert report.mapped_bytes == 96 + 20 and report.n_mapped_files == 1 and report.not_mapped == {}
        np.testing.assert_array_equal(params["x"].tensor.numpy(), x)
        np.testing.assert_array_equal(weights["y"].numpy(), y)
        assert weights["x"].type is Type.F32 and weights["x"].name == "x"
        assert not weights["x"].view().flags.writeable
        gc.collect()
    first, second = (r.message for r in caplog.records)  # as stable-diffusion.cpp writes them
    assert re.fullmatch(r"memory-mapped 2 tensors in 1 files \(0\.00 MB\), taking \d+\.\d\ds", first)
    assert second == "test params backend buffer size = 0.00 MB(RAM) (2 tensors)"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_life_of_the_mapping(tmp_path: Path, backend: Backend) -> None:
    path = save(tmp_path / "x.safetensors", {"x": f32(np.arange(4096, dtype=np.float32))})

    def n_mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(path))

    n_fds = len(os.listdir("/proc/self/fd"))
    params = {"x": Param((4096,))}
    weights = load(path, backend, params)  # the checkpoint is closed by now
    gc.collect()
    assert n_mapped() == 1
    assert weights.changed() is None
    tensor = weights["x"]
    view = tensor.view()
    with pytest.raises(GGMLError, match="views"):
        weights.close()
    assert view[4095] == 4095 and not weights.closed
    del view
    gc.collect()
    weights.close()
    weights.close()
    assert n_mapped() == 0 and len(os.listdir("/proc/self/fd")) == n_fds
    for use in (tensor.numpy, lambda: tensor.ne, weights.changed):
        with pytest.raises(ClosedError):
            use()


def test_a_tensor_keeps_its_mapping(tmp_path: Path, backend: Backend) -> None:
    path = save(tmp_path / "x.safetensors", {"x": f32(np.arange(4096, dtype=np.float32)), "y": ("F16", (2,), bytes(4))})
    params = {"x": Param((4096,)), "y": Param((2,), Type.F32)}
    tensor = load(path, backend, params)["x"]  # Weights and checkpoint are gone
    params.clear()
    gc.collect()
    assert tensor.numpy()[4095] == 4095
    view = tensor.view()
    del tensor
    gc.collect()
    assert view[4095] == 4095


DROP_IN_ANY_ORDER = """
import gc, random, sys
import numpy as np
from loader import LoadOptions, Param, load_params, open_checkpoint
from pyggml import Backend, Graph, ops

for seed in range(50):
    backend = Backend.cpu(1)
    checkpoint = open_checkpoint(sys.argv[1])
    params = {"x": Param((32, 8)), "y": Param((32, 8))}
    options = LoadOptions(mode=("off", "map")[seed % 2])
    weights = load_params(params, checkpoint, backend=backend, component="t", options=options)
    graph = Graph(backend, n_nodes=16)
    graph.output(ops.mul_mat(weights["x"], graph.input((32, 2), name="i")), name="o")
    graph.compute(i=np.ones((2, 32), np.float32))
    view = weights["x"].view()
    things = [backend, checkpoint, params, weights, graph, view, weights["y"]]
    del backend, checkpoint, params, weights, graph, view
    random.Random(seed).shuffle(things)
    n_left = seed % 7 if seed == 49 else 0
    while len(things) > n_left:
        things.pop()
        gc.collect()
print("alive")
"""


def test_parts_may_be_dropped_in_any_order(tmp_path: Path) -> None:
    """Also at the interpreter's exit: the last round leaves some for it."""
    ones = f32(np.ones((8, 32), np.float32))
    path = save(tmp_path / "x.safetensors", {"x": ones, "y": ones})
    run = subprocess.run(
        [sys.executable, "-c", DROP_IN_ANY_ORDER, str(path)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert (run.returncode, run.stdout.strip()) == (0, "alive"), run.stderr


def test_weights_notice_that_a_file_changed(tmp_path: Path, backend: Backend) -> None:
    path = save(tmp_path / "x.safetensors", {"x": f32(np.ones(4, np.float32))})
    with load(path, backend, {"x": Param((4,))}) as weights:
        with open(path, "ab") as out:
            out.write(b"more")
        assert str(path) in str(weights.changed())


@pytest.mark.parametrize("mmap", [True, False])
def test_mixed_files(tmp_path: Path, backend: Backend, mmap: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Mapped, converted, empty, optional and absent, of 1 to 5 dimensions: the same values with and without mapping."""
    caplog.set_level(logging.INFO, "pyggml.loader")
    arrays = {
        "f32": RNG.normal(size=(6, 64)).astype(np.float32),
        "f16": RNG.normal(size=(4, 32)).astype(np.float16),
        "norm": RNG.normal(size=64).astype(np.float16),
        "i64": np.arange(10),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(3.5, np.float32),
        "conv3d": RNG.normal(size=(2, 3, 2, 3, 3)).astype(np.float16),
        "conv1x1": RNG.normal(size=(8, 4, 1, 1)).astype(np.float32),
        "conv1x1x1": RNG.normal(size=(8, 4, 1, 1, 1)).astype(np.float32),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors")
    params = {
        "f32": Param((64, 6)), "f16": Param((32, 4)), "norm": Param((64,), Type.F32), "i64": Param((10,)),
        "empty": Param((4, 0)), "scalar": Param((1,)), "conv3d": Param((3, 3, 2, 6)), "conv1x1": Param((4, 8)),
        "conv1x1x1": Param((4, 8)), "absent": Param((7,), optional=True),
    }  # fmt: skip
    with load(tmp_path / "x.safetensors", backend, params, options=MODES[mmap]) as weights:
        for name, array in arrays.items():
            if not array.size:
                assert weights[name].ne == (4, 0, 1, 1)
                continue
            ours = weights[name].numpy()
            np.testing.assert_array_equal(ours.reshape(-1), array.reshape(-1), err_msg=name)
        assert weights["norm"].type is Type.F32 and weights["i64"].type is Type.I32
        assert not params["absent"].loaded
        with pytest.raises(KeyError):
            weights["absent"]
        report = weights.report
        assert report.n_tensors == 9 and report.n_converted == 2
        assert (report.n_mapped, report.n_copied) == ((6, 3) if mmap else (0, 9))
        assert report.read_bytes == sum(a.nbytes for k, a in arrays.items() if not mmap or k in ("norm", "i64"))
        assert report.not_mapped.get("I64 becomes I32") == 1 and report.not_mapped["no elements"] == 1
        assert report.to_dict()["component"] == "test"
    assert ("memory-mapped" in caplog.text) == mmap


QUANTS = [
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
    "F16",
    "BF16",
    "F32",
]


def write_gguf(path: Path, tensors: dict[str, tuple[Type, np.ndarray]]) -> Path:
    writer = gguf.GGUFWriter(path, "test")
    for name, (kind, values) in tensors.items():
        raw = quantize(values, kind) if kind.is_quantized else None
        if kind is Type.BF16:
            raw = ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16).view(np.uint8)
        if raw is None:
            assert kind.dtype is not None
            raw = values.astype(kind.dtype).view(np.uint8)
        raw = raw.reshape(*values.shape[:-1], -1)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType(int(kind)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_quantised_types_are_mapped_and_copied_alike(tmp_path: Path, backend: Backend) -> None:
    values = RNG.normal(size=(6, 512)).astype(np.float32)
    path = write_gguf(tmp_path / "x.gguf", {name: (Type[name], values) for name in QUANTS})
    params = {name: Param((512, 6)) for name in QUANTS}
    with load(path, backend, params) as mapped, load(path, backend, dict(params), options=UNMAPPED) as copied:
        assert mapped.report.n_mapped == len(QUANTS) and copied.report.n_mapped == 0
        for name in QUANTS:
            assert mapped[name].type is Type[name]
            assert mapped[name].raw() == copied[name].raw()


@pytest.mark.parametrize("wanted", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_K])
def test_conversion_between_all_types(tmp_path: Path, backend: Backend, wanted: Type) -> None:
    values = RNG.normal(size=(6, 512)).astype(np.float32)
    path = write_gguf(tmp_path / "x.gguf", {name: (Type[name], values) for name in QUANTS})
    with (
        load(path, backend, {name: Param((512, 6), wanted) for name in QUANTS}) as weights,
        open_checkpoint(path) as ck,
    ):
        for name in QUANTS:
            raw = np.frombuffer(ck[name].file.read_at(ck[name].offset, ck[name].n_bytes), np.uint8)
            floats = to_float32(raw, name).reshape(6, 512)
            if wanted.is_quantized and name != wanted.name:
                expected = dequantize(quantize(floats, wanted), wanted).reshape(6, 512)
            else:
                expected = floats
            atol = {Type.F16: 2e-3, Type.BF16: 2e-2}.get(wanted, 0)
            np.testing.assert_allclose(weights[name].numpy(), expected, atol=atol, rtol=0, err_msg=name)


def test_pieces_do_not_show(tmp_path: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Staged in many pieces, rows larger and smaller than a piece: the same bytes as in one."""
    values = RNG.normal(size=(7, 1024)).astype(np.float32)
    path = write_gguf(tmp_path / "x.gguf", {n: (Type[n], values) for n in ("F32", "Q4_K", "Q8_0")})
    wanted = {"F32": Type.Q6_K, "Q4_K": Type.F16, "Q8_0": Type.Q4_0}

    def result() -> dict[str, bytes]:
        with load(path, backend, {name: Param((1024, 7), kind) for name, kind in wanted.items()}) as weights:
            copied = load(path, backend, {name: Param((1024, 7)) for name in wanted}, options=UNMAPPED)
            return {name: weights[name].raw() for name in wanted} | {"=" + n: copied[n].raw() for n in wanted}

    whole = result()
    for staging in (3000, 5000, 40_000):
        monkeypatch.setattr("loader.params.STAGING", staging)
        assert result() == whole


def test_staging_memory_is_bounded(tmp_path: Path, backend: Backend) -> None:
    n = 24 << 20  # 48 MB as f16
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"x": np.ones((24, 1 << 20), np.float16)}, path)
    tracemalloc.start()
    with load(path, backend, {"x": Param((1 << 20, 24), Type.F32)}) as weights:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert weights.report.read_bytes == 2 * n
        assert peak < 40 << 20
        assert weights["x"].numpy().sum() == n


def test_progress(tmp_path: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loader.params.STAGING", 64)
    path = save(tmp_path / "x.safetensors", {"x": f32(np.ones(40, np.float32)), "y": f32(np.ones(40, np.float32))})
    calls: list[tuple[int, int]] = []
    params = {"x": Param((40,)), "y": Param((40,), Type.F16)}
    load(path, backend, params, options=UNMAPPED, progress=lambda done, total: calls.append((done, total))).close()
    assert calls[-1] == (320, 320) and len(calls) > 4
    assert calls == sorted(calls)


FLOAT8 = {  # the corners of both formats (OCP 8-bit floating point specification)
    "F8_E4M3": {0x00: 0.0, 0x01: 2.0**-9, 0x08: 2.0**-6, 0x38: 1.0, 0x7E: 448.0, 0xFE: -448.0, 0xB8: -1.0},
    "F8_E5M2": {0x01: 2.0**-16, 0x04: 2.0**-14, 0x3C: 1.0, 0x7B: 57344.0, 0x7C: np.inf, 0xFC: -np.inf, 0xBC: -1.0},
}


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("wanted", [None, Type.F16, Type.F32])
def test_float8(tmp_path: Path, backend: Backend, dtype: str, wanted: Type | None) -> None:
    codes = bytes(range(256))
    path = save(tmp_path / "x.safetensors", {"x": (dtype, (2, 128), codes)})
    with load(path, backend, {"x": Param((128, 2), wanted)}) as weights:
        assert weights["x"].type is (Type.F16 if wanted is None else wanted)
        values = weights["x"].numpy().reshape(-1)
        for code, value in FLOAT8[dtype].items():
            assert values[code] == value
        assert np.isnan(values).sum() == (2 if dtype == "F8_E4M3" else 6)
        positive = values[:0x7F] if dtype == "F8_E4M3" else values[:0x7D]
        assert (np.diff(positive) > 0).all()


def test_bfloat16_is_exact_in_f32_and_checked_in_f16(tmp_path: Path, backend: Backend) -> None:
    codes = np.array([0x3F80, 0xC020, 0x7F80, 0x0001, 0x4780], "<u2")  # 1, -2.5, inf, 2^-133, 65536
    path = save(tmp_path / "x.safetensors", {"x": ("BF16", (5,), codes.tobytes())})
    with load(path, backend, {"x": Param((5,), Type.F32)}) as weights:
        assert weights["x"].numpy().tolist() == [1.0, -2.5, np.inf, 2.0**-133, 65536.0]
    with load(path, backend, {"x": Param((5,))}) as weights:
        assert weights["x"].type is Type.BF16 and weights.report.n_mapped == 1
    params = {"x": Param((5,), Type.F16)}
    with pytest.raises(LoadError, match=r"tensor 'x'.*65504") as caught:
        load(path, backend, params)
    assert caught.value.kind == "Overflow" and not params["x"].loaded


def test_integers_are_checked() -> None:
    def info(dtype: str, n: int) -> TensorInfo:
        return TensorInfo("x", (n,), dtype, None, 0, 8 * n, "x")  # type: ignore[arg-type]  # no file is read

    big = np.array([1, 2**40]).view(np.uint8)
    with pytest.raises(OverflowError):
        convert(big, info("I64", 2), Type.I32, 2)
    small = np.array([-5, 7]).view(np.uint8)
    assert convert(small, info("I64", 2), Type.I32, 2).view(np.int32).tolist() == [-5, 7]
    with pytest.raises(OverflowError):
        convert(np.array([1e300]).view(np.uint8), info("F64", 1), Type.F32, 1)


# matching


def refusal(path: Path, backend: Backend, params: dict[str, Param], component: str = "z_image") -> LoadError:
    with open_checkpoint(path) as checkpoint, pytest.raises(LoadError) as caught:
        load_params(params, checkpoint, backend=backend, component=component)
    assert caught.value.kind == "WrongTensors"
    assert all(not param.loaded for param in params.values())
    return caught.value


def test_missing_surplus_and_wrong_are_all_listed(tmp_path: Path, backend: Backend) -> None:
    one = f32(np.ones(4, np.float32))
    path = save(tmp_path / "x.safetensors", {"a": one, "b": one, "c": one, "extra": one, "s": ("C64", (1,), bytes(8))})
    params = {"a": Param((4,)), "b": Param((2, 2)), "c": Param((4,), Type.I32), "s": Param((1,)), "lost": Param((4,)),
              "maybe": Param((4,), optional=True)}  # fmt: skip
    error = refusal(path, backend, params)
    assert set(error.problems) == {
        "'lost' is missing",
        "'extra' is surplus",
        "'b' has ne [4], wanted is [2, 2]",
        "'c' is F32, which cannot become I32",
        "'s' is C64, which cannot become a type of ggml",
    }
    assert "1 missing: 'lost'" in str(error) and "z_image" in str(error) and "\n" not in str(error)


def test_names_in_the_file_are_shown(tmp_path: Path, backend: Backend) -> None:
    path = save(tmp_path / "x.safetensors", {"blk.0.q": f32(np.ones(4, np.float32))})
    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(LoadError, match=r"'layers\.0\.q' \('blk\.0\.q' in the file\)"),
    ):
        renamed = checkpoint.renamed([("^blk", "layers")])
        load_params({"layers.0.q": Param((5,))}, renamed, backend=backend, component="te")


def test_text_encoder_given_as_diffusion_model_says_so(tmp_path: Path, backend: Backend) -> None:
    one = f32(np.ones(4, np.float32))
    path = save(tmp_path / "x.safetensors", {"blk.0.attn_q_norm.weight": one, "token_embd.weight": one})
    error = refusal(path, backend, {f"layers.{i}": Param((4,)) for i in range(30)})
    assert "this is a text encoder (Qwen3), not z_image" in str(error)
    assert len(error.problems) == 32 and len(str(error)) < 600


def test_a_row_that_is_no_whole_block_stays_as_it_is(tmp_path: Path, backend: Backend) -> None:
    path = save(tmp_path / "x.safetensors", {"x": f32(np.ones((2, 31), np.float32))})
    with pytest.raises(GGMLError, match="31"):
        load(path, backend, {"x": Param((31, 2), Type.Q4_0)})


def test_failing_load_leaves_nothing_open(tmp_path: Path, backend: Backend) -> None:
    path = save(
        tmp_path / "x.safetensors", {"x": ("F64", (1,), np.array([1e300]).tobytes()), "y": f32(np.ones(4, np.float32))}
    )
    before = Path("/proc/self/maps").read_text().count(str(path)) if sys.platform == "linux" else 0
    with pytest.raises(LoadError):
        load(path, backend, {"x": Param((1,)), "y": Param((4,))})
    gc.collect()
    if sys.platform == "linux":
        assert Path("/proc/self/maps").read_text().count(str(path)) == before


def test_file_that_shrinks_while_it_is_copied(tmp_path: Path, backend: Backend) -> None:
    path = save(tmp_path / "x.safetensors", {"x": f32(np.ones(1000, np.float32))})
    checkpoint: Checkpoint = open_checkpoint(path)
    os.truncate(path, 2000)
    with pytest.raises(LoadError, match="became shorter"):
        load_params({"x": Param((1000,))}, checkpoint, backend=backend, component="te", options=UNMAPPED)
    with pytest.raises(LoadError, match="became shorter"):
        load_params({"x": Param((1000,))}, checkpoint, backend=backend, component="te")


# placement


def test_plan_is_made_without_data(tmp_path: Path, backend: Backend, cpu: BufferType) -> None:
    path = save(tmp_path / "x.safetensors", {"x": f32(np.ones((2, 32), np.float32)), "n": ("BF16", (4,), bytes(8))})
    wanted = {"x": ((32, 2), None, False), "n": ((4,), Type.F32, False), "o": ((1,), None, True)}
    with open_checkpoint(path) as checkpoint:
        plan = plan_params(wanted, checkpoint, device=backend.device, buffer_type=cpu, component="t")
        assert "mapped" not in repr(checkpoint.files[0])
    assert {p.name: p.action for p in plan.placements} == {"x": "map", "n": "convert"}
    assert (plan.n_bytes("map"), plan.n_bytes("convert"), plan.n_bytes()) == (256, 16, 272)
    assert plan.absent == ("o",) and plan.reasons() == {"BF16 becomes F32": 1}


def test_only_plain_host_buffer_types_map(backend: Backend, cpu: BufferType) -> None:
    device = backend.device
    assert maps_files(device, cpu) and device_of(cpu) is not None
    for extra in device.extra_buffer_types:
        assert not maps_files(device, extra)


@pytest.mark.parametrize("shift", [0, 1, 2, 4, 8, 12, 20])
def test_misaligned_data_is_copied_and_odd_alignment_computes_the_same(
    tmp_path: Path, backend: Backend, shift: int
) -> None:
    """Data at any multiple of its element's size is mapped: products with such weights must be exact all the same."""
    w32 = RNG.normal(size=(33, 100)).astype(np.float32)
    w16 = RNG.normal(size=(33, 100)).astype(np.float16)
    wb = (RNG.normal(size=(33, 100)).astype(np.float32).view(np.uint32) >> 16).astype("<u2")
    table = {"f16": ("F16", w16.shape, w16.tobytes()), "bf16": ("BF16", wb.shape, wb.tobytes()), "f32": f32(w32)}
    path = save(tmp_path / "x.safetensors", table, shift=shift)
    x = RNG.normal(size=(5, 100)).astype(np.float32)

    def products(mmap: bool) -> tuple[Weights, dict[str, np.ndarray]]:
        weights = load(path, backend, {name: Param((100, 33)) for name in table}, options=MODES[mmap])
        with Graph(backend, n_nodes=64) as graph:
            node = graph.input((100, 5), name="x")
            for name in table:
                graph.output(ops.mul_mat(weights[name], node), name=name)
            return weights, {name: np.array(y) for name, y in graph.compute(x=x).items()}

    (mapped, ours), (copied, theirs) = products(True), products(False)
    assert mapped.report.n_mapped == {0: 3, 1: 0, 2: 2}.get(shift, 3)
    for name in table:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    mapped.close()
    copied.close()
