"""Fixtures of the pipeline's tests: one tiny model, its texts, and one whole run of `longrope extend` on them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny

from longrope import cli, data, models

# Decides the results of the shared run; the kill test asks for the same and must arrive at the same.
SETTINGS = (
    *("--to", str(tiny.TARGET), "--dtype", "fp32", "--threads", "1"),
    *("--population", "6", "--iterations", "3", "--mutations", "3", "--crossovers", "2", "--parents", "3"),
    *("--screen", "192", "--screen-documents", "1", "--screen-controls", "1", "--seed", "7"),
)


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Run:
    """A run directory and the command that made it."""

    folder: Path
    arguments: tuple[str, ...]
    finished: Finished


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.texts(tmp_path_factory.mktemp("tiny") / "texts")


@pytest.fixture(scope="session")
def loaded(model_folder: Path) -> models.LoadedModel:
    return models.load(str(model_folder), "fp32")


@pytest.fixture(scope="session")
def split(loaded: models.LoadedModel, text_folder: Path) -> data.Split:
    """The documents of the shared run."""
    return data.split(loaded.tokenizer, (str(text_folder),), tiny.TARGET)


@pytest.fixture(scope="session")
def extended(model_folder: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`longrope extend` on the tiny model, as a stranger runs it: a process of its own. Tests only read it."""
    folder = tmp_path_factory.mktemp("extend") / "run"
    asked = ("--text", str(text_folder), *SETTINGS, "--passkey-depths", "0.5")
    arguments = ("extend", str(model_folder), "--run-dir", str(folder), *asked)
    return Run(folder, arguments, run_process(*arguments))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Run the command line in this process, which saves the seconds of importing torch."""

    def run(*arguments: object) -> Finished:
        capsys.readouterr()
        code: object = 0
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = ended.code
        said = capsys.readouterr()
        assert isinstance(code, int)
        return Finished(code, said.out, said.err)

    return run


def run_process(*arguments: str) -> Finished:
    """Run `python -m longrope` with `arguments`."""
    done = subprocess.run([sys.executable, "-m", "longrope", *arguments], capture_output=True, text=True, check=False)
    return Finished(done.returncode, done.stdout, done.stderr)
