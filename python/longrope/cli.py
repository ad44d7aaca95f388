"""The `longrope` command: options in, one function of the package, one line for an error."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from .errors import PipelineError, disk_error, one_line, refuse

app = typer.Typer(
    name="longrope",
    help="Extend the context window of a language model: search LongRoPE factors, evaluate, export, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_given: list[str] = []  # the arguments of `main`, which need not be those of the process

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a hub name, a GGUF file, or smollm2.")]
To = Annotated[int, typer.Option("--to", help="Target length, in tokens.")]
RunDir = Annotated[Path | None, typer.Option(help="Where results go, and where a run goes on. [runs/MODEL-TO]")]
Text = Annotated[
    list[str] | None, typer.Option(help="Documents: file, folder, .jsonl, stdlib, dataset; repeatable. [stdlib]")
]
HeldoutText = Annotated[list[str] | None, typer.Option(help="Documents of the held-out side. [from --text]")]
PresetName = Annotated[str | None, typer.Option("--preset", help="demo (20 minutes), full (hours) or paper.")]
Dtype = Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32.")]
Threads = Annotated[int | None, typer.Option(help="Of torch and the kernels. [torch's choice]")]
OriginalLength = Annotated[int | None, typer.Option(help="Tokens trained on. [from the configuration]")]
SearchDocuments = Annotated[int | None, typer.Option(help="Documents the search reads.")]
HeldoutDocuments = Annotated[int | None, typer.Option(help="Documents the result is proved on.")]
Windows = Annotated[int | None, typer.Option("--windows-per-document", help="Stretches read of a long document. [1]")]
ScoreFrom = Annotated[int | None, typer.Option(help="First position the search scores. [the original length]")]
Budget_ = Annotated[int | None, typer.Option("--budget", help="Evaluations the search may spend.")]
TimeBudget = Annotated[float | None, typer.Option(help="Minutes of evaluations the search may spend.")]
Method = Annotated[
    str | None, typer.Option(help="longrope, or longrope2: needle objective, critical space. [longrope]")
]
Objective = Annotated[str | None, typer.Option(help="What is minimised: text, or needle (answers). [by --method]")]
Space = Annotated[str | None, typer.Option(help="all pairs, or critical: those from a pair on. [by --method]")]
Needles = Annotated[int | None, typer.Option(help="Questions about each search document. [2]")]
Population = Annotated[int | None, typer.Option(help="Of the first generation. [64]")]
Iterations = Annotated[int | None, typer.Option(help="Generations after the first. [40]")]
Mutations = Annotated[int | None, typer.Option(help="Per iteration. [16]")]
Crossovers = Annotated[int | None, typer.Option(help="Per iteration. [16]")]
MutationProbability = Annotated[float | None, typer.Option(help="[0.3]")]
Parents = Annotated[int | None, typer.Option(help="The best that have children. [32]")]
Monotone = Annotated[bool | None, typer.Option("--monotone/--no-monotone", help="lambda_i <= lambda_{i+1}. [yes]")]
StartTokens = Annotated[str | None, typer.Option(help="Choices of n-hat: 0, or 0,16,64, or paper. [paper]")]
AttentionFactor = Annotated[str | None, typer.Option(help="A number, yarn, su or search. [1.0]")]
Screen = Annotated[str | None, typer.Option(help="Screening lengths: 10240,12288, or none.")]
ScreenDocuments = Annotated[int | None, typer.Option(help="Search documents a screen reads, the first. [all]")]
ScreenKeep = Annotated[float | None, typer.Option(help="Share of candidates a screen lets pass. [0.34]")]
ScreenControls = Annotated[int | None, typer.Option(help="Candidates it turns down, scored all the same. [0]")]
PasskeyDepths = Annotated[str | None, typer.Option(help="Passkey retrieval at these depths: 0.1,0.5,0.9, or none.")]
Tune = Annotated[str | None, typer.Option(help="Lengths to fine-tune at and steps at each: 2048:100,4096:80, or none.")]
TuneBatch = Annotated[int | None, typer.Option(help="Sequences a step of the fine-tuning learns from. [1]")]
TuneRate = Annotated[float | None, typer.Option(help="Learning rate of the fine-tuning. [2e-5]")]
TuneSchedule = Annotated[str | None, typer.Option(help="linear, constant or cosine. [linear]")]
TuneWarmup = Annotated[int | None, typer.Option(help="Steps in which the rate rises. [0]")]
TuneLora = Annotated[int | None, typer.Option(help="Rank of adapters trained in place of the weights. [0: none]")]
TuneShort = Annotated[
    float | None, typer.Option("--tune-short-share", help="Share of short windows under the original RoPE. [0]")
]
Readjust = Annotated[str | None, typer.Option(help="Lengths searched again on the tuned model: 512,1024, or none.")]
LastBudget = Annotated[int | None, typer.Option(help="Evaluations of the second search. [--budget]")]
Searched = Annotated[
    bool | None, typer.Option("--search/--no-search", help="No: YaRN's factors; --readjust searches. [yes]")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and what it takes, and stop.")]
Seed = Annotated[int | None, typer.Option(help="Of all random draws. [0]")]
FactorFile = Annotated[Path | None, typer.Option("--factors", help="A factor file. [the winner in the run directory]")]


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; works at any place of the line.")] = False,
) -> None:
    """Every command tells its options with --help."""


@app.command()
def inspect(
    model: Model,
    to: Annotated[int | None, typer.Option("--to", help="Show turns at this length too.")] = None,
    original_length: OriginalLength = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table as JSON.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Write the figure as PNG.")] = None,
) -> None:
    """Show the wavelength of every rotary pair, its turns in training, and the critical dimension."""
    import json

    from . import models
    from .extend import say_inspection
    from .inspection import inspect_rope
    from .run import write_atomically

    source = models.find(model)
    config = models.load_config(source)
    rope = models.rope_of(config, original_length, source)
    if to is not None:
        models.check_target(to, rope)
    found = inspect_rope(rope, model, config.model_type, to)
    say_inspection(found)
    if json_file is not None:
        write_atomically(json_file, (json.dumps(found.to_dict(), indent=1) + "\n").encode())
    if figure is not None:
        from .report import figures

        write_atomically(figure, figures.png(figures.wavelengths(found.to_dict())))


@app.command()
def search(
    model: Model,
    to: To,
    run_dir: RunDir = None,
    preset: PresetName = None,
    text: Text = None,
    heldout_text: HeldoutText = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    original_length: OriginalLength = None,
    search_documents: SearchDocuments = None,
    heldout_documents: HeldoutDocuments = None,
    windows_per_document: Windows = None,
    score_from: ScoreFrom = None,
    method: Method = None,
    objective: Objective = None,
    space: Space = None,
    needles: Needles = None,
    budget: Budget_ = None,
    time_budget: TimeBudget = None,
    population: Population = None,
    iterations: Iterations = None,
    mutations: Mutations = None,
    crossovers: Crossovers = None,
    mutation_probability: MutationProbability = None,
    parents: Parents = None,
    monotone: Monotone = None,
    start_tokens: StartTokens = None,
    attention_factor: AttentionFactor = None,
    screen: Screen = None,
    screen_documents: ScreenDocuments = None,
    screen_keep: ScreenKeep = None,
    screen_controls: ScreenControls = None,
    seed: Seed = None,
) -> None:
    """Search factors; writes factors/winner.json into the run directory."""
    arguments = dict(locals())
    from .options import open_run, serves

    if serves(model, threads):
        return

    context, spending = open_run(**arguments, command=typed())
    from .plan import check_room
    from .search.stage import run_search

    with closing(context):
        check_room(context.loaded, to)
        run_search(context, spending)


@app.command()
def readjust(
    model: Model,
    lengths: Annotated[str, typer.Option(help="Tokens, comma-separated: a regime for texts of up to each.")],
    factors: Annotated[Path | None, typer.Option(help="The ladder, a factor file. [that of MODEL]")] = None,
    run_dir: RunDir = None,
    text: Text = None,
    heldout_text: HeldoutText = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    original_length: OriginalLength = None,
    search_documents: SearchDocuments = None,
    windows_per_document: Windows = None,
    budget: Budget_ = None,
    time_budget: TimeBudget = None,
    population: Population = None,
    iterations: Iterations = None,
    mutations: Mutations = None,
    crossovers: Crossovers = None,
    mutation_probability: MutationProbability = None,
    parents: Parents = None,
    monotone: Monotone = None,
    start_tokens: StartTokens = None,
    seed: Seed = None,
) -> None:
    """Search factors of an extended model for shorter texts; writes a ladder to factors/readjusted.json."""
    arguments = dict(locals())
    from .options import open_readjustment, serves

    if serves(model, threads):
        return

    context, ladder, spending = open_readjustment(**arguments, command=typed())
    from .plan import check_room
    from .search.readjust import run_readjustment

    with closing(context):
        check_room(context.loaded, context.target_length)
        run_readjustment(context, ladder, context.request.lengths, spending)


@app.command()
def extend(
    model: Model,
    to: To,
    run_dir: RunDir = None,
    preset: PresetName = None,
    text: Text = None,
    heldout_text: HeldoutText = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    original_length: OriginalLength = None,
    search_documents: SearchDocuments = None,
    heldout_documents: HeldoutDocuments = None,
    windows_per_document: Windows = None,
    score_from: ScoreFrom = None,
    method: Method = None,
    objective: Objective = None,
    space: Space = None,
    needles: Needles = None,
    budget: Budget_ = None,
    time_budget: TimeBudget = None,
    population: Population = None,
    iterations: Iterations = None,
    mutations: Mutations = None,
    crossovers: Crossovers = None,
    mutation_probability: MutationProbability = None,
    parents: Parents = None,
    monotone: Monotone = None,
    start_tokens: StartTokens = None,
    attention_factor: AttentionFactor = None,
    screen: Screen = None,
    screen_documents: ScreenDocuments = None,
    screen_keep: ScreenKeep = None,
    screen_controls: ScreenControls = None,
    passkey_depths: PasskeyDepths = None,
    tune: Tune = None,
    tune_batch: TuneBatch = None,
    tune_lr: TuneRate = None,
    tune_schedule: TuneSchedule = None,
    tune_warmup: TuneWarmup = None,
    tune_lora: TuneLora = None,
    tune_short_share: TuneShort = None,
    readjust: Readjust = None,
    last_budget: LastBudget = None,
    searched: Searched = None,
    seed: Seed = None,
    dry_run: DryRun = False,
) -> None:
    """All of it: inspect, search, fine-tune where asked, evaluate on held-out documents, export, reload, report.

    With --tune LENGTH:STEPS,... the whole method of the paper: searches at those lengths, fine-tuning at each, a second
    search from the last of them to --to without training, and --readjust for short texts.
    """
    arguments = dict(locals())
    from .options import open_extension, serves

    if serves(model, threads):
        return

    del arguments["dry_run"]
    context, spending, progressive = open_extension(**arguments, command=typed())
    from .extend import extend as run_extend
    from .extend import say_stages

    with closing(context):
        if progressive is not None:
            progressive.plan() if dry_run else progressive.run()
        elif dry_run:
            say_stages(context, spending)
        else:
            run_extend(context, spending)


@app.command()
def evaluate(
    model: Model,
    to: To,
    run_dir: RunDir = None,
    factors: FactorFile = None,
    preset: PresetName = None,
    text: Text = None,
    heldout_text: HeldoutText = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    original_length: OriginalLength = None,
    search_documents: SearchDocuments = None,
    heldout_documents: HeldoutDocuments = None,
    windows_per_document: Windows = None,
    passkey_depths: PasskeyDepths = None,
) -> None:
    """Perplexity by position and length on held-out documents, beside the original and published methods; passkey.

    Of a MODEL that was extended to --to, or beyond, the original is what it was before that: the same weights under its
    shorter regimes.
    """
    arguments = {name: value for name, value in locals().items() if name != "factors"}
    from .factors import read
    from .options import open_run, read_factors, serves

    if serves(model, threads):
        return
    if factors is not None:
        read(factors)  # before the seconds that loading a model takes
    context, _ = open_run(**arguments, keep_settings=True, again=True)
    from .evaluate.stage import run_evaluation, say_evaluation
    from .plan import check_room

    with closing(context):
        check_room(context.loaded, to)
        found = read_factors(context, factors)
        name = "heldout.json" if found else "baselines.json"
        say_evaluation(run_evaluation(context, None if found is None else found[0], name, dynamic=True))


@app.command()
def measure(
    model: Model,
    to: Annotated[int | None, typer.Option("--to", help="Tokens read of a document. [the run's, or longest]")] = None,
    run_dir: RunDir = None,
    method: Annotated[
        str | None, typer.Option(help="original, pi, ntk, dynamic-ntk, yarn, longrope; with commas. [the winner]")
    ] = None,
    factors: Annotated[Path | None, typer.Option("--factors", help="A factor file, beside the methods.")] = None,
    lengths: Annotated[str | None, typer.Option(help="4096,8192,... [doubles of the original length]")] = None,
    tasks: Annotated[
        str, typer.Option(help="Of perplexity, sliding, passkey, multi-needle, ruler or its tasks by name, or none.")
    ] = "perplexity,passkey,multi-needle,ruler",
    depths: Annotated[str | None, typer.Option(help="Of passkeys and needles. [0,0.25,0.5,0.75,1]")] = None,
    samples: Annotated[int, typer.Option(help="Of every RULER task; trials of every depth.")] = 5,
    needles: Annotated[int, typer.Option(help="Of multi-needle.")] = 4,
    stride: Annotated[int, typer.Option(help="Of sliding windows, in tokens.")] = 256,
    lm_eval: Annotated[str | None, typer.Option("--lm-eval", help="lm-eval tasks, with commas; longrope_tiny.")] = None,
    lm_eval_limit: Annotated[int | None, typer.Option("--lm-eval-limit", help="Samples of each. [all]")] = None,
    text: Text = None,
    heldout_text: HeldoutText = None,
    heldout_documents: HeldoutDocuments = None,
    windows_per_document: Windows = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    original_length: OriginalLength = None,
    seed: Annotated[int, typer.Option(help="Of what is hidden and asked.")] = 0,
) -> None:
    """Perplexity by length, passkeys and needles by depth, RULER-like tasks, lm-eval: any method, with intervals."""
    arguments = {name: value for name, value in locals().items() if name not in ("method", "factors")}
    from .factors import read
    from .options import serves

    if serves(model, threads):
        return
    if factors is not None:
        read(factors)
    from .measuring import chosen_methods, open_measurement, say_measured

    context, plan = open_measurement(**arguments, command=typed())
    from .evaluate.measure import measure as run_measure
    from .plan import check_room
    from .progress import say
    from .report import write_report

    with closing(context):
        check_room(context.loaded, context.target_length)
        results = run_measure(context, chosen_methods(context, method, factors, plan), plan)
        say_measured(results, plan)
        say(f"{context.run.path / 'measured'}, {write_report(context.run.path)}")


@app.command()
def export(
    model: Model,
    factors: Annotated[Path, typer.Option("--factors", help="A factor file.")],
    out: Annotated[Path, typer.Option(help="The folder to write, or the GGUF file.")],
    format: Annotated[str, typer.Option(help="transformers, or gguf for llama.cpp.")] = "transformers",
    gguf: Annotated[Path | None, typer.Option(help="The model's GGUF file, to take the weights from. [MODEL]")] = None,
    dtype: Dtype = "auto",
    original_length: OriginalLength = None,
) -> None:
    """Write a checkpoint that stock transformers loads, or a GGUF file, from a model and a factor file."""
    from . import models
    from .export import export_checkpoint, export_gguf
    from .factors import read
    from .progress import say

    if format not in ("transformers", "gguf"):
        refuse("--format", format, "transformers or gguf")
    if gguf is not None and format != "gguf":
        refuse("--gguf", gguf, "--format gguf beside it")
    read(factors)
    if format == "gguf":
        source = models.find(model)
        if gguf is None and source.gguf_file is None:
            refuse("--gguf", "nothing", f"the GGUF file of {model}")
        config = models.load_config(source)
        rope, _ = read(factors, models.rope_of(config, original_length).scalings[-1])
        notes = export_gguf(rope, config, source.file if gguf is None else gguf, out)
    else:
        loaded = models.load(model, dtype, original_length)
        rope, content = read(factors, loaded.base)
        notes = export_checkpoint(loaded, rope, out, content)
    say(f"wrote {out}")
    for note in notes:
        say(f"note: {note}")


@app.command()
def tune(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder of the training; the tuned model is written to OUT/model.")],
    factors: Annotated[Path | None, typer.Option("--factors", help="A factor file. [the winner of --run-dir]")] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="A run directory: its winner is taken, its documents are not trained on.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="llama2-128k, llama2-256k, mistral or tiny.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a sequence. [the factors' longest]")] = None,
    steps: Annotated[int | None, typer.Option(help="Of the optimizer.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences per step. [1]")] = None,
    per_forward: Annotated[int | None, typer.Option(help="Sequences per forward. [1]")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate. [2e-5]")] = None,
    schedule: Annotated[str | None, typer.Option(help="linear, constant or cosine. [linear]")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps in which the rate rises. [0]")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="[0]")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="[1.0]")] = None,
    compute: Annotated[str | None, typer.Option(help="bf16 or fp32, of the computation. [by --dtype]")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints. [50]")] = None,
    stop_above: Annotated[float | None, typer.Option(help="Multiple of the least loss that ends it. [1.5]")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Of adapters trained instead of the weights. [0: none]")] = None,
    short_share: Annotated[float | None, typer.Option(help="Of rows with short windows (LongRoPE2). [0]")] = None,
    short_length: Annotated[int | None, typer.Option(help="Tokens of a short window. [the first regime's]")] = None,
    text: Text = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    original_length: OriginalLength = None,
    seed: Seed = None,
    tensorboard: Annotated[bool | None, typer.Option(help="Write TensorBoard's files. [where installed]")] = None,
    overcommit: Annotated[bool, typer.Option("--overcommit", help="Start though memory may run out.")] = False,
) -> None:
    """Fine-tune under a factor file's last regime; resumes exactly. Writes what stock transformers loads."""
    arguments = dict(locals())
    from .tune.command import run_command

    run_command(**arguments)


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]) -> None:
    """Write report.html and the figures again, from the files of a run directory."""
    from .progress import say
    from .report import write_report

    say(f"wrote {write_report(run)}")


