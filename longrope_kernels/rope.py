"""What a rotary embedding is: one regime (`RopeScaling`) and the ladder of regimes of a LongRoPE model (`LongRope`)."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import config as _config
from .bundles import Rotation
from .checks import MAX_POSITION, integer, is_int, is_real, no_tangents
from .errors import brief, refuse
from .turns import base_turns, fixed_point, turns_of_inv_freq


class RopeScaling:
    """One rotary regime: pair i turns by `theta^(-2i/rotary_dim) / rescale_factors[i]` radians per token.

    Positions below `start_tokens` (LongRoPE's n-hat) keep the original frequency. cos and sin are multiplied by
    `attention_factor` at every position. Instances are immutable by convention and compare by value.

    Attributes (besides the arguments): `turns` and `base_turns`, int64[rotary_dim / 2], the rescaled and the original
    frequencies in 2^-64 turn per token, wrapped; `base_inv_freq`, float64[rotary_dim / 2], in radians per token.

    Args:
        head_dim: dimensions of a head.
        theta: base of the frequencies; give this or `inv_freq`.
        inv_freq: unrescaled frequencies, rotary_dim / 2 values in radians per token, instead of `theta`.
        rescale_factors: LongRoPE's lambda, rotary_dim / 2 positive values; None: all 1. A float64 tensor that
            requires a gradient receives it through the attention. The scaling holds the values the tensor had: after
            a change in place, as an optimizer makes, its next use is refused (except inside a compiled graph), and
            `scaling.replace(rescale_factors=tensor)` makes the one to go on with.
        start_tokens: n-hat, in tokens.
        attention_factor: multiplies cos and sin of queries and keys.
        rotary_dim: dimensions that rotate, the first of the head; None: all.
        interleaved: pairs are dims (2i, 2i+1), GPT-J's layout, rather than (i, i + rotary_dim/2), NeoX's and Llama's.

    Raises:
        ValueError: an argument is out of range, not finite or of the wrong length; the line names it.
        RuntimeError: when used after the tensor of `rescale_factors` was changed in place.

    Examples:
        >>> scaling = RopeScaling(head_dim=64, theta=1e5, rescale_factors=[1.0] * 16 + [2.0] * 16)
        >>> scaling.inv_freq.shape
        torch.Size([32])

    Reference: LongRoPE, arXiv 2402.13753, equation 3.
    """

    def __init__(
        self,
        head_dim: int,
        theta: float | None = None,
        rescale_factors: Iterable[float] | Tensor | None = None,
        start_tokens: int = 0,
        attention_factor: float = 1.0,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        *,
        inv_freq: Iterable[float] | Tensor | None = None,
        monotone: bool = False,
    ) -> None:
        head_dim = integer("head_dim", head_dim, 2)
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if not is_int(rotary_dim) or not 2 <= rotary_dim <= head_dim or rotary_dim % 2:
            refuse("rotary_dim", rotary_dim, f"an even int between 2 and head_dim ({head_dim})")
        if (theta is None) == (inv_freq is None):
            refuse("theta", theta, f"either theta or inv_freq, not both and not neither (inv_freq={brief(inv_freq)})")
        pairs = rotary_dim // 2
        if theta is not None and not (is_real(theta) and theta > 1):
            refuse("theta", theta, "a finite number > 1")
        start_tokens = integer("start_tokens", start_tokens, 0, MAX_POSITION - 1)
        if not (is_real(attention_factor) and attention_factor > 0):
            refuse("attention_factor", attention_factor, "a finite number > 0")

        self.head_dim = head_dim
        self.rotary_dim = int(rotary_dim)
        self.theta = None if theta is None else float(theta)
        self.start_tokens = start_tokens
        self.attention_factor = float(attention_factor)
        self.interleaved = bool(interleaved)
        self._given_inv_freq = None if inv_freq is None else _positive("inv_freq", inv_freq, pairs)
        factors = [1.0] * pairs if rescale_factors is None else rescale_factors
        self._factors = _positive("rescale_factors", factors, pairs)
        if monotone:
            check_monotone(self._factors)
        tensor = factors if isinstance(factors, Tensor) and factors.requires_grad else None
        self._factor_tensor = None if tensor is None or tensor.is_inference() else tensor
        self._factor_version = 0 if self._factor_tensor is None else self._factor_tensor._version

        exact = turns_of_inv_freq(self._given_inv_freq) if self._given_inv_freq else base_turns(self.theta, rotary_dim)
        self.turns = _host(fixed_point(exact, self._factors), torch.int64)
        self.base_turns = _host(fixed_point(exact, [1.0] * pairs), torch.int64)
        self.base_inv_freq = _host(self._given_inv_freq or [float(turn) * 2 * math.pi for turn in exact])
        self._tables = Tables((self,))

    @property
    def pairs(self) -> int:
        """Rotary pairs, rotary_dim / 2."""
        return self.rotary_dim // 2

    @property
    def rescale_factors(self) -> tuple[float, ...]:
        """LongRoPE's lambda, the values the scaling was made with."""
        tensor = self._factor_tensor
        # A traced tensor has no version: a compiled graph is not checked.
        if tensor is not None and not torch.compiler.is_compiling() and tensor._version != self._factor_version:
            refuse(
                "rescale_factors",
                "a tensor that was changed in place after the scaling was made of it",
                "a new scaling for its new values: scaling.replace(rescale_factors=tensor)",
                RuntimeError,
            )
        return self._factors

    @property
    def inv_freq(self) -> Tensor:
        """Rescaled frequencies, float64[pairs], in radians per token; differentiable in `rescale_factors`."""
        values, tensor = self.rescale_factors, self._factor_tensor
        return self.base_inv_freq / (_host(values) if tensor is None else tensor.to("cpu", torch.float64))

    def rotation(self, regime_index: Tensor) -> Rotation:
        """Bundle this regime for a batch whose `regime_index` (int32[batch]) is all zero."""
        return self._tables.rotation(regime_index)

    @property
    def is_identity(self) -> bool:
        """True when this is the unscaled rotary embedding: factors and attention factor are all 1."""
        return self.attention_factor == 1.0 and all(factor == 1.0 for factor in self.rescale_factors)

    def replace(self, **changes: Any) -> RopeScaling:
        """Return a copy with some constructor arguments changed."""
        arguments: dict[str, Any] = {
            "head_dim": self.head_dim,
            "theta": self.theta,
            "inv_freq": self._given_inv_freq,
            "start_tokens": self.start_tokens,
            "attention_factor": self.attention_factor,
            "rotary_dim": self.rotary_dim,
            "interleaved": self.interleaved,
        }
        if "rescale_factors" not in changes:
            values, tensor = self.rescale_factors, self._factor_tensor
            arguments["rescale_factors"] = values if tensor is None else tensor
        if changes.get("theta") is not None:
            arguments["inv_freq"] = None
        if changes.get("inv_freq") is not None:
            arguments["theta"] = None
        return RopeScaling(**(arguments | changes))

    def __reduce__(self) -> tuple[Any, ...]:
        # The copy of a tensor counts its changes anew, and so must the scaling.
        return _restored, (self.to_dict(), self._factor_tensor)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict from which `from_dict` restores an equal instance, bit for bit."""
        return {
            "head_dim": self.head_dim,
            "rotary_dim": self.rotary_dim,
            "interleaved": self.interleaved,
            "theta": self.theta,
            "inv_freq": None if self._given_inv_freq is None else list(self._given_inv_freq),
            "rescale_factors": list(self.rescale_factors),
            "start_tokens": self.start_tokens,
            "attention_factor": self.attention_factor,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> RopeScaling:
        """Restore an instance written by `to_dict`."""
        _fields_of(fields)
        known = {*cls._FIELDS}
        if unknown := sorted(set(fields) - known):
            refuse("fields", unknown, f"only {sorted(known)}")
        if "head_dim" not in fields:
            refuse("fields", sorted(fields), "a dict with head_dim")
        return cls(**fields)

    _FIELDS = (
        "head_dim",
        "rotary_dim",
        "interleaved",
        "theta",
        "inv_freq",
        "rescale_factors",
        "start_tokens",
        "attention_factor",
    )

    @classmethod
    def pi(cls, head_dim: int, theta: float, factor: float, **kwargs: Any) -> RopeScaling:
        """Position interpolation: every frequency divided by `factor` (arXiv 2306.15595)."""
        pairs = _rotary_dim(head_dim, kwargs) // 2
        return cls(head_dim, theta, [_scale_factor(factor)] * pairs, **kwargs)

    @classmethod
    def ntk(cls, head_dim: int, theta: float, factor: float, **kwargs: Any) -> RopeScaling:
        """NTK-aware scaling: a larger base, so that the slowest pair is divided by `factor` and the first by 1."""
        pairs = _rotary_dim(head_dim, kwargs) // 2
        last = max(pairs - 1, 1)
        return cls(head_dim, theta, [_scale_factor(factor) ** (pair / last) for pair in range(pairs)], **kwargs)

    @classmethod
    def dynamic_ntk(
        cls,
        head_dim: int,
        theta: float,
        factor: float,
        original_max_position_embeddings: int,
        length: int,
        **kwargs: Any,
    ) -> RopeScaling:
        """NTK-aware scaling for a sequence of `length` tokens: transformers' rope type `dynamic` at that length.

        Up to the original length nothing is scaled, beyond it the slowest pair is divided by
        `1 + factor (length / original - 1)`: with a factor of 1 by just what the length asks for.

        Args:
            factor: what a transformers configuration calls so.
            length: tokens of the sequence, in transformers the longest of the batch so far.
        """
        original = integer("original_max_position_embeddings", original_max_position_embeddings, 1)
        longest = max(integer("length", length, 1), original)
        return cls.ntk(head_dim, theta, 1.0 + _scale_factor(factor) * (longest / original - 1.0), **kwargs)

    @classmethod
    def yarn(
        cls,
        head_dim: int,
        theta: float,
        factor: float,
        original_max_position_embeddings: int,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        attention_factor: float | None = None,
        truncate: bool = True,
        **kwargs: Any,
    ) -> RopeScaling:
        """YaRN: pairs with many periods in the original window kept, those with under one divided by `factor`.

        Args:
            beta_fast, beta_slow: periods in the original window between which the ramp lies.
            attention_factor: None: YaRN's `0.1 ln(factor) + 1`.
            truncate: round the ends of the ramp to whole pairs, as the released code does.

        Reference: arXiv 2309.00071.
        """
        rotary_dim = _rotary_dim(head_dim, kwargs)
        factors = _config.yarn_factors(
            rotary_dim, theta, _scale_factor(factor), original_max_position_embeddings, beta_fast, beta_slow, truncate
        )
        if attention_factor is None:
            attention_factor = 0.1 * math.log(factor) + 1.0
        return cls(head_dim, theta, factors, attention_factor=attention_factor, **kwargs)

    def _key(self) -> tuple[Any, ...]:
        return tuple(self._given_inv_freq if name == "inv_freq" else getattr(self, name) for name in self._FIELDS)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RopeScaling) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        base = f"theta={self.theta:g}" if self.theta is not None else f"inv_freq=<{self.pairs} values>"
        low, high = min(self._factors), max(self._factors)
        return (
            f"RopeScaling(head_dim={self.head_dim}, {base}, "
            f"rescale_factors=<{self.pairs} values in [{low:g}, {high:g}]>, start_tokens={self.start_tokens}, "
            f"attention_factor={self.attention_factor:g}, "
            f"rotary_dim={self.rotary_dim}, interleaved={self.interleaved})"
        )


class LongRope:
    """The ladder of rotary regimes of a model: each serves sequences up to its length.

    Args:
        original_max_position_embeddings: tokens the model was trained on before it was extended.
        regimes: from the longest sequence (tokens) a regime serves to its `RopeScaling`. Sequences longer than the
            longest length get the last regime, as in transformers.

    Raises:
        ValueError: no regime, a length that is not a positive int, or regimes that disagree in shape or base.

    Examples:
        >>> short = RopeScaling(head_dim=64, theta=1e5)
        >>> rope = LongRope(8192, {8192: short, 16384: RopeScaling.pi(64, 1e5, 2.0)})
        >>> rope.select(8193).rescale_factors[0]
        2.0
    """

    def __init__(self, original_max_position_embeddings: int, regimes: Mapping[int, RopeScaling]) -> None:
        original = integer("original_max_position_embeddings", original_max_position_embeddings, 1)
        if not isinstance(regimes, Mapping) or not regimes:
            refuse("regimes", brief(regimes), "a dict of at least one length with its RopeScaling")
        for length, scaling in regimes.items():
            if not is_int(length) or length < 1:
                refuse("regimes", f"length {length!r}", "lengths that are ints >= 1")
            if not isinstance(scaling, RopeScaling):
                refuse("regimes", f"{type(scaling).__name__} at {length}", "a RopeScaling for every length", TypeError)
        self.original_max_position_embeddings = original
        self.regimes: dict[int, RopeScaling] = {int(length): regimes[length] for length in sorted(regimes)}
        first, *rest = self.regimes.values()
        for scaling in rest:
            for name in ("head_dim", "rotary_dim", "interleaved", "theta", "_given_inv_freq"):
                if getattr(scaling, name) != getattr(first, name):
                    refuse("regimes", f"{name.lstrip('_')} {getattr(scaling, name)}", f"{getattr(first, name)} in all")
        self._tables = Tables(self.scalings)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Longest sequence of each regime, ascending, in tokens."""
        return tuple(self.regimes)

    @property
    def max_position_embeddings(self) -> int:
        """Longest sequence the ladder was made for, in tokens."""
        return self.lengths[-1]

    @property
    def scalings(self) -> tuple[RopeScaling, ...]:
        """The regimes, shortest first."""
        return tuple(self.regimes.values())

    @property
    def short(self) -> RopeScaling:
        """The regime of sequences of the original length: the short factors of formats that have two sets."""
        return self.select(self.original_max_position_embeddings)

    @property
    def long(self) -> RopeScaling:
        """The regime of the longest sequences: the long factors of formats that have two sets."""
        return self.scalings[-1]

    @property
    def head_dim(self) -> int:
        return self.scalings[0].head_dim

    @property
    def rotary_dim(self) -> int:
        return self.scalings[0].rotary_dim

    @property
    def interleaved(self) -> bool:
        return self.scalings[0].interleaved

    def select(self, length: int) -> RopeScaling:
        """Return the regime of a sequence of `length` tokens: the first whose length is not exceeded."""
        return self.scalings[min(bisect.bisect_left(self.lengths, integer("length", length, 0)), len(self.regimes) - 1)]

    def select_index(self, lengths: Tensor) -> Tensor:
        """Return the regime of each sequence, int32 like `lengths`, computed on its device without a host copy."""
        index = torch.zeros_like(lengths, dtype=torch.int32)
        for length in self.lengths[:-1]:
            index += lengths > length
        return index

    def rotation(self, regime_index: Tensor) -> Rotation:
        """Bundle the tables of all regimes with the regime of each sequence (int32[batch])."""
        return self._tables.rotation(regime_index)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict, lossless (n-hat, several regimes and attention factors included)."""
        return {
            "format": "longrope-kernels/1",
            "original_max_position_embeddings": self.original_max_position_embeddings,
            "regimes": [{"max_length": length} | scaling.to_dict() for length, scaling in self.regimes.items()],
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LongRope:
        """Restore what `to_dict` wrote.

        Raises:
            ValueError: another format, or a field missing.
        """
        _fields_of(fields)
        if fields.get("format") != "longrope-kernels/1":
            refuse("fields", f"format {fields.get('format')!r}", "format 'longrope-kernels/1'")
        for name in ("original_max_position_embeddings", "regimes"):
            if name not in fields:
                refuse("fields", sorted(fields), f"a dict with {name}")
        if not isinstance(fields["regimes"], Sequence):
            refuse("regimes", brief(fields["regimes"]), "a list of dicts, one for each regime", TypeError)
        regimes = {}
        for regime in fields["regimes"]:
            _fields_of(regime, "regimes")
            regime = dict(regime)
            if "max_length" not in regime:
                refuse("regimes", sorted(regime), "max_length in every regime")
            max_length = regime.pop("max_length")
            regimes[max_length] = RopeScaling.from_dict(regime)
        return cls(fields["original_max_position_embeddings"], regimes)

    @classmethod
    def from_config(cls, config: Any, layer_type: str | None = None) -> LongRope:
        """Read the rotary embedding of a transformers configuration.

        Args:
            config: a `PretrainedConfig`, or a dict like its `to_dict()`.
            layer_type: which entry to read where a model has one embedding per layer type (Gemma-3).

        Returns:
            One regime for the kinds default, linear, yarn and llama3; two for longrope and dynamic is refused.

        Raises:
            UnsupportedRopeError: the model has no RoPE, or of a kind that depends on more than the pair and regime.
        """
        return _config.long_rope_from_config(cls, RopeScaling, config, layer_type)

    def to_config(self, allow_loss: bool = False) -> dict[str, Any]:
        """Return transformers' `rope_parameters` of type longrope that say the same.

        Args:
            allow_loss: write what can be written where transformers cannot say it all (start tokens, more than two
                regimes, a short attention factor unlike the long one) instead of raising.

        Returns:
            A dict for `config.rope_parameters`; `max_position_embeddings` is a field of the config beside it.
        """
        return _config.long_rope_to_config(self, allow_loss)

    @classmethod
    def pi(
        cls,
        head_dim: int,
        theta: float,
        original_max_position_embeddings: int,
        max_position_embeddings: int,
        **kwargs: Any,
    ) -> LongRope:
        """Position interpolation beyond the original length; the original embedding up to it."""
        factor = _length_ratio(original_max_position_embeddings, max_position_embeddings)
        return cls._two(
            original_max_position_embeddings, max_position_embeddings, RopeScaling.pi(head_dim, theta, factor, **kwargs)
        )

    @classmethod
    def ntk(
        cls,
        head_dim: int,
        theta: float,
        original_max_position_embeddings: int,
        max_position_embeddings: int,
        **kwargs: Any,
    ) -> LongRope:
        """NTK-aware scaling beyond the original length; the original embedding up to it."""
        factor = _length_ratio(original_max_position_embeddings, max_position_embeddings)
        return cls._two(
            original_max_position_embeddings,
            max_position_embeddings,
            RopeScaling.ntk(head_dim, theta, factor, **kwargs),
        )

    @classmethod
    def yarn(
        cls,
        head_dim: int,
        theta: float,
        original_max_position_embeddings: int,
        max_position_embeddings: int,
        **kwargs: Any,
    ) -> LongRope:
        """YaRN beyond the original length; the original embedding up to it."""
        factor = _length_ratio(original_max_position_embeddings, max_position_embeddings)
        return cls._two(
            original_max_position_embeddings,
            max_position_embeddings,
            RopeScaling.yarn(head_dim, theta, factor, original_max_position_embeddings, **kwargs),
        )

    @classmethod
    def _two(cls, original: int, longest: int, scaling: RopeScaling) -> LongRope:
        short = scaling.replace(rescale_factors=None, start_tokens=0, attention_factor=1.0)
        return cls(original, {original: short, longest: scaling})

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, LongRope)
            and self.original_max_position_embeddings == other.original_max_position_embeddings
            and self.regimes == other.regimes
        )

    def __hash__(self) -> int:
        return hash((self.original_max_position_embeddings, tuple(self.regimes.items())))

    def __repr__(self) -> str:
        regimes = ", ".join(f"{length}: {scaling!r}" for length, scaling in self.regimes.items())
        return f"LongRope({self.original_max_position_embeddings}, {{{regimes}}})"


def check_monotone(rescale_factors: Iterable[float]) -> None:
    """Raise ValueError unless every factor is at least the one of the next faster pair (the paper's rule)."""
    factors = tuple(rescale_factors)
    for pair, (before, after) in enumerate(itertools.pairwise(factors)):
        if after < before:
            refuse("rescale_factors", f"{after} at pair {pair + 1} after {before}", "factors that never decrease")


class Tables:
    """The tensors of some regimes, stacked once and kept per device."""

    def __init__(self, scalings: tuple[RopeScaling, ...]) -> None:
        self._scalings = scalings
        self._interleaved = scalings[0].interleaved
        self._differentiable = any(scaling._factor_tensor is not None for scaling in scalings)
        with torch.inference_mode(False):
            cpu = (
                torch.stack([scaling.turns for scaling in scalings]),
                torch.stack([scaling.base_turns for scaling in scalings]),
                torch.stack([scaling.inv_freq.detach() for scaling in scalings]),
                _host([scaling.start_tokens for scaling in scalings], torch.int64),
                _host([scaling.attention_factor for scaling in scalings], torch.float32),
            )
        self._by_device = {torch.device("cpu"): cpu}

    def rotation(self, regime_index: Tensor) -> Rotation:
        """Bundle the tables with int32[batch] regimes, on the device of the latter."""
        device = regime_index.device
        tables = self._by_device.get(device)
        if tables is None:
            turns, base, inv_freq, start_tokens, factor = self._by_device[torch.device("cpu")]
            with torch.inference_mode(False):
                tables = (
                    turns.to(device),
                    base.to(device),
                    inv_freq.to(device),
                    start_tokens.to(device),
                    factor.to(device),
                )
            self._by_device[device] = tables
        turns, base, inv_freq, start_tokens, factor = tables
        if self._differentiable:
            inv_freq = torch.stack([scaling.inv_freq for scaling in self._scalings]).to(device)
        return Rotation(turns, base, inv_freq, start_tokens, factor, regime_index, self._interleaved)


def _restored(fields: dict[str, Any], factors: Tensor | None) -> RopeScaling:
    scaling = RopeScaling.from_dict(fields)
    return scaling if factors is None else scaling.replace(rescale_factors=factors)


def _host(values: Sequence[float], dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a tensor on the CPU, whatever the default device, that training may save, even if made for inference."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device="cpu")


def _positive(name: str, values: Iterable[float] | Tensor, count: int) -> tuple[float, ...]:
    if isinstance(values, Tensor):
        no_tangents(**{name: values})
        if values.is_meta:
            refuse(name, "a meta tensor", f"{count} numbers: a tensor with values, or a list")
        values = values.detach().to("cpu", torch.float64).flatten().tolist()
    try:
        result = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        refuse(name, brief(values), f"{count} numbers", TypeError)
    if len(result) != count:
        refuse(name, f"{len(result)} values", f"{count} (rotary_dim / 2)")
    for pair, value in enumerate(result):
        if not (math.isfinite(value) and value > 0):
            refuse(name, f"{value} at pair {pair}", "finite numbers > 0")
    return result


def _fields_of(fields: object, name: str = "fields") -> None:
    if not isinstance(fields, Mapping):
        refuse(name, brief(fields), "a dict, as to_dict writes it", TypeError)


def _rotary_dim(head_dim: object, options: Mapping[str, Any]) -> int:
    name, value = ("head_dim", head_dim) if options.get("rotary_dim") is None else ("rotary_dim", options["rotary_dim"])
    return integer(name, value, 2)


def _scale_factor(factor: float) -> float:
    if not (is_real(factor) and factor >= 1):
        refuse("factor", factor, "a finite number >= 1")
    return float(factor)


def _length_ratio(original: int, longest: int) -> float:
    integer("original_max_position_embeddings", original, 1)
    if not is_int(longest) or longest <= original:
        refuse("max_position_embeddings", longest, f"an int above the original length {original}")
    return longest / original
