"""`python -m bench.plots`: draw docs/figures/cpu_time.png, time against tokens, from bench/results/cpu.json."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from . import record, tables
from .workloads import OURS, TORCH

FIGURE = record.ROOT / "docs/figures/cpu_time.png"
LINES = {OURS: ("longrope_kernels", "#1f6feb"), TORCH: ("torch SDPA + transformers' RoPE", "#c0392b")}


def draw(content: dict[str, Any], path: Path = FIGURE) -> Path:
    """Draw time against tokens, both logarithmic, and return where the figure is.

    Raises:
        ValueError: a record without growth rows.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in content["rows"] if row["section"] == "growth" and "refused" not in row]
    if not rows:
        raise ValueError("cpu.json: got no row of section growth, expected some")
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=130)
    for side, (name, color) in LINES.items():
        points = [(row["shape"]["tokens"], row["seconds"][side]) for row in rows if side in row["seconds"]]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, color=color, label=name)
        axes.annotate(
            tables.duration(points[-1][1]), points[-1], (6, -3), textcoords="offset points", color=color, fontsize=8
        )
    shape, found = rows[0]["shape"], content["machine"]
    heads = f"{shape['heads']}/{shape['key_heads']} heads x {shape['head_dim']}"
    title = f"Causal attention with rotation, {rows[0]['dtype']}, {heads}"
    axes.set(xlabel="tokens", ylabel="seconds", title=f"{title}; {found['processor']}, {content['threads']} threads")
    axes.title.set_fontsize(10)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [row["shape"]["tokens"] for row in rows]
    axes.set_xticks(ticks, [f"{tokens // 1024}k" if tokens >= 1024 else str(tokens) for tokens in ticks])
    axes.margins(x=0.1)
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8)
    return save(figure, path)


def save(figure: Any, path: Path) -> Path:
    """Write a figure."""
    import matplotlib.pyplot as plt

    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path


def main() -> int:
    """Draw, or say in one line why not."""
    try:
        print(draw(record.read(record.RESULTS / "cpu.json")).relative_to(record.ROOT))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
