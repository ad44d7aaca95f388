"""What every stage works with: the run directory, the model, the documents, and the settings that decide results."""

from __future__ import annotations

import platform
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

import longrope_kernels as lk

from . import data, models
from .errors import UsageError, refuse
from .evaluate.scoring import block_tokens
from .progress import say, waiting
from .run import RunDirectory
from .search.space import PAPER_START_TOKENS
from .team import Crew, Leader, meet, rank


@dataclass(frozen=True)
class Request:
    """What was asked, as far as it decides results; a run directory serves one request."""

    model: str
    to: int
    text: tuple[str, ...] = ("stdlib",)
    heldout_text: tuple[str, ...] | None = None
    dtype: str = "auto"
    original_length: int | None = None
    search_documents: int = 2
    heldout_documents: int = 2
    windows_per_document: int = 1
    score_from: int | None = None
    population: int = 64
    iterations: int = 40
    mutations: int = 16
    crossovers: int = 16
    mutation_probability: float = 0.3
    parents: int = 32
    monotone: bool = True
    start_tokens: tuple[int, ...] = PAPER_START_TOKENS
    attention_factor: str = "1.0"
    screens: tuple[int, ...] = ()
    screen_documents: int | None = None
    screen_keep: float = 0.34
    screen_controls: int = 0
    seed: int = 0
    method: str = "longrope"
    objective: str = "text"
    space: str = "all"
    needles: int = 2
    lengths: tuple[int, ...] = ()  # of a readjustment, whose `to` is the longest of them
    ladder: str | None = None  # digest of the ladder that is readjusted
    tune: tuple[tuple[int, int], ...] = ()  # lengths to fine-tune at and steps at each
    tune_batch: int = 1
    tune_lr: float = 2e-5
    tune_schedule: str = "linear"
    tune_warmup: int = 0
    tune_lora: int = 0
    tune_short_share: float = 0.0
    readjust: tuple[int, ...] = ()
    searched: bool = True


