"""The CPU kernels' instruction sets: each serves the whole contract alone, and a level that cannot be is refused."""

import pytest
import torch
from levels import LEVELS, every_level

import longrope_kernels as lk
from longrope_kernels import testing
from longrope_kernels.backends import cpu, native

pytestmark = pytest.mark.skipif(not cpu.levels(), reason="the native module is not built")

SCALING = lk.RopeScaling(head_dim=64, theta=1e4, rescale_factors=[1.0 + i / 8 for i in range(32)], start_tokens=5)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def operands(dtype=torch.float32, tokens=200, batch=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, tokens, 64, generator=generator).to(dtype) for heads in (4, 2, 2)]


def test_portable_kernels_are_in_every_build_and_the_best_level_is_the_default(monkeypatch):
    monkeypatch.delenv("LONGROPE_KERNELS_CPU_LEVEL", raising=False)
    assert cpu.levels()[-1] == "portable"
    assert cpu.level() == cpu.levels()[0]


@pytest.mark.parametrize("level", ["avx1024", "AVX2", "avx"])
def test_an_unknown_level_is_one_line(level, monkeypatch):
    monkeypatch.setenv("LONGROPE_KERNELS_CPU_LEVEL", level)
    with pytest.raises(
        ValueError, match=f"^LONGROPE_KERNELS_CPU_LEVEL: got '{level}', expected one .* have: .*portable$"
    ):
        lk.attention(*operands(), SCALING)


@pytest.mark.skipif(len(LEVELS) < 2, reason="this machine has the portable kernels only")
def test_a_level_that_the_processor_lacks_is_one_line(monkeypatch):
    monkeypatch.setattr(cpu, "levels", lambda: ["portable"])
    monkeypatch.setenv("LONGROPE_KERNELS_CPU_LEVEL", LEVELS[0])
    with pytest.raises(
        ValueError, match=f"^LONGROPE_KERNELS_CPU_LEVEL: got '{LEVELS[0]}', expected one .* have: portable$"
    ):
        lk.attention(*operands(), SCALING)


def test_the_native_module_refuses_a_level_by_itself():
    with pytest.raises(
        ValueError, match=r"^LONGROPE_KERNELS_CPU_LEVEL: got 'avx1024', expected one .* have: .*portable$"
    ):
        cpu._native.attention_forward("avx1024", _arguments())


def _arguments():
    query, key, value = operands()
    rotation, geometry = testing.bundles_of(testing.Problem(query, key, value, SCALING, {}))
    out, lse = torch.empty_like(query), torch.empty(query.shape[:-1])
    return native.batch_arguments(query, key, value, out, lse, rotation, geometry)[0]


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype):
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = [x.requires_grad_() for x in operands(dtype)]
            out = lk.attention(*leaves, SCALING, backend="cpu")
            rotated = lk.apply_rope(*leaves[:2], SCALING, backend="cpu")
            gradients = torch.autograd.grad((out * out.detach().cos()).sum(), leaves)
            results.append((out, *rotated, *gradients))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_gradient_of_a_rotation_rotates_back(dtype, interleaved):
    scaling = SCALING.replace(rescale_factors=[1.5] * 20, rotary_dim=40, interleaved=interleaved, attention_factor=1.1)
    positions = torch.arange(200) + 2**20
    query, key, _ = (x.requires_grad_() for x in operands(dtype))
    rotated = lk.apply_rope(query, key, scaling, positions, backend="cpu")
    back = torch.autograd.grad(rotated, (query, key), [x.detach() for x in rotated])
    eps = torch.finfo(dtype).eps
    for x, gradient in zip((query, key), back, strict=True):
        expected = x.detach().double()
        expected[..., :40] *= 1.1**2  # the attention factor is in both rotations
        assert (gradient.double() - expected).abs().max() <= (2 * eps + 2e-6) * expected.abs().max()


@every_level
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("tokens", "offset"), [(60, 0), (60, 10**6), (1200, 0)])  # of the last, parts are summed
def test_the_gradient_of_the_factors_is_that_of_float64(dtype, tolerance, tokens, offset):
    at = torch.arange(tokens) + offset

    def gradient(backend, to):
        factors = torch.linspace(1, 3, 32, dtype=torch.float64, requires_grad=True)
        scaling = lk.RopeScaling(head_dim=64, theta=1e4, rescale_factors=factors)
        leaves = [x.to(to) for x in operands(dtype, tokens, batch=2 if tokens == 60 else 1)]
        out = lk.attention(*leaves, scaling, query_positions=at, key_positions=at, backend=backend)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(to)
        return torch.autograd.grad((out * weight).sum(), factors)[0]

    exact = gradient("reference", torch.float64)
    tolerance += 3e-8 * offset  # positions multiply the rounding of fp32 gradients: what is left where both cancel
    assert (gradient("cpu", dtype) - exact).norm() <= tolerance * exact.norm()


BEYOND = {  # query_start, key_length and window of sequences whose queries see nothing, or only some of them do
    "past the last key": ([500, 0], [20, 200], 21),
    "at the last key": ([0, 180], [190, 200], 30),
    "no keys": ([0, 400], [0, 0], 150),
    "before the first key": ([-300, -100], [200, 200], None),
}


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BEYOND)
def test_queries_that_see_nothing_add_nothing_to_any_gradient(case, dtype):
    start, length, window = BEYOND[case]
    options = {"query_start": torch.tensor(start), "key_length": torch.tensor(length), "window": window}
    testing.check_gradients(lk.attention, testing.Problem(*operands(dtype), SCALING, options))


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_query_that_sees_nothing_may_be_nan(softcap, dtype):
    """It adds nothing to the gradients of keys and values, nor has one, though other rows of its strip see keys."""

    def gradients(bad):
        query, key, value = operands(dtype, batch=1)
        query[:, :, 45:50] = bad
        leaves = [x.requires_grad_() for x in (query, key, value)]
        out = lk.attention(*leaves, SCALING, query_start=torch.tensor([-50]), softcap=softcap)
        return torch.autograd.grad(out.float().square().sum(), leaves)

    for clean, found in zip(gradients(1.0), gradients(torch.nan), strict=True):
        assert torch.equal(clean, found)
