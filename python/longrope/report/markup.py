"""Small pieces of HTML, and numbers as the report writes them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape


def figure(svg: str | None, caption: str) -> str:
    return "" if svg is None else f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def card(title: str, value: str, kind: str) -> str:
    return f'<div class="card {kind}"><b>{value}</b><span>{escape(title)}</span></div>'


def table(head: Sequence[str], rows: Iterable[tuple[bool, Sequence[str]]]) -> str:
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr{' class=ours' if ours else ''}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for ours, cells in rows
    )
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def as_perplexity(nll: float) -> str:
    return as_number(math.exp(min(nll, 700.0)))


def as_number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"
