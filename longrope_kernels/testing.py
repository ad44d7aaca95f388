"""The property-test kit: problems drawn by hypothesis, the error rule, and one conformance suite for any kernel.

Any callable with the arguments of `longrope_kernels.attention` (or `apply_rope`) can be held to it::

    from longrope_kernels import testing
    testing.conformance(attention=my_attention, dtypes=[torch.bfloat16])

The error rule (as flash-attention's, with exact angles): against float64, the largest error may be twice that of the
plain computation in the same dtype on the same data, plus a floor of a few units in the last place and the angle
budget. The plain computation rotates by exact angles rounded to float32 cos and sin, rounds the rotated operands and
the probabilities to the dtype, and accumulates in float32.

Needs hypothesis: `pip install hypothesis`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from . import functional, reference
from .backends import reference as _definition
from .backends.composed import gathered
from .bundles import Geometry, Pages, Rotation
from .cache import KVCache
from .rope import LongRope, RopeScaling

ANGLE_BUDGET = 3e-7  # absolute error of cos and sin that the numerics contract allows
FLOOR_ULPS = 4  # units in the last place of the largest output
HEAD_DIMS = (32, 40, 64, 80, 96, 128, 256)

Attention = Callable[..., Any]  # with the arguments of longrope_kernels.attention


@dataclass
class Problem:
    """Operands of one call and its keyword arguments; `repr` is what a failing example shows."""

    query: Tensor = field(repr=False)
    key: Tensor = field(repr=False)
    value: Tensor = field(repr=False)
    scaling: RopeScaling | LongRope
    kwargs: dict[str, Any]
    shape: str = ""

    def __post_init__(self) -> None:
        self.shape = f"query {tuple(self.query.shape)}, key {tuple(self.key.shape)}, {self.query.dtype}"

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    def replace(self, **changes: Any) -> Problem:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@st.composite
def scalings(draw: st.DrawFn, head_dim: int = 64, start_tokens: bool = True) -> RopeScaling:
    """Draw a regime: monotone or wild factors, partial rotary, both layouts, start tokens, an attention factor."""
    rotary_dim = 2 * draw(st.integers(1, head_dim // 2)) if draw(st.booleans()) else head_dim
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    largest = draw(st.sampled_from([1.0, 2.0, 16.0]))
    factors = (0.9 + (largest - 0.9) * torch.rand(rotary_dim // 2, generator=generator, dtype=torch.float64)).tolist()
    if draw(st.booleans()):
        factors.sort()
    return RopeScaling(
        head_dim=head_dim,
        theta=draw(st.sampled_from([1e4, 1e5, 5e5])),
        rescale_factors=factors,
        rotary_dim=rotary_dim,
        interleaved=draw(st.booleans()),
        start_tokens=draw(st.sampled_from([0, 0, 1, 4, 16, 64])) if start_tokens else 0,
        attention_factor=draw(st.sampled_from([1.0, 1.19, 0.9])),
    )


@st.composite
def problems(
    draw: st.DrawFn,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16),
    head_dims: Sequence[int] = HEAD_DIMS,
    max_tokens: int = 300,
) -> Problem:
    """Draw a whole problem: GQA, q shorter or longer than k, masks, padding, far positions, regimes, strides."""
    head_dim = draw(st.sampled_from(list(head_dims)))
    batch, key_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 4))
    key_tokens = draw(st.one_of(st.integers(1, 40), st.integers(1, max_tokens)))
    query_tokens = draw(st.one_of(st.just(key_tokens), st.integers(1, 9), st.integers(1, max_tokens)))
    dtype = draw(st.sampled_from(list(dtypes)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens_first = draw(st.booleans())  # [B, T, H, D] in memory, as projections leave it

    def operand(heads: int, tokens: int) -> Tensor:
        shape = (batch, tokens, heads, head_dim) if tokens_first else (batch, heads, tokens, head_dim)
        x = torch.randn(shape, generator=generator).to(dtype)
        return x.transpose(1, 2) if tokens_first else x

    regime = draw(scalings(head_dim))
    scaling: RopeScaling | LongRope = regime
    kwargs: dict[str, Any] = {"is_causal": draw(st.booleans())}
    if draw(st.booleans()):
        length = max(1, draw(st.integers(1, key_tokens)))
        long = regime.replace(rescale_factors=[1.7] * regime.pairs, attention_factor=1.1, start_tokens=2)
        scaling = LongRope(length, {length: regime, 4 * length: long})
    if draw(st.booleans()):
        kwargs["window"] = draw(st.one_of(st.integers(1, 80), st.tuples(st.integers(-1, 40), st.integers(-1, 40))))
    if draw(st.sampled_from([False, False, True])):
        kwargs["softcap"] = draw(st.sampled_from([2.0, 30.0]))
    if draw(st.booleans()):
        kwargs["scale"] = draw(st.sampled_from([0.05, 0.3]))
    if draw(st.booleans()):
        starts = [draw(st.integers(0, key_tokens)) for _ in range(batch)]
        kwargs["key_start"] = torch.tensor(starts)
        if draw(st.booleans()):
            kwargs["key_length"] = torch.tensor([draw(st.integers(0, key_tokens - start)) for start in starts])
    if draw(st.sampled_from([False, False, True])):
        kwargs["query_start"] = torch.tensor([draw(st.integers(-5, key_tokens)) for _ in range(batch)])
    if draw(st.booleans()):
        offset = draw(st.sampled_from([0, 1000, 2**20, 2**31 - 1 - 2 * max_tokens]))
        step = draw(st.sampled_from([1, 2]))
        key_positions = offset + step * torch.arange(key_tokens)
        kwargs["key_positions"] = key_positions if draw(st.booleans()) else key_positions.expand(batch, -1).clone()
        scattered = torch.randint(0, 2 * max_tokens, (batch, query_tokens), generator=generator)
        kwargs["query_positions"] = offset + scattered
    return Problem(
        operand(key_heads * group, query_tokens),
        operand(key_heads, key_tokens),
        operand(key_heads, key_tokens),
        scaling,
        kwargs,
    )


@dataclass
class CacheProblem:
    """A cache to fill in some cuts, and queries that are the last tokens of its sequences."""

    query: Tensor = field(repr=False)
    key: Tensor = field(repr=False)  # [batch, key_heads, longest sequence, head_dim]
    value: Tensor = field(repr=False)
    scaling: RopeScaling
    lengths: list[int]
    cuts: list[int]  # tokens of each append to the longest sequence
    quantised: bool | str
    page_tokens: int | None
    shape: str = ""

    def __post_init__(self) -> None:
        self.shape = f"query {tuple(self.query.shape)}, key {tuple(self.key.shape)}, {self.query.dtype}"

    def filled(self, backend: str | None, device: str = "cpu", at_once: bool = False) -> KVCache:
        """Return the cache as a backend fills it on a device, in the cuts or with one append."""
        batch, key_heads, tokens, head_dim = self.key.shape
        kind = (self.key.dtype, self.quantised, self.page_tokens)
        cache = KVCache(batch, key_heads, head_dim, tokens, *kind, device=device)
        at = 0
        for cut in [tokens] if at_once else self.cuts:
            count = (torch.tensor(self.lengths) - at).clamp(0, cut)
            key, value = (x[:, :, at : at + cut].to(device) for x in (self.key, self.value))
            cache.append(key, value, count.to(device), backend=backend)
            at += cut
        return cache


@st.composite
def cache_problems(
    draw: st.DrawFn,
    formats: Sequence[bool | str] = (False, "int8", "fp8"),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16),
    head_dims: Sequence[int] = HEAD_DIMS,
    max_tokens: int = 300,
) -> CacheProblem:
    """Draw a cache of a format, contiguous or in pages, how it is filled, and what asks it."""
    head_dim, dtype = draw(st.sampled_from(list(head_dims))), draw(st.sampled_from(list(dtypes)))
    lengths = draw(st.lists(st.integers(1, max_tokens), min_size=1, max_size=3))
    first = draw(st.integers(0, max(lengths)))
    quantised = draw(st.sampled_from(list(formats)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    query_tokens = draw(st.sampled_from([1, 1, 3, 30]))
    shapes = ((2 * draw(st.integers(1, 4)), query_tokens), (2, max(lengths)), (2, max(lengths)))
    query, key, value = (
        torch.randn(len(lengths), heads, tokens, head_dim, generator=generator).to(dtype) for heads, tokens in shapes
    )
    return CacheProblem(
        query,
        key,
        value,
        draw(scalings(head_dim)),
        lengths,
        [first, max(lengths) - first],
        quantised,
        draw(st.sampled_from([None, 64] if quantised else [None, 7, 64])),
    )


def plain_attention(problem: Problem) -> tuple[Tensor, Tensor]:
    """The plain computation of the error rule: eager, whole score matrix, in the dtype of the operands.

    Returns:
        out like query, and lse float32[batch, heads, tokens]. Differentiable in the operands.
    """
    query, key, value = problem.operands
    rotation, geometry = bundles_of(problem)
    inner = _definition._Problem(query.detach(), key.detach(), value.detach(), rotation, geometry)
    scores = _rotated(query, inner.query_cos, inner.query_sin, rotation).float() @ (
        inner.expand(_rotated(key, inner.key_cos, inner.key_sin, rotation)).float().mT
    )
    scores = scores * geometry.scale
    if geometry.softcap:
        scores = geometry.softcap * torch.tanh(scores / geometry.softcap)
    index = inner.slot_index[:, None, None, :]
    visible = (index >= inner.low[:, None, :, None]) & (index < inner.high[:, None, :, None])
    seen = visible.any(-1)
    scores = scores.masked_fill(~visible, -math.inf)
    lse = scores.masked_fill(~seen.unsqueeze(-1), 0.0).logsumexp(-1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).to(query.dtype).float()
    out = (weights @ inner.expand(value).float().masked_fill(~inner.inside, 0.0)).to(query.dtype)
    return out, lse.masked_fill(~seen, -math.inf)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, rotation: Rotation) -> Tensor:
    return _definition.rotate(x.float(), cos.float(), sin.float(), rotation.interleaved).to(x.dtype)


def bundles_of(problem: Problem) -> tuple[Rotation, Geometry]:
    """Return the rotation and geometry that `attention` would hand to a backend for this problem."""
    return functional.bundle(*problem.operands, problem.scaling, **problem.kwargs)


def assert_within_error_rule(
    name: str, actual: Tensor, plain: Tensor, exact: Tensor, angle_floor: float = 0.0, factor: float = 2.0
) -> None:
    """Assert the error rule: `max|actual - exact| <= factor * max|plain - exact| + floor`.

    Args:
        actual: of the kernel. plain: of the plain computation in the same dtype. exact: float64.
        angle_floor: absolute error that the angle budget explains.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    infinite = ~exact.isfinite()
    assert torch.equal(actual.double()[infinite], exact[infinite]), f"{name}: infinities at other places"
    if not actual.numel() or infinite.all():
        return
    error, allowed = ((x.double() - exact).masked_fill(infinite, 0.0).abs().max().item() for x in (actual, plain))
    largest = exact.masked_fill(infinite, 0.0).abs().max().item()
    floor = FLOOR_ULPS * torch.finfo(actual.dtype).eps * largest + angle_floor
    assert math.isfinite(error), f"{name}: not finite"
    assert error <= factor * allowed + floor, (
        f"{name}: error {error:.3g}, allowed {factor:g} x {allowed:.3g} (plain) + {floor:.3g} (floor)"
    )


