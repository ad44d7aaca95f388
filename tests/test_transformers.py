"""An enabled model computes what the stock model does: every family, padding, cache and way to generate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

hf = pytest.importorskip("transformers")

from longrope_kernels.integrations.transformers import disable, enable  # noqa: E402

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.12,  # the default 0.02 makes attention so even that its position hardly matters
}
GEMMA = {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 24}
FACTORS = [1.0 + 0.05 * pair for pair in range(48)]


def phi3_rope(pairs: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": FACTORS[:pairs],
        "long_factor": [4 * factor for factor in FACTORS[:pairs]],
        "original_max_position_embeddings": 16,
    }


CONFIGS: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**COMMON),
    "llama3-rope": lambda: hf.LlamaConfig(
        **COMMON,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": lambda: hf.MistralConfig(**COMMON, sliding_window=None),
    "mistral-window": lambda: hf.MistralConfig(**COMMON, sliding_window=8),
    "qwen2": lambda: hf.Qwen2Config(**COMMON),
    "qwen2-window": lambda: hf.Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": lambda: hf.Qwen3Config(**COMMON, head_dim=32),
    "phi3": lambda: hf.Phi3Config(**COMMON | {"hidden_size": 192, "num_attention_heads": 2}, sliding_window=None),
    "phi3-longrope": lambda: hf.Phi3Config(
        **COMMON | {"hidden_size": 192, "num_attention_heads": 2},
        original_max_position_embeddings=400,
        rope_parameters=phi3_rope(48),
        sliding_window=None,
    ),
    "phi4-mini": lambda: hf.Phi3Config(
        **COMMON | {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
        original_max_position_embeddings=400,
        rope_parameters=phi3_rope(48) | {"partial_rotary_factor": 0.75},
        sliding_window=None,
    ),
    "gemma2": lambda: hf.Gemma2Config(**COMMON, **GEMMA),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **COMMON,
        **GEMMA,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
        },
    ),
}
FAMILIES = sorted(CONFIGS)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
RELATIVES: dict[str, Any] = {  # the same attention in other models
    "gemma": lambda: hf.GemmaConfig(**COMMON, head_dim=32),
    "granite": lambda: hf.GraniteConfig(**COMMON, attention_multiplier=0.1),
    "mixtral": lambda: hf.MixtralConfig(**COMMON, num_local_experts=4),
    "olmo2": lambda: hf.Olmo2Config(**COMMON),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(**COMMON, **EXPERTS, shared_expert_intermediate_size=64),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**COMMON, **EXPERTS, head_dim=32),
}


def build(name: str, implementation: str = "eager", **changes: Any) -> Any:
    """Return a random model of a family; eager is the one stock attention that has Gemma-2's softcap."""
    torch.manual_seed(len(name))
    config = (CONFIGS | RELATIVES)[name]()
    config.update(changes)
    return hf.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def pair(name: str) -> tuple[Any, Any]:
    """Return the stock model and an enabled one of the same weights."""
    stock = build(name)
    ours = copy.deepcopy(stock)
    enable(ours)
    return stock, ours


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(length: int, left: list[int], right: list[int]) -> Tensor:
    """Return an attention mask [batch, length] with that much padding in each row."""
    column = torch.arange(length)
    return torch.stack([(column >= a) & (column < length - b) for a, b in zip(left, right, strict=True)]).long()


def assert_close(ours: Tensor, stock: Tensor, tolerance: float = 1e-5) -> None:
    """Compare relative to the scale of the stock logits."""
    error = float((ours - stock).abs().max() / stock.abs().max())
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("name", [*FAMILIES, *RELATIVES])
@torch.no_grad()
def test_logits_equal_the_stock_models(name: str) -> None:
    stock, ours = pair(name)
    ids = tokens(2, 40)
    assert_close(ours(ids).logits, stock(ids).logits)


@pytest.mark.parametrize("name", [*FAMILIES, *RELATIVES])
@torch.no_grad()
def test_logits_of_a_padded_batch_equal_the_stock_models(name: str) -> None:
    stock, ours = pair(name)
    ids, mask = tokens(4, 30), padding(30, left=[0, 11, 0, 5], right=[0, 0, 13, 5])
    for kwargs in ({}, {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}):
        real = mask.bool()
        assert_close(ours(ids, mask, **kwargs).logits[real], stock(ids, mask, **kwargs).logits[real])


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_padding_and_neighbours_do_not_change_a_sequence(name: str) -> None:
    _, ours = pair(name)
    ids = tokens(1, 20)
    alone = ours(ids).logits[0]
    batch = torch.cat((torch.nn.functional.pad(ids, (9, 0)), torch.nn.functional.pad(ids, (0, 9)), tokens(1, 29, 1)))
    logits = ours(batch, padding(29, left=[9, 0, 0], right=[0, 9, 0])).logits
    # The projections around the attention are torch's, whose rounding depends on the shape: hence not torch.equal.
    assert_close(logits[0, 9:], alone, 2e-6)
    assert_close(logits[1, :20], alone, 2e-6)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", FAMILIES)
