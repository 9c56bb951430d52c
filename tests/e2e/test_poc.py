"""The sites of a configuration as real FLARE processes, step by step as a data scientist types it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file

from clinifed.jobs.poc import local_kits
from clinifed.jobs.recipe import FederationRecipe
from clinifed.jobs.submit import read_run

from .conftest import CONFIGS, command, processes_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]
PLAN = {
    **yaml.safe_load((CONFIGS / "smoke.yaml").read_text()),
    "rounds": 4,
    "privacy": "off",  # so that two runs of it give one model
    "aggregation": {"quorum": 3, "round_timeout_s": 120, "norm_bound": 1000.0},
    "deployment": {"rounds_per_job": 3},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("poc") / "federation.yaml"
    path.write_text(yaml.safe_dump(PLAN))
    return path


@pytest.fixture(scope="module")
def up(config, clinifed):
    run = config.parent / "run"
    done = clinifed("poc", "up", config, "--out", run)
    assert done.code == 0, done.err
    yield run
    done = clinifed("poc", "down", run)
    assert done.code == 0, done.err
    assert processes_of(run) == []


def interrupted(words: list[str], when: str, timeout_s: float = 300) -> tuple[int, str]:
    """Run a command, and press Ctrl-C once it has said ``when``."""
    said = ""
    with subprocess.Popen(
        words,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + timeout_s
        assert process.stderr is not None
        for line in process.stderr:
            said += line
            if when in line:
                process.send_signal(signal.SIGINT)
                break
            assert time.monotonic() < deadline, said
        said += process.stderr.read()
        return process.wait(120), said


def test_a_run_whose_coordinator_went_away_goes_on_and_gives_the_model_of_a_simulation(up, config, clinifed):
    code, said = interrupted(command("poc", "submit", up), "round 1 of 4")
    assert code == 130, said
    assert "the run goes on at the server" in said
    status = clinifed("status", up, "--json")
    assert status.code == 0, status.err
    assert set(status.json()["sites"]) == set(PLAN["sites"])
    assert len(status.json()["jobs"]) == 1
    done = clinifed("poc", "submit", up, "--json")
    assert done.code == 0, done.err
    summary = done.json()
    assert summary["rounds"] == 4
    assert all(r["accepted"] for site in summary["sites"].values() for r in site["rounds"])
    jobs = [json.loads(line) for line in (up / "jobs.jsonl").read_text().splitlines()]
    assert [job["until"] for job in jobs] == [3, 4], "a chain, and no job too many"
    simulated = config.parent / "simulated"
    other = clinifed("simulate", config, "--out", simulated, "--json")
    assert other.code == 0, other.err
    assert summary["metrics"] == other.json()["metrics"]
    mine, theirs = (load_file(p / "checkpoint" / "model.safetensors") for p in (up, simulated))
    assert set(mine) == set(theirs)
    for name, value in mine.items():
        assert abs(value - theirs[name]).max() < 1e-6, name


def test_our_exported_job_is_an_ordinary_job_for_nvflare_job_submit(up):
    content, _, contract = read_run(up)
    recipe = FederationRecipe(contract)
    recipe.write(up / "exported")
    tools = Path(sys.executable).parent
    done = subprocess.run(
        [
            *(tools / "nvflare", "job", "submit"),
            *("-j", up / "exported" / contract.federation),
            *("--startup-kit", content["admin_kit"]),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    state = up / "kits" / "server" / "clinifed-runs" / recipe.run_name / "state.json"
    deadline = time.monotonic() + 180
    while not state.exists() or json.loads(state.read_text())["next_round"] < contract.rounds:
        assert time.monotonic() < deadline, "the job did not finish"
        time.sleep(1)


def test_ctrl_c_in_the_one_command_leaves_no_process_and_says_so(config, tmp_path):
    run = tmp_path / "run"
    code, said = interrupted(command("poc", config, "--out", run), "round 1 of 4")
    assert code == 130, said
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    assert processes_of(run) == []
    kits = local_kits(run)
    assert not [p for name in kits.kits for p in kits.processes(name)]
