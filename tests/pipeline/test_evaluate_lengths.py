"""Perplexity by length: both ways of cutting a text equal a computation by hand, and every token counts once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional

import longrope_kernels as lk
from longrope.data import Split, Window
from longrope.errors import UsageError
from longrope.evaluate import Scorer
from longrope.evaluate.lengths import Cut, difference, forwards, non_overlapping, score, sliding
from longrope.models import LoadedModel
from longrope.run import EvaluationLog

Cutter = Callable[[Window, int], list[Cut]]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EvaluationLog]:
    opened = EvaluationLog(tmp_path / "evaluations.jsonl")
    yield opened
    opened.close()


def text_of(tokens: int) -> Window:
    return Window("text", "", tokens, 0, tuple(range(tokens)))


@pytest.mark.parametrize(("tokens", "length", "stride"), [(100, 10, 1), (100, 16, 5), (97, 32, 31), (50, 50, 7)])
def test_sliding_scores_every_token_once_with_a_window_before_it(tokens: int, length: int, stride: int) -> None:
    scored = []
    for window, start in sliding(text_of(tokens), length, stride):
        assert len(window.tokens) == length
        assert start == 0 or start >= length - stride
        scored += window.tokens[start:]
    assert scored == list(range(tokens))


@pytest.mark.parametrize(("tokens", "length", "count"), [(100, 10, 10), (99, 10, 9), (10, 10, 1)])
def test_non_overlapping_windows_lie_side_by_side(tokens: int, length: int, count: int) -> None:
    cuts = non_overlapping(text_of(tokens), length)
    assert [token for window, start in cuts for token in window.tokens[start:]] == list(range(count * length))


def test_a_window_as_long_as_the_text_is_the_same_in_both_ways() -> None:
    assert sliding(text_of(64), 64, 8) == non_overlapping(text_of(64), 64)


@torch.inference_mode()
def by_hand(loaded: LoadedModel, rope: lk.LongRope, text: tuple[int, ...], length: int, stride: int) -> list[float]:
    """Return the loss of every token, by the ordinary forward of each window, as the published loops do it."""
    loaded.use(rope)
    losses: list[float] = []
    end = 0
    for begin in [*range(0, len(text) - length, stride), len(text) - length]:
        ids = torch.tensor([text[begin : begin + length]])
        logits = loaded.model(ids, use_cache=False).logits[0]
        every = functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none").tolist()
        losses += every[max(end - begin, 1) - 1 :]
        end = begin + length
    return losses


@pytest.fixture(scope="module")
def text(split: Split) -> Window:
    return split.heldout[0]


@pytest.fixture(scope="module")
def yarn(loaded: LoadedModel) -> lk.LongRope:
    return loaded.extended(lk.RopeScaling.yarn(32, 1000.0, 2.0, tiny.ORIGINAL), tiny.TARGET)


@pytest.mark.parametrize(("length", "stride"), [(64, 16), (64, 63), (192, 32), (192, 20)])
def test_the_mean_is_that_of_a_recomputation_by_hand(
    loaded: LoadedModel, log: EvaluationLog, yarn: lk.LongRope, text: Window, length: int, stride: int
) -> None:
    row = score(Scorer(loaded, log), [sliding(text, length, stride)], yarn)
    expected = by_hand(loaded, yarn, text.tokens, length, stride)
    assert row["tokens"] == len(expected) == tiny.TARGET - 1
    assert row["nll"] == pytest.approx(np.mean(expected), rel=1e-4)
    assert row["full_context"] == pytest.approx(np.mean(expected[length - 1 :]), rel=1e-4)
    assert row["perplexity"] == pytest.approx(math.exp(row["nll"]))
    assert row["low"] < row["nll"] < row["high"]


def test_the_mean_over_non_overlapping_windows_is_that_of_each_alone(
    loaded: LoadedModel, log: EvaluationLog, yarn: lk.LongRope, text: Window
) -> None:
    row = score(Scorer(loaded, log), [non_overlapping(text, 64)], yarn)
    alone = [by_hand(loaded, yarn, text.tokens[first : first + 64], 64, 64) for first in range(0, 256, 64)]
    assert row["tokens"] == 4 * 63
    assert row["nll"] == pytest.approx(np.mean(alone), rel=1e-4)
    assert row["full_context"] is None


def test_a_window_runs_under_the_regime_of_its_own_length(
    loaded: LoadedModel, log: EvaluationLog, yarn: lk.LongRope, text: Window
) -> None:
    scorer = Scorer(loaded, log)
    short, long = ([score(scorer, [non_overlapping(text, length)], rope)["nll"] for rope in (yarn, loaded.rope)]
                   for length in (tiny.ORIGINAL, tiny.TARGET))  # fmt: skip
    assert short[0] == short[1]
    assert long[0] != long[1]


def test_every_window_is_scored_once_for_good(
    loaded: LoadedModel, log: EvaluationLog, yarn: lk.LongRope, text: Window
) -> None:
    new: list[int] = []
    cuts = [sliding(text, 128, 64)]
    rows = [score(Scorer(loaded, log, lambda length, seconds: new.append(length)), cuts, yarn) for _ in range(2)]
    assert rows[0] == rows[1]
    assert new == [128] * 3
    assert len(forwards(cuts, yarn)) == 3


def test_a_difference_is_paired_and_computes_nothing(
    loaded: LoadedModel, log: EvaluationLog, yarn: lk.LongRope, text: Window
) -> None:
    scorer = Scorer(loaded, log)
    cuts = [sliding(text, 192, 32)]
    one = score(scorer, cuts, yarn)
    assert difference(scorer, cuts, yarn, loaded.rope) is None
    other = score(scorer, cuts, loaded.rope)
    found, swapped = difference(scorer, cuts, yarn, loaded.rope), difference(scorer, cuts, loaded.rope, yarn)
    assert found["mean"] == pytest.approx(one["nll"] - other["nll"])
    assert found["low"] < found["mean"] < found["high"]
    assert swapped["mean"] == pytest.approx(-found["mean"])
    assert difference(scorer, cuts, yarn, yarn) == {"mean": 0.0, "low": 0.0, "high": 0.0}


@pytest.mark.parametrize("stride", [0, -1, 64])
def test_a_stride_that_leaves_tokens_out_is_refused(stride: int) -> None:
    with pytest.raises(
        UsageError, match=f"--stride: got {stride}, expected a number of tokens from 1 to below the length 64"
    ):
        sliding(text_of(256), 64, stride)


@pytest.mark.parametrize("cut", [sliding, non_overlapping])
def test_a_length_beyond_the_text_is_refused(cut: Cutter) -> None:
    with pytest.raises(UsageError, match="--lengths: got 512, expected from 2 to 256"):
        cut(text_of(256), 512, *((64,) if cut is sliding else ()))
