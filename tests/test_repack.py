"""Weights in layouts of their own (CPU_REPACK): which, the same bytes whichever way they came, and no memory twice."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from test_modes import resident

from loader import LoadOptions, MappedFile, Param, Weights, load_params, open_checkpoint
from loader.repack import FASTER, layout_for, takes
from models.nn import Embedding, Linear, linear
from pyggml import Backend, Buffer, BufferType, Context, GGMLError, Graph, ShapeError, Type, ops, quantize

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
NE = (512, 256)


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with Backend.cpu(2) as backend:
        yield backend


@pytest.fixture(scope="module")
def layout(backend: Backend) -> BufferType:
    found = layout_for(backend.device, NE, Type.Q4_0, "on")
    if found is None:
        pytest.skip("this processor has no layout of its own for q4_0")
    return found


def write(path: Path, table: dict[str, tuple[Type, np.ndarray]]) -> Path:
    """A gguf file of quantised tensors, as name -> (type, bytes [n_out, bytes of a row])."""
    writer = gguf.GGUFWriter(path, "test")
    for name, (type, raw) in table.items():
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[type.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


TYPES = (Type.Q4_0, Type.IQ4_NL, Type.Q4_K, Type.Q8_0, Type.F16)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(8)
    table = {}
    for type in TYPES:
        values = rng.standard_normal(NE[::-1], np.float32) / NE[0] ** 0.5
        raw = values.astype(np.float16) if type is Type.F16 else quantize(values, type).reshape(NE[1], -1)
        table[type.name] = (type, raw)
    return write(tmp_path_factory.mktemp("repack") / "x.gguf", table)


def load(path: Path, backend: Backend, *, product: bool = True, **options: Any) -> Weights:
    params = {type.name: Param(NE, product=product) for type in TYPES}
    with open_checkpoint(path) as checkpoint:
        return load_params(params, checkpoint, backend=backend, component="t", options=LoadOptions(**options))


def products(weights: Weights, backend: Backend) -> dict[str, np.ndarray]:
    """Every weight times 1 and 25 tokens, as `Linear` computes it."""
    rng = np.random.default_rng(9)
    result = {}
    for type in TYPES:
        for n in (1, 25):
            with Graph(backend, 16) as graph:
                graph.output(linear(weights[type.name], graph.input((NE[0], n), name="x")), name="y")
                result[f"{type.name} {n}"] = graph.compute(x=rng.standard_normal((n, NE[0]), np.float32))["y"]
    return result


def test_what_is_repacked(path: Path, backend: Backend, layout: BufferType) -> None:
    def repacked(**options: Any) -> set[str]:
        with load(path, backend, **options) as weights:
            report = weights.report
            names = {n for n, p in weights.params.items() if layout_name(p) != "plain"}
            assert report.n_repacked == len(names) and report.n_mapped == len(TYPES) - len(names)
            assert report.not_mapped == ({f"repacked for {layout.name}": len(names)} if names else {})
            assert report.repacked_bytes == sum(weights.params[n].tensor.n_bytes for n in names)
            return names

    def layout_name(param: Param) -> str:
        from pyggml.lib import lib

        return layout.name if lib.pyggml_is_repacked(param.tensor.ptr) else "plain"

    every = {type.name for type in TYPES if takes(backend.device, layout, NE, type)}
    assert "Q4_0" in every and "F16" not in every
    assert repacked(repack="on") == every
    assert repacked(repack="off") == set()
    assert repacked(repack="on", product=False) == set()
    assert repacked(repack="auto") in (set(), every & {type.name for type in FASTER[layout.name]})


def test_only_weights_of_products_qualify() -> None:
    assert Linear(32, 32).weight.product and not Embedding(32, 32).weight.product


def test_shapes_without_a_kernel_stay(backend: Backend, layout: BufferType) -> None:
    assert layout_for(backend.device, (512, 255), Type.Q4_0, "on") is None
    assert layout_for(backend.device, (512,), Type.Q4_0, "on") is None


def test_products_of_repacked_weights(path: Path, backend: Backend, layout: BufferType) -> None:
    with load(path, backend, repack="on") as repacked, load(path, backend, repack="off") as plain:
        ours, theirs = products(repacked, backend), products(plain, backend)
        rng = np.random.default_rng(9)
        for name, y in ours.items():
            type, n = name.split()
            x = rng.standard_normal((int(n), NE[0]), np.float32)
            expected = x @ plain[type].numpy().T
            assert np.abs(y - expected).max() < 0.02 * np.abs(expected).max(), name  # activations have 8 bits
            if type in ("Q8_0", "F16"):
                assert y.tobytes() == theirs[name].tobytes()  # not repacked on x86: our kernel and ggml's, as before


@linux
def test_the_same_bytes_whichever_way_they_came(path: Path, backend: Backend, layout: BufferType) -> None:
    seen = set()
    for mode in ("map", "io", "off"):
        for mlock in (False, True):
            for reclaim in (True, False):
                with load(path, backend, repack="on", mode=mode, mlock=mlock, reclaim=reclaim) as weights:
                    seen.add(b"".join(y.tobytes() for y in products(weights, backend).values()))
    assert len(seen) == 1


def test_repacked_weights_are_not_read_as_plain(path: Path, backend: Backend, layout: BufferType) -> None:
    with load(path, backend, repack="on") as weights, Graph(backend, 16) as graph:
        w = weights["Q4_0"]
        for read in (w.numpy, w.raw, lambda: w.view()):
            with pytest.raises(GGMLError, match=r"repacked|no type"):
                read()
        rows = ops.view(graph.use(w), (NE[0], 8), (w.nb[1],))
        graph.output(ops.mul_mat(rows, graph.input((NE[0], 2), name="x")), name="y")
        with pytest.raises(ShapeError, match="weights as the file has them, but these are repacked"):
            graph.compute(x=np.zeros((2, NE[0])))
    with Context(1) as context:
        odd = context.new_tensor((512, 255), Type.Q4_0)
        Buffer.allocate(context, layout)
        with pytest.raises(GGMLError, match="no layout for this type and shape"):
            odd.set(np.zeros((255, 512)))


@linux
@pytest.mark.parametrize("mode", ["map", "io", "off"])
@pytest.mark.parametrize(("reclaim", "mlock"), [(True, False), (False, False), (True, True)])
def test_source_pages_go_as_the_copy_goes(
    path: Path, backend: Backend, layout: BufferType, mode: Any, reclaim: bool, mlock: bool
) -> None:
    """Never more than one tensor ahead: what is resident at each report is the tensor just copied, whole pages."""
    seen: list[int] = []
    names = [t.name for t in TYPES if takes(backend.device, layout, NE, t)]
    params = {n: Param(NE, product=True) for n in names}
    with open_checkpoint(path) as checkpoint:
        only = checkpoint.renamed([(rf"^(?!({'|'.join(names)})$).*$", None)])
        sizes = [only[n].n_bytes for n in names]
        load_params(
            params, only, backend=backend, component="t", progress=lambda done, total: seen.append(resident(path)),
            options=LoadOptions(mode=mode, repack="on", reclaim=reclaim, mlock=mlock),
        ).close()  # fmt: skip
    around = 2 * 64 * 1024  # the kernel maps what is cached around a page that is asked for
    if mode == "off":
        assert not any(seen)
    elif reclaim and not mlock:
        assert all(n <= max(sizes) + around for n in seen) and seen[0] >= sizes[0]
    else:
        assert seen[-1] >= sum(sizes)


MEASURE = """
import json, resource, sys
import numpy as np
from loader import LoadOptions, Param, load_params, open_checkpoint
from loader.repack import takes
from models.nn import linear
from pyggml import Backend, Graph
def status(key):
    return int(next(x for x in open("/proc/self/status") if x.startswith(key)).split()[1]) * 1024
