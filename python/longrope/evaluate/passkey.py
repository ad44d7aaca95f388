"""Passkey retrieval: a number hidden at some depth of a long filler text, asked for at its end.

The task of arXiv 2305.16300, and the same with several numbers of which all must be found. Scored in one forward, see
`prompts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import longrope_kernels as lk

from ..errors import refuse
from ..models import LoadedModel
from ..run import EvaluationLog
from .prompts import NOISE, Sample, answers, ask, bury, encoder, opening, too_short

TASK = "There is an important pass key hidden in the text below. Find it and remember it.\n\n"
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"

MULTI_TASK = "There are important pass keys hidden in the text below. Find them and remember them.\n\n"
MULTI_NEEDLE = "\nThe pass key of the {name} box is {key}. Remember it.\n"
MULTI_QUESTION = "\n\nWhat are the pass keys?"
MULTI_ANSWER = " The pass key of the {name} box is"
BOXES = ("red", "blue", "green", "yellow", "black", "white", "brown", "silver", "purple", "golden", "orange", "pink")


def passkey(
    loaded: LoadedModel,
    log: EvaluationLog,
    rope: lk.LongRope,
    length: int,
    depths: Sequence[float],
    seed: int = 0,
    on_new: Callable[[int, float], None] = lambda length, seconds: None,
    **about: Any,
) -> list[dict[str, Any]]:
    """Return one record per depth, each with `retrieved`.

    Args:
        length: tokens of the prompt and the answer together.
        depths: where the needle is, from 0 (beginning) to 1 (end).
        about: further fields for the log.
    """
    records = []
    for number, depth in enumerate(depths):
        sample = one_key(loaded.tokenizer, length, depth, seed + number)
        records.append(ask(loaded, log, rope, sample, on_new, depth=depth, **about))
    return records


def one_key(tokenizer: Any, length: int, depth: float, seed: int, option: str = "--passkey-depths") -> Sample:
    """Return the question for one number, `length` tokens with its answer."""
    prompt, answer = build(tokenizer, length, depth, seed, option)
    return Sample("passkey", tuple(prompt), tuple(answer), ((0, len(answer)),))


def build(
    tokenizer: Any, length: int, depth: float, seed: int, option: str = "--passkey-depths"
) -> tuple[list[int], list[int]]:
    """Return the tokens of the prompt and of the answer, `length` together; `option` is what an error names."""
    if not 0 <= depth <= 1:
        refuse(option, depth, "numbers between 0 and 1")
    number = str(int(np.random.default_rng([seed, length]).integers(10_000, 100_000)))
    encode = encoder(tokenizer)
    head, needle, question = opening(tokenizer, TASK), encode(NEEDLE.format(key=number)), encode(QUESTION)
    answer = encode(f" {number}")
    room = length - sum(map(len, (head, needle, question, answer)))
    if room < 0:
        refuse(option, f"{length} tokens", f"at least {length - room}, what passkey needs with this tokenizer")
    return [*head, *bury(encode(NOISE), [(depth, needle)], room), *question], answer


def many_keys(tokenizer: Any, length: int, depth: float, seed: int, count: int) -> Sample:
    """Return the question for `count` numbers, each of a box of another colour, `length` tokens with the answers.

    The first needle is at `depth`, the others follow at equal distances up to the end. They are asked for in an order
    of their own.
    """
    if not 2 <= count <= len(BOXES):
        refuse("--needles", count, f"an int between 2 and {len(BOXES)}")
    random = np.random.default_rng([seed, length, count])
    names = [BOXES[i] for i in random.permutation(len(BOXES))[:count]]
    keys = [str(key) for key in random.choice(90_000, count, replace=False) + 10_000]
    encode = encoder(tokenizer)
    needles = [
        (depth + (1 - depth) * number / count, encode(MULTI_NEEDLE.format(name=name, key=key)))
        for number, (name, key) in enumerate(zip(names, keys, strict=True))
    ]
    asked = [(MULTI_ANSWER.format(name=names[i]), keys[i]) for i in random.permutation(count)]
    parts = [(given if not i else f".{given}", f" {key}") for i, (given, key) in enumerate(asked)]
    head, question = opening(tokenizer, MULTI_TASK), encode(MULTI_QUESTION)
    answer, spans = answers(encode, MULTI_QUESTION, parts)
    room = length - sum(map(len, (head, question, answer, *(needle for _, needle in needles))))
    if room < 0:
        too_short(length, length - room, f"multi-needle with {count} needles")
    return Sample("multi-needle", (*head, *bury(encode(NOISE), needles, room), *question), tuple(answer), tuple(spans))
