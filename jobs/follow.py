"""What a running federation has done so far, from the files it appends to; and whether it is still alive."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clinifed.aggregators.flare import GLOBAL_FILE, ROUNDS_FILE, SERVER_FOLDER
from clinifed.contract import Contract
from clinifed.errors import FederationError
from clinifed.files import read_lines
from clinifed.policy import SitePolicy

__all__ = ["follow", "server_file"]

_POLL_S = 0.2
_START_S = 300  # importing torch and embedding the images, all sites at once on two cores
_STOP_S = 60  # FLARE's own shutdown


def server_file(workspace: Path, name: str) -> Path | None:
    """The server's ``name`` beneath a job's workspace, wherever FLARE put the run folder."""
    found = sorted(workspace.glob(f"**/{SERVER_FOLDER}/{name}"))
    return found[0] if found else None


def follow(
    process: subprocess.Popen[bytes],
    contract: Contract,
    workspace: Path,
    policies: dict[str, SitePolicy],
    progress: Callable[[str], None],
    log: Path,
) -> list[dict[str, Any]]:
    """Wait for the federation and tell what happens; returns the server's record of every round.

    Raises:
        FederationError: the processes ended, or fell silent, before the last round was recorded.
    """
    told: dict[str, int] = {name: 0 for name in policies}
    rounds: list[dict[str, Any]] = []
    last_sign = finished = time.monotonic()
    while True:
        ended = process.poll() is not None
        for name, policy in policies.items():
            for entry in read_lines(policy.diary)[told[name] :]:
                progress(f"  {name}: round {entry['round'] + 1} trained in {entry['compute_s']:.2f} s")
                told[name] += 1
                last_sign = time.monotonic()
        path = server_file(workspace, ROUNDS_FILE)
        for entry in (read_lines(path) if path else [])[len(rounds) :]:
            rounds.append(entry)
            missing = "".join(f"; {site}: {why}" for site, why in entry["missing"].items())
            outcome = "averaged" if entry["counted"] else "too few, model unchanged"
            progress(
                f"round {entry['round'] + 1} of {contract.rounds}: {len(entry['accepted'])} updates {outcome} "
                f"({entry['seconds']:.1f} s){missing}"
            )
            last_sign = finished = time.monotonic()
        complete = len(rounds) == contract.rounds
        now = time.monotonic()
        if ended or (complete and now - finished > _STOP_S):
            break
        if now - last_sign > contract.round_timeout_s + _START_S:
            raise FederationError(
                f"nothing was heard for {now - last_sign:.0f} s in round {len(rounds) + 1} of {contract.rounds}; "
                f"what FLARE said is in {log}"
            )
        time.sleep(_POLL_S)
    if not complete or not any(entry["counted"] for entry in rounds) or server_file(workspace, GLOBAL_FILE) is None:
        raise FederationError(
            f"the federation ended after {len(rounds)} of {contract.rounds} rounds without a model; "
            f"what FLARE said is in {log}"
        )
    return rounds
