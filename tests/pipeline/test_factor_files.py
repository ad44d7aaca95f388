"""Factor files: what was written is read again; what is missing, broken or of another model is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import longrope_kernels as lk
from longrope import factors
from longrope.errors import UsageError
from longrope.search import Candidate

BASE = lk.RopeScaling(head_dim=32, theta=1000.0)
CANDIDATE = Candidate(tuple(1 + pair / 30 for pair in range(16)), 16, 1.07)
ROPE = lk.LongRope(128, {128: BASE, 256: CANDIDATE.scaling(BASE)})


def content() -> dict[str, Any]:
    return factors.describe(ROPE, "tiny", "mutation of 0123abcd", CANDIDATE, {"value": 1 / 3}, {"seed": 0})


def written(path: Path, fields: Any) -> Path:
    path.write_text(json.dumps(fields))
    return path


def test_a_ladder_survives_the_file_bit_for_bit(tmp_path: Path) -> None:
    rope, fields = factors.read(written(tmp_path / "winner.json", content()), BASE)
    assert rope == ROPE
    assert Candidate.from_dict(fields["candidate"]) == CANDIDATE
    assert fields["objective"]["value"] == 1 / 3


def test_it_says_what_a_reader_looks_for_first() -> None:
    fields = content()
    assert fields["rescale_factors"] == list(CANDIDATE.factors)
    assert (fields["start_tokens"], fields["attention_factor"]) == (16, 1.07)
    assert (fields["original_max_position_embeddings"], fields["max_position_embeddings"]) == (128, 256)
    assert fields["origin"] == "mutation of 0123abcd"
    assert fields["provenance"]["seed"] == 0
    assert fields["provenance"]["created"].endswith("Z")


def refused(path: Path, base: lk.RopeScaling | None = BASE) -> str:
    with pytest.raises(UsageError) as raised:
        factors.read(path, base)
    line = str(raised.value)
    assert line.startswith("--factors: ")
    assert "\n" not in line
    return line


def test_a_missing_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.json") == (
        f"--factors: {tmp_path / 'none.json'}: got no such file, expected a JSON file"
    )


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_half_written_file(tmp_path: Path, share: float) -> None:
    path = written(tmp_path / "half.json", content())
    path.write_text(path.read_text()[: int(share * path.stat().st_size)])
    assert "got a broken file" in refused(path)


def test_a_folder_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    assert "got a broken file" in refused(tmp_path / "bytes.json")
    assert "got a broken file" in refused(tmp_path)


@pytest.mark.parametrize("fields", [[], 7, {}, {"format": "longrope-factors/0"}, {"format": factors.FORMAT}])
def test_another_format(tmp_path: Path, fields: Any) -> None:
    line = refused(written(tmp_path / "other.json", fields))
    assert line.endswith("expected a factor file of format 'longrope-factors/1'")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1.0] * 15, "rescale_factors"),
        ([1.0] * 15 + [-1.0], "rescale_factors"),
        ([1.0] * 15 + [0.0], "rescale_factors"),
        ([1.0] * 15 + [float("nan")], "rescale_factors"),
        ([1.0] * 15 + [float("inf")], "rescale_factors"),
        ([1.0] * 15 + ["two"], "rescale_factors"),
        (7, ""),
        ("1", ""),
    ],
)
def test_factors_of_the_wrong_number_or_kind(tmp_path: Path, values: Any, said: str) -> None:
    fields = content()
    fields["rope"]["regimes"][1]["rescale_factors"] = values
    assert said in refused(written(tmp_path / "wrong.json", fields))


@pytest.mark.parametrize("missing", ["regimes", "original_max_position_embeddings", "format"])
def test_a_field_that_is_missing(tmp_path: Path, missing: str) -> None:
    fields = content()
    del fields["rope"][missing]
    assert missing in refused(written(tmp_path / "wrong.json", fields))


@pytest.mark.parametrize("rope", [None, [], 7, {"format": "longrope-kernels/1", "regimes": [7]}])
def test_a_rope_that_is_none(tmp_path: Path, rope: Any) -> None:
    refused(written(tmp_path / "wrong.json", {**content(), "rope": rope}))


@pytest.mark.parametrize(
    ("base", "line"),
    [
        (lk.RopeScaling(head_dim=64, theta=1000.0), "head_dim 32 in"),
        (lk.RopeScaling(head_dim=32, theta=1e4), "theta 1000.0 in"),
        (lk.RopeScaling(head_dim=32, theta=1000.0, rotary_dim=16), "rotary_dim 32 in"),
        (lk.RopeScaling(head_dim=32, theta=1000.0, interleaved=True), "interleaved False in"),
    ],
)
def test_the_factors_of_another_model(tmp_path: Path, base: lk.RopeScaling, line: str) -> None:
    said = refused(written(tmp_path / "winner.json", content()), base)
    assert f"--factors: got {line}" in said
    assert said.endswith("that of the model")
