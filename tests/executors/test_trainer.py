"""Training at a site: refused beyond policy or budget, charged first, and only the site's own names leave."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from clinifed.aggregators.ingress import check_update
from clinifed.contract import Contract
from clinifed.errors import BudgetExceededError, DataError, LedgerError, ModelError, PrivacyError, UpdateError
from clinifed.executors.trainer import SiteTrainer
from clinifed.files import read_lines
from clinifed.jobs.recipe import build_contract
from clinifed.messages import META_KEYS, packed, release_sha256, unpacked, update_norm
from clinifed.policy import Budget
from clinifed.privacy.accountant import cost_units
from clinifed.privacy.engine import PatientDPOptimizer
from clinifed.privacy.ledger import Ledger
from clinifed.privacy.noise import NoiseSource
from clinifed.privacy.withdrawn import Withdrawn

from .conftest import JOB


def zeros(contract: Contract) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in contract.shapes.items()}


def kinds(policy) -> list[str]:
    return [record["kind"] for record in read_lines(policy.ledger)]


def test_an_update_passes_the_servers_checks_and_carries_nothing_else(contract, train):
    update = train().train(0, zeros(contract))
    check_update(update, contract, 0, False, JOB)
    assert set(update.meta) <= set(META_KEYS) - {"declared"}
    assert all(value.any() for value in update.params.values())


@pytest.mark.parametrize(
    ("trunk", "shared"),
    [
        ("projection", "trunk.projection.weight"),
        ("lora", "trunk.blocks.0.attn.qkv.up.weight"),
        ("blocks", "trunk.blocks.5.mlp.fc1.weight"),
    ],
)
def test_the_trunk_trains_with_the_heads_and_is_shared(federation, backbone, train, trunk, shared):
    training = federation.training.model_copy(update={"train": trunk})
    agreed = build_contract(federation.model_copy(update={"training": training}), backbone)
    update = train(agreed).train(0, zeros(agreed))
    check_update(update, agreed, 0, False, JOB)
    assert update.params[shared].any()
    assert update.params.keys() == agreed.shapes.keys()


def test_in_bfloat16_half_as_many_bytes_leave_and_what_is_charged_is_what_is_sent(federation, backbone, policy, train):
    aggregation = federation.aggregation.model_copy(update={"update_dtype": "bfloat16"})
    agreed = build_contract(federation.model_copy(update={"aggregation": aggregation}), backbone)
    update = train(agreed).train(0, zeros(agreed))
    check_update(update, agreed, 0, False, JOB)
    bits = packed(update.params)
    assert 2 * sum(v.nbytes for v in bits.values()) == sum(v.nbytes for v in update.params.values())
    assert all(np.array_equal(unpacked(bits)[n], v) for n, v in update.params.items())
    released = [record["release_sha256"] for record in read_lines(policy.ledger) if record["kind"] == "release"]
    assert released == [release_sha256(update)]


@pytest.mark.parametrize("name", ["multi-label-bce", "siglip-public-negatives"])
def test_every_objective_trains_a_site(federation, backbone, train, name):
    privacy = federation.privacy.model_copy(update={"objective": name})
    agreed = build_contract(federation.model_copy(update={"privacy": privacy}), backbone)
    update = train(agreed).train(0, zeros(agreed))
    check_update(update, agreed, 0, False, JOB)


def test_every_round_is_charged_once_and_the_plan_fits_the_budget_exactly(contract, policy, train):
    for number in range(contract.rounds):  # a new trainer each time, as after a restarted process
        train().train(number, zeros(contract))
    charges = [r for r in read_lines(policy.ledger) if r["kind"] == "charge"]
    assert [(r["round"], r["releases"]) for r in charges] == [(n, 2) for n in range(3)]
    state = Ledger.of(policy).state()
    assert state.epsilon_spent == pytest.approx(1.0, rel=1e-6)
    assert state.spent_units == 6 * cost_units(contract.promise.noise_multiplier)
    assert (state.reserved_units, kinds(policy)[-1]) == (0, "free")
    with pytest.raises(BudgetExceededError, match="beyond the budget"):
        train(job="another")


def test_the_charge_is_on_disk_before_the_noise_is_drawn(contract, policy, train, monkeypatch):
    trainer = train()

    def crash(self):
        assert kinds(policy) == ["open", "reserve", "charge"]
        raise RuntimeError("killed before the noise")

    monkeypatch.setattr(PatientDPOptimizer, "add_noise", crash)
    with pytest.raises(RuntimeError):
        trainer.train(0, zeros(contract))
    assert Ledger.of(policy).state().spent_units > 0


def test_a_round_asked_for_again_is_sent_again_as_it_was_and_costs_nothing(contract, policy, train):
    first = train().train(0, zeros(contract))
    before = kinds(policy)
    again = train().train(0, {name: t + 1 for name, t in zeros(contract).items()})  # a restarted process
    assert again.meta == first.meta
    assert all((again.params[name] == first.params[name]).all() for name in first.params)
    assert kinds(policy) == before


def lose_a_charge(contract, train, monkeypatch, number=0):
    """A process that dies between the charge and the outbox."""
    trainer = train()
    with monkeypatch.context() as patch:
        patch.setattr(PatientDPOptimizer, "add_noise", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train(number, zeros(contract))


def test_a_charge_that_a_crash_lost_costs_the_round_and_no_other(contract, policy, train, monkeypatch):
    lose_a_charge(contract, train, monkeypatch)
    with pytest.raises(BudgetExceededError, match=r"lost in a crash.*reserve of 0 rounds"):
        train().train(0, zeros(contract))
    for number in (1, 2):
        train().train(number, zeros(contract))
    assert Ledger.of(policy).state().epsilon_spent == pytest.approx(1.0, rel=1e-6)


def test_a_lost_charge_is_paid_again_from_the_reserve_with_fresh_noise(
    federation, backbone, policy, train, monkeypatch
):
    privacy = federation.privacy.model_copy(update={"reserve_rounds": 1})
    agreed = build_contract(federation.model_copy(update={"privacy": privacy}), backbone)

    def build():
        return train(agreed)

    lose_a_charge(agreed, build, monkeypatch)
    for number in range(agreed.rounds):
        build().train(number, zeros(agreed))
    charges = [r["round"] for r in read_lines(policy.ledger) if r["kind"] == "charge"]
    assert charges == [0, 0, 1, 2]
    assert Ledger.of(policy).state().epsilon_spent == pytest.approx(1.0, rel=1e-6)


class TestPolicy:
    """What a site refuses, each before any image is read."""

    def refused(self, policy, match, build, error=PrivacyError) -> None:
        before = kinds(policy)
        with pytest.raises(error, match=match):
            build()
        assert not policy.cache.exists()
        assert [kind for kind in kinds(policy) if kind != "refuse"] == before

    def test_a_contract_that_was_not_approved(self, policy, train):
        self.refused(policy, "not among approved_contracts", lambda: train(approved_contracts=("0" * 64,)))

    def test_a_coordinator_that_is_not_named(self, policy, train):
        self.refused(policy, "coordinator 'simulator' is none of", lambda: train(coordinators=("admin@x",)))

    def test_a_contract_beyond_the_budget(self, policy, train):
        self.refused(policy, "permits 0.9", lambda: train(budget=Budget(epsilon=0.9, delta=1e-5)))

    def test_a_contract_that_counts_its_releases_wrongly(self, contract, policy, train):
        promise = contract.promise.model_copy(update={"releases": 3})
        wrong = contract.model_copy(update={"promise": promise})
        self.refused(policy, "3 rounds and 0 in reserve of 2 local epochs are 6", lambda: train(wrong))

    def test_a_contract_that_promises_less_than_its_noise_gives(self, contract, policy, train):
        promise = contract.promise.model_copy(update={"epsilon": 0.5})
        wrong = contract.model_copy(update={"promise": promise})
        self.refused(policy, "promises epsilon 0.5, but its noise amounts to 1.0000", lambda: train(wrong))

    def test_fewer_nominal_patients_than_the_policys_least(self, policy, train):
        self.refused(
            policy, "12 nominal patients for alder, the policy's least is 50", lambda: train(min_nominal_patients=50)
        )

    def test_an_objective_that_is_not_registered(self, contract, policy, train):
        promise = contract.promise.model_copy(update={"objective": "infonce"})
        wrong = contract.model_copy(update={"promise": promise})
        self.refused(policy, "every other patient's gradient", lambda: train(wrong))

    def test_every_reason_is_told_at_once(self, contract, policy, train):
        promise = contract.promise.model_copy(update={"releases": 3, "epsilon": 0.1})
        wrong = contract.model_copy(update={"promise": promise})
        with pytest.raises(PrivacyError) as caught:
            train(wrong, approved_contracts=(), coordinators=())
        assert len(caught.value.problems) == 4

    def test_a_missing_ledger(self, policy, train):
        policy.ledger.unlink()
        with pytest.raises(LedgerError, match="cannot be opened"):
            train()
        assert not policy.cache.exists()

    def test_a_missing_signing_key(self, policy, train):
        policy.signing_key.unlink()
        self.refused(policy, "no signing key", train)

    def test_an_exhausted_budget(self, contract, policy, train):
        train().releases.ledger.charge(JOB, 0, Ledger.of(policy).state().reserved_units, "n")
        images = list(policy.cache.iterdir())
        with pytest.raises(BudgetExceededError, match="beyond the budget of 1"):
            train(job="another")
        assert list(policy.cache.iterdir()) == images

    def test_another_base_model_with_both_hashes(self, contract, policy, train):
        other = contract.base_model.model_copy(update={"sha256": "f" * 64})
        wrong = contract.model_copy(update={"base_model": other})
        self.refused(policy, f"{contract.base_model.sha256}.*{'f' * 64}", lambda: train(wrong), ModelError)


@pytest.mark.parametrize("scale", [0.0, 0.9])
def test_noise_that_is_not_what_it_claims_stops_the_job_before_anything_is_charged(policy, train, monkeypatch, scale):
    honest = NoiseSource.standard_normal
    monkeypatch.setattr(NoiseSource, "standard_normal", lambda self, *where: scale * honest(self, *where))
    with pytest.raises(PrivacyError):
        train()
    assert kinds(policy) == ["open"]


def test_privacy_off_needs_the_policy_and_data_that_is_nobodys(contract, policy, train):
    promise = contract.promise.model_copy(update={"mode": "off"})
    off = contract.model_copy(update={"promise": promise})
    with pytest.raises(PrivacyError, match="switches privacy off"):
        train(off)
    update = train(off, permit_privacy_off=True).train(0, zeros(off))
    assert update.meta["claim"]["epsilon"] is None
    assert kinds(policy) == ["open"]


def test_a_round_that_the_contract_has_not_is_refused_uncharged(contract, policy, train):
    for number in (-1, contract.rounds):
        with pytest.raises(PrivacyError, match=f"round {number} was asked for, the contract has 3"):
            train().train(number, zeros(contract))
    assert kinds(policy) == ["open", "reserve"]


def test_other_patients_in_the_middle_of_a_job_are_refused(contract, prepared, train, tmp_path):
    from clinifed.data.manifest import write_manifest

    train().train(0, zeros(contract))
    source = prepared.sites["alder"]
    first = source.records[0].patient
    (tmp_path / "images").symlink_to(source.folder / "images")
    fewer = write_manifest(tmp_path / "m.csv", [r for r in source.records if r.patient != first], "synthetic")
    with pytest.raises(PrivacyError, match="other patients than when job"):
        train(manifest=fewer.path)


def test_no_image_of_a_patient_who_withdrew_is_read(contract, policy, prepared, train):
    source = prepared.sites["alder"].records
    gone = source[0].patient
    Withdrawn.of(policy).add(gone)
    trainer = train(declare=("patient_count",))
    assert trainer.data.patients == len({r.patient for r in source}) - 1
    assert len(trainer.data.features) == sum(r.patient != gone for r in source)
    (reserved,) = [r for r in read_lines(policy.ledger) if r["kind"] == "reserve"]
    assert gone not in trainer.releases.cohorts.patients(reserved["cohort"]["patients_hmac"])


def test_figures_leave_only_where_the_policy_declares_them(contract, train):
    trainer = train(declare=("patient_count", "image_count", "label_counts", "train_loss"))
    declared = trainer.train(0, zeros(contract)).meta["declared"]
    assert declared["patient_count"] == trainer.data.patients
    assert declared["image_count"] == len(trainer.data.patient)
    assert sum(map(sum, declared["label_counts"].values())) == declared["image_count"]
    assert declared["train_loss"] > 0


def test_views_are_rows_of_their_patient_and_do_not_count_as_images(federation, backbone, contract, train):
    training = federation.training.model_copy(update={"views": 3})
    agreed = build_contract(federation.model_copy(update={"training": training}), backbone)
    plain = train()
    plain.releases.finish()
    viewed = train(agreed, job="another", declare=("patient_count", "image_count", "label_counts"))
    assert len(viewed.data.patient) == 3 * len(plain.data.patient)
    assert torch.equal(viewed.data.patient[::3], plain.data.patient)
    assert torch.equal(viewed.data.features[::3], plain.data.features)  # the first view is the image itself
    assert not torch.allclose(viewed.data.features[1::3], plain.data.features)
    declared = viewed._declared()
    assert declared["image_count"] == len(plain.data.patient)
    assert sum(map(sum, declared["label_counts"].values())) == declared["image_count"]


def test_the_pull_draws_towards_zero_shot_after_the_noise(federation, backbone, contract, train):
    training = federation.training.model_copy(update={"pull": 1.0})
    agreed = build_contract(federation.model_copy(update={"training": training}), backbone)
    far = {name: t + 3 for name, t in zeros(agreed).items()}
    update = train(agreed).train(0, far)
    # At full strength every step ends at the start, whatever data and noise did before.
    assert all(abs(value + 3).max() < 1e-4 for value in update.params.values())


def test_a_global_model_of_other_names_is_refused(contract, policy, train):
    delta = zeros(contract)
    delta.pop("heads.radiology.bias")
    with pytest.raises(UpdateError, match="this site needs"):
        train().train(0, delta)
    assert kinds(policy) == ["open", "reserve"]


def test_images_are_embedded_once(train, monkeypatch):
    train()
    monkeypatch.setattr("clinifed.executors.features.iter_pixels", None)
    train()


def test_unreadable_images_are_left_out_and_a_site_without_any_is_refused(policy, prepared, train, tmp_path):
    from clinifed.data.manifest import write_manifest

    records = prepared.sites["alder"].records
    # Without its hash, what an image shows is not known, and nothing that was kept is it.
    broken = [replace(r, image=f"images/absent{i}.dcm", sha256="") for i, r in enumerate(records)]
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "images").symlink_to(prepared.sites["alder"].folder / "images")
    half = write_manifest(folder / "half.csv", [*broken[:2], *records[2:]], "synthetic")
    trainer: SiteTrainer = train(manifest=half.path)
    assert len(trainer.data.features) == len(records) - 2
    none = write_manifest(folder / "none.csv", broken, "synthetic")
    with pytest.raises(DataError, match="none of"):
        train(manifest=none.path)


def test_an_update_longer_than_the_contracts_bound_is_projected_and_not_refused(contract, policy, train):
    """Whatever the noise, no honest update is too long for the server; shortening it costs no budget."""
    sites = {"alder": contract.sites["alder"].model_copy(update={"norm_bound": 1e-3})}
    agreed = contract.model_copy(update={"sites": sites})
    update = train(agreed).train(0, zeros(agreed))
    check_update(update, agreed, 0, False, JOB)
    assert update_norm(update.params) == pytest.approx(1e-3, rel=1e-4)
    assert [kind for kind in kinds(policy) if kind == "charge"] == ["charge"]


def test_an_update_within_the_bound_is_sent_as_it_was_made(contract, train):
    update = train().train(0, zeros(contract))
    assert update_norm(update.params) < contract.sites["alder"].norm_bound * (1 - 1e-5)


def test_a_site_whose_images_are_in_the_cache_needs_no_tower(contract, train, monkeypatch):
    """Neither for its embeddings, nor for its heads: both are those of the first start."""
    first = train()

    def loads(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("clinifed.models.backbone.load_tower", loads)
    monkeypatch.setattr("clinifed.models.backbone.load_tokenizer", loads)
    again = train()
    assert again.data.features.equal(first.data.features)
    assert all(again.start[name].equal(value) for name, value in first.start.items())
    check_update(again.train(0, zeros(contract)), contract, 0, False, JOB)
