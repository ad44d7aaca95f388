"""The figures, from the JSON files of a run directory alone."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import matplotlib.ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .files import screen_text

COLORS = {"original": "#8a8f98", "pi": "#c58b2a", "ntk": "#4f86c6", "dynamic-ntk": "#7a6fb0", "yarn": "#3a9188"}
COLORS["longrope"] = "#c8385a"
TITLES = {"original": "original", "pi": "PI", "ntk": "NTK", "yarn": "YaRN", "longrope": "LongRoPE (ours)"}
OTHERS = ("#7a5aa6", "#8a6d3b", "#3b3f46", "#b07aa1", "#7f9f3f")  # seeds without a name of their own
INK, FAINT = "#22262e", "#d9dce1"

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": "#9aa0a8",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": "#50565f",
    "ytick.color": "#50565f",
    "legend.frameon": False,
    "svg.hashsalt": "longrope",
    "svg.fonttype": "path",
}


@contextmanager
def axes(width: float = 7.6, height: float = 3.6) -> Iterator[tuple[Figure, Axes]]:
    """Yield one figure with one set of axes in the house's style, closed to later changes of the style."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def factors(search: dict[str, Any], inspection: dict[str, Any]) -> Figure:
    """Rescale factors by pair, ours beside PI, NTK and YaRN."""
    with axes() as (figure, ax):
        ours = search["winner"]["candidate"]
        lines = {one["origin"][5:]: one["candidate"]["factors"] for one in search["history"] if _is_seed(one)}
        for (name, values), color in zip(lines.items(), seed_colors(search), strict=True):
            ax.plot(values, color=color, label=TITLES.get(name, name), linewidth=1.6, alpha=0.9,
                    linestyle="-" if name in COLORS else "--")  # fmt: skip
        title = TITLES["longrope"] + (f", n-hat {ours['start_tokens']}" if ours["start_tokens"] else "")
        ax.plot(ours["factors"], color=COLORS["longrope"], label=title, linewidth=2.2, marker="o", markersize=3.2)
        _critical(ax, inspection)
        if (found := ours.get("critical_pair")) is not None:
            ax.axvline(found - 0.5, color=COLORS["longrope"], linewidth=0.9, linestyle="--")
            ax.annotate(
                f"critical pair found: {found} →", (found - 0.5, 1), (-4, -5), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha="right", va="top", fontsize=8.5, color=COLORS["longrope"],
            )  # fmt: skip
        ax.set(xlabel="rotary pair, fastest first", ylabel="rescale factor", title="Rescale factors")
        ax.legend(loc="upper left", bbox_to_anchor=(0, 0.95), fontsize=9)
        return figure


def wavelengths(inspection: dict[str, Any]) -> Figure:
    """Turns of each pair in training, and at the target."""
    with axes(height=3.2) as (figure, ax):
        pairs = inspection["pairs"]
        periods = [pair["periods_in_training"] for pair in pairs]
        colors = [COLORS["longrope"] if value < 1 else COLORS["ntk"] for value in periods]
        ax.bar(range(len(pairs)), periods, color=colors, width=0.8)
        ax.axhline(1.0, color=INK, linewidth=0.9)
        ax.set_yscale("log")
        _critical(ax, inspection, top=True)
        length = f"{inspection['original_length']:,}"
        ax.set(xlabel="rotary pair, fastest first", ylabel="turns", title=f"Turns in the {length} tokens of training")
        return figure


