"""Run a transformers model through the fused attention: `enable(model)`, and back: `disable(model)`.

An enabled model caches its keys unrotated and rotates them where they are read, so every key of a sequence always has
one and the same rotation, that of the regime of the sequence's present length. Everything is done to the instance:
other models in the process, those sharing its configuration object included, stay as they are.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.masking_utils import sdpa_mask

from ..errors import UnsupportedRopeError, refuse
from ..rope import LongRope, RopeScaling
from .transformers_attention import NAME, LayerRope, UnrotatedEmbedding, skip_rotation

SIDECAR = "longrope.json"
# Models whose attention rotates queries and keys last thing before the cache, in the NeoX layout: those tested.
MODEL_TYPES = (
    *("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "mixtral"),
    *("olmo2", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
)
POLICIES = ("rerotate", "reprefill")
_FULL = "full_attention"


def enable(
    model: nn.Module,
    rope: LongRope | RopeScaling | str | Path | None = None,
    *,
    policy: Literal["rerotate", "reprefill"] = "rerotate",
    regime: int | None = None,
    group: Any = None,
) -> None:
    """Route the attention of this model instance through `longrope_kernels.attention`.

    Each sequence of a batch gets the regime of its own length (its largest position + 1); sequences packed into one row
    are told apart by `model(input_ids, cu_seq_lens_q=bounds)`. A model already enabled is disabled first, so calling
    twice replaces the rope. While enabled, the instance holds a copy of its configuration.

    Args:
        model: a transformers model of one of `MODEL_TYPES`, or a module that wraps one.
        rope: the rotary embedding; a file, or a folder with a `longrope.json` (`LongRope.to_dict` as JSON). None: the
            `longrope.json` beside the checkpoint the model came from, else `LongRope.from_config`. In a model with an
            embedding per layer type (Gemma-3) it is that of the full-attention layers; local layers keep their own.
        policy: what `generate` does when a sequence grows into another regime. "rerotate": go on with the cache; all
            its keys rotate by the new regime from then on, though above the first layer they were computed under the
            old one. "reprefill": run all tokens again, as transformers does for Phi-3 alone.
        regime: a length in tokens whose regime every sequence gets, whatever its own: pins the regime of a generation.
        group: a torch.distributed process group over whose ranks each sequence is spread
            (`torch.distributed.group.WORLD` for all). Every rank then gives its part of the input,
            `distributed.shard(input_ids, 1, group)`, without position_ids or padding, and takes its part of the output;
            labels are shifted before they are cut. Gradients of weights are the rank's part, to be summed. For training
            and scoring; not for `generate`.

    Raises:
        UnsupportedRopeError: a model type, or a kind of rotary embedding, that is not supported; the line names it.
        ValueError: an argument does not fit the model, or a file cannot be read.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_attention_heads=2, num_hidden_layers=1))
        >>> enable(model, LongRope.yarn(32, 1e4, 2048, 8192))
        >>> disable(model)
    """
    if not {"q_offset", "kv_offset"} <= inspect.signature(sdpa_mask).parameters.keys():
        refuse("transformers", transformers_version, "a release whose mask interface has q_offset (5.23 has)")
    if policy not in POLICIES:
        refuse("policy", repr(policy), f"one of {', '.join(POLICIES)}")
    if regime is not None and (not isinstance(regime, int) or isinstance(regime, bool) or regime < 1):
        refuse("regime", regime, "a length in tokens, an int >= 1, or None")
    decoder = _decoder(model)
    ropes = _ropes(decoder, rope)
    configs = [(module, vars(module).get("config")) for module in model.modules()]
    disable(model)

    changes = _Changes()
    copies: dict[int, Any] = {}  # what one deepcopy has copied, the others take: modules go on sharing a config
    for module, config in configs:
        if isinstance(config, PreTrainedConfig):
            config = copy.deepcopy(config, copies)
            config._attn_implementation = NAME
            changes.set(module, "config", config)
    changes.set(decoder, "rotary_emb", UnrotatedEmbedding(decoder.rotary_emb))
    layers = {layer_type: LayerRope(ladder, regime, group) for layer_type, ladder in ropes.items()}
    for attention in _attentions(decoder):
        changes.set(attention, "longrope", layers[_layer_type(attention, layers)])
        forward = _unrotated_forward(type(attention))
        # Where somebody has wrapped this instance's forward, it stays, and multiplies by cos 1.
        if forward is not None and "forward" not in vars(attention):
            changes.set(attention, "forward", types.MethodType(forward, attention))
    for module in model.modules():
        if isinstance(module, GenerationMixin):
            # Phi-3's own version drops the cache where its configuration changes factors, wherever `rope` does.
            prepare: Callable[..., Any] = GenerationMixin.prepare_inputs_for_generation
            if policy == "reprefill" and regime is None:
                prepare = _reprefilling(ropes[_FULL if _FULL in ropes else None])
            changes.set(module, "prepare_inputs_for_generation", types.MethodType(prepare, module))
    decoder._longrope_changes = changes


def disable(model: nn.Module) -> None:
    """Undo `enable`: attention, rotary embedding and configuration are the stock objects again.

    A model that is not enabled is left as it is. What somebody else has replaced since `enable` stays theirs; changes
    made meanwhile to `model.config` were made to the copy, and go with it.
    """
    for module in list(model.modules()):
        changes = vars(module).pop("_longrope_changes", None)
        if changes is not None:
            changes.undo()


class _Absent:
    """Marks an attribute that was not there; a class, because a deep copy of the model must keep its identity."""


@dataclass
class _Changes:
    """Attributes set on modules, with what was there before."""

    entries: list[tuple[nn.Module, str, Any, Any]] = field(default_factory=list)

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        self.entries.append((module, name, value, self._own(module, name)))
        setattr(module, name, value)

    def undo(self) -> None:
        for module, name, value, stock in reversed(self.entries):
            if self._own(module, name) is not value:
                continue
            if stock is _Absent:
                delattr(module, name)
            else:
                setattr(module, name, stock)

    @staticmethod
    def _own(module: nn.Module, name: str) -> Any:
        return vars(module).get(name, module._modules.get(name, _Absent))


def _decoder(model: nn.Module) -> Any:
    """Return the one module of the model that holds `rotary_emb` and `layers`."""
    if not isinstance(model, nn.Module):
        refuse("model", type(model).__name__, "a transformers model", TypeError)
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not parts:
        refuse("model", type(model).__name__, "a transformers model, or a module that wraps one", TypeError)
    for part in parts:
        if part.config.model_type not in MODEL_TYPES:
            refuse(
                "model", f"a {part.config.model_type} model", f"one of {', '.join(MODEL_TYPES)}", UnsupportedRopeError
            )
    decoders = [part for part in parts if {"rotary_emb", "layers"} <= part._modules.keys()]
    if len(decoders) != 1:
        refuse("model", f"{len(decoders)} decoders in a {type(model).__name__}", "a model with one")
    return decoders[0]


def _attentions(decoder: Any) -> list[nn.Module]:
    return [layer.self_attn for layer in decoder.layers]


def _layer_type(attention: nn.Module, known: Mapping[str | None, Any]) -> str | None:
    """Return under which key of `known` the rope of an attention module is: one for all, or one per layer type."""
    layer_type = getattr(attention, "layer_type", None)
    return layer_type if layer_type in known else None


def _ropes(decoder: Any, rope: LongRope | RopeScaling | str | Path | None) -> dict[str | None, LongRope]:
    """Return the rope of each layer type, or of None where all layers share one, after checking it fits the model."""
    config = decoder.config
    given = _given(rope, config)
    parameters = getattr(config, "rope_parameters", None) or {}
    layer_types = [name for name, value in parameters.items() if isinstance(value, dict)]
    ropes: dict[str | None, LongRope] = {}
    if layer_types:
        ropes.update({name: LongRope.from_config(config, name) for name in layer_types})
        if given is not None:
            if _FULL not in layer_types:
                refuse("rope", f"one rope for layers of type {layer_types}", f"a model with {_FULL} layers")
            ropes[_FULL] = given
    else:
        ropes[None] = given if given is not None else LongRope.from_config(config)
    stock = getattr(decoder.rotary_emb, "stock", decoder.rotary_emb)
    for attention in _attentions(decoder):
        name = _layer_type(attention, ropes)
        ladder, table = ropes[name], getattr(stock, f"{name}_inv_freq" if name else "inv_freq")
        found = (ladder.head_dim, ladder.rotary_dim, ladder.interleaved)
        wanted = (attention.head_dim, 2 * table.numel(), False)
        if found != wanted:
            refuse(
                "rope",
                "head_dim {}, rotary_dim {}, interleaved {}".format(*found),
                "those of the {} model, {}, {} and {}".format(config.model_type, *wanted),
            )
    return ropes


def _given(rope: LongRope | RopeScaling | str | Path | None, config: Any) -> LongRope | None:
    """Return the rope that the argument or a sidecar says, or None where the configuration is to be read."""
    if rope is None:
        beside = Path(config.name_or_path) / SIDECAR
        return _read(beside) if config.name_or_path and beside.is_file() else None
    if isinstance(rope, RopeScaling):
        longest = config.max_position_embeddings
        return LongRope(longest, {longest: rope})
    if isinstance(rope, (str, Path)):
        path = Path(rope)
        return _read(path / SIDECAR if path.is_dir() else path)
    if not isinstance(rope, LongRope):
        refuse("rope", type(rope).__name__, "a LongRope, a RopeScaling, a path or None", TypeError)
    return rope


def _read(path: Path) -> LongRope:
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        refuse("rope", f"{path} ({error})", f"a {SIDECAR} written from LongRope.to_dict()")
    if not isinstance(fields, dict):
        refuse("rope", f"{path} with a JSON {type(fields).__name__}", f"a {SIDECAR} written from LongRope.to_dict()")
    return LongRope.from_dict(fields)


def _unrotated_forward(attention: type[nn.Module]) -> Callable[..., Any] | None:
    """Return the class's `forward` with an `apply_rotary_pos_emb` that skips the identity, or None where it has none.

    Multiplying by cos 1 and sin 0 is right too, but took 52 ms a layer at 16k tokens.
    """
    stock = attention.forward
    name = "apply_rotary_pos_emb"
    if not isinstance(stock, types.FunctionType) or name not in stock.__code__.co_names:
        return None
    namespace = {**stock.__globals__, name: skip_rotation(stock.__globals__[name])}
    forward = types.FunctionType(stock.__code__, namespace, stock.__name__, stock.__defaults__, stock.__closure__)
    forward.__kwdefaults__ = stock.__kwdefaults__
    return functools.update_wrapper(forward, stock)


def _reprefilling(rope: LongRope) -> Callable[..., dict[str, Any]]:
    """Return a `prepare_inputs_for_generation` that empties the cache when a sequence enters another regime."""

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(
        self: Any,
        input_ids: Any,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        if past and next_sequence_length is not None and not kwargs.get("is_first_iteration"):
            tokens = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
            before, now = tokens[:, :past].sum(1), tokens.sum(1)
            if bool((rope.select_index(before) != rope.select_index(now)).any()):
                if input_ids.shape[1] < past:
                    refuse("policy", "'reprefill' from inputs_embeds", "input_ids, so that all tokens can be run again")
                past_key_values.reset()
                next_sequence_length = None
        return GenerationMixin.prepare_inputs_for_generation(
            self, input_ids, next_sequence_length, past_key_values, attention_mask, **kwargs
        )

    return prepare_inputs_for_generation
