"""Figures of what `longrope measure` found: perplexity by length with intervals, retrieval by length and depth."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..evaluate.lengths import perplexity
from .figures import COLORS, INK, STYLE, axes, plain_log

# One brightness for one value, to every kind of eye and in print; in so few steps that SVG needs no picture for them.
COLOR_MAP = mpl.colormaps["cividis"].resampled(21)
MARKERS = {"original": "s", "pi": "v", "ntk": "^", "dynamic-ntk": "D", "yarn": "P"}


def retrieval(measured: dict[str, Any], task: str) -> Figure:
    """Draw the share found in every cell, lengths across and depths down; in a cell its count and the answers' loss."""
    found = measured[task]
    rows, depths = found["rows"], found["depths"]
    shares = [[row["cells"][i]["retrieved"] / row["cells"][i]["trials"] for row in rows] for i in range(len(depths))]
    with axes(max(4.2, 1.8 + 1.25 * len(rows)), max(2.8, 1.7 + 0.46 * len(depths))) as (figure, ax):
        cells = ax.pcolormesh(shares, cmap=COLOR_MAP, vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
        ax.invert_yaxis()
        for j, row in enumerate(rows):
            for i, cell in enumerate(row["cells"]):
                color = INK if shares[i][j] > 0.5 else "white"
                text = f"{cell['retrieved']}/{cell['trials']}"
                text += "" if cell["nll"] is None else f"\n{cell['nll']:.2f}"
                ax.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=8, linespacing=1.15, color=color)
        ax.grid(False)
        under = [f"{row['length']:,}\n{row['share']:.0%} [{row['low']:.0%}, {row['high']:.0%}]" for row in rows]
        ax.set_xticks([j + 0.5 for j in range(len(rows))], under, fontsize=8.5)
        ax.set_yticks([i + 0.5 for i in range(len(depths))], [f"{depth:.0%}" for depth in depths])
        what = f"all of {found['needles']} needles" if "needles" in found else "passkey"
        ax.set(xlabel="tokens, share found [95% interval]", ylabel="depth", title=f"{measured['title']}: {what} found")
        original = sum(row["length"] <= measured["original_length"] for row in rows)
        if 0 < original < len(rows):
            ax.axvline(original, color="white", linewidth=3)
            ax.axvline(original, color=INK, linewidth=1.2, linestyle=":")
        bar = figure.colorbar(cells, ax=ax, ticks=(0, 0.5, 1), pad=0.02)
        bar.ax.set_yticklabels(("none", "half", "all"), fontsize=8.5)
        return figure


def by_length(measured: list[dict[str, Any]], section: str, title: str) -> Figure:
    """Draw perplexity against length, a line and its interval for each method."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 3.6), layout="constrained")
        ax = figure.add_subplot()
        for one in measured:
            _line(ax, one, one[section]["rows"])
        original = measured[0]["original_length"]
        ax.axvline(original, color=INK, linewidth=0.9, linestyle=":")
        lengths = sorted({row["length"] for one in measured for row in one[section]["rows"]})
        ax.set_xscale("log", base=2)
        ax.set_xticks(lengths, [f"{length:,}" for length in lengths])
        ax.minorticks_off()
        ax.set_yscale("log")
        plain_log(ax)
        ax.set(xlabel="tokens of a window", ylabel="perplexity (log scale)", title=title)
        ax.legend(fontsize=9)
        return figure


def _line(ax: Axes, one: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    name = one["method"]
    color = COLORS.get(name, COLORS["longrope"])
    lengths = [row["length"] for row in rows]
    ax.plot(
        lengths, [perplexity(row["nll"]) for row in rows], color=color, label=one["title"], linewidth=1.8,
        marker=MARKERS.get(name, "o"), markersize=4.5,
    )  # fmt: skip
    if all(row["low"] is not None for row in rows):
        low, high = ([perplexity(row[end]) for row in rows] for end in ("low", "high"))
        ax.fill_between(lengths, low, high, color=color, alpha=0.15, linewidth=0)
