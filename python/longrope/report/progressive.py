"""The report of a progressive extension: its stages, perplexity by length, and the ladder of regimes."""

from __future__ import annotations

import math
from html import escape
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..plan import sequences_of
from .figures import COLORS, INK, axes, plain_log, thousands
from .files import OURS, Report
from .markup import as_perplexity, card, figure, table


def headline(report: Report, title: str) -> str:
    """Say what came out, in two sentences and a row of numbers."""
    parts = [
        f"<h1>{escape(title)}</h1>",
        '<p class="lead">Rescale factors of the rotary embedding, searched on some documents, fine-tuned on others and '
        "proved on others again.</p>",
    ]
    found = report.lengths
    if found is None:
        return "\n".join(parts)
    methods, last, first = found["methods"], found["lengths"][-1], found["lengths"][0]
    at_last = {name: method["by_length"][-1]["nll"] for name, method in methods.items()}
    rival = min((name for name in methods if name != OURS), key=at_last.__getitem__)
    far, near = found["differences"][rival][-1], found["differences"]["original"][0]
    parts.append(
        f'<div class="verdict"><p>Held-out documents of {last:,} tokens are read at perplexity '
        f"<b>{as_perplexity(at_last[OURS])}</b>; {methods[rival]['title']}, the best of the methods without training, "
        f"reads them at {as_perplexity(at_last[rival])} ({interval(far)}).</p><p>Texts of {first:,} tokens, which the "
        f"original model was trained on, are {verdict(near)} than by it ({interval(near)}).</p></div>"
    )
    cards = [
        card(method["title"], as_perplexity(at_last[name]), "ours" if name == OURS else "")
        for name, method in methods.items()
    ]
    caption = f"Held-out perplexity, texts of {last:,} tokens"
    parts.append(f'<p class="lead" style="font-size:14px">{caption}</p><div class="cards">{"".join(cards)}</div>')
    return "\n".join(parts)


def interval(difference: dict[str, Any]) -> str:
    """Say a paired difference."""
    return (
        f"{difference['mean']:+.4f} nats per token, 95% interval {difference['low']:+.4f} to {difference['high']:+.4f}"
    )


def verdict(difference: dict[str, Any]) -> str:
    """Say which way a paired difference goes, where its interval does."""
    if difference["high"] < 0:
        return "read better"
    return "read worse" if difference["low"] > 0 else "read neither better nor worse"


def stages_section(report: Report, drawn: dict[str, str]) -> str:
    """What was planned, and how training went."""
    if report.plan is None or "recipe" not in report.plan:
        return ""
    recipe = report.plan["recipe"]
    trained = ", then ".join(f"{steps:,} steps at {length:,} tokens" for length, steps in recipe["tune"])
    words = (
        f"<p>Searched and fine-tuned: {trained}."
        + (f" The rest of the way to {recipe['target']:,} tokens without training." if _further(recipe) else "")
        + (f" Factors searched again for {_lengths(recipe['readjust'])} tokens." if recipe["readjust"] else "")
        + "</p>"
    )
    head = ["stage", "sequences", "tokens each", "tokens", "memory foreseen", "time foreseen"]
    rows = [
        (
            False,
            [
                stage["name"],
                *sequences_of(stage),
                f"{stage['tokens']:,}",
                f"{stage['bytes'] / 2**30:.2f} GiB",
                f"{stage['seconds']:,.0f} s",
            ],
        )
        for stage in report.plan["stages"]
    ]
    caption = "Loss of every step, and its mean over ten steps."
    return "<h2>Stages</h2>" + words + table(head, rows) + figure(drawn.get("tuning"), caption)


def lengths_section(report: Report, drawn: dict[str, str]) -> str:
    """Perplexity of whole texts of every length, and the intervals."""
    found = report.lengths
    if found is None:
        return ""
    head = ["perplexity of a text of", *(f"{length:,}" for length in found["lengths"])]
    rows = [
        (name == OURS, [method["title"], *(as_perplexity(entry["nll"]) for entry in method["by_length"])])
        for name, method in found["methods"].items()
    ]
    parts = [
        "<h2>Perplexity by length</h2>",
        figure(
            drawn.get("lengths"),
            "Held-out documents, read from their beginning to each length. The extended model reads every length under "
            "the regime its ladder has for it; the others have one regime each, and the weights of the original model.",
        ),
        table(head, rows),
    ]
    for method, differences in found.get("differences", {}).items():
        cells = [f"{d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]" for d in differences]
        head = [f"nats against {found['methods'][method]['title']}", *(f"{d['length']:,}" for d in differences)]
        parts.append(table(head, [(True, ["ours", *cells])]))
    return "\n".join(parts)


