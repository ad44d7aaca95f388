"""What users call: checks every argument, fills in defaults, and hands over to the ops."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import checks, ops, ops_packed
from .bundles import Geometry, Pages, Rotation
from .errors import refuse
from .rope import LongRope, RopeScaling


def apply_rope(
    query: Tensor,
    key: Tensor | None,
    scaling: RopeScaling | LongRope | None = None,
    positions: Tensor | None = None,
    *,
    key_positions: Tensor | None = None,
    regime_index: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rotate queries and keys by exact angles: `position * frequency` is reduced modulo a turn in 64-bit integers.

    Args:
        query: [batch, query_heads, query_tokens, head_dim], float32, float16 or bfloat16; any strides, the last 1.
        key: [batch, key_heads, key_tokens, head_dim], or None to rotate the query alone.
        scaling: one regime, or a ladder of which each sequence gets the regime of its length (largest position + 1).
        positions: integers in [0, 2**31), [query_tokens] or [batch, query_tokens]. None: 0, 1, ... for the keys, and
            for the queries the last of those (0, 1, ... where key is None).
        key_positions: positions of the keys; None: those of the queries, where both have as many tokens.
        regime_index: int[batch], the regime of each sequence, instead of its length's. Only with a LongRope.
        cos, sin: tables instead of `scaling`, for parity with weights tuned under other angles: [tokens, P] or
            [batch, tokens, P], P = rotary_dim / 2, used as they are in float32; query and key share them.
        interleaved: layout of the pairs for `cos` and `sin`; a scaling has its own.
        backend: "cpu", "reference", or None for the fastest that can.

    Returns:
        The rotated query and key (None where key is), in their dtypes. Differentiable, also in rescale factors.

    Raises:
        ValueError, TypeError: one line that names the argument.
        BackendUnavailableError: the forced backend cannot run here.

    Examples:
        >>> scaling = RopeScaling(head_dim=64, theta=1e4)
        >>> q, k = apply_rope(torch.randn(1, 8, 5, 64), torch.randn(1, 2, 5, 64), scaling)

    Reference: RoFormer, arXiv 2104.09864; LongRoPE, arXiv 2402.13753.
    """
    checks.operand("query", query)
    if key is not None:
        checks.operand("key", key, query)
    if cos is not None or sin is not None:
        if scaling is not None or positions is not None:
            refuse("cos", "tables beside a scaling or positions", "either cos and sin, or scaling and positions")
        return _apply_tables(query, key, cos, sin, interleaved)
    checks.no_tangents(query=query, key=key)
    if not isinstance(scaling, (RopeScaling, LongRope)):
        refuse("scaling", type(scaling).__name__, "a RopeScaling, a LongRope, or cos and sin tables", TypeError)
    if key is None:
        key = query[:, :0]
    rotation, query_at, key_at = _rotary_arguments(query, key, scaling, positions, key_positions, regime_index)
    rotated, rotated_key = ops.apply_rope(
        query, key, *_tables(rotation), query_at, key_at, rotation.interleaved, False, checks.backend(backend)
    )
    return rotated, rotated_key if key.shape[1] else None


