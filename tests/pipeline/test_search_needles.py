"""LongRoPE2's objective: exact lengths with any tokenizer, only the answer counts, the same from the same seed."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import Finished
from test_killed_search import STOPPED_WHILE_WRITING, logged
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from longrope.data import Split, Window
from longrope.errors import UsageError
from longrope.evaluate.scoring import Scorer
from longrope.loss import token_nll
from longrope.models import LoadedModel
from longrope.run import EvaluationLog
from longrope.search.needles import NEAR_START, NEEDLE, QUESTION, NeedleLoss

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:?-\n▁"


def marked() -> PreTrainedTokenizerFast:
    """A tokenizer as SentencePiece's: a mark before every text and for every space, and a token at the beginning."""
    vocabulary = {letter: index for index, letter in enumerate(["<s>", *LETTERS])}
    merges = []
    for pair in itertools.product("▁", "abcdefghijklmnopqrstuvwxyz0123456789"):
        vocabulary["".join(pair)] = len(vocabulary)
        merges.append(pair)
    bare = Tokenizer(models.BPE(vocabulary, merges))
    bare.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bare.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    bare.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>")


def whole_words() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for every number and word of ours, each with the space before it."""
    bare = Tokenizer(models.WordLevel({"?": 0}, "?"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=bare)


TOKENIZERS: dict[str, Callable[[], Any]] = {"bytes": tiny.tokenizer, "marked": marked, "words": whole_words}


def windows(tokenizer: Any, count: int = 2, length: int = 4000) -> tuple[Window, ...]:
    ids = tokenizer("a b c d e " * length)["input_ids"][:length]
    return tuple(Window(f"text{number}", f"{number}", length, 0, tuple(ids)) for number in range(count))


def objective(name: str = "bytes", length: int = 1000, **changes: Any) -> NeedleLoss:
    tokenizer = TOKENIZERS[name]()
    return NeedleLoss(windows(tokenizer), length, tokenizer, **{"needles": 3, **changes})


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("length", [500, 501, 777])
def test_every_sample_has_exactly_the_length_asked_for_and_ends_with_the_answer(name: str, length: int) -> None:
    made = objective(name, length)
    assert len(made.samples) == 6
    for sample in made.samples:
        assert len(sample.window.tokens) == sample.length == length
        assert 0 < length - sample.start <= 8
        assert sample.window.tokens[0] == made.windows[0].tokens[0], "the beginning-of-sequence token stays first"


@pytest.mark.parametrize("name", ["bytes", "marked"])
def test_the_answer_is_said_near_the_start_and_nowhere_else(name: str) -> None:
    made = objective(name, 2000)
    for sample in made.samples:
        text = made.tokenizer.decode(sample.window.tokens)
        answer = made.tokenizer.decode(sample.window.tokens[sample.start :]).strip()
        assert answer.isdigit()
        assert len(answer) == 6
        first, last = text.index(answer), text.rindex(answer)
        assert text.count(answer) == 2
        assert last == len(text) - len(answer)
        assert first < (NEAR_START + 0.06) * len(text)
        key = text[: text.index(f" is {answer}")].rsplit("the number of the ", 1)[1]
        assert text.endswith(f"the number of the {key} is {answer}")


def test_the_rest_is_the_document(loaded: LoadedModel, split: Split) -> None:
    made = NeedleLoss(split.search, 256, loaded.tokenizer)
    note = re.escape(NEEDLE).replace(r"\{key\}", "[a-z ]+").replace(r"\{value\}", "[0-9]+")
    for number, sample in enumerate(made.samples):
        document = loaded.tokenizer.decode(split.search[number // 2].tokens)
        text = loaded.tokenizer.decode(sample.window.tokens)
        rest, found = re.subn(note, "", text[: text.rindex(QUESTION.split("{")[0])])
        assert found == 1
        assert len(rest) > 30
        assert document.startswith(rest)


def test_the_same_seed_asks_the_same_and_another_one_another(loaded: LoadedModel) -> None:
    assert objective().samples == objective().samples
    assert objective(seed=1).samples != objective().samples
    names = [sample.window.name for sample in objective().samples]
    assert len(names) == len(set(names)) == 6


def test_a_screen_asks_the_same_about_less_text() -> None:
    whole = objective()
    short = whole.shortened(600, 1)
    assert len(short.samples) == 3
    for one, other in zip(short.samples, whole.samples, strict=False):
        assert one.length == 600
        assert one.window.tokens[one.start :] == other.window.tokens[other.start :]


def test_a_length_without_room_for_the_question_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--objective: got needle at 100 tokens, expected at least \d+ tokens"):
        _ = objective(length=100).samples


def test_only_the_answer_counts(loaded: LoadedModel, split: Split, tmp_path: Path) -> None:
    sample = NeedleLoss(split.search, 256, loaded.tokenizer).samples[0]
    log = EvaluationLog(tmp_path / "log.jsonl")
    record = Scorer(loaded, log).score(sample.window, loaded.rope, sample.length, sample.start)
    every = token_nll(loaded.model, torch.tensor(sample.window.tokens))
    assert record["nll"] == pytest.approx(float(every[sample.start - 1 :].mean()), rel=1e-5)
    log.close()


def test_the_interval_resamples_whole_answers() -> None:
    made = objective()
    one = [{"nll": value} for value in (1.0, 2.0, 3.0, 1.0, 2.0, 3.0)]
    other = [{"nll": value - 0.5} for value in (1.0, 2.0, 3.0, 1.0, 2.0, 3.0)]
    same = made.difference(one, other)
    assert (same.mean, same.low, same.high) == (0.5, 0.5, 0.5)
    assert (same.blocks, same.documents) == (6, 2)
    apart = made.difference(one, [{"nll": 2.0}] * 6)
    assert apart.mean == pytest.approx(0.0)
    assert apart.low < 0 < apart.high


@pytest.fixture(scope="module")
def arguments(model_folder: Path, text_folder: Path) -> list[str]:
    return [
        *("search", str(model_folder), "--to", "256", "--text", str(text_folder), "--dtype", "fp32", "--threads", "1"),
        *("--population", "9", "--iterations", "2", "--mutations", "3", "--crossovers", "2", "--parents", "4"),
        *("--method", "longrope2", "--screen", "240", "--screen-documents", "1", "--screen-keep", "0.5"),
    ]


def test_longrope2_searches_by_needles_and_goes_on_without_repeating_anything(
    arguments: list[str], command: Callable[..., Finished], tmp_path: Path
) -> None:
    done = command(*arguments, "--run-dir", tmp_path)
    assert (done.code, done.err) == (0, "")
    assert "Search plan: LongRoPE2, 256 tokens of 2 documents, 2 needles in each, scored on the answers" in done.out
    records = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert {(record["stage"], record["length"]) for record in records} == {("search", 256), ("screen", 240)}
    assert len({record["window"] for record in records}) == 4

    search = json.loads((tmp_path / "search.json").read_text())
    assert (search["method"], search["objective"], search["space"]["kind"]) == ("LongRoPE2", "needle", "critical")
    winner = json.loads((tmp_path / "factors/winner.json").read_text())
    mine = [r for r in records if r["stage"] == "search" and r["candidate"] == search["winner"]["candidate"]]
    assert len(mine) == 4
    assert winner["objective"]["value"] == pytest.approx(np.mean([record["nll"] for record in mine]))
    assert winner["objective"]["what"].endswith("answers about needles")

    kept = {file: (tmp_path / file).read_bytes() for file in ("evaluations.jsonl", "search.json")}
    assert command(*arguments, "--run-dir", tmp_path).code == 0
    assert {file: (tmp_path / file).read_bytes() for file in kept} == kept


def test_a_search_by_needles_that_is_killed_goes_on_to_the_same_winner(
    arguments: list[str], command: Callable[..., Finished], tmp_path: Path
) -> None:
    """SIGKILL twice, each time in the middle of a line: in the seeds, and among children of the first generation."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert command(*arguments, "--run-dir", whole).code == 0
    for line, lines in ((6, 5), (45, 49)):
        program = STOPPED_WHILE_WRITING.format(line=line, bytes=40, then="os.kill(os.getpid(), signal.SIGKILL)")
        killed = [sys.executable, "-c", program, *arguments, "--run-dir", str(broken)]
        assert subprocess.run(killed, stdout=subprocess.DEVNULL, check=False).returncode == -signal.SIGKILL
        log = (broken / "evaluations.jsonl").read_bytes()
        assert (log.count(b"\n"), len(log) - log.rindex(b"\n") - 1) == (lines, 40)
    done = command(*arguments, "--run-dir", broken)
    assert (done.code, done.err) == (0, "")
    assert "49 evaluations are there and are not repeated" in done.out
    after = logged(broken)
    assert (broken / "evaluations.jsonl").read_bytes().startswith(log[: log.rindex(b"\n") + 1])
    # The same forwards in the same order, none twice, none more.
    assert [(one["key"], one["nll_sha256"]) for one in after] == [(o["key"], o["nll_sha256"]) for o in logged(whole)]
    ours, theirs = (json.loads((folder / "search.json").read_text()) for folder in (broken, whole))
    ours.pop("seconds"), theirs.pop("seconds")
    assert ours == theirs
    winners = [json.loads((folder / "factors/winner.json").read_text()) for folder in (broken, whole)]
    assert winners[0]["rope"] == winners[1]["rope"]
    assert winners[0]["candidate"]["critical_pair"] is not None or winners[0]["origin"].startswith("seed ")


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("--method", "longrope3", "--method: got longrope3, expected one of longrope, longrope2"),
        ("--objective", "code", "--objective: got code, expected one of text, needle"),
        ("--space", "some", "--space: got some, expected one of all, critical"),
        ("--needles", 0, "--needles: got 0, expected an int >= 1"),
        ("--score-from", 128, "--score-from: got 128, expected --objective text beside it: needles are scored on"),
        ("--budget", 5, "--budget: got 5, expected at least 24: pi, ntk, yarn, critical pair 7"),
    ],
)
def test_bad_choices_are_one_line(
    arguments: list[str], command: Callable[..., Finished], tmp_path: Path, option: str, value: object, line: str
) -> None:
    done = command(*arguments, "--run-dir", tmp_path / "run", option, value)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith(f"longrope: {line}")
