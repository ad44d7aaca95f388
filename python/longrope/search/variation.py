"""How candidates change: mutations that move a part or the whole shape, crossovers that recombine two parents.

All moves happen on the logarithms of the factors, so that 1 -> 1.1 and 2 -> 2.2 are the same step; `Space.legal` then
restores the monotone rule by least squares, so that a plateau moves as one piece instead of a hundredth at a time.
Sizes are relative to the space's span, in LongRoPE's the logarithm of the extension: what is a bold move at 2x is a
small one at 64x. Only the pairs that the space leaves free move; the others follow from the critical pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .space import Candidate, Space

# Of the space's span: from fine tuning to almost half the way from no scaling to all of it.
SMALLEST_MOVE, LARGEST_MOVE = 0.03, 0.4

Move = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


def genes(logs: np.ndarray, size: float, random: np.random.Generator, probability: float = 0.3) -> np.ndarray:
    """Move each pair by itself with the mutation probability."""
    chosen = random.random(len(logs)) < probability
    return logs + chosen * random.normal(0.0, size, len(logs))


def segment(logs: np.ndarray, size: float, random: np.random.Generator) -> np.ndarray:
    """Move a run of neighbouring pairs by the same ratio."""
    pairs = len(logs)
    length = int(random.integers(1, max(pairs // 3, 1) + 1))
    first = int(random.integers(0, pairs - length + 1))
    moved = logs.copy()
    moved[first : first + length] += random.normal(0.0, size)
    return moved


def bump(logs: np.ndarray, size: float, random: np.random.Generator) -> np.ndarray:
    """Add a smooth bump around a random pair."""
    pairs = len(logs)
    center, width = random.uniform(0, pairs), random.uniform(1.0, max(pairs / 5, 1.5))
    return logs + random.normal(0.0, size) * np.exp(-0.5 * ((np.arange(pairs) - center) / width) ** 2)


def shift(logs: np.ndarray, size: float, random: np.random.Generator) -> np.ndarray:
    """Slide the whole shape along the pairs: a ramp that starts earlier or later."""
    pairs = np.arange(len(logs))
    by = random.normal(0.0, size * len(logs) / 6)
    return np.interp(pairs - by, pairs, logs)


def stretch(logs: np.ndarray, size: float, random: np.random.Generator) -> np.ndarray:
    """Widen or narrow the shape around a random pair: a ramp that is less or more steep."""
    pairs = np.arange(len(logs))
    center, ratio = random.uniform(0, len(logs)), np.exp(random.normal(0.0, size))
    return np.interp(center + (pairs - center) * ratio, pairs, logs)


def power(logs: np.ndarray, size: float, random: np.random.Generator) -> np.ndarray:
    """Raise all factors to one power: more or less scaling everywhere it is."""
    return logs * np.exp(random.normal(0.0, size))


SHAPE_MOVES: tuple[Move, ...] = (segment, bump, shift, stretch, power)


def mutate(parent: Candidate, space: Space, random: np.random.Generator, probability: float = 0.3) -> Candidate:
    """Return a changed copy: one shape move for sure, others, the genes, n-hat and the attention factor by chance.

    Args:
        probability: of each gene to move by itself, of each further kind of move, and of n-hat and the attention
            factor to change.
    """
    scale = space.span
    logs, free = parent.logs, space.free_from(parent)
    logs, kept = logs[free:], logs[:free]
    first = int(random.integers(0, len(SHAPE_MOVES) + 1))
    for index, move in enumerate((*SHAPE_MOVES, None)):
        applies = index == first or (move is not None and random.random() < probability / len(SHAPE_MOVES))
        if not applies:
            continue
        size = scale * float(np.exp(random.uniform(np.log(SMALLEST_MOVE), np.log(LARGEST_MOVE))))
        logs = genes(logs, size, random, probability) if move is None else move(logs, size, random)
    start = int(_change(space.start_tokens, parent.start_tokens, random, probability))
    factor = _change(space.attention_factors, parent.attention_factor, random, probability)
    critical = None
    if space.critical_pairs:
        critical = int(_change(space.critical_pairs, free, random, probability))
    return space.legal(np.concatenate([kept, logs]), start, factor, critical)


def crossover(
    first: Candidate, other: Candidate, third: Candidate, space: Space, random: np.random.Generator
) -> Candidate:
    """Return a child of two or three parents.

    A run of pairs of another in the first; a crossfade from one to the other along the pairs; a blend of both, or of
    what lies beyond either; or the first moved along the difference of two others (differential evolution), which
    learns from the population in which directions the objective is flat.
    """
    free = min(space.free_from(first), space.free_from(other))
    a, b, c = first.logs[free:], other.logs[free:], third.logs[free:]
    pairs = len(a)
    kind = int(random.integers(0, 4))
    if kind == 0:
        start, stop = np.sort(random.integers(0, pairs + 1, 2))
        weight = np.zeros(pairs)
        weight[start:stop] = 1.0
        logs = a + weight * (b - a)
    elif kind == 1:
        center, width = random.uniform(0, pairs), random.uniform(0.5, max(pairs / 8, 1.0))
        logs = a + (b - a) / (1.0 + np.exp(-(np.arange(pairs) - center) / width))
    elif kind == 2:
        logs = a + random.uniform(-0.5, 1.5) * (b - a)
    else:
        logs = a + random.uniform(0.3, 1.0) * (b - c)
    start = first.start_tokens if random.random() < 0.5 else other.start_tokens
    factor = first.attention_factor if random.random() < 0.5 else other.attention_factor
    critical = None
    if space.critical_pairs:
        critical = space.free_from(first if random.random() < 0.5 else other)
    return space.legal(np.concatenate([first.logs[:free], logs]), start, factor, critical)


def _change(choices: Sequence[float], value: float, random: np.random.Generator, probability: float) -> float:
    """Return `value`, or by chance a neighbour in the list of choices or any other."""
    if len(choices) == 1 or random.random() >= probability:
        return choices[0] if len(choices) == 1 else value
    at = min(range(len(choices)), key=lambda index: abs(choices[index] - value))
    if random.random() < 0.5:
        at += 1 if random.random() < 0.5 else -1
    else:
        at = int(random.integers(0, len(choices)))
    return choices[min(max(at, 0), len(choices) - 1)]
