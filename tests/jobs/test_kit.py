"""What a kit holds: rights, limits and storage, asked of FLARE's own classes."""

import math
import shutil
from pathlib import Path

import pytest
from nvflare.fuel.sec.authz import AuthzContext, Person
from nvflare.security.security import COMMAND_CATEGORIES, CommandCategory, FLAuthorizer

from clinifed.errors import ConfigError
from clinifed.jobs.kit import (
    AUTHORIZATION,
    COORDINATOR_ROLE,
    TIME_LIMITS,
    job_rules,
    read_kit,
    server_resources,
    site_resources,
)
from clinifed.jobs.kit_storage import KitStorage

COORDINATOR = Person("coordinator@consortium.org", "consortium", COORDINATOR_ROLE)
STRANGER = Person("other@consortium.org", "consortium", COORDINATOR_ROLE)


def may(right: str, submitter: Person = COORDINATOR, user: Person = COORDINATOR) -> bool:
    return FLAuthorizer("alder", AUTHORIZATION).authorize(AuthzContext(right, user, submitter))[0]


@pytest.mark.parametrize(
    "right", ["submit_job", "abort_job", "delete_job", "download_job", "list_jobs", "check_status"]
)
def test_the_coordinator_may_run_its_own_jobs(right: str) -> None:
    assert may(right)


@pytest.mark.parametrize("right", ["abort_job", "delete_job", "download_job"])
def test_nobody_touches_another_s_jobs(right: str) -> None:
    assert not may(right, STRANGER)


COMMANDS = [c for c, k in COMMAND_CATEGORIES.items() if k in (CommandCategory.OPERATE, CommandCategory.SHELL_COMMANDS)]


@pytest.mark.parametrize("right", ["byoc", "clone_job", "server-predeployed-flwr", *COMMANDS])
@pytest.mark.parametrize("role", ["project_admin", "org_admin", "lead", "member"])
def test_nobody_brings_code_operates_or_reads_a_machine(role: str, right: str) -> None:
    own = Person("admin", "alder", role)
    assert not may(right, own, own)


def test_only_installed_classes_and_no_logs() -> None:
    assert job_rules("site")["class_allow_list"] == ["clinifed.executors.flare.SiteExecutor"]
    for role, resources in (("site", site_resources()), ("server", server_resources())):
        assert job_rules(role).items() <= resources.items()
        ids = [c["id"] for c in resources["components"]]
        assert ids.count("process_launcher") == 1
        assert not {"site_log_streamer", "log_receiver"} & set(ids)


def test_every_limit_is_finite_and_above_what_kits_say() -> None:
    limits = [most for limits in TIME_LIMITS.values() for most in limits.values()]
    assert all(math.isfinite(most) for most in limits)
    server = server_resources()["servers"][0]
    assert server["heart_beat_timeout"] <= TIME_LIMITS["server"]["servers[0].heart_beat_timeout"]


def test_storage_moves_with_its_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = tmp_path / "kit"
    kit.mkdir()
    monkeypatch.chdir(kit)
    KitStorage(".").create_object("storage/jobs/one", b"job", {"name": "one"})
    assert (kit / "storage" / "jobs" / "one" / "data").read_bytes() == b"job"
    monkeypatch.chdir(tmp_path)
    shutil.move(kit, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved = KitStorage(".")
    assert moved.list_objects("storage/jobs") == ["storage/jobs/one"]
    assert moved.get_data("storage/jobs/one") == b"job"


def test_storage_is_owner_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    KitStorage("storage/snapshots")
    assert (tmp_path / "storage" / "snapshots").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["fed_client.json", "client.crt", "rootCA.pem"])
def test_a_damaged_startup_file_is_said(name: str, kits: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(kits["alder"], tmp_path / "alder")
    (tmp_path / "alder" / "startup" / name).write_text("{")
    with pytest.raises(ConfigError, match=rf"startup/{name}: cannot be read"):
        read_kit(tmp_path / "alder")
