"""Servers that compute for us: ggml's RPC backend, made to survive the loss of a server.

ggml's client ends the process when a connection breaks, in a thread of its own, while other threads wait for it without
a limit. So it is given a connection that does not break: a relay in this process, which passes everything on to the
server, and once that is gone answers in its place, with zeros of the right length. What is computed then is thrown
away: whoever looks at a result, or moves data, asks `check`, and gets ServerLost.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from typing import Any

from .errors import GGMLError, ServerLost

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 8.0  # for the first answer of a connection: a server serves one at a time, and lets others wait
_CHUNK = 1 << 20

# The commands of protocol 7 that are answered, and how many bytes at least; those of GET_TENSOR are in the request.
_ALIGNMENT, _MAX_SIZE, _BASE, _GET_TENSOR, _HELLO = 1, 2, 3, 8, 14
_ANSWERS = {0: 16, _ALIGNMENT: 8, _MAX_SIZE: 8, _BASE: 8, 7: 1, _GET_TENSOR: 0, 9: 1, 11: 16, 13: 8, _HELLO: 0, 15: 4}
_PROTOCOL = 7
_HELLO_BYTES = 24  # of capabilities, all of them zero: plain TCP

_BUSY = "is it busy with another client, or something else than an RPC server?"

_relays: dict[str, _Relay] = {}  # by the address that ggml knows, which is its devices' description


def check(description: str) -> None:
    """ServerLost when the server behind a device, known by its description, is gone."""
    relay = _relays.get(description)
    if relay is not None and relay.lost:
        raise ServerLost(relay.lost)


def any_servers() -> bool:
    """Whether this process has any: when not, nothing needs to be checked."""
    return bool(_relays)


def server_of(description: str) -> str:
    """host:port of the server behind a device, or "" when it is none of ours."""
    return _relays[description].endpoint if description in _relays else ""


def relay_to(endpoint: str) -> str:
    """Connect to host:port; returns the address that ggml is to be given in its place.

    ValueError when it is no host:port, ServerLost when nobody answers, GGMLError when it speaks another protocol.
    """
    relay = _Relay(endpoint)
    _relays[relay.address] = relay
    return relay.address


class _Relay:
    """Listens on the loopback interface for ggml's client; every connection of it gets one to the server."""

    def __init__(self, endpoint: str) -> None:
        host, colon, port = endpoint.rpartition(":")
        if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise ValueError(f"an RPC server is given as host:port, such as 192.168.1.5:50052, not {endpoint!r}")
        self.endpoint = endpoint
        self.target = (host.strip("[]"), int(port))
        self.lost = ""
        self.hello = self._ask_hello()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, name=f"relay to {endpoint}", daemon=True).start()

    def _connect(self) -> socket.socket:
        server = socket.create_connection(self.target, CONNECT_SECONDS)
        server.settimeout(None)  # a graph may take its time
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A machine that vanishes says nothing: asked every 2 seconds, and given up after 3 questions, or 8 seconds.
        for name, value in (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 8000)):
            if hasattr(socket, name):
                server.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        return server

    def _ask_hello(self) -> bytes:
        """The server's answer to the first command."""
        try:
            with self._connect() as server:
                until = time.monotonic() + ANSWER_SECONDS
                server.sendall(struct.pack("<BQ", _HELLO, _HELLO_BYTES) + bytes(_HELLO_BYTES))
                (n,) = struct.unpack("<Q", _read(server, 8, until))
                hello = _read(server, n, until) if 3 <= n <= 1024 else b""
        except UnicodeError:  # a name that is none, before anybody was asked
            raise ValueError(f"{self.target[0]!r} is no name of a host: an RPC server is given as host:port") from None
        except TimeoutError as error:
            raise ServerLost(f"no answer from an RPC server at {self.endpoint}: {_reason(error)}") from None
        except (OSError, EOFError) as error:
            raise ServerLost(f"no RPC server at {self.endpoint}: {_reason(error)}") from None
        if not hello or hello[0] != _PROTOCOL:
            version = ".".join(map(str, hello[:3])) or "unknown"
            raise GGMLError(
                f"the RPC server at {self.endpoint} speaks version {version} of the protocol, we {_PROTOCOL}: "
                "build both from one ggml"
            )
        return hello

    def _accept(self) -> None:
        while True:
            client, _ = self.listener.accept()
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(client,), name=f"relay to {self.endpoint}", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server: socket.socket | None = None
        try:
            server = None if self.lost else self._connect()
        except OSError as error:
            self._lose(error)
        with client:
            try:
                while True:
                    self._pass_command(client, server)
            except (OSError, EOFError, _ClientClosed):  # ggml has closed its connection
                pass
            finally:
                if server is not None:
                    server.close()

    def _pass_command(self, client: socket.socket, server: socket.socket | None) -> None:
        head = _read(client, 9)
        command, n = struct.unpack("<BQ", head)
        body = b""
        self._to_server(server, head)
        while n > 0:
            body = _read(client, min(n, _CHUNK))
            n -= len(body)
            self._to_server(server, body)
        if command not in _ANSWERS:
            return
        expected = _ANSWERS[command] or (len(self.hello) if command == _HELLO else struct.unpack("<Q", body[-8:])[0])
        done = -8  # bytes of the answer that ggml has got, its length included
        if server is not None and not self.lost:
            try:
                # ggml greets with each connection, and the server may serve another one by then: of ours too, when it
                # was given by two names.
                until = time.monotonic() + ANSWER_SECONDS if command == _HELLO else None
                length = _read(server, 8, until)
                if length != struct.pack("<Q", expected):
                    n = struct.unpack("<Q", length)[0]
                    raise EOFError(f"it answers command {command} with {n} bytes, not {expected}")
                _to_client(client, length)
                done = 0
                while done < expected:
                    part = _read(server, min(expected - done, _CHUNK))
                    _to_client(client, part)
                    done += len(part)
                return
            except (OSError, EOFError) as error:
                self._lose(error)
        # In the place of the server, with values that ggml can go on with: no assertion looks at a null or a zero.
        if done < 0:
            _to_client(client, struct.pack("<Q", expected))
            done = 0
        instead = {_ALIGNMENT: 4096, _MAX_SIZE: 1 << 62, _BASE: 4096}.get(command)
        if instead is not None:
            _to_client(client, struct.pack("<Q", instead)[done:])
        elif command == _HELLO:
            _to_client(client, self.hello[done:])
        else:
            while done < expected:
                part = bytes(min(expected - done, _CHUNK))
                _to_client(client, part)
                done += len(part)

    def _to_server(self, server: socket.socket | None, data: bytes) -> None:
        if server is None or self.lost:
            return
        try:
            server.sendall(data)
        except OSError as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        if not self.lost:
            self.lost = f"the RPC server {self.endpoint} is gone: {_reason(error)}"


class _ClientClosed(Exception):
    pass


def _to_client(client: socket.socket, data: bytes) -> None:
    """Send; an error here says nothing about the server."""
    try:
        client.sendall(data)
    except OSError as error:
        raise _ClientClosed from error


def _read(source: socket.socket, n: int, until: float | None = None) -> bytes:
    """Exactly n bytes; EOFError when the connection ends before, TimeoutError when they have not come `until` then."""
    data = bytearray(n)
    view: Any = memoryview(data)
    while view:
        if until is not None:
            source.settimeout(max(until - time.monotonic(), 1e-3))
        try:
            got = source.recv_into(view)
        except TimeoutError as error:
            if until is None:  # the system gave up: a machine that vanished
                raise
            raise TimeoutError(_BUSY) from error
        if not got:
            raise EOFError("it closed the connection")
        view = view[got:]
    if until is not None:
        source.settimeout(None)
    return bytes(data)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
