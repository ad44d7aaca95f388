"""The CUDA backend on a GPU: conformance in its dtypes, long sequences, the same bits in every run.

LONGROPE_KERNELS_DRY_RUN=1 takes the same steps in the emulator, on few examples (bench/gpu.sh).
"""

import functools
import os

import pytest
import torch

import longrope_kernels as lk
from longrope_kernels import testing
from longrope_kernels.backends import cuda

DRY = os.environ.get("LONGROPE_KERNELS_DRY_RUN") == "1"
if not DRY and (not torch.cuda.is_available() or cuda.unavailable_reason() is not None):
    pytest.skip(f"needs a GPU and the CUDA module: {cuda.unavailable_reason()}", allow_module_level=True)

DEVICE = "cpu" if DRY else "cuda"
DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True, scope="module")
def emulated():
    """In a dry run the backend's kernels are the emulator's, Hopper's own among them."""
    if not DRY:
        yield
        return
    from bench import layouts

    before = cuda.emulate(layouts.emulator(), hopper=True)
    yield
    cuda.emulate(before)


@pytest.fixture(params=["", "ampere"], ids=["its own", "of Ampere"])
def kernels(request):
    """The kernels of the GPU, and where Hopper has its own, those of Ampere."""
    if not request.param:
        yield
        return
    if not cuda.runs_hopper_kernels(torch.device(DEVICE)):
        pytest.skip("this GPU has no others")
    with cuda.ampere_kernels():
        yield


def on_device(function):
    """The function of the CUDA backend, its tensors taken to the GPU and its results brought back."""

    def moved(x, device):
        return x.to(device) if isinstance(x, torch.Tensor) else x

    @functools.wraps(function)
    def run(*arguments, **options):
        options = {name: moved(x, DEVICE) for name, x in options.items()}
        result = function(*(moved(x, DEVICE) for x in arguments), backend="cuda", **options)
        return tuple(moved(x, "cpu") for x in result) if isinstance(result, tuple) else moved(result, "cpu")

    return run


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("head_dims", [[64, 96, 128], [192, 256]])
def test_conforms(head_dims):
    testing.conformance(
        on_device(lk.attention),
        on_device(lk.apply_rope),
        dtypes=DTYPES,
        head_dims=head_dims,
        max_tokens=100 if DRY else 600,
        max_examples=1 if DRY else 60,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantised", [False, "int8", "fp8"])
def test_a_cache_is_read_and_filled_as_the_definition_says(dtype, quantised):
    torch.manual_seed(0)
    key, value = torch.randn(2, 2, 2, 157, 64).to(dtype)
    scaling = lk.RopeScaling(64, 1e4, [1.0 + i / 8 for i in range(32)], start_tokens=70, attention_factor=1.1)
    for query_tokens in (1, 40):
        query = torch.randn(2, 8, query_tokens, 64).to(dtype)
        problem = testing.CacheProblem(query, key, value, scaling, [157, 90], [100, 57], quantised, 64)
        testing.check_cache(problem, "cuda", DEVICE)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_long_sequences_keep_to_the_error_of_the_plain_computation(head_dim):
    torch.manual_seed(0)
    tokens = 200 if DRY else 4096
    q, k, v = (torch.randn(1, heads, tokens, head_dim).bfloat16() for heads in (4, 2, 2))
    scaling = lk.RopeScaling(head_dim, 1e4)
    attention = on_device(lk.attention)
    out = attention(q, k, v, scaling)
    plain, _ = testing.plain_attention(testing.Problem(q, k, v, scaling, {}))
    exact = lk.attention(q.double(), k.double(), v.double(), scaling, backend="reference")
    testing.assert_within_error_rule("out", out, plain, exact, 1e-5)
    assert all(torch.equal(attention(q, k, v, scaling), out) for _ in range(2 if DRY else 20))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_gradients_of_long_sequences_are_those_of_the_reference_and_the_same_in_every_run(head_dim):
    torch.manual_seed(0)
    tokens = 200 if DRY else 2048
    operands = [torch.randn(1, heads, tokens, head_dim).bfloat16() for heads in (4, 2, 2)]
    weight = torch.randn_like(operands[0])
    scaling = lk.RopeScaling(head_dim, 1e4)

    def gradients(attention, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in operands]
        return torch.autograd.grad((attention(*leaves, scaling) * weight).float().sum(), leaves)

    exact = gradients(functools.partial(lk.attention, backend="reference"), torch.float64)
    runs = [gradients(on_device(lk.attention), torch.bfloat16) for _ in range(2 if DRY else 20)]
    for x, wanted in zip(runs[0], exact, strict=True):
        assert (x - wanted).abs().max() < 0.02 * wanted.abs().max()
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
