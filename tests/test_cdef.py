"""The bindings are generated: what is generated, and that it is the ggml that `api.lock` describes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from pyggml import cdef
from pyggml.lib import FOLDER, ffi, lib

LOCK = Path(cdef.__file__).with_name("api.lock")

HEADER = """
# 1 "/usr/include/stddef.h" 1
typedef unsigned long size_t;
# 3 "{folder}/ggml.h" 2
typedef struct ggml_backend_buffer_type * ggml_backend_buffer_type_t;
typedef struct ggml_backend_buffer_type * ggml_backend_buffer_type_t;
    struct ggml_tensor {{
        int32_t op_params[64 / sizeof(int32_t)];
        _Bool
        flag;
        void (*callback)(int x);
    }};
    static const size_t GGML_TENSOR_SIZE = sizeof(struct ggml_tensor);
    extern struct ggml_tensor * ggml_add(
            struct ggml_context * ctx,
            struct ggml_tensor  * a,
            const float * restrict weights);
    extern struct ggml_tensor * ggml_get_tensor(struct ggml_context * ctx, const char * name);
    extern void ggml_build_forward_expand(struct ggml_cgraph * cgraph, struct ggml_tensor * tensor);
    extern struct ggml_tensor * ggml_format_name(struct ggml_tensor * tensor, const char * fmt, ...);
    extern struct ggml_tensor * ggml_sum(struct ggml_context *, struct ggml_tensor *);
    extern int64_t ggml_time_ms(void);
"""


@pytest.fixture
def cleaned(tmp_path: Path) -> str:
    return cdef.clean(cdef.only_from(HEADER.format(folder=tmp_path), tmp_path))


def test_only_the_folders_own_lines_are_kept_and_cleaned(cleaned: str) -> None:
    assert "unsigned long" not in cleaned
    assert cleaned.count("ggml_backend_buffer_type_t;") == 1
    assert "op_params[16]" in cleaned and "_Bool flag" in cleaned
    for word in ("extern", "restrict", "GGML_TENSOR_SIZE", "sizeof"):
        assert word not in cleaned


def test_functions_are_found_with_their_signatures(cleaned: str) -> None:
    found = cdef.functions(cleaned)
    assert found["ggml_time_ms"] == ("int64_t", "void")
    assert found["ggml_add"] == (
        "struct ggml_tensor *",
        "struct ggml_context * ctx, struct ggml_tensor * a, const float * weights",
    )
    assert "ggml_format_name" not in found, "variadic"
    assert "callback" not in found


def test_guards_are_made_for_what_builds_nodes(cleaned: str) -> None:
    assert set(cdef.guarded(cleaned)) == {"ggml_add", "ggml_sum", "ggml_build_forward_expand"}
    heads, bodies = cdef.guards(cleaned)
    assert "struct ggml_tensor * py_ggml_sum(struct ggml_context * a0, struct ggml_tensor * a1);" in heads
    assert "bool py_ggml_build_forward_expand(" in heads, "a void call reports whether it went through"
    line = next(line for line in bodies.splitlines() if "py_ggml_add(" in line)
    assert "PYGGML_NOT_EMPTY(a)" in line and "PYGGML_NOT_EMPTY(ctx)" not in line and "PYGGML_LEAVE_NODE" in line
    assert "ggml_add(ctx, a, weights)" in line


def test_constants_are_plain_integers() -> None:
    macros = '#define GGML_A 4\n#define GGML_B (1 << 2)\n#define GGML_C "x"\n#define OTHER 3\n#define GGUF_D 0x10\n'
    assert cdef.constants(macros) == "#define GGML_A 4\n#define GGUF_D 0x10"


def test_the_lock_changes_with_a_signature(cleaned: str) -> None:
    lines = cdef.lock(cleaned).splitlines()
    digest = hashlib.sha256(b"int64_t ggml_time_ms(void)").hexdigest()[:8]
    assert f"ggml_time_ms {digest}" in lines
    other = cdef.lock(cleaned.replace("int64_t ggml_time_ms", "int32_t ggml_time_ms")).splitlines()
    assert len(set(lines) ^ set(other)) == 2


# ggml's headers declare these, its sources do not define them.
DECLARED_ONLY = {"ggml_threadpool_get_n_threads"}


def locked() -> dict[str, str]:
    return dict(line.split() for line in LOCK.read_text(encoding="utf-8").splitlines())


def test_the_built_bindings_are_those_of_the_lock() -> None:
    """When this fails after a change of ggml: look at the difference, then copy lib/api.lock over the old one."""
    built = FOLDER / "api.lock"
    assert built.read_text(encoding="utf-8") == LOCK.read_text(encoding="utf-8")


def test_every_public_function_is_reachable() -> None:
    names = locked()
    assert len(names) > 550
    for probe in (
        "ggml_mul_mat",
        "ggml_gallocr_new",
        "ggml_backend_sched_new",
        "ggml_cpu_has_avx2",
        "gguf_init_from_file",
    ):
        assert probe in names
    assert {name for name in names if not hasattr(lib, name)} == DECLARED_ONLY


def test_a_library_with_another_tensor_is_refused() -> None:
    code = (
        "import sys, types, importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('generated', {str(FOLDER.parent / '_ggml.py')!r})\n"
        "generated = importlib.util.module_from_spec(spec); spec.loader.exec_module(generated)\n"
        "class Wrong:\n"
        "    def __getattr__(self, name): return getattr(generated.ffi, name)\n"
        "    def sizeof(self, kind): return generated.ffi.sizeof(kind) + (96 if 'tensor' in kind else 0)\n"
        "fake = types.ModuleType('pyggml._ggml'); fake.ffi = Wrong(); sys.modules['pyggml._ggml'] = fake\n"
        "try:\n    import pyggml\nexcept ImportError as error:\n    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "another struct ggml_tensor" in run.stdout, run.stderr


def test_layouts_are_what_the_compiler_saw() -> None:
    assert lib.ggml_tensor_overhead() == ffi.sizeof("struct ggml_tensor") + 32
    assert ffi.offsetof("struct ggml_tensor", "name") > 0
