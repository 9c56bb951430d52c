"""Following a federation on this machine: told round by round, and its end judged by the run's state."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from clinifed.aggregators.run_state import SERVER_FOLDER, RunState
from clinifed.errors import FederationError
from clinifed.files import append_line
from clinifed.jobs import follow as module
from clinifed.jobs.follow import follow, run_folder, tell_round

RUN = "run"


@pytest.fixture
def contract(make_contract):
    made = make_contract({"alder": ["radiology"], "birch": ["radiology"]})
    settings = made.aggregation.model_copy(update={"round_timeout_s": 5, "start_timeout_s": 5})
    return made.model_copy(update={"rounds": 2, "aggregation": settings})


@pytest.fixture
def ended():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process


def record(number, counted=True):
    missing = {} if counted else {"birch": "policy"}
    return {
        "round": number,
        "counted": counted,
        "accepted": ["alder"],
        "missing": missing,
        "seconds": 1.25,
        "nonces": {},
    }


def rounds(workspace, contract, *counted):
    state = RunState(workspace / "simulate" / SERVER_FOLDER / RUN, RUN, contract)
    for number, each in enumerate(counted):
        state.commit(number, state.delta, {}, record(number, each))


def followed(process, contract, tmp_path, policies=None):
    said = []
    try:
        return follow(process, contract, RUN, tmp_path, policies or {}, said.append, tmp_path / "log.txt"), said
    except FederationError as error:
        error.said = said
        raise


def test_a_round_is_one_line_with_who_is_missing_and_why():
    assert tell_round(record(0), 5) == "round 1 of 5: 1 updates averaged (1.2 s)"
    assert tell_round(record(4, False), 5) == (
        "round 5 of 5: 1 updates too few, model unchanged (1.2 s); birch: policy"
    )


def test_the_folder_of_a_run_is_found_wherever_flare_puts_it(tmp_path, contract):
    assert run_folder(tmp_path, RUN) is None
    rounds(tmp_path, contract, True)
    assert run_folder(tmp_path, RUN) == tmp_path / "simulate" / SERVER_FOLDER / RUN
    assert run_folder(tmp_path, "another") is None


def test_a_run_that_is_complete_is_told_round_by_round(tmp_path, contract, ended):
    diary = tmp_path / "diary.jsonl"
    append_line(diary, {"round": 0, "compute_s": 0.5})
    rounds(tmp_path, contract, True, False)
    state, said = followed(ended, contract, tmp_path, {"alder": SimpleNamespace(diary=diary)})
    assert state.complete
    assert said == ["  alder: round 1 trained in 0.50 s", tell_round(record(0), 2), tell_round(record(1, False), 2)]


@pytest.mark.parametrize("counted", [[], [True], [False, False]])
def test_processes_that_end_without_a_model_are_an_error_with_the_log(tmp_path, contract, ended, counted):
    rounds(tmp_path, contract, *counted)
    with pytest.raises(FederationError, match=rf"ended after {len(counted)} of 2 rounds without a model; .*log\.txt"):
        followed(ended, contract, tmp_path)


def test_silence_is_noticed(tmp_path, contract, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda s: None))
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        try:
            with pytest.raises(FederationError, match=r"nothing was heard for 11 s in round 1 of 2"):
                followed(process, contract, tmp_path)
        finally:
            process.kill()
