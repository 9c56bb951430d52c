"""What each site could do alone, with and without DP, and what the zero-shot model does: the lines to beat."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from clinifed.aggregators.averaging import Totals, add_model, first_averaged, mean_model
from clinifed.contract import Contract
from clinifed.evaluation.metrics import Scores, multi_label_scores, patient_scores
from clinifed.executors.trainer import local_steps
from clinifed.models.adapters import TrainablePart, build_trainable
from clinifed.models.backbone import Backbone
from clinifed.privacy.engine import PatientTensors
from clinifed.privacy.objectives import OBJECTIVES, Objective, resolve_objective

__all__ = ["load_part", "local_scores", "score_part"]


@torch.inference_mode()
def score_part(
    part: TrainablePart,
    public: PatientTensors,
    names: list[str],
    objective: Objective = OBJECTIVES["cross-entropy"],
) -> dict[str, Scores]:
    """Scores of ``part`` on public patients, for each of its specialties.

    Args:
        public: features; ``specialty`` counts ``names``, sorted.
        objective: whose labels ``public`` holds.
    """
    logits = part(public.features)
    figures = patient_scores if objective.labels == "one" else multi_label_scores
    scores = {}
    for name in sorted(logits):
        rows = public.specialty == names.index(name)
        scores[name] = figures(
            logits[name][rows].double().numpy(), public.patient[rows].numpy(), public.label[rows].numpy()
        )
    return scores


def local_scores(
    contract: Contract,
    backbone: Backbone,
    site: str,
    data: PatientTensors,
    public: PatientTensors,
    names: list[str],
    *,
    private: bool,
) -> dict[str, Scores]:
    """One site alone for as many steps as the federation takes, at the same epsilon or without DP.

    For synthetic and public data only: these steps are compared, never released, so nothing is charged.
    """
    agreed = contract.sites[site]
    mine = {name: contract.specialties[name] for name in agreed.specialties}
    part = build_trainable(backbone, mine, contract.training)
    if not private:
        promise = contract.promise.model_copy(update={"mode": "off"})
        contract = contract.model_copy(update={"promise": promise})
    start = part.shared()
    first = first_averaged(contract.rounds, contract.aggregation.average_last)
    totals: Totals = {}
    with _one_thread():
        for number in range(contract.rounds):
            local_steps(part, start, data, contract, agreed.nominal_patients, contract.training.local_epochs)
            if number >= first:  # as the federation's model, or the comparison would not be one
                totals = add_model(totals, {name: tensor.numpy() for name, tensor in part.shared().items()})
    if totals:
        averaged = mean_model(totals, contract.rounds - first)
        part.load_shared({name: torch.from_numpy(value) for name, value in averaged.items()})
    return score_part(part, public, names, resolve_objective(contract.promise.objective))


@contextmanager
def _one_thread() -> Iterator[None]:
    """The steps are small: threads that wait for each other cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_part(contract: Contract, backbone: Backbone, state: Mapping[str, Tensor] | None = None) -> TrainablePart:
    """The trainable part of the whole federation, at its start or with ``state``."""
    return build_trainable(backbone, contract.specialties, contract.training, state)
