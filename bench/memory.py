"""What a long forward takes, in memory and time: layer by layer in chunks of tokens, and the ordinary way.

`python -m bench.memory` runs a model on random tokens of several lengths, each in a process of its own, prints a table
and writes bench/results/memory.json and docs/figures/memory.png. By default one layer of SmolLM2 is run, and the last
4,096 tokens are scored: layers are alike, only one is ever at work, as is one chunk of logits, so that neither peaks
nor the times of a layer and of a token's loss depend on how many there are. `--layers 0` runs all layers. `--paper`
prints what the formula of `layered_forward` means for larger models.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from longrope import loss, models
from longrope.progress import clock, console, say, task
from longrope.search.budget import forward_cost
from longrope_kernels.integrations.transformers_layered import CHUNK_TOKENS, layered_forward

from . import plots, record

FIGURE = record.ROOT / "docs/figures/memory.png"
LAYERED, ORDINARY = "layer by layer", "ordinary"
WAYS = {LAYERED: "#1f6feb", ORDINARY: "#c0392b"}
LENGTHS = "4096,16384,32768,65536,131072"
ORDINARY_UP_TO = 32_768
SCORED_TOKENS = 4096
GIB = 2**30
# As published: parameters, hidden_size, intermediate_size, key heads, head_dim.
PAPER = {
    "LLaMA2-7B": (6.74e9, 4096, 11008, 32, 128),
    "Mistral-7B": (7.24e9, 4096, 14336, 8, 128),
}
PAPER_LENGTHS = (131_072, 524_288, 2_097_152)


def measure(model: str, dtype: str, tokens: int, way: str, layers: int) -> dict[str, Any]:
    """Run one forward and the losses of the last tokens in this process, whose peak so far is forgotten."""
    loaded = models.load(model, dtype)
    body = getattr(loaded.model, loaded.model.base_model_prefix)
    every = len(body.layers)
    if layers:
        body.layers = body.layers[:layers]
        body.config.num_hidden_layers = len(body.layers)
    extension = max(tokens / loaded.original_length, 1.0)
    scaling = loaded.base.replace(rescale_factors=[extension] * loaded.base.pairs)
    loaded.use(loaded.extended(scaling, max(tokens, loaded.original_length + 1)))
    ids = torch.randint(0, body.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
    before = _bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    with torch.inference_mode():
        began = time.monotonic(), time.process_time()
        if way == LAYERED:
            hidden = layered_forward(loaded.model, ids.unsqueeze(0))[0]
        else:
            hidden = body(input_ids=ids.unsqueeze(0), use_cache=False).last_hidden_state[0]
        done = time.monotonic(), time.process_time()
        forward_peak = _bytes("VmHWM")
        nll = loss.nll_of(loaded.model, hidden, ids, tokens - SCORED_TOKENS)
    seconds, processor_seconds = (end - start for start, end in zip(began, done, strict=True))
    return {
        "tokens": tokens,
        "way": way,
        "layers": len(body.layers),
        "layers_of_model": every,
        "dtype": loaded.dtype,
        "weights_bytes": sum(x.numel() * x.element_size() for x in loaded.model.parameters()),
        "loaded_bytes": before,
        "forward_peak_bytes": forward_peak,
        "peak_bytes": _bytes("VmHWM"),
        "seconds_a_layer": seconds / len(body.layers),
        "processor_seconds_a_layer": processor_seconds / len(body.layers),
        "processor_seconds_a_loss": (time.process_time() - done[1]) / len(nll),
        "nll": float(nll.double().mean()),
    }


def _bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def run(model: str, dtype: str, lengths: list[int], layers: int, threads: int, folder: Path) -> dict[str, Any]:
    """Measure every length and way; return the record."""
    results = record.Record("memory", folder)
    results.content["notes"] = {"model": model, "chunk_tokens": CHUNK_TOKENS, "tokens": "random"}
    results.content["threads"] = threads
    works = [(length, way) for length in lengths for way in WAYS if way == LAYERED or length <= ORDINARY_UP_TO]
    with (
        tempfile.TemporaryDirectory() as place,
        task("memory", sum(forward_cost(length) for length, _ in works)) as work,
    ):
        source = unpacked(model, dtype, Path(place))
        for length, way in works:
            request = json.dumps([source, dtype, length, way, layers, threads])
            command = [sys.executable, "-m", "bench.memory", "--one", request]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = done.stderr.strip().splitlines()[-1:] if done.returncode > 0 else []
                reason = f"exit code {done.returncode} {' '.join(said)}"
                results.add(record.refused(f"{length} tokens, {way}", "memory", reason))
            else:
                results.add({"section": "memory", **json.loads(done.stdout.splitlines()[-1])})
            work.advance(forward_cost(length), f"{length:,} tokens, {way}")
    results.finish()
    return results.content


def unpacked(model: str, dtype: str, folder: Path) -> str:
    """Return the model as a folder that loads in a second, where it is a GGUF file, which takes half a minute."""
    if models.find(model).gguf_file is None:
        return model
    loaded = models.load(model, dtype)
    loaded.stock()
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def show(content: dict[str, Any]) -> None:
    """Print the rows; the time of the whole model is that of its layers times their number, and the losses."""
    table = Table()
    for heading in (
        "tokens",
        "way",
        "forward, beside the weights",
        "with losses",
        "in all",
        "a layer",
        "the model, estimated",
    ):
        table.add_column(heading, justify="right")
    for row in content["rows"]:
        if "refused" in row:
            say(f"{row['name']}: {row['refused']}")
            continue
        whole = (
            row["processor_seconds_a_layer"] * row["layers_of_model"] + row["processor_seconds_a_loss"] * row["tokens"]
        )
        table.add_row(
            f"{row['tokens']:,}",
            row["way"],
            *(f"{(row[name] - row['loaded_bytes']) / GIB:.2f} GiB" for name in ("forward_peak_bytes", "peak_bytes")),
            f"{row['peak_bytes'] / GIB:.2f} GiB",
            f"{row['processor_seconds_a_layer']:.2f} s",
            clock(whole),
        )
    console.print(table)
    say("Times are processor seconds, of all threads together: those of a clock where one thread has a core to itself.")


def paper_bytes(tokens: int, hidden: int, intermediate: int, key_heads: int, head_dim: int) -> int:
    """Return the bytes beside the weights by the formula of `layered_forward`, in two-byte elements."""
    return 2 * (tokens * (hidden + 2 * key_heads * head_dim) + CHUNK_TOKENS * (3 * intermediate + 6 * hidden))


def show_paper() -> None:
    """Print the memory of larger models, by the formula; nothing of it is measured."""
    table = Table(title="By the formula, bf16, not measured: weights + the forward (the losses take 0.3 GiB more)")
    for heading in ("model", *(f"{length:,} tokens" for length in PAPER_LENGTHS)):
        table.add_column(heading, justify="right")
    for name, (parameters, *sizes) in PAPER.items():
        found = [paper_bytes(length, *sizes) for length in PAPER_LENGTHS]
        table.add_row(name, *(f"{2 * parameters / GIB:.1f} + {one / GIB:.1f} GiB" for one in found))
    console.print(table)


def draw(content: dict[str, Any], path: Path = FIGURE) -> Path:
    """Draw peak beside the weights, and time of a layer, against tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in content["rows"] if "refused" not in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), dpi=130)
    for way, color in WAYS.items():
        found = [row for row in rows if row["way"] == way]
        tokens = [row["tokens"] for row in found]
        peaks = [(row["forward_peak_bytes"] - row["loaded_bytes"]) / GIB for row in found]
        left.plot(tokens, peaks, marker="o", ms=4, color=color, label=way)
        right.plot(
            tokens, [row["processor_seconds_a_layer"] for row in found], marker="o", ms=4, color=color, label=way
        )
    left.set(title="peak of the forward beside the weights, GiB", xlabel="tokens", yscale="log")
    right.set(title="time of a layer, processor seconds", xlabel="tokens", yscale="log")
    ticks = sorted({row["tokens"] for row in rows})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tokens // 1024}k" for tokens in ticks])
        axes.grid(alpha=0.25, which="both")
        axes.legend(fontsize=8)
    what = f"{content['notes']['model']}, {rows[0]['dtype']}, {content['threads']} threads"
    figure.suptitle(f"{what}, {content['machine']['processor']}", fontsize=10)
    return plots.save(figure, path)


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--lengths", default=LENGTHS)
    parser.add_argument("--layers", type=int, default=1, help="run the first so many; 0: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the JSON")
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        *request, threads = json.loads(arguments.one)
        torch.set_num_threads(threads)
        print(json.dumps(measure(*request)))
        return 0
    if arguments.paper:
        show_paper()
        return 0
    lengths = [int(length) for length in arguments.lengths.split(",")]
    content = run(arguments.model, arguments.dtype, lengths, arguments.layers, arguments.threads, arguments.results)
    show(content)
    if arguments.results == record.RESULTS:
        say(f"{draw(content).relative_to(record.ROOT)}")
    return int(any("refused" in row for row in content["rows"]))


if __name__ == "__main__":
    sys.exit(main())
