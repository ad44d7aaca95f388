"""The whole method on a tiny model: its stages, its ladder, what it writes, and SIGKILL in every stage."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Finished, Run, run_process

import longrope_kernels as lk
from longrope import context, factors, models
from longrope.export import reload
from longrope.loss import token_nll
from longrope.progressive import by_length
from longrope.run import digest

TARGET = 1024
SETTINGS = (
    *("--to", str(TARGET), "--dtype", "fp32", "--threads", "1", "--tune", "256:5,512:3", "--tune-lr", "1e-3"),
    *("--readjust", "64,128", "--population", "5", "--iterations", "1", "--mutations", "2", "--crossovers", "1"),
    *("--parents", "3", "--budget", "44", "--start-tokens", "0,4", "--attention-factor", "search", "--seed", "3"),
)
# A file whose line count says that a stage is under way, and how many lines.
MOMENTS = {
    "search": ("stages/search-256/evaluations.jsonl", 9),
    "tune": ("stages/tune-256/log.jsonl", 2),
    "second search": ("stages/search-1024/evaluations.jsonl", 3),
    "readjust": ("stages/readjust/evaluations.jsonl", 41),
    "evaluate": ("stages/result/evaluations.jsonl", 2),
    "export": ("heldout.json", 1),
    "report": ("export.json", 1),
}


# Has stock transformers loaded, and gives each request a process in which the reload check finds it so.
STOCK = """
import io, os, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

