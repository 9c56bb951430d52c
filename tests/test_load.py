"""Configuration: every problem at once, each with file, key, value and the nearest valid key; nothing is repaired."""

from pathlib import Path

import pytest
import yaml

from clinifed.config import Federation
from clinifed.errors import ConfigError
from clinifed.load import load_federation

CONFIGS = sorted((Path(__file__).parents[1] / "simulator_configs").rglob("*.yaml"))

GOOD = {
    "name": "test",
    "rounds": 2,
    "min_clients": 1,
    "aggregation": {"quorum": 1, "round_timeout_s": 60},
    "max_clients": 3,
    "data": {"synthesize": {"seed": 1}},
    "sites": {"alder": {"specialties": ["radiology"]}, "birch": {"specialties": ["radiology"]}},
}


def write(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "federation.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **changes}))
    return path


def problems(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_federation(path, overrides)
    assert caught.value.exit_code == 2
    return "\n".join(caught.value.problems)


def test_there_are_configurations_to_ship() -> None:
    assert {p.stem for p in CONFIGS} >= {"demo", "smoke", "three_hospitals", "real_sites"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_configuration_loads_and_says_how_to_run_it(path: Path) -> None:
    federation = load_federation(path)
    first = path.read_text().splitlines()[0]
    assert first == f"# clinifed simulate simulator_configs/{path.name} --out runs/{path.stem}"
    assert federation.min_clients <= len(federation.sites) <= federation.max_clients


def test_the_missions_own_example_is_as_the_mission_says() -> None:
    federation = load_federation(next(p for p in CONFIGS if p.stem == "three_hospitals"))
    assert (federation.min_clients, federation.max_clients, len(federation.sites)) == (3, 10, 3)
    assert (federation.privacy.epsilon, federation.training.local_epochs) == (1.0, 3)


def test_the_demo_keeps_its_promises() -> None:
    federation = load_federation(next(p for p in CONFIGS if p.stem == "demo"))
    assert len(federation.sites) >= 4
    assert len({s for site in federation.sites.values() for s in site.specialties}) == 4
    assert federation.privacy.epsilon <= 3
    assert federation.privacy.delta <= 1e-5


def test_all_problems_are_told_at_once_with_file_key_and_value(tmp_path: Path) -> None:
    path = write(tmp_path, rounds=0, privacy={"epsilom": 1.0}, max_clients="many", surprise=1)
    text = problems(path)
    assert text.count(str(path)) == 4
    assert "rounds: Input should be greater than or equal to 1 (value 0)" in text
    assert "privacy.epsilom: unknown key (value 1.0); did you mean 'epsilon'?" in text
    assert "max_clients" in text
    assert "'many'" in text
    assert "surprise: unknown key (value 1); remove it" in text


@pytest.mark.parametrize(
    ("key", "near"),
    [("round", "rounds"), ("min_client", "min_clients"), ("site", "sites"), ("agregation", "aggregation")],
)
def test_a_misspelt_key_gets_the_nearest_valid_one(tmp_path: Path, key: str, near: str) -> None:
    assert f"did you mean {near!r}?" in problems(write(tmp_path, **{key: 1}))


def test_a_misspelt_key_of_a_site_gets_the_nearest_valid_one(tmp_path: Path) -> None:
    sites = {"alder": {"specialties": ["radiology"], "manifesto": "x"}}
    text = problems(write(tmp_path, sites=sites))
    assert "sites.alder.manifesto: unknown key (value 'x'); did you mean 'manifest'?" in text


@pytest.mark.parametrize(("low", "high"), [(3, 3), (1, 1)])
def test_fewer_or_more_sites_than_allowed_are_refused(tmp_path: Path, low: int, high: int) -> None:
    assert "2 sites, but min_clients is" in problems(write(tmp_path, min_clients=low, max_clients=high))


def test_privacy_off_is_what_a_bare_off_means(tmp_path: Path) -> None:
    path = tmp_path / "federation.yaml"
    bounded = {**GOOD, "aggregation": {**GOOD["aggregation"], "norm_bound": 1.0}}
    path.write_text(yaml.safe_dump(bounded) + "privacy: off\n")
    assert load_federation(path).privacy.mode == "off"


def test_privacy_off_is_refused_for_a_hospitals_data(tmp_path: Path) -> None:
    sites = {"alder": {"specialties": ["radiology"], "manifest": "m.csv", "nominal_patients": 5}}
    text = problems(write(tmp_path, sites=sites, data={}, privacy=False))
    assert "privacy: off is for public or synthetic data" in text


def test_a_hospitals_ledger_must_outlive_the_run(tmp_path: Path) -> None:
    sites = {"alder": {"specialties": ["radiology"], "manifest": "m.csv", "nominal_patients": 5}}
    assert "sites.alder.ledger: missing" in problems(write(tmp_path, sites=sites, data={}))


def test_the_public_denominator_is_required(tmp_path: Path) -> None:
    sites = {"alder": {"specialties": ["radiology"], "manifest": "m.csv", "data_class": "public"}}
    assert "sites.alder.nominal_patients: missing" in problems(write(tmp_path, sites=sites, data={}))


@pytest.mark.parametrize("name", ["mean", "server", "Alder", "a b", ""])
def test_names_a_site_may_not_have(tmp_path: Path, name: str) -> None:
    assert "sites." in problems(write(tmp_path, sites={name: {"specialties": ["radiology"]}}))


def test_overrides_are_read_as_yaml(tmp_path: Path) -> None:
    federation = load_federation(
        write(tmp_path), ["rounds=7", "privacy.epsilon=0.5", "data.synthesize.shuffle_labels=true"]
    )
    assert (federation.rounds, federation.privacy.epsilon) == (7, 0.5)
    assert federation.data.synthesize is not None
    assert federation.data.synthesize.shuffle_labels is True


@pytest.mark.parametrize("setting", ["rounds", "=3", "rounds.deep=1", "rounds={"])
def test_an_override_that_cannot_apply_says_how_to_write_it(tmp_path: Path, setting: str) -> None:
    assert "--set" in problems(write(tmp_path), setting)


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "\x00"])
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    assert str(path) in problems(path)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    assert "cannot be read" in problems(tmp_path / "absent.yaml")


def test_relative_paths_count_from_the_file(tmp_path: Path) -> None:
    sites = {
        "alder": {"specialties": ["radiology"], "manifest": "m.csv", "nominal_patients": 5, "data_class": "public"}
    }
    federation = load_federation(write(tmp_path, sites=sites, data={}))
    assert federation.sites["alder"].manifest == tmp_path / "m.csv"


def test_the_nominal_number_of_synthetic_patients_is_the_plans(tmp_path: Path) -> None:
    plan = {"synthesize": {"patients_per_specialty": 20}}
    sites = {
        "alder": {"specialties": ["radiology", "dermatology"]},
        "birch": {"specialties": ["radiology"], "nominal_patients": 9},
    }
    federation = load_federation(write(tmp_path, sites=sites, data=plan))
    assert isinstance(federation, Federation)
    assert [federation.nominal_patients(n) for n in ("alder", "birch")] == [40, 9]


@pytest.mark.parametrize("key", ["quorum", "round_timeout_s"])
def test_quorum_and_deadline_have_no_default(tmp_path: Path, key: str) -> None:
    rest = {k: v for k, v in GOOD["aggregation"].items() if k != key}
    assert f"aggregation.{key}: missing" in problems(write(tmp_path, aggregation=rest))


@pytest.mark.parametrize("seconds", [0, -1, 10**9, float("inf")])
def test_no_deadline_is_endless(tmp_path: Path, seconds: float) -> None:
    assert "aggregation.round_timeout_s" in problems(
        write(tmp_path, aggregation={"quorum": 1, "round_timeout_s": seconds})
    )


def test_a_quorum_beyond_min_clients_is_refused(tmp_path: Path) -> None:
    text = problems(write(tmp_path, aggregation={"quorum": 2, "round_timeout_s": 60}))
    assert "aggregation.quorum (2) is more than min_clients (1)" in text


def test_with_privacy_off_the_norm_bound_is_explicit(tmp_path: Path) -> None:
    assert "aggregation.norm_bound: missing" in problems(write(tmp_path, privacy={"mode": "off"}))
