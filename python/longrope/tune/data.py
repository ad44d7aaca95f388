"""Training text as the paper cuts it: segments between BOS and EOS, packed to sequences of one length.

A sequence depends on its number, the documents and the seed alone, so training that is interrupted goes on with the
sequence that would have come next.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch.utils.data import Dataset

from ..data import Document
from ..errors import refuse
from ..run import digest

MINIMUM_TOKENS = 16  # of text in a segment; documents lose their last few where they would leave less room than that


@dataclass(frozen=True)
class Segment:
    """A stretch of a document, in tokens of it: [start, stop)."""

    document: int
    start: int
    stop: int


class Segments(Dataset[dict[str, Any]]):
    """Sequences of `length` tokens, numbered from 0 and without end.

    A document is cut where a sequence is full, and every part of it is bookended by BOS and EOS where the tokenizer has
    them. Documents follow each other in an order drawn from the seed, anew in every pass over them; a pass begins with
    a new sequence, so no sequence holds a text twice. Documents are tokenized when they are first needed.

    Args:
        tokenizer: of the model.
        documents: see `longrope.data.training`.
        length: tokens of every sequence, bookends included.
        seed: of the order; text draws one of its own.
        count: what `len` says; the trainer's steps times its sequences per step.

    Raises:
        UsageError: the documents together do not fill one sequence.
    """

    def __init__(
        self, tokenizer: Any, documents: Iterable[Document], length: int, seed: int | str = 0, count: int = 0
    ) -> None:
        self.tokenizer, self.length, self.seed, self.count = tokenizer, length, seed, count
        self.documents = tuple(documents)
        self.before, self.after = (
            [] if token is None else [token] for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)
        )
        self._tokens: dict[int, array[int]] = {}
        self._planned: list[tuple[Segment, ...]] = []
        self._plan = self._sequences()
        self.segments(0)  # a text that cannot fill the length is said before the work begins

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return `input_ids`, int64[length]."""
        return {"input_ids": torch.tensor(self.tokens(number))}

    def tokens(self, number: int) -> list[int]:
        """Return the tokens of a sequence."""
        tokens: list[int] = []
        for segment in self.segments(number):
            tokens += [*self.before, *self._ids(segment.document)[segment.start : segment.stop], *self.after]
        return tokens

    def segments(self, number: int) -> tuple[Segment, ...]:
        """Return what a sequence is made of."""
        while len(self._planned) <= number:
            self._planned.append(next(self._plan))
        return self._planned[number]

    def fingerprint(self) -> str:
        """Return 16 hex digits of the documents, whatever order they were given in."""
        return digest(sorted(document.sha256 for document in self.documents))

    def _sequences(self) -> Iterator[tuple[Segment, ...]]:
        passes = 0
        while True:
            filled = False
            for sequence in self._pass(passes):
                filled = True
                yield sequence
            if not filled:
                total = sum(len(self._ids(number)) for number in range(len(self.documents)))
                refuse("--text", f"{total} tokens to train on", f"enough for one sequence of {self.length}")
            passes += 1

    def _pass(self, number: int) -> Iterator[tuple[Segment, ...]]:
        bookends = len(self.before) + len(self.after)
        least = bookends + MINIMUM_TOKENS
        room, sequence = self.length, list[Segment]()
        for document in self._order(number):
            tokens, at = len(self._ids(document)), 0
            while at < tokens:
                taken = min(room - bookends, tokens - at)
                left = room - bookends - taken
                if 0 < left < least:
                    taken -= least - left
                    left = least
                    tokens = at + taken
                if taken < 1:
                    break
                sequence.append(Segment(document, at, at + taken))
                at, room = at + taken, left
                if not room:
                    yield tuple(sequence)
                    room, sequence = self.length, []

    def _order(self, number: int) -> list[int]:
        """Return the documents in the order of a pass, which does not depend on the order they were given in."""

        def key(document: int) -> str:
            name = f"{self.seed} {number} {self.documents[document].sha256}"
            return hashlib.sha256(name.encode()).hexdigest()

        return sorted(range(len(self.documents)), key=key)

    def _ids(self, document: int) -> array[int]:
        if document not in self._tokens:
            text = self.documents[document].text
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            self._tokens[document] = array("I", ids)
        return self._tokens[document]


class MixedWindows(Dataset[dict[str, Any]]):
    """Long sequences, and among them, evenly spread, rows of as many tokens that hold short windows.

    A short window is a sequence of its own `Segments`; its texts are told apart by `cu_seqlens`, so that each is read
    by itself, from position 0.

    Args:
        long, short: of the same documents; a whole number of short windows need not fill a long one.
        share: of the rows that hold short windows, at least 0 and below 1.
    """

    def __init__(self, long: Segments, short: Segments, share: float) -> None:
        self.long, self.short, self.share = long, short, share
        self.windows = max(long.length // short.length, 1)

    def __len__(self) -> int:
        return len(self.long)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return `input_ids`, int64[tokens], and of short windows `cu_seqlens`, int64[texts + 1]."""
        before = self._shorts(number)
        if self._shorts(number + 1) == before:
            return self.long[number - before]
        rows = range(before * self.windows, (before + 1) * self.windows)
        bookends = len(self.short.before) + len(self.short.after)
        segments = [segment for row in rows for segment in self.short.segments(row)]
        lengths = torch.tensor([0, *(segment.stop - segment.start + bookends for segment in segments)])
        tokens = [token for row in rows for token in self.short.tokens(row)]
        return {"input_ids": torch.tensor(tokens), "cu_seqlens": lengths.cumsum(0)}

    def fingerprint(self) -> str:
        """Return that of the documents."""
        return self.long.fingerprint()

    def _shorts(self, number: int) -> int:
        """Return how many of the first `number` rows are short: the share, in exact arithmetic."""
        return int(Fraction(str(self.share)) * number)
