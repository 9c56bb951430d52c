"""One run on the server's disk: the global delta, the rounds done, and what the server's optimiser remembers.

A run may take several FLARE jobs, and outlives each of them: its folder lies beside the jobs' run folders, which FLARE
clears away. ``state.json`` is the only authority; all else counts as far as it says. No FLARE in here.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from clinifed.contract import Contract
from clinifed.errors import FederationError
from clinifed.files import append_line, read_lines, sha256_of, write_atomic, write_json
from clinifed.messages import Parameters

__all__ = ["ROUNDS_FILE", "SERVER_FOLDER", "STATE_FILE", "RunState"]

# Beneath the server's workspace: a folder for each run; beneath a job's run folder: a copy. The name is none that
# Python could import: FLARE puts such folders on the path.
SERVER_FOLDER = "clinifed-runs"
STATE_FILE = "state.json"
ROUNDS_FILE = "rounds.jsonl"
_MEMORY = "memory:"  # before the names of what the server's optimiser remembers


class RunState:
    """The state of one run, read when made, and written round by round.

    Args:
        folder: the run's own; made if absent.
        run: the run's name.
        contract: what the run goes by.

    Guarantees:
        - A round is in the state whole or not at all, whenever the process is killed.
        - No round is applied twice: a round that is not the next one is refused.
        - A state that is damaged, or of another contract, is refused and nothing of it is used.

    Raises:
        FederationError: the folder holds a damaged state, or another contract's.
    """

    def __init__(self, folder: Path, run: str, contract: Contract) -> None:
        self.folder, self.run, self.contract = folder, run, contract
        self.next_round = 0
        self.delta: Parameters = {n: np.zeros(shape, dtype=np.float32) for n, shape in contract.shapes.items()}
        self.memory: dict[str, NDArray[np.float32]] = {}
        self.rounds: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if (folder / STATE_FILE).exists():
            self._read()
        else:
            # A crash in the very first round may have left a line that no state counts.
            (folder / ROUNDS_FILE).unlink(missing_ok=True)

    @property
    def complete(self) -> bool:
        """Whether every round of the contract is done."""
        return self.next_round >= self.contract.rounds

    @property
    def counted(self) -> int:
        """Rounds that changed the model."""
        return sum(entry["counted"] for entry in self.rounds)

    def nonces(self) -> set[str]:
        """The nonces of every update that was ever accepted in this run."""
        return {nonce for entry in self.rounds for nonce in entry["nonces"].values()}

    def _read(self) -> None:
        path = self.folder / STATE_FILE
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            content = (self.folder / state["weights"]).read_bytes()
            lines = (self.folder / ROUNDS_FILE).read_bytes()
            if state["contract_sha256"] != self.contract.sha256() or state["run"] != self.run:
                raise FederationError(
                    f"{path}: is of run {state['run']} under contract {state['contract_sha256']}, not of run "
                    f"{self.run} under contract {self.contract.sha256()}; a run keeps its contract to its end"
                )
            if sha256_of(content) != state["weights_sha256"] or len(lines) < state["rounds_bytes"]:
                raise FederationError(
                    f"{path}: {state['weights']} or {ROUNDS_FILE} is not what was written; restore the folder from a "
                    "backup, or start a new run"
                )
            arrays = load(content)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise FederationError(f"{path}: damaged ({type(error).__name__}); nothing of it is used") from error
        if len(lines) > state["rounds_bytes"]:  # a round that was written down, and not committed any more
            os.truncate(self.folder / ROUNDS_FILE, state["rounds_bytes"])
        self.next_round = state["next_round"]
        self.memory = {n.removeprefix(_MEMORY): v for n, v in arrays.items() if n.startswith(_MEMORY)}
        self.delta = {n: v for n, v in arrays.items() if not n.startswith(_MEMORY)}
        self.rounds = read_lines(self.folder / ROUNDS_FILE)

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
            FederationError: ``number`` is not the next round.
            OSError: it cannot be written; the state stays as it was.
        """
        if number != self.next_round:
            raise FederationError(f"round {number} was to be applied, but round {self.next_round} is the next one")
        arrays = {**delta, **{_MEMORY + name: value for name, value in memory.items()}}
        content = save({name: np.ascontiguousarray(value) for name, value in sorted(arrays.items())})
        weights = f"round_{number:05d}.safetensors"
        rounds = self.folder / ROUNDS_FILE
        before = rounds.stat().st_size if rounds.exists() else 0
        try:
            write_atomic(self.folder / weights, content)
            append_line(rounds, entry, durable=True)
            state = {
                "schema_version": 1,
                "run": self.run,
                "contract_sha256": self.contract.sha256(),
                "next_round": number + 1,
                "weights": weights,
                "weights_sha256": sha256_of(content),
                "rounds_bytes": rounds.stat().st_size,
            }
            write_json(self.folder / STATE_FILE, state)  # the round counts from here on
        except OSError:
            if rounds.exists():
                os.truncate(rounds, before)
            (self.folder / weights).unlink(missing_ok=True)
            raise
        for old in self.folder.glob("round_*.safetensors"):
            if old.name != weights:
                old.unlink(missing_ok=True)
        self.next_round, self.delta, self.memory = number + 1, dict(delta), dict(memory)
        self.rounds.append(dict(entry))

    def publish(self, folder: Path) -> None:
        """Copy what a coordinator takes home into ``folder``, which then reads as a run's folder of its own."""
        if not (self.folder / STATE_FILE).exists():
            return  # no round was ever done
        folder.mkdir(parents=True, exist_ok=True)
        state = (self.folder / STATE_FILE).read_bytes()
        for name in (json.loads(state)["weights"], ROUNDS_FILE):
            write_atomic(folder / name, (self.folder / name).read_bytes())
        write_atomic(folder / STATE_FILE, state)
