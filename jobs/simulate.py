"""``clinifed simulate``: a whole federation on one machine, through FLARE's simulator, into one run directory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from clinifed.config import Federation
from clinifed.errors import ConfigError
from clinifed.executors.flare import SIMULATOR
from clinifed.jobs.basis import basis_file, with_basis
from clinifed.jobs.finish import finish_run
from clinifed.jobs.follow import follow
from clinifed.jobs.prepare import make_site_keys, prepare_data, site_policies, write_site_folder
from clinifed.jobs.recipe import build_contract, new_run
from clinifed.jobs.run_directory import run_directory, take
from clinifed.jobs.simulator import simulator_process
from clinifed.models.backbone import load_backbone
from clinifed.privacy.claims import TRUST_MODEL

__all__ = ["simulate"]

DATA_FOLDER = "data"  # beneath the run: synthesized or indexed data
# Each has a trainer of 0.9 GB (measured; torch and open_clip are the most of it): within a machine of 24 GB.
_MAX_PROCESSES = 16


def simulate(
    federation: Federation, run: Path, progress: Callable[[str], None], threads: int | None = None
) -> dict[str, Any]:
    """Run ``federation`` and leave ``summary.json``, ``checkpoint/``, ``log.txt`` and ``sites/`` in ``run``.

    Args:
        threads: FLARE simulator threads, at most one for each site; fewer means one fresh process per task.

    Raises:
        ConfigError: there are more threads than sites. Nothing is made.
        ClinifedError: after writing a ``summary.json`` with status ``failed``; no checkpoint is left then.
    """
    most = len(federation.sites)
    if threads is not None and not 1 <= threads <= most:
        raise ConfigError(f"--threads {threads}: FLARE's simulator takes 1 to {most}, one for each site")
    run = run.resolve()
    take(run)
    with run_directory(run, federation.name) as started:
        return _run(federation, run, progress, threads or min(most, _MAX_PROCESSES), started)


def _run(
    federation: Federation, run: Path, progress: Callable[[str], None], threads: int, started: float
) -> dict[str, Any]:
    backbone = with_basis(federation, load_backbone(federation.model.ref), run, progress)
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
    policies = site_policies(federation, data, run, contract, (SIMULATOR,), basis_file(federation, run))
    workspace = run / "flare"
    write_site_folder(workspace / contract.federation / "local", policies, contract)
    log_file = run / "log.txt"
    progress("starting FLARE's simulator")
    name = new_run()
    with simulator_process(contract, name, workspace, threads, log_file) as process:
        state = follow(process, contract, name, workspace, policies, progress, log_file)
    least = federation.evaluation.min_patients
    return finish_run(contract, backbone, data, policies, state, run, started, progress, least)
