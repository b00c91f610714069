"""Feed broken files to the loader: no crash, no hang, no allocation beyond what the file holds.

    python tests/hostile/fuzz.py [--seconds 600] [--seed N] [--keep DIR]

Files are made with the structure of their format and one to six things wrong with it; some are damaged again as bytes.
Each must load, or be refused with a LoadError: the same verdict mapped and read, the same bytes. Two processes work;
one that dies or uses 10 seconds of CPU for one file is a finding, and the file is kept. A case is found again by its
seed and number. tests/test_fuzz.py runs some seconds of it.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from loader import LoadError, Param, describe, load_params, open_checkpoint
from loader.convert import native_type
from loader.dtypes import GGML_TYPES, SAFETENSORS_BITS
from loader.gguf import GGUFArray
from loader.options import LoadOptions, Mode
from loader.save import save_checkpoint
from pyggml import Backend, Type

CPU_SECONDS = 10
MODES: tuple[Mode, ...] = ("map", "io", "off")
# Objects of a header take some times its bytes; what a claim costs that nothing stands behind is far more.
MEMORY = 1 << 20, 60  # bytes in any case, and for each byte of the file
TOP = (1 << 64) - 1
NUMBERS = [
    *range(14), 31, 32, 33, 64, 255, 256, 1 << 15, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 33,
    1 << 40, 1 << 60, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, TOP,
]  # fmt: skip
NAMES = [
    b"a.weight", b"a.weight", b"a.scale_weight", b"a.weight_scale", b"a.weight_scale_inv", b"a.comfy_quant",
    b"a.input_scale", b"scaled_fp8", b"blk.0.attn_q.weight", b"lora.a.lora_A.weight", b"t" * 63, b"t" * 64,
    b"gr\xc3\xb6\xc3\x9fe", b"x/../y", b"cap_pad_token",
]  # fmt: skip
ODD_NAMES = [b"t" * 5000, b"", b"\0", b"a\0b", b"\xff", b"\x1b[2J", b"__metadata__"]
KEYS = [b"general.architecture", b"tokenizer.ggml.tokens", b"tokenizer.chat_template", b"k", b"split.no"]
ODD_KEYS = [b"general.alignment", b"split.count", b"split.tensors.count", b"pyggml.config", b"k" * 70_000, *ODD_NAMES]
JSONS = [
    "null", "true", "-1", "0", "1e3", "1.5", "NaN", "Infinity", '"x"', "[]", "{}", "[[]]", "9" * 30, "9" * 5000,
    '"\\ud800"', '{"a": 1, "a": 2}', "[" * 2000, "1" + "0" * 19, '"F32"', "[0, 16]", "[16, 0]", "[1, 1, 1, 1, 1]",
]  # fmt: skip


class Chance(random.Random):
    """Random choices, and how often something is wrong: in a third of all files nothing, unless bytes are damaged."""

    rate = 0.0

    def odd(self, times: float = 1) -> bool:
        return self.random() < self.rate * times


# files of the gguf format


def number(random: Chance, honest: int) -> int:
    """Mostly what is right, sometimes near it, sometimes far off."""
    if not random.odd():
        return honest
    return random.choice(NUMBERS) if random.random() < 0.5 else max(0, honest + random.choice([-32, -8, -1, 1, 8, 32]))


def text(random: Chance, value: bytes) -> bytes:
    return struct.pack("<Q", number(random, len(value)) & TOP) + value


def gguf_value(random: Chance, kind: int, depth: int = 0) -> bytes:
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 10: 8, 11: 8, 12: 8}
    if kind == 7:
        return bytes([random.choice([2, 255]) if random.odd() else random.randrange(2)])
    if kind == 8:
        return text(random, b"\xff\xfe" if random.odd() else random.choice([b"x", b"", b"{}", b"lumina2", bytes(300)]))
    if kind == 9:
        element = random.choice([9, 13, 1000]) if random.odd() else random.choice([*sizes, 7, 8, 8])
        n = random.choice([0, 1, 3, 300])
        values = b"".join(gguf_value(random, element, depth + 1) for _ in range(n)) if depth < 3 else b""
        return struct.pack("<IQ", element, number(random, n)) + values
    return random.randbytes(sizes.get(kind, 4)) if random.random() < 0.8 else bytes(sizes.get(kind, 4))


def gguf_file(random: Chance) -> bytes:
    """A header of some keys and tensors, then data."""
    alignment = random.choice([0, 3, 4, 1 << 31]) if random.odd() else random.choice([8, 32, 32, 32, 64])
    pairs = []
    if alignment != 32:
        pairs.append(text(random, ODD_KEYS[0]) + struct.pack("<II", 5 if random.odd() else 4, alignment))
    for i in range(random.randrange(5)):
        kind = number(random, random.choice([0, 4, 6, 7, 8, 9, 9, 10, 12])) & 0xFFFFFFFF
        key = random.choice(ODD_KEYS) if random.odd() else b"%b%d" % (random.choice(KEYS), i)
        pairs.append(text(random, key) + struct.pack("<I", kind) + gguf_value(random, kind))
    infos, at = [], 0
    aligned = alignment if 0 < alignment < 1 << 16 else 32
    for i in range(random.randrange(5)):
        kind = random.choice([*GGML_TYPES, 0, 1, 8, 12, 30])
        _, block, size = GGML_TYPES[kind]
        ne = [block * random.choice([1, 2]), *(random.choice([1, 1, 2, 3]) for _ in range(random.randrange(3)))]
        n_bytes = size * int(np.prod(ne)) // block
        ne = [number(random, d) for d in ne]
        name = random.choice([*ODD_NAMES, *NAMES]) if random.odd() else b"t%d" % i
        rank = number(random, len(ne)) & 0xFFFFFFFF
        shown = struct.pack(f"<{len(ne)}Q", *(d & TOP for d in ne))
        place = struct.pack("<IQ", number(random, kind) & 0xFFFFFFFF, number(random, at) & TOP)
        infos.append(text(random, name) + struct.pack("<I", rank) + shown + place)
        at += -(-n_bytes // aligned) * aligned
    shuffle_sometimes(random, pairs, infos)
    counts = struct.pack("<QQ", number(random, len(infos)) & TOP, number(random, len(pairs)) & TOP)
    head = b"GGUF" + struct.pack("<I", number(random, 3) & 0xFFFFFFFF) + counts + b"".join(pairs + infos)
    head += bytes(-len(head) % aligned)
    return head + random.randbytes(random.randrange(at + 64) if random.odd() else at)


def shuffle_sometimes(random: Chance, *lists: list[bytes]) -> None:
    for items in lists:
        if not items or not random.odd(3):
            continue
        match random.randrange(3):
            case 0:
                random.shuffle(items)
            case 1:
                items.append(random.choice(items))
            case _:
                items.pop()


# files of the safetensors format


def safetensors_file(random: Chance) -> bytes:
    """JSON of some tensors, its values replaced here and there by other JSON; then data."""
    entries, at = [], 0
    for i in range(random.randrange(6)):
        dtype = random.choice([*SAFETENSORS_BITS, "F32", "F16", "BF16", "F8_E4M3", "F8_E4M3"])
        shape = [random.choice([1, 2, 4, 8]) for _ in range(random.randrange(4))]
        n_bytes = int(np.prod(shape, dtype=int)) * SAFETENSORS_BITS[dtype] // 8
        name = random.choice(ODD_NAMES if random.odd() else NAMES) if random.random() < 0.5 else b"t%d" % i
        fields = {
            "dtype": json.dumps(dtype),
            "shape": "[" + ",".join(str(number(random, d)) for d in shape) + "]",
            "data_offsets": f"[{number(random, at)},{number(random, at + n_bytes)}]",
        }
        at += n_bytes
        if random.odd():
            fields[random.choice([*fields, "more"])] = random.choice(JSONS)
        body = ",".join(f'"{key}":{value}' for key, value in fields.items())
        value = random.choice(JSONS) if random.odd() else "{" + body + "}"
        shown = json.dumps(name.decode(errors="surrogateescape")).encode()
        if random.odd() or all(not entry.startswith(shown + b":") for entry in entries):
            entries.append(shown + b":" + value.encode())
        else:
            at -= n_bytes
    if random.random() < 0.3:
        tables = ['{"format":"pt"}', '{"pyggml.config":"{}"}']
        if random.odd(3):
            tables = ['{"pyggml.config":"["}', random.choice(JSONS)]
        layers = json.dumps({"layers": {"a": {"format": random.choice(["float8_e4m3fn", "int8_tensorwise", 3])}}})
        odd = random.choice(["{", "[]", '{"layers": 1}'])
        tables.append(json.dumps({"_quantization_metadata": odd if random.odd(3) else layers}))
        entries.append(b'"__metadata__":' + random.choice(tables).encode())
    shuffle_sometimes(random, entries)
    head = b"{" + b",".join(entries) + b"}" + (random.choice([b"\n", b"\0", b"x"]) if random.odd() else b"")
    head += b" " * (-len(head) % 8)
    data = random.randbytes(at)
    if random.random() < 0.3 and b"comfy_quant" in head:
        data = b'{"format": "float8_e4m3fn"}'.ljust(at)[:at]
    return struct.pack("<Q", number(random, len(head)) & TOP) + head + data


def damaged(random: Chance, data: bytes) -> bytes:
    """Cut, lengthened, or with a few bytes changed; mostly as it is."""
    out = bytearray(data)
    for _ in range(random.choice([0, 0, 0, 0, 1, 3])):
        i = random.randrange(len(out) + 1)
        match random.randrange(6):
            case 0:
                del out[i:]
            case 1:
                out += random.randbytes(random.choice([1, 8, 40]))
            case 2:
                out[i : i + 8] = struct.pack("<Q", random.choice(NUMBERS))
            case 3:
                out[i : i + 4] = struct.pack("<I", random.choice(NUMBERS) & 0xFFFFFFFF)
            case 4:
                out[i : i + random.randrange(5)] = random.choice(JSONS).encode()
            case _:
                del out[i : i + random.choice([1, 8])]
    return bytes(out)


def make(seed: int, i: int) -> tuple[str, bytes]:
    """Case `i`: (suffix, bytes)."""
    rng = Chance(f"{seed} {i}")
    rng.rate = rng.choice([0, 0.01, 0.03, 0.1])
    if i % 2:
        return "gguf", damaged(rng, gguf_file(rng))
    return "safetensors", damaged(rng, safetensors_file(rng))


# what a file must survive


class Finding(Exception):
    """Something that no file may do."""


def verdict(path: Path, backend: Backend, mode: Mode) -> str | dict[str, bytes]:
    """The refusal, or the bytes of every tensor that ggml can have."""
    options = LoadOptions(mode)
    try:
        with open_checkpoint(path) as checkpoint:
            params = {name: Param(fold(info.ne)) for name, info in checkpoint.items()}
            with load_params(params, checkpoint, backend=backend, component="fuzz", options=options) as weights:
                # a tensor without elements may have no memory
                return {name: weights[name].raw() if info.n_bytes else b"" for name, info in checkpoint.items()}
    except LoadError as e:
        return f"{e.kind} {e}"


def fold(ne: tuple[int, ...]) -> tuple[int, ...]:
    """Four dimensions at most, as the loader folds them."""
    last = 1
    for d in ne[3:]:
        last *= d
    return ne if len(ne) <= 4 else (*ne[:3], last)


def look(path: Path, *, describes: bool = True) -> str:
    """Everything that reading headers and data can come upon; returns the refusal's kind, or "accepted"."""
    refusal = "accepted"
    for raw in (True, False):
        try:
            with open_checkpoint(path, raw=raw) as checkpoint:
                if describes:
                    str(describe(checkpoint))
                for name, info in checkpoint.items():
                    if not 0 <= info.offset <= info.offset + info.n_bytes:
                        raise Finding(f"tensor {name!r} lies nowhere")
                    if info.n_bytes and info.offset + info.n_bytes > info.file.n_bytes:
                        raise Finding(f"tensor {name!r} ends behind the file")
                    try:
                        checkpoint.read(name)
                        native_type(info)
                    except LoadError:
                        if info.scale is None:
                            raise Finding(f"tensor {name!r} was accepted and cannot be read") from None
                for value in checkpoint.metadata.values():
                    if isinstance(value, GGUFArray):
                        try:
                            value.tolist()
                        except LoadError as e:
                            if e.kind not in ("BadText", "BadValue"):
                                raise
        except LoadError as e:  # noqa: PERF203
            if not str(e).isprintable():
                raise Finding(f"the message is more than a line: {e!r}") from e
            refusal = e.kind
    return refusal


