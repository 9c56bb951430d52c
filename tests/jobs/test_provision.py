"""Startup kits: what each holds, and that a hospital can be added without touching anybody else's."""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import yaml
from cryptography import x509

from clinifed.config import Federation
from clinifed.errors import ConfigError, FederationError
from clinifed.jobs import provision as module
from clinifed.jobs.kit import SERVER, read_kit
from clinifed.jobs.provision import AUTHORITY, provision
from clinifed.load import read_yaml, validate
from clinifed.policy import SitePolicy

COORDINATOR = "coordinator@consortium.org"


def everything(folder: Path) -> dict[str, str]:
    """Every file with its mode and content; links would show as files."""
    return {
        str(p.relative_to(folder)): f"{p.stat().st_mode:o} {sha256(p.read_bytes()).hexdigest()}"
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_each_participant_has_a_kit_of_its_role(kits: dict[str, Path]) -> None:
    roles = {name: read_kit(path).role for name, path in kits.items()}
    assert roles == {SERVER: "server", "alder": "site", "birch": "site", "cedar-2": "site", COORDINATOR: "admin"}
    assert {name: read_kit(path).name for name, path in kits.items()} == {name: name for name in kits}


def test_kits_and_keys_are_owner_only(kits: dict[str, Path]) -> None:
    authority = kits[SERVER].parent / AUTHORITY
    assert authority.stat().st_mode & 0o777 == 0o700
    assert (authority / "cert.json").stat().st_mode & 0o777 == 0o600
    assert "root_pri_key" in (authority / "cert.json").read_text()
    for path in kits.values():
        assert path.stat().st_mode & 0o777 == 0o700
        assert read_kit(path).key.stat().st_mode & 0o777 == 0o600
        text = b"".join(p.read_bytes() for p in path.rglob("*") if p.is_file() and p.suffix != ".key")
        assert b"PRIVATE KEY" not in text


def test_no_sample_of_flare_can_come_into_force(kits: dict[str, Path]) -> None:
    left = {
        p.name for path in kits.values() for p in (path / "local").iterdir() if p.name.endswith((".default", ".sample"))
    }
    assert left == {"log_config.json.default"}


def test_jobs_and_snapshots_lie_in_the_server_s_kit(kits: dict[str, Path]) -> None:
    text = (kits[SERVER] / "local" / "resources.json").read_text()
    assert "/tmp" not in text
    content = json.loads(text)
    assert content["snapshot_persistor"]["args"]["storage"]["args"] == {"folder": "storage/snapshots"}
    assert content["servers"][0]["heart_beat_timeout"] == 30


def test_unsigned_jobs_are_refused_by_server_and_sites(kits: dict[str, Path]) -> None:
    for name, path in kits.items():
        kit = read_kit(path)
        assert kit.role == "admin" or kit.config["require_signed_jobs"] is True, name


def test_the_readme_says_until_when_the_certificate_is_valid(kits: dict[str, Path]) -> None:
    for path in kits.values():
        expires = read_kit(path).certificate.not_valid_after_utc
        assert f"{expires:%Y-%m-%d}" in (path / "README.md").read_text()


def test_the_policy_template_names_every_key_and_permits_nothing(kits: dict[str, Path]) -> None:
    path = kits["alder"] / "local" / "clinifed" / "alder.yaml"
    content = read_yaml(path)
    assert set(content) == set(SitePolicy.model_fields)
    assert content["approved_contracts"] == content["coordinators"] == content["declare"] == []
    assert content["permit_privacy_off"] is False
    with pytest.raises(ConfigError) as caught:
        validate(SitePolicy, content, "alder.yaml")
    missing = {"manifest", "ledger", "signing_key", "cache", "diary", "budget.epsilon", "budget.delta"}
    said = {p.split(": ")[1] for p in caught.value.problems}
    assert missing <= said
    for line in path.read_text().splitlines():
        assert "#" in line or not line or line == "budget:", line


def test_a_filled_in_template_is_a_policy(kits: dict[str, Path]) -> None:
    text = (kits["alder"] / "local" / "clinifed" / "alder.yaml").read_text()
    for key in ("manifest", "ledger", "signing_key", "cache", "diary"):
        text = text.replace(f"\n{key}: ", f"\n{key}: /secure/{key} ")
    text = text.replace("epsilon: ", "epsilon: 1 ", 1).replace("delta: ", "delta: 1.0e-5 ", 1)
    text = text.replace("min_nominal_patients: ", "min_nominal_patients: 100 ", 1)
    policy = validate(SitePolicy, yaml.safe_load(text), "alder.yaml")
    assert (policy.budget.epsilon, policy.min_nominal_patients) == (1, 100)


def test_adding_a_hospital_changes_no_byte_of_the_others(
    tmp_path: Path, make_federation: Callable[..., Federation]
) -> None:
    out = tmp_path / "out"
    provision(make_federation("alder", "birch"), out, lambda _: None)
    before = everything(out)
    said: list[str] = []
    provision(make_federation("alder", "birch", "dogwood"), out, said.append)
    after = everything(out)
    assert {k: v for k, v in after.items() if not k.startswith(("dogwood/", AUTHORITY))} == {
        k: v for k, v in before.items() if not k.startswith(AUTHORITY)
    }
    root = {p.read_bytes() for p in out.glob("*/startup/rootCA.pem")}
    assert len(root) == 1
    new = read_kit(out / "dogwood")
    new.certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(root.pop()))
    assert "dogwood: new kit" in "\n".join(said)
    assert "alder: has its kit; unchanged" in said


