"""Context parallelism: ranks that hold a part of a sequence each compute what one rank computes on the whole."""

import functools
import math

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor

import longrope_kernels as lk
from longrope_kernels import distributed as cp
from longrope_kernels.bundles import Geometry

PLAIN = lk.RopeScaling(head_dim=32, theta=1e3)
LONG = PLAIN.replace(rescale_factors=[1 + i / 4 for i in range(16)], start_tokens=5, attention_factor=1.1)
LADDER = lk.LongRope(40, {40: PLAIN, 96: LONG})
FACTORS = [1.3] * 16
RESULTS = ("out", "lse", "dq", "dk", "dv")

CASES = {
    "causal": {},
    "not causal": {"is_causal": False},
    "padded": {"key_length": torch.tensor([96, 37])},
    "a window, softcap": {"window": 21, "softcap": 5.0},
    "a window on both sides": {"window": (30, 11), "is_causal": False, "scale": 0.3},
    "a padded window": {"window": (17, 3), "is_causal": False, "key_length": torch.tensor([50, 96])},
    "the regime given": {"regime_index": torch.tensor([0, 1])},
}


def operands(tokens: int = 96, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, tokens, 32, generator=generator).to(dtype) for heads in (4, 2, 2)]


def weights(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """What a loss multiplies them with."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(out.shape, generator=generator), torch.randn(lse.shape, generator=generator)


def loss(out: Tensor, lse: Tensor, by: tuple[Tensor, Tensor]) -> Tensor:
    return (out * by[0]).sum() + (torch.where(lse.isinf(), 0.0, lse) * by[1]).sum()


def whole(dtype: torch.dtype, options: dict, tokens: int = 96, backend: str | None = None) -> list[Tensor]:
    """One rank's out, lse and gradients."""
    leaves = [x.requires_grad_() for x in operands(tokens, dtype)]
    options = {"query_start": torch.zeros(2, dtype=torch.int64), **options}
    out, lse = lk.attention(*leaves, LADDER, return_lse=True, backend=backend, **options)
    by = weights(out, lse)
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss(out, lse, by), leaves)]


def ring(dtype: torch.dtype, options: dict, tokens: int = 96, backend: str | None = None) -> list[Tensor]:
    """The same on the ranks of the group, put together."""
    q, k, v = operands(tokens, dtype)
    by = tuple(cp.shard(x, 2) for x in weights(q, q[..., 0]))
    leaves = [cp.shard(x, 2).requires_grad_() for x in (q, k, v)]
    out, lse = cp.ring_attention(*leaves, LADDER, return_lse=True, backend=backend, **options)
    grads = torch.autograd.grad(loss(out, lse, by), leaves)
    return [cp.unshard(x, 2) for x in (out, lse, *grads)]


def rings() -> dict[str, list[Tensor]]:
    """Every case, in float64 by the reference and in float32 by the kernels."""
    exact = {name: ring(torch.float64, options, backend="reference") for name, options in CASES.items()}
    return exact | {f"{name}, float32": ring(torch.float32, options) for name, options in CASES.items()}


@functools.cache
def found(count: int) -> list[dict[str, list[Tensor]]]:
    """What each of `count` ranks found."""
    return ranks.run(count, rings)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_ranks_agree_with_one(count: int, name: str) -> None:
    expected = whole(torch.float64, CASES[name], backend="reference")
    for rank, cases in enumerate(found(count)):
        for case, tolerance in ((name, 1e-12), (f"{name}, float32", 1e-5)):
            for what, a, b in zip(RESULTS, cases[case], expected, strict=True):
                assert torch.allclose(a.double(), b, rtol=0, atol=tolerance), f"{what} of {case} on rank {rank}"


def test_bf16_on_two_ranks_errs_as_on_one() -> None:
    exact = whole(torch.float64, {}, 512, "reference")
    one = whole(torch.bfloat16, {}, 512)
    two, other = ranks.run(2, ring, torch.bfloat16, {}, 512)
    assert all(torch.equal(a, b) for a, b in zip(two, other, strict=True))
    for what, a, b, c in zip(RESULTS, two, one, exact, strict=True):
        assert a.dtype == b.dtype
        errors = [float((x.double() - c).norm() / c.norm()) for x in (a, b)]
        assert errors[0] < 1.2 * errors[1], f"{what}: {errors[0]:.1e} beside {errors[1]:.1e}"


def test_runs_are_bitwise_equal() -> None:
    name = "a window, softcap, float32"
    again = ranks.run(3, ring, torch.float32, CASES["a window, softcap"])[0]
    assert all(torch.equal(a, b) for a, b in zip(found(3)[0][name], again, strict=True))


def factor_gradient() -> Tensor:
    factors = torch.tensor(FACTORS, dtype=torch.float64, requires_grad=True)
    scaling = PLAIN.replace(rescale_factors=factors, start_tokens=7)
    q, k, v = (cp.shard(x.double(), 2) for x in operands())
    out = cp.ring_attention(q, k, v, scaling, backend="reference")
    (out * out.detach().cos()).sum().backward()
    if dist.is_initialized():
        dist.all_reduce(factors.grad)
    return factors.grad


def test_the_gradients_of_the_factors_add_up_over_the_ranks() -> None:
    expected = factor_gradient()
    assert expected.abs().min() > 1e-6
    assert torch.allclose(ranks.run(3, factor_gradient)[1], expected, rtol=1e-9)


