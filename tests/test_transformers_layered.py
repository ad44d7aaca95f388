"""A forward layer by layer, in chunks of tokens, is the ordinary forward of an enabled model, in less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

from test_transformers import CONFIGS, RELATIVES, build

import longrope_kernels as lk
from longrope_kernels.integrations.transformers import disable, enable
from longrope_kernels.integrations.transformers_layered import layered_forward

DENSE = sorted(name for name in CONFIGS | RELATIVES if not name.endswith("moe"))
LADDER = lk.LongRope(
    40,
    {
        40: lk.RopeScaling(head_dim=16, theta=1e4),
        400: lk.RopeScaling(head_dim=16, theta=1e4, rescale_factors=[2.0] * 8, start_tokens=7, attention_factor=1.2),
    },
)


def token_ids(tokens: int, batch: int = 1) -> Tensor:
    return torch.randint(2, 97, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


@torch.inference_mode()
def ordinary(model: nn.Module, ids: Tensor) -> Tensor:
    return model.model(input_ids=ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DENSE)
def test_it_is_the_ordinary_forward(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    enable(model)
    ids = token_ids(450, 2)
    found, expected = layered_forward(model, ids, 100), ordinary(model, ids)
    assert (found - expected).norm() <= 2 * torch.finfo(dtype).eps * expected.norm()
    if linear_layers_round_alike(model, 450, 90):
        assert torch.equal(found, expected)


@torch.inference_mode()
def linear_layers_round_alike(model: nn.Module, tokens: int, chunk: int) -> bool:
    """Whether the matrix products of this machine give a row the same bits whatever the number of rows."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            x = torch.randn(2, tokens, module.in_features, dtype=module.weight.dtype)
            if not torch.equal(module(x)[:, :chunk], module(x[:, :chunk])):
                return False
    return True


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe"])
def test_experts_round_by_how_many_tokens_they_get(name: str) -> None:
    model = build(name)
    enable(model)
    ids = token_ids(450)
    assert torch.allclose(layered_forward(model, ids, 100), ordinary(model, ids), atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 39, 40, 41, 300])
def test_every_chunk_gets_the_regime_of_the_whole_sequence(tokens: int) -> None:
    model = build("llama")
    enable(model, LADDER)
    ids = token_ids(tokens)
    assert torch.allclose(layered_forward(model, ids, 32), ordinary(model, ids), atol=1e-5)


def test_a_pinned_regime_stays_pinned() -> None:
    model = build("llama")
    enable(model, LADDER, regime=40)
    ids = token_ids(100)
    assert torch.equal(layered_forward(model, ids, 50), ordinary(model, ids))


def test_the_model_is_left_as_it_was_after_an_error_too() -> None:
    model = build("llama")
    enable(model, LADDER)
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(ZeroDivisionError):
        layered_forward(model, token_ids(64), 32)
    assert [dict(vars(module)) for module in model.modules()] == before


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that exist at once, of those made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: one for key, one in self.alive.items() if not one[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return found


def bytes_a_token(layers: int, run: Callable[[nn.Module, Tensor], Tensor]) -> float:
    """By how much the peak grows with each token of a longer sequence."""
    peaks = []
    for tokens in (512, 2560):
        model = build("llama", num_hidden_layers=layers)
        enable(model)
        with Alive() as alive:
            run(model, token_ids(tokens))
        peaks.append(alive.peak)
    return (peaks[1] - peaks[0]) / 2048


def test_what_grows_with_the_sequence_is_one_hidden_state_and_one_layers_keys_and_values() -> None:
    held = 4 * (64 + 2 * 2 * 16)  # float32: hidden_size, and two key heads of 16
    for layers in (2, 6):
        grows = bytes_a_token(layers, lambda model, ids: layered_forward(model, ids, 128))
        assert held <= grows < held + 32  # token ids, masks and positions of the chunks
        assert bytes_a_token(layers, ordinary) > 3 * held


BAD = {
    "model: got a LlamaForCausalLM that is not enabled": lambda model: (disable(model), layered_forward(model, IDS)),
    "model: got a model in training mode": lambda model: layered_forward(model.train(), IDS),
    "input_ids: got shape (5,)": lambda model: layered_forward(model, IDS[0]),
    "input_ids: got shape (1, 0)": lambda model: layered_forward(model, IDS[:, :0]),
    "chunk_tokens: got 0": lambda model: layered_forward(model, IDS, 0),
}
IDS = token_ids(5)


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named_in_one_line(message: str) -> None:
    model = build("llama")
    enable(model)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the line is compared below
        BAD[message](model)
    assert str(error.value).startswith(message)
