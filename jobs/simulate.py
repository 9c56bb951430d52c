"""``clinifed simulate``: a whole federation on one machine, through FLARE's simulator, into one run directory."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clinifed.aggregators.flare import GLOBAL_FILE
from clinifed.config import Federation
from clinifed.errors import ClinifedError, ConfigError, FederationError
from clinifed.files import write_json
from clinifed.jobs.finish import evaluate_run, save_checkpoint, site_claims, summarise
from clinifed.jobs.follow import follow, server_file
from clinifed.jobs.prepare import make_site_keys, prepare_data, site_policies, write_site_folder
from clinifed.jobs.recipe import build_contract
from clinifed.jobs.simulator import simulator_process
from clinifed.models.backbone import load_backbone
from clinifed.privacy.claims import TRUST_MODEL

__all__ = ["simulate"]

DATA_FOLDER = "data"  # beneath the run: synthesized or indexed data
# Each has a trainer of 0.9 GB (measured; torch and open_clip are the most of it): within a machine of 24 GB.
_MAX_PROCESSES = 16


def _claim(run: Path) -> None:
    """Take the run directory, or say why it cannot be used."""
    used = [name for name in ("summary.json", "checkpoint", "flare", "sites") if (run / name).exists()]
    if used:
        raise ConfigError(f"--out {run}: holds {', '.join(used)} of an earlier run; choose another directory")
    run.mkdir(parents=True, exist_ok=True)


def simulate(
    federation: Federation, run: Path, progress: Callable[[str], None], threads: int | None = None
) -> dict[str, Any]:
    """Run ``federation`` and leave ``summary.json``, ``checkpoint/``, ``log.txt`` and ``sites/`` in ``run``.

    Args:
        threads: FLARE simulator threads; fewer than sites means one fresh process per task.

    Raises:
        ClinifedError: after writing a ``summary.json`` with status ``failed``; no checkpoint is left then.
    """
    run = run.resolve()
    _claim(run)
    started = time.monotonic()
    try:
        return _run(federation, run, progress, threads or min(len(federation.sites), _MAX_PROCESSES), started)
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        problems = list(error.problems) if isinstance(error, ClinifedError) else [type(error).__name__]
        write_json(
            run / "summary.json",
            {
                "schema_version": 1,
                "status": status,
                "federation": federation.name,
                "error": problems,
                "wall_s": round(time.monotonic() - started, 3),
                "rounds": 0,
                "full_model_bytes": None,
                "checkpoint": None,
                "sites": {},
                "metrics": {},
            },
        )
        raise


def _run(
    federation: Federation, run: Path, progress: Callable[[str], None], threads: int, started: float
) -> dict[str, Any]:
    backbone = load_backbone(federation.model.ref)
    contract = build_contract(federation, backbone, make_site_keys(federation, run))
    promise = contract.promise
    if promise.mode == "dp":
        progress(
            f"{len(contract.sites)} hospitals, {contract.rounds} rounds: {promise.releases} releases at sigma "
            f"{promise.noise_multiplier:.3f}, at most epsilon {promise.epsilon:g} per {promise.unit} "
            f"({promise.relation.replace('_', '/')}, delta {promise.delta:g}; {TRUST_MODEL})"
        )
    else:
        progress(f"{len(contract.sites)} sites, {contract.rounds} rounds, privacy off (public or synthetic data only)")
    data = prepare_data(federation, run / DATA_FOLDER, progress)
    for name, manifest in data.sites.items():
        count = len({r.patient for r in manifest.records}), len(manifest.records)
        progress(f"  {name}: {count[0]} patients, {count[1]} images, {', '.join(contract.sites[name].specialties)}")
    policies = site_policies(federation, data, run, contract)
    workspace = run / "flare"
    write_site_folder(workspace / contract.federation / "local", policies, contract)
    log_file = run / "log.txt"
    progress("starting FLARE's simulator")
    with simulator_process(contract, workspace, threads, log_file) as process:
        rounds = follow(process, contract, workspace, policies, progress, log_file)
    delta = server_file(workspace, GLOBAL_FILE)
    if delta is None:
        raise FederationError(f"no {GLOBAL_FILE} beneath {workspace}; what FLARE said is in {log_file}")
    claims = site_claims(contract, policies)
    metrics, params = evaluate_run(contract, backbone, data, policies, delta, progress)
    summary = summarise(contract, backbone, policies, rounds, claims, metrics, time.monotonic() - started)
    save_checkpoint(run / "checkpoint", contract, params, data, rounds, claims, metrics)
    write_json(run / "summary.json", summary)
    progress(f"checkpoint {os.path.relpath(run / 'checkpoint')}")
    return summary
