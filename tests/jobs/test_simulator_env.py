"""FLARE's simulator for more sites than it takes by default: its own parser reads what it is told."""

import argparse
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.private.fed.app.simulator.simulator import define_simulator_parser
from nvflare.private.fed.app.simulator.simulator_runner import SimulatorRunner
from nvflare.recipe import SimEnv

from clinifed.jobs import simulator_env
from clinifed.jobs.simulator_env import Simulation

JOB = SimpleNamespace(name="many", export_job=lambda folder: (Path(folder) / "many").mkdir())


def environment(sites: int, folder: Path) -> Simulation:
    names = [f"site{number:03d}" for number in range(sites)]
    return Simulation(clients=names, num_threads=4, workspace_root=str(folder))


def test_more_than_a_hundred_sites_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser, told = argparse.ArgumentParser(), []
    define_simulator_parser(parser)

    def run(words: list[str]) -> Any:
        assert (Path(words[3]) / ".").is_dir()
        told.append(parser.parse_args(words[3:]))
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(simulator_env.subprocess, "run", run)
    assert environment(101, tmp_path).deploy(JOB) == "many"
    (asked,) = told
    assert (asked.max_clients, asked.threads, len(asked.clients.split(","))) == (101, 4, 101)
    assert asked.workspace == str(tmp_path / "many")
    assert list((tmp_path / "many").rglob("*.json*")), "FLARE's default list of classes"


def test_an_error_of_the_simulator_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator_env.subprocess, "run", lambda words: subprocess.CompletedProcess(words, 3))
    with pytest.raises(RuntimeError, match="ended with 3"):
        environment(101, tmp_path).deploy(JOB)


def test_up_to_a_hundred_it_is_flares_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimEnv, "deploy", lambda self, job: "flare's")
    assert environment(100, tmp_path).deploy(JOB) == "flare's"
    assert SimulatorRunner.__init__.__defaults__ is not None
    assert simulator_env._MOST in SimulatorRunner.__init__.__defaults__
