"""Eight tasks after RULER that need no download: made from a seed, for any tokenizer and any length in tokens.

RULER (Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language Models?", arXiv 2404.06654)
asks for more than one needle: for one among others like it, for chains, and for what only the whole text knows. Names
are RULER's where a task means the same. The texts are ours, so scores are not to be set beside published ones:

| task            | what is asked                                              | how RULER differs                    |
|-----------------|------------------------------------------------------------|--------------------------------------|
| niah_single     | the number of one key, in repeated noise                   | the same, as niah_single_1           |
| niah_multikey   | the number of one of four keys                             | essays; here drawn sentences         |
| niah_multivalue | all four numbers of one key, in their order                | essays; any order                    |
| niah_multiquery | the numbers of four keys, one after the other              | essays; all at once, any order       |
| vt              | the five variables to which a chain assigns one number     | a solved example before; any order   |
| cwe             | the five words that appear most, in order of appearance    | ten of a numbered list; any order    |
| fwe             | the three most frequent of coded words (Zipf, exponent 2)  | any order                            |
| qa              | the town where one of many people lives                    | SQuAD and HotpotQA among distractors |

An order is asked for because then there is one right text, and one forward says whether greedy decoding writes it
(see `prompts`). A prompt with its answers has exactly the length asked for; what tasks made of whole words or facts
leave over is noise before them.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import ruler_words as words
from .prompts import NOISE, Encode, Sample, answers, bury, continuation, encoder, opening, too_short

KEYS, VALUES, HOPS = 4, 4, 4
COMMON, COMMON_SHARE = 5, 0.3  # words of cwe that appear most, and their share of the list
FREQUENT, CODED = 3, 40  # words that fwe asks for, and all that it has
Fill = Callable[[int, Encode], list[int]]


@dataclass(frozen=True)
class Text:
    """A task before it has its length in tokens.

    Attributes:
        head, question: what the prompt begins and ends with.
        parts: words that are given and the answer after them, each.
        needles: depth and text of each.
        filler: what they lie in.
        fill: makes the text between head and question, of as many tokens as it is given or a little fewer; more only
            where the task does not fit. None: needles in filler.
    """

    head: str
    question: str
    parts: Sequence[tuple[str, str]]
    needles: Sequence[tuple[float, str]] = ()
    filler: str = NOISE
    fill: Fill | None = None


def sample(task: str, tokenizer: Any, length: int, seed: int) -> Sample:
    """Return one question of a task, `length` tokens with its answers; the same for the same arguments.

    Raises:
        UsageError: a length the task does not fit into; one line that says what it needs.
    """
    text = TASKS[task](np.random.default_rng([seed, length, list(TASKS).index(task)]), length)
    encode = encoder(tokenizer)
    head, question = opening(tokenizer, text.head), encode(text.question)
    answer, spans = answers(encode, text.question, text.parts)
    needles = [(depth, encode(needle)) for depth, needle in text.needles]
    room = length - sum(map(len, (head, question, answer, *(tokens for _, tokens in needles))))
    body = [] if text.fill is None else text.fill(room, encode)
    if len(body) > room:
        too_short(length, length - room + len(body), task)
    filler = bury(encode(text.filler), needles, room - len(body))
    return Sample(task, (*head, *filler, *body, *question), tuple(answer), tuple(spans))


def niah_single(random: np.random.Generator, length: int) -> Text:
    return _needles(random, NOISE, keys=1, asked=1)


def niah_multikey(random: np.random.Generator, length: int) -> Text:
    return _needles(random, words.sentences(random, length), keys=KEYS, asked=1)


def niah_multiquery(random: np.random.Generator, length: int) -> Text:
    return _needles(random, words.sentences(random, length), keys=KEYS, asked=KEYS)


def _needles(random: np.random.Generator, filler: str, keys: int, asked: int) -> Text:
    """Return a text with one number for each of `keys`, of which the first `asked` are asked for."""
    names, numbers = words.keys(random, keys), words.numbers(random, keys)
    stems = [f"The magic number of the {name} is" for name in names]
    needles = [(random.random(), f"\n{stem} {number}.\n") for stem, number in zip(stems, numbers, strict=True)]
    named = " and of ".join(f"the {name}" for name in names[:asked])
    parts = [("" if not i else f". {stems[i]}", f" {numbers[i]}") for i in range(asked)]
    return Text(
        "Magic numbers are hidden in the text below. Remember them.\n\n",
        f"\n\nWhat is the magic number of {named}? {stems[0]}",
        parts,
        needles,
        filler,
    )


def niah_multivalue(random: np.random.Generator, length: int) -> Text:
    (name,), numbers = words.keys(random, 1), words.numbers(random, VALUES)
    needles = [
        (depth, f"\nA magic number of the {name} is {number}.\n")
        for depth, number in zip(sorted(random.random(VALUES)), numbers, strict=True)
    ]
    return Text(
        "Magic numbers are hidden in the text below. Remember them.\n\n",
        f"\n\nWhat are the {VALUES} magic numbers of the {name}, in the order of the text? The numbers are:",
        _listed(numbers),
        needles,
        words.sentences(random, length),
    )


def vt(random: np.random.Generator, length: int) -> Text:
    names = words.coded(random, HOPS + 1, 5, string.ascii_uppercase)
    (number,) = words.numbers(random, 1)
    values = [number, *(f"VAR {name}" for name in names)]
    needles = [
        (depth, f"\nVAR {name} = {value}\n")
        for depth, name, value in zip(sorted(random.random(HOPS + 1)), names, values, strict=False)
    ]
    return Text(
        "The text below assigns values to variables. Remember which variable has which value.\n\n",
        f"\n\nWhich {HOPS + 1} variables have the value {number}, in the order of the text? The variables are:",
        _listed(names, " VAR"),
        needles,
    )


def cwe(random: np.random.Generator, length: int) -> Text:
    common = [words.NOUNS[i] for i in random.choice(len(words.NOUNS), COMMON, replace=False)]
    rare = words.compounds(random)

    def fill(room: int, encode: Encode) -> list[int]:
        often = [continuation(encode, ".", f" {word}") for word in common]
        others: list[list[int]] = []
        left, repeats = room, 0
        step = round(COMMON * (1 / COMMON_SHARE - 1))
        while True:  # one more of each common word, and the rare ones that belong to it
            new = [continuation(encode, ".", f" {next(rare)}") for _ in range(step)]
            cost = sum(map(len, often)) + sum(map(len, new))
            if cost > left and repeats >= 2:
                break
            others += new
            left, repeats = left - cost, repeats + 1
        kinds = np.array([*np.repeat(np.arange(COMMON), repeats), *np.full(len(others), -1)])
        random.shuffle(kinds)
        # All are equally frequent: the first to appear takes the name of the first answer.
        order = {kind: i for i, kind in enumerate(dict.fromkeys(kinds[kinds >= 0].tolist()))}
        remaining = iter(others)
        return [token for kind in kinds.tolist() for token in (often[order[kind]] if kind >= 0 else next(remaining))]

    return Text(
        "Below is a list of words. Some appear more often than others. Remember them.\n\n",
        f"\n\nWhich {COMMON} words appear most often, in the order in which they first appear? The words are:",
        _listed(common),
        fill=fill,
    )


def fwe(random: np.random.Generator, length: int) -> Text:
    coded = words.coded(random, CODED, 6, string.ascii_lowercase)

    def fill(room: int, encode: Encode) -> list[int]:
        tokens = [continuation(encode, ".", f" {word}") for word in coded]

        def counts(most: int) -> list[int]:
            return [most // rank**2 for rank in range(1, CODED + 1)]

        def cost(most: int) -> int:
            return sum(count * len(token) for count, token in zip(counts(most), tokens, strict=True))

        most = (FREQUENT + 1) ** 2 + 2  # the fewest with which the first four ranks differ
        while cost(most + 1) <= room:
            most += 1
        kinds = np.repeat(np.arange(CODED), counts(most))
        random.shuffle(kinds)
        return [token for kind in kinds.tolist() for token in tokens[kind]]

    return Text(
        "Below is a text of coded words. Remember how often each of them appears.\n\n",
        f"\n\nWhich {FREQUENT} coded words appear most often, the most frequent first? The words are:",
        _listed(coded[:FREQUENT]),
        fill=fill,
    )


def qa(random: np.random.Generator, length: int) -> Text:
    people = words.people(random)

    def fact(name: str) -> tuple[str, str]:
        town, job = (choices[random.integers(len(choices))] for choices in (words.TOWNS, words.JOBS))
        return f" {name} works as a {job} and has a house in {town}.", town

    name = next(people)
    asked, town = fact(name)

    def fill(room: int, encode: Encode) -> list[int]:
        facts = [continuation(encode, ".", asked)]
        left = room - len(facts[0])
        for other in people:
            facts.append(continuation(encode, ".", fact(other)[0]))
            left -= len(facts[-1])
            if left < 0:
                break
        facts.pop()
        at = int(random.integers(len(facts)))
        facts[0], facts[at] = facts[at], facts[0]
        return list(itertools.chain.from_iterable(facts))

    return Text(
        "Below are facts about many people. Remember them.\n\n",
        f"\n\nIn which town does {name} live? {name} lives in the town of",
        [("", f" {town}")],
        fill=fill,
    )


def _listed(found: Sequence[str], before: str = "") -> list[tuple[str, str]]:
    """Number the answers, one a line: after a comma, models would rather say "and"."""
    return [(f"\n{i}.{before}", f" {one}") for i, one in enumerate(found, 1)]


TASKS: dict[str, Callable[[np.random.Generator, int], Text]] = {
    task.__name__: task for task in (niah_single, niah_multikey, niah_multivalue, niah_multiquery, vt, cwe, fwe, qa)
}
