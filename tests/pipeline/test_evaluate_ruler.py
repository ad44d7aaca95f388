"""RULER-like tasks: exact lengths, answers that a reader of the prompt arrives at, and scores of known models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import planted
import pytest
import tiny
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

import longrope_kernels as lk
from longrope.errors import UsageError
from longrope.evaluate import ruler, ruler_words
from longrope.evaluate.prompts import Sample, ask
from longrope.run import EvaluationLog

TOKENIZER = tiny.tokenizer()
ROPE = lk.LongRope.pi(32, 1000.0, 128, 1024)
LENGTH = 2000


def words_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that marks the beginning and writes spaces as SentencePiece does, one before every text."""
    bare = Tokenizer(BPE(unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Metaspace()
    bare.decoder = decoders.Metaspace()
    texts = [" ".join((*ruler_words.NOUNS, *ruler_words.TOWNS)), "The magic number is 0123456789, VAR ="]
    bare.train_from_iterator(texts, BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>"], show_progress=False))
    made = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", unk_token="<unk>")
    made.add_bos_token = True
    return made


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EvaluationLog]:
    opened = EvaluationLog(tmp_path / "evaluations.jsonl")
    yield opened
    opened.close()


def texts(sample: Sample) -> tuple[str, list[str]]:
    """Return the prompt and the answers as text."""
    answers = [TOKENIZER.decode(list(sample.answer[a:b])).strip() for a, b in sample.spans]
    return TOKENIZER.decode(list(sample.prompt)), answers


@pytest.mark.parametrize("task", ruler.TASKS)
@pytest.mark.parametrize("length", [1000, 1001, 5000])
def test_a_prompt_with_its_answers_has_the_exact_length(task: str, length: int) -> None:
    for seed in range(3):
        assert ruler.sample(task, TOKENIZER, length, seed).length == length


@pytest.mark.parametrize("task", ruler.TASKS)
def test_lengths_are_exact_for_a_tokenizer_of_whole_words_too(task: str) -> None:
    tokenizer = words_tokenizer()
    sample = ruler.sample(task, tokenizer, 1500, 0)
    assert sample.length == 1500
    answer = tokenizer.decode(list(sample.answer[slice(*sample.spans[0])]))
    assert answer.strip() in tokenizer.decode(list(sample.prompt))


@pytest.mark.parametrize("task", ruler.TASKS)
def test_samples_differ_by_seed_and_length_and_are_the_same_again(task: str) -> None:
    one, again, other, longer = (
        ruler.sample(task, TOKENIZER, length, seed) for length, seed in ((1500, 0), (1500, 0), (1500, 1), (1600, 0))
    )
    assert one == again
    assert len({one.prompt, other.prompt, longer.prompt}) == 3
    assert len({one.answer, other.answer, longer.answer}) == 3


def needles(prompt: str) -> list[tuple[str, str]]:
    return re.findall(r"\n(?:The|A) magic number of the ([\w ]+) is (\d{7})\.\n", prompt)


def solve_niah(prompt: str) -> list[str]:
    hidden = dict(needles(prompt))
    question = prompt[prompt.index("\n\nWhat is") :]
    asked = re.findall(r"of the ([\w ]+?)(?: and|\?)", question.partition("?")[0] + "?")
    return [hidden[name] for name in asked]


def solve_multivalue(prompt: str) -> list[str]:
    (name,) = re.findall(r"numbers of the ([\w ]+), in the order", prompt)
    return [value for key, value in needles(prompt) if key == name]


def solve_vt(prompt: str) -> list[str]:
    (number,) = re.findall(r"have the value (\d+)", prompt)
    values: dict[str, str] = {}
    for name, value in re.findall(r"\nVAR (\w+) = (VAR \w+|\d+)\n", prompt):
        values[name] = values[value[4:]] if value.startswith("VAR ") else value
    return [name for name, value in values.items() if value == number]


def solve_cwe(prompt: str) -> list[str]:
    listed = prompt[: prompt.index("\n\nWhich")].split()
    often = {word for word in ruler_words.NOUNS if listed.count(word) > 1}
    return [word for word in dict.fromkeys(listed) if word in often]


def solve_fwe(prompt: str) -> list[str]:
    coded = Counter(re.findall(r"\b[a-z]{6}\b", prompt[: prompt.index("\n\nWhich")].split("them.\n\n")[-1]))
    ranked = coded.most_common(4)
    assert [count for _, count in ranked] == sorted({count for _, count in ranked}, reverse=True)
    return [word for word, _ in ranked[:3]]


def solve_qa(prompt: str) -> list[str]:
    (name,) = re.findall(r"In which town does ([\w ]+) live\?", prompt)
    return re.findall(rf"{name} works as a \w+ and has a house in (\w+)\.", prompt)


SOLVERS: dict[str, Callable[[str], list[str]]] = {
    **dict.fromkeys(("niah_single", "niah_multikey", "niah_multiquery"), solve_niah),
    "niah_multivalue": solve_multivalue,
    "vt": solve_vt,
    "cwe": solve_cwe,
    "fwe": solve_fwe,
    "qa": solve_qa,
}


@pytest.mark.parametrize("task", ruler.TASKS)
@pytest.mark.parametrize("length", [1200, 6000])
def test_a_reader_of_the_prompt_arrives_at_the_answers(task: str, length: int) -> None:
    for seed in range(5):
        prompt, answers = texts(ruler.sample(task, TOKENIZER, length, seed))
        assert SOLVERS[task](prompt) == answers


@pytest.mark.parametrize(
    ("task", "hidden", "asked"),
    [("niah_single", 1, 1), ("niah_multikey", 4, 1), ("niah_multivalue", 4, 4), ("niah_multiquery", 4, 4)],
)
def test_prompts_hold_exactly_the_needles_claimed(task: str, hidden: int, asked: int) -> None:
    prompt, answers = texts(ruler.sample(task, TOKENIZER, LENGTH, 0))
    found = needles(prompt)
    assert len(found) == hidden
    assert len({key for key, _ in found}) == (1 if task == "niah_multivalue" else hidden)
    assert len(answers) == asked
    assert len(set(answers)) == asked
    assert len(re.findall(r"\d{7}", prompt)) == hidden


def test_common_words_are_equally_common_and_the_rare_ones_rarer() -> None:
    for length in (1200, 6000):
        prompt, answers = texts(ruler.sample("cwe", TOKENIZER, length, 0))
        counts = Counter(prompt[prompt.index("them.\n\n") + 7 : prompt.index("\n\nWhich")].split())
        often = {counts[word] for word in answers}
        assert len(often) == 1
        rare = [count for word, count in counts.items() if word not in (*answers, *ruler.NOISE.split())]
        assert max(rare) < min(often)
        assert not set(ruler_words.NOUNS) & set(re.findall(r"\w+", ruler.NOISE.lower()))


def test_the_one_asked_for_is_among_many_and_anywhere() -> None:
    places = []
    for seed in range(8):
        prompt, _ = texts(ruler.sample("qa", TOKENIZER, 6000, seed))
        (name,) = re.findall(r"In which town does ([\w ]+) live\?", prompt)
        people = re.findall(r" ([\w ]+) works as a", prompt)
        assert len(people) == len(set(people)) > 50
        places.append(prompt.index(name) / len(prompt))
    assert min(places) < 0.4 < 0.6 < max(places)


@pytest.mark.parametrize("task", ruler.TASKS)
@pytest.mark.parametrize(("off_by", "share"), [(0, 1.0), (1, 0.0)])
def test_known_models_score_all_and_nothing(log: EvaluationLog, task: str, off_by: int, share: float) -> None:
    sample = ruler.sample(task, TOKENIZER, 1200, 0)
    record = ask(planted.loaded(planted.Planted(off_by)), log, ROPE, sample)
    assert record["found"] / record["answers"] == share
    assert record["retrieved"] == (share == 1.0)
    assert (record["nll"] < 1e-3) == (share == 1.0)


@pytest.mark.parametrize("task", ruler.TASKS)
def test_a_length_without_room_is_refused_with_what_would_do(task: str) -> None:
    with pytest.raises(
        UsageError, match=rf"--lengths: got 100 tokens, expected at least \d+, what {task} needs"
    ) as found:
        ruler.sample(task, TOKENIZER, 100, 0)
    needed = int(re.findall(r"at least (\d+)", str(found.value))[0])
    assert needed < 1000
