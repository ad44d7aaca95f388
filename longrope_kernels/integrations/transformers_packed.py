"""The attention of an enabled model over sequences packed into one row: `model(input_ids, cu_seq_lens_q=...)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import refuse
from ..functional import attention_varlen
from .transformers_attention import LayerRope, Layout


def attend_packed(
    layer: LayerRope, layout: Layout, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, **scores: Any
) -> Tensor:
    """Attend within each of the sequences that lie one behind the other in a row.

    Args:
        layout: of the row, which must say that positions are its indices and none of it is padding.
        query, key, value: [1, heads, tokens, head_dim], unrotated.
        cu_seqlens: int[sequences + 1] or [1, sequences + 1], cumulative lengths from 0 to all tokens.
        scores: scale, window and softcap of `attention_varlen`.

    Returns:
        Like query. Each sequence has positions from 0 and, unless one is pinned, the regime of its own length.

    Raises:
        ValueError: more than a row, positions, padding, or a cache; the line names it.
    """
    tokens = query.shape[2]
    if query.shape[0] != 1:
        refuse("cu_seq_lens_q", f"{query.shape[0]} rows", "input_ids of one row")
    if layout.query_positions is not None:
        refuse("position_ids", "positions", "None beside cu_seq_lens_q: every packed sequence counts from 0")
    if key.shape[2] != tokens or not bool((layout.key_length == tokens) & (layout.query_start == 0)):
        refuse("attention_mask", "padding or a cache", "neither beside cu_seq_lens_q")
    bounds = cu_seqlens.flatten()
    regime_index = None
    if layer.regime is not None:
        regime_index = layer.rope.select_index(torch.full_like(bounds[1:], layer.regime))
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    out = attention_varlen(q, k, v, bounds, scaling=layer.rope, regime_index=regime_index, **scores)
    assert isinstance(out, Tensor)
    return out.transpose(0, 1).unsqueeze(0)
