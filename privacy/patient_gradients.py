"""One gradient per patient, made where Opacus would make one per image, and never written out where it need not be.

Opacus' hooks see, at every layer, what went in and what the loss sends back. Of a linear layer that sees one row per
image, the gradient of a patient is a sum of outer products: its norm follows from the products of the rows alone
(Goodfellow, arXiv 1510.01799; Li et al., arXiv 2110.05679), and the clipped sum over all patients is one product of
matrices (Bu et al., arXiv 2210.00038). So it is never formed. Those works take the gradient of one image; the norm of
a patient's mean needs the products between the patient's images as well, which :class:`Outer` adds up. Where an image
is a sequence of tokens, the gradient of a patient is formed, by one product over all tokens of all its images.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from clinifed.errors import PrivacyError

__all__ = ["Formed", "Groups", "Outer", "PatientGradient", "PatientGradients", "Sent"]

_SURE = 0.1  # of what was added up; a float32 sum that is left with less is made anew in float64


class Groups:
    """Which rows of a physical batch are whose.

    Args:
        patient: (R,) int64, the patient of each row, 0 … P-1, non-decreasing.
    """

    def __init__(self, patient: Tensor) -> None:
        self.patient = patient
        self.images = torch.bincount(patient)  # (P,)

    @cached_property
    def by_size(self) -> list[tuple[Tensor, Tensor]]:
        """(numbers of the patients (P',), rows of their images (P', m)), for each number m of images that occurs."""
        first = torch.cumsum(self.images, dim=0) - self.images
        found = []
        for images in torch.unique(self.images).tolist():
            patients = torch.nonzero(self.images == images).flatten()
            found.append((patients, first[patients].unsqueeze(1) + torch.arange(images, device=patients.device)))
        return found

    def mean(self, rows: Tensor) -> Tensor:
        """Rows (R, N) → their mean over each patient (P, N), float32."""
        total = rows.new_zeros(len(self.images), rows.shape[1], dtype=torch.float32)
        return total.index_add_(0, self.patient, rows.float()).div_(self.images.unsqueeze(1))


class Sent:
    """What each image sends into a layer, (R, in), and the products between the images of a patient.

    All heads are sent the same, so that they share the products.
    """

    def __init__(self, rows: Tensor, groups: Groups) -> None:
        self.rows, self.groups = rows.float(), groups

    @cached_property
    def products(self) -> list[Tensor]:
        """(P', m, m) for each number m of images: aᵢ·aⱼ."""
        return [_products(self.rows[rows]) for _, rows in self.groups.by_size]


def _products(rows: Tensor) -> Tensor:
    return rows @ rows.mT


@dataclass(frozen=True)
class Formed:
    """The gradients of P patients for one parameter, written out."""

    means: Tensor  # (P, *shape of the parameter) float32: of each patient, the mean over its images

    def squared_norms(self) -> Tensor:
        """(P,) float32."""
        return self.means.flatten(1).square().sum(dim=1)

    def clipped_sum(self, factor: Tensor) -> Tensor:
        """The sum of all patients' gradients, each times its ``factor`` (P,); a factor of 0 leaves a patient out."""
        kept = self.means.flatten(1)
        if not bool(factor.all()):  # 0 · NaN is NaN, so that a factor of zero would not do
            kept = torch.where((factor > 0).unsqueeze(1), kept, 0.0)
        return (factor @ kept).view(self.means.shape[1:])


@dataclass(frozen=True)
class Outer:
    """The gradients of P patients for the weight of a linear layer: means of outer products, none of them formed."""

    backprops: Tensor  # (R, out) float32: what the loss sends back to each image
    sent: Sent  # (R, in): what each image sent in

    def squared_norms(self) -> Tensor:
        """(P,) float32; of a patient of m images, Σᵢⱼ (gᵢ·gⱼ)(aᵢ·aⱼ) / m², accurate also where terms cancel."""
        groups = self.sent.groups
        norms = self.backprops.new_empty(len(groups.images))
        for (patients, rows), sent in zip(groups.by_size, self.sent.products, strict=True):
            terms = _products(self.backprops[rows]) * sent
            total = terms.sum(dim=(1, 2))
            unsure = total < _SURE * terms.abs().sum(dim=(1, 2))
            if bool(unsure.any()):
                again = rows[unsure]
                exact = _products(self.backprops[again].double()) * _products(self.sent.rows[again].double())
                total[unsure] = exact.sum(dim=(1, 2)).clamp(min=0).float()
            norms[patients] = total / rows.shape[1] ** 2
        return norms

    def clipped_sum(self, factor: Tensor) -> Tensor:
        """As :meth:`Formed.clipped_sum`, (out, in), by one product over all images."""
        groups = self.sent.groups
        weight = (factor / groups.images)[groups.patient].unsqueeze(1)  # (R, 1)
        back, sent = self.backprops, self.sent.rows
        if not bool(factor.all()):
            back, sent = torch.where(weight > 0, back, 0.0), torch.where(weight > 0, sent, 0.0)
        return (weight * back).T @ sent


PatientGradient = Formed | Outer


class PatientGradients(GradSampleHooks):
    """Opacus' hooks on a module, which leave a gradient per patient instead of one per image.

    Set :attr:`groups` before each pass, then call :meth:`backward` with its losses, and :meth:`take` after it. Which
    modules are watched, and how the ones that are not linear make their gradients, is Opacus'.

    Guarantees:
        - What :meth:`take` returns for a patient is the mean over the patient's images of Opacus' gradient per image.
        - A parameter that took part in another way than once for each image is refused.
    """

    groups: Groups  # of the current physical batch

    def __init__(self, module: nn.Module) -> None:
        self._found: dict[Tensor, PatientGradient] = {}
        self._wrong: dict[Tensor, str] = {}
        self._outputs: list[Tensor] = []
        self._sent: dict[int, Sent] = {}  # by where it lies in memory
        super().__init__(module, loss_reduction="sum")

    def add_hooks(self, **_options: Any) -> None:
        """Watch every module that trains: what goes in on the way forward, what comes to its output on the way back."""
        watched = self.iterate_submodules(self._module)
        self.autograd_grad_sample_hooks = [module.register_forward_hook(self._passed) for module in watched]
        self._module.autograd_grad_sample_hooks = self.autograd_grad_sample_hooks
        self.enable_hooks()

    def backward(self, losses: Tensor, *, checkpointing: bool = False) -> None:
        """The pass back from ``losses`` (R,), one for each row.

        Args:
            checkpointing: some modules are computed again, so that their outputs are not in this graph.
        """
        outputs, self._outputs = self._outputs, []
        if checkpointing:
            losses.sum().backward()
        elif outputs:
            # What autograd would add up for the parameters over the whole batch is not asked for: nobody needs it.
            torch.autograd.grad(losses.sum(), outputs, allow_unused=True)

    def take(self, trained: Mapping[str, nn.Parameter]) -> list[PatientGradient]:
        """The gradients of the last pass, in the order of ``trained``; the next pass begins anew.

        Raises:
            PrivacyError: a parameter has none, or was used more than once; all of them at once.
        """
        found, wrong = self._found, self._wrong
        self._found, self._wrong, self._sent = {}, {}, {}
        for parameter in trained.values():
            if parameter not in found:
                wrong.setdefault(parameter, "no gradient per image; it does not take part in the loss")
        if wrong:
            raise PrivacyError(*(f"{name}: {wrong[p]}, so freeze it" for name, p in trained.items() if p in wrong))
        return [found[parameter] for parameter in trained.values()]

    def _passed(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Called by torch after ``module`` has computed ``output`` (R, …) of its one input."""
        if not (self.hooks_enabled and torch.is_grad_enabled() and output.requires_grad):
            return
        sent = inputs[0].detach()
        output.register_hook(lambda back: self._returned(module, sent, back.detach()))
        self._outputs.append(output)

    def _returned(self, module: nn.Module, sent: Tensor, back: Tensor) -> None:
        """Called by torch when ``back``, the gradient of the losses with respect to ``module``'s output, is there."""
        if type(module) is nn.Linear:
            self._linear(module, sent, back)
            return
        sampler: Callable[..., Mapping[nn.Parameter, Tensor]] = self.GRAD_SAMPLERS[type(module)]
        for parameter, rows in sampler(module, [sent], back).items():
            if self._once(parameter, len(rows)):
                self._found[parameter] = self._mean(rows)

    def _linear(self, module: nn.Linear, sent: Tensor, back: Tensor) -> None:
        weight: Tensor = module.weight
        bias: Tensor | None = module.bias
        if weight.requires_grad and self._once(weight, len(sent)):
            if back.dim() == 2:
                shared = self._sent.setdefault(sent.data_ptr(), Sent(sent, self.groups))
                self._found[weight] = Outer(back.float(), shared)
            else:
                self._found[weight] = self._formed(sent.flatten(1, -2), back.flatten(1, -2))
        if bias is not None and bias.requires_grad and self._once(bias, len(sent)):
            self._found[bias] = self._mean(back if back.dim() == 2 else back.flatten(1, -2).sum(dim=1))

    def _once(self, parameter: Tensor, gradients: int) -> bool:
        """Whether ``parameter`` takes part for the first time in this pass, with one gradient for each image."""
        if gradients != (images := len(self.groups.patient)):
            counts = f"{gradients} gradients for {images} images"
            self._wrong[parameter] = f"{counts}; it is used in a way that has no gradient per image"
        elif parameter in self._found:
            self._wrong[parameter] = "used more than once in one pass, so that its gradients per image do not add up"
        return parameter not in self._wrong

    def _formed(self, sent: Tensor, back: Tensor) -> Formed:
        """Of tokens (R, T, in) and what comes back to them (R, T, out): one product per patient."""
        means = back.new_empty(len(self.groups.images), back.shape[-1], sent.shape[-1], dtype=torch.float32)
        for patients, rows in self.groups.by_size:
            tokens = rows.shape[1] * sent.shape[1]
            a = sent[rows].view(len(rows), tokens, -1)
            g = back[rows].view(len(rows), tokens, -1)
            means[patients] = (g.mT @ a.to(g.dtype)).float() / rows.shape[1]
        return Formed(means)

    def _mean(self, rows: Tensor) -> Formed:
        return Formed(self.groups.mean(rows.flatten(1)).view(-1, *rows.shape[1:]))
