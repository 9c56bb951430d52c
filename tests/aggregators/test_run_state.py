"""The state of a run: a round is in it whole or not at all, once, and nothing damaged is used."""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from clinifed import files
from clinifed.aggregators import run_state
from clinifed.aggregators.run_state import ROUNDS_FILE, STATE_FILE, RunState
from clinifed.contract import Contract
from clinifed.errors import FederationError
from clinifed.files import read_lines, write_json

from .rounds import one_round, sent, settings

RUN = "run"
KILLED = 77


@pytest.fixture(scope="module")
def small(make_contract: Callable[..., Contract]) -> Contract:
    return make_contract({"alder": ["radiology"], "birch": ["radiology"]}).model_copy(update={"rounds": 9})


def values(contract: Contract, number: int) -> dict[str, np.ndarray]:
    dice = np.random.default_rng(number)
    return {name: dice.normal(size=shape).astype(np.float32) for name, shape in contract.shapes.items()}


def entry(number: int) -> dict[str, object]:
    return {"round": number, "counted": number % 2 == 0, "nonces": {"alder": f"{number:032x}"}, "why": "é"}


def commit(state: RunState, number: int) -> None:
    memory = {f"momentum.{name}": -value for name, value in values(state.contract, number).items()}
    state.commit(number, values(state.contract, number), memory, entry(number))


def told(state: RunState) -> tuple[object, ...]:
    """All that a state says, comparable."""
    arrays = [{n: v.tobytes() for n, v in part.items()} for part in (state.delta, state.memory)]
    return state.next_round, list(state.rounds), *arrays


def begun(folder: Path, contract: Contract, rounds: int) -> RunState:
    state = RunState(folder, RUN, contract)
    for number in range(rounds):
        commit(state, number)
    return state


def sound(folder: Path, contract: Contract) -> tuple[object, ...]:
    """What a new process reads; it must agree with itself, and go on."""
    read = RunState(folder, RUN, contract)
    said = told(read)
    assert [e["round"] for e in read.rounds] == list(range(read.next_round))
    if read.next_round:
        assert told(read)[2] == {n: v.tobytes() for n, v in values(contract, read.next_round - 1).items()}
    commit(read, read.next_round)
    assert told(RunState(folder, RUN, contract)) == told(read)
    assert [e["round"] for e in read_lines(folder / ROUNDS_FILE)] == list(range(read.next_round))
    weights = [path.name for path in folder.glob("*.safetensors")]
    assert weights == [json.loads((folder / STATE_FILE).read_bytes())["weights"]]
    assert list(folder.glob(".*.tmp")) == []
    return said


class Halves:
    """A file that passes on what it is given in two parts, between which things happen."""

    def __init__(self, file, between: Callable[[], None]) -> None:
        self.file, self.between = file, between

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content: bytes) -> None:
        half = len(content) // 2
        self.file.write(content[:half])
        self.file.flush()
        self.between()
        self.file.write(content[half:])
        self.file.flush()


