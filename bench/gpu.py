"""The Triton backend beside the CUDA one and what a GPU's user would run instead, as a share of what that GPU just did.

    python -m bench.gpu [--out DIR] [--minutes N] [--dry-run]     the benchmark; writes DIR/gpu.json
    python -m bench.gpu --smoke                                   each kernel once on a small shape, for a sanitizer

Every side is checked against ours before it is timed, and a peer that is missing, refuses or disagrees is a note in the
row, not a failure. In each round every side runs once beside a large matrix product and a large copy, timed by device
events, caches flushed between. Without a GPU --dry-run takes the same steps in Triton's interpreter, on small shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import longrope_kernels as lk

from . import gpu_peers as peers
from . import interpreter
from .gpu_peers import Call
from .record import Record, refused, row
from .timing import Samples
from .workloads import OURS, Disagreement, Shape, Work, check, difference, tolerance

MATMUL, COPY = "matmul", "copy"
CUDA = "ours, CUDA kernels"
AMPERE = "ours, CUDA kernels of Ampere"
DESCRIPTORS = "ours, tensor descriptors"


@dataclass(frozen=True)
class Device:
    """Where to run, how large the ceilings' operands are, and how many rounds a work gets."""

    name: str
    dtype: torch.dtype
    matmul: int
    copy_bytes: int
    rounds: int

    @property
    def is_gpu(self) -> bool:
        return self.name == "cuda"


GPU = Device("cuda", torch.bfloat16, 8192, 2**31, 20)
DRY = Device("cpu", torch.float16, 64, 2**16, 1)


