"""Ownership of things that C must free."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

from .errors import ClosedError

H = TypeVar("H", bound="Handle")


class Handle:
    """A pointer that must be freed, once: by `close()`, by `with`, by the garbage collector or at interpreter exit.

    Freed by `weakref.finalize` and not by `ffi.gc`: at exit it runs newest first, so that children go before parents.
    A child keeps its parents in attributes. Using a closed handle raises ClosedError.
    """

    ptr: Any

    def _own(self, ptr: Any, free: Callable[..., object], *args: Any) -> None:
        """Take `ptr`; `free(*args)` or `free(ptr)` gives it back. `free` must not hold a reference to self."""
        self.ptr = ptr
        self._finalizer = weakref.finalize(self, free, *(args or (ptr,)))

    def close(self) -> None:
        """Free it now. May be called any number of times."""
        finalizer = self.__dict__.get("_finalizer")
        if finalizer is not None and finalizer.alive:
            self.__dict__.pop("ptr", None)
            finalizer()

    @property
    def closed(self) -> bool:
        return "ptr" not in self.__dict__

    def __getattr__(self, name: str) -> Any:
        # `ptr` is a plain attribute, for speed; close() removes it, and only then this is reached.
        if name == "ptr":
            raise ClosedError(f"this {type(self).__name__} is closed")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __enter__(self: H) -> H:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
