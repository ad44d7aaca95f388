"""From the arguments of an op to the launches that compute it. Nothing runs here, and a meta tensor will do."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...bundles import Geometry, Rotation
from . import configs
from .backward import backward_key_kernel, backward_query_kernel, delta_kernel
from .configs import Config, pad, width
from .decode import combine_kernel, decode_kernel
from .forward import forward_kernel
from .launch import Launch
from .rope import rotate_kernel

_LOG2_E = math.log2(math.e)
_UNBOUNDED = 2**31 - 1


def tables(rotation: Rotation) -> dict[str, Tensor]:
    """Return the rotation's tables by parameter name."""
    return {
        name: getattr(rotation, name).contiguous()
        for name in ("turns", "base_turns", "start_tokens", "attention_factor", "regime_index")
    }


def head_constants(query: Tensor, rotation: Rotation) -> dict[str, Any]:
    """Return the compile-time constants that say how a head is cut into pieces."""
    head_dim, pairs = query.shape[-1], rotation.turns.shape[-1]
    return {
        "HEAD_DIM": head_dim,
        "PAIRS": pairs,
        "PAIR_BLOCK": pad(pairs),
        "REST_BLOCK": pad(head_dim - 2 * pairs),
    }


def strides(name: str, x: Tensor) -> dict[str, int]:
    """Return the strides of a [B, H, T, D] operand, in elements."""
    return dict(zip((f"{name}_batch_stride", f"{name}_head_stride", f"{name}_token_stride"), x.stride(), strict=False))


