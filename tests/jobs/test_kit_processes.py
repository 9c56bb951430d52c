"""Kits as processes: they come up, are found, stop, and come up again after everything was killed."""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clinifed.config import Federation
from clinifed.errors import ConfigError, FederationError
from clinifed.jobs.kit import SERVER
from clinifed.jobs.kit_flare import is_running
from clinifed.jobs.kit_processes import LocalKits, clear_stale, coordinator_session, free_ports
from clinifed.jobs.preflight import FLARE_CHECK, preflight
from clinifed.jobs.processes import end_processes, marked, marked_environment
from clinifed.jobs.provision import provision
from clinifed.policy import SitePolicy

SITES = ("alder", "birch", "cedar-2")
COORDINATOR = "coordinator@consortium.org"


def test_free_ports_are_different_and_free() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_what_a_killed_daemon_left_is_cleared(tmp_path: Path) -> None:
    for name in ("daemon_pid.fl", "pid.fl", "shutdown.fl", "restart.fl", "log.txt"):
        (tmp_path / name).write_text("1")
    clear_stale(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["log.txt"]


def test_a_name_that_is_no_kit_is_refused(kits: dict[str, Path], tmp_path: Path) -> None:
    local = LocalKits(kits, uuid.uuid4().hex, tmp_path)
    with pytest.raises(ConfigError, match="'elm' is none of the kits server, alder"):
        local.start(["elm"])


def test_no_answer_of_the_server_is_said(kits: dict[str, Path]) -> None:
    with (
        pytest.raises(FederationError, match=r"no answer of the server at localhost:8003 within 1 s .* is it started"),
        coordinator_session(kits[COORDINATOR], 1.0),
    ):
        pass


@pytest.fixture
def mark() -> Iterator[str]:
    name = uuid.uuid4().hex
    yield name
    end_processes(name, grace_s=0)


def test_only_what_carries_the_mark_and_more_is_ended(mark: str) -> None:
    def sleeper(kit: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"]
        environment = marked_environment(mark, None, CLINIFED_KIT=kit)
        process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()  # its environment is its own by now
        return process

    with sleeper("alder") as one, sleeper("birch") as other:
        assert {p.pid for p in marked(mark)} == {one.pid, other.pid}
        end_processes(mark, more={"CLINIFED_KIT": "alder"})
        assert one.wait(5) != 0
        assert other.poll() is None
        end_processes(mark, grace_s=0)
        assert other.wait(5) == -9
        assert marked(mark) == []


@pytest.fixture
def federation(make_federation: Callable[..., Federation]) -> Federation:
    port, admin_port = free_ports(2)
    return make_federation(*SITES, port=port, admin_port=admin_port)


@pytest.mark.e2e
def test_a_federation_comes_up_is_checked_is_killed_comes_up_again_and_stops(
    federation: Federation, tmp_path: Path, mark: str, fill_in: Callable[..., SitePolicy]
) -> None:
    shared = {p.name for p in Path(tempfile.gettempdir()).iterdir() if p.name.startswith("nvflare")}
    kits = provision(federation, tmp_path / "kits", lambda _: None)
    for site in SITES:
        fill_in(kits[site], tmp_path / "secure" / site)

    # Nothing runs: the server's kit passes FLARE's check; a site's cannot, and says what to do.
    assert preflight(kits[SERVER]).problems == ()
    (problem,) = preflight(kits["alder"]).problems
    assert "start the server, or open the way to it" in problem

    with LocalKits(kits, mark, tmp_path / "logs") as local:
        local.start([SERVER])
        with coordinator_session(kits[COORDINATOR], 60):
            pass
        # The server runs: a site passes FLARE's check with its dry run, before it is started.
        assert preflight(kits["alder"]).problems == ()
        local.start()
        local.wait_connected(SITES)
        for name in (SERVER, *SITES):
            assert len(local.processes(name, "daemon")) == len(local.processes(name, "parent")) == 1
        # All run: every kit passes, and nothing was displaced by being asked.
        sessions = {name: local.processes(name, "parent")[0].pid for name in SITES}
        before = (kits[SERVER] / "log.txt").read_text().count("already registered")
        for name, kit in kits.items():
            found = preflight(kit)
            assert found.problems == ()
            assert FLARE_CHECK in found.checks, name
        assert sessions == {name: local.processes(name, "parent")[0].pid for name in SITES}
        assert (kits[SERVER] / "log.txt").read_text().count("already registered") == before

        local.kill()
        assert marked(mark) == []
        # What the daemons left names processes of others by now.
        for name in SITES:
            (kits[name] / "daemon_pid.fl").write_text("1\n")
            (kits[name] / "pid.fl").write_text("1\n")
            (kits[name] / "shutdown.fl").touch()
        local.start()
        local.wait_connected(SITES)

        started = time.monotonic()
        local.stop(["birch"])
        assert time.monotonic() - started < 20
        assert local.processes("birch") == []
        assert local.processes("alder", "parent")
    assert marked(mark) == []
    assert {p.name for p in Path(tempfile.gettempdir()).iterdir() if p.name.startswith("nvflare")} == shared
    assert not [p for kit in kits.values() for p in kit.glob("*.fl")]
    assert not any((kit / "tmp").exists() for kit in kits.values())
    assert (kits[SERVER] / "storage" / "jobs").is_dir()


@pytest.mark.e2e
def test_flare_refuses_to_start_a_kit_whose_startup_was_changed(kits: dict[str, Path], tmp_path: Path) -> None:
    kit = tmp_path / SERVER
    shutil.copytree(kits[SERVER], kit)
    config = kit / "startup" / "fed_server.json"
    config.write_text(config.read_text().replace('"require_signed_jobs": true', '"require_signed_jobs": false'))
    command = [
        "-m",
        "nvflare.private.fed.app.server.server_train",
        "-s",
        "fed_server.json",
        "--set",
        "secure_train=true",
    ]
    done = subprocess.run(
        [sys.executable, *command, "config_folder=config", "-m", str(kit)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "not secure content" in done.stdout
    assert "fed_server.json" in done.stdout


def test_leaving_on_an_error_kills_everything(mark: str, kits: dict[str, Path], tmp_path: Path) -> None:
    kit = tmp_path / SERVER
    shutil.copytree(kits[SERVER], kit)
    # A kit whose daemon only waits: what is tested is the way out.
    (kit / "startup" / "sub_start.sh").write_text("#!/usr/bin/env bash\nwhile true; do sleep 1; done\n")
    local = LocalKits({SERVER: kit}, mark, tmp_path)

    def fail_in_the_middle() -> None:
        with local:
            local.start()
            deadline = time.monotonic() + 10
            while not local.processes(SERVER, "daemon"):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert not is_running(local.kits[SERVER])
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail_in_the_middle()
    assert marked(mark) == []
