"""Train the small Llama of `examples/tiny-512`: 2.4 million parameters, windows of 512 tokens, the standard library.

    python examples/train_tiny.py --out examples/tiny-512

It is made to be extended: small enough that the whole pipeline runs on two cores in minutes, and able to look things
up, which a third of its training teaches it (a number is told, other text follows, the number is asked for). It reads
no text that `longrope` searches or evaluates on (`longrope.data`). Killed and started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import longrope_kernels as lk
from longrope.data import STDLIB_HELDOUT, STDLIB_SEARCH
from longrope.evaluate.passkey import FILLER, NEEDLE, QUESTION, TASK
from longrope_kernels.integrations.transformers import enable

LENGTH = 512
BEGIN, END = "<s>", "</s>"
LOOKUPS = 0.35  # share of the sequences that are made of texts to look things up in
CHECKPOINT_STEPS = 50
# Beside what `longrope` reads: installed packages, generated tables, and the topics' own module.
UNUSED = ("site-packages/", "dist-packages/", "pydoc_data/", "encodings/", "_sysconfigdata")


def training_texts() -> list[str]:
    """Return the standard library without its tests and without what `longrope` searches or evaluates on."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = {file.relative_to(root).as_posix(): file for file in sorted(root.rglob("*.py"))}
    left_out = (*STDLIB_HELDOUT, *STDLIB_SEARCH, *UNUSED)
    files = [file for name, file in names.items() if not name.startswith(left_out) and "/test" not in f"/{name}"]
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    return [text for text in texts if text.strip()]


def tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return byte-level BPE trained on `texts`; every digit is a token of its own."""
    bare = Tokenizer(models.BPE())
    digits, letters = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    bare.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[BEGIN, END], initial_alphabet=alphabet)
    bare.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bare,
        bos_token=BEGIN,
        eos_token=END,
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )


def config(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )


class Batches:
    """Batch number `step`, int64[sequences, LENGTH + 1], from the step and the seed alone."""

    def __init__(self, tokens: PreTrainedTokenizerFast, texts: list[str], sequences: int, seed: int) -> None:
        self.tokens, self.texts, self.sequences, self.seed = tokens, texts, sequences, seed
        parts = [[0, *ids, 1] for ids in tokens(texts, add_special_tokens=False, verbose=False)["input_ids"]]
        self.stream = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])

    def __call__(self, step: int) -> torch.Tensor:
        drawn = random.Random(f"{self.seed} {step}")
        rows = []
        for _ in range(self.sequences):
            if drawn.random() < LOOKUPS:
                rows.append(self.lookups(drawn))
            else:
                first = drawn.randrange(len(self.stream) - LENGTH - 1)
                rows.append(self.stream[first : first + LENGTH + 1])
        return torch.from_numpy(np.stack(rows))

    def lookups(self, drawn: random.Random) -> np.ndarray:
        """Return texts to look things up in, of 64 to 512 tokens, one after the other."""
        ids: list[int] = []
        while len(ids) < LENGTH + 1:
            room = round(math.exp(drawn.uniform(math.log(64), math.log(LENGTH))))
            make = self.pass_key if drawn.random() < 0.5 else self.magic_numbers
            ids += [0, *make(drawn, room - 2), 1]
        return np.asarray(ids[: LENGTH + 1], dtype=np.int64)

    def pass_key(self, drawn: random.Random, room: int) -> list[int]:
        key = str(drawn.randrange(10_000, 100_000))
        head, needle = self.ids(TASK), self.ids(NEEDLE.format(key=key))
        question = self.ids(f"{QUESTION} {key}")
        left = max(room - len(head) - len(needle) - len(question), 0)
        filler = self.filler(drawn, left)
        at = drawn.randrange(left + 1)
        return [*head, *filler[:at], *needle, *filler[at:], *question]

    def magic_numbers(self, drawn: random.Random, room: int) -> list[int]:
        """Several names with a number each, then questions for some of them."""
        names = [
            "".join(drawn.choices("abcdefghijklmnopqrstuvwxyz", k=drawn.randint(4, 8)))
            for _ in range(drawn.randint(1, 4))
        ]
        numbers = {name: "".join(drawn.choices("0123456789", k=drawn.randint(4, 7))) for name in names}
        told = [self.ids(f"\nOne of the special magic numbers for {name} is: {numbers[name]}.\n") for name in names]
        asked = drawn.sample(names, drawn.randint(1, len(names)))
        questions = [
            self.ids(
                f"\nWhat is the special magic number for {name}? The special magic number for {name} is {numbers[name]}"
            )
            for name in asked
        ]
        left = max(room - sum(map(len, (*told, *questions))), 0)
        filler = self.filler(drawn, left)
        cuts = [0, *sorted(drawn.randrange(left + 1) for _ in told), left]
        ids = filler[: cuts[1]]
        for number, needle in enumerate(told):
            ids = [*ids, *needle, *filler[cuts[number + 1] : cuts[number + 2]]]
        return [*ids, *(token for question in questions for token in question)]

    def filler(self, drawn: random.Random, count: int) -> list[int]:
        if drawn.random() < 0.5:
            sentence = self.ids(FILLER)
            return (sentence * (count // len(sentence) + 1))[:count]
        first = drawn.randrange(len(self.stream) - count)
        return [max(token, 2) for token in self.stream[first : first + count].tolist()]

    def ids(self, text: str) -> list[int]:
        return list(self.tokens(text, add_special_tokens=False)["input_ids"])


def rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate: a linear warm-up of 50 steps, then a cosine to a twentieth."""
    if step < 50:
        return peak * (step + 1) / 50
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - 50) / max(steps - 50, 1))))