@contextlib.contextmanager
def faults(at: Callable[[str], None]) -> Iterator[None]:
    """``at`` is called with what is about to be done on the disk, and may raise, or end the process."""

    def before(what, name):
        def call(*args, **kwargs):
            at(name)
            return what(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("open", "fsync", "truncate"):
            patch.setattr(files.os, name, before(getattr(os, name), name))
        for name in ("replace", "unlink"):
            patch.setattr(pathlib.Path, name, before(getattr(Path, name), name))
        opened = os.fdopen
        patch.setattr(files.os, "fdopen", lambda *a: Halves(opened(*a), lambda: at("write")))
        yield


def killed(work: Callable[[], None], at: int) -> int:
    """Do ``work`` in a child that dies at its ``at``-th step: a line of our code, or half of a write. Its exit code."""
    steps, ours = 0, {run_state.__file__, files.__file__}

    def step(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == at:
            os._exit(KILLED)

    def trace(frame, event, arg):
        if frame.f_code.co_filename not in ours:
            return None
        step()
        return trace

    child = os.fork()
    if child == 0:
        code = 1
        try:
            with faults(step):
                sys.settrace(trace)
                work()
                sys.settrace(None)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_round_is_in_the_state_whole_or_not_at_all_whenever_the_process_is_killed(tmp_path, small, rounds):
    before, seen = told(begun(tmp_path / "model", small, rounds)), set()
    after = told(begun(tmp_path / "after", small, rounds + 1))
    for at in range(1, 1000):
        folder = tmp_path / str(at)
        shutil.copytree(tmp_path / "model", folder)
        code = killed(lambda folder=folder: commit(RunState(folder, RUN, small), rounds), at)
        said = sound(folder, small)
        assert said in (before, after)
        seen.add(said[0])
        shutil.rmtree(folder)
        if code == 0:
            break
        assert code == KILLED
    assert at > 40, "there are more steps than that"
    assert seen == {rounds, rounds + 1}
    assert said == after


def attempts(folder: Path, contract: Contract, lasting: bool) -> Iterator[tuple[RunState, str, bool]]:
    """A commit of round 1 whose n-th access to the disk fails, for every n: (the state, at what, whether it raised)."""
    model = folder / "model"
    begun(model, contract, 1)
    for at in range(1, 100):
        here = folder / f"{at}"
        shutil.copytree(model, here)
        state, steps, where = RunState(here, RUN, contract), 0, ""

        def full(what: str, at: int = at, lasting: bool = lasting) -> None:
            nonlocal steps, where
            steps += what not in ("truncate", "unlink")  # these free room, and work on a full disk
            if what not in ("truncate", "unlink") and (steps == at or (lasting and steps > at)):
                where = where or what
                raise OSError(errno.ENOSPC, "No space left on device")

        raised = False
        with faults(full):
            try:
                commit(state, 1)
            except OSError:
                raised = True
        yield state, where, raised
        if not raised:
            return


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_a_full_disk_leaves_the_state_as_it_was_and_the_next_commit_works(tmp_path, small, lasting):
    before, last = None, 0
    for state, where, raised in attempts(tmp_path, small, lasting):
        if not raised:
            assert not where
            break
        before = before or told(begun(tmp_path / "before", small, 1))
        said = told(RunState(state.folder, RUN, small))
        if said == before:
            assert told(state) == before
            commit(state, 1)
            assert last == 0, "once the new state counts, it does"
        else:  # the very last step: the new state counts already, and only was not made durable
            last += 1
            assert where in ("open", "fsync")
            with pytest.raises(FederationError, match="not what this job left"):
                commit(state, 1)
        assert sound(state.folder, small)[0] == 2
    assert 1 <= last <= 2
    assert state.next_round == 2


def test_no_round_is_applied_twice(tmp_path, small):
    state = begun(tmp_path, small, 2)
    said = told(state)
    for number in (0, 1, 3):
        with pytest.raises(FederationError, match=f"round {number} was to be applied, but round 2 is the next one"):
            commit(state, number)
    assert told(state) == told(RunState(tmp_path, RUN, small)) == said


def test_no_round_is_applied_twice_by_two_jobs_that_run_at_once(tmp_path, small):
    first = begun(tmp_path, small, 1)
    second = RunState(tmp_path, RUN, small)
    commit(second, 1)
    with pytest.raises(FederationError, match=r"round 1 of run run .* another one has gone on"):
        commit(first, 1)
    assert told(RunState(tmp_path, RUN, small)) == told(second)
    assert sound(tmp_path, small)[0] == 2


def test_who_opens_a_state_while_a_round_is_written_takes_nothing_from_it(tmp_path, small):
    state = begun(tmp_path, small, 1)
    with (tmp_path / ROUNDS_FILE).open("ab") as file:
        file.write(b'{"round":1}\n')  # as in the middle of a commit
    size = (tmp_path / ROUNDS_FILE).stat().st_size
    assert told(RunState(tmp_path, RUN, small)) == told(state)
    assert (tmp_path / ROUNDS_FILE).stat().st_size == size


def flipped(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_state_that_is_damaged_is_refused_and_nothing_of_it_is_used(tmp_path, small):
    begun(tmp_path / "model", small, 2)
    refused = 0
    for path in sorted((tmp_path / "model").iterdir()):
        for place in range(0, path.stat().st_size, 1 if path.name == STATE_FILE else 7):
            folder = tmp_path / "damaged"
            shutil.copytree(tmp_path / "model", folder)
            flipped(folder / path.name, place)
            with pytest.raises(FederationError):
                RunState(folder, RUN, small)
            refused += 1
            shutil.rmtree(folder)
    assert refused > 400


DAMAGED = {
    "weights that are gone": lambda f: next(f.glob("*.safetensors")).unlink(),
    "weights cut short": lambda f: os.truncate(next(f.glob("*.safetensors")), 20),
    "rounds that are gone": lambda f: (f / ROUNDS_FILE).unlink(),
    "rounds cut short": lambda f: os.truncate(f / ROUNDS_FILE, (f / ROUNDS_FILE).stat().st_size - 1),
    "an empty state": lambda f: (f / STATE_FILE).write_text(""),
    "a state that is no mapping": lambda f: (f / STATE_FILE).write_text("[]"),
    "a state of no text": lambda f: (f / STATE_FILE).write_bytes(b"\xff"),
    "a state of another version": lambda f: edit(f, schema_version=2),
    "a round less": lambda f: edit(f, next_round=1),
}


def edit(folder: Path, **changes: object) -> None:
    write_json(folder / STATE_FILE, {**json.loads((folder / STATE_FILE).read_text()), **changes})


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_every_way_of_damage_is_said_with_the_file(tmp_path, small, damage):
    begun(tmp_path, small, 2)
    damage(tmp_path)
    with pytest.raises(FederationError, match=STATE_FILE):
        RunState(tmp_path, RUN, small)


def test_a_state_of_another_contract_or_run_is_refused(tmp_path, small):
    begun(tmp_path, small, 1)
    other = small.model_copy(update={"rounds": 8})
    with pytest.raises(FederationError, match=f"{small.sha256()}, not of run run under contract {other.sha256()}"):
        RunState(tmp_path, RUN, other)
    with pytest.raises(FederationError, match=r"is of run run under contract .*, not of run another"):
        RunState(tmp_path, "another", small)


def test_what_is_published_reads_back_equal(tmp_path, small):
    state = RunState(tmp_path / "run", RUN, small)
    state.publish(tmp_path / "home")
    assert not (tmp_path / "home").exists(), "no round was done: there is nothing to take home"
    for number in range(2):
        commit(state, number)
        with (tmp_path / "run" / ROUNDS_FILE).open("ab") as file:
            file.write(b'{"torn')
        state.publish(tmp_path / "home")
        assert told(RunState(tmp_path / "home", RUN, small)) == told(state)


def test_nonces_and_what_counted_persist(tmp_path, small):
    begun(tmp_path, small, 3)
    read = RunState(tmp_path, RUN, small)
    assert read.nonces() == {f"{number:032x}" for number in range(3)}
    assert read.counted == 2
    assert not read.complete
    for number in range(3, small.rounds):
        commit(read, number)
    assert RunState(tmp_path, RUN, small).complete


@pytest.mark.parametrize("rule", ["fedavgm", "fedadam"])
def test_the_memory_of_the_servers_optimiser_goes_on_to_the_same_bits(tmp_path, small, rule):
    _, memory = one_round(sent(1), settings(rule))
    RunState(tmp_path, RUN, small).commit(0, values(small, 0), memory, entry(0))
    read = RunState(tmp_path, RUN, small).memory
    assert {n: v.tobytes() for n, v in read.items()} == {n: v.tobytes() for n, v in memory.items()}
    assert memory
    again = [one_round(sent(2), settings(rule), each) for each in (memory, read)]
    assert [{n: v.tobytes() for n, v in part.items()} for part in again[0]] == [
        {n: v.tobytes() for n, v in part.items()} for part in again[1]
    ]


def test_a_new_run_starts_at_zero_and_its_folder_is_its_owners(tmp_path, small):
    state = RunState(tmp_path / "runs" / RUN, RUN, small)
    assert {n: v.shape for n, v in state.delta.items()} == small.shapes
    assert not any(value.any() for value in state.delta.values())
    assert (tmp_path / "runs" / RUN).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("run", ["", ".", "..", "../other", "a/b", "a b", "x" * 65, "é"])
def test_a_run_whose_name_is_no_folder_of_its_own_is_refused_and_nothing_is_made(tmp_path, contract, run):
    with pytest.raises(FederationError, match="a run's name"):
        RunState(tmp_path / "runs" / "x", run, contract)
    assert list(tmp_path.iterdir()) == []
