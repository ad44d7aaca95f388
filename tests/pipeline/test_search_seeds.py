"""The seeds of the search and the baselines it is measured against are the constructors of longrope_kernels."""

from __future__ import annotations

import math

import pytest
from landscape import BASE, EXTENSION, ORIGINAL, space

from longrope.search import baselines, seed_factors
from longrope.search.stage import attention_factors
from longrope_kernels import LongRope, RopeScaling

ARGUMENTS = {
    "head_dim": 64,
    "theta": 1e5,
    "original_max_position_embeddings": ORIGINAL,
    "max_position_embeddings": int(ORIGINAL * EXTENSION),
}


@pytest.mark.parametrize("name", ["pi", "ntk", "yarn"])
def test_a_baseline_is_the_published_method(name: str) -> None:
    published = getattr(LongRope, name)(**ARGUMENTS).scalings[-1]
    assert baselines(BASE, ORIGINAL, EXTENSION)[name].scaling(BASE) == published


@pytest.mark.parametrize("name", ["pi", "ntk", "yarn"])
def test_a_seed_has_the_factors_of_the_method_and_attention_factor_one(name: str) -> None:
    published = getattr(LongRope, name)(**ARGUMENTS).scalings[-1]
    seed = seed_factors(BASE, ORIGINAL, EXTENSION)[name]
    assert seed.factors == published.rescale_factors
    assert (seed.start_tokens, seed.attention_factor) == (0, 1.0)


def test_seeds_of_a_partly_rotated_model_cover_its_rotary_pairs() -> None:
    base = RopeScaling(head_dim=96, theta=1e4, rotary_dim=64)
    assert {len(seed.factors) for seed in seed_factors(base, 4096, 8.0).values()} == {32}


def test_the_seeds_obey_the_monotone_rule_and_the_bounds() -> None:
    for seed in seed_factors(BASE, ORIGINAL, EXTENSION).values():
        nearest = space().legal(seed.logs)
        assert nearest.factors == pytest.approx(seed.factors, abs=0.00501)


def test_attention_factor_choices_are_numbers_or_named_formulas() -> None:
    assert attention_factors("1.07", 4.0, 8192) == (1.07,)
    assert attention_factors("yarn", 4.0, 8192) == (0.1 * math.log(4.0) + 1.0,)
    assert attention_factors("su", 4.0, 8192) == (math.sqrt(1 + math.log(4.0) / math.log(8192)),)
    searched = attention_factors("search", 4.0, 8192)
    assert searched[0] == 1.0
    assert list(searched) == sorted(searched)
    assert any(math.isclose(choice, 0.1 * math.log(4.0) + 1.0, abs_tol=1e-6) for choice in searched)
