"""A federation without FLARE: the engine, the accountant and the aggregation rule that a real one uses, on features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from torch import Tensor, nn

from clinifed.aggregators.averaging import add_model, first_averaged, mean_model
from clinifed.aggregators.rules import aggregate
from clinifed.config import Aggregation
from clinifed.evaluation.metrics import patient_scores
from clinifed.messages import Update, head_name, specialty_of
from clinifed.models.adapters import TrainablePart
from clinifed.models.basis import Basis
from clinifed.privacy.accountant import mu_squared, noise_multiplier_for
from clinifed.privacy.engine import Mechanism, PatientTensors, plain_step, private_step
from clinifed.privacy.objectives import OBJECTIVES

DELTA = 1e-5
ROUNDS = 20
AVERAGE_LAST = 0.5
NOISE_OF_A_LOGIT = 0.8  # standard deviation in the end, of a row of norm 1: chosen on validation sets of other seeds
LARGEST_RATE = 300.0  # beyond it runs without noise swing, in every basis; chosen there too
_OBJECTIVE = OBJECTIVES["cross-entropy"]
_ALL = 1 << 20  # images in a physical batch
_SETTINGS = Aggregation(quorum=1, round_timeout_s=60)
State = dict[str, Tensor]


def public_rate(epsilon: float, patients: int, sites: int) -> float:
    """The learning rate from the contract's numbers alone.

    T steps of η move each coordinate of the mean over S sites by noise of standard deviation η·T/(μ·N₀·√S), since
    σ = √T/μ; on a row of norm 1 that is the noise of a logit, and the rate is such that it is NOISE_OF_A_LOGIT.
    """
    rate = NOISE_OF_A_LOGIT * sqrt(mu_squared(epsilon, DELTA)) * patients * sqrt(sites) / ROUNDS
    return min(rate, LARGEST_RATE)


@dataclass(frozen=True)
class View:
    """Patients and heads as one basis shows them; without one, as they are, with a bias of its own for each head."""

    basis: Basis | None

    def patients(self, data: PatientTensors) -> PatientTensors:
        """``data`` in the basis."""
        if self.basis is None:
            return data
        return PatientTensors(self.basis(data.features), data.patient, data.specialty, data.label)

    def start(self, zero_shot: State) -> State:
        """Zero-shot heads in the basis."""
        return dict(zero_shot) if self.basis is None else self.basis.heads(zero_shot)


def part_of(state: Mapping[str, Tensor]) -> TrainablePart:
    """Heads of the shapes of ``state``, loaded with it."""
    names = sorted({specialty_of(name) or "" for name in state})
    heads = nn.ModuleDict()
    for name in names:
        labels, dims = state[head_name(name, "weight")].shape
        heads[name] = nn.Linear(dims, labels, bias=head_name(name, "bias") in state)
    part = TrainablePart(heads)
    part.load_shared(state)
    return part


def federate(
    sites: Sequence[PatientTensors],
    start: State,
    rate: float,
    epsilon: float | None = None,
    patients: int = 0,
    *,
    rounds: int = ROUNDS,
    local_steps: int = 1,
    average_last: float = AVERAGE_LAST,
) -> State:
    """The model at the end. Every site adds its own noise, calibrated once for all its releases.

    Args:
        epsilon: per patient and site for the whole run; None: without noise and clip.
        patients: N₀ of each site; not read without noise.
    """
    part, shapes = part_of(start), {name: tuple(tensor.shape) for name, tensor in start.items()}
    mechanism = None
    if epsilon is not None:
        mechanism = Mechanism(noise_multiplier_for(epsilon, DELTA, rounds * local_steps), 1.0, patients)
    delta = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    first, totals = first_averaged(rounds, average_last), {}
    for number in range(rounds):
        began = {name: start[name] + torch.from_numpy(delta[name]) for name in start}
        updates = []
        for index, data in enumerate(sites):
            part.load_shared(began)
            for _ in range(local_steps):
                if mechanism is None:
                    plain_step(part, data, _OBJECTIVE, rate, _ALL)
                else:
                    private_step(part, data, _OBJECTIVE, mechanism, rate, _ALL)
            change = {name: (tensor - began[name]).numpy() for name, tensor in part.shared().items()}
            updates.append(Update(f"site{index:02d}", number, change))
        change, _ = aggregate(updates, {update.site: 1.0 for update in updates}, shapes, _SETTINGS, {})
        delta = {name: delta[name] + change[name] for name in delta}
        if number >= first:
            totals = add_model(totals, delta)
    final = mean_model(totals, rounds - first) if first < rounds else delta
    return {name: start[name] + torch.from_numpy(final[name]) for name in start}


def pooled(sites: Sequence[PatientTensors]) -> PatientTensors:
    """All patients as one site's."""
    offsets = np.cumsum([0, *(data.patients for data in sites)])
    return PatientTensors(
        torch.cat([data.features for data in sites]),
        torch.cat([data.patient + int(offset) for data, offset in zip(sites, offsets, strict=False)]),
        torch.cat([data.specialty for data in sites]),
        torch.cat([data.label for data in sites]),
    )


@torch.inference_mode()
def balanced_accuracy(state: State, data: PatientTensors) -> dict[str, float]:
    """By patient, for each specialty."""
    part = part_of(state).eval()
    logits, found = part(data.features), {}
    for index, name in enumerate(sorted(logits)):
        mine = data.specialty == index
        rows = (logits[name][mine].double(), data.patient[mine], data.label[mine])
        found[name] = patient_scores(*(tensor.numpy() for tensor in rows)).balanced_accuracy
    return found
