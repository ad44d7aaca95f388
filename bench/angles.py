"""How exact is cos(position * frequency)? Worst error by position, for the ways in use and for ours.

`python -m bench.angles` prints the table, writes `bench/results/angles.json` and draws `docs/figures/angle_error.png`.
Truth is integer arithmetic on 160-bit fractions of a turn. Every pair of a head_dim-64, theta-1e5 embedding is taken at
512 positions that end at each of the printed ones.
"""

from __future__ import annotations

import argparse
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

import longrope_kernels as lk
from longrope_kernels.turns import base_turns

THETA, HEAD_DIM, SPAN, BITS = 1e5, 64, 512, 160
ENDS = [2**k - 1 for k in range(10, 32)]
WAYS = {
    "fp32 angle (model libraries)": "#c0392b",
    "running product (llama.cpp's way)": "#e67e22",
    "fp64 product": "#7f8c8d",
    "fixed-point turns (ours)": "#1f6feb",
}


def truth(positions: np.ndarray) -> np.ndarray:
    """cos of every pair in float64, from exact integer products; [positions, pairs]."""
    result = np.empty((len(positions), HEAD_DIM // 2))
    for pair, turn in enumerate(base_turns(THETA, HEAD_DIM)):
        fixed = round(turn * 2**BITS)
        for row, position in enumerate(positions):
            fraction = Fraction(int(position) * fixed % 2**BITS, 2**BITS)
            result[row, pair] = np.cos(2 * np.pi * float(fraction if fraction < 0.5 else fraction - 1))
    return result


def ways(positions: np.ndarray) -> dict[str, np.ndarray]:
    """cos of every pair as each way computes it; [positions, pairs]."""
    pairs = torch.arange(0, HEAD_DIM, 2, dtype=torch.int64).float()
    inv_freq = 1.0 / (THETA ** (pairs / HEAD_DIM))  # as transformers computes it
    at = torch.from_numpy(positions)
    fp32 = (at.float().unsqueeze(-1) * inv_freq).double().cos()
    scale = torch.tensor(THETA ** (-2.0 / HEAD_DIM), dtype=torch.float32)
    running = [at.float()]
    for _ in range(HEAD_DIM // 2 - 1):
        running.append(running[-1] * scale)
    scaling = lk.RopeScaling(head_dim=HEAD_DIM, theta=THETA)
    one = torch.zeros(1, 1, len(positions), HEAD_DIM)
    one[..., : HEAD_DIM // 2] = 1.0  # a = 1, b = 0: the rotated a is cos
    ours = lk.apply_rope(one, None, scaling, at)[0][0, 0, :, : HEAD_DIM // 2]
    product = (at.double().unsqueeze(-1) * scaling.base_inv_freq).cos()
    found = (fp32, torch.stack(running, -1).double().cos(), product, ours.double())
    return {name: values.numpy() for name, values in zip(WAYS, found, strict=True)}


def measure() -> list[dict[str, float]]:
    """Worst error of each way over the SPAN positions that end at each of ENDS."""
    rows = []
    for end in ENDS:
        positions = np.arange(end - SPAN + 1, end + 1)
        exact = truth(positions)
        rows.append({"position": end} | {n: float(np.abs(v - exact).max()) for n, v in ways(positions).items()})
    return rows


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """Draw worst error against position, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=130)
    for name, color in WAYS.items():
        axes.plot([r["position"] for r in rows], [r[name] for r in rows], marker="o", ms=3, color=color, label=name)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="position (tokens)",
        ylabel="largest error of cos",
        title=f"Error of the rotary angle by position (theta {THETA:g}, head_dim {HEAD_DIM})",
    )
    axes.axhline(3e-7, color="#1f6feb", lw=0.8, ls=":")
    axes.text(1100, 3.6e-7, "contract: 3e-7", color="#1f6feb", fontsize=8)
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parent.parent
    parser.add_argument("--json", type=Path, default=root / "bench/results/angles.json")
    parser.add_argument("--figure", type=Path, default=root / "docs/figures/angle_error.png")
    arguments = parser.parse_args()
    rows = measure()
    print(f"{'position':>12}" + "".join(f"{name:>36}" for name in WAYS))
    for row in rows:
        print(f"{row['position']:>12}" + "".join(f"{row[name]:>36.2e}" for name in WAYS))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"theta": THETA, "head_dim": HEAD_DIM, "rows": rows}, indent=1) + "\n")
    draw(rows, arguments.figure)


if __name__ == "__main__":
    main()
