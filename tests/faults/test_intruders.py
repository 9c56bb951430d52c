"""Copied kits, foreign certificates, foreign and replayed jobs in a real federation: nobody is let in, nothing runs."""

import json
import shutil
import socket
import ssl
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from nvflare.fuel.hci.client import file_transfer
from nvflare.lighter.utils import sign_folders

from clinifed.aggregators.run_state import STATE_FILE, RunState
from clinifed.contract import Contract
from clinifed.files import read_lines
from clinifed.jobs.kit import read_kit
from clinifed.jobs.kit_processes import LocalKits, connected_sites, coordinator_session
from clinifed.jobs.prepare import write_policy
from clinifed.jobs.provision import AUTHORITY, provision
from clinifed.jobs.recipe import FederationRecipe, new_run

from .federation import SITES, LiveFederation, Outcome, copy_kit

pytestmark = pytest.mark.faults


def job_folder(contract: Contract, run: str, to: Path) -> Path:
    """A job as the coordinator exports it, unsigned."""
    FederationRecipe(contract, run).write(to)
    return to / contract.federation


def configured(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """What a site is told to run, changed."""

    def spoil(job: Path) -> None:
        path = job / "app" / "config" / "config_fed_client.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return spoil


def ended(session: Any, jobs: Mapping[str, str], patience_s: float = 120.0) -> dict[str, str]:
    """How each of the jobs (what → id) ended, in FLARE's words."""
    deadline = time.monotonic() + patience_s
    while True:
        states = {what: str(session.get_job_meta(job)["status"]) for what, job in jobs.items()}
        if all(state.startswith("FINISHED") for state in states.values()) or time.monotonic() > deadline:
            return states
        time.sleep(0.5)


def logged(folder: Path, text: str) -> bool:
    """Whether a log of that job's process, at that site, has ``text``."""
    return any(text in path.read_text(errors="replace") for path in folder.glob("*log*.txt"))


@dataclass
class Watched:
    """A run, during which a copy of cedar's kit asked for cedar's place."""

    outcome: Outcome
    job: Path  # as it was submitted, signed
    alerts: int
    copy_tried: bool
    copy_ran: bool
    same_process: bool


@pytest.fixture(scope="module")
def watched(started: LiveFederation, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    folder = tmp_path_factory.mktemp("copied")
    kits = {"copy": copy_kit(started.paths["cedar"], folder / "kit")}
    copy = LocalKits(kits, f"copy-{uuid.uuid4().hex}", folder / "logs", started.kits.environment)
    started.clear_faults()
    started.kits.start()
    started.kits.wait_connected(SITES, 120)
    log = started.paths["server"] / "log.txt"

    def alerts() -> int:
        return log.read_text().count("SECURITY ALERT: cedar")

    known, first = alerts(), [process.pid for process in started.kits.processes("cedar", "parent")]
    with copy:
        copy.start()
        outcome = started.run({"rounds": 2})
        deadline = time.monotonic() + 60
        while alerts() == known and time.monotonic() < deadline:
            time.sleep(0.5)
        # Refused, it ends, and its daemon starts it anew every few seconds: at any moment one of the two is there.
        tried, ran = bool(copy.processes("copy")), bool(copy.processes("copy", "job"))
        copy.kill()
    folder = next((started.home / "runs" / outcome.run / "jobs").iterdir()) / outcome.contract.federation
    same = [process.pid for process in started.kits.processes("cedar", "parent")] == first
    return Watched(outcome, folder, alerts() - known, tried, ran, same)


def test_a_job_that_is_replayed_on_a_server_that_forgot_it_costs_no_site_anything(
    live: LiveFederation, watched: Watched
) -> None:
    outcome = watched.outcome
    live.approve(live.federation(rounds=2), outcome.contract)
    spent = live.spent()
    shutil.rmtree(live.server_run(outcome.run))
    with coordinator_session(live.admin, 60) as session:
        ended(session, {"forgotten": session.submit_job(str(watched.job))})
    assert live.spent() == spent
    # The sites sent what they had released before: the same bytes, and so the same model.
    state = RunState(live.server_run(outcome.run), outcome.run, outcome.contract)
    assert [entry["nonces"] for entry in state.rounds] == [entry["nonces"] for entry in outcome.rounds]
    assert all((state.delta[name] == value).all() for name, value in outcome.state.delta.items())


# --- jobs that the sites do not permit --------------------------------------------------------------------------------

CODE = "from pathlib import Path\nPath({mark!r}).touch()\nfrom clinifed.executors.flare import SiteExecutor\n"


# What the server refuses before a site hears of it; what a site itself makes of such jobs is in test_door.py.
SERVER_REFUSES = {
    "own code": "BYOC not permitted",
    "unsigned": "unsigned job rejected",
    "tampered": "does not pass signature verification",
}


def unchanged(job: Path) -> None:
    """As the coordinator exports it."""


def foreign_class(config: dict[str, Any]) -> None:
    config["executors"][0]["executor"] = {"path": "nvflare.app_common.np.np_trainer.NPTrainer", "args": {}}


def own_filter(config: dict[str, Any]) -> None:
    filters = [{"path": "clinifed.executors.filters.ReleaseFilter", "args": {}}]
    config["task_result_filters"] = [{"tasks": ["train"], "filters": filters}]


def function_of_ours(mark: str) -> Callable[[dict[str, Any]], None]:
    """A "class" that is a function of the installed package: FLARE would call it with the job's own arguments."""

    def change(config: dict[str, Any]) -> None:
        call = {"path": "clinifed.files.append_line", "args": {"path": mark, "content": "x"}}
        config["components"].append({"id": "call", **call})

    return change


def own_code(mark: str) -> Callable[[Path], None]:
    def spoil(job: Path) -> None:
        custom = job / "app" / "custom"
        custom.mkdir()
        (custom / "brought.py").write_text(CODE.format(mark=mark))

        def run_it(config: dict[str, Any]) -> None:
            config["executors"][0]["executor"]["path"] = "brought.SiteExecutor"

        configured(run_it)(job)

    return spoil


def tampering(folder: str, key: Any, certificate: Any) -> None:
    """Signed, and then changed."""
    sign_folders(folder, key, certificate)
    path = Path(folder) / "app" / "config" / "config_fed_client.json"
    path.write_text(path.read_text().replace("task_result_filters", "task_result_filtres"))


def test_a_job_that_sites_or_server_do_not_permit_runs_nowhere(
    live: LiveFederation, watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = live.server_run(watched.outcome.run) / STATE_FILE
    state = known.read_bytes()
    federation = live.federation()
    contract = live.contract(federation)
    # One site approved nothing, one knows another coordinator, one would take part: the quorum is two.
    live.approve(federation, contract, without=("birch",))
    live.policies["alder"] = live.policies["alder"].model_copy(update={"coordinators": ("another@consortium.org",)})
    write_policy(live.paths["alder"] / "local", live.policies["alder"])
    mark = tmp_path / "ran"  # what foreign code would make
    jobs: dict[str, tuple[Callable[[Path], None], Callable[..., None]]] = {
        "not approved": (unchanged, sign_folders),
        "foreign class": (configured(foreign_class), sign_folders),
        "own filter": (configured(own_filter), sign_folders),
        "function of ours": (configured(function_of_ours(str(mark))), sign_folders),
        "own code": (own_code(str(mark)), sign_folders),
        "unsigned": (unchanged, lambda *_: None),
        "tampered": (unchanged, tampering),
    }
    runs = {what: new_run() for what in jobs}
    before = live.spent()
    with coordinator_session(live.admin, 60) as session:
        submitted = {}
        for what, (spoil, sign) in jobs.items():
            folder = job_folder(contract, runs[what], tmp_path / what.replace(" ", "-"))
            spoil(folder)
            monkeypatch.setattr(file_transfer, "sign_folders", sign)
            submitted[what] = session.submit_job(str(folder))
        monkeypatch.undo()
        again = {"again": session.submit_job(str(watched.job))}  # the coordinator's own, of a run that is over
        states = ended(session, submitted | again)
        details = {what: str(session.get_job_meta(job).get("job_deploy_detail")) for what, job in submitted.items()}
    assert not mark.exists(), "code of a job ran"
    assert {
        what: s for what, s in states.items() if not s.startswith("FINISHED") or ("COMPLETED" in s) != (what in again)
    } == {}
    for run in runs.values():
        assert not (live.server_run(run) / STATE_FILE).exists(), "no round was done"
    assert live.spent() == before
    assert known.read_bytes() == state
    # Each for its own reason, told where it belongs: a site's to the site, a return code to the server.
    told = {e["site"]: e.get("reason") for e in read_lines(live.server_run(runs["not approved"]) / "events.jsonl")[1:4]}
    assert told == {"alder": "policy", "birch": "policy", "cedar": None}
    job = submitted["not approved"]
    assert logged(live.paths["alder"] / job, "is none of ['another@consortium.org']")
    assert logged(live.paths["birch"] / job, f"contract {contract.sha256()} is not among approved_contracts")
    for site in SITES:
        assert logged(live.paths[site] / submitted["foreign class"], "NotAuthorized"), site
        own = live.paths[site] / submitted["own filter"]
        assert logged(own, "filters of its own") or logged(own, "NotAuthorized"), site
        for what in SERVER_REFUSES:
            assert not (live.paths[site] / submitted[what]).exists(), f"{site}: {what}"
    for what, why in SERVER_REFUSES.items():
        assert why in details[what], what
        assert states[what] == "FINISHED:FAILED_TO_RUN", what


# --- who is let in ----------------------------------------------------------------------------------------------------


def test_a_copied_kit_is_refused_while_the_first_is_alive(live: LiveFederation, watched: Watched) -> None:
    assert watched.alerts > 0
    assert watched.copy_tried
    assert not watched.copy_ran
    assert watched.same_process
    assert watched.outcome.accepted() == [list(SITES)] * 2
    assert {e["event"] for e in watched.outcome.events} & {"site_lost", "site_back"} == set()


def issued(kit: Path, authority: Path, days: int, to: Path) -> tuple[Path, Path]:
    """A certificate in cedar's name and for cedar's key, of ``authority``, valid for ``days`` from yesterday on."""
    old, state = read_kit(kit).certificate, json.loads((authority / "cert.json").read_text())
    root = x509.load_pem_x509_certificate(state["root_cert"].encode())
    key = serialization.load_pem_private_key(state["root_pri_key"].encode(), None)
    begins = datetime.now(UTC) - timedelta(days=abs(days) + 1)
    builder = x509.CertificateBuilder(root.subject, old.subject, old.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(begins).not_valid_after(datetime.now(UTC) + timedelta(days=days))
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    path = to / f"{uuid.uuid4().hex}.crt"
    path.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return path, read_kit(kit).key


def spoken_to(live: LiveFederation, certificate: tuple[Path, Path] | None) -> bool:
    """Whether the server goes on with one who shows this certificate: it answers, or waits for more."""
    kit = read_kit(live.paths["cedar"])
    context = ssl.create_default_context(cafile=str(kit.startup / "rootCA.pem"))
    context.check_hostname = False
    if certificate is not None:
        context.load_cert_chain(*certificate)
    with socket.create_connection(kit.address, 10) as plain:
        try:
            with context.wrap_socket(plain) as secure:
                secure.settimeout(5)
                secure.sendall(b"GET / HTTP/1.1\r\nHost: server\r\n\r\n")
                return bool(secure.recv(100))
        except TimeoutError:
            return True
        except (ssl.SSLError, ConnectionError):
            return False


def test_a_certificate_that_expired_or_is_of_a_foreign_root_is_not_let_in(live: LiveFederation, tmp_path: Path) -> None:
    kit, ours = live.paths["cedar"], live.paths["server"].parent / AUTHORITY
    provision(live.federation(), tmp_path / "kits", lambda text: None)  # the same federation, by somebody else
    theirs = tmp_path / "kits" / AUTHORITY
    own = (kit / "startup" / "client.crt", kit / "startup" / "client.key")
    assert spoken_to(live, own)
    assert spoken_to(live, issued(kit, ours, 1, tmp_path)), "the construction is that of an honest certificate"
    assert not spoken_to(live, issued(kit, ours, -1, tmp_path)), "expired"
    assert not spoken_to(live, issued(kit, theirs, 1, tmp_path)), "of a foreign root"
    assert not spoken_to(live, None)
    stranger = tmp_path / "kits" / "cedar" / "startup"
    assert not spoken_to(live, (stranger / "client.crt", stranger / "client.key"))
    with coordinator_session(live.admin, 60) as session:
        assert set(connected_sites(session)) == set(SITES)
