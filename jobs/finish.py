"""After the last round: the model with its start added back, what it is worth, its checkpoint and the summary."""

import json
import os
import time
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import torch

from clinifed.aggregators.checkpoint import write_checkpoint
from clinifed.aggregators.run_state import RunState
from clinifed.contract import Contract
from clinifed.data.manifest import Manifest
from clinifed.evaluation.metrics import Scores, mean_scores
from clinifed.executors.features import patient_tensors
from clinifed.files import read_lines, write_json
from clinifed.jobs.baselines import load_part, local_scores, score_part
from clinifed.jobs.prepare import PreparedData
from clinifed.messages import Parameters
from clinifed.models.adapters import GlobalModel
from clinifed.models.backbone import Backbone
from clinifed.models.state import apply_delta, read_checkpoint
from clinifed.policy import SitePolicy
from clinifed.privacy.claims import claim_schema, make_claim
from clinifed.privacy.engine import PatientTensors
from clinifed.privacy.ledger import Ledger
from clinifed.privacy.objectives import resolve_objective

__all__ = ["evaluate_run", "finish_run", "save_checkpoint", "site_claims", "summarise", "summary_schema", "told_claims"]

_SCHEMA = "summary.schema.json"


def _features(
    contract: Contract,
    model: GlobalModel,
    backbone: Backbone,
    manifest: Manifest,
    names: list[str],
    split: str | None,
    cache: Path | None,
    views: int = 1,
) -> PatientTensors:
    return patient_tensors(
        model,
        backbone,
        manifest,
        {name: contract.specialties[name] for name in names},
        split=split,
        batch_size=contract.training.batch_size,
        cache=cache,
        objective=resolve_objective(contract.promise.objective),
        views=views,
    )


