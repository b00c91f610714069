"""LoadError: every refusal of a file, naming the file, the tensor and the byte.

One class, not a tree: what callers do with a bad file is the same whatever is wrong with it. `kind` says
which rule was broken, for tests and for programs that must tell an unfinished download from a forged header.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, TypeAlias

from pyggml.errors import GGMLError

Kind: TypeAlias = Literal[
    "CannotOpen",  # the operating system refused, or it is not a regular file
    "CannotLock",  # the operating system does not let us keep that much in memory
    "TruncatedFile",
    "TrailingBytes",
    "BadMagic",
    "PickleRefused",
    "Unsupported",  # read well, but of a kind that is not computed here
    "UnsupportedVersion",
    "WrongEndianness",
    "LimitExceeded",
    "BadHeader",  # JSON that is not JSON, or not the JSON of this format
    "BadText",  # empty, not UTF-8, control characters
    "BadType",
    "BadValue",
    "BadShape",
    "Overflow",
    "Misaligned",
    "SizeMismatch",
    "OutOfBounds",
    "Gap",
    "Overlap",
    "DuplicateKey",
    "DuplicateTensor",
    "MissingTensor",
    "MissingFile",
    "UnsafePath",
    "WeightsChanged",  # a file was written to while it was in use
    "WrongTensors",  # a good file whose tensors are not the model's
]


class LoadError(GGMLError, ValueError):
    """A model file was refused.

    Attributes: `kind`, the rule that was broken; `path`, the file; `tensor`, the tensor's name; `offset`, the
    byte of the file at which the bad field stands; `field`, its name; `hint`, what to do about it. Unknown
    ones are None. `problems`: all of them, one line each, where there can be several.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: Kind = "BadValue",
        path: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        offset: int | None = None,
        field: str | None = None,
        hint: str | None = None,
        problems: Sequence[str] = (),
    ) -> None:
        self.message = message
        self.kind: Kind = kind
        self.path = None if path is None else os.fspath(path)
        self.tensor = tensor
        self.offset = offset
        self.field = field
        self.hint = hint
        self.problems = tuple(problems)
        super().__init__(str(self))

    def __str__(self) -> str:
        where = [] if self.path is None else [self.path]
        if self.tensor is not None:
            where.append(f"tensor {quoted(self.tensor)}")
        if self.field is not None:
            where.append(self.field)
        if self.offset is not None:
            where.append(f"byte {self.offset}")
        text = f"{', '.join(where)}: {self.message}" if where else self.message
        return printable(f"{text}; {self.hint}" if self.hint else text)  # files, and so names, can be hostile


def printable(text: str) -> str:
    """`text` without the characters that could move a terminal's cursor or start a new line of a log."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def quoted(text: str, limit: int = 100) -> str:
    """A name from a file, fit for one line of a message: escaped, quoted and cut."""
    shown = printable(text[:limit])
    return f"'{shown}...' ({len(text)} characters)" if len(text) > limit else f"'{shown}'"
