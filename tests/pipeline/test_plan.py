"""What is said before a run: pace, memory, the stages of a progressive extension, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import Run

from longrope import plan
from longrope.context import Request
from longrope.errors import UsageError
from longrope.models import LoadedModel
from longrope.plan import Pace, Stage
from longrope.progressive.recipe import Recipe, parse_tune
from longrope.run import read_run
from longrope.search.stage import planned_search

TUNED = ((256, 10), (512, 5))


@pytest.mark.parametrize(("linear", "square"), [(1e-3, 0.0), (0.0, 1e-6), (2e-4, 3e-7)])
def test_a_pace_goes_through_what_was_measured_and_beyond(linear: float, square: float) -> None:
    def true(length: int) -> float:
        return linear * length + square * length**2

    pace = Pace.through((512, true(512)), (2048, true(2048)))
    assert pace.seconds(65536) == pytest.approx(true(65536))


def test_no_part_of_a_noisy_pace_is_negative() -> None:
    fast_long, fast_short = Pace.through((512, 1.0), (2048, 3.9)), Pace.through((512, 0.01), (2048, 9.0))
    assert fast_long.square == 0.0
    assert fast_short.linear == 0.0
    assert 0 < fast_long.seconds(100) < fast_long.seconds(1000)


@pytest.mark.parametrize(("recompute", "forwards"), [(False, 3), (True, 4)])
def test_training_costs_a_forward_more_where_activations_are_computed_again(recompute: bool, forwards: int) -> None:
    pace = Pace(1e-3, 0.0)
    train, read = (plan.seconds_of(Stage("a", kind, 512, 10, recompute=recompute), pace) for kind in ("tune", "search"))
    assert train == pytest.approx(forwards * read) == pytest.approx(forwards * 5.12)


def test_ranks_share_out_the_sequences_and_the_time_a_search_may_take() -> None:
    pace = Pace(1e-3, 0.0)
    stage = Stage.search("a", "search", {256: 5, 512: 10}, None)
    assert plan.seconds_of(stage, pace) == pytest.approx(5 * 0.256 + 10 * 0.512)
    assert plan.seconds_of(stage, pace, 2) == pytest.approx(3 * 0.256 + 5 * 0.512)
    assert plan.seconds_of(Stage.search("a", "search", {512: 10}, 4.0), pace, 2) == pytest.approx(2.0)


def test_screens_are_counted_in_sequences_tokens_and_time() -> None:
    """Ten seeds and children on two windows: both screens read all that come to them, the target what they let pass."""
    request = Request(
        *("", 512),
        **{"population": 10, "iterations": 2, "mutations": 4, "crossovers": 2, "screen_keep": 0.5},
        **{"screens": (192, 256, 384), "screen_documents": 1, "screen_controls": 1},
    )
    # 192 is below what the model knows. Children: 7, then twice 6; of 7 the second screen sees 4 and the target 2 + 1.
    forwards = planned_search(request, 2, 512, 200, None)
    assert forwards == {256: 3 + 7 + 6 + 6, 384: 3 + 4 + 3 + 3, 512: 2 * (3 + 3 + 3 + 3)}
    stage = Stage.search("search-512", "second search", forwards, None)
    assert (stage.length, stage.sequences, stage.screens) == (512, 24, {256: 22, 384: 13})
    assert stage.tokens == 24 * 512 + 22 * 256 + 13 * 384
    assert plan.seconds_of(stage, Pace(1e-3, 0.0)) == pytest.approx(1e-3 * stage.tokens)
    assert plan.sequences_of({**stage.__dict__}) == ("22 + 13 + 24", "256 + 384 + 512")
    # A budget counts forwards of any length: the seeds first, and of the rest the same share of each.
    less = planned_search(request, 2, 512, 200, 30)
    assert sum(less.values()) == 30
    assert less[512] >= 6
    assert less[256] / 22 == pytest.approx(less[384] / 13, abs=0.1)
    assert planned_search(request, 2, 512, 200, 1000) == forwards
    # A walk along nine attention factors scores up to eight candidates, unscreened, which leaves none to draw at first.
    walked = planned_search(dataclasses.replace(request, attention_factor="search"), 2, 512, 200, None)
    assert walked == {256: 3 + 6 + 6, 384: 3 + 3 + 3, 512: 2 * (3 + 8 + 3 + 3)}


def test_the_plan_says_what_the_search_itself_says(extended: Run) -> None:
    settings = read_run(extended.folder)["settings"]
    known = {name: value for name, value in settings.items() if name in Request.__dataclass_fields__}
    request = Request(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})
    planned = planned_search(request, 2, 256, 128, None)
    assert sum(planned.values()) > planned[256]
    assert f"  {sum(planned.values())} evaluations in all" in extended.finished.out
    said = extended.finished.out[: extended.finished.out.index("baselines on held-out documents")]
    row = next(line for line in said.splitlines() if line.startswith("│ search "))
    assert [cell.strip() for cell in row.split("│")[2:4]] == [f"{planned[192]} + {planned[256]}", "192 + 256"]


def test_too_little_memory_for_one_forward_is_said_before_a_search(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = plan.forward_bytes(loaded, 4096)
    monkeypatch.setattr(plan, "share_of_memory", lambda loaded_bytes, ranks: needed)
    plan.check_room(loaded, 4096)
    with pytest.raises(UsageError, match=r"^--to: got .* for 8,192 tokens, .* expected at most about 4,096 tokens$"):
        plan.check_room(loaded, 8192)


def test_memory_grows_with_the_length_and_starts_at_the_weights(loaded: LoadedModel) -> None:
    weights = sum(value.numel() * value.element_size() for value in loaded.model.parameters())
    short, long, longer = (plan.forward_bytes(loaded, tokens) for tokens in (8192, 2**17, 2**18))
    assert weights < short < long < longer
    config = loaded.model.config
    row = config.hidden_size + 2 * config.num_key_value_heads * config.head_dim
    assert longer - long == 4 * 2**17 * row  # the chunks are full at both


def test_what_memory_does_not_hold_is_refused_with_what_would_fit(loaded: LoadedModel) -> None:
    stage = Stage("search-65536", "search", 65536, 10)
    needs = [(stage, plan.forward_bytes(loaded, stage.length))]
    plan.check_memory(128, loaded, needs, needs[0][1])
    with pytest.raises(UsageError, match=r"--to: got .* for 65,536 tokens, .* expected at most about 32,768 tokens"):
        plan.check_memory(128, loaded, needs, needs[0][1] - 1)
    with pytest.raises(UsageError, match=r"--tune: got .* expected shorter sequences"):
        plan.check_memory(128, loaded, [(Stage("tune-64", "tune", 64, 1), 10**6)], 10**6 - 1)


@pytest.mark.parametrize(
    ("tune", "readjust", "words"),
    [
        ((), (), "--tune: got nothing"),
        (((512, 5), (256, 10)), (), "--tune: got 512:5,256:10"),
        (((128, 5),), (), "ascending lengths above 128"),
        (((8192, 5),), (), "up to the target 4096"),
        (TUNED, (256, 128), "got 256,128, expected ascending"),
        (TUNED, (512,), "from 16 to below the tuned length 512"),
        (TUNED, (8, 64), "from 16 to below the tuned length 512"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(
    tune: tuple[tuple[int, int], ...], readjust: tuple[int, ...], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        Recipe(128, 4096, tune, readjust)


def test_a_second_search_beyond_what_the_paper_tried_is_said() -> None:
    assert Recipe(128, 4096, TUNED).notes == []
    assert "16 times the tuned length" in Recipe(128, 8192, TUNED).notes[0]


def test_tune_is_parsed() -> None:
    assert parse_tune("2048:150,4096:100") == ((2048, 150), (4096, 100))
    assert parse_tune("none") == ()


@pytest.mark.parametrize("text", ["", "2048", "2048:", "2048:0", "a:1", "1:2:3", "2048:10;4096:5"])
def test_tune_that_does_not_parse_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--tune"):
        parse_tune(text)


def test_the_pace_is_taken_near_the_lengths_it_is_for(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that advances by what a forward should take: attention's share shows from 8,192 tokens on."""
    now, read = [0.0], list[int]()

    def forward(model: object, ids: torch.Tensor) -> None:
        tokens = ids.numel()
        read.append(tokens)
        now[0] += 1e-5 * tokens + 1e-9 * tokens**2

    monkeypatch.setattr(plan, "token_nll", forward)
    monkeypatch.setattr(plan.time, "monotonic", lambda: now[0])
    pace = plan.measure_pace(loaded, 65536)
    assert pace.seconds(65536) == pytest.approx(1e-5 * 65536 + 1e-9 * 65536**2)
    assert read == [512, 512, 2048, 8192, 32768], "none above the longest, none needed after one of two seconds"
    read.clear()
    plan.measure_pace(loaded, 4096)
    assert read == [512, 512, 2048]