@dataclass
class Context:
    """A run under way; the model and the documents are loaded when a stage first needs them.

    Attributes:
        within: the run that this one is a stage of, whose documents it reads.
        crew: the other ranks; None where there are none.
        again: whether a model that was extended to the target counts as it was before (`models.before`), so that what
            extended it is set beside what else would have.
    """

    request: Request
    run: RunDirectory
    threads: int | None = None
    passkey_depths: tuple[float, ...] = ()
    crew: Crew | None = None
    within: Context | None = None
    extends: bool = True
    again: bool = False
    _team: Leader | None = field(default=None, repr=False)
    _loaded: models.LoadedModel | None = field(default=None, repr=False)
    _split: data.Split | None = field(default=None, repr=False)

    @classmethod
    def open(
        cls,
        request: Request,
        run_dir: str | Path,
        threads: int | None = None,
        passkey_depths: tuple[float, ...] = (),
        budget: dict[str, Any] | None = None,
        command: str | None = None,
        within: Context | None = None,
        extends: bool = True,
        again: bool = False,
    ) -> Context:
        """Check the request against the model's configuration, then make or reopen the run directory.

        Args:
            extends: whether the target must be an extension and the search have documents; measuring needs neither.
        """
        source = models.find(request.model)
        with waiting(f"reading the configuration of {request.model}", 5.0 if source.gguf_file else None):
            config = models.load_config(source)
        if extends and not request.lengths:
            rope = models.rope_of(config, request.original_length, source)
            check_extension(request, models.before(rope, request.to) if again else rope)
        models.check_dtype(request.dtype)
        if threads is not None:
            models.set_threads(threads)
        dtype = models.default_dtype() if request.dtype == "auto" else request.dtype
        settings = {**request.__dict__, "dtype": dtype, "model_fingerprint": models.fingerprint(source)}
        extra = {"budget": budget or {}, "command": command, "versions": versions()}
        defaults = {field.name: field.default for field in fields(Request) if field.default is not MISSING}
        run = RunDirectory(run_dir, settings, extra, defaults)
        if run.evaluations.torn:
            say(f"{run.evaluations.path}: the last line was cut short when the run was killed; it is dropped")
        if run.evaluations.records:
            say(f"{run.path}: going on; {len(run.evaluations.records)} evaluations are there and are not repeated")
        _, ranks = rank()
        crew = None if within is None else within.crew
        if within is None and ranks > 1:
            crew = Crew(meet(), ranks)
        return cls(request, run, threads, passkey_depths, crew, within, extends, again)

    @property
    def team(self) -> Leader | None:
        """The other ranks at this run's forwards, from their first use until the model is let go; None without them."""
        if self._team is None and self.crew is not None:
            job = {name: self.run.settings[name] for name in ("model_fingerprint", "dtype", "original_length")}
            own = self.within is None or self.request.model == self.within.request.model
            model = None if own else str(Path(self.request.model).absolute())
            job |= {"model": model, "before": self.request.to if self.again else None}
            self._team = self.crew.lead(job, self.run.evaluations)
        return self._team

    @property
    def loaded(self) -> models.LoadedModel:
        """The model, loaded once."""
        if self._loaded is None:
            self._loaded = models.load(
                self.request.model, self.run.settings["dtype"], self.request.original_length, self.threads
            )
            if self.again:
                self._loaded.rope = models.before(self._loaded.rope, self.request.to)
        return self._loaded

    @property
    def split(self) -> data.Split:
        """The windows of both sides, which must be those the run directory was begun with."""
        if self._split is None and self.within is not None:
            self._split = self.within.split.cut(self.loaded.tokenizer, self.request.to)
        if self._split is None:
            with waiting(f"tokenizing documents of at least {self.request.to:,} tokens"):
                self._split = data.split(
                    self.loaded.tokenizer,
                    self.request.text,
                    self.request.to,
                    self.request.search_documents,
                    self.request.heldout_documents,
                    self.request.windows_per_document,
                    self.request.heldout_text,
                    required=("search", "heldout") if self.extends else ("heldout",),
                )
            described = self._split.describe()
            before = self.run.read_json("documents.json")
            if before is not None and before != described:
                changed = _first_difference(before, described)
                raise UsageError(
                    f"--text: got other documents than {self.run.path} was made with ({changed}), "
                    "expected the same (or another --run-dir)"
                )
            if before is None:
                self.run.write_json("documents.json", described)
            for side, windows in (("search", self._split.search), ("held-out", self._split.heldout)):
                if windows:
                    say(f"{side} documents: {', '.join(f'{w.name} ({w.document_tokens:,} tokens)' for w in windows)}")
        return self._split

    @property
    def original_length(self) -> int:
        return self.loaded.original_length

    @property
    def target_length(self) -> int:
        return self.request.to

    @property
    def extension(self) -> float:
        """s, target length over original length."""
        return self.request.to / self.original_length

    @property
    def score_from(self) -> int:
        """First position the search scores, rounded down to a whole block of the log."""
        if self.request.score_from is None:
            return self.original_length
        block = block_tokens(self.original_length)
        return self.request.score_from // block * block

    def share(self, other: Context) -> None:
        """Take the model that `other` has loaded, or will load: both are of the same files."""
        self._loaded = other.loaded

    def release(self) -> None:
        """Let go of the model, on all ranks; a later use loads it anew."""
        self._loaded = None
        if self._team is not None:
            self._team.close()
            self._team = None

    def close(self) -> None:
        self.release()
        if self.crew is not None and self.within is None:
            self.crew.close()
        self.run.close()


def check_extension(request: Request, rope: lk.LongRope) -> None:
    """Refuse a target, a first position or screens that the model's own length rules out."""
    models.check_target(request.to, rope)
    original = rope.lengths[-1]
    start = original if request.score_from is None else request.score_from
    if not original <= start < request.to:
        refuse("--score-from", start, f"a position from the original length {original} to below {request.to}")
    for length in request.screens:
        if not start < length < request.to:
            refuse("--screen", length, f"lengths between {start}, where scoring begins, and {request.to}")


def versions() -> dict[str, str]:
    """Return what the results were made with."""
    import transformers

    import longrope_kernels

    return {
        "longrope_kernels": longrope_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": processor(),
    }


def processor() -> str:
    """Return the processor's name and the number of threads torch uses."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def _first_difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    for side in ("search", "heldout"):
        old, new = ([f"{w['document']}@{w['offset']}" for w in side_windows[side]] for side_windows in (before, after))
        if old != new:
            return f"{side}: {', '.join(new)} instead of {', '.join(old)}"
    return "the same names with other contents"
