"""Packed batches and caches in terms of plain attention: the definition, and what the reference backend runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ..bundles import KEY_GROUP, LARGEST, Geometry, Packing, Pages, Rotation, lse_dtype

Attention = Callable[[Tensor, Tensor, Tensor, Rotation, Geometry], tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def _sequence(
    b: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Rotation,
    geometry: Geometry,
    packing: Packing,
) -> tuple[slice, slice, Tensor, Tensor, Tensor, Rotation, Geometry]:
    """Return sequence b of a packed batch as a batch of one, [1, heads, tokens, head_dim]."""
    rows = slice(int(packing.query_bounds[b]), int(packing.query_bounds[b + 1]))
    slots = slice(int(packing.key_bounds[b]), int(packing.key_bounds[b + 1]))
    own = dataclasses.replace(rotation, regime_index=rotation.regime_index[b : b + 1])
    positions = [
        None if x is None else x[:, part]
        for x, part in ((geometry.query_positions, rows), (geometry.key_positions, slots))
    ]
    own_geometry = dataclasses.replace(geometry, query_positions=positions[0], key_positions=positions[1])
    q, k, v = (x[part].transpose(0, 1).unsqueeze(0) for x, part in ((query, rows), (key, slots), (value, slots)))
    return rows, slots, q, k, v, own, own_geometry


def attention_varlen(
    attention: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Rotation,
    geometry: Geometry,
    packing: Packing,
) -> tuple[Tensor, Tensor]:
    """Attend sequence by sequence: out like query [Tq, Hq, D], lse [Hq, Tq]."""
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.zeros(query.shape[1], query.shape[0], dtype=lse_dtype(query), device=query.device)
    for b in range(packing.batch):
        rows, _, q, k, v, own, own_geometry = _sequence(b, query, key, value, rotation, geometry, packing)
        one, one_lse = attention(q, k, v, own, own_geometry)
        out[rows], lse[:, rows] = one[0].transpose(0, 1), one_lse[0]
    return out, lse


def attention_varlen_backward(
    backward: Backward,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    rotation: Rotation,
    geometry: Geometry,
    packing: Packing,
    want_inv_freq: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients sequence by sequence."""
    grads = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    d_inv_freq = torch.zeros_like(rotation.inv_freq)
    for b in range(packing.batch):
        rows, slots, q, k, v, own, own_geometry = _sequence(b, query, key, value, rotation, geometry, packing)
        d_q, d_k, d_v, d_f = backward(
            grad_out[rows].transpose(0, 1).unsqueeze(0),
            None if grad_lse is None else grad_lse[:, rows].unsqueeze(0),
            q,
            k,
            v,
            out[rows].transpose(0, 1).unsqueeze(0),
            lse[:, rows].unsqueeze(0),
            own,
            own_geometry,
            want_inv_freq,
        )
        for grad, part, one in zip(grads, (rows, slots, slots), (d_q, d_k, d_v), strict=True):
            grad[part] = one[0].transpose(0, 1)
        d_inv_freq += d_f
    return grads[0], grads[1], grads[2], d_inv_freq


def gathered(pages: Pages, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the cache's keys and values as [batch, key_heads, longest sequence, head_dim] of `dtype`, dequantised."""
    longest = int(pages.length.max()) if pages.length.numel() else 0
    index = torch.arange(longest, device=pages.length.device)
    page = pages.block_table.long()[:, index // pages.page_tokens]  # [B, T]
    slot = (index % pages.page_tokens).expand_as(page)
    page = torch.where(index < pages.length.unsqueeze(1), page, 0)
    key, value = (_at(x, page, slot).transpose(1, 2).to(dtype) for x in (pages.key, pages.value))
    if pages.key_scale is None:
        return key, value
    assert pages.value_scale is not None
    assert pages.key_tail is not None
    value = value * pages.value_scale[page, :, slot].transpose(1, 2).unsqueeze(-1)
    key = key * pages.key_scale[page, :, slot // KEY_GROUP].transpose(1, 2)
    waiting = index >= (pages.length // KEY_GROUP * KEY_GROUP).unsqueeze(1)  # keys of the group that is not whole
    tail = pages.key_tail[:, :, index % KEY_GROUP].to(key.dtype)
    return torch.where(waiting[:, None, :, None], tail, key).to(dtype), value.to(dtype)


def _at(pages: Tensor, page: Tensor, slot: Tensor) -> Tensor:
    """Return pages[page, :, slot]. Up to torch 2.9 at least, fp8 is not indexed on the CPU: its bytes are."""
    stored = pages.view(torch.uint8) if pages.dtype == torch.float8_e4m3fn else pages
    return stored[page, :, slot].view(pages.dtype)


def attention_paged(
    attention: Attention, query: Tensor, pages: Pages, rotation: Rotation, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """Gather the pages, dequantise in float64, and attend."""
    key, value = gathered(pages, torch.float64)
    start = pages.length - query.shape[2] if geometry.query_start is None else geometry.query_start
    geometry = dataclasses.replace(geometry, key_length=pages.length, query_start=start)
    out, lse = attention(query.double(), key, value, rotation, geometry)
    return out.to(query.dtype), lse.to(lse_dtype(query))


def cache_append(key: Tensor, value: Tensor, pages: Pages, count: Tensor) -> None:
    """Write `count[b]` tokens of each sequence at its index `length[b]` and on."""
    for b in range(key.shape[0]):
        for t in range(int(count[b])):
            index = int(pages.length[b]) + t
            page, slot = int(pages.block_table[b, index // pages.page_tokens]), index % pages.page_tokens
            if pages.key_scale is None:
                pages.key[page, :, slot], pages.value[page, :, slot] = key[b, :, t], value[b, :, t]
                continue
            assert pages.value_scale is not None
            assert pages.key_tail is not None
            pages.value[page, :, slot], scale = _quantised(value[b, :, t].float(), -1, pages.value.dtype)
            pages.value_scale[page, :, slot] = scale[..., 0]
            pages.key_tail[b, :, index % KEY_GROUP] = key[b, :, t]
            if index % KEY_GROUP == KEY_GROUP - 1:
                first = slot - KEY_GROUP + 1
                rounded, scale = _quantised(pages.key_tail[b].float(), 1, pages.key.dtype)
                pages.key[page, :, first : slot + 1] = rounded
                pages.key_scale[page, :, first // KEY_GROUP] = scale[:, 0]


def _quantised(x: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x in a format of `LARGEST` and the scale along `dim`: NaN where x is not finite, beside zeros.

    Both formats round to the nearest, halves to even. Where the inverse of a scale is no number, all are 0.
    """
    largest = LARGEST[dtype]
    scale = x.abs().amax(dim, keepdim=True) / largest
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    scaled = (x * (1 / scale).nan_to_num(0.0, posinf=0.0)).nan_to_num(0.0).clamp(-largest, largest)
    return (scaled if dtype.is_floating_point else scaled.round()).to(dtype), scale
