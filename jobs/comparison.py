"""Did federation beat what a site can do alone? Every model on the same patients, per specialty and per site."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clinifed.config import Specialty
from clinifed.evaluation.assessment import MIN_PATIENTS, Drawn, Panel
from clinifed.evaluation.scoring import logits_of
from clinifed.models.adapters import TrainablePart
from clinifed.privacy.engine import PatientTensors
from clinifed.privacy.objectives import Objective

__all__ = ["HOLDOUT", "MODELS", "PUBLIC_TEST", "Judged", "compare", "judge"]

# The models of the table, in its order, and what it calls them.
MODELS = {
    "zero_shot": "zero-shot",
    "local_only": "local only, no DP",
    "local_only_dp": "local only, DP",
    "centralised": "centralised, no DP",
    "federated_no_dp": "federated, no DP",
    "federated_dp": "federated, DP",
    "trained": "this checkpoint",
}
PUBLIC_TEST, HOLDOUT = "public test", "holdout"

Logits = Mapping[str, NDArray[np.float64]]  # specialty → (R, K) of its R images


@dataclass(frozen=True)
class Judged:
    """Patients on whom models are judged, and what each model says of them."""

    data: PatientTensors
    names: list[str]  # ``data.specialty`` counts these, sorted
    site: str | None  # whose patients they are; None: nobody's
    shared: Mapping[str, Logits]  # a key of MODELS → of the model that all have
    local: Mapping[str, Mapping[str, Logits]]  # a key of MODELS → site → of its own model


def judge(
    data: PatientTensors,
    names: list[str],
    site: str | None,
    shared: Mapping[str, TrainablePart],
    local: Mapping[str, Mapping[str, TrainablePart]],
) -> Judged:
    """Ask every model about ``data``; about a site's patients, of the sites' own models only that site's."""
    asked = {key: {s: m for s, m in by_site.items() if site in (None, s)} for key, by_site in local.items()}
    return Judged(
        data,
        names,
        site,
        {key: logits_of(part, data, names) for key, part in shared.items()},
        {key: {s: logits_of(m, data, names) for s, m in by_site.items()} for key, by_site in asked.items()},
    )


def compare(
    specialties: Mapping[str, Specialty],
    objective: Objective,
    candidate: str,
    public: Judged | None,
    holdouts: Sequence[Judged],
    minimum: int = MIN_PATIENTS,
) -> list[dict[str, Any]]:
    """The rows of the table, as JSON values.

    On the public test set there is a row for each specialty, where the mean over sites stands for the sites' own
    models, and one for each site that has a model of its own. On held-out patients there is a row for each site, and
    one for all sites together, where each site's own model judges its own patients.

    Args:
        specialties: what the models know.
        objective: whose labels these are.
        candidate: which model the others are held against: ``gain`` is candidate − other, on the same draws.
        public: of the public test set.
        holdouts: of held-out patients, each of one site.
        minimum: of patients, below which a figure is suppressed.
    """
    rows = []
    names = {name for judged in (*holdouts, *([public] if public else [])) for name in judged.names}
    for name in sorted(names & specialties.keys()):
        labels = tuple(specialties[name].labels)
        if public is not None and name in public.names:
            panel = _panel([public], name, labels, objective, minimum)
            drawn = {key: panel.drawn(logits[name]) for key, logits in public.shared.items()}
            local = {
                key: {site: panel.drawn(logits[name]) for site, logits in by_site.items() if name in logits}
                for key, by_site in public.local.items()
            }
            mean = {key: Drawn.mean(list(by_site.values())) for key, by_site in local.items() if by_site}
            rows.append(_row(panel, name, PUBLIC_TEST, None, {**drawn, **mean}, candidate))
            for site in sorted({site for by_site in local.values() for site in by_site}):
                own = {key: by_site[site] for key, by_site in local.items() if site in by_site}
                rows.append(_row(panel, name, PUBLIC_TEST, site, {**drawn, **own}, candidate))
        mine = [judged for judged in holdouts if name in judged.names]
        for some in [[judged] for judged in mine] + ([mine] if len(mine) > 1 else []):
            panel = _panel(some, name, labels, objective, minimum)
            drawn = _drawn_together(panel, some, name)
            rows.append(_row(panel, name, HOLDOUT, some[0].site if len(some) == 1 else None, drawn, candidate))
    return rows


def _row(
    panel: Panel, specialty: str, patients_of: str, site: str | None, drawn: Mapping[str, Drawn], candidate: str
) -> dict[str, Any]:
    ordered = {key: drawn[key] for key in MODELS if key in drawn}
    return {
        "specialty": specialty,
        "patients_of": patients_of,
        "site": site,
        **panel.to_dict(),
        "models": {key: panel.figures(one) for key, one in ordered.items()},
        "gain": {key: panel.gain(drawn[candidate], one) for key, one in ordered.items() if key != candidate},
    }


def _panel(judged: Sequence[Judged], name: str, labels: Sequence[str], objective: Objective, minimum: int) -> Panel:
    """The patients of one specialty in all of ``judged``; patients of two sites are two patients."""
    patient, label, seen = [], [], 0
    for one in judged:
        rows = one.data.specialty == one.names.index(name)
        patient.append(one.data.patient[rows].numpy() + seen)
        label.append(one.data.label[rows].numpy())
        seen += one.data.patients
    many = objective.labels == "many"
    return Panel(np.concatenate(patient), np.concatenate(label), labels, multi_label=many, minimum=minimum)


def _drawn_together(panel: Panel, judged: Sequence[Judged], name: str) -> dict[str, Drawn]:
    """Each model on the patients of all sites of ``judged``; a model that a site lacks is left out."""
    said: list[dict[str, Logits]] = []
    for one in judged:
        own = {
            key: logits for key, by_site in one.local.items() for site, logits in by_site.items() if site == one.site
        }
        said.append({**one.shared, **own})
    whole = [key for key in MODELS if all(name in models.get(key, {}) for models in said)]
    return {key: panel.drawn(np.concatenate([models[key][name] for models in said])) for key in whole}
