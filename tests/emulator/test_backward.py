"""Gradients of the emulated kernels, those for Ampere and those for Hopper, beside what the conformance suite already
holds them to.
"""

import pytest
import torch

import longrope_kernels as lk

from .test_kernels import operands


@pytest.fixture(params=["emulated", "hopper"])
def kernels(request):
    return request.getfixturevalue(request.param)


def gradients(backend, dtype=torch.float16, start_tokens=0, offset=0):
    """Of query, key, value and the rescale factors, through out and lse."""
    factors = torch.linspace(1, 4, 16, dtype=torch.float64).requires_grad_()
    scaling = lk.RopeScaling(32, 1e4, factors, start_tokens=start_tokens)
    leaves = [x.requires_grad_() for x in operands(2, (4, 2), (70, 90), 32, dtype)]
    at = torch.arange(90) + offset
    options = {"query_positions": at[:70], "key_positions": at, "window": 50, "softcap": 20.0}
    out, lse = lk.attention(*leaves, scaling, **options, return_lse=True, backend=backend)
    return torch.autograd.grad((out.float() ** 2).sum() + lse.sin().sum(), [*leaves, factors])


@pytest.mark.parametrize("start_tokens", [0, 20])
def test_gradient_of_the_rescale_factors(kernels, start_tokens):
    actual, exact = (gradients(backend, start_tokens=start_tokens)[3] for backend in ("cuda", "reference"))
    assert torch.allclose(actual, exact, rtol=0.02, atol=0.01 * float(exact.abs().max()))


def test_gradient_of_the_rescale_factors_does_not_move_with_the_positions(kernels):
    near, far = (gradients("cuda", offset=offset)[3] for offset in (0, 10**6))
    assert (near - far).abs().max() < 0.1 * near.abs().max()


def test_the_order_of_warps_and_blocks_changes_no_bit_of_a_gradient(kernels):
    results = []
    for seed in range(3):
        kernels.seed(seed)
        results.append(gradients("cuda"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradients_of_a_packed_batch_are_those_of_its_sequences(kernels):
    scaling = lk.RopeScaling(64, 1e4)
    lengths = [3, 70, 0, 20]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(sum(lengths), heads, 64, generator=generator).bfloat16().requires_grad_() for heads in (4, 2, 2)
    ]
    out = lk.attention_varlen(*leaves, bounds, bounds, scaling, backend="cuda")
    weight = torch.randn(out.shape, generator=generator).bfloat16()
    packed = torch.autograd.grad(out, leaves, weight)
    for b, count in enumerate(lengths):
        rows = slice(int(bounds[b]), int(bounds[b + 1]))
        if count == 0:
            continue
        alone = [x[rows].detach().transpose(0, 1).unsqueeze(0).requires_grad_() for x in leaves]
        one = lk.attention(*alone, scaling, backend="cuda")
        wanted = torch.autograd.grad(one, alone, weight[rows].transpose(0, 1).unsqueeze(0))
        for a, e in zip(packed, wanted, strict=True):
            assert torch.equal(a[rows], e[0].transpose(0, 1))


def test_head_dims_without_backward_kernels_are_refused(kernels):
    leaves = [x.requires_grad_() for x in operands(tokens=(5, 5), head_dim=256)]
    out = lk.attention(*leaves, lk.RopeScaling(256, 1e4), backend="cuda")
    with pytest.raises(lk.BackendUnavailableError, match="no backward kernels for head_dim 256"):
        out.sum().backward()
