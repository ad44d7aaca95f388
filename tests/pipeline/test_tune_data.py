"""Sequences to train on: every one is full, bookended, of texts that no proof reads, and always the same."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_data_split import Words, words, write

from longrope import data
from longrope.data import Document
from longrope.errors import UsageError
from longrope.tune.data import MINIMUM_TOKENS, Segments

BOS, EOS = 1, 2


class Marked(Words):
    """One token a word, and one for the beginning and the end of a text, where it has them."""

    def __init__(self, bos: bool = True, eos: bool = True) -> None:
        super().__init__()
        self.bos_token_id, self.eos_token_id = BOS if bos else None, EOS if eos else None


def corpus(sizes: list[int]) -> list[Document]:
    return [Document(str(number), words(number, size)) for number, size in enumerate(sizes)]


texts = st.lists(st.integers(1, 300), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 90 + 8 * MINIMUM_TOKENS)


@given(sizes=texts, length=st.integers(64, 90), bos=st.booleans(), eos=st.booleans(), seed=st.integers(0, 3))
def test_every_sequence_is_full_and_every_segment_bookended(
    sizes: list[int], length: int, bos: bool, eos: bool, seed: int
) -> None:
    documents = corpus(sizes)
    tokenizer = Marked(bos, eos)
    sequences = Segments(tokenizer, documents, length, seed)
    for number in range(5):
        tokens = sequences.tokens(number)
        assert len(tokens) == length
        at = 0
        for segment in sequences.segments(number):
            assert not bos or tokens[at] == BOS
            at += bos
            text = tokenizer(documents[segment.document].text)["input_ids"]
            assert tokens[at : at + segment.stop - segment.start] == text[segment.start : segment.stop]
            at += segment.stop - segment.start
            assert not eos or tokens[at] == EOS
            at += eos
        assert at == length


def test_a_pass_reads_every_text_once_and_the_next_one_in_another_order() -> None:
    documents = corpus([500, 40, 300, 77, 900])
    sequences = Segments(Marked(), documents, 64, seed=3)
    seen: list[set[tuple[int, int]]] = [set()]
    orders: list[list[int]] = [[]]
    for number in range(120):
        for segment in sequences.segments(number):
            tokens = {(segment.document, at) for at in range(segment.start, segment.stop)}
            if segment.start == 0 and segment.document in orders[-1]:
                seen.append(set())
                orders.append([])
            assert not tokens & seen[-1], "a text twice in one pass"
            seen[-1] |= tokens
            if segment.document not in orders[-1]:
                orders[-1].append(segment.document)
    whole = sum(len(document.text.split()) for document in documents)
    assert all(whole - 64 - 5 * MINIMUM_TOKENS <= len(one) <= whole for one in seen[:-1])
    assert len({tuple(order) for order in orders[:-1]}) > 1


def test_a_sequence_depends_on_its_number_the_texts_and_the_seed_alone() -> None:
    documents = corpus([200, 90, 400])
    straight = Segments(Marked(), documents, 64, seed=1)
    forward = [straight.tokens(number) for number in range(20)]
    jumping = Segments(Marked(), documents[::-1], 64, seed=1)
    assert jumping.tokens(17) == forward[17]
    assert [jumping.tokens(number) for number in range(20)] == forward
    assert jumping.fingerprint() == straight.fingerprint()
    other = Segments(Marked(), documents, 64, seed=2)
    assert [other.tokens(number) for number in range(20)] != forward


def test_text_that_fills_no_sequence_is_refused() -> None:
    with pytest.raises(UsageError, match="--text: got 50 tokens to train on, expected enough for one sequence of 64"):
        Segments(Marked(), corpus([20, 30]), 64)


def test_a_text_that_the_search_or_the_proof_reads_is_never_trained_on(tmp_path: Path) -> None:
    folder = write(tmp_path / "texts", [words(seed, 30) for seed in range(9)])
    again = write(tmp_path / "again", [words(seed, 30) for seed in (0, 3, 7, 11)])
    split = data.split(Words(), [folder], 20, search=2, heldout=3)
    trained = [document.sha256 for document in data.training([folder, again], split.texts)]
    assert len(split.texts) == 5
    assert not split.texts & set(trained)
    assert len(trained) == len(set(trained)) == 9 - 5 + 1


def test_no_passage_of_the_standard_library_is_trained_on_and_read_by_the_search_or_the_proof() -> None:
    def passages(text: str) -> set[str]:
        return {" ".join(part.split()) for part in text.split("\n\n") if len(part) >= 400}

    sides = [*data.stdlib(data.STDLIB_HELDOUT), *data.stdlib(data.STDLIB_SEARCH)]
    read = set[str]().union(*(passages(document.text) for document in sides))
    trained = list(data.training(["stdlib"], {document.sha256 for document in sides}))
    shared = {document.name: len(passages(document.text) & read) for document in trained}
    assert sum(len(document.text) for document in trained) > 2_000_000
    assert len(read) > 500
    assert sum(shared.values()) <= 3, {name: count for name, count in shared.items() if count}


def test_the_order_of_many_documents_is_drawn() -> None:
    sizes = [random.Random(number).randint(20, 60) for number in range(40)]
    sequences = Segments(Marked(), corpus(sizes), 64)
    first = [segment.document for number in range(5) for segment in sequences.segments(number)]
    assert first != sorted(first)
