"""A progressive extension from its recipe to its report; every stage in a folder of its own, finished once."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import longrope_kernels as lk

from .. import data, factors, models
from ..context import Context
from ..errors import refuse
from ..evaluate.stage import OURS, run_evaluation, say_evaluation
from ..export.stage import run_export, say_export
from ..extend import run_inspection, say_inspection
from ..plan import Stage, make_plan, say_plan
from ..progress import clock, say
from ..report import write_report
from ..run import STAGES, digest, read_json
from ..search.budget import Budget
from ..search.problem import planned_forwards, within
from ..search.readjust import LADDER_FILE, RESULT_FILE, run_readjustment
from ..search.seeds import BLENDS, baselines
from ..search.stage import WINNER_FILE, counts, evolution_settings, planned_search, run_search
from ..team import rank
from ..tune import memory
from ..tune.data import Segments
from ..tune.prepare import compute_dtype, resolve
from ..tune.settings import TuneSettings
from ..tune.stage import FORMAT as TUNED
from ..tune.stage import run_tuning
from .by_length import lengths_between, published, say_lengths, score_lengths, tabulate
from .recipe import Recipe, named_as_typed

READJUST_SEEDS = len(BLENDS) + 2  # and both ends
READJUST_WALK = 4  # attention factors besides that of the best seed
PROVED = 3  # on held-out documents: both ends of a readjustment, and what was found


class Extension:
    """One progressive extension under way.

    Args:
        context: of the model as it came, to the target; its run directory holds the stages' folders.
        budget: of each search.
        last_budget: of the second search, whose forwards are the longest.
        settings: of the fine-tuning; length, steps and seed are the recipe's.
    """

    def __init__(
        self, context: Context, recipe: Recipe, budget: Budget, last_budget: Budget, settings: TuneSettings
    ) -> None:
        self.context, self.recipe, self.settings = context, recipe, settings
        self.budget, self.last_budget = budget, last_budget
        self.began = time.monotonic()

    def stages(self) -> list[Stage]:
        """Return the plan.

        Raises:
            UsageError: a budget that does not reach for the seeds of one of the searches.
        """
        recipe, request = self.recipe, self.context.request
        again = recipe.target > recipe.tuned
        start = recipe.tuned if again else recipe.original
        for length in request.screens if recipe.searched else ():
            if not start < length < recipe.target:
                expected = f"lengths between {start}, from where on that search scores, and the target {recipe.target}"
                refuse("--screen", length, expected)

        def search(name: str, kind: str, length: int, budget: Budget, windows_of: int = 0) -> Stage:
            split = self.context.split.cut(self.context.loaded.tokenizer, windows_of or length)
            seeds, samples, what = READJUST_SEEDS, len(split.search), "windows"
            if kind != "readjust":
                seeds, samples, what = counts(request, samples)
            if budget.evaluations is not None and budget.evaluations < seeds * samples:
                argument = "--last-budget" if kind == "second search" else "--budget"
                expected = f"at least {seeds * samples}: {seeds} seeds on {samples} {what} of {length} tokens"
                refuse(argument, budget.evaluations, expected)
            if kind != "readjust":
                chosen = request if length == recipe.target else dataclasses.replace(request, screens=())
                planned = planned_search(chosen, len(split.search), length, start, budget.evaluations)
                return Stage.search(name, kind, planned, budget.seconds)
            planned = planned_forwards(evolution_settings(request), seeds, [(length, samples)], [], READJUST_WALK)
            planned = within(planned, length, seeds * samples, budget.evaluations)
            proofs = PROVED * len(split.heldout)
            return Stage(name, kind, length, planned[length] + proofs, budget.seconds)

        plan = [
            Stage(f"tune-{length}", "tune", length, steps * self.settings.batch, recompute=self.recomputes(length))
            for length, steps in recipe.tune
        ]
        if recipe.searched:
            plan = [*(search(f"search-{length}", "search", length, self.budget) for length, _ in recipe.tune), *plan]
            if again:
                plan.append(search(f"search-{recipe.target}", "second search", recipe.target, self.last_budget))
        for length in recipe.readjust:
            name, longest = f"readjust-{length}", recipe.readjust[-1]
            plan.append(search(name, "readjust", length, self.budget, longest))
        # PI, NTK, YaRN, the original; dynamic NTK and ours, at lengths that add up to twice the target; what the second
        # search is shown beside; pass keys of three methods.
        forwards = 8 + (5 + 3 * len(self.context.passkey_depths)) * again
        return [*plan, Stage("evaluate", "evaluate", recipe.target, forwards * len(self.context.split.heldout))]

    def plan(self) -> dict[str, Any]:
        """Print the plan and write `plan.json`; refuse what memory will not hold."""
        loaded, recipe, stages = self.context.loaded, self.recipe, self.stages()
        # What training would refuse is said now, not after the searches.
        for length, _ in recipe.tune:
            with named_as_typed():
                resolve(self.settings_of(length), loaded, loaded.extended(loaded.base, length))
        Segments(loaded.tokenizer, self.documents(), recipe.tuned)
        training = {stage.name: self.training_bytes(stage) for stage in stages if stage.kind == "tune"}
        plan = make_plan(loaded, recipe.original, recipe.target, stages, training, recipe.notes)
        plan["recipe"] = dataclasses.asdict(recipe)
        say_plan(plan)
        self.context.run.write_json("plan.json", plan)
        return plan

    def documents(self) -> Iterator[data.Document]:
        """Yield the texts to train on: those that neither side of the split has."""
        return data.training(self.context.request.text, self.context.split.texts)

    def training_bytes(self, stage: Stage) -> int:
        shape, settings = memory.Shape.of(self.context.loaded.model), self.complete_settings_of(stage.length)
        return memory.foreseen(shape, settings, rank()[1], recompute=stage.recompute).total

    def recomputes(self, length: int) -> bool:
        """Return whether the fine-tuning at a length computes its activations twice, see `tune.memory`."""
        shape, ranks = memory.Shape.of(self.context.loaded.model), rank()[1]
        available = memory.share_of_memory(shape.weight_bytes, ranks)
        return memory.recomputes(shape, self.complete_settings_of(length), available, ranks)

    def complete_settings_of(self, length: int) -> TuneSettings:
        """Return the same as `settings_of`, with the dtype said."""
        dtype = compute_dtype(self.settings.dtype, self.context.loaded.dtype)
        return dataclasses.replace(self.settings_of(length), dtype=dtype)

    def settings_of(self, length: int) -> TuneSettings:
        """Return the settings of the fine-tuning at a length."""
        steps = dict(self.recipe.tune)[length]
        if self.settings.warmup > steps:
            refuse("--tune-warmup", self.settings.warmup, f"at most the {steps} steps at {length} tokens")
        return dataclasses.replace(self.settings, length=length, steps=steps)

    def run(self) -> dict[str, Any]:
        """Run what is not done yet and return the table by length."""
        self.stage("inspect")
        say_inspection(run_inspection(self.context))
        self.stage("plan")
        self.plan()
        return self.finish(*self.build())

    def build(self) -> tuple[Path, lk.LongRope]:
        """Search, tune, search again and readjust, as far as that is not done yet; return the model and its ladder."""
        regimes = {length: self.search(length) for length, _ in self.recipe.tune}
        model, ladder = self.tune(regimes)
        if self.recipe.target > self.recipe.tuned:
            ladder = self.second_search(model)
        if self.recipe.readjust:
            ladder = self.readjust(model, ladder)
        return model, ladder

    def stage(self, name: str) -> None:
        say()
        say(f"== {name} ({clock(time.monotonic() - self.began)})")

    @contextmanager
    def open(
        self, name: str, model: str, to: int, depths: tuple[float, ...] = (), again: bool = False, **changes: Any
    ) -> Iterator[Context]:
        """Open the folder of a stage: its own model and target, the documents of the whole run.

        Args:
            again: see `Context`.
        """
        context = self.context
        first = model == context.request.model
        request = dataclasses.replace(
            context.request,
            model=model,
            to=to,
            original_length=context.request.original_length if first else None,
            screens=context.request.screens if to == context.target_length else (),
            score_from=None,
            tune=(),
            readjust=(),
            **changes,
        )
        folder = context.run.path / STAGES / name
        opened = Context.open(request, folder, context.threads, depths, within=context, again=again)
        if first:
            opened.share(context)
        with closing(opened):
            yield opened

    def search(self, length: int) -> lk.RopeScaling:
        """Return the factors for a length on the model as it came."""
        self.stage(f"search for {length:,} tokens")
        tuned = (self.context.run.path / STAGES / f"tune-{length}" / "tune.json").is_file()
        with self.open(f"search-{length}", self.context.request.model, length) as context:
            if tuned and self.recipe.searched and not done(context, "search.json", self.budget):
                expected = f"that of the search that {context.run.path} was tuned after (or another --run-dir)"
                refuse("--budget", self.budget.bounds, expected)
            return self.found(context, self.budget).scalings[-1]

    def second_search(self, model: Path) -> lk.LongRope:
        """Return the ladder of the tuned model with factors for the target."""
        target = self.recipe.target
        self.stage(f"second search, for {target:,} tokens, without training")
        with self.open(f"search-{target}", str(model), target) as context:
            return self.found(context, self.last_budget)

    def found(self, context: Context, budget: Budget) -> lk.LongRope:
        """Return the ladder of a search's winner, or of YaRN where nothing is searched."""
        loaded = context.loaded
        if not self.recipe.searched:
            yarn = baselines(loaded.base, loaded.original_length, context.extension)["yarn"]
            return loaded.extended(yarn.scaling(loaded.base), context.target_length)
        if not done(context, "search.json", budget):
            run_search(context, budget.times(1))
        return factors.read(context.run.path / WINNER_FILE, loaded.base)[0]

    def tune(self, regimes: dict[int, lk.RopeScaling]) -> tuple[Path, lk.LongRope]:
        """Fine-tune at every length in turn; return the last model's folder and ladder."""
        context, recipe = self.context, self.recipe
        rope, model = context.loaded.rope, context.request.model
        context.release()
        ladder, text = rope, text_of(self.documents())
        for length, _ in recipe.tune:
            self.stage(f"fine-tune at {length:,} tokens")
            ladder = lk.LongRope(rope.original_max_position_embeddings, {**rope.regimes, length: regimes[length]})
            folder = context.run.path / STAGES / f"tune-{length}"
            made = finished_training(folder)
            finished = (
                made is not None
                and (folder / "model" / "config.json").is_file()
                and (made["rope"], made["documents"]) == (ladder.to_dict(), text)
                and made["provenance"]["model_fingerprint"] == models.fingerprint(models.find(model))
            )
            if not finished:  # a training of other factors, text or weights is refused, not taken over
                loaded = models.load(model, context.run.settings["dtype"], threads=context.threads)
                settings = self.settings_of(length)
                if context.crew is not None:
                    context.crew.train(self.training_job(loaded, ladder, settings, text, folder))
                run_tuning(loaded, ladder, settings, self.documents(), folder)
            model = str(folder / "model")
        return Path(model), ladder

    def training_job(
        self, loaded: models.LoadedModel, ladder: lk.LongRope, settings: TuneSettings, text: str, folder: Path
    ) -> dict[str, Any]:
        """Return what `train_along` needs to know of a training; JSON."""
        return {
            "model": str(loaded.source.file.absolute()) if loaded.source.file.exists() else loaded.name,
            "model_fingerprint": models.fingerprint(loaded.source),
            "dtype": loaded.dtype,
            "original_length": None,
            "rope": ladder.to_dict(),
            "settings": dataclasses.asdict(settings),
            "sources": self.context.request.text,
            "taken": sorted(self.context.split.texts),
            "text": text,
            "folder": str(folder.absolute()),
        }

    def readjust(self, model: Path, ladder: lk.LongRope) -> lk.LongRope:
        """Return the ladder with regimes for the short lengths that are searched on the tuned model."""
        lengths = self.recipe.readjust
        self.stage(f"readjust for {', '.join(f'{length:,}' for length in lengths)} tokens")
        with self.open(
            "readjust", str(model), lengths[-1], lengths=lengths, ladder=digest(ladder.to_dict())
        ) as context:
            budget = self.budget.times(len(lengths))
            if not done(context, RESULT_FILE, budget):
                run_readjustment(context, ladder, lengths, budget)
            return factors.read(context.run.path / LADDER_FILE)[0]

    def finish(self, model: Path, ladder: lk.LongRope) -> dict[str, Any]:
        """Evaluate, export, reload and report."""
        context, recipe = self.context, self.recipe
        origin = f"progressive extension, tuned at {', '.join(f'{length:,}' for length, _ in recipe.tune)} tokens"
        content = factors.describe(
            ladder, context.request.model, origin, provenance={"recipe": dataclasses.asdict(recipe)}
        )
        context.run.write_json(WINNER_FILE, content)
        regimes = [{"length": length, **scaling.to_dict()} for length, scaling in ladder.regimes.items()]
        context.run.write_json("ladder.json", {"format": "longrope-ladder/1", "regimes": regimes})
        self.stage("perplexity by length, on held-out documents")
        lengths = lengths_between(recipe.original, recipe.target)
        records = score_lengths(context, published(context, lengths), lengths)
        context.release()
        with self.open("result", str(model), recipe.target, context.passkey_depths, again=True) as result:
            records |= score_lengths(result, {OURS: ladder}, lengths)
            table = tabulate(records, lengths)
            context.run.write_json("lengths.json", table)
            say_lengths(table)
            if recipe.target > recipe.tuned:
                self.stage("the second search beside PI, NTK and YaRN on the tuned model")
                heldout = run_evaluation(result, ladder)
                heldout["methods"]["original"]["title"] = f"tuned at {recipe.tuned:,}, not extended further"
                context.run.write_json("heldout.json", heldout)
                say_evaluation(heldout)
            self.stage("export and reload")
            exported = run_export(result, ladder, content, context.run.path / "export")
            context.run.write_json("export.json", exported)
            say_export(exported)
        self.stage("report")
        say(f"{write_report(context.run.path)}, made in {clock(time.monotonic() - self.began)}")
        return table


