"""Python's cyclic garbage collector, held off while a header is read."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """A header of 100,000 tensors makes a million objects and no cycle; walking them again and again doubles the time.

    In several threads at once the collector may run early, never stay off.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
