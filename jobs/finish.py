"""After the last round: the model with its start added back, what it is worth, its checkpoint and the summary."""

import json
import os
import time
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import torch

from clinifed.aggregators.checkpoint import write_checkpoint
from clinifed.aggregators.run_state import RunState
from clinifed.contract import Contract
from clinifed.evaluation.assessment import MIN_PATIENTS
from clinifed.files import read_lines, write_json
from clinifed.jobs.card import agreed_card, public_paths
from clinifed.jobs.evaluate_run import evaluate_run
from clinifed.jobs.prepare import PreparedData
from clinifed.models.backbone import Backbone
from clinifed.models.state import arrays, read_checkpoint
from clinifed.policy import SitePolicy
from clinifed.privacy.claims import claim_schema, make_claim
from clinifed.privacy.ledger import Ledger

__all__ = ["finish_run", "save_checkpoint", "site_claims", "summarise", "summary_schema", "told_claims"]

_SCHEMA = "summary.schema.json"


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
    card = {
        **agreed_card(contract, rounds[0]["job"]),
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
        "public": public_paths({"validation": data.validation, "test": data.test}, path.parent, path),
    }
    write_checkpoint(path, arrays(params), card)


def summarise(
    contract: Contract,
    backbone: Backbone,
    policies: dict[str, SitePolicy],
    rounds: list[dict[str, Any]],
    claims: Mapping[str, dict[str, Any] | None],
    metrics: dict[str, Any],
    comparison: list[dict[str, Any]],
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
        "comparison": comparison,
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
    minimum: int = MIN_PATIENTS,
) -> dict[str, Any]:
    """Evaluate a finished run, and write ``out/checkpoint`` and ``out/summary.json``; returns the summary.

    Args:
        policies: of the sites that are on this machine, with their ledgers; of others, their last word counts.
        started: ``time.monotonic()`` at the beginning.
        minimum: of patients, below which a figure of the comparison is suppressed.
    """
    claims = told_claims(contract, state.rounds) | site_claims(contract, policies)
    metrics, rows, params = evaluate_run(contract, backbone, data, policies, state.model(), progress, minimum)
    summary = summarise(contract, backbone, policies, state.rounds, claims, metrics, rows, time.monotonic() - started)
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
