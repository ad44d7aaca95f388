"""What the Triton kernels compile to, on a machine without a GPU: registers, spills, shared memory, instructions.

    python -m bench.report_gpu [--quick] [--json FILE] [--target T] [--op OP]
    python -m bench.report_gpu --ceilings

Each kernel is compiled as a call on a GPU would launch it: the launches come from the backend's own plans, made for
tensors on the meta device. Triton caches what it compiles by source, so a second run is quick. What a kernel must not
have (`Report.faults`) is listed behind the table, and then the exit status is 1.

What the kernels may take on gfx942 is in ceilings.json, for one version of Triton; with others nothing is compared.
--ceilings compiles everything for gfx942 and writes what it takes now.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from triton.backends.amd.compiler import HIPBackend
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longrope_kernels.backends.triton import configs, plans, plans_backward
from longrope_kernels.backends.triton.configs import Config
from longrope_kernels.backends.triton.launch import BLACKWELL, TRITON, Launch
from longrope_kernels.bundles import KEY_GROUP, Geometry, Packing, Pages, Rotation


def _left_out() -> dict[str, str]:
    """Return the targets that this Triton does not compile for, and why."""
    reasons = {}
    if TRITON < BLACKWELL:
        reasons["sm_100"] = f"Triton {triton.__version__} does not know it"
    # Triton 3.2 and 3.3 link with an ld.lld of ROCm; 3.5 brings its own.
    if hasattr(HIPBackend, "path_to_rocm_lld"):
        try:
            HIPBackend.path_to_rocm_lld()
        except Exception as error:  # Triton raises no other
            reasons["gfx942"] = str(error)
    return reasons


LEFT_OUT = _left_out()
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
for _target in LEFT_OUT:
    del TARGETS[_target]
TILES_OF = {"sm_89": GPUTarget("cuda", 89, 32)}  # chips with the configurations of another target
# Shared memory that one program may have, in bytes. The tiles of sm_80, which has 163 KB, are those of sm_86, sm_89 and
# generation 12 too, which have 99.
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}
# The kernels that multiply matrices. In one of 16 bits the tensor cores must do it.
MATMUL_KERNELS = ("forward_kernel", "decode_kernel", "backward_query_kernel", "backward_key_kernel")
WARP_MATMUL = re.compile("[HIQ]MMA")  # SASS of mma.sync
GROUP_MATMUL = re.compile("[HIQ]GMMA|UTC[A-Z]+MMA")  # of wgmma and of tcgen05.mma
GROUP_ROWS = 64  # of the least product that wgmma computes
# What the committed ceilings hold a kernel to.
CEILINGS = pathlib.Path(__file__).with_name("ceilings.json")
CEILING_TARGET = "gfx942"
BOUNDED = (
    "registers",
    "accumulators",
    "vector_spills",
    "scalar_spills",
    "spill_bytes",
    "shared_bytes",
    "instructions",
)


@functools.cache
def ceilings() -> dict[str, dict[str, int]]:
    """What each kernel may take on gfx942, by `Report.name`; none where the file is of another Triton than this."""
    content = json.loads(CEILINGS.read_text())
    return content["kernels"] if content["triton"] == triton.__version__ else {}


def write_ceilings(rows: Iterable[Report]) -> None:
    """Commit to what the reports say."""
    lines = [f"  {json.dumps(row.name)}: {json.dumps({name: getattr(row, name) for name in BOUNDED})}" for row in rows]
    kernels = ",\n".join(sorted(lines))
    CEILINGS.write_text(f'{{\n "triton": "{triton.__version__}",\n "kernels": {{\n{kernels}\n }}\n}}\n')
    ceilings.cache_clear()


QUANTISED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # caches, by the first word of an op


@dataclass(frozen=True)
class Case:
    """One call: its head, dtype and features."""

    target: str
    op: str  # one of OPS
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    rotary_dim: int | None = None
    interleaved: bool = False
    general: bool = False  # window, softcap, explicit positions, padding, and the gradient of the frequencies

    @property
    def quantised(self) -> torch.dtype | None:
        """What the case's cache holds, where that is another format than its dtype."""
        return QUANTISED.get(self.op.split()[0])

    @property
    def label(self) -> str:
        """The case in words, without its target."""
        extra = [f"rotary {self.rotary_dim}"] * (self.rotary_dim is not None)
        extra += ["interleaved"] * self.interleaved + ["general"] * self.general
        return ", ".join([self.op, f"head_dim {self.head_dim}", str(self.dtype).removeprefix("torch."), *extra])


