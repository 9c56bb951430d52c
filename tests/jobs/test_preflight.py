"""Preflight: each thing that a kit must be, broken on its own, is said; all together are said at once."""

import json
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from nvflare.lighter.constants import ProvFileName
from nvflare.lighter.utils import Identity, generate_cert, generate_keys, load_private_key, serialize_cert, sign_folders

from clinifed.errors import ConfigError
from clinifed.jobs import kit_checks
from clinifed.jobs.kit import AUTHORIZATION, SERVER, read_kit
from clinifed.jobs.preflight import CHECKS, preflight
from clinifed.jobs.provision import AUTHORITY
from clinifed.policy import SitePolicy
from clinifed.privacy.ledger import Ledger

COORDINATOR = "coordinator@consortium.org"
FillIn = Callable[..., SitePolicy]


@pytest.fixture
def copies(kits: dict[str, Path], tmp_path: Path, fill_in: FillIn) -> dict[str, Path]:
    """Kits to break: the server's, a site's that its hospital filled in, the coordinator's."""
    made = {}
    for name in (SERVER, "alder", COORDINATOR):
        made[name] = tmp_path / name
        shutil.copytree(kits[name], made[name])
    fill_in(made["alder"], tmp_path / "secure")
    return made


def problems_of(kit: Path) -> list[str]:
    return list(preflight(kit, flare=False).problems)


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def root_key(kits: dict[str, Path]) -> Any:
    state = json.loads((kits[SERVER].parent / AUTHORITY / "cert.json").read_text())
    return load_private_key(state["root_pri_key"])


@pytest.mark.parametrize("name", [SERVER, "alder", COORDINATOR])
def test_a_kit_as_it_was_sent_and_filled_in_passes(name: str, copies: dict[str, Path]) -> None:
    found = preflight(copies[name], flare=False)
    assert found.problems == ()
    assert found.to_dict()["ok"] is True
    assert any(note.startswith("certificate valid until") for note in found.notes)


def test_what_a_site_may_run_is_listed(copies: dict[str, Path]) -> None:
    notes = preflight(copies["alder"], flare=False).notes
    assert f"approves contract {'ab' * 32}" in notes
    assert f"accepts jobs of {COORDINATOR}" in notes
    assert any(note.startswith("ledger: 1 records, head ") for note in notes)


def test_an_unfilled_kit_says_every_missing_key_of_the_policy(kits: dict[str, Path]) -> None:
    said = "\n".join(problems_of(kits["birch"]))
    for key in ("manifest", "ledger", "signing_key", "cache", "diary", "budget.epsilon", "budget.delta"):
        assert f"birch.yaml: {key}: " in said


def test_what_is_no_kit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a startup kit; .* must hold one of fed_server\.json"):
        preflight(tmp_path)


