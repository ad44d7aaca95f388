"""The works that are timed: operands, our side, the peers' sides, and the check that they agree."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import longrope_kernels as lk
from longrope_kernels.backends import cpu

from . import llama_cpp, peers

OURS, TORCH, COMPILED, PACKED = "ours", "torch", "torch.compile", "torch, heads packed"
UNROTATED, ONE_THREAD, OURS_BF16 = "ours, unrotated", "ours, one thread", "ours, bf16 cache"
OURS_FP16, LLAMA, LLAMA_UNFUSED = "ours, fp16", "llama.cpp", "llama.cpp, no flash attention"
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

Call = Callable[[], Any]


class Disagreement(AssertionError):
    """Two sides computed different things: their times are not comparable."""


@dataclass(frozen=True)
class Shape:
    """Heads, tokens and dtype of one work; `tokens` are the keys where one query is decoded."""

    heads: int
    key_heads: int
    head_dim: int
    tokens: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"{NAMES[self.dtype]} {self.heads}/{self.key_heads}x{self.head_dim}, {self.tokens:,} tokens"

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("heads", "key_heads", "head_dim", "tokens")}


@dataclass
class Work:
    """One comparison.

    Attributes:
        sides: what is timed; "ours" is what the others are divided by.
        flop, read_bytes: what the work must spend at least, once; one of them is given where a ceiling binds it.
        differences: relative RMS difference of each compared side from ours.
        notes: why a side is missing.
        derived: sides whose seconds are calculated from the medians of the other sides.
    """

    shape: Shape
    sides: dict[str, Call]
    flop: float = 0.0
    read_bytes: float = 0.0
    differences: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    derived: dict[str, Callable[[Mapping[str, float]], float]] = field(default_factory=dict)


def in_huge_pages(x: Tensor) -> Tensor:
    """Return a copy of x in huge pages where the system has them, as our caches lie; all sides read the same memory."""
    copy = torch.empty_like(x, requires_grad=False)
    cpu.advise_huge_pages(copy)
    return copy.copy_(x.detach())


def tolerance(shape: Shape) -> float:
    """Return the largest relative RMS difference that the dtype and the peer's float32 angles explain.

    Operands, tables and probabilities are rounded a few times; the peer's angle at position p is off by p * 2^-24.
    """
    return 4 * torch.finfo(shape.dtype).eps + shape.tokens * 2.0**-24


def difference(one: Any, other: Any) -> float:
    """Return the largest relative RMS difference of two results, tensors or tuples of them."""
    pairs = [(one, other)] if isinstance(one, Tensor) else list(zip(one, other, strict=True))
    worst = 0.0
    for a, b in pairs:
        # In parts: float64 copies of a long result would need more memory than the work.
        squares = torch.zeros(2, dtype=torch.float64, device=a.device)
        for x, y in zip(a.detach().flatten().split(2**22), b.detach().flatten().split(2**22), strict=True):
            squares += torch.stack(((x.double() - y.double()).square().sum(), y.double().square().sum()))
        found = (squares[0] / squares[1].clamp(min=1e-300)).sqrt().item()
        worst = max(worst, found if found == found else float("inf"))
    return worst


def check(work: Work, compared: dict[str, float]) -> Work:
    """Run our side and each compared one, and refuse to go on where they differ by more than their bound.

    Raises:
        Disagreement: one line that names both sides, the difference and the bound.
    """
    expected = work.sides[OURS]()
    for name, bound in compared.items():
        found = work.differences[name] = difference(work.sides[name](), expected)
        if not found <= bound:
            raise Disagreement(f"{name} differs from ours by {found:.2g} of the RMS, expected at most {bound:.2g}")
    return work


def _operands(shape: Shape, query_tokens: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, tokens: int) -> Tensor:
        return torch.randn(1, heads, tokens, shape.head_dim, generator=generator).to(shape.dtype)

    tokens = shape.tokens if query_tokens is None else query_tokens
    return draw(shape.heads, tokens), draw(shape.key_heads, shape.tokens), draw(shape.key_heads, shape.tokens)


def _without_gradients(call: Call) -> Call:
    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


def _finish(work: Work, compile_peer: Call | None, uncompared: dict[str, Call] | None = None) -> Work:
    """Add the compiled peer where it can run, check all sides, then add those that compute something else."""
    if compile_peer is not None:
        reason = peers.compile_failure(compile_peer)
        if reason is None:
            work.sides[COMPILED] = compile_peer
        else:
            work.notes[COMPILED] = reason
    bound = tolerance(work.shape)
    check(work, {name: bound for name in work.sides if name != OURS})
    work.sides |= uncompared or {}
    return work


def prefill(
    shape: Shape, compile: bool = True, unrotated: bool = False, torch_side: bool = True, one_thread: bool = False
) -> Work:
    """Causal attention with rotation over a whole sequence."""
    other = peers.Transformers(shape.heads, shape.key_heads, shape.head_dim)
    query, key, value = _operands(shape)
    positions = torch.arange(shape.tokens).unsqueeze(0)

    def ours(scaling: lk.RopeScaling | None = other.scaling) -> Tensor:
        return lk.attention(query, key, value, scaling)

    def alone() -> Tensor:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return ours()
        finally:
            torch.set_num_threads(threads)

    sides: dict[str, Call] = {OURS: _without_gradients(ours)}
    if torch_side:
        sides[TORCH] = _without_gradients(lambda: other.attention(query, key, value, positions))
    if one_thread:
        sides[ONE_THREAD] = _without_gradients(alone)
    compile_peer = None
    if compile:
        function = peers.compiled(other.attention)
        compile_peer = _without_gradients(lambda: function(query, key, value, positions))
    work = Work(shape, sides, flop=2.0 * shape.heads * shape.head_dim * shape.tokens * (shape.tokens + 1))
    return _finish(work, compile_peer, {UNROTATED: _without_gradients(lambda: ours(None))} if unrotated else None)


def beside_llama_cpp(shape: Shape) -> Work:
    """The same beside llama.cpp's attention, with its fused kernel and without; bench/llama_cpp.py says how.

    What is compared are the logits that its one-layer model gives the last token, with those of our attention.
    """
    theta = peers.THETA
    # Its architecture llama has the two dims of a pair side by side.
    scaling = lk.RopeScaling(head_dim=shape.head_dim, theta=theta, interleaved=True)
    query, key, value = _operands(shape)
    halves = tuple(x.half() for x in (query, key, value))
    work = Work(
        shape,
        {
            OURS: _without_gradients(lambda: lk.attention(query, key, value, scaling)),
            OURS_FP16: _without_gradients(lambda: lk.attention(*halves, scaling)),
        },
        flop=2.0 * shape.heads * shape.head_dim * shape.tokens * (shape.tokens + 1),
    )
    check(work, {OURS_FP16: tolerance(shape)})
    heads = (shape.heads, shape.key_heads, shape.head_dim)
    weights = llama_cpp.make_weights(*heads)
    expected = last_logits(weights, scaling, llama_cpp.prompt(shape.tokens))
    with tempfile.TemporaryDirectory() as folder:
        model = llama_cpp.write_model(Path(folder, "one-layer.gguf"), weights, *heads, shape.tokens, theta)
        for name, flash in ((LLAMA, True), (LLAMA_UNFUSED, False)):
            settings = llama_cpp.Settings(shape.tokens, torch.get_num_threads(), flash)
            session = llama_cpp.Session(model, settings)
            found = work.differences[name] = difference(torch.tensor(session.decode(shape.tokens)), expected)
            # It rounds keys and values to fp16, as `OURS_FP16` does, and angles to fp32, from a running product.
            bound = tolerance(replace(shape, dtype=torch.float16))
            if not found <= bound:
                raise Disagreement(f"{name} differs from ours by {found:.2g} of the RMS, expected at most {bound:.2g}")
            sides = {f"{name}, model of {tokens:,} tokens": tokens for tokens in llama_cpp.lengths(shape.tokens)}
            work.sides |= {side: partial(session.decode, tokens) for side, tokens in sides.items()}
            work.derived[name] = lambda seconds, sides=sides: llama_cpp.quadratic_seconds(
                {tokens: seconds[side] for side, tokens in sides.items()}
            )
    return work


def last_logits(weights: llama_cpp.Weights, scaling: lk.RopeScaling, words: Any) -> Tensor:
    """Return the logits of the last of `words` under the one-layer model of bench/llama_cpp.py, by our attention."""

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, torch.from_numpy(weights[f"{name}.weight"]))

    def norm(x: Tensor, name: str) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], torch.from_numpy(weights[f"{name}.weight"]), llama_cpp.EPSILON)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, scaling.head_dim)).transpose(0, 1).unsqueeze(0)

    layer = "blk.0"
    hidden = torch.from_numpy(weights["token_embd.weight"])[torch.from_numpy(words).long()]
    normed = norm(hidden, f"{layer}.attn_norm")
    key, value = (heads(linear(normed, f"{layer}.{name}")) for name in ("attn_k", "attn_v"))
    out = lk.attention(heads(linear(normed[-1:], f"{layer}.attn_q")), key, value, scaling)
    hidden = hidden[-1] + linear(out.flatten(), f"{layer}.attn_output")
    normed = norm(hidden, f"{layer}.ffn_norm")
    gated = functional.silu(linear(normed, f"{layer}.ffn_gate")) * linear(normed, f"{layer}.ffn_up")
    hidden = hidden + linear(gated, f"{layer}.ffn_down")
    return linear(norm(hidden, "output_norm"), "output")


def training(shape: Shape, compile: bool = True) -> Work:
    """Forward and backward of the same: gradients of query, key and value."""
    other = peers.Transformers(shape.heads, shape.key_heads, shape.head_dim)
    operands = tuple(x.requires_grad_() for x in _operands(shape))
    positions = torch.arange(shape.tokens).unsqueeze(0)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(operands[0].shape, generator=generator).to(shape.dtype)

    def gradients(function: Callable[..., Tensor], *rest: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*operands, *rest), operands, grad_out)

    sides: dict[str, Call] = {
        OURS: lambda: gradients(lk.attention, other.scaling),
        TORCH: lambda: gradients(other.attention, positions),
    }
    compile_peer = None
    if compile:
        function = peers.compiled(other.attention)
        compile_peer = lambda: gradients(function, positions)  # noqa: E731
    # Two products forward; backward recomputes one of them and adds four.
    flop = 3.5 * 2.0 * shape.heads * shape.head_dim * shape.tokens * (shape.tokens + 1)
    return _finish(Work(shape, sides, flop=flop), compile_peer)


def decode(shape: Shape, compile: bool = True) -> Work:
    """One query over a cache: ours holds keys before rotation, the peers' after it."""
    other = peers.Transformers(shape.heads, shape.key_heads, shape.head_dim)
    query, key, value = (in_huge_pages(x) for x in _operands(shape, query_tokens=1))
    position = torch.tensor([[shape.tokens - 1]])
    rotated = _rotated_cache(other, key)
    arguments = (query, rotated, value, position)
    sides: dict[str, Call] = {
        OURS: _without_gradients(lambda: lk.attention(query, key, value, other.scaling)),
        TORCH: _without_gradients(lambda: other.decode(*arguments)),
        PACKED: _without_gradients(lambda: other.decode_packed(*arguments)),
    }
    compile_peer = None
    if compile:
        function = peers.compiled(other.decode)
        compile_peer = _without_gradients(lambda: function(*arguments))
    return _finish(Work(shape, sides, read_bytes=2.0 * key.numel() * key.element_size()), compile_peer)


