"""Language models whose answers are known beforehand, for the tests of what is asked and how it is scored."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import tiny
import torch

LETTERS = 256


class Planted(torch.nn.Module):
    """A model that says, after each token, the one that follows it in the text it is given, or the one after that."""

    base_model_prefix = "body"
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=LETTERS))

    def __init__(self, off_by: int = 0, until: int | None = None) -> None:
        super().__init__()
        self.off_by, self.until = off_by, until

    def body(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        said = (input_ids[0].roll(-1) + self.off_by) % LETTERS
        if self.until is not None:  # right up to this token, wrong afterwards
            said[self.until :] = (said[self.until :] + 1) % LETTERS
        logits = 20.0 * torch.nn.functional.one_hot(said[None], LETTERS).float()
        return SimpleNamespace(last_hidden_state=logits)

    def get_output_embeddings(self) -> torch.nn.Module:
        return torch.nn.Identity()


def loaded(model: torch.nn.Module) -> Any:
    """Return what stands in for a `LoadedModel` around a planted model."""
    return SimpleNamespace(model=model, tokenizer=tiny.tokenizer(), use=lambda rope: None)