def _flip(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def _authorization(role: str, rights: Any) -> Callable[[Path], None]:
    return lambda kit: edit(kit / "local/authorization.json", lambda c: c["permissions"].update({role: rights}))


def _resources(**values: Any) -> Callable[[Path], None]:
    return lambda kit: edit(kit / "local/resources.json", lambda c: c.update(values))


def _heart_beat(value: Any) -> Callable[[Path], None]:
    return lambda kit: edit(kit / "local/resources.json", lambda c: c["servers"][0].update(heart_beat_timeout=value))


def _job_store(folder: str) -> Callable[[Path], None]:
    def change(content: Any) -> None:
        store = next(c for c in content["components"] if c["id"] == "job_store")
        store["args"]["folder"] = folder

    return lambda kit: edit(kit / "local/resources.json", change)


def _rights(**values: str) -> dict[str, str]:
    return {**AUTHORIZATION["permissions"]["lead"], **values}


def _without(name: str) -> Callable[[Path], None]:
    return lambda kit: edit(
        kit / "local/resources.json",
        lambda c: c.update(components=[part for part in c["components"] if part["id"] != name]),
    )


BREAKS: list[tuple[str, Callable[[Path], None], str]] = [
    ("alder", lambda k: _flip(k / "startup/sub_start.sh"), "sub_start.sh: not as the root in rootCA.pem signed it"),
    (
        SERVER,
        lambda k: _flip(k / "startup/fed_server.json"),
        "fed_server.json: not as the root in rootCA.pem signed it",
    ),
    (COORDINATOR, lambda k: (k / "startup/signature.json").unlink(), "signature.json: missing or damaged"),
    ("alder", lambda k: (k / "startup/extra.sh").write_text(""), "extra.sh: not signed by the federation's root"),
    ("alder", lambda k: (k / "startup/stop_fl.sh").unlink(), "stop_fl.sh: signed, but not there"),
    (SERVER, lambda k: (k / "startup/server.key").chmod(0o640), "server.key: readable by others; say chmod 600"),
    ("alder", lambda k: (k / "local/resources.json").chmod(0o666), "resources.json: writable by others"),
    ("alder", lambda k: (k / "local/privacy.json").unlink(), "local/privacy.json: missing"),
    (SERVER, lambda k: (k / "local/x__p_resources.json").write_text("{}"), "FLARE would take settings or code from it"),
    ("alder", lambda k: (k / "local/custom").mkdir(), "local/custom: FLARE would take settings or code from it"),
    ("alder", _resources(class_allow_list=["*"]), "class_allow_list: ['*']"),
    (SERVER, _resources(class_list_enforcement_mode="warn"), "class_list_enforcement_mode: 'warn'"),
    ("alder", _resources(allow_log_streaming=True), "allow_log_streaming: True"),
    (
        "alder",
        lambda k: edit(k / "local/privacy.json", lambda c: c["scopes"][0]["task_result_filters"].append({"name": "X"})),
        "scopes[0].task_result_filters: on the way out:",
    ),
    ("alder", lambda k: edit(k / "local/privacy.json", lambda c: c.update(default_scope="no")), "names no scope"),
    ("alder", _authorization("lead", _rights(byoc="any")), "permissions.lead.byoc: permitted"),
    (SERVER, _authorization("lead", _rights(byoc="o:site")), "permissions.lead.byoc: permitted"),
    (SERVER, _authorization("project_admin", "any"), "permissions.project_admin.byoc: permitted"),
    ("alder", _authorization("org_admin", {"shell_commands": "o:site"}), "permissions.org_admin.cat: permitted"),
    ("alder", _authorization("member", {"byoc": "not n:someone"}), "permissions.member.byoc: permitted"),
    (SERVER, lambda k: (k / "local/authorization.json").write_text("{}"), "authorization.json: FLARE cannot read it"),
    ("alder", _without("process_launcher"), "components.process_launcher: None; it must be clinifed"),
    (SERVER, _without("stale_job_sweeper"), "components.stale_job_sweeper: None"),
    (SERVER, _without("identity_guard"), "components.identity_guard: None"),
    (SERVER, _heart_beat(600), "servers[0].heart_beat_timeout: 600; it must be more than 0 and at most 60 seconds"),
    (SERVER, _heart_beat(0), "servers[0].heart_beat_timeout: 0; it must be"),
    (SERVER, _heart_beat(None), "servers[0].heart_beat_timeout: None; it must be"),
    ("alder", _resources(client={}), "client.retry_timeout: None; it must be"),
    (COORDINATOR, _resources(admin={}), "admin.login_timeout: None; it must be"),
    (SERVER, _job_store("/tmp/nvflare/jobs-storage"), "'/tmp/nvflare/jobs-storage' lies outside the kit"),
    (SERVER, _job_store("../jobs"), "'../jobs' lies outside the kit"),
]


@pytest.mark.parametrize(("name", "damage", "says"), BREAKS, ids=[says[:50] for _, _, says in BREAKS])
def test_each_defect_is_said(name: str, damage: Callable[[Path], None], says: str, copies: dict[str, Path]) -> None:
    damage(copies[name])
    problems = problems_of(copies[name])
    assert any(says in problem for problem in problems), problems
    assert all(str(copies[name]) in problem for problem in problems)


def test_every_defect_is_said_at_once(copies: dict[str, Path]) -> None:
    gone = "local/privacy.json: missing"  # nothing else could be said of that file
    broken = [(damage, says) for name, damage, says in BREAKS if name == "alder" and says != gone]
    assert len(broken) > 8
    for damage, _ in broken:
        damage(copies["alder"])
    said = "\n".join(problems_of(copies["alder"]))
    assert [says for _, says in broken if says not in said] == []


def test_every_check_is_asked_of_some_kit() -> None:
    asserted = {check for _, check in CHECKS.values()}
    assert asserted == {getattr(kit_checks, name) for name in kit_checks.__all__ if name != "writable"}


def test_unsigned_jobs_accepted_are_said_though_signed(copies: dict[str, Path], kits: dict[str, Path]) -> None:
    kit = copies["alder"]
    edit(kit / "startup/fed_client.json", lambda c: c.update(require_signed_jobs=False))
    sign_folders(str(kit / "startup"), root_key(kits), signature_file=ProvFileName.SIGNATURE_JSON)
    (problem,) = problems_of(kit)
    assert "fed_client.json:require_signed_jobs: False; it must be true" in problem


def test_secure_logging_off_is_said_though_signed(copies: dict[str, Path], kits: dict[str, Path]) -> None:
    script = copies[SERVER] / "startup/sub_start.sh"
    script.write_text(
        script.read_text().replace("export NVFLARE_SECURE_LOGGING=true", "# export NVFLARE_SECURE_LOGGING")
    )
    sign_folders(str(script.parent), root_key(kits), signature_file=ProvFileName.SIGNATURE_JSON)
    (problem,) = problems_of(copies[SERVER])
    assert "sub_start.sh:NVFLARE_SECURE_LOGGING: not set" in problem


def test_an_old_flare_is_said(copies: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.8.1")
    assert "nvflare: version 2.8.1; install 2.9 or later" in problems_of(copies[SERVER])


@pytest.fixture
def reissue(copies: dict[str, Path], kits: dict[str, Path]) -> Iterator[Callable[..., None]]:
    """A kit with another certificate for its own key, everything else as the root would sign it."""

    def make(name: str, signer: Any, start: datetime, end: datetime) -> None:
        kit = read_kit(copies[name])
        own = serialization.load_pem_private_key(kit.key.read_bytes(), None).public_key()
        certificate = generate_cert(
            Identity(kit.name, "unit"), Identity("unit"), signer, own, not_valid_before=start, not_valid_after=end
        )
        kit.key.with_suffix(".crt").write_bytes(serialize_cert(certificate))
        sign_folders(str(kit.startup), root_key(kits), signature_file=ProvFileName.SIGNATURE_JSON)

    return make


def test_an_expired_certificate_is_said(
    copies: dict[str, Path], kits: dict[str, Path], reissue: Callable[..., None]
) -> None:
    now = datetime.now(UTC)
    reissue("alder", root_key(kits), now - timedelta(days=9), now - timedelta(days=1))
    (problem,) = problems_of(copies["alder"])
    assert "client.crt: expired on" in problem
    assert "ask the coordinator for a new kit" in problem


def test_a_certificate_of_the_future_is_said(
    copies: dict[str, Path], kits: dict[str, Path], reissue: Callable[..., None]
) -> None:
    now = datetime.now(UTC)
    reissue(SERVER, root_key(kits), now + timedelta(days=1), now + timedelta(days=9))
    (problem,) = problems_of(copies[SERVER])
    assert "server.crt: valid only from" in problem


def test_a_certificate_of_a_foreign_root_is_said(copies: dict[str, Path], reissue: Callable[..., None]) -> None:
    now = datetime.now(UTC)
    stranger, _ = generate_keys()
    reissue("alder", stranger, now - timedelta(days=1), now + timedelta(days=9))
    (problem,) = problems_of(copies["alder"])
    assert "client.crt: not issued by the root in rootCA.pem" in problem


def test_a_kit_under_a_foreign_root_is_said(copies: dict[str, Path]) -> None:
    key, public = generate_keys()
    root = generate_cert(Identity("unit"), Identity("unit"), key, public, ca=True)
    (copies["alder"] / "startup/rootCA.pem").write_bytes(serialize_cert(root))
    said = "\n".join(problems_of(copies["alder"]))
    assert "client.crt: not issued by the root in rootCA.pem" in said
    assert "fed_client.json: not as the root in rootCA.pem signed it" in said


def test_another_key_than_the_certificate_s_is_said(copies: dict[str, Path], kits: dict[str, Path]) -> None:
    shutil.copyfile(kits["birch"] / "startup/client.key", copies["alder"] / "startup/client.key")
    assert any("client.key: another key than that of client.crt" in p for p in problems_of(copies["alder"]))


def test_a_site_s_own_defects_are_said_at_once(kits: dict[str, Path], tmp_path: Path, fill_in: FillIn) -> None:
    kit = tmp_path / "alder"
    shutil.copytree(kits["alder"], kit)
    policy = fill_in(
        kit,
        tmp_path / "secure",
        approved_contracts=(),
        coordinators=(),
        cache=tmp_path / "nowhere" / "cache",
        basis=tmp_path / "basis.safetensors",
    )
    policy.signing_key.chmod(0o644)
    policy.manifest.unlink()
    policy.ledger.write_bytes(policy.ledger.read_bytes().replace(b"1e-05", b"1e-04"))
    said = "\n".join(problems_of(kit))
    for expected in (
        "approved_contracts: empty, so nothing may run",
        "coordinators: empty, so nobody may submit",
        f"cache: {tmp_path / 'nowhere'} cannot be written",
        "signing.key: a signing key must be readable by its owner alone",
        str(policy.manifest),
        str(policy.ledger),
        "basis.safetensors: cannot be read as a basis",
    ):
        assert expected in said


def test_an_exhausted_budget_is_said(copies: dict[str, Path], tmp_path: Path) -> None:
    from clinifed.policy import find_policy

    ledger = Ledger.of(find_policy(copies["alder"] / "local", "alder"))
    ledger.reserve("job", ledger.state().budget_units, "ab" * 32)
    (problem,) = problems_of(copies["alder"])
    assert "nothing is left for a job" in problem


def test_another_site_s_policy_is_said(copies: dict[str, Path], tmp_path: Path) -> None:
    path = copies["alder"] / "local/clinifed/alder.yaml"
    path.write_text(path.read_text().replace("site: alder", "site: birch"))
    (problem,) = problems_of(copies["alder"])
    assert "the policy is for site 'birch', but this is 'alder'" in problem
