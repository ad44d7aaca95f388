"""Tensor descriptors of keys and values: on Hopper and later a tile then comes by one bulk copy (TMA) of one thread.

Made on the host with each call, so that nothing is written on the device and Triton's allocator, which is the user's,
stays as it is. Triton has them from 3.4 on. The hardware wants addresses and strides in multiples of 16 bytes; where an
operand has others, or Triton none, the kernel reads through pointers, with the same results.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .configs import Config

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

ALIGNMENT = 16  # bytes, of addresses and strides
_MOST_STRIDE = 2**40  # bytes, excluded
_MOST_SIZE = 2**31  # a coordinate is an int32


def describe(x: Tensor, tokens: int, dims: int) -> Any | None:
    """Return a descriptor of x [B, H, T, D] for tiles [1, 1, tokens, dims]; None where there can be none.

    What a tile has beyond T or D is zero.
    """
    itemsize = x.element_size()
    # A dimension of size 1 is never stepped through: its stride is anything.
    strides = [stride if size > 1 else ALIGNMENT for size, stride in zip(x.shape, x.stride(), strict=True)]
    strides[-1] = x.stride(-1)
    fits = all(0 < stride * itemsize < _MOST_STRIDE and stride * itemsize % ALIGNMENT == 0 for stride in strides[:-1])
    sized = all(0 < size < _MOST_SIZE for size in x.shape)
    if TensorDescriptor is None or not (fits and sized and strides[-1] == 1 and x.data_ptr() % ALIGNMENT == 0):
        return None
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, tokens, dims])


NONE: dict[str, Any] = {"pair_tiles": None, "rest_tiles": None, "value_tiles": None, "TILES": False}


def key_tiles(key: Tensor, value: Tensor, config: Config, constants: dict[str, Any]) -> dict[str, Any]:
    """Return what `forward_kernel` reads whole blocks of keys through, by parameter name: `NONE` where it does not.

    Args:
        key: as its tile is, [a | b | rest] each padded: the scratch copy, or keys that do not rotate.
        constants: the launch's, of which PAIR_BLOCK, REST_BLOCK and VALUE_BLOCK say the dims of a piece.
    """
    if not config.descriptors:
        return NONE
    pieces = {"pair": key, "rest": key, "value": value}
    found = {
        f"{name}_tiles": describe(x, config.keys, dims)
        for name, x in pieces.items()
        if (dims := constants[f"{name.upper()}_BLOCK"])
    }
    return NONE if None in found.values() else NONE | found | {"TILES": True}
