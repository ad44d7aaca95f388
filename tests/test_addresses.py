"""Index arithmetic past 2^31 and 2^32 elements: operands gigabytes long, in memory of which a few pages exist.

Operands are views of one mapping, with a stride above 2^31 elements in one dimension of size 3, so that its last index
lies past 2^32. An offset cut to 32 bits, signed or not, falls elsewhere in the mapping, on other numbers.
"""

import dataclasses
import mmap
import sys

import pytest
import torch
from levels import every_level

import longrope_kernels as lk
from longrope_kernels.backends import cpu, native

pytestmark = pytest.mark.skipif(sys.platform != "linux" or sys.maxsize < 2**32, reason="maps 24 GiB of nothing")

HEAD_DIM, SIZE = 16, 3
SCALING = lk.RopeScaling(HEAD_DIM, 1e4, [1.0 + i / 8 for i in range(HEAD_DIM // 2)], start_tokens=2)
STRIDE = 2**31 + 4096  # elements
REACH = SIZE * STRIDE  # elements on either side of where operands begin
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class Distant:
    """Places copies of tensors in a mapping, far from themselves."""

    def __init__(self):
        try:
            memory = mmap.mmap(-1, 2 * 2 * REACH, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        except OSError as error:
            pytest.skip(f"no address space to map: {error}")
        self.bytes = torch.frombuffer(memory, dtype=torch.int8)
        self.used = REACH  # elements of 2 bytes

    def place(self, x, dim):
        """A copy of x, of 1 or 2 bytes an element, whose dimension `dim` has the stride STRIDE."""
        strides = list(x.contiguous().stride())
        strides[dim] = STRIDE
        begin, self.used = self.used, self.used + x.numel()
        view = self.bytes.view(x.dtype).as_strided(x.shape, strides, begin)
        return view.copy_(x)


@pytest.fixture(scope="module")
def distant():
    return Distant()


@pytest.fixture
def reached(monkeypatch):
    """How many operands the kernels were given with the large stride."""
    count, given = [0], (native.operand, native.packed_operand)

    def counted(operand):
        def described(x):
            count[0] += STRIDE in x.stride()
            return operand(x)

        return described

    monkeypatch.setattr(native, "operand", counted(given[0]))
    monkeypatch.setattr(native, "packed_operand", counted(given[1]))
    return lambda: count[0]


def drawn(*shapes, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, HEAD_DIM, generator=generator).to(dtype) for shape in shapes]


def assert_same_far_away(distant, function, near, dim):
    far = [distant.place(x, dim) for x in near]
    for a, b in zip(function(*far), function(*near), strict=True):
        assert torch.equal(a, b)


def with_gradients(function, *inputs):
    """`function` of all but the last input, and the gradients where the last is that of its first result."""
    *leaves, grad = (x.detach().requires_grad_() for x in inputs)
    results = function(*leaves)
    return *results, *torch.autograd.grad(results[0], leaves, grad.detach())


@every_level
@pytest.mark.parametrize(
    ("dim", "query_heads", "tokens"),
    [
        pytest.param(0, 3, SIZE, id="batch, decode"),
        pytest.param(0, 3, 20, id="batch, prefill"),
        pytest.param(1, SIZE, SIZE, id="heads, decode"),
        pytest.param(1, SIZE, 20, id="heads, prefill"),
        pytest.param(2, 3, SIZE, id="tokens, decode"),
        pytest.param(2, 18, SIZE, id="tokens, prefill"),
    ],
)
def test_attention_and_its_gradients(distant, reached, dim, query_heads, tokens):
    query, key, value, grad = drawn(*((SIZE, heads, tokens) for heads in (query_heads, 3, 3, query_heads)))

    def attention(*operands, grad):
        out, lse = lk.attention(*operands, SCALING, return_lse=True, backend="cpu")
        # Not by way of autograd, whose formula makes the gradient of out contiguous.
        bundles = lk.functional.bundle(*operands, SCALING)
        return out, lse, *cpu.attention_backward(grad, None, *operands, out, lse, *bundles, True)

    assert_same_far_away(distant, lambda *x: attention(*x[:3], grad=x[3]), (query, key, value, grad), dim)
    assert reached() == 7, "query, key and value forward and backward, and the gradient of out"


@every_level
@pytest.mark.parametrize("dim", [0, 1], ids=["tokens", "heads"])
def test_packed_attention_and_its_gradients(distant, reached, dim):
    query, key, value, grad = drawn(*[(SIZE, SIZE)] * 4)
    bounds = torch.tensor([0, 1, SIZE])

    def attention(*leaves):
        return lk.attention_varlen(*leaves, bounds, scaling=SCALING, return_lse=True, backend="cpu")

    assert_same_far_away(distant, lambda *x: with_gradients(attention, *x), (query, key, value, grad), dim)
    assert reached() == 6


@every_level
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "heads", "tokens"])
def test_rotation_and_its_gradient(distant, reached, dim):
    query, key, grad = drawn(*[(SIZE, SIZE, SIZE)] * 3)

    def rotation(*leaves):
        return lk.apply_rope(*leaves, SCALING, torch.arange(SIZE), backend="cpu")

    assert_same_far_away(distant, lambda *x: with_gradients(rotation, *x), (query, key, grad), dim)
    assert reached() == 2


@every_level
@pytest.mark.parametrize("query_tokens", [1, 20])
@pytest.mark.parametrize(
    ("dim", "page_tokens", "quantised"),
    [
        pytest.param(0, 64, False, id="pages"),
        pytest.param(1, 64, False, id="heads"),
        pytest.param(2, SIZE, False, id="tokens"),
        pytest.param(0, 64, True, id="pages of int8"),
        pytest.param(1, 64, True, id="heads of int8"),
    ],
)
def test_a_cache_is_filled_and_read(distant, reached, dim, page_tokens, quantised, query_tokens):
    capacity = SIZE * page_tokens
    query, *tokens = drawn((1, SIZE, min(query_tokens, capacity)), *[(1, SIZE, capacity)] * 2)

    def attend(is_far):
        cache = lk.KVCache(1, SIZE, HEAD_DIM, capacity, quantised=quantised, page_tokens=page_tokens)
        if is_far:
            held = {name: distant.place(getattr(cache.pages, name), dim) for name in ("key", "value")}
            cache.pages = dataclasses.replace(cache.pages, **held)
        for part in (slice(0, 2), slice(2, None)):
            cache.append(*(x[:, :, part] for x in tokens), backend="cpu")
        read = cache.attend(query, SCALING, return_lse=True, backend="cpu")
        return *read, cache.pages.key, cache.pages.value  # wrong addresses that agree would cancel in what is read

    for a, b in zip(attend(True), attend(False), strict=True):
        assert torch.equal(a, b)
    assert reached() == 6, "keys and values, appended twice and read"


@every_level
@pytest.mark.parametrize("dim", [1, 2], ids=["heads", "tokens"])
def test_what_is_appended(distant, reached, dim):
    def held(*tokens):
        cache = lk.KVCache(SIZE, SIZE, HEAD_DIM, SIZE)
        cache.append(*tokens, backend="cpu")
        return cache.pages.key, cache.pages.value

    assert_same_far_away(distant, held, drawn(*[(SIZE, SIZE, SIZE)] * 2), dim)
    assert reached() == 2
