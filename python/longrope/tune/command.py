"""`longrope tune`: from the options of the command to a run of the stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import factors as factor_files
from .. import models
from ..data import training
from ..errors import refuse
from ..progress import console, say
from ..run import read_json
from ..search.stage import WINNER_FILE
from ..team import rank
from .settings import TuneSettings
from .settings import preset as recipe
from .stage import TuneResult, run_tuning


def run_command(
    model: str,
    out: Path,
    factors: Path | None,
    run_dir: Path | None,
    preset: str | None,
    compute: str | None,
    text: list[str] | None,
    dtype: str,
    threads: int | None,
    original_length: int | None,
    tensorboard: bool | None,
    overcommit: bool,
    **options: Any,
) -> TuneResult:
    """Read factors and settings, load the model, train.

    Args:
        options: fields of `TuneSettings`; None leaves the preset's or the default.
    """
    console.quiet = rank()[0] > 0  # rank 0 speaks for all
    if factors is None:
        if run_dir is None:
            refuse("--factors", "nothing", "a factor file, or --run-dir with a run that has a winner")
        factors = run_dir / WINNER_FILE
    rope, _ = factor_files.read(factors)
    given = {name: value for name, value in {**options, "dtype": compute}.items() if value is not None}
    if preset is None:
        if "steps" not in given:
            refuse("--steps", "nothing", "a number of steps, or a --preset that has one")
        settings = TuneSettings(**{"length": rope.max_position_embeddings, **given})
    else:
        settings = recipe(preset, **given)
    loaded = models.load(model, dtype, original_length, threads)
    factor_files.read(factors, loaded.base)  # must fit the model
    documents = training(text or ["stdlib"], kept_out(run_dir))
    result = run_tuning(loaded, rope, settings, documents, out, tensorboard, overcommit)
    losses = result.losses
    tenth = max(len(losses) // 10, 1)
    say(
        f"{result.model}: loss {sum(losses[:tenth]) / tenth:.4f} over the first {tenth} of {len(losses)} steps, "
        f"{sum(losses[-tenth:]) / tenth:.4f} over the last"
    )
    return result


def kept_out(run_dir: Path | None) -> set[str]:
    """Return the SHA-256 of the documents that a run searches or proves its result on."""
    if run_dir is None:
        return set()
    sides = read_json(run_dir / "documents.json")
    try:
        return {window["sha256"] for side in ("search", "heldout") for window in sides[side]}
    except (KeyError, TypeError):
        refuse("--run-dir", run_dir / "documents.json", "a run's documents")
