"""Short benchmarks by lm-eval, which is handed the model as it is: enabled, each sequence under its own regime.

Stock tasks bring their data from the hub. `longrope_tiny`, twenty sentences with three endings each, is packaged here
and needs no network; it is there to try the way, not to rank models.
"""

from __future__ import annotations

import functools
import io
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import longrope_kernels as lk

from ..errors import UsageError, one_line, refuse
from ..models import LoadedModel
from ..progress import waiting
from ..run import EvaluationLog, digest, now
from .bootstrap import mean_interval
from .prompts import encoder

PACKAGED = Path(__file__).with_name("lm_eval_tasks")


def check(tasks: tuple[str, ...]) -> None:
    """Refuse tasks where lm-eval is not installed or does not know them; before anything is computed."""
    if not tasks:
        return
    if find_spec("lm_eval") is None:
        refuse("--lm-eval", ",".join(tasks), "the package lm_eval installed (pip install lm_eval)")
    for task in tasks:
        if not _manager_of(task).match_tasks([task]):
            refuse("--lm-eval", task, "a task of lm-eval (lm-eval ls tasks), or longrope_tiny")


def lm_eval(
    loaded: LoadedModel,
    log: EvaluationLog,
    rope: lk.LongRope,
    task: str,
    max_length: int,
    limit: int | None = None,
    **about: Any,
) -> dict[str, Any]:
    """Return lm-eval's metrics of a task, or of a group of tasks, from the log where it has them.

    One sequence at a time: padding another to its length would give it another regime.

    Args:
        max_length: longest sequence in tokens; lm-eval cuts longer ones at their beginning.
        limit: samples of each task; None: all.

    Returns:
        A record whose `results` has, by task and metric, `value`, `stderr` as lm-eval gives it, and `low` and `high`,
        the bootstrapped 95% interval over samples, where a metric is a mean over them.

    Raises:
        UsageError: data that is not here and cannot be downloaded; one line.
    """
    from lm_eval import __version__ as version
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    asked = {"lm_eval": task, "version": version, "limit": limit, "max_length": max_length}
    key = digest({**asked, "rope": rope.to_dict()})
    record = log.get(key)
    if record is not None:
        return record
    loaded.use(rope)
    began = time.monotonic()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with warnings.catch_warnings(), waiting(f"lm-eval {task}"), _bars_on_a_terminal():
        warnings.simplefilter("ignore")
        try:
            model = HFLM(
                pretrained=loaded.model,
                tokenizer=loaded.tokenizer,
                batch_size=1,
                max_length=max_length,
                prefix_token_id=_prefix_token(loaded.tokenizer),
            )
            found = simple_evaluate(
                model,
                tasks=[task],
                limit=limit,
                task_manager=_manager_of(task),
                bootstrap_iters=1000,
                verbosity="ERROR",
            )
        except Exception as error:  # whatever a task, its data set or the hub raises
            detail = one_line(f"{type(error).__name__}: {error}", 240)
            raise UsageError(
                one_line(f"--lm-eval: got {task} ({detail}), expected one whose data is here or can be downloaded")
            ) from error
    results = {
        name: _metrics(fields, found.get("samples", {}).get(name, [])) for name, fields in found["results"].items()
    }
    seconds = round(time.monotonic() - began, 3)
    return log.append(
        key, {"stage": "lm-eval", **about, **asked, "results": results, "seconds": seconds, "time": now()}
    )


def _metrics(fields: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Turn lm-eval's `metric,filter` fields into values with intervals."""
    made: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        metric, comma, kept_by = name.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = fields.get(f"{metric}_stderr,{kept_by}")
        one: dict[str, Any] = {"value": float(value), "stderr": stderr if isinstance(stderr, float) else None}
        scores = [sample[metric] for sample in samples if sample.get("filter", kept_by) == kept_by and metric in sample]
        if scores and all(isinstance(score, (int, float)) for score in scores):
            values = np.asarray(scores, dtype=float)
            interval = mean_interval([(values, np.ones(len(values)))], 1)
            if abs(interval.value - value) < 1e-9:  # a mean over samples, not a perplexity or an F1 over all of them
                one.update(samples=len(values), low=interval.low, high=interval.high)
        made[metric if kept_by == "none" else name] = one
    return made


@functools.cache
def _manager(stock: bool = True) -> Any:
    """Return lm-eval's index of tasks; reading the stock ones takes half a minute."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(PACKAGED), include_defaults=stock)


def _manager_of(task: str) -> Any:
    return _manager(stock=not (PACKAGED / f"{task}.yaml").is_file())


@contextmanager
def _bars_on_a_terminal() -> Iterator[None]:
    """Let lm-eval's progress bars, which nothing else turns off, go to a terminal and nowhere else."""
    if sys.stderr.isatty():
        yield
    else:
        with redirect_stderr(io.StringIO()):
            yield


def _prefix_token(tokenizer: Any) -> int:
    """Return what a text without a context begins with; lm-eval has no answer where a tokenizer marks neither end."""
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return next((mark for mark in marks if mark is not None), encoder(tokenizer)("\n")[0])
