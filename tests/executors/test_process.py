"""The trainer's process: it answers whole or is gone, ends with its parent, and says nothing where it may not."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from safetensors.numpy import save

from clinifed.aggregators.ingress import check_update
from clinifed.errors import FederationError
from clinifed.executors.flare import SIMULATOR
from clinifed.executors.frames import read_frame, write_frame
from clinifed.executors.process import TrainerGoneError, TrainerProcess
from clinifed.privacy.ledger import Ledger
from clinifed.privacy.outbox import unpack

from .conftest import JOB


@pytest.fixture
def site(contract, policy):
    return policy.model_copy(update={"approved_contracts": (contract.sha256(),)})


@pytest.fixture
def trainer(contract, site):
    made = TrainerProcess(contract, site, JOB, SIMULATOR)
    yield made
    made.stop()


@pytest.fixture
def delta(contract):
    import numpy as np

    return save({name: np.zeros(shape, np.float32) for name, shape in contract.shapes.items()})


def never() -> bool:
    return False


def test_it_trains_a_round_that_the_server_accepts(trainer, contract, delta):
    update = unpack(trainer.train(0, delta, never, 120).body)
    check_update(update, contract, 0, False, JOB)
    assert unpack(trainer.train(0, delta, never, 120).body).meta == update.meta  # asked again: the same


@pytest.mark.parametrize(("threads", "told"), [(None, None), (3, "3")])
def test_the_trainer_takes_the_threads_of_the_policy_or_torchs_own(contract, site, monkeypatch, threads, told):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    made = TrainerProcess(contract, site.model_copy(update={"threads": threads}), JOB, SIMULATOR)
    try:
        assert psutil.Process(made._process.pid).environ().get("OMP_NUM_THREADS") == told
    finally:
        made.stop()


def test_simulated_sites_have_one_thread_each(site):
    assert site.threads == 1


def test_a_refusal_comes_back_as_policy_with_its_reasons(contract, policy, delta):
    unapproved = TrainerProcess(contract, policy.model_copy(update={"approved_contracts": ()}), JOB, SIMULATOR)
    try:
        header = unapproved.train(0, delta, never, 120).header
        assert header["failed"] == "policy"
        assert "approved_contracts" in header["problems"][0]
        assert unapproved.alive
    finally:
        unapproved.stop()


def test_what_it_says_goes_into_the_sites_own_log_owner_only(trainer, site, delta, capfd):
    trainer.train(0, delta, never, 120)
    assert "trained in" in site.log.read_text()
    assert site.log.stat().st_mode & 0o077 == 0
    said = capfd.readouterr()
    assert said.out + said.err == ""


def test_a_killed_trainer_is_gone_and_not_answered_for(trainer, delta):
    threading.Timer(0.3, lambda: os.kill(trainer._process.pid, signal.SIGKILL)).start()
    with pytest.raises(TrainerGoneError, match="-9"):
        trainer.train(0, delta, never, 120)
    assert not trainer.alive
    with pytest.raises(TrainerGoneError):
        trainer.train(1, delta, never, 120)


def test_a_trainer_that_does_not_answer_is_ended_and_not_started_again_for_it(trainer, delta):
    os.kill(trainer._process.pid, signal.SIGSTOP)
    with pytest.raises(FederationError, match=r"did not answer in 0\.5 s") as caught:
        trainer.train(0, delta, never, 0.5)
    assert not isinstance(caught.value, TrainerGoneError)
    assert not trainer.alive


def test_a_stopped_round_ends_the_trainer(trainer, delta):
    with pytest.raises(TrainerGoneError):
        trainer.train(0, delta, lambda: True, 120)
    assert not trainer.alive


def test_flares_credentials_are_not_handed_on(contract, site, monkeypatch):
    monkeypatch.setenv("NVFLARE_JOB_TOKEN", "secret")
    made = TrainerProcess(contract, site, JOB, SIMULATOR)
    try:
        assert "NVFLARE_JOB_TOKEN" not in psutil.Process(made._process.pid).environ()
    finally:
        made.stop()


PARENT = """
import os, sys, time
from clinifed.executors import process
class Policy:
    threads = 1
    class log:
        parent = type("P", (), {"mkdir": staticmethod(lambda **_: None)})
    @staticmethod
    def model_dump(mode): return {}
class Contract(Policy): pass
os_open, process.os.open = os.open, lambda *a: os_open(os.devnull, os.O_WRONLY)
made = process.TrainerProcess(Contract, Policy, "j", "c")
print(made._process.pid, flush=True)
time.sleep(60)
"""


def test_it_ends_with_its_parent_however_that_ends():
    with subprocess.Popen([sys.executable, "-P", "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    deadline = time.monotonic() + 20
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("body", [b"", b"x" * 70_000])
def test_a_frame_comes_back_as_it_was_and_a_torn_one_not_at_all(body):
    sent = bytearray()
    write_frame(sent.extend, {"round": 3}, body)

    def reader(content):
        place = 0

        def read(size):
            nonlocal place
            place += size
            return content[place - size : place]

        return read

    frame = read_frame(reader(bytes(sent)))
    assert frame is not None
    assert (frame.header, frame.body) == ({"round": 3}, body)
    assert [read_frame(reader(bytes(sent[:cut]))) for cut in (0, 3, 10, len(sent) - 1)] == [None] * 4


def test_a_stream_that_is_no_frame_is_refused():
    with pytest.raises(FederationError, match="not one of ours"):
        read_frame(lambda size: b"\xff" * size)


def test_the_handshake_names_the_base_model_and_gets_ready_without_a_charge(trainer, contract, site):
    assert trainer.hello(never, 120).header == {"base_model_sha256": contract.base_model.sha256}
    assert Ledger.of(site).state().reserved_units > 0
    assert Ledger.of(site).state().spent_units == 0
    assert trainer.hello(never, 120).header == {"base_model_sha256": contract.base_model.sha256}
