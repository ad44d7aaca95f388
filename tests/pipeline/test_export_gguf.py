"""A GGUF export is the original file with the tensors and keys that llama.cpp reads a LongRoPE model by."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import Finished, Run
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants

import longrope_kernels as lk
from longrope import models
from longrope.errors import PipelineError, UsageError
from longrope.export import export_gguf, gguf, read_gguf

BASE = lk.RopeScaling(head_dim=32, theta=1000.0)
LONG = BASE.replace(rescale_factors=[1 + pair / 20 for pair in range(16)], start_tokens=16, attention_factor=1.1)
LADDER = lk.LongRope(tiny.ORIGINAL, {tiny.ORIGINAL: BASE, tiny.TARGET: LONG})


def write(path: Path, architecture: str = "llama", **changes: Any) -> Path:
    """Write a file of the tiny model's sizes, with a tensor of every kind that needs care."""
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(tiny.ORIGINAL)
    writer.add_block_count(changes.get("layers", 2))
    writer.add_embedding_length(64)
    writer.add_head_count(2)
    writer.add_rope_dimension_count(32)
    writer.add_key_length(32)
    writer.add_rope_freq_base(changes.get("theta", 1000.0))
    writer.add_rope_scaling_factor(4.0)  # must go: with it llama.cpp would scale positions a second time
    writer.add_key_value("general.languages", ["en", "de"], GGUFValueType.ARRAY, GGUFValueType.STRING)
    writer.add_key_value("tokenizer.ggml.scores", [0.5, -1.0], GGUFValueType.ARRAY, GGUFValueType.FLOAT32)
    random = np.random.default_rng(0)
    weight = random.standard_normal((6, 64)).astype(np.float32)
    writer.add_tensor("a.weight", weight)
    writer.add_tensor("b.weight", weight[:5].astype(np.float16))
    for name, kind in (("c.weight", GGMLQuantizationType.Q8_0), ("d.weight", GGMLQuantizationType.BF16)):
        writer.add_tensor(name, quants.quantize(weight, kind), raw_dtype=kind)
    writer.add_tensor("rope_freqs.weight", np.ones(16, np.float32))
    if "split" in changes:
        writer.add_uint16("split.count", changes["split"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "model.gguf")


@pytest.fixture
def exported(source: Path, tmp_path: Path) -> GGUFReader:
    export_gguf(LADDER, tiny.config(), source, tmp_path / "out" / "long.gguf")
    assert os.listdir(tmp_path / "out") == ["long.gguf"]
    return GGUFReader(tmp_path / "out" / "long.gguf")


def test_the_weights_are_the_originals_byte_for_byte(exported: GGUFReader, source: Path) -> None:
    ours, theirs = ({t.name: t for t in reader.tensors} for reader in (exported, GGUFReader(source)))
    assert theirs.keys() - ours.keys() == {"rope_freqs.weight"}
    for name in theirs.keys() & ours.keys():
        assert ours[name].tensor_type == theirs[name].tensor_type
        assert ours[name].shape.tolist() == theirs[name].shape.tolist()
        assert ours[name].data.tobytes() == theirs[name].data.tobytes()


def test_the_tensors_and_keys_are_those_llama_cpp_reads(exported: GGUFReader) -> None:
    tensors = {tensor.name: tensor for tensor in exported.tensors}
    for name, scaling in (("rope_factors_long.weight", LONG), ("rope_factors_short.weight", BASE)):
        assert tensors[name].tensor_type == GGMLQuantizationType.F32
        assert tensors[name].data.tolist() == np.float32(scaling.rescale_factors).tolist()
    keys = {name: field.contents() for name, field in exported.fields.items() if name.startswith("llama.")}
    assert keys["llama.rope.scaling.type"] == "longrope"
    assert keys["llama.rope.scaling.original_context_length"] == tiny.ORIGINAL
    assert keys["llama.rope.scaling.attn_factor"] == pytest.approx(1.1)
    assert keys["llama.context_length"] == tiny.TARGET
    assert "llama.rope.scaling.factor" not in keys


def test_all_other_keys_are_kept_with_their_types(exported: GGUFReader, source: Path) -> None:
    before = GGUFReader(source).fields
    changed = {"GGUF.kv_count", "GGUF.tensor_count", "llama.context_length", "llama.rope.scaling.factor"}
    for name in before.keys() - changed:
        assert exported.fields[name].contents() == before[name].contents(), name
        assert exported.fields[name].types == before[name].types, name


def test_what_is_read_back_is_the_ladder_as_far_as_the_format_goes(exported: GGUFReader, tmp_path: Path) -> None:
    found = read_gguf(tmp_path / "out" / "long.gguf")
    assert found.lengths == LADDER.lengths
    assert np.allclose(found.scalings[1].rescale_factors, LONG.rescale_factors, rtol=1e-7)
    assert found.scalings[0].rescale_factors == BASE.rescale_factors
    assert [scaling.start_tokens for scaling in found.scalings] == [0, 0]
    assert all(scaling.attention_factor == pytest.approx(1.1) for scaling in found.scalings)
    without_loss = json.loads(exported.fields["longrope_kernels.ladder"].contents())
    assert lk.LongRope.from_dict(without_loss) == LADDER


def test_what_llama_cpp_will_not_do_is_said(source: Path, tmp_path: Path) -> None:
    three = lk.LongRope(tiny.ORIGINAL, {tiny.ORIGINAL: BASE, 200: BASE, tiny.TARGET: LONG})
    notes = export_gguf(three, tiny.config(), source, tmp_path / "out.gguf")
    assert [note.split(",")[0] for note in notes[1:3]] == ["3 regimes", "n-hat is 16"]
    assert notes[0].endswith("start it with -c 128 for those")
    assert "llama.cpp applies 1.1 to both" in notes[3]
    plain = lk.LongRope(tiny.ORIGINAL, {tiny.ORIGINAL: BASE, tiny.TARGET: BASE.replace(rescale_factors=[2.0] * 16)})
    assert len(export_gguf(plain, tiny.config(), source, tmp_path / "out.gguf")) == 1


def test_an_earlier_export_is_replaced_and_anything_else_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "long.gguf"
    for _ in range(2):
        export_gguf(LADDER, tiny.config(), source, out)
    export_gguf(LADDER, tiny.config(), out, tmp_path / "again.gguf")  # and can be a source itself
    assert (tmp_path / "again.gguf").read_bytes() == out.read_bytes()
    other = write(tmp_path / "other.gguf")
    before = other.read_bytes()
    for target in (source, other):
        with pytest.raises(UsageError, match=r"--out: got .* expected a file that is absent or an earlier export"):
            export_gguf(LADDER, tiny.config(), source, target)
    assert other.read_bytes() == before


def test_what_transformers_would_read_without_its_factors_is_not_read_at_all(
    exported: GGUFReader, tmp_path: Path
) -> None:
    with pytest.raises(
        UsageError, match=r"long\.gguf, a GGUF file with LongRoPE factors, expected the file it was made"
    ):
        models.load_config(models.find(str(tmp_path / "out" / "long.gguf")))


BAD: dict[str, Any] = {
    "architecture qwen2 in": {"architecture": "qwen2"},
    "block_count 3 in": {"layers": 3},
    "rope.freq_base 10000.0 in": {"theta": 10000.0},
    "a part of a split file": {"split": 2},
}


@pytest.mark.parametrize("said", BAD)
def test_a_file_that_is_not_of_the_model_is_refused(tmp_path: Path, said: str) -> None:
    source = write(tmp_path / "bad.gguf", **BAD[said])
    with pytest.raises(UsageError, match=f"^--gguf: got .*{said}"):
        export_gguf(LADDER, tiny.config(), source, tmp_path / "out.gguf")
    assert os.listdir(tmp_path) == ["bad.gguf"]


def test_a_broken_file_is_refused_in_one_line(source: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.gguf"
    half.write_bytes(source.read_bytes()[:700])
    for path in (half, tmp_path / "none.gguf"):
        with pytest.raises(UsageError) as refused:
            export_gguf(LADDER, tiny.config(), path, tmp_path / "out.gguf")
        assert str(refused.value).startswith("--gguf: got ")
        assert "\n" not in str(refused.value)
    with pytest.raises(UsageError, match=r"expected a file with rope\.scaling\.type longrope and the tensors"):
        read_gguf(source)


def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(GGUFWriter, "write_tensor_data", fail)
    with pytest.raises(PipelineError, match="got a full disk, expected free space"):
        export_gguf(LADDER, tiny.config(), source, tmp_path / "out.gguf")
    assert os.listdir(tmp_path) == ["model.gguf"]


def test_the_command_writes_it_without_loading_weights(
    command: Callable[..., Finished], extended: Run, model_folder: Path, source: Path, tmp_path: Path
) -> None:
    winner = extended.folder / "factors" / "winner.json"
    arguments = ("export", model_folder, "--factors", winner, "--out", tmp_path / "out.gguf", "--format")
    done = command(*arguments, "gguf", "--gguf", source)
    assert (done.code, done.err) == (0, "")
    assert f"wrote {tmp_path / 'out.gguf'}" in done.out
    assert "note: llama.cpp takes the long factors wherever" in done.out
    found = json.loads(GGUFReader(tmp_path / "out.gguf").fields[gguf.LADDER_KEY].contents())
    assert found == json.loads(winner.read_text())["rope"]
    for wrong, line in (
        (("gguf",), f"--gguf: got nothing, expected the GGUF file of {model_folder}"),
        (("onnx",), "--format: got onnx, expected transformers or gguf"),
        (("transformers", "--gguf", source), f"--gguf: got {source}, expected --format gguf beside it"),
    ):
        done = command(*arguments, *wrong)
        assert (done.code, done.err) == (2, f"longrope: {line}\n")
