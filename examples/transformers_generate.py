"""Extend a transformers model by YaRN at run time and generate across the change of regime, keys cached unrotated.

The model is random, so the text means nothing; put `AutoModelForCausalLM.from_pretrained(...)` in its place.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import longrope_kernels as lk
from longrope_kernels.integrations.transformers import disable, enable

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.1,
)
model = LlamaForCausalLM(config).eval()
prompt = torch.randint(3, 1000, (1, 40))


def generate() -> torch.Tensor:
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=48, do_sample=False)[0, 40:]


stock = generate()
# Two regimes: the original embedding up to 64 tokens, YaRN beyond. The switch falls in the middle of the generation.
rope = lk.LongRope.yarn(head_dim=64, theta=1e4, original_max_position_embeddings=64, max_position_embeddings=256)
enable(model, rope)
rerotated = generate()  # cached keys rotate by the new factors from token 65 on
enable(model, rope, policy="reprefill")
reprefilled = generate()  # all 65 tokens are run again
enable(model, rope, regime=256)
pinned = generate()  # the long factors from the first token on
disable(model)

for name, text in (("rerotate", rerotated), ("reprefill", reprefilled), ("pinned to 256", pinned)):
    same = int((text == stock).int().cumprod(0).sum())
    print(f"{name:>13}: the first {same} of {len(stock)} tokens are the stock model's")
assert torch.equal(generate(), stock)