def test_generate_equals_stock_generate(name: str, cache: str) -> None:
    stock, ours = pair(name)
    ids, mask = tokens(3, 12), padding(12, left=[0, 5, 9], right=[0, 0, 0])
    for length, arguments in ((12, {}), (12, {"attention_mask": mask}), (5, {})):
        options = arguments | {"max_new_tokens": 16, "do_sample": False, "cache_implementation": cache}
        expected = stock.generate(ids[:, :length], **options)
        assert torch.equal(ours.generate(ids[:, :length], **options), expected)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2", "gemma3", *RELATIVES])
def test_other_ways_to_generate_equal_stock(name: str) -> None:
    stock, ours = pair(name)
    ids, mask = tokens(2, 21), padding(21, left=[0, 7], right=[0, 0])
    for options in (
        {"use_cache": False},
        {"num_beams": 3},
        {"prefill_chunk_size": 6},
        {"prefill_chunk_size": 6, "cache_implementation": "static"},
    ):
        options |= {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
        assert torch.equal(ours.generate(ids, **options), stock.generate(ids, **options)), options


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_cache_fed_in_pieces_gives_the_logits_of_one_forward(name: str) -> None:
    stock, ours = pair(name)
    ids, mask = tokens(2, 30), padding(30, left=[0, 4], right=[0, 0])
    expected = stock(ids, mask).logits
    caches = (
        hf.DynamicCache(config=ours.config),
        hf.DynamicCache(),
        hf.StaticCache(config=ours.config, max_cache_len=33),
    )
    for cache in caches:
        for start, stop in ((0, 7), (7, 8), (8, 20), (20, 21), (21, 30)):
            out = ours(ids[:, start:stop], mask[:, :stop], past_key_values=cache)
            real = mask[:, start:stop].bool()
            assert_close(out.logits[real], expected[:, start:stop][real], 2e-5)


@torch.no_grad()
def test_the_cache_holds_unrotated_keys() -> None:
    _, ours = pair("llama")
    ids = tokens(1, 6)
    ids[:] = ids[:, :1]  # one token repeated: in the first layer, position alone tells its keys apart
    keys = ours(ids).past_key_values.layers[0].keys
    assert_close(keys, keys[:, :, :1].expand_as(keys))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_the_stock_model(name: str) -> None:
    stock = build(name)
    ids = tokens(2, 40)
    exact = stock(ids).logits
    half = copy.deepcopy(stock).bfloat16()
    error = (half(ids).logits - exact).square().mean().sqrt()
    enable(half)
    assert (half(ids).logits - exact).square().mean().sqrt() < 1.2 * error


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi4-mini"])
def test_gradients_equal_the_stock_models(name: str) -> None:
    stock, ours = pair(name)
    ids, mask = tokens(2, 24), padding(24, left=[0, 5], right=[0, 0])
    # The label of a first token is predicted from the padding before it, whose attention nobody defines.
    labels = ids.masked_fill(mask.cumsum(1) <= 1, -100)
    for model in (stock, ours):
        model.train()
        model(ids, mask, labels=labels).loss.backward()
    for (parameter_name, ours_parameter), parameter in zip(ours.named_parameters(), stock.parameters(), strict=True):
        scale = parameter.grad.abs().max()
        error = (ours_parameter.grad - parameter.grad).abs().max()
        assert error < 1e-4 * scale, f"{parameter_name}: {error / scale:.2e}"


def test_gradient_checkpointing_changes_no_gradient() -> None:
    _, ours = pair("mistral-window")
    ids = tokens(2, 24)
    gradients = []
    for checkpointing in (False, True):
        ours.train()
        if checkpointing:
            ours.gradient_checkpointing_enable({"use_reentrant": False})
        ours.zero_grad()
        ours(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in ours.parameters()])
    assert all(map(torch.equal, *gradients))


@torch.no_grad()
def test_autocast_and_inference_mode() -> None:
    stock, ours = pair("qwen3")
    ids = tokens(2, 20)
    exact = stock(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(ours(ids).logits.float(), exact, 0.1)
    with torch.inference_mode():
        assert_close(ours(ids).logits, exact)


def test_disable_restores_the_stock_model_bit_for_bit() -> None:
    for name in FAMILIES:
        model = build(name)
        ids = tokens(2, 20)
        with torch.no_grad():
            before = model(ids).logits
        attributes = [(module, dict(vars(module)), dict(module._modules)) for module in model.modules()]
        enable(model)
        disable(model)
        for module, values, children in attributes:
            now = dict(vars(module))
            assert now.keys() == values.keys()
            assert all(now[key] is values[key] for key in values)
            assert dict(module._modules) == children
        with torch.no_grad():
            assert torch.equal(model(ids).logits, before)
