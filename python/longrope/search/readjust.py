"""Readjustment for short lengths: LongRoPE's "short context recovery" (arXiv 2402.13753).

Weights that were tuned under large factors read short texts worse than they did. At each length below the tuned one a
search on those weights chooses factors between the original's and the extended ones, and all of them together are a
ladder of regimes. Both ends are seeds, so a regime is never worse than either on the search documents; what it is worth
on others, the held-out ones say.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

import longrope_kernels as lk

from .. import factors
from ..context import Context
from ..errors import refuse
from ..evaluate.scoring import Scorer, mean_nll
from ..progress import say
from ..team import Forward
from .budget import Budget
from .objectives import TextLoss
from .problem import Problem
from .seeds import blends
from .solve import keep_time, provenance, solve
from .space import Candidate
from .spaces import Between
from .stage import evolution_settings

FORMAT = "longrope-readjust/1"
LADDER_FILE, RESULT_FILE = "factors/readjusted.json", "readjust.json"
ENDS = ("original", "extended")  # seeds, see `seeds.blends`
LEAST_LENGTH = 16  # tokens: what an interval needs


def run_readjustment(
    context: Context, ladder: lk.LongRope, lengths: Sequence[int], budget: Budget | None = None
) -> lk.LongRope:
    """Search factors at each length, and return the ladder with a regime for each of them.

    Writes `readjust-LENGTH.json` and `factors/readjust-LENGTH.json` for each length, what came out to `readjust.json`,
    and the ladder to `factors/readjusted.json`, a factor file.

    Args:
        context: its model's weights are those that `ladder` is for; its documents are read from their beginning.
        ladder: what was reached by extension: the original regime, where there is one, and longer ones.
        lengths: in tokens, below the longest of the ladder.
        budget: shared out evenly between the lengths; None: all that the request asks for.
    """
    check_lengths(ladder, lengths)
    found: list[dict[str, Any]] = []
    regimes = dict(ladder.regimes)
    for length in sorted(set(lengths)):
        problem = readjustment_problem(context, ladder, length)
        say()
        say(f"Readjusting for {length:,} tokens")
        result = solve(context, problem, _share(budget, len(set(lengths))))
        regimes[length] = Candidate.from_dict(result["winner"]["candidate"]).scaling(problem.base)
        found.append(prove(context, problem, result))
    readjusted = lk.LongRope(ladder.original_max_position_embeddings, regimes)
    spent = {"evaluations": None, "seconds": None} if budget is None else budget.bounds
    summary = {"format": FORMAT, "ladder": list(readjusted.lengths), "lengths": found, "budget": spent}
    content = factors.describe(
        readjusted,
        context.loaded.name,
        f"readjusted for {', '.join(str(one['length']) for one in found)} tokens",
        objective={
            "what": "mean negative log-likelihood in nats per token, by length",
            "value": {str(one["length"]): one["search"]["readjusted"] for one in found},
            "origin": {str(one["length"]): one["origin"] for one in found},
        },
        provenance=provenance(context),
    )
    keep_time(context, LADDER_FILE, content)
    context.run.write_json(RESULT_FILE, summary)  # last: where it is, all is
    say_readjustment(summary)
    return readjusted


def readjustment_problem(context: Context, ladder: lk.LongRope, length: int) -> Problem:
    """Return the search for the regime of sequences of `length` tokens."""
    request = context.request
    near, far = ends(ladder, length)
    relative = tuple(there / here for there, here in zip(far.rescale_factors, near.rescale_factors, strict=True))
    attention = far.attention_factor / near.attention_factor
    largest = float(max(relative))
    space = Between(
        near.pairs,
        math.exp(float(np.abs(np.log(relative)).max()) or 1.0),
        tuple(sorted({near.start_tokens, far.start_tokens, *request.start_tokens})),
        tuple(sorted({attention ** (step / 4) for step in range(5)})),
        upper=max(largest, 1.0 + 1e-9),
        monotone=request.monotone and all(one <= other for one, other in itertools.pairwise(relative)),
        ends=relative,
        lower=min((*relative, 1.0)),
    )
    seeds = blends(space, far.start_tokens, attention)
    seeds["original"] = dataclasses.replace(seeds["original"], start_tokens=near.start_tokens)
    return Problem(
        f"readjust-{length}",
        f"readjust-{length}.json",
        {"winner": f"factors/readjust-{length}.json"},
        "LongRoPE, readjusted",
        near,
        lambda scaling: lk.LongRope(ladder.original_max_position_embeddings, {length: scaling}),
        space,
        seeds,
        TextLoss(context.split.search, length, 0),
        evolution_settings(request),
    )


def ends(ladder: lk.LongRope, length: int) -> tuple[lk.RopeScaling, lk.RopeScaling]:
    """Return the original embedding and the extended one that factors for `length` tokens lie between.

    The extended one is the next longer regime of the ladder: after a second interpolation, what the weights were tuned
    with, not what was found later without training.
    """
    lengths, scalings = ladder.lengths, ladder.scalings
    has_original = len(lengths) > 1 and lengths[0] <= ladder.original_max_position_embeddings
    near = scalings[0] if has_original else _plain(scalings[0])
    least = max(length, lengths[0]) if has_original else length
    far = next((scaling for upto, scaling in ladder.regimes.items() if upto > least), scalings[-1])
    return near, far


def check_lengths(ladder: lk.LongRope, lengths: Sequence[int]) -> None:
    """Refuse lengths that the ladder does not go beyond, and a ladder that was never extended."""
    if not lengths:
        refuse("--lengths", "none", "one or more lengths in tokens")
    longest = ladder.max_position_embeddings
    for length in lengths:
        if not LEAST_LENGTH <= length < longest:
            refuse("--lengths", length, f"from {LEAST_LENGTH} to below the {longest:,} tokens the ladder serves")
        near, far = ends(ladder, length)
        if near.rescale_factors == far.rescale_factors:
            refuse("MODEL", "the original factors alone", "an extended model, or its ladder by --factors")


def prove(context: Context, problem: Problem, result: dict[str, Any]) -> dict[str, Any]:
    """Return what one readjustment gained on either end, on the search documents and on the held-out ones."""
    length, heldout = problem.objective.length, TextLoss(context.split.heldout, problem.objective.length, 0)
    winner = Candidate.from_dict(result["winner"]["candidate"])
    scores = {one["origin"]: one["score"] for one in result["history"]}
    scorer = Scorer(context.loaded, context.run.evaluations, team=context.team)
    forwards = {}
    for name, candidate in (*((end, problem.seeds[end]) for end in ENDS), ("readjusted", winner)):
        about = {"stage": f"{problem.name} heldout", "candidate": candidate.to_dict()}
        rope = problem.rope(candidate)
        forwards[name] = [Forward(one.window, rope, one.length, one.start, about) for one in heldout.samples]
    scorer.announce(itertools.chain(*forwards.values()))
    records = {
        name: [scorer.score(one.window, one.rope, one.length, one.start, **one.about) for one in some]
        for name, some in forwards.items()
    }
    return {
        "length": length,
        "origin": result["winner"]["origin"],
        "largest_factor": max(winner.factors),
        "search": {**{end: scores[f"seed {end}"] for end in ENDS}, "readjusted": result["winner"]["score"]},
        "heldout": {name: mean_nll(some, 0, length) for name, some in records.items()},
        "differences": {end: heldout.difference(records["readjusted"], records[end]).to_dict() for end in ENDS},
    }


def say_readjustment(summary: dict[str, Any]) -> None:
    """Print the ladder, and what each readjusted regime is worth on held-out documents."""
    say()
    say(f"The ladder: {', '.join(f'{length:,}' for length in summary['ladder'])} tokens. Held-out loss by length:")
    for one in summary["lengths"]:
        losses = ", ".join(f"{name} {value:.4f}" for name, value in one["heldout"].items())
        say(f"  {one['length']:,}: {losses} ({one['origin']}, largest factor {one['largest_factor']:g})")
        for end, difference in one["differences"].items():
            say(f"    minus {end}: {difference['mean']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]")


def _plain(scaling: lk.RopeScaling) -> lk.RopeScaling:
    return scaling.replace(rescale_factors=None, start_tokens=0, attention_factor=1.0)


def _share(budget: Budget | None, lengths: int) -> Budget:
    if budget is None:
        return Budget()
    evaluations = None if budget.evaluations is None else budget.evaluations // lengths
    return Budget(evaluations, None if budget.seconds is None else budget.seconds / lengths)
