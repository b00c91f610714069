"""The one seam to the C library: every other module says `from .lib import ffi, lib`.

`lib.ggml_x` is ggml's function; `lib.py_ggml_x` its guarded twin, which returns NULL (or False) where ggml would
assert; `guard_error()` makes the exception from it. Opening checks that the library is the one the
declarations were made for: a `struct ggml_tensor` of another size corrupts memory without a word.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from .errors import DeviceLost, GGMLError, OutOfMemory, ShapeError

try:
    from ._ggml import ffi as ffi
except ImportError as error:
    raise ImportError("pyggml's native part is not built: run `python build.py` or `pip install .`") from error

FOLDER = Path(__file__).parent / "lib"
_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
_PREFIX = "" if sys.platform == "win32" else "lib"

# Without it ggml would start a debugger for a backtrace when it aborts: slow, and noise to the user.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")


def _path(name: str) -> Path:
    return FOLDER / f"{_PREFIX}{name}{_SUFFIX}"


class _Libraries:
    """Several libraries as one: a name is looked up in each until it is found, then kept."""

    def __init__(self, opened: list[Any]) -> None:
        self._opened = opened

    def __getattr__(self, name: str) -> Any:
        for library in self._opened:
            try:
                value = getattr(library, name)
            except (AttributeError, ffi.error):  # not declared; declared, but in another of the libraries
                continue
            setattr(self, name, value)
            return value
        raise AttributeError(f"ggml has no {name}")


def _open() -> Any:
    if not _path("pyggml").exists():
        raise ImportError(f"{_path('pyggml')} is missing: run `python build.py` or `pip install .`")
    first = ffi.dlopen(str(_path("pyggml")))
    opened = [first]
    if sys.platform == "win32":  # there, a library's dependencies are not searched for it
        opened += [ffi.dlopen(str(_path(name))) for name in ("ggml", "ggml-base")]
    if _path("ggml-cpu").exists():
        opened.append(ffi.dlopen(str(_path("ggml-cpu"))))
    first.pyggml_init()
    expected = ffi.sizeof("struct ggml_tensor") + ffi.sizeof("void *") * 4
    if first.ggml_tensor_overhead() != expected:
        raise ImportError(
            f"{_path('ggml-base')} was built with another struct ggml_tensor (overhead {first.ggml_tensor_overhead()}, "
            f"expected {expected}): build it again with `python build.py`"
        )
    if not _path("ggml-cpu").exists():
        # A portable build: the best CPU variant for this machine is loaded now, and found again by its handle.
        first.ggml_backend_load_all_from_path(str(FOLDER).encode())
        opened += [ffi.dlopen(str(v)) for v in sorted(FOLDER.glob(f"*ggml-cpu-*{_SUFFIX}")) if _is_loaded(v)]
    return _Libraries(opened) if len(opened) > 1 else first


def _is_loaded(path: Path) -> bool:
    """Whether this process has the library; cffi itself crashes when it is asked so (2.1.1, RTLD_NOLOAD)."""
    import ctypes

    if sys.platform == "win32":
        return bool(ctypes.windll.kernel32.GetModuleHandleW(path.name))
    try:
        ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)
    except OSError:
        return False
    return True


lib: Any = _open()


def take_log() -> str:
    """What ggml warned of since the last call; empty when nothing."""
    text = ffi.new("char[4096]")
    n_bytes = lib.pyggml_take_log(text, 4096)
    return str(ffi.buffer(text, n_bytes)[:].decode(errors="replace")).strip()


def guard_error(what: str) -> GGMLError:
    """The exception for a guarded call that came back empty; `what` names the call and its arguments."""
    text = ffi.string(lib.pyggml_last_error()).decode(errors="replace")
    raw = text
    text = text.replace("GGML_ASSERT(", "").replace(") failed", "") if "GGML_ASSERT" in text else text
    text = text.rsplit("/", 1)[-1]  # the file's folder is the build machine's
    where = _caller()
    if "obj_new" in text or "not enough space" in text:
        return GGMLError(f"{what}: no room for another tensor, ask for more when making it [{text}]{where}")
    if text.endswith("fatal error") or not ("GGML_ASSERT" in raw or text.startswith("check.c")):
        return ShapeError(f"{what}: ggml gives up: {text.split(': ', 1)[-1]}. {take_log()}".strip() + where)
    return ShapeError(f"{what}: ggml requires {text.split(': ', 1)[-1]} [{text.split(': ', 1)[0]}]{where}")


def check_call(succeeded: Any, what: str) -> Any:
    """`succeeded`, the result of a call of calls.h, unless the call threw: then the exception in Python.

    DeviceLost when the device can no longer be used, OutOfMemory when memory of it is all that was missing, else
    GGMLError; `what` is what was being done.
    """
    text = ffi.string(lib.pyggml_last_exception()).decode(errors="replace")
    if not text:
        return succeeded
    said = take_log()
    message = f"{what}: {text}" + (f"; {said}" if said else "")
    if "DeviceLost" in text:
        raise DeviceLost(f"{message}. Nothing can be computed on it any more in this process")
    if "OutOfDeviceMemory" in text or "OutOfHostMemory" in text or text == "std::bad_alloc":
        raise OutOfMemory(message)
    raise GGMLError(message)


def _caller() -> str:
    """The line outside this package that the call came from."""
    frame = sys._getframe(1)
    package = str(Path(__file__).parent)
    while frame and frame.f_code.co_filename.startswith(package):
        if frame.f_back is None:
            return ""
        frame = frame.f_back
    return f", at {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def set_log_level(level: int) -> None:
    """Print ggml's own messages at this level and above to stderr: 1 debug, 2 info, 3 warning (default), 4 error."""
    lib.pyggml_set_log_level(level)
