"""The data of lm-eval's task `longrope_tiny`: the file beside this one, found wherever the package is installed."""

import json
from pathlib import Path
from typing import Any


def load(**ignored: Any) -> dict[str, Any]:
    """Return the one split, as lm-eval asks for it."""
    import datasets

    lines = Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
