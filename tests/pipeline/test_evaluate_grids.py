"""Grids of retrieval: prompts hold what they claim, a perfect model finds all, and intervals are Wilson's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import planted
import pytest
import tiny

import longrope_kernels as lk
from longrope.errors import UsageError
from longrope.evaluate.grids import questions, row
from longrope.evaluate.passkey import many_keys, one_key
from longrope.evaluate.prompts import Sample, ask
from longrope.run import EvaluationLog

TOKENIZER = tiny.tokenizer()
ROPE = lk.LongRope.pi(32, 1000.0, 128, 1024)
DEPTHS = (0.0, 0.5, 1.0)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EvaluationLog]:
    opened = EvaluationLog(tmp_path / "evaluations.jsonl")
    yield opened
    opened.close()


def measured(log: EvaluationLog, model: Any, task: str, trials: int = 2) -> dict[str, Any]:
    stand_in = planted.loaded(model)

    def asking(sample: Sample, **about: Any) -> dict[str, Any]:
        return ask(stand_in, log, ROPE, sample, **about)

    return row(asking, stand_in, task, 700, DEPTHS, trials, 3, 0)


@pytest.mark.parametrize("length", [500, 501, 1024])
@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("depth", [0.0, 0.6, 1.0])
def test_several_needles_with_their_answers_have_the_exact_length(length: int, count: int, depth: float) -> None:
    if length < 1024 and count > 3:
        count = 3
    sample = many_keys(TOKENIZER, length, depth, 0, count)
    assert sample.length == len(sample.prompt) + len(sample.answer) == length


def test_every_number_is_in_the_prompt_once_and_asked_for_under_its_own_name() -> None:
    sample = many_keys(TOKENIZER, 1024, 0.0, 3, 4)
    prompt, answer = TOKENIZER.decode(list(sample.prompt)), TOKENIZER.decode(list(sample.answer))
    hidden = dict(re.findall(r"The pass key of the (\w+) box is (\d{5})\. Remember", prompt))
    asked = re.findall(r"The pass key of the (\w+) box is (\d{5})", answer)
    assert len(hidden) == len(set(hidden.values())) == 4
    assert dict(asked) == hidden
    spans = [TOKENIZER.decode(list(sample.answer[a:b])).strip() for a, b in sample.spans]
    assert spans == [key for _, key in asked]


def test_the_first_needle_is_at_the_depth_and_the_others_follow_it() -> None:
    for depth in (0.0, 0.5):
        prompt = TOKENIZER.decode(list(many_keys(TOKENIZER, 4096, depth, 1, 4).prompt))
        places = [found.start() / len(prompt) for found in re.finditer(r"\d{5}\. Remember it", prompt)]
        assert places == pytest.approx([depth + (1 - depth) * i / 4 for i in range(4)], abs=0.07)


def test_keys_differ_by_cell_and_trial_and_are_the_same_again() -> None:
    stand_in = planted.loaded(planted.Planted())
    for task in ("passkey", "multi-needle"):
        first, second = (list(questions(stand_in, task, 700, DEPTHS, 3, 3, 0)) for _ in range(2))
        assert first == second
        answers = Counter(sample.answer for _, _, sample in first)
        assert len(first) == 9
        assert max(answers.values()) == 1


@pytest.mark.parametrize("task", ["passkey", "multi-needle"])
def test_a_model_that_is_always_right_finds_everything(log: EvaluationLog, task: str) -> None:
    found = measured(log, planted.Planted(), task)
    assert [cell["retrieved"] for cell in found["cells"]] == [2, 2, 2]
    assert (found["share"], found["retrieved"], found["trials"]) == (1.0, 6, 6)
    assert found["found"] == found["answers"] == (6 if task == "passkey" else 18)
    assert found["low"] == pytest.approx(6 / (6 + 1.96**2), rel=1e-3)
    assert found["high"] == 1.0
    assert found["nll"] < 1e-3


@pytest.mark.parametrize("task", ["passkey", "multi-needle"])
def test_a_model_that_is_always_wrong_finds_nothing(log: EvaluationLog, task: str) -> None:
    found = measured(log, planted.Planted(off_by=1), task)
    assert [cell["retrieved"] for cell in found["cells"]] == [0, 0, 0]
    assert (found["share"], found["found"], found["low"]) == (0.0, 0, 0.0)
    assert 0 < found["high"] < 0.5
    assert found["nll"] > 10


def test_two_needles_of_three_are_not_all(log: EvaluationLog) -> None:
    sample = many_keys(TOKENIZER, 700, 0.0, 0, 3)
    last = len(sample.prompt) + sample.spans[-1][0]
    record = ask(planted.loaded(planted.Planted(until=last)), log, ROPE, sample)
    assert (record["found"], record["answers"], record["retrieved"]) == (2, 3, False)


def test_words_between_the_answers_are_given_not_asked_for(log: EvaluationLog) -> None:
    sample = many_keys(TOKENIZER, 700, 0.0, 0, 2)

    class OnlyDigits(planted.Planted):
        def body(self, input_ids: Any, use_cache: bool) -> Any:
            found = super().body(input_ids, use_cache)
            for i in range(len(sample.answer)):
                if not any(a <= i < b for a, b in sample.spans):
                    found.last_hidden_state[0, len(sample.prompt) + i - 1] = 0.0
            return found

    assert ask(planted.loaded(OnlyDigits()), log, ROPE, sample)["retrieved"]


def test_a_question_is_asked_once(log: EvaluationLog) -> None:
    new: list[int] = []
    known: list[int] = []
    sample = one_key(TOKENIZER, 600, 0.5, 0)
    for _ in range(2):
        ask(planted.loaded(planted.Planted()), log, ROPE, sample, lambda n, _: new.append(n), known.append)
    assert (new, known) == ([600], [600])


@pytest.mark.parametrize("count", [0, 1, 13])
def test_a_number_of_needles_without_names_is_refused(count: int) -> None:
    with pytest.raises(UsageError, match=f"--needles: got {count}, expected an int between 2 and 12"):
        many_keys(TOKENIZER, 1024, 0.0, 0, count)


def test_a_length_without_room_is_refused_with_what_would_do() -> None:
    with pytest.raises(UsageError, match=r"--lengths: got 300 tokens, expected at least (\d+)") as refused:
        many_keys(TOKENIZER, 300, 0.0, 0, 3)
    needed = int(re.findall(r"at least (\d+)", str(refused.value))[0])
    assert many_keys(TOKENIZER, needed, 0.0, 0, 3).length == needed
