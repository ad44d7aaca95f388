"""What is not a number stays visible: a score that is none makes its row none, and no other row."""

import pytest
import torch
from levels import every_backend_and_level

import longrope_kernels as lk
from longrope_kernels import testing

SCALING = lk.RopeScaling(head_dim=64, theta=1e4, rescale_factors=[1.0 + i / 8 for i in range(32)], start_tokens=5)
BAD = [float("nan"), float("inf"), float("-inf")]


def operands(dtype, queries, keys):
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, queries), (2, keys), (2, keys))
    return [torch.randn(1, heads, tokens, 64, generator=generator).to(dtype) for heads, tokens in shapes]


@every_backend_and_level
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize(("queries", "keys"), [(1, 40), (1, 2100), (8, 8), (70, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_is_not_finite_makes_its_row_not_a_number(backend, cpu_level, dtype, queries, keys, softcap, bad):
    problem = testing.Problem(*operands(dtype, queries, keys), SCALING, {"softcap": softcap, "backend": backend})
    testing.check_bad_query(lk.attention, problem, bad, row=queries // 2)


@every_backend_and_level
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("queries", "keys"), [(1, 40), (3, 2100), (8, 8), (70, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_key_that_is_not_finite_makes_every_row_that_sees_it_not_a_number(
    backend, cpu_level, dtype, queries, keys, bad
):
    query, key, value = operands(dtype, queries, keys)
    clean = lk.attention(query, key, value, SCALING, backend=backend)
    at = keys - 1 - queries // 2
    key[:, 0, at] = bad  # of the first key head, which the first two heads read
    out, lse = lk.attention(query, key, value, SCALING, return_lse=True, backend=backend)
    sees = torch.arange(keys - queries, keys) >= at
    assert out[:, :2, sees].isnan().all()
    assert lse[:, :2, sees].isnan().all()
    assert torch.equal(out[:, :2, ~sees], clean[:, :2, ~sees])
    assert torch.equal(out[:, 2:], clean[:, 2:])


@every_backend_and_level
def test_a_query_that_is_not_a_number_shows_in_the_gradients_of_what_it_read(backend, cpu_level):
    query, key, value = (x.requires_grad_() for x in operands(torch.float32, 70, 70))
    with torch.no_grad():
        query[:, 1, 40] = float("nan")
    lk.attention(query, key, value, SCALING, backend=backend).sum().backward()
    assert query.grad[:, 1, 40].isnan().all()
    assert key.grad[:, 0, :41].isnan().all()
    assert value.grad[:, 0, :41].isnan().all()
    assert not query.grad[:, 0].isnan().any()
    assert not key.grad[:, 1].isnan().any()
