"""numpy in and out for every type, views of the data, and names."""

from __future__ import annotations

import gc
from typing import Any

import gguf
import numpy as np
import pytest

from pyggml import (
    Backend,
    Buffer,
    ClosedError,
    Context,
    GGMLError,
    Graph,
    ShapeError,
    Tensor,
    Type,
    dequantize,
    quantize,
)
from pyggml.lib import lib

BACKEND = Backend.cpu(1)
PLAIN = [t for t in Type if t.dtype is not None]
QUANTISED = [t for t in Type if t.is_quantized and t.name not in ("Q8_1", "Q8_K")]
# Quantising to these first searches a grid for seconds.
EXPENSIVE = {"IQ1_S", "IQ1_M", "IQ2_S"}
MARKED = [pytest.param(t, id=t.name, marks=[pytest.mark.slow] if t.name in EXPENSIVE else []) for t in QUANTISED]
# The rms error of a round trip of uniform numbers, as a multiple of what an ideal quantiser with as many bits a weight
# would make (2 / 2^bits / √12): floating-point and ternary types are made for other distributions.
FACTORS = {"Q4_1": 2.1, "Q5_1": 2.1, "IQ1_M": 2.1, "TQ2_0": 2.2, "Q2_0": 2.5, "NVFP4": 2.5, "MXFP4": 3.0}


def allocated(ne: tuple[int, ...], type: Type, name: str = "t") -> Tensor:
    context = Context(1)
    tensor = context.new_tensor(ne, type, name)
    Buffer.allocate(context, BACKEND.buffer_type)
    return tensor


@pytest.mark.parametrize("type", PLAIN, ids=lambda t: t.name)
def test_plain_types_come_back_exactly(type: Type) -> None:
    array = (np.random.default_rng(0).normal(size=(3, 4, 5)) * 50).astype(type.dtype)
    tensor = allocated((5, 4, 3), type)
    tensor.set(array)
    back = tensor.numpy()
    assert back.dtype == array.dtype and back.shape == array.shape and np.array_equal(back, array)
    assert tensor.raw() == array.tobytes()
    assert tensor.shape == (3, 4, 5) and tensor.ne == (5, 4, 3, 1)
    assert Type.of(array.dtype) is type


def test_bf16_is_rounded_to_even_and_widened_exactly() -> None:
    # 1 + 2^-8 lies between two neighbours; the even one is below, for 1 + 3·2^-8 above.
    given = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-7, 3.38e38, np.inf, -0.0, 1e-40], np.float32)
    tensor = allocated((8,), Type.BF16)
    tensor.set(given)
    bits = np.frombuffer(tensor.raw(), np.uint16)
    assert bits[:4].tolist() == [0x3F80, 0x3F80, 0x3F82, 0xBF81]
    assert np.array_equal(tensor.numpy(), (bits.astype(np.uint32) << 16).view(np.float32))
    everything = np.arange(0x7F80, dtype=np.uint16)  # every positive number
    assert np.array_equal(
        dequantize(everything.view(np.uint8), Type.BF16), (everything.astype(np.uint32) << 16).view(np.float32)
    )
    tensor.set([np.nan] * 8)
    assert np.isnan(tensor.numpy()).all()


@pytest.mark.parametrize("type", MARKED)
def test_quantised_types_round_trip(type: Type) -> None:
    array = np.random.default_rng(1).uniform(-1, 1, (6, 512)).astype(np.float32)
    importance = np.ones(512, np.float32) if lib.ggml_quantize_requires_imatrix(type) else None
    raw = quantize(array, type, importance)
    assert raw.nbytes == 6 * type.row_size(512)
    back = dequantize(raw, type).reshape(array.shape)
    ideal = 2 / 2 ** (8 * type.type_size / type.block_size) / 12**0.5
    assert np.sqrt(np.square(back - array).mean()) <= FACTORS.get(type.name, 1.65) * ideal
    if importance is None:
        tensor = allocated((512, 6), type)
        tensor.set(array)
        assert tensor.raw() == raw.tobytes()
        assert np.array_equal(tensor.numpy(), back)
    else:
        with pytest.raises(GGMLError, match="importance"):
            quantize(array, type)


@pytest.mark.parametrize("type", QUANTISED, ids=lambda t: t.name)
def test_quantised_types_are_read_as_another_implementation_reads_them(type: Type) -> None:
    if not hasattr(gguf.GGMLQuantizationType, type.name):
        pytest.skip("the gguf package does not know it")
    raw = np.random.default_rng(2).integers(0, 256, 4 * type.row_size(512), np.uint8)  # any bytes are blocks
    try:
        with np.errstate(all="ignore"):  # the scales of random blocks may be infinite
            other = gguf.quants.dequantize(raw.reshape(4, -1), gguf.GGMLQuantizationType[type.name])
    except NotImplementedError:
        pytest.skip("the gguf package cannot read it")
    assert np.array_equal(dequantize(raw, type), other.reshape(-1), equal_nan=True)


