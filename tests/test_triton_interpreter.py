"""The Triton kernels on CPU tensors, in Triton's interpreter: in a process of its own, which test_triton.py starts.

float32 and float16 only: the interpreter's bfloat16 loads and products are wrong.
"""

import os
import pathlib

import pytest
import torch
from opchecks import check_what_ops_say

import longrope_kernels as lk
from longrope_kernels import backends, testing
from longrope_kernels.backends import triton as triton_backend
from longrope_kernels.backends.composed import gathered
from longrope_kernels.bundles import Geometry, Packing, Pages

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process", allow_module_level=True)

import triton
import triton.language as tl

from longrope_kernels.backends.triton import launch, pages, plans, plans_backward

if reason := launch.interpreter_reason():
    pytest.skip(reason, allow_module_level=True)

DTYPES = [torch.float32, torch.float16]
ROOT = pathlib.Path(__file__).parent.parent


def both(function):
    return function("triton"), function("reference")


def operands(batch=2, query_heads=4, key_heads=2, queries=70, keys=100, head_dim=64):
    torch.manual_seed(0)
    shapes = ((query_heads, queries), (key_heads, keys), (key_heads, keys))
    return [torch.randn(batch, heads, tokens, head_dim) for heads, tokens in shapes]


def scaling(head_dim=64, **changes):
    return lk.RopeScaling(
        head_dim=head_dim, theta=1e4, rescale_factors=torch.linspace(1, 8, head_dim // 2).tolist(), **changes
    )


def test_conforms():
    options = {"head_dims": [32, 64], "max_tokens": 80, "max_examples": 6}
    testing.conformance(backend="triton", dtypes=DTYPES, caches=[False, "int8", "fp8"], **options)


@pytest.mark.slow
def test_conforms_thoroughly():
    caches = [False, "int8", "fp8"]
    testing.conformance(backend="triton", dtypes=DTYPES, max_tokens=300, max_examples=80, caches=caches)


@pytest.mark.parametrize("head_dim", [16, 40, 80, 96, 128, 256])
@pytest.mark.parametrize("queries", [1, 40])
def test_head_dims(head_dim, queries):
    s = scaling(head_dim, start_tokens=7, attention_factor=1.1)
    q, k, v = operands(1, 2, 1, queries, 70, head_dim)
    out, exact = both(lambda backend: lk.attention(q, k, v, s, backend=backend))
    assert (out - exact).abs().max() < 4e-6


@pytest.mark.parametrize("queries", [1, 3, 90])
def test_runs_of_keys_meet_exactly(queries):
    """More keys than one run of the split, n-hat inside a block, a window over the seam."""
    s = scaling(32, start_tokens=530)
    q, k, v = operands(2, 2, 1, queries, 1100, 32)
    starts = torch.tensor([0, 37])
    for kwargs in ({}, {"window": 600}, {"softcap": 3.0, "is_causal": False}):
        (out, lse), (exact, exact_lse) = both(
            lambda backend, kwargs=kwargs: lk.attention(
                q, k, v, s, key_start=starts, return_lse=True, backend=backend, **kwargs
            )
        )
        assert (out - exact).abs().max() < 2e-6
        assert (lse - exact_lse).abs().max() < 4e-6


@pytest.mark.parametrize("queries", [1, 70])
def test_no_rotation(queries):
    q, k, v = operands(queries=queries)
    out, exact = both(lambda backend: lk.attention(q, k, v, backend=backend))
    assert (out - exact).abs().max() < 2e-6


def test_nan_outside_the_sequence_does_not_leak():
    q, k, v = operands()
    for x in (k, v):
        x[:, :, :9] = torch.nan
        x[:, :, 90:] = torch.nan
    bounds = {"key_start": torch.tensor([9, 9]), "key_length": torch.tensor([81, 3])}
    for queries in (1, 70):
        out, exact = both(
            lambda backend, n=queries: lk.attention(q[:, :, :n], k, v, scaling(), **bounds, backend=backend)
        )
        assert (out - exact).abs().max() < 2e-6


def test_offsets_past_32_bits():
    """Token strides so far apart that a 32-bit offset, in elements, would wrap. Memory is touched at the rows alone."""
    stride = 2**26
    tokens = 70
    memory = torch.empty(stride * (tokens - 1) + 32, dtype=torch.float16)
    far = torch.as_strided(memory, (1, 1, tokens, 32), (0, 0, stride, 1))
    near = torch.randn(1, 1, tokens, 32).half()
    far.copy_(near)
    q = torch.randn(1, 1, tokens, 32).half()
    for queries in (1, tokens):
        out, expected = (
            lk.attention(q[:, :, :queries], k, k, scaling(32), is_causal=False, backend="triton") for k in (far, near)
        )
        assert torch.equal(out, expected)
    rotation = scaling(32).rotation(torch.zeros(1, dtype=torch.int32))
    geometry = Geometry(None, None, None, None, None, 0.2, True, -1, -1, 0.0)
    out, lse = triton_backend.attention(near, near, near, rotation, geometry)
    grads, expected = (
        triton_backend.attention_backward(x, None, x, x, x, out, lse, rotation, geometry, False) for x in (far, near)
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    assert torch.equal(*(lk.apply_rope(k, None, scaling(32), backend="triton")[0] for k in (far, near)))


def test_keys_are_rotated_alike_in_the_tile_and_in_scratch(monkeypatch):
    from longrope_kernels.backends.triton import configs

    q, k, v = operands(queries=100)
    outs = []
    for in_tile in (True, False):
        monkeypatch.setattr(configs, "rotates_in_tile", lambda rows, in_tile=in_tile: in_tile)
        outs.append(lk.attention(q, k, v, scaling(interleaved=True), backend="triton"))
    assert torch.allclose(*outs, rtol=0, atol=1e-6)


@pytest.fixture
def by_descriptor(monkeypatch):
    """A call's result through pointers and through descriptors, and how many launches took descriptors."""
    from longrope_kernels.backends.triton import configs, descriptors
    from longrope_kernels.backends.triton.launch import Launch

    if descriptors.TensorDescriptor is None:
        pytest.skip("Triton before 3.4 has no tensor descriptors")
    run = Launch.run

    def compare(call):
        taken = []
        monkeypatch.setattr(Launch, "run", lambda launch: (taken.append(launch.config.descriptors), run(launch))[1])
        results = []
        for wanted in (False, True):
            with configs.by_descriptors(wanted):
                results.append(call())
        return *results, sum(taken)

    return compare


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 80), (96, 32), (32, 0)])
def test_whole_blocks_of_keys_through_descriptors_are_the_same_bits(by_descriptor, head_dim, rotary_dim, dtype):
    s = lk.RopeScaling(head_dim, 1e4, [2.0] * (rotary_dim // 2), rotary_dim=rotary_dim) if rotary_dim else None
    q, k, v = (x.to(dtype) for x in operands(2, 2, 1, 130, 150, head_dim))
    v = v.transpose(1, 2).contiguous().transpose(1, 2)  # heads side by side, as projections leave them
    bounds = {"key_start": torch.tensor([9, 0]), "key_length": torch.tensor([136, 143])}
    for x in (k, v):
        x[0, :, :9] = x[0, :, 145:] = x[1, :, 143:] = torch.nan
    more = {64: {"window": (100, 20), "is_causal": False}, 96: {"softcap": 3.0}}.get(head_dim, {})
    pointers, descriptors, taken = by_descriptor(
        lambda: lk.attention(q, k, v, s, return_lse=True, backend="triton", **bounds, **more)
    )
    assert taken == 1
    for one, other in zip(pointers, descriptors, strict=True):
        assert torch.equal(one, other)
    assert descriptors[0].isfinite().all()


def test_packed_batches_through_descriptors_are_the_same_bits(by_descriptor):
    leaves, bounds = packed([100, 0, 3, 70], [100, 5, 33, 90])
    pointers, descriptors, taken = by_descriptor(
        lambda: lk.attention_varlen(*leaves, *bounds, scaling(32), backend="triton")
    )
    assert taken == 1
    assert torch.equal(pointers, descriptors)


def test_operands_that_descriptors_do_not_take_are_read_through_pointers(by_descriptor):
    """Rows or an address that are no multiple of 16 bytes, a value for all heads; keys rotated in the tile, caches."""
    q, k, _ = (x.half() for x in operands(1, 4, 2, 130, 140, 32))
    memory = torch.randn(2 * 141 * 36).half()
    values = {
        "rows of 72 bytes": memory[: 2 * 140 * 36].view(1, 2, 140, 36)[..., :32],
        "2 bytes off": memory[1 : 1 + 2 * 140 * 32].view(1, 2, 140, 32),
        "expanded": memory[: 140 * 32].view(1, 1, 140, 32).expand(1, 2, 140, 32),
    }
    for name, v in values.items():
        call = lambda v=v: lk.attention(q, k, v, scaling(32), backend="triton")  # noqa: E731
        pointers, descriptors, taken = by_descriptor(call)
        assert taken == 0, name
        assert torch.equal(pointers, descriptors)
    cache = lk.KVCache(1, 2, 32, 140, torch.float16, page_tokens=64)
    cache.append(k, k, backend="triton")
    calls = {
        "in the tile": lambda: lk.attention(q[:, :, :100], k, k, scaling(32), backend="triton"),
        "split": lambda: lk.attention(q[:, :, :3], k, k, scaling(32), backend="triton"),
        "cache": lambda: cache.attend(q, scaling(32), backend="triton"),
    }
    for name, call in calls.items():
        assert by_descriptor(call)[2] == 0, name


def gradients(inputs, scalings, backend, **kwargs):
    out, lse = lk.attention(*inputs, scalings, return_lse=True, backend=backend, **kwargs)
    return torch.autograd.grad((out * out).sum() + lse.sin().sum(), inputs)


@pytest.mark.parametrize("kwargs", [{}, {"window": (20, 11), "is_causal": False}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("group", [1, 3])
def test_gradients_where_blocks_are_whole_and_where_not(kwargs, group):
    inputs = [x.requires_grad_() for x in operands(2, group, 1, 130, 150, 32)]
    s = scaling(32, start_tokens=9, attention_factor=1.2, interleaved=group == 3)
    kwargs = kwargs | {"key_start": torch.tensor([0, 33])}
    actual, exact = both(lambda backend: gradients(inputs, s, backend, **kwargs))
    for a, e in zip(actual, exact, strict=True):
        assert (a - e).abs().max() < 4e-6 * max(1.0, float(e.abs().max()))
    assert all(torch.equal(a, b) for a, b in zip(actual, gradients(inputs, s, "triton", **kwargs), strict=True))


def test_gradient_of_the_rescale_factors():
    factors = torch.linspace(1, 4, 16, dtype=torch.float64).requires_grad_()

    def gradient(backend, offset=0, start_tokens=0, dtype=torch.float32):
        s = lk.RopeScaling(32, 1e4, factors, start_tokens=start_tokens)
        q, k, v = (x.to(dtype) for x in operands(2, 4, 2, 50, 60, 32))
        at = torch.arange(60) + offset
        out = lk.attention(q, k, v, s, query_positions=at[:50], key_positions=at, backend=backend)
        return torch.autograd.grad((out.float() ** 2).sum(), factors)[0]

    for start_tokens in (0, 20):
        actual, exact = both(lambda backend, n=start_tokens: gradient(backend, start_tokens=n))
        assert torch.allclose(actual, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
    # q's and k's terms cancel to a part in 10^6, which is what the fp32 gradients that go in are good for: a few
    # percent here, as in the CPU backend. From gradients rounded to the dtype it would be many times the value.
    for dtype in (torch.float32, torch.float16):
        near, far = (gradient("triton", offset, dtype=dtype) for offset in (0, 10**6))
        assert (near - far).abs().max() < 0.1 * near.abs().max(), "moving all positions changes it"


def test_a_tiny_model_trains_as_on_the_reference():
    s = scaling(16, start_tokens=3)
    tokens = torch.randint(0, 11, (2, 33), generator=torch.Generator().manual_seed(1))
    losses = {}
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        embed, project, head = torch.nn.Embedding(11, 32), torch.nn.Linear(32, 96), torch.nn.Linear(32, 11)
        parameters = [p for module in (embed, project, head) for p in module.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        losses[backend] = []
        for _ in range(6):
            x = embed(tokens[:, :-1])
            q, k, v = project(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            x = x + lk.attention(q, k, v, s, backend=backend).transpose(1, 2).flatten(2)
            loss = torch.nn.functional.cross_entropy(head(x).flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.item())
    assert losses["triton"][-1] < losses["triton"][0]
    assert torch.allclose(*(torch.tensor(x) for x in losses.values()), rtol=1e-5, atol=0)


def test_the_trained_model_trains_on_as_on_the_reference(monkeypatch):
    """examples/tiny-512, the README's first tokens, three steps of AdamW on all weights, beyond n-hat and rescaled."""
    transformers = pytest.importorskip("transformers")
    from longrope_kernels.integrations.transformers import enable

    folder = ROOT / "examples" / "tiny-512"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = tokenizer((ROOT / "README.md").read_text(), return_tensors="pt").input_ids[0]
    batch = text[:40].view(1, 40)
    rope = scaling(32, start_tokens=4)
    losses, changes = {}, {}
    for backend in ("triton", "reference"):
        monkeypatch.setitem(backends.PREFERENCE, "cpu", (backend,))
        model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        enable(model, rope)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[backend] = []
        for _ in range(3):
            loss = model(batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.item())
        changes[backend] = torch.nn.utils.parameters_to_vector(model.parameters()).detach() - before
    actual, exact = losses["triton"], losses["reference"]
    assert exact[0] < 6.5, "a model that knows nothing starts at log(2048) = 7.6"
    assert actual[-1] < actual[0] - 0.3
    assert torch.allclose(torch.tensor(actual), torch.tensor(exact), rtol=1e-5, atol=0)
    assert (changes["triton"] - changes["reference"]).norm() < 1e-3 * changes["reference"].norm()


def test_bfloat16_is_refused():
    q, k, v = (x.bfloat16() for x in operands())
    with pytest.raises(lk.BackendUnavailableError, match="bfloat16"):
        lk.attention(q, k, v, scaling(), backend="triton")


def test_compiles_into_one_graph():
    s = scaling()

    def layer(q, k, v):
        q, k = lk.apply_rope(q, k, s, backend="triton")
        return lk.attention(q * 2, k, v, s, backend="triton").sin()

    inputs = operands(1, 2, 1, 20, 20)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs), layer(*inputs))


def packed(lengths, key_lengths, head_dim=32, heads=(2, 1)):
    torch.manual_seed(0)
    shapes = ((sum(lengths), heads[0]), (sum(key_lengths), heads[1]), (sum(key_lengths), heads[1]))
    bounds = [torch.tensor([0, *n]).cumsum(0) for n in (lengths, key_lengths)]
    return [torch.randn(*shape, head_dim) for shape in shapes], bounds


@pytest.mark.parametrize("kwargs", [{}, {"window": (20, 11), "is_causal": False}, {"softcap": 3.0}], ids=str)
def test_packed_batches(kwargs):
    """Empty sequences, more keys than queries, blocks that no sequence needs; out, lse and gradients."""
    operands, bounds = packed([70, 0, 3, 40], [70, 5, 33, 90])
    ladder = lk.LongRope(40, {40: scaling(32), 400: scaling(32, start_tokens=9, attention_factor=1.2)})
    leaves = [x.requires_grad_() for x in operands]

    def run(backend):
        out, lse = lk.attention_varlen(*leaves, *bounds, ladder, return_lse=True, backend=backend, **kwargs)
        return out, lse, *torch.autograd.grad((out * out).sum() + lse.sin().sum(), leaves)

    for actual, exact in zip(*both(run), strict=True):
        assert actual.stride() == exact.stride()
        assert (actual - exact).detach().abs().max() < 4e-6 * max(1.0, float(exact.detach().abs().max()))


def test_a_packed_sequence_does_not_depend_on_its_batch():
    operands, bounds = packed([50, 30, 66], [50, 64, 66])
    out, lse = lk.attention_varlen(*operands, *bounds, scaling(32), return_lse=True, backend="triton")
    rows, keys = slice(50, 80), slice(50, 114)
    alone = [operands[0][rows], *(x[keys] for x in operands[1:])]
    own = [torch.tensor([0, n]) for n in (30, 64)]
    one, one_lse = lk.attention_varlen(*alone, *own, scaling(32), return_lse=True, backend="triton")
    assert torch.equal(out[rows], one)
    assert torch.equal(lse[:, rows], one_lse)


def test_packed_explicit_positions_and_the_gradient_of_the_factors():
    operands, bounds = packed([20, 45], [20, 45])
    at = torch.cat((torch.arange(20) + 7, torch.arange(45) * 3))

    def gradient(backend):
        factors = torch.linspace(1, 4, 16, dtype=torch.float64).requires_grad_()
        s = lk.RopeScaling(32, 1e4, factors, start_tokens=5)
        out = lk.attention_varlen(
            *operands, bounds[0], scaling=s, query_positions=at, key_positions=at, backend=backend
        )
        return out, torch.autograd.grad((out**2).sum(), factors)[0]

    (out, actual), (exact_out, exact) = both(gradient)
    assert (out - exact_out).abs().max() < 2e-6
    assert torch.allclose(actual, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


KINDS = [(False, None), (False, 7), (True, None), (True, 64), ("fp8", None), ("fp8", 64)]


def cached(dtype, quantised, page_tokens, backend="triton", cuts=(90, 1, 64, 2), lengths=(157, 100), head_dim=32):
    torch.manual_seed(0)
    key, value = torch.randn(2, 2, 2, sum(cuts), head_dim, dtype=torch.float32).to(dtype)
    cache = lk.KVCache(2, 2, head_dim, 192, dtype, quantised, page_tokens)
    at = 0
    for cut in cuts:
        part = slice(at, at + cut)
        count = (torch.tensor(lengths) - at).clamp(0, cut)
        cache.append(key[:, :, part], value[:, :, part], count, backend=backend)
        at += cut
    return cache, key, value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_holds_what_the_definition_holds_however_appending_was_cut(kind, dtype):
    caches = [cached(dtype, *kind, backend=backend)[0].pages for backend in ("triton", "reference")]
    for name in ("key", "value", "key_scale", "value_scale", "key_tail"):
        fields = [getattr(pages, name) for pages in caches]
        if fields[0] is not None:
            assert testing.same_bits(*fields), name
    at_once = cached(dtype, *kind, cuts=(157,))[0].pages  # its pages lie elsewhere
    for held, expected in zip(gathered(at_once, torch.float32), gathered(caches[0], torch.float32), strict=True):
        assert torch.equal(held, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("query_tokens", "query_heads"), [(1, 4), (3, 4), (40, 4), (1, 40)])
def test_reading_a_cache(kind, query_tokens, query_heads):
    """Decoding, a few tokens, a chunk of a prefill, more heads than the decode kernel takes; n-hat inside a block."""
    s = scaling(32, start_tokens=70, attention_factor=1.1, interleaved=query_tokens == 3)
    cache, key, value = cached(torch.float32, *kind)
    query = torch.randn(2, query_heads, query_tokens, 32)
    options = {"window": 130, "softcap": 3.0} if query_tokens == 3 else {}
    (out, lse), (exact, exact_lse) = both(
        lambda backend: cache.attend(query, s, return_lse=True, backend=backend, **options)
    )
    assert (out - exact).abs().max() < 4e-6
    assert (lse - exact_lse).abs().max() < 4e-6
    if not kind[0]:
        plain = lk.attention(query, key, value, s, key_length=cache.length, backend="triton", **options)
        assert torch.equal(out, plain), "a cache gives the bits of attention over its keys"


@pytest.mark.parametrize("rotary_dim", [0, 12])
@pytest.mark.parametrize("quantised", ["int8", "fp8"])
def test_reading_a_quantised_cache_with_dims_that_do_not_rotate(rotary_dim, quantised):
    s = lk.RopeScaling(40, 1e4, [2.0] * (rotary_dim // 2), rotary_dim=rotary_dim) if rotary_dim else None
    cache, _, _ = cached(torch.float16, quantised, 64, head_dim=40)
    for query_tokens in (1, 20):
        query = torch.randn(2, 4, query_tokens, 40).half()
        out, exact = both(lambda backend, query=query: cache.attend(query, s, backend=backend))
        assert (out - exact).abs().max() < 4e-3


@pytest.mark.parametrize("quantised", ["int8", "fp8"])
def test_a_quantised_value_that_is_not_finite_is_seen_by_whoever_reads_it(quantised):
    key, value = torch.randn(2, 2, 2, 64, 32)
    value[0, 0, 3, 5] = torch.inf
    cache = lk.KVCache(2, 2, 32, 64, torch.float32, quantised)
    cache.append(key, value, backend="triton")
    out = cache.attend(torch.randn(2, 4, 1, 32), scaling(32), backend="triton")
    assert out[0, :2].isnan().all()
    assert out[0, 2:].isfinite().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("queries", [1, 3, 90])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_make_their_rows_not_a_number(queries, bad):
    problem = testing.Problem(*operands(1, 4, 2, queries, 100, 32), scaling(32), {"backend": "triton"})
    testing.check_bad_query(lk.attention, problem, bad)


@triton.jit
def fp8_kernel(codes, values, wide, bits, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(wide + at, pages.widened(tl.load(codes + at)))
    tl.store(bits + at, pages.fp8_bits(tl.load(values + at)))


def test_fp8_without_a_type_of_the_target_is_that_of_torch():
    """Every code, and on the way back every code, every middle between two, and their neighbours in fp32."""
    codes = torch.arange(256).to(torch.uint8)
    exact = codes.view(torch.float8_e4m3fn).float()
    largest = exact[exact.isfinite()].sort().values
    middles = torch.cat((exact, (largest[1:] + largest[:-1]) / 2, torch.tensor([1e-30, 1e-44, 500.0, 3e38, torch.inf])))
    values = torch.cat([x for y in (middles, -middles) for x in (y, y.nextafter(y + 1), y.nextafter(y - 1))])
    values = torch.cat((values, torch.zeros(-len(values) % 256)))
    codes = codes.repeat(len(values) // 256)
    wide, bits = torch.empty_like(values), torch.empty_like(codes)
    fp8_kernel[(len(values) // 256,)](codes, values, wide, bits, 256)
    assert torch.equal(wide[:256].isnan(), exact.isnan())
    assert torch.equal(wide[:256].nan_to_num(), exact.nan_to_num())
    expected = values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(bits, torch.where(values.isnan(), 127, expected))


def own_pages(quantised, page_tokens):
    """A cache of 2 sequences with room for 128 tokens, empty, and a page of nobody's behind those of each."""
    columns = 128 // page_tokens
    shape = (2 * columns + 2, 2, page_tokens, 32)
    table = torch.arange(shape[0], dtype=torch.int32).view(2, -1)[:, :columns]
    length = torch.zeros(2, dtype=torch.int64)
    if not quantised:
        return Pages(torch.zeros(shape), torch.zeros(shape), table, length)
    stored = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[quantised]
    key, value = torch.zeros(2, *shape, dtype=torch.uint8).view(stored)
    scales = torch.zeros(*shape[:2], page_tokens // 64, 32), torch.zeros(shape[:3])
    return Pages(key, value, table, length, *scales, torch.zeros(2, 2, 64, 32))


@pytest.mark.parametrize(("quantised", "page_tokens"), [(False, 8), (False, 128), ("int8", 64), ("fp8", 128)])
@pytest.mark.parametrize(("asked", "taken"), [((70, 5), (28, 5)), ((5, 90), (5, 70))], ids=["room", "tokens"])
def test_an_append_past_the_room_or_the_tokens_at_hand_leaves_the_rest_alone(quantised, page_tokens, asked, taken):
    """Straight to the backend, for on a GPU the host sees no counts to check: 100 tokens are held and 70 at hand."""
    torch.manual_seed(0)
    key, value = torch.randn(2, 2, 2, 100, 32)
    held = []
    for counts in (asked, taken):
        pages = own_pages(quantised, page_tokens)
        triton_backend.cache_append(key, value, pages, torch.tensor([100, 3]))
        pages.length.copy_(torch.tensor([100, 3]))
        triton_backend.cache_append(key[:, :, :70], value[:, :, :70], pages, torch.tensor(counts))
        held.append(pages)
    for name in ("key", "value", "key_scale", "value_scale", "key_tail"):
        fields = [getattr(pages, name) for pages in held]
        assert fields[0] is None or testing.same_bits(*fields), name


def guarded(like):
    """Memory for a tensor of that shape, and a number behind it that nobody may write."""
    memory = torch.full((like.numel() + 4096,), 77.0, dtype=like.dtype)
    return memory[: like.numel()].view(like.shape), memory[like.numel() :]


def test_lengths_past_the_operands_write_nothing_behind_them():
    """Gradients of padded keys, and the scratch copy of a packed batch, whose lengths the device alone knows."""
    q, k, v = operands(1, 2, 1, 50, 60, 32)
    rotation = scaling(32).rotation(torch.zeros(2, dtype=torch.int32))
    key_length = torch.tensor([90])
    geometry = Geometry(None, None, torch.tensor([10]), None, key_length, 0.2, False, -1, -1, 0.0)
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[:-1])
    launches = plans_backward.attention_backward(q, None, q, k, v, out, lse, rotation, geometry, False, "interpreter")[
        2
    ]
    behind = []
    for step in launches:
        for name in {"grad_key", "grad_value"} & set(step.arguments):
            step.arguments[name], guard = guarded(k)
            behind.append(guard)
        if step.name != "backward_query_kernel":  # it writes rows of queries, of which there are no more
            step.run()
    packed = torch.tensor([0, 40]), torch.tensor([40, 60])
    copy, step = plans.rotate(q, rotation, None, torch.zeros(2, dtype=torch.int64), False, "interpreter", True, packed)
    step.arguments["out"], guard = guarded(copy)
    step.run()
    assert len(behind) == 2
    assert all(bool((guard == 77).all()) for guard in (*behind, guard))


def before_nan(x, dim):
    """X as a part of memory that has NaN behind it along a dimension."""
    memory = torch.full((*x.shape[:dim], x.shape[dim] + 80, *x.shape[dim + 1 :]), torch.nan)
    part = memory.narrow(dim, 0, x.shape[dim])
    return part.copy_(x)


@pytest.mark.parametrize("queries", [1, 5, 90])
@pytest.mark.parametrize("form", ["key_length", "both", "packed"])
def test_lengths_past_the_operands_read_nothing_behind_them(form, queries):
    """Straight to the backend. One token, a few and many: each kernel; and of the last its backward."""
    rotation = scaling(32).rotation(torch.zeros(2, dtype=torch.int32))

    def run(ends):
        """Out, lse and gradients; `ends` are where the second sequence's keys end: 100 is where the operand does."""
        q, k, v = operands(2, 4, 2, queries, 100, 32)
        bounds = [torch.tensor([30, 20]), torch.tensor([60, ends - 20])] if form == "both" else [None] * 2
        if form == "key_length":
            bounds = [None, torch.tensor([60, ends])]
        geometry = Geometry(None, None, torch.tensor([20, 5]), *bounds, 0.2, False, -1, -1, 0.0)
        if form == "packed":
            q, k, v = (before_nan(x[0].transpose(0, 1), 0) for x in (q, k, v))
            packing = Packing(torch.tensor([0, queries // 2, queries + ends - 100]), torch.tensor([0, 40, ends]))
            forward, backward = triton_backend.attention_varlen, triton_backend.attention_varlen_backward
            where = (rotation, geometry, packing)
        else:
            q, k, v = (before_nan(x, 2) for x in (q, k, v))
            forward, backward = triton_backend.attention, triton_backend.attention_backward
            where = (rotation, geometry)
        out, lse = forward(q, k, v, *where)
        return out, lse, *backward(torch.ones_like(out), None, q, k, v, out, lse, *where, True)

    exact, actual = run(100), run(170)
    assert all(x.isfinite().all() for x in exact)
    assert all(testing.same_bits(x, y) for x, y in zip(actual, exact, strict=True))


@pytest.mark.parametrize("of", ["queries", "keys"])
@pytest.mark.parametrize(
    "bounds", [[0, 70, 30, 100], [-5, 40, 90, 100], [0, 900, 40, 130], [0, 40, 2**40, 2**41]], ids=str
)
def test_a_packed_batch_ends_with_its_operands_and_its_bounds_never_fall(of, bounds):
    """Straight to the backend: on a GPU the host sees no bounds to check."""
    q, k, v, grad = torch.randn(4, 100, 2, 32, generator=torch.Generator().manual_seed(0))
    rotation = scaling(32).rotation(torch.zeros(3, dtype=torch.int32))
    geometry = Geometry(None, None, None, None, None, 0.2, True, -1, -1, 0.0)
    sound = torch.tensor([0, 30, 60, 100])

    def run(bounds):
        packing = Packing(bounds, sound) if of == "queries" else Packing(sound, bounds)
        operands = [before_nan(x, 0) for x in (q, k, v)]
        out, lse = triton_backend.attention_varlen(*operands, rotation, geometry, packing)
        where = (rotation, geometry, packing)
        return out, lse, *triton_backend.attention_varlen_backward(grad, None, *operands, out, lse, *where, True)

    told, kept = torch.tensor(bounds), torch.tensor(bounds).clamp(0, 100).cummax(0).values
    assert all(testing.same_bits(x, y) for x, y in zip(run(told), run(kept), strict=True))


@pytest.mark.parametrize("queries", [1, 5, 90])
@pytest.mark.parametrize(("quantised", "page_tokens"), [(False, 8), (False, 128), ("int8", 64), ("fp8", 128)])
def test_a_length_past_the_room_of_a_cache_reads_no_page_of_others(quantised, page_tokens, queries):
    torch.manual_seed(0)
    key, value = torch.randn(2, 2, 2, 128, 32)
    query, rotation = torch.randn(2, 4, queries, 32), scaling(32).rotation(torch.zeros(2, dtype=torch.int32))
    pages = own_pages(quantised, page_tokens)
    triton_backend.cache_append(key, value, pages, torch.tensor([128, 100]))
    geometry = Geometry(None, None, torch.tensor([30, 20]), None, None, 0.2, False, -1, -1, 0.0)
    held = []
    for length in ([128, 100], [150, 100]):
        pages.length.copy_(torch.tensor(length))
        held += [triton_backend.attention_paged(query, pages, rotation, geometry)]
    assert all(x.isfinite().all() for x in held[0])
    assert all(testing.same_bits(x, y) for x, y in zip(*held, strict=True))


def test_an_empty_cache_gives_zero():
    cache = lk.KVCache(2, 2, 32, 70, torch.float32)
    cache.append(*torch.randn(2, 2, 2, 3, 32), torch.tensor([3, 0]), backend="triton")
    out, lse = cache.attend(torch.randn(2, 2, 1, 32), scaling(32), return_lse=True, backend="triton")
    assert (out[1] == 0).all()
    assert (lse[1] == -torch.inf).all()
    assert out[0].abs().sum() > 0


def test_what_ops_say_of_their_results_is_so():
    check_what_ops_say("triton")


@pytest.mark.parametrize("quantised", ["int8", "fp8"])
def test_a_step_over_a_cache_and_packed_batches_compile_into_one_graph(quantised):
    s = scaling(32)
    caches = [cached(torch.float32, quantised, 64)[0] for _ in range(2)]
    key, value = torch.randn(2, 2, 2, 1, 32)
    query = torch.randn(2, 4, 1, 32)
    operands, bounds = packed([20, 30], [20, 30])

    def step(query, key, value, pages, operands, bounds):
        lk.cache_append(key, value, pages, backend="triton")
        pages.length.add_(1)
        read = lk.attention_paged(query, pages, s, backend="triton")
        return read.sin(), lk.attention_varlen(*operands, bounds, scaling=s, backend="triton") * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    rest = (operands, bounds[0])
    for actual, expected in zip(
        compiled(query, key, value, caches[0].pages, *rest),
        step(query, key, value, caches[1].pages, *rest),
        strict=True,
    ):
        assert torch.equal(actual, expected)
    assert torch.equal(caches[0].pages.key_tail, caches[1].pages.key_tail)
