"""How well a part of the text ranks candidates as all of it does: `python -m bench.screens [RUN]`.

Every evaluation at the target length holds the losses of its prefixes, so any shorter or narrower screen can be tried
on a finished run at no cost. Prints Kendall's tau against the objective, over all candidates and over the better half,
where it matters, and the cost of the screen as a share of the objective's.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longrope.evaluate.scoring import mean_nll
from longrope.search.budget import forward_cost
from longrope.search.screening import kendall_tau

from .record import RESULTS

Record = dict[str, Any]


def candidates(run: Path) -> list[dict[str, Record]]:
    """Return the records of each candidate by document, of those that the objective scored whole."""
    found: dict[str, dict[str, Record]] = defaultdict(dict)
    for line in (run / "evaluations.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["stage"] == "search":
            found[json.dumps(record["candidate"], sort_keys=True)][record["window"]] = record
    documents = max(len(records) for records in found.values())
    return [records for records in found.values() if len(records) == documents]


def taus(found: Sequence[dict[str, Record]], documents: Sequence[str], length: int) -> tuple[float, float]:
    """Return tau over all candidates and over the better half, of a screen of `length` tokens of `documents`."""
    first = next(iter(found[0].values()))["start"]
    target = [mean_nll(list(records.values()), first, max(r["length"] for r in records.values())) for records in found]
    screen = [mean_nll([records[name] for name in documents], first, length) for records in found]
    order = sorted(range(len(found)), key=target.__getitem__)
    half = order[: len(order) // 2]
    return kendall_tau(screen, target), kendall_tau([screen[i] for i in half], [target[i] for i in half])


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.screens", description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, default=RESULTS / "search_full", help="a run directory")
    found = candidates(parser.parse_args().run)
    records = next(iter(found))
    start, target = (next(iter(records.values()))[name] for name in ("start", "length"))
    print(f"{len(found)} candidates, scored from {start:,} to {target:,} tokens of {len(records)} documents")
    print(f"{'screen':<48}{'tau':>6}{'better half':>13}{'cost':>7}")
    for documents in (*([name] for name in records), list(records)):
        for share in (0.25, 0.5, 0.75, 1.0):
            length = start + int(share * (target - start))
            if length == target and len(documents) == len(records):
                continue
            every, half = taus(found, documents, length)
            cost = len(documents) * forward_cost(length) / (len(records) * forward_cost(target))
            title = f"{length:,} tokens of {documents[0] if len(documents) == 1 else f'all {len(documents)}'}"
            print(f"{title:<48}{every:>6.2f}{half:>13.2f}{cost:>7.0%}")


if __name__ == "__main__":
    main()
