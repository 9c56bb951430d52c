"""The gradients of patients for parameters, written out, or as the outer products that they are sums of.

Of a linear layer that sees one row per image, the gradient of a patient is a sum of outer products: its norm follows
from the products of the rows alone (Goodfellow, arXiv 1510.01799; Li et al., arXiv 2110.05679), and the clipped sum
over all patients is one product of matrices (Bu et al., arXiv 2210.00038). So it is never formed. Those works take the
gradient of one image; the norm of a patient's mean needs the products between the patient's images as well.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Formed", "Groups", "Outer", "PatientGradient"]

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
    def by_size(self) -> list[tuple[Tensor | slice, Tensor | slice]]:
        """(which patients (P',), which rows (P', m)), for each number m of images that occurs.

        Where all patients have as many images, one pair of slices: their rows need no picking.
        """
        least, most = self.images.aminmax()
        if least == most:
            return [(slice(None), slice(None))]
        first = torch.cumsum(self.images, dim=0) - self.images
        found: list[tuple[Tensor | slice, Tensor | slice]] = []
        for images in torch.unique(self.images).tolist():
            patients = torch.nonzero(self.images == images).flatten()
            found.append((patients, first[patients].unsqueeze(1) + torch.arange(images, device=patients.device)))
        return found

    def split(self, rows: Tensor) -> Iterator[Tensor]:
        """Rows (R, …) → (P', m, …) for each number m of images that occurs."""
        for _, numbers in self.by_size:
            if isinstance(numbers, slice):
                yield rows.reshape(len(self.images), -1, *rows.shape[1:])
            else:
                yield rows[numbers]

    def join(self, parts: Iterable[Tensor]) -> Tensor:
        """What was made of each part of :meth:`split`, (P', …) → (P, …)."""
        joined: Tensor | None = None
        for (patients, _), part in zip(self.by_size, parts, strict=True):
            if isinstance(patients, slice):
                return part
            joined = part.new_empty(len(self.images), *part.shape[1:]) if joined is None else joined
            joined[patients] = part
        assert joined is not None
        return joined

    def mean(self, rows: Tensor) -> Tensor:
        """Rows (R, N) → their mean over each patient (P, N), float32."""
        return self.join(part.float().mean(dim=1) for part in self.split(rows))


def _products(rows: Tensor) -> Tensor:
    return rows @ rows.mT


@dataclass(frozen=True)
class Formed:
    """The gradients of P patients for one parameter, written out."""

    means: Tensor  # (P, *shape of the parameter) float32: of each patient, the mean over its images

    def squared_norms(self) -> Tensor:
        """(P,) float32."""
        # Row by row, which needs no room for the squares; over all at once its sum would be 1e-4 off.
        rows: Tensor = torch.linalg.vector_norm(self.means, dim=-1)
        return rows.flatten(1).square().sum(dim=1) if rows.dim() > 1 else rows.square()

    def clipped_sums(self, factor: Tensor, *, some_skipped: bool) -> list[Tensor]:
        """The sum of all patients' gradients, each times its ``factor`` (P,).

        Args:
            some_skipped: whether a factor is 0, which leaves a patient out, whatever its gradient is.
        """
        kept = self.means.flatten(1)
        if some_skipped:  # 0 · NaN is NaN, so that a factor of zero would not do
            kept = torch.where((factor > 0).unsqueeze(1), kept, 0.0)
        return [(kept.T @ factor).view(self.means.shape[1:])]


@dataclass(frozen=True)
class Outer:
    """The gradients of P patients for linear layers that are sent the same: means of outer products, none formed.

    A bias is a weight on one more number that is sent, 1. Layers side by side are one layer of as many outputs.
    """

    backprops: Tensor  # (R, out) float32: what the loss sends back to each image, layer after layer
    sent: Tensor  # (R, in) float32: what each image sent in
    groups: Groups
    widths: tuple[int, ...]  # outputs of each layer
    bias: bool = False  # whether the layers have biases that train

    def squared_norms(self) -> Tensor:
        """(P,) float32; of a patient of m images, Σᵢⱼ (gᵢ·gⱼ)(aᵢ·aⱼ) / m², accurate also where terms cancel."""
        several = zip(self.groups.split(self.backprops), self.groups.split(self.sent), strict=True)
        return self.groups.join(self._squared_norms(back, sent) for back, sent in several)

    def _squared_norms(self, back: Tensor, sent: Tensor) -> Tensor:
        """(P',) of patients of m images each: (P', m, out) and (P', m, in)."""
        terms = _products(back) * (_products(sent) + self.bias)
        total = terms.sum(dim=(1, 2))
        unsure = total < _SURE * terms.abs().sum(dim=(1, 2))
        if bool(unsure.any()):
            exact = _products(back[unsure].double()) * (_products(sent[unsure].double()) + self.bias)
            total[unsure] = exact.sum(dim=(1, 2)).clamp(min=0).float()
        return total / sent.shape[1] ** 2

    def clipped_sums(self, factor: Tensor, *, some_skipped: bool) -> list[Tensor]:
        """As :meth:`Formed.clipped_sums`: the layers' weights (out, in), then their biases (out,)."""
        weight = (factor / self.groups.images)[self.groups.patient].unsqueeze(1)  # (R, 1)
        back, sent = self.backprops, self.sent
        if some_skipped:
            back, sent = torch.where(weight > 0, back, 0.0), torch.where(weight > 0, sent, 0.0)
        clipped = (weight * back).T  # (out, R)
        biases = clipped.sum(dim=1).split(self.widths) if self.bias else ()
        return [*(clipped @ sent).split(self.widths), *biases]


PatientGradient = Formed | Outer
