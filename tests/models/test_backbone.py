"""One loading path for the hub, a directory and the shipped model; what cannot be loaded says what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import clinifed.models
from clinifed.errors import ModelError
from clinifed.models.backbone import load_backbone, state_sha256
from clinifed.models.specialties import SPECIALTIES

TINY = Path(clinifed.models.__file__).parent / "tiny"


def test_a_local_directory_is_the_same_model_as_the_shipped_one():
    shipped, local = load_backbone("tiny"), load_backbone(f"local-dir:{TINY}")
    assert shipped.sha256 == local.sha256
    assert shipped.preprocess == local.preprocess


def test_it_is_frozen_and_in_evaluation_mode():
    model = load_backbone("tiny").model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", [n for n in SPECIALTIES if n != "pathology"])
def test_no_prompt_has_an_unknown_word(name):
    """transformers may ignore a vocabulary file silently; then every word is unknown."""
    backbone = load_backbone("tiny")
    tokenizer = backbone.tokenizer.tokenizer
    assert len(tokenizer) == len((TINY / "vocab.txt").read_text().split())
    for prompts in SPECIALTIES[name].labels.values():
        assert not (backbone.tokenizer(list(prompts)) == tokenizer.unk_token_id).any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"resize_mode": "squash"}, "preprocess_cfg.resize_mode 'squash'"),
        ({"resize_mode": "longest", "fill_color": 127}, "preprocess_cfg.resize_mode 'longest'"),
        ({"interpolation": "random"}, "preprocess_cfg.interpolation 'random'"),
        ({"resize_mode": "squash", "interpolation": "random"}, "preprocess_cfg.interpolation 'random'"),
    ],
)
def test_a_model_that_wants_its_images_otherwise_is_refused(tmp_path, change, said):
    shutil.copytree(TINY, tmp_path / "model")
    path = tmp_path / "model/open_clip_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "preprocess_cfg": config["preprocess_cfg"] | change}))
    with pytest.raises(ModelError) as caught:
        load_backbone(f"local-dir:{tmp_path / 'model'}")
    assert len(caught.value.problems) == ("interpolation" in change) + ("resize_mode" in change)
    assert said in "".join(caught.value.problems)


def test_what_shortest_says_is_what_is_done_without_being_said(tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    path = tmp_path / "model/open_clip_config.json"
    config = json.loads(path.read_text())
    config["preprocess_cfg"] |= {"resize_mode": "shortest", "fill_color": 127}
    path.write_text(json.dumps(config))
    assert load_backbone(f"local-dir:{tmp_path / 'model'}").preprocess == load_backbone("tiny").preprocess


def test_the_hash_sees_every_weight():
    state = {"a": torch.zeros(3), "b": torch.ones(2)}
    hashes = {state_sha256(state), state_sha256({**state, "b": torch.tensor([1.0, 1.0 + 1e-6])})}
    hashes |= {
        state_sha256({"a": torch.zeros(3), "c": torch.ones(2)}),
        state_sha256({"a": torch.zeros(1, 3), "b": torch.ones(2)}),
    }
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("ref", "text"),
    [
        ("biomedclip", "is not known"),
        ("local-dir:/nowhere", "no open_clip_config.json"),
        ("hf-hub:no-such-owner/no-such-model", "mirror the model to a directory"),
    ],
)
def test_what_cannot_be_loaded_says_what_to_do(ref, text, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=text):
        load_backbone(ref)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_directory_without_weights_is_refused_rather_than_filled_at_random(tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model" / "open_clip_model.safetensors").unlink()
    with pytest.raises(ModelError, match="could not be loaded"):
        load_backbone(f"local-dir:{tmp_path / 'model'}")


def test_the_shipped_files_name_no_machine():
    for path in TINY.rglob("*.json"):
        json.loads(path.read_text())
        assert "/work" not in path.read_text()
        assert "/tmp" not in path.read_text()
