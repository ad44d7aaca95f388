"""Passkey retrieval: prompts of the exact length, found by a model that copies, not by one that does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

import longrope_kernels as lk
from longrope.errors import UsageError
from longrope.evaluate import passkey
from longrope.evaluate.passkey import build
from longrope.run import EvaluationLog

TOKENIZER = tiny.tokenizer()
ROPE = lk.LongRope.pi(32, 1000.0, 128, 1024)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EvaluationLog]:
    opened = EvaluationLog(tmp_path / "evaluations.jsonl")
    yield opened
    opened.close()


class Copier(torch.nn.Module):
    """A language model that looks for the last eight tokens further back and says what followed there."""

    base_model_prefix = "body"
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=256))

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach = reach

    def body(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        tokens = input_ids[0].tolist()
        guesses = [self.follow(tokens[: end + 1]) for end in range(len(tokens))]
        return SimpleNamespace(last_hidden_state=torch.nn.functional.one_hot(torch.tensor([guesses]), 256).float())

    def follow(self, read: list[int], context: int = 8) -> int:
        tail = read[-context:]
        for end in range(len(read) - 1, max(len(read) - self.reach, context), -1):
            if read[end - context : end] == tail:
                return read[end]
        return 0

    def get_output_embeddings(self) -> torch.nn.Module:
        return torch.nn.Identity()


def with_copier(reach: int) -> Any:
    return SimpleNamespace(model=Copier(reach), tokenizer=TOKENIZER, use=lambda rope: None)


@pytest.mark.parametrize("length", [188, 189, 400, 1024])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_prompt_and_answer_have_the_exact_length(length: int, depth: float) -> None:
    prompt, answer = build(TOKENIZER, length, depth, seed=0)
    assert len(prompt) + len(answer) == length


def test_the_key_is_in_the_prompt_twice_and_is_the_answer() -> None:
    prompt, answer = build(TOKENIZER, 600, 0.5, seed=1)
    key = TOKENIZER.decode(answer).strip()
    assert key.isdigit()
    assert len(key) == 5
    assert TOKENIZER.decode(prompt).count(key) == 2


def test_depth_says_where_the_needle_is() -> None:
    places = []
    for depth in (0.0, 0.5, 1.0):
        text = TOKENIZER.decode(build(TOKENIZER, 1000, depth, seed=1)[0])
        places.append(text.index("The pass key is") / len(text))
    assert places[0] < 0.15
    assert places[1] == pytest.approx(0.5, abs=0.05)
    assert places[2] > 0.8


def test_keys_differ_by_seed_and_are_the_same_again() -> None:
    keys = [tuple(build(TOKENIZER, 600, 0.5, seed)[1]) for seed in (0, 1, 2, 0)]
    assert len(set(keys)) == 3
    assert keys[0] == keys[3]


def test_a_model_that_copies_finds_the_key_at_every_depth(log: EvaluationLog) -> None:
    records = passkey(with_copier(10_000), log, ROPE, 600, (0.0, 0.5, 1.0))
    assert [record["retrieved"] for record in records] == [True] * 3
    assert all(record["guessed"] == record["expected"] for record in records)


def test_a_model_that_reaches_no_further_than_half_finds_it_only_near_the_end(log: EvaluationLog) -> None:
    records = passkey(with_copier(300), log, ROPE, 600, (0.0, 0.1, 1.0))
    assert [record["retrieved"] for record in records] == [False, False, True]


def test_a_key_with_one_wrong_digit_is_not_found(log: EvaluationLog) -> None:
    model = with_copier(10_000)
    right = model.model.follow
    model.model.follow = lambda read: 0 if len(read) == 599 else right(read)
    (record,) = passkey(model, log, ROPE, 600, (0.5,))
    assert record["guessed"][:-1] == record["expected"][:-1]
    assert not record["retrieved"]


def test_a_retrieval_happens_once(log: EvaluationLog) -> None:
    new: list[int] = []
    for _ in range(2):
        passkey(with_copier(10_000), log, ROPE, 600, (0.5,), on_new=lambda length, seconds: new.append(length))
    assert new == [600]


def test_a_length_without_room_for_the_task_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--passkey-depths: got 100 tokens, expected at least 188"):
        build(TOKENIZER, 100, 0.5, 0)


def test_a_depth_outside_the_text_is_refused(log: EvaluationLog) -> None:
    with pytest.raises(UsageError, match=r"--passkey-depths: got 1\.5, expected numbers between 0 and 1"):
        passkey(with_copier(10), log, ROPE, 600, (1.5,))
