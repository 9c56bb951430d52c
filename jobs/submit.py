"""``clinifed submit`` and ``clinifed status``: a run on a federation that is up, from the coordinator's machine."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clinifed.config import Federation
from clinifed.contract import Contract
from clinifed.errors import ConfigError
from clinifed.files import write_json
from clinifed.jobs.basis import with_basis
from clinifed.jobs.chain import RunChain
from clinifed.jobs.finish import finish_run
from clinifed.jobs.prepare import PreparedData, prepare_public
from clinifed.jobs.recipe import build_contract, new_run
from clinifed.load import validate
from clinifed.models.backbone import load_backbone
from clinifed.policy import SitePolicy

__all__ = ["RUN_FILE", "begin", "read_run", "resume", "submit"]

RUN_FILE = "run.json"  # in a run directory: all that is needed to go on with it


def begin(
    federation: Federation, out: Path, admin: Path, contract: Contract, kits: Mapping[str, Path] | None = None
) -> None:
    """Write down in ``out`` what a run is, before anything of it is submitted.

    Args:
        kits: where the processes of this machine have their kits, for a federation on one machine.

    Raises:
        ConfigError: ``out`` holds a run already.
    """
    if (out / RUN_FILE).exists():
        raise ConfigError(f"--out {out}: holds a run already; go on with it by --resume {out}, or choose another")
    out.mkdir(parents=True, exist_ok=True)
    write_json(
        out / RUN_FILE,
        {
            "schema_version": 1,
            "run": new_run(),
            "admin_kit": str(admin.resolve()),
            "kits": {name: str(path.resolve()) for name, path in (kits or {}).items()},
            "federation": federation.model_dump(mode="json"),
            "contract": contract.model_dump(mode="json"),
            "contract_sha256": contract.sha256(),
        },
    )


def read_run(out: Path) -> tuple[dict[str, Any], Federation, Contract]:
    """What ``begin`` wrote.

    Raises:
        ConfigError: ``out`` holds no run, or a damaged one.
    """
    path = out / RUN_FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        federation = validate(Federation, content["federation"], f"{path}: federation")
        contract = validate(Contract, content["contract"], f"{path}: contract")
        if contract.sha256() != content["contract_sha256"]:
            raise ConfigError(f"{path}: the contract is not the one that was written; a run keeps its contract")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a run directory ({type(error).__name__}: {error})") from None
    return content, federation, contract


def submit(federation: Federation, admin: Path, out: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    """Submit ``federation`` to the running federation whose coordinator has the kit ``admin``, and follow it.

    Returns:
        The summary, which is in ``out`` as well, with the checkpoint.

    Raises:
        ConfigError: a site of hospital data names no public key, or ``out`` is taken.
        FederationError: the run did not finish; it can be resumed.
    """
    keyless = [name for name, site in federation.sites.items() if site.public_key is None]
    if keyless:
        raise ConfigError(
            *(
                f"sites.{name}.public_key: missing; the hospital's steward gets it by `clinifed privacy key`, and "
                "updates of that site are taken at its signature only"
                for name in keyless
            )
        )
    if federation.training.basis != "none" and federation.model.basis is None:
        raise ConfigError(
            f"training.basis: {federation.training.basis!r}, but model.basis names no file; make one with `clinifed "
            "basis CONFIG --out FILE`: every site must hold it, and name it in its policy, before the run"
        )
    contract = build_contract(federation, with_basis(federation, load_backbone(federation.model.ref), out, progress))
    begin(federation, out, admin, contract)
    progress(f"contract {contract.sha256()}: each site's policy must approve it before the site takes part")
    return resume(out, progress)


def resume(
    out: Path,
    progress: Callable[[str], None],
    policies: Mapping[str, SitePolicy] | None = None,
    data: PreparedData | None = None,
    patience_s: float = 600.0,
) -> dict[str, Any]:
    """Go on with the run in ``out`` to its end, wherever it stands; the summary of one that finished is read again.

    Args:
        policies: of the sites that are on this machine; none of hospitals elsewhere.
        data: manifests that are at hand; default: the public sets of the configuration.
    """
    started = time.monotonic()
    content, federation, contract = read_run(out)
    if (out / "summary.json").exists():
        summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        if summary["status"] == "finished":  # what a failed attempt left is no result
            return summary
    data = data or prepare_public(federation, out / "data", progress)
    admin, per_job = Path(content["admin_kit"]), federation.deployment.rounds_per_job
    with RunChain(contract, content["run"], out, admin, per_job, progress, patience_s) as chain:
        state = chain.finish()
    backbone = with_basis(federation, load_backbone(federation.model.ref), out, progress, contract)
    least = federation.evaluation.min_patients
    return finish_run(contract, backbone, data, dict(policies or {}), state, out, started, progress, least)
