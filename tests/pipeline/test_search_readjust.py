"""Readjustment for short lengths: between the original's factors and the extended ones, never worse than either."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import Finished, Run

from longrope import factors, models
from longrope.errors import UsageError
from longrope.search.readjust import check_lengths, ends
from longrope.search.seeds import blends
from longrope.search.spaces import Between
from longrope_kernels import LongRope, RopeScaling

ORIGINAL = RopeScaling(head_dim=8, theta=1e4)
TUNED = ORIGINAL.replace(rescale_factors=[1.0, 2.0, 4.0, 8.0], start_tokens=16, attention_factor=1.2)
FURTHER = ORIGINAL.replace(rescale_factors=[1.0, 4.0, 16.0, 64.0], attention_factor=1.4)
LADDER = LongRope(128, {128: ORIGINAL, 1024: TUNED, 8192: FURTHER})


@pytest.mark.parametrize(
    ("length", "far"), [(64, TUNED), (128, TUNED), (1000, TUNED), (1024, FURTHER), (4000, FURTHER)]
)
def test_the_ends_are_the_original_and_the_next_longer_regime(length: int, far: RopeScaling) -> None:
    assert ends(LADDER, length) == (ORIGINAL, far)


def test_a_tuned_model_that_lost_its_original_regime_had_plain_frequencies() -> None:
    assert ends(LongRope(128, {1024: TUNED}), 256) == (ORIGINAL, TUNED)
    assert ends(LongRope(1024, {1024: TUNED}), 256) == (ORIGINAL, TUNED)


@pytest.mark.parametrize("length", [0, 15, 8192, 9000])
def test_lengths_the_ladder_does_not_go_beyond_are_refused(length: int) -> None:
    with pytest.raises(UsageError, match=f"--lengths: got {length}, expected from 16 to below the 8,192 tokens"):
        check_lengths(LADDER, [64, length])


def test_a_model_that_was_never_extended_is_refused() -> None:
    with pytest.raises(UsageError, match="MODEL: got the original factors alone, expected an extended model"):
        check_lengths(LongRope(1024, {1024: ORIGINAL}), [256])


def between(**changes: Any) -> Between:
    arguments = {"attention_factors": (1.0, 1.1, 1.2), "upper": 8.0, "ends": TUNED.rescale_factors}
    return Between(4, 8.0, (0, 16), **{**arguments, **changes})


def test_factors_lie_between_both_ends_pair_by_pair() -> None:
    random = np.random.default_rng(0)
    for _ in range(100):
        made = np.asarray(between(monotone=False).legal(random.normal(1.0, 2.0, 4)).factors)
        assert np.all((made >= 1.0) & (made <= TUNED.rescale_factors))
    shrunk = between(ends=(0.5, 1.0, 2.0, 4.0), lower=0.5, upper=4.0)
    assert shrunk.legal([-9.0] * 4).factors == (0.5, 1.0, 1.0, 1.0)
    assert shrunk.legal([9.0] * 4).factors == (1.0, 1.0, 2.0, 4.0)


def test_the_largest_factor_can_be_made_smaller() -> None:
    assert between(upper=3.0).legal([9.0] * 4).factors == (1.0, 2.0, 3.0, 3.0)


def test_the_seeds_are_both_ends_and_geometric_means_of_them() -> None:
    seeds = blends(between(), 16, 1.2)
    assert list(seeds) == ["original", "blend 0.25", "blend 0.5", "blend 0.75", "extended"]
    assert seeds["original"].scaling(ORIGINAL) == ORIGINAL
    assert seeds["extended"].scaling(ORIGINAL) == TUNED
    assert seeds["blend 0.5"].factors == pytest.approx([1.0, math.sqrt(2), 2.0, math.sqrt(8)])
    assert (seeds["blend 0.5"].start_tokens, seeds["blend 0.5"].attention_factor) == (16, 1.1)


@pytest.fixture(scope="module")
def readjusted(extended: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The arguments of `longrope readjust` on the export of the shared run."""
    folder = tmp_path_factory.mktemp("readjust") / "run"
    text = extended.arguments[extended.arguments.index("--text") + 1]
    return folder, [
        *("readjust", str(extended.folder / "export"), "--lengths", "64,100", "--text", text, "--run-dir", str(folder)),
        *("--dtype", "fp32", "--threads", "1", "--population", "7", "--iterations", "1", "--mutations", "2"),
        *("--crossovers", "1", "--start-tokens", "0,8"),
    ]


def scores(folder: Path, length: int) -> dict[str, float]:
    search = json.loads((folder / f"readjust-{length}.json").read_text())
    return {one["origin"]: one["score"] for one in search["history"]}


