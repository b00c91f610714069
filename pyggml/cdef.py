"""Turn ggml's headers into what the bindings need. Runs at build time only (see build.py).

    declarations(headers)   preprocessed, cleaned C declarations that cffi parses
    guards(cdef)            C twins of the graph-building functions that turn GGML_ASSERT into an error
    asserts(ffi, cdef)      static asserts: the compiled headers have the layouts and signatures that cffi assumes
    lock(cdef)              one line a function: its name and a short hash of its signature

The declarations are ggml's text and stay out of the repository; `api.lock` is committed, so that a new ggml shows its
API change in review.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path
from typing import Any

HEADERS = ("ggml.h", "ggml-alloc.h", "ggml-backend.h", "ggml-cpu.h", "ggml-opt.h", "gguf.h")

# Plain-C, lock-free calls that assert and are not of the form "context in, tensor out".
EXTRA_GUARDS = ("ggml_build_forward_expand", "ggml_new_graph_custom", "ggml_new_graph", "ggml_graph_dup",
                "ggml_build_backward_expand", "ggml_graph_add_node", "ggml_graph_cpy", "ggml_graph_reset",
                "ggml_rope_set_offset", "ggml_soft_max_add_sinks", "ggml_flash_attn_ext_add_sinks",
                "ggml_flash_attn_ext_set_n_kv_max", "ggml_prec_set_src", "ggml_set_param", "ggml_set_loss")  # fmt: skip
# Context in, tensor out, but NULL is an answer and nothing is asserted.
UNGUARDED = (
    "ggml_get_first_tensor", "ggml_get_next_tensor", "ggml_get_tensor",
    "ggml_new_i32", "ggml_new_f32",  # in the CPU backend, which a portable build loads after our library
)  # fmt: skip

# Takes tensors without elements; the other operations divide by sizes, or have nothing to compute.
_MAY_BE_EMPTY = re.compile(r"ggml_(new|dup|view|reshape|permute|transpose|cont|cpy|cast|concat)(_|$)")

_FUNCTION = re.compile(r"^(?P<result>[\w \t*]+?)\b(?P<name>(?:ggml|gguf|pyggml)_\w+)\s*\((?P<args>[^;{}]*)\)\s*;", re.M)


def preprocess(compiler: list[str], include: Path, macros: bool = False) -> str:
    """The headers as one translation unit after the preprocessor, with line markers; or its macro definitions."""
    unit = "".join(f'#include "{name}"\n' for name in HEADERS)
    flags = ["-dM"] if macros else ["-D_Noreturn=", "-D__attribute__(x)="]
    run = subprocess.run(
        [*compiler, "-E", "-x", "c", *flags, f"-I{include}", "-"],
        input=unit, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if run.returncode:
        raise RuntimeError(f"the C preprocessor failed on ggml's headers:\n{run.stderr[-2000:]}")
    return run.stdout


def only_from(text: str, folder: Path) -> str:
    """Keep the lines whose line marker points into `folder`: ggml's own, not libc's."""
    kept: list[str] = []
    inside = False
    for line in text.splitlines():
        if marker := re.match(r'# \d+ "([^"]*)"', line):
            inside = Path(marker[1]).resolve().parent == folder.resolve()
        elif inside and not line.startswith("#"):
            kept.append(line)
    return "\n".join(kept)


def clean(text: str) -> str:
    """Rewrite the few constructs that cffi does not take."""
    text = re.sub(r"\b(extern|restrict|__restrict__|__restrict|__inline|inline)\b ?", "", text)
    text = re.sub(r"_Bool\s+", "_Bool ", text)  # a system macro: the preprocessor puts it on a line of its own
    text = re.sub(r"static const size_t \w+ = [^;]*;", "", text)
    text = re.sub(r"\[\s*(\d+)\s*/\s*sizeof\((?:int32_t|float)\)\s*\]", lambda m: f"[{int(m[1]) // 4}]", text)
    text = re.sub(r"\[\s*(\d+)\s*\*\s*(\d+)\s*\]", lambda m: f"[{int(m[1]) * int(m[2])}]", text)
    seen: set[str] = set()
    lines = []
    for line in text.splitlines():
        # C11 allows a typedef twice, cffi does not.
        if re.match(r"\s*typedef [^{}]*;\s*$", line):
            key = " ".join(line.split())
            if key in seen:
                continue
            seen.add(key)
        if line.strip():
            lines.append(line.rstrip())
    return "\n".join(lines)


def constants(macros: str) -> str:
    """`#define`s of ggml with plain integer values."""
    found = re.findall(r"^#define ((?:GGML|GGUF)_\w+) (0x[0-9a-fA-F]+|-?\d+)$", macros, re.M)
    return "\n".join(f"#define {name} {value}" for name, value in sorted(found))


def declarations(compiler: list[str], include: Path) -> str:
    """Everything that cffi parses: ggml's constants and declarations."""
    body = clean(only_from(preprocess(compiler, include), include))
    return constants(preprocess(compiler, include, macros=True)) + "\n" + body + "\n"


