"""The training loss of long sequences: logits of a chunk of positions at a time, in the backward pass too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..loss import CHUNK_BYTES, head_logits

IGNORED = -100


class CausalLoss(nn.Module):
    """A causal language model whose forward is its loss: what the trainer trains.

    The model's body runs as it does otherwise; its head and the cross-entropy run over a chunk of positions at a time,
    and once more in the backward pass, so that the logits of one chunk are all that is ever held.

    Args:
        model: a transformers causal language model.
        chunk_tokens: positions whose logits are held at once; None: what fits into 128 MiB of float32.
    """

    def __init__(self, model: Any, chunk_tokens: int | None = None) -> None:
        super().__init__()
        self.model = model
        vocabulary = model.config.get_text_config().vocab_size
        self.chunk_tokens = max(CHUNK_BYTES // (4 * vocabulary), 1) if chunk_tokens is None else chunk_tokens

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor | None = None) -> dict[str, Tensor]:
        """Return `loss`, the mean over all tokens of -log p(token | those before it), in nats.

        Args:
            input_ids: int64[batch, tokens].
            cu_seqlens: int64[1, sequences + 1], where a single row holds sequences that are to be told apart; the first
                token of each is not scored.
        """
        body = getattr(self.model, self.model.base_model_prefix)
        packed = {} if cu_seqlens is None else {"cu_seq_lens_q": cu_seqlens[0]}
        hidden = body(input_ids=input_ids, use_cache=False, **packed).last_hidden_state
        targets = functional.pad(input_ids[:, 1:], (0, 1), value=IGNORED)
        if cu_seqlens is not None:
            targets[0, cu_seqlens[0, 1:] - 1] = IGNORED
        return {"loss": mean_nll(self.model, hidden.flatten(0, 1), targets.flatten(), self.chunk_tokens)}


def mean_nll(model: Any, hidden: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
    """Return the mean cross-entropy over the positions that have a target, a float32 scalar.

    Args:
        hidden: [positions, hidden_size], what the head reads.
        targets: int64[positions]; `IGNORED` where none is scored.
    """
    # Split, not sliced: the gradients of slices would each be as large as the whole.
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, target in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        total = total + checkpoint(
            _summed_nll, model, part, target, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
        )
    return total / (targets != IGNORED).sum()


def _summed_nll(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(head_logits(model, hidden), targets, ignore_index=IGNORED, reduction="sum")
