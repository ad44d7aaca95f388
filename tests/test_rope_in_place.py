"""`apply_rope_in_place`: the bits of `apply_rope`, over the operands; what must not be written over is refused."""

import pytest
import torch
from levels import LEVELS

import longrope_kernels as lk
from longrope_kernels import overlap

SCALING = lk.RopeScaling(64, 1e4, torch.linspace(1, 8, 32).tolist(), start_tokens=9, attention_factor=1.1)
LADDER = lk.LongRope(40, {40: SCALING.replace(rescale_factors=None), 400: SCALING})


def operands(dtype=torch.float32, batch=2, heads=(4, 2), tokens=70, head_dim=64):
    """Queries and keys as views of one projection [batch, tokens, heads of q, k and v, head_dim]."""
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(batch, tokens, heads[0] + 2 * heads[1], head_dim, generator=generator).to(dtype)
    return projected, projected.transpose(1, 2).split((*heads, heads[1]), dim=1)


@pytest.mark.parametrize(
    ("backend", "cpu_level"), [("reference", None), *((None, level) for level in LEVELS)], indirect=["cpu_level"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [64, 48, 18])
def test_bits_of_the_copy_and_nothing_else_is_written(backend, dtype, interleaved, rotary_dim):
    scaling = lk.RopeScaling(64, 1e4, rotary_dim=rotary_dim, interleaved=interleaved, start_tokens=9)
    projected, (q, k, v) = operands(dtype)
    wanted = [*lk.apply_rope(q, k, scaling, backend=backend), v.clone()]
    assert lk.apply_rope_in_place(q, k, scaling, backend=backend) is None
    for x, y in zip(projected.transpose(1, 2).split((4, 2, 2), dim=1), wanted, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("head_dim", [2, 6, 16, 40, 96, 128, 256])
@pytest.mark.parametrize("tokens", [1, 33])
def test_small_and_large_heads(head_dim, tokens):
    q, k = (torch.randn(2, heads, tokens, head_dim) for heads in (3, 1))
    scaling = lk.RopeScaling(head_dim, 1e4)
    wanted = lk.apply_rope(q, k, scaling)
    lk.apply_rope_in_place(q, k, scaling)
    assert torch.equal(q, wanted[0])
    assert torch.equal(k, wanted[1])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"scaling": LADDER},
        {"scaling": LADDER, "regime_index": torch.tensor([1, 0])},
        {"scaling": SCALING, "positions": torch.arange(70) + 2**30, "key_positions": torch.arange(70).flip(0)},
    ],
    ids=["ladder", "regimes", "positions"],
)
def test_arguments_of_the_copying_op(kwargs):
    _, (q, k, _) = operands()
    wanted = lk.apply_rope(q, k, **kwargs)
    lk.apply_rope_in_place(q, k, **kwargs)
    assert torch.equal(q, wanted[0])
    assert torch.equal(k, wanted[1])


def test_the_query_alone_and_nothing_at_all():
    _, (q, k, _) = operands()
    wanted, before = lk.apply_rope(q, None, SCALING)[0], k.clone()
    lk.apply_rope_in_place(q, None, SCALING)
    assert torch.equal(q, wanted)
    assert torch.equal(k, before)
    lk.apply_rope_in_place(q[:, :, :0], k[:, :, :0], SCALING)
    lk.apply_rope_in_place(q[:0], k[:0], SCALING)
    assert torch.equal(q, wanted)


def test_opcheck():
    _, (q, k, _) = operands()
    r = LADDER.rotation(torch.tensor([0, 1], dtype=torch.int32))
    tables = (r.turns, r.base_turns, r.inv_freq, r.start_tokens, r.attention_factor, r.regime_index)
    at = torch.arange(70).expand(2, -1)
    op = torch.ops.longrope_kernels.apply_rope_in_place.default
    assert [a.name for a in op._schema.arguments if a.alias_info is not None] == ["query", "key"]
    torch.library.opcheck(op, (q, k, *tables, at, at, False, True, ""))


