"""A decoding step touches the device alone, so that a CUDA graph can hold it; and compiles into one graph of torch's.

Tensors on the meta device stand for a GPU's: whatever reads a value of one fails, and a dispatch mode refuses what a
capture would, copies between host and device.
"""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import longrope_kernels as lk
from longrope_kernels import backends, functional, ops, ops_packed
from longrope_kernels.bundles import Pages

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("launches are recorded here, not run", allow_module_level=True)

from longrope_kernels.backends import triton
from longrope_kernels.backends.triton import configs, launch

PLAIN = lk.RopeScaling(64, 1e4)
LADDER = lk.LongRope(100, {100: PLAIN, 4000: PLAIN.replace(rescale_factors=[2.0] * 32, start_tokens=9)})


class DeviceOnly(TorchDispatchMode):
    """Refuses to read a value on the host, and to copy between the host and the device."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        name = function.name()
        if name in ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero"):
            raise AssertionError(f"{name} reads a tensor on the host")
        found = [x.device.type for x in torch.utils._pytree.tree_leaves(arguments) if isinstance(x, torch.Tensor)]
        result = function(*arguments, **options)
        found += [x.device.type for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        if len(set(found)) > 1:
            raise AssertionError(f"{name} mixes devices: {found}")
        return result


@pytest.fixture
def launched(monkeypatch):
    """The names of what is launched on meta tensors, which are taken for a GPU's."""
    names = []
    monkeypatch.setattr(launch, "target_of", lambda device: "sm_90")
    monkeypatch.setattr(launch.Launch, "run", lambda self: names.append(self.name))
    monkeypatch.setattr(triton, "unavailable_reason", lambda: None)
    monkeypatch.setattr(triton, "supports", lambda op, query: None)
    monkeypatch.setitem(backends.PREFERENCE, "meta", ("triton",))
    # Past the dispatcher, which would answer for meta tensors with the fake implementation.
    for module, op in ((ops, "attention"), (ops_packed, "attention_paged"), (ops_packed, "cache_append")):
        monkeypatch.setattr(getattr(functional, module.__name__.rsplit(".", 1)[1]), op, getattr(module, op)._init_fn)
    return names


def meta_pages(quantised, page_tokens=256, count=8, batch=2, dtype=torch.bfloat16):
    meta = {"device": "meta"}
    shape = (count, 2, page_tokens, 64)
    table = torch.empty(batch, count // batch, dtype=torch.int32, **meta)
    length = torch.empty(batch, dtype=torch.int64, **meta)
    stored = {False: dtype, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[quantised]
    pages = torch.empty(shape, dtype=stored, **meta)
    if not quantised:
        return Pages(pages, pages, table, length)
    scales = torch.empty(count, 2, page_tokens // 64, 64, **meta), torch.empty(count, 2, page_tokens, **meta)
    return Pages(pages, pages, table, length, *scales, torch.empty(batch, 2, 64, 64, dtype=dtype, **meta))


@pytest.mark.parametrize("scaling", [None, PLAIN, LADDER], ids=["none", "one regime", "ladder"])
@pytest.mark.parametrize("quantised", [False, "int8", "fp8"])
@pytest.mark.parametrize(("tokens", "kernel"), [(1, "decode_kernel"), (4, "forward_kernel"), (100, "forward_kernel")])
def test_a_step_over_a_cache_stays_on_the_device(launched, scaling, quantised, tokens, kernel):
    pages = meta_pages(quantised)
    query = torch.empty(2, 8, tokens, 64, dtype=torch.bfloat16, device="meta")
    key = query[:, :2]

    def step():
        lk.cache_append(key, key, pages)
        pages.length.add_(tokens)
        return lk.attention_paged(query, pages, scaling, window=500)

    step()  # a ladder's tables reach a device once
    launched.clear()
    with DeviceOnly():
        out = step()
    assert out.shape == query.shape
    appended = ["append_kernel", "tail_kernel"] if quantised else ["append_kernel"]
    assert launched == [*appended, kernel, *(["combine_kernel"] if tokens < 100 else [])]


@pytest.mark.parametrize("tokens", [1, 300])
def test_attention_with_lengths_on_the_device_stays_there(launched, tokens):
    query = torch.empty(2, 8, tokens, 64, dtype=torch.bfloat16, device="meta")
    key = torch.empty(2, 2, 512, 64, dtype=torch.bfloat16, device="meta")
    bounds = {name: torch.empty(2, dtype=torch.int64, device="meta") for name in ("key_start", "key_length")}
    lk.attention(query, key, key, LADDER, **bounds)
    with DeviceOnly():
        lk.attention(query, key, key, LADDER, **bounds)
    assert launched


def test_more_runs_of_keys_than_a_grid_has_programs_are_refused(launched):
    query = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device="meta")
    most = configs.MOST_SPLITS * configs.SPLIT_KEYS
    lk.attention(query, *2 * [query.expand(-1, -1, most, -1)])
    with pytest.raises(
        ValueError, match=f"^key: got {most + 1} tokens beside 1 rows of queries, expected at most {most}"
    ):
        lk.attention(query, *2 * [query.expand(-1, -1, most + 1, -1)])
    key = query.expand(-1, -1, most + 1, -1)
    lk.attention(query.expand(-1, -1, 65, -1), key, key)


def test_the_mode_refuses_what_a_capture_refuses():
    length = torch.ones(2, dtype=torch.int64)
    with DeviceOnly(), pytest.raises(AssertionError, match="reads a tensor on the host"):
        length.max().item()
    with DeviceOnly(), pytest.raises(AssertionError, match="mixes devices"):
        length.to("meta")


@pytest.mark.parametrize("quantised", [False, "int8", "fp8"])
def test_a_decoding_step_is_one_graph_of_torch(quantised):
    """Traced with fake tensors of a GPU: no break, and the ops as they are in the graph."""
    pages = meta_pages(quantised)
    query = torch.empty(2, 8, 1, 64, dtype=torch.bfloat16, device="meta")
    graphs = []

    def collect(module, inputs):
        graphs.append([node.target for node in module.graph.nodes if node.op == "call_function"])
        return module.forward

    def step(query, key, pages):
        lk.cache_append(key, key, pages, backend="triton")
        pages.length.add_(1)
        return lk.attention_paged(query, pages, LADDER, backend="triton").sin()

    torch.compile(step, fullgraph=True, backend=collect)(query, query[:, :2], pages)
    (targets,) = graphs
    assert torch.ops.longrope_kernels.cache_append.default in targets
    assert torch.ops.longrope_kernels.attention_paged.default in targets
