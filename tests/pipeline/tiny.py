"""A random Llama of two layers with a byte tokenizer, and long texts for it: the whole pipeline in seconds."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ORIGINAL, TARGET = 128, 256


def tokenizer() -> PreTrainedTokenizerFast:
    """Return one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bare)


def config(**changes: object) -> LlamaConfig:
    settings = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": ORIGINAL,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return LlamaConfig(**{**settings, **changes})


def save(folder: Path) -> Path:
    """Write the model and its tokenizer as transformers does."""
    torch.manual_seed(0)
    LlamaForCausalLM(config()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def texts(folder: Path, count: int = 4, letters: int = 400) -> Path:
    """Write `count` text files of `letters` bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        drawn = random.Random(number)
        words = " ".join("".join(drawn.choices("abcdefgh", k=drawn.randint(2, 7))) for _ in range(letters))
        (folder / f"text{number}.txt").write_text(words[:letters])
    return folder