def test_it_writes_a_ladder_and_goes_on_without_repeating_anything(
    extended: Run, readjusted: tuple[Path, list[str]], command: Callable[..., Finished]
) -> None:
    folder, arguments = readjusted
    done = command(*arguments)
    assert (done.code, done.err) == (0, "")
    assert "The ladder: 64, 100, 128, 256 tokens. Held-out loss by length:" in done.out

    rope, fields = factors.read(folder / "factors/readjusted.json")
    before, _ = factors.read(extended.folder / "factors/winner.json")
    assert rope.lengths == (64, 100, tiny.ORIGINAL, tiny.TARGET)
    assert rope.original_max_position_embeddings == tiny.ORIGINAL
    assert rope.scalings[2:] == before.scalings
    far = np.asarray(before.scalings[-1].rescale_factors)
    for length in (64, 100):
        found = scores(folder, length)
        assert len(found) >= 7
        best = min(found.values())
        assert fields["objective"]["value"][str(length)] == best <= min(found["seed original"], found["seed extended"])
        made = np.asarray(rope.regimes[length].rescale_factors)
        assert np.all((made >= 1.0) & (made <= far + 1e-9))
        regime, _ = factors.read(folder / f"factors/readjust-{length}.json")
        assert regime.scalings == (rope.regimes[length],)

    files = ("evaluations.jsonl", "factors/readjusted.json", "readjust.json")
    kept = {file: (folder / file).read_bytes() for file in files}
    assert command(*arguments).code == 0
    assert {file: (folder / file).read_bytes() for file in kept} == kept


def test_the_loss_of_a_readjustment_counts_from_position_0(
    readjusted: tuple[Path, list[str]], command: Callable[..., Finished]
) -> None:
    folder, arguments = readjusted
    assert command(*arguments).code == 0
    records = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert {(record["stage"], record["length"], record["start"]) for record in records} == {
        *(("readjust-64", 64, 0), ("readjust-64 heldout", 64, 0)),
        *(("readjust-100", 100, 0), ("readjust-100 heldout", 100, 0)),
    }
    searched, proved = (
        {record["window"] for record in records if record["stage"].endswith("heldout") == held}
        for held in (False, True)
    )
    assert len(searched) == len(proved) == 2
    assert not searched & proved
    records = [record for record in records if not record["stage"].endswith("heldout")]
    original = [r for r in records if r["length"] == 64 and set(r["candidate"]["factors"]) == {1.0}]
    original = [r for r in original if r["candidate"]["start_tokens"] == 0][:2]
    assert scores(folder, 64)["seed original"] == pytest.approx(np.mean([record["nll"] for record in original]))


def test_the_ladder_is_exported_and_read_again_whole(
    extended: Run, readjusted: tuple[Path, list[str]], command: Callable[..., Finished], tmp_path: Path
) -> None:
    folder, arguments = readjusted
    assert command(*arguments).code == 0
    file, out = folder / "factors/readjusted.json", tmp_path / "export"
    done = command("export", extended.folder / "export", "--factors", file, "--out", out, "--dtype", "fp32")
    assert (done.code, done.err) == (0, "")
    assert "two sets of factors: stock transformers knows nothing of those for up to " in done.out
    source = models.find(str(out))
    assert models.rope_of(models.load_config(source), source=source) == factors.read(file)[0]


def test_another_ladder_for_the_same_directory_is_refused(
    extended: Run, readjusted: tuple[Path, list[str]], command: Callable[..., Finished]
) -> None:
    folder, arguments = readjusted
    assert command(*arguments).code == 0
    done = command(*arguments, "--factors", extended.folder / "factors/best_seed.json")
    winner = json.loads((extended.folder / "factors/winner.json").read_text())["rope"]
    if json.loads((extended.folder / "factors/best_seed.json").read_text())["rope"] != winner:
        assert done.code == 2
        assert done.err.startswith("longrope: --factors: got ")
    done = command(*arguments, "--seed", 3)
    assert done.err.startswith(f"longrope: --seed: got 3 in {folder}, expected 0")


@pytest.mark.parametrize(
    ("lengths", "line"),
    [
        ("4k", "--lengths: got '4k', expected ints separated by commas, or none"),
        ("none", "--lengths: got none, expected one or more lengths in tokens"),
        ("64,256", "--lengths: got 256, expected from 16 to below the 256 tokens the ladder serves"),
    ],
)
def test_lengths_as_typed_are_checked_before_the_model_is_loaded(
    extended: Run, command: Callable[..., Finished], lengths: str, line: str
) -> None:
    done = command("readjust", extended.folder / "export", "--lengths", lengths)
    assert (done.code, done.err) == (2, f"longrope: {line}\n")


def test_a_plain_model_needs_its_ladder(
    model_folder: Path, extended: Run, command: Callable[..., Finished], tmp_path: Path, text_folder: Path
) -> None:
    done = command("readjust", model_folder, "--lengths", 64)
    assert done.err == (
        "longrope: MODEL: got the original factors alone, expected an extended model, or its ladder by --factors\n"
    )
    done = command(
        *("readjust", model_folder, "--lengths", 64, "--factors", extended.folder / "factors/winner.json"),
        *("--text", text_folder, "--run-dir", tmp_path / "run", "--dtype", "fp32", "--budget", 10),
    )
    assert (done.code, done.err) == (0, "")
    assert json.loads((tmp_path / "run/readjust-64.json").read_text())["evaluations"] == 10
