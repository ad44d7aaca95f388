"""The two functions transformers calls for an enabled model: one makes its masks, the other computes its attention.

Queries and keys arrive unrotated, and so are cached. What the attention must know about the batch is where each
sequence lies in the key slots; transformers tells it to the mask interface alone, once per forward and kind of layer.
So the "mask" made here is no mask but a row of seven integers per sequence (`_COLUMNS`), which travels through the
model in the mask's place: an int64 tensor, so that static caches, checkpointing and device moves take it along.
Positions arrive separately, in each layer's `position_ids`; both are combined once per forward into a `Layout`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from ..errors import refuse
from ..functional import attention
from ..rope import LongRope

NAME = "longrope_kernels"

# first, end: tokens of the sequence lie in [first, end), counted in tokens ever fed (padding included);
# query_offset, key_offset: that count at query row 0 and at key slot 0; key_slots: slots of the cache layer;
# window: tokens a query sees, 0 for all; magic: no mask of anybody else's holds it.
_COLUMNS = ("first", "end", "query_offset", "key_offset", "key_slots", "window", "magic")
_MAGIC = int.from_bytes(b"longrope", "big")
_FAR = 2**40  # beyond any position


@dataclass(frozen=True)
class LayerRope:
    """What an attention module of an enabled model rotates by."""

    rope: LongRope
    regime: int | None  # length in tokens whose regime every sequence gets; None: its own length
    group: Any = None  # ranks that each hold a part of every sequence; None: this process holds all

    @property
    def has_start_tokens(self) -> bool:
        """Whether rotation depends on more than the distance of two tokens."""
        return any(scaling.start_tokens for scaling in self.rope.scalings)


class UnrotatedEmbedding(nn.Module):
    """Stands in for a model's `rotary_emb` and rotates by nothing: cos 1, sin 0.

    Both have width 1, which broadcasts over the head. An attention module whose `forward` was given `skip_rotation`
    does not even multiply.
    """

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.stock = stock

    def forward(
        self, x: Tensor, position_ids: Tensor | None = None, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return cos and sin, [1, 1, 1] like x."""
        config: Any = self.stock.config
        if config._attn_implementation != NAME:
            # Any other attention would take the unrotated queries and keys for rotated ones.
            what = f"{config._attn_implementation!r} on an enabled model"
            refuse("attn_implementation", what, f"{NAME!r}, or disable(model) first")
        return x.new_ones(1, 1, 1), x.new_zeros(1, 1, 1)