def ladder_section(report: Report, drawn: dict[str, str]) -> str:
    """The regimes."""
    ladder = report.ladder
    if ladder is None or len(ladder["regimes"]) < 3:
        return ""
    rows = [
        (
            False,
            [
                f"up to {regime['length']:,}",
                f"{min(regime['rescale_factors']):g} to {max(regime['rescale_factors']):g}",
                str(regime["start_tokens"]),
                f"{regime['attention_factor']:.4g}",
            ],
        )
        for regime in ladder["regimes"]
    ]
    head = ["texts of", "rescale factors", "n-hat", "attention factor"]
    return "<h2>The ladder of regimes</h2>" + figure(drawn.get("ladder"), "") + table(head, rows)


def by_length(found: dict[str, Any]) -> Figure:
    """Perplexity by length, all methods."""
    with axes(height=3.8) as (drawing, ax):
        top = 1.0
        for name, method in found["methods"].items():
            ours = name == OURS
            lengths = [entry["length"] for entry in method["by_length"]]
            values = [math.exp(min(entry["nll"], 50)) for entry in method["by_length"]]
            top = max(top, max(values) if ours else min(values))
            ax.plot(
                lengths, values, color=COLORS[name], label=method["title"], marker="o", zorder=3 if ours else 2,
                linewidth=2.4 if ours else 1.6, markersize=4.5 if ours else 3,
            )  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(found["lengths"])
        thousands(ax)
        low, high = ax.get_ylim()
        ax.set_ylim(low, min(high, 30 * top))
        plain_log(ax)
        ax.set(xlabel="length, tokens", ylabel="perplexity (log scale)", title="Held-out perplexity by length")
        ax.legend(fontsize=9)
        return drawing


def tuning(stages: list[dict[str, Any]]) -> Figure | None:
    """Training losses of all stages, one after the other."""
    if not stages:
        return None
    with axes(height=3.2) as (drawing, ax):
        begun = 0
        for stage in stages:
            losses = np.asarray(stage["losses"])
            steps = begun + np.arange(1, len(losses) + 1)
            width = min(10, len(losses))
            smooth = np.convolve(losses, np.full(width, 1 / width), "valid")
            ax.plot(steps, losses, color=COLORS["original"], linewidth=0.8, alpha=0.6)
            ax.plot(steps[width - 1 :], smooth, color=COLORS[OURS], linewidth=2)
            ax.axvline(begun, color=INK, linewidth=0.9, linestyle=":")
            ax.annotate(
                f"{stage['settings']['length']:,} tokens", (begun, 1), (4, -4), xycoords=("data", "axes fraction"),
                textcoords="offset points", va="top", fontsize=8.5, color="#50565f",
            )  # fmt: skip
            begun += len(losses)
        ax.set(xlabel="step", ylabel="loss, nats per token", title="Fine-tuning")
        return drawing


def ladder(content: dict[str, Any]) -> Figure | None:
    """Rescale factors of every regime, light for short texts and dark for long ones."""
    regimes = content["regimes"]
    if len(regimes) < 3:
        return None
    with axes(height=3.6) as (drawing, ax):
        import matplotlib as mpl

        colors = mpl.colormaps["viridis_r"](np.linspace(0.1, 0.95, len(regimes)))
        for regime, color in zip(regimes, colors, strict=True):
            label = f"up to {regime['length']:,}" + (
                f", n-hat {regime['start_tokens']}" if regime["start_tokens"] else ""
            )
            ax.plot(regime["rescale_factors"], color=color, label=label, linewidth=1.8, marker="o", markersize=3)
        ax.set_yscale("log", base=2)
        plain_log(ax)
        ax.set(xlabel="rotary pair, fastest first", ylabel="rescale factor (log scale)", title="The ladder of regimes")
        ax.legend(fontsize=9)
        return drawing


def _further(recipe: dict[str, Any]) -> bool:
    return bool(recipe["target"] > recipe["tune"][-1][0])


def _lengths(lengths: list[int]) -> str:
    return ", ".join(f"{length:,}" for length in lengths)
