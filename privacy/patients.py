"""What a private step works on: all patients of a site, in order, and the mechanism of one release."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from clinifed.errors import PrivacyError

__all__ = ["Mechanism", "PatientTensors", "physical_batches", "rows_per_batch"]

_FLAT_ROWS = 4096  # of features that are one row per image: 8 MB at BiomedCLIP's 512 numbers


@dataclass(frozen=True)
class PatientTensors:
    """A site's patients as the trainable part reads them: R rows of P patients, sorted by patient.

    A row is an image or an augmented view of one. Views are simply more rows of their patient: they count in the mean
    before the clip, at no change in sensitivity (De et al., arXiv 2204.13650).

    Raises:
        PrivacyError: the rows of a patient are not together, or numbers are missing. A patient in two places would
            be clipped twice.
    """

    features: Tensor  # (R, F) float32
    patient: Tensor  # (R,) int64, 0 … P-1, non-decreasing; every number occurs
    specialty: Tensor  # (R,) int64, position among the sorted names of the heads
    label: Tensor  # (R,) int64, as the objective reads it

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise PrivacyError unless the tensors are what they should be; they can be written to, so ask again."""
        lengths = {name: len(tensor) for name, tensor in vars(self).items()}
        if len(set(lengths.values())) > 1:
            raise PrivacyError(f"tensors of patients have different lengths: {lengths}; give one row per image")
        if any(vars(self)[name].dtype != torch.int64 for name in ("patient", "specialty", "label")):
            raise PrivacyError("patient, specialty and label must be int64")
        steps = torch.diff(self.patient)  # 0 within a patient, 1 to the next one
        least, most = map(int, steps.aminmax()) if len(steps) else (0, 0)
        if len(self.patient) and (int(self.patient[0]) != 0 or least < 0 or most > 1):
            raise PrivacyError(
                "the numbers of the patients do not rise from 0 without gaps: the images of a patient must stand "
                "together, or each run of them would be clipped by itself; sort by patient and number anew"
            )

    @property
    def patients(self) -> int:
        """P. A private number: it must not leave the site in DP mode."""
        return int(self.patient[-1]) + 1 if len(self.patient) else 0


@dataclass(frozen=True)
class Mechanism:
    """The Gaussian mechanism of one release; all of it is public and stands in the contract.

    Raises:
        PrivacyError: no noise, no clip, or no denominator.
    """

    noise_multiplier: float  # σ; the noise has standard deviation σ·C
    max_grad_norm: float  # C
    nominal_patients: int  # N₀, the denominator

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value!r}: must be {limit}"
            for name, value, limit, good in (
                ("noise_multiplier", self.noise_multiplier, "above 0 and finite", 0 < self.noise_multiplier < inf),
                ("max_grad_norm", self.max_grad_norm, "above 0 and finite", 0 < self.max_grad_norm < inf),
                ("nominal_patients", self.nominal_patients, "1 or more", 1 <= self.nominal_patients < inf),
            )
            if not good
        ]
        if problems:
            raise PrivacyError(*problems)


def rows_per_batch(data: PatientTensors, batch_size: int) -> int:
    """Images in a physical batch of a step: ``batch_size``, or more where an image is one short row of features.

    ``batch_size`` is what the tower can take at a time; a step over kept features needs little memory for each.
    """
    return max(batch_size, _FLAT_ROWS) if data.features.dim() == 2 else batch_size


def physical_batches(patient: Tensor, batch_size: int) -> Iterator[slice]:
    """Row ranges of at most ``batch_size`` images that never split a patient (unless alone larger than that)."""
    if 0 < len(patient) <= batch_size:
        yield slice(0, len(patient))
        return
    ends = [*(torch.nonzero(torch.diff(patient)).flatten() + 1).tolist(), len(patient)] if len(patient) else []
    start = previous = 0
    for end in ends:
        if end - start > batch_size and previous > start:
            yield slice(start, previous)
            start = previous
        previous = end
    if previous > start:
        yield slice(start, previous)
