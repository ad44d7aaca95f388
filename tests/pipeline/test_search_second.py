"""A search on a model that was extended before: candidates multiply its factors, seeds follow from its wavelengths."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import Finished, Run

from longrope import factors
from longrope.inspection import critical_pair
from longrope.search import baselines, seed_factors
from longrope.search.seeds import effective_pairs
from longrope_kernels import RopeScaling

PLAIN = RopeScaling(head_dim=64, theta=1e5)
TUNED_LENGTH, FURTHER = 65_536, 8.0


def tuned(name: str) -> RopeScaling:
    """SmolLM2's embedding, trained to 8,192, as it is after an extension to 65,536."""
    shape = {"head_dim": 64, "theta": 1e5, "factor": 8.0}
    return {
        "pi": lambda: RopeScaling.pi(**shape),
        "ntk": lambda: RopeScaling.ntk(**shape),
        "yarn": lambda: RopeScaling.yarn(**shape, original_max_position_embeddings=8192),
    }[name]()


@pytest.mark.parametrize("method", ["pi", "ntk", "yarn"])
def test_pairs_that_turn_alike_get_the_same_factor_whatever_made_them_turn_so(method: str) -> None:
    """A larger theta and the factors that are the same frequencies give the same seeds."""
    larger = RopeScaling(head_dim=64, theta=1e6)
    factored = PLAIN.replace(rescale_factors=(PLAIN.inv_freq / larger.inv_freq).tolist())
    seeds = [seed_factors(base, TUNED_LENGTH, FURTHER)[method].factors for base in (larger, factored)]
    if method == "yarn":  # the released code rounds the ends of its ramp to whole pairs, which are not the same ones
        assert np.abs(np.diff(np.log(seeds), axis=0)).max() < 0.25
    else:
        assert seeds[0] == pytest.approx(seeds[1])


@pytest.mark.parametrize("base", ["pi", "ntk", "yarn"])
def test_yarn_keeps_what_turns_often_and_interpolates_what_turns_less_than_once(base: str) -> None:
    scaling = tuned(base)
    turns = TUNED_LENGTH * scaling.inv_freq.numpy() / (2 * math.pi)
    factor = np.asarray(seed_factors(scaling, TUNED_LENGTH, FURTHER)["yarn"].factors)
    whole_pair = 1e5 ** (1 / 32)
    assert np.all(factor[turns > 32 * whole_pair] == 1.0)
    assert np.all(factor[turns < 1 / whole_pair] == FURTHER)
    ramp = (turns < 32 / whole_pair) & (turns > whole_pair)
    assert ramp.any()
    assert np.all((factor[ramp] > 1.0) & (factor[ramp] < FURTHER))


def test_yarn_by_theta_alone_would_take_pairs_to_turn_more_often_than_they_do() -> None:
    scaling = tuned("pi")
    ours = np.asarray(seed_factors(scaling, TUNED_LENGTH, FURTHER)["yarn"].factors)
    by_theta = np.asarray(RopeScaling.yarn(64, 1e5, FURTHER, TUNED_LENGTH).rescale_factors)
    assert np.all(by_theta <= ours)
    assert np.abs(ours - by_theta).max() > 1.0


def test_ntk_keeps_the_first_pair_and_interpolates_the_last() -> None:
    for base in ("pi", "ntk", "yarn"):
        ntk = seed_factors(tuned(base), TUNED_LENGTH, FURTHER)["ntk"].factors
        assert (ntk[0], ntk[-1]) == (1.0, pytest.approx(FURTHER))
        assert list(ntk) == sorted(ntk)


def test_a_llama_3_1_embedding_is_seeded_from_its_wavelengths() -> None:
    base = RopeScaling(head_dim=8, theta=1e4, rescale_factors=[1.0, 1.0, 4.0, 8.0])
    assert effective_pairs(base).tolist() == pytest.approx([0, 1, 2 + 4 * math.log(4, 1e4), 3 + 4 * math.log(8, 1e4)])
    assert effective_pairs(PLAIN).tolist() == list(range(32))


@pytest.mark.parametrize("method", ["pi", "ntk", "yarn"])
def test_a_second_baseline_multiplies_the_factors_of_the_first(method: str) -> None:
    base = tuned("yarn")
    scaling = baselines(base, TUNED_LENGTH, FURTHER)[method].scaling(base)
    ratio = np.asarray(scaling.rescale_factors) / np.asarray(base.rescale_factors)
    assert ratio.min() >= 1.0 - 1e-12
    assert ratio[-1] == pytest.approx(FURTHER)


def test_the_critical_pair_of_a_tuned_model_is_that_of_its_wavelengths() -> None:
    plain = critical_pair(PLAIN.inv_freq.tolist(), 8192)
    for base in ("pi", "yarn"):
        assert critical_pair(tuned(base).inv_freq.tolist(), TUNED_LENGTH) == plain
    assert critical_pair(PLAIN.inv_freq.tolist(), TUNED_LENGTH) > plain


def test_a_second_search_starts_from_the_first_ones_factors(
    extended: Run, command: Callable[..., Finished], tmp_path: Path
) -> None:
    texts = tiny.texts(tmp_path / "texts", letters=600)
    export, folder = extended.folder / "export", tmp_path / "run"
    done = command(
        *("search", export, "--to", 512, "--text", texts, "--run-dir", folder, "--dtype", "fp32", "--threads", 1),
        *("--population", 5, "--iterations", 1, "--mutations", 2, "--crossovers", 1, "--start-tokens", 0),
    )
    assert (done.code, done.err) == (0, "")
    assert "scored from position 256" in done.out
    first, _ = factors.read(extended.folder / "factors/winner.json")
    second, fields = factors.read(folder / "factors/winner.json")
    assert second.lengths == (128, 256, 512)
    assert second.scalings[:2] == first.scalings
    product = np.multiply(first.scalings[-1].rescale_factors, fields["candidate"]["factors"])
    assert second.scalings[-1].rescale_factors == pytest.approx(product)
    search = json.loads((folder / "search.json").read_text())
    base = first.scalings[-1]
    pi, _, yarn = (one["candidate"]["factors"] for one in search["history"][:3])
    assert set(pi) == {2.0}
    assert tuple(yarn) == seed_factors(base, 256, 2.0)["yarn"].factors
