"""Progress on a terminal."""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import Any, TypeVar

B = TypeVar("B", bound="Bars")


class Bars:
    """A bar for each phase, on a terminal; nothing elsewhere. `style`: options of tqdm."""

    def __init__(self, **style: Any) -> None:
        self._style = style
        self._bar: Any = None

    def __call__(self, phase: str, done: int, total: int) -> None:
        """A phase begins with 0 done, and ends when all is."""
        from tqdm import tqdm

        if done == 0:
            self._end()
            self._bar = tqdm(total=total, desc=f"{phase:8}", disable=None, **self._style, **screen())
        elif self._bar is not None:
            self._bar.update(done - self._bar.n)
            if done == total:
                self._end()

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self: B) -> B:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end()


def screen() -> dict[str, Any]:
    """Size of the terminal on stderr, as tqdm's options; some say 0, and tqdm would then show nothing."""
    try:
        size = os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError):
        size = os.terminal_size((80, 24))
    return {"ncols": size.columns or 80, "nrows": size.lines or 24}