def _angle_floor(problem: Problem) -> float:
    """What an error of ANGLE_BUDGET in cos and sin can move a score by."""
    _, geometry = bundles_of(problem)
    scalings_ = problem.scaling.scalings if isinstance(problem.scaling, LongRope) else (problem.scaling,)
    factor = max(scaling.attention_factor for scaling in scalings_)
    largest = problem.query.double().norm(dim=-1).amax() * problem.key.double().norm(dim=-1).amax()
    return 2 * ANGLE_BUDGET * factor**2 * geometry.scale * float(largest)


def check_attention(attention: Attention, problem: Problem) -> None:
    """Out and lse obey the error rule against float64."""
    out, lse = attention(*problem.operands, problem.scaling, return_lse=True, **problem.kwargs)
    exact, exact_lse = reference.attention(*problem.operands, problem.scaling, return_lse=True, **problem.kwargs)
    plain, plain_lse = plain_attention(problem)
    assert out.dtype == problem.query.dtype, f"out: {out.dtype}, expected {problem.query.dtype}"
    assert lse.dtype == torch.float32, f"lse: {lse.dtype}, expected torch.float32"
    floor = _angle_floor(problem)
    assert_within_error_rule("out", out, plain, exact, floor * float(problem.value.double().abs().amax()))
    assert_within_error_rule("lse", lse, plain_lse, exact_lse, floor + FLOOR_ULPS * 2.0**-23)