def test_provisioning_again_changes_nothing(tmp_path: Path, make_federation: Callable[..., Federation]) -> None:
    provision(make_federation("alder"), tmp_path / "out", lambda _: None)
    before = everything(tmp_path / "out")
    provision(make_federation("alder"), tmp_path / "out", lambda _: None)
    assert everything(tmp_path / "out") == before


def test_a_removed_or_renamed_site_is_said(tmp_path: Path, make_federation: Callable[..., Federation]) -> None:
    provision(make_federation("alder", "birch"), tmp_path / "out", lambda _: None)
    said: list[str] = []
    provision(make_federation("alder", "beech"), tmp_path / "out", said.append)
    assert [s for s in said if s.startswith("birch: the configuration no longer names it")]
    assert [s for s in said if s.startswith("beech: new kit")]
    assert (tmp_path / "out" / "birch" / "startup").is_dir()


def test_another_deployment_is_refused_and_changes_nothing(
    tmp_path: Path, make_federation: Callable[..., Federation]
) -> None:
    out = tmp_path / "out"
    provision(make_federation("alder", "birch"), out, lambda _: None)
    before = everything(out)
    with pytest.raises(ConfigError) as caught:
        provision(make_federation("alder", "birch", "dogwood", port=9002), out, lambda _: None)
    assert len(caught.value.problems) == 3  # the server and both sites; the coordinator uses the other port
    assert all("put the configuration back" in p for p in caught.value.problems)
    assert everything(out) == before


def test_kits_without_their_root_are_refused(tmp_path: Path, make_federation: Callable[..., Federation]) -> None:
    out = tmp_path / "out"
    provision(make_federation("alder"), out, lambda _: None)
    (out / AUTHORITY / "cert.json").unlink()
    with pytest.raises(ConfigError, match=r"authority/cert\.json; put it back"):
        provision(make_federation("alder", "birch"), out, lambda _: None)


@pytest.mark.parametrize("there", [False, True])
def test_a_failure_leaves_out_as_it_was(
    there: bool, tmp_path: Path, make_federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if there:
        provision(make_federation("alder"), out, lambda _: None)
    before = everything(tmp_path)

    def fail(*_: object) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(module, "policy_template", fail)
    with pytest.raises(FederationError, match="disk full"):
        provision(make_federation("alder", "birch"), out, lambda _: None)
    assert everything(tmp_path) == before
    assert out.exists() == there


def test_a_kit_lost_between_is_made_again_from_its_certificate(
    tmp_path: Path, make_federation: Callable[..., Federation]
) -> None:
    out = tmp_path / "out"
    kits = provision(make_federation("alder"), out, lambda _: None)
    key = read_kit(kits["alder"]).key.read_bytes()
    kits["alder"].rename(tmp_path / "away")
    provision(make_federation("alder"), out, lambda _: None)
    assert read_kit(out / "alder").key.read_bytes() == key


def test_a_site_may_reach_the_server_another_way(tmp_path: Path, make_federation: Callable[..., Federation]) -> None:
    federation = make_federation("alder", "birch", port=9002)
    kits = provision(federation, tmp_path / "out", lambda _: None, {"alder": ("proxy.example.org", 7)})
    assert read_kit(kits["alder"]).address == ("proxy.example.org", 7)
    assert read_kit(kits["birch"]).address == ("localhost", 9002)
    assert "proxy.example.org" in (kits["alder"] / "README.md").read_text()
    with pytest.raises(ConfigError, match="'elm' is no site"):
        provision(federation, tmp_path / "other", lambda _: None, {"elm": ("localhost", 7)})


def test_a_host_that_is_none_is_refused(tmp_path: Path, make_federation: Callable[..., Federation]) -> None:
    with pytest.raises(ConfigError, match=r"deployment: FLARE refuses it: .*not a host"):
        provision(make_federation("alder", host="not a host"), tmp_path / "out", lambda _: None)
    assert list(tmp_path.iterdir()) == []
