"""The checkpoint: whole or absent, never overwritten, never broken, and readable back."""

import json

import numpy as np
import pytest

from clinifed.aggregators.checkpoint import write_checkpoint
from clinifed.errors import ModelError
from clinifed.files import file_sha256
from clinifed.models.state import read_checkpoint

PARAMS = {"heads.radiology.weight": np.ones((2, 4), np.float32), "heads.radiology.bias": np.zeros(2, np.float32)}


def test_what_is_written_is_read_back(tmp_path):
    write_checkpoint(tmp_path / "checkpoint", PARAMS, {"federation": "x"})
    read = read_checkpoint(tmp_path / "checkpoint")
    assert {k: v.numpy().tolist() for k, v in read.params.items()} == {k: v.tolist() for k, v in PARAMS.items()}
    assert read.card == {"federation": "x", "weights_sha256": file_sha256(tmp_path / "checkpoint/model.safetensors")}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_what_must_not_leave_is_its_owners_alone(tmp_path):
    write_checkpoint(tmp_path / "own" / "checkpoint", PARAMS, {}, owner_only=True)
    path = tmp_path / "own" / "checkpoint"
    assert [p.stat().st_mode & 0o777 for p in (path, *sorted(path.iterdir()))] == [0o700, 0o600, 0o600]


def test_a_checkpoint_is_never_overwritten(tmp_path):
    write_checkpoint(tmp_path / "checkpoint", PARAMS, {})
    with pytest.raises(ModelError, match="never overwritten"):
        write_checkpoint(tmp_path / "checkpoint", PARAMS, {})


def test_weights_that_the_card_does_not_describe_are_refused(tmp_path):
    for name, scale in (("one", 1), ("two", 2)):
        write_checkpoint(tmp_path / name, {k: scale * v for k, v in PARAMS.items()}, {})
    (tmp_path / "one/card.json").replace(tmp_path / "two/card.json")
    with pytest.raises(ModelError, match="is not the one"):
        read_checkpoint(tmp_path / "two")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_model_leaves_nothing_behind(tmp_path, value):
    with pytest.raises(ModelError, match="holds NaN or infinity"):
        write_checkpoint(tmp_path / "checkpoint", {"trunk.x": np.array([value], np.float32)}, {})
    with pytest.raises(ValueError):  # a card that JSON cannot hold, after the weights were written
        write_checkpoint(tmp_path / "checkpoint", PARAMS, {"epsilon": value})
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_in_another_format_is_refused_and_nothing_is_executed(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    with pytest.raises(ModelError, match="missing"):
        read_checkpoint(folder)
    (folder / "card.json").write_text(json.dumps({}))
    (folder / "model.safetensors").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")  # a pickle
    with pytest.raises(ModelError, match="cannot be read"):
        read_checkpoint(folder)
    assert not (tmp_path / "executed").exists()