def test_f16_is_read_as_numpy_reads_it() -> None:
    every = np.arange(65536, dtype=np.uint16)
    assert np.array_equal(
        dequantize(every.view(np.uint8), Type.F16), every.view(np.float16).astype(np.float32), equal_nan=True
    )


def test_set_wants_the_right_shape_and_kind() -> None:
    tensor = allocated((4, 3), Type.F32)
    tensor.set(np.ones((1, 3, 4)))
    tensor.set([[1, 2, 3, 4]] * 3)
    for shape in ((4, 3), (12,), (3, 5), ()):
        with pytest.raises(ShapeError, match="does not fit"):
            tensor.set(np.ones(shape))
    with pytest.raises(ShapeError, match="cut"):
        allocated((4,), Type.I32).set(np.array([0.5, 1, 2, 3]))
    with pytest.raises(GGMLError, match="no data"):
        Context(1).new_tensor((4,)).set(np.ones(4))


def test_strides_are_followed() -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    with Graph(BACKEND) as graph:
        x = graph.input((4, 3, 2), name="x")
        views = {"transposed": x.transpose(), "permuted": x.permute(2, 0, 1, 3), "narrow": x.narrow(0, 1, 2)}
        graph.output(x + 0.0, name="y")
        for view in views.values():
            graph.add(view)
        graph.compute(x=array)
        assert np.array_equal(views["transposed"].numpy(), array.swapaxes(1, 2))
        # x's dimensions 0, 1, 2 have become 2, 0, 1
        assert np.array_equal(views["permuted"].numpy(), np.transpose(array, (2, 0, 1)))
        assert np.array_equal(views["narrow"].numpy(), array[:, :, 1:3])
        assert np.array_equal(views["narrow"].view(), array[:, :, 1:3])
        assert not views["narrow"].is_contiguous
        with pytest.raises(ShapeError):
            views["narrow"].set(np.zeros((2, 3, 2)))
        with pytest.raises(ShapeError):
            views["narrow"].raw()


def test_a_quantised_tensor_can_be_strided_by_rows() -> None:
    tensor = allocated((64, 6), Type.Q8_0)
    tensor.set(np.random.default_rng(0).normal(size=(6, 64)))
    with Graph(BACKEND) as graph:
        part = graph.use(tensor).narrow(1, 2, 3)
        assert np.array_equal(part.numpy(), tensor.numpy()[2:5])


def test_a_view_writes_through_and_keeps_the_buffer() -> None:
    context = Context(1)
    tensor = context.new_tensor((4, 2))
    buffer = Buffer.allocate(context, BACKEND.buffer_type)
    assert buffer
    tensor.set(np.zeros((2, 4)))
    view = tensor.view()
    view[1, 2] = 7
    assert tensor.numpy()[1, 2] == 7 and view.flags.writeable
    assert not view.flags.owndata
    with pytest.raises(GGMLError, match="views of this buffer are alive"):
        buffer.close()
    part = view[1:]
    del view, tensor, context
    gc.collect()
    with pytest.raises(GGMLError, match="views of this buffer are alive"):
        buffer.close()
    assert part[0, 2] == 7
    del part
    gc.collect()
    buffer.close()
    assert buffer.closed


def test_a_view_outlives_every_handle() -> None:
    view = allocated((1000,), Type.F32).view()
    gc.collect()
    view[:] = 3
    assert view.sum() == 3000


def test_a_view_of_read_only_memory_is_read_only() -> None:
    raw = np.zeros(64, np.float32)
    offset = (-raw.ctypes.data) % 32
    buffer = Buffer.from_memory(BACKEND.device, raw.ctypes.data + offset, 32, owner=raw)
    context = Context(1)
    tensor = context.new_tensor((8,))
    buffer.place(tensor, 0)
    assert not tensor.view().flags.writeable
    with pytest.raises(GGMLError, match="leave a buffer"):
        buffer.place(context_tensor(16), 0)
    with pytest.raises(GGMLError, match="has data already"):
        buffer.place(tensor, 0)


def context_tensor(n: int) -> Tensor:
    return Context(1).new_tensor((n,))


