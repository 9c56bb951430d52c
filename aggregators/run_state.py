"""One run on the server's disk: the global delta, the rounds done, the optimiser's memory, and the sum of models.

A run may take several FLARE jobs, and outlives each of them: its folder lies beside the jobs' run folders, which FLARE
clears away. ``state.json`` is the only authority; all else counts as far as it says. No FLARE in here.
"""

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from clinifed.aggregators.averaging import Totals, add_model, first_averaged, mean_model
from clinifed.contract import Contract
from clinifed.errors import FederationError
from clinifed.files import append_line, canonical_json, sha256_of, write_atomic, write_json
from clinifed.messages import Parameters

__all__ = ["ROUNDS_FILE", "SERVER_FOLDER", "STATE_FILE", "RunState"]

# Beneath the server's workspace: a folder for each run; beneath a job's run folder: a copy. The name is none that
# Python could import: FLARE puts such folders on the path.
SERVER_FOLDER = "clinifed-runs"
STATE_FILE = "state.json"
ROUNDS_FILE = "rounds.jsonl"
_MEMORY = "memory:"  # before the names of what the server's optimiser remembers
_TOTAL = "total:"  # before the names of the sums of models, float64
_LOCK = ".lock"
_RUN = re.compile(r"[A-Za-z0-9_-]{1,64}")
_VERSION = 1


