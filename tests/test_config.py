"""Configurations of transformers: read as transformers computes them, written so that it computes the same."""

import json

import pytest
import torch

import longrope_kernels as lk

transformers = pytest.importorskip("transformers")
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

SHORT = [1.0 + 0.01 * pair for pair in range(48)]
LONG = [1.0 + 0.5 * pair for pair in range(48)]


def stock(config, length):
    """inv_freq and attention factor that transformers computes for a sequence of `length` tokens."""
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        embedding = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
        return embedding.inv_freq, embedding.attention_scaling
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)


def llama(**rope):
    return transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_theta": 5e5, **rope},
    )


def phi(pairs, head_dim, partial=1.0, **rope):
    return transformers.Phi3Config(
        hidden_size=head_dim * 4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": SHORT[:pairs],
            "long_factor": LONG[:pairs],
            "partial_rotary_factor": partial,
            "original_max_position_embeddings": 4096,
            **rope,
        },
    )


CONFIGS = {
    "default": llama(rope_type="default"),
    "linear": llama(rope_type="linear", factor=4.0),
    "yarn": llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=8192),
    "yarn, not truncated": llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=8192, truncate=False),
    "llama3": llama(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    ),
    "Phi-3-mini": phi(48, 96),
    "Phi-4-mini": phi(48, 128, partial=0.75),
    "explicit attention factor": phi(48, 96, attention_factor=1.0),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [100, 4096, 4097, 32768])
def test_frequencies_are_those_of_transformers(name, length):
    config = CONFIGS[name]
    scaling = lk.LongRope.from_config(config).select(length)
    inv_freq, attention_factor = stock(config, length)
    assert torch.allclose(scaling.inv_freq.float(), inv_freq, rtol=2e-6)
    assert scaling.attention_factor == pytest.approx(attention_factor)
    assert scaling.rotary_dim == 2 * inv_freq.shape[0]


@pytest.mark.parametrize("name", ["Phi-3-mini", "Phi-4-mini", "explicit attention factor"])
def test_longrope_makes_the_round_trip(name):
    config = CONFIGS[name]
    rope = lk.LongRope.from_config(config)
    parameters = json.loads(json.dumps(rope.to_config()))
    again = type(config)(**(config.to_dict() | {"rope_parameters": parameters}))
    assert lk.LongRope.from_config(again) == rope
    for length in (4096, 4097):
        ours, theirs = rope.select(length), stock(again, length)
        assert torch.allclose(ours.inv_freq.float(), theirs[0], rtol=2e-6)
        assert ours.attention_factor == pytest.approx(theirs[1])


@pytest.mark.parametrize("factor", [1.0, 2.0, 3.7])
@pytest.mark.parametrize("length", [100, 32768, 32769, 50_000, 131_072])
@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_dynamic_ntk_at_a_length_is_what_transformers_runs_there(factor, length, partial):
    config = llama(rope_type="dynamic", factor=factor, partial_rotary_factor=partial)
    inv_freq, attention_factor = stock(config, length)
    ours = lk.RopeScaling.dynamic_ntk(64, 5e5, factor, 32768, length, rotary_dim=int(64 * partial))
    assert torch.allclose(ours.inv_freq.float(), inv_freq, rtol=2e-6)
    assert ours.attention_factor == attention_factor == 1.0
    assert ours.is_identity == (length <= 32768)


def test_a_config_from_before_rope_parameters_is_read():
    fields = {
        "model_type": "phi3",
        "hidden_size": 384,
        "num_attention_heads": 4,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_theta": 1e4,
        "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
    }
    assert lk.LongRope.from_config(fields) == lk.LongRope.from_config(CONFIGS["Phi-3-mini"])


def test_factors_below_one_are_read():
    factors = [0.9978, *LONG[1:]]
    assert lk.LongRope.from_config(phi(48, 96, short_factor=factors)).scalings[0].rescale_factors[0] == 0.9978


def test_what_a_config_cannot_say_raises_unless_loss_is_wanted():
    plain = lk.RopeScaling(head_dim=64, theta=1e4)
    long = plain.replace(rescale_factors=[2.0] * 32)
    cases = {
        "start_tokens: got 4": {4096: plain, 8192: long.replace(start_tokens=4)},
        "regimes: got 3 regimes": {4096: plain, 8192: long, 16384: long},
        "attention_factor: got 1 short, 1.1 long": {4096: plain, 8192: long.replace(attention_factor=1.1)},
    }
    for message, regimes in cases.items():
        rope = lk.LongRope(4096, regimes)
        with pytest.raises(ValueError, match=message):
            rope.to_config()
        assert rope.to_config(allow_loss=True)["long_factor"] == [2.0] * 32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2", "max_position_embeddings": 1024}, "config: got a gpt2 config without rope_theta"),
        (
            {"model_type": "x", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type: got 'dynamic' in a x config",
        ),
        (
            {"model_type": "qwen2_vl", "rope_parameters": {"rope_theta": 1e4, "mrope_section": [1, 2]}},
            "rope_type: got 'mrope' in a qwen2_vl config",
        ),
        ({"model_type": "gemma3", "rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "layer_type: got None"),
    ],
)
def test_models_without_a_usable_embedding_are_refused(fields, message):
    with pytest.raises(lk.UnsupportedRopeError, match=message):
        lk.LongRope.from_config(fields)
