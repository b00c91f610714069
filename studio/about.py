"""What there is: versions, devices, and what a checkpoint holds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence


def versions() -> str:
    """One line: ours, ggml's, Python's, the machine."""
    import platform

    from pyggml import __version__
    from pyggml.lib import ffi, lib

    ggml = ffi.string(lib.ggml_version()).decode()
    return f"pyggml {__version__}, ggml {ggml}, Python {platform.python_version()}, {platform.machine()}"


def show_files(paths: Sequence[str], as_json: bool) -> int:
    """Print what each checkpoint is; a file that is none stops at its error."""
    from loader.describe import describe_path

    if as_json:
        print(json.dumps([describe_path(path).to_dict() for path in paths], indent=1, ensure_ascii=False))
        return 0
    for i, path in enumerate(paths):
        print("\n" * (i > 0) + str(describe_path(path)))
    return 0


def run_rpc_server(args: argparse.Namespace) -> int:
    """Become ggml's rpc-server. ValueError for what it would take badly, and when this build has none."""
    import os
    import socket
    import subprocess
    import sys

    from pyggml.lib import FOLDER

    program = FOLDER / ("rpc-server.exe" if sys.platform == "win32" else "rpc-server")
    if not program.exists():
        raise ValueError("this build has no rpc-server: build it with `python build.py --rpc`")
    if not 1 <= args.port <= 65535:
        raise ValueError(f"--port must be in 1..65535, not {args.port}")
    if args.threads is not None and not 1 <= args.threads <= 512:
        raise ValueError(f"--threads must be in 1..512, not {args.threads}")
    try:
        # the program itself ends without a word when it cannot listen
        family, _, _, _, address = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except OSError as error:
        why = str(error.strerror).partition(" (while")[0]
        raise ValueError(f"cannot listen at {args.host}:{args.port}: {why}") from None
    given = {"-H": args.host, "-p": args.port, "-t": args.threads, "-d": args.device}
    command = ["rpc-server", *(str(x) for pair in given.items() if pair[1] is not None for x in pair)]
    command += ["-c"] if args.cache else []
    if sys.platform == "win32":
        return subprocess.run([program, *command[1:]], check=False).returncode
    sys.stdout.flush()
    os.execv(program, command)


def list_devices(as_json: bool) -> int:
    """Print name, description and memory of each device; name and description as sd-cli's --list-devices."""
    from pyggml import devices

    rows = []
    for device in devices():
        free, total = device.memory
        rows.append(
            {
                "name": device.name, "description": device.description, "type": device.type.name.lower(),
                "memory_free": free, "memory_total": total, "maps_files": device.maps_host_memory,
                "buffer_types": [device.buffer_type.name, *(b.name for b in device.extra_buffer_types)],
            }
        )  # fmt: skip
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        for row in rows:
            print(f"{row['name']}\t{row['description']}")
    return 0
