"""`python -m bench`: pytest-benchmark over RoPE and attention, ours beside torch SDPA + transformers' RoPE.

Prints a table with ratios and writes bench/results/ops.json. Other benchmarks: bench.cpu, bench.angles.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from longrope.progress import Task, console, say, task

from . import record, tables, test_ops, timing


class Collector:
    """Takes the times from pytest-benchmark as they come, so that an interrupted run keeps what it has."""

    def __init__(self, results: record.Record, work: Task, chosen: Collection[test_ops.Case]) -> None:
        self.results, self.work, self.chosen = results, work, chosen
        self.seconds: dict[test_ops.Case, dict[str, list[float]]] = {}
        self.failed: dict[test_ops.Case, str] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.callspec.params["case"] in self.chosen]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: Any) -> Any:
        case, side = item.callspec.params["case"], item.callspec.params["side"]
        try:
            result = yield
            self.seconds.setdefault(case, {})[side] = list(item.funcargs["benchmark"].stats.stats.data)
        except Exception as error:
            self.failed.setdefault(case, (str(error) or type(error).__name__).splitlines()[0])
            self._after(case, side)
            raise
        self._after(case, side)
        return result

    def _after(self, case: test_ops.Case, side: str) -> None:
        if side == case.sides[-1]:
            self._finish(case)
        self.work.advance(case.cost * case.rounds, f"{case.section} {case.name}")

    def _finish(self, case: test_ops.Case) -> None:
        if case in self.failed:
            self.results.add(record.refused(case.name, case.section, self.failed[case]))
            return
        work = test_ops.work_of(case)
        assert isinstance(work, test_ops.Work)
        wanted = {} if case.wanted is None else {case.sides[1]: case.wanted}
        samples = timing.Samples(self.seconds[case])
        self.results.add(record.row(case.name, case.section, work, samples, wanted))


def run(folder: Path = record.RESULTS, only: str = "") -> int:
    """Run, print and write; return the exit status."""
    chosen = [case for case in test_ops.cases() if only in f"{case.section} {case.name}"]
    results = record.Record("ops", folder)
    # pytest's own reporter would write into the progress line; failures come back as rows.
    options = ["-s", "-p", "no:terminal", "-p", "no:cacheprovider", "--timeout=0", "--benchmark-disable-gc"]
    arguments = [str(Path(__file__).with_name("test_ops.py")), *options, f"--rootdir={record.ROOT}", "-c", os.devnull]
    with task("bench", sum(case.cost * case.rounds * len(case.sides) for case in chosen)) as work:
        collector = Collector(results, work, chosen)
        status = pytest.main(arguments, plugins=[collector])
    show(results.content)
    if status == pytest.ExitCode.INTERRUPTED:
        say(f"interrupted; what was measured is in {results.partial.name}")
        return 130
    if not results.rows:
        say(f"nothing was measured (pytest's exit status {int(status)})")
        return 1
    if only:
        say(f"part of the benchmark; written to {results.partial.name}")
    else:
        say(f"written to {results.finish().name}")
    return int(any("refused" in row for row in results.rows))


def show(content: dict[str, Any]) -> None:
    """Print the table of ratios."""
    tables.brief(content).show(console)
    for line in (*tables.refusals(content), tables.provenance(content)):
        say(line)
    wanted = tables.goals(content)
    if wanted.rows:
        wanted.show(console)


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the JSON")
    parser.add_argument("--only", default="", help="run works whose name contains this word")
    arguments = parser.parse_args()
    return run(arguments.results, arguments.only)


if __name__ == "__main__":
    sys.exit(main())