def apply_rope_in_place(
    query: Tensor,
    key: Tensor | None,
    scaling: RopeScaling | LongRope,
    positions: Tensor | None = None,
    *,
    key_positions: Tensor | None = None,
    regime_index: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """`apply_rope` over its operands, to the same bits: no memory for a second copy, for inference.

    Args:
        query, key: as in `apply_rope`; each element has memory of its own, so expanded tensors are refused, but both
            may be views of one tensor, as of a projection to queries, keys and values.
        scaling, positions, key_positions, regime_index, backend: as in `apply_rope`.

    Raises:
        ValueError, TypeError: one line that names the argument; nothing is written. A query, a key or rescale factors
            that require a gradient are refused unless under `torch.no_grad()`: there is none through this.
        BackendUnavailableError: the forced backend cannot run here.

    Examples:
        >>> qkv = torch.randn(1, 5, 12, 64)  # [batch, tokens, heads, head_dim]
        >>> q, k, v = qkv.transpose(1, 2).split((8, 2, 2), dim=1)
        >>> apply_rope_in_place(q, k, RopeScaling(head_dim=64, theta=1e4))
    """
    checks.operand("query", query)
    if key is not None:
        checks.operand("key", key, query)
    checks.no_tangents(query=query, key=key)
    if not isinstance(scaling, (RopeScaling, LongRope)):
        refuse("scaling", type(scaling).__name__, "a RopeScaling or a LongRope", TypeError)
    if key is None:
        key = query.new_empty((query.shape[0], 0, *query.shape[2:]))
    rotation, query_at, key_at = _rotary_arguments(query, key, scaling, positions, key_positions, regime_index)
    checks.no_gradient(query=query, key=key, rescale_factors=rotation.inv_freq)
    ops.apply_rope_in_place(
        query, key, *_tables(rotation), query_at, key_at, rotation.interleaved, False, checks.backend(backend)
    )


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: RopeScaling | LongRope | None = ...,
    *,
    is_causal: bool = ...,
    scale: float | None = ...,
    window: int | tuple[int, int] | None = ...,
    softcap: float | None = ...,
    query_positions: Tensor | None = ...,
    key_positions: Tensor | None = ...,
    key_start: Tensor | None = ...,
    key_length: Tensor | None = ...,
    query_start: Tensor | None = ...,
    regime_index: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: RopeScaling | LongRope | None = ...,
    *,
    is_causal: bool = ...,
    scale: float | None = ...,
    window: int | tuple[int, int] | None = ...,
    softcap: float | None = ...,
    query_positions: Tensor | None = ...,
    key_positions: Tensor | None = ...,
    key_start: Tensor | None = ...,
    key_length: Tensor | None = ...,
    query_start: Tensor | None = ...,
    regime_index: Tensor | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: RopeScaling | LongRope | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    key_start: Tensor | None = None,
    key_length: Tensor | None = None,
    query_start: Tensor | None = None,
    regime_index: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with rotation fused in: queries and keys come unrotated, and so can be cached unrotated.

    Sequence b is the key slots [key_start, key_start + key_length); a token's index counts from key_start. Masks go by
    index, rotation by position, and positions default to the index.

    Args:
        query: [batch, query_heads, query_tokens, head_dim], float32, float16 or bfloat16; any strides, the last 1.
        key, value: [batch, key_heads, key_tokens, head_dim]; key_heads divides query_heads (GQA, MQA).
        scaling: one regime for all; a LongRope, of which each sequence gets the regime of its own length; None: no
            rotation.
        is_causal: a query sees the keys up to its own index. Alignment is bottom-right: without `query_start` the last
            query is the last key.
        scale: of the scores, a normal float32 number > 0; None: head_dim ** -0.5.
        window: W: the query itself and the W - 1 keys before it; (left, right): that many keys on each side, -1 all.
        softcap: scores become softcap * tanh(score / softcap); a normal float32 number > 0.
        query_positions, key_positions: rotation positions, integers in [0, 2**31), [tokens] or [batch, tokens].
        key_start, key_length, query_start: int[batch]: first slot and number of keys of each sequence, and the index
            of its first query (below 0 for rows of padding in front). None: 0, the slots that are left, and
            key_length - query_tokens.
        regime_index: int[batch], the regime of each sequence, instead of its length's. Only with a LongRope.
        return_lse: return the log-sum-exp of the scores too.
        backend: "cpu", "reference", or None for the fastest that can.

    Returns:
        out, like query; with `return_lse` also lse, float32[batch, query_heads, query_tokens], natural logarithm.
        A query that sees no key gives out 0 and lse -inf. Differentiable in reverse mode, lse and rescale factors
        included.

    Raises:
        ValueError, TypeError: one line that names the argument, its value and what was expected.
        BackendUnavailableError: the forced backend cannot run here.

    Examples:
        >>> rope = LongRope.yarn(64, 1e5, 8192, 16384)
        >>> q, k, v = torch.randn(1, 9, 128, 64), torch.randn(1, 3, 128, 64), torch.randn(1, 3, 128, 64)
        >>> attention(q, k, v, rope).shape
        torch.Size([1, 9, 128, 64])

    Reference: FlashAttention-2, arXiv 2307.08691; LongRoPE, arXiv 2402.13753.
    """
    rotation, geometry = bundle(
        query,
        key,
        value,
        scaling,
        is_causal,
        scale,
        window,
        softcap,
        query_positions,
        key_positions,
        key_start,
        key_length,
        query_start,
        regime_index,
    )
    out, lse = ops.attention(
        query, key, value, *_tables(rotation), *_fields(geometry), rotation.interleaved, checks.backend(backend)
    )
    return (out, lse) if return_lse else out


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    scaling: RopeScaling | LongRope | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    regime_index: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of sequences packed one behind the other, without padding (the convention of flash-attention).

    Sequence b is the query rows [cu_seqlens_q[b], cu_seqlens_q[b + 1]) and the key rows of cu_seqlens_k. It sees itself
    alone, aligned at its last tokens, and gives the same bits as in any other batch.

    Args:
        query: [all query tokens, query_heads, head_dim], float32, float16 or bfloat16; any strides, the last 1.
        key, value: [all key tokens, key_heads, head_dim]; key_heads divides query_heads.
        cu_seqlens_q, cu_seqlens_k: int[batch + 1], cumulative lengths from 0 to all tokens. None for the keys: those of
            the queries.
        scaling: one regime for all; a LongRope, of which each sequence gets the regime of its own length; None.
        query_positions, key_positions: rotation positions, integers in [0, 2**31), one per packed token. None: the
            index in the sequence.
        regime_index: int[batch], the regime of each sequence, instead of its length's. Only with a LongRope.
        is_causal, scale, window, softcap, return_lse, backend: as in `attention`.

    Returns:
        out, like query; with `return_lse` also lse, float32[query_heads, all query tokens]. Differentiable as in
        `attention`.

    Raises:
        ValueError, TypeError: one line that names the argument, its value and what was expected.
        BackendUnavailableError: the forced backend cannot run here.

    Examples:
        >>> rope, bounds = LongRope.yarn(64, 1e5, 8192, 16384), torch.tensor([0, 100, 128])
        >>> q, k, v = torch.randn(128, 9, 64), torch.randn(128, 3, 64), torch.randn(128, 3, 64)
        >>> attention_varlen(q, k, v, bounds, scaling=rope).shape
        torch.Size([128, 9, 64])
    """
    layout = "[tokens, heads, head_dim]"
    checks.operand("query", query, layout=layout)
    checks.operand("key", key, query, layout)
    checks.operand("value", value, query, layout)
    checks.no_tangents(query=query, key=key, value=value)
    checks.heads(query, key)
    if value.shape != key.shape:
        refuse("value", f"shape {tuple(value.shape)}", f"that of key, {tuple(key.shape)}")
    _scaling(scaling)
    query_bounds = checks.bounds("cu_seqlens_q", cu_seqlens_q, query.device)
    key_bounds = query_bounds if cu_seqlens_k is None else checks.bounds("cu_seqlens_k", cu_seqlens_k, query.device)
    if key_bounds.shape != query_bounds.shape:
        refuse("cu_seqlens_k", f"{len(key_bounds) - 1} sequences", f"those of cu_seqlens_q, {len(query_bounds) - 1}")
    query_at = checks.positions("query_positions", query_positions, 1, query.shape[0], query.device)
    key_at = checks.positions("key_positions", key_positions, 1, key.shape[0], query.device)
    if isinstance(scaling, LongRope) and regime_index is None:
        lengths = key_bounds.diff() if key_at is None else _farthest(key_at[0], key_bounds)
        if query_at is not None:
            lengths = torch.maximum(lengths, _farthest(query_at[0], query_bounds))
        regime_index = scaling.select_index(lengths)
    rotation = _rotation(scaling, regime_index, query, len(query_bounds) - 1)
    out, lse = ops_packed.attention_varlen(
        query,
        key,
        value,
        *_tables(rotation),
        query_bounds,
        key_bounds,
        query_at,
        key_at,
        *_scores(query, is_causal, scale, window, softcap),
        rotation.interleaved,
        checks.backend(backend),
    )
    return (out, lse) if return_lse else out


def attention_paged(
    query: Tensor,
    pages: Pages,
    scaling: RopeScaling | LongRope | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    query_positions: Tensor | None = None,
    query_start: Tensor | None = None,
    regime_index: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over a cache of unrotated keys, for engines with pages of their own (`cache.KVCache` for the rest).

    One pass over the cache where queries are few (decoding, speculative decoding), blockwise where they are many
    (chunked prefill). Not differentiable.

    Args:
        query: [batch, query_heads, query_tokens, head_dim], the last tokens of each sequence, whose keys are in the
            cache already.
        pages: `longrope_kernels.Pages`: keys and values by page, block table, lengths; int8 or fp8 with their
            scales.
        query_positions: rotation positions, integers in [0, 2**31), [query_tokens] or [batch, query_tokens]. None: the
            index. Keys are rotated by their index.
        query_start: int[batch], index of the first query. None: pages.length - query_tokens.
        scaling, is_causal, scale, window, softcap, regime_index, return_lse, backend: as in `attention`; the length of
            a sequence is that of its cache.

    Returns:
        out, like query; with `return_lse` also lse, float32[batch, query_heads, query_tokens].

    Raises:
        ValueError, TypeError: one line that names the argument, its value and what was expected; no memory is touched.
    """
    checks.operand("query", query)
    checks.no_tangents(query=query)
    checks.pages(pages)
    batch = query.shape[0]
    if pages.block_table.shape[0] != batch:
        refuse("block_table", f"{pages.block_table.shape[0]} sequences", f"those of query, {batch}")
    if not pages.quantised:
        checks.same_kind("key_pages", pages.key, query)
        checks.same_kind("value_pages", pages.value, query)
    elif pages.key_tail is not None:
        checks.same_kind("key_tail", pages.key_tail, query)
    if pages.key.shape[-1] != query.shape[-1]:
        refuse("key_pages", f"head_dim {pages.key.shape[-1]}", f"that of query, {query.shape[-1]}")
    checks.heads(query, pages.key)
    _scaling(scaling)
    query_at = checks.positions("query_positions", query_positions, batch, query.shape[2], query.device)
    start = checks.per_sequence("query_start", query_start, batch, query.device)
    if isinstance(scaling, LongRope) and regime_index is None:
        lengths = pages.length if query_at is None else torch.maximum(pages.length, _span(query_at))
        regime_index = scaling.select_index(lengths)
    rotation = _rotation(scaling, regime_index, query)
    out, lse = ops_packed.attention_paged(
        query,
        *page_fields(pages),
        *_tables(rotation),
        query_at,
        start,
        *_scores(query, is_causal, scale, window, softcap),
        rotation.interleaved,
        checks.backend(backend),
    )
    return (out, lse) if return_lse else out


def cache_append(
    key: Tensor, value: Tensor, pages: Pages, count: Tensor | None = None, backend: str | None = None
) -> None:
    """Write new keys, unrotated, and values behind what a cache holds; `pages.length` is the caller's to advance.

    What the cache holds afterwards does not depend on how the appending was cut into calls.

    Args:
        key, value: [batch, key_heads, tokens, head_dim].
        count: int[batch], how many of the tokens to take, from the first; None: all.

    Raises:
        ValueError, TypeError: one line; nothing is written.
    """
    counts = append_counts(key, value, pages, count)
    ops_packed.cache_append(key, value, *page_fields(pages), counts, checks.backend(backend))


def append_counts(key: Tensor, value: Tensor, pages: Pages, count: Tensor | None = None) -> Tensor:
    """Check the arguments of `cache_append` and return how many tokens of each sequence it takes, int64[batch]."""
    checks.operand("key", key)
    checks.operand("value", value, key)
    checks.no_tangents(key=key, value=value)
    checks.pages(pages)
    if value.shape != key.shape:
        refuse("value", f"shape {tuple(value.shape)}", f"that of key, {tuple(key.shape)}")
    batch, heads, tokens, head_dim = key.shape
    if (heads, head_dim) != (pages.key.shape[1], pages.key.shape[3]):
        refuse(
            "key", f"{heads} heads of {head_dim}", f"those of the cache, {pages.key.shape[1]} of {pages.key.shape[3]}"
        )
    if pages.block_table.shape[0] != batch:
        refuse("key", f"batch {batch}", f"that of the cache, {pages.block_table.shape[0]}")
    kept = pages.key if pages.key_tail is None else pages.key_tail
    checks.same_kind("key", key, kept, "the cache")
    counts = checks.per_sequence("count", count, batch, key.device)
    return torch.full((batch,), tokens, device=key.device) if counts is None else counts


def bundle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: RopeScaling | LongRope | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    key_start: Tensor | None = None,
    key_length: Tensor | None = None,
    query_start: Tensor | None = None,
    regime_index: Tensor | None = None,
) -> tuple[Rotation, Geometry]:
    """Check the arguments of `attention` and return what it hands to a backend beside the operands."""
    checks.operand("query", query)
    checks.operand("key", key, query)
    checks.operand("value", value, query)
    checks.no_tangents(query=query, key=key, value=value)
    checks.heads(query, key)
    for dim, what in ((1, "heads"), (2, "tokens")):
        if value.shape[dim] != key.shape[dim]:
            refuse("value", f"{value.shape[dim]} {what}", f"those of key, {key.shape[dim]}")
    scores = _scores(query, is_causal, scale, window, softcap)
    _scaling(scaling)

    batch, _, query_tokens, _ = query.shape
    key_tokens, device = key.shape[2], query.device
    query_positions = checks.positions("query_positions", query_positions, batch, query_tokens, device)
    key_positions = checks.positions("key_positions", key_positions, batch, key_tokens, device)
    query_start = checks.per_sequence("query_start", query_start, batch, device)
    key_start = checks.per_sequence("key_start", key_start, batch, device)
    key_length = checks.per_sequence("key_length", key_length, batch, device)
    if isinstance(scaling, LongRope) and regime_index is None:
        if key_positions is not None:
            lengths = _span(key_positions)
        elif key_length is not None:
            lengths = key_length
        else:
            lengths = torch.full((batch,), key_tokens, device=device) - (0 if key_start is None else key_start)
        if query_positions is not None:
            lengths = torch.maximum(lengths, _span(query_positions))
        regime_index = scaling.select_index(lengths)
    geometry = Geometry(
        query_positions,
        key_positions,
        query_start,
        key_start,
        key_length,
        *scores,
    )
    return _rotation(scaling, regime_index, query), geometry


def _rotary_arguments(
    query: Tensor,
    key: Tensor,
    scaling: RopeScaling | LongRope,
    positions: Tensor | None,
    key_positions: Tensor | None,
    regime_index: Tensor | None,
) -> tuple[Rotation, Tensor, Tensor]:
    """Return the rotation and the positions of queries and keys, int64[batch, tokens], defaults filled in."""
    batch, _, query_tokens, _ = query.shape
    key_tokens = key.shape[2]
    if key_positions is None and positions is not None:
        if key_tokens != query_tokens:
            refuse("key_positions", None, f"positions of the {key_tokens} keys, as the query has {query_tokens} tokens")
        key_positions = positions
    query_at = checks.positions("positions", positions, batch, query_tokens, query.device)
    key_at = checks.positions("key_positions", key_positions, batch, key_tokens, query.device)
    if query_at is None:
        if query_tokens > key_tokens:
            refuse("positions", None, f"positions, as the query has {query_tokens} tokens and the key {key_tokens}")
        query_at = torch.arange(key_tokens - query_tokens, key_tokens, device=query.device).expand(batch, -1)
    if key_at is None:
        key_at = torch.arange(key_tokens, device=query.device).expand(batch, -1)
    if isinstance(scaling, LongRope) and regime_index is None:
        regime_index = scaling.select_index(torch.maximum(_span(query_at), _span(key_at)))
    return _rotation(scaling, regime_index, query), query_at, key_at


def _scaling(scaling: object) -> None:
    if scaling is not None and not isinstance(scaling, (RopeScaling, LongRope)):
        refuse("scaling", type(scaling).__name__, "a RopeScaling, a LongRope or None", TypeError)


def _scores(
    query: Tensor,
    is_causal: bool,
    scale: float | None,
    window: int | tuple[int, int] | None,
    softcap: float | None,
) -> tuple[float, bool, int, int, float]:
    """Check how scores are formed and masked; return the last five fields of a `Geometry`."""
    checks.positive_or_none("scale", scale)
    checks.positive_or_none("softcap", softcap)
    left, right = checks.window(window)
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return factor, checks.flag("is_causal", is_causal), left, right, 0.0 if softcap is None else float(softcap)


def _rotation(
    scaling: RopeScaling | LongRope | None, regime_index: Tensor | None, query: Tensor, batch: int | None = None
) -> Rotation:
    device = query.device
    batch = query.shape[0] if batch is None else batch
    index = checks.per_sequence("regime_index", regime_index, batch, device, torch.int32)
    if index is not None and not isinstance(scaling, LongRope):
        refuse("regime_index", "a tensor", f"None with a scaling of type {type(scaling).__name__}")
    if index is None:
        index = torch.zeros(batch, dtype=torch.int32, device=device)
    if scaling is None:
        none = torch.zeros(1, 0, dtype=torch.int64, device=device)
        start = torch.zeros(1, dtype=torch.int64, device=device)
        return Rotation(none, none, none.double(), start, torch.ones(1, device=device), index, False)
    if scaling.head_dim != query.shape[-1]:
        refuse("scaling", f"head_dim {scaling.head_dim}", f"that of query, {query.shape[-1]}")
    return scaling.rotation(index)


def _tables(rotation: Rotation) -> tuple[Tensor, ...]:
    return (
        rotation.turns,
        rotation.base_turns,
        rotation.inv_freq,
        rotation.start_tokens,
        rotation.attention_factor,
        rotation.regime_index,
    )


def _fields(geometry: Geometry) -> tuple[Any, ...]:
    return (
        geometry.query_positions,
        geometry.key_positions,
        geometry.query_start,
        geometry.key_start,
        geometry.key_length,
        geometry.scale,
        geometry.is_causal,
        geometry.window_left,
        geometry.window_right,
        geometry.softcap,
    )


def page_fields(pages: Pages) -> tuple[Any, ...]:
    """Return a cache as the ops take it."""
    scales = (pages.key_scale, pages.value_scale, pages.key_tail)
    return pages.key, pages.value, pages.block_table, pages.length, *scales


def _farthest(positions: Tensor, bounds: Tensor) -> Tensor:
    """Tokens from position 0 to the largest of each packed sequence, int64[batch]."""
    index = torch.arange(positions.shape[0], device=positions.device)
    sequence = torch.searchsorted(bounds[1:].contiguous(), index, right=True)
    spans = torch.zeros(bounds.shape[0] - 1, dtype=torch.int64, device=positions.device)
    return spans.scatter_reduce(0, sequence.clamp(max=max(bounds.shape[0] - 2, 0)), positions + 1, "amax")


def _span(positions: Tensor) -> Tensor:
    """Tokens from position 0 to the largest, int64[batch]."""
    if positions.shape[1] == 0:
        return torch.zeros(positions.shape[0], dtype=torch.int64, device=positions.device)
    return positions.amax(1) + 1


def _apply_tables(
    query: Tensor, key: Tensor | None, cos: Tensor | None, sin: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor | None]:
    if cos is None or sin is None:
        refuse("sin" if sin is None else "cos", None, "both tables, cos and sin")
    for name, table in (("cos", cos), ("sin", sin)):
        if not isinstance(table, Tensor):
            refuse(name, type(table).__name__, "a tensor", TypeError)
        checks.dense(name, table)
    tokens, pairs = query.shape[2], cos.shape[-1] if cos.dim() else 0
    shapes = ((tokens, pairs), (query.shape[0], tokens, pairs))
    for name, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape) not in shapes or not 0 < 2 * pairs <= query.shape[-1]:
            refuse(name, f"shape {tuple(table.shape)}", f"[{tokens}, P] or [batch, {tokens}, P], 2 P <= head_dim")
    if key is not None and key.shape[2] != tokens:
        refuse("key", f"{key.shape[2]} tokens", f"those of query, {tokens}, as both share the tables")
    cos, sin = (table.float().unsqueeze(-3) for table in (cos, sin))

    def one(x: Tensor) -> Tensor:
        rotary, rest = x[..., : 2 * pairs].float(), x[..., 2 * pairs :]
        a, b = (rotary[..., 0::2], rotary[..., 1::2]) if interleaved else rotary.split(pairs, dim=-1)
        turned = (a * cos - b * sin, b * cos + a * sin)
        rotary = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
        return torch.cat((rotary.to(x.dtype), rest), dim=-1)

    return one(query), None if key is None else one(key)
