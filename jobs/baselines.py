"""What federating is held against: each site alone, all data in one place, and the federation without DP.

All of it trains on patients without a charge to any ledger: it is for data marked public or synthetic only, is
compared, and is never released.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from clinifed.aggregators.averaging import Totals, add_model, first_averaged, mean_model
from clinifed.aggregators.rules import Memory, aggregate
from clinifed.contract import Contract
from clinifed.executors.trainer import local_steps
from clinifed.messages import Update
from clinifed.models.adapters import TrainablePart, build_trainable
from clinifed.models.backbone import Backbone
from clinifed.privacy.engine import PatientTensors

__all__ = ["alone", "centralised", "federated_openly", "load_part", "one_thread", "pool"]


def alone(contract: Contract, backbone: Backbone, site: str, data: PatientTensors, *, private: bool) -> TrainablePart:
    """One site alone for as many steps as the federation takes, at the same epsilon or without DP.

    Args:
        data: the site's training patients; ``specialty`` counts its own specialties, sorted.
    """
    agreed = contract.sites[site]
    part = _part(contract, backbone, agreed.specialties)
    _rounds(part, data, contract if private else _open(contract), agreed.nominal_patients)
    return part


def centralised(contract: Contract, backbone: Backbone, data: Mapping[str, PatientTensors]) -> TrainablePart:
    """One model on the patients of all sites in one place, for as many steps as the federation takes, without DP.

    Args:
        data: site → its training patients, as :func:`alone` takes them.
    """
    part = load_part(contract, backbone)
    pooled = pool({site: data[site] for site in sorted(data)}, contract)
    _rounds(part, pooled, _open(contract), pooled.patients)
    return part


def _rounds(part: TrainablePart, data: PatientTensors, terms: Contract, nominal_patients: int) -> None:
    """As many steps as the federation takes, in place, and its average of the last models."""
    start, averaging = part.shared(), _Averaging(terms)
    with one_thread():
        for number in range(terms.rounds):
            local_steps(part, start, data, terms, nominal_patients, terms.training.local_epochs)
            averaging.add(number, part.shared())
    averaging.put_into(part)


class _Averaging:
    """The mean of the last models, as the federation's: or the comparison would not be one."""

    def __init__(self, contract: Contract) -> None:
        self._first = first_averaged(contract.rounds, contract.aggregation.average_last)
        self._models = contract.rounds - self._first
        self._totals: Totals = {}

    def add(self, number: int, model: Mapping[str, Tensor]) -> None:
        if number >= self._first:
            self._totals = add_model(self._totals, {name: tensor.numpy() for name, tensor in model.items()})

    def put_into(self, part: TrainablePart) -> None:
        if self._totals:
            averaged = mean_model(self._totals, self._models)
            part.load_shared({name: torch.from_numpy(value) for name, value in averaged.items()})


def federated_openly(contract: Contract, backbone: Backbone, data: Mapping[str, PatientTensors]) -> TrainablePart:
    """The same federation without DP, by the contract's own rule: what the noise costs shows beside it.

    In this process, and with every site in every round.

    Args:
        data: site → its training patients, as :func:`alone` takes them.
    """
    terms, whole = _open(contract), load_part(contract, backbone)
    start = whole.shared()
    delta = {name: torch.zeros_like(value) for name, value in start.items()}
    sites = {site: _part(contract, backbone, contract.sites[site].specialties) for site in sorted(data)}
    weights = {site: contract.sites[site].weight for site in sites}
    memory: Memory = {}
    averaging = _Averaging(contract)
    with one_thread():
        for number in range(contract.rounds):
            updates = []
            for site, part in sites.items():
                zero_shot = {name: start[name] for name in part.shared()}
                began = {name: start[name] + delta[name] for name in zero_shot}
                part.load_shared(began)
                nominal = contract.sites[site].nominal_patients
                local_steps(part, zero_shot, data[site], terms, nominal, contract.training.local_epochs)
                change = {name: (value - began[name]).numpy() for name, value in part.shared().items()}
                updates.append(Update(site, number, change))
            step, memory = aggregate(updates, weights, contract.shapes, contract.aggregation, memory)
            delta = {name: delta[name] + torch.from_numpy(step[name]) for name in delta}
            averaging.add(number, {name: start[name] + delta[name] for name in start})
    whole.load_shared({name: start[name] + delta[name] for name in start})
    averaging.put_into(whole)
    return whole


def pool(data: Mapping[str, PatientTensors], contract: Contract) -> PatientTensors:
    """The patients of several sites as one set; ``specialty`` counts the contract's, sorted.

    Patients of two sites are two patients: pseudonyms say nothing across sites.
    """
    names = sorted(contract.specialties)
    features, patient, specialty, label, seen = [], [], [], [], 0
    for site, mine in data.items():
        place = torch.tensor([names.index(name) for name in sorted(contract.sites[site].specialties)])
        features.append(mine.features)
        patient.append(mine.patient + seen)
        specialty.append(place[mine.specialty])
        label.append(mine.label)
        seen += mine.patients
    return PatientTensors(torch.cat(features), torch.cat(patient), torch.cat(specialty), torch.cat(label))


def _open(contract: Contract) -> Contract:
    """The contract without DP."""
    return contract.model_copy(update={"promise": contract.promise.model_copy(update={"mode": "off"})})


@contextmanager
def one_thread() -> Iterator[None]:
    """For steps that are small: threads that wait for each other cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_part(contract: Contract, backbone: Backbone, state: Mapping[str, Tensor] | None = None) -> TrainablePart:
    """The trainable part of the whole federation, at its start or with ``state``."""
    return _part(contract, backbone, contract.specialties, state)


def _part(
    contract: Contract, backbone: Backbone, names: Iterable[str], state: Mapping[str, Tensor] | None = None
) -> TrainablePart:
    specialties = {name: contract.specialties[name] for name in names}
    return build_trainable(backbone, specialties, contract.training, state).ready()