path, options = sys.argv[1], json.loads(sys.argv[2])
backend = Backend.cpu(2)
with open_checkpoint(path) as checkpoint:
    params = {name: Param(checkpoint[name].ne, product=True) for name in checkpoint}
    weights = load_params(params, checkpoint, backend=backend, component="t", options=LoadOptions(**options))
peak = status("VmHWM")
y = np.ones((1, 1024), np.float32)
graph = Graph(backend, 256)
h = graph.input((1024, 1), name="x")
for name in params:
    h = linear(weights[name], h)
graph.output(h, name="y")
y = graph.compute(x=y)["y"]
print(json.dumps({"peak": peak, "repacked": weights.report.repacked_bytes, "seconds": weights.report.seconds,
                  "largest": max(p.tensor.n_bytes for p in params.values()), "y": y.tobytes().hex()}))
"""


@linux
def test_peak_memory_falls_by_the_size_of_the_repacked_weights(
    tmp_path: Path, backend: Backend, layout: BufferType
) -> None:
    """A process of its own for each; weights of 236 MB."""
    n_tensors, n = 40, 10240
    raw = np.random.default_rng(1).integers(0, 256, (n, 1024 // 32, 18), np.uint8)
    raw[..., :2] = np.frombuffer(np.float16(0.004).tobytes(), np.uint8)
    down = raw.reshape(-1)[: n * 1024 // 32 * 18].reshape(1024, -1)
    pairs = {f"{i}.{w}": (Type.Q4_0, raw.reshape(n, -1) if w == "up" else down)
             for i in range(n_tensors // 2) for w in ("up", "down")}  # fmt: skip
    path = write(tmp_path / "big.gguf", pairs)

    def measure(**options: Any) -> dict[str, Any]:
        run = subprocess.run(
            [sys.executable, "-c", MEASURE, str(path), json.dumps(options)], capture_output=True, text=True,
            timeout=300, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        result: dict[str, Any] = json.loads(run.stdout)
        return result

    kept, reclaimed = measure(repack="on", reclaim=False), measure(repack="on")
    assert kept["repacked"] == n_tensors * raw.nbytes
    fall = kept["peak"] - reclaimed["peak"]
    assert abs(fall - (kept["repacked"] - kept["largest"])) < 0.05 * kept["repacked"]
    assert abs(fall - kept["repacked"]) < 0.05 * kept["repacked"]
    assert kept["y"] == reclaimed["y"]


@linux
def test_small_tensors_do_not_bring_repacked_ones_back(tmp_path: Path, backend: Backend, layout: BufferType) -> None:
    """test_plan.py has what that saves."""
    n, ne = 20, (1024, 1792)
    raw = np.zeros((ne[1], ne[0] // 32 * 18), np.uint8)
    pair = (("norm", Type.F32, np.ones(4096, np.float32)), ("weight", Type.Q4_0, raw))
    table = {f"{i}.{name}": (type, values) for i in range(n) for name, type, values in pair}
    path = write(tmp_path / "x.gguf", table)
    params = {name: Param((4096,) if name.endswith("norm") else ne, product=True) for name in table}
    for reclaim, copied in ((True, n), (False, 0)):
        with open_checkpoint(path) as checkpoint:
            options = LoadOptions(repack="on", reclaim=reclaim)
            weights = load_params(params, checkpoint, backend=backend, component="t", options=options)
        with weights:
            assert weights.report.not_mapped.get("small, beside repacked weights", 0) == copied
            assert weights.report.n_repacked == n
            assert all((weights[f"{i}.norm"].numpy() == 1).all() for i in range(n))
            assert (resident(path) == 0) is reclaim
    with open_checkpoint(path) as checkpoint:
        plain = load_params(params, checkpoint, backend=backend, component="t", options=LoadOptions(repack="off"))
    with plain:
        assert plain.report.n_mapped == 2 * n


@linux
def test_computing_with_repacked_weights_reads_no_file(path: Path, backend: Backend, layout: BufferType) -> None:
    """No major fault, although nothing of the file is cached any more."""
    names = [t.name for t in TYPES if takes(backend.device, layout, NE, t)]
    with open_checkpoint(path) as checkpoint:
        only = checkpoint.renamed([(rf"^(?!({'|'.join(names)})$).*$", None)])
        weights = load_params(
            {n: Param(NE, product=True) for n in names}, only, backend=backend, component="t",
            options=LoadOptions(repack="on"),
        )  # fmt: skip
    with MappedFile(path) as file:
        os.sync()
        file.drop_cache()
    with weights, Graph(backend, 16) as graph:
        x = graph.input((NE[0], 25), name="x")
        for name in names:
            graph.output(linear(weights[name], x), name=name)
        graph.alloc()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        for _ in range(3):
            graph.compute(x=np.ones((25, NE[0])))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_majflt == before
