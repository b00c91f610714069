"""What holds for every test."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tiny_models import write_tiny_models, write_tiny_qwen

if TYPE_CHECKING:
    from pyggml import Backend

# A shell starts what it puts into the background with SIGINT ignored, and processes hand that on to their children:
# tests that interrupt one would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# In a build with Vulkan too the suite computes on the processor, also where `auto` is asked for, and no driver takes
# memory that tests measure; tests/test_vulkan.py shows its processes a device. Loaders of Vulkan before 1.3.234 do not
# know the first variable: the second is ggml's.
os.environ |= {"VK_LOADER_DRIVERS_DISABLE": "*", "GGML_VK_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    """The processor, with one thread."""
    from pyggml import Backend  # not before the variables are set

    with Backend.cpu(1) as backend:
        yield backend


@pytest.fixture(scope="module")
def z_image_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny Z-Image, as keyword arguments of `models.load`."""
    return write_tiny_models(tmp_path_factory.mktemp("z_image"))


@pytest.fixture(scope="module")
def qwen_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny Qwen-Image, as keyword arguments of `models.load`."""
    return write_tiny_qwen(tmp_path_factory.mktemp("qwen_image"))