def test_one_rank_needs_no_group() -> None:
    for a, b in zip(ring(torch.float32, {}), whole(torch.float32, {}), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def in_a_subgroup() -> list[Tensor] | None:
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        with pytest.raises(ValueError, match="group: got one without this rank"):
            cp.positions(8, group)
        return None
    q, k, v = (cp.shard(x, 2, group) for x in operands())
    return [cp.unshard(cp.ring_attention(q, k, v, LADDER, group=group), 2, group)]


def test_a_group_may_be_a_part_of_all_ranks() -> None:
    expected = whole(torch.float32, {})[0]
    _, *found = ranks.run(3, in_a_subgroup)
    assert all(torch.allclose(one[0], expected, atol=1e-5) for one in found)


def test_the_parts_are_the_whole_in_zigzag_order() -> None:
    def held(rank: int) -> list[int]:
        return [index for start in cp._starts(rank, 3, 2) for index in range(start, start + 2)]

    assert [held(rank) for rank in range(3)] == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]


def test_a_causal_mask_costs_every_rank_the_same() -> None:
    causal = Geometry(*[None] * 5, 1.0, True, -1, -1, 0.0)
    for source in range(4):
        for rank in set(range(4)) - {source}:
            (piece,) = cp.pieces(rank, source, 4, 8, causal)
            rows, columns = (len(range(16)[part]) for part in (piece.queries, piece.keys))
            assert rows * columns == 128  # half of 16 x 16


def test_blocks_out_of_the_windows_reach_cost_nothing() -> None:
    windowed = Geometry(*[None] * 5, 1.0, True, 7, -1, 0.0)
    counts = [[len(cp.pieces(rank, source, 4, 8, windowed)) for source in range(4)] for rank in range(4)]
    # Each chunk sees itself and the one before it.
    assert counts == [[2, 1, 0, 0], [1, 2, 1, 0], [0, 1, 2, 1], [0, 0, 1, 3]]


@pytest.mark.parametrize("seen", [(True, True), (True, False), (False, True), (False, False)])
def test_merging_is_attention_over_both_sets_and_defined_where_nothing_is_seen(seen: tuple[bool, bool]) -> None:
    q, k, v = (x.double().requires_grad_() for x in operands(6))
    lengths = [torch.full((2,), 3 if one else 0) for one in seen]
    parts = []
    for half, length in zip((slice(0, 3), slice(3, 6)), lengths, strict=True):
        options = {"is_causal": False, "key_length": length, "return_lse": True, "backend": "reference"}
        parts += lk.attention(q, k[:, :, half], v[:, :, half], None, **options)
    out, lse = cp.merge(*parts)
    kept = [i for i in range(6) if seen[i // 3]]
    expected = lk.attention(
        q, k[:, :, kept], v[:, :, kept], None, is_causal=False, return_lse=True, backend="reference"
    )
    by = weights(out, lse)
    found = [out, lse, *torch.autograd.grad(loss(out, lse, by), (q, k, v))]
    wanted = [*expected, *torch.autograd.grad(loss(*expected, by), (q, k, v))]
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    if not any(seen):
        assert torch.equal(lse, torch.full_like(lse, -math.inf))


def test_gradients_of_some_keys_under_the_lse_of_all_are_their_part() -> None:
    """What the ring rests on, of every backend."""
    q, k, v = (x.requires_grad_() for x in operands(64))
    out, lse = lk.attention(q, k, v, PLAIN, is_causal=False, return_lse=True)
    by = weights(out, lse)
    expected = torch.autograd.grad(loss(out, lse, by), (q, k, v))
    for backend in ("cpu", "reference"):
        if lk.backends.unavailable_reason(backend) is not None:
            continue
        total = torch.zeros(2, 4, 64, 32)
        for part in (slice(0, 20), slice(20, 64)):
            at = torch.arange(64)
            rotation, geometry = lk.functional.bundle(
                q, k[:, :, part], v[:, :, part], PLAIN, False, query_positions=at, key_positions=at[part]
            )
            module = getattr(lk.backends, backend)
            dq, dk, dv, _ = module.attention_backward(
                *by, q, k[:, :, part].detach(), v[:, :, part].detach(), out, lse, rotation, geometry, False
            )
            total += dq
            assert torch.allclose(dk, expected[1][:, :, part], atol=1e-4)
            assert torch.allclose(dv, expected[2][:, :, part], atol=1e-4)
        assert torch.allclose(total, expected[0], atol=1e-4)


def refused(case: str) -> str:
    tokens = 8 + 2 * dist.get_rank() if case == "unequal" else 7 if case == "odd" else 8
    q, k, v = (torch.zeros(1, heads, tokens, 32) for heads in (2, 1, 1))
    try:
        cp.ring_attention(q, k[:, :, : 4 if case == "fewer keys" else None], v, PLAIN)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("case", "line"),
    [
        (
            "unequal",
            "query: got shape (1, 2, 8, 32) here and sizes from [1, 2, 8, 32] to [1, 2, 10, 32] over",
        ),
        ("odd", "query: got 7 tokens, expected an even number"),
        ("fewer keys", "key: got 4 tokens, expected those of query, 8"),
    ],
)
def test_bad_arguments_are_refused_on_every_rank(case: str, line: str) -> None:
    said = ranks.run(2, refused, case)
    assert said[0].startswith(line)
    assert said[1]


def test_a_length_that_does_not_divide_is_named() -> None:
    with pytest.raises(ValueError, match=r"tokens: got 7, expected a multiple of 2"):
        cp.shard(torch.zeros(7), 0)
    with pytest.raises(ValueError, match="group: got str, expected None"):
        cp.positions(8, "all")
