"""One page that says what was done, what came out, and how to do it again."""

from .page import write_report

__all__ = ["write_report"]
