"""Processes that die in the middle of a round, or after each task: no epsilon is lost, none is invented."""

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml

from clinifed.files import read_lines
from clinifed.privacy.accountant import cost_units
from clinifed.privacy.officer import ledger_report

from .conftest import CONFIGS, command, processes_of

pytestmark = pytest.mark.e2e
PLAN = yaml.safe_load((CONFIGS / "smoke.yaml").read_text())
STEPS = 100  # local steps of a round: long enough to be killed in the middle of


def trainer_of(run: Path, site: str) -> psutil.Process | None:
    """The trainer's process of one site: the one that writes its log."""
    log = str(run / "sites" / site / "trainer.log")
    for process in psutil.process_iter():
        try:
            if (
                "clinifed.executors.child" in process.cmdline()
                and str(Path(f"/proc/{process.pid}/fd/2").readlink()) == log
            ):
                return process
        except (psutil.Error, OSError):
            continue
    return None


def charges(run: Path, site: str) -> list[int]:
    return [r["round"] for r in read_lines(run / "sites" / site / "ledger.jsonl") if r["kind"] == "charge"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Three rounds with one in reserve; alder's trainer is killed right after the charge of round 1."""
    home = tmp_path_factory.mktemp("killed")
    run, config = home / "run", home / "federation.yaml"
    training = {"local_epochs": STEPS, "train": "projection", "learning_rate": 0.01}
    privacy = {**PLAN["privacy"], "reserve_rounds": 1}
    config.write_text(yaml.safe_dump({**PLAN, "rounds": 3, "training": training, "privacy": privacy}))
    victim = None
    with subprocess.Popen(
        command("simulate", config, "--out", run, "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=home
    ) as process:
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if victim is None and charges(run, "alder") == [0]:
                victim = trainer_of(run, "alder")
            if victim is not None and charges(run, "alder") == [0, 1]:
                victim.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, err.decode()
    assert victim is not None, "the trainer was not found"
    return run, yaml.safe_load(out)


def test_the_site_goes_on_in_the_same_round_with_a_charge_of_the_reserve(killed):
    run, summary = killed
    assert charges(run, "alder") == [0, 1, 1, 2]
    assert charges(run, "birch") == [0, 1, 2]
    assert all(r["accepted"] for site in summary["sites"].values() for r in site["rounds"])
    (job,) = ledger_report(run / "sites" / "alder" / "ledger.jsonl")["jobs"]
    assert (job["charges"], job["releases"], job["lost_charges"], job["finished"]) == (4, 3, 1, True)


def test_epsilon_is_the_ledgers_sum_and_at_most_the_lost_charge_more_than_uninterrupted(killed):
    run, summary = killed
    reports = {name: ledger_report(run / "sites" / name / "ledger.jsonl") for name in summary["sites"]}
    for name, report in reports.items():
        assert summary["sites"][name]["privacy"]["epsilon"] == report["epsilon"]
        assert report["reserved_units"] == 0
    unit = STEPS * cost_units(summary["sites"]["alder"]["privacy"]["noise_multiplier"])
    uninterrupted = reports["birch"]["spent_units"]
    assert uninterrupted == 3 * unit
    assert reports["alder"]["spent_units"] == uninterrupted + unit
    assert reports["alder"]["epsilon"] == pytest.approx(PLAN["privacy"]["epsilon"], rel=1e-6)  # all four were planned


def test_no_process_is_left(killed):
    assert processes_of(killed[0]) == []
    assert trainer_of(killed[0], "alder") is None


def test_fewer_threads_than_sites_a_new_process_for_each_task_cost_the_same_epsilon(clinifed, smoke, tmp_path):
    run, plan = tmp_path / "run", tmp_path / "two.yaml"
    two = {**PLAN, "sites": {name: PLAN["sites"][name] for name in ("alder", "birch")}}
    two |= {"min_clients": 2, "max_clients": 2, "aggregation": {**PLAN["aggregation"], "quorum": 2}}
    plan.write_text(yaml.safe_dump(two))
    done = clinifed("simulate", plan, "--out", run, "--threads", 1, "--json")
    assert done.code == 0, done.err
    summary = done.json()
    assert set(summary["sites"]) == {"alder", "birch"}
    for name, site in summary["sites"].items():
        log = (run / "sites" / name / "trainer.log").read_text()
        assert log.count("INFO clinifed.models.backbone") >= 2, "the process was not recycled"
        # Sigma is made for the rounds: as many as there are cost what was asked for.
        assert site["privacy"]["epsilon"] == pytest.approx(smoke.summary["sites"][name]["privacy"]["epsilon"], rel=1e-6)
        report = ledger_report(run / "sites" / name / "ledger.jsonl")
        assert site["privacy"]["epsilon"] == report["epsilon"]
        assert charges(run, name) == [0, 1]
        assert report["reserved_units"] == 0
    assert processes_of(run) == []
