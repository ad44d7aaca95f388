"""The CPU backend against torch and against the machine: `python -m bench.cpu [--model]`, 10 to 20 minutes.

Prefill, forward + backward and decode beside torch SDPA + transformers' RoPE and torch.compile of the same; prefill
beside llama.cpp's attention where llama-cpp-python is installed (docs/benchmarks.md); all cores over one; growth of
time with tokens; with --model, perplexity of SmolLM2 in one whole forward. Sides run in turns, the ceilings
(register-only multiply-adds, a torch matmul, reads of memory) beside them in every round.
Prints tables and writes bench/results/cpu.json and docs/figures/cpu_time.png.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from longrope.progress import Task, console, say, task

from . import llama_cpp, record, tables, timing, workloads
from .workloads import ONE_THREAD, OURS_BF16, TORCH, UNROTATED, Shape, Work

BF16, FP32 = torch.bfloat16, torch.float32
LARGE, SMALL = (16, 4, 128), (9, 3, 64)
DECODE = Shape(32, 8, 128, 131072, BF16)
GROWTH_TOKENS = tuple(1024 * 2**k for k in range(7))
TORCH_SECONDS = 10.0  # the peer is left out of longer growth rows
TORCH_RATE = 1.1e11  # operations a second: only to foresee that, and time left


@dataclass(frozen=True)
class Plan:
    """One row to be: how to build it, and what is wanted of it.

    Attributes:
        kind: "compute" or "memory", which ceilings it is measured against; "none".
        operations: of vectors, that the work spends on 512 bytes it reads; 0 where it is not measured against that.
        seconds: expected of one round of all sides.
        least_tokens: what `--tiny` does not go below.
    """

    section: str
    shape: Shape
    build: Callable[[Shape], Work]
    kind: str = "compute"
    seconds: float = 1.0
    compiles: bool = True
    label: str = ""
    least_tokens: int = 1
    goals: dict[str, float] = field(default_factory=dict, hash=False)
    operations: int = 0

    @property
    def name(self) -> str:
        return f"{self.label}, {self.shape}" if self.label else str(self.shape)

    def cost(self, budget: float) -> float:
        """Seconds expected: building (each side once, twice where it compiles), warming up and the rounds."""
        if self.section == "model":
            return self.seconds
        return (15.0 if self.compiles else 0.0) + 2 * self.seconds + max(budget, timing.MIN_ROUNDS * self.seconds)

    def shrunk(self, divisor: int) -> Plan:
        """Return the same row with fewer tokens."""
        shape = replace(self.shape, tokens=max(self.shape.tokens // divisor, self.least_tokens))
        return replace(self, shape=shape, seconds=self.seconds / divisor)


def _seconds(shape: Shape, work: float, sides: float) -> float:
    return work * 2 * shape.heads * shape.head_dim * float(shape.tokens) ** 2 / TORCH_RATE * sides


def prefills() -> list[Plan]:
    """Whole sequences, with and without rotation."""
    found = []
    for heads, lengths in ((LARGE, (4096, 16384)), (SMALL, (8192, 16384))):
        for dtype in (BF16, FP32):
            wanted = {BF16: (3.5, 0.58) if heads == LARGE else (3.0, 0.45), FP32: (1.2, 0.78)}[dtype]
            goals = {TORCH: wanted[0], "share": wanted[1], UNROTATED: 1 / 1.03}
            for tokens in lengths:
                shape = Shape(*heads, tokens, dtype)

                def build(shape: Shape) -> Work:
                    return workloads.prefill(shape, unrotated=True)

                found.append(Plan("prefill", shape, build, seconds=_seconds(shape, 1.0, 3.0), goals=goals))
    return found


def trainings() -> list[Plan]:
    """Forward + backward."""
    shapes = ((Shape(*LARGE, 4096, BF16), 2.5), (Shape(*LARGE, 4096, FP32), 1.25))
    return [
        Plan("training", shape, workloads.training, seconds=_seconds(shape, 3.5, 3.0), goals={TORCH: wanted})
        for shape, wanted in shapes
    ]


def decodes() -> list[Plan]:
    """One query over a long cache."""
    goals = {TORCH: 20.0, "share": 0.85}
    int8_goals = {OURS_BF16: 1.7, "share": 0.80}
    # Operations as csrc/cpu/attention_decode.h and attention_decode_int8.h count them, as cycles of one multiplication.
    return [
        Plan("decode", DECODE, workloads.decode, "memory", seconds=1.5, goals=goals, operations=100),
        Plan(
            "decode",
            DECODE,
            workloads.decode_int8,
            "memory",
            0.5,
            compiles=False,
            label="int8",
            goals=int8_goals,
            operations=180,
        ),
    ]


def besides_llama_cpp() -> list[Plan]:
    """Prefill beside llama.cpp's attention, where llama-cpp-python is installed."""
    if llama_cpp.unavailable_reason():
        return []
    shapes = [Shape(*LARGE, 4096, BF16), Shape(*LARGE, 16384, BF16), Shape(*SMALL, 16384, BF16)]
    # A third more for the shorter prompts; with the fused kernel and without.
    return [
        Plan(
            "llama.cpp",
            shape,
            workloads.beside_llama_cpp,
            seconds=_seconds(shape, 1.0, 5.0),
            compiles=False,
            least_tokens=1024,
        )
        for shape in shapes
    ]


def scaling() -> list[Plan]:
    """All cores over one."""
    shape = Shape(*LARGE, 4096, BF16)
    threads = torch.get_num_threads()
    if threads == 1:
        return []

    def build(shape: Shape) -> Work:
        return workloads.prefill(shape, compile=False, torch_side=False, one_thread=True)

    goals = {ONE_THREAD: 1.9} if threads == 2 else {}
    label = f"{threads} threads over 1"
    return [Plan("threads", shape, build, seconds=0.6, compiles=False, label=label, goals=goals)]


