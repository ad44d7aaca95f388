"""Write the factors into a GGUF file of the model, for llama.cpp: tensors and keys that it reads, weights untouched.

llama.cpp divides the frequency of pair i by `rope_factors_long.weight[i]` where the context it was started with is
longer than `rope.scaling.original_context_length`, by `rope_factors_short.weight[i]` otherwise, and multiplies cos and
sin by `rope.scaling.attn_factor` in both. docs/runtimes.md has what follows from that.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

import longrope_kernels as lk

from ..errors import UsageError, disk_error, one_line, refuse
from ..progress import task

# Whose loaders in llama.cpp (src/models) have the two tensors; Mistral and Mixtral are of architecture llama.
ARCHITECTURES = ("llama", "phi3", "phimoe")
LADDER_KEY = "longrope_kernels.ladder"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
REPLACED_TENSORS = (LONG, SHORT, "rope_freqs.weight")  # the last has Llama-3's own factors, which the ladder includes


def export_gguf(rope: lk.LongRope, config: Any, source: str | Path, out: str | Path) -> list[str]:
    """Write `out`: `source` with the factors of `rope`. Returns what the file cannot say, one line each.

    Args:
        config: transformers' configuration of the model that `rope` is for; the file must be of that model.
        out: appears whole or not at all; a file that is no earlier export is left alone.

    Raises:
        UsageError: not a GGUF file, of another model, or of a kind whose factors llama.cpp does not read; one line.
        PipelineError: the disk is full.
    """
    from gguf import GGUFEndian, GGUFValueType, GGUFWriter

    source, out = Path(source), Path(out)
    reader = _open(source, "--gguf")
    architecture = _check(reader, source, rope, config)
    if out.exists() and (out.resolve() == source.resolve() or LADDER_KEY not in _open(out, "--out").fields):
        refuse("--out", out, "a file that is absent or an earlier export")
    prefix = f"{architecture}.rope.scal"  # rope.scaling.*, and rope.scale_linear of old files: said by the factors now
    ours = {
        f"{architecture}.context_length": (rope.max_position_embeddings, GGUFValueType.UINT32),
        f"{architecture}.rope.scaling.type": ("longrope", GGUFValueType.STRING),
        f"{architecture}.rope.scaling.original_context_length": (
            rope.original_max_position_embeddings,
            GGUFValueType.UINT32,
        ),
        f"{architecture}.rope.scaling.attn_factor": (rope.scalings[-1].attention_factor, GGUFValueType.FLOAT32),
        LADDER_KEY: (json.dumps(rope.to_dict(), separators=(",", ":")), GGUFValueType.STRING),
    }
    factors = {
        name: np.array(scaling.rescale_factors, np.float32)
        for name, scaling in ((LONG, rope.long), (SHORT, rope.short))
    }
    kept = [tensor for tensor in reader.tensors if tensor.name not in REPLACED_TENSORS]
    part = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        writer = GGUFWriter(part, architecture, endianess=reader.endianess)
        writer.data_alignment = reader.alignment
        for field in reader.fields.values():
            name = field.name
            if name.startswith(("GGUF.", prefix)) or name in ours or name == "general.architecture":
                continue
            nested = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=nested)
        for name, (value, kind) in ours.items():
            writer.add_key_value(name, value, kind)
        for name, values in factors.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        for tensor in kept:
            data = tensor.data
            writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        native = GGUFEndian.LITTLE if np.little_endian else GGUFEndian.BIG
        with task(f"writing {out.name}", sum(tensor.n_bytes for tensor in kept)) as work:
            for values in factors.values():
                writer.write_tensor_data(values, native)
            for tensor in kept:
                writer.write_tensor_data(tensor.data, reader.endianess)
                work.advance(tensor.n_bytes)
        writer.flush()
        writer.close()
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, out)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise disk_error(str(out), error) from error
    return gguf_losses(rope)


def read_gguf(path: str | Path) -> lk.LongRope:
    """Return the ladder that llama.cpp makes of a GGUF file's tensors and keys: no n-hat, one attention factor.

    What this package wrote beside them, n-hat included, is the JSON of `LongRope.to_dict` under the key
    `longrope_kernels.ladder`, and is not read here.

    Raises:
        UsageError: not a GGUF file, or one without factors; one line.
    """
    reader = _open(Path(path), "--gguf")
    architecture = _value(reader, "general.architecture")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors if tensor.name in (LONG, SHORT)}
    if _value(reader, f"{architecture}.rope.scaling.type") != "longrope" or len(tensors) != 2:
        refuse("--gguf", path, f"a file with rope.scaling.type longrope and the tensors {LONG} and {SHORT}")
    rotary_dim = int(_value(reader, f"{architecture}.rope.dimension_count"))
    width = _value(reader, f"{architecture}.embedding_length") // _value(reader, f"{architecture}.attention.head_count")
    longest = int(_value(reader, f"{architecture}.context_length"))
    original = int(_value(reader, f"{architecture}.rope.scaling.original_context_length"))
    short, long = (
        lk.RopeScaling(
            head_dim=int(_value(reader, f"{architecture}.attention.key_length", width)),
            theta=float(_value(reader, f"{architecture}.rope.freq_base", 10000.0)),
            rescale_factors=tensors[name].astype(np.float64).tolist(),
            attention_factor=float(_value(reader, f"{architecture}.rope.scaling.attn_factor", 1.0)),
            rotary_dim=rotary_dim,
        )
        for name in (SHORT, LONG)
    )
    return lk.LongRope(original, {original: short, longest: long})


def gguf_losses(rope: lk.LongRope) -> list[str]:
    """Return what llama.cpp will do otherwise than this ladder says, one line each."""
    original, short, long = rope.original_max_position_embeddings, rope.short, rope.long
    notes = [
        f"llama.cpp takes the long factors wherever its context (-c) is above {original:,} tokens, for short texts "
        f"too: start it with -c {original} for those"
    ]
    if len(rope.scalings) > 2:
        notes.append(f"{len(rope.scalings)} regimes, of which a GGUF file holds the first and the last")
    if long.start_tokens:
        notes.append(f"n-hat is {long.start_tokens}, which llama.cpp does not have: it rescales all positions")
    if short.attention_factor != long.attention_factor:
        notes.append(
            f"the attention factor is {short.attention_factor:g} up to {original:,} tokens and "
            f"{long.attention_factor:g} beyond, and a GGUF file has one: llama.cpp applies {long.attention_factor:g} "
            "to both"
        )
    return notes


def _check(reader: Any, source: Path, rope: lk.LongRope, config: Any) -> str:
    """Refuse a file that is not of the model; return its architecture."""
    architecture = str(_value(reader, "general.architecture", "?"))
    if architecture not in ARCHITECTURES:
        expected = f"one whose rope factors llama.cpp reads: {', '.join(ARCHITECTURES)}"
        refuse("--gguf", f"architecture {architecture} in {source}", expected)
    if int(_value(reader, "split.count", 1)) > 1:
        refuse("--gguf", f"{source}, a part of a split file", "the whole model in one file (llama-gguf-split --merge)")
    wanted = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "rope.dimension_count": rope.rotary_dim,
        "rope.freq_base": float(np.float32(rope.scalings[0].theta or 0.0)),
    }
    for key, value in wanted.items():
        found = _value(reader, f"{architecture}.{key}", 10000.0 if key == "rope.freq_base" else None)
        if found is not None and found != value:
            refuse("--gguf", f"{key} {found} in {source}", f"{value}, that of the model")
    return architecture


def _open(path: Path, option: str) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except FileNotFoundError:
        refuse(option, path, "an existing GGUF file")
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UsageError(one_line(f"{option}: got {path} ({error}), expected a whole GGUF file")) from error


def _value(reader: Any, name: str, default: Any = None) -> Any:
    field = reader.fields.get(name)
    return default if field is None else field.contents()