@pytest.mark.parametrize("type", [Type.BF16, Type.Q8_0])
def test_no_view_of_what_numpy_has_no_type_for(type: Type) -> None:
    with pytest.raises(GGMLError, match="numpy has no type"):
        allocated((32,), type).view()


def test_long_names_stay_different() -> None:
    context = Context(4)
    a, b = (context.new_tensor((1,), name="model.layers." + "x" * 80 + tail) for tail in "ab")
    assert a.name != b.name and len(a.name.encode()) == 63
    c = context.new_tensor((1,), name="é" * 50)
    assert len(c.name.encode()) <= 63
    d = context.new_tensor((1,), name="x" * 63)
    assert d.name == "x" * 63


def test_use_after_close() -> None:
    context = Context(1)
    tensor = context.new_tensor((4,))
    context.close()
    context.close()
    for use in (
        lambda: tensor.ne,
        lambda: tensor.numpy(),
        lambda: tensor.name,
        lambda: tensor.set([1] * 4),
        lambda: tensor.view(),
    ):
        with pytest.raises(ClosedError):
            use()
    assert "closed" in repr(tensor)
    with pytest.raises(ClosedError):
        context.new_tensor((4,))


def test_shapes_that_are_none() -> None:
    context = Context(8)
    for ne in ((), (1, 1, 1, 1, 1), (-1,), (2**31,), (1.5,), (2**20, 2**20, 2**20)):
        with pytest.raises(ShapeError):
            context.new_tensor(ne)
    with pytest.raises(ShapeError, match="multiple"):
        context.new_tensor((33,), Type.Q8_0)
    with pytest.raises(GGMLError, match="no room"):
        for _ in range(100):
            context.new_tensor((1,))


def test_operators() -> None:
    a, b = np.array([1.0, 2, 3, 4]), np.array([[2.0] * 4, [4.0] * 4])
    with Graph(BACKEND) as graph:
        x, y = graph.input((4,), name="x"), graph.input((4, 2), name="y")
        cases: dict[str, tuple[Any, Any]] = {
            "x+y": (x + y, a + b), "y+x": (y + x, b + a), "x*y": (x * y, a * b), "y-x": (y - x, b - a),
            "y/x": (y / x, b / a), "x+1": (x + 1, a + 1), "1+x": (1 + x, 1 + a), "x-1": (x - 1, a - 1),
            "1-x": (1 - x, 1 - a), "2*x": (2 * x, 2 * a), "x/4": (x / 4, a / 4), "2/x": (2 / x, 2 / a), "-x": (-x, -a),
            "np": (np.float32(2) * x, 2 * a), "npr": (x - np.float64(2), a - 2),
        }  # fmt: skip
        for name, (node, _) in cases.items():
            graph.output(node, name=name)
        results = graph.compute(x=a, y=b)
    for name, (_, wanted) in cases.items():
        assert np.allclose(results[name], wanted), name


def test_methods_are_the_operations() -> None:
    x = np.random.default_rng(0).uniform(0.5, 2, (4, 8)).astype(np.float32)
    with Graph(BACKEND, 256) as graph:
        t = graph.input((8, 4), name="x")
        graph.output(t.reshape(4, -1).narrow(1, 2, 4).cont(16), name="part")
        graph.output(t.permute(1, 0, 2, 3).cast(Type.F16).cast(Type.F32), name="permuted")
        graph.output(t.chunk(2)[0].cont().repeat((8, 4)), name="repeated")
        graph.output(t.sum() + t.mean().sum() + t.sum_rows().sum(), name="sums")
        graph.output(t.sqr().sqrt().exp().log().clamp(0.6, 1.9).relu(), name="chain")
        graph.output(t.tanh().sigmoid().silu().gelu().norm().rms_norm().soft_max(), name="acts")
        r = graph.compute(x=x)
    assert np.array_equal(r["part"], x.reshape(-1)[8:24])
    assert np.allclose(r["permuted"], x.T, atol=1e-3)
    assert np.array_equal(r["repeated"], np.tile(x[:, :4], (1, 2)))
    assert np.allclose(r["sums"], 2 * x.sum() + x.mean(1).sum(), rtol=1e-5)
    assert np.allclose(r["chain"], x.clip(0.6, 1.9), atol=1e-5)
    assert np.allclose(r["acts"].sum(-1), 1, atol=1e-5)


def test_item_and_op_parameters() -> None:
    with Graph(BACKEND) as graph:
        x = graph.input((4,), name="x")
        y = graph.output(x.sum() * 2.5, name="y")
        assert y.op_param(0, "f") == 2.5
        graph.compute(x=[1, 2, 3, 4])
        assert y.item() == 25.0
        with pytest.raises(ShapeError):
            x.item()
