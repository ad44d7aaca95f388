"""Low-rank adapters by peft: put into the model before training, merged into its weights after."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from ..errors import refuse


class Adapters:
    """LoRA adapters of every linear layer of the body; all other weights are frozen.

    Args:
        model: changed in place: its linear layers are wrapped.
        rank: of the adapters; their output is scaled by `alpha` / rank, alpha being twice the rank.
        seed: of their initial values.

    Raises:
        UsageError: peft is not installed.
    """

    def __init__(self, model: Any, rank: int, seed: int) -> None:
        check_peft()
        from peft import LoraConfig, get_peft_model

        self.requires_grad = {name: weight.requires_grad for name, weight in model.named_parameters()}
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model, self.wrapped = model, get_peft_model(model, config)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()

    def merge(self) -> None:
        """Add the adapters to the weights, in float32, and take them out of the model."""
        for weight in self.model.parameters():
            weight.data = weight.data.float()
        self._done(self.wrapped.merge_and_unload())

    def remove(self) -> None:
        """Take the adapters out of the model as if they had never been."""
        self._done(self.wrapped.unload())

    def _done(self, model: Any) -> None:
        assert model is self.model
        for name, weight in model.named_parameters():
            weight.requires_grad_(self.requires_grad[name])


def check_peft() -> None:
    """Refuse adapters where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        refuse("--lora-rank", "no package peft", "it installed (pip install peft)")
