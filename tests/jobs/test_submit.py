"""Submitting a run: written down before anything happens, gone on with wherever it stands, never begun twice."""

import json

import pytest

from clinifed.config import Federation
from clinifed.contract import Contract
from clinifed.errors import ConfigError, FederationError
from clinifed.jobs import submit as module
from clinifed.jobs.submit import RUN_FILE, begin, read_run, resume, submit

KEY = "ab" * 32


def plan(**site: object) -> Federation:
    return Federation.model_validate(
        {
            "name": "unit",
            "rounds": 2,
            "min_clients": 1,
            "max_clients": 2,
            "aggregation": {"quorum": 1, "round_timeout_s": 60},
            "sites": {
                name: {"specialties": ["radiology"], "nominal_patients": 10, **site} for name in ("alder", "birch")
            },
        }
    )


@pytest.fixture
def contract(make_contract) -> Contract:
    return make_contract({"alder": ["radiology"], "birch": ["radiology"]})


@pytest.fixture
def begun(tmp_path, contract):
    begin(plan(public_key=KEY), tmp_path / "run", tmp_path / "kit", contract, {"alder": tmp_path / "kits" / "alder"})
    return tmp_path / "run"


def test_what_was_begun_reads_back_as_it_was(begun, contract, tmp_path):
    content, federation, agreed = read_run(begun)
    assert (federation, agreed) == (plan(public_key=KEY), contract)
    assert agreed.sha256() == contract.sha256()
    assert content["admin_kit"] == str(tmp_path / "kit")
    assert content["kits"] == {"alder": str(tmp_path / "kits" / "alder")}


def test_two_runs_have_two_names(begun, contract, tmp_path):
    begin(plan(), tmp_path / "another", tmp_path / "kit", contract)
    assert read_run(tmp_path / "another")[0]["run"] != read_run(begun)[0]["run"]


def test_a_directory_that_holds_a_run_is_not_begun_again(begun, contract, tmp_path):
    before = (begun / RUN_FILE).read_bytes()
    with pytest.raises(ConfigError, match=f"holds a run already; go on with it by --resume {begun}"):
        begin(plan(), begun, tmp_path / "kit", contract)
    assert (begun / RUN_FILE).read_bytes() == before


def changed(folder, **changes):
    path = folder / RUN_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGED = {
    "none": lambda f: (f / RUN_FILE).unlink(),
    "empty": lambda f: (f / RUN_FILE).write_text(""),
    "no mapping": lambda f: (f / RUN_FILE).write_text("[]"),
    "no contract": lambda f: (f / RUN_FILE).write_text("{}"),
    "another hash": lambda f: changed(f, contract_sha256="0" * 64),
    "no federation": lambda f: changed(f, federation={"name": "unit"}),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_directory_that_holds_no_run_is_refused_with_its_path(begun, damage):
    damage(begun)
    with pytest.raises(ConfigError) as caught:
        read_run(begun)
    assert all(problem.startswith(str(begun / RUN_FILE)) for problem in caught.value.problems)


def test_a_contract_that_was_altered_is_refused(begun):
    agreed = json.loads((begun / RUN_FILE).read_text())["contract"]
    changed(begun, contract={**agreed, "rounds": 9})
    with pytest.raises(ConfigError, match="the contract is not the one that was written"):
        read_run(begun)


def test_every_site_without_a_key_is_named_and_nothing_is_begun(tmp_path):
    with pytest.raises(ConfigError) as caught:
        submit(plan(), tmp_path / "kit", tmp_path / "run", lambda text: None)
    assert [p.split(":")[0] for p in caught.value.problems] == ["sites.alder.public_key", "sites.birch.public_key"]
    assert not (tmp_path / "run").exists()


def test_a_run_whose_kit_is_none_is_begun_and_says_what_is_wrong(tmp_path):
    said = []
    with pytest.raises(ConfigError, match="kit"):
        submit(plan(public_key=KEY), tmp_path / "kit", tmp_path / "run", said.append)
    _, _, agreed = read_run(tmp_path / "run")
    assert said[0] == f"contract {agreed.sha256()}: each site's policy must approve it before the site takes part"
    assert {name: site.public_key for name, site in agreed.sites.items()} == {"alder": KEY, "birch": KEY}


def test_a_run_that_finished_is_told_again_and_nothing_is_submitted(begun, monkeypatch):
    (begun / "summary.json").write_text('{"status": "finished"}')
    monkeypatch.setattr(module, "RunChain", None)
    assert resume(begun, lambda text: None) == {"status": "finished"}


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_a_run_that_failed_is_gone_on_with(begun, monkeypatch, status):
    """What a run wrote of its failure is no result: a resumed run asks the server again."""
    (begun / "summary.json").write_text(json.dumps({"status": status}))

    class AskedError(Exception):
        pass

    def asked(*_, **__):
        raise AskedError

    monkeypatch.setattr(module, "RunChain", asked)
    with pytest.raises(AskedError):
        resume(begun, lambda text: None)


def test_an_interrupted_run_leaves_its_directory_to_go_on_with(begun, monkeypatch):
    class Gone:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def finish(self):
            raise FederationError("the server did not answer")

    monkeypatch.setattr(module, "RunChain", Gone)
    with pytest.raises(FederationError):
        resume(begun, lambda text: None)
    assert not (begun / "summary.json").exists()
    assert read_run(begun)
