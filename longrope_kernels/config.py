"""Rotary embeddings in transformers' configurations: reading the kinds that are tables, writing longrope."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .checks import integer, is_real
from .errors import UnsupportedRopeError, brief, refuse

if TYPE_CHECKING:
    from .rope import LongRope, RopeScaling

# Models of transformers 5 whose apply_rotary_pos_emb pairs neighbouring dims.
INTERLEAVED_MODEL_TYPES = frozenset({"codegen", "cohere", "cohere2", "ernie4_5", "glm", "glm4", "gptj", "helium"})
READABLE_KINDS = ("default", "linear", "yarn", "llama3", "longrope", "su")


def yarn_factors(
    rotary_dim: int,
    theta: float,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
) -> list[float]:
    """Rescale factors of YaRN: 1 before the ramp, `factor` after it, frequencies blended linearly on it."""
    integer("original_max_position_embeddings", original_max_position_embeddings, 1)
    for name, value, least in (("theta", theta, 1), ("beta_slow", beta_slow, 0), ("beta_fast", beta_fast, 0)):
        if not (is_real(value) and value > least):
            refuse(name, value, f"a finite number > {least}")
    if beta_fast < beta_slow:
        refuse("beta_fast", beta_fast, f"a number >= beta_slow ({beta_slow})")

    def pair_of(periods: float) -> float:
        return rotary_dim * math.log(original_max_position_embeddings / (periods * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(beta_fast), pair_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    width = (high - low) or 0.001  # the released code's guard against an empty ramp
    factors = []
    for pair in range(rotary_dim // 2):
        interpolated = min(max((pair - low) / width, 0.0), 1.0)
        factors.append(1.0 / (interpolated / factor + (1.0 - interpolated)))
    return factors


def llama3_factors(inv_freq: list[float], parameters: Mapping[str, Any]) -> list[float]:
    """Rescale factors of Llama 3.1: `factor` for long wavelengths, 1 for short ones, blended between."""
    factor, low, high = (float(parameters[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    length = parameters["original_max_position_embeddings"]
    factors = []
    for frequency in inv_freq:
        periods = length * frequency / (2 * math.pi)
        kept = min(max((periods - low) / (high - low), 0.0), 1.0)
        factors.append(1.0 / ((1.0 - kept) / factor + kept))
    return factors


def long_rope_from_config(
    ladder: type[LongRope], scaling_type: type[RopeScaling], config: Any, layer_type: str | None
) -> LongRope:
    """Implement `LongRope.from_config`; the two types are passed in so that this module imports neither."""
    fields = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(fields, Mapping):
        refuse("config", brief(config), "a transformers configuration or its dict", TypeError)
    model_type = fields.get("model_type", "model")
    parameters = _rope_parameters(fields, model_type, layer_type)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if "mrope_section" in parameters or kind not in READABLE_KINDS:
        kind = "mrope" if "mrope_section" in parameters else kind
        refuse(
            "rope_type",
            f"{kind!r} in a {model_type} config",
            f"one of {', '.join(READABLE_KINDS)}",
            UnsupportedRopeError,
        )

    longest = fields.get("max_position_embeddings")
    if not isinstance(longest, int) or longest < 1:
        refuse("max_position_embeddings", longest, f"an int >= 1 in the {model_type} config")
    head_dim = fields.get("head_dim")
    if not head_dim:
        hidden, heads = (integer(name, fields.get(name), 1) for name in ("hidden_size", "num_attention_heads"))
        head_dim = hidden // heads
    partial = parameters.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1.0
    theta = float(parameters["rope_theta"])
    plain = scaling_type(
        head_dim=head_dim,
        theta=theta,
        rotary_dim=int(head_dim * partial),
        interleaved=model_type in INTERLEAVED_MODEL_TYPES,
    )
    original = parameters.get("original_max_position_embeddings") or fields.get("original_max_position_embeddings")

    if kind == "default":
        return ladder(longest, {longest: plain})
    if kind in ("longrope", "su"):
        original = original or longest
        attention_factor = parameters.get("attention_factor")
        if attention_factor is None:
            attention_factor = su_attention_factor(parameters.get("factor") or longest / original, original)
        short, long = (
            plain.replace(rescale_factors=_factors(parameters, name), attention_factor=float(attention_factor))
            for name in ("short_factor", "long_factor")
        )
        return ladder(original, {original: short, longest: long} if longest > original else {original: short})

    factor = parameters.get("factor") or longest / (original or longest)
    if kind == "linear":
        return ladder(original or longest, {longest: plain.replace(rescale_factors=[float(factor)] * plain.pairs)})
    original = original or longest
    if kind == "llama3":
        factors = llama3_factors(plain.inv_freq.tolist(), {**parameters, "original_max_position_embeddings": original})
        return ladder(original, {max(longest, original): plain.replace(rescale_factors=factors)})
    factors = yarn_factors(
        plain.rotary_dim,
        theta,
        float(factor),
        original,
        float(parameters.get("beta_fast") or 32),
        float(parameters.get("beta_slow") or 1),
        bool(parameters.get("truncate", True)),
    )
    scaling = plain.replace(rescale_factors=factors, attention_factor=_yarn_attention_factor(parameters, float(factor)))
    return ladder(original, {max(longest, original): scaling})


def long_rope_to_config(rope: LongRope, allow_loss: bool) -> dict[str, Any]:
    """Implement `LongRope.to_config`."""
    short, long = rope.short, rope.long
    if long.theta is None:
        refuse("inv_freq", "given frequencies", "a theta: transformers' longrope has no other base")
    if not allow_loss:
        for length, scaling in rope.regimes.items():
            if scaling.start_tokens:
                refuse(
                    "start_tokens",
                    f"{scaling.start_tokens} in the regime of {length} tokens",
                    "0: transformers cannot say n-hat (allow_loss=True drops it)",
                )
        if len(rope.regimes) > 2:
            refuse(
                "regimes",
                f"{len(rope.regimes)} regimes",
                "at most two in transformers (allow_loss=True keeps that of the original length and the last)",
            )
        if short.attention_factor != long.attention_factor:
            refuse(
                "attention_factor",
                f"{short.attention_factor:g} short, {long.attention_factor:g} long",
                "equal ones: transformers applies one to both (allow_loss=True writes the long one)",
            )
    parameters: dict[str, Any] = {
        "rope_type": "longrope",
        "rope_theta": long.theta,
        "short_factor": list(short.rescale_factors),
        "long_factor": list(long.rescale_factors),
        "attention_factor": long.attention_factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
        "factor": rope.max_position_embeddings / rope.original_max_position_embeddings,
    }
    if long.rotary_dim != long.head_dim:
        parameters["partial_rotary_factor"] = long.rotary_dim / long.head_dim
    return parameters


def su_attention_factor(factor: float, original_max_position_embeddings: int) -> float:
    """LongRoPE's attention factor `sqrt(1 + ln s / ln L)`, what transformers computes when a config says none."""
    if factor <= 1.0:
        return 1.0
    return math.sqrt(1.0 + math.log(factor) / math.log(original_max_position_embeddings))


def _yarn_attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    weight, weight_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return mscale(weight) / mscale(weight_all) if weight and weight_all else mscale(1.0)


def _rope_parameters(fields: Mapping[str, Any], model_type: str, layer_type: str | None) -> dict[str, Any]:
    parameters = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    by_layer = {name: value for name, value in parameters.items() if isinstance(value, Mapping)}
    if by_layer:
        if layer_type is None:
            refuse(
                "layer_type",
                None,
                f"one of {sorted(by_layer)}: the {model_type} config has an embedding for each",
                UnsupportedRopeError,
            )
        if layer_type not in by_layer:
            refuse("layer_type", layer_type, f"one of {sorted(by_layer)}")
        parameters = dict(by_layer[layer_type])
    if parameters.get("rope_theta") is None:
        if fields.get("rope_theta") is None:
            refuse(
                "config",
                f"a {model_type} config without rope_theta",
                "a model with rotary position embeddings",
                UnsupportedRopeError,
            )
        parameters["rope_theta"] = fields["rope_theta"]
    return parameters


def _factors(parameters: Mapping[str, Any], name: str) -> list[float]:
    if parameters.get(name) is None:
        refuse(name, None, "a list of rotary_dim / 2 factors in a longrope config")
    return list(parameters[name])
