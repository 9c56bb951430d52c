"""What the model of a finished run is worth, beside what each site could do alone and what all data in one place gives.

Nothing is decided here: figures are of the public test set, and of held-out patients where they are no hospital's.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clinifed.contract import Contract
from clinifed.data.manifest import Manifest
from clinifed.errors import DataError, UpdateError
from clinifed.evaluation.assessment import MIN_PATIENTS
from clinifed.evaluation.metrics import mean_scores
from clinifed.evaluation.scoring import scores_of
from clinifed.executors.features import patient_tensors
from clinifed.jobs.baselines import alone, centralised, federated_openly, load_part
from clinifed.jobs.card import without_basis
from clinifed.jobs.comparison import Judged, compare, judge
from clinifed.jobs.prepare import PreparedData
from clinifed.messages import Parameters
from clinifed.models.adapters import FrozenPart, TrainablePart
from clinifed.models.backbone import Backbone
from clinifed.models.state import apply_delta
from clinifed.policy import SitePolicy
from clinifed.privacy.engine import PatientTensors
from clinifed.privacy.objectives import Objective, resolve_objective

__all__ = ["evaluate_run"]


def _features(
    contract: Contract,
    model: FrozenPart,
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
    minimum: int = MIN_PATIENTS,
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Metrics by specialty on the public test set, the comparison with what else could be done, the final parameters.

    Without a public test set the metrics are empty. What the federation is compared with needs the sites' own images,
    so it is made for data marked public or synthetic only; for a hospital's it is left out.

    Args:
        minimum: of patients, below which a figure of the comparison is suppressed.
    """
    start_part = load_part(contract, backbone)
    start = start_part.shared()
    params = apply_delta(start, {name: torch.from_numpy(value) for name, value in delta.items()})
    written = without_basis(contract)  # what is evaluated is what is written, and zero-shot is the base model's
    if written is not contract and backbone.basis is not None:
        params = backbone.basis.folded(params)
    model = FrozenPart(backbone, start_part)
    objective = resolve_objective(contract.promise.objective)
    held_out = _held_out(contract, model, backbone, data, policies, progress)
    if data.test is None and not held_out:
        return {}, [], params
    local, shared = _baselines(contract, model, backbone, data, policies, progress)
    candidate = "federated_dp" if contract.promise.mode == "dp" else "federated_no_dp"
    shared |= {"zero_shot": load_part(written, backbone), candidate: load_part(written, backbone, params)}
    public = None
    if data.test is not None:
        progress("evaluating on the public test set")
        tested = sorted({r.specialty for r in data.test.records} & set(contract.specialties))
        features = _features(contract, model, backbone, data.test, tested, None, None)
        public = judge(features, tested, None, shared, local)
    holdouts = [judge(mine, names, site, shared, local) for site, (mine, names) in held_out.items()]
    rows = compare(contract.specialties, objective, candidate, public, holdouts, minimum)
    return ({} if public is None else _metrics(contract, objective, public, candidate)), rows, params


def _held_out(
    contract: Contract,
    model: FrozenPart,
    backbone: Backbone,
    data: PreparedData,
    policies: dict[str, SitePolicy],
    progress: Callable[[str], None],
) -> dict[str, tuple[PatientTensors, list[str]]]:
    """Site → its held-out patients and their specialties, of sites whose data is public or synthetic.

    A hospital's own are evaluated at the hospital alone: ``clinifed evaluate --site``.
    """
    found = {}
    for site, manifest in data.sites.items():
        held = {record.specialty for record in manifest.records if record.split == "holdout"}
        names = sorted(held & set(contract.sites[site].specialties))
        if manifest.data_class == "hospital" or not names:
            continue
        try:
            cache = policies[site].cache
            found[site] = _features(contract, model, backbone, manifest, names, "holdout", cache), names
        except DataError as error:  # the run is over and good; this is a line of a table
            progress(f"{site}: held-out patients are left out: {'; '.join(error.problems)}")
    return found


def _baselines(
    contract: Contract,
    model: FrozenPart,
    backbone: Backbone,
    data: PreparedData,
    policies: dict[str, SitePolicy],
    progress: Callable[[str], None],
) -> tuple[dict[str, dict[str, TrainablePart]], dict[str, TrainablePart]]:
    """What the federation is held against: by site what it does alone, and the models that all could share."""
    local: dict[str, dict[str, TrainablePart]] = {"local_only": {}, "local_only_dp": {}}
    shared: dict[str, TrainablePart] = {}
    if not data.sites or any(manifest.data_class == "hospital" for manifest in data.sites.values()):
        return local, shared
    private = contract.promise.mode == "dp"
    progress("training every site alone, all data in one place, and without DP, for comparison")
    own = {}
    for site, manifest in data.sites.items():
        names = sorted(contract.sites[site].specialties)
        cache, views = policies[site].cache, contract.training.views
        own[site] = _features(contract, model, backbone, manifest, names, "train", cache, views)

    def attempt(models: dict[str, TrainablePart], key: str, what: str, train: Callable[[], TrainablePart]) -> None:
        try:
            models[key] = train()
        except (DataError, UpdateError) as error:  # a step that suits clipped gradients may be too long for others
            progress(f"{what} is not compared: {'; '.join(error.problems)}")

    for site, mine in own.items():
        attempt(
            local["local_only"], site, f"{site} alone", partial(alone, contract, backbone, site, mine, private=False)
        )
        if private:
            one = partial(alone, contract, backbone, site, mine, private=True)
            attempt(local["local_only_dp"], site, f"{site} alone, with DP", one)
    attempt(shared, "centralised", "all data in one place", partial(centralised, contract, backbone, own))
    if private and set(own) == set(contract.sites):
        openly = partial(federated_openly, contract, backbone, own)
        attempt(shared, "federated_no_dp", "the federation without DP", openly)
    return local, shared


def _metrics(contract: Contract, objective: Objective, public: Judged, candidate: str) -> dict[str, Any]:
    """The short form, of the public test set: figures without intervals."""
    scores = {key: scores_of(logits, public.data, public.names, objective) for key, logits in public.shared.items()}
    alone_scores = {
        key: {site: scores_of(logits, public.data, public.names, objective) for site, logits in by_site.items()}
        for key, by_site in public.local.items()
    }
    metrics: dict[str, Any] = {}
    for name in public.names:
        entry: dict[str, Any] = {
            "chance": 1 / len(contract.specialties[name].labels) if objective.labels == "one" else 0.5,
            "zero_shot": scores["zero_shot"][name].to_dict(),
            "local_only_dp": None,
            "local_only": None,
            "federated": scores[candidate][name].to_dict(),
        }
        for key, of_sites in alone_scores.items():
            by_site = {site: found[name] for site, found in of_sites.items() if name in found}
            if by_site:
                entry[key] = {
                    **{site: {"balanced_accuracy": s.balanced_accuracy} for site, s in by_site.items()},
                    "mean": {"balanced_accuracy": mean_scores(by_site)},
                }
        metrics[name] = entry
    return metrics
