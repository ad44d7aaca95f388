"""Which tile sizes, warps and pipeline stages a kernel runs with: data, picked by pure functions of the problem.

The data is configs.json: kernel and variant, target, bits of an element, head width -> [rows, keys, warps, stages],
and true behind them where keys come through tensor descriptors, or what else ptxas is told.
`python -m bench.tune_gpu` writes it, from measurements on a GPU; until it has run on one, the figures are those that
compile without spills and within the target's shared memory, two programs on a multiprocessor where that is possible
(`make report-gpu` prints both).

Nothing here looks at a device or a length of the key cache: a sequence's bits must not depend on its neighbours or on
the slots around it. What may decide is the target, the head, the dtype and the number of query rows.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Config:
    """Rows and keys of a tile, warps of a program, stages of its software pipeline.

    With `descriptors` keys come through tensor descriptors where the operands allow it: `forward_kernel` alone. `ptxas`
    are options of NVIDIA's assembler for this tile, where Triton takes them (from 3.4 on).
    """

    rows: int
    keys: int
    warps: int
    stages: int
    descriptors: bool = False
    ptxas: str = ""

    @classmethod
    def of_list(cls, entry: list[Any]) -> Config:
        """Return what an entry of the table says."""
        rows, keys, warps, stages, *others = entry
        return cls(rows, keys, warps, stages, True in others, next((x for x in others if isinstance(x, str)), ""))

    def to_list(self) -> list[Any]:
        """The entry of the table: descriptors and options only where there are any."""
        sizes = [self.rows, self.keys, self.warps, self.stages]
        return [*sizes, *[True] * self.descriptors, *[self.ptxas] * bool(self.ptxas)]


# Keys of a run of split-key attention, counted from a sequence's first key. 512 keys of bf16 and head_dim 128 are
# 256 kB, a partial result of 8 rows is 4 kB, and 128k keys with 8 key heads make 2,048 programs.
SPLIT_KEYS = 512
MOST_SPLITS = 2**16 - 1  # programs along a grid's second axis
# Up to this many rows (query tokens x query heads that share a key head) keys are split: one row block sees them all.
SPLIT_ROWS = 64
# Keys are rotated in the tile up to this many rows, see `rotates_in_tile`.
IN_TILE_ROWS = 256

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "interpreter")
TABLE = pathlib.Path(__file__).with_name("configs.json")
DESCRIPTOR_TARGETS = ("sm_90", "sm_100", "interpreter")  # whose hardware has them, and what imitates it
# Chips that run the tiles of another row: Ada and generation 12 have the instructions of Ampere, and the shared memory
# of sm_86, 99 KB a program, which the row of sm_80 keeps to.
TILES_OF = {"sm_89": "sm_80"}
_FP8_TARGETS = ("sm_89", "sm_90", "sm_100")  # those that convert e4m3 themselves
WIDTHS = (64, 128, 256, 512)  # head widths of the table: the smallest that holds the head is taken
KERNELS = (
    "forward",
    "forward extras",
    "forward int8",
    "forward fp8",
    "decode",
    "decode int8",
    "decode fp8",
    "split 16",
    "split 32",
    "split 64",
    "backward query",
    "backward query extras",
    "backward key",
    "backward key extras",
)
# The interpreter's tiles are as small as they can be with every branch of a kernel taken in a small test.
_INTERPRETER = {
    "forward": Config(64, 32, 4, 1),
    "decode": Config(16, 32, 4, 1),
    "backward query": Config(64, 32, 4, 1),
    "backward key": Config(32, 64, 4, 1),
}


def pad(dims: int) -> int:
    """Dims of a tile: a power of two that tl.dot takes, or 0 for none."""
    return 0 if dims == 0 else max(16, 1 << (dims - 1).bit_length())


def width(head_dim: int, pairs: int) -> int:
    """Dims of a row of the scratch layout, [a | b | rest], each padded."""
    return 2 * pad(pairs) + pad(head_dim - 2 * pairs)


def has_fp8(target: str) -> bool:
    """Whether a target has e4m3 as caches keep it."""
    return target in _FP8_TARGETS


def splits_keys(rows: int) -> bool:
    """Whether the keys are split over programs: few rows cannot fill a GPU otherwise."""
    return rows <= SPLIT_ROWS


def shares_rotations(query_tokens: int, group: int, key_positions: bool) -> bool:
    """Whether `decode_kernel` takes a call whose keys are split: one angle for all rows, keys in order."""
    return query_tokens == 1 and group <= 16 and not key_positions


def rotates_in_tile(rows: int) -> bool:
    """Whether keys are rotated where they are read, or once into a scratch copy.

    In the tile a key is rotated once per row block: about 35 operations a pair on the general cores, beside 2 * rows
    multiply-adds a pair of the first product on the tensor cores. At 128 rows and a ratio of rates near 16 (dense bf16
    to fp32 on sm_80 and sm_90) that is as long again as the product itself, and it does not overlap well, being
    upstream of it. A scratch copy costs 4 head_dim bytes of traffic a key (1.4 us for 1,000 keys of 8 heads of 128 at
    3 TB/s) and a launch, about 3 us, once. One or two blocks of 128 rows spend no more on rotating twice than on the
    copy.
    """
    return rows <= IN_TILE_ROWS


@functools.cache
def table() -> dict[str, dict[str, dict[str, dict[str, list[Any]]]]]:
    """Return the data, read once."""
    return json.loads(TABLE.read_text())


def _chosen(kernel: str, target: str, head_width: int, itemsize: int) -> Config:
    if target == "interpreter":
        return _INTERPRETER[kernel.removesuffix(" extras").removesuffix(" int8").removesuffix(" fp8")]
    at = next(width for width in WIDTHS if width >= head_width)
    return Config.of_list(table()[kernel][TILES_OF.get(target, target)][str(8 * itemsize)][str(at)])


_by_descriptors: bool | None = None  # None: as the table says


@contextlib.contextmanager
def by_descriptors(wanted: bool) -> Iterator[None]:
    """Have `forward` take tensor descriptors where the target has them, or pointers: for benchmarks and tests."""
    global _by_descriptors
    before, _by_descriptors = _by_descriptors, wanted
    try:
        yield
    finally:
        _by_descriptors = before


def forward(target: str, head_width: int, itemsize: int, plain: bool, quantised: str = "") -> Config:
    """Configuration of `forward_kernel`.

    Args:
        head_width: the larger of the padded row and the padded head.
        plain: no softcap and no rotation in the tile, which want registers of their own.
        quantised: "int8" or "fp8" for a cache of those, which are dequantised in registers.
    """
    variant = f"forward {quantised}" if quantised else "forward" if plain else "forward extras"
    config = _chosen(variant, target, head_width, itemsize)
    if _by_descriptors is not None:
        config = replace(config, descriptors=_by_descriptors and target in DESCRIPTOR_TARGETS)
    return config


def decode(target: str, head_width: int, itemsize: int, quantised: str = "") -> Config:
    """Configuration of `decode_kernel`: one token, 16 rows; `quantised` as in `forward`."""
    return _chosen(f"decode {quantised}" if quantised else "decode", target, head_width, itemsize)


def forward_split(target: str, head_width: int, itemsize: int, rows: int) -> Config:
    """Configuration of `forward_kernel` where it splits keys, and rotates them in the tile."""
    block = min(SPLIT_ROWS, pad(rows))
    if target == "interpreter":
        return Config(block, 32, 4, 1)
    return _chosen(f"split {block}", target, head_width, itemsize)


def backward_query(target: str, head_width: int, itemsize: int, extras: bool) -> Config:
    """Configuration of the kernel that computes d query: rows stay, keys pass.

    `extras`: a softcap or the gradient of the frequencies, which want registers of their own.
    """
    return _chosen("backward query extras" if extras else "backward query", target, head_width, itemsize)


def backward_key(target: str, head_width: int, itemsize: int, extras: bool) -> Config:
    """Configuration of the kernel that computes d key and d value: keys stay, rows pass."""
    return _chosen("backward key extras" if extras else "backward key", target, head_width, itemsize)


def delta(target: str) -> Config:
    """Configuration of `delta_kernel`: `rows` are tokens; keys have no meaning."""
    return Config(64 if target == "interpreter" else 32, 0, 4, 1)


def rotate(target: str, head_width: int) -> Config:
    """Configuration of `rotate_kernel`: `rows` are tokens; keys have no meaning."""
    if target == "interpreter":
        return Config(64, 0, 4, 1)
    return Config(32 if head_width <= 128 else 16, 0, 4 if head_width <= 64 else 8, 1)


def append() -> Config:
    """Configuration of `append_kernel` and `tail_kernel`: `keys` are those of a group of a quantised cache."""
    return Config(0, 64, 4, 1)
