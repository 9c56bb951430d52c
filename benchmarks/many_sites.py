"""Many sites on one machine: whole simulations, and the server's memory at a payload that weighs something.

``python benchmarks/many_sites.py [--sites 3 10 50 200] [--rounds 1] [--threads 8] [--out FOLDER]`` writes a section of
RESULTS.md, and ``many_sites_*`` in results.json: what a site and round of many costs over one of the fewest.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml
from results import Entry, record, write_section

PARAMETERS = 5_000_000  # 20 MB of float32 an update
SPECIALTIES = ["radiology", "dermatology", "emergency", "cardiology"]


def config(sites: int, rounds: int) -> dict:
    return {
        "name": "many-sites",
        "rounds": rounds,
        "min_clients": sites,
        "max_clients": sites,
        "privacy": {"epsilon": 3.0, "delta": 1e-5},
        "aggregation": {"quorum": sites, "round_timeout_s": 3600},
        "data": {
            "synthesize": {"patients_per_specialty": 4, "public_patients_per_specialty": 8, "max_images": 1},
        },
        "sites": {
            f"site{n:03d}": {"specialties": [SPECIALTIES[n % 4], SPECIALTIES[(n + 1) % 4]]} for n in range(sites)
        },
    }


def simulate(sites: int, rounds: int, threads: int, folder: Path) -> dict:
    """One whole run; peak memory of the server's process (which is the simulator's), and of everything together."""
    run, plan = folder / f"run{sites}", folder / f"sites{sites}.yaml"
    plan.write_text(yaml.safe_dump(config(sites, rounds)))
    words = ["-P", "-m", "clinifed", "simulate", str(plan), "--out", str(run), "--threads", str(threads), "--json"]
    started = time.monotonic()
    server = total = most = 0
    with (folder / f"out{sites}.json").open("wb") as out, (folder / f"err{sites}.txt").open("wb") as err:
        process = subprocess.Popen([sys.executable, *words], stdout=out, stderr=err)
        while process.poll() is None:
            used = count = 0
            for child in psutil.Process(process.pid).children(recursive=True):
                try:
                    rss = child.memory_full_info().pss
                    used, count = used + rss, count + 1
                    if "clinifed.jobs.simulator" in child.cmdline():
                        server = max(server, child.memory_info().rss)
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            total, most = max(total, used), max(most, count)
            time.sleep(2)
    assert process.returncode == 0, (folder / f"err{sites}.txt").read_text()
    summary = json.loads((folder / f"out{sites}.json").read_text())
    accepted = sum(r["accepted"] for s in summary["sites"].values() for r in s["rounds"])
    assert accepted == sites * rounds, f"{accepted} updates of {sites * rounds}"
    sent = next(iter(summary["sites"].values()))["rounds"][0]["bytes_sent"]
    return {
        "sites": sites,
        "threads": threads,
        "wall_s": round(time.monotonic() - started),
        "payload_bytes": sent,
        "server_peak_mib": round(server / 2**20),
        "all_peak_gib": round(total / 2**30, 2),
        "processes": most,
    }


CHILD = """
import json, resource, sys, tempfile
from pathlib import Path
import numpy as np
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from clinifed.aggregators.run_state import RunState
from clinifed.aggregators.specialty import SpecialtyAggregator
from clinifed.config import Aggregation, Training
from clinifed.contract import BaseModelRef, Contract, ContractSite, Promise
from clinifed.models.specialties import SPECIALTIES
from clinifed.privacy.claims import make_claim

