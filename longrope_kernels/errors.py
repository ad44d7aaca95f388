"""Errors of the package, and the one form in which a bad argument is reported."""

from __future__ import annotations

from typing import NoReturn


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here, or cannot run this problem."""


class UnsupportedRopeError(ValueError):
    """A model configuration has no rotary embedding, or one of a kind this package does not implement."""


def brief(value: object) -> str:
    """Return a value as it is written, on one line of at most 60 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def refuse(argument: str, value: object, expected: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raise `error` with one line that names the argument, its value and what was expected."""
    raise error(f"{argument}: got {value}, expected {expected}")
