"""The training loss in chunks is the model's own loss, in value and in gradient, and never holds all logits."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig

import longrope_kernels as lk
from longrope.tune.loss import CausalLoss
from longrope_kernels.integrations.transformers import enable

TOKENS = 96
SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: tiny.config(),
    "llama-tied": lambda: tiny.config(tie_word_embeddings=True),
    "gemma2": lambda: Gemma2Config(**SIZES, query_pre_attn_scalar=32, final_logit_softcapping=3.0),
    "granite": lambda: GraniteConfig(**SIZES, logits_scaling=4.0, bos_token_id=0, eos_token_id=0),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]()).train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_loss_that_transformers_computes(name: str) -> None:
    model = build(name)
    enable(model, lk.LongRope(128, {128: lk.LongRope.from_config(model.config).scalings[-1]}))
    ids = torch.randint(256, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    whole = model(input_ids=ids, labels=ids, use_cache=False).loss
    whole.backward()
    wanted = gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    loss = CausalLoss(model, chunk_tokens=17)(ids)["loss"]
    loss.backward()
    assert torch.allclose(loss, whole, rtol=1e-6, atol=0)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for key, grad in wanted.items():
        assert torch.allclose(found[key], grad, rtol=1e-4, atol=1e-6 * float(grad.abs().max())), key


def test_logits_of_more_than_a_chunk_are_never_held() -> None:
    class Watching(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(one, torch.Tensor) and one.shape[-1:] == (256,):
                    self.most = max(self.most, one.numel() // 256)
            return out

    model = build("llama")
    enable(model)
    ids = torch.randint(256, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with Watching() as watching:
        CausalLoss(model, chunk_tokens=8)(ids)["loss"].backward()
    assert 8 <= watching.most <= 64, "64: the head's own weight, transposed"
    with Watching() as watching:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert watching.most >= TOKENS, "and the watch sees those of the ordinary loss"
