"""What a tile costs each unit of a multiprocessor, from the machine code of the CUDA kernels: nothing here is measured.

    python -m bench.report_cuda [--source PART] [--target T] [--write]

Each kernel is compiled by nvcc (cached by content in build/nvcc, as tests/test_cuda_build.py does) and disassembled. Of
its loop over tiles the way is counted that an unmasked, uncapped tile takes: the shortest which leaves out no product.
Cycles are of one multiprocessor: the instructions of all warps of a block, times what one occupies its unit (`RATES`).
What is largest binds. Where a kernel has no products, the way with all its global loads and stores is counted.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import itertools
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "nvcc"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
# Sources that convert fp8, which have binaries for sm_89 of their own.
CONVERTERS = ("cache_append.cu", "prepare_keys.cu", "sm80/attention_decode_fp8.cu")


def cuobjdump() -> str | None:
    """The disassembler of the CUDA toolkit, or the one that Triton brings."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = shutil.which("cuobjdump", path=str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return found


def compiled(source: str, target: str) -> tuple[Path, str]:
    """Return the cubin of a kernel file for a target and what ptxas said about it; cached by content."""
    folders = (SOURCES, ROOT / "csrc" / "core")
    headers = sorted(x for folder in folders for x in folder.rglob("*") if x.suffix in (".h", ".cuh"))
    path = SOURCES / source
    digest = hashlib.sha256(b"".join(x.read_bytes() for x in [*headers, path]) + str(NVCC).encode()).hexdigest()[:20]
    cubin = CACHE / f"{path.stem}-{target}-{digest}.cubin"
    report = cubin.with_suffix(".txt")
    if not report.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        arch = f"-gencode=arch={target.replace('sm', 'compute')},code={target}"
        command = [str(NVCC), "-std=c++17", "-O3", arch, "-cubin", "-Xptxas", "-v", str(path), "-o", str(cubin)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        report.write_text(result.stdout + result.stderr)
    return cubin, report.read_text()


def disassembled(cubin: Path) -> str:
    """Return the SASS of a cubin without the encodings; cached beside it."""
    text = cubin.with_suffix(".sass")
    if not text.exists():
        command = [str(cuobjdump()), "-sass", str(cubin)]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        part = text.with_suffix(".part")
        part.write_text(re.sub(r"[ \t]*/\* 0x[0-9a-f]{16} \*/[ \t]*\n?", "\n", found))
        part.replace(text)
    return text.read_text()


def functions(code: str) -> dict[str, str]:
    """Return the SASS of each kernel, by mangled name."""
    return {x.split(maxsplit=1)[0]: x for x in code.split("Function : ")[1:]}


def instructions_of(code: str) -> list[tuple[int, str]]:
    """Return a kernel's instructions with their addresses."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+\s+)?[A-Z][^;]*);", code)
    return [(int(address, 16), text.strip()) for address, text in found]


class Code:
    """A kernel's instructions and where each may go on."""

    def __init__(self, sass: str) -> None:
        found = instructions_of(sass)
        self.texts = [text for _, text in found]
        self.place = {address: i for i, (address, _) in enumerate(found)}
        self.following = [self._following(i) for i in range(len(found))]
        self.capped = self._capped()

    def _following(self, i: int) -> list[int]:
        text = self.texts[i]
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        following = [self.place[int(target[1], 16)]] if target else []
        if i + 1 < len(self.texts) and not re.match(r"(EXIT|RET|BRA(\.U)? [^!UP])", text):
            following.append(i + 1)
        return following

    def _capped(self) -> set[int]:
        """Return the instructions of runs that take a tanh, an exp2 and a reciprocal each."""
        starts = {j for i, following in enumerate(self.following) if following != [i + 1] for j in (*following, i + 1)}
        bounds = sorted({0, *starts, len(self.texts)})
        runs = [range(a, b) for a, b in itertools.pairwise(bounds)]
        both = ("MUFU.EX2", "MUFU.RCP")
        return {i for run in runs if all(any(x in self.texts[i] for i in run) for x in both) for i in run}

    def matches(self, pattern: str) -> list[bool]:
        return [bool(re.search(pattern, text)) for text in self.texts]

    def reached(self, without: int) -> set[int]:
        """Return what can be reached from the start by ways that leave one instruction out."""
        seen, open_ = set(), [0]
        while open_:
            i = open_.pop()
            if i == without or i in seen:
                continue
            seen.add(i)
            open_ += self.following[i]
        return seen

    def loops(self) -> list[tuple[int, int]]:
        """Return first and last of each loop, the shortest first.

        A jump back makes a loop where no way leads past its first instruction to the jump: code put at the end for a
        wait that lasts jumps back too.
        """
        reachable = self.reached(-1)
        found = [
            (to, i)
            for i, following in enumerate(self.following)
            for to in following
            if to < i and i in reachable and i not in self.reached(to)
        ]
        return sorted(found, key=lambda x: x[1] - x[0])

    def way(self, first: int, last: int, needed: str, enough: int = 1 << 30) -> list[str]:
        """Return the shortest way from one instruction to another of those with most of what is needed, up to enough.

        Jumps back are not taken, so a loop inside is gone through once. Subroutines, divisions of numbers past 32 bits,
        are taken where there is no other way, and no score is capped. Empty where there is none.
        """
        wanted = self.matches(needed)
        lengths = [1 + SUBROUTINE * ("CALL" in text) for text in self.texts]
        ways = {last: (-wanted[last], lengths[last], last)}  # the needed, negative; the length; where to
        for i in range(last - 1, first - 1, -1):
            reached = [(ways[j][0], ways[j][1], j) for j in self.following[i] if j > i and j in ways]
            if i in self.capped:
                continue
            if reached:
                count, length, j = min(reached)
                ways[i] = (max(count - wanted[i], -enough), length + lengths[i], j)
        if first not in ways:
            return []
        found = [first]
        while found[-1] != last:
            found.append(ways[found[-1]][2])
        return [self.texts[i] for i in found]

    def whole(self, needed: str) -> list[str]:
        """Return the way from the start to the last EXIT."""
        return self.way(0, max(i for i in self.reached(-1) if "EXIT" in self.texts[i]), needed)


PRODUCTS, ACCESSES = r"\bHG?MMA\b", r"\b(LDG|STG)\b"
SUBROUTINE = 200


def operations(text: str) -> int:
    """Return the multiply-adds of an instruction of a warp."""
    group = re.search(r"HGMMA\.64x(\d+)x16", text)
    return 64 * int(group[1]) * 16 // 4 if group else 16 * 8 * 16 * ("HMMA" in text)


def loop_of_products(sass: str, wanted: int, also: str = "LDGSTS", enough: int = 1 << 30) -> list[str]:
    """Return the way through the smallest loop that multiplies and adds `wanted` times in each warp.

    Args:
        also: what is needed besides products, a pattern.
        enough: how many of it and of products.

    Raises:
        ValueError: one line, where there is none.
    """
    code = Code(sass)
    for loop in code.loops():
        way = code.way(*loop, rf"{PRODUCTS}|{also}", enough)
        if sum(map(operations, way)) == wanted:
            return way
    raise ValueError(f"no loop with {wanted} multiply-adds of a warp")


def loop_of_accesses(sass: str, needed: str) -> list[str]:
    """Return the way through the smallest loop with most accesses of a kind, or through all where no loop has any."""
    code = Code(sass)
    ways = [code.way(*loop, needed) for loop in code.loops()]
    counts = [sum(bool(re.search(needed, x)) for x in way) for way in ways]
    return ways[counts.index(max(counts))] if any(counts) else code.whole(needed)


@dataclass(frozen=True)
class Rates:
    """Of one multiprocessor: cycles that an instruction of a warp takes on each unit, bytes a cycle."""

    tensor_operations: float  # multiply-adds a cycle by mma.sync
    group_operations: float  # by wgmma
    fp32_lanes: int
    l2_bytes: float  # infinite where nobody says
    memory_bytes: float
    memory: str  # whose


# 4 schedulers issue an instruction of a warp each; 16 exp2 and 128 bytes of shared memory a cycle on all of them, 64 or
# 128 fp32 operations: CUDA C++ Programming Guide, arithmetic instructions and compute capabilities. Tensor cores: the
# A100's and H100's whitepapers, 312 TFLOP/s of 108 multiprocessors at 1.41 GHz, 989 of 132 at 1.83; mma.sync on Hopper
# reaches 0.62 of wgmma (Luo et al. 2024, arXiv:2402.13499); datasheets of the A10, 125 of 72 at 1.695, and of the L40S,
# 362 of 142 at 2.52 (GeForce cards of these chips have half of it with fp32 accumulators). L2: 5,120 bytes a clock
# (A100); some 30 a multiprocessor on Hopper. Memory: 2,039 GB/s (A100 80 GB), 4,800 (H200), 600 (A10), 864 (L40S) over
# all multiprocessors.
RATES = {
    "sm_80": Rates(1024, 0, 64, 47, 13.4, "A100 80 GB"),
    "sm_86": Rates(512, 0, 128, math.inf, 4.9, "A10"),
    "sm_89": Rates(512, 0, 128, math.inf, 2.4, "L40S"),
    "sm_90": Rates(0.62 * 2048, 2048, 128, 30, 21, "H200"),
}


TARGETS = ("sm_80", "sm_90", "sm_90a")  # what is said of all kernels; sm_86 and sm_89 run binaries of sm_80


def rates_of(target: str) -> Rates:
    """Return the rates of a target: sm_80, sm_86, sm_89, sm_90 or sm_90a."""
    return RATES[target.removesuffix("a")]


def binary_of(source: str, target: str) -> str:
    """Return the target that a source's binary for a GPU is built for; sources that convert fp8 have one for sm_89."""
    return "sm_80" if target == "sm_86" or (target == "sm_89" and source not in CONVERTERS) else target


SHARED_BYTES, EXP2_LANES, SCHEDULERS = 128, 16, 4
UNITS = ("issue", "fp32", "tensor cores", "exp2", "shared memory", "L2", "memory")
KINDS = ("products", "exp2", "shared memory", "copies")
FP32 = r"^(FADD|FMUL|FFMA|FMNMX|FSETP|FSEL|FSET)\b"


def bytes_of(text: str) -> int:
    """Return the bytes that a warp's access to shared or global memory moves."""
    if "LDSM" in text:
        return 128 * int((re.search(r"\.(\d)\b", text) or "11")[1])
    width = re.search(r"\.(128|64|U16|S16|16|U8|S8|8)\b", text)
    return 4 * int(re.sub(r"\D", "", width[1])) if width else 128


@dataclass(frozen=True)
class Cost:
    """Cycles of a multiprocessor for one tile, by unit, and the instructions of a warp that make them, by kind."""

    instructions: int
    kinds: dict[str, int]
    cycles: dict[str, float]

    @property
    def bound(self) -> str:
        return max(self.cycles, key=lambda unit: self.cycles[unit])


def cost(way: list[str], target: str, warps: float, counted: str = "^$", lanes: float = 1.0) -> Cost:
    """Return what `warps` warps that go this way cost.

    Args:
        counted: which accesses to global memory move bytes, a row's; others read what all share.
        lanes: share of the lanes that they have something for.
    """
    rates = rates_of(target)
    cycles = dict.fromkeys(UNITS, 0.0)
    kinds = dict.fromkeys(KINDS, 0)
    for predicated in way:
        cycles["issue"] += 1 / SCHEDULERS
        if predicated.startswith("@!PT"):
            continue  # never done
        text = re.sub(r"^@!?U?P\w+\s+", "", predicated)
        name = text.split(maxsplit=1)[0]
        if name.startswith("HGMMA"):
            columns = int(re.search(r"64x(\d+)x16", name)[1])  # type: ignore[index]
            kinds["products"] += 1
            cycles["tensor cores"] += 64 * columns * 16 / rates.group_operations / 4
            from_registers = re.search(r"HGMMA\S+ R\d+, R\d+, gdesc", text)
            cycles["shared memory"] += (columns * 32 + (0 if from_registers else 64 * 32)) / SHARED_BYTES / 4
        elif name.startswith("HMMA"):
            kinds["products"] += 1
            cycles["tensor cores"] += 16 * 8 * 16 / rates.tensor_operations
        elif name.startswith("MUFU"):
            kinds["exp2"] += 1
            cycles["exp2"] += 32 / EXP2_LANES
        elif re.match(r"(LDS|STS|LDSM)\b", name):
            kinds["shared memory"] += 1
            cycles["shared memory"] += bytes_of(text) / SHARED_BYTES
        elif name.startswith("LDGSTS"):
            kinds["copies"] += 1
            cycles["shared memory"] += bytes_of(text) / SHARED_BYTES
            cycles["L2"] += bytes_of(text) / rates.l2_bytes
        elif re.match(r"(LDG|STG)\b", name) and re.search(counted, text):
            kinds["copies"] += 1
            cycles["memory"] += bytes_of(text) * lanes / rates.memory_bytes
        elif re.match(FP32, name):
            cycles["fp32"] += 32 / rates.fp32_lanes
    return Cost(len(way), kinds, {unit: warps * x for unit, x in cycles.items()})


@dataclass(frozen=True)
class Tile:
    """A kernel with products, and the tile that its loop works on.

    Attributes:
        products: of rows, keys and head_dim, that it has.
        warps: that take part; where two kinds of warps share the products, half of them go each of `ways`.
        columns: that bulk copies bring of each row, zeros past head_dim among them; 0 where there are none.
        ways: what a way must have besides the products; one for each kind.
        stored_bytes: of an element of a cache that is decoded, its scales among them.
    """

    label: str
    source: str
    target: str
    name: str  # part of the mangled one
    head_dim: int
    rows: int
    keys: int
    products: int
    warps: int
    columns: int = 0
    ways: tuple[str, ...] = ("LDGSTS",)
    stored_bytes: float = 0.0

    def cost(self) -> Cost:
        """Count the loop's instructions."""
        width = 256 if self.head_dim > 128 else self.head_dim
        wanted = self.products * self.rows * self.keys * width // self.warps
        sass = function_of(self.source, self.target, self.name)
        enough = 1 << 30
        if self.stored_bytes:  # not the copies of all layouts: those of whole rows, 16 bytes of a thread each
            copies = 2 * self.keys * self.head_dim * int(self.stored_bytes) // (16 * 32 * self.warps)
            enough = wanted // operations("HMMA") + copies
        parts = [
            cost(loop_of_products(sass, wanted, also, enough), self.target, self.warps / len(self.ways))
            for also in self.ways
        ]
        if self.stored_bytes:  # a cache is read from memory
            read = 2 * self.keys * self.head_dim * self.stored_bytes
            cycles = parts[0].cycles | {"L2": 0.0, "memory": read / rates_of(self.target).memory_bytes}
            return replace(parts[0], cycles=cycles)
        moved = 4 * (self.rows if self.label == "dk, dv" else self.keys)  # bytes of a column of two operands
        return total(parts, moved * self.columns, moved * min(self.columns, self.head_dim), self.target)

    def useful(self) -> float:
        """Return the cycles of the tensor cores at their full rate."""
        rates = rates_of(self.target)
        full = rates.group_operations or rates.tensor_operations
        return self.products * self.rows * self.keys * self.head_dim / full


def total(parts: list[Cost], stored: int, read: int, target: str) -> Cost:
    """Return what the kinds of warps cost together, and bulk copies beside them that read and store so many bytes."""
    rates = rates_of(target)
    cycles = {unit: sum(x.cycles[unit] for x in parts) for unit in UNITS}
    cycles["shared memory"] += stored / SHARED_BYTES
    cycles["L2"] += read / rates.l2_bytes
    return replace(max(parts, key=lambda x: x.instructions), cycles=cycles)


def function_of(source: str, target: str, name: str) -> str:
    """Return the SASS of the one kernel of bf16 whose mangled name has a part."""
    kernels = of_file(source, binary_of(source, target))
    found = [x for mangled, x in kernels.items() if name in mangled and "Half" not in mangled]
    if len(found) != 1:
        raise ValueError(f"{source} for {target}: {len(found)} kernels of bf16 with {name!r}, expected one")
    return found[0]


@functools.cache
def of_file(source: str, target: str) -> dict[str, str]:
    """Return the kernels of a source."""
    return functions(disassembled(compiled(source, target)[0]))


def tiles() -> Iterator[Tile]:
    """Every kernel with products, as bf16 of each head_dim takes it."""
    forward, backward, wide = (f"attention_{x}.cu" for x in ("forward", "backward", "backward_wide"))
    bf16 = "INS_12BFloat16BitsE"
    for target in ("sm_80", "sm_86", "sm_89"):
        little = target != "sm_80"  # shared memory of a multiprocessor, by which a launch chooses
        for dim, keys in ((64, 64), (96, 32), (128, 32), (256, 32 if little else 64)):
            name = f"attention_forward_kernel{bf16}Li{dim}ELi{keys}E"
            yield Tile("forward", f"sm80/{forward}", target, name, dim, 128, keys, 2, 4 if dim <= 128 else 8)
        for dim in (64, 96, 128):
            keys, rows = 32 if little and dim == 128 else 64, 64 if dim <= 64 else 32
            name = f"query_gradient_kernel{bf16}Li{dim}ELi{keys}E"
            yield Tile("dq", f"sm80/{backward}", target, name, dim, 64, keys, 3, 4)
            yield Tile("dk, dv", f"sm80/{backward}", target, f"key_gradient_kernel{bf16}Li{dim}E", dim, rows, 64, 4, 4)
        teams, rows = (r"LDGSTS|MUFU\.EX2", r"LDGSTS"), 16 if little else 32
        yield Tile("dq", f"sm80/{wide}", target, f"wide_query_gradient_kernel{bf16}", 256, 64, 32, 3, 8, 0, teams)
        name = f"wide_key_gradient_kernel{bf16}Li{rows}E"
        yield Tile("dk, dv", f"sm80/{wide}", target, name, 256, rows, 64, 4, 8, 0, teams)
    caches = (
        ("16 bits", "attention_decode.cu", "S1_", 2.0),
        ("int8", "attention_decode_int8.cu", "a", 1.03),
        ("fp8", "attention_decode_fp8.cu", "NS_3Fp8E", 1.03),
    )
    for target, cache, dim in itertools.product(RATES, caches, (64, 96, 128, 256)):
        stored, source, mangled, size = cache
        keys = 64 if dim <= 128 else 32
        name = f"attention_decode_kernel{bf16}Li{dim}E{mangled}E"
        shape = (dim, 16, keys, 2, keys // 16, 0, (r"LDGSTS.*\.128",))
        yield Tile(f"decode, {stored}", f"sm80/{source}", target, name, *shape, size)
    for dim in (64, 96, 128, 256):
        boxes = -(-dim // 64) * 64  # columns that come, in boxes of 64
        keys = 128 if dim <= 128 else 64
        name = f"attention_forward_sm90_kernel{bf16}Li{dim}E"
        yield Tile("forward", f"sm90/{forward}", "sm_90a", name, dim, 128, keys, 2, 8, boxes)
    for dim in (64, 96, 128):
        boxes, rows = -(-dim // 64) * 64, 128 if dim <= 64 else 64
        name = f"gradient_sm90_kernel{bf16}Li{dim}E"
        source = f"sm90/{backward}"
        yield Tile("dq", source, "sm_90a", f"query_{name}", dim, 128, 128, 3, 8, boxes)
        yield Tile("dk, dv", source, "sm_90a", f"key_{name}", dim, rows, 128, 4, 8, boxes)
    name = f"query_gradient_sm90_kernel{bf16}Li256E"
    yield Tile("dq", f"sm90/{wide}", "sm_90a", name, 256, 128, 64, 3, 8, 256)
    name = f"wide_key_gradient_sm90_kernel{bf16}"
    groups = (r"STS\.128", r"LDS\.128")
    yield Tile("dk, dv", f"sm90/{wide}", "sm_90a", name, 256, 64, 64, 4, 8, 256, groups)


@dataclass(frozen=True)
class Stream:
    """A kernel without products: what its way moves, all lanes at work but a share of them."""

    label: str
    source: str
    name: str
    step: str
    needed: str = rf"{ACCESSES}.*\.128\b"
    lanes: float = 1.0

    def cost(self, target: str) -> Cost:
        """Count the instructions of a warp."""
        found = function_of(self.source, target, self.name)
        return cost(loop_of_accesses(found, self.needed), target, 1, self.needed, self.lanes)


def streams() -> Iterator[Stream]:
    """Every kernel that is bound by what it moves."""
    bf16 = "INS_12BFloat16BitsE"
    yield Stream("rope", "rope.cu", f"rope_kernel{bf16}Lb1E", "16 pairs of a lane, in a loop over heads")
    yield Stream("keys, rotated", "prepare_keys.cu", f"prepare_keys_kernel{bf16}Lb1E", "16 pairs of a lane")
    yield Stream("queries, rotated", "prepare_keys.cu", f"prepare_queries_kernel{bf16}Lb1E", "16 pairs of a lane")
    yield Stream("values, gathered", "prepare_keys.cu", f"gather_values_kernel{bf16}", "8 dims of a lane")
    for dim in (64, 96, 128, 256):
        lanes = 8 if dim <= 64 else 16 if dim <= 128 else 32  # of a row
        name, step = f"attention_delta_kernel{bf16}Li{lanes}E", f"{4 * 32 // lanes} rows of {dim}"
        yield Stream("delta", "attention_delta.cu", name, step, lanes=dim / 8 / lanes)
    anything = rf"{ACCESSES}"
    yield Stream("combine", "attention_combine.cu", f"attention_combine_kernel{bf16}", "partial results", anything)
    yield Stream("append", "cache_append.cu", f"append_plain_kernel{bf16}", "8 dims of a lane")
    halved = r"\bLDG.*\.128\b|\bSTG.*\.64\b"
    for stored, mangled in (("int8", "a"), ("fp8", "NS_3Fp8E")):
        name = f"kernel{bf16.removesuffix('E')}E{mangled}Li16E"
        yield Stream(f"append {stored}, keys", "cache_append.cu", f"quantise_groups_{name}", "64 tokens", halved)
        yield Stream(f"append {stored}, values", "cache_append.cu", f"quantise_values_{name}", "tokens", halved)


def table_of_tiles(rows: list[Tile]) -> list[str]:
    """Return a table of the kernels with products, and what both kernels of a backward pass come to together."""
    lines = [
        f"| kernel | head_dim | rows x keys | instructions ({', '.join(KINDS)}) | {' | '.join(UNITS)} | bound by "
        "| of the tensor cores |",
        "|" + "---|" * (len(UNITS) + 6),
    ]
    query: tuple[Tile, Cost] | None = None
    for row in rows:
        found = row.cost()
        units = " | ".join(f"{found.cycles[x]:,.0f}" if found.cycles[x] else "" for x in UNITS)
        kinds = ", ".join(str(x) for x in found.kinds.values())
        most = found.cycles[found.bound]
        share = f"{row.useful() / most:.0%}"
        if row.stored_bytes:
            share = f"{found.cycles['memory'] / most:.0%} of memory"
        lines.append(
            f"| {row.target} {row.label} | {row.head_dim} | {row.rows} x {row.keys} | {found.instructions} ({kinds}) "
            f"| {units} | {found.bound} | {share} |"
        )
        if row.label == "dq":
            query = row, found
        if row.label == "dk, dv" and query is not None:
            # Both recompute the scores: seven products where the usual count has five.
            scores = [x.rows * x.keys for x in (row, query[0])]
            spent = most / scores[0] + query[1].cycles[query[1].bound] / scores[1]
            five = 5 * row.useful() / row.products / scores[0]
            blank = " | ".join("" for _ in UNITS)
            name = f"| {row.target} backward, of five products | {row.head_dim} | | | {blank} | | {five / spent:.0%} |"
            lines.append(name)
    return lines


def table_of_streams(rows: list[Stream], targets: list[str]) -> list[str]:
    """Return a table of the kernels without products."""
    lines = ["| kernel | what a warp does | instructions | issue | memory | bound by |", "|---|---|---|---|---|---|"]
    for row, target in itertools.product(rows, targets):
        found = row.cost(target)
        issue, memory = (found.cycles[x] for x in ("issue", "memory"))
        lines.append(
            f"| {target} {row.label} | {row.step} | {found.instructions} | {issue:.0f} | {memory:.0f} | {found.bound} |"
        )
    return lines


DOCUMENT = ROOT / "docs" / "cuda.md"
BEGIN, END = "<!-- report_cuda -->\n", "<!-- /report_cuda -->\n"


def compiler() -> str:
    """Return nvcc's version, on which the counts depend."""
    said = subprocess.run([str(NVCC), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", said)[1]  # type: ignore[index]


def written() -> str:
    """Return the tables as docs/cuda.md has them."""
    lines = [f"By nvcc {compiler()}, bf16:", "", *table_of_tiles([x for x in tiles() if x.target in TARGETS]), ""]
    return "\n".join([*lines, *table_of_streams(list(streams()), ["sm_80", "sm_90"]), ""])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="", help="kernels whose file's name has this part")
    parser.add_argument("--target", choices=(*RATES, "sm_90a"), help="one target only")
    parser.add_argument("--write", action="store_true", help="put all tables into docs/cuda.md")
    arguments = parser.parse_args()
    if NVCC is None or cuobjdump() is None:
        missing = "nvcc" if NVCC is None else "cuobjdump (the CUDA toolkit and Triton have one)"
        sys.exit(f"bench.report_cuda: {missing} not found")
    if arguments.write:
        before, rest = DOCUMENT.read_text().split(BEGIN)
        DOCUMENT.write_text(before + BEGIN + written() + END + rest.split(END)[1])
        return
    wanted = [arguments.target] if arguments.target else TARGETS
    some = [x for x in tiles() if arguments.source in x.source and x.target in wanted]
    targets = [x for x in ("sm_80", "sm_90") if x in wanted]
    others = [x for x in streams() if arguments.source in x.source] if targets else []
    print("\n".join(table_of_tiles(some) * bool(some) + table_of_streams(others, targets) * bool(others)))


if __name__ == "__main__":
    main()
