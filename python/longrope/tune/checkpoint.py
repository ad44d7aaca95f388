"""Checkpoints of a training run: safetensors and JSON in a folder that appears whole or not at all.

    weights.safetensors    the weights that are trained, float32, by name
    optimizer.safetensors  the optimizer's tensors, as `<name of the weight>/<name of the tensor>`
    state.json             the rest of the optimizer, the schedule, the random generators, and the files' checksums
    trainer_state.json     transformers' own record of where it is

Nothing is pickled, so nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import PipelineError, disk_error, one_line
from ..run import write_atomically
from . import ranks

FORMAT = "longrope-training/1"
WEIGHTS, OPTIMIZER, STATE, TRAINER = (
    *("weights.safetensors", "optimizer.safetensors"),
    *("state.json", "trainer_state.json"),
)
KEPT = 2  # checkpoints, the latest


def save(
    folder: Path,
    step: int,
    weights: Mapping[str, Tensor],
    optimizer: Any,
    scheduler: Any,
    trainer_state: str,
    settings: str,
    writes: bool = True,
) -> None:
    """Write the checkpoint of a step, then drop all but the latest `KEPT`.

    Args:
        folder: of the run's checkpoints.
        weights: trained parameters by name, those the optimizer has.
        optimizer, scheduler: torch's.
        trainer_state: JSON of transformers' `TrainerState`.
        settings: digest of what decides results.
        writes: whether this rank does, of those that hold the weights together; all must call.

    Raises:
        PipelineError: the disk is full; checkpoints before this one are kept.
    """
    names = {id(weight): name for name, weight in weights.items()}
    moments, scalars = dict[str, Tensor](), dict[str, dict[str, Any]]()
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in state.items():
            if isinstance(value, Tensor):
                moments[f"{name}/{key}"] = ranks.whole(value)
            else:
                scalars.setdefault(name, {})[key] = value
    groups = [
        {**group, "params": [names[id(parameter)] for parameter in group["params"]]} for group in optimizer.param_groups
    ]
    whole = {name: ranks.whole(weight) for name, weight in weights.items()}
    if not writes:
        return
    final, part = folder_of(folder, step), folder / f".step-{step:08}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        save_file(whole, part / WEIGHTS)
        save_file(moments, part / OPTIMIZER)
        content = {
            "format": FORMAT,
            "step": step,
            "settings": settings,
            "files": {name: checksum(part / name) for name in (WEIGHTS, OPTIMIZER)},
            "optimizer": {"scalars": scalars, "groups": groups},
            "scheduler": scheduler.state_dict(),
            "random": random_state(),
        }
        write_atomically(part / STATE, (json.dumps(content) + "\n").encode())
        write_atomically(part / TRAINER, trainer_state.encode())
        _sync(part / WEIGHTS, part / OPTIMIZER, part)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        _sync(folder)
    except (OSError, SafetensorError, PipelineError) as error:
        shutil.rmtree(part, ignore_errors=True)
        kept = latest(folder)
        said = f"the checkpoint {kept.name} is kept" if kept else "no checkpoint was made yet"
        if isinstance(error, OSError):
            raise disk_error(str(final), error, said) from error
        raise PipelineError(one_line(f"{final}: got {error}, expected to write there; {said}")) from error
    for old in _all(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


class Checkpoint:
    """A checkpoint read back and checked.

    Raises:
        PipelineError: a file is missing, cut or changed, or of other settings; one line names it.
    """

    def __init__(self, folder: Path, settings: str) -> None:
        self.folder = folder
        try:
            self.content: dict[str, Any] = json.loads((folder / STATE).read_text())
            if self.content["format"] != FORMAT:
                raise ValueError(f"format {self.content['format']!r}")
            for name, wanted in self.content["files"].items():
                if checksum(folder / name) != wanted:
                    raise ValueError(f"{name} with other content than was written")
            json.loads((folder / TRAINER).read_text())
            self.weights = load_file(folder / WEIGHTS)
            self.moments = load_file(folder / OPTIMIZER)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise PipelineError(
                one_line(
                    f"{folder}: got a broken checkpoint ({error}), expected a whole one; delete that folder to go on "
                    "from the one before it"
                )
            ) from error
        if self.content["settings"] != settings:
            raise PipelineError(
                f"{folder}: got a checkpoint of settings {self.content['settings']}, expected {settings}; delete it"
            )

    def into_model(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the weights into those of the model."""
        with torch.no_grad():
            for name, weight in weights.items():
                found = self.weights.get(name)
                if found is None or found.shape != weight.shape:
                    shape = None if found is None else tuple(found.shape)
                    raise PipelineError(f"{self.folder}: got {name} of shape {shape}, expected {tuple(weight.shape)}")
                weight.copy_(ranks.like(found, weight))

    def into_optimizer(self, weights: Mapping[str, Tensor], optimizer: Any, scheduler: Any) -> None:
        """Restore the optimizer and the schedule, bit for bit."""
        saved = self.content["optimizer"]
        state: dict[int, dict[str, Any]] = {}
        groups, number, numbers = [], 0, dict[str, int]()
        for group in saved["groups"]:
            for name in group["params"]:
                numbers[name] = number
                number += 1
            params = [numbers[name] for name in group["params"]]
            groups.append({**group, "params": params, "betas": tuple(group["betas"])})
        for key, value in self.moments.items():
            name, _, field = key.rpartition("/")
            state.setdefault(numbers[name], {})[field] = ranks.like(value, weights[name])
        for name, fields in saved["scalars"].items():
            state.setdefault(numbers[name], {}).update(fields)
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        scheduler.load_state_dict(self.content["scheduler"])

    def into_random(self) -> None:
        """Restore the random generators."""
        restore_random(self.content["random"])


def latest(folder: Path) -> Path | None:
    """Return the latest checkpoint of a run, or None."""
    found = _all(folder)
    return found[-1] if found else None


def folder_of(checkpoints: Path, step: int) -> Path:
    """Return where the checkpoint of a step is."""
    return checkpoints / f"step-{step:08}"


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint's name says."""
    return int(checkpoint.name.removeprefix("step-"))


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        hasher = hashlib.sha256()
        while block := file.read(1 << 22):
            hasher.update(block)
    return hasher.hexdigest()


def random_state() -> dict[str, Any]:
    """Return the state of every random generator that training may draw from; JSON."""
    version, internal, gauss = random.getstate()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(internal), gauss],
        "torch": _hex(torch.get_rng_state()),
        "cuda": [_hex(state) for state in devices],
    }


def restore_random(saved: Mapping[str, Any]) -> None:
    """Put every random generator where `random_state` found it."""
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(_tensor(saved["torch"]))
    for number, state in enumerate(saved["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_tensor(state), number)


def _hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _all(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))


def _sync(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
