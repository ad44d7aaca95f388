"""llama.cpp's attention on the CPU: the part of a model's time that grows as the square of the tokens.

llama-cpp-python binds whole models, not the attention. So a model is made of which attention is nearly all: one layer
of architecture llama with the heads in question, a hidden size of 64, 256 words and random weights. `llama_decode` of a
prompt of n tokens then takes a n + b n^2 seconds; a and b are fitted to prompts of n/4, n/2 and n tokens (medians),
and b n^2 is called the attention's time. What llama.cpp's attention spends in proportion to n is left out with the
projections, in its favour: rotation, writing the cache, and the masked half of the blocks on the diagonal.

The model runs in a process of its own, `python -m bench.llama_cpp MODEL SETTINGS`: its threads do not meet torch's,
and an abort over there is one line here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

PACKAGE = "llama-cpp-python"
HIDDEN, FEED_FORWARD, WORDS = 64, 64, 256
EPSILON = 1e-5
# llama.cpp's own default: what a user of `llama-cli` and of the Python class gets. Queries are taken so many at a time.
UBATCH = 512
LEAST_SHARE = 0.1

Weights = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Settings:
    """What `llama_decode` is timed under.

    Attributes:
        context: tokens of the cache (fp16, llama.cpp's default); it rounds up to a multiple of 256.
        flash: its fused attention kernel, or separate products and softmax.
    """

    context: int
    threads: int
    flash: bool = True
    ubatch: int = UBATCH


def unavailable_reason() -> str | None:
    """Say why llama.cpp cannot be run here, or None."""
    return None if importlib.util.find_spec("llama_cpp") else "not installed"


def note() -> str:
    """Say in one line what the rows of llama.cpp measure, or why there are none."""
    if reason := unavailable_reason():
        return reason
    return (
        f"{PACKAGE} {metadata.version(PACKAGE)}; its time is b n^2 of the a n + b n^2 seconds that llama_decode takes "
        f"for a prompt of n tokens through one layer with these heads (hidden size {HIDDEN}), "
        f"fitted to n/4, n/2 and n; what grows with n alone, rotation too, is left out; fp16 cache, n_ubatch {UBATCH}"
    )


def make_weights(heads: int, key_heads: int, head_dim: int, seed: int = 0) -> Weights:
    """Draw the one-layer model, by the names of its GGUF tensors, each matrix [out, in].

    Scores have a standard deviation of about 2 and the attention's output the residual's size, so that a wrong
    attention is seen in the logits.
    """
    random = np.random.default_rng(seed)

    def matrix(outputs: int, inputs: int, gain: float = 1.0) -> NDArray[np.float32]:
        return random.normal(0.0, gain * inputs**-0.5, (outputs, inputs)).astype(np.float32)

    ones = np.ones(HIDDEN, np.float32)
    return {
        "token_embd.weight": random.normal(size=(WORDS, HIDDEN)).astype(np.float32),
        "output_norm.weight": ones,
        "output.weight": matrix(WORDS, HIDDEN),
        "blk.0.attn_norm.weight": ones,
        "blk.0.attn_q.weight": matrix(heads * head_dim, HIDDEN, 2**0.5),
        "blk.0.attn_k.weight": matrix(key_heads * head_dim, HIDDEN, 2**0.5),
        "blk.0.attn_v.weight": matrix(key_heads * head_dim, HIDDEN),
        "blk.0.attn_output.weight": matrix(HIDDEN, heads * head_dim, 4.0),
        "blk.0.ffn_norm.weight": ones,
        "blk.0.ffn_gate.weight": matrix(FEED_FORWARD, HIDDEN),
        "blk.0.ffn_up.weight": matrix(FEED_FORWARD, HIDDEN),
        "blk.0.ffn_down.weight": matrix(HIDDEN, FEED_FORWARD),
    }


def write_model(
    path: Path, weights: Weights, heads: int, key_heads: int, head_dim: int, context: int, theta: float
) -> Path:
    """Write the one-layer model as a GGUF file, in float32 and without a tokenizer."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_context_length(context)
    writer.add_vocab_size(WORDS)
    writer.add_block_count(1)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_tokenizer_model("none")
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def prompt(tokens: int) -> NDArray[np.int32]:
    """Return the words of a prompt, the same for every length but for where it ends."""
    return np.random.default_rng(1).integers(0, WORDS, tokens, dtype=np.int32)


def lengths(tokens: int) -> tuple[int, int, int]:
    """Return the prompts that the time of `tokens` is fitted to."""
    return tokens // 4, tokens // 2, tokens


def quadratic_seconds(seconds: Mapping[int, float]) -> float:
    """Fit a n + b n^2 with a and b not negative to seconds by number of tokens n; return b n^2 for the largest n.

    Least squares of the times divided by n, which weighs short and long prompts alike.

    Raises:
        ValueError: one line, for fewer than two lengths, or where b n^2 is too small a part to be told from noise.
    """
    if len(seconds) < 2 or min(seconds) < 1:
        raise ValueError(f"seconds: got prompts of {sorted(seconds)} tokens, expected two lengths or more, from 1")
    n = np.array(sorted(seconds), np.float64)
    rates = np.array([seconds[int(x)] for x in n]) / n
    slope, intercept = np.polyfit(n, rates, 1)
    if intercept < 0:
        slope = (rates * n).sum() / (n * n).sum()
    if not slope * n[-1] >= LEAST_SHARE * rates[-1]:
        shown = ", ".join(f"{int(x):,}: {seconds[int(x)]:.3g} s" for x in n)
        raise ValueError(f"seconds: got {shown}, expected times of which {LEAST_SHARE:.0%} grows as tokens squared")
    return float(slope * n[-1] ** 2)


class Session:
    """A process in which llama.cpp holds one model; it ends with this object."""

    def __init__(self, model: Path, settings: Settings) -> None:
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115, as long-lived as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.llama_cpp", str(model), json.dumps(asdict(settings))],
            cwd=Path(__file__).resolve().parent.parent,
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # an abort would start a debugger first
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        weakref.finalize(self, _end, self._process)
        self.build: str = self._answer()["build"]

    def decode(self, tokens: int) -> list[float]:
        """Run `prompt(tokens)` from an empty cache; return the last token's logits.

        Raises:
            RuntimeError: one line, where llama.cpp refuses or its process has ended.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it said last is reported below
            print(tokens, file=self._process.stdin, flush=True)
        return self._answer()["logits"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()
            raise RuntimeError(f"llama.cpp: its process ended with status {status}: {said[-1] if said else 'no word'}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def serve(model_path: str, settings: Settings, requests: Sequence[str] | IO[str], answers: IO[str]) -> None:
    """Load the model, then decode a prompt of as many tokens as each line of `requests` says; JSON lines out."""
    import ctypes

    import llama_cpp as library

    library.llama_backend_init()
    model = library.llama_model_load_from_file(model_path.encode(), library.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp does not load {model_path}")
    parameters = library.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = -(-settings.context // 256) * 256
    parameters.n_ubatch = min(settings.ubatch, parameters.n_batch)
    parameters.n_threads = parameters.n_threads_batch = settings.threads
    parameters.flash_attn_type = int(settings.flash)  # LLAMA_FLASH_ATTN_TYPE_DISABLED, _ENABLED
    context = library.llama_init_from_model(model, parameters)
    if not context:
        raise SystemExit(f"llama.cpp makes no context of {parameters.n_ctx} tokens")
    memory = library.llama_get_memory(context)
    print(json.dumps({"build": library.llama_print_system_info().decode().strip()}), file=answers, flush=True)
    for line in requests:
        words = prompt(int(line))
        library.llama_memory_clear(memory, True)
        array = (library.llama_token * len(words))(*words.tolist())
        began = time.perf_counter()
        # One sequence from position 0; the logits of the last token alone.
        status = library.llama_decode(context, library.llama_batch_get_one(array, len(words)))
        if status:
            raise SystemExit(f"llama_decode of {len(words)} tokens answers {status}")
        library.llama_synchronize(context)
        seconds = time.perf_counter() - began
        row = library.llama_get_logits_ith(context, -1)
        logits = np.ctypeslib.as_array(ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), (WORDS,)).tolist()
        print(json.dumps({"logits": logits, "seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # whatever else is printed over there is no answer
        serve(sys.argv[1], Settings(**json.loads(sys.argv[2])), sys.stdin, out)
