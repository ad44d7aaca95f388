"""Wavelengths, turns in training and the critical pair of known models, from their configurations' numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from longrope.inspection import critical_pair, inspect_rope
from longrope_kernels import LongRope, RopeScaling


def plain(head_dim: int, theta: float, length: int, **changes: Any) -> LongRope:
    return LongRope(length, {length: RopeScaling(head_dim=head_dim, theta=theta, **changes)})


@pytest.mark.parametrize(
    ("model", "head_dim", "theta", "length", "pair"),
    [
        ("SmolLM2-135M", 64, 1e5, 8192, 20),
        ("Llama-2-7B", 128, 1e4, 4096, 46),
        ("Llama-3-8B", 128, 5e5, 8192, 35),
        ("Phi-3-mini", 96, 1e4, 2048, 31),
        ("Mistral-7B-v0.1", 128, 1e4, 8192, 50),
    ],
)
def test_the_critical_pair_of_known_models(model: str, head_dim: int, theta: float, length: int, pair: int) -> None:
    found = inspect_rope(plain(head_dim, theta, length), model)
    assert found.critical_pair == pair
    assert found.pairs[pair].periods_in_training < 1 <= found.pairs[pair - 1].periods_in_training


def test_smollm2_wavelengths() -> None:
    found = inspect_rope(plain(64, 1e5, 8192), target_length=16384)
    assert len(found.pairs) == 32
    assert found.pairs[0].wavelength_tokens == pytest.approx(2 * math.pi)
    assert found.pairs[31].wavelength_tokens == pytest.approx(2 * math.pi * 1e5 ** (31 / 32))
    assert found.pairs[16].wavelength_tokens == pytest.approx(2 * math.pi * 1e5**0.5)
    assert found.pairs[0].periods_in_training == pytest.approx(8192 / (2 * math.pi))
    for pair in found.pairs:
        assert pair.periods_at_target == pytest.approx(2 * pair.periods_in_training)


def test_rescaled_models_are_shown_as_they_turn() -> None:
    halved = inspect_rope(plain(64, 1e5, 8192, rescale_factors=[2.0] * 32))
    original = inspect_rope(plain(64, 1e5, 8192))
    for ours, theirs in zip(halved.pairs, original.pairs, strict=True):
        assert ours.wavelength_tokens == pytest.approx(2 * theirs.wavelength_tokens)


def test_only_the_rotary_dimensions_have_pairs() -> None:
    found = inspect_rope(plain(96, 1e4, 4096, rotary_dim=64))
    assert len(found.pairs) == 32
    assert found.rotary_dim == 64


@pytest.mark.parametrize(("length", "pair"), [(1, 0), (6, 0), (7, 1), (10**12, 32)])
def test_the_critical_pair_stays_within_the_pairs(length: int, pair: int) -> None:
    assert critical_pair(RopeScaling(head_dim=64, theta=1e4).inv_freq.tolist(), length) == pair


def test_the_command_prints_the_table_and_writes_json_and_a_figure(command, model_folder: Path, tmp_path: Path) -> None:
    done = command(
        *("inspect", model_folder, "--to", 256, "--json", tmp_path / "a.json", "--figure", tmp_path / "a.png")
    )
    assert (done.code, done.err) == (0, "")
    assert "Theoretical critical dimension: pair 7" in done.out
    fields = json.loads((tmp_path / "a.json").read_text())
    assert (fields["format"], fields["critical_pair"], len(fields["pairs"])) == ("longrope-inspection/1", 7, 16)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_another_original_length_moves_the_critical_pair(command, model_folder: Path) -> None:
    assert "critical dimension: pair 11." in command("inspect", model_folder, "--original-length", 512).out


@pytest.mark.parametrize("length", [0, 64, 128])
def test_a_target_within_the_original_length_is_refused(command, model_folder: Path, length: int) -> None:
    done = command("inspect", model_folder, "--to", length)
    assert (done.code, done.err) == (2, f"longrope: --to: got {length}, expected more than the original length 128\n")