sites, size = int(sys.argv[1]), int(sys.argv[2])
contract = Contract(
    federation="memory", clinifed_version="0", base_model=BaseModelRef(ref="tiny", sha256="0" * 64),
    specialties={"radiology": SPECIALTIES["radiology"]}, training=Training(),
    aggregation=Aggregation(quorum=1, round_timeout_s=60),
    promise=Promise(mode="dp", epsilon=1, delta=1e-5, noise_multiplier=10, max_grad_norm=1, releases=3,
                    objective="cross-entropy"),
    rounds=3, min_clients=1, max_clients=sites,
    sites={f"s{n:02d}": ContractSite(specialties=("radiology",), nominal_patients=10, weight=1, norm_bound=1e9)
           for n in range(sites)},
    shapes={f"trunk.part{n}": (size // 10,) for n in range(10)},
)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
aggregator = SpecialtyAggregator(contract.text())
aggregator.warning = print
aggregator.job = "run"
with tempfile.TemporaryDirectory() as folder:
    state = RunState(Path(folder), "run", contract)
    before = peak()
    generator = np.random.default_rng(0)
    for number, site in enumerate(contract.sites):
        params = {n: generator.standard_normal(s, dtype=np.float32) for n, s in contract.shapes.items()}
        head = "a" * 64
        claim = make_claim(contract, site, "job", 10**9, 1e-5, head)
        meta = {"job": "run", "nonce": f"{number:032x}", "claim": claim, "ledger_head": head, "client_name": site}
        model = FLModel(params_type=ParamsType.DIFF, params=params, current_round=0, meta=meta)
        assert aggregator.accept_model(model), aggregator.refused
        del params, model
    staged = peak()
    change = aggregator.aggregate_model().params
    delta = {n: v + change[n] for n, v in state.delta.items()}
    state.commit(0, delta, aggregator.memory, {"round": 0, "counted": True, "accepted": [], "nonces": {}})
    print(json.dumps({"before_mib": before, "staged_mib": staged, "peak_mib": peak()}))
"""


def server_memory(sites: int) -> dict:
    """Peak memory of a server that stages, checks, averages and commits updates of 20 MB from ``sites`` sites."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, str(sites), str(PARAMETERS)], capture_output=True, text=True, check=True
    )
    return {"sites": sites, "payload_mib": PARAMETERS * 4 / 2**20, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 10, 50, 200])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--out", type=Path, help="keep the runs here")
    args = parser.parse_args()
    memory = [server_memory(n) for n in args.sites]
    lines = [
        f"One round of fedavg, updates of {PARAMETERS * 4 / 1e6:.0f} MB, staged, checked, averaged and committed:",
        "",
        "| sites | staged payloads, MiB | peak above start, MiB | ratio |",
        "|---|---|---|---|",
    ]
    for m in memory:
        staged, grown = m["sites"] * m["payload_mib"], m["peak_mib"] - m["before_mib"]
        lines.append(f"| {m['sites']} | {staged:.0f} | {grown:.0f} | {grown / staged:.2f} |")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        runs = []
        for sites in args.sites:  # written after each, since the largest may take an hour
            kept = folder / f"figures{sites}-{args.rounds}.json"  # a run that exists is reused
            if not kept.exists():
                kept.write_text(json.dumps(simulate(sites, args.rounds, min(sites, args.threads), folder)))
            runs.append(json.loads(kept.read_text()))
            print(json.dumps(runs[-1]), flush=True)
            write(lines, runs, args.rounds)


def write(lines: list[str], runs: list[dict], rounds: int) -> None:
    """The results so far."""
    each = [run["wall_s"] / (run["sites"] * rounds) for run in runs]
    unit = f"s of wall time a site and round, over that of {runs[0]['sites']} sites"
    record(
        [Entry(f"many_sites_{r['sites']}", c / each[0], c, each[0], unit, 0) for r, c in zip(runs, each, strict=True)]
    )
    rows = [
        f"| {r['sites']} | {r['threads']} | {r['wall_s']} | {cost:.1f} | {r['payload_bytes'] / 1e3:.1f} | "
        f"{r['server_peak_mib']} | {r['all_peak_gib']} |"
        for r, cost in zip(runs, each, strict=True)
    ]
    head = [
        "",
        f"Whole simulations, rounds: {rounds}, every update of every site accepted:",
        "",
        "| sites | threads | wall, s | a site and round, s | update, kB | server, peak MiB | all processes, peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    tail = [
        "",
        "Wall time grows with the sites, since their tasks share the cores: a site's handshake and its round are a",
        "process each where there are fewer threads than sites. Memory grows with the threads, and the server's with",
        "what a round stages. FLARE's simulator takes 100 clients unless it is told a number, which its `SimEnv` does",
        "not tell; `jobs/simulator_env.py` does.",
    ]
    write_section("Many sites", [*lines, *head, *rows, *tail])


if __name__ == "__main__":
    main()
