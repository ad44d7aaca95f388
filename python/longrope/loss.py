"""Negative log-likelihood of the tokens of a long sequence, without ever holding all its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from longrope_kernels.integrations.transformers_layered import is_enabled, layered_forward

CHUNK_BYTES = 128 * 2**20  # of float32 logits held at once


@torch.inference_mode()
def token_nll(model: Any, input_ids: Tensor, start: int = 1, chunk_tokens: int | None = None) -> Tensor:
    """Return -log p(token | all tokens before it), in nats, of the tokens from index `start` on.

    The model body runs once, layer by layer where the model is enabled (`layered_forward`); its head and the
    cross-entropy run over a chunk of positions at a time, and only over positions that are scored.

    Args:
        model: a transformers causal language model.
        input_ids: int64[tokens].
        start: index of the first token scored; 1 is the first that has a token before it.
        chunk_tokens: positions whose logits are held at once; None: what fits into 128 MiB.

    Returns:
        float32[tokens - start].
    """
    return nll_of(model, last_hidden_state(model, input_ids), input_ids, start, chunk_tokens)


@torch.inference_mode()
def nll_of(model: Any, hidden: Tensor, input_ids: Tensor, start: int = 1, chunk_tokens: int | None = None) -> Tensor:
    """`token_nll` where the model's last hidden state, [tokens, hidden_size], is known."""
    tokens = input_ids.numel()
    start = max(start, 1)
    if chunk_tokens is None:
        chunk_tokens = max(CHUNK_BYTES // (4 * model.config.get_text_config().vocab_size), 1)
    losses = []
    for first in range(start, tokens, chunk_tokens):
        last = min(first + chunk_tokens, tokens)
        logits = head_logits(model, hidden[first - 1 : last - 1])
        losses.append(functional.cross_entropy(logits, input_ids[first:last], reduction="none"))
    return torch.cat(losses) if losses else torch.zeros(0)


@torch.inference_mode()
def answer_scores(model: Any, input_ids: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Return the likeliest token at each index from `start` on, and the loss of the one that is there.

    Args:
        input_ids: int64[tokens]; those from `start` on, the answer, are few: their logits are held at once.

    Returns:
        int64[tokens - start], and float32[tokens - start] in nats, each given all tokens before it.
    """
    hidden = last_hidden_state(model, input_ids)
    logits = head_logits(model, hidden[start - 1 : -1])
    return logits.argmax(-1), functional.cross_entropy(logits, input_ids[start:], reduction="none")


def last_hidden_state(model: Any, input_ids: Tensor) -> Tensor:
    """Return [tokens, hidden_size], what the head reads, of int64[tokens]."""
    if is_enabled(model):
        return layered_forward(model, input_ids.unsqueeze(0))[0]
    body = getattr(model, model.base_model_prefix)
    return body(input_ids=input_ids.unsqueeze(0), use_cache=False).last_hidden_state[0]


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """Return float32 logits as the model's own forward makes them: its scale and its softcap included."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2
        logits = torch.tanh(logits / cap) * cap
    return logits.float()
