"""JSON as files of strangers should be read: nothing twice, nothing that is not JSON, nothing endless."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from .errors import Kind, LoadError, quoted
from .limits import DEFAULT_LIMITS, Limits
from .mapped import MappedFile


def parse_json(text: bytes, path: str, offset: int = 0, *, padding: bytes = b" \t\r\n") -> Any:
    """Strict JSON: UTF-8 without a mark, no key twice, no NaN or infinity, no half of a surrogate pair, which is no
    text. Trailing whitespace: `padding` only.

    `path` and `offset`, where the text begins in it, are for messages. Raises `LoadError` (BadHeader,
    BadText, DuplicateKey).
    """

    def fail(kind: Kind, message: str) -> LoadError:
        return LoadError(message, kind=kind, path=path, offset=offset, field="JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise fail("DuplicateKey", f"the key {quoted(key)} stands in one object twice")
                seen.add(key)
        return table

    def no_constant(name: str) -> NoReturn:
        raise fail("BadHeader", f"{name} is not JSON")

    try:
        decoded = str(text.rstrip(padding), "utf-8")
    except UnicodeDecodeError as e:
        raise fail("BadText", f"not UTF-8: {e.reason} at byte {offset + e.start}") from e
    if decoded[-1:].isspace():
        raise fail("BadHeader", "padded with something else than spaces")
    try:
        value = json.loads(decoded, object_pairs_hook=unique, parse_constant=no_constant)
        if re.search(r"\\u[dD][89a-fA-F]", decoded):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except LoadError:
        raise
    except UnicodeEncodeError:
        raise fail("BadText", "holds half of a surrogate pair, which is no text") from None
    except RecursionError:
        raise fail("BadHeader", "nested too deeply") from None
    except ValueError as e:  # JSONDecodeError, and an integer of more than 4,300 digits
        raise fail("BadHeader", f"not valid JSON: {e}") from e


def read_json(path: str, limits: Limits = DEFAULT_LIMITS) -> Any:
    """A whole JSON file, strictly (see `parse_json`). Raises `LoadError`."""
    with MappedFile(path) as file:
        return parse_json_file(file, limits)


def parse_json_file(file: MappedFile, limits: Limits = DEFAULT_LIMITS) -> Any:
    """The same of a file that is already open."""
    if file.n_bytes > limits.json:
        message = f"{file.n_bytes} bytes, at most {limits.json} are allowed"
        raise LoadError(message, kind="LimitExceeded", path=file.path, offset=0)
    return parse_json(file.read_at(0, file.n_bytes), file.path)