def seconds(device: Device, call: Call) -> float:
    """Seconds of one call, by device events where there are any."""
    if not device.is_gpu:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def ceilings(device: Device) -> dict[str, Callable[[], float]]:
    """A large matrix product in GFLOP/s and a large copy in GB/s, on random data: zeros run faster."""
    n = device.matmul
    a, b = (torch.randn(n, n, device=device.name).to(device.dtype) for _ in range(2))
    source = torch.randn(device.copy_bytes // 4, device=device.name)
    target = torch.empty_like(source)
    return {
        MATMUL: lambda: 2 * n**3 / seconds(device, lambda: a @ b) / 1e9,
        COPY: lambda: 2 * device.copy_bytes / seconds(device, lambda: target.copy_(source)) / 1e9,
    }


def in_turns(device: Device, work: Work, limit: float) -> Samples:
    """Time every side once a round beside the ceiling that binds the work, for at most `limit` seconds."""
    name = MATMUL if work.flop else COPY
    ceiling = ceilings(device)[name]
    flush = torch.empty(2**28 if device.is_gpu else 16, dtype=torch.int8, device=device.name)
    samples = Samples({side: [] for side in work.sides}, {name: []})
    for _ in range(3 if device.is_gpu else 0):
        ceiling()
        if sum(seconds(device, call) for call in work.sides.values()) > limit / 4:
            break  # what takes this long is warm after one
    began = time.perf_counter()
    for _ in range(device.rounds):
        samples.ceilings[name].append(ceiling())
        for side, call in work.sides.items():
            flush.zero_()
            samples.seconds[side].append(seconds(device, call))
        if time.perf_counter() - began > limit:
            break
    return samples


def operands(device: Device, shape: Shape, query_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value."""
    generator = torch.Generator(device.name).manual_seed(0)
    sizes = ((shape.heads, query_tokens), (shape.key_heads, shape.tokens), (shape.key_heads, shape.tokens))
    query, key, value = (
        torch.randn(1, heads, tokens, shape.head_dim, device=device.name, generator=generator).to(shape.dtype)
        for heads, tokens in sizes
    )
    return query, key, value


def scaling_of(head_dim: int) -> lk.RopeScaling:
    """Non-uniform factors, so that nothing can take a short cut."""
    return lk.RopeScaling(head_dim, 5e5, torch.linspace(1, 16, head_dim // 2).tolist())


def forward(device: Device, shape: Shape) -> Iterator[tuple[str, Work]]:
    """Causal attention, rotation included."""
    query, key, value = operands(device, shape, shape.tokens)
    s = scaling_of(shape.head_dim)
    cos, sin = peers.tables(s, shape.tokens, query)
    work = Work(shape, {OURS: lambda: lk.attention(query, key, value, s, backend="triton")})
    work.flop = 2.0 * shape.heads * shape.tokens**2 * shape.head_dim
    makers: dict[str, Callable[[], Call]] = {
        name: functools.partial(peers.sdpa, backend, query, key, value, cos, sin, True)
        for name, backend in (("SDPA flash", "FLASH_ATTENTION"), ("SDPA cuDNN", "CUDNN_ATTENTION"))
    }
    if not device.is_gpu:
        makers["SDPA math"] = functools.partial(peers.sdpa, "MATH", query, key, value, cos, sin, True)
    makers[CUDA] = lambda: lambda: lk.attention(query, key, value, s, backend="cuda")
    makers[AMPERE] = lambda: by_ampere(device, lambda: lk.attention(query, key, value, s, backend="cuda"))
    makers[DESCRIPTORS] = functools.partial(by_descriptors, query, key, value, s)
    makers["FlexAttention"] = functools.partial(peers.flex, query, key, value, cos, sin)
    makers["flash-attn-4"] = functools.partial(peers.flash_attention_4, query, key, value, cos, sin)
    yield "forward", with_peers(work, makers)


def long_forward(device: Device, shape: Shape) -> Iterator[tuple[str, Work]]:
    """Causal attention over millions of tokens: ours alone, some rows held to the reference, and the memory it takes.

    Four heads of one key head: more take longer in proportion.
    """
    if device.is_gpu:
        torch.cuda.reset_peak_memory_stats()
    query, key, value = operands(device, shape, shape.tokens)
    s = scaling_of(shape.head_dim)
    work = Work(shape, {})
    work.flop = 2.0 * shape.heads * shape.tokens**2 * shape.head_dim
    for name, backend in ((OURS, "triton"), (CUDA, "cuda")):
        call = functools.partial(lk.attention, query, key, value, s, backend=backend)
        try:
            out = call()
            work.differences[name] = of_some_rows(out, query, key, value, s)
            if not work.differences[name] <= 4 * torch.finfo(shape.dtype).eps:
                raise Disagreement(f"{work.differences[name]:.2g} of the RMS beside the reference")
            work.sides[name] = call
        except Exception as error:  # whatever a side raises is its reason; ours must run
            if name == OURS:
                raise
            work.notes[name] = reason(error)
    if device.is_gpu:
        used = torch.cuda.max_memory_allocated() / 2**30
        work.notes["memory"] = f"{used:.1f} GiB at most, operands and results among them"
    yield "long forward", work


def of_some_rows(out: Tensor, query: Tensor, key: Tensor, value: Tensor, s: lk.RopeScaling) -> float:
    """The largest relative RMS difference of some rows of causal attention from the reference's, by key heads."""
    tokens, group = query.shape[2], query.shape[1] // key.shape[1]
    worst = 0.0
    for end in (min(5, tokens), tokens // 2 + 1, tokens):
        rows = slice(max(end - 2, 0), end)
        for head in range(key.shape[1]):
            heads = slice(head * group, (head + 1) * group)
            seen = (x[:, head : head + 1, :end].double() for x in (key, value))
            exact = lk.attention(query[:, heads, rows].double(), *seen, s, backend="reference")
            worst = max(worst, difference(out[:, heads, rows].double(), exact))
    return worst


def by_ampere(device: Device, call: Call) -> Call:
    """The same by the kernels of Ampere, where Hopper's would run."""
    from longrope_kernels.backends import cuda

    if not device.is_gpu or not cuda.runs_hopper_kernels(torch.device(device.name)):
        raise RuntimeError("no Hopper GPU, on which they would not run otherwise")

    def run() -> Tensor:
        with cuda.ampere_kernels():
            return call()

    return run


def by_descriptors(query: Tensor, key: Tensor, value: Tensor, s: lk.RopeScaling) -> Call:
    """Our Triton forward with whole blocks of keys through tensor descriptors (TMA) instead of pointers."""
    from longrope_kernels.backends.triton import configs, descriptors, launch

    target = launch.target_of(query.device)
    if descriptors.TensorDescriptor is None or target not in configs.DESCRIPTOR_TARGETS:
        raise RuntimeError(f"{target} or this Triton has none")

    def run() -> Tensor:
        with configs.by_descriptors(True):
            return lk.attention(query, key, value, s, backend="triton")

    return run


def backward(device: Device, shape: Shape) -> Iterator[tuple[str, Work]]:
    """The backward pass alone, of ours and of the peers."""
    leaves = [x.requires_grad_() for x in operands(device, shape, shape.tokens)]
    s = scaling_of(shape.head_dim)
    cos, sin = peers.tables(s, shape.tokens, leaves[0])

    def gradients(call: Call) -> Call:
        out = call()
        grad = torch.randn(out.shape, device=device.name, generator=torch.Generator(device.name).manual_seed(1))
        grad = grad.to(out.dtype)
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    work = Work(shape, {OURS: gradients(lambda: lk.attention(*leaves, s, backend="triton"))})
    work.flop = 5.0 * shape.heads * shape.tokens**2 * shape.head_dim
    backends = ("FLASH_ATTENTION", "CUDNN_ATTENTION") if device.is_gpu else ("MATH",)
    makers = {
        f"SDPA {backend.split('_')[0].lower()}": functools.partial(
            lambda backend: gradients(peers.sdpa(backend, *leaves, cos, sin, True)), backend
        )
        for backend in backends
    }
    makers["FlexAttention"] = lambda: gradients(peers.flex(*leaves, cos, sin))
    makers["flash-attn-4"] = lambda: gradients(peers.flash_attention_4(*leaves, cos, sin))
    makers[CUDA] = lambda: gradients(lambda: lk.attention(*leaves, s, backend="cuda"))
    makers[AMPERE] = lambda: by_ampere(device, gradients(lambda: lk.attention(*leaves, s, backend="cuda")))
    yield "backward", with_peers(work, makers)


def decode(device: Device, shape: Shape) -> Iterator[tuple[str, Work]]:
    """One token over a cache of unrotated keys in pages, in the dtype of the query, int8 and fp8."""
    query, key, value = operands(device, shape, 1)
    s = scaling_of(shape.head_dim)
    cos, sin = peers.tables(s, shape.tokens, query)
    itemsize = shape.dtype.itemsize
    for name, quantised in (("decode", False), ("decode int8", "int8"), ("decode fp8", "fp8")):
        cache = lk.KVCache(
            1, shape.key_heads, shape.head_dim, shape.tokens, shape.dtype, quantised, 256, device=device.name
        )
        cache.append(key, value, backend="triton")
        work = Work(shape, {OURS: functools.partial(cache.attend, query, s, backend="triton")})
        work.read_bytes = 2.0 * shape.key_heads * shape.tokens * shape.head_dim * (1.03 if quantised else itemsize)
        makers: dict[str, Callable[[], Call]] = {
            CUDA: functools.partial(functools.partial, cache.attend, query, s, backend="cuda")
        }
        if not quantised:
            turned = peers.rotated(key, cos, sin)
            one = (torch.ones_like(cos), torch.zeros_like(sin))  # a cache of rotated keys: the query's rotation is left
            last = peers.rotated(query, cos[-1:], sin[-1:])
            for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION") if device.is_gpu else ("MATH",):
                makers[f"SDPA {backend.split('_')[0].lower()}, rotated keys"] = functools.partial(
                    sdpa_decode, backend, last, turned, value, one
                )
        peer = with_peers(work, makers)
        if not quantised and device.is_gpu:
            uncompared(peer, "flashinfer, plain RoPE", lambda: peers.flashinfer_decode(query, key, value, s))
        yield name, peer


def sdpa_decode(backend: str, query: Tensor, key: Tensor, value: Tensor, one: tuple[Tensor, Tensor]) -> Call:
    """SDPA over keys that were cached rotated, rotating the query alone."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run() -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            turned = peers.rotated(query, one[0][-1:], one[1][-1:])
            return torch.nn.functional.scaled_dot_product_attention(turned, key, value, enable_gqa=True)

    return run


def append(device: Device, shape: Shape) -> Iterator[tuple[str, Work]]:
    """A prompt's keys and values into an empty cache in pages; a quantised one is compared by the values it holds."""
    _, key, value = operands(device, shape, 1)
    for name, quantised in (("append", False), ("append int8", "int8"), ("append fp8", "fp8")):

        def filled(backend: str, quantised: str | bool = quantised) -> Call:
            cache = lk.KVCache(
                1, shape.key_heads, shape.head_dim, shape.tokens, shape.dtype, quantised, 256, device=device.name
            )
            cache.append(key, value, backend=backend)
            pages, empty = cache.pages, torch.zeros(1, dtype=torch.int64, device=device.name)
            pages = dataclasses.replace(pages, length=empty)

            def run() -> Tensor:
                lk.cache_append(key, value, pages, backend=backend)
                return pages.value if pages.value_scale is None else pages.value_scale

            return run

        work = Work(shape, {OURS: filled("triton")})
        stored = 1.03 if quantised else shape.dtype.itemsize
        work.read_bytes = 2.0 * shape.key_heads * shape.tokens * shape.head_dim * (shape.dtype.itemsize + stored)
        yield name, with_peers(work, {CUDA: functools.partial(filled, "cuda")})


def rope(device: Device, shape: Shape) -> Iterator[tuple[str, Work]]:
    """Rotation of queries and keys alone."""
    query, key, _ = operands(device, shape, shape.tokens)
    s = scaling_of(shape.head_dim)
    cos, sin = peers.tables(s, shape.tokens, query)
    work = Work(shape, {OURS: lambda: lk.apply_rope(query, key, s, backend="triton")})
    work.read_bytes = 2.0 * (query.numel() + key.numel()) * shape.dtype.itemsize
    turned = torch.compile(peers.rotated) if device.is_gpu else peers.rotated
    makers: dict[str, Callable[[], Call]] = {
        "torch.compile" if device.is_gpu else "torch": lambda: lambda: (turned(query, cos, sin), turned(key, cos, sin)),
        CUDA: lambda: lambda: lk.apply_rope(query, key, s, backend="cuda"),
    }
    peer = with_peers(work, makers)
    uncompared(peer, "Liger, in place", lambda: peers.liger_rope(query, key, cos, sin))
    yield "rope", peer


def with_peers(work: Work, makers: dict[str, Callable[[], Call]]) -> Work:
    """Add each peer that can run here and agrees with ours; say why the others are missing."""
    bound = tolerance(work.shape)
    for name, make in makers.items():
        try:
            work.sides[name] = make()
            check(work, {name: bound})
        except Exception as error:  # whatever a peer raises is its reason
            work.sides.pop(name, None)
            work.notes[name] = reason(error)
            if isinstance(error, Disagreement):
                print(f"  {name}: {error}", file=sys.stderr)
    work.sides[OURS]()
    return work


def uncompared(work: Work, name: str, make: Callable[[], Call]) -> None:
    """Add a peer that computes something else by design."""
    try:
        call = make()
        call()
        work.sides[name] = call
        work.notes[name] = "does not compute the same thing: timed, not compared"
    except Exception as error:  # whatever a peer raises is its reason
        work.notes[name] = reason(error)


def reason(error: Exception) -> str:
    """The first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def works(device: Device) -> Iterator[tuple[str, Callable[[], Iterator[tuple[str, Work]]]]]:
    """What is measured, the most telling first: the time may end before the list does."""
    if not device.is_gpu:
        small = Shape(4, 2, 32, 80, device.dtype)
        for make in (forward, backward, decode, rope, append, long_forward):
            yield make.__name__, functools.partial(make, device, small)
        return
    for make, head_dim, tokens in (
        (forward, 128, 16384),
        (backward, 128, 16384),
        (decode, 128, 131072),
        (rope, 128, 16384),
        (long_forward, 128, 2097152),
        (forward, 64, 16384),
        (forward, 96, 16384),
        (forward, 128, 4096),
        (backward, 64, 16384),
        (backward, 96, 16384),
        (forward, 128, 65536),
        (decode, 128, 16384),
        (forward, 256, 8192),
        (backward, 256, 8192),
        (append, 128, 16384),
        (backward, 128, 4096),
        (decode, 128, 524288),
        (decode, 64, 131072),
        (decode, 96, 131072),
    ):
        heads, key_heads = (4, 1) if make is long_forward else (32, 8)
        shape = Shape(heads, key_heads, head_dim, tokens, device.dtype)
        yield f"{make.__name__} {head_dim} {tokens}", functools.partial(make, device, shape)


def run(device: Device, folder: pathlib.Path, minutes: float) -> int:
    """Measure all works within the time, print a line for each side, and leave a record."""
    record = Record("gpu", folder)
    record.content["machine"] |= describe(device)
    record.content["dry_run"] = not device.is_gpu
    deadline = time.monotonic() + 60 * minutes
    failed = 0
    for name, make in works(device):
        if time.monotonic() > deadline:
            record.add(refused(name, "gpu", f"{minutes:g} minutes were over"))
            continue
        try:
            for section, work in make():
                found = row(f"{section}, {work.shape}", section, work, in_turns(device, work, 20.0))
                record.add(found)
                report(found)
        except Exception as error:  # one work's failure does not stop the next
            failed += 1
            record.add(refused(name, "gpu", reason(error)))
            print(f"{name}: {reason(error)}", flush=True)
    print(record.finish())
    return int(failed > 0)


def report(found: dict[str, object]) -> None:
    """Print one row."""
    shares, times = found["shares"], found["seconds"]
    assert isinstance(shares, dict)
    assert isinstance(times, dict)
    share = ", ".join(f"{100 * value:.0f}% of {name}" for name, value in shares.items())
    print(f"{found['name']}: {found['rate']:,.0f} {found['unit']}, {share}")
    for side, value in times.items():
        print(f"  {side:28} {1e3 * value:9.3f} ms  {value / times[OURS]:5.2f}x")
    notes = found["notes"]
    assert isinstance(notes, dict)
    for side, note in notes.items():
        print(f"  {side:28} {note}", flush=True)


def describe(device: Device) -> dict[str, object]:
    """Name the GPU and its software."""
    if not device.is_gpu:
        return {"gpu": None}
    import triton

    facts = torch.cuda.get_device_properties(0)
    return {
        "gpu": facts.name,
        "gpu_memory_gib": round(facts.total_memory / 2**30, 1),
        "multiprocessors": facts.multi_processor_count,
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": triton.__version__,
    }


def smoke(device: Device, backend: str, head_dim: int) -> float:
    """Run every kernel of a backend once on a small shape; return the largest error against the reference."""
    tokens = 150 if device.is_gpu else 80
    shape = Shape(4, 2, head_dim, tokens, device.dtype)
    leaves = [x.requires_grad_() for x in operands(device, shape, shape.tokens)]
    s = scaling_of(head_dim)
    worst = 0.0
    for queries in (1, 3, tokens):
        first, *others = leaves
        arguments = (first[:, :, -queries:], *others)
        out = lk.attention(*arguments, s, backend=backend)
        exact = lk.attention(*(x.double() for x in arguments), s, backend="reference")
        worst = max(worst, float((out - exact).abs().max().detach()))
        torch.autograd.grad(out.float().square().sum(), leaves)
    for quantised in (False, "int8", "fp8"):
        cache = lk.KVCache(1, 2, head_dim, 256, shape.dtype, quantised, 64, device=device.name)
        cache.append(leaves[1].detach(), leaves[2].detach(), backend=backend)
        for queries in (1, 40):
            query = leaves[0].detach()[:, :, -queries:]
            cache.attend(query, s, backend=backend)
    bounds = torch.tensor([0, 70, tokens], device=device.name)
    packed = [x.detach()[0].transpose(0, 1).contiguous().requires_grad_() for x in leaves]
    out = lk.attention_varlen(*packed, bounds, scaling=s, backend=backend)
    torch.autograd.grad(out.float().square().sum(), packed)
    if device.is_gpu:
        torch.cuda.synchronize()
    return worst


def smoke_all(device: Device) -> int:
    """The same of every GPU backend that can run here, without a GPU in the interpreter and in the emulator."""
    from longrope_kernels.backends import cuda, unavailable_reason

    if not device.is_gpu:
        from .layouts import emulator

        cuda.emulate(emulator(), hopper=True)
    failed = 0
    nothing = contextlib.nullcontext
    # At head_dim 256 the CUDA backend has kernels of its own, and on Hopper two of everything.
    for name, backend, head_dims, kernels in (
        ("triton", "triton", (64,), nothing),
        ("cuda", "cuda", (64, 128, 256), nothing),
        ("cuda, kernels of Ampere", "cuda", (64, 128, 256), cuda.ampere_kernels),
    ):
        why = unavailable_reason(backend)
        if why is not None:
            print(f"{name}: not run, {why}")
            continue
        with kernels():
            worst = max(smoke(device, backend, x) for x in head_dims)
        failed += not worst < 0.05
        print(f"{name}: largest error {worst:.2g}")
    return int(failed > 0)


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("bench/results"), help="folder of gpu.json")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no further work after this")
    parser.add_argument("--dry-run", action="store_true", help="small shapes, in Triton's interpreter")
    parser.add_argument("--smoke", action="store_true", help="each kernel once")
    arguments = parser.parse_args()
    dry = arguments.dry_run or bool(os.environ.get("LONGROPE_KERNELS_DRY_RUN"))
    if not dry and not torch.cuda.is_available():
        print("bench.gpu: no GPU that torch can use (--dry-run does without)", file=sys.stderr)
        return 2
    if dry and os.environ.get("TRITON_INTERPRET") != "1":
        print("bench.gpu: a dry run needs TRITON_INTERPRET=1 in the environment", file=sys.stderr)
        return 2
    if dry:
        interpreter.patch_once()
    if arguments.smoke:
        return smoke_all(DRY if dry else GPU)
    return run(DRY if dry else GPU, arguments.out, arguments.minutes)


if __name__ == "__main__":
    sys.exit(main())
