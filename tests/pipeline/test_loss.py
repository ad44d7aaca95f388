"""The loss of a long sequence is plain cross entropy, and its logits are never held whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM, LlamaForCausalLM

from longrope import loss
from longrope.loss import answer_scores, token_nll

SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(tiny.config()),
    "tied": lambda: LlamaForCausalLM(tiny.config(tie_word_embeddings=True)),
    "gemma2, which caps its logits": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, final_logit_softcapping=2.0, sliding_window=32)
    ),
    "granite, which divides its logits": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0)),
}
TOKENS = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(0))


def made(name: str) -> Any:
    torch.manual_seed(1)
    return MODELS[name]().eval()


@torch.inference_mode()
def plain(model: Any, ids: torch.Tensor, start: int) -> torch.Tensor:
    logits = model(ids.unsqueeze(0), use_cache=False).logits[0].float()
    return functional.cross_entropy(logits[start - 1 : -1], ids[start:], reduction="none")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("start", [1, 2, 37, 99])
def test_it_is_the_cross_entropy_of_the_models_own_logits(name: str, start: int) -> None:
    model = made(name)
    torch.testing.assert_close(token_nll(model, TOKENS, start), plain(model, TOKENS, start), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 99, 1000])
def test_the_size_of_the_chunks_changes_nothing(chunk: int) -> None:
    model = made("llama")
    torch.testing.assert_close(token_nll(model, TOKENS, 1, chunk), plain(model, TOKENS, 1), rtol=1e-5, atol=1e-5)


def test_the_first_token_has_nothing_before_it_and_no_loss() -> None:
    model = made("llama")
    assert token_nll(model, TOKENS, 0).shape == token_nll(model, TOKENS, 1).shape == (99,)
    assert token_nll(model, TOKENS, 100).shape == (0,)


def test_an_answer_is_scored_as_the_logits_say() -> None:
    model = made("llama")
    with torch.inference_mode():
        expected = model(TOKENS.unsqueeze(0)).logits[0, 89:-1].argmax(-1)
    likeliest, losses = answer_scores(model, TOKENS, 90)
    assert torch.equal(likeliest, expected)
    torch.testing.assert_close(losses, plain(model, TOKENS, 90), rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """Records how many rows of logits any tensor ever held."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == 1009:
                self.rows = max(self.rows, tensor.numel() // 1009)
        return result


def test_no_tensor_ever_holds_the_logits_of_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,009 words, a number that no other dimension has; a budget of 16 rows of them."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(tiny.config(vocab_size=1009)).eval()
    monkeypatch.setattr(loss, "CHUNK_BYTES", 16 * 4 * 1009 + 3)
    ids = torch.randint(0, 1009, (128,), generator=torch.Generator().manual_seed(0))
    with Largest() as ours:
        token_nll(model, ids)
    with Largest() as theirs:
        plain(model, ids, 1)
    assert theirs.rows == 128
    assert ours.rows == 16
