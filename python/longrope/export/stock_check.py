"""Score an exported folder with stock transformers, in a process that cannot import this project.

Run by its text (`python -c`), with a JSON request on standard input; prints one JSON line. Nothing here is shared with
what it checks.
"""

import hashlib
import json
import sys


class Refuse:
    """Makes importing this project an error rather than a habit."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("longrope", "longrope_kernels"):
            raise ImportError(f"{name} must not be needed to load the export")
        return None


def main():
    sys.meta_path.insert(0, Refuse())
    request = json.load(sys.stdin)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(request["threads"])
    dtype = getattr(torch, request["dtype"])

    @torch.inference_mode()
    def losses(model, tokens, start):
        ids = torch.tensor([tokens])
        scored = ids[0, start:]
        logits = model(ids, use_cache=False, logits_to_keep=len(scored) + 1).logits[0, :-1]
        parts = [
            torch.nn.functional.cross_entropy(part.float(), target, reduction="none")
            for part, target in zip(logits.split(512), scored.split(512), strict=True)
        ]
        return torch.cat(parts)

    model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=dtype).eval()
    result = {"rope_type": model.config.rope_parameters["rope_type"]}
    short_tokens = request["tokens"][: request["short_length"]]
    short = losses(model, short_tokens, 1)
    result["short_nll"] = short.double().mean().item()
    result["short_sha256"] = hashlib.sha256(short.numpy().tobytes()).hexdigest()
    long = losses(model, request["tokens"][: request["long_length"]], request["long_start"])
    result["long_nll"] = long.double().mean().item()
    del model

    config = AutoConfig.from_pretrained(request["folder"])
    config.rope_parameters = request["original_rope_parameters"]
    config.max_position_embeddings = request["original_length"]
    model = AutoModelForCausalLM.from_pretrained(request["folder"], config=config, dtype=dtype).eval()
    plain = losses(model, short_tokens, 1)
    result["original_short_sha256"] = hashlib.sha256(plain.numpy().tobytes()).hexdigest()
    result["original_short_nll"] = plain.double().mean().item()

    ours = sorted(name for name in sys.modules if name.partition(".")[0] in ("longrope", "longrope_kernels"))
    assert not ours, ours
    import transformers

    result["transformers"] = transformers.__version__
    print(json.dumps(result))


main()
