"""What a running federation has done so far, from the files it appends to; and whether it is still alive."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clinifed.aggregators.run_state import ROUNDS_FILE, SERVER_FOLDER, STATE_FILE, RunState
from clinifed.contract import Contract
from clinifed.errors import FederationError
from clinifed.files import read_lines
from clinifed.policy import SitePolicy

__all__ = ["follow", "run_folder", "tell_round"]

_POLL_S = 0.2
_STOP_S = 120  # the sites' farewell, and FLARE's own shutdown


def run_folder(workspace: Path, run: str) -> Path | None:
    """The folder of ``run`` on a server whose files lie somewhere beneath ``workspace``."""
    found = sorted(workspace.glob(f"**/{SERVER_FOLDER}/{run}/{STATE_FILE}"))
    return found[0].parent if found else None


def tell_round(entry: dict[str, Any], rounds: int) -> str:
    """One line about a round that ended."""
    missing = "".join(f"; {site}: {why}" for site, why in entry["missing"].items())
    outcome = "averaged" if entry["counted"] else "too few, model unchanged"
    return (
        f"round {entry['round'] + 1} of {rounds}: {len(entry['accepted'])} updates {outcome} "
        f"({entry['seconds']:.1f} s){missing}"
    )


def follow(
    process: subprocess.Popen[bytes],
    contract: Contract,
    run: str,
    workspace: Path,
    policies: dict[str, SitePolicy],
    progress: Callable[[str], None],
    log: Path,
) -> RunState:
    """Wait for the federation and tell what happens; returns the run's state on the server.

    Raises:
        FederationError: the processes ended, or fell silent, before the last round was recorded.
    """
    told: dict[str, int] = {name: 0 for name in policies}
    folder: Path | None = None
    seen = 0
    last_sign = finished = time.monotonic()
    while True:
        ended = process.poll() is not None
        for name, policy in policies.items():
            for entry in read_lines(policy.diary)[told[name] :]:
                progress(f"  {name}: round {entry['round'] + 1} trained in {entry['compute_s']:.2f} s")
                told[name] += 1
                last_sign = time.monotonic()
        folder = folder or run_folder(workspace, run)
        for entry in (read_lines(folder / ROUNDS_FILE) if folder else [])[seen:]:
            seen += 1
            progress(tell_round(entry, contract.rounds))
            last_sign = finished = time.monotonic()
        now = time.monotonic()
        if ended or (seen >= contract.rounds and now - finished > _STOP_S):
            break
        if now - last_sign > contract.aggregation.round_timeout_s + contract.aggregation.start_timeout_s:
            raise FederationError(
                f"nothing was heard for {now - last_sign:.0f} s in round {seen + 1} of {contract.rounds}; "
                f"what FLARE said is in {log}"
            )
        time.sleep(_POLL_S)
    state = RunState(folder, run, contract) if folder else None
    if state is None or not state.complete or not state.counted:
        raise FederationError(
            f"the federation ended after {seen} of {contract.rounds} rounds without a model; "
            f"what FLARE said is in {log}"
        )
    return state
