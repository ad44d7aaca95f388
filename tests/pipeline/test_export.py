"""An export is the original's weights with the factors in its configuration, for stock transformers and for us."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Finished, Run
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

import longrope_kernels as lk
from longrope.data import Split
from longrope.errors import PipelineError, UsageError
from longrope.evaluate import Scorer
from longrope.export import export_checkpoint
from longrope.export.reload import reload_check
from longrope.export.stage import expressible
from longrope.models import LoadedModel
from longrope.run import EvaluationLog
from longrope_kernels.integrations.transformers import enable

FACTORS = [1 + pair / 20 for pair in range(16)]


def ladder(loaded: LoadedModel, **changes: Any) -> lk.LongRope:
    long = {"rescale_factors": FACTORS, "start_tokens": 0, "attention_factor": 1.0} | changes
    return loaded.extended(loaded.base.replace(**long), tiny.TARGET)


@pytest.fixture
def plain(loaded: LoadedModel, tmp_path: Path) -> Path:
    assert export_checkpoint(loaded, ladder(loaded), tmp_path / "export") == []
    return tmp_path / "export"


def test_the_weights_are_the_originals(plain: Path, model_folder: Path) -> None:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (plain, model_folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_configuration_says_the_ladder(plain: Path, loaded: LoadedModel) -> None:
    config = AutoConfig.from_pretrained(plain)
    assert lk.LongRope.from_config(config) == ladder(loaded)
    assert config.rope_parameters["rope_type"] == "longrope"
    assert config.rope_parameters["attention_factor"] == 1.0
    assert [config.rope_parameters[f"{regime}_mscale"] for regime in ("short", "long")] == [1.0, 1.0]
    assert config.max_position_embeddings == tiny.TARGET
    assert config.rope_parameters["original_max_position_embeddings"] == tiny.ORIGINAL


def test_the_tokenizer_travels_with_it(plain: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(plain)
    assert tokenizer("héllo")["input_ids"] == tiny.tokenizer()("héllo")["input_ids"]
    assert tokenizer.model_max_length == tiny.TARGET


def test_the_sidecar_keeps_n_hat_and_both_attention_factors(loaded: LoadedModel, tmp_path: Path) -> None:
    rope = ladder(loaded, start_tokens=16, attention_factor=1.1)
    notes = export_checkpoint(loaded, rope, tmp_path / "export")
    assert len(notes) == 2
    assert "n-hat is 16, which a transformers configuration cannot say" in notes[0]
    assert "--start-tokens 0 avoids it" in notes[0]
    assert "the attention factor is 1 up to 128 tokens and 1.1 beyond" in notes[1]
    readme = (tmp_path / "export" / "README.md").read_text()
    assert all(note in readme for note in notes)
    said = AutoConfig.from_pretrained(tmp_path / "export").rope_parameters
    assert (said["short_mscale"], said["long_mscale"]) == (1.0, 1.1)  # what vLLM and SGLang read, for both regimes
    sidecar = json.loads((tmp_path / "export" / "longrope.json").read_text())
    assert lk.LongRope.from_dict(sidecar) == rope
    assert lk.LongRope.from_config(AutoConfig.from_pretrained(tmp_path / "export")) == expressible(rope)


def test_our_integration_reads_the_sidecar_by_itself(loaded: LoadedModel, tmp_path: Path, split: Split) -> None:
    rope = ladder(loaded, start_tokens=16)
    export_checkpoint(loaded, rope, tmp_path / "export")
    ids = torch.tensor([split.heldout[0].tokens])
    loaded.use(rope)
    with torch.inference_mode():
        expected = loaded.model(ids).logits
        model = LlamaForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
        enable(model)
        assert torch.equal(model(ids).logits, expected)


def test_the_model_in_memory_stays_as_it_was(loaded: LoadedModel, plain: Path) -> None:
    config = loaded.model.config
    assert config.rope_parameters["rope_type"] == "default"
    assert config.max_position_embeddings == tiny.ORIGINAL


def test_a_factor_file_is_put_beside_the_weights(loaded: LoadedModel, tmp_path: Path) -> None:
    export_checkpoint(loaded, ladder(loaded), tmp_path / "export", {"origin": "seed yarn"})
    assert json.loads((tmp_path / "export" / "longrope_factors.json").read_text()) == {"origin": "seed yarn"}


def test_an_earlier_export_is_replaced_as_a_whole(loaded: LoadedModel, plain: Path) -> None:
    (plain / "left_over.txt").write_text("x")
    export_checkpoint(loaded, ladder(loaded, attention_factor=1.2), plain)
    assert not (plain / "left_over.txt").exists()
    assert json.loads((plain / "config.json").read_text())["rope_parameters"]["attention_factor"] == 1.2
    assert os.listdir(plain.parent) == ["export"]


def test_a_folder_that_is_no_export_is_left_alone(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError) as refused:
        export_checkpoint(loaded, ladder(loaded), tmp_path)
    assert str(refused.value) == f"--out: got {tmp_path}, expected a folder that is empty, absent, or an earlier export"
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    with pytest.raises(UsageError, match="--out: got"):
        export_checkpoint(loaded, ladder(loaded), tmp_path / "thesis.txt")


def test_the_models_own_folder_is_not_overwritten(loaded: LoadedModel, model_folder: Path) -> None:
    before = sorted(os.listdir(model_folder))
    with pytest.raises(UsageError, match="--out"):
        export_checkpoint(loaded, ladder(loaded), model_folder)
    assert sorted(os.listdir(model_folder)) == before


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "got a full disk, expected free space"),
        (SafetensorError("I/O error: No space left on device"), "No space left on device, expected to write"),
    ],
)
def test_a_full_disk_leaves_the_earlier_export(
    loaded: LoadedModel, plain: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    def fail(self: Any, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    before = {file.name: file.read_bytes() for file in plain.iterdir()}
    monkeypatch.setattr(type(loaded.model), "save_pretrained", fail)
    with pytest.raises(PipelineError, match=line):
        export_checkpoint(loaded, ladder(loaded, attention_factor=1.3), plain)
    assert {file.name: file.read_bytes() for file in plain.iterdir()} == before
    assert os.listdir(plain.parent) == ["export"]
    assert loaded.model.config.rope_parameters["rope_type"] == "default"


def test_the_command_writes_an_export_from_a_factor_file(
    command: Callable[..., Finished], extended: Run, model_folder: Path, tmp_path: Path
) -> None:
    winner = extended.folder / "factors" / "winner.json"
    arguments = ("export", model_folder, "--factors", winner, "--out", tmp_path / "out", "--dtype", "fp32")
    done = command(*arguments)
    assert (done.code, done.err) == (0, "")
    assert f"wrote {tmp_path / 'out'}" in done.out
    for name in ("config.json", "longrope.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (extended.folder / "export" / name).read_bytes()
    assert command(*arguments[:3], tmp_path / "none.json", *arguments[4:]).code == 2


def test_the_run_reloaded_it_in_a_process_without_this_package(extended: Run) -> None:
    check = json.loads((extended.folder / "export.json").read_text())["reload"]
    assert check["passed"]
    assert check["rope_type"] == "longrope"
    assert check["short_equals_stock_original"]
    assert [(one["name"], one["length"]) for one in check["checks"]] == [("short", 128), ("long", 256)]
    assert all(one["difference"] <= 1e-3 for one in check["checks"])


def test_the_reload_check_notices_wrong_factors(loaded: LoadedModel, plain: Path, split: Split, tmp_path: Path) -> None:
    """Among them: a check that compared the export with itself would pass here."""
    fields = json.loads((plain / "config.json").read_text())
    original = dict(loaded.model.config.rope_parameters)
    fields["rope_parameters"]["long_factor"] = [2.0] * 16
    (plain / "config.json").write_text(json.dumps(fields))
    log = EvaluationLog(tmp_path / "evaluations.jsonl")
    check = reload_check(Scorer(loaded, log), ladder(loaded), split.heldout[0], plain, original)
    log.close()
    assert [one["passed"] for one in check["checks"]] == [True, False]
    assert not check["passed"]
