"""Frequencies as 64-bit fixed-point fractions of a turn, rounded correctly from exact arithmetic.

A rotary pair of frequency `inv_freq` (radians per token) turns by `inv_freq / (2 pi)` of a full turn per token. Kept as
`F = round(2^64 * turn) mod 2^64`, the angle at position p is the integer product `p * F mod 2^64`: reduction modulo a
turn is what overflow does by itself, and the error at position p is at most p / 2^65 of a turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache

# 80 digits; the arithmetic below keeps 70.
_PI = Decimal("3.1415926535897932384626433832795028841971693993751058209749445923078164062862090")
_DIGITS = 70


@lru_cache(maxsize=64)
def base_turns(theta: float, rotary_dim: int) -> tuple[Fraction, ...]:
    """Turns per token of each pair of plain RoPE, `theta^(-2i / rotary_dim) / (2 pi)`, to about 70 digits.

    Args:
        theta: base of the frequencies, > 1.
        rotary_dim: rotated dimensions, even.

    Returns:
        rotary_dim / 2 fractions, in turns per token.
    """
    with localcontext() as context:
        context.prec = _DIGITS
        log_theta = Decimal(theta).ln()
        exponents = (-(log_theta * (2 * pair)) / rotary_dim for pair in range(rotary_dim // 2))
        return tuple(Fraction(exponent.exp() / (2 * _PI)) for exponent in exponents)


@lru_cache(maxsize=64)
def turns_of_inv_freq(inv_freq: tuple[float, ...]) -> tuple[Fraction, ...]:
    """Turns per token of frequencies given in radians per token, the float64 values taken as exact."""
    with localcontext() as context:
        context.prec = _DIGITS
        return tuple(Fraction(Decimal(value) / (2 * _PI)) for value in inv_freq)


def fixed_point(turns: Sequence[Fraction], rescale_factors: Sequence[float]) -> list[int]:
    """Return `round(2^64 * turn / factor) mod 2^64` of each pair as signed 64-bit integers.

    Args:
        turns: turns per token.
        rescale_factors: LongRoPE's lambda of each pair, taken as exact float64 values.
    """
    result = []
    for turn, factor in zip(turns, rescale_factors, strict=True):
        numerator, denominator = float(factor).as_integer_ratio()
        fixed = _round_ratio(turn.numerator * denominator << 64, turn.denominator * numerator) & (2**64 - 1)
        result.append(fixed - 2**64 if fixed >= 2**63 else fixed)
    return result


def _round_ratio(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)