def state(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor that a further step depends on."""
    for name, value in model.named_parameters():
        yield f"weight.{name}", value.data
        for key in ("exp_avg", "exp_avg_sq"):
            yield f"{key}.{name}", optimizer.state[value][key]


def train(options: argparse.Namespace) -> None:
    out = Path(options.out)
    texts = training_texts()
    words = tokenizer(texts, options.vocabulary)
    batches = Batches(words, texts, options.sequences, options.seed)
    print(
        f"{len(texts)} texts, {len(batches.stream):,} tokens; {options.steps} steps of {options.sequences * LENGTH:,}"
    )
    torch.manual_seed(options.seed)
    model = LlamaForCausalLM(config(options.vocabulary))
    enable(model, lk.LongRope.from_config(model.config))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.95))
    for value in model.parameters():
        optimizer.state[value] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(value),
            "exp_avg_sq": torch.zeros_like(value),
        }
    checkpoint = out / ".training.safetensors"
    begun, log = 0, []
    if checkpoint.exists():
        kept = load_file(checkpoint)
        begun = int(kept.pop("step"))
        for name, value in state(model, optimizer):
            value.copy_(kept[name])
        for held in optimizer.state.values():
            held["step"].fill_(begun)
        log = json.loads((out / "training.json").read_text())["loss"][:begun]
        print(f"going on at step {begun}")
    clock = time.monotonic()
    for step in range(begun, options.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, options.steps, options.rate)
        ids = batches(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log.append(round(loss.item(), 4))
        if (step + 1) % 10 == 0:
            passed = time.monotonic() - clock
            left = passed / (step + 1 - begun) * (options.steps - step - 1)
            print(
                f"step {step + 1}/{options.steps}, loss {np.mean(log[-10:]):.3f}, {left / 60:.0f} min left", flush=True
            )
        if (step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == options.steps:
            out.mkdir(parents=True, exist_ok=True)
            (out / "training.json").write_text(json.dumps({"settings": vars(options), "loss": log}) + "\n")
            part = checkpoint.with_suffix(".part")
            save_file(
                {
                    "step": torch.tensor(step + 1),
                    **{name: value.contiguous() for name, value in state(model, optimizer)},
                },
                part,
            )
            part.replace(checkpoint)
    model.to(torch.bfloat16).save_pretrained(out)
    words.save_pretrained(out)
    checkpoint.unlink()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="examples/tiny-512")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--sequences", type=int, default=8, help="of 512 tokens, per step")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="matrix products in bf16")
    train(parser.parse_args())
