"""What a user runs without us: torch's SDPA behind transformers' own rotary embedding, eager and compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import longrope_kernels as lk

THETA, ORIGINAL_TOKENS, FACTOR = 1e5, 8192, 8.0


class Transformers:
    """transformers' Llama around the attention: cos and sin from LlamaRotaryEmbedding, then apply_rotary_pos_emb.

    The embedding is YaRN, so that frequencies are non-uniform and an attention factor applies, on both sides.
    """

    def __init__(self, heads: int, key_heads: int, head_dim: int) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

        config = LlamaConfig(
            hidden_size=heads * head_dim,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            head_dim=head_dim,
            max_position_embeddings=int(ORIGINAL_TOKENS * FACTOR),
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": THETA,
                "factor": FACTOR,
                "original_max_position_embeddings": ORIGINAL_TOKENS,
            },
        )
        self.embedding = LlamaRotaryEmbedding(config)
        self.apply = apply_rotary_pos_emb
        self.scaling: lk.RopeScaling = lk.LongRope.from_config(config).scalings[-1]

    def rope(self, query: Tensor, key: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate as transformers' Llama does, tables included."""
        cos, sin = self.embedding(query, positions)
        return self.apply(query, key, cos, sin)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        """Rotate and attend over a whole sequence."""
        query, key = self.rope(query, key, positions)
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def decode(self, query: Tensor, rotated_key: Tensor, value: Tensor, position: Tensor) -> Tensor:
        """Rotate one query and attend over a cache of rotated keys, as transformers' SDPA path calls torch."""
        query, _ = self.rope(query, query, position)
        return functional.scaled_dot_product_attention(query, rotated_key, value, enable_gqa=True)

    def decode_packed(self, query: Tensor, rotated_key: Tensor, value: Tensor, position: Tensor) -> Tensor:
        """The same with the heads of a group as queries of one head: less work for torch, if one knows."""
        query, _ = self.rope(query, query, position)
        batch, heads, _, head_dim = query.shape
        key_heads = rotated_key.shape[1]
        packed = query.reshape(batch, key_heads, heads // key_heads, head_dim)
        return functional.scaled_dot_product_attention(packed, rotated_key, value).reshape(query.shape)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return torch.compile of a function, for one shape; the first call compiles."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def compile_failure(call: Callable[[], Any]) -> str | None:
    """Run a compiled call once: None, or in one line why it cannot run here (no C++ compiler, for one)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except Exception as error:  # inductor wraps whatever its compiler says
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}" if str(error).strip() else "failed"
    return None
