"""What `enable` does beside computing the same: ropes and regimes, isolation, files, and what it refuses."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_transformers import COMMON, FACTORS, assert_close, build, padding, pair, phi3_rope, tokens
from torch import Tensor

hf = pytest.importorskip("transformers")

import longrope_kernels as lk  # noqa: E402
from longrope_kernels.integrations.transformers import disable, enable  # noqa: E402

ORIGINAL = 16  # tokens up to which the short regime of these models serves
SHORT = lk.RopeScaling(16, 1e4)
LONG = lk.RopeScaling(16, 1e4, rescale_factors=[1.0 + pair for pair in range(8)], attention_factor=1.1)
LADDER = lk.LongRope(ORIGINAL, {ORIGINAL: SHORT, 512: LONG})


def phi3(layers: int = 2) -> Any:
    """Return a stock Phi-3 that changes factors above 16 tokens."""
    torch.manual_seed(0)
    config = hf.Phi3Config(
        **COMMON | {"num_hidden_layers": layers},
        original_max_position_embeddings=ORIGINAL,
        rope_parameters=phi3_rope(8),
        sliding_window=None,
    )
    return hf.Phi3ForCausalLM._from_config(config, attn_implementation="eager").eval()


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM._from_config(hf.LlamaConfig(**COMMON | changes), attn_implementation="eager").eval()


def counted(model: Any) -> list[int]:
    """Return a list to which every forward of the model appends its number of tokens."""
    lengths: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return lengths


@pytest.mark.parametrize("length", [ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 3 * ORIGINAL])
@torch.no_grad()
def test_the_regime_changes_where_stock_longrope_changes_it(length: int) -> None:
    stock = phi3()
    ours = copy.deepcopy(stock)
    enable(ours)
    assert_close(ours(tokens(2, length)).logits, stock(tokens(2, length)).logits)


@torch.no_grad()
def test_each_sequence_of_a_batch_gets_the_regime_of_its_own_length() -> None:
    stock = phi3()
    ours = copy.deepcopy(stock)
    enable(ours)
    ids, mask = tokens(3, 30), padding(30, left=[0, 0, 20], right=[0, 20, 0])
    logits = ours(ids, mask).logits
    assert_close(logits[0], stock(ids[:1]).logits[0])
    assert_close(logits[1, :10], stock(ids[1:2, :10]).logits[0])
    assert_close(logits[2, 20:], stock(ids[2:, 20:]).logits[0])
    moved = (stock(ids, mask).logits[1, :10] - logits[1, :10]).abs().max()
    assert moved > 0.01, "the stock model gives the whole batch the factors of its longest row"


@torch.no_grad()
def test_a_ladder_is_lossless_up_to_the_original_length() -> None:
    stock, ours = llama(), llama()
    enable(ours, LADDER)
    assert_close(ours(tokens(1, ORIGINAL)).logits, stock(tokens(1, ORIGINAL)).logits)
    assert (ours(tokens(1, 20)).logits - stock(tokens(1, 20)).logits).abs().max() > 0.01
    extended = llama(rope_parameters=LADDER.to_config(allow_loss=True), max_position_embeddings=512)
    assert_close(ours(tokens(1, 40)).logits, extended(tokens(1, 40)).logits)


@torch.no_grad()
def test_a_pinned_regime_and_a_single_scaling_hold_at_every_length() -> None:
    pinned, single = llama(), llama()
    enable(pinned, LADDER, regime=500)
    enable(single, LONG)
    for length in (8, 40):
        assert torch.equal(pinned(tokens(1, length)).logits, single(tokens(1, length)).logits)


def test_rerotate_keeps_the_cache_where_the_regime_changes() -> None:
    # One layer: its keys do not depend on the regime, so that rotating them anew is all that a prefill would do.
    stock, ours = phi3(layers=1), phi3(layers=1)
    enable(ours)
    lengths = counted(ours)
    for cache in ("dynamic", "static"):
        lengths.clear()
        options = {"max_new_tokens": 12, "do_sample": False}
        generated = ours.generate(tokens(1, 10), cache_implementation=cache, **options)
        assert torch.equal(generated, stock.generate(tokens(1, 10), **options))
        assert lengths == [10] + [1] * 11


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_reprefill_equals_stock_phi3_and_running_without_a_cache(cache: str) -> None:
    stock, ours = phi3(), phi3()
    enable(ours, policy="reprefill")
    options = {"max_new_tokens": 14, "do_sample": False}
    lengths = counted(ours)
    expected = stock.generate(tokens(1, 10), **options)
    assert torch.equal(ours.generate(tokens(1, 10), cache_implementation=cache, **options), expected)
    assert sorted(lengths) == [1] * 12 + [10, ORIGINAL + 1]
    ids, mask = tokens(3, 12), padding(12, left=[0, 3, 6], right=[0, 0, 0])
    expected = ours.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(ours.generate(ids, attention_mask=mask, cache_implementation=cache, **options), expected)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2", "gemma3"])
@torch.no_grad()
def test_start_tokens_hold_in_every_cache(name: str) -> None:
    model = build(name)
    head_dim = model.model.layers[0].self_attn.head_dim
    rope = lk.RopeScaling(head_dim, 1e4, rescale_factors=FACTORS[: head_dim // 2], start_tokens=9)
    enable(model, rope)
    ids, mask = tokens(2, 30), padding(30, left=[0, 4], right=[0, 0])
    expected = model(ids, mask).logits
    enable(model, rope.replace(start_tokens=0))
    assert (model(ids, mask).logits - expected).abs().max() > 0.01
    enable(model, rope)
    for cache in (hf.DynamicCache(config=model.config), hf.StaticCache(config=model.config, max_cache_len=30)):
        for start, stop in ((0, 20), (20, 21), (21, 27), (27, 30)):
            out = model(ids[:, start:stop], mask[:, :stop], past_key_values=cache)
            real = mask[:, start:stop].bool()
            assert_close(out.logits[real], expected[:, start:stop][real], 2e-5)


@torch.no_grad()
def test_given_positions_rotate_and_choose_the_regime() -> None:
    stock = phi3()
    ours = copy.deepcopy(stock)
    enable(ours)
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    for positions in (torch.arange(0, 24, 2)[None], torch.stack((torch.arange(12), torch.arange(12) ** 2))):
        for row in range(len(positions)):  # row by row, as the stock model has one regime for a batch
            inputs = {"attention_mask": mask[:1], "position_ids": positions[row : row + 1], "use_cache": False}
            assert_close(ours(ids[:1], **inputs).logits, stock(ids[:1], **inputs).logits)
    assert (ours(ids, position_ids=torch.arange(12)[None] + 50).logits - ours(ids).logits).abs().max() > 0.01


@torch.no_grad()
def test_local_layers_of_gemma3_keep_their_own_rope() -> None:
    stock, ours = pair("gemma3")
    rope = lk.RopeScaling(32, 1e5, rescale_factors=FACTORS[:16])
    enable(ours, rope)
    parameters = lk.LongRope(256, {256: rope, 512: rope}).to_config()
    config = copy.deepcopy(stock.config)
    config.rope_parameters["full_attention"] = parameters
    expected = type(stock)._from_config(config, attn_implementation="eager").eval()
    expected.load_state_dict(stock.state_dict())
    assert_close(ours(tokens(1, 40)).logits, expected(tokens(1, 40)).logits)
    assert (stock(tokens(1, 40)).logits - expected(tokens(1, 40)).logits).abs().max() > 0.01


def test_rescale_factors_receive_a_gradient_through_the_model() -> None:
    model = llama()
    factors = torch.linspace(1, 3, 8, dtype=torch.float64, requires_grad=True)
    ids = tokens(1, 30)
    losses = []
    for step in (-1e-3, 1e-3):
        enable(model, lk.RopeScaling(16, 1e4, rescale_factors=factors.detach() + step))
        with torch.no_grad():
            losses.append(float(model(ids, labels=ids).loss))
    enable(model, lk.RopeScaling(16, 1e4, rescale_factors=factors))
    model(ids, labels=ids).loss.backward()
    assert factors.grad is not None
    assert float(factors.grad.sum()) == pytest.approx((losses[1] - losses[0]) / 2e-3, rel=0.05)


@torch.no_grad()
def test_models_that_share_a_config_are_told_apart() -> None:
    config = hf.LlamaConfig(**COMMON)
    first, second = (hf.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval() for _ in range(2))
    second.config = second.model.config = first.config
    for module in second.modules():
        if "config" in vars(module):
            module.config = first.config
    shared, implementation = first.config, first.config._attn_implementation
    before = second(tokens(1, 20)).logits
    enable(first, LADDER)
    assert second.config is shared
    assert shared._attn_implementation == implementation
    assert torch.equal(second(tokens(1, 20)).logits, before)
    assert first.config is first.model.config is first.model.layers[0].self_attn.config
    disable(first)
    assert first.config is shared


@torch.no_grad()
def test_enabling_again_replaces_the_rope_and_a_failure_changes_nothing() -> None:
    model = llama()
    enable(model, LONG)
    model.config.use_cache = False
    expected = model(tokens(1, 20)).logits
    enable(model, SHORT)
    assert not torch.equal(model(tokens(1, 20)).logits, expected)
    assert model.config.use_cache is False
    enable(model, LONG)
    with pytest.raises(ValueError, match=r"^rope: got head_dim 32, rotary_dim 32, interleaved False, expected those"):
        enable(model, lk.RopeScaling(32, 1e4))
    assert torch.equal(model(tokens(1, 20)).logits, expected)
    disable(model)
    disable(model)
    assert torch.equal(model(tokens(1, 20)).logits, llama()(tokens(1, 20)).logits)


@torch.no_grad()
def test_an_enabled_model_can_be_copied_pickled_and_saved(tmp_path: Path) -> None:
    model = llama()
    stock = model(tokens(1, 20)).logits
    enable(model, LADDER)
    expected = model(tokens(1, 20)).logits
    twin = copy.deepcopy(model)
    disable(model)
    assert torch.equal(twin(tokens(1, 20)).logits, expected)
    disable(twin)
    assert torch.equal(twin(tokens(1, 20)).logits, stock)

    enable(model, LADDER)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    assert torch.equal(twin(tokens(1, 20)).logits, expected)
    disable(twin)
    assert_close(twin(tokens(1, 20)).logits, stock, 1e-6)

    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(loaded(tokens(1, 20)).logits, stock)


@torch.no_grad()
def test_a_sidecar_beside_the_checkpoint_is_read(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    (tmp_path / "longrope.json").write_text(json.dumps(LADDER.to_dict()))
    model = llama()
    enable(model, LADDER)
    expected = model(tokens(1, 20)).logits
    for rope in (tmp_path, str(tmp_path / "longrope.json")):
        enable(model, rope)
        assert torch.equal(model(tokens(1, 20)).logits, expected)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    enable(loaded)
    assert torch.equal(loaded(tokens(1, 20)).logits, expected)


@torch.no_grad()
def test_a_forward_somebody_wrapped_is_left_alone() -> None:
    model = llama()
    attention = model.model.layers[0].self_attn
    attention.forward = wrapped = lambda *args, **kwargs: type(attention).forward(attention, *args, **kwargs)
    enable(model)
    assert attention.forward is wrapped
    assert_close(model(tokens(1, 20)).logits, llama()(tokens(1, 20)).logits)
    disable(model)
    assert attention.forward is wrapped


# Those of transformers read `func.__code__.co_varnames`, which dynamo of torch 2.6 does not follow; that of 2.9 does.
compiles_models = pytest.mark.xfail(
    torch.__version__ < (2, 9), raises=torch._dynamo.exc.Unsupported, reason="dynamo stops in transformers' own code"
)


@compiles_models
@torch.no_grad()
def test_an_enabled_model_compiles_without_a_graph_break() -> None:
    ids, mask = tokens(2, 20), padding(20, left=[0, 4], right=[0, 0])
    for name in ("llama", "mistral-window", "gemma3"):
        _, model = pair(name)
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert_close(compiled(ids, mask).logits[mask.bool()], model(ids, mask).logits[mask.bool()])
        with pytest.raises(RuntimeError, match="attention_mask: got a gap"):
            compiled(ids, mask.index_fill(1, torch.tensor([7]), 0))


@compiles_models
def test_generate_compiles_with_a_static_cache() -> None:
    stock, ours = pair("gemma2")
    compiling = hf.CompileConfig(backend="eager", mode=None, fullgraph=True)
    compiling._compile_all_devices = True
    ids, mask = tokens(2, 6), padding(6, left=[0, 4], right=[0, 0])
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(ours.generate(ids, compile_config=compiling, **options), stock.generate(ids, **options))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def masked(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


BAD_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "hole": ({"attention_mask": masked([1] * 6, [1, 1, 0, 1, 1, 1])}, "attention_mask: got a gap .* of row 1, "),
    "short": ({"attention_mask": masked([1] * 4, [1] * 4)}, "attention_mask: got 4 columns, expected 6"),
    "4D": ({"attention_mask": torch.ones(2, 1, 6, 6).bool()}, r"attention_mask: got a torch.bool mask of shape \(2, 1"),
    "ints": ({"attention_mask": torch.ones(2, 1, 1, 7).long()}, "attention_mask: got an int64 mask of shape"),
    "packed": (
        {"position_ids": masked([0, 1, 2, 0, 1, 2]), "use_cache": False},
        "attention_mask: got a pattern .*pack",
    ),
    "packed-cached": (
        {"position_ids": masked([0, 1, 2, 0, 1, 2])},
        "position_ids: got 0 after 2 in row 0, expected inc",
    ),
    "weights": ({"output_attentions": True}, "output_attentions: got True, expected False"),
    "packed rows": ({"cu_seq_lens_q": masked([0, 3, 6])}, "cu_seq_lens_q: got 2 rows, expected input_ids of one row"),
    "cache": ({"cache": masked([0])}, "cache: got a Tensor, expected None"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
@torch.no_grad()
def test_inputs_that_cannot_be_expressed_are_refused(case: str) -> None:
    _, model = pair("llama")
    inputs, message = BAD_INPUTS[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        model(tokens(2, 6), **inputs)


@torch.no_grad()
def test_positions_that_do_not_continue_the_cache_are_refused() -> None:
    _, model = pair("llama")
    cache = model(tokens(1, 6)).past_key_values
    with pytest.raises(ValueError, match=r"^position_ids: got 9 in row 0, expected 6, the index in its sequence"):
        model(tokens(1, 1), past_key_values=cache, position_ids=torch.tensor([[9]]))


def test_right_padding_cannot_be_generated_from() -> None:
    _, model = pair("llama")
    with pytest.raises(ValueError, match=r"^attention_mask: got a gap .*on the left, to generate"):
        model.generate(tokens(2, 6), attention_mask=padding(6, left=[0, 0], right=[0, 2]), max_new_tokens=3)


def test_dropout_is_refused_in_training_alone() -> None:
    model = llama(attention_dropout=0.1)
    enable(model)
    model(tokens(1, 6))
    with pytest.raises(ValueError, match=r"^attention_dropout: got 0.1, expected 0 in training"):
        model.train()(tokens(1, 6))


def test_another_attention_on_an_enabled_model_is_refused() -> None:
    model = llama()
    enable(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"^attn_implementation: got 'sdpa' on an enabled model"):
        model(tokens(1, 6))
    model = llama()
    model.set_attn_implementation("longrope_kernels")
    with pytest.raises(ValueError, match=r"^attn_implementation: got 'longrope_kernels' on a model that is not"):
        model(tokens(1, 6))


def test_the_integration_is_an_attribute_of_the_package() -> None:
    assert lk.integrations.transformers.enable is enable


def test_models_and_ropes_that_are_not_supported_are_refused(tmp_path: Path) -> None:
    gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(lk.UnsupportedRopeError, match=r"^model: got a gpt2 model, expected one of gemma, "):
        enable(gpt2)
    neox = hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(lk.UnsupportedRopeError, match="gpt_neox"):
        enable(neox)
    dynamic = llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(lk.UnsupportedRopeError, match="'dynamic' in a llama config"):
        enable(dynamic)
    with pytest.raises(TypeError, match=r"^model: got Linear, expected a transformers model"):
        enable(torch.nn.Linear(2, 2))
    (tmp_path / "longrope.json").write_text('{"format": "longrope-ker')
    for rope, message in (
        (tmp_path, r"^rope: got .*longrope.json \(Unterminated"),
        (tmp_path / "none.json", r"^rope: got .*none.json \(.*No such file"),
    ):
        with pytest.raises(ValueError, match=message):
            enable(llama(), rope)
    with pytest.raises(TypeError, match=r"^rope: got list, expected a LongRope"):
        enable(llama(), [1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^policy: got 'pin', expected one of rerotate, reprefill"):
        enable(llama(), policy="pin")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^regime: got 0, expected a length"):
        enable(llama(), regime=0)
