"""Retrieval by length and depth: every cell asked several times, every row with the interval of its share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..models import LoadedModel
from .bootstrap import wilson
from .passkey import many_keys, one_key
from .prompts import Sample

PASSKEY, MULTI_NEEDLE = "passkey", "multi-needle"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TRIAL_SEEDS = 1000  # apart; depths take those between

Ask = Callable[..., dict[str, Any]]


def questions(
    loaded: LoadedModel, task: str, length: int, depths: Sequence[float], trials: int, needles: int, seed: int
) -> Iterator[tuple[float, int, Sample]]:
    """Yield depth, trial and sample of one row; keys differ from cell to cell and from trial to trial.

    Args:
        task: passkey, or multi-needle: `needles` keys, of which all must be found.
    """
    for trial in range(trials):
        for number, depth in enumerate(depths):
            own = seed + number + trial * TRIAL_SEEDS
            if task == PASSKEY:
                yield depth, trial, one_key(loaded.tokenizer, length, depth, own, "--lengths")
            else:
                yield depth, trial, many_keys(loaded.tokenizer, length, depth, own, needles)


def row(
    ask: Ask, loaded: LoadedModel, task: str, length: int, depths: Sequence[float], trials: int, needles: int, seed: int
) -> dict[str, Any]:
    """Ask all questions of one length and return its row: cells by depth, the share of the row, Wilson's 95% interval.

    Args:
        ask: takes a sample and fields for the log, and returns its record (`prompts.ask`).
    """
    records: dict[float, list[dict[str, Any]]] = {depth: [] for depth in depths}
    for depth, trial, sample in questions(loaded, task, length, depths, trials, needles, seed):
        records[depth].append(ask(sample, depth=depth, trial=trial))
    cells = [{"depth": depth, "trials": len(found), **_counted(found)} for depth, found in records.items()]
    every = [record for found in records.values() for record in found]
    counted = _counted(every)
    share = wilson(counted["retrieved"], len(every))
    return {
        "length": length,
        "trials": len(every),
        **counted,
        "share": share.value,
        "low": share.low,
        "high": share.high,
        "cells": cells,
    }


def _counted(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Count questions answered in full and answers found; the mean loss where all records have one."""
    losses = [record["nll"] for record in records if "nll" in record]  # runs from before it was recorded have none
    return {
        "retrieved": sum(record["retrieved"] for record in records),
        "found": sum(record.get("found", record["retrieved"]) for record in records),
        "answers": sum(record.get("answers", 1) for record in records),
        "nll": sum(losses) / len(losses) if len(losses) == len(records) else None,
    }