def rotate(
    x: Tensor,
    rotation: Rotation,
    positions: Tensor | None,
    first_index: Tensor | None,
    conjugate: bool,
    target: str,
    scratch: bool = False,
) -> tuple[Tensor, Launch]:
    """Rotate x [B, H, T, D] at int64[B, T] positions, or from int64[B] `first_index` on.

    Returns:
        The result, like x or in the scratch layout [B, H, T, width], and the launch that fills it.
    """
    batch, heads, tokens, head_dim = x.shape
    pairs = rotation.turns.shape[-1]
    row = width(head_dim, pairs)
    out = x.new_empty((batch, heads, tokens, row if scratch else head_dim))
    config = configs.rotate(target, row)
    token_blocks = -(-tokens // config.rows)
    # All heads in one program share its angles; with few tokens, heads are what there is to spread over a GPU.
    in_program = heads if batch * token_blocks >= 256 else min(heads, 4)
    positions = _unit_last(positions)
    other = first_index if first_index is not None else rotation.start_tokens
    arguments = {
        "x": x,
        "out": out,
        **tables(rotation),
        "positions": positions if positions is not None else other,
        "first_index": other,
        **strides("x", x),
        **strides("out", out),
        "positions_batch_stride": positions.stride(0) if positions is not None else 0,
        "heads": heads,
        "tokens": tokens,
        "token_blocks": token_blocks,
        "heads_in_program": in_program,
        **head_constants(x, rotation),
        "INTERLEAVED": rotation.interleaved,
        "CONJUGATE": conjugate,
        "HAS_POSITIONS": positions is not None,
        "TO_SCRATCH": scratch,
        "BLOCK": config.rows,
    }
    grid = (batch * token_blocks, -(-heads // in_program) if heads else 0)
    return out, Launch(rotate_kernel, grid, arguments, config)


def attention(
    query: Tensor, key: Tensor, value: Tensor, rotation: Rotation, geometry: Geometry, target: str
) -> tuple[Tensor, Tensor, list[Launch]]:
    """Return out, lse and the launches that fill them."""
    batch, query_heads, query_tokens, head_dim = query.shape
    key_heads, key_tokens = key.shape[1], key.shape[2]
    pairs = rotation.turns.shape[-1]
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse, []
    group = query_heads // key_heads
    rows = query_tokens * group
    row_width = max(width(head_dim, pairs), pad(head_dim))
    launches = []
    if configs.splits_keys(rows):
        shares = configs.shares_rotations(query_tokens, group, geometry.key_positions is not None)
        if shares:
            config = configs.decode(target, row_width, query.element_size())
        else:
            config = configs.forward_split(target, row_width, query.element_size(), rows)
        splits = max(1, -(-key_tokens // configs.SPLIT_KEYS))
        partial = query.new_empty((batch, key_heads, splits, rows, head_dim), dtype=torch.float32)
        partial_lse = query.new_empty((batch, key_heads, splits, rows), dtype=torch.float32)
        arguments = _attention_arguments(query, key, value, rotation, geometry, config)
        row_blocks = arguments["row_blocks"]
        grid = (batch * key_heads * row_blocks, splits)
        arguments |= {"splits": splits, "SPLIT": configs.SPLIT_KEYS}
        if shares:
            for name in ("key_positions", "key_positions_stride", "HAS_KEY_POSITIONS"):
                del arguments[name]
            for name in ("query_token_stride", "query_tokens", "row_blocks"):
                del arguments[name]
            arguments |= {"partial": partial, "partial_lse": partial_lse}
            launches.append(Launch(decode_kernel, grid, arguments, config))
        else:
            arguments |= {"out": partial, "lse": partial_lse, **strides("out", partial), "ROTATE_KEY": True}
            launches.append(Launch(forward_kernel, grid, arguments, config))
        merge = {
            "partial": partial,
            "partial_lse": partial_lse,
            "out": out,
            "lse": lse,
            **strides("out", out),
            "key_heads": key_heads,
            "group": group,
            "query_tokens": query_tokens,
            "splits": splits,
            "HEAD_DIM": head_dim,
            "VALUE_BLOCK": pad(head_dim),
            "BLOCK_SPLITS": 16,
        }
        launches.append(Launch(combine_kernel, (batch * key_heads * rows,), merge, Config(1, 16, 4, 1)))
        return out, lse, launches

    in_tile = configs.rotates_in_tile(rows) or pairs == 0
    plain = geometry.softcap == 0.0 and (pairs == 0 or not in_tile)
    config = configs.forward(target, row_width, query.element_size(), plain)
    if not in_tile:
        _, key_start, _ = geometry.resolved(batch, query_tokens, key_tokens, query.device)
        key, launch = rotate(key, rotation, geometry.key_positions, -key_start, False, target, scratch=True)
        launches.append(launch)
    arguments = _attention_arguments(query, key, value, rotation, geometry, config)
    arguments |= {"out": out, "lse": lse, **strides("out", out), "splits": 1, "SPLIT": 0, "ROTATE_KEY": in_tile}
    arguments["HAS_KEY_POSITIONS"] = arguments["HAS_KEY_POSITIONS"] and in_tile
    programs = batch * key_heads * arguments["row_blocks"]
    launches.append(Launch(forward_kernel, (programs,), arguments, config))
    return out, lse, launches


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    rotation: Rotation,
    geometry: Geometry,
    want_inv_freq: bool,
    target: str,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor], list[Launch]]:
    """Return (dq, dk, dv), partial sums of d inv_freq (fp64 [B, n, P], empty unless wanted), and the launches."""
    batch, query_heads, query_tokens, head_dim = query.shape
    key_heads, key_tokens = key.shape[1], key.shape[2]
    pairs = rotation.turns.shape[-1]
    grad_query = query.new_empty(query.shape)
    # Slots outside every sequence belong to no program.
    padded = geometry.key_start is not None or geometry.key_length is not None
    new = torch.zeros if padded or grad_query.numel() == 0 else torch.empty
    grad_key, grad_value = (new(x.shape, dtype=x.dtype, device=x.device) for x in (key, value))
    gradients = (grad_query, grad_key, grad_value)
    if grad_query.numel() == 0 or key.numel() == 0:
        return (grad_query.zero_(), grad_key, grad_value), [], []

    row_width = max(width(head_dim, pairs), pad(head_dim))
    grad_out = grad_out if grad_out.stride(-1) == 1 or head_dim == 1 else grad_out.contiguous()
    delta = query.new_empty(query.shape[:-1], dtype=torch.float32)
    config = configs.delta(target)
    token_blocks = -(-query_tokens // config.rows)
    arguments: dict[str, Any] = {
        "out": out,
        "grad_out": grad_out,
        "lse": lse.contiguous(),
        "grad_lse": delta if grad_lse is None else grad_lse.float().contiguous(),
        "delta": delta,
        **strides("out", out),
        **strides("grad_out", grad_out),
        "query_heads": query_heads,
        "query_tokens": query_tokens,
        "token_blocks": token_blocks,
        "HEAD_DIM": head_dim,
        "VALUE_BLOCK": pad(head_dim),
        "HAS_GRAD_LSE": grad_lse is not None,
        "BLOCK_ROWS": config.rows,
    }
    launches = [Launch(delta_kernel, (batch * query_heads * token_blocks,), arguments, config)]

    rotated_query, rotated_key = query, key
    if pairs:
        query_start, key_start, _ = geometry.resolved(batch, query_tokens, key_tokens, query.device)
        for x, positions, first in (
            (query, geometry.query_positions, query_start),
            (key, geometry.key_positions, -key_start),
        ):
            rotated, launch = rotate(x, rotation, positions, first, False, target, scratch=True)
            launches.append(launch)
            rotated_query, rotated_key = (rotated, rotated_key) if x is query else (rotated_query, rotated)
    elif pad(head_dim) != head_dim:
        # Kernels read padded rows without a mask.
        fill = (0, pad(head_dim) - head_dim)
        rotated_query, rotated_key = (torch.nn.functional.pad(x, fill) for x in (query, key))

    shared: dict[str, Any] = {
        "grad_out": grad_out,
        "lse": lse.contiguous(),
        "delta": delta,
        **strides("grad_out", grad_out),
    }
    shared |= {"scale": geometry.scale, "WANT_TURNS": want_inv_freq and pairs > 0}
    partials: list[Tensor] = []

    def sums(blocks: int) -> Tensor:
        """Partial sums of one kernel, or a stand-in of the same type."""
        if not shared["WANT_TURNS"]:
            return rotation.inv_freq
        partials.append(query.new_empty((batch, key_heads * blocks, pairs), dtype=torch.float64))
        return partials[-1]

    config = configs.backward_query(target, row_width, query.element_size())
    arguments = _attention_arguments(rotated_query, rotated_key, value, rotation, geometry, config)
    row_blocks = arguments["row_blocks"]
    arguments |= shared | head_constants(query, rotation) | {"VALUE_BLOCK": pad(head_dim)}
    arguments |= {"grad_query": grad_query, **strides("grad_query", grad_query), "grad_turns": sums(row_blocks)}
    for name in ("key_positions", "key_positions_stride", "HAS_KEY_POSITIONS"):
        del arguments[name]
    launches.append(Launch(backward_query_kernel, (batch * key_heads * row_blocks,), arguments, config))

    config = configs.backward_key(target, row_width, query.element_size(), shared["WANT_TURNS"] or geometry.softcap > 0)
    key_blocks = -(-key_tokens // config.keys)
    arguments = _attention_arguments(rotated_query, rotated_key, value, rotation, geometry, config)
    arguments |= shared | head_constants(query, rotation) | {"VALUE_BLOCK": pad(head_dim)}
    arguments |= {"grad_key": grad_key, "grad_value": grad_value, "key_blocks": key_blocks}
    arguments |= {**strides("grad_key", grad_key), **strides("grad_value", grad_value), "grad_turns": sums(key_blocks)}
    for name in ("query_positions", "query_positions_stride", "HAS_QUERY_POSITIONS", "row_blocks"):
        del arguments[name]
    launches.append(Launch(backward_key_kernel, (batch * key_heads * key_blocks,), arguments, config))
    return gradients, partials, launches


def _attention_arguments(
    query: Tensor, key: Tensor, value: Tensor, rotation: Rotation, geometry: Geometry, config: Config
) -> dict[str, Any]:
    """Return what the kernels that walk keys for blocks of rows share."""
    batch, query_heads, query_tokens, head_dim = query.shape
    key_heads, key_tokens = key.shape[1], key.shape[2]
    group = query_heads // key_heads
    starts = [x.contiguous() for x in geometry.resolved(batch, query_tokens, key_tokens, query.device)]
    query_positions, key_positions = _unit_last(geometry.query_positions), _unit_last(geometry.key_positions)
    right = 0 if geometry.is_causal else geometry.window_right
    return {
        "query": query,
        "key": key,
        "value": value,
        **tables(rotation),
        "query_positions": query_positions if query_positions is not None else starts[0],
        "key_positions": key_positions if key_positions is not None else starts[0],
        "query_start": starts[0],
        "key_start": starts[1],
        "key_length": starts[2],
        **strides("query", query),
        **strides("key", key),
        **strides("value", value),
        "query_positions_stride": query_positions.stride(0) if query_positions is not None else 0,
        "key_positions_stride": key_positions.stride(0) if key_positions is not None else 0,
        "key_heads": key_heads,
        "group": group,
        "query_tokens": query_tokens,
        "row_blocks": -(-query_tokens * group // config.rows),
        "window_left": min(max(geometry.window_left, 0), _UNBOUNDED),
        "window_right": min(max(right, 0), _UNBOUNDED),
        **_score_scales(geometry),
        **head_constants(query, rotation),
        "VALUE_BLOCK": pad(head_dim),
        "INTERLEAVED": rotation.interleaved,
        "HAS_QUERY_POSITIONS": query_positions is not None,
        "HAS_KEY_POSITIONS": key_positions is not None,
        "HAS_LEFT": geometry.window_left >= 0,
        "HAS_RIGHT": right >= 0,
        "HAS_CAP": geometry.softcap > 0.0,
        "BLOCK_ROWS": config.rows,
        "BLOCK_KEYS": config.keys,
    }


def _score_scales(geometry: Geometry) -> dict[str, float]:
    """Scores in units of log 2: s * scale_log2, or with a softcap tanh(s * cap_slope) * cap_log2."""
    cap = geometry.softcap
    return {
        "scale_log2": geometry.scale * _LOG2_E,
        "cap_slope": geometry.scale / cap if cap else 0.0,
        "cap_log2": cap * _LOG2_E,
    }


def _unit_last(positions: Tensor | None) -> Tensor | None:
    if positions is not None and positions.stride(-1) != 1:
        return positions.contiguous()
    return positions