def by_position(heldout: dict[str, Any]) -> Figure:
    """Held-out perplexity by position, all methods; below, what each loses against the best rival of ours."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 5.6), layout="constrained")
        upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
        methods = heldout["methods"]
        rivals = [name for name in ("pi", "ntk", "yarn") if name in methods]
        best = min(rivals, key=lambda name: methods[name]["nll"], default="original")
        base = [bucket["nll"] for bucket in methods[best]["by_position"]]
        reach = 0.0
        for name, method in methods.items():
            if name == "dynamic-ntk":  # of one text of the target's length it is NTK
                continue
            buckets = method["by_position"]
            middles = [(bucket["first"] + bucket["last"]) / 2 for bucket in buckets]
            ours = name == "longrope"
            style: dict[str, Any] = {
                "color": COLORS[name],
                "label": method["title"],
                "linewidth": 2.4 if ours else 1.6,
                "marker": "o",
                "markersize": 4.5 if ours else 3,
                "zorder": 3 if ours else 2,
            }
            upper.plot(middles, [math.exp(min(bucket["nll"], 50)) for bucket in buckets], **style)
            differences = [bucket["nll"] - other for bucket, other in zip(buckets, base, strict=True)]
            lower.plot(middles, differences, **style)
            if ours or name == best:
                reach = max([reach, *map(abs, differences)])
        original = heldout["original_length"]
        for ax in (upper, lower):
            ax.axvline(original, color=INK, linewidth=0.9, linestyle=":")
            thousands(ax)
        upper.annotate(
            f"trained to {original:,}", (original, 1), (4, -4), xycoords=("data", "axes fraction"),
            textcoords="offset points", va="top", fontsize=8.5, color="#50565f",
        )  # fmt: skip
        upper.set_yscale("log")
        plain_log(upper)
        upper.set(ylabel="perplexity (log scale)", title="Held-out perplexity by position")
        upper.legend(fontsize=9, ncols=2)
        lower.set_ylim(-3 * max(reach, 1e-4), 3 * max(reach, 1e-4))
        lower.set(xlabel="position, tokens", ylabel=f"nats above {methods[best]['title']}")
        return figure


def search_curve(search: dict[str, Any]) -> Figure:
    """Every score at the target length in its order, and the best so far; what is far above is drawn at the edge."""
    with axes(height=3.6) as (figure, ax):
        history = search["history"]
        best, running = math.inf, []
        for one in history:
            best = min(best, one["score"])
            running.append(best)
        highest = _highest(search)
        margin = max((highest - best) * 0.12, 1e-4)
        edge = highest + margin / 2
        seeds = dict(zip((one["id"] for one in history if _is_seed(one)), seed_colors(search), strict=True))
        for index, one in enumerate(history):
            above = one["score"] > highest
            style: dict[str, Any] = {"color": "#9aa0a8", "marker": "^" if above else "o", "markersize": 4}
            if _is_seed(one):
                name = one["origin"][5:]
                label = f"seed {TITLES.get(name, name)}, {one['score']:.3f}"
                style = {"color": seeds[one["id"]], "marker": "^" if above else "D", "markersize": 6.5, "label": label}
            ax.plot(index + 1, edge if above else one["score"], linestyle="", **style)
        order = range(1, len(history) + 1)
        ax.step(order, running, where="post", color=COLORS["longrope"], linewidth=2, label="best so far")
        ax.set_ylim(best - margin, highest + margin)
        ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        ax.set(xlabel="candidate scored at the target length", ylabel="loss, nats per token", title="The search")
        ax.legend(fontsize=9)
        return figure


def screens(search: dict[str, Any]) -> Figure | None:
    """Scores of the screens against those at the target; None where there was no screen."""
    target = {one["id"]: one["score"] for one in search["history"]}
    both = [(screen, [key for key in screen["scores"] if key in target]) for screen in search["screens"]]
    both = [(screen, keys) for screen, keys in both if len(keys) > 1]
    if not both:
        return None
    highest = _highest(search)
    with axes(height=3.6) as (figure, ax):
        for (screen, keys), color in zip(both, ("#4f86c6", "#3a9188", "#c58b2a", "#8a8f98"), strict=False):
            agreement = screen["agreement"]
            near = [key for key in keys if target[key] <= highest]
            label = f"{screen_text(screen)}: tau {agreement['tau']:.2f}, {agreement['pairs']} candidates"
            if len(near) < len(keys):
                label += f", of which {len(keys) - len(near)} far above"
            ax.plot([screen["scores"][key] for key in near], [target[key] for key in near], "o", color=color,
                    markersize=5, label=label)  # fmt: skip
        title = "Do the screens rank as the target does?"
        ax.set(xlabel="loss at the screen", ylabel="loss at the target", title=title)
        ax.legend(fontsize=9)
        return figure


def _highest(search: dict[str, Any]) -> float:
    """Return the highest loss to draw: half of the candidates, and as far up from the seed as the winner is down."""
    scores = sorted(one["score"] for one in search["history"])
    seed: float = search["best_seed"]["score"]
    return max(seed + (seed - scores[0]), scores[len(scores) // 2])


def svg(figure: Figure) -> str:
    """Return a figure as an inline SVG element, without the XML prologue and metadata."""
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(
            buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")), transparent=True
        )
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file on white."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _critical(ax: Axes, inspection: dict[str, Any], top: bool = False) -> None:
    at = inspection["critical_pair"] - 0.5
    ax.axvline(at, color=INK, linewidth=0.9, linestyle=":")
    ax.annotate(
        "less than one turn in training →", (at, float(top)), (4, -5 if top else 5),
        xycoords=("data", "axes fraction"), textcoords="offset points", va="top" if top else "bottom",
        fontsize=8.5, color="#50565f",
    )  # fmt: skip


def seed_colors(search: dict[str, Any]) -> list[str]:
    """Return a color for each seed of a search, in their order."""
    names = [one["origin"][5:] for one in search["history"] if _is_seed(one)]
    others = itertools.cycle(OTHERS)
    return [COLORS[name] if name in COLORS else next(others) for name in names]


def _is_seed(one: dict[str, Any]) -> bool:
    return bool(one["origin"].startswith("seed "))


def thousands(ax: Axes) -> None:
    """Write positions as 16,384."""
    ax.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))


def plain_log(ax: Axes) -> None:
    """Write the values of a logarithmic axis as plain numbers."""
    ax.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    low, high = ax.get_ylim()
    if high / low < 30:
        ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
