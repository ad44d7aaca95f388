"""Context parallelism: one sequence spread over the ranks of a torch.distributed group (`ring_attention`).

Blocks of *unrotated* keys and values pass around the ring; a rank rotates what it attends to, by the positions of the
block's owner and by the regime of the whole sequence. So n-hat and a ladder of regimes mean on N ranks what they mean
on one, and only key heads travel.

Zigzag: the sequence is cut into 2N chunks, and rank r holds chunks r and 2N-1-r, one behind the other. A causal mask
then costs every rank the same at every step: against its own block the plain causal triangle; against the block of a
lower rank all rows see its first chunk, of a higher rank the rows of the second chunk see all of it. Either way half.

Memory of a rank, for T tokens in all: its T/N tokens of query, key, value and out; two blocks of keys and values (one
at work, one arriving); out in float32, and as much again while a part is merged. Backward adds dq, and three blocks of
dk and dv (arriving, at work, leaving) in float32, which travel one step behind their block and end at its owner. No
rank ever holds more, whatever N.

Traffic of a rank: forward N-1 blocks of 2 * batch * key_heads * T/N * head_dim elements; backward the same, and N such
blocks in float32. The next block is asked for before the present one is worked on, and the accumulators pass while the
next contribution is computed: communication hides where a block takes longer to attend to than to send.

Sums have one order, so results are bitwise equal from run to run for a number of ranks. Ranks agree with one another
on the whole: partial results are merged in float32 (`merge`), each rounded to the dtype of the operands once before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import checks, functional, ops
from .bundles import Geometry, Rotation, lse_dtype
from .errors import refuse
from .rope import LongRope, RopeScaling

KEYS, GRADIENTS = 0, 1  # tags: what a message carries


def positions(tokens: int, group: Any = None, device: torch.device | str = "cpu", rank: int | None = None) -> Tensor:
    """Return the indices in the sequence of the tokens that a rank holds, int64[tokens / N].

    Args:
        tokens: of the whole sequence, a multiple of 2N.
        group: of N ranks; None: the default group, or one rank where torch.distributed is not initialised.
        rank: in the group; None: this one.
    """
    mine, ranks = _place(group)
    rank = mine if rank is None else rank
    if tokens < 0 or tokens % (2 * ranks):
        refuse("tokens", tokens, f"a multiple of {2 * ranks}, two chunks for each of {ranks} ranks (pad at the end)")
    chunk = tokens // (2 * ranks)
    index = torch.arange(chunk, device=device)
    return torch.cat([start + index for start in _starts(rank, ranks, chunk)])


def shard(x: Tensor, dim: int, group: Any = None) -> Tensor:
    """Return the part of `x` that this rank holds, from the whole, along the dimension of its tokens. Differentiable.

    Examples:
        >>> shard(torch.arange(4), 0)  # one rank holds all
        tensor([0, 1, 2, 3])
    """
    return x.index_select(dim, positions(x.shape[dim], group, x.device))


def unshard(x: Tensor, dim: int, group: Any = None) -> Tensor:
    """Return the whole from the parts of all ranks, on every rank. Not differentiable: losses are of a rank's part."""
    _, ranks = _place(group)
    if ranks == 1:
        return x.detach().clone()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks)]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    order = torch.cat([positions(ranks * x.shape[dim], group, x.device, rank) for rank in range(ranks)])
    return torch.cat(parts, dim).index_select(dim, order.argsort())


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join the attention of the same queries over two sets of keys.

    Args:
        out, other_out: [..., tokens, head_dim].
        lse, other_lse: [..., tokens], natural logarithm; -inf where a query sees no key of the set.

    Returns:
        out and lse over both sets, in the wider dtype of the two. Where both are -inf: out 0, lse -inf, gradients 0.
    """
    top = torch.maximum(lse, other_lse).detach()
    top = torch.where(top.isinf(), 0.0, top)
    left, right = torch.exp(lse - top), torch.exp(other_lse - top)
    total = left + right
    seen = total > 0
    total = torch.where(seen, total, 1.0)
    merged = (left / total).unsqueeze(-1) * out + (right / total).unsqueeze(-1) * other_out
    return merged.to(torch.promote_types(out.dtype, other_out.dtype)), torch.where(seen, top + total.log(), -torch.inf)


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: RopeScaling | LongRope | None = None,
    *,
    group: Any = None,
    is_causal: bool = True,
    scale: float | None = None,
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    key_length: Tensor | None = None,
    regime_index: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of a sequence whose tokens are spread over the ranks of `group`, in zigzag order (`shard`).

    Every rank calls it with tensors of the same shape; operands come unrotated. The module's text has memory, traffic
    and order. Without torch.distributed, or with one rank, it is `attention`.

    Args:
        query: [batch, query_heads, T / N, head_dim], this rank's tokens.
        key, value: [batch, key_heads, T / N, head_dim].
        scaling: one regime for all; a LongRope, of which each sequence gets the regime of its whole length; None.
        group: a process group of N ranks that sends and receives on the device of the operands; None: the default.
        key_length: int[batch], tokens of each sequence, where some are padded at their end; the same on every rank.
            None: T.
        is_causal, scale, window, softcap, regime_index, return_lse, backend: as in `attention`.

    Returns:
        out, like query; with `return_lse` also lse, [batch, query_heads, T / N]. Differentiable: gradients of query,
        key and value are complete; that of rescale factors is the part of this rank's queries, to be summed over the
        ranks like that of any replicated parameter.

    Raises:
        ValueError, TypeError: one line that names the argument, its value and what was expected.

    Examples:
        >>> rope = LongRope.yarn(64, 1e5, 8192, 16384)
        >>> q, k, v = (shard(torch.randn(1, heads, 128, 64), 2) for heads in (9, 3, 3))
        >>> ring_attention(q, k, v, rope).shape
        torch.Size([1, 9, 128, 64])

    Reference: Ring Attention, arXiv 2310.01889; Striped Attention, arXiv 2311.09431, has another balanced order.
    """
    rank, ranks = _place(group)
    checks.operand("query", query)
    if ranks > 1 and query.device.type == "cpu":  # first of all, so that every rank refuses or none does
        _same_everywhere("query", query.shape, group)
    batch, tokens = query.shape[0], query.shape[2]
    if key.shape[2] != tokens:
        refuse("key", f"{key.shape[2]} tokens", f"those of query, {tokens}")
    if tokens % 2:
        refuse("query", f"{tokens} tokens", "an even number, two chunks of the sequence (pad at the end)")
    whole = torch.full((batch,), ranks * tokens, device=query.device)
    length = checks.per_sequence("key_length", key_length, batch, query.device)
    length = whole if length is None else length
    if isinstance(scaling, LongRope) and regime_index is None:
        regime_index = scaling.select_index(length)
    rotation, geometry = functional.bundle(
        query, key, value, scaling, is_causal, scale, window, softcap, regime_index=regime_index
    )
    ring = _Ring(group, rank, ranks, tokens // 2, length, rotation, geometry, checks.backend(backend))
    out, lse = _RingAttention.apply(query, key, value, rotation.inv_freq, ring)
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class Piece:
    """One call of the op: some of a rank's rows against some of a block's.

    Attributes:
        queries, keys: rows of the local query and of the block.
        offset: index in the sequence of the first query row less that of the first key row.
    """

    queries: slice
    keys: slice
    offset: int
    is_causal: bool


def pieces(rank: int, source: int, ranks: int, chunk: int, geometry: Geometry) -> list[Piece]:
    """Return what rank `rank` computes against the block of rank `source`."""
    first, second, whole = slice(0, chunk), slice(chunk, 2 * chunk), slice(0, 2 * chunk)
    causal, left, right = geometry.is_causal, geometry.window_left, geometry.window_right
    if left < 0 and right < 0:
        if source == rank or not causal:  # chunks of one rank ascend, so its rows are causal among themselves
            return [Piece(whole, whole, 0, causal)]
        return [Piece(whole, first, 0, False) if source < rank else Piece(second, whole, 0, False)]
    found = []
    right = 0 if causal else right
    for queries, start in zip((first, second), _starts(rank, ranks, chunk), strict=True):
        for keys, key_start in zip((first, second), _starts(source, ranks, chunk), strict=True):
            offset = start - key_start
            near, far = offset - (chunk - 1), offset + (chunk - 1)  # of a query after a key, in tokens
            if (left < 0 or near <= left) and (right < 0 or far >= -right):
                found.append(Piece(queries, keys, offset, causal))
    return found


@dataclass(frozen=True)
class _Ring:
    """All of a call but its operands."""

    group: Any
    rank: int
    ranks: int
    chunk: int
    length: Tensor  # int64[B], tokens of each whole sequence
    rotation: Rotation
    geometry: Geometry
    backend: str

    def calls(self, source: int) -> Iterator[tuple[Piece, tuple[Any, ...]]]:
        """Yield the pieces against a block, each with what the op takes behind its operands."""
        device = self.length.device
        tokens = 2 * self.chunk * self.ranks
        query_at, key_at = (positions(tokens, self.group, device, rank) for rank in (self.rank, source))
        for piece in pieces(self.rank, source, self.ranks, self.chunk, self.geometry):
            batch = self.length.shape[0]
            at = key_at[piece.keys]
            geometry = replace(
                self.geometry,
                query_positions=query_at[piece.queries].expand(batch, -1),
                key_positions=at.expand(batch, -1),
                query_start=torch.full_like(self.length, piece.offset),
                # The later chunk of a block has tokens of a sequence only where the earlier one is full of them.
                key_length=(at < self.length.unsqueeze(1)).sum(1),
                is_causal=piece.is_causal,
            )
            *tables, interleaved = vars(self.rotation).values()
            yield piece, (*tables, *vars(geometry).values(), interleaved)

    def exchange(self, x: Tensor, tag: int) -> _Arriving:
        """Send `x` to the next rank and receive its like from the one before."""
        arriving = torch.empty_like(x)
        peers = [(self.rank + step) % self.ranks for step in (1, -1)]
        if self.group is not None:
            peers = [dist.get_global_rank(self.group, peer) for peer in peers]
        sides = ((dist.isend, x, peers[0]), (dist.irecv, arriving, peers[1]))
        works = dist.batch_isend_irecv([dist.P2POp(op, part, peer, self.group, tag) for op, part, peer in sides])
        return _Arriving(arriving, x, works)

    def blocks(self, key: Tensor, value: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield every rank's keys and values, [2, B, Hkv, T/N, D], this one's first; the next arrives meanwhile."""
        block = torch.stack((key, value))
        for step in range(self.ranks):
            arriving = self.exchange(block, KEYS) if step + 1 < self.ranks else None
            yield (self.rank - step) % self.ranks, block
            if arriving is not None:
                block = arriving.wait()


@dataclass
class _Arriving:
    tensor: Tensor
    sent: Tensor  # must live until it has left
    works: list[Any]

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.tensor


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, inv_freq: Tensor, ring: _Ring
    ) -> tuple[Tensor, Tensor]:
        wide = lse_dtype(query)
        out = torch.zeros(query.shape, dtype=wide, device=query.device)
        lse = torch.full(query.shape[:-1], -torch.inf, dtype=wide, device=query.device)
        for source, (keys, values) in ring.blocks(key, value):
            for piece, rest in ring.calls(source):
                rows = (slice(None), slice(None), piece.queries)
                columns = (slice(None), slice(None), piece.keys)
                found = ops.attention(query[rows], keys[columns], values[columns], *rest, ring.backend)
                out[rows], lse[rows] = merge(out[rows], lse[rows], *found)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.ring = ring
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        ring, wide = ctx.ring, lse.dtype
        d_query = torch.zeros(query.shape, dtype=wide, device=query.device)
        d_inv_freq = torch.zeros_like(ring.rotation.inv_freq)
        arriving = None
        for source, block in ring.blocks(key, value):
            d_block = torch.zeros(block.shape, dtype=wide, device=query.device)
            for piece, rest in ring.calls(source):
                rows = (slice(None), slice(None), piece.queries)
                columns = (slice(None), slice(None), piece.keys)
                grads = ops.attention_backward(
                    grad_out[rows].contiguous(),
                    grad_lse[rows].contiguous(),
                    query[rows],
                    *(x[columns] for x in block),
                    out[rows],
                    lse[rows],  # of all keys, so that the gradients are those of the whole, as far as this piece goes
                    *rest,
                    ctx.needs_input_grad[3],
                    ring.backend,
                )
                d_query[rows] += grads[0]
                for total, grad in zip(d_block, grads[1:3], strict=True):
                    total[columns] += grad
                d_inv_freq += grads[3]
            if ring.ranks > 1:
                if arriving is not None:
                    d_block += arriving.wait()
                arriving = ring.exchange(d_block, GRADIENTS)
        d_block = d_block if arriving is None else arriving.wait()
        d_key, d_value = (x.to(key.dtype) for x in d_block)
        return d_query.to(query.dtype), d_key, d_value, d_inv_freq if ctx.needs_input_grad[3] else None, None


def _place(group: Any) -> tuple[int, int]:
    """Return this rank and the number of ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            refuse("group", type(group).__name__, "None, as torch.distributed is not initialised")
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        refuse("group", "one without this rank", "a group that this rank is in")
    return rank, dist.get_world_size(group)


def _starts(rank: int, ranks: int, chunk: int) -> tuple[int, int]:
    """Return the index in the sequence at which each of a rank's two chunks begins."""
    return rank * chunk, (2 * ranks - 1 - rank) * chunk


def _same_everywhere(name: str, shape: torch.Size, group: Any) -> None:
    """Refuse shapes that differ between ranks, which would otherwise hang or tear messages."""
    sizes = torch.tensor(shape, device="cpu")
    bounds = torch.cat((sizes, -sizes))
    dist.all_reduce(bounds, dist.ReduceOp.MAX, group=group)
    largest, smallest = bounds[: len(shape)], -bounds[len(shape) :]
    if not torch.equal(largest, smallest):
        what = f"shape {tuple(shape)} here and sizes from {smallest.tolist()} to {largest.tolist()} over the ranks"
        refuse(name, what, "the same shape on every rank")
