"""Questions about something hidden in a long text: built to an exact number of tokens, asked in one forward.

A sample is a prompt and its answers. One forward reads both, and every token of an answer must be the likeliest one
given all before it, which is what greedy decoding would have to write. Where there are several answers, the words
between them are given, and each is asked for after the right ones before it. Beside found or not found, the record has
the loss of the answers' tokens, which tells models apart that find nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

import longrope_kernels as lk

from ..errors import refuse
from ..loss import answer_scores
from ..models import LoadedModel
from ..run import EvaluationLog, digest, now

Encode = Callable[[str], list[int]]
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        kind: what it is called in the log.
        prompt: tokens up to the first answer.
        answer: tokens of all answers with the words between them.
        spans: where each answer lies in `answer`, first token and end; what lies between is given, not asked for.
    """

    kind: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        """Tokens of the prompt and the answers together."""
        return len(self.prompt) + len(self.answer)


def ask(
    loaded: LoadedModel,
    log: EvaluationLog,
    rope: lk.LongRope,
    sample: Sample,
    on_new: Callable[[int, float], None] = lambda length, seconds: None,
    on_known: Callable[[int], None] = lambda length: None,
    **about: Any,
) -> dict[str, Any]:
    """Return the record of a sample, from the log where it has it: a question is asked once.

    The record has `found`, how many of the `answers` were found; `retrieved`, whether all were; and `nll`, in nats per
    token of the answers.

    Args:
        rope: the ladder, whose regime for `sample.length` tokens is used.
        on_new, on_known: called with the length (and the seconds) after a forward, or for a record that was there.
        about: further fields for the log.
    """
    key = digest({sample.kind: [sample.prompt, sample.answer], "rope": rope.to_dict()})
    known = log.get(key)
    if known is not None:
        on_known(sample.length)
        return known
    loaded.use(rope)
    began = time.monotonic()
    device = next(loaded.model.parameters(), torch.empty(0)).device
    ids = torch.tensor([*sample.prompt, *sample.answer], device=device)
    likeliest, losses = answer_scores(loaded.model, ids, len(sample.prompt))
    seconds = round(time.monotonic() - began, 3)
    guessed, nll = likeliest.tolist(), losses.double().tolist()
    found = sum(tuple(guessed[a:b]) == sample.answer[a:b] for a, b in sample.spans)
    asked = [loss for a, b in sample.spans for loss in nll[a:b]]
    decode = loaded.tokenizer.decode
    record = log.append(
        key,
        {
            "stage": sample.kind,
            **about,
            "length": sample.length,
            "answers": len(sample.spans),
            "found": found,
            "retrieved": found == len(sample.spans),
            "nll": sum(asked) / len(asked),
            "expected": decode(list(sample.answer)),
            "guessed": decode(guessed),
            "seconds": seconds,
            "time": now(),
        },
    )
    on_new(sample.length, seconds)
    return record


def encoder(tokenizer: Any) -> Encode:
    """Return the function from a text to its tokens, without marks of beginning or end."""
    return lambda text: list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def opening(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text that begins a prompt, with the marks that the tokenizer puts there."""
    return list(tokenizer(text, verbose=False)["input_ids"])


def continuation(encode: Encode, before: str, text: str) -> list[int]:
    """Return the tokens that `text` adds after `before`; tokenizers differ in what they make of a leading space."""
    first, both = encode(before), encode(before + text)
    return both[len(first) :] if both[: len(first)] == first else encode(text)


def answers(encode: Encode, before: str, parts: Sequence[tuple[str, str]]) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the tokens of `given answer given answer ...` and where the answers lie in them.

    Args:
        before: what the prompt ends with.
        parts: words that are given and the answer after them, each.
    """
    tokens: list[int] = []
    spans = []
    for given, answer in parts:
        tokens += encode(given) if given else []
        added = continuation(encode, given or before, answer)
        spans.append((len(tokens), len(tokens) + len(added)))
        tokens += added
    return tokens, spans


def bury(filler: Sequence[int], needles: Sequence[tuple[float, Sequence[int]]], room: int) -> list[int]:
    """Return `room` tokens of `filler`, repeated or cut, with needles put in at their depths.

    Args:
        needles: depth, from 0 (beginning) to 1 (end), and tokens of each.
    """
    text = (list(filler) * (room // len(filler) + 1))[:room]
    found: list[int] = []
    last = 0
    for depth, needle in sorted(needles, key=lambda one: one[0]):
        at = round(depth * room)
        found += [*text[last:at], *needle]
        last = at
    return [*found, *text[last:]]


def too_short(length: int, needed: int, task: str) -> NoReturn:
    """Refuse a length that a task does not fit into."""
    refuse("--lengths", f"{length} tokens", f"at least {needed}, what {task} needs with this tokenizer")
