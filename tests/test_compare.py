"""Comparing two backends operation by operation: a wrong one is named, and what only inherits its error is not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from pyggml import Backend, GGMLError, Graph, Op, SplitBackend, Type, ops
from pyggml.compare import compare_ops, first_difference, relative_error
from pyggml.lib import ffi, lib
from studio import cli

RNG = np.random.default_rng(0)


@pytest.fixture
def two() -> Iterator[tuple[Backend, Backend]]:
    with Backend.cpu(1) as a, Backend.cpu(1) as b:
        yield a, b


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[Backend, Callable[[Any], bool]], None]:
    """spoil(backend, which): from now on the results of `which` nodes are 3 % too large on that backend."""

    def spoil(backend: Backend, which: Callable[[Any], bool]) -> None:
        def compute(ptr: Any, graph: Any) -> int:
            status = lib.pyggml_compute(ptr, graph)
            for i in range(lib.ggml_graph_n_nodes(graph)):
                node = lib.ggml_graph_node(graph, i)
                if ptr == backend.ptr and which(node):
                    data = ffi.buffer(ffi.cast("char *", node.data), lib.ggml_nbytes(node))
                    np.frombuffer(data, np.float32)[:] *= np.float32(1.03)
            return int(status)

        class Wrong:
            pyggml_compute = staticmethod(compute)

            def __getattr__(self, name: str) -> Any:
                return getattr(lib, name)

        for module in ("graph", "compare"):
            monkeypatch.setattr(f"pyggml.{module}.lib", Wrong())

    return spoil


def network(backend: Backend) -> Graph:
    """Two layers, with views, in-place reuse of memory, a strided source, a mask of infinities and rows by number."""
    graph = Graph(backend, 64)
    x = graph.input((32, 6), name="x")
    w = graph.input((32, 32), Type.F16, name="w")
    mask = graph.input((6, 6), Type.F16, name="mask")
    rows = graph.input((4,), Type.I32, name="rows")
    for i in range(2):
        y = ops.mul_mat(w, x)
        y.name = f"product {i}"
        scores = ops.soft_max_ext(ops.mul_mat(y, y), mask, scale=0.1)
        values = ops.cont(ops.permute(y, 1, 0, 2, 3))
        x = ops.add(x, ops.silu(ops.mul_mat(values, scores)))
    half = ops.view(x, (16, 6), (x.nb[1],), offset=64)
    graph.output(ops.get_rows(ops.scale(ops.cont(half), 2.0), rows), name="out")
    future = np.triu(np.full((6, 6), -np.inf, np.float32), 1)
    graph.set(x=RNG.normal(size=(6, 32)), w=RNG.normal(size=(32, 32)) / 6, mask=future, rows=[5, 0, 3, 3])
    return graph


def test_equal_backends(two: tuple[Backend, Backend]) -> None:
    with network(two[0]) as graph:
        expected = graph.compute()["out"]
        found = list(compare_ops(graph, two[1]))
        assert [d.error for d in found] == [0.0] * len(found)
        n_views = sum(node.op in (Op.VIEW, Op.PERMUTE, Op.RESHAPE) for node in graph.nodes)
        assert n_views and len(found) == len(graph.nodes) - n_views
        assert first_difference(graph, two[1], 0.0) is None
        np.testing.assert_array_equal(graph.outputs["out"].numpy(), expected)  # and they were all computed


@pytest.mark.parametrize("where", [0, 1], ids=["the graph's", "the other"])
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda node: ffi.string(node.name) == b"product 1", "product 1 F32 ne [32, 6] = mul_mat> of (<Tensor w"),
        (lambda node: node.op == Op.SOFT_MAX, "ne [6, 6] = soft_max> of (<Tensor "),
        (lambda node: node.op == Op.GET_ROWS, "<Tensor out F32 ne [16, 4] = get_rows> of (<Tensor "),
    ],
)
def test_a_wrong_operation_is_named(
    two: tuple[Backend, Backend], spoil: Any, wrong: Callable[[Any], bool], named: str, where: int
) -> None:
    with network(two[0]) as graph:
        spoil(two[where], wrong)
        first = first_difference(graph, two[1], 0.01)
        assert first is not None and first.error == pytest.approx(0.03, rel=0.05)
        assert named in str(first) and str(first).endswith(f": differs by {first.error:.3g}")
        assert first_difference(graph, two[1], 0.1) is None
        # What is made of a wrong result is not wrong itself.
        large = [d for d in compare_ops(graph, two[1]) if d.error is not None and d.error > 0.01]
        assert len(large) == sum(wrong(node.ptr) for node in graph.nodes)


def test_what_the_other_cannot_compute_is_said(two: tuple[Backend, Backend]) -> None:
    with network(two[0]) as graph, SplitBackend([two[1]]) as split:
        with pytest.raises(GGMLError, match="computes whole graphs"):
            next(compare_ops(graph, split))

        class Refusing:
            def __getattr__(self, name: str) -> Any:
                return getattr(lib, name)

            def pyggml_first_refused(self, ptr: Any, one: Any, why: Any) -> int:
                return 0 if lib.ggml_graph_node(one, 0).op == Op.SOFT_MAX else -1

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pyggml.compare.lib", Refusing())
            found = list(compare_ops(graph, two[1]))
        refused = [d for d in found if d.error is None]
        assert len(refused) == 2 and all(str(d).endswith(": CPU has no such kernel") for d in refused)
        assert all(d.error == 0 for d in found if d not in refused)


def test_relative_error() -> None:
    a, inf, nan = np.array([3.0, 4.0]), np.inf, np.nan
    assert relative_error(a, a) == 0 and relative_error(a * 1.01, a) == pytest.approx(0.01)
    assert relative_error(np.append(a, inf), np.append(a, inf)) == 0
    assert relative_error(np.append(a * 1.01, -inf), np.append(a, -inf)) == pytest.approx(0.01)
    for x, y in ((inf, 1.0), (1.0, inf), (inf, -inf), (nan, 1.0), (1.0, nan)):
        assert relative_error(np.append(a, x), np.append(a, y)) == inf, (x, y)
    assert relative_error(np.append(a, nan), np.append(a, nan)) == 0
    assert relative_error(a, 0 * a) == inf and relative_error(0 * a, 0 * a) == 0


def test_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    small = ("compare-backends", "a red circle", "-W", "16", "-H", "16", "--backend", "cpu")
    assert cli.main(small) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split(" at ")[0] for line in lines] == [
        "the text encoder", "the caption's refiner", "the transformer", "the decoder",
    ]  # fmt: skip
    wanted = re.compile(r": \d+ operations on CPU and CPU(, \d+ left out)?, they differ by at most 0$")
    assert all(wanted.search(line) for line in lines), lines
    for wrong, message in (
        (("--with", "cuda7"), "error: --with: there is no device 'cuda7'"),
        (("--tolerance", "0"), "error: --tolerance must be above 0 and below 1, not 0.0"),
        (("--max-vram", "1G"), "error: compare-backends wants the weights where they are computed with: leave"),
    ):
        assert cli.main((*small, *wrong)) == 2
        assert capsys.readouterr().err.startswith(message)


def test_a_wrong_operation_on_the_command_line(spoil: Any, capsys: pytest.CaptureFixture[str]) -> None:
    class Any_:  # the backend that the command opens itself
        ptr = type("Anything", (), {"__eq__": lambda self, other: True, "__hash__": None})()
