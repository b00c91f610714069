"""How the packages are laid out: imports go one way, public names are listed and documented, nothing unsafe is used."""

from __future__ import annotations

import ast
import importlib
import re
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ["pyggml", "loader", "models", "studio"]  # a package may import those before it
FILES = [path for package in ORDER for path in sorted((ROOT / package).rglob("*.py")) if path.name != "_ggml.py"]
ABOVE = {"pyggml/__main__.py": "studio"}  # so that `python -m pyggml` is the command
PUBLIC = ["pyggml", "pyggml.ops", "loader", "models", "models.qwen_image", "models.z_image"]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> Iterator[str]:
    """First parts of the absolute imports of a module, wherever they stand."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0]


def test_there_are_files_to_look_at() -> None:
    assert {path.parts[len(ROOT.parts)] for path in FILES} == set(ORDER) and len(FILES) > 40


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    package = name_of(path).split("/")[0]
    higher = set(ORDER[ORDER.index(package) + 1 :]) - {ABOVE.get(name_of(path))}
    tree = ast.parse(path.read_bytes())
    found = set(imported(tree))
    assert not found & higher
    assert package not in found, "inside a package imports are relative"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level < len(name_of(path).split("/")), "a relative import leaves the package"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_unsafe_is_used(path: Path) -> None:
    tree = ast.parse(path.read_bytes())
    assert not set(imported(tree)) & {"pickle", "marshal", "shelve", "dill", "torch", "transformers", "diffusers"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else ""
            assert called not in {"eval", "exec", "compile", "__import__"}
            assert not any(keyword.arg in ("shell", "allow_pickle") for keyword in node.keywords)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_what_is_public_is_documented(path: Path) -> None:
    tree = ast.parse(path.read_bytes())
    assert ast.get_docstring(tree), "a module says what it is about"
    assert not re.search(r"(^|_)(utils?|helpers?|common|misc)\.py$", path.name)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            is_one_line = len(node.body) == 1 and not isinstance(node, ast.ClassDef)
            assert ast.get_docstring(node) or is_one_line, f"{node.name} has no docstring"


@pytest.mark.parametrize("package", PUBLIC)
def test_all_is_sorted_and_complete(package: str) -> None:
    module = importlib.import_module(package)
    names = list(module.__all__)
    assert names == sorted(set(names))
    for name in names:
        getattr(module, name)
    top = package.split(".")[0]
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and str(getattr(value, "__module__", "")).split(".")[0] == top
    }
    assert not public - set(names)


def test_versions_agree() -> None:
    import pyggml

    assert f'version = "{pyggml.__version__}"' in (ROOT / "pyproject.toml").read_text()
    lock = (ROOT / "vendor" / "ggml" / "ggml.lock").read_text()
    version = re.search(r'^ggml\s*= "(.+)"$', lock, re.M)
    assert version and f"version {version[1]}," in (ROOT / "vendor" / "ggml" / "NOTICE.md").read_text()
    assert f"## [{pyggml.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