program = open(sys.argv[1]).read()
for request in sys.stdin:
    if os.fork() == 0:
        sys.stdin = io.StringIO(request)
        exec(program, {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.fixture(scope="module")
def stock() -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """What `reload.run_stock` does, but for the seconds of importing torch and transformers."""
    program = [sys.executable, "-c", STOCK, str(Path(reload.__file__).with_name("stock_check.py"))]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def run(request: dict[str, Any]) -> dict[str, Any]:
            print(json.dumps(request), file=server.stdin, flush=True)
            return dict(json.loads(server.stdout.readline()))

        yield run


@pytest.fixture
def command(
    command: Callable[..., Finished], stock: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Finished]:
    """The command line in this process; `progressive` and what is killed reload in an interpreter of their own."""
    monkeypatch.setattr(reload, "run_stock", stock)
    return command


@pytest.fixture(scope="module")
def long_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.texts(tmp_path_factory.mktemp("progressive") / "texts", 7, 1400)


def arguments(model: Path, texts: Path, folder: Path) -> tuple[str, ...]:
    return ("extend", str(model), "--text", str(texts), "--run-dir", str(folder), *SETTINGS)


@pytest.fixture(scope="module")
def progressive(model_folder: Path, long_texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One whole run, as a stranger runs it. Tests only read it."""
    folder = tmp_path_factory.mktemp("progressive") / "run"
    asked = arguments(model_folder, long_texts, folder)
    return Run(folder, asked, run_process(*asked))


def read(run: Path, name: str) -> Any:
    return json.loads((run / name).read_text())


def test_it_ends_well_and_says_what_it_did(progressive: Run) -> None:
    assert progressive.finished.code == 0, progressive.finished.err
    said = progressive.finished.out
    order = ["== inspect", "Plan: 128 to 1,024", "search for 256", "search for 512", "fine-tune at 256", "at 512"]
    order += ["second search", "readjust for 64, 128", "by length", "export and reload", "report.html"]
    places = [said.index(words) for words in order]
    assert places == sorted(places)


def test_the_ladder_has_the_readjusted_the_tuned_and_the_searched_regimes(progressive: Run) -> None:
    rope, _ = factors.read(progressive.folder / "factors/winner.json")
    assert rope.lengths == (64, 128, 512, TARGET)
    assert rope.original_max_position_embeddings == tiny.ORIGINAL
    stages = progressive.folder / "stages"
    tuned = factors.read(stages / "search-512/factors/winner.json")[0].scalings[-1]
    assert rope.regimes[512] == tuned
    assert rope.regimes[TARGET] == factors.read(stages / "search-1024/factors/winner.json")[0].scalings[-1]
    # The second search multiplies the factors that the weights were tuned under: none of them can become smaller.
    assert all(
        far >= near for far, near in zip(rope.regimes[TARGET].rescale_factors, tuned.rescale_factors, strict=True)
    )
    for length in (64, 128):
        winner = read(stages, f"readjust/readjust-{length}.json")
        ends = {one["origin"]: one["score"] for one in winner["history"]}
        assert winner["winner"]["score"] <= min(ends["seed original"], ends["seed extended"])


def test_each_tuning_goes_on_from_the_one_before(progressive: Run) -> None:
    first, second = (read(progressive.folder, f"stages/tune-{length}/tune.json") for length in (256, 512))
    assert (len(first["losses"]), len(second["losses"])) == (5, 3)
    assert second["model"].endswith("stages/tune-256/model")
    assert second["losses"][0] < first["losses"][0] - 0.5, "steps at 256 tokens help at 512"


def test_no_text_is_on_two_sides(progressive: Run, long_texts: Path) -> None:
    documents = read(progressive.folder, "documents.json")
    search, heldout = ({window["sha256"] for window in documents[side]} for side in ("search", "heldout"))
    assert (len(search), len(heldout), len(search & heldout)) == (2, 2, 0)
    every = {hashlib.sha256(file.read_bytes()).hexdigest() for file in long_texts.iterdir()}
    for length in (256, 512):
        trained_on = read(progressive.folder, f"stages/tune-{length}/tune.json")["documents"]
        assert trained_on == digest(sorted(every - search - heldout))
    for stage in ("search-256", "search-1024", "readjust"):
        log = (progressive.folder / "stages" / stage / "evaluations.jsonl").read_text().splitlines()
        choosing = [line for line in map(json.loads, log) if not line["stage"].endswith("heldout")]
        read_from = {line["window"].rpartition("@")[0] for line in choosing}
        assert read_from == {window["document"] for window in documents["search"]}


def test_the_table_by_length_is_of_the_final_weights_under_the_ladder(progressive: Run) -> None:
    table = read(progressive.folder, "lengths.json")
    assert table["lengths"] == [128, 256, 512, 1024]
    loaded = models.load(str(progressive.folder / "stages/tune-512/model"), "fp32")
    rope, _ = factors.read(progressive.folder / "factors/winner.json")
    documents = read(progressive.folder, "documents.json")["heldout"]
    text = Path(documents[0]["document"]).read_text()
    for entry in table["methods"]["longrope"]["by_length"][:2]:
        ids = torch.tensor(loaded.tokenizer(text)["input_ids"][: entry["length"]])
        loaded.use(lk.LongRope(128, {TARGET: rope.select(entry["length"])}))
        mine = float(token_nll(loaded.model, ids).double().mean())
        records = (progressive.folder / "stages/result/evaluations.jsonl").read_text().splitlines()
        found = [
            one["nll"]
            for one in map(json.loads, records)
            if one.get("length") == entry["length"] and one["window"].startswith(documents[0]["document"])
        ]
        assert any(value == pytest.approx(mine, abs=1e-5) for value in found)


def test_training_helps_beyond_the_original_length(progressive: Run) -> None:
    table = read(progressive.folder, "lengths.json")
    for method in ("original", "pi", "ntk", "yarn"):
        assert table["differences"][method][-1]["high"] < 0


def test_the_report_shows_stages_lengths_and_ladder(progressive: Run) -> None:
    page = (progressive.folder / "report.html").read_text()
    for words in (
        "Perplexity by length",
        "Readjusted for short texts",
        "<h2>Stages</h2>",
        "The ladder of regimes",
        "5 steps at 256 tokens",
    ):
        assert words in page
    assert {"lengths.png", "ladder.png", "tuning.png"} <= {f.name for f in (progressive.folder / "figures").iterdir()}


def test_the_export_is_of_the_tuned_weights(progressive: Run) -> None:
    export = read(progressive.folder, "export.json")
    assert export["reload"]["passed"]
    assert any("512" in note and "two sets of factors" in note for note in export["notes"])
    config = read(progressive.folder, "export/config.json")
    rope, _ = factors.read(progressive.folder / "factors/winner.json")
    assert config["rope_parameters"]["short_factor"] == list(rope.regimes[128].rescale_factors)
    assert config["rope_parameters"]["long_factor"] == list(rope.regimes[TARGET].rescale_factors)
    tuned, exported = (
        models.load(str(progressive.folder / name), "fp32").model.state_dict()
        for name in ("stages/tune-512/model", "export")
    )
    assert all(exported[name].equal(value) for name, value in tuned.items())


def test_a_finished_run_repeats_nothing(progressive: Run, command: Callable[..., Finished]) -> None:
    def state() -> dict[str, tuple[int, bytes]]:
        files = [*progressive.folder.rglob("*.jsonl"), *progressive.folder.rglob("*.safetensors")]
        return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}

    before, table = state(), read(progressive.folder, "lengths.json")
    again = command(*progressive.arguments)
    assert again.code == 0, again.err
    assert read(progressive.folder, "lengths.json") == table
    after = state()
    assert {name: content for name, (_, content) in after.items()} == {name: c for name, (_, c) in before.items()}
    weights = [name for name in before if name.endswith(".safetensors")]
    assert all(after[name][0] == before[name][0] for name in weights), "no weights are written again"


def kill_at(asked: tuple[str, ...], file: Path, lines: int) -> None:
    """Run until `file` has `lines` lines, then SIGKILL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "longrope", *asked], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 240
        while not (file.is_file() and file.read_bytes().count(b"\n") >= lines):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("moments", [("tune",), pytest.param(tuple(MOMENTS), marks=pytest.mark.slow)])
def test_killed_and_started_again_it_arrives_at_the_same(
    progressive: Run,
    moments: tuple[str, ...],
    command: Callable[..., Finished],
    model_folder: Path,
    long_texts: Path,
    tmp_path: Path,
) -> None:
    asked = arguments(model_folder, long_texts, tmp_path / "run")
    for moment in moments:
        name, lines = MOMENTS[moment]
        kill_at(asked, tmp_path / "run" / name, lines)
    done = command(*asked)
    assert done.code == 0, done.err
    whole, killed = (read(folder, "lengths.json") for folder in (progressive.folder, tmp_path / "run"))
    assert killed == whole
    assert read(tmp_path / "run", "ladder.json") == read(progressive.folder, "ladder.json")


def test_a_dry_run_says_the_plan_and_does_nothing(
    command: Callable[..., Finished], model_folder: Path, long_texts: Path, tmp_path: Path
) -> None:
    done = command(*arguments(model_folder, long_texts, tmp_path / "run"), "--dry-run")
    assert done.code == 0, done.err
    assert "Plan: 128 to 1,024 tokens" in done.out
    for stage in ("search-256", "tune-256", "tune-512", "search-1024", "readjust-64", "evaluate"):
        assert stage in done.out
    assert not (tmp_path / "run/stages").exists()
    plain = command(
        "extend", model_folder, "--text", long_texts, "--to", "256", "--run-dir", tmp_path / "a", "--dry-run"
    )
    assert plain.code == 0, plain.err
    assert "Plan: 128 to 256 tokens" in plain.out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("--tune", "512:3,256:5"), "--tune: got 512:3,256:5, expected ascending lengths"),
        (("--tune", "2048:5"), "up to the target 1024"),
        (("--tune", "none", "--readjust", "64"), "--readjust: got 64, expected --tune beside it"),
        (
            ("--readjust", "600"),
            "--readjust: got 600, expected ascending lengths from 16 to below the tuned length 512",
        ),
        (("--budget", "23"), "--budget: got 23, expected at least 24: 3 seeds on 8 windows of 256 tokens"),
        (
            ("--method", "longrope2", "--budget", "95"),
            "--budget: got 95, expected at least 96: 6 seeds on 16 needles of 256 tokens",
        ),
        (("--last-budget", "5"), "--last-budget: got 5, expected at least 6"),
        (("--tune-lr", "0"), "--tune-lr: got 0.0, expected a number above 0"),
        (("--tune-batch", "0"), "--tune-batch: got 0, expected an int >= 1"),
        (("--tune-schedule", "step"), "--tune-schedule: got step, expected one of linear, constant, cosine"),
        (("--tune-lora", "-1"), "--tune-lora: got -1, expected an int >= 0"),
        (("--tune-warmup", "4"), "--tune-warmup: got 4, expected at most the 3 steps at 512 tokens"),
        (
            ("--screen", "400"),
            "--screen: got 400, expected lengths between 512, from where on that search scores, and the target 1024",
        ),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_done(
    changes: tuple[str, ...],
    words: str,
    command: Callable[..., Finished],
    model_folder: Path,
    long_texts: Path,
    tmp_path: Path,
) -> None:
    done = command(*arguments(model_folder, long_texts, tmp_path / "run"), *changes)
    assert (done.code, words in done.err, done.err.count("\n")) == (2, True, 1), done.err
    assert not (tmp_path / "run/stages").exists()


def test_a_step_that_ranks_cannot_share_is_said_before_anything_is_done(
    command: Callable[..., Finished],
    model_folder: Path,
    long_texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(context, "meet", torch.distributed.HashStore)
    done = command(*arguments(model_folder, long_texts, tmp_path / "run"))
    expected = "--tune-batch: got 1, expected a multiple of 2, the sequences that 2 ranks read at once"
    assert (done.code, done.err) == (2, f"longrope: {expected}\n")
    assert not (tmp_path / "run/stages").exists()


def test_text_with_nothing_left_to_train_on_is_said(
    command: Callable[..., Finished], model_folder: Path, tmp_path: Path
) -> None:
    texts = tiny.texts(tmp_path / "texts", 4, 1400)
    done = command(*arguments(model_folder, texts, tmp_path / "run"))
    assert done.code == 2
    assert "--text: got 0 tokens to train on, expected enough for one sequence of 512" in done.err
    assert not (tmp_path / "run/stages").exists(), "before the searches, not after them"


def test_a_target_that_is_trained_at_needs_no_second_search(
    command: Callable[..., Finished], model_folder: Path, long_texts: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    asked = ("--to", 512, "--tune", "256:2,512:1", "--readjust", "none")
    done = command(*arguments(model_folder, long_texts, run), *asked)
    assert done.code == 0, done.err
    assert "without training" not in done.out
    rope, _ = factors.read(run / "factors/winner.json")
    assert rope.lengths == (128, 512)
    assert rope.regimes[512] == factors.read(run / "stages/search-512/factors/winner.json")[0].scalings[-1]
    assert read(run, "export.json")["reload"]["passed"]
    assert read(run, "lengths.json")["lengths"] == [128, 256, 512]


def test_lengths_double_from_the_original_to_the_target() -> None:
    assert by_length.lengths_between(512, 32768) == [512, 1024, 2048, 4096, 8192, 16384, 32768]
    assert by_length.lengths_between(512, 512) == [512]


def test_a_run_goes_on_in_a_folder_that_was_moved(
    progressive: Run, command: Callable[..., Finished], model_folder: Path, long_texts: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(progressive.folder, tmp_path / "moved"))
    (moved / "lengths.json").unlink()
    done = command(*arguments(model_folder, long_texts, moved))
    assert done.code == 0, done.err
    assert read(moved, "lengths.json") == read(progressive.folder, "lengths.json")
    for log in (moved / "stages").rglob("*.jsonl"):
        assert log.read_bytes() == (progressive.folder / log.relative_to(moved)).read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("--tune-lr", "0.01"), "--tune-lr: got 0.01"),
        (("--tune-warmup", "2"), "--tune-warmup: got 2"),
        (("--seed", "4"), "--seed: got 4"),
        (("--no-search",), "--search: got false"),
    ],
)
def test_stages_of_other_settings_are_not_taken_over(
    changes: tuple[str, ...],
    words: str,
    progressive: Run,
    command: Callable[..., Finished],
    model_folder: Path,
    long_texts: Path,
    tmp_path: Path,
) -> None:
    """Also where the run was killed before its own log had a line."""
    begun = tmp_path / "run"
    begun.mkdir()
    for name in ("run.json", "documents.json"):
        shutil.copy(progressive.folder / name, begun)
    shutil.copytree(progressive.folder / "stages", begun / "stages")
    done = command(*arguments(model_folder, long_texts, begun), *changes)
    assert (done.code, words in done.err, done.err.count("\n")) == (2, True, 1), done.err