def functions(cdef: str) -> dict[str, tuple[str, str]]:
    """name -> (result type, arguments), each with single spaces; functions with `...` are left out."""
    found = {}
    # Bodies of structs hold function-like lines (callbacks); their names carry no ggml_ prefix.
    for match in _FUNCTION.finditer(re.sub(r"\{[^{}]*\}", "{}", cdef)):
        result = " ".join(match["result"].replace("*", " * ").split())
        args = " ".join(match["args"].replace("*", " * ").split())
        if result.startswith("typedef") or "..." in args:
            continue
        found[match["name"]] = (result, args)
    return found


def _split_args(args: str) -> list[str]:
    return [] if args in ("", "void") else [part.strip() for part in args.split(",")]


def _arg_name(arg: str, index: int) -> tuple[str, str]:
    """(declaration with a name, name) of one parameter."""
    words = arg.split()
    tail = words[-1]
    array = re.fullmatch(r"(\w+)\[\d*\]", tail)
    if array:
        return arg, array[1]
    keywords = {"int", "float", "void", "size_t", "bool", "double", "char", "int64_t", "uint64_t"}
    plain = [w for w in words if w not in ("const", "struct", "enum", "*")]
    if tail != "*" and tail not in keywords and len(plain) > 1:
        return arg, tail
    return f"{arg} a{index}", f"a{index}"


def guarded(cdef: str) -> dict[str, tuple[str, str]]:
    """The functions that get a twin: (ggml_context * first, ggml_tensor * back) and EXTRA_GUARDS."""
    chosen = {}
    for name, (result, args) in functions(cdef).items():
        builds = result == "struct ggml_tensor *" and args.startswith("struct ggml_context *")
        if (builds and name not in UNGUARDED) or name in EXTRA_GUARDS:
            chosen[name] = (result, args)
    return chosen


def guards(cdef: str) -> tuple[str, str]:
    """(declarations, C) of the twins: `py_ggml_x` is `ggml_x` between PYGGML_ENTER and PYGGML_LEAVE of shim.c."""
    heads, bodies = [], []
    for name, (result, args) in guarded(cdef).items():
        named = [_arg_name(arg, i) for i, arg in enumerate(_split_args(args))]
        head = f"{result} py_{name}({', '.join(d for d, _ in named) or 'void'})"
        call = f"{name}({', '.join(n for _, n in named)})"
        if result == "void":
            # A void call reports through its result: true, or false after an assert.
            head = f"bool py_{name}({', '.join(d for d, _ in named) or 'void'})"
            bodies.append(f"PYGGML_API {head} {{ PYGGML_ENTER(false); {call}; PYGGML_LEAVE(true); }}")
        else:
            node = result == "struct ggml_tensor *"
            checks = ""
            if node and not _MAY_BE_EMPTY.match(name):
                checks = "".join(f"PYGGML_NOT_EMPTY({n}) " for d, n in named if d == f"struct ggml_tensor * {n}")
            leave = "PYGGML_LEAVE_NODE" if node else "PYGGML_LEAVE"
            bodies.append(
                f"PYGGML_API {head} {{ {checks}{result} volatile result_; PYGGML_ENTER(NULL); "
                f"result_ = {call}; {leave}(result_); }}"
            )
        heads.append(f"{head};")
    return "\n".join(heads) + "\n", "\n".join(bodies) + "\n"


def asserts(ffi: Any, cdef: str) -> str:
    """Static asserts that the compiler's view of the headers is cffi's: struct sizes, field offsets, signatures."""
    quiet = '#if defined(__GNUC__)\n#pragma GCC diagnostic ignored "-Wdeprecated-declarations"\n#endif'
    lines = ["#include <stddef.h>", *(f'#include "{name}"' for name in HEADERS), quiet]
    for kind in ffi.list_types()[1]:
        size = ffi.typeof(f"struct {kind}")
        if size.kind == "struct" and size.fields is not None:
            lines.append(f'_Static_assert(sizeof(struct {kind}) == {ffi.sizeof(size)}, "size of struct {kind}");')
            lines += [
                f'_Static_assert(offsetof(struct {kind}, {field}) == {info.offset}, "{kind}.{field}");'
                for field, info in size.fields
            ]
    for name, (result, args) in functions(cdef).items():
        pointer = f"{result} (*)({args or 'void'})"
        lines.append(f'_Static_assert(_Generic(&{name}, {pointer}: 1, default: 0), "signature of {name}");')
    return "\n".join(lines) + "\n"


def lock(cdef: str) -> str:
    """`api.lock`: a line for each bound function, its name and the first 8 hex digits of its signature's sha256."""
    rows = []
    for name, (result, args) in sorted(functions(cdef).items()):
        digest = hashlib.sha256(f"{result} {name}({args})".encode()).hexdigest()[:8]
        rows.append(f"{name} {digest}\n")
    return "".join(rows)
