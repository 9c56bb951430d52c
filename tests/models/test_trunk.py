"""What trains of the tower: it starts as the base model, shares only what trains, and never changes the backbone."""

import pytest
import torch

from clinifed.config import Training
from clinifed.errors import ModelError
from clinifed.models.adapters import GlobalModel, build_trainable
from clinifed.models.backbone import Backbone, load_backbone, state_sha256
from clinifed.models.specialties import SPECIALTIES
from clinifed.models.trunk import TRUNKS, build_trunk
from clinifed.privacy.audit_neighbours import clipped_sum, without_patient
from clinifed.privacy.engine import Mechanism, PatientTensors, plain_step, private_step
from clinifed.privacy.objectives import OBJECTIVES

CHOSEN = {name: SPECIALTIES[name] for name in ("emergency", "radiology")}
OBJECTIVE = OBJECTIVES["cross-entropy"]
TOWER = ("lora", "blocks")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("tiny")


@pytest.fixture(scope="module")
def pixels(backbone: Backbone) -> torch.Tensor:
    size = backbone.preprocess.size_px
    return torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(0))


def patients(model: GlobalModel, pixels: torch.Tensor) -> PatientTensors:
    with torch.no_grad():
        features = model.features(pixels)
    return PatientTensors(
        features, torch.tensor([0, 1, 1, 2, 3, 3]), torch.tensor([0, 1, 1, 0, 0, 1]), torch.tensor([0, 1, 0, 2, 1, 1])
    )


@pytest.mark.parametrize("train", TRUNKS)
def test_a_step_moves_what_is_shared_and_nothing_else(backbone: Backbone, pixels: torch.Tensor, train: str) -> None:
    tower = state_sha256(backbone.model.state_dict())
    part = build_trainable(backbone, CHOSEN, Training(train=train))
    before, whole = part.shared(), {n: p.clone() for n, p in part.named_parameters()}
    data = patients(GlobalModel(backbone, part), pixels)
    private_step(part, data, OBJECTIVE, Mechanism(1.0, 1.0, 4), 1.0, 4)
    after = part.shared()
    assert all(not torch.equal(before[n], after[n]) for n in before)
    assert all(torch.equal(p, whole[n]) for n, p in part.named_parameters() if n not in before)
    assert state_sha256(backbone.model.state_dict()) == tower


@pytest.mark.parametrize("train", TRUNKS)
def test_without_clip_and_noise_the_private_step_is_the_plain_one(
    backbone: Backbone, pixels: torch.Tensor, train: str
) -> None:
    moved = []
    for step in (
        lambda part, data: private_step(part, data, OBJECTIVE, Mechanism(1e-7, 1000.0, 4), 0.1, 4),
        lambda part, data: plain_step(part, data, OBJECTIVE, 0.1, 4),
    ):
        part = build_trainable(backbone, CHOSEN, Training(train=train))
        before = part.shared()
        step(part, patients(GlobalModel(backbone, part), pixels))
        moved.append({n: t - before[n] for n, t in part.shared().items()})
    for name, change in moved[1].items():
        assert change.abs().max() > 1e-6, name
        # The noise and its grid are small beside the clip, which nobody reaches here.
        torch.testing.assert_close(moved[0][name], change, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("train", TRUNKS)
def test_the_clipped_sum_on_a_gpu_is_the_processors(pixels: torch.Tensor, train: str) -> None:
    backbone = load_backbone("tiny")  # its tower goes to the GPU
    part = build_trainable(backbone, CHOSEN, Training(train=train))
    data = patients(GlobalModel(backbone, part), pixels)
    expected = clipped_sum(part, data, OBJECTIVE, 0.01, 4)
    assert part.ready().device.type == "cuda"
    torch.testing.assert_close(clipped_sum(part, data, OBJECTIVE, 0.01, 4).cpu(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("train", TRUNKS)
def test_one_patient_moves_the_clipped_sum_by_at_most_the_clip(
    backbone: Backbone, pixels: torch.Tensor, train: str
) -> None:
    part = build_trainable(backbone, CHOSEN, Training(train=train))
    data, clip = patients(GlobalModel(backbone, part), pixels), 0.01
    whole = clipped_sum(part, data, OBJECTIVE, clip, 4)
    for patient in range(data.patients):
        shift = whole - clipped_sum(part, without_patient(data, patient), OBJECTIVE, clip, 4)
        assert 0.9 * clip < shift.norm() < clip * (1 + 1e-4)


@pytest.mark.parametrize("train", TOWER)
@pytest.mark.parametrize("setting", ["checkpointing", "bf16"])
def test_checkpointing_and_bf16_change_memory_and_digits_only(
    backbone: Backbone, pixels: torch.Tensor, train: str, setting: str
) -> None:
    choice = {"checkpointing": True} if setting == "checkpointing" else {"precision": "bf16"}
    moved = []
    for more in ({}, choice):
        part = build_trainable(backbone, CHOSEN, Training(train=train, **more))
        before = part.shared()
        data = patients(GlobalModel(backbone, part), pixels)
        private_step(part, data, OBJECTIVE, Mechanism(1e-7, 1.0, 4), 1.0, 4)
        plain_step(part, data, OBJECTIVE, 1.0, 4)
        moved.append(torch.cat([(t - before[n]).flatten() for n, t in part.shared().items()]))
    error = (moved[0] - moved[1]).norm() / moved[0].norm()
    assert error < (1e-4 if setting == "checkpointing" else 0.05)
    assert error > 0 or setting == "checkpointing"


@pytest.mark.parametrize("train", TOWER)
def test_merged_computes_what_the_trained_trunk_does(backbone: Backbone, pixels: torch.Tensor, train: str) -> None:
    part = build_trainable(backbone, CHOSEN, Training(train=train, blocks=2))
    generator = torch.Generator().manual_seed(1)
    state = {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in part.shared().items()}
    part.load_shared(state)
    with torch.no_grad():
        features = GlobalModel(backbone, part).features(pixels)
        trained, merged = part.trunk(features), part.trunk.merged()(features)
        start = build_trunk(backbone, Training(train=train, blocks=2))(features)
    assert (trained - start).abs().max() > 0.01
    torch.testing.assert_close(merged, trained, rtol=0, atol=1e-6)
    assert not any("up.weight" in n for n, _ in part.trunk.merged().named_parameters())


def test_more_blocks_than_the_tower_has_are_refused(backbone: Backbone) -> None:
    with pytest.raises(ModelError, match=r"training.blocks: 13, but the image tower of tiny has \d+ blocks"):
        build_trunk(backbone, Training(train="blocks", blocks=13))


def test_what_does_not_train_is_the_backbones_own_memory(backbone: Backbone) -> None:
    trunk = build_trunk(backbone, Training(train="lora"))
    own = {p.data_ptr() for p in backbone.model.visual.parameters()}
    frozen = [p for n, p in trunk.named_parameters() if not p.requires_grad and ".down." not in n]
    assert frozen
    assert all(p.data_ptr() in own for p in frozen)
