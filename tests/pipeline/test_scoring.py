"""One evaluation: its sums are those of stock transformers, it happens once, and it is logged."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

import longrope_kernels as lk
from longrope.data import Split, Window
from longrope.evaluate import Scorer
from longrope.evaluate.scoring import block_sums, block_tokens, blocks, bucket_tokens, mean_nll
from longrope.models import LoadedModel
from longrope.run import EvaluationLog


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EvaluationLog]:
    opened = EvaluationLog(tmp_path / "evaluations.jsonl")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def window(split: Split) -> Window:
    return split.heldout[0]


@pytest.fixture(scope="module")
def yarn(loaded: LoadedModel) -> lk.LongRope:
    scaling = lk.RopeScaling.yarn(32, 1000.0, 2.0, tiny.ORIGINAL, attention_factor=1.0)
    return loaded.extended(scaling, tiny.TARGET)


@torch.inference_mode()
def stock_losses(folder: Path, rope: lk.LongRope | None, tokens: tuple[int, ...]) -> np.ndarray:
    """Return the loss of every token but the first, by transformers alone."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if rope is not None:
        config = copy.deepcopy(model.config)
        config.rope_parameters = rope.to_config()
        config.max_position_embeddings = rope.max_position_embeddings
        model = LlamaForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    ids = torch.tensor([tokens])
    logits = model(ids, use_cache=False).logits[0, :-1]
    return functional.cross_entropy(logits, ids[0, 1:], reduction="none").double().numpy()


@pytest.mark.parametrize("method", ["original", "yarn"])
@pytest.mark.parametrize("length", [tiny.ORIGINAL, tiny.TARGET])
def test_block_sums_equal_a_direct_cross_entropy_with_stock_transformers(
    loaded: LoadedModel,
    log: EvaluationLog,
    window: Window,
    yarn: lk.LongRope,
    model_folder: Path,
    method: str,
    length: int,
) -> None:
    rope = loaded.rope if method == "original" else yarn
    record = Scorer(loaded, log).score(window, rope, length)
    direct = stock_losses(model_folder, None if method == "original" else yarn, window.tokens[:length])
    size = record["block_tokens"]
    sums = [direct[max(first - 1, 0) : first + size - 1].sum() for first in range(0, length, size)]
    np.testing.assert_allclose(record["block_nll"], sums, rtol=2e-4)
    assert record["nll"] == pytest.approx(direct.mean(), rel=2e-4)
    for first, last in itertools.pairwise(range(0, length + 1, bucket_tokens(tiny.ORIGINAL))):
        assert mean_nll([record], first, last) == pytest.approx(direct[max(first - 1, 0) : last - 1].mean(), rel=2e-4)


def test_scoring_from_a_position_gives_the_same_losses_there(
    loaded: LoadedModel, log: EvaluationLog, window: Window, yarn: lk.LongRope
) -> None:
    scorer = Scorer(loaded, log)
    whole, late = scorer.score(window, yarn), scorer.score(window, yarn, start=tiny.ORIGINAL)
    size = whole["block_tokens"]
    np.testing.assert_allclose(late["block_nll"], whole["block_nll"][tiny.ORIGINAL // size :], rtol=1e-5)
    assert late["nll"] == pytest.approx(mean_nll([whole], tiny.ORIGINAL, tiny.TARGET), rel=1e-6)


def test_an_evaluation_happens_once(loaded: LoadedModel, log: EvaluationLog, window: Window, yarn: lk.LongRope) -> None:
    forwards: list[int] = []
    known: list[int] = []
    scorer = Scorer(loaded, log, lambda length, seconds: forwards.append(length), known.append)
    first = scorer.score(window, yarn, stage="search")
    assert scorer.score(window, yarn, stage="heldout") == first
    reopened = Scorer(loaded, EvaluationLog(log.path), lambda length, seconds: forwards.append(length), known.append)
    assert reopened.score(window, yarn) == first
    assert forwards == [tiny.TARGET]
    assert known == [tiny.TARGET] * 2


@pytest.mark.parametrize("what", ["rope", "length", "start", "window"])
def test_whatever_changes_the_result_is_another_evaluation(
    loaded: LoadedModel, log: EvaluationLog, window: Window, yarn: lk.LongRope, split: Split, what: str
) -> None:
    arguments: dict[str, Any] = {"window": window, "rope": yarn, "length": tiny.TARGET, "start": 0}
    other = {"rope": loaded.rope, "length": 192, "start": 64, "window": split.search[0]}[what]
    scorer = Scorer(loaded, log)
    keys = {scorer.score(**arguments)["key"], scorer.score(**(arguments | {what: other}))["key"]}
    assert len(keys) == 2


def test_scores_do_not_depend_on_what_was_scored_before(
    loaded: LoadedModel, tmp_path: Path, window: Window, yarn: lk.LongRope
) -> None:
    hashes = []
    for name, order in (("a", (yarn, loaded.rope)), ("b", (loaded.rope, yarn))):
        scorer = Scorer(loaded, EvaluationLog(tmp_path / name))
        hashes.append([scorer.score(window, rope)["nll_sha256"] for rope in order])
    assert hashes[0] == hashes[1][::-1]


def test_a_short_text_under_the_ladder_is_the_original_bit_for_bit(
    loaded: LoadedModel, log: EvaluationLog, window: Window, yarn: lk.LongRope
) -> None:
    scorer = Scorer(loaded, log)
    ours, original = (scorer.score(window, rope, tiny.ORIGINAL) for rope in (yarn, loaded.rope))
    assert ours["nll_sha256"] == original["nll_sha256"]
    assert ours["key"] != original["key"]


@pytest.mark.parametrize(("start", "length"), [(0, 100), (0, 96), (40, 100), (32, 33), (1, 2)])
def test_blocks_count_every_scored_token_once(start: int, length: int) -> None:
    losses = np.arange(1.0, 1.0 + length - max(start, 1))
    record = {
        "block_nll": block_sums(losses, max(start, 1), 32),
        **{"block_tokens": 32, "start": start, "length": length},
    }
    sums, counts = blocks(record, 0, length)
    assert sums.sum() == losses.sum()
    assert counts.sum() == len(losses)
    assert mean_nll([record], 0, length) == losses.mean()


def test_position_buckets_of_several_documents_weigh_tokens_equally() -> None:
    records = [
        {"block_nll": [31.0 * loss, 32.0 * loss], "block_tokens": 32, "start": 0, "length": 64} for loss in (1.0, 2.0)
    ]
    assert mean_nll(records, 0, 32) == mean_nll(records, 32, 64) == 1.5
    assert np.isnan(mean_nll(records, 64, 96))


def test_blocks_divide_buckets() -> None:
    for original in (8192, 4096, 2048, 131072, 128, 1000, 6):
        assert bucket_tokens(original) % block_tokens(original) == 0
    assert (bucket_tokens(8192), block_tokens(8192)) == (2048, 64)


def test_a_window_is_named_by_its_text_and_place(window: Window) -> None:
    assert window.describe() != dataclasses.replace(window, tokens=window.tokens[::-1]).describe()
    assert window.describe() != dataclasses.replace(window, sha256="0").describe()