def decode_int8(shape: Shape) -> Work:
    """One query over an int8 cache, beside ours over the same tokens in the queries' dtype."""
    other = peers.Transformers(shape.heads, shape.key_heads, shape.head_dim)
    query, key, value = _operands(shape, query_tokens=1)
    caches = {}
    for name, quantised in ((OURS, True), (OURS_BF16, False)):
        caches[name] = lk.KVCache(1, shape.key_heads, shape.head_dim, shape.tokens, shape.dtype, quantised)
        caches[name].append(key, value)

    def attend(cache: lk.KVCache) -> Call:
        return _without_gradients(lambda: cache.attend(query, other.scaling))

    work = Work(shape, {name: attend(cache) for name, cache in caches.items()}, read_bytes=float(caches[OURS].bytes))
    # Keys and values are each rounded to a 127th of the largest of their group.
    return check(work, {OURS_BF16: tolerance(shape) + 2 / 127})


def _rotated_cache(other: peers.Transformers, key: Tensor, part: int = 8192) -> Tensor:
    """Rotate keys in parts, as decoding appended them."""
    rotated = torch.empty_like(key)
    cpu.advise_huge_pages(rotated)
    with torch.no_grad():
        for first in range(0, key.shape[2], part):
            some = key[:, :, first : first + part]
            positions = torch.arange(first, first + some.shape[2]).unsqueeze(0)
            rotated[:, :, first : first + part] = other.rope(some, some, positions)[1]
    return rotated


def rope(shape: Shape, backward: bool = False) -> Work:
    """Rotation alone of queries and keys; with `backward`, of their gradients too."""
    other = peers.Transformers(shape.heads, shape.key_heads, shape.head_dim)
    query, key, value = _operands(shape)
    positions = torch.arange(shape.tokens).unsqueeze(0)
    del value

    def ours() -> Any:
        return lk.apply_rope(query, key, other.scaling)

    def theirs() -> Any:
        return other.rope(query, key, positions)

    calls = {OURS: ours, TORCH: theirs}
    if backward:
        operands = (query.requires_grad_(), key.requires_grad_())
        grads = tuple(torch.ones_like(x) for x in operands)

        def gradients(call: Call) -> Call:
            return lambda: torch.autograd.grad(call(), operands, grads)

        sides = {name: gradients(call) for name, call in calls.items()}
    else:
        sides = {name: _without_gradients(call) for name, call in calls.items()}
    # Read and written once.
    moved = 2.0 * (query.numel() + key.numel()) * query.element_size() * (2 if backward else 1)
    return _finish(Work(shape, sides, read_bytes=moved), None)
