"""Passkey retrieval: a number hidden at some depth of a long filler text, asked for at its end.

The task of arXiv 2305.16300, scored in one forward per depth: every token of the answer must be the likeliest one
given all before it, which is what greedy decoding would have to produce.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import longrope_kernels as lk

from ..errors import refuse
from ..loss import next_tokens
from ..models import LoadedModel
from ..run import EvaluationLog, digest, now

TASK = "There is an important pass key hidden in the text below. Find it and remember it.\n\n"
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"


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
        if not 0 <= depth <= 1:
            refuse("--passkey-depths", depth, "numbers between 0 and 1")
        prompt, answer = build(loaded.tokenizer, length, depth, seed + number)
        key = digest({"passkey": [prompt, answer], "rope": rope.to_dict()})
        record = log.get(key)
        if record is None:
            loaded.use(rope)
            began = time.monotonic()
            guessed = next_tokens(loaded.model, torch.tensor([*prompt, *answer]), len(prompt)).tolist()
            seconds = round(time.monotonic() - began, 3)
            found = {"depth": depth, "length": length, "retrieved": guessed == answer}
            said = {"expected": loaded.tokenizer.decode(answer), "guessed": loaded.tokenizer.decode(guessed)}
            record = log.append(key, {**about, "stage": "passkey", **found, **said, "seconds": seconds, "time": now()})
            on_new(length, seconds)
        records.append(record)
    return records


def build(tokenizer: Any, length: int, depth: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the tokens of the prompt and of the answer, `length` together."""
    number = str(int(np.random.default_rng([seed, length]).integers(10_000, 100_000)))

    def encode(text: str, special: bool = False) -> list[int]:
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    head, needle, question = encode(TASK, special=True), encode(NEEDLE.format(key=number)), encode(QUESTION)
    answer = encode(f" {number}")
    filler = encode(FILLER)
    room = length - sum(map(len, (head, needle, question, answer)))
    if room < 0:
        refuse("--passkey-depths", f"{length} tokens", f"at least {length - room}, what the task needs, or none")
    text = (filler * (room // len(filler) + 1))[:room]
    at = round(depth * room)
    return [*head, *text[:at], *needle, *text[at:], *question], answer
