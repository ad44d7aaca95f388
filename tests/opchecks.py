"""Do results have the shape, dtype and strides that an op's fake implementation says? Inductor builds on them."""

import torch

import longrope_kernels as lk

OPS = torch.ops.longrope_kernels
SCALING = lk.RopeScaling(head_dim=64, theta=1e4, rotary_dim=48, rescale_factors=[1.5] * 24, start_tokens=2)
LADDER = lk.LongRope(8, {8: SCALING.replace(rescale_factors=None), 64: SCALING})
TOKENS = 20


def calls(backend, dtype):
    """Return every op that returns something, with arguments: operands as a model has them, transposed."""
    rotation = LADDER.rotation(torch.tensor([0, 1], dtype=torch.int32))
    tables = (rotation.turns, rotation.base_turns, rotation.inv_freq, rotation.start_tokens)
    tables += (rotation.attention_factor, rotation.regime_index)
    scores = (0.125, True, -1, -1, 0.0, False)
    torch.manual_seed(0)

    q, k, v = (torch.randn(2, TOKENS, heads, 64).to(dtype).transpose(1, 2) for heads in (4, 2, 2))
    at = torch.arange(TOKENS).expand(2, -1)
    starts = torch.tensor([0, 3])
    padded = (q, k, v, *tables, None, None, None, starts, None, *scores)
    out, lse = OPS.attention(*padded, backend)

    cache = lk.KVCache(2, 2, 64, 100, dtype)
    cache.append(k, v, backend="reference")
    pages = (cache.pages.key, cache.pages.value, cache.pages.block_table, cache.pages.length, None, None, None)
    over_pages = (*pages, *tables, None, None, *scores, backend)

    packed_q, packed_k, packed_v = (torch.randn(heads, 2 * TOKENS, 64).to(dtype).transpose(0, 1) for heads in (4, 2, 2))
    bounds = torch.tensor([0, TOKENS - 3, 2 * TOKENS])
    packed = (packed_q, packed_k, packed_v, *tables, bounds, bounds, None, None, *scores)
    packed_out, packed_lse = OPS.attention_varlen(*packed, backend)

    return {
        "apply_rope": (OPS.apply_rope, (q, k, *tables, at, at, False, False, backend)),
        "apply_rope of queries alone": (OPS.apply_rope, (q, q[:, :0], *tables, at, at, False, False, backend)),
        "attention": (OPS.attention, (*padded, backend)),
        "attention_backward": (OPS.attention_backward, (q, lse, *padded[:3], out, lse, *padded[3:], True, backend)),
        "attention_varlen": (OPS.attention_varlen, (*packed, backend)),
        "attention_varlen_backward": (
            OPS.attention_varlen_backward,
            (packed_q, packed_lse, *packed[:3], packed_out, packed_lse, *packed[3:], True, backend),
        ),
        "attention_paged": (OPS.attention_paged, (q, *over_pages)),
        "attention_paged of one token": (OPS.attention_paged, (q[:, :, -1:], *over_pages)),
    }


def check_what_ops_say(backend, dtype=torch.float32):
    """Run every op beside its fake implementation; assert that they agree, strides included."""
    for op, arguments in calls(backend, dtype).values():
        torch.library.opcheck(op, arguments, test_utils="test_faketensor")
