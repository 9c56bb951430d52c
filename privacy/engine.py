"""One step of patient-level differential privacy on Opacus: patient mean, one clip, sum, noise, public denominator.

Opacus computes a gradient per image; privacy is promised per patient. So the images of a patient are averaged into
one gradient over the trunk and all heads before the clip, and removing a patient moves the sum by at most C.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from clinifed.errors import DataError, PrivacyError
from clinifed.privacy.noise import NoiseSource, to_grid
from clinifed.privacy.objectives import Objective
from clinifed.privacy.patient_gradients import Parameters, PatientGradients
from clinifed.privacy.patient_means import Groups, PatientGradient
from clinifed.privacy.patients import Mechanism, PatientTensors, physical_batches, rows_per_batch
from clinifed.privacy.soundness import refuse_other_data, refuse_unsound

__all__ = [
    "Mechanism",
    "PatientDPOptimizer",
    "PatientTensors",
    "mean_loss",
    "physical_batches",
    "plain_step",
    "private_step",
    "pull_towards",
]

log = logging.getLogger(__name__)

_TOGETHER = 1 << 18  # numbers that are noised at a time: 10 MB of working memory


class PatientDPOptimizer(DPOptimizer):
    """Opacus' optimiser with the patient as the unit.

    Guarantees:
        - One patient moves the clipped sum by at most C, however many images and specialties the patient has.
        - The noise is N(0, σ²C²) per coordinate, drawn anew for every release from :class:`NoiseSource`.
        - The denominator is the public N₀; the true number of patients enters nowhere else.
        - A patient whose gradient is not finite contributes zero, which depends on that patient alone.
    """

    gradients: Sequence[tuple[Parameters, PatientGradient]] = ()  # of the current physical batch, all of ``params``

    def __init__(self, optimizer: torch.optim.Optimizer, mechanism: Mechanism) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=mechanism.max_grad_norm,
            expected_batch_size=mechanism.nominal_patients,
            loss_reduction="sum",
        )
        self.skipped = 0  # patients whose gradient was not finite; stays at the site

    @property
    def grad_samples(self) -> Sequence[object]:
        """What Opacus keeps per image is here per patient; Opacus asks only whether there is any."""
        return self.gradients

    def clip_and_accumulate(self) -> None:
        """One clip per patient over all parameters, and the sum into ``summed_grad``."""
        squares = [gradient.squared_norms() for _, gradient in self.gradients]
        norms = torch.stack(squares).sum(dim=0).sqrt()  # (P,)
        finite = torch.isfinite(norms)
        skipped = int((~finite).sum())
        self.skipped += skipped
        # 1e-6: as Opacus; it only ever makes the factor smaller.
        factor = torch.where(finite, (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0), 0.0)
        for parameters, gradient in self.gradients:
            for p, clipped in zip(parameters, gradient.clipped_sums(factor, some_skipped=skipped > 0), strict=True):
                p.summed_grad = clipped if p.summed_grad is None else p.summed_grad.add_(clipped)

    def add_noise(self) -> None:
        """Clipped sum + N(0, σ²C²), in float64, rounded to the grid; one fresh key for the whole release."""
        source = NoiseSource()
        std = self.noise_multiplier * self.max_grad_norm
        for some in _in_parts(self.params):
            clipped = torch.cat([p.summed_grad.flatten() for p in some]).double()
            noise = source.standard_normal(clipped.shape, clipped.device)
            released = to_grid(clipped.add_(noise, alpha=std), self.max_grad_norm).float()
            for p, part in zip(some, released.split([p.numel() for p in some]), strict=True):
                p.grad = part.view_as(p)

    def scale_grad(self) -> None:
        """Divide by the public N₀ (Opacus would divide by numbers derived from the private one)."""
        for parameter in self.params:
            parameter.grad /= self.expected_batch_size


def _in_parts(parameters: Iterable[Any]) -> Iterator[list[Any]]:
    """Parameters together up to _TOGETHER numbers: a call for each small one would cost more than its noise."""
    some: list[Any] = []
    for parameter in parameters:
        if some and sum(p.numel() for p in some) + parameter.numel() > _TOGETHER:
            yield some
            some = []
        some.append(parameter)
    if some:
        yield some


def private_step(
    module: nn.Module,
    data: PatientTensors,
    objective: Objective,
    mechanism: Mechanism,
    learning_rate: float,
    batch_size: int,
) -> None:
    """One full-batch DP gradient step on ``module``, in place; one Gaussian release, already paid for.

    Args:
        module: features (B, F) → logits {specialty: (B, K)}; every parameter that requires a gradient trains.
        data: all patients of the site; none may be left out.
        batch_size: images per physical batch; changes memory, never the mechanism.

    Guarantees:
        - The release is a Gaussian mechanism with L2 sensitivity C under adding or removing one patient.
        - Every trainable parameter got a gradient per image and moved, or PrivacyError is raised.
        - No buffer of the module takes anything in.

    Raises:
        PrivacyError: module or data are unsound under differential privacy, or a parameter did not take part.
        DataError: there are no patients.
    """
    refuse_other_data(data)
    refuse_unsound(module)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trained:
        raise PrivacyError("no parameter of the module requires a gradient: there is nothing to release")
    before = {name: t.detach().clone() for name, t in (*trained.items(), *module.named_buffers())}
    optimizer = PatientDPOptimizer(torch.optim.SGD(trained.values(), lr=learning_rate), mechanism)
    module.train()  # Opacus records activations in training mode only
    device = next(iter(trained.values())).device
    checkpointing = _checkpointing(module)
    hooks = PatientGradients(module)
    try:
        batches = list(physical_batches(data.patient, batch_size))
        if not batches:
            raise DataError("no patients: a site without any has nothing to train on")
        for index, rows in enumerate(batches):
            hooks.groups = Groups((data.patient[rows] - data.patient[rows.start]).to(device))
            losses = _losses(module, data, objective, rows, device, checkpointing)
            hooks.backward(losses, checkpointing=checkpointing)
            optimizer.gradients = hooks.take(trained)
            optimizer.signal_skip_step(index < len(batches) - 1)
            optimizer.step()
            optimizer.zero_grad()
    finally:
        hooks.cleanup()
    if optimizer.skipped:
        log.warning("%d patients had a gradient that was not finite and counted as zero", optimizer.skipped)
    if still := [name for name, p in trained.items() if torch.equal(p.detach(), before[name])]:
        raise PrivacyError(
            f"{', '.join(still)} did not move although noise was added: the release is not what it claims"
        )
    if changed := [name for name, b in module.named_buffers() if not torch.equal(b, before[name])]:
        raise PrivacyError(
            f"{', '.join(changed)}: a buffer changed while patients passed through, and no noise covers it; remove it"
        )


def _checkpointing(module: nn.Module) -> bool:
    """Whether a part of ``module`` is computed again in the backward pass; it says so in an attribute."""
    return any(getattr(m, "checkpointing", False) for m in module.modules())


def _losses(
    module: nn.Module, data: PatientTensors, objective: Objective, rows: slice, device: torch.device, graph: bool
) -> Tensor:
    """The losses (B,) of ``rows``; with ``graph`` their features take part in it, as checkpoints need it."""
    features = data.features[rows].detach().to(device).requires_grad_(graph)
    return objective(module(features), data.specialty[rows].to(device), data.label[rows].to(device))


@torch.no_grad()
def mean_loss(module: nn.Module, data: PatientTensors, objective: Objective, batch_size: int) -> float:
    """The mean loss over all images, without noise: what may leave a site only where its policy declares it."""
    device = next(module.parameters()).device
    parts = [
        _losses(module, data, objective, rows, device, False)
        for rows in physical_batches(data.patient, rows_per_batch(data, batch_size))
    ]
    return float(torch.cat(parts).mean())


def pull_towards(module: nn.Module, start: Mapping[str, Tensor], strength: float) -> None:
    """Draw what trains towards ``start``, in place: p ← p − strength·(p − start[p]).

    A regulariser that sees no data and runs after the noise: post-processing, which costs nothing.

    Args:
        start: name → tensor of the parameter's shape; public.
        strength: in [0, 1]; 0 changes nothing, 1 ends at ``start``.

    Raises:
        PrivacyError: ``strength`` is outside its range.
    """
    if not 0 <= strength <= 1:
        raise PrivacyError(f"strength={strength!r}: a pull towards the start lies in [0, 1]")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.sub_(strength * (parameter - start[name].to(parameter.device)))


def plain_step(
    module: nn.Module, data: PatientTensors, objective: Objective, learning_rate: float, batch_size: int
) -> None:
    """The same step without clip and noise: the mean over patients of each patient's mean. For public data only.

    Raises:
        DataError: there are no patients, or the loss is not finite.
    """
    if data.patients == 0:
        raise DataError("no patients: a site without any has nothing to train on")
    images = torch.bincount(data.patient)
    weight = 1.0 / (images[data.patient] * data.patients)  # (R,)
    trained = [p for p in module.parameters() if p.requires_grad]
    checkpointing = _checkpointing(module)
    optimizer = torch.optim.SGD(trained, lr=learning_rate)
    optimizer.zero_grad()  # or the last step's gradient would count again
    for rows in physical_batches(data.patient, batch_size):
        losses = _losses(module, data, objective, rows, trained[0].device, checkpointing)
        loss = (losses * weight[rows].to(losses.device)).sum()
        if not torch.isfinite(loss):
            raise DataError(f"the loss is {loss.item()}: lower training.learning_rate, or look at the images")
        loss.backward()
    optimizer.step()
