"""One forward of a long sequence, layer by layer in chunks of tokens: `layered_forward(model, input_ids)`.

A chunk of queries needs the keys and values of its own layer alone, and of no later token. So a layer works through the
sequence chunk by chunk, each chunk's result replacing its input, and then lets the next layer have its memory. Alive at
any time are the hidden states of the sequence, once, the keys and values of one layer, and the activations of a chunk:

    bytes = itemsize * (tokens * (hidden_size + 2 * key_heads * head_dim) + chunk_tokens * c)

with c, what a layer makes of one token, about 3 * intermediate_size + 6 * hidden_size. (The CPU kernels repack keys and
values for their products: as much again as one layer holds.) Work is that of the ordinary forward, but that keys are
rotated once for every chunk of queries instead of once.

Nothing of a model is written again here. Its own forward runs once over each chunk with layers that only take down what
they are called with (embeddings, masks, positions), and then its own layers are called with that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ..errors import refuse
from .transformers import _attentions, _decoder

CHUNK_TOKENS = 4096


def is_enabled(model: nn.Module) -> bool:
    """Whether `enable` is in force on this model instance."""
    return any("_longrope_changes" in vars(module) for module in model.modules())


@torch.no_grad()
def layered_forward(model: nn.Module, input_ids: Tensor, chunk_tokens: int = CHUNK_TOKENS) -> Tensor:
    """Return the last hidden state, after the final norm, in the memory of a few hidden states and one layer's keys.

    Every sequence gets the regime of its whole length. Attention gives the ordinary forward's bits; so do linear layers
    and experts where they round alike whatever the number of rows, and otherwise results are equal within the dtype.

    Args:
        model: one that `enable` is in force on, or a module that wraps one.
        input_ids: int64[batch, tokens], no padding.
        chunk_tokens: most tokens whose activations are held at once.

    Returns:
        [batch, tokens, hidden_size]. Not differentiable.

    Raises:
        ValueError: one line that names the argument.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from longrope_kernels.integrations.transformers import enable
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_attention_heads=2, num_hidden_layers=1)).eval()
        >>> enable(model)
        >>> layered_forward(model, torch.arange(10).unsqueeze(0), chunk_tokens=4).shape
        torch.Size([1, 10, 64])
    """
    if not is_enabled(model):
        refuse("model", f"a {type(model).__name__} that is not enabled", "enable(model) before")
    if model.training:
        refuse("model", "a model in training mode", "model.eval() before: nothing here is differentiable")
    if input_ids.dim() != 2 or not input_ids.numel():
        refuse("input_ids", f"shape {tuple(input_ids.shape)}", "[batch, tokens], at least one of each")
    if not isinstance(chunk_tokens, int) or isinstance(chunk_tokens, bool) or chunk_tokens < 1:
        refuse("chunk_tokens", chunk_tokens, "an int >= 1")
    decoder = _decoder(model)
    ropes: list[Any] = [attention.longrope for attention in _attentions(decoder)]
    if any(rope.group is not None for rope in ropes):
        refuse("model", "one whose sequences are spread over ranks", "enable(model) without a group")
    tokens = input_ids.shape[1]
    layers = list(decoder.layers[: decoder.config.num_hidden_layers])
    memory = _OneLayer(tokens)
    cache = _OneLayerCache(memory)
    hidden, calls = _arguments(decoder, layers, input_ids, chunk_tokens, cache)
    with _regime_of(decoder, tokens):
        for number, layer in enumerate(layers):
            memory.filled = 0
            for at, arguments in calls:
                found = layer(hidden[:, at], **arguments[number])
                hidden[:, at] = found[0] if isinstance(found, tuple) else found
    for at, _ in calls:
        hidden[:, at] = decoder.norm(hidden[:, at])
    return hidden


def _arguments(
    decoder: Any, layers: list[nn.Module], input_ids: Tensor, chunk_tokens: int, cache: _OneLayerCache
) -> tuple[Tensor, list[tuple[slice, list[dict[str, Any]]]]]:
    """Return what goes into the first layer, [batch, tokens, hidden], and each layer's arguments by chunk."""
    hidden: Tensor | None = None
    calls: list[tuple[slice, list[dict[str, Any]]]] = []
    tokens = input_ids.shape[1]
    count = -(-tokens // chunk_tokens)
    # Equal to a token: a short rest at the end would be decoded, by another kernel.
    for at in (slice(i * tokens // count, (i + 1) * tokens // count) for i in range(count)):
        cache.memory.filled = at.start
        with _taking_down(layers) as taken:
            decoder(input_ids=input_ids[:, at], past_key_values=cache, use_cache=True)
        (embedded, _), arguments = taken[0], [arguments for _, arguments in taken]
        if hidden is None:
            hidden = embedded.new_empty(embedded.shape[0], tokens, embedded.shape[2])
        hidden[:, at] = embedded
        calls.append((at, arguments))
    assert hidden is not None
    return hidden, calls


@contextmanager
def _taking_down(layers: list[nn.Module]) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
    """Have layers hand their input through while the block runs, and list the arguments they are called with."""
    taken: list[tuple[Tensor, dict[str, Any]]] = []

    def forward(hidden_states: Tensor, **arguments: Any) -> Tensor:
        taken.append((hidden_states, arguments))
        return hidden_states

    with _set([(layer, "forward", forward) for layer in layers]):
        yield taken


def _regime_of(decoder: Any, tokens: int) -> Any:
    """Give every attention module the regime of `tokens` while a block runs; one that is pinned stays so."""
    pinned: dict[int, Any] = {}
    values: list[tuple[nn.Module, str, Any]] = []
    for attention in _attentions(decoder):
        rope: Any = attention.longrope
        if rope.regime is None:
            values.append(
                (attention, "longrope", pinned.setdefault(id(rope), dataclasses.replace(rope, regime=tokens)))
            )
    return _set(values)


@contextmanager
def _set(values: list[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Set attributes of module instances while a block runs."""
    before = [(module, name, vars(module).get(name, _set)) for module, name, _ in values]
    try:
        for module, name, value in values:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            if value is _set:
                vars(module).pop(name, None)
            else:
                setattr(module, name, value)


class _OneLayer(DynamicLayer):
    """Keys and values of the layer at work, in memory that the next layer takes over."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.filled = tokens, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the keys and values of a chunk; return those of all chunks so far."""
        self.keys = self._room(self.keys, key_states)
        self.values = self._room(self.values, value_states)
        at = slice(self.filled, self.filled + key_states.shape[2])
        self.keys[:, :, at], self.values[:, :, at] = key_states, value_states
        self.filled = at.stop
        return self.keys[:, :, : at.stop], self.values[:, :, : at.stop]

    def _room(self, held: Tensor | None, states: Tensor) -> Tensor:
        shape = (*states.shape[:2], self.tokens, states.shape[3])
        return states.new_empty(shape) if held is None or held.shape != shape else held

    def get_seq_length(self) -> int:
        return self.filled


class _OneLayerCache(Cache):
    """A cache in which every layer finds the one that is at work."""

    def __init__(self, memory: _OneLayer) -> None:
        super().__init__(layers=[memory])
        self.memory = memory

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self.memory.update(key_states, value_states)
