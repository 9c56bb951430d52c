"""A federation of processes on one machine, as far as nothing is started: kits as a hospital's, and one run in them."""

import json
import socket

import pytest
import yaml

from clinifed.config import Federation
from clinifed.errors import ConfigError
from clinifed.jobs.kit import SERVER, read_kit
from clinifed.jobs.kit_processes import LocalKits
from clinifed.jobs.poc import _policies, local_kits, poc, poc_submit, prepare_poc
from clinifed.jobs.preflight import preflight
from clinifed.jobs.submit import read_run

PLAN = {
    "name": "unit",
    "rounds": 2,
    "min_clients": 1,
    "max_clients": 2,
    "aggregation": {"quorum": 1, "round_timeout_s": 60},
    "data": {"synthesize": {"patients_per_specialty": 4, "public_patients_per_specialty": 4, "max_images": 1}},
    "sites": {"alder": {"specialties": ["radiology"]}, "birch": {"specialties": ["radiology"]}},
}


@pytest.fixture(scope="module")
def federation() -> Federation:
    return Federation.model_validate(PLAN)


@pytest.fixture(scope="module")
def made(federation, tmp_path_factory):
    out = tmp_path_factory.mktemp("poc") / "run"
    return out, prepare_poc(federation, out, lambda text: None)


def test_there_is_a_kit_for_the_server_every_site_and_the_coordinator(made, federation):
    out, kits = made
    assert set(kits) == {SERVER, *federation.sites, federation.deployment.coordinator}
    assert {name: read_kit(path).role for name, path in kits.items()} == {
        SERVER: "server",
        "alder": "site",
        "birch": "site",
        federation.deployment.coordinator: "admin",
    }
    assert all(path.is_relative_to(out) for path in kits.values())


def test_every_kit_passes_preflight_as_a_hospitals_would(made):
    for path in made[1].values():
        assert list(preflight(path, flare=False).problems) == []


def test_the_run_stands_there_with_free_ports_of_its_own(made, federation):
    out, kits = made
    content, written, agreed = read_run(out)
    assert content["kits"] == {name: str(path) for name, path in kits.items()}
    assert written.deployment.port != written.deployment.admin_port
    assert {written.deployment.port, written.deployment.admin_port}.isdisjoint({8002, 8003})
    assert read_kit(kits["alder"]).address[1] in (written.deployment.port, written.deployment.admin_port)
    with socket.socket() as free:
        free.bind(("127.0.0.1", written.deployment.port))
    assert all(site.public_key for site in agreed.sites.values())


def test_each_site_approves_this_contract_of_this_coordinator_and_nothing_else(made, federation):
    out, kits = made
    _, _, agreed = read_run(out)
    for name, policy in _policies(out).items():
        assert policy.approved_contracts == (agreed.sha256(),)
        assert policy.coordinators == (federation.deployment.coordinator,)
        path = kits[name] / "local" / "clinifed" / f"{name}.yaml"
        assert yaml.safe_load(path.read_text())["site"] == name
        assert path.stat().st_mode & 0o077 == 0


def test_nothing_was_started(made):
    kits = local_kits(made[0])
    assert isinstance(kits, LocalKits)
    assert [kits.processes(name) for name in kits.kits] == [[]] * 4


def test_a_directory_with_a_run_is_not_prepared_or_run_again(made, federation):
    for run in (prepare_poc, poc):
        with pytest.raises(ConfigError, match=r"holds run\.json.* of an earlier run"):
            run(federation, made[0], lambda text: None)
    assert not (made[0] / "summary.json").exists()


def test_a_directory_that_was_never_brought_up_is_refused(tmp_path):
    for ask in (local_kits, lambda out: poc_submit(out, lambda text: None)):
        with pytest.raises(ConfigError, match=r"run\.json: not a run directory"):
            ask(tmp_path)


def test_a_federation_that_cannot_be_prepared_leaves_a_summary_that_says_so(federation, tmp_path):
    """The data of a site is missing: nothing is started."""
    bad = Federation.model_validate(
        {
            **PLAN,
            "data": {},
            "sites": {name: {"specialties": ["radiology"], "nominal_patients": 10} for name in ("alder", "birch")},
        }
    )
    with pytest.raises(Exception, match="no data; give manifest"):
        poc(bad, tmp_path / "run", lambda text: None)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert any("no data" in text for text in summary["error"])
