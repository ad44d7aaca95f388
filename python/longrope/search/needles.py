"""LongRoPE2's objective: the loss of answers that only the beginning of a long text gives (arXiv 2502.20082).

Most tokens of a book are predicted from their neighbours, so a mean over all of them hardly sees whether far ones are
still found. Here a sentence near the start of a search document says a key's number, a question at the end asks for it,
and only the tokens of the number count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..data import Window
from ..errors import refuse
from ..evaluate.bootstrap import RESAMPLES, PairedDifference
from .objectives import Record, Sample
from .screening import describe

NEEDLE = "\n\nA note in the margin: the number of the {key} is {value}. Keep it in mind.\n\n"
QUESTION = (
    "\n\nQuestion: which number does the note in the margin give for the {key}?\nAnswer: the number of the {key} is"
)
COLORS = ("amber", "azure", "copper", "crimson", "golden", "ivory", "scarlet", "silver", "teal", "violet")
THINGS = ("anchor", "bridge", "compass", "falcon", "garden", "harbor", "lantern", "meadow", "orchard", "tower")
NEAR_START = 0.05  # share of the document within which the needle is
DIGITS = 6


@dataclass(frozen=True)
class NeedleLoss:
    """Loss of the answers to `needles` questions about each document, each in a forward of `length` tokens.

    Attributes:
        windows: of at least `length` tokens.
        seed: of keys, numbers and places; a shorter sample asks the same question.
    """

    windows: tuple[Window, ...]
    length: int
    tokenizer: Any
    needles: int = 2
    seed: int = 0
    name: str = "needle"

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        return tuple(
            self._sample(window, number, needle)
            for number, window in enumerate(self.windows)
            for needle in range(self.needles)
        )

    @property
    def unit(self) -> str:
        return "needle"

    @property
    def where(self) -> str:
        return f"{describe(self.length, len(self.windows))}, {self.needles} needles in each, scored on the answers"

    def shortened(self, length: int, documents: int) -> NeedleLoss:
        return NeedleLoss(self.windows[:documents], length, self.tokenizer, self.needles, self.seed)

    def difference(self, one: Sequence[Record], other: Sequence[Record]) -> PairedDifference:
        """Resample whole answers, both candidates together: their tokens depend on each other."""
        apart = np.array([a["nll"] - b["nll"] for a, b in zip(one, other, strict=True)])
        drawn = np.random.default_rng(0).integers(0, len(apart), (RESAMPLES, len(apart)))
        low, high = np.quantile(apart[drawn].mean(1), (0.025, 0.975))
        tokens = max(sample.length - sample.start for sample in self.samples)
        return PairedDifference(float(apart.mean()), float(low), float(high), len(apart), tokens, len(self.windows))

    def describe(self) -> dict[str, Any]:
        return {
            "what": "mean negative log-likelihood in nats per token of the answers about needles",
            "length": self.length,
            "needles": self.needles,
            "seed": self.seed,
            "documents": [window.describe() for window in self.windows],
        }

    def _sample(self, window: Window, number: int, needle: int) -> Sample:
        """Return one question about a document, exactly `length` tokens with its answer."""
        random = np.random.default_rng([self.seed, number, needle])
        key = f"{random.choice(COLORS)} {random.choice(THINGS)}"
        value = str(random.integers(10 ** (DIGITS - 1), 10**DIGITS))
        share = NEAR_START * random.random()
        hidden = self._encode(NEEDLE.format(key=key, value=value))
        question, answer = self._question(key, value)
        room = self.length - len(hidden) - len(question) - len(answer)
        if room < 1:
            refuse("--objective", f"needle at {self.length} tokens", f"at least {self.length - room + 1} tokens")
        text = window.tokens[:room]
        at = 1 + int(share * (room - 1))  # behind the beginning-of-sequence token, where there is one
        tokens = (*text[:at], *hidden, *text[at:], *question, *answer)
        asked = Window(
            f"{window.document}, needle {needle}", window.sha256, window.document_tokens, window.offset, tokens
        )
        return Sample(asked, self.length, self.length - len(answer))

    def _question(self, key: str, value: str) -> tuple[list[int], list[int]]:
        """Encode both as one text: a tokenizer may mark the beginning of a text, or join a space to what follows."""
        question = self._encode(QUESTION.format(key=key))
        both = self._encode(f"{QUESTION.format(key=key)} {value}")
        shared = next((i for i, (a, b) in enumerate(zip(question, both, strict=False)) if a != b), len(question))
        return both[:shared], both[shared:]

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