def test_another_budget_is_refused_where_the_weights_were_tuned_after_the_search(
    progressive: Run, command: Callable[..., Finished], model_folder: Path, long_texts: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(progressive.folder, tmp_path / "moved"))
    before = (moved / "stages/search-256/evaluations.jsonl").read_bytes()
    done = command(*arguments(model_folder, long_texts, moved), "--budget", "60")
    assert (done.code, "--budget: got" in done.err, done.err.count("\n")) == (2, True, 1), done.err
    assert (moved / "stages/search-256/evaluations.jsonl").read_bytes() == before


def test_a_larger_budget_of_a_search_goes_on_before_the_tuning(
    progressive: Run, command: Callable[..., Finished], model_folder: Path, long_texts: Path, tmp_path: Path
) -> None:
    begun = Path(shutil.copytree(progressive.folder, tmp_path / "begun"))
    for stage in ("tune-256", "tune-512", "search-1024", "readjust", "result"):
        shutil.rmtree(begun / "stages" / stage)
    before = read(begun, "stages/search-256/search.json")["evaluations"]
    done = command(*arguments(model_folder, long_texts, begun), "--budget", "60")
    assert done.code == 0, done.err
    assert read(begun, "stages/search-256/search.json")["evaluations"] > before


def test_training_text_that_changed_is_not_mixed_with_what_was_tuned(
    progressive: Run, command: Callable[..., Finished], model_folder: Path, long_texts: Path, tmp_path: Path
) -> None:
    """The split takes texts by their hashes: a further one that it does not choose leaves the sides as they are."""
    moved = Path(shutil.copytree(progressive.folder, tmp_path / "moved"))
    for length in (256, 512):
        file = moved / f"stages/tune-{length}/tune.json"
        made = json.loads(file.read_text())
        file.write_text(json.dumps({**made, "documents": "other texts"}))
    done = command(*arguments(model_folder, long_texts, moved))
    # The stage itself finds the same text and settings as its own run.json says, and what it has is whole.
    assert done.code == 0, done.err
    run = moved / "stages/tune-256/run.json"
    asked = json.loads(run.read_text())
    asked["settings"]["text"] = "other texts"
    run.write_text(json.dumps(asked))
    done = command(*arguments(model_folder, long_texts, moved))
    assert (done.code, "--text: got" in done.err, done.err.count("\n")) == (2, True, 1), done.err


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tune-256/tune.json", "{", "stages/tune-256/tune.json: got a broken file"),
        ("tune-256/tune.json", '{"format": "longrope-tune/0"}', "tune-256/tune.json, expected what a training leaves"),
        ("search-256/search.json", "{}", "search-256/search.json, expected what a search leaves"),
        ("search-256/factors/winner.json", "{}", "winner.json, expected a factor file of format"),
        ("tune-512/model/model.safetensors", "no weights", "stages/tune-512/model ("),
    ],
)
def test_what_is_broken_is_named_and_refused(
    file: str,
    content: str,
    words: str,
    progressive: Run,
    command: Callable[..., Finished],
    model_folder: Path,
    long_texts: Path,
    tmp_path: Path,
) -> None:
    moved = Path(shutil.copytree(progressive.folder, tmp_path / "moved"))
    (moved / "stages" / file).write_text(content)
    shutil.rmtree(moved / "stages/search-1024")  # which reads the tuned weights
    done = command(*arguments(model_folder, long_texts, moved))
    assert (words in done.err, done.err.count("\n")) == (True, 1), done.err
    assert done.code in (1, 2)


def test_killed_while_a_readjustment_is_proved_it_goes_on(
    progressive: Run, command: Callable[..., Finished], model_folder: Path, long_texts: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(progressive.folder, tmp_path / "moved"))
    for name in ("readjust.json", "factors/readjusted.json"):  # what is written after the last forward
        (moved / "stages/readjust" / name).unlink()
    done = command(*arguments(model_folder, long_texts, moved))
    assert done.code == 0, done.err
    assert read(moved, "ladder.json") == read(progressive.folder, "ladder.json")
