"""A process that forks writers of one ledger, kills them at random moments, and starts them again.

``python writers.py FOLDER WRITERS KILLS``. The writers run the real :class:`clinifed.executors.release.Releases`; what
they send is a line of ``sent.log``. A budget that is spent before the last kill, as on a fast machine, is followed by
another ledger, each in a folder of its own below FOLDER. Forking saves the imports, which would take longer than
everything else.
"""

import os
import random
import signal
import sys
import time
from hashlib import sha256
from pathlib import Path

import numpy as np

from clinifed.config import Aggregation, Training
from clinifed.contract import BaseModelRef, Contract, ContractSite, Promise
from clinifed.data.manifest import Manifest, Record
from clinifed.errors import BudgetExceededError
from clinifed.executors.release import Releases
from clinifed.models.specialties import SPECIALTIES
from clinifed.policy import Budget, SitePolicy
from clinifed.privacy.ledger import Ledger
from clinifed.privacy.outbox import pack
from clinifed.signing import make_signing_key

ROUNDS, RESERVE, SIGMA = 6, 2, 60.0  # some jobs to a budget, so that several are spent
CONTRACT = Contract(
    federation="killed",
    clinifed_version="0",
    base_model=BaseModelRef(ref="tiny", sha256="0" * 64),
    specialties={"radiology": SPECIALTIES["radiology"]},
    training=Training(),
    promise=Promise(
        mode="dp",
        epsilon=1,
        delta=1e-5,
        noise_multiplier=SIGMA,
        max_grad_norm=1,
        reserve_rounds=RESERVE,
        releases=ROUNDS + RESERVE,
        objective="cross-entropy",
    ),
    rounds=ROUNDS,
    min_clients=1,
    max_clients=1,
    aggregation=Aggregation(quorum=1, round_timeout_s=60),
    sites={"alder": ContractSite(specialties=("radiology",), nominal_patients=10, weight=1, norm_bound=1)},
    shapes={"heads.radiology.bias": (2,)},
)


def policy(folder: Path) -> SitePolicy:
    return SitePolicy(
        site="alder",
        manifest=folder / "manifest.csv",
        ledger=folder / "ledger.jsonl",
        signing_key=folder / "signing.key",
        cache=folder / "cache",
        diary=folder / "diary.jsonl",
        budget=Budget(epsilon=1.0, delta=1e-5),
    )


def draw() -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Noise of the operating system: no two releases are alike."""
    return {"heads.radiology.bias": np.frombuffer(os.urandom(8), dtype="<u4").astype(np.float32)}, {}


def write(folder: Path, writer: int, generation: int) -> None:
    """Job after job, until the budget is spent: what a site does."""
    manifest = Manifest(
        folder / "manifest.csv", (Record("a", "p", "radiology", "normal", "", "train"),), "hospital", "0"
    )
    log = os.open(folder / "sent.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    mine = sorted(folder.glob(f"job-{writer}-*"))
    while True:
        job = mine.pop() if mine else folder / f"job-{writer}-{generation:06d}-{time.monotonic_ns():020d}"
        job.touch()
        releases = Releases(CONTRACT, policy(folder), job.name)
        try:
            releases.reserve(manifest)
        except BudgetExceededError:
            return
        for number in range(ROUNDS):
            try:
                update = releases.release(number, draw)
            except BudgetExceededError:
                continue  # this round is lost
            os.write(log, f"{job.name} {number} {sha256(pack(update)).hexdigest()}\n".encode())
        job.unlink()


def fork(folder: Path, writer: int, generation: int) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            write(folder, writer, generation)
            code = 0
        except BaseException as error:
            with (folder / "failed.log").open("a") as file:
                file.write(f"{type(error).__name__}: {error}\n")
        os._exit(code)
    return child


def disturb(folder: Path, writers: int, kills: int, dice: random.Random) -> int:
    """Kill writers of one ledger, at most ``kills`` times, until its budget is spent; returns the number of kills."""
    folder.mkdir()
    make_signing_key(folder / "signing.key")
    Ledger.of(policy(folder)).create()
    done, running = 0, {writer: fork(folder, writer, 0) for writer in range(writers)}
    while done < kills and running:
        time.sleep(dice.uniform(0, 0.08) / len(running))
        writer = dice.choice(sorted(running))
        os.kill(running[writer], signal.SIGKILL)
        _, status = os.waitpid(running.pop(writer), 0)
        if os.WIFSIGNALED(status):  # else it had spent the budget before the signal came, or failed
            done += 1
            running[writer] = fork(folder, writer, done)
        elif os.WEXITSTATUS(status):
            break
    for child in running.values():  # the last ones spend what is left
        os.waitpid(child, 0)
    return done


def main() -> None:
    home, writers, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    dice, done = random.Random(), 0
    for number in range(kills):  # a ledger that allows no kill at all would show nothing
        if done == kills or list(home.rglob("failed.log")):
            break
        done += disturb(home / f"ledger-{number}", writers, kills - done, dice)
    sys.stdout.write(str(done))


if __name__ == "__main__":
    main()
