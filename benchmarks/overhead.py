"""What a federation costs beside its training: a simulated run over the same job that trains nothing, and training.

``python benchmarks/overhead.py`` writes its section of ``RESULTS.md`` and ``federation_overhead`` in ``results.json``.

Three sites. The run has ``ROUNDS`` rounds. The job that imports and loads the same and trains nothing is the same
federation with one round, less what its slowest site computed in it. Both are whole ``clinifed simulate`` commands,
evaluation included; embeddings are made anew in each, since nothing is kept between them.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from results import Entry, record, write_section

ROUNDS = 10
GOAL = 1.15
TRAINED = re.compile(r"round \d+: trained in ([0-9.]+) s")
PLAN: dict[str, Any] = {
    "name": "overhead",
    "min_clients": 3,
    "max_clients": 3,
    "training": {"train": "lora", "learning_rate": 0.5, "batch_size": 32},
    "privacy": {"epsilon": 3.0},
    "aggregation": {"quorum": 3, "round_timeout_s": 600},
    "data": {"synthesize": {"patients_per_specialty": 100, "public_patients_per_specialty": 20, "max_images": 2}},
    "sites": {name: {"specialties": ["radiology", "dermatology"]} for name in ("alder", "birch", "cedar")},
}


def simulate(folder: Path, rounds: int) -> tuple[float, float]:
    """Wall seconds of a run, and what the slowest site computed in it, round by round."""
    folder.mkdir()
    plan, out = folder / "plan.yaml", folder / "run"
    plan.write_text(yaml.safe_dump({**PLAN, "rounds": rounds}))
    command = [sys.executable, "-P", "-m", "clinifed", "simulate", str(plan), "--out", str(out), "--threads", "1"]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall = time.perf_counter() - began
    logs = [path for path in out.rglob("*log*") if path.is_file()]
    by_site = {}
    for site in PLAN["sites"]:
        texts = [path.read_text(errors="replace") for path in logs if site in str(path)]
        found = max((TRAINED.findall(text) for text in texts), key=len, default=[])
        if len(found) < rounds:
            raise SystemExit(f"{out}: {site} tells of {len(found)} rounds, not of {rounds}")
        by_site[site] = [float(seconds) for seconds in found[:rounds]]
    return wall, sum(max(of_round) for of_round in zip(*by_site.values(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="print, and leave the results alone")
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(options.turns):
            empty, once = simulate(Path(scratch) / f"empty{turn}", 1)
            wall, compute = simulate(Path(scratch) / f"whole{turn}", ROUNDS)
            runs.append((wall, empty - once, compute))
    ratios = [wall / (empty + compute) for wall, empty, compute in runs]
    wall, empty, compute = (statistics.median(column) for column in zip(*runs, strict=True))
    ratio = statistics.median(ratios)
    print(json.dumps({"ratio": ratio, "wall_s": wall, "empty_s": empty, "compute_s": compute, "ratios": ratios}))
    if options.dry:
        return
    unit = "s, run over the job that trains nothing and the slowest site's compute"
    record([Entry("federation_overhead", ratio, wall, empty + compute, unit, max(ratios) - min(ratios))])
    lines = [
        f"Three simulated sites, {ROUNDS} rounds of `lora` on the tiny model, 200 patients a site, one thread each.",
        "",
        "| what | ratio | here |",
        "|---|---|---|",
        f"| `federation_overhead` (goal ≤ {GOAL}) | {ratio:.2f} | {wall:.0f} s over {empty:.0f} s + {compute:.0f} s |",
    ]
    write_section("What a federation costs beside its training", lines)


if __name__ == "__main__":
    main()