def try_file(path: Path, backend: Backend, *, thorough: bool = True) -> str:
    """Read the file in all ways, and when `thorough` describe and convert it. Returns the verdict; raises what is a
    finding.
    """
    size = path.stat().st_size
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    result = look(path, describes=thorough)
    peak = tracemalloc.get_traced_memory()[1] - before
    if peak > MEMORY[0] + MEMORY[1] * size:
        raise Finding(f"{peak} bytes were allocated for a file of {size}")
    mapped, by_io, read = (verdict(path, backend, mode) for mode in MODES)
    if not mapped == by_io == read:
        raise Finding(f"mapped: {str(mapped)[:200]}; mapped to read: {str(by_io)[:200]}; read: {str(read)[:200]}")
    if thorough:
        for suffix, kind in ((".gguf", Type.Q8_0), (".safetensors", Type.F16)):
            target = path.with_name("saved" + suffix)
            try:
                with open_checkpoint(path) as checkpoint:
                    save_checkpoint(checkpoint, target, type=kind, n_threads=1)
                open_checkpoint(target).close()
            except LoadError:
                pass
    return result


def fuzz(
    folder: Path, seed: int, first: int, step: int, seconds: float, n_max: int | None = None, *, limit: bool = False
) -> tuple[int, Counter[str]]:
    """Try cases first, first + step, ... Returns their number and the verdicts; an exception is a finding.

    `limit`: a file that takes too much CPU time ends the process.
    """
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds
    i = first
    tracemalloc.start()
    try:
        with Backend.cpu(1) as backend:
            while time.monotonic() < end and (n_max is None or i < first + step * n_max):
                suffix, data = make(seed, i)
                path = folder / f"case.{suffix}"
                path.write_bytes(data)
                (folder / "number").write_text(str(i))
                if limit and hasattr(signal, "setitimer"):
                    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
                counts[f"{suffix} {try_file(path, backend, thorough=i // 2 % 16 == 0)}"] += 1
                i += step
    finally:
        tracemalloc.stop()
        if limit and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, 0)
    return (i - first) // step, counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="where files that are findings go")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:  # SIGPROF ends it when a file takes too long
        n, counts = fuzz(args.folder, args.seed, args.first, args.processes, args.seconds, limit=True)
        print(json.dumps([n, counts]))
        return 0
    print(f"seed {args.seed}", flush=True)
    findings, n, counts = 0, 0, Counter[str]()
    end = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as folder:
        first = list(range(args.processes))
        running: dict[int, subprocess.Popen[str]] = {}
        while running or time.monotonic() < end - 1:
            for k in range(args.processes):
                left = end - time.monotonic()
                if k not in running and left > 1:
                    place = Path(folder) / str(k)
                    place.mkdir(exist_ok=True)
                    command = [sys.executable, __file__, "--worker", str(k), "--folder", str(place), "--first",
                               str(first[k]), "--seed", str(args.seed), "--seconds", str(left), "--processes",
                               str(args.processes)]  # fmt: skip
                    running[k] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            time.sleep(0.2)
            for k, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[k]
                out, err = process.communicate()
                if process.returncode == 0:
                    done, found = json.loads(out)
                    n += done
                    counts.update(found)
                    continue
                i = int((Path(folder) / str(k) / "number").read_text())
                args.keep.mkdir(exist_ok=True)
                suffix = make(args.seed, i)[0]
                kept = args.keep / f"{args.seed}-{i}.{suffix}"
                shutil.copy(Path(folder) / str(k) / f"case.{suffix}", kept)
                findings += 1
                n += (i - first[k]) // args.processes
                first[k] = i + args.processes
                last = err.strip().splitlines()[-1:] or [""]
                print(f"FINDING {kept}: exit {process.returncode} {last[0]}", flush=True)
    for name, count in sorted(counts.items()):
        print(f"{count:9} {name}")
    print(f"{n} files, {findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
