"""Where documents come from: files, folders, JSON lines, and what every Python has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longrope.data import (
    SHORT_PARAGRAPH,
    STDLIB_HELDOUT,
    STDLIB_SEARCH,
    TOPICS_FIRST,
    TOPICS_SECOND,
    documents,
    stdlib,
)
from longrope.errors import UsageError


def texts(*sources: object) -> list[str]:
    return [document.text for document in documents([str(source) for source in sources])]


def test_a_folder_is_read_in_the_order_of_its_names_with_what_lies_below(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, text in (("b/deep.md", "3"), ("a.txt", "1"), ("picture.png", "no"), ("b.py", "2")):
        (tmp_path / name).write_text(text)
    assert sorted(texts(tmp_path)) == ["1", "2", "3"]
    assert texts(tmp_path) == texts(tmp_path)


@pytest.mark.parametrize("field", ["text", "content", "document"])
def test_json_lines_are_one_document_each(tmp_path: Path, field: str) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(json.dumps({"id": number, field: f"text {number}"}) for number in range(3)) + "\n\n")
    assert texts(path) == ["text 0", "text 1", "text 2"]
    assert [document.name for document in documents([str(path)])] == [f"{path}:{number}" for number in (1, 2, 3)]


@pytest.mark.parametrize("line", ["{broken", "[1, 2]", '{"other": "x"}', '{"text": 5}', "7"])
def test_a_broken_json_line_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(UsageError, match=r"--text: got .*some\.jsonl line 2, expected a JSON object with a string in"):
        texts(path)


def test_a_json_text_may_hold_any_line_separator(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps({"text": "one\u2028two\u0085three"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert texts(path) == ["one\u2028two\u0085three"]


def test_what_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match=r"--text: got .*latin\.txt .*expected a readable UTF-8 file"):
        texts(path)


def test_a_folder_without_texts_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a folder with files that end in"):
        texts(tmp_path)
    with pytest.raises(UsageError, match=r"--text: got '.*none\.txt', expected a file, a folder"):
        texts(tmp_path / "none.txt")


def test_an_empty_source_is_not_the_current_folder() -> None:
    with pytest.raises(UsageError, match="--text: got '', expected a file"):
        texts("")


def test_the_halves_of_the_python_topics_share_no_long_paragraph() -> None:
    first, second = (document.text for document in stdlib((TOPICS_FIRST, TOPICS_SECOND)))
    halves = [{" ".join(part.split()) for part in half.split("\n\n")} for half in (first, second)]
    shared = [paragraph for paragraph in halves[0] & halves[1] if len(paragraph) >= SHORT_PARAGRAPH]
    assert shared == []
    assert min(len(first), len(second)) > 100_000


def test_the_two_lists_of_the_standard_library_are_disjoint_and_here() -> None:
    assert not set(STDLIB_HELDOUT) & set(STDLIB_SEARCH)
    found = list(stdlib((*STDLIB_HELDOUT, *STDLIB_SEARCH)))
    assert len({document.sha256 for document in found}) == len(found) > 15
