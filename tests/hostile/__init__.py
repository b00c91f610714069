"""Files that must be refused, each with the rule that it breaks, and files that must not be."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    name: str
    data: bytes
    kind: str  # LoadError.kind
