"""A model whose sequences are spread over ranks computes what it computes on one."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("transformers")

from test_transformers import build
from test_transformers_layered import LADDER, token_ids

from longrope_kernels import distributed as cp
from longrope_kernels.integrations.transformers import enable
from longrope_kernels.integrations.transformers_layered import layered_forward

TOKENS = 96
CASES: dict[str, dict[str, Any]] = {
    "llama": {"rope": LADDER},  # n-hat, and another regime than that of a rank's own tokens
    "gemma2": {},  # softcap, and a window in every other layer
    "phi3-longrope": {"regime": 500},
}


def results(name: str, group: Any = None) -> list[Tensor]:
    """Logits and the gradients of all weights, from this rank's part of the tokens."""
    model = build(name)
    enable(model, **CASES[name], group=group)
    ids = token_ids(TOKENS, 2)
    weight = torch.sin(torch.arange(TOKENS * 97.0)).view(1, TOKENS, 97)
    if group is not None:
        ids, weight = cp.shard(ids, 1, group), cp.shard(weight, 1, group)
    logits = model(input_ids=ids, use_cache=False).logits
    (logits * weight).sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    if group is None:
        return [logits.detach(), *grads]
    for grad in grads:
        dist.all_reduce(grad, group=group)
    return [cp.unshard(logits, 1, group), *grads]


def on_ranks() -> dict[str, list[Tensor]]:
    return {name: results(name, dist.group.WORLD) for name in CASES}


def refusals() -> list[str]:
    """What this rank is told; every rank refuses alike, so none waits for another."""
    model = build("llama")
    enable(model, LADDER, group=dist.group.WORLD)
    ids = cp.shard(token_ids(TOKENS), 1)
    half = ids.shape[1]
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    said = []
    for call in (
        lambda: model(input_ids=ids, position_ids=cp.positions(TOKENS).unsqueeze(0), attention_mask=mask | 1),
        lambda: model(input_ids=ids, attention_mask=mask),
        lambda: model.generate(ids, max_new_tokens=2, do_sample=False),
        lambda: layered_forward(model, ids, half),
    ):
        try:
            call()
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.fixture(scope="module")
def found() -> list[dict[str, list[Tensor]]]:
    return ranks.run(2, on_ranks)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_those_of_one_rank(name: str, found: list[dict[str, list[Tensor]]]) -> None:
    expected = results(name)
    for rank in found:
        for a, b in zip(rank[name], expected, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6


def test_what_cannot_be_spread_is_refused() -> None:
    for said in ranks.run(2, refusals):
        assert [line.split(":")[0] for line in said] == ["position_ids", "attention_mask", "attention_mask", "model"]
