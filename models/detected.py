"""What configs that are read from a file share: anything that does not fit is a LoadError, and quick to find."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from loader.checkpoint import Checkpoint
from loader.errors import LoadError

Config = TypeVar("Config")
Read = Callable[[Any, Checkpoint], Config]


def detected(what: str) -> Callable[[Read[Config]], Read[Config]]:
    """For `from_checkpoint`: shapes with too few dimensions, names and settings that are no numbers, sizes that divide
    by nothing are a LoadError that says what the file is not.
    """

    def decorate(read: Read[Config]) -> Read[Config]:
        @wraps(read)
        def checked(cls: Any, checkpoint: Checkpoint) -> Config:
            try:
                return read(cls, checkpoint)
            except LoadError:
                raise
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                problem = f"this is no {what}: its shapes or settings do not fit together ({error!r:.200})"
                raise LoadError(problem, path=checkpoint.path) from error

        return checked

    return decorate


def shape(what: str, checkpoint: Checkpoint, name: str, n_dimensions: int | None = None) -> tuple[int, ...]:
    """ne of a tensor. LoadError that says what the file is not where the tensor is missing or, with `n_dimensions`, has
    another number of them or a dimension of 0.
    """
    if name not in checkpoint:
        raise LoadError(f"this is no {what}: a tensor is missing", path=checkpoint.path, tensor=name)
    found = tuple(checkpoint[name].ne)
    if n_dimensions is not None and (len(found) != n_dimensions or not all(found)):
        problem = f"this is no {what}: its shape is {found}, {n_dimensions} dimensions are expected"
        raise LoadError(problem, path=checkpoint.path, tensor=name)
    return found


def n_blocks(checkpoint: Checkpoint, prefix: str) -> int:
    """How many blocks there are, of names `prefix`.0.x, `prefix`.1.x, and so on; LoadError for other numbers."""
    at = prefix.count(".") + 1
    numbers = {name.split(".")[at] for name in checkpoint if name.startswith(f"{prefix}.")}
    if numbers != set(map(str, range(len(numbers)))):
        wrong = min(numbers - set(map(str, range(len(numbers)))))
        problem = f"{len(numbers)} blocks {prefix}, but one of them is number {wrong[:40]}"
        raise LoadError(problem, path=checkpoint.path, hint="the file is broken, or parts of it are missing")
    return len(numbers)
