"""Training at a site: charged first, refused beyond policy or budget, and only the site's own names leave."""

import numpy as np
import pytest
import torch

from clinifed.aggregators.ingress import check_update
from clinifed.contract import Contract
from clinifed.errors import DataError, ModelError, PrivacyError, UpdateError
from clinifed.executors.trainer import SiteTrainer
from clinifed.files import read_lines
from clinifed.jobs.recipe import build_contract
from clinifed.messages import META_KEYS
from clinifed.policy import Budget
from clinifed.privacy.engine import PatientDPOptimizer


def zeros(contract: Contract) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in contract.shapes.items()}


def test_an_update_passes_the_servers_checks_and_carries_nothing_else(contract, policy):
    update = SiteTrainer(contract, policy).train("job", 0, zeros(contract))
    check_update(update, contract, 0, sent_already=False)
    assert set(update.meta) <= set(META_KEYS)
    assert all(value.any() for value in update.params.values())


def test_the_projection_trains_with_the_heads_and_is_shared(federation, backbone, policy):
    training = federation.training.model_copy(update={"train": "projection"})
    agreed = build_contract(federation.model_copy(update={"training": training}), backbone)
    update = SiteTrainer(agreed, policy).train("job", 0, zeros(agreed))
    check_update(update, agreed, 0, sent_already=False)
    assert update.params["trunk.projection.weight"].any()


def test_every_round_is_charged_once_and_the_plan_fits_the_budget_exactly(contract, policy):
    for number in range(contract.rounds):  # a new trainer each time, as after a restarted process
        trainer = SiteTrainer(contract, policy)
        trainer.train("job", number, zeros(contract))
    records = read_lines(policy.ledger)
    assert [(r["kind"], r["round"], r["releases"]) for r in records] == [("charge", n, 2) for n in range(3)]
    assert trainer.ledger.state().epsilon_spent == pytest.approx(1.0, rel=1e-6)
    with pytest.raises(PrivacyError, match="budget is exhausted"):
        SiteTrainer(contract, policy)
    with pytest.raises(PrivacyError, match="beyond the budget"):
        trainer.train("job", 3, zeros(contract))


def test_the_charge_is_on_disk_before_the_noise_is_drawn(contract, policy, monkeypatch):
    trainer = SiteTrainer(contract, policy)

    def crash(self):
        assert len(read_lines(policy.ledger)) == 1
        raise RuntimeError("killed before the noise")

    monkeypatch.setattr(PatientDPOptimizer, "add_noise", crash)
    with pytest.raises(RuntimeError):
        trainer.train("job", 0, zeros(contract))
    assert trainer.ledger.state().spent_units > 0


def test_a_repeated_round_is_charged_again_with_fresh_noise(contract, policy):
    trainer = SiteTrainer(contract, policy)
    first, second = (trainer.train("job", 0, zeros(contract)) for _ in range(2))
    assert len(read_lines(policy.ledger)) == 2
    assert not np.array_equal(first.params["heads.radiology.weight"], second.params["heads.radiology.weight"])


def test_a_contract_beyond_the_budget_is_refused_before_any_image_is_read(contract, policy):
    poor = policy.model_copy(update={"budget": Budget(epsilon=0.9, delta=1e-5)})
    with pytest.raises(PrivacyError, match="permits"):
        SiteTrainer(contract, poor)
    assert not policy.cache.exists()
    assert not policy.ledger.exists()


def test_a_contract_that_counts_its_releases_wrongly_is_refused(contract, policy):
    promise = contract.promise.model_copy(update={"releases": 3})
    with pytest.raises(PrivacyError, match="3 rounds of 2 local epochs are 6"):
        SiteTrainer(contract.model_copy(update={"promise": promise}), policy)


def test_privacy_off_needs_the_policy_and_data_that_is_nobodys(contract, policy):
    promise = contract.promise.model_copy(update={"mode": "off"})
    off = contract.model_copy(update={"promise": promise})
    with pytest.raises(PrivacyError, match="switches privacy off"):
        SiteTrainer(off, policy)
    permitted = policy.model_copy(update={"permit_privacy_off": True})
    update = SiteTrainer(off, permitted).train("job", 0, zeros(off))
    assert "epsilon_claim" not in update.meta
    assert not policy.ledger.exists()


def test_another_base_model_is_refused_with_both_hashes(contract, policy):
    other = contract.base_model.model_copy(update={"sha256": "f" * 64})
    with pytest.raises(ModelError, match=f"{contract.base_model.sha256}.*{'f' * 64}"):
        SiteTrainer(contract.model_copy(update={"base_model": other}), policy)


def test_a_global_model_of_other_names_is_refused(contract, policy):
    delta = zeros(contract)
    delta.pop("heads.radiology.bias")
    with pytest.raises(UpdateError, match="this site needs"):
        SiteTrainer(contract, policy).train("job", 0, delta)
    assert not policy.ledger.exists()


def test_images_are_embedded_once(contract, policy, monkeypatch):
    SiteTrainer(contract, policy)
    monkeypatch.setattr("clinifed.executors.features.iter_pixels", None)
    SiteTrainer(contract, policy)


def test_unreadable_images_are_left_out_and_a_site_without_any_is_refused(contract, policy, prepared, tmp_path):
    from clinifed.data.manifest import write_manifest

    records = prepared.sites["alder"].records
    broken = [r.__class__(**{**vars(r), "image": f"images/absent{i}.dcm"}) for i, r in enumerate(records)]
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "images").symlink_to(prepared.sites["alder"].folder / "images")
    half = write_manifest(folder / "half.csv", [*broken[:2], *records[2:]], "synthetic")
    trainer = SiteTrainer(contract, policy.model_copy(update={"manifest": half.path}))
    assert len(trainer.data.features) == len(records) - 2
    none = write_manifest(folder / "none.csv", broken, "synthetic")
    with pytest.raises(DataError, match="none of"):
        SiteTrainer(contract, policy.model_copy(update={"manifest": none.path}))