@app.command()
def doctor() -> None:
    """Say which backends this machine can run, why it cannot run the others, and all versions."""
    from .doctor import run_doctor

    run_doctor()


@app.command()
def bench(
    lengths: Annotated[str, typer.Option(help="Tokens, comma-separated.")] = "1024,4096,8192",
    dtype: Dtype = "auto",
    threads: Threads = None,
) -> None:
    """Time our attention beside torch's SDPA with RoPE, in under a minute (`make bench` has the full set)."""
    from .bench import run_bench
    from .models import set_threads
    from .options import integers

    if threads is not None:
        set_threads(threads)
    run_bench(integers("--lengths", lengths), dtype=dtype)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0, 1 for what could not be done, 2 for a wrong argument, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    _given[:] = arguments
    quiet_libraries()
    try:
        code = app(arguments or ["--help"], prog_name="longrope", standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        _exit(*explain(error, arguments))
    if code:  # typer returns 130 for an interrupt that came while a command ran
        _exit("stopped; the same command goes on where it was" if code == 130 else "", code)


def typed() -> str:
    """Return the command line as it was given."""
    return shlex.join(["longrope", *_given])


def quiet_libraries() -> None:
    """Keep other libraries' bars and advice off the terminal; before they are imported."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def explain(error: BaseException, arguments: Sequence[str] = ()) -> tuple[str, int]:
    """Return the line for an error, and the exit code."""
    if isinstance(error, PipelineError):
        return str(error), error.exit_code
    if isinstance(error, typer.Exit):
        return "", error.exit_code
    if isinstance(error, typer.Abort):
        return "stopped", 130
    if hasattr(error, "format_message"):  # the command line's own complaints
        return one_line(_misread(error, arguments) or error.format_message()), int(getattr(error, "exit_code", 2))
    if isinstance(error, OSError) and error.errno:
        return str(disk_error(str(error.filename or "run"), error)), 1
    if isinstance(error, MemoryError):
        return "memory: got none left, expected room for the model and one forward at the target length", 1
    return one_line(f"unexpected {type(error).__name__}: {error} (--debug shows the traceback)"), 1


def _misread(error: Any, arguments: Sequence[str]) -> str | None:
    """Return the line for an option whose value has the wrong type; the library's own does not say the value."""
    message = str(getattr(error, "message", ""))
    kinds = {"integer": "an integer", "number": "a number", "float": "a number"}
    kind = next((said for word, said in kinds.items() if f"valid {word}" in message), None)
    for name in getattr(getattr(error, "param", None), "opts", ()) if kind else ():
        for argument, value in reversed(list(zip(arguments, [*arguments[1:], ""], strict=True))):  # the last one counts
            if argument == name or argument.startswith(f"{name}="):
                value = value if argument == name else argument.partition("=")[2]
                return f"{name}: got {value!r}, expected {kind}"
    return None


def _exit(line: str, code: int) -> NoReturn:
    if line:
        print(f"longrope: {line}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
