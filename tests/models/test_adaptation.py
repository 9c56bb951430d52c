"""Where fine-tuning starts: what of a checkpoint means the same is carried over, and nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clinifed.config import Specialty, Training
from clinifed.errors import ModelError
from clinifed.models.adaptation import start_from
from clinifed.models.adapters import build_trainable
from clinifed.models.backbone import Backbone, load_backbone
from clinifed.models.heads import zero_shot_heads
from clinifed.models.specialties import SPECIALTIES
from clinifed.models.state import Checkpoint

RADIOLOGY = SPECIALTIES["radiology"]
# Shares one label's prompts with radiology, under another name, and has one of its own.
CLINIC = Specialty(labels={"clear": RADIOLOGY.labels["normal"], "burn": SPECIALTIES["emergency"].labels["deep"]})


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("tiny")


def learned(backbone: Backbone, train: str = "heads", **specialties: Specialty) -> Checkpoint:
    """A checkpoint whose every parameter moved."""
    training = Training.model_validate({"train": train})
    params = build_trainable(backbone, specialties, training).shared()
    generator = torch.Generator().manual_seed(0)
    moved = {name: t + torch.randn(t.shape, generator=generator) for name, t in params.items()}
    card = {
        "base_model": {"ref": "tiny", "sha256": backbone.sha256},
        "training": training.model_dump(),
        "specialties": {name: s.model_dump(mode="json") for name, s in specialties.items()},
    }
    return Checkpoint(Path("checkpoint"), moved, card)


def test_a_specialty_that_the_checkpoint_has_starts_with_its_head_and_another_as_zero_shot(backbone):
    source = learned(backbone, radiology=RADIOLOGY)
    wanted = {"radiology": RADIOLOGY, "cardiology": SPECIALTIES["cardiology"]}
    start = start_from(source, backbone, wanted, Training())
    zero = zero_shot_heads(backbone, wanted, Training().temperature)
    assert torch.equal(start.params["heads.radiology.weight"], source.params["heads.radiology.weight"])
    assert torch.equal(start.params["heads.cardiology.weight"], zero["heads.cardiology.weight"])
    assert (start.heads, start.trunk) == (("radiology",), False)


def test_rows_of_alike_prompts_take_over_what_was_learned_and_all_others_stay_zero_shot(backbone):
    source = learned(backbone, radiology=RADIOLOGY)
    start = start_from(source, backbone, {"clinic": CLINIC}, Training(), "radiology")
    zero = zero_shot_heads(backbone, {"clinic": CLINIC, "radiology": RADIOLOGY}, Training().temperature)
    change = source.params["heads.radiology.weight"] - zero["heads.radiology.weight"]
    expected = zero["heads.clinic.weight"].clone()
    expected[0] += change[0]
    assert torch.allclose(start.params["heads.clinic.weight"], expected)
    assert start.params["heads.clinic.bias"].tolist() == [float(source.params["heads.radiology.bias"][0]), 0.0]
    (row,) = start.rows["clinic"]
    assert (row.label, row.source) == ("clear", "normal")
    assert row.cosine == pytest.approx(1, abs=1e-5)


def test_the_trunk_is_carried_over_whole(backbone):
    source = learned(backbone, "projection", radiology=RADIOLOGY)
    training = Training(train="projection")
    start = start_from(source, backbone, {"cardiology": SPECIALTIES["cardiology"]}, training, "radiology")
    assert start.trunk
    assert start.rows == {"cardiology": ()}
    assert torch.equal(start.params["trunk.projection.weight"], source.params["trunk.projection.weight"])


def test_nothing_to_carry_over_is_an_error(backbone):
    source = learned(backbone, radiology=RADIOLOGY)
    with pytest.raises(ModelError, match=r"nothing of it is carried over to cardiology.*no prompt is alike"):
        start_from(source, backbone, {"cardiology": SPECIALTIES["cardiology"]}, Training(), "radiology")


def test_every_misfit_is_told_at_once(backbone):
    source = learned(backbone, "projection", radiology=RADIOLOGY)
    other = {**source.card, "base_model": {"sha256": "0" * 64}}
    source = replace(source, card=other)
    with pytest.raises(ModelError) as caught:
        start_from(source, backbone, {"clinic": CLINIC}, Training(temperature=5), "burns", 1.5)
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 5
    for word in ("trained on base model", "training.temperature", "training.train: heads", "'burns'", "alike=1.5"):
        assert word in told


def test_a_head_of_other_labels_is_refused_and_says_how_to_go_on(backbone):
    source = learned(backbone, radiology=RADIOLOGY)
    with pytest.raises(ModelError, match="--from-specialty radiology"):
        start_from(source, backbone, {"radiology": CLINIC}, Training())
