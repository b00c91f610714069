"""The command `pyggml`: generate, plan, compare-backends, convert, inspect, devices. Options are spelled as in sd-cli.

Exit codes: 0; 2 for bad input or a bad file, with one line `error: ...` on stderr; 1 when we fail; 130 after Ctrl-C.
Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(BAD_INPUT)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; SystemExit with code 2 and one line for options that are not ours."""
    parser = _Parser(
        prog="pyggml", description="Draw pictures with Z-Image on ordinary machines.", allow_abbrev=False
    )
    parser.add_argument("--version", action="store_true", help="print versions and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    _add_generate(commands.add_parser("generate", help="draw a picture", description=_GENERATE, allow_abbrev=False))
    plan = commands.add_parser("plan", help="say what `generate` would load, and whether it fits into memory",
                               description=_PLAN, allow_abbrev=False)  # fmt: skip
    _add_generate(plan)
    plan.add_argument("--json", action="store_true", help="as JSON")
    plan.set_defaults(dry_run=True)
    _add_compare(
        commands.add_parser("compare-backends", help="find the operation that two devices disagree about",
                            description=_COMPARE, allow_abbrev=False)
    )  # fmt: skip
    _add_convert(
        commands.add_parser("convert", help="write a model in other types", description=_CONVERT, allow_abbrev=False)
    )
    inspect = commands.add_parser("inspect", help="say what checkpoints are, without loading them", allow_abbrev=False)
    inspect.add_argument("files", nargs="+", metavar="FILE", help="a gguf or safetensors file, an index, or a folder")
    inspect.add_argument("--json", action="store_true", help="as a JSON list")
    inspect.add_argument("-v", "--verbose", action="store_true", help="a traceback when something fails")
    server = commands.add_parser("rpc-server", help="let others compute here (docs/devices.md)", allow_abbrev=False)
    server.add_argument("-H", "--host", default="127.0.0.1", metavar="ADDRESS", help="to listen at (127.0.0.1)")
    server.add_argument("-p", "--port", type=int, default=50052, metavar="N", help="50052")
    server.add_argument("-t", "--threads", type=int, metavar="N", help="of the processor, half of all unless given")
    server.add_argument("-d", "--device", metavar="NAME,...", help="what computes: the GPUs, else the processor")
    server.add_argument("-c", "--cache", action="store_true", help="keep weights on disk for the next time")
    devices = commands.add_parser("devices", help="list what this build can compute on", allow_abbrev=False)
    devices.add_argument("--json", action="store_true", help="as a JSON list")
    devices.add_argument("-v", "--verbose", action="store_true", help="a traceback when something fails")
    return parser


_GENERATE = """Draw a picture. Without model options the small demo model is used, which knows one or two shapes on a
background, such as "a large red circle on a blue background"."""


_PLAN = """Say what `generate` with the same options would map, copy and convert, what memory each phase takes, and
whether it fits into what is free. Reads headers only; `generate --dry-run` is the same."""


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="what to draw")
    add("-p", "--prompt", dest="prompt_option", metavar="PROMPT", help="the same, as sd-cli spells it")
    add("-o", "--output", default="output.png", metavar="FILE", help="PNG to write; %%d is the number (output.png)")
    models = parser.add_argument_group("models")
    models.add_argument("--diffusion-model", metavar="FILE",
                        help="Z-Image or Qwen-Image transformer: gguf, safetensors or a folder")  # fmt: skip
    models.add_argument("--llm", "--qwen2vl", metavar="FILE", help="text encoder: Qwen3, or Qwen2.5-VL for Qwen-Image")
    models.add_argument("--vae", metavar="FILE", help="autoencoder: Flux's, or Qwen-Image's")
    models.add_argument("--tae", "--taesd", metavar="FILE",
                        help="tiny autoencoder: fast and rough, in the place of --vae (docs/models.md)")  # fmt: skip
    models.add_argument("--taesd-preview-only", action="store_true", help="--tae for --preview tae, pictures by --vae")
    models.add_argument("--llm-vision", "--llm_vision", "--qwen2vl_vision", metavar="FILE",
                        help="vision tower (mmproj) for editing, where the text encoder's file has none")  # fmt: skip
    models.add_argument("--edit-model", choices=("edit", "2509", "2511"),
                        help="which Qwen-Image-Edit it is: 2511 if its file is marked so, else 2509")  # fmt: skip
    models.add_argument("--model-args", metavar="KEY=VALUE", help="sd-cli's: qwen_image_zero_cond_t=true")
    models.add_argument("--grid-positions", action="store_true",
                        help="place pictures' tokens by row and column, as the text encoder was trained")  # fmt: skip
    mode = models.add_mutually_exclusive_group()
    set_mode = partial(mode.add_argument, dest="mmap", action="store_const", default="auto")
    set_mode("--mmap", const="map", help="leave weights in the mapped files (default, but on network file systems)")
    set_mode("--mmap=io", const="io", help="map files to read them, and copy")
    set_mode("--no-mmap", const="off", help="read weights into memory of our own")
    models.add_argument("--mlock", action="store_true", help="lock weights in memory")
    models.add_argument("--mmap-flags", metavar="A,B,...", help="advice to the system about the files: sequential, "
                        "populate, willneed, dontneed (else of PYGGML_MMAP_FLAGS or SD_MMAP_FLAGS)")  # fmt: skip
    models.add_argument("--repack", choices=("auto", "on", "off"), default="auto", help="copy weights into the layout "
                        "of another kernel: where that was measured to be faster (default), always, never")  # fmt: skip
    models.add_argument("--reclaim-mmap-source", action=argparse.BooleanOptionalAction, default=True,
                        help="give back a mapping's pages that were copied from (default)")  # fmt: skip
    models.add_argument("--max-ram", type=_size, metavar="SIZE",
                        help="memory to stay within, such as 6G or 800M, beside what the system allows")  # fmt: skip
    models.add_argument("--compat", choices=("diffusers", "sd.cpp"), default="diffusers",
                        help="whose rules to follow where the two differ (docs/parity.md)")  # fmt: skip
    lora = parser.add_argument_group("LoRA", "<lora:NAME:WEIGHT> in the prompt, or:")
    lora.add_argument("--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="may be repeated")
    lora.add_argument("--lora-model-dir", default=".", metavar="DIR", help="where the names of prompts are (.)")
    lora.add_argument("--lora-apply-mode", choices=("auto", "at_runtime", "immediately"), default="auto",
                      help="beside the weights, or merged into what it changes (docs/lora.md)")  # fmt: skip
    lora.add_argument("--lightning", type=_few_steps, metavar="N|off|auto",
                      help="steps, guidance and schedule of a Lightning model of N steps; auto: as a LoRA is called")
    picture = parser.add_argument_group("picture")
    picture.add_argument("-n", "--negative-prompt", default="", metavar="TEXT", help="what to keep out (cfg-scale > 1)")
    picture.add_argument("-W", "--width", type=int, metavar="PX", help="a multiple of 8; the model's own size")
    picture.add_argument("-H", "--height", type=int, metavar="PX", help="a multiple of 8")
    picture.add_argument("-s", "--seed", type=int, default=42, metavar="N", help="42; below 0: a random one")
    picture.add_argument("-b", "--batch-count", type=int, default=1, metavar="N", help="pictures, with seeds N, N+1...")
    picture.add_argument("-i", "--init-img", metavar="FILE", help="start from this picture")
    picture.add_argument("--mask", metavar="FILE", help="of --init-img: white is drawn anew, the rest stays")
    picture.add_argument("-r", "--ref-image", action="append", default=[], metavar="FILE",
                         help="a picture to edit, or to take apart into layers; may be repeated")  # fmt: skip
    picture.add_argument("--layers", "--qwen-image-layers", type=int, metavar="N", help="how many layers (4)")
    picture.add_argument("--strength", type=float, metavar="X", help="how much of it to forget, 0..1 (0.75)")
    steps = parser.add_argument_group("sampling")
    steps.add_argument("--steps", type=int, metavar="N", help="8 (Z-Image), 50 (Qwen-Image)")
    steps.add_argument("--cfg-scale", type=float, metavar="X", help="guidance, 1 = off; 1 (Z-Image), 4 (Qwen-Image)")
    steps.add_argument("--guidance", metavar="NAME",
                       help="apg or cfg-zero instead of the model's own (docs/sampling.md)")  # fmt: skip
    steps.add_argument("--extra-sample-args", metavar="KEY=VALUE,...", help="apg_eta, apg_momentum, "
                       "apg_norm_threshold, apg_norm_threshold_smoothing, cfg_zero_steps")  # fmt: skip
    steps.add_argument("--sampling-method", default="euler", metavar="NAME", help="euler; an unknown name lists all")
    steps.add_argument("--scheduler", metavar="NAME", help="the noise levels' schedule; an unknown name lists all")
    steps.add_argument("--sigmas", metavar="A,B,...,0", help="noise levels instead of a schedule")
    steps.add_argument("--flow-shift", type=float, metavar="X",
                       help="3 (Z-Image-Turbo), 6 for Z-Image; by the size of the picture (Qwen-Image)")  # fmt: skip
    steps.add_argument("--eta", type=float, metavar="X", help="noise put back by ancestral methods")
    steps.add_argument("--rng", choices=("cpu", "cuda"), help="cpu draws noise as torch on CPU, cuda as on CUDA")
    steps.add_argument("--cache-mode", choices=("easycache", "dbcache", "taylorseer", "cache-dit"),
                       help="skip evaluations that change little (docs/sampling.md)")  # fmt: skip
    steps.add_argument("--cache-option", metavar="KEY=VALUE,...",
                       help="such as threshold=0.1; each mode's are in docs/sampling.md")  # fmt: skip
    steps.add_argument("--scm-mask", metavar="1,0,...", help="for each step: 1 computes it, 0 leaves it to the cache")
    steps.add_argument("--scm-policy", choices=("dynamic", "static"), default="dynamic",
                       help="static: the steps of a 0 are all skipped that can be")  # fmt: skip
    where = parser.add_argument_group("devices (docs/devices.md)")
    where.add_argument("--rpc-servers", metavar="HOST:PORT,...",
                       help="machines that run rpc-server; without --backend the model is split over them")  # fmt: skip
    where.add_argument("--backend", metavar="NAME|MODULE=NAME,...",
                       help="what computes te, diffusion and vae, a name of --list-devices")  # fmt: skip
    where.add_argument("--params-backend", metavar="NAME|MODULE=NAME,...",
                       help="where weights rest: cpu, disk, or (default) where they are used")  # fmt: skip
    where.add_argument("--max-vram", type=_size, metavar="SIZE", help="memory of a device to stay within, such as 4G: "
                       "weights rest on the cpu, and come as they are needed")  # fmt: skip
    where.add_argument("--offload-to-cpu", action="store_true", help="--params-backend cpu")
    where.add_argument("--clip-on-cpu", action="store_true", help="te=cpu")
    where.add_argument("--vae-on-cpu", action="store_true", help="vae=cpu")
    where.add_argument("--list-devices", action="store_true", help="print names and descriptions, and exit")
    running = parser.add_argument_group("running")
    running.add_argument("--preview", choices=("none", "proj", "tae", "vae"), default="none",
                         help="write what each step takes the picture to be: its colours, or decoded")
    running.add_argument("--preview-path", default="./preview.png", metavar="FILE", help="./preview.png")
    running.add_argument("--preview-interval", type=int, default=1, metavar="N", help="after every N steps (1)")
    running.add_argument("--cfg-batch", choices=("auto", "on", "off"), default="auto",
                         help="both predictions of guidance in one graph: where weights are read in each step")
    running.add_argument("--flash-attention", "--fa", "--diffusion-fa", action=argparse.BooleanOptionalAction,
                         default=True, help="attention as one operation, where there is one (on): --no-fa for none")
    running.add_argument("--vae-tiling", action="store_true", help="decode in tiles, as is done when memory is short")
    running.add_argument("--vae-tile-size", metavar="XxY", help="of a tile, in latent pixels, 8 to a side (32x32)")
    running.add_argument("--vae-tile-overlap", type=float, metavar="X", help="sd-cli's; our tiles need none")
    running.add_argument("-t", "--threads", type=int, metavar="N", help="physical cores unless given")
    running.add_argument("--dry-run", action="store_true", help="say what would be loaded and whether it fits, and end")
    running.add_argument("--report", metavar="FILE", help="write seconds, weights and memory as JSON")
    running.add_argument("--find-bad-op", action="store_true", help="name the first operation that is not finite")
    running.add_argument("--disable-image-metadata", action="store_true", help="no `parameters` text in the PNG")
    running.add_argument("-v", "--verbose", action="store_true", help="say what is loaded and done")


_COMPARE = """Draw a picture in one step, and compute each operation on a second device too, from the same inputs. Says
for each part of the model how many operations were compared, and the first whose results differ by more than the
tolerance; the exit code is then 1. Options are those of `generate`; nothing is written."""


def _add_compare(parser: argparse.ArgumentParser) -> None:
    _add_generate(parser)
    parser.add_argument("--with", dest="compare_with", default="cpu", metavar="NAME", help="the second device (cpu)")
    parser.add_argument("--tolerance", type=float, default=0.01, metavar="X",
                        help="of a result: length of the difference by its length (0.01)")  # fmt: skip


def _size(text: str) -> int:
    """Bytes of "6G", "1.5g", "800M": powers of 1024, as container tools count."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    number, unit = (text[:-1], units.get(text[-1:].upper())) if text[-1:].isalpha() else (text, 1)
    try:
        n_bytes = int(float(number) * (unit or 0))
    except (ValueError, OverflowError):
        n_bytes = 0
    if n_bytes < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 6G or 800M")
    return n_bytes


def _few_steps(text: str) -> int | None:
    """None of "auto", 0 of "off", else a number of steps."""
    if text in ("auto", "off"):
        return None if text == "auto" else 0
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, off or a number of steps in 1..100")
    return int(text)


_CONVERT = """Write a model as one gguf or safetensors file, in other types if asked for. Names and metadata stay.
Vectors and sensitive tensors keep their type, as in sd-cli (docs/convert.md)."""


def _add_convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", nargs="?", metavar="MODEL", help="a gguf or safetensors file, an index, or a folder")
    add("-m", "--model", metavar="MODEL", help="the same, as sd-cli spells it")
    add("-o", "--output", default="output.gguf", metavar="FILE", help="to write: .gguf or .safetensors (output.gguf)")
    add("--type", metavar="TYPE", help="f32, f16, bf16, q8_0, q4_K, ...; an unknown one lists all (as in the file)")
    add("--tensor-type-rules", metavar="RULES", help="regex=type,regex=type; the first that fits a name counts")
    add("--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="merge this in; may be repeated")
    add("--imat-in", metavar="FILE", help="importance matrix, gguf or the older form")
    add("-t", "--threads", type=int, metavar="N", help="all processors unless given")
    add("-v", "--verbose", action="store_true", help="a traceback when something fails")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.version:
        from .about import versions

        print(versions())
        return 0
    if args.command is None:
        parser.print_help()
        return 0
    log = _log_to_stderr() if getattr(args, "verbose", False) else None
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names may be no UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Who read our output has gone; the interpreter's own flush at exit must not say so again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if getattr(args, "verbose", False):
            import traceback

            traceback.print_exc()
        code, text = _explain(error)
        print(f"error: {text}", file=sys.stderr)
        return code
    finally:
        if log is not None:  # who calls `main` more than once may have another stderr by then
            log.close()


def _run(args: argparse.Namespace) -> int:
    if args.command == "rpc-server":
        from .about import run_rpc_server

        return run_rpc_server(args)
    draws = args.command in ("generate", "plan", "compare-backends")
    if draws and args.list_devices:
        from .about import list_devices
        from .generate import add_servers

        add_servers(args)
        return list_devices(as_json=False)
    if draws:
        import faulthandler

        if sys.__stderr__ is not None:  # should ggml end the process, the line that called it is printed
            faulthandler.enable(sys.__stderr__)
        from .generate import generate

        return generate(args)
    if args.command == "convert":
        from .convert import convert

        return convert(args)
    from .about import list_devices, show_files

    return show_files(args.files, args.json) if args.command == "inspect" else list_devices(args.json)


def _explain(error: Exception) -> tuple[int, str]:
    """(exit code, one line) for an exception."""
    if isinstance(error, ImportError):  # not built, or not installed
        return FAILED, " ".join(str(error).split())
    from loader.errors import LoadError, printable
    from pyggml.errors import Cancelled, GGMLError

    text = printable(" ".join(str(error).split())) or type(error).__name__
    if isinstance(error, Cancelled):
        return INTERRUPTED, text
    if isinstance(error, OSError) and error.filename is not None:
        return BAD_INPUT, printable(f"{error.filename}: {error.strerror}")
    if isinstance(error, OSError) and error.strerror:  # a full disk, for one
        return FAILED, error.strerror
    if isinstance(error, LoadError) or (isinstance(error, ValueError) and not isinstance(error, GGMLError)):
        return BAD_INPUT, text
    if isinstance(error, GGMLError):
        return FAILED, text
    if isinstance(error, MemoryError):  # numpy's says how much it wanted
        return FAILED, f"out of memory: {text}"
    return FAILED, f"{type(error).__name__}: {text} (this is a fault of pyggml; -v shows where)"


def _log_to_stderr() -> contextlib.ExitStack:
    """Lines in the form that stable-diffusion.cpp prints, until what is returned is closed."""
    import logging

    logging.addLevelName(logging.WARNING, "WARN")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[%(levelname)-5s] %(filename)s:%(lineno)-4d - %(message)s"))
    root = logging.getLogger("pyggml")
    root.addHandler(handler)
    level = root.level
    root.setLevel(logging.DEBUG)
    before = contextlib.ExitStack()
    before.callback(root.removeHandler, handler)
    before.callback(root.setLevel, level)
    return before


if __name__ == "__main__":
    sys.exit(main())
