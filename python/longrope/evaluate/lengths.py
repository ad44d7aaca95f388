"""Perplexity by length: texts cut into windows of L tokens, in the two ways that published figures use.

(a) `sliding`, the context-preserving stride of Press et al. (2021, arXiv 2012.15832). The window of L tokens moves by
    S; of every window but the first only the S new tokens are scored, each with L - S tokens before it or more. The
    first window scores all its tokens, so that each token of the text counts once. S = 256 is what YaRN and LongRoPE
    evaluate with. It costs L / S times the forwards of the other way.

(b) `non_overlapping`: one window after the other, all tokens scored, the early ones of a window with next to nothing
    before them. The usual figure of papers on quantisation, of lm-eval's rolling loss of documents, and, with only the
    second half of every window scored, of llama.cpp's perplexity. The loss is higher than the sliding one.

Nothing of one window serves the next. A cache of keys and values would save (a) most of its work and give other
numbers: above the first layer, states of the tokens that two windows share were computed from tokens which the second
window does not have. So every window is a forward of its own, from its first token on, under the regime of L tokens.

The last sliding window ends with the text and is as long as all others, so that it may score fewer than S tokens; a
rest too short for a non-overlapping window is left out. Where the text is L tokens, both are the same one window.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

import longrope_kernels as lk

from ..data import Window
from ..errors import refuse
from ..team import Forward
from .bootstrap import mean_interval
from .scoring import Scorer, blocks

STRIDE = 256
Cut = tuple[Window, int]
Sums = tuple[np.ndarray, np.ndarray]  # losses and numbers of tokens of neighbouring blocks


def sliding(text: Window, length: int, stride: int = STRIDE) -> list[Cut]:
    """Return the windows of `length` tokens, each `stride` after the last, and the index each is scored from.

    Args:
        stride: new tokens of a window, from 1 to `length` - 1: the first of a window has nothing before it.

    Examples:
        >>> text = Window("a", "", 7, 0, tuple(range(7)))
        >>> [(window.tokens, start) for window, start in sliding(text, 4, 2)]
        [((0, 1, 2, 3), 0), ((2, 3, 4, 5), 2), ((3, 4, 5, 6), 3)]
    """
    if not 1 <= stride < length:
        refuse("--stride", stride, f"a number of tokens from 1 to below the length {length}")
    tokens = _fits(text, length)
    cuts, end = [(_part(text, 0, length), 0)], length
    while end < tokens:
        last, end = end, min(end + stride, tokens)
        cuts.append((_part(text, end - length, length), length - (end - last)))
    return cuts


def non_overlapping(text: Window, length: int) -> list[Cut]:
    """Return one window of `length` tokens after the other, each scored from its beginning.

    Examples:
        >>> text = Window("a", "", 7, 0, tuple(range(7)))
        >>> [(window.tokens, start) for window, start in non_overlapping(text, 3)]
        [((0, 1, 2), 0), ((3, 4, 5), 0)]
    """
    return [(_part(text, first, length), 0) for first in range(0, _fits(text, length) - length + 1, length)]


def forwards(texts: Sequence[Sequence[Cut]], rope: lk.LongRope, **about: Any) -> list[Forward]:
    """Return what `score` will run, to be announced to other ranks."""
    return [Forward(window, rope, len(window.tokens), start, about) for text in texts for window, start in text]


def score(scorer: Scorer, texts: Sequence[Sequence[Cut]], rope: lk.LongRope, **about: Any) -> dict[str, Any]:
    """Score windows, each once for good, and return the mean loss with its interval.

    Args:
        texts: the windows of every document, from `sliding` or `non_overlapping`.
        about: further fields for the log.

    Returns:
        Loss in nats per token, perplexity, ends of the 95% interval of the loss (blocks of the scored tokens,
        resampled within documents), and `full_context`, the mean loss of what windows after the first of a sliding
        evaluation score; None where there is none.
    """
    for text in texts:
        for window, start in text:
            scorer.score(window, rope, len(window.tokens), start, **about)
    parts = _parts(scorer, texts, rope)
    assert parts is not None
    merged = [_joined(text) for text in parts]
    found = mean_interval(merged)
    late = [
        part for text, cuts in zip(parts, texts, strict=True) for part, (_, at) in zip(text, cuts, strict=True) if at
    ]
    return {
        "windows": sum(map(len, texts)),
        "tokens": int(sum(counts.sum() for _, counts in merged)),
        "nll": found.value,
        "low": found.low,
        "high": found.high,
        "perplexity": perplexity(found.value),
        "full_context": sum(sums.sum() for sums, _ in late) / sum(counts.sum() for _, counts in late) if late else None,
    }


def difference(
    scorer: Scorer, texts: Sequence[Sequence[Cut]], rope: lk.LongRope, other: lk.LongRope
) -> dict[str, float | None] | None:
    """Return the mean loss under `rope` minus that under `other`, blocks of both resampled together.

    None where the log lacks a score of either: nothing is computed.
    """
    ours, theirs = (_parts(scorer, texts, ladder) for ladder in (rope, other))
    if ours is None or theirs is None:
        return None
    pairs = [(_joined(one), _joined(two)) for one, two in zip(ours, theirs, strict=True)]
    found = mean_interval([(sums - others, counts) for (sums, counts), (others, _) in pairs])
    return {"mean": found.value, "low": found.low, "high": found.high}


def perplexity(nll: float) -> float:
    """Return exp of a mean loss in nats; of a hopeless one a very large number."""
    return math.exp(min(nll, 700.0))


def _fits(text: Window, length: int) -> int:
    if not 2 <= length <= len(text.tokens):
        refuse("--lengths", length, f"from 2 to {len(text.tokens)}, the tokens that are read of a document")
    return len(text.tokens)


def _part(text: Window, first: int, length: int) -> Window:
    return dataclasses.replace(text, offset=text.offset + first, tokens=text.tokens[first : first + length])


def _parts(scorer: Scorer, texts: Sequence[Sequence[Cut]], rope: lk.LongRope) -> list[list[Sums]] | None:
    """Return sums and counts of the blocks of every window, by document, or None where one is not in the log."""
    found: list[list[Sums]] = []
    for text in texts:
        found.append([])
        for window, start in text:
            record = scorer.known(window, rope, len(window.tokens), start)
            if record is None:
                return None
            found[-1].append(blocks(record, 0, record["length"]))
    return found


def _joined(parts: Sequence[Sums]) -> Sums:
    return np.concatenate([sums for sums, _ in parts]), np.concatenate([counts for _, counts in parts])
