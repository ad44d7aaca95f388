"""A run directory serves one request, one process at a time, and its files appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from longrope import models
from longrope.errors import PipelineError, UsageError
from longrope.run import RunDirectory, read_json, write_atomically

SETTINGS = {"to": 256, "seed": 0, "text": ("a", "b")}


def test_the_same_request_opens_it_again(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path / "run", SETTINGS)
    first.evaluations.append("key", {"score": 1.0})
    first.close()
    again = RunDirectory(tmp_path / "run", SETTINGS)
    assert again.evaluations.get("key") == {"key": "key", "score": 1.0}
    again.close()


def test_another_request_is_refused_with_the_difference(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path, SETTINGS)
    first.evaluations.append("key", {})
    first.close()
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(UsageError) as refused:
        RunDirectory(tmp_path, {**SETTINGS, "seed": 1})
    assert str(refused.value) == (
        f"--seed: got 1 in {tmp_path}, expected 0, with which that directory was made (or another --run-dir)"
    )
    assert (tmp_path / "run.json").read_bytes() == before
    RunDirectory(tmp_path, SETTINGS).close()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("model", "MODEL: got 1 in"),
        ("model_fingerprint", "MODEL: got files of fingerprint 1 in"),
        ("screens", "--screen: got 1 in"),
        ("score_from", "--score-from: got 1 in"),
    ],
)
def test_a_difference_is_named_as_the_argument_is(tmp_path: Path, name: str, line: str) -> None:
    first = RunDirectory(tmp_path, {name: 0})
    first.evaluations.append("key", {})
    first.close()
    with pytest.raises(UsageError) as refused:
        RunDirectory(tmp_path, {name: 1})
    assert str(refused.value).startswith(line)


def test_settings_that_a_directory_does_not_have_count_as_their_defaults(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path, SETTINGS)
    first.evaluations.append("key", {})
    first.close()
    defaults = {"to": 1, "objective": "text", "lengths": ()}
    with pytest.raises(UsageError) as refused:
        RunDirectory(tmp_path, {**SETTINGS, "objective": "needle", "lengths": ()}, None, defaults)
    assert str(refused.value).startswith('--objective: got "needle" in')
    again = RunDirectory(tmp_path, {**SETTINGS, "objective": "text", "lengths": ()}, None, defaults)
    assert read_json(tmp_path / "run.json")["settings"]["objective"] == "text"
    again.close()
    with pytest.raises(UsageError, match="--lengths: got null"):
        RunDirectory(tmp_path, {**SETTINGS, "objective": "text", "lengths": None}, None, defaults)


def test_a_folder_of_something_else_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        UsageError, match=r"--run-dir: got .*, which has config\.json and no run\.json, expected a new or"
    ):
        RunDirectory(tmp_path, SETTINGS)
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_run_killed_before_its_first_file_was_whole_begins_again(tmp_path: Path) -> None:
    for name in (".lock", ".run.json.part"):
        (tmp_path / name).touch()
    RunDirectory(tmp_path, SETTINGS).close()


def test_a_request_that_came_to_nothing_claims_no_directory(tmp_path: Path) -> None:
    """A wrong argument noticed late must not make the right one a difference."""
    RunDirectory(tmp_path, {**SETTINGS, "text": ["typo"]}).close()
    RunDirectory(tmp_path, SETTINGS).close()
    assert read_json(tmp_path / "run.json")["settings"]["text"] == ["a", "b"]


def test_budgets_may_change_from_run_to_run(tmp_path: Path) -> None:
    for budget in (10, 20):
        run = RunDirectory(tmp_path, SETTINGS, {"budget": budget})
        run.evaluations.append(str(budget), {})
        run.close()
    assert read_json(tmp_path / "run.json")["budget"] == 20


def test_only_one_process_works_in_it(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path, SETTINGS)
    with pytest.raises(UsageError, match=r"--run-dir: got .*, expected a directory no other longrope process"):
        RunDirectory(tmp_path, SETTINGS)
    first.close()
    RunDirectory(tmp_path, SETTINGS).close()


def test_a_file_is_not_a_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--run-dir: got .*file, expected a directory, not a file"):
        RunDirectory(tmp_path / "file", SETTINGS)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PipelineError, match=r"--run-dir .*: got Not a directory, expected to write there"):
        RunDirectory(tmp_path / "file" / "run", SETTINGS)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "longrope-run/0"}', "\x00"])
def test_a_broken_run_json_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UsageError, match=r"run\.json.*expected") as refused:
        RunDirectory(tmp_path, SETTINGS)
    assert "\n" not in str(refused.value)


def test_floats_keep_every_bit(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, SETTINGS)
    values = [1 / 3, 1e-300, 0.1 + 0.2]
    run.write_json("values.json", values)
    assert run.read_json("values.json") == values
    assert run.read_json("missing.json") is None
    run.close()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_whose_writing_fails_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    file = tmp_path / "winner.json"
    write_atomically(file, b"old")

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(PipelineError, match=r"winner\.json: got a full disk, expected free space"):
            write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["winner.json"]


def test_reading_json_says_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="got no such file, expected a JSON file"):
        read_json(tmp_path / "none.json")
    (tmp_path / "half.json").write_text(json.dumps({"a": [1, 2]})[:-3])
    with pytest.raises(UsageError, match="got a broken file"):
        read_json(tmp_path / "half.json")


def test_only_what_makes_the_model_is_its_fingerprint(model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    made = models.fingerprint(models.find(str(folder)))
    for name in ("notes.json", "README.md", "training_args.bin"):
        (folder / name).write_text("{}")
    assert models.fingerprint(models.find(str(folder))) == made
    (folder / "longrope.json").write_text("{}")
    assert models.fingerprint(models.find(str(folder))) != made, "the ladder that the weights serve"
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
        before = models.fingerprint(models.find(str(folder)))
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
        assert models.fingerprint(models.find(str(folder))) != before, name


def test_the_same_files_in_another_place_are_the_same_model(tmp_path: Path) -> None:
    def opened(model: str, fingerprint: str) -> RunDirectory:
        return RunDirectory(tmp_path / "run", {"model": model, "model_fingerprint": fingerprint})

    with closing(opened("here", "a")) as run:
        run.evaluations.append("key", {"nll": 1.0})
    with closing(opened("moved/there", "a")) as run:
        assert run.evaluations.get("key")
    with pytest.raises(UsageError, match="MODEL: got"):
        opened("moved/there", "b")
