"""The contract and the recipe: sigma once for all rounds, public numbers only, no code in the job."""

import json

import pytest

from clinifed.config import Federation
from clinifed.contract import Contract
from clinifed.errors import ConfigError, PrivacyError
from clinifed.jobs.recipe import FederationRecipe, build_contract
from clinifed.models.backbone import load_backbone
from clinifed.privacy.accountant import noise_multiplier_for

PLAN = {
    "name": "unit",
    "rounds": 5,
    "min_clients": 1,
    "aggregation": {"quorum": 1, "round_timeout_s": 60},
    "max_clients": 2,
    "training": {"local_epochs": 3},
    "data": {"synthesize": {"patients_per_specialty": 30}},
    "sites": {"alder": {"specialties": ["radiology", "emergency"]}, "birch": {"specialties": ["radiology"]}},
}


def contract(**changes) -> Contract:
    return build_contract(Federation.model_validate({**PLAN, **changes}), load_backbone("tiny"))


def test_sigma_is_calibrated_for_all_rounds_and_epochs_together():
    promise = contract().promise
    assert promise.releases == 15
    assert promise.noise_multiplier == noise_multiplier_for(1.0, 1e-5, 15)


def test_the_contract_survives_its_journey_as_plain_data():
    agreed = contract()
    again = Contract.model_validate(json.loads(json.dumps(agreed.model_dump(mode="json"))))
    assert again == agreed
    assert again.sha256() == agreed.sha256()


@pytest.mark.parametrize("change", [{"rounds": 6}, {"privacy": {"epsilon": 2}}, {"training": {"learning_rate": 1}}])
def test_another_agreement_has_another_hash(change):
    assert contract(**change).sha256() != contract().sha256()


def test_weights_are_public_numbers():
    assert {s.weight for s in contract().sites.values()} == {1.0}
    by_patients = contract(aggregation={**PLAN["aggregation"], "weights": "nominal_patients"})
    assert {n: s.weight for n, s in by_patients.sites.items()} == {"alder": 60.0, "birch": 30.0}


def test_the_shared_parameters_are_the_heads_alone_or_with_the_projection():
    heads = set(contract().shapes)
    assert heads == {f"heads.{s}.{p}" for s in ("radiology", "emergency") for p in ("weight", "bias")}
    assert set(contract(training={"train": "projection"}).shapes) - heads == {"trunk.projection.weight"}


def test_an_unknown_specialty_and_an_unsound_objective_are_refused():
    with pytest.raises(ConfigError, match="'phrenology' is not known"):
        contract(sites={"alder": {"specialties": ["phrenology"]}})
    with pytest.raises(PrivacyError, match="infonce"):
        contract(privacy={"objective": "infonce"})


def test_a_federation_may_define_its_own_specialty():
    own = {"ophthalmology": {"labels": {"healthy": ["a healthy eye"], "glaucoma": ["an eye with glaucoma"]}}}
    agreed = contract(specialties=own, sites={"alder": {"specialties": ["ophthalmology"]}})
    assert agreed.shapes["heads.ophthalmology.weight"][0] == 2


def names(content) -> list[str]:
    if isinstance(content, dict):
        return [*content, *(n for v in content.values() for n in names(v))]
    return [n for v in content for n in names(v)] if isinstance(content, list) else []


def test_no_name_in_a_job_holds_a_dot_which_flare_would_read_as_several_names(tmp_path):
    FederationRecipe(contract()).write(tmp_path)
    for path in tmp_path.rglob("*.json"):
        assert [name for name in names(json.loads(path.read_text())) if "." in name] == []


def test_the_job_names_our_classes_and_brings_no_code(tmp_path):
    FederationRecipe(contract()).write(tmp_path)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert [f for f in files if not f.endswith(".json")] == []
    server = json.loads((tmp_path / "unit/app/config/config_fed_server.json").read_text())
    paths = [c["path"] for c in (*server["components"], *server["workflows"])]
    assert all(p.startswith("clinifed.") for p in paths), paths
    assert server["workflows"][0]["args"]["contract"] == contract().text()