class RunState:
    """The state of one run, read when made, and written round by round.

    Args:
        folder: the run's own; made if absent.
        run: the run's name.
        contract: what the run goes by.

    Guarantees:
        - A round is in the state whole or not at all, whenever the process is killed.
        - No round is applied twice: a round that is not the next one is refused, also where another process, such as
          a job too many or one that outlived its server, did it.
        - A state that is damaged, or of another contract, is refused and nothing of it is used.
        - The model is the mean of the deltas after the last ``aggregation.average_last`` of the rounds, whenever
          processes were killed, and of no other; where that is 0, it is the last delta.

    Raises:
        FederationError: the folder holds a damaged state, or another contract's.
    """

    def __init__(self, folder: Path, run: str, contract: Contract) -> None:
        if not _RUN.fullmatch(run):  # it names the folder, and a job brings it
            raise FederationError(f"run {run[:80]!r}: a run's name is of letters, digits, - and _, at most 64")
        self.folder, self.run, self.contract = folder, run, contract
        self.next_round = 0
        self.delta: Parameters = {n: np.zeros(shape, dtype=np.float32) for n, shape in contract.shapes.items()}
        self.memory: dict[str, NDArray[np.float32]] = {}
        self._totals: Totals = {}
        self._first = first_averaged(contract.rounds, contract.aggregation.average_last)
        self.rounds: list[dict[str, Any]] = []
        self._text: bytes | None = None  # the state as it stands on the disk, as far as we know
        self._bytes, self._digest = 0, sha256()  # of the lines that it counts
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._locked():
            if (folder / STATE_FILE).exists():
                self._read()

    @property
    def complete(self) -> bool:
        """Whether every round of the contract is done."""
        return self.next_round >= self.contract.rounds

    @property
    def counted(self) -> int:
        """Rounds that changed the model."""
        return sum(entry["counted"] for entry in self.rounds)

    def model(self) -> Parameters:
        """What is evaluated and written, as a change from the start: the mean of the last models, or the last one."""
        models = self.next_round - self._first
        return mean_model(self._totals, models) if models > 0 else dict(self.delta)

    def nonces(self) -> set[str]:
        """The nonces of every update that was ever accepted in this run."""
        return {nonce for entry in self.rounds for nonce in entry["nonces"].values()}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time: two jobs of a run may meet here."""
        handle = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _read(self) -> None:
        path = self.folder / STATE_FILE
        try:
            text = path.read_bytes()
            state = json.loads(text)
            content = (self.folder / state["weights"]).read_bytes()
            # More lines than the state counts are of a round that was written down, and not committed any more.
            lines = (self.folder / ROUNDS_FILE).read_bytes()[: state["rounds_bytes"]]
            if state["contract_sha256"] != self.contract.sha256() or state["run"] != self.run:
                raise FederationError(
                    f"{path}: is of run {state['run']} under contract {state['contract_sha256']}, not of run "
                    f"{self.run} under contract {self.contract.sha256()}; a run keeps its contract to its end"
                )
            digest = sha256(lines)
            if sha256_of(content) != state["weights_sha256"] or digest.hexdigest() != state["rounds_sha256"]:
                raise FederationError(
                    f"{path}: {state['weights']} or {ROUNDS_FILE} is not what was written; restore the folder from a "
                    "backup, or start a new run"
                )
            rounds = [json.loads(line) for line in lines.splitlines()]
            if state["schema_version"] != _VERSION or state["next_round"] != len(rounds):
                raise FederationError(
                    f"{path}: version {state['schema_version']}, next round {state['next_round']}, but {len(rounds)} "
                    f"rounds in {ROUNDS_FILE} (version {_VERSION}); restore the folder from a backup"
                )
            arrays = load(content)
            totals = {n.removeprefix(_TOTAL): v for n, v in arrays.items() if n.startswith(_TOTAL)}
            if set(totals) != (set(self.contract.shapes) if len(rounds) > self._first else set()):
                raise FederationError(
                    f"{path}: {state['weights']} does not hold the sums that aggregation.average_last needs; restore "
                    "the folder from a backup, or start a new run"
                )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise FederationError(f"{path}: damaged ({type(error).__name__}); nothing of it is used") from error
        self.memory = {n.removeprefix(_MEMORY): v for n, v in arrays.items() if n.startswith(_MEMORY)}
        self.delta = {n: v for n, v in arrays.items() if not n.startswith((_MEMORY, _TOTAL))}
        self.next_round, self.rounds, self._totals = len(rounds), rounds, totals
        self._text, self._bytes, self._digest = text, len(lines), digest

    def commit(
        self,
        number: int,
        delta: Parameters,
        memory: Mapping[str, NDArray[np.float32]],
        entry: Mapping[str, Any],
    ) -> None:
        """Take one round in: durable when this returns, and undone if it does not.

        Args:
            delta: the global delta after the round, name → float32.
            memory: of the server's optimiser.
            entry: the round's record; holds at least ``counted`` and ``nonces``.

        Raises:
            FederationError: ``number`` is not the next round, or another process has gone on.
            OSError: it cannot be written; the state stays as it was. Where the disk fails in the very last step, it is
                what it is read as when opened again, and this object commits no more.
        """
        with self._locked():
            self._commit(number, delta, memory, entry)

    def _commit(
        self, number: int, delta: Parameters, memory: Mapping[str, NDArray[np.float32]], entry: Mapping[str, Any]
    ) -> None:
        if number != self.next_round:
            raise FederationError(f"round {number} was to be applied, but round {self.next_round} is the next one")
        path, rounds, weights = self.folder / STATE_FILE, self.folder / ROUNDS_FILE, f"round_{number:05d}.safetensors"
        if (path.read_bytes() if path.exists() else None) != self._text:
            raise FederationError(
                f"round {number} of run {self.run} was to be applied, but {STATE_FILE} is not "
                "what this job left: another one has gone on, or a disk has failed"
            )
        totals = add_model(self._totals, delta) if number >= self._first else {}
        arrays: dict[str, NDArray[Any]] = {**delta}
        for prefix, values in ((_MEMORY, memory), (_TOTAL, totals)):
            arrays |= {prefix + name: value for name, value in values.items()}
        content = save({name: np.ascontiguousarray(value) for name, value in sorted(arrays.items())})
        line, digest = canonical_json(entry) + b"\n", self._digest.copy()
        digest.update(line)
        state: dict[str, Any] = {
            "schema_version": _VERSION,
            "run": self.run,
            "contract_sha256": self.contract.sha256(),
            "next_round": number + 1,
            "weights": weights,
            "weights_sha256": sha256_of(content),
            "rounds_bytes": self._bytes + len(line),
            "rounds_sha256": digest.hexdigest(),
        }
        try:
            if rounds.exists():
                os.truncate(rounds, self._bytes)  # of a round that a crash cut short
            write_atomic(self.folder / weights, content)
            append_line(rounds, entry, durable=True)
            write_json(path, state)  # the round counts from here on
        except OSError:
            # Where only the last of it failed, to make the new state durable, the state stands and needs its files.
            if (path.read_bytes() if path.exists() else None) == self._text:
                with suppress(OSError):  # what this leaves, no state counts
                    (self.folder / weights).unlink(missing_ok=True)
                    os.truncate(rounds, self._bytes)
            raise
        self.next_round, self.delta, self.memory, self._totals = number + 1, dict(delta), dict(memory), totals
        self._text, self._bytes, self._digest = path.read_bytes(), state["rounds_bytes"], digest
        self.rounds.append(dict(entry))
        for old in (*self.folder.glob("round_*.safetensors"), *self.folder.glob(".*.tmp")):
            if old.name != weights:
                with suppress(OSError):  # the round counts; the next one tries again
                    old.unlink()

    def publish(self, folder: Path) -> None:
        """Copy what a coordinator takes home into ``folder``, which then reads as a run's folder of its own."""
        if not (self.folder / STATE_FILE).exists():
            return  # no round was ever done
        folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            text = (self.folder / STATE_FILE).read_bytes()
            state = json.loads(text)
            contents = {n: (self.folder / n).read_bytes() for n in (state["weights"], ROUNDS_FILE)}
        contents[ROUNDS_FILE] = contents[ROUNDS_FILE][: state["rounds_bytes"]]
        for name, content in (*contents.items(), (STATE_FILE, text)):
            write_atomic(folder / name, content)
