"""The export stage: checkpoint, then the reload check in a process without this project."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import longrope_kernels as lk

from ..context import Context
from ..errors import PipelineError
from ..evaluate.scoring import Scorer
from ..progress import say
from .checkpoint import export_checkpoint
from .reload import reload_check


def run_export(
    context: Context, rope: lk.LongRope, content: dict[str, Any], folder: str | Path | None = None
) -> dict[str, Any]:
    """Export into the run directory, check the export, write `export.json` and return it.

    A folder that a killed run has already written and checked is not written again.
    """
    folder = context.run.path / "export" if folder is None else Path(folder)
    before = context.run.read_json("export.json")
    said = {"folder": str(folder), "rope": rope.to_dict()}
    same = before is not None and all(before.get(name) == value for name, value in said.items())
    if same and before["reload"]["passed"] and (folder / "config.json").is_file():
        return dict(before)
    loaded = context.loaded
    original = copy.deepcopy(loaded.model.config.rope_parameters)
    notes = export_checkpoint(loaded, rope, folder, content)
    check = reload_check(
        Scorer(loaded, context.run.evaluations), expressible(rope), context.split.heldout[0], folder, original
    )
    result = {"format": "longrope-export/1", **said, "notes": notes, "reload": check}
    context.run.write_json("export.json", result)
    if not check["passed"]:
        worst = max(check["checks"], key=lambda one: one["difference"])
        raise PipelineError(
            f"reload check: got a loss of {worst['stock_nll']:.5f} from stock transformers at {worst['length']} "
            f"tokens, expected {worst['ours_nll']:.5f} within {check['tolerance']:g}"
        )
    return result


def expressible(rope: lk.LongRope) -> lk.LongRope:
    """Return the ladder as a transformers configuration says it: no n-hat, one attention factor."""
    original = rope.original_max_position_embeddings
    long = rope.long.replace(start_tokens=0)
    short = rope.short.replace(start_tokens=0, attention_factor=long.attention_factor)
    return lk.LongRope(original, {original: short, rope.max_position_embeddings: long})


def say_export(result: dict[str, Any]) -> None:
    """Print where the export is and how the reload went."""
    check = result["reload"]
    say(f"Export: {result['folder']} (rope_type {check['rope_type']}); longrope.json has the ladder without loss")
    for note in result["notes"]:
        say(f"  note: {note}")
    for one in check["checks"]:
        say(
            f"  reloaded with stock transformers {check['transformers']}, without this package: positions "
            f"{one['start']:,}-{one['length']:,}, loss {one['stock_nll']:.5f}, ours {one['ours_nll']:.5f}, "
            f"difference {one['difference']:.5f} (tolerance {check['tolerance']:g})"
        )
    change = check["checks"][0]["stock_nll"] - check["short_stock_original_nll"]
    same = "equal, bit for bit" if check["short_equals_stock_original"] else f"loss {change:+.4f} (see the notes)"
    say(f"  short regime in stock transformers against the original model: {same}")
