"""Choose the tiles of the Triton kernels and write them as data, off line: nothing is tuned at a user's first call.

    python -m bench.tune_gpu [--kernel K] [--width W] [--bits B] [--minutes N] [--out FILE]     on a GPU
    python -m bench.tune_gpu --compile-only [--target T] [--dry-run] ...                        without one

For each entry of configs.json the present tile and its neighbours (half and double the rows and keys, other warps and
stages; for prefill on sm_90 and sm_100 each of them with keys through tensor descriptors too) are tried. What spills or
needs more shared memory than there is, is out. On a GPU the fastest by the median of a real call wins if it beats the
present tile by more than 2%; with --compile-only the one with the fewest instructions per score wins if it beats it by
more than 10%. --dry-run prints the winners and writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import longrope_kernels as lk
from longrope_kernels.backends.triton import configs
from longrope_kernels.backends.triton.configs import Config
from longrope_kernels.bundles import KEY_GROUP

from . import report_gpu
from .report_gpu import DTYPES, LAUNCHES, Entry, Table, entries

# Seconds, or another cost, of an entry with the tile that the table has now; None: that tile cannot be taken.
Cost = Callable[[Entry], float | None]


def candidates(kernel: str, target: str, present: Config) -> list[Config]:
    """The present tile first, then its neighbours that the kernels take."""
    split = kernel.startswith("split")
    rows = (
        (present.rows,) if split or kernel.startswith("decode") else (present.rows // 2, present.rows, 2 * present.rows)
    )
    keys = (present.keys // 2, present.keys, 2 * present.keys)
    stages = (1,) if target == "gfx942" else (1, 2, 3, 4)
    # Whoever reads a quantised cache takes blocks that divide a group of keys.
    most = KEY_GROUP if split or kernel.startswith("decode") or kernel.endswith(("int8", "fp8")) else 128
    found = [present]
    by_descriptor = (False, True) if kernel == "forward" and target in configs.DESCRIPTOR_TARGETS else (False,)
    for row, key, warps, stage, descriptors in itertools.product(rows, keys, (4, 8), stages, by_descriptor):
        config = Config(row, key, warps, stage, descriptors)
        if 16 <= row <= 128 and 16 <= key <= most and config != present:
            found.append(config)
    return found


@contextlib.contextmanager
def trying(table: Table, entry: Entry, config: Config) -> Iterator[None]:
    """The table with another tile at one place."""
    place = table[entry.kernel][entry.target][entry.bits]
    before = place[entry.width]
    place[entry.width] = config.to_list()
    try:
        yield
    finally:
        place[entry.width] = before


def compiled_cost(entry: Entry) -> float | None:
    """Instructions per score of the compiled kernel; None where it spills, does not fit or does not compile."""
    case = entry.case
    launch = next(x for x in report_gpu.launches(case) if x.name == LAUNCHES[entry.kernel][1])
    found = report_gpu.report(launch, case.target, case.label)
    if found.error:  # a tile that the compiler does not take, whatever it says
        print(f"  {launch.config}: {found.error}", file=sys.stderr)
    if found.error or found.spill_bytes or found.shared_bytes > report_gpu.SHARED_LIMIT[case.target]:
        return None
    return found.instructions * launch.config.warps / (launch.config.rows * launch.config.keys)


def measured_cost(entry: Entry) -> float | None:
    """Seconds of a real call on the GPU, the median of as many as fit into a fifth of a second, at least 5."""
    if compiled_cost(entry) is None:
        return None
    call = problem(entry)
    from .gpu import GPU, seconds

    for _ in range(2):
        call()
    first = seconds(GPU, call)
    return statistics.median(seconds(GPU, call) for _ in range(max(5, min(50, int(0.2 / max(first, 1e-6))))))


def problem(entry: Entry) -> Callable[[], Any]:
    """A call of the op that an entry is for, on random data on the GPU."""
    case = entry.case
    rotary = case.head_dim if case.rotary_dim is None else case.rotary_dim
    s = lk.RopeScaling(case.head_dim, 5e5, torch.linspace(1, 16, rotary // 2).tolist(), rotary_dim=rotary)
    few = {"decode": 1, "decode at positions": 1, "8 tokens": 8, "16 tokens": 16, "in tile": 40}
    for kind in report_gpu.QUANTISED:
        few |= {kind: 1, f"{kind} in tile": 40}
    tokens = few.get(case.op, 8192)
    keys = 8192 if tokens == 8192 else 65536

    def draw(heads: int, count: int) -> torch.Tensor:
        return torch.randn(1, heads, count, case.head_dim, device="cuda").to(case.dtype)

    query, key, value = draw(32, tokens), draw(8, keys), draw(8, keys)
    options: dict[str, Any] = {"softcap": 30.0} if case.general else {}
    if case.quantised is not None:
        kind = case.op.split()[0]
        cache = lk.KVCache(1, 8, case.head_dim, keys, case.dtype, kind, page_tokens=256, device="cuda")
        cache.append(key, value)
        return lambda: cache.attend(query, s, backend="triton", **options)
    if case.op == "decode at positions":
        options["key_positions"] = torch.arange(keys, device="cuda")
    if case.op != "backward":
        return lambda: lk.attention(query, key, value, s, backend="triton", **options)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out = lk.attention(*leaves, s, backend="triton", **options)
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def tune(table: Table, places: list[Entry], cost: Cost, margin: float, minutes: float) -> dict[Entry, Config]:
    """Try the neighbours of every place, keep in the table what wins by the margin, and return the changes."""
    deadline = time.monotonic() + 60 * minutes
    changes = {}
    for entry in places:
        present = entry.config(table)
        best, least = present, float("inf")
        for config in candidates(entry.kernel, entry.target, present):
            if time.monotonic() > deadline:
                break
            with trying(table, entry, config):
                found = cost(entry)
            if found is not None and (found < least * (1 - margin) if best == present else found < least):
                best, least = config, found
        if best != present:
            changes[entry] = best
            table[entry.kernel][entry.target][entry.bits][entry.width] = best.to_list()
            print(f"{entry}: {present} -> {best}", flush=True)
    return changes


def dumps(table: Table) -> str:
    """The table as configs.json has it: a line for each target and size of an element."""
    kernels = []
    for kernel, targets in table.items():
        rows = []
        for target, sizes in targets.items():
            lines = ",\n".join(f'   "{bits}": {json.dumps(widths)}' for bits, widths in sizes.items())
            rows.append(f'  "{target}": {{\n{lines}\n  }}')
        kernels.append(f' "{kernel}": {{\n' + ",\n".join(rows) + "\n }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def main() -> int:
    """Tune what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=configs.KERNELS, help="one kernel only")
    parser.add_argument("--target", choices=list(report_gpu.TARGETS), help="with --compile-only: one target only")
    parser.add_argument("--bits", choices=list(DTYPES), help="one size of an element only")
    parser.add_argument("--width", choices=[str(width) for width in configs.WIDTHS], help="one head width only")
    parser.add_argument("--minutes", type=float, default=60.0, help="try nothing further after this")
    parser.add_argument("--compile-only", action="store_true", help="rank by what compiles, without a GPU")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("--out", type=pathlib.Path, default=configs.TABLE, help="where the table goes")
    arguments = parser.parse_args()
    target, cost, margin = arguments.target, compiled_cost, 0.1
    if not arguments.compile_only:
        if not torch.cuda.is_available():
            print("bench.tune_gpu: no GPU that torch can use (--compile-only does without)", file=sys.stderr)
            return 2
        from longrope_kernels.backends.triton.launch import target_of

        target, cost, margin = target_of(torch.device("cuda")), measured_cost, 0.02
        target = configs.TILES_OF.get(target, target)
    table = configs.table()
    wanted = entries(table, kernel=arguments.kernel, target=target, bits=arguments.bits, width=arguments.width)
    places = [entry for entry in wanted if entry.target in report_gpu.TARGETS]
    changes = tune(table, places, cost, margin, arguments.minutes)
    print(f"{len(places)} entries, {len(changes)} changed")
    if changes and not arguments.dry_run:
        arguments.out.write_text(dumps(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
