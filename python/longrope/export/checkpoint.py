"""Write the extended model as a transformers folder: weights untouched, factors in its configuration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

import longrope_kernels as lk
from longrope_kernels.integrations.transformers import SIDECAR

from ..errors import PipelineError, disk_error, one_line, refuse
from ..models import LoadedModel
from ..progress import quiet_transformers, waiting
from ..run import write_atomically

TUNED = "tune.json"


def export_checkpoint(
    loaded: LoadedModel,
    rope: lk.LongRope,
    folder: str | Path,
    content: Mapping[str, Any] | None = None,
    tuned: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write a folder that stock transformers loads, and return what it cannot say, one line each.

    The configuration gets `rope_parameters` of type longrope with an explicit attention factor. `longrope.json` beside
    it has the ladder without loss, n-hat included, for `longrope_kernels.integrations.transformers.enable`.

    Args:
        folder: appears whole or not at all; one that holds something else than an export is left alone.
        content: a factor file to put beside the weights.
        tuned: what is said of weights that were fine-tuned under the last regime.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / SIDECAR).is_file())):
        refuse("--out", folder, "a folder that is empty, absent, or an earlier export")
    notes = losses(rope)
    part, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    loaded.stock()
    model = loaded.model
    before = (model.config.rope_parameters, model.config.max_position_embeddings)
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with waiting(f"writing {folder}"), quiet_transformers():
            model.config.rope_parameters = {**rope.to_config(allow_loss=True), **mscales(rope)}
            model.config.max_position_embeddings = rope.max_position_embeddings
            model.save_pretrained(part)
            loaded.tokenizer.model_max_length = rope.max_position_embeddings
            loaded.tokenizer.save_pretrained(part)
            _clean_config(part / "config.json")
            write_atomically(part / SIDECAR, (json.dumps(rope.to_dict(), indent=1) + "\n").encode())
            if content is not None:
                write_atomically(part / "longrope_factors.json", (json.dumps(content, indent=1) + "\n").encode())
            if tuned is not None:
                write_atomically(part / TUNED, (json.dumps(tuned, indent=1) + "\n").encode())
            write_atomically(part / "README.md", readme(loaded, rope, notes, tuned is not None).encode())
            # Renamed, not deleted in place: killed in between, a half of the old export would be nobody's folder.
            if folder.exists():
                folder.rename(old)
            part.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise disk_error(str(folder), error) from error
    except SafetensorError as error:  # what its writer makes of a full disk
        shutil.rmtree(part, ignore_errors=True)
        raise PipelineError(one_line(f"{folder}: got {error}, expected to write the weights there")) from error
    finally:
        model.config.rope_parameters, model.config.max_position_embeddings = before
    return notes


def mscales(rope: lk.LongRope) -> dict[str, float]:
    """Return the attention factors of both regimes under the names that vLLM and SGLang read."""
    return {"short_mscale": rope.short.attention_factor, "long_mscale": rope.long.attention_factor}


def losses(rope: lk.LongRope) -> list[str]:
    """Return what a transformers configuration cannot say about this ladder, one line each."""
    notes = []
    short, long = rope.short, rope.long
    if dropped := [length for length, scaling in rope.regimes.items() if scaling not in (short, long)]:
        lengths = ", ".join(f"{length:,}" for length in dropped)
        notes.append(
            "a transformers configuration has two sets of factors: stock transformers knows nothing of those for up "
            f"to {lengths} tokens; {SIDECAR} has all"
        )
    if long.start_tokens:
        notes.append(
            f"n-hat is {long.start_tokens}, which a transformers configuration cannot say: stock transformers rescales "
            f"all positions; {SIDECAR} keeps it for our integration (--start-tokens 0 avoids it)"
        )
    if short.attention_factor != long.attention_factor:
        notes.append(
            f"the attention factor is {short.attention_factor:g} up to {rope.original_max_position_embeddings:,} "
            f"tokens and {long.attention_factor:g} beyond, and a transformers configuration has one: stock "
            f"transformers applies {long.attention_factor:g} to both; {SIDECAR} keeps both (--attention-factor 1.0 "
            "avoids it)"
        )
    return notes


def readme(loaded: LoadedModel, rope: lk.LongRope, notes: list[str], tuned: bool = False) -> str:
    """Return the folder's README."""
    weights = f"were fine-tuned under the last regime ({TUNED})" if tuned else "are those of the original model"
    lines = [
        f"# {loaded.name}, {rope.original_max_position_embeddings:,} to {rope.max_position_embeddings:,} tokens",
        "",
        f"The weights {weights}. `config.json` carries the factors (rope_type longrope), so stock",
        "`transformers` loads this folder; `longrope.json` carries them without loss for the fused attention:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        "from longrope_kernels.integrations.transformers import enable",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this folder")  # enough by itself',
        "enable(model)  # fused attention, exact angles, n-hat; reads longrope.json",
        "```",
        "",
        *(f"- {note}" for note in notes),
    ]
    return "\n".join(lines) + "\n"


def _clean_config(path: Path) -> None:
    """Drop what described the file the weights came from."""
    fields = json.loads(path.read_text())
    fields.pop("quantization_config", None)
    write_atomically(path, (json.dumps(fields, indent=2) + "\n").encode())
