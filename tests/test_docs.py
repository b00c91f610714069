"""What README.md and docs/ show: their Python runs, their commands run, their links lead somewhere.

A block behind `<!-- not run: why -->` is only parsed, its commands by the command line's own parser.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from studio import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SMALL = ["-W", "64", "-H", "64", "--steps", "1", "-t", "1"]  # what is drawn is not looked at here


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    is_run: bool


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text[: m.start(2)].count("\n") + 1, m[2], m[3], m[1] is None)
        for m in re.finditer(r"(<!-- not run: .+? -->\n)?^```(\w+)\n(.*?)^```$", text, re.M | re.S)
    ]


def commands(block: Block) -> list[list[str]]:
    """The lines of a shell block that call pyggml."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if re.match(r"(\$ )?pyggml ", line)]


ALL = [block for page in PAGES for block in blocks_of(page)]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the checkout to relative paths, where files may be written."""
    (tmp_path / "studio").symlink_to(ROOT / "studio")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", sorted({b.page for b in ALL if b.language == "python"}), ids=lambda p: p.name)
def test_python_runs(page: Path, checkout: Path) -> None:
    """The blocks of a page, one after the other with the same names."""
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks_of(page):
        if block.language != "python":
            continue
        # line numbers of a traceback are those of the page
        code = compile("\n" * block.line + block.text, str(page), "exec")
        if block.is_run:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, names)


@pytest.mark.parametrize("page", sorted({b.page for b in ALL if commands(b)}), ids=lambda p: p.name)
def test_commands_run(page: Path, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks_of(page):
        for argv in commands(block) if block.language == "sh" else []:
            args = cli.make_parser().parse_args(argv)  # exits, with the reason, when an option is not ours
            if block.is_run:
                code = cli.main([*argv, *(SMALL if args.command == "generate" else [])])
                assert code == 0, f"{page.name}:{block.line}: {shlex.join(argv)}: {capsys.readouterr().err}"


def test_there_is_something_to_run() -> None:
    run = [block for block in ALL if block.is_run]
    assert sum(block.language == "python" for block in run) >= 5
    assert sum(len(commands(block)) for block in run) >= 5
    assert any(not block.is_run and "--diffusion-model" in block.text for block in ALL)
    for block in ALL:
        assert block.language in ("python", "sh", "c", "text", "json"), f"{block.page.name}:{block.line}"
        if block.language == "python":
            ast.parse(block.text)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_readme_begins_with_two_commands() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    title, _, sentence, _, fence, first, second, end = lines[:8]
    assert title == "# pyggml" and sentence.endswith(".") and (fence, end) == ("```sh", "```")
    assert "pip install ." in first and "pyggml generate" in first
    assert "'.[test]'" in second and second.endswith("pytest")
    argv = shlex.split(first.split("/pyggml ", 1)[1])
    assert cli.make_parser().parse_args(argv).diffusion_model is None


def run_ci(folder: Path, second: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """.ci/run in a folder whose README and linters do nothing."""
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci")
    linters = "mkdir -p .venv/bin && printf '#!/bin/sh\\necho $0 $@ >> linted' | tee .venv/bin/ruff > .venv/bin/mypy"
    first = f"{linters} && chmod +x .venv/bin/*"
    (folder / "README.md").write_text(f"# x\n\nText.\n\n```sh\n{first}\n{second}\n```\n\n```sh\ntouch never\n```\n")
    inherited = {key: value for key, value in os.environ.items() if key != "PYGGML_BUILD"}
    return subprocess.run([folder / ".ci" / "run"], capture_output=True, text=True, check=False, timeout=60, cwd=os.sep,
                          env=inherited | environment)  # fmt: skip


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(("second", "code"), [("touch ran", 0), ("true && false && touch ran", 1)])
def test_ci_runs_the_readmes_commands(second: str, code: int, tmp_path: Path) -> None:
    """All commands run, and one that fails stops the rest."""
    done = run_ci(tmp_path, second, PYGGML_BUILD="")
    assert bool(done.returncode) == bool(code), done.stderr
    assert (tmp_path / "ran").exists() == (code == 0) and not (tmp_path / "never").exists()
    if code == 0:
        assert (tmp_path / "linted").read_text() == ".venv/bin/ruff check .\n.venv/bin/mypy\n"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_ci_goes_on_without_vulkan(tmp_path: Path) -> None:
    """Where its parts are missing and cannot be installed: said in the first and the last line."""
    (tmp_path / "build.py").write_text(
        "def find_compilers(): return [], []\ndef check_vulkan(cxx): raise ValueError('no glslc')\n"
        "def cache_folder():\n    from pathlib import Path\n    return Path('cache')\n"
    )
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "debian_vulkan.sh").write_text("#!/bin/sh\necho no mirror for $1 >&2\nexit 7\n")
    (tmp_path / "tools" / "debian_vulkan.sh").chmod(0o755)
    done = run_ci(tmp_path, "echo $PYGGML_BUILD, $VULKAN_SDK > ran", VULKAN_SDK="/its/own")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ran").read_text() == "--rpc, /its/own\n"
    said = re.findall(r"^PYGGML_BUILD=--rpc TESTS OF VULKAN ARE LEFT OUT\. .*$", done.stdout, re.M)
    assert len(said) == 2 and "no mirror for cache/vulkan-sdk\nIt failed (7)." in done.stdout, done.stdout