def test_compiles_into_one_graph_and_writes_the_operands():
    def layer(q, k, v):
        lk.apply_rope_in_place(q, k, LADDER)
        return lk.attention(q, k, v).sin()

    inputs, same = operands()[1], operands()[1]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), layer(*same))
    for x, y in zip(inputs, same, strict=True):
        assert torch.equal(x, y)


def test_autograd_sees_the_write():
    x = torch.randn(1, 1, 4, 64, requires_grad=True)
    y = x.exp()
    with torch.no_grad():
        lk.apply_rope_in_place(y, None, SCALING)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def learned():
    return SCALING.replace(rescale_factors=torch.full((32,), 1.5, dtype=torch.float64, requires_grad=True))


_, (Q, K, V) = operands()
REFUSED = {
    "query: got a tensor that requires a gradient": lambda: (Q.clone().requires_grad_(), K, SCALING),
    "key: got a tensor that requires a gradient": lambda: (Q, K.clone().requires_grad_(), SCALING),
    "rescale_factors: got a tensor that requires a gradient": lambda: (Q, K, learned()),
    "query: got shape (2, 4, 70, 64), strides (0": lambda: (Q[:1].expand(2, -1, -1, -1), K, SCALING),
    "key: got shape (2, 4, 70, 64), strides (35840, 0": lambda: (Q, K[:, :1].expand(-1, 4, -1, -1), SCALING),
    "query: got shape (2, 2, 9, 64), strides (35840, 64, 64": lambda: (
        Q.as_strided((2, 2, 9, 64), (35840, 64, 64, 1)),
        None,
        SCALING,
    ),
    "key: got memory that query has too": lambda: (Q, Q[:, 3:], SCALING),
    "scaling: got NoneType": lambda: (Q, K, None),
    "key: got head_dim 32": lambda: (Q, K[..., :32], SCALING),
    "regime_index: got 2": lambda: (Q, K, LADDER, None),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_in_one_line_before_anything_is_written(message):
    before = Q.clone(), K.clone()
    index = {"regime_index": torch.tensor([0, 2])} if message.startswith("regime_index") else {}
    with pytest.raises((ValueError, TypeError)) as error:
        lk.apply_rope_in_place(*REFUSED[message](), **index)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert torch.equal(Q, before[0])
    assert torch.equal(K, before[1])


def test_without_a_gradient_leaves_are_written_as_by_an_optimizer():
    q = Q.clone().requires_grad_()
    wanted = lk.apply_rope(Q, None, SCALING)[0]
    with torch.no_grad():
        lk.apply_rope_in_place(q, None, SCALING)
    assert torch.equal(q, wanted)


def _addresses(x):
    at = torch.zeros(x.shape, dtype=torch.int64)
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        at += (torch.arange(size) * stride).view(-1, *[1] * (x.dim() - dim - 1))
    return (x.data_ptr() // x.element_size() + at).flatten().tolist()


@pytest.mark.parametrize("seed", range(40))
def test_memory_is_told_apart_where_views_are_taken_of_one_tensor(seed):
    """Shared elements are always found; views cut along one dimension, and steps of any other, are told apart."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    whole = torch.zeros([draw(2, 7) for _ in range(4)]).permute(*torch.randperm(4, generator=generator).tolist())
    dim = draw(0, 4)
    cut = draw(1, whole.shape[dim])
    x, y = whole.narrow(dim, 0, cut), whole.narrow(dim, cut, whole.shape[dim] - cut)
    assert not overlap.within(x)
    assert not overlap.between(x, y)
    assert not overlap.between(y, x)
    other = draw(0, 4)
    x, y = (v.narrow(other, start := draw(0, v.shape[other]), draw(1, v.shape[other] - start + 1)) for v in (x, whole))
    if set(_addresses(x)) & set(_addresses(y)):
        assert overlap.between(x, y)