def launches(case: Case) -> list[Launch]:
    """Return what the call launches on the case's target."""
    meta: dict[str, Any] = {"device": "meta"}
    batch, query_heads, key_heads, tokens = 1, 32, 8, 16384
    rotary_dim = case.head_dim if case.rotary_dim is None else case.rotary_dim
    queries = {"decode": 1, "decode at positions": 1, "in tile": 40, "pages": 1}
    queries |= {"8 tokens": 8, "16 tokens": 16}  # of 4 heads to a key head: blocks of 32 and 64 rows
    for kind in QUANTISED:
        queries |= {kind: 1, f"{kind} in tile": 40, f"{kind} 16 tokens": 16}
    rows = queries.get(case.op, tokens)
    query = torch.empty(batch, query_heads, rows, case.head_dim, dtype=case.dtype, **meta)
    key = torch.empty(batch, key_heads, tokens, case.head_dim, dtype=case.dtype, **meta)
    table = torch.empty(2, rotary_dim // 2, dtype=torch.int64, **meta)
    one = torch.empty(2, dtype=torch.int64, **meta)
    regimes = torch.empty(batch, dtype=torch.int32, **meta)
    rotation = Rotation(table, table, table.double(), one, one.float(), regimes, case.interleaved)
    positions = [torch.empty(batch, n, dtype=torch.int64, **meta) for n in (rows, tokens)]
    lengths = torch.empty(batch, dtype=torch.int64, **meta)
    general, in_pages = case.general, case.op == "pages" or case.quantised is not None
    geometry = Geometry(
        positions[0] if general else None,
        positions[1]
        if (general and case.op != "decode" and not in_pages) or case.op == "decode at positions"
        else None,
        None,
        lengths if general else None,
        lengths if general else None,
        0.1,
        True,
        4095 if general else -1,
        -1,
        30.0 if general else 0.0,
    )
    target = case.target
    if case.op == "rope":
        return [plans.rotate(key, rotation, positions[1], None, False, target)[1]]
    if case.op.endswith("append"):
        return plans.cache_append(key, key, _pages(case, lengths), lengths)
    if in_pages:
        return plans.attention_paged(query, _pages(case, lengths), rotation, geometry, target)[2]
    lse = torch.empty(query.shape[:-1], **meta)
    if case.op in ("packed", "packed backward"):
        packing = Packing(
            torch.empty(batch + 1, dtype=torch.int64, **meta), torch.empty(batch + 1, dtype=torch.int64, **meta)
        )
        query, key = query[0].transpose(0, 1), key[0].transpose(0, 1)
        if case.op == "packed":
            return plans.attention_varlen(query, key, key, rotation, geometry, packing, target)[2]
        return plans_backward.attention_varlen_backward(
            query, None, query, key, key, query, lse[0], rotation, geometry, packing, general, target
        )[2]
    if case.op != "backward":
        return plans.attention(query, key, key, rotation, geometry, target)[2]
    return plans_backward.attention_backward(
        query, lse if general else None, query, key, key, query, lse, rotation, geometry, general, target
    )[2]


def _pages(case: Case, lengths: torch.Tensor) -> Pages:
    """A cache in pages of 256 tokens, quantised or in the case's dtype."""
    count, key_heads, size, meta = 64, 8, 256, {"device": "meta"}
    table = torch.empty(len(lengths), count, dtype=torch.int32, **meta)
    if case.quantised is None:
        pages = torch.empty(count, key_heads, size, case.head_dim, dtype=case.dtype, **meta)
        return Pages(pages, pages, table, lengths)
    pages = torch.empty(count, key_heads, size, case.head_dim, dtype=case.quantised, **meta)
    key_scale = torch.empty(count, key_heads, size // KEY_GROUP, case.head_dim, **meta)
    tail = torch.empty(len(lengths), key_heads, KEY_GROUP, case.head_dim, dtype=case.dtype, **meta)
    return Pages(pages, pages, table, lengths, key_scale, torch.empty(count, key_heads, size, **meta), tail)


def compile_launch(launch: Launch, target: str) -> Any:
    """Compile a launch for a target, specialised on its arguments as Triton's launcher would."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned = []
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            constants[parameter.name] = value
            types[parameter.name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            types[parameter.name] = POINTERS[value.dtype]
        elif hasattr(value, "block_shape"):  # a tensor descriptor
            types[parameter.name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            types[parameter.name] = "fp32"
        else:
            types[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        divides = isinstance(value, torch.Tensor) or (isinstance(value, (int, float)) and value % 16 == 0)
        if parameter.name not in constants and divides:
            aligned.append(parameter.name)
    source = _source(launch.kernel, types, constants, aligned)
    return triton.compile(source, target=(TARGETS | TILES_OF)[target], options=launch.options)


def _source(kernel: Any, types: dict[str, str], constants: dict[str, Any], aligned: list[str]) -> ASTSource:
    place = {p.name: i for i, p in enumerate(kernel.params)}
    if "constexprs" in inspect.signature(ASTSource.__init__).parameters:
        by_place = {(place[name],): value for name, value in constants.items()}
        attributes = {(place[name],): [["tt.divisibility", 16]] for name in aligned}
        return ASTSource(kernel, types, constexprs=by_place, attrs=attributes)
    # Triton 3.2: constants by name, of which those that are not compile-time parameters have a type as well.
    from triton.backends.compiler import AttrsDescriptor

    of_run_time = {p.name: "*i8" if constants.get(p.name, 1) is None else "i32" for p in kernel.params}
    types = {p.name: types[p.name] for p in kernel.params if not p.is_constexpr}
    types = {name: of_run_time[name] if kind == "constexpr" else kind for name, kind in types.items()}
    attributes = AttrsDescriptor.from_hints({place[name]: 16 for name in aligned})
    return ASTSource(kernel, types, constants=constants, attrs=attributes)


@dataclass(frozen=True)
class Report:
    """What one kernel of one case compiled to."""

    target: str
    case: str
    kernel: str
    config: Config
    registers: int = 0  # a thread; on AMD vector registers, accumulators included
    spill_bytes: int = 0  # local memory of a thread, for spills or anything else
    shared_bytes: int = 0
    matmuls: int = 0  # tensor-core instructions
    group_matmuls: int = 0  # of these, on sm_90 those of a warpgroup (wgmma), on sm_100 tcgen05.mma
    instructions: int = 0
    accumulators: int = 0  # AMD's, as are the two below: of the registers, those beside the products
    vector_spills: int = 0  # registers that were spilled: to memory, or to accumulators
    scalar_spills: int = 0  # to memory, or to lanes of a vector register
    error: str = ""  # what the compiler said where it failed; the numbers are 0 then

    @property
    def name(self) -> str:
        """The kernel and its case."""
        return f"{self.kernel} ({self.case})"

    @property
    def tile(self) -> str:
        """Rows and keys of the tile, and how keys come, in words."""
        config = self.config
        tile = f"{config.rows} x {config.keys}" if config.keys else str(config.rows)
        return tile + " by descriptors" * config.descriptors

    @property
    def faults(self) -> list[str]:
        """What a kernel must not have, each as a line: local memory, too much shared memory, no tensor cores."""
        if self.error:
            found = [f"does not compile: {self.error}"]
        else:
            found = [*self._excesses(), *self._missing_tensor_cores()]
        where = f"{self.target} {self.kernel} ({self.case}, tile {self.tile}, {self.config.warps} warps)"
        return [f"{where}: {fault}" for fault in found]

    def _excesses(self) -> Iterator[str]:
        if self.shared_bytes > SHARED_LIMIT[self.target]:
            yield f"{self.shared_bytes} bytes of shared memory, of {SHARED_LIMIT[self.target]}"
        ceiling = ceilings().get(self.name, {}) if self.target == CEILING_TARGET else {}
        if self.spill_bytes and not ceiling:
            yield f"{self.spill_bytes} bytes of local memory"
        if self.target == CEILING_TARGET and ceilings() and not ceiling:
            yield f"no ceiling in {CEILINGS.name} (python -m bench.report_gpu --ceilings writes them)"
        for what, most in ceiling.items():
            if getattr(self, what) > most:
                yield f"{getattr(self, what)} {what.replace('_', ' ')}, of {most} in {CEILINGS.name}"

    def _missing_tensor_cores(self) -> Iterator[str]:
        if self.kernel not in MATMUL_KERNELS or "float32" in self.case:
            return
        # The kernel of d key and d value computes the transposed products.
        rows = self.config.keys if self.kernel == "backward_key_kernel" else self.config.rows
        others = self.matmuls - self.group_matmuls
        if not self.matmuls:
            yield "no tensor-core instruction"
        elif self.target == "sm_90" and rows >= GROUP_ROWS and others:
            yield f"{others} of {self.matmuls} tensor-core instructions are not wgmma"


def report(launch: Launch, target: str, label: str) -> Report:
    """Compile a launch and read what it takes."""
    head = (target, label, launch.name, launch.config)
    try:
        compiled = compile_launch(launch, target)
    except Exception as error:  # whatever a compiler raises, the other kernels are reported
        return Report(*head, error=" ".join(f"{type(error).__name__}: {error}".split())[:300])
    read = _amd if target.startswith("gfx") else _nvidia
    return Report(*head, shared_bytes=int(compiled.metadata.shared), **read(compiled))


def _nvidia(compiled: Any) -> dict[str, int]:
    """What the cubin says."""
    tools = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    stack, local = (int(_one(rf"{name}:(\d+)", usage)) for name in ("STACK", "LOCAL"))
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ +)?(\w+).*;", sass, re.MULTILINE)
    by_warp, by_group = (sum(bool(kind.fullmatch(x)) for x in opcodes) for kind in (WARP_MATMUL, GROUP_MATMUL))
    return {
        "registers": int(_one(r"REG:(\d+)", usage)),
        "spill_bytes": max(stack, local),
        "matmuls": by_warp + by_group,
        "group_matmuls": by_group,
        "instructions": len(opcodes),
    }


def _amd(compiled: Any) -> dict[str, int]:
    """What the assembly and its metadata say."""
    text = compiled.asm["amdgcn"]
    code = re.findall(r"^\t[sv]_|^\t(?:ds|buffer|global|flat|scratch)_", text, re.MULTILINE)
    names = {
        "registers": "vgpr_count",
        "accumulators": "agpr_count",
        "vector_spills": "vgpr_spill_count",
        "scalar_spills": "sgpr_spill_count",
        "spill_bytes": "private_segment_fixed_size",
    }
    numbers = {name: int(_one(rf"\.{field}:\s+(\d+)", text)) for name, field in names.items()}
    return numbers | {"matmuls": len(re.findall("v_mfma", text)), "instructions": len(code)}


def _one(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in the compiler's report"
    return found.group(1)


PLAIN_OPS = ("rope", "forward", "in tile", "decode", "decode at positions", "backward")
OPS = (
    *PLAIN_OPS,
    "pages",
    *QUANTISED,
    *(f"{kind} in tile" for kind in QUANTISED),
    "packed",
    "packed backward",
    "append",
    *(f"{kind} append" for kind in QUANTISED),
    "8 tokens",
    "16 tokens",
    *(f"{kind} 16 tokens" for kind in QUANTISED),
)


Table = dict[str, dict[str, dict[str, dict[str, list[int]]]]]
# The launch that an entry belongs to: op of a Case, function of the kernel, general features.
LAUNCHES = {
    "forward": ("forward", "forward_kernel", False),
    "forward extras": ("in tile", "forward_kernel", True),
    "forward int8": ("int8 in tile", "forward_kernel", True),
    "forward fp8": ("fp8 in tile", "forward_kernel", True),
    "decode": ("decode", "decode_kernel", True),
    "decode int8": ("int8", "decode_kernel", True),
    "decode fp8": ("fp8", "decode_kernel", True),
    "split 16": ("decode at positions", "forward_kernel", True),
    "split 32": ("8 tokens", "forward_kernel", True),
    "split 64": ("16 tokens", "forward_kernel", True),
    "backward query": ("backward", "backward_query_kernel", False),
    "backward query extras": ("backward", "backward_query_kernel", True),
    "backward key": ("backward", "backward_key_kernel", False),
    "backward key extras": ("backward", "backward_key_kernel", True),
}
DTYPES = {"16": torch.bfloat16, "32": torch.float32}


@dataclass(frozen=True)
class Entry:
    """One place of the table."""

    kernel: str
    target: str
    bits: str
    width: str

    @property
    def case(self) -> Case:
        """A call that takes this entry; the widest is a head of 256 dims of which 64 rotate."""
        op, _, general = LAUNCHES[self.kernel]
        rotary = 64 if self.width == "512" else None
        return Case(self.target, op, min(int(self.width), 256), DTYPES[self.bits], rotary, general=general)

    def config(self, table: Table) -> Config:
        """The tile that the table has here."""
        return Config.of_list(table[self.kernel][self.target][self.bits][self.width])


def entries(table: Table, **wanted: str | None) -> Iterator[Entry]:
    """The places of the table that match what is wanted (None: any)."""
    for kernel, targets in table.items():
        for target, sizes in targets.items():
            for bits, widths in sizes.items():
                for width in widths:
                    entry = Entry(kernel, target, bits, width)
                    if all(value in (None, getattr(entry, name)) for name, value in wanted.items()):
                        yield entry


def quick_cases() -> Iterator[Case]:
    """The sample of `make test`: what a Llama-like model runs, on each target."""
    cases = [Case(target, "forward") for target in ("sm_80", "sm_90", "sm_100", "gfx942")]
    cases += [Case(target, "decode") for target in ("sm_80", "sm_90")]
    cases += [Case("sm_90", "backward"), Case("sm_80", "backward"), Case("gfx942", "packed backward")]
    # fp8 in integers, and converted by the chip
    cases += [Case(target, "fp8") for target in ("sm_80", "sm_90", "gfx942")]
    cases += [Case("sm_90", "pages"), Case("sm_90", "packed"), Case("sm_90", "append"), Case("sm_80", "fp8 append")]
    yield from (case for case in cases if case.target in TARGETS)


def all_cases() -> Iterator[Case]:
    """Every configuration that the heuristics can choose, and what changes a kernel beside its configuration.

    The sample comes first: of launches that compile to the same, it is the first case that is reported.
    """
    yield from quick_cases()
    for target in TARGETS:
        yield from (entry.case for entry in entries(configs.table(), target=target))
        for op, head_dim in itertools.product(PLAIN_OPS, (64, 128, 256)):
            yield Case(target, op, head_dim)
        of_caches = [x for kind in QUANTISED for x in (kind, f"{kind} in tile")]
        for op, head_dim in itertools.product(("pages", *of_caches), (64, 128, 256)):
            yield Case(target, op, head_dim)
        for op in ("pages", *of_caches):
            yield Case(target, op, 128, torch.float32)
        for op in of_caches:
            yield Case(target, op, 128, general=True, interleaved=True)
        for op in ("packed", "packed backward"):
            yield Case(target, op)
            yield Case(target, op, 96, torch.float16, general=True)
        for kind, head_dim in itertools.product(QUANTISED, (64, 128, 256)):
            yield Case(target, f"{kind} 16 tokens", head_dim)
        for op in ("8 tokens", "16 tokens"):
            for head_dim in (64, 128, 256):
                yield Case(target, op, head_dim)
            yield Case(target, op, 128, general=True, interleaved=True)
            yield Case(target, op, 128, torch.float32)
        for op in ("append", *(f"{kind} append" for kind in QUANTISED)):
            yield Case(target, op)
        for op in PLAIN_OPS:
            yield Case(target, op, 80)
            yield Case(target, op, 96, torch.float16, general=True)
            yield Case(target, op, 128, general=True, interleaved=True)
            yield Case(target, op, 256, rotary_dim=64)
            yield Case(target, op, 64, torch.float32)
            yield Case(target, op, 128, torch.float32, general=True)
            yield Case(target, op, 256, torch.float32)


def distinct(cases: Iterable[Case]) -> Iterator[tuple[Case, int, Launch]]:
    """The launches of the cases, each with its place in its case, without those that differ in nothing compiled."""
    seen = set()
    for case in cases:
        for place, launch in enumerate(launches(case)):
            compiled = tuple(
                (p.name, str(x) if p.is_constexpr or x is None else getattr(x, "dtype", None))
                for p in launch.kernel.params
                for x in (launch.arguments[p.name],)
            )
            key = (case.target, launch.name, launch.config, compiled)
            if key not in seen:
                seen.add(key)
                yield case, place, launch


def reports(cases: Iterable[Case], jobs: int = 1) -> Iterator[Report]:
    """Compile the launches of the cases that are distinct."""
    work = [(case, place) for case, place, _ in distinct(cases)]
    if jobs == 1:
        yield from map(_report, work)
        return
    # Not forked: torch's threads do not survive that.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_report, work)


def _report(work: tuple[Case, int]) -> Report:
    case, place = work
    return report(launches(case)[place], case.target, case.label)


def table(rows: list[Report]) -> str:
    """The reports as text."""
    head = (
        "target",
        "kernel",
        "case",
        "tile",
        "warps",
        "stages",
        "regs",
        "spill B",
        "shared kB",
        "matmul",
        "wgmma",
        "instr",
    )
    lines = [head]
    for r in rows:
        shared = f"{r.shared_bytes / 1024:.1f}"
        matmuls = (r.matmuls, r.group_matmuls)
        numbers = (r.config.warps, r.config.stages, r.registers, r.spill_bytes, shared, *matmuls, r.instructions)
        lines.append((r.target, r.kernel, r.case, r.tile, *map(str, numbers)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the sample of the test suite")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here too")
    parser.add_argument("--target", choices=list(TARGETS), help="one target only")
    parser.add_argument("--op", choices=OPS, help="one op only")
    parser.add_argument("--ceilings", action="store_true", help=f"write {CEILINGS.name} from all of {CEILING_TARGET}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers side by side")
    arguments = parser.parse_args()
    if arguments.ceilings:
        if arguments.quick or arguments.op or arguments.target not in (None, CEILING_TARGET):
            parser.error(f"--ceilings is of all cases of {CEILING_TARGET}: without --quick, --op or another --target")
        if CEILING_TARGET in LEFT_OUT:
            parser.error(f"--ceilings: {CEILING_TARGET} is left out: {LEFT_OUT[CEILING_TARGET]}")
        arguments.target = CEILING_TARGET
    for target, reason in LEFT_OUT.items():
        print(f"{target} is left out: {reason}", file=sys.stderr)
    cases = quick_cases() if arguments.quick else all_cases()
    wanted = (c for c in cases if arguments.target in (None, c.target) and arguments.op in (None, c.op))
    rows = []
    for row in reports(wanted, arguments.jobs):
        rows.append(row)
        print(f"\r{len(rows)} kernels compiled", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(table(rows))
    if arguments.json:
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"versions": versions, "kernels": [asdict(r) for r in rows]}, indent=1))
    if arguments.ceilings:
        write_ceilings(row for row in rows if not row.error)
    elif not ceilings():
        print(f"{CEILINGS.name} is of another Triton than {triton.__version__}: not compared", file=sys.stderr)
    if faults := [fault for row in rows for fault in row.faults]:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
