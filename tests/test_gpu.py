"""The Triton backend on a GPU: conformance in all dtypes, caches, packed batches, a captured decode.

LONGROPE_KERNELS_DRY_RUN=1 with TRITON_INTERPRET=1 takes the same steps without one, on few examples (bench/gpu.sh).
"""

import functools
import os

import pytest
import torch

import longrope_kernels as lk
from longrope_kernels import testing

DRY = os.environ.get("LONGROPE_KERNELS_DRY_RUN") == "1" and os.environ.get("TRITON_INTERPRET") == "1"
if not DRY and not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

DEVICE = "cpu" if DRY else "cuda"
DTYPES = [torch.float16] if DRY else [torch.float32, torch.float16, torch.bfloat16]
SCALING = lk.RopeScaling(64, 1e4, [1.0 + i / 8 for i in range(32)], start_tokens=70, attention_factor=1.1)


def moved(x, device):
    return x.to(device) if isinstance(x, torch.Tensor) else x


def on_device(function):
    """The function with its tensors taken to the GPU and its results brought back."""

    @functools.wraps(function)
    def run(*arguments, **options):
        result = function(
            *(moved(x, DEVICE) for x in arguments), **{name: moved(x, DEVICE) for name, x in options.items()}
        )
        return tuple(moved(x, "cpu") for x in result) if isinstance(result, tuple) else moved(result, "cpu")

    return functools.partial(run, backend="triton")


def test_conforms():
    examples = {"max_examples": 1, "head_dims": [32], "max_tokens": 60} if DRY else {"max_examples": 60}
    testing.conformance(on_device(lk.attention), on_device(lk.apply_rope), dtypes=DTYPES, **examples)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantised", [False, "int8", "fp8"])
def test_a_cache_is_read_and_filled_as_the_definition_says(dtype, quantised):
    torch.manual_seed(0)
    key, value = torch.randn(2, 2, 2, 157, 64).to(dtype)
    for query_tokens in (1, 3, 40):
        query = torch.randn(2, 8, query_tokens, 64).to(dtype)
        problem = testing.CacheProblem(query, key, value, SCALING, [157, 90], [100, 57], quantised, 64)
        testing.check_cache(problem, "triton", DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_sequence_is_what_it_is_alone(dtype):
    torch.manual_seed(0)
    operands = [torch.randn(190, heads, 64, device=DEVICE).to(dtype).requires_grad_() for heads in (4, 2, 2)]
    bounds = torch.tensor([0, 100, 100, 190], device=DEVICE)
    out = lk.attention_varlen(*operands, bounds, scaling=SCALING, backend="triton")
    grads = torch.autograd.grad(out.float().square().sum(), operands)
    for rows in (slice(0, 100), slice(100, 190)):
        alone = [x[rows].detach().cpu().double().transpose(0, 1).unsqueeze(0).requires_grad_() for x in operands]
        exact = lk.attention(*alone, SCALING, backend="reference")
        pairs = [(out[rows], exact)]
        pairs += zip((x[rows] for x in grads), torch.autograd.grad(exact.square().sum(), alone), strict=True)
        for actual, expected in pairs:
            error = (actual.cpu().double() - expected[0].transpose(0, 1)).detach().abs().max()
            assert error < 16 * torch.finfo(dtype).eps * max(1.0, float(expected.detach().abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_through_tensor_descriptors_give_the_same(dtype):
    from longrope_kernels.backends.triton import configs, descriptors, launch

    if descriptors.TensorDescriptor is None or launch.target_of(torch.device(DEVICE)) not in configs.DESCRIPTOR_TARGETS:
        pytest.skip("this Triton or this GPU has no tensor descriptors")
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 300, 64, device=DEVICE).to(dtype) for heads in (4, 2, 2))
    starts = torch.tensor([0, 37], device=DEVICE)
    results = []
    for wanted in (False, True):
        with configs.by_descriptors(wanted):
            results.append(lk.attention(query, key, value, SCALING, key_start=starts, backend="triton"))
    # The interpreter gives the same bits; compilers may fuse multiply-adds otherwise in two kernels.
    assert torch.allclose(*results, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.skipif(DRY, reason="graphs are of a GPU")
def test_a_decoding_step_can_be_captured_and_replayed():
    ladder = lk.LongRope(100, {100: lk.RopeScaling(64, 1e4), 400: SCALING})
    torch.manual_seed(0)
    key, value = torch.randn(2, 1, 2, 300, 64, device=DEVICE).bfloat16()
    query = torch.randn(1, 8, 1, 64, device=DEVICE).bfloat16()
    pages = lk.KVCache(1, 2, 64, 320, device=DEVICE).pages
    new = [x[:, :, :1].clone() for x in (key, value)]

    def step():
        lk.cache_append(*new, pages)
        pages.length.add_(1)
        return lk.attention_paged(query, pages, ladder)

    step()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = step()
    pages.length.zero_()
    for t in range(300):
        for x, source in zip(new, (key, value), strict=True):
            x.copy_(source[:, :, t : t + 1])
        graph.replay()
        if t in (0, 99, 100, 299):
            expected = lk.attention(query, key[:, :, : t + 1], value[:, :, : t + 1], ladder)
            assert torch.allclose(out, expected, rtol=0, atol=2e-2), t
