"""What a federation costs beside its training: a simulated run over the same job that trains nothing, and training.

``python benchmarks/overhead.py`` writes its section of ``RESULTS.md`` and ``federation_overhead`` in ``results.json``.

Three sites, each with a FLARE process and a trainer of its own. The run has ``ROUNDS`` rounds. The job that imports and
loads the same and trains nothing is the same federation with one round, less what its slowest site computed in it. Both
are timed from the start of FLARE's simulator to its end, with the same images on the disk and no embeddings kept.
"""

import argparse
import json
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from results import Entry, record, write_section

from clinifed.config import Federation
from clinifed.executors.flare import SIMULATOR
from clinifed.jobs.follow import follow
from clinifed.jobs.prepare import PreparedData, make_site_keys, prepare_data, site_policies, write_site_folder
from clinifed.jobs.recipe import build_contract, new_run
from clinifed.jobs.simulator import simulator_process
from clinifed.models.backbone import load_backbone

ROUNDS = 10
GOAL = 1.15
PATIENTS = {"federation_overhead": 800, "federation_overhead_short": 100}  # per specialty, two of them, at a site
TRAINED = re.compile(r"round \d+: trained in ([0-9.]+) s")
PLAN: dict[str, Any] = {
    "name": "overhead",
    "min_clients": 3,
    "max_clients": 3,
    "training": {"train": "lora", "learning_rate": 0.5, "batch_size": 32},
    "privacy": {"epsilon": 3.0},
    "aggregation": {"quorum": 3, "round_timeout_s": 600},
    "sites": {name: {"specialties": ["radiology", "dermatology"]} for name in ("alder", "birch", "cedar")},
}


def plan(patients: int, rounds: int) -> Federation:
    drawn = {"patients_per_specialty": patients, "public_patients_per_specialty": 20, "max_images": 2}
    return Federation.model_validate({**PLAN, "rounds": rounds, "data": {"synthesize": drawn}})


def simulate(run: Path, federation: Federation, data: PreparedData) -> tuple[float, float]:
    """Wall seconds of FLARE's part of a run, and what the slowest site computed in it, round by round."""
    run.mkdir()
    contract = build_contract(federation, load_backbone(federation.model.ref), make_site_keys(federation, run))
    policies = site_policies(federation, data, run, contract, (SIMULATOR,))
    workspace, log, name = run / "flare", run / "log.txt", new_run()
    write_site_folder(workspace / contract.federation / "local", policies, contract)
    began = time.perf_counter()
    with simulator_process(contract, name, workspace, len(contract.sites), log) as process:
        state = follow(process, contract, name, workspace, policies, lambda text: None, log)
    wall = time.perf_counter() - began
    assert len(state.rounds) == federation.rounds
    taken = []
    for site, policy in policies.items():
        found = TRAINED.findall(policy.log.read_text(errors="replace"))
        if len(found) != federation.rounds:
            raise SystemExit(f"{policy.log}: {site} tells of {len(found)} rounds, not of {federation.rounds}")
        taken.append([float(seconds) for seconds in found])
    return wall, sum(max(of_round) for of_round in zip(*taken, strict=True))


def measured(patients: int, turns: int, scratch: Path) -> dict[str, Any]:
    """The ratio in each turn, and the medians of what it is of."""
    data = prepare_data(plan(patients, ROUNDS), scratch / "data", lambda text: None)
    runs = []
    for turn in range(turns):
        empty, once = simulate(scratch / f"empty{turn}", plan(patients, 1), data)
        wall, compute = simulate(scratch / f"whole{turn}", plan(patients, ROUNDS), data)
        runs.append((wall, empty - once, compute))
    wall, empty, compute = (statistics.median(column) for column in zip(*runs, strict=True))
    ratios = [wall / (empty + compute) for wall, empty, compute in runs]
    return {"wall_s": wall, "empty_s": empty, "compute_s": compute, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="print, and leave the results alone")
    options = parser.parse_args()
    entries, lines = [], [f"Three simulated sites, {ROUNDS} rounds of `lora` on the tiny model.", ""]
    lines += ["| what | ratio | here |", "|---|---|---|"]
    for name, patients in PATIENTS.items():
        with tempfile.TemporaryDirectory() as scratch:
            found = measured(patients, options.turns, Path(scratch))
        print(json.dumps({name: found}), flush=True)
        ratio, base = statistics.median(found["ratios"]), found["empty_s"] + found["compute_s"]
        unit = "s, run over the job that trains nothing and the slowest site's compute"
        spread = max(found["ratios"]) - min(found["ratios"])
        entries.append(Entry(name, ratio, found["wall_s"], base, unit, spread))
        goal = f" (goal ≤ {GOAL})" if name == "federation_overhead" else ""
        lines.append(
            f"| `{name}`{goal}, {2 * patients} patients a site, {found['compute_s'] / ROUNDS:.1f} s a round "
            f"| {ratio:.2f} | {found['wall_s']:.0f} s over {found['empty_s']:.0f} s + {found['compute_s']:.0f} s |"
        )
    if not options.dry:
        record(entries)
        write_section("What a federation costs beside its training", lines)


if __name__ == "__main__":
    main()
