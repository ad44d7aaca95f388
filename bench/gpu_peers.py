"""What a user of a GPU runs without us. Each peer gets cos and sin as ready tables, and its time includes RoPE."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import longrope_kernels as lk

Call = Callable[[], Any]


def tables(scaling: lk.RopeScaling, tokens: int, like: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """cos and sin of NeoX pairs, [tokens, head_dim] in the dtype of `like`, as model libraries keep them."""
    at = torch.arange(first, first + tokens, dtype=torch.float64)
    angle = torch.outer(at, torch.as_tensor(scaling.inv_freq).double().cpu())
    both = torch.cat((angle, angle), 1)
    return both.cos().to(like), both.sin().to(like)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, H, T, D] as transformers does."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def sdpa(backend: str, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, causal: bool) -> Call:
    """torch's scaled_dot_product_attention with one of its backends: FLASH_ATTENTION, CUDNN_ATTENTION, MATH."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rope = rotated if not query.is_cuda else torch.compile(rotated)
    last = (cos[-query.shape[2] :], sin[-query.shape[2] :])

    def run() -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return functional.scaled_dot_product_attention(
                rope(query, *last), rope(key, cos, sin), value, is_causal=causal, enable_gqa=True
            )

    return run


def flex(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Call:
    """FlexAttention, causal, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = query.shape[2]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device=str(query.device))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Any:
        turned = rotated(query, cos, sin), rotated(key, cos, sin)
        return flex_attention(*turned, value, block_mask=mask, enable_gqa=True)

    if not query.is_cuda:
        return lambda: attend(query, key, value)
    compiled = torch.compile(attend)

    def run() -> Any:
        # A backward that is timed again and again needs what a compiled one would give away at the first.
        with torch._functorch.config.patch(donated_buffer=False):
            return compiled(query, key, value)

    return run


def flash_attention_4(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Call:
    """flash-attn-4, whose layout is [B, T, H, D]."""
    attend = importlib.import_module("flash_attn.cute").flash_attn_func
    rope = torch.compile(rotated)

    def run() -> Tensor:
        turned = (rope(query, cos, sin), rope(key, cos, sin), value)
        result = attend(*(x.transpose(1, 2) for x in turned), causal=True)
        return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)

    return run


def liger_rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Call:
    """Liger's rotation, in place in its operands, which therefore are copies of its own."""
    rope = importlib.import_module("liger_kernel.ops.rope").LigerRopeFunction
    q, k, c, s = query.clone(), key.clone(), cos.unsqueeze(0), sin.unsqueeze(0)
    return lambda: rope.apply(q, k, c, s)


def flashinfer_decode(query: Tensor, key: Tensor, value: Tensor, scaling: lk.RopeScaling) -> Call:
    """flashinfer's decode that rotates inside, which knows plain RoPE alone: other angles, the same work."""
    attend = importlib.import_module("flashinfer").single_decode_with_kv_cache
    q, k, v = query[0, :, 0], key[0].transpose(0, 1).contiguous(), value[0].transpose(0, 1).contiguous()
    theta = scaling.theta or 1e4
    return lambda: attend(q, k, v, pos_encoding_mode="ROPE_LLAMA", rope_theta=theta)
