"""Losses of tokens by llama.cpp itself, through the C functions that the package xllamacpp exports.

Run as a program, with a JSON request on standard input, so that an abort over there is a failed process here. The two
parameter structs are opaque memory that llama.cpp fills; only the first fields, the context's sizes, are set here.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np


def losses(model: Path, tokens: list[int], context: int) -> np.ndarray:
    """Return -log p of tokens 1, 2, ... under a context of `context` tokens, in a process of its own."""
    request = {"model": str(model), "tokens": tokens, "context": context}
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return np.array(json.loads(done.stdout.splitlines()[-1]))


class Parameters(ctypes.Structure):
    """More bytes than any version's struct; passed by value as the last argument, so that the rest does not matter."""

    _fields_ = (("sizes", ctypes.c_uint32 * 3), ("rest", ctypes.c_ubyte * 1012))


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def declare(library: Any, name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function


def main() -> None:
    request = json.load(sys.stdin)
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None
    (place,) = spec.submodule_search_locations or ()
    library = ctypes.CDLL(str(next(Path(place).glob("xllamacpp*.so"))))
    pointer = ctypes.c_void_p
    declare(library, "llama_backend_init", None)()
    model = declare(library, "llama_model_load_from_file", pointer, ctypes.c_char_p, Parameters)(
        request["model"].encode(), declare(library, "llama_model_default_params", Parameters)()
    )
    assert model, "llama.cpp does not load the model"
    tokens, context_tokens = request["tokens"], request["context"]
    parameters = declare(library, "llama_context_default_params", Parameters)()
    parameters.sizes[:] = (context_tokens, context_tokens, context_tokens)  # n_ctx, n_batch, n_ubatch
    # It rounds sizes up to a multiple of 256, which may reach into the other regime.
    context = declare(library, "llama_init_from_model", pointer, pointer, Parameters)(model, parameters)
    assert declare(library, "llama_n_ctx", ctypes.c_uint32, pointer)(context) == context_tokens
    batch = declare(library, "llama_batch_init", Batch, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)(
        len(tokens), 0, 1
    )
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    assert declare(library, "llama_decode", ctypes.c_int32, pointer, Batch)(context, batch) == 0
    vocabulary = declare(library, "llama_vocab_n_tokens", ctypes.c_int32, pointer)(
        declare(library, "llama_model_get_vocab", pointer, pointer)(model)
    )
    row = declare(library, "llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), pointer, ctypes.c_int32)
    found = []
    for i, token in enumerate(tokens[1:]):
        logits = np.ctypeslib.as_array(row(context, i), (vocabulary,)).astype(np.float64)
        found.append(float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[token]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