def evaluate_run(
    contract: Contract,
    backbone: Backbone,
    data: PreparedData,
    policies: dict[str, SitePolicy],
    delta: Parameters,
    progress: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metrics by specialty on the public test set, and the final parameters.

    Without a public test set the metrics are empty. The local baselines need the sites' own images, so they are
    made for data marked public or synthetic only; for a hospital's they stay null.
    """
    names = sorted(contract.specialties)
    start_part = load_part(contract, backbone)
    start = start_part.shared()
    params = apply_delta(start, {name: torch.from_numpy(value) for name, value in delta.items()})
    written = without_basis(contract)  # what is evaluated is what is written, and zero-shot is the base model's
    if written is not contract and backbone.basis is not None:
        params = backbone.basis.folded(params)
    if data.test is None:
        return {}, params
    progress("evaluating on the public test set")
    tested = sorted({r.specialty for r in data.test.records} & set(names))
    model = GlobalModel(backbone, start_part).eval()  # only its frozen part is read here
    public = _features(contract, model, backbone, data.test, tested, None, None)
    objective = resolve_objective(contract.promise.objective)
    zero_shot = score_part(load_part(written, backbone), public, tested, objective)
    federated = score_part(load_part(written, backbone, params), public, tested, objective)
    alone: dict[bool, dict[str, dict[str, Scores]]] = {True: {}, False: {}}
    if all(manifest.data_class != "hospital" for manifest in data.sites.values()):
        progress("training every site alone, for comparison")
        for site, manifest in data.sites.items():
            mine = sorted(contract.sites[site].specialties)
            views = contract.training.views
            own = _features(contract, model, backbone, manifest, mine, "train", policies[site].cache, views)
            modes = (True, False) if contract.promise.mode == "dp" else (False,)
            for private in modes:
                alone[private][site] = local_scores(contract, backbone, site, own, public, tested, private=private)
    metrics: dict[str, Any] = {}
    for name in tested:
        entry: dict[str, Any] = {
            "chance": 1 / len(contract.specialties[name].labels) if objective.labels == "one" else 0.5,
            "zero_shot": zero_shot[name].to_dict(),
            "local_only_dp": None,
            "local_only": None,
            "federated": federated[name].to_dict(),
        }
        for private, key in ((True, "local_only_dp"), (False, "local_only")):
            by_site = {site: scores[name] for site, scores in alone[private].items() if name in scores}
            if by_site:
                entry[key] = {
                    **{site: {"balanced_accuracy": s.balanced_accuracy} for site, s in by_site.items()},
                    "mean": {"balanced_accuracy": mean_scores(by_site)},
                }
        metrics[name] = entry
    return metrics, params


def without_basis(contract: Contract) -> Contract:
    """``contract`` with heads that read the embedding itself, as every model is written; itself where they do."""
    if contract.training.basis == "none":
        return contract
    return contract.model_copy(update={"training": contract.training.model_copy(update={"basis": "none"})})


def site_claims(contract: Contract, policies: dict[str, SitePolicy]) -> dict[str, dict[str, Any]]:
    """Every site's claim over its ledger's lifetime, from the verified file: for sites of this machine, at hand."""
    claims = {}
    for name, policy in policies.items():
        if contract.promise.mode == "off":
            claims[name] = make_claim(contract, name, "lifetime")
        else:
            state = Ledger.of(policy).state()
            claims[name] = make_claim(
                contract, name, "lifetime", state.spent_units, state.delta, state.head, state.epsilon_budget
            )
    return claims


def told_claims(contract: Contract, rounds: list[dict[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """What each site last claimed of this run; None of a site from which no update was ever taken."""
    claims: dict[str, dict[str, Any] | None] = dict.fromkeys(contract.sites)
    for entry in rounds:
        claims |= entry["claims"]
    return claims


def _declared(rounds: list[dict[str, Any]], site: str) -> dict[str, Any]:
    """What ``site`` told of its data, un-noised, by its own policy; the last round's word."""
    told: list[dict[str, Any]] = [entry["declared"][site] for entry in rounds if site in entry["declared"]]
    return told[-1] if told else {}


def save_checkpoint(
    path: Path,
    contract: Contract,
    params: dict[str, torch.Tensor],
    data: PreparedData,
    rounds: list[dict[str, Any]],
    claims: Mapping[str, dict[str, Any] | None],
    metrics: dict[str, Any],
) -> None:
    """Write the checkpoint with its card."""
    public = {
        which: str(Path("..") / manifest.path.relative_to(path.parent))
        for which, manifest in (("validation", data.validation), ("test", data.test))
        if manifest is not None and manifest.path.is_relative_to(path.parent)
    }
    card = {
        "schema_version": 1,
        "clinifed_version": contract.clinifed_version,
        "federation": contract.federation,
        "contract_sha256": contract.sha256(),
        "job": rounds[0]["job"],
        "base_model": contract.base_model.model_dump(),
        "training": without_basis(contract).training.model_dump(),
        "objective": contract.promise.objective,
        "specialties": {n: s.model_dump(mode="json") for n, s in contract.specialties.items()},
        "rounds": contract.rounds,
        "sites": {
            name: {
                "specialties": list(site.specialties),
                "rounds_accepted": sum(name in entry["accepted"] for entry in rounds),
                "privacy": claims[name],
                "declared": _declared(rounds, name),
            }
            for name, site in contract.sites.items()
        },
        "evaluation": {"data": "public test", "manifest_sha256": data.test.sha256, "metrics": metrics}
        if data.test
        else None,
        "public": public,
        "exportable": True,
    }
    write_checkpoint(path, {n: t.numpy().astype(np.float32) for n, t in params.items()}, card)


def summarise(
    contract: Contract,
    backbone: Backbone,
    policies: dict[str, SitePolicy],
    rounds: list[dict[str, Any]],
    claims: Mapping[str, dict[str, Any] | None],
    metrics: dict[str, Any],
    wall_s: float,
) -> dict[str, Any]:
    """The summary of a finished run, checked against its schema."""
    sites: dict[str, Any] = {}
    for name, site in contract.sites.items():
        written = read_lines(policies[name].diary) if name in policies else []
        diary = {entry["round"]: entry for entry in written if entry["job"] == rounds[0]["job"]}
        sites[name] = {
            "specialties": list(site.specialties),
            "rounds": [
                {
                    "round": entry["round"],
                    "compute_s": diary.get(entry["round"], {}).get("compute_s"),
                    "bytes_sent": diary.get(entry["round"], {}).get("bytes_sent"),
                    "bytes_received": diary.get(entry["round"], {}).get("bytes_received"),
                    "accepted": name in entry["accepted"],
                    "reason": entry["missing"].get(name),
                }
                for entry in rounds
            ],
            "privacy": claims[name],
            "declared": _declared(rounds, name),
        }
    summary = {
        "schema_version": 1,
        "status": "finished",
        "federation": contract.federation,
        "wall_s": round(wall_s, 3),
        "rounds": len(rounds),
        "full_model_bytes": backbone.parameter_bytes,
        "checkpoint": "checkpoint",
        "sites": sites,
        "metrics": metrics,
    }
    jsonschema.validate(summary, summary_schema())
    return summary


def finish_run(
    contract: Contract,
    backbone: Backbone,
    data: PreparedData,
    policies: dict[str, SitePolicy],
    state: RunState,
    out: Path,
    started: float,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Evaluate a finished run, and write ``out/checkpoint`` and ``out/summary.json``; returns the summary.

    Args:
        policies: of the sites that are on this machine, with their ledgers; of others, their last word counts.
        started: ``time.monotonic()`` at the beginning.
    """
    claims = told_claims(contract, state.rounds) | site_claims(contract, policies)
    metrics, params = evaluate_run(contract, backbone, data, policies, state.model(), progress)
    summary = summarise(contract, backbone, policies, state.rounds, claims, metrics, time.monotonic() - started)
    made = out / "checkpoint"
    if not made.exists() or read_checkpoint(made).card["job"] != state.run:  # a crash may have come in between
        save_checkpoint(made, contract, params, data, state.rounds, claims, metrics)
    write_json(out / "summary.json", summary)
    progress(f"checkpoint {os.path.relpath(out / 'checkpoint')}")
    return summary


def summary_schema() -> dict[str, Any]:
    """The JSON Schema of ``summary.json``, as shipped with the package."""
    schema: dict[str, Any] = json.loads(files("clinifed").joinpath(_SCHEMA).read_text(encoding="utf-8"))
    schema["$defs"]["privacy"] = claim_schema()  # the file names it by reference
    return schema
