"""One gradient per patient, made where Opacus would make one per image, and never written out where it need not be.

Opacus' hooks see, at every layer, what went in and what the loss sends back. Of a linear layer that sees one row per
image, the gradient of a patient is a sum of outer products: its norm follows from the products of the rows alone
(Goodfellow, arXiv 1510.01799; Li et al., arXiv 2110.05679), and the clipped sum over all patients is one product of
matrices (Bu et al., arXiv 2210.00038). So it is never formed. Those works take the gradient of one image; the norm of
a patient's mean needs the products between the patient's images as well, which :class:`Outer` adds up. Where an image
is a sequence of tokens, the gradient of a patient is formed, by one product over all tokens of all its images.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from clinifed.errors import PrivacyError

__all__ = ["Formed", "Outer", "PatientGradient", "PatientGradients"]


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
    activations: Tensor  # (R, in) float32: what each image sent in
    groups: Tensor  # (R,) int64: the patient of each image, 0 … P-1, non-decreasing

    def squared_norms(self) -> Tensor:
        """(P,) float32; of a patient of m images, Σᵢⱼ (gᵢ·gⱼ)(aᵢ·aⱼ) / m², in float64 where terms may cancel."""
        norms = self.backprops.new_empty(int(self.groups[-1]) + 1)
        for patients, rows in _by_size(self.groups):
            sent, back = self.activations[rows], self.backprops[rows]  # (P', m, in), (P', m, out)
            images = rows.shape[1]
            if images == 1:
                norms[patients] = (sent.square().sum(dim=2) * back.square().sum(dim=2)).squeeze(1)
                continue
            sent, back = sent.double(), back.double()
            products = (sent @ sent.mT) * (back @ back.mT)
            norms[patients] = (products.sum(dim=(1, 2)).clamp(min=0) / images**2).float()
        return norms

    def clipped_sum(self, factor: Tensor) -> Tensor:
        """As :meth:`Formed.clipped_sum`, (out, in), by one product over all images."""
        weight = (factor / torch.bincount(self.groups))[self.groups].unsqueeze(1)  # (R, 1)
        back, sent = self.backprops, self.activations
        if not bool(factor.all()):
            back, sent = torch.where(weight > 0, back, 0.0), torch.where(weight > 0, sent, 0.0)
        return (weight * back).T @ sent


PatientGradient = Formed | Outer


class PatientGradients(GradSampleHooks):
    """Opacus' hooks on a module, which leave a gradient per patient instead of one per image.

    Set :attr:`groups` before each backward pass, and call :meth:`take` after it.

    Guarantees:
        - What :meth:`take` returns for a patient is the mean over the patient's images of Opacus' gradient per image.
        - A parameter that took part in another way than once for each image is refused.
    """

    groups: Tensor  # (R,) int64, the patient of each row of the current physical batch, counted from 0

    def __init__(self, module: nn.Module) -> None:
        self._found: dict[Tensor, PatientGradient] = {}
        self._wrong: dict[Tensor, str] = {}
        super().__init__(module, loss_reduction="sum")

    def take(self, trained: Mapping[str, nn.Parameter]) -> list[PatientGradient]:
        """The gradients of the last backward pass, in the order of ``trained``; the next pass begins anew.

        Raises:
            PrivacyError: a parameter has none, or was used more than once; all of them at once.
        """
        found, wrong = self._found, self._wrong
        self._found, self._wrong = {}, {}
        missing = {p: "no gradient per image; it does not take part in the loss" for p in trained.values()}
        wrong = {p: wrong.get(p) or missing[p] for p in trained.values() if p in wrong or p not in found}
        if wrong:
            raise PrivacyError(*(f"{name}: {wrong[p]}, so freeze it" for name, p in trained.items() if p in wrong))
        return [found[parameter] for parameter in trained.values()]

    def capture_backprops_hook(
        self, module: nn.Module, _forward_input: Any, forward_output: Any, loss_reduction: str, batch_first: bool
    ) -> None:
        """Called by torch when the gradient of ``module``'s output is there."""
        if not self.hooks_enabled:
            return
        activations, backprops = self.rearrange_grad_samples(
            module=module, backprops=forward_output[0].detach(), loss_reduction=loss_reduction, batch_first=batch_first
        )
        if type(module) is nn.Linear:
            self._linear(module, activations[0], backprops)
        else:
            sampler: Callable[..., Mapping[nn.Parameter, Tensor]] = self.GRAD_SAMPLERS[type(module)]
            for parameter, rows in sampler(module, activations, backprops).items():
                if self._once(parameter, len(rows)):
                    self._found[parameter] = self._mean(rows)
        if not module.activations:
            del module.max_batch_len

    def _linear(self, module: nn.Linear, sent: Tensor, back: Tensor) -> None:
        weight: Tensor = module.weight
        bias: Tensor | None = module.bias
        if weight.requires_grad and self._once(weight, len(sent)):
            if back.dim() == 2:
                self._found[weight] = Outer(back.float(), sent.float(), self.groups)
            else:
                self._found[weight] = self._formed(sent.flatten(1, -2), back.flatten(1, -2))
        if bias is not None and bias.requires_grad and self._once(bias, len(sent)):
            self._found[bias] = self._mean(back if back.dim() == 2 else back.flatten(1, -2).sum(dim=1))

    def _once(self, parameter: Tensor, gradients: int) -> bool:
        """Whether ``parameter`` takes part for the first time in this pass, with one gradient for each image."""
        if gradients != len(self.groups):
            counts = f"{gradients} gradients for {len(self.groups)} images"
            self._wrong[parameter] = f"{counts}; it is used in a way that has no gradient per image"
        elif parameter in self._found:
            self._wrong[parameter] = "used more than once in one pass, so that its gradients per image do not add up"
        return parameter not in self._wrong

    def _formed(self, sent: Tensor, back: Tensor) -> Formed:
        """Of tokens (R, T, in) and what comes back to them (R, T, out): one product per patient."""
        means = torch.empty(int(self.groups[-1]) + 1, back.shape[-1], sent.shape[-1], device=back.device)
        for patients, rows in _by_size(self.groups):
            tokens = rows.shape[1] * sent.shape[1]
            a = sent[rows].reshape(len(rows), tokens, -1)
            g = back[rows].reshape(len(rows), tokens, -1)
            means[patients] = (g.mT @ a.to(g.dtype)).float() / rows.shape[1]
        return Formed(means)

    def _mean(self, rows: Tensor) -> Formed:
        """Rows (R, *shape) → their means over each patient."""
        count = torch.bincount(self.groups)
        flat = rows.flatten(1).float()
        total = flat.new_zeros(len(count), flat.shape[1]).index_add_(0, self.groups, flat)
        return Formed(total.div_(count.unsqueeze(1)).view(-1, *rows.shape[1:]))


def _by_size(groups: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(numbers of the patients (P',), rows of their images (P', m)), for each number m of images that occurs."""
    count = torch.bincount(groups)
    first = torch.cumsum(count, dim=0) - count
    for images in torch.unique(count).tolist():
        patients = torch.nonzero(count == images).flatten()
        yield patients, first[patients].unsqueeze(1) + torch.arange(images, device=groups.device)
