"""Computing on RPC servers: one model over two of them, and what happens when they go away."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import write_tiny_models

import models
from loader.checkpoint import open_checkpoint
from loader.params import Param
from loader.upload import Uploader, take
from models.split import shares
from pyggml import Backend, Buffer, Context, GGMLError, Graph, ServerLost, SplitBackend, add_rpc_server, ops, rpc
from pyggml.lib import FOLDER
from studio import cli

ROOT = Path(__file__).parents[1]
DEMO = [str(ROOT / "studio" / "demo" / f) for f in ("z_image_demo.gguf", "qwen3_demo.gguf", "ae_demo.safetensors")]
DRAW: dict[str, Any] = dict(
    prompt="a red circle on a blue background", height=64, width=64, num_inference_steps=2, output_type="np"
)
START = [sys.executable, "-c", "import sys; from studio.cli import main; sys.exit(main())"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
has_rpc = pytest.mark.skipif(
    not json.loads((FOLDER / "build.json").read_text())["rpc"], reason="built without --rpc: python build.py --rpc"
)


class Server:
    """An rpc-server of our build on the loopback interface."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.endpoint = f"127.0.0.1:{port}"
        command = [*START, "rpc-server", "-p", str(port), "-t", "1"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
        until = time.monotonic() + 120
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            assert self.process.poll() is None and time.monotonic() < until, "the server does not listen"
            time.sleep(0.05)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def serve() -> Iterator[Callable[[], Server]]:
    running: list[Server] = []

    def start() -> Server:
        running.append(Server())
        return running[-1]

    yield start
    for server in running:
        server.kill()


def psnr(a: NDArray[Any], b: NDArray[Any]) -> float:
    error = np.mean((a.astype(float) - b) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else np.inf


@has_rpc
def test_a_model_over_two_servers(serve: Callable[[], Server]) -> None:
    first, second = (add_rpc_server(serve().endpoint)[0] for _ in range(2))
    pictures = {}
    for backend in ("cpu", first.name, f"{first.name}&{second.name}"):
        with models.load(*DEMO, backend=backend, n_threads=1) as pipe:
            pictures[backend] = pipe(**DRAW).images[0]
            if "&" in backend:
                parts = [part.report.allocated_bytes for part in pipe.transformer.weights.parts]
                assert min(parts) > 0.3 * sum(parts)
    cpu, one, two = pictures.values()
    assert np.array_equal(one, two)
    assert psnr(cpu, one) > 40  # the processor's own kernels here, ggml's there


@has_rpc
@pytest.mark.parametrize("which", [0, 1])
def test_a_server_dies_in_a_step(serve: Callable[[], Server], which: int) -> None:
    servers = [serve(), serve()]
    names = [add_rpc_server(server.endpoint)[0].name for server in servers]
    died: list[float] = []

    def die() -> None:
        time.sleep(0.2)
        died.append(time.monotonic())
        servers[which].kill()

    with models.load(*DEMO, backend="&".join(names), n_threads=1) as pipe:
        features = pipe.encode("a red circle on a blue background")
        thread = threading.Thread(target=die)
        noise = np.random.default_rng(0).standard_normal((16, 32, 32), np.float32)
        levels = np.linspace(1, 0, 201, dtype=np.float32)  # far more steps than can be done
        thread.start()
        with pytest.raises(ServerLost, match=f"the RPC server {servers[which].endpoint} is gone: "):
            pipe.denoise(noise, levels, features)
        assert time.monotonic() - died[0] < 10
        thread.join()
        with pytest.raises(ServerLost, match="is gone"):  # and it stays gone
            pipe.denoise(noise, levels, features)
    # Buffers of the lost server have been closed without harm; the other one goes on, and so does a new one.
    other, new = names[1 - which], add_rpc_server(serve().endpoint)[0].name
    with models.load(*DEMO, backend=f"{other}&{new}", n_threads=1) as pipe:
        assert pipe(**DRAW).images[0].std() > 10


@has_rpc
def test_a_server_dies_before_it_is_used(serve: Callable[[], Server]) -> None:
    server = serve()
    device = add_rpc_server(server.endpoint)[0]
    assert device.description == server.endpoint
    with device.open() as backend:
        context = Context(n_tensors=1)
        tensor = context.new_tensor((1000,))
        Buffer.allocate(context, backend.buffer_type)
        tensor.set(np.ones(1000))
        assert tensor.numpy().sum() == 1000
        server.kill()
        for use in (tensor.numpy, lambda: tensor.set(np.ones(1000))):
            with pytest.raises(ServerLost, match=server.endpoint):
                use()
        other = Context(n_tensors=1)
        other.new_tensor((10,))
        with pytest.raises(ServerLost, match=server.endpoint):
            Buffer.allocate(other, backend.buffer_type)
    with pytest.raises(ServerLost, match=f"no RPC server at {server.endpoint}"):
        add_rpc_server(server.endpoint)
    with pytest.raises(ServerLost, match=server.endpoint):
        models.load(*DEMO, backend=device.name)


@has_rpc
def test_a_server_dies_while_weights_are_sent(serve: Callable[[], Server]) -> None:
    """What is left of them is not read: a large model takes minutes."""
    server, value = serve(), np.ones(1024, np.float32)
    context = Context(n_tensors=1)
    tensor = context.new_tensor((1024,))
    with add_rpc_server(server.endpoint)[0].open() as backend:
        Buffer.allocate(context, backend.buffer_type)
        uploader = Uploader(backend.device, 4096)
        try:
            uploader.put(tensor, 0, value.nbytes, partial(take, value.view(np.uint8).data))
            server.kill()
            with pytest.raises(ServerLost, match=server.endpoint):
                for _ in range(1000):
                    uploader.put(tensor, 0, value.nbytes, partial(take, value.view(np.uint8).data))
                    time.sleep(0.01)
        finally:
            uploader.close()


@has_rpc
def test_one_server_by_two_names(serve: Callable[[], Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves one connection at a time: the other one is not waited for without a limit."""
    monkeypatch.setattr(rpc, "ANSWER_SECONDS", 1.0)
    server = serve()
    names = [server.endpoint, server.endpoint.replace("127.0.0.1", "localhost")]
    with pytest.raises(ServerLost, match=rf"{names[1]}.* is it busy with another client"):
        models.load(*DEMO, backend="&".join(add_rpc_server(name)[0].name for name in names), n_threads=1)


@has_rpc
def test_command_line(serve: Callable[[], Server], tmp_path: Path) -> None:
    servers = [serve(), serve()]
    both = ",".join(server.endpoint for server in servers)

    def generate(output: str) -> subprocess.CompletedProcess[str]:
        arguments = ["generate", DRAW["prompt"], "-W", "64", "-H", "64", "--steps", "1", "-o", str(tmp_path / output)]
        command = [*START, *arguments, "--rpc-servers", both]
        return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)

    for output in ("a.png", "b.png"):  # the servers are free again after a run
        run = generate(output)
        assert run.returncode == 0, run.stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    listed = [*START, "generate", "--list-devices", "--rpc-servers", both]
    shown = subprocess.run(listed, env=ENVIRONMENT, capture_output=True, text=True, timeout=300).stdout.splitlines()
    assert shown[-2:] == [f"RPC{i}\t{server.endpoint}" for i, server in enumerate(servers)]
    servers[1].kill()
    run = generate("c.png")
    assert run.returncode == 1
    assert run.stderr == f"error: no RPC server at {servers[1].endpoint}: Connection refused\n"


@pytest.mark.parametrize(
    "endpoint", ["", "host", "host:", ":50052", "host:0", "host:65536", "host:5x", "host:٥", "a..b:5"]
)
def test_what_is_no_endpoint(endpoint: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        rpc.relay_to(endpoint)


@has_rpc
@pytest.mark.parametrize("wrong", [["-p", "0"], ["-p", "70000"], ["-t", "0"]])
def test_options_of_the_server(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rpc-server", *wrong]) == 2
    assert capsys.readouterr().err.startswith("error: --")


@has_rpc
def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert cli.main(["rpc-server", "-p", str(port)]) == 2
    assert capsys.readouterr().err == f"error: cannot listen at 127.0.0.1:{port}: Address already in use\n"


def test_a_build_without_rpc_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if (FOLDER / "rpc-server").exists():
        pytest.skip("this build has RPC")
    with pytest.raises(GGMLError, match=r"build it with `python build\.py --rpc`"):
        add_rpc_server("127.0.0.1:1")
    assert cli.main(["rpc-server", "-p", "50052"]) == 2
    assert "build.py --rpc" in capsys.readouterr().err


# -- the relay, against servers of our own that misbehave -------------------------------------------------------------

HELLO = bytes([7, 0, 0, 0]) + bytes(24)


def misbehaving(answer: Callable[[socket.socket], None]) -> str:
    """host:port of a server that does `answer` with every connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                answer(connection)

    threading.Thread(target=run, daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def greet(connection: socket.socket, hello: bytes = HELLO) -> None:
    rpc._read(connection, 9 + 24)
    connection.sendall(struct.pack("<Q", len(hello)) + hello)


def test_another_protocol_is_refused() -> None:
    endpoint = misbehaving(lambda c: greet(c, bytes([8, 1, 0, 0]) + bytes(24)))
    with pytest.raises(GGMLError, match=r"speaks version 8\.1\.0 of the protocol, we 7"):
        rpc.relay_to(endpoint)


def test_what_is_no_rpc_server_is_refused() -> None:
    with pytest.raises(GGMLError, match="version unknown"):
        rpc.relay_to(misbehaving(lambda c: c.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")))
    with pytest.raises(ServerLost, match=r"closed the connection|reset by peer"):
        rpc.relay_to(misbehaving(lambda c: None))


def test_a_server_that_is_busy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "ANSWER_SECONDS", 0.2)
    with pytest.raises(ServerLost, match="is it busy with another client"):
        rpc.relay_to(misbehaving(lambda c: time.sleep(3)))


def test_a_server_that_answers_byte_by_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is for all of the answer."""

    def trickle(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for _ in range(200):
                connection.sendall(bytes(1))
                time.sleep(0.1)

    monkeypatch.setattr(rpc, "ANSWER_SECONDS", 0.3)
    with pytest.raises(ServerLost, match="something else than an RPC server"):
        rpc.relay_to(misbehaving(trickle))


@pytest.mark.parametrize("at", ["at once", "in an answer", "with a wrong length"])
def test_ggml_gets_answers_of_the_right_length_when_the_server_does_not_answer(at: str) -> None:
    n, n_first = (1 << 20) + 1000, 1 << 20  # the relay passes on an answer in pieces of 1 MiB

    def answer(connection: socket.socket) -> None:
        greet(connection)
        if at != "at once" and connection.recv(1):
            rpc._read(connection, 8 + 316)
            connection.sendall(struct.pack("<Q", n if at == "in an answer" else 5) + b"1" * n_first + b"23")

    address = rpc.relay_to(misbehaving(answer))
    rpc.check(address)
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), 20) as ggml:
        ggml.sendall(struct.pack("<BQ", 14, 24) + bytes(24))
        assert rpc._read(ggml, 8 + len(HELLO))[8:] == HELLO
        asked = bytes(300) + struct.pack("<QQ", 0, n)
        ggml.sendall(struct.pack("<BQ", 8, len(asked)) + asked)  # GET_TENSOR
        got = rpc._read(ggml, 8 + n)
        assert struct.unpack("<Q", got[:8]) == (n,)
        assert got[8:] == (b"1" if at == "in an answer" else bytes(1)) * n_first + bytes(n - n_first)
        with pytest.raises(ServerLost, match="is gone"):
            rpc.check(address)
        answers = {0: 16, 1: 8, 2: 8, 3: 8, 7: 1, 9: 1, 11: 16, 13: 8, 14: 28, 15: 4}
        for command, n_answer in answers.items():
            ggml.sendall(struct.pack("<BQ", 6, 5000) + bytes(5000))  # SET_TENSOR is not answered
            ggml.sendall(struct.pack("<BQ", command, 16) + bytes(16))
            got = rpc._read(ggml, 8 + n_answer)
            assert struct.unpack("<Q", got[:8]) == (n_answer,)
            if command in (1, 2, 3):
                assert struct.unpack("<Q", got[8:])[0] >= 4096  # ggml divides by it, or asserts that it is no null


# -- one graph on several backends, which needs no server -------------------------------------------------------------


def test_a_graph_on_two_backends() -> None:
    rng = np.random.default_rng(0)
    values = [rng.standard_normal((32, 32), np.float32) for _ in range(2)]
    x = rng.standard_normal((5, 32), np.float32)
    with Backend.cpu(1) as a, Backend.cpu(2) as b, SplitBackend([a, b]) as both:
        weights = []
        for backend, value in zip((a, b), values, strict=True):
            context = Context(n_tensors=1)
            weights.append(context.new_tensor((32, 32)))
            Buffer.allocate(context, backend.buffer_type, weights=True)
            weights[-1].set(value)
        with Graph(both, n_nodes=16) as graph:
            h = ops.silu(ops.mul_mat(weights[0], graph.input((32, 5), name="x")))
            graph.output(ops.mul_mat(weights[1], h), name="y")
            for given in (x, 2 * x):
                y = graph.compute(x=given)["y"]
                h_ = given @ values[0].T
                np.testing.assert_allclose(y, h_ / (1 + np.exp(-h_)) @ values[1].T, rtol=1e-3, atol=1e-3)
            assert graph.buffer_size > 0
            with pytest.raises(GGMLError, match="no single nodes"):
                graph.profile()


def test_a_pipeline_on_two_backends(tmp_path: Path) -> None:
    files = write_tiny_models(tmp_path)
    small: dict[str, Any] = DRAW | {"height": 32, "width": 32}
    with Backend.cpu(1) as a, Backend.cpu(1) as b, SplitBackend([a, b]) as both:
        with models.load(**files, backend=a) as pipe:
            one = pipe(**small).images[0]
        with models.load(**files, backend=both) as pipe:
            report = pipe.transformer.weights.report
            assert report.n_tensors == sum(part.report.n_tensors for part in pipe.transformer.weights.parts)
            assert np.abs(pipe(**small).images[0].astype(int) - one).max() <= 1


def test_shares_are_whole_layers(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(DEMO[0])
    params = {f"layers.{i}.{part}": Param((100,)) for i in range(6) for part in ("a", "b")} | {"end": Param((300,))}
    found = shares(params, checkpoint, 2)
    assert found[0] + found[1] == list(params)
    assert [name.split(".")[1] for name in found[0]] == ["0", "0", "1", "1", "2", "2", "3", "3"]
    assert sorted(shares({"a": Param((4,))}, checkpoint, 2)) == [[], ["a"]]


def test_a_device_is_not_named_twice() -> None:
    with pytest.raises(ValueError, match="names a device twice"):
        models.load(*DEMO, backend="cpu&CPU")
