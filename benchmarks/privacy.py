"""What privacy costs: noise, the private step, and the ledger, as ratios within one run.

``python benchmarks/privacy.py`` writes its section of ``RESULTS.md``.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from results import write_section
from torch import nn

from clinifed.models.adapters import TrainablePart
from clinifed.models.trunk import Projection
from clinifed.policy import Budget
from clinifed.privacy.engine import Mechanism, PatientTensors, plain_step, private_step
from clinifed.privacy.ledger import Ledger, read_ledger
from clinifed.privacy.noise import NoiseSource
from clinifed.privacy.objectives import OBJECTIVES
from clinifed.privacy.self_test import self_test

MILLION = 1_000_000
APPENDS = 2_000
RECORDS = 100_000


def seconds(run: Callable[[], object], times: int = 5) -> float:
    """The median over ``times`` runs, after one to warm up."""
    run()
    took = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        took.append(time.perf_counter() - began)
    return float(np.median(took))


def noise() -> list[str]:
    ours = seconds(lambda: NoiseSource().standard_normal((MILLION,)))
    numpy = seconds(lambda: np.random.default_rng().standard_normal(MILLION))
    tested = seconds(self_test)
    return [
        f"| noise, 1 M parameters (AES-CTR, four draws) over numpy's generator | {ours / numpy:.1f} | {ours:.3f} s |",
        f"| noise self-test of a job over noise of 1 M parameters | {tested / ours:.2f} | {tested:.3f} s |",
    ]


def step() -> list[str]:
    """A site of 500 patients with two images each, heads of BiomedCLIP's size."""
    torch.set_num_threads(1)
    patient = torch.arange(500).repeat_interleave(2)
    data = PatientTensors(torch.randn(1000, 512), patient, torch.randint(0, 2, (1000,)), torch.randint(0, 2, (1000,)))
    mechanism, objective = Mechanism(10.0, 1.0, 500), OBJECTIVES["cross-entropy"]
    lines = []
    for name, projection in (("heads", None), ("projection and heads", Projection(nn.Linear(512, 512, bias=False)))):
        part = TrainablePart(nn.ModuleDict({"a": nn.Linear(512, 2), "b": nn.Linear(512, 2)}), projection)
        private = seconds(lambda p=part: private_step(p, data, objective, mechanism, 0.1, 64))
        plain = seconds(lambda p=part: plain_step(p, data, objective, 0.1, 64))
        lines.append(f"| private step over plain step, {name} | {private / plain:.1f} | {private:.3f} s |")
    return lines


def ledger(folder: Path) -> list[str]:
    book = Ledger(folder / "ledger.jsonl", "alder", Budget(epsilon=100.0, delta=1e-5))
    book.create()
    book.reserve("job", 10**9, "c" * 64)
    took = []
    for number in range(APPENDS):
        began = time.perf_counter()
        book.charge("job", number, 1, f"n{number}")
        took.append(time.perf_counter() - began)
    p50, p99 = np.percentile(took, 50), np.percentile(took, 99)
    with book.chain.locked() as (view, append):
        fill = RECORDS - len(view.records)
        fsync, sync, write = (lambda *_: None,) * 3  # the filling itself is not what is measured
        from clinifed.privacy import chain

        kept = chain.os.fsync, chain.sync_folder, chain.write_atomic
        chain.os.fsync, chain.sync_folder, chain.write_atomic = fsync, sync, write
        record = {"version": 2, "site": "alder", "kind": "charge", "job": "job", "units": 1}
        for number in range(fill):
            if number == fill - 1:
                chain.os.fsync, chain.sync_folder, chain.write_atomic = kept
            append({**record, "round": number, "nonce": f"m{number}"})
    replay = seconds(lambda: read_ledger(folder / "ledger.jsonl"), 3)
    fresh = Ledger(folder / "ledger.jsonl", "alder", Budget(epsilon=100.0, delta=1e-5))
    fresh.state()
    late = seconds(lambda: fresh.charge("job", 0, 1, f"l{time.monotonic_ns()}"), 20)
    return [
        f"| ledger append, p99 over p50, first {APPENDS:,} records | {p99 / p50:.1f} | p99 {1e3 * p99:.1f} ms |",
        f"| ledger append at {RECORDS:,} records over one among the first | {late / p50:.1f} | {1e3 * late:.0f} ms |",
        f"| replay of {RECORDS:,} records over one append there | {replay / late:.1f} | {replay:.2f} s |",
    ]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [*noise(), *step(), *ledger(Path(folder))]
    text = ["| what | ratio | here |", "|---|---|---|", *rows]
    write_section("What privacy costs", text)
    print("\n".join(text))


if __name__ == "__main__":
    main()
