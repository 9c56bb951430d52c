"""The deployed model: what was trained, and the base model's own answer beside it."""

from types import SimpleNamespace

import pytest
import torch

from clinifed.config import Training
from clinifed.errors import ExportError
from clinifed.export.deployed import DeployedModel, TextTower, deploy
from clinifed.models.adapters import GlobalModel, build_trainable
from clinifed.models.backbone import Backbone
from clinifed.models.specialties import SPECIALTIES
from clinifed.models.trunk import TRUNKS

PROJECTION = Training(train="projection")
BOTH = {name: SPECIALTIES[name] for name in ("emergency", "radiology")}


@pytest.fixture(scope="module")
def pixels(images: dict[str, SimpleNamespace]) -> torch.Tensor:
    return torch.from_numpy(images["test"].pixels[:6])


@torch.no_grad()
@pytest.mark.parametrize("train", TRUNKS)
def test_zero_shot_logits_are_the_untrained_models(
    train: str, backbone: Backbone, pixels: torch.Tensor, trained: GlobalModel
) -> None:
    training = Training(train=train)
    heads = {n: t for n, t in trained.part.shared().items() if n.startswith("heads.")}
    part = build_trainable(backbone, BOTH, training)
    moved = {n: t + 0.1 * t.std() * torch.randn_like(t) for n, t in part.shared().items() if n.startswith("trunk.")}
    part.load_shared({**heads, **moved})
    start = GlobalModel(backbone, build_trainable(backbone, BOTH, training)).eval()
    _, logits, zero_shot = deploy(GlobalModel(backbone, part).eval(), backbone, BOTH, training)(pixels)
    for name, expected in start(pixels)[1].items():
        torch.testing.assert_close(zero_shot[name], expected, rtol=0, atol=1e-5)
        assert (logits[name] - expected).abs().max() > 0.1  # the trained head says something else


@torch.no_grad()
def test_logits_are_the_trained_models_but_of_heads_exported_as_zero_shot(
    backbone: Backbone, pixels: torch.Tensor, trained: GlobalModel
) -> None:
    embedding, expected = trained(pixels)
    model = deploy(trained, backbone, BOTH, PROJECTION, zero_shot_heads=["radiology"])
    found, logits, zero_shot = model(pixels)
    assert torch.equal(found, embedding)
    assert torch.equal(logits["emergency"], expected["emergency"])
    assert torch.equal(logits["radiology"], zero_shot["radiology"])


def test_baked_prompts_have_length_one(model: DeployedModel) -> None:
    for name in model.specialties:
        torch.testing.assert_close(model.prompts(name).norm(dim=1), torch.ones(len(BOTH[name].labels)))


@torch.no_grad()
def test_the_text_tower_gives_the_baked_rows(model: DeployedModel, backbone: Backbone) -> None:
    (first, *_) = BOTH["radiology"].labels.values()
    rows = TextTower(backbone).eval()(backbone.tokenizer(list(first)))
    mean = torch.nn.functional.normalize(rows.mean(dim=0), dim=-1)
    torch.testing.assert_close(mean, model.prompts("radiology")[0])


def test_a_subset_is_exported_and_an_unknown_specialty_refused(trained: GlobalModel, backbone: Backbone) -> None:
    assert deploy(trained, backbone, BOTH, PROJECTION, ["radiology"]).specialties == ("radiology",)
    for wrong in (["cardiology"], []):
        with pytest.raises(ExportError, match="the checkpoint has emergency, radiology"):
            deploy(trained, backbone, BOTH, PROJECTION, wrong)
