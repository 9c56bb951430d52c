"""A federation in a public basis: from public images to a model that needs none, and no further where it would lose."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from clinifed.config import BasisKind, Federation
from clinifed.contract import Contract
from clinifed.errors import ConfigError, ModelError
from clinifed.executors.flare import SIMULATOR
from clinifed.executors.trainer import SiteTrainer
from clinifed.jobs import basis as basis_module
from clinifed.jobs.baselines import load_part
from clinifed.jobs.basis import MAX_LOSS, basis_file, planned_basis, with_basis, write_basis
from clinifed.jobs.card import without_basis
from clinifed.jobs.evaluate_run import evaluate_run
from clinifed.jobs.plan import plan_federation
from clinifed.jobs.prepare import PreparedData, make_site_keys, prepare_data, site_policies
from clinifed.jobs.recipe import build_contract
from clinifed.jobs.submit import submit
from clinifed.load import load_federation
from clinifed.models.adapters import GlobalModel
from clinifed.models.backbone import Backbone, load_backbone
from clinifed.models.basis import Basis, read_basis
from clinifed.policy import SitePolicy

PLAN = {
    "name": "unit",
    "rounds": 3,
    "min_clients": 1,
    "max_clients": 1,
    "training": {"basis": "centre", "learning_rate": 20.0},
    "privacy": {"epsilon": 3.0},
    "aggregation": {"quorum": 1, "round_timeout_s": 60},
    "data": {"synthesize": {"patients_per_specialty": 6, "public_patients_per_specialty": 40, "max_images": 2}},
    "sites": {"alder": {"specialties": ["emergency"]}},
}


def silent(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def federation() -> Federation:
    return Federation.model_validate(PLAN)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def bare() -> Backbone:
    return load_backbone("tiny")


@pytest.fixture(scope="module")
def data(federation: Federation, run: Path) -> PreparedData:
    return prepare_data(federation, run / "data", silent)


@pytest.fixture(scope="module")
def based(federation: Federation, bare: Backbone, run: Path, data: PreparedData) -> Backbone:
    return with_basis(federation, bare, run, silent)


@pytest.fixture(scope="module")
def contract(federation: Federation, based: Backbone) -> Contract:
    return build_contract(federation, based)


@pytest.fixture
def trainer(
    federation: Federation, data: PreparedData, run: Path, contract: Contract, tmp_path: Path
) -> Callable[..., SiteTrainer]:
    make_site_keys(federation, tmp_path)
    policies = site_policies(federation, data, tmp_path, contract, (SIMULATOR,), basis_file(federation, run))

    def build(**changes: object) -> SiteTrainer:
        return SiteTrainer(contract, policies["alder"].model_copy(update=changes), "run", SIMULATOR)

    return build


def test_the_contract_names_the_basis_and_its_shapes(contract: Contract, based: Backbone) -> None:
    assert based.basis is not None
    assert contract.base_model.basis_sha256 == based.basis.sha256()
    assert contract.shapes == {"heads.emergency.weight": (3, based.basis.dims)}
    assert Contract.read(contract.text()).sha256() == contract.sha256()


def test_a_site_trains_in_the_basis_and_what_is_written_needs_none(
    trainer: Callable[..., SiteTrainer], contract: Contract, based: Backbone, bare: Backbone, data: PreparedData
) -> None:
    site = trainer()
    zero = {name: torch.zeros(shape) for name, shape in contract.shapes.items()}
    delta = site.train(0, zero).params
    assert {name: value.shape for name, value in delta.items()} == contract.shapes
    metrics, _, params = evaluate_run(contract, based, replace(data, sites={}), {}, delta, silent)
    written = load_part(without_basis(contract), bare, params)  # with the base model alone
    trained = load_part(contract, based)
    trained.load_shared({n: t + torch.from_numpy(delta[n]) for n, t in trained.shared().items()})
    size = bare.preprocess.size_px
    pixels = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (GlobalModel(bare, part).cpu()(pixels)[1]["emergency"] for part in (written, trained))
    assert torch.allclose(ours, theirs, atol=1e-2)
    assert float((ours - ours.mean()).abs().max()) > 0.1
    assert metrics["emergency"]["zero_shot"]["balanced_accuracy"] > 1 / 3


@pytest.mark.parametrize("how", ["other", "absent"])
def test_a_site_without_the_agreed_basis_takes_no_part(
    trainer: Callable[..., SiteTrainer], based: Backbone, tmp_path: Path, how: str
) -> None:
    assert based.basis is not None
    other = tmp_path / "other"
    other.write_bytes(replace(based.basis, mean=based.basis.mean + 1).content())
    said = "the contract wants" if how == "other" else "name it under `basis` in the policy"
    with pytest.raises(ModelError, match=said):
        trainer(basis=other if how == "other" else None)


def test_a_basis_that_loses_what_tells_classes_apart_is_refused_with_the_figures(
    federation: Federation, bare: Backbone, run: Path, data: PreparedData, tmp_path: Path, monkeypatch
) -> None:
    def worst(kind: BasisKind, embeddings: torch.Tensor, dims: int) -> Basis:
        """The directions in which public embeddings vary least: what a basis must not be."""
        centre = embeddings.mean(dim=0)
        axes = torch.linalg.svd(embeddings - centre, full_matrices=True).Vh  # by falling variance
        return Basis(centre, axes[-dims:].T.contiguous())

    monkeypatch.setattr(basis_module, "make_basis", worst)
    training = federation.training.model_copy(update={"basis": "pca", "basis_dims": 2})
    small = federation.model_copy(update={"training": training})
    told: list[str] = []
    with pytest.raises(ModelError, match=rf"loses more than {MAX_LOSS:g} .*→") as caught:
        write_basis(small, bare, tmp_path / "basis", run / "data", told.append)
    assert any("fitted" in line for line in told)
    assert "take 'centre'" in caught.value.problems[-1]
    assert not (tmp_path / "basis").exists()


def test_neither_a_shift_nor_a_scale_of_all_rows_changes_what_a_probe_tells() -> None:
    """With eight patients one of them is 0.125, more than a basis may lose: what decides must be the basis alone."""
    patient, label = np.arange(16) // 2, np.array([0, 1] * 4).repeat(2)
    for seed in range(40):
        draw = np.random.default_rng(seed)
        rows = draw.standard_normal((16, 64)) + 3 * draw.standard_normal(64)
        told = [basis_module._probe(changed, patient, label) for changed in (rows, 5 * (rows - rows.mean(axis=0)))]
        assert told[0] == told[1], seed


def test_centring_loses_nothing(federation: Federation, bare: Backbone, run: Path, data: PreparedData, tmp_path: Path):
    basis, trials = write_basis(federation, bare, tmp_path / "basis", run / "data", silent)
    assert [trial.specialty for trial in trials] == ["emergency"]
    assert all(np.allclose(*pair, atol=1e-9) for t in trials for pair in (t.zero_shot, t.probe)), trials
    assert read_basis(tmp_path / "basis").sha256() == basis.sha256()
    with pytest.raises(ConfigError, match="never overwritten"):
        write_basis(federation, bare, tmp_path / "basis", run / "data", silent)


def test_without_public_images_or_a_basis_there_is_nothing_to_make(bare: Backbone, tmp_path: Path) -> None:
    plan = {**PLAN, "data": {}, "sites": {"alder": {"specialties": ["emergency"], "nominal_patients": 9}}}
    federation = Federation.model_validate(plan)
    with pytest.raises(ConfigError, match="no public validation set"):
        with_basis(federation, bare, tmp_path, silent)
    none = federation.model_copy(update={"training": federation.training.model_copy(update={"basis": "none"})})
    assert with_basis(none, bare, tmp_path, silent) is bare
    with pytest.raises(ConfigError, match="nothing to make"):
        write_basis(none, bare, tmp_path / "basis", tmp_path, silent)


def test_a_real_federation_must_name_the_file_that_its_sites_hold(tmp_path: Path) -> None:
    site = {"specialties": ["emergency"], "nominal_patients": 9, "public_key": "0" * 64}
    federation = Federation.model_validate({**PLAN, "data": {}, "sites": {"alder": site}})
    with pytest.raises(ConfigError, match=r"model.basis names no file"):
        submit(federation, tmp_path, tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()


def test_a_basis_is_planned_for_before_it_is_made(
    federation: Federation, bare: Backbone, contract: Contract, tmp_path: Path
) -> None:
    assert build_contract(federation, planned_basis(federation, bare)).shapes == contract.shapes
    path = tmp_path / "federation.yaml"
    path.write_text(yaml.safe_dump(PLAN))
    (row,) = plan_federation(path).feasibility
    assert row.parameters == sum(int(np.prod(shape)) for shape in contract.shapes.values())


def test_a_file_without_a_basis_to_train_in_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "federation.yaml"
    path.write_text(yaml.safe_dump({**PLAN, "training": {}, "model": {"basis": "basis.safetensors"}}))
    with pytest.raises(ConfigError, match=r"model.basis: has no effect"):
        load_federation(path)


def test_a_policy_names_the_file(trainer: Callable[..., SiteTrainer], run: Path) -> None:
    policy: SitePolicy = trainer().policy
    assert policy.basis == run / "basis.safetensors"
    assert SitePolicy.model_validate(policy.model_dump(mode="json")) == policy
