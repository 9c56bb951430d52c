"""The trainable part: it starts as zero-shot, in every mode, and refuses parameters that do not fit."""

import pytest
import torch
from torch.nn import functional

from clinifed.config import Training
from clinifed.errors import ModelError
from clinifed.models.adapters import GlobalModel, build_trainable
from clinifed.models.backbone import load_backbone
from clinifed.models.heads import prompt_matrix
from clinifed.models.specialties import SPECIALTIES
from clinifed.models.state import apply_delta
from clinifed.models.trunk import TRUNKS

CHOSEN = {name: SPECIALTIES[name] for name in ("emergency", "radiology")}


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("tiny")


@pytest.fixture(scope="module")
def pixels(backbone):
    size = backbone.preprocess.size_px
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("train", TRUNKS)
@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_the_start_is_zero_shot_classification(backbone, pixels, train, temperature):
    model = GlobalModel(
        backbone, build_trainable(backbone, CHOSEN, Training(train=train, temperature=temperature))
    ).eval()
    with torch.no_grad():
        embedding, logits = model(pixels)
        expected = functional.normalize(backbone.model.encode_image(pixels), dim=-1)
    assert torch.allclose(embedding, expected, atol=1e-6)
    for name, specialty in CHOSEN.items():
        assert torch.allclose(logits[name], temperature * expected @ prompt_matrix(backbone, specialty).T, atol=1e-4)


@pytest.mark.parametrize("train", TRUNKS)
def test_the_cached_features_lead_to_the_same_logits(backbone, pixels, train):
    part = build_trainable(backbone, CHOSEN, Training(train=train))
    model = GlobalModel(backbone, part).eval()
    with torch.no_grad():
        through_features, whole = part(model.features(pixels)), model(pixels)[1]
    assert all(torch.allclose(through_features[n], whole[n], atol=1e-6) for n in CHOSEN)


@pytest.mark.parametrize("train", TRUNKS)
def test_only_trunk_and_heads_are_shared(backbone, train):
    names = set(build_trainable(backbone, CHOSEN, Training(train=train)).shared())
    assert all(n.startswith(("trunk.", "heads.")) for n in names)
    assert any(n.startswith("trunk.") for n in names) == (train != "heads")


def test_training_leaves_the_backbone_as_it_was(backbone):
    before = backbone.model.visual.head.proj.weight.clone()
    part = build_trainable(backbone, CHOSEN, Training(train="projection"))
    with torch.no_grad():
        part.trunk.projection.weight.add_(1.0)
    assert torch.equal(backbone.model.visual.head.proj.weight, before)


def test_an_unknown_mode_and_parameters_that_do_not_fit_are_refused(backbone):
    with pytest.raises(ModelError, match="'everything' is not one of"):
        build_trainable(backbone, CHOSEN, Training.model_construct(train="everything"))
    with pytest.raises(ModelError, match="do not fit"):
        build_trainable(backbone, CHOSEN, Training(train="heads"), {"heads.radiology.weight": torch.zeros(1)})
    with pytest.raises(ModelError, match="does not fit the model at a"):
        apply_delta({"a": torch.zeros(2)}, {"a": torch.zeros(3)})
