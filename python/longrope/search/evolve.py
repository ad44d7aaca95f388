"""The evolution of LongRoPE (arXiv 2402.13753, algorithm 1), over any objective.

Generation 0 is the seeds, the best of them under neighbouring attention factors, and mutations. Every further one is
made of mutations and crossovers of the best candidates ever scored. Where there are screens, they rank a generation's
children on less text, and only the best are scored by the objective; parents, and the winner, are chosen among those.

The attention factor is one temperature for all pairs: the loss is smooth along it, and what the other genes are worth
depends on it. A walk finds in three or four evaluations what mutations, which move other genes as well, find late.

Generation g draws from a generator seeded by (seed, g) and the scores so far, so a run that is started again with the
scores it had makes the same children.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..errors import BudgetExhausted, refuse
from .screening import Screen
from .space import Candidate, Space, nearest
from .variation import crossover, mutate

TRIES = 50  # to draw a child that was not seen before


@dataclass(frozen=True)
class EvolutionSettings:
    """Sizes of the evolution; defaults are the paper's.

    Attributes:
        population: size of generation 0, the seeds included.
        mutations, crossovers: children of every further generation.
        mutation_probability: see `variation.mutate`.
        parents: how many of the best candidates have children.
        controls: children a generation that screens turned down and the objective scores all the same, drawn at
            random: they tell whether the screens are right about what they turn down.
        seed: of all random draws.
    """

    population: int = 64
    iterations: int = 40
    mutations: int = 16
    crossovers: int = 16
    mutation_probability: float = 0.3
    parents: int = 32
    controls: int = 0
    seed: int = 0

    @property
    def candidates(self) -> int:
        """How many an evolution makes, seeds included, without any budget."""
        return self.population + self.iterations * (self.mutations + self.crossovers)

    def __post_init__(self) -> None:
        least = {"population": 1, "parents": 1}
        for name in ("population", "parents", "iterations", "mutations", "crossovers", "controls", "seed"):
            if getattr(self, name) < least.get(name, 0):
                option = "--screen-controls" if name == "controls" else f"--{name}"
                refuse(option, getattr(self, name), f"an int >= {least.get(name, 0)}")
        if not 0 <= self.mutation_probability <= 1:
            refuse("--mutation-probability", self.mutation_probability, "a number between 0 and 1")


@dataclass(frozen=True)
class Scored:
    """A candidate, its score (lower is better), and where it is from: `seed yarn`, `mutation of ...`, ..."""

    candidate: Candidate
    score: float
    origin: str
    generation: int

    @property
    def is_seed(self) -> bool:
        return self.origin.startswith("seed ")


@dataclass
class Outcome:
    """What an evolution found.

    Attributes:
        scored: in the order in which the objective scored them.
        stopped: why it ended.
    """

    scored: list[Scored] = field(default_factory=list)
    generations: int = 0
    screened: int = 0
    stopped: str = ""

    @property
    def best(self) -> Scored:
        """The lowest score; of equal ones the first, and seeds are scored first."""
        return min(self.scored, key=lambda one: one.score)

    @property
    def best_seed(self) -> Scored:
        return min((one for one in self.scored if one.is_seed), key=lambda one: one.score)


def evolve(
    space: Space,
    seeds: Mapping[str, Candidate],
    objective: Callable[[Candidate], float],
    settings: EvolutionSettings,
    screens: Sequence[Screen] = (),
    affords: Callable[[Sequence[int]], bool] = lambda counts: True,
    on_scored: Callable[[Scored], None] = lambda scored: None,
    announce: Callable[[Callable[[Candidate], float], Sequence[Candidate]], None] = lambda score, candidates: None,
) -> Outcome:
    """Search for the candidate with the lowest objective.

    Args:
        objective: any callable from a candidate to a score; may raise `BudgetExhausted` before it starts to work.
        screens: cheaper scores, the cheapest first.
        affords: whether so many candidates can still be scored, by each screen in turn and by the objective; decides
            how many children a generation has.
        on_scored: called after each objective score.
        announce: called with a score and all candidates that it is going to be asked for, one by one, before the first:
            scores that are computed elsewhere can then be computed at the same time.

    Returns:
        All that was scored, the seeds first; the best is never worse than the best seed.
    """
    outcome = Outcome()
    seen: set[str] = set()

    def score(candidate: Candidate, origin: str, generation: int) -> None:
        value = objective(candidate)
        # Not a number (an overflow in half precision) compares as neither better nor worse: the worst, then.
        scored = Scored(candidate, math.inf if math.isnan(value) else value, origin, generation)
        outcome.scored.append(scored)
        on_scored(scored)

    announce(objective, list({candidate.id: candidate for candidate in seeds.values()}.values()))
    for name, candidate in seeds.items():
        if candidate.id not in seen:
            seen.add(candidate.id)
            score(candidate, f"seed {name}", 0)
    try:
        _walk_attention_factor(space, outcome, seen, score, lambda: affords([0] * len(screens) + [1]))
        for generation in range(settings.iterations + 1):
            random = np.random.default_rng([settings.seed, generation])
            active = [screen for screen in screens if screen.dropped_after is None]
            if generation == 0 and settings.population > len(outcome.scored):
                for screen in active:  # seeds have both scores: the first test of the screens
                    if affords([len(seeds) * (screen is other) for other in screens] + [0]):
                        announce(screen.score, [scored.candidate for scored in outcome.scored])
                        for scored in list(outcome.scored):
                            screen(scored.candidate)
            wanted = settings.mutations + settings.crossovers
            if generation == 0:
                wanted = max(settings.population - len(outcome.scored), 0)
            children_count = _affordable(wanted, screens, active, settings.controls, affords)
            if children_count == 0 and wanted > 0:
                raise BudgetExhausted
            parents = sorted(outcome.scored, key=lambda one: one.score)[: settings.parents]
            share = 1.0 if generation == 0 else settings.mutations / max(wanted, 1)
            children = _children(space, parents, children_count, share, settings.mutation_probability, random, seen)
            if not children and wanted > 0:
                outcome.stopped = "no new candidates left in the space"
                return outcome
            outcome.screened += len(children) if active else 0
            survivors = _survivors(children, active, settings.controls, random, announce)
            announce(objective, [candidate for candidate, _ in survivors])
            for candidate, origin in survivors:
                score(candidate, origin, generation)
            outcome.generations = generation
            target = {one.candidate.id: one.score for one in outcome.scored}
            for screen in active:
                screen.judge(target)
    except BudgetExhausted:
        outcome.stopped = "the budget is spent"
        return outcome
    outcome.stopped = f"all {settings.iterations} iterations are done"
    return outcome


def _walk_attention_factor(
    space: Space,
    outcome: Outcome,
    seen: set[str],
    score: Callable[[Candidate, str, int], None],
    affords: Callable[[], bool],
) -> None:
    """Score the best seed under the next choices of the attention factor, in either direction while that is better."""
    choices = space.attention_factors
    for step in (-1, 1):
        while True:
            best = outcome.best
            at = choices.index(nearest(choices, best.candidate.attention_factor)) + step
            if not 0 <= at < len(choices):
                break
            moved = replace(best.candidate, attention_factor=choices[at])
            if moved.id in seen:
                break
            if not affords():
                raise BudgetExhausted
            seen.add(moved.id)
            score(moved, f"attention factor of {best.candidate.id[:8]}", 0)
            if outcome.best is best:
                break


def survivors_counts(children: int, screens: Sequence[Screen], active: Sequence[Screen], controls: int) -> list[int]:
    """Return how many of `children` each screen scores, and last how many the objective does."""
    counts, left = [], children
    for screen in screens:
        counts.append(left if screen in active else 0)
        if screen in active:
            left = math.ceil(left * screen.keep)
    return [*counts, min(left + (controls if active else 0), children)]


def _affordable(
    wanted: int,
    screens: Sequence[Screen],
    active: Sequence[Screen],
    controls: int,
    affords: Callable[[Sequence[int]], bool],
) -> int:
    """Return the largest number of children, up to `wanted`, that can be screened and scored to the end."""
    for count in range(wanted, 0, -1):
        if affords(survivors_counts(count, screens, active, controls)):
            return count
    return 0


def _children(
    space: Space,
    parents: Sequence[Scored],
    count: int,
    mutation_share: float,
    probability: float,
    random: np.random.Generator,
    seen: set[str],
) -> list[tuple[Candidate, str]]:
    """Draw `count` candidates that were not seen before, with what they came from."""
    children: list[tuple[Candidate, str]] = []
    mutations = round(count * mutation_share)
    for number in range(count):
        for _ in range(TRIES):
            first = int(len(parents) * random.random() ** 2)  # the better, the more children
            one = parents[first]
            if number < mutations or len(parents) == 1:
                child = mutate(one.candidate, space, random, probability)
                origin = f"mutation of {one.candidate.id[:8]}"
            else:
                second = _another(first, len(parents), random)
                other, third = parents[second], parents[_another(second, len(parents), random)]
                child = crossover(one.candidate, other.candidate, third.candidate, space, random)
                origin = f"crossover of {one.candidate.id[:8]} with {other.candidate.id[:8]}"
            if child.id not in seen:
                seen.add(child.id)
                children.append((child, origin))
                break
    return children


def _another(than: int, count: int, random: np.random.Generator) -> int:
    """Draw one of `count` >= 2 indices but `than`."""
    drawn = int(random.integers(0, count - 1))
    return drawn + (drawn >= than)


def _survivors(
    children: Sequence[tuple[Candidate, str]],
    active: Sequence[Screen],
    controls: int,
    random: np.random.Generator,
    announce: Callable[[Callable[[Candidate], float], Sequence[Candidate]], None],
) -> list[tuple[Candidate, str]]:
    """Let the screens rank the children; return the best, and controls, in the order in which to score them."""
    left = list(children)
    for screen in active:
        announce(screen.score, [candidate for candidate, _ in left])
        left.sort(key=lambda child: screen(child[0]))
        left = left[: math.ceil(len(left) * screen.keep)]
    if active and controls:
        kept = {candidate.id for candidate, _ in left}
        refused = [child for child in children if child[0].id not in kept]
        for index in random.permutation(len(refused))[:controls]:
            candidate, origin = refused[index]
            left.append((candidate, f"{origin}, a control the screen turned down"))
    return left
