"""A whole forward of a real model: perplexity of SmolLM2-135M over one long document, ours beside stock transformers.

Here thread pools meet: attention between torch's matrix products, thirty times a forward.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import longrope_kernels as lk
from longrope import data, models
from longrope.loss import token_nll

from .workloads import NAMES, OURS, TORCH, Disagreement, Shape, Work

SHAPE = Shape(9, 3, 64, 16384, torch.bfloat16)
NATS = 0.02  # mean losses may differ by this; bf16 alone makes a few thousandths


@functools.cache
def _loaded(dtype: str) -> models.LoadedModel:
    return models.load("smollm2", dtype)


def perplexity(shape: Shape) -> Work:
    """Return the work of scoring one document of `shape.tokens` tokens.

    The sides are too slow to run twice: each timed run is checked against the one before it.
    """
    loaded = _loaded(NAMES[shape.dtype])
    document = next(data.stdlib((data.TOPICS_FIRST,)))
    ids = loaded.tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"][: shape.tokens]
    if len(ids) < shape.tokens:
        raise ValueError(f"document: got {len(ids)} tokens, expected {shape.tokens}")
    tokens = torch.tensor(ids)
    plain = lk.LongRope(shape.tokens, {shape.tokens: loaded.base})
    work = Work(shape, {})
    losses: dict[str, float] = {}

    def score(side: str, few: bool = False) -> Tensor:
        if side == OURS:
            loaded.use(plain)
        else:
            loaded.stock()
        nll = token_nll(loaded.model, tokens[:512] if few else tokens)
        if not few:
            losses[side] = nll.double().mean().item()
            if len(losses) == 2:
                work.differences[TORCH] = abs(losses[TORCH] - losses[OURS])
                if not work.differences[TORCH] <= NATS:
                    raise Disagreement(f"mean loss: got {losses[OURS]:.4f} and {losses[TORCH]:.4f} nats of torch")
        return nll

    for side in (OURS, TORCH):
        score(side, few=True)
        work.sides[side] = functools.partial(score, side)
    return work
