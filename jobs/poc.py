"""``clinifed poc``: the sites of a configuration as real FLARE processes on this machine, from kits, over mTLS."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clinifed.config import Federation
from clinifed.jobs.basis import basis_file, with_basis
from clinifed.jobs.kit import SERVER
from clinifed.jobs.kit_processes import LocalKits, free_ports
from clinifed.jobs.prepare import make_site_keys, prepare_data, site_policies, write_policy
from clinifed.jobs.provision import provision
from clinifed.jobs.recipe import build_contract
from clinifed.jobs.run_directory import run_directory, take
from clinifed.jobs.submit import begin, read_run, resume
from clinifed.models.backbone import load_backbone
from clinifed.policy import SitePolicy, find_policy

__all__ = ["local_kits", "poc", "poc_down", "poc_submit", "poc_up", "prepare_poc"]

_CONNECT_S = 120.0  # measured: 10 s for three sites on two quiet cores


def prepare_poc(federation: Federation, out: Path, progress: Callable[[str], None]) -> dict[str, Path]:
    """Make data, kits and policies in ``out``, and write down the run; starts nothing. Returns name → kit.

    Every kit is what ``clinifed provision`` makes; only the site's policy is filled in, as its steward would do it.

    Raises:
        ConfigError, DataError, LedgerError: as a simulation would; nothing was started.
    """
    take(out)
    first, second = free_ports(2)
    deployment = federation.deployment.model_copy(update={"host": "localhost", "port": first, "admin_port": second})
    federation = federation.model_copy(update={"deployment": deployment})
    backbone = with_basis(federation, load_backbone(federation.model.ref), out, progress)
    contract = build_contract(federation, backbone, make_site_keys(federation, out))
    data = prepare_data(federation, out / "data", progress)
    policies = site_policies(federation, data, out, contract, (deployment.coordinator,), basis_file(federation, out))
    kits = provision(federation, out / "kits", progress)
    for name, policy in policies.items():
        write_policy(kits[name] / "local", policy)
    begin(federation, out, kits[deployment.coordinator], contract, kits)
    (out / "log.txt").symlink_to(kits[SERVER].resolve().relative_to(out.resolve()) / "log.txt")
    return kits


def local_kits(out: Path) -> LocalKits:
    """The processes of the federation in ``out``, running or not."""
    content, _, _ = read_run(out)
    kits = {name: Path(path) for name, path in content["kits"].items()}
    return LocalKits(kits, content["run"], out / "logs")


def _policies(out: Path) -> dict[str, SitePolicy]:
    content, federation, _ = read_run(out)
    return {name: find_policy(Path(content["kits"][name]) / "local", name) for name in federation.sites}


def poc_up(federation: Federation, out: Path, progress: Callable[[str], None]) -> None:
    """Prepare the federation in ``out`` and start it; returns once every site is connected."""
    out = out.resolve()
    prepare_poc(federation, out, progress)
    _start(out, federation, progress)


def _start(out: Path, federation: Federation, progress: Callable[[str], None]) -> None:
    kits = local_kits(out)
    progress(f"starting {SERVER} and {len(federation.sites)} sites")
    try:
        kits.start()
        seconds = kits.wait_connected(federation.sites, _CONNECT_S)
    except BaseException:
        kits.kill()
        raise
    progress(f"all sites are connected ({seconds:.0f} s)")


def poc_submit(out: Path, progress: Callable[[str], None], patience_s: float = 600.0) -> dict[str, Any]:
    """Run the federation in ``out`` to its end, or go on with it; returns the summary."""
    out = out.resolve()
    _, federation, _ = read_run(out)
    return resume(out, progress, _policies(out), prepare_data(federation, out / "data", progress), patience_s)


def poc_down(out: Path, progress: Callable[[str], None]) -> None:
    """Stop the federation in ``out``; its run directory stays."""
    kits = local_kits(out.resolve())
    progress("stopping")
    kits.stop()


@contextmanager
def _running(federation: Federation, out: Path, progress: Callable[[str], None]) -> Iterator[None]:
    poc_up(federation, out, progress)
    with local_kits(out):
        yield
        progress("stopping")


def poc(federation: Federation, out: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    """The whole of it: prepare, start, run, stop. Leaves the run directory of a simulation, and the kits.

    Raises:
        ClinifedError: after everything was stopped, with a ``summary.json`` that says so.
    """
    out = out.resolve()
    take(out)
    with run_directory(out, federation.name), _running(federation, out, progress):
        return poc_submit(out, progress)
