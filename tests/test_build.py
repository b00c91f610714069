"""build.py: what it refuses, in one sentence that says what to do; what it keeps; what a wheel holds.

Nothing is compiled here but by the tests marked `slow`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

import build

ROOT = Path(__file__).parents[1]


def failing(command: Any, **_: Any) -> Any:
    return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")


def make_lock(folder: Path, members: dict[str, bytes]) -> dict[str, str]:
    """An archive as a package's source distribution, in the cache at `folder`, and the lock that fits it."""
    archive = folder / "downloads" / "thing-1.0.tar.gz"
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return {
        "package": "thing", "version": "1.0", "file": archive.name, "path": "thing-1.0/vendor/ggml",
        "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(), "license": "thing-1.0/LICENSE", "ggml": "9.9",
    }  # fmt: skip


GOOD = {
    "thing-1.0/LICENSE": b"MIT",
    "thing-1.0/setup.py": b"raise SystemExit('never run')",
    "thing-1.0/vendor/ggml/CMakeLists.txt": b"project(ggml)",
    "thing-1.0/vendor/ggml/include/ggml.h": b"// ggml",
}


def message(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_the_lock_names_what_is_fetched() -> None:
    lock = build.read_lock()
    assert set(lock) == {"package", "version", "file", "sha256", "path", "ggml", "license"}
    assert lock["package"] == "llama-cpp-python" and len(lock["sha256"]) == 64


def test_only_the_source_and_its_licence_are_unpacked(tmp_path: Path) -> None:
    lock = make_lock(tmp_path, GOOD)
    for _ in range(2):
        source = build.unpack(build.fetch_archive(lock, tmp_path), lock, tmp_path)
    assert sorted(p.relative_to(source.parent).as_posix() for p in source.parent.rglob("*") if p.is_file()) == [
        "LICENSE", "complete", "ggml/CMakeLists.txt", "ggml/include/ggml.h",
    ]  # fmt: skip


def test_the_source_of_the_rpc_server_is_found(tmp_path: Path) -> None:
    lock = make_lock(tmp_path, GOOD | {"thing-1.0/vendor/tools/rpc/rpc-server.cpp": b"// server"})
    archive = build.fetch_archive(lock, tmp_path)
    source = build.unpack(archive, lock, tmp_path)
    assert build.server_source(source) is None
    build.unpack_server(archive, lock, source)
    found = build.server_source(source)
    assert found is not None and found.read_text() == "// server"
    llama_cpp = tmp_path / "llama.cpp"
    (llama_cpp / "tools" / "rpc").mkdir(parents=True)
    (llama_cpp / "tools" / "rpc" / "rpc-server.cpp").write_text("// theirs")
    assert build.server_source(llama_cpp / "ggml") == llama_cpp / "tools" / "rpc" / "rpc-server.cpp"


def test_an_archive_without_the_rpc_server_is_said(tmp_path: Path) -> None:
    lock = make_lock(tmp_path, GOOD)
    archive = build.fetch_archive(lock, tmp_path)
    with pytest.raises(build.BuildError, match=r"has no thing-1\.0/vendor/tools/rpc/rpc-server\.cpp: build without"):
        build.unpack_server(archive, lock, build.unpack(archive, lock, tmp_path))


def test_a_path_that_leads_out_is_refused(tmp_path: Path) -> None:
    lock = make_lock(tmp_path, GOOD | {"thing-1.0/vendor/ggml/../../../../evil": b"x"})
    with pytest.raises(build.BuildError, match="unsafe path"):
        build.unpack(build.fetch_archive(lock, tmp_path), lock, tmp_path)
    assert not list(tmp_path.rglob("evil"))


def test_a_half_unpacked_source_is_unpacked_again(tmp_path: Path) -> None:
    lock = make_lock(tmp_path, GOOD)
    source = build.unpack(build.fetch_archive(lock, tmp_path), lock, tmp_path)
    (source.parent / "complete").unlink()
    (source / "include" / "ggml.h").write_text("half")
    build.unpack(build.fetch_archive(lock, tmp_path), lock, tmp_path)
    assert (source / "include" / "ggml.h").read_text() == "// ggml"


def test_a_wrong_hash_is_said(tmp_path: Path) -> None:
    lock = make_lock(tmp_path, GOOD) | {"sha256": "0" * 64}
    with pytest.raises(build.BuildError, match=r"has sha256 [0-9a-f]{64}, but .*ggml.lock says 0{64}: delete the file"):
        build.fetch_archive(lock, tmp_path)


def test_no_network_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", failing)
    lock = make_lock(tmp_path / "elsewhere", GOOD)
    with pytest.raises(build.BuildError) as error:
        build.fetch_archive(lock, tmp_path)
    assert str(error.value) == (
        "cannot download thing==1.0 with pip (ERROR: No matching distribution found): check the network, or put "
        f"thing-1.0.tar.gz into {tmp_path / 'downloads'}, or pass --ggml-source DIR."
    )


def test_real_pip_without_an_index_ends_in_the_same_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    lock = build.read_lock() | {"package": "no-such-package-of-pyggml"}
    with pytest.raises(build.BuildError, match=r"cannot download no-such-package-of-pyggml==.* with pip \(.+\): check"):
        build.fetch_archive(lock, tmp_path)


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    assert build.main([]) == 2
    assert "no C compiler found: install one (Debian: apt install g++" in message(capsys)


def test_no_cmake_and_no_network_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("PYGGML_CACHE", str(tmp_path))
    monkeypatch.setattr(build.sysconfig, "get_path", lambda _: "/nowhere")
    monkeypatch.setattr(subprocess, "run", failing)
    with pytest.raises(build.BuildError, match=r"cmake is missing and pip cannot fetch it \(ERROR: No .*\): install"):
        build.find_tool("cmake")
    program = tmp_path / "tools" / "cmake" / "cmake" / "data" / "bin" / "cmake"
    program.parent.mkdir(parents=True)
    program.touch(0o755)
    assert build.find_tool("cmake") == str(program)


def test_an_old_python_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(build.sys, "version_info", (3, 9, 2))
    monkeypatch.setattr(build.platform, "python_version", lambda: "3.9.2")
    assert build.main([]) == 2
    assert message(capsys) == "error: pyggml needs Python 3.10 or newer, this is 3.9.2.\n"


@pytest.fixture
def sdk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Vulkan SDK that has all that is looked for, and a compiler that sees no headers but its own."""
    if sys.platform == "win32":
        pytest.skip("the compiler is a shell script")
    files = {
        "include/vulkan/vulkan.hpp": "", "include/vulkan/vulkan_core.h": "#define VK_HEADER_VERSION 268\n",
        "include/spirv/unified1/spirv.hpp": "", "lib/libvulkan.so": "", "bin/glslc": "#!/bin/sh\necho shaderc 1\n",
        "bin/c++": '#!/bin/sh\ncase "$*" in *-lvulkan*) exec test -e "$VULKAN_SDK/lib/libvulkan.so";; esac\n'
                   f'exec {" ".join(build.find_compilers()[1])} -nostdinc "$@"\n',
    }  # fmt: skip
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    monkeypatch.setenv("VULKAN_SDK", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "bin" / "c++"))
    monkeypatch.setattr(build.shutil, "which", only_in(str(tmp_path)))
    return tmp_path


def only_in(folder: str) -> Any:
    """shutil.which for a machine that has glslc nowhere else."""
    which = build.shutil.which
    return lambda name, path=None: which(name, path=folder if path is None and name == "glslc" else path)


def test_vulkan_is_part_of_the_key(sdk: Path) -> None:
    lock = build.read_lock()
    plain = build.ggml_key(build.Options(), lock, build.find_compilers())
    first = build.ggml_key(build.Options(vulkan=True), lock, build.find_compilers())
    assert first not in (plain, build.ggml_key(build.Options(vulkan=True), lock | {"x": "y"}, build.find_compilers()))
    (sdk / "include/vulkan/vulkan_core.h").write_text("#define VK_HEADER_VERSION 309\n")
    assert build.ggml_key(build.Options(vulkan=True), lock, build.find_compilers()) != first


@pytest.mark.parametrize(
    "missing, said",
    [
        ("bin/glslc", "--vulkan needs the compiler glslc: install it (Debian: apt install glslc) or set VULKAN_SDK"),
        ("include/vulkan/vulkan.hpp", "--vulkan needs Vulkan's header files 1.3.268 or newer with vulkan.hpp: set"),
        ("include/spirv/unified1/spirv.hpp", "--vulkan needs SPIR-V's header files (spirv/unified1/spirv.hpp)"),
        ("lib/libvulkan.so", "--vulkan needs the Vulkan loader to link with (libvulkan)"),
    ],
)
def test_what_vulkan_lacks_is_said(sdk: Path, missing: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    (sdk / missing).unlink()
    assert build.main(["--vulkan"]) == 2
    assert said in message(capsys)


def test_old_vulkan_headers_are_said(sdk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sdk / "include/vulkan/vulkan_core.h").write_text("#define VK_HEADER_VERSION 239\n")
    assert build.main(["--vulkan"]) == 2
    assert "1.3.268 or newer, but those that" in (text := message(capsys)) and "are of version 239" in text


def test_vulkan_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYGGML_BUILD", raising=False)
    for value, expected in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("PYGGML_VULKAN", value)
        assert build.Options.from_environment() == build.Options(vulkan=expected)
    monkeypatch.setenv("PYGGML_VULKAN", "1")
    monkeypatch.setenv("PYGGML_BUILD", "--portable")
    assert build.Options.from_environment() == build.Options(portable=True, vulkan=True)


def test_a_wrong_tree_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        assert build.main(["--ggml-source", str(folder)]) == 2
        assert f"--ggml-source {folder} is no ggml tree: it has no include/ggml.h." in message(capsys)


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    log = tmp_path / "build.log"
    script = "print('x.c:1: error: wrong'); raise SystemExit(1)"
    with pytest.raises(build.BuildError) as error:
        build.run([sys.executable, "-c", script], log, "compiling ggml")
    assert str(error.value) == f"compiling ggml failed; the whole log is {log}:\nx.c:1: error: wrong"


def test_the_key_follows_what_the_build_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, compilers = build.read_lock(), build.find_compilers()
    key = build.ggml_key(build.Options(), lock, compilers)
    assert key == build.ggml_key(build.Options(), lock, compilers)
    assert key != build.ggml_key(build.Options(debug=True), lock, compilers)
    assert key != build.ggml_key(build.Options(), lock | {"sha256": "0"}, compilers)
    assert key != build.ggml_key(build.Options(), lock, ([sys.executable], [sys.executable]))
    portable = build.ggml_key(build.Options(portable=True), lock, compilers)
    monkeypatch.setattr(build, "cpu_identity", lambda: "another processor")
    assert key != build.ggml_key(build.Options(), lock, compilers)
    assert portable == build.ggml_key(build.Options(portable=True), lock, compilers)


def test_options_of_a_pip_build_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYGGML_BUILD", "--portable --debug")
    assert build.Options.from_environment() == build.Options(portable=True, debug=True)
    monkeypatch.delenv("PYGGML_BUILD")
    assert build.Options.from_environment() == build.Options()


def test_the_cache_is_where_the_user_wants_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYGGML_CACHE", str(tmp_path))
    assert build.cache_folder() == tmp_path
    monkeypatch.delenv("PYGGML_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert build.cache_folder() == tmp_path / "xdg" / "pyggml"


def test_hatchling_can_load_the_file() -> None:
    """It executes the file without naming it in sys.modules, where dataclasses would look."""
    code = compile((ROOT / "build.py").read_text(), "build.py", "exec")
    names: dict[str, Any] = {"__name__": "not_a_module", "__file__": str(ROOT / "build.py")}
    exec(code, names)
    assert names["parse"]([]) == names["Options"]()


def test_nothing_of_ggml_is_tracked() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert sorted(p for p in tracked if p.startswith("vendor/")) == [
        "vendor/ggml/CMakeLists.txt", "vendor/ggml/NOTICE.md", "vendor/ggml/ggml.lock",
    ]  # fmt: skip
    assert not {"pyggml/_ggml.py", "models/vocab/qwen2.merges"} & set(tracked)
    assert not [p for p in tracked if p.startswith("pyggml/lib/")]
    demo = sum((ROOT / p).stat().st_size for p in tracked if p.startswith("studio/demo/"))
    assert 0 < demo < 24e6
    for path in (ROOT / "studio" / "demo").iterdir():
        assert path.stat().st_mode & 0o444 == 0o444, f"{path} cannot be read by all"


# -- real builds ------------------------------------------------------------------------------------------------------


def checkout(folder: Path) -> Path:
    """The tracked files, as they are now, in a folder of their own."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(3600)
def test_a_wheel_holds_all_that_is_needed_and_works_elsewhere(tmp_path: Path) -> None:
    """Uses the user's cache for ggml; pip fetches the build's requirements."""
    source = checkout(tmp_path / "source")
    out = tmp_path / "wheels"
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", out, source], check=True)
    (wheel,) = out.glob("*.whl")
    assert "-py3-none-" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "pyggml/_ggml.py", "pyggml/lib/build.json", "pyggml/lib/LICENSE.ggml", "pyggml/py.typed", "pyggml/api.lock",
        "models/vocab/qwen2.merges", "models/vocab/qwen2.LICENSE", "studio/demo/z_image_demo.gguf",
        "studio/demo/qwen3_demo.gguf", "studio/demo/ae_demo.safetensors",
    } <= names  # fmt: skip
    assert {name.rsplit("/", 1)[-1] for name in names if "licenses" in name} == {"LICENSE", "NOTICE.md"}
    assert any(name.startswith("pyggml/lib/libpyggml") for name in names)
    assert not any(name.startswith(("tests/", "vendor/")) for name in names)

    # a second build with nothing changed
    start = time.monotonic()
    again = subprocess.run([sys.executable, source / "build.py"], capture_output=True, text=True, check=True)
    assert "is up to date" in again.stdout and time.monotonic() - start < 2

    target = tmp_path / "installed"
    subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel], check=True)
    subprocess.run(
        [sys.executable, "-m", "pyggml", "generate", "a red circle", "-W", "64", "-H", "64"],
        check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(target)},
    )  # fmt: skip
    assert (tmp_path / "output.png").exists()


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_portable_build_picks_a_variant_and_computes(tmp_path: Path) -> None:
    source = checkout(tmp_path)
    subprocess.run([sys.executable, source / "build.py", "--portable"], check=True)
    assert json.loads((source / "pyggml" / "lib" / "build.json").read_text())["portable"] is True
    assert len(list((source / "pyggml" / "lib").glob("*ggml-cpu-*"))) > 5
    code = (
        "import numpy as np; from pyggml import Backend, Graph, devices; from pyggml.lib import lib;"
        "g = Graph(Backend.cpu(1)); x = g.input((8,), name='x'); g.output(x * x + 1.0, name='y');"
        "y = g.compute(x=np.arange(8))['y']; assert y.tolist() == [i * i + 1 for i in range(8)];"
        "lib.ggml_cpu_init(); assert [d.name for d in devices()] == ['CPU']"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=source)
    # Our own kernels are there at each level that this processor has.
    for level in ("baseline", "avx2", "avx512"):
        subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "tests/test_own_ops.py"],
            check=True, cwd=source, env=os.environ | {"PYGGML_CPU_LEVEL": level},
        )  # fmt: skip
