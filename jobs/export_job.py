"""``clinifed job``: the FLARE job folder of a federation, and if wished a workspace to try it in."""

from collections.abc import Callable
from pathlib import Path

from clinifed.config import Federation
from clinifed.errors import ConfigError
from clinifed.executors.flare import SIMULATOR
from clinifed.jobs.basis import basis_file, with_basis
from clinifed.jobs.prepare import make_site_keys, prepare_data, site_policies, write_site_folder
from clinifed.jobs.recipe import FederationRecipe, build_contract
from clinifed.models.backbone import load_backbone

__all__ = ["export_job"]


def export_job(
    federation: Federation, out: Path, workspace: Path | None, progress: Callable[[str], None]
) -> dict[str, Path]:
    """Write ``out/<name>``; with ``workspace``, also data and ``local/`` for ``nvflare simulator -w WORKSPACE``.

    Returns:
        What was written: ``job``, and ``workspace``.

    Raises:
        ConfigError: the job folder exists.
    """
    target = out / federation.name
    if target.exists():
        raise ConfigError(f"--out {out}: {target} exists; choose another folder")
    written = {"job": target}
    if workspace is None:
        backbone = with_basis(federation, load_backbone(federation.model.ref), out, progress)
        contract = build_contract(federation, backbone)
    else:
        home = workspace.with_name(f"{workspace.name}-data").resolve()
        backbone = with_basis(federation, load_backbone(federation.model.ref), home, progress)
        contract = build_contract(federation, backbone, make_site_keys(federation, home))
        data = prepare_data(federation, home / "data", progress)
        basis = basis_file(federation, home)
        policies = site_policies(federation, data, home, contract, (SIMULATOR,), basis)
        write_site_folder(workspace / "local", policies, contract)
        written["workspace"] = workspace
    FederationRecipe(contract).write(out)
    progress(f"contract {contract.sha256()}")
    return written