def check_bad_query(attention: Attention, problem: Problem, bad: float, row: int = 0) -> None:
    """A query that is not finite makes its row of out and lse not a number, and changes no bit of any other.

    Args:
        bad: what query `row` of the second head is filled with, in every sequence.
    """

    def results(query: Tensor) -> tuple[Tensor, Tensor]:
        _, key, value = problem.operands
        found: tuple[Tensor, Tensor] = attention(query, key, value, problem.scaling, return_lse=True, **problem.kwargs)
        return found

    spoilt = problem.query.clone()
    spoilt[:, 1, row] = bad
    hit = torch.zeros(spoilt.shape[:-1], dtype=torch.bool)
    hit[:, 1, row] = True
    for name, clean, found in zip(("out", "lse"), results(problem.query), results(spoilt), strict=True):
        assert found[hit].isnan().all(), f"{name}: a number in the row of a query that is none"
        assert torch.equal(found[~hit], clean[~hit]), f"{name}: another row has changed"


def check_gradients(attention: Attention, problem: Problem) -> None:
    """Gradients of query, key and value, through out and lse, obey the error rule against float64."""
    generator = torch.Generator().manual_seed(0)
    grad_out = torch.randn(problem.query.shape, generator=generator)
    grad_lse = torch.randn(problem.query.shape[:-1], generator=generator)

    def gradients(function: Callable[[Problem], tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in problem.operands]
        out, lse = function(problem.replace(query=leaves[0], key=leaves[1], value=leaves[2]))
        # A row that sees no key has lse -inf and gradient 0.
        lse = torch.where(lse.isinf(), 0.0, lse)
        loss = (out.double() * grad_out.to(problem.query.dtype).double()).sum() + (lse.double() * grad_lse).sum()
        return torch.autograd.grad(loss, leaves)

    def called(function: Attention) -> Callable[[Problem], tuple[Tensor, Tensor]]:
        return lambda p: function(*p.operands, p.scaling, return_lse=True, **p.kwargs)

    dtype = problem.query.dtype
    actual, plain = gradients(called(attention), dtype), gradients(plain_attention, dtype)
    exact = gradients(called(reference.attention), torch.float64)
    floor = 4 * _angle_floor(problem)
    for name, a, p, e in zip(("d query", "d key", "d value"), actual, plain, exact, strict=True):
        assert_within_error_rule(name, a, p, e, floor * max(float(e.abs().amax()), 1.0))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors hold the same; torch.equal does not take float8."""
    if a.dtype == b.dtype == torch.float8_e4m3fn:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return torch.equal(a, b)


def check_filling(problem: CacheProblem, backend: str | None = None, device: str = "cpu") -> None:
    """A cache holds the bits that the definition holds, however the appending was cut."""
    ours, at_once = (_on_cpu(problem.filled(backend, device, at_once).pages) for at_once in (False, True))
    exact = problem.filled("reference").pages
    for name in (f.name for f in dataclasses.fields(Pages)):
        a, b = getattr(ours, name), getattr(exact, name)
        assert a is None or same_bits(a, b), f"{name}: not the bits of the definition"
    # What was appended at once may lie in other pages.
    for name, a, b in zip(
        ("keys", "values"), gathered(ours, torch.float64), gathered(at_once, torch.float64), strict=True
    ):
        assert torch.equal(a, b), f"{name}: what is held depends on how the appending was cut"


def _on_cpu(pages: Pages) -> Pages:
    fields = ((f.name, getattr(pages, f.name)) for f in dataclasses.fields(Pages))
    moved: dict[str, Any] = {name: None if x is None else x.cpu() for name, x in fields}
    return Pages(**moved)


def check_reading(cache: KVCache, query: Tensor, scaling: RopeScaling, backend: str | None = None) -> None:
    """Out and lse of a cache obey the error rule against float64 over what it holds, dequantised."""
    length = cache.length.cpu()
    out, lse = cache.attend(query.to(cache.length.device), scaling, return_lse=True, backend=backend)
    key, value = gathered(_on_cpu(cache.pages), torch.float64)
    exact, exact_lse = reference.attention(query, key, value, scaling, key_length=length, return_lse=True)
    rounded = Problem(query, key.to(query.dtype), value.to(query.dtype), scaling, {"key_length": length})
    plain, plain_lse = plain_attention(rounded)
    assert_within_error_rule("out", out.cpu(), plain, exact, 1e-5)
    assert_within_error_rule("lse", lse.cpu(), plain_lse, exact_lse, 1e-5)


def check_cache(problem: CacheProblem, backend: str | None = None, device: str = "cpu") -> None:
    """`check_filling` and `check_reading`, of a cache on a device."""
    check_filling(problem, backend, device)
    check_reading(problem.filled(backend, device), problem.query, problem.scaling, backend)


def check_repeats(attention: Attention, problem: Problem) -> None:
    """Two calls give the same bits."""
    first, second = (attention(*problem.operands, problem.scaling, return_lse=True, **problem.kwargs) for _ in range(2))
    assert torch.equal(first[0], second[0]), "out differs from run to run"
    assert torch.equal(first[1], second[1]), "lse differs from run to run"


def _assert_same(actual: Tensor, expected: Tensor, bitwise: bool, message: str) -> None:
    if bitwise:
        assert torch.equal(actual, expected), message
    else:
        eps = torch.finfo(actual.dtype).eps
        assert torch.allclose(actual, expected, rtol=2 * eps, atol=2 * eps), message


def check_neighbours(attention: Attention, problem: Problem, bitwise: bool = True) -> None:
    """A sequence alone gives the same bits as in its batch."""
    rotation, _ = bundles_of(problem)
    together = attention(*problem.operands, problem.scaling, **problem.kwargs)
    ladder = isinstance(problem.scaling, LongRope)
    for b in range(problem.query.shape[0]):
        kwargs = {
            name: value[b : b + 1]
            if isinstance(value, Tensor)
            and value.shape[0] == problem.query.shape[0]
            and (value.dim() == 2 or name in ("key_start", "key_length", "query_start"))
            else value
            for name, value in problem.kwargs.items()
        }
        if ladder:
            kwargs["regime_index"] = rotation.regime_index[b : b + 1]
        alone = attention(*(x[b : b + 1] for x in problem.operands), problem.scaling, **kwargs)
        _assert_same(alone[0], together[b], bitwise, f"sequence {b} depends on its neighbours in the batch")


def check_left_padding(attention: Attention, problem: Problem, padding: int, bitwise: bool = True) -> None:
    """Slots before a sequence, whatever they hold, change nothing, bit for bit."""
    scaling = problem.scaling.scalings[0] if isinstance(problem.scaling, LongRope) else problem.scaling
    bare = attention(*problem.operands, scaling)
    junk = (torch.full((*x.shape[:2], padding, x.shape[3]), math.nan, dtype=x.dtype) for x in problem.operands)
    padded = [torch.cat((n, x), dim=2) for n, x in zip(junk, problem.operands, strict=True)]
    start = torch.full((problem.query.shape[0],), padding)
    out = attention(problem.query, *padded[1:], scaling, key_start=start)
    _assert_same(out, bare, bitwise, f"{padding} slots of left padding change the result")


def check_distance_alone(
    attention: Attention, problem: Problem, shift: int, dtype: torch.dtype = torch.float32
) -> None:
    """Moving all positions by the same amount changes only what the angle budget explains (no start tokens).

    In a `dtype` of 16 bits, also what rounding the rotated operands explains.
    """
    scaling = problem.scaling.scalings[0] if isinstance(problem.scaling, LongRope) else problem.scaling
    scaling = scaling.replace(start_tokens=0)
    query, key, value = (x.to(dtype) for x in problem.operands)
    at = torch.arange(key.shape[2])
    near, far = (
        attention(
            query,
            key,
            value,
            scaling,
            is_causal=False,
            key_positions=at + offset,
            query_positions=torch.arange(query.shape[2]) + offset,
        )
        for offset in (0, shift)
    )
    problem = problem.replace(query=query, key=key, value=value, kwargs={})
    eps = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    budget = 4 * (_angle_floor(problem) * (1 + eps / ANGLE_BUDGET) + 2 * eps) * float(value.abs().amax()) + 1e-5
    assert (near - far).abs().max() <= budget, f"moving by {shift} changes the output by {(near - far).abs().max():.3g}"


def check_rope(apply_rope: Callable[..., Any], problem: Problem, positions: Tensor) -> None:
    """Rotation is within the angle budget and a rounding of float64, and keeps norms (times the attention factor)."""
    scaling = problem.scaling.scalings[0] if isinstance(problem.scaling, LongRope) else problem.scaling
    query = problem.query
    key = problem.query[:, :1].contiguous()
    rotated = apply_rope(query, key, scaling, positions)
    exact = reference.apply_rope(query, key, scaling, positions)
    eps = torch.finfo(query.dtype).eps
    for name, x, e in zip(("query", "key"), rotated, exact, strict=True):
        assert e is not None
        largest = max(float(e.abs().max()), 1e-30)
        error = float((x.double() - e).abs().max())
        assert error <= (eps + 4 * ANGLE_BUDGET) * largest, f"{name}: error {error:.3g} at scale {largest:.3g}"
    turned = rotated[0].double()[..., : scaling.rotary_dim].norm(dim=-1)
    expected = query.double()[..., : scaling.rotary_dim].norm(dim=-1) * scaling.attention_factor
    assert torch.allclose(turned, expected, rtol=4 * eps + 1e-6, atol=1e-6), "norms are not kept"
    rest = slice(scaling.rotary_dim, None)
    assert torch.equal(rotated[0][..., rest], query[..., rest]), "dims past rotary_dim changed"
    below = positions < scaling.start_tokens
    if below.any():
        plain = apply_rope(query, key, scaling.replace(rescale_factors=None, start_tokens=0), positions)[0]
        assert torch.equal(rotated[0][:, :, below], plain[:, :, below]), "positions below start_tokens are rescaled"


def conformance(
    attention: Attention = functional.attention,
    apply_rope: Callable[..., Any] = functional.apply_rope,
    *,
    backend: str | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16),
    head_dims: Sequence[int] = HEAD_DIMS,
    max_tokens: int = 300,
    max_examples: int = 50,
    gradients: bool = True,
    bitwise: bool = True,
    caches: Sequence[bool | str] = (),
    device: str = "cpu",
) -> None:
    """Hold a kernel to the numerics contract: every property on `max_examples` hypothesis-drawn problems.

    Args:
        attention, apply_rope: callables with the arguments of those of `longrope_kernels`.
        backend: name handed to both as `backend=`, for ours.
        dtypes, head_dims, max_tokens: what the kernel supports.
        gradients: check backward too.
        bitwise: batch neighbours and padding must change no bit; False: nothing beyond a rounding.
        caches: formats of `KVCache` (its `quantised`) that our backend fills and reads, on `device`.

    Raises:
        AssertionError: with hypothesis' smallest failing problem.
    """
    if backend is not None:
        attention = functools.partial(attention, backend=backend)
        apply_rope = functools.partial(apply_rope, backend=backend)
    drawn = problems(dtypes=dtypes, head_dims=head_dims, max_tokens=max_tokens)
    small = problems(dtypes=dtypes, head_dims=head_dims, max_tokens=min(max_tokens, 80))
    positions = st.one_of(
        st.integers(0, 100).map(torch.tensor), st.sampled_from([2**20, 2**24 + 1, 2**31 - 1]).map(torch.tensor)
    )

    def run(check: Callable[..., None], *strategies: st.SearchStrategy[Any], share: float = 1.0) -> None:
        @settings(
            max_examples=max(1, int(share * max_examples)),
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.tuples(*strategies))
        def holds(drawn_values: tuple[Any, ...]) -> None:
            check(*drawn_values)

        holds()

    def rope(problem: Problem, first: Tensor) -> None:
        at = (first + torch.arange(problem.query.shape[2])).clamp(max=2**31 - 1)
        check_rope(apply_rope, problem, at)

    run(rope, drawn, positions)
    run(functools.partial(check_attention, attention), drawn)
    run(functools.partial(check_repeats, attention), drawn, share=0.3)
    run(functools.partial(check_neighbours, attention, bitwise=bitwise), drawn, share=0.5)
    run(
        functools.partial(check_left_padding, attention, bitwise=bitwise), _square(drawn), st.integers(1, 70), share=0.3
    )
    widest = torch.float32 if torch.float32 in dtypes else dtypes[0]
    distance = functools.partial(check_distance_alone, attention, dtype=widest)
    run(distance, drawn, st.sampled_from([1, 1000, 2**21, 2**30]), share=0.3)
    if gradients:
        run(functools.partial(check_gradients, attention), small, share=0.5)
    if caches:
        kept = cache_problems(caches, dtypes, head_dims, max_tokens)
        run(functools.partial(check_cache, backend=backend, device=device), kept, share=0.3)


def _square(drawn: st.SearchStrategy[Problem]) -> st.SearchStrategy[Problem]:
    """Problems with as many queries as keys."""

    def cut(problem: Problem) -> Problem:
        tokens = min(problem.query.shape[2], problem.key.shape[2])
        q, k, v = (x[:, :, :tokens] for x in problem.operands)
        return problem.replace(query=q, key=k, value=v, kwargs={})

    return drawn.map(cut)
