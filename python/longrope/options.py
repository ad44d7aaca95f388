"""From the options of a command to a request, a budget and an open run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import longrope_kernels as lk

from . import factors as factor_files
from . import models, presets, team
from .context import Context, Request
from .errors import PipelineError, refuse
from .evaluate.scoring import run_forward
from .presets import Preset, screen_lengths
from .progress import console
from .progressive.recipe import Recipe, named_as_typed, parse_tune
from .progressive.stages import Extension, train_along
from .run import digest, read_run
from .search.budget import Budget
from .search.readjust import check_lengths
from .search.space import PAPER_START_TOKENS
from .search.stage import WINNER_FILE, attention_factors, evolution_settings
from .tune.settings import TuneSettings


def open_run(
    model: str,
    to: int,
    run_dir: Path | None = None,
    preset: str | None = None,
    threads: int | None = None,
    budget: int | None = None,
    time_budget: float | None = None,
    passkey_depths: str | None = None,
    keep_settings: bool = False,
    command: str | None = None,
    extends: bool = True,
    again: bool = False,
    **options: Any,
) -> tuple[Context, Budget]:
    """Open the run that the options of a command describe.

    Args:
        options: fields of `Request` as the command line has them; None leaves the preset's or the default.
        command: the line as typed, for the record.
        keep_settings: what is not said comes from the run directory where there is one.
        extends, again: see `Context.open`.
    """
    chosen = Preset({}) if preset is None else presets.preset(preset)
    folder = run_dir or Path("runs") / f"{Path(model).stem or model}-{to}"
    if to < 1:
        refuse("--to", to, "a target length in tokens")
    if time_budget is not None and not time_budget > 0:
        refuse("--time-budget", time_budget, "minutes above 0")
    if budget is not None and budget < 1:
        refuse("--budget", budget, "a number of evaluations above 0")
    given = {name: value for name, value in _parse(options).items() if value is not None}
    if "screens" not in given and chosen.screen_shares:
        lengths = _screens(model, to, given.get("original_length"), chosen)
        given["screens"] = tuple(length for length in lengths if length > given.get("score_from", 0))
    before: dict[str, Any] = {}
    run: dict[str, Any] = {}
    if keep_settings and (folder / "run.json").is_file():
        run = read_run(folder)
        known = run["settings"]
        if given.get("dtype") == "auto":
            del given["dtype"]
        names = {field.name for field in dataclasses.fields(Request)}
        before = {name: _tuples(value) for name, value in known.items() if name in names}
    method = presets.method(given["method"]) if "method" in given else {}
    request = Request(**{**before, **chosen.request, **method, **given, "model": model, "to": to})
    _check_kinds(request)
    if request.screen_documents is not None and request.screen_documents > request.search_documents:
        refuse(
            "--screen-documents", request.screen_documents, f"at most the {request.search_documents} search documents"
        )
    evolution_settings(request)
    attention_factors(request.attention_factor, 2.0, 2048)
    evaluations = budget if budget is not None or time_budget is not None else chosen.budget
    minutes = time_budget if time_budget is not None or budget is not None else chosen.minutes
    spending = Budget(evaluations, None if minutes is None else minutes * 60)
    depths = chosen.passkey_depths if passkey_depths is None else numbers("--passkey-depths", passkey_depths)
    if not all(0 <= depth <= 1 for depth in depths):
        refuse("--passkey-depths", passkey_depths, "numbers between 0 and 1")
    asked: dict[str, Any] = {"evaluations": evaluations, "minutes": minutes}
    if keep_settings:  # what the run was asked stays on record
        asked, command = run.get("budget", {}), run.get("command") or command
    context = Context.open(
        request,
        folder,
        threads,
        depths,
        asked,
        command,
        extends=extends,
        again=again,
    )
    return context, spending


def open_readjustment(
    model: str,
    lengths: str,
    factors: Path | None = None,
    run_dir: Path | None = None,
    original_length: int | None = None,
    **options: Any,
) -> tuple[Context, lk.LongRope, Budget]:
    """Open the run that the options of `longrope readjust` describe, and return the ladder it is about.

    Args:
        lengths: as typed, `4096,8192`.
        factors: the ladder's file, where it is not the model's own.
        options: as `open_run` takes them.
    """
    chosen = tuple(sorted(set(integers("--lengths", lengths))))
    source = models.find(model)
    ladder = models.rope_of(models.load_config(source), original_length, source)
    if factors is not None:
        ladder, _ = factor_files.read(factors, ladder.scalings[-1])
    check_lengths(ladder, chosen)
    folder = run_dir or Path("runs") / f"{Path(model).stem or model}-readjusted"
    asked: dict[str, Any] = {"lengths": chosen, "ladder": digest(ladder.to_dict()), "original_length": original_length}
    context, budget = open_run(model, max(chosen), folder, **asked, **options)
    return context, ladder, budget


def open_extension(
    preset: str | None = None,
    tune: str | None = None,
    readjust: str | None = None,
    last_budget: int | None = None,
    **options: Any,
) -> tuple[Context, Budget, Extension | None]:
    """Open the run of `longrope extend`, and the progressive extension where the options describe one.

    Args:
        options: as `open_run` takes them.
    """
    chosen = Preset({}) if preset is None else presets.preset(preset)
    if last_budget is not None and last_budget < 1:
        refuse("--last-budget", last_budget, "a number of evaluations above 0")
    steps = None if tune is None else parse_tune(tune)
    lengths = None if readjust is None else integers("--readjust", readjust)
    if steps == () and lengths is None:
        lengths = ()
    context, budget = open_run(preset=preset, tune=steps, readjust=lengths, **options)
    request = context.request
    try:
        if not request.tune:
            if request.readjust:
                refuse("--readjust", readjust, "--tune beside it (longrope readjust does that alone)")
            return context, budget, None
        source = models.find(request.model)
        original = models.rope_of(models.load_config(source), request.original_length, source).lengths[-1]
        recipe = Recipe(original, request.to, request.tune, request.readjust, request.searched)
        with named_as_typed():
            settings = TuneSettings(
                length=recipe.tune[0][0],
                steps=recipe.tune[0][1],
                batch=request.tune_batch,
                lr=request.tune_lr,
                schedule=request.tune_schedule,
                warmup=request.tune_warmup,
                seed=request.seed,
                lora_rank=request.tune_lora,
                short_share=request.tune_short_share,
            )
        evaluations = chosen.last_budget if last_budget is None else last_budget
        last = Budget(evaluations, budget.seconds) if evaluations else budget
        return context, budget, Extension(context, recipe, budget, last, settings)
    except PipelineError:
        context.close()
        raise


def serves(model: str, threads: int | None) -> bool:
    """Whether this is one of torchrun's ranks above 0; it works for rank 0 until that has no more to do."""
    if team.rank()[0] == 0:
        return False
    console.quiet = True  # rank 0 speaks for all
    try:
        team.Hand(model, run_forward, train_along, threads).serve(team.meet())
    finally:
        console.quiet = False
    return True


