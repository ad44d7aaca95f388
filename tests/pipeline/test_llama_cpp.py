"""llama.cpp loads an exported GGUF file and gives its tokens the losses that we do, in both regimes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter

import longrope_kernels as lk
from longrope.export import export_gguf
from longrope.loss import token_nll
from longrope.models import LoadedModel

pytest.importorskip("xllamacpp", reason="llama.cpp itself, from the package xllamacpp")

import judge

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(path: Path, model: Any) -> Path:
    """Write the tiny model as llama.cpp's converter would: rotary pairs side by side, no tokenizer."""
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("none")

    def add(name: str, weight: torch.Tensor) -> None:
        writer.add_tensor(f"{name}.weight", weight.detach().float().numpy().copy())

    add("token_embd", model.model.embed_tokens.weight)
    add("output_norm", model.model.norm.weight)
    add("output", model.lm_head.weight)
    for number, layer in enumerate(model.model.layers):
        for theirs, ours in NAMES.items():
            weight = layer.get_submodule(theirs).weight
            if ours in ("attn_q", "attn_k"):
                weight = weight.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
            add(f"blk.{number}.{ours}", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("regime", "context"), [("short", 256), ("long", 512)])
def test_llama_cpp_gives_our_losses(loaded: LoadedModel, tmp_path: Path, regime: str, context: int) -> None:
    factors = [1 + pair / 4 for pair in range(16)]
    long = loaded.base.replace(rescale_factors=factors, attention_factor=1.2)
    short = loaded.base.replace(rescale_factors=[1.1] * 16, attention_factor=1.2)
    rope = lk.LongRope(256, {256: short, 512: long})
    source = write(tmp_path / "model.gguf", loaded.model)
    notes = export_gguf(rope, loaded.model.config, source, tmp_path / "long.gguf")
    assert len(notes) == 1
    # Short enough for either context: which factors llama.cpp takes, its context decides.
    tokens = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(0))
    found = judge.losses(tmp_path / "long.gguf", tokens.tolist(), context)
    expected = {}
    for name, scaling in (("short", short), ("long", long), ("unscaled", loaded.base)):
        loaded.use(lk.LongRope(512, {512: scaling}))
        expected[name] = token_nll(loaded.model, tokens).double().numpy()
    errors = {name: np.abs(found - losses).mean() for name, losses in expected.items()}
    assert errors[regime] < 5e-3, errors  # its cache is in half precision
    assert min(error for name, error in errors.items() if name != regime) > 0.5, errors
    assert np.abs(judge.losses(source, tokens.tolist(), context) - expected["unscaled"]).mean() < 5e-3
