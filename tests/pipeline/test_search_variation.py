"""Mutation changes one candidate; crossover really recombines two."""

from __future__ import annotations

import numpy as np
import pytest
from landscape import Landscape, ramp, seeds, space

from longrope.search import Candidate
from longrope.search.variation import SHAPE_MOVES, Move, crossover, genes, mutate

FREE = space(monotone=False)
TARGET = ramp(1.2, 4.0, 12.0, 2.0)
HALF = len(TARGET) // 2


def candidate(factors: np.ndarray, start_tokens: int = 0) -> Candidate:
    return FREE.legal(np.log(factors), start_tokens)


def test_crossover_puts_the_good_halves_of_two_parents_into_one_child() -> None:
    wrong = TARGET * 1.4
    first = candidate(np.concatenate((TARGET[:HALF], wrong[HALF:])))
    other = candidate(np.concatenate((wrong[:HALF], TARGET[HALF:])))
    random, landscape = np.random.default_rng(0), Landscape(TARGET, 0)
    children = [crossover(first, other, first, FREE, random) for _ in range(400)]
    assert min(map(landscape, children)) < 0.4 * min(landscape(first), landscape(other))


def test_crossover_takes_pairs_from_both_parents() -> None:
    first, other = candidate(np.full(32, 1.5)), candidate(np.full(32, 3.0))
    random = np.random.default_rng(1)
    mixed = 0
    for _ in range(200):
        factors = set(crossover(first, other, other, FREE, random).factors)
        mixed += factors == {1.5, 3.0}
    assert mixed > 20


def test_crossover_fades_and_blends_and_goes_beyond_either_parent() -> None:
    first, other = candidate(np.full(32, 2.0)), candidate(np.full(32, 3.0))
    random = np.random.default_rng(10)
    children = [np.asarray(crossover(first, other, first, FREE, random).factors) for _ in range(300)]
    fades = [child for child in children if child[0] < 2.1 and child[-1] > 2.9 and len(set(child)) > 3]
    flat = [child[0] for child in children if len(set(child)) == 1]
    assert len(fades) > 10
    assert all(np.all(np.diff(child) >= 0) for child in fades)
    assert any(2.0 < level < 3.0 for level in flat)
    assert min(flat) < 2.0
    assert max(flat) > 3.0


def test_crossover_moves_along_the_difference_of_two_others() -> None:
    """The third parent has a bump that neither of the others has: only their difference can bring it in."""
    bump = np.ones(32)
    bump[5] = 1.5
    first, other, third = (candidate(2.0 * shape) for shape in (np.ones(32), np.ones(32), bump))
    random = np.random.default_rng(11)
    children = {crossover(first, other, third, FREE, random).factors for _ in range(100)}
    assert any(child[5] < 2.0 and child[4] == child[6] == 2.0 for child in children)


def test_crossover_takes_n_hat_from_either_parent_and_from_nowhere_else() -> None:
    first, other = candidate(TARGET, 4), candidate(TARGET, 64)
    random = np.random.default_rng(2)
    drawn = [crossover(first, other, first, FREE, random).start_tokens for _ in range(200)]
    assert set(drawn) == {4, 64}
    assert 60 < drawn.count(4) < 140


def test_crossover_of_equal_parents_is_the_parent() -> None:
    parent = candidate(TARGET, 16)
    random = np.random.default_rng(3)
    assert {crossover(parent, parent, parent, FREE, random) for _ in range(100)} == {parent}


@pytest.mark.parametrize("name", ["pi", "ntk", "yarn"])
@pytest.mark.parametrize("monotone", [True, False])
def test_children_are_legal(name: str, monotone: bool) -> None:
    bounds = space(monotone)
    random = np.random.default_rng(4)
    parents = list(seeds().values())
    parent = seeds()[name]
    for _ in range(150):
        for child in (
            mutate(parent, bounds, random),
            crossover(parent, *(parents[int(random.integers(3))] for _ in range(2)), bounds, random),
        ):
            assert bounds.legal(child.logs, child.start_tokens, child.attention_factor) == child
            assert len(child.factors) == len(parent.factors)


def test_mutation_nearly_always_changes_something() -> None:
    random = np.random.default_rng(5)
    parent = seeds()["yarn"]
    assert sum(mutate(parent, FREE, random) == parent for _ in range(200)) < 10


def test_mutation_probability_nought_leaves_n_hat_and_the_attention_factor() -> None:
    random = np.random.default_rng(6)
    parent = candidate(TARGET, 16)
    children = [mutate(parent, FREE, random, probability=0.0) for _ in range(100)]
    assert {child.start_tokens for child in children} == {16}


def test_mutation_reaches_every_n_hat() -> None:
    random = np.random.default_rng(7)
    parent = candidate(TARGET, 16)
    assert {mutate(parent, FREE, random).start_tokens for _ in range(500)} == set(FREE.start_tokens)


@pytest.mark.parametrize("move", SHAPE_MOVES, ids=lambda move: move.__name__)
def test_a_shape_move_leaves_its_argument_alone_and_is_finite(move: Move) -> None:
    random = np.random.default_rng(8)
    logs = np.log(TARGET)
    before = logs.copy()
    for _ in range(50):
        moved = move(logs, 0.3, random)
        assert moved.shape == logs.shape
        assert np.isfinite(moved).all()
    assert np.array_equal(logs, before)


def test_genes_move_about_the_asked_share_of_pairs() -> None:
    random = np.random.default_rng(9)
    moved = np.mean([genes(np.zeros(32), 0.1, random, 0.3) != 0 for _ in range(300)])
    assert moved == pytest.approx(0.3, abs=0.03)