def growths(divisor: int = 1) -> list[Plan]:
    """Time by tokens; the peer only where it takes less than TORCH_SECONDS."""
    found = []
    for tokens in GROWTH_TOKENS:
        shape = Shape(*SMALL, tokens, BF16)
        with_torch = _seconds(replace(shape, tokens=tokens // divisor), 1.0, 1.0) < TORCH_SECONDS

        def build(shape: Shape, with_torch: bool = with_torch) -> Work:
            return workloads.prefill(shape, compile=False, torch_side=with_torch)

        seconds = _seconds(shape, 1.0, 1.3 if with_torch else 0.3)
        found.append(Plan("growth", shape, build, seconds=seconds, compiles=False))
    return found


def plans(model: bool = False, divisor: int = 1) -> list[Plan]:
    """All rows, in the order of the table.

    Args:
        divisor: of all tokens, for tests of the machinery.
    """
    found = [*prefills(), *trainings(), *decodes(), *besides_llama_cpp(), *scaling(), *growths(divisor)]
    if divisor > 1:
        found = [plan.shrunk(divisor) for plan in found]
    if model:
        from . import model as whole

        shape = replace(whole.SHAPE, tokens=whole.SHAPE.tokens // divisor)
        seconds = 140.0 / divisor
        goals = {TORCH: 1.95}
        label = "SmolLM2-135M perplexity"
        plan = Plan("model", shape, whole.perplexity, "none", seconds, compiles=False, label=label, goals=goals)
        found.append(plan)
    return found


def measure(plan: Plan, budget: float, size: float, progress: Callable[[float], None]) -> dict[str, Any]:
    """Build, check and time one row."""
    work = plan.build(plan.shape)
    ceilings = {} if plan.kind == "none" else timing.probes(plan.kind, plan.shape.dtype, size, plan.operations)
    samples = timing.in_turns(work.sides, ceilings, budget, progress, once=plan.section == "model")
    for name, calculate in work.derived.items():
        samples.derive(name, calculate)
    return record.row(plan.name, plan.section, work, samples, plan.goals)


def run(
    folder: Path = record.RESULTS,
    model: bool = False,
    only: str = "",
    budget: float = 20.0,
    divisor: int = 1,
    figure: Path | None = record.ROOT / "docs/figures/cpu_time.png",
) -> int:
    """Measure every row, print and write; return the exit status.

    A row whose sides disagree is written without figures, and the status is 1.
    """
    every = plans(model, divisor)
    chosen = [plan for plan in every if only in f"{plan.section} {plan.name}"]
    if not chosen:
        sections = dict.fromkeys(plan.section for plan in every)
        say(f"--only: {only!r} is in no row's section or name; sections are {', '.join(sections)}")
        return 2
    results = record.Record("cpu", folder)
    results.content["notes"]["llama.cpp"] = llama_cpp.note()
    status = 0
    try:
        with task("bench-cpu", sum(plan.cost(budget) for plan in chosen)) as work:
            for plan in chosen:
                status |= _one(plan, budget, 1 / divisor, work, results)
                gc.collect()
    except KeyboardInterrupt:
        show(results.content)
        say(f"interrupted; what was measured is in {results.partial.name}")
        return 130
    show(results.content)
    if len(chosen) < len(every) or not results.rows:
        say(f"part of the benchmark; written to {results.partial.name}")
        return status
    path = results.finish()
    say(f"written to {path.name}")
    if figure is not None:
        from . import plots

        say(f"drawn: {plots.draw(record.read(path), figure).name}")
    return status


def _one(plan: Plan, budget: float, size: float, work: Task, results: record.Record) -> int:
    began, cost = work.done, plan.cost(budget)
    title = f"{plan.section} {plan.name}"
    work.advance(0.0, title)
    status = 0
    try:
        found = measure(plan, budget, size, lambda share: work.advance(began + share * cost - work.done, title))
    except Exception as error:  # one row that fails costs no other
        # Disagreement of the sides above all; its message is one line.
        found = record.refused(plan.name, plan.section, f"{error}".strip().splitlines()[0] or type(error).__name__)
        status = 1
    results.add(found)
    work.advance(began + cost - work.done, title)
    return status


def show(content: dict[str, Any]) -> None:
    """Print all tables."""
    tables.comparisons(content).show(console, "Ours beside torch (SDPA + transformers' RoPE), in turns; medians")
    tables.ceilings(content).show(console, "Rates beside the ceilings of the same rounds")
    tables.growth(content).show(console, "Growth with tokens: prefill, bf16, 9/3x64")
    tables.goals(content).show(console, "Wanted and reached")
    for line in (tables.rotation_cost(content), *tables.refusals(content), tables.provenance(content)):
        if line:
            say(line)


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="store_true", help="measure a whole forward of SmolLM2 too: 5 minutes more")
    parser.add_argument(
        "--only", default="", help="measure the rows whose section or name contains this, such as 'prefill bf16'"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="wanted for the rounds of one row (20)")
    parser.add_argument("--threads", type=int, help="of torch and of the kernels; all cores where not given")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the JSON")
    parser.add_argument("--tiny", type=int, default=1, metavar="N", help="divide tokens by N, to try the command")
    arguments = parser.parse_args()
    if arguments.tiny > 1 and arguments.results == record.RESULTS:
        parser.error("--tiny: got the folder of real results, expected --results FOLDER beside it")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    figure = record.ROOT / "docs/figures/cpu_time.png" if arguments.results == record.RESULTS else None
    return run(arguments.results, arguments.model, arguments.only, arguments.seconds, arguments.tiny, figure)


if __name__ == "__main__":
    sys.exit(main())
