"""`longrope measure`: one or more methods, at several lengths, on several tasks, into a run directory.

Every forward is a line of the log, synced before the next begins, and never computed again. What comes out of a method
is `measured/METHOD.json`; a later call with other tasks adds to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import longrope_kernels as lk

from ..context import Context
from ..progress import Task, task
from ..run import digest
from ..search.budget import forward_cost
from ..search.seeds import baselines
from . import grids, harness, lengths, prompts, ruler
from .bootstrap import mean_interval, wilson
from .lengths import STRIDE
from .scoring import Scorer

FORMAT = "longrope-measured/1"
FOLDER = "measured"
PERPLEXITY, SLIDING, RULER = "perplexity", "sliding", "ruler"
TASKS = (PERPLEXITY, SLIDING, grids.PASSKEY, grids.MULTI_NEEDLE, RULER)
BASELINES = {"original": "original", "pi": "PI", "ntk": "NTK", "dynamic-ntk": "dynamic NTK", "yarn": "YaRN"}


@dataclass(frozen=True)
class Plan:
    """What is measured of every method.

    Attributes:
        lengths: tokens of a window, or of a prompt with its answers.
        tasks: of `TASKS` and `ruler.TASKS`.
        samples: trials of a cell of a grid, and samples of a RULER task.
        needles: keys of multi-needle.
        stride: new tokens of a sliding window.
        lm_eval: names of tasks; `lm_eval_limit`: samples of each, None: all.
    """

    lengths: tuple[int, ...]
    tasks: tuple[str, ...]
    depths: tuple[float, ...] = grids.DEPTHS
    samples: int = 5
    needles: int = 4
    stride: int = STRIDE
    lm_eval: tuple[str, ...] = ()
    lm_eval_limit: int | None = None
    seed: int = 0

    @property
    def ruler_tasks(self) -> tuple[str, ...]:
        """The tasks of `ruler`, all or those named."""
        return tuple(ruler.TASKS) if RULER in self.tasks else tuple(one for one in ruler.TASKS if one in self.tasks)


@dataclass(frozen=True)
class Method:
    """A ladder by name.

    Attributes:
        at: returns the ladder for sequences of so many tokens: one and the same, but for dynamic NTK.
    """

    name: str
    title: str
    at: Callable[[int], lk.LongRope]


def baseline(context: Context, name: str) -> Method:
    """Return one of `BASELINES`: PI, NTK and YaRN made for the target length, dynamic NTK for each length anew."""
    loaded = context.loaded
    original = loaded.original_length

    @functools.cache
    def extended(length: int) -> lk.LongRope:
        if name == "original" or length <= original:
            return loaded.rope
        candidate = baselines(loaded.base, original, length / original)["ntk" if name == "dynamic-ntk" else name]
        return loaded.extended(candidate.scaling(loaded.base), length)

    def at(length: int) -> lk.LongRope:
        return extended(length if name == "dynamic-ntk" else context.target_length)

    return Method(name, BASELINES[name], at)


def regime(context: Context, method: Method, length: int) -> lk.LongRope:
    """Return the ladder to run `length` tokens under.

    Where its regime for them is the model's own, that is the model's own ladder: the same computation, which all
    methods then share.
    """
    rope, own = method.at(length), context.loaded.rope
    return own if rope.select(length) == own.select(length) else rope


def measure(context: Context, methods: Sequence[Method], plan: Plan) -> list[dict[str, Any]]:
    """Measure all methods, baselines first, write a file of each, and return their contents."""
    order = (*BASELINES, *(method.name for method in methods))
    methods = sorted(methods, key=lambda method: order.index(method.name))
    harness.check(plan.lm_eval)
    try_prompts(context, plan)
    done = []
    with task("measure", len(methods) * total_cost(context, plan)) as work:
        for method in methods:
            file = f"{FOLDER}/{method.name}.json"
            result = header(context, method)
            before = context.run.read_json(file)
            if before is not None and all(before.get(name) == value for name, value in result.items()):
                result = before
            for section, value in sections(context, method, plan, work):
                result[section] = value
                context.run.write_json(file, result)
            done.append(result)
    for method, result in zip(methods, done, strict=True) if plan.lm_eval else ():  # it has progress bars of its own
        result["lm_eval"] = [benchmark(context, method, name, plan.lm_eval_limit) for name in plan.lm_eval]
        context.run.write_json(f"{FOLDER}/{method.name}.json", result)
    return done


def benchmark(context: Context, method: Method, name: str, limit: int | None) -> dict[str, Any]:
    """Return what lm-eval says of one of its tasks; sequences of any length up to the target, each in its regime."""
    target = context.target_length
    rope = method.at(target)
    record = harness.lm_eval(context.loaded, context.run.evaluations, rope, name, target, limit, method=method.name)
    return {field: record[field] for field in ("lm_eval", "version", "limit", "max_length", "results")}


def header(context: Context, method: Method) -> dict[str, Any]:
    """Return what a file says of the method; where that has changed, what was measured before is not kept."""
    target, original = context.target_length, context.loaded.original_length
    return {
        "format": FORMAT,
        "method": method.name,
        "title": method.title,
        "model": context.request.model,
        "rope": method.at(target).to_dict(),
        "original_length": original,
        "target_length": target,
    }


def sections(context: Context, method: Method, plan: Plan, work: Task) -> Iterator[tuple[str, Any]]:
    """Yield the parts of the result as they are finished."""
    if PERPLEXITY in plan.tasks:
        yield PERPLEXITY, windows(context, method, plan, work, PERPLEXITY, lengths.non_overlapping)
    if SLIDING in plan.tasks:
        cut = functools.partial(lengths.sliding, stride=plan.stride)
        found = windows(context, method, plan, work, SLIDING, cut)
        yield SLIDING, {"stride": plan.stride, **found}
    for grid in (grids.PASSKEY, grids.MULTI_NEEDLE):
        if grid in plan.tasks:
            rows = [
                grids.row(
                    _asking(context, method, length, work),
                    *(context.loaded, grid, length, plan.depths, plan.samples, plan.needles, plan.seed),
                )
                for length in plan.lengths
            ]
            found = {"depths": list(plan.depths), "samples": plan.samples, "rows": rows}
            yield grid, {**found, **({"needles": plan.needles} if grid == grids.MULTI_NEEDLE else {})}
    if plan.ruler_tasks:
        yield RULER, {"samples": plan.samples, "rows": ruler_rows(context, method, plan, work)}


def windows(
    context: Context,
    method: Method,
    plan: Plan,
    work: Task,
    stage: str,
    cut: Callable[[Any, int], list[lengths.Cut]],
) -> dict[str, Any]:
    """Return perplexity by length over the held-out documents, cut into windows by one of the conventions."""
    texts = context.split.heldout
    scorer = Scorer(context.loaded, context.run.evaluations, team=context.team)
    label = f"{method.title}, {stage}"
    scorer.on_new = lambda length, seconds: work.advance(forward_cost(length), f"{label} at {length:,}")
    scorer.on_known = lambda length: work.skip(forward_cost(length), f"{label} at {length:,}")
    about = {"stage": f"measure {stage}", "method": method.name}
    jobs = [(length, [cut(text, length) for text in texts], regime(context, method, length)) for length in plan.lengths]
    for _, cuts, rope in jobs:
        scorer.announce(lengths.forwards(cuts, rope, **about))
    rows = []
    for length, cuts, rope in jobs:
        row = {"length": length, **lengths.score(scorer, cuts, rope, **about)}
        rows.append({**row, "minus": differences(context, scorer, cuts, rope, length)})
    return {"documents": [text.describe() for text in texts], "rows": rows}


def differences(
    context: Context, scorer: Scorer, cuts: Sequence[Sequence[lengths.Cut]], rope: lk.LongRope, length: int
) -> dict[str, dict[str, float | None]]:
    """Return the loss minus that of every baseline which has been scored on the same windows and differs."""
    found = {}
    for name in BASELINES:
        other = regime(context, baseline(context, name), length)
        minus = None if other == rope else lengths.difference(scorer, cuts, rope, other)
        if minus is not None:
            found[name] = minus
    return found


def ruler_rows(context: Context, method: Method, plan: Plan, work: Task) -> list[dict[str, Any]]:
    """Return the score of every task at every length."""
    rows = []
    for name in plan.ruler_tasks:
        for length in plan.lengths:
            asking = _asking(context, method, length, work)
            records = [
                asking(ruler.sample(name, context.loaded.tokenizer, length, plan.seed + number), trial=number)
                for number in range(plan.samples)
            ]
            ones = np.ones(len(records))
            shares = np.array([record["found"] / record["answers"] for record in records])
            losses = np.array([record["nll"] for record in records])
            score, nll = (mean_interval([(values, ones)], 1) for values in (shares, losses))
            whole = wilson(sum(record["retrieved"] for record in records), len(records))
            rows.append(
                {
                    **{"task": name, "length": length, "samples": len(records)},
                    **{"score": score.value, "low": score.low, "high": score.high},
                    **{"nll": nll.value, "nll_low": nll.low, "nll_high": nll.high},
                    **{"all_found": whole.value, "all_found_low": whole.low, "all_found_high": whole.high},
                }
            )
    return rows


def try_prompts(context: Context, plan: Plan) -> None:
    """Refuse a length too short for a task before the first forward."""
    shortest, tokenizer = min(plan.lengths), context.loaded.tokenizer
    for grid in {grids.PASSKEY, grids.MULTI_NEEDLE} & set(plan.tasks):
        next(grids.questions(context.loaded, grid, shortest, plan.depths, 1, plan.needles, plan.seed))
    for name in plan.ruler_tasks:
        ruler.sample(name, tokenizer, shortest, plan.seed)
    if {PERPLEXITY, SLIDING} & set(plan.tasks):
        for text in context.split.heldout:
            for length in plan.lengths:
                lengths.sliding(text, length, plan.stride if SLIDING in plan.tasks else 1)


def total_cost(context: Context, plan: Plan) -> float:
    """Return what a method costs, in units of `forward_cost`; lm-eval's is not known."""
    questions = len(plan.ruler_tasks) + len(plan.depths) * len({grids.PASSKEY, grids.MULTI_NEEDLE} & set(plan.tasks))
    cost = sum(plan.samples * questions * forward_cost(length) for length in plan.lengths)
    cuts: Mapping[str, Callable[[Any, int], list[lengths.Cut]]] = {
        PERPLEXITY: lengths.non_overlapping,
        SLIDING: functools.partial(lengths.sliding, stride=plan.stride),
    }
    for name in {PERPLEXITY, SLIDING} & set(plan.tasks):
        for length in plan.lengths:
            cost += sum(len(cuts[name](text, length)) for text in context.split.heldout) * forward_cost(length)
    return cost


def _asking(context: Context, method: Method, length: int, work: Task) -> grids.Ask:
    """Return the function that asks one sample of `length` tokens under a method."""
    rope = regime(context, method, length)

    def asking(sample: prompts.Sample, **about: Any) -> dict[str, Any]:
        label = f"{method.title}, {sample.kind} at {length:,}"
        return prompts.ask(
            context.loaded,
            context.run.evaluations,
            rope,
            sample,
            lambda length, seconds: work.advance(forward_cost(length), label),
            lambda length: work.skip(forward_cost(length), label),
            method=method.name,
            **about,
        )

    return asking


def factors_name(rope: lk.LongRope) -> str:
    """Return what the file of a ladder is called that is not the run's own."""
    return f"factors-{digest(rope.to_dict())[:8]}"
