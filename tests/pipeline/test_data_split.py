"""The two sides never share a document, whatever the documents are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from longrope import data
from longrope.data import Document, split
from longrope.errors import UsageError


class Words:
    """A tokenizer of one token a word, with a mark before every text where that is asked."""

    def __init__(self, marked: bool = False) -> None:
        self.marked = marked

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        ids = [sum(word.encode()) for word in text.split()]
        return {"input_ids": [1, *ids] if self.marked and add_special_tokens else ids}


def words(seed: int, count: int) -> str:
    drawn = random.Random(seed)
    return " ".join("".join(drawn.choices("abcdef", k=5)) for _ in range(count))


def write(folder: Path, texts: Sequence[str]) -> str:
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    return str(folder)


def sides(made: data.Split) -> tuple[set[str], set[str]]:
    return {window.sha256 for window in made.search}, {window.sha256 for window in made.heldout}


@given(
    texts=st.lists(st.tuples(st.integers(0, 5), st.integers(5, 60)), min_size=2, max_size=12),
    search=st.integers(1, 4),
    heldout=st.integers(1, 4),
    windows=st.integers(1, 3),
)
def test_no_document_is_on_both_sides(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[int, int]], search: int, heldout: int, windows: int
) -> None:
    """Texts may repeat, be too short or be long enough for several windows."""
    folder = write(tmp_path_factory.mktemp("texts"), [words(*text) for text in texts])
    long_enough = {text for text in texts if text[1] >= 20}
    if len(long_enough) < 2:
        with pytest.raises(UsageError, match="--text: got"):
            split(Words(), [folder], 20, search, heldout, windows)
        return
    made = split(Words(), [folder], 20, search, heldout, windows)
    ours, theirs = sides(made)
    assert not ours & theirs
    assert min(search, len(long_enough) - 1) >= len(ours) >= 1
    assert min(heldout, len(long_enough) - 1) >= len(theirs) >= 1
    assert all(len(window.tokens) == 20 for window in (*made.search, *made.heldout))


def test_the_split_depends_on_the_texts_alone(tmp_path: Path) -> None:
    texts = [words(seed, 30) for seed in range(6)]
    one = split(Words(), [write(tmp_path / "one", texts)], 20)
    again = split(Words(), [write(tmp_path / "other", texts[::-1])], 20)
    assert [w.sha256 for w in one.search] == [w.sha256 for w in again.search]
    assert [w.tokens for w in one.heldout] == [w.tokens for w in again.heldout]


def test_a_text_that_is_in_both_folders_is_used_by_one_side_alone(tmp_path: Path) -> None:
    shared = [words(seed, 30) for seed in range(3)]
    one, other = write(tmp_path / "one", shared), write(tmp_path / "other", [*shared, words(9, 30)])
    ours, theirs = sides(split(Words(), [one], 20, heldout_sources=[other]))
    assert ours
    assert theirs
    assert not ours & theirs


def test_windows_of_one_document_follow_each_other_without_overlap(tmp_path: Path) -> None:
    folder = write(tmp_path, [words(0, 70), words(1, 70)])
    made = split(Words(), [folder], 20, windows_per_document=5)
    assert [window.offset for window in made.search] == [0, 20, 40]


def test_every_window_begins_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    folder = write(tmp_path, [words(0, 45), words(1, 45)])
    made = split(Words(marked=True), [folder], 20, windows_per_document=2)
    text = Words()((tmp_path / "0.txt").read_text())["input_ids"]
    windows = next(side for side in (made.search, made.heldout) if side[0].document.endswith("0.txt"))
    assert [window.tokens for window in windows] == [(1, *text[:19]), (1, *text[19:38])]


def test_byte_tokens_have_no_mark_before_them() -> None:
    assert data._prefix(tiny.tokenizer()) == []
    assert data._prefix(Words(marked=True)) == [1]


def test_a_document_one_token_too_short_is_refused_with_its_length(tmp_path: Path) -> None:
    folder = write(tmp_path, [words(0, 19), words(1, 19)])
    with pytest.raises(UsageError) as refused:
        split(Words(), [folder], 20)
    line = str(refused.value)
    assert line.startswith("--text: got no document of 20 tokens (the longest has 19)")
    assert folder in line


def test_one_long_document_cannot_serve_both_sides(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--text: got 1 document of 20 tokens .* for the search side"):
        split(Words(), [write(tmp_path, [words(0, 500)])], 20)


def test_short_held_out_text_is_refused_by_its_own_name(tmp_path: Path) -> None:
    long, short = write(tmp_path / "long", [words(0, 30)]), write(tmp_path / "short", [words(1, 5)])
    with pytest.raises(UsageError) as refused:
        split(Words(), [long], 20, heldout_sources=[short])
    assert str(refused.value).startswith("--heldout-text: got no document of 20 tokens")
    assert short in str(refused.value)
    assert long not in str(refused.value)


def test_a_description_tells_two_splits_apart(tmp_path: Path) -> None:
    folder = write(tmp_path, [words(seed, 50) for seed in range(4)])
    described = [split(Words(), [folder], length).describe() for length in (20, 20, 21)]
    assert described[0] == described[1]
    assert described[0] != described[2]


def test_a_document_is_named_by_its_text() -> None:
    assert Document("a", "x").sha256 == Document("b", "x").sha256 != Document("a", "y").sha256
