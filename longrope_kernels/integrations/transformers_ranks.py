"""The attention of an enabled model whose sequences are spread over ranks: `enable(model, rope, group=...)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..distributed import ring_attention
from ..errors import refuse
from .transformers_attention import LayerRope, Layout


def attend_over_ranks(
    layer: LayerRope, layout: Layout, query: Tensor, key: Tensor, value: Tensor, **scores: Any
) -> Tensor:
    """Attend from this rank's tokens to those of all ranks of the layer's group.

    Args:
        layout: of this rank's tokens alone, as transformers knows no others; must say that none of them is padding.
        query, key, value: [batch, heads, tokens, head_dim], unrotated.
        scores: scale, window and softcap of `ring_attention`.

    Returns:
        Like query.

    Raises:
        ValueError: positions, padding or a cache; the line names it.
    """
    if layout.query_positions is not None:
        refuse("position_ids", "positions", "None: those of longrope_kernels.distributed.positions are used")
    tokens = query.shape[2]
    if key.shape[2] != tokens or not bool(((layout.key_length == tokens) & (layout.query_start == 0)).all()):
        refuse("attention_mask", "padding or a cache", "whole sequences, without either, where ranks share them")
    regime_index = None
    if layer.regime is not None:
        regime_index = layer.rope.select_index(torch.full_like(layout.lengths, layer.regime))
    out = ring_attention(query, key, value, layer.rope, group=layer.group, regime_index=regime_index, **scores)
    assert isinstance(out, Tensor)
    return out
