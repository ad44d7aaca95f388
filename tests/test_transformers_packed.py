"""Sequences packed into one row are computed as each would be alone: positions, regime, mask and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from test_transformers import FAMILIES, RELATIVES, build, tokens
from test_transformers_layered import LADDER

from longrope_kernels.integrations.transformers import enable

LENGTHS = (40, 3, 1, 70)
BOUNDS = torch.tensor([0, 40, 43, 44, 114])


def packed(model: Any, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    return model(input_ids=ids, cu_seq_lens_q=BOUNDS, use_cache=False, **arguments).logits


@pytest.mark.parametrize("name", [*FAMILIES, *RELATIVES])
def test_every_packed_sequence_is_computed_as_if_alone(name: str) -> None:
    model = build(name)
    enable(model)
    ids = tokens(1, sum(LENGTHS))
    together = packed(model, ids).split(LENGTHS, 1)
    for part, alone in zip(together, ids.split(LENGTHS, 1), strict=True):
        assert torch.allclose(part, model(input_ids=alone, use_cache=False).logits, atol=2e-4)


@pytest.mark.parametrize("regime", [None, 1000])
def test_every_packed_sequence_has_the_regime_of_its_own_length_and_gradients_of_its_own(regime: int | None) -> None:
    model = build("llama")
    enable(model, LADDER, regime=regime)
    ids = tokens(1, sum(LENGTHS))
    gradients = []
    for parts in (packed(model, ids).split(LENGTHS, 1), [model(part).logits for part in ids.split(LENGTHS, 1)]):
        model.zero_grad()
        sum((part.sin().sum() for part in parts), torch.zeros(())).backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    for ours, wanted in zip(*gradients, strict=True):
        assert torch.allclose(ours, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    assert {LADDER.select(length) for length in LENGTHS} == set(LADDER.scalings[:2]), "two regimes are in the row"


def test_what_packed_sequences_exclude_is_named() -> None:
    model = build("llama")
    enable(model)
    ids = tokens(1, sum(LENGTHS))
    padding = torch.ones_like(ids)
    padding[0, 0] = 0
    for arguments, said in (
        ({"attention_mask": padding}, "attention_mask: got padding or a cache, expected neither beside cu_seq_lens_q"),
        ({"cu_seq_lens_k": BOUNDS + 1}, "cu_seq_lens_k: got tensor"),
        ({"position_ids": torch.arange(114).unsqueeze(0) * 2, "attention_mask": padding | 1}, "position_ids: got posi"),
    ):
        with pytest.raises(ValueError, match=said):
            packed(model, ids, **arguments)
    with pytest.raises(ValueError, match="cu_seq_lens_q: got 2 rows, expected input_ids of one row"):
        packed(model, ids.expand(2, -1))