def skip_rotation(stock: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Wrap an `apply_rotary_pos_emb` so that it returns at once what `UnrotatedEmbedding` would not rotate."""

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if cos.shape[-1] == 1:  # a real table is at least two wide
            return q, k
        return stock(q, k, cos, sin, *args, **kwargs)

    return apply_rotary_pos_emb


def layout_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """Describe where each sequence lies: what transformers' mask interface calls instead of building a mask.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset: sizes, and tokens fed before the queries and before key
            slot 0 (sliding caches drop the oldest).
        mask_function: transformers' description of the pattern; causal, or causal with the window `local_size`.
        attention_mask: bool[batch, tokens fed], 1 for a token and 0 for padding, or None.

    Returns:
        int64[batch, 1, 1, 7], see `_COLUMNS`.

    Raises:
        ValueError: a pattern or a padding mask that is not one run of tokens per sequence.
    """
    expected = causal_mask_function if local_size is None else sliding_window_causal_mask_function(local_size)
    if torch.compiler.is_compiling() and local_size is not None:
        # Closures cannot be looked into here; transformers allows the skip where it has added nothing to the pattern.
        known = not kwargs.get("use_vmap") and (kwargs.get("allow_is_causal_skip") or q_length == 1)
    else:
        known = _same(mask_function, expected)
    if not known:
        refuse(
            "attention_mask",
            "a pattern of another kind (packed position_ids, bidirectional, chunked or custom)",
            "causal attention, one sequence in a row (while compiling, give an attention_mask of 1s)",
        )
    last = q_offset + q_length
    first, end = torch.zeros((), dtype=torch.int64, device=device), last
    if attention_mask is not None:
        first, end = _run_of_tokens(attention_mask, last, batch_size)
    columns = torch.zeros(batch_size, len(_COLUMNS), dtype=torch.int64, device=device)
    for i, value in enumerate((first, end, q_offset, kv_offset, kv_length, local_size or 0, _MAGIC)):
        columns[:, i] = value
    return columns.view(batch_size, 1, 1, len(_COLUMNS))


def _run_of_tokens(attention_mask: Tensor, last: int | Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return the first token and the end of each sequence, int64[rows], of a 2D padding mask."""
    if attention_mask.ndim != 2 or attention_mask.shape[0] not in (1, batch_size):
        refuse("attention_mask", f"shape {tuple(attention_mask.shape)}", f"[{batch_size}, tokens]")
    column = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    token = attention_mask.bool() & (column < last)
    first = token.int().argmax(1)
    end = ((column + 1) * token).amax(1)
    whole = token.sum(1) == end - first
    if torch.compiler.is_compiling():
        ok = whole.all() & (attention_mask.shape[1] >= last)
        torch._assert_async(ok, "attention_mask: got a gap between tokens, expected padding at the ends only")
    elif attention_mask.shape[1] < int(last):
        refuse("attention_mask", f"{attention_mask.shape[1]} columns", f"{int(last)}, one per token ever fed")
    elif not whole.all():
        row = int((~whole).nonzero()[0])
        what = f"a gap between the tokens of row {row}"
        refuse("attention_mask", what, "padding on the left or the right only (on the left, to generate)")
    return first, end


def _same(function: object, expected: object) -> bool:
    """Whether two mask functions are the same code over equal captured values."""
    if isinstance(function, FunctionType) and isinstance(expected, FunctionType):
        if function.__code__ is not expected.__code__:
            return False
        cells, others = function.__closure__ or (), expected.__closure__ or ()
        return _same(tuple(c.cell_contents for c in cells), tuple(c.cell_contents for c in others))
    if isinstance(function, tuple) and isinstance(expected, tuple):
        return len(function) == len(expected) and all(map(_same, function, expected))
    if isinstance(function, Tensor) or isinstance(expected, Tensor):
        return function is expected
    return bool(function == expected)


@dataclass
class Layout:
    """Arguments of the fused attention that all layers of a kind share in one forward; int64[batch] each."""

    key_start: Tensor
    key_length: Tensor
    query_start: Tensor
    lengths: Tensor  # largest position + 1: what selects the regime
    query_positions: Tensor | None  # [batch, query_tokens], None: the index
    key_positions: Tensor | None  # [batch, key_tokens], None: the index
    regimes: dict[int, Tensor] = field(default_factory=dict)  # by id of the LayerRope

    def regime_index(self, layer: LayerRope) -> Tensor:
        """Return int32[batch]."""
        if id(layer) not in self.regimes:
            lengths = self.lengths if layer.regime is None else torch.full_like(self.lengths, layer.regime)
            self.regimes[id(layer)] = layer.rope.select_index(lengths)
        return self.regimes[id(layer)]


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_ids: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Rotate and attend: what transformers' attention interface calls in an enabled model.

    Args:
        module: an attention module that `enable` has given its rope.
        query: [batch, query_heads, query_tokens, head_dim], unrotated.
        key, value: [batch, key_heads, key_slots, head_dim], unrotated, from the cache where there is one.
        attention_mask: what `layout_mask` made.
        position_ids: int64[batch or 1, query_tokens].
        kwargs: `cu_seq_lens_q`, see `attend_packed`.

    Returns:
        [batch, query_tokens, query_heads, head_dim], and None for the weights, which are never formed.

    Raises:
        ValueError: dropout, output_attentions, a mask of another's making, or positions that cannot be expressed.
    """
    layer = getattr(module, "longrope", None)
    if layer is None:
        refuse("attn_implementation", f"{NAME!r} on a model that is not enabled", "enable(model) before its use")
    if dropout:
        refuse("attention_dropout", dropout, "0 in training: the fused attention has no dropout")
    if kwargs.get("output_attentions", module.config.output_attentions):
        refuse("output_attentions", True, "False: the fused attention never forms the weights (use disable(model))")
    packed, packed_keys = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if packed_keys is not None and (packed is None or not torch.equal(packed, packed_keys)):
        refuse("cu_seq_lens_k", f"{packed_keys}", "None, or those of cu_seq_lens_q")
    for name in ("cache", "position_bias", "s_aux"):  # paged, biased, sinks
        if kwargs.get(name) is not None:
            refuse(name, f"a {type(kwargs[name]).__name__}", "None: plain attention of one sequence in a row")
    if is_causal is False:
        refuse("is_causal", False, "causal attention")
    device = query.device.type
    if torch.is_autocast_enabled(device):  # an op of one's own is not on autocast's list; torch's attention is
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)

    layout = _layout(attention_mask, position_ids, query.shape[2], key.shape[2], sliding_window, layer.has_start_tokens)
    if layer.group is not None:
        from .transformers_ranks import attend_over_ranks

        if packed is not None:
            refuse("cu_seq_lens_q", "packed sequences on a model spread over ranks", "enable(model) without a group")
        out = attend_over_ranks(layer, layout, query, key, value, scale=scaling, window=sliding_window, softcap=softcap)
        return out.transpose(1, 2), None
    if packed is not None:
        from .transformers_packed import attend_packed

        out = attend_packed(
            layer, layout, query, key, value, packed, scale=scaling, window=sliding_window, softcap=softcap
        )
        return out.transpose(1, 2), None
    out = attention(
        query,
        key,
        value,
        layer.rope,
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
        query_positions=layout.query_positions,
        key_positions=layout.key_positions,
        key_start=layout.key_start,
        key_length=layout.key_length,
        query_start=layout.query_start,
        regime_index=layout.regime_index(layer),
    )
    return out.transpose(1, 2), None


def _layout(
    mask: Tensor | None,
    position_ids: Tensor | None,
    query_tokens: int,
    key_tokens: int,
    window: int | None,
    has_start_tokens: bool,
) -> Layout:
    """Return the layout of a forward, made once and kept on the mask, which every layer of a kind is handed."""
    if mask is None or mask.dtype != torch.int64 or mask.shape[1:] != (1, 1, len(_COLUMNS)):
        what = "None" if mask is None else f"a {mask.dtype} mask of shape {tuple(mask.shape)}"
        refuse("attention_mask", what, "a 2D padding mask [batch, tokens]: other masks cannot be expressed")
    if torch.compiler.is_compiling():
        return _make_layout(mask, position_ids, query_tokens, key_tokens, window, has_start_tokens)
    kept = getattr(mask, "_longrope_layout", None)
    if kept is None or kept[0] is not position_ids or kept[1] != has_start_tokens:
        layout = _make_layout(mask, position_ids, query_tokens, key_tokens, window, has_start_tokens)
        mask._longrope_layout = kept = (position_ids, has_start_tokens, layout)  # type: ignore[attr-defined]
    return kept[2]


def _make_layout(
    mask: Tensor,
    position_ids: Tensor | None,
    query_tokens: int,
    key_tokens: int,
    window: int | None,
    has_start_tokens: bool,
) -> Layout:
    columns = mask[:, 0, 0]
    first, end, query_offset, key_offset = columns[:, :4].unbind(1)
    index = (query_offset - first).unsqueeze(1) + torch.arange(query_tokens, device=mask.device)
    slot_index = (key_offset - first).unsqueeze(1) + torch.arange(key_tokens, device=mask.device)
    key_start = (first - key_offset).clamp(0, key_tokens)
    key_length = ((end - key_offset).clamp(max=key_tokens) - key_start).clamp(min=0)
    layout = Layout(key_start, key_length, query_offset - torch.maximum(first, key_offset), end - first, None, None)

    positions = index if position_ids is None else position_ids.to(torch.int64).expand(index.shape)
    token = (index >= 0) & (index < (end - first).unsqueeze(1))
    explicit = dropped = False
    if index.numel():
        explicit, dropped = _check(columns, positions, index, token, key_tokens, window)
    if explicit:
        layout.lengths = torch.where(token, positions, -1).amax(1) + 1
        layout.query_positions = torch.where(token, positions, 0)
        layout.key_positions = torch.zeros_like(slot_index)
        layout.key_positions[:, :query_tokens] = layout.query_positions
    elif dropped and has_start_tokens:  # a slot's place in a sliding cache is no longer its index in the sequence
        layout.query_positions, layout.key_positions = index.clamp(min=0), slot_index.clamp(min=0)
    return layout


def _check(
    columns: Tensor, positions: Tensor, index: Tensor, token: Tensor, key_tokens: int, window: int | None
) -> tuple[bool, bool]:
    """Refuse what cannot be expressed; return whether positions differ from the index, and whether keys were dropped.

    A model that is given none counts its `position_ids` from the first slot, left padding included. That is the index
    plus a constant of the sequence, which distances do not see, and it is read as the index.
    """
    first = columns[:, 0]
    shift = positions - index
    low, high = torch.where(token, shift, _FAR).amin(1), torch.where(token, shift, -_FAR).amax(1)
    by_index = (low > high) | (low == high) & ((low == 0) | (low == first))
    falls = token[:, 1:] & token[:, :-1] & (positions.diff(dim=1) <= 0)
    flags = torch.stack((by_index.all(), falls.any(), (columns[:, -1] == _MAGIC).all()))
    if torch.compiler.is_compiling():
        ok = flags[0] & ~flags[1] & flags[2] & (columns[:, 4:6] == columns.new_tensor((key_tokens, window or 0))).all()
        torch._assert_async(ok, "position_ids or attention_mask: cannot be expressed; run uncompiled for the reason")
        return False, True
    query_offset, key_offset, slots, local, all_by_index, any_falls, ours = torch.cat(
        (columns[0, 2:-1], flags)
    ).tolist()
    if not ours:
        refuse("attention_mask", f"an int64 mask of shape [{len(columns)}, 1, 1, 7]", "a 2D padding mask")
    if slots != key_tokens:
        refuse("attention_mask", f"a mask for {slots} key slots", f"one for the {key_tokens} keys of the layer")
    if local != (window or 0):
        refuse("sliding_window", window, f"{local or None}, the window of the layer's mask")
    if any_falls:
        row, column = (falls.nonzero()[0] + torch.tensor([0, 1], device=falls.device)).tolist()
        refuse(
            "position_ids",
            f"{int(positions[row, column])} after {int(positions[row, column - 1])} in row {row}",
            "increasing positions; of packed sequences, cu_seq_lens_q and no position_ids",
        )
    if not all_by_index and query_offset:
        row = int((~by_index).nonzero()[0])
        column = int(token[row].int().argmax())
        refuse(
            "position_ids",
            f"{int(positions[row, column])} in row {row}",
            f"{int(index[row, column])}, the index in its sequence: the positions of cached keys are not kept",
        )
    return not all_by_index, key_offset > 0


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, layout_mask)
