"""The torch.library ops: schemas, fake and autograd formulas, torch.compile and export."""

import pytest
import torch
from opchecks import check_what_ops_say
from torch._dynamo.testing import CompileCounterWithBackend

import longrope_kernels as lk

SCALING = lk.RopeScaling(head_dim=32, theta=1e4, rescale_factors=[1.5] * 16, start_tokens=2)
ROPE = lk.LongRope(8, {8: SCALING.replace(rescale_factors=None), 64: SCALING})


def operands(tokens=16, grad=False):
    torch.manual_seed(0)
    return [torch.randn(2, heads, tokens, 32, requires_grad=grad) for heads in (4, 2, 2)]


def attention_arguments(grad=False):
    q, k, v = operands(grad=grad)
    rotation = ROPE.rotation(torch.tensor([0, 1], dtype=torch.int32))
    inv_freq = rotation.inv_freq.clone().requires_grad_(grad)
    tables = (
        rotation.turns,
        rotation.base_turns,
        inv_freq,
        rotation.start_tokens,
        rotation.attention_factor,
        rotation.regime_index,
    )
    starts = torch.tensor([0, 3])
    return (q, k, v, *tables, None, None, None, starts, None, 0.2, True, 9, -1, 5.0, False, "")


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_attention(grad):
    arguments = attention_arguments(grad)
    torch.library.opcheck(torch.ops.longrope_kernels.attention.default, arguments, test_utils=CHECKS)


def test_opcheck_attention_backward():
    arguments = attention_arguments()
    out, lse = torch.ops.longrope_kernels.attention(*arguments)
    backward = (out, lse, *arguments[:3], out, lse, *arguments[3:-1], True, "")
    torch.library.opcheck(torch.ops.longrope_kernels.attention_backward.default, backward, test_utils=CHECKS[:3])


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_apply_rope(grad):
    q, k, _ = operands(grad=grad)
    rotation = SCALING.rotation(torch.zeros(2, dtype=torch.int32))
    at = torch.arange(16).expand(2, -1)
    arguments = (
        q,
        k,
        rotation.turns,
        rotation.base_turns,
        rotation.inv_freq.clone().requires_grad_(grad),
        rotation.start_tokens,
        rotation.attention_factor,
        rotation.regime_index,
        at,
        at,
        False,
        False,
        "",
    )
    torch.library.opcheck(torch.ops.longrope_kernels.apply_rope.default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_ops_say_of_their_results_is_so(backend):
    check_what_ops_say(backend)


@pytest.mark.parametrize("scaling", [SCALING, ROPE], ids=["one regime", "ladder"])
def test_compiles_without_a_graph_break_and_agrees(scaling):
    def layer(q, k, v):
        q, k = lk.apply_rope(q, k, scaling)
        return lk.attention(q * 2, k, v, scaling, softcap=4.0).sin()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    eager_inputs, compiled_inputs = operands(grad=True), operands(grad=True)
    expected, actual = layer(*eager_inputs), compiled(*compiled_inputs)
    assert torch.equal(actual, expected)
    for a, b in zip(
        torch.autograd.grad(actual.sum(), compiled_inputs),
        torch.autograd.grad(expected.sum(), eager_inputs),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_one_compiled_graph_serves_many_scalings():
    def layer(q, k, v, *tables):
        return torch.ops.longrope_kernels.attention(
            q, k, v, *tables, None, None, None, None, None, 0.2, True, -1, -1, 0.0, False, ""
        )[0]

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for factor in (1.0, 2.0, 4.0):
        r = SCALING.replace(rescale_factors=[factor] * 16).rotation(torch.zeros(2, dtype=torch.int32))
        tables = (r.turns, r.base_turns, r.inv_freq, r.start_tokens, r.attention_factor, r.regime_index)
        assert torch.equal(compiled(*operands(), *tables), layer(*operands(), *tables))
    assert counter.frame_count == 1


def test_compiles_with_a_scale_that_varies():
    compiled = torch.compile(
        lambda q, k, v, x: lk.attention(q, k, v, SCALING, scale=x), fullgraph=True, backend="eager"
    )
    for scale in (0.1, 0.2, 0.3):
        assert torch.equal(compiled(*operands(), scale), lk.attention(*operands(), SCALING, scale=scale))


@pytest.mark.parametrize(("holder", "strict"), [("module", False), ("module", True), ("global", False)])
def test_exports(holder, strict):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scaling = SCALING if holder == "module" else None

        def forward(self, q, k, v):
            return lk.attention(q, k, v, SCALING if self.scaling is None else self.scaling)

    # Strict export (the default of torch 2.6) refuses the tensors of a scaling that no module holds.
    exported = torch.export.export(Layer(), tuple(operands()), strict=strict)
    assert torch.equal(exported.module()(*operands()), Layer()(*operands()))


def test_values_are_checked_inside_a_compiled_graph():
    compiled = torch.compile(
        lambda q, k, v, n: lk.attention(q, k, v, SCALING, key_length=n), backend="aot_eager", fullgraph=True
    )
    with pytest.raises(ValueError, match="key_length: got 99"):
        compiled(*operands(), torch.tensor([1, 99]))


def test_compiles_with_learned_factors():
    factors = torch.full((16,), 1.5, dtype=torch.float64, requires_grad=True)
    scaling = SCALING.replace(rescale_factors=factors)
    compiled = torch.compile(lambda q, k, v: lk.attention(q, k, v, scaling), fullgraph=True, backend="aot_eager")
    grads = [
        torch.autograd.grad(f(*operands()).sum(), factors)[0] for f in (compiled, lambda *x: lk.attention(*x, scaling))
    ]
    assert torch.equal(*grads)
