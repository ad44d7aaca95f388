"""Load an export with stock transformers in a process of its own, and compare its losses with ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import longrope_kernels as lk

from ..data import Window
from ..errors import PipelineError, one_line
from ..evaluate.scoring import Scorer
from ..models import DTYPES
from ..progress import waiting

# Relative difference in perplexity. The two sides round at other places (fused attention beside SDPA) and have other
# angles (exact beside float32 products, off by up to 5e-4 rad at 8,192). In bf16 a rounding is 0.4% of an activation
# and losses of single tokens move by a few hundredths of a nat, their mean over thousands of tokens by far less.
TOLERANCE = {"fp32": 1e-3, "fp16": 5e-3, "bf16": 1e-2}
SHORT_TOKENS = 2048
LONG_TOKENS = 1024  # beyond the original length
LONG_SCORED = 2048  # the last of them: stock transformers holds their logits at once


def reload_check(
    scorer: Scorer,
    rope: lk.LongRope,
    window: Window,
    folder: str | Path,
    original_rope_parameters: dict[str, Any],
) -> dict[str, Any]:
    """Return the losses of both sides, their differences, the tolerance, and `passed`.

    Three comparisons: a short text through the short regime against stock transformers with the original rotary
    embedding (equal bit for bit where the short regime is the original one); the same text, and one a little longer
    than the original length, against our own kernels (within the tolerance).

    Args:
        rope: as exported; what the configuration cannot say must have been taken out.
        window: at least `original length + LONG_TOKENS` tokens where the target is.
        original_rope_parameters: of the model's configuration before the export.
    """
    loaded = scorer.loaded
    original, block = loaded.original_length, scorer.block_tokens
    short_length = min(SHORT_TOKENS, original) // block * block
    beyond = min(LONG_TOKENS, rope.max_position_embeddings - original)
    long_length = (original + max(beyond // block * block, block)) if beyond >= block else rope.max_position_embeddings
    long_start = max(long_length - LONG_SCORED, 0) // block * block
    request = {
        "folder": str(Path(folder).resolve()),
        "dtype": str(DTYPES[loaded.dtype]).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "tokens": window.tokens[:long_length],
        "short_length": short_length,
        "long_length": long_length,
        "long_start": max(long_start, 1),
        "original_length": original,
        "original_rope_parameters": original_rope_parameters,
    }
    with waiting(f"reloading {folder} with stock transformers: {short_length:,} and {long_length:,} tokens", 60.0):
        answer = run_stock(request)
        ours_short = scorer.score(window, rope, short_length, stage="reload")
        ours_long = scorer.score(window, rope, long_length, long_start, stage="reload")
    tolerance = TOLERANCE[loaded.dtype]
    checks = []
    for name, start, length, ours, stock in (
        ("short", 0, short_length, ours_short["nll"], answer["short_nll"]),
        ("long", long_start, long_length, ours_long["nll"], answer["long_nll"]),
    ):
        difference = abs(stock - ours)
        checks.append(
            {
                "name": name,
                "start": start,
                "length": length,
                "ours_nll": ours,
                "stock_nll": stock,
                "difference": difference,
                "passed": difference <= tolerance,
            }
        )
    same = answer["short_sha256"] == answer["original_short_sha256"]
    return {
        "format": "longrope-reload/1",
        "window": window.name,
        "tolerance": tolerance,
        "checks": checks,
        "short_equals_stock_original": same,
        "short_stock_original_nll": answer["original_short_nll"],
        "transformers": answer["transformers"],
        "rope_type": answer["rope_type"],
        "passed": all(check["passed"] for check in checks),
    }


def run_stock(request: dict[str, Any]) -> dict[str, Any]:
    """Run `stock_check.py` in a fresh interpreter that cannot import this project."""
    program = Path(__file__).with_name("stock_check.py").read_text()
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = one_line(lines[-1] if lines else f"exit code {done.returncode}", 300)
        raise PipelineError(f"reload check: got {reason!r}, expected stock transformers to load {request['folder']}")
    return dict(json.loads(done.stdout.splitlines()[-1]))
