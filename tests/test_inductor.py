"""torch.compile with Inductor, its default: kernels of its own around our ops, forward, backward and over caches."""

import dataclasses
import shutil
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor_config

import longrope_kernels as lk
from longrope_kernels.backends import cpu, reference

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32" or not shutil.which("g++"), reason="Inductor needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore:longrope_kernels runs on the fp64 reference:RuntimeWarning"),
]

SCALING = lk.RopeScaling(head_dim=32, theta=1e4, rescale_factors=[1.5] * 16, start_tokens=2)
LADDER = lk.LongRope(8, {8: SCALING.replace(rescale_factors=None), 64: SCALING})
HEADS = (4, 2, 2)  # of queries, keys and values


@pytest.fixture(autouse=True)
def own_compilation():
    """Nothing compiled before is taken for ours. For a few small kernels no pool of processes is started, and nothing
    is compiled to find out which vectors the compiler knows."""
    torch._dynamo.reset()
    with inductor_config.patch({"compile_threads": 1, "cpp.vec_isa_ok": False}):
        yield
    torch._dynamo.reset()


def projected(batch, tokens, dtype=torch.float32):
    """Queries, keys and values as a model has them: the heads of a token beside each other in memory."""
    return [torch.randn(batch, tokens, heads, 32, dtype=dtype).transpose(1, 2) for heads in HEADS]


def layer(q, k, v, packed_q, packed_k, packed_v, bounds):
    """Every differentiable op. The steps around them round nothing, and no gradient has more than two terms, so fusing
    them changes no bit."""
    q, k, v = q * 2, k.relu(), v * 4
    turned, turned_key = lk.apply_rope(q, k, LADDER)
    out, lse = lk.attention(q, k, v, SCALING, softcap=4.0, window=9, return_lse=True)
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (packed_q * 2, packed_k.relu(), packed_v)]
    packed_out, packed_lse = lk.attention_varlen(*packed, bounds, scaling=LADDER, return_lse=True)
    return turned * 2, turned_key, out.relu(), lse, packed_out * 4, packed_lse * 2


def both_ways(compiled, batch, tokens, bounds, dtype=torch.float32):
    """Assert that the compiled layer gives the results and the gradients of the layer itself, bit for bit."""
    torch.manual_seed(tokens)
    inputs = [*projected(batch, tokens, dtype), *projected(batch, tokens, dtype)]
    results, gradients = [], []
    for function in (layer, compiled):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves, torch.tensor(bounds))
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(out, leaves, [torch.randn_like(x) for x in out]))
        results.append(out)
    for found in (results, gradients):
        for n, (expected, actual) in enumerate(zip(*found, strict=True)):
            assert torch.equal(actual, expected), (n, (actual - expected).abs().max())


def test_a_layer_and_its_gradients_have_the_same_bits():
    both_ways(torch.compile(layer, fullgraph=True), 2, 16, [0, 5, 32])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_graph_serves_all_lengths(dtype):
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    # Sizes that are equal at first are taken for one size, so they differ from each other and from the layer.
    both_ways(compiled, 3, 18, [0, 5, 9, 30, 54], dtype)
    compilations = counter.frame_count  # dynamo may have begun again
    for batch, tokens, bounds in ((7, 70, [0, 100, 210, 300, 301, 490]), (6, 9, [0] * 5 + [54])):
        both_ways(compiled, batch, tokens, bounds, dtype)
    assert counter.frame_count == compilations


@pytest.mark.parametrize(("backend", "quantised"), [(cpu, False), (cpu, "int8"), (reference, "fp8")])
def test_decoding_writes_the_cache_where_it_lies(monkeypatch, backend, quantised):
    if reason := backend.unavailable_reason():
        pytest.skip(reason)

    def step(q, k, v, pages):
        lk.apply_rope_in_place(q, None, SCALING, backend=backend.NAME)
        lk.cache_append(k * 2, v * 2, pages, backend=backend.NAME)
        pages.length.add_(1)
        return lk.attention_paged(q * 2, pages, LADDER, backend=backend.NAME).relu()

    addresses = []
    for op, at in (("cache_append", 2), ("attention_paged", 1)):
        run = getattr(backend, op)
        seen = lambda *given, run=run, at=at: addresses.append(given[at].key.data_ptr()) or run(*given)  # noqa: E731
        monkeypatch.setattr(backend, op, seen)

    torch.manual_seed(0)
    key, value = torch.randn(2, 2, 2, 62, 32)
    caches = [lk.KVCache(2, 2, 32, 128, torch.float32, quantised) for _ in range(2)]
    for cache in caches:
        cache.append(key, value, backend=backend.NAME)
    before = [x.pages.key.data_ptr() for x in caches]
    compiled = torch.compile(step, fullgraph=True)
    for _ in range(4):  # the third makes a group of a quantised cache whole
        inputs = projected(2, 1)
        same = [x.clone() for x in inputs]
        assert torch.equal(step(*inputs, caches[0].pages), compiled(*same, caches[1].pages))
        assert torch.equal(inputs[0], same[0])
        for field in dataclasses.fields(caches[0].pages):
            x, y = (getattr(cache.pages, field.name) for cache in caches)
            assert x is y is None or torch.equal(x.view(torch.uint8), y.view(torch.uint8))
    assert caches[1].length.tolist() == [66, 66]
    assert addresses[-4:] == [before[0]] * 2 + [before[1]] * 2