def train_along(loaded: models.LoadedModel, job: dict[str, Any]) -> None:
    """Train with the other ranks what rank 0 has begun, see `Extension.training_job`.

    Raises:
        UsageError: the text here is other than rank 0's; one line.
    """
    documents = list(data.training(job["sources"], set(job["taken"])))
    if text_of(documents) != job["text"]:
        refuse("--text", f"other documents on rank {rank()[0]} than on rank 0", "the same, to train on")
    settings = TuneSettings(**{**job["settings"], "betas": tuple(job["settings"]["betas"])})
    run_tuning(loaded, lk.LongRope.from_dict(job["rope"]), settings, documents, job["folder"])


def text_of(documents: Iterable[data.Document]) -> str:
    """Return 16 hex digits of the documents, whatever order they come in."""
    return digest(sorted(document.sha256 for document in documents))


def finished_training(folder: Path) -> dict[str, Any] | None:
    """Return the `tune.json` of a stage, or None where there is none.

    Raises:
        UsageError: broken, or of something else; one line that names it.
    """
    file = folder / "tune.json"
    if not file.is_file():
        return None
    made = read_json(file)
    if not isinstance(made, dict) or made.get("format") != TUNED or not {"rope", "documents", "provenance"} <= {*made}:
        refuse("--run-dir", file, f"what a training leaves, of format {TUNED!r}; without it, it is made again")
    return made


def done(context: Context, result: str, budget: Budget) -> bool:
    """Whether a search has left its result, within the budget that is asked for now.

    Raises:
        UsageError: a result that is broken; one line that names it.
    """
    found = context.run.read_json(result)
    if found is not None and (not isinstance(found, dict) or "budget" not in found):
        refuse("--run-dir", context.run.path / result, "what a search leaves; without it, it is made again")
    return found is not None and found["budget"] == budget.bounds