def read_factors(context: Context, path: Path | None) -> tuple[lk.LongRope, dict[str, Any]] | None:
    """Return the ladder of a factor file, of the run's winner, or that a model extended to the target has, or None."""
    if path is None:
        path = context.run.path / WINNER_FILE
        if not path.is_file():
            source = context.loaded.source
            own = models.rope_of(models.load_config(source), context.request.original_length, source)
            return (own, {}) if own.lengths[-1] >= context.target_length else None
    rope, content = factor_files.read(path, context.loaded.base)
    refuse_searched_on(context, path, content)
    return rope, content


def refuse_searched_on(context: Context, path: Path, content: dict[str, Any]) -> None:
    """Refuse a factor file that was searched on a document which it would be held out from."""
    read = {one.get("sha256") for one in (content.get("objective") or {}).get("documents", [])}
    for window in context.split.heldout:
        if window.sha256 in read:
            refuse(
                "--factors",
                f"{path}, searched on {window.document}",
                "one that did not read what it is measured on (--heldout-text, or the --run-dir of its search)",
            )


def integers(option: str, text: str) -> tuple[int, ...]:
    """Parse `1,2,3`; `none` is nothing."""
    if text == "none":
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        refuse(option, repr(text), "ints separated by commas, or none")


def numbers(option: str, text: str) -> tuple[float, ...]:
    """Parse `0.1,0.5`; `none` is nothing."""
    if text == "none":
        return ()
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        refuse(option, repr(text), "numbers separated by commas, or none")


def _parse(options: dict[str, Any]) -> dict[str, Any]:
    """Turn options as typed into fields of `Request`."""
    parsed = dict(options)
    for name in ("text", "heldout_text"):
        if parsed.get(name):
            parsed[name] = tuple(parsed[name])
        else:
            parsed.pop(name, None)
    start_tokens = parsed.get("start_tokens")
    if start_tokens is not None:
        parsed["start_tokens"] = (
            PAPER_START_TOKENS if start_tokens == "paper" else integers("--start-tokens", start_tokens)
        )
        if not parsed["start_tokens"] or min(parsed["start_tokens"]) < 0:
            refuse("--start-tokens", start_tokens, "one or more ints >= 0, or paper")
    screen = parsed.pop("screen", None)
    if screen is not None:
        parsed["screens"] = integers("--screen", screen)
    for name in ("search_documents", "heldout_documents", "windows_per_document", "screen_documents", "needles"):
        if parsed.get(name) is not None and parsed[name] < 1:
            refuse(f"--{name.replace('_', '-')}", parsed[name], "an int >= 1")
    keep = parsed.get("screen_keep")
    if keep is not None and not 0 < keep <= 1:
        refuse("--screen-keep", keep, "a share above 0 and up to 1")
    return parsed


def _check_kinds(request: Request) -> None:
    for option, value, known in (
        ("--objective", request.objective, presets.OBJECTIVES),
        ("--space", request.space, presets.SPACES),
    ):
        if value not in known:
            refuse(option, value, f"one of {', '.join(known)}")
    if request.objective == "needle" and request.score_from is not None:
        refuse("--score-from", request.score_from, "--objective text beside it: needles are scored on their answers")


def _screens(model: str, to: int, original_length: int | None, chosen: Preset) -> tuple[int, ...]:
    config = models.load_config(models.find(model))
    original = models.rope_of(config, original_length, models.find(model)).lengths[-1]
    return screen_lengths(chosen.screen_shares, original, to, 64 if original % 64 == 0 else 1)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value
