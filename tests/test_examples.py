"""The examples run, and do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pyggml

FOLDER = Path(__file__).parents[1] / "examples"


def run(name: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(Path(pyggml.__file__).parents[1])}
    command = [sys.executable, FOLDER / name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quadratic() -> None:
    first, second = run("quadratic.py").splitlines()
    assert first.split() == ["[", "4.", "5.", "8.", "13.", "20.", "29.", "40.", "53.]"]
    assert second.split()[-1] == "151.]"


def test_quantized_matmul() -> None:
    error = float(run("quantized_matmul.py").split()[-1])
    assert 0.01 < error < 0.1


def test_train() -> None:
    found = re.search(r"loss ([\d.]+) -> ([\d.]+)", run("train.py"))
    assert found and float(found[1]) > 0.1 and float(found[2]) < 1e-3
