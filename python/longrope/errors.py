"""What a user did wrong or a machine lacks, as one line; the command line prints it and exits with its code."""

from __future__ import annotations

import errno
from typing import NoReturn


class PipelineError(Exception):
    """The work cannot go on (disk full, a broken file); nothing that was finished is lost."""

    exit_code = 1


class UsageError(PipelineError):
    """An argument is wrong."""

    exit_code = 2


class BudgetExhausted(Exception):
    """The search may not afford another evaluation; raised before it starts."""


def refuse(argument: str, value: object, expected: str) -> NoReturn:
    """Raise `UsageError` with one line that names the argument, its value and what was expected."""
    raise UsageError(one_line(f"{argument}: got {value}, expected {expected}"))


def one_line(text: str, limit: int = 600) -> str:
    """Return `text` with its line breaks and runs of spaces folded, cut to `limit` characters."""
    folded = " ".join(text.split())
    return folded if len(folded) <= limit else folded[: limit - 3] + "..."


def disk_error(what: str, error: OSError, kept: str = "what was finished is kept") -> PipelineError:
    """Return the line for a failed write of `what`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PipelineError(f"{what}: got a full disk, expected free space; {kept}, run the same command again")
    return PipelineError(one_line(f"{what}: got {error.strerror or error}, expected to write there; {kept}"))
