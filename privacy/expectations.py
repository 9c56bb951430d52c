"""What to expect of a federation, quoted from a study and never read into it: the nearest cell that promises no more.

``expectations.json`` is written by ``benchmarks/learning.py``: balanced accuracy over patients of a site, epsilon and
number of sites, on drawn embeddings. A cell speaks for all that is at least as large in every one of the three.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

__all__ = ["STUDY_DELTA", "Expectation", "expectation", "study"]

STUDY_DELTA = 1e-5  # of the study's epsilons
_ROUNDING = 1 - 1e-6  # an epsilon of 3 comes back from its units a little smaller


@dataclass(frozen=True)
class Expectation:
    """One cell of the study: a head for four classes in a public basis, each site with noise of its own."""

    source: str
    patients: int  # of each site, at or below those asked for
    epsilon: float  # likewise, at STUDY_DELTA
    sites: int  # likewise
    zero_shot: float  # balanced accuracy of the start, in [0, 1]; the mean over seeds, as all here
    balanced_accuracy: float
    interval: float  # half-width of its 95 % interval over seeds
    gain: float  # over zero-shot
    gain_interval: float

    @property
    def learns(self) -> bool:
        """Whether the study shows a gain over zero-shot."""
        return self.gain > self.gain_interval


@cache
def study() -> dict[str, Any]:
    """The study as it ships with the package."""
    content: dict[str, Any] = json.loads(files("clinifed.privacy").joinpath("expectations.json").read_text("utf-8"))
    return content


def expectation(patients: float, epsilon: float, sites: int) -> Expectation | None:
    """The largest cell that is no larger than what is asked for; None where all are larger.

    Args:
        patients: of one site who have the specialty, by public numbers.
        epsilon: per patient and site for the whole run, at STUDY_DELTA.
        sites: how many train the part.

    Guarantees:
        - No cell of more patients, epsilon or sites is ever quoted.
    """
    content = study()
    fitting = [
        cell
        for cell in content["cells"]
        if cell["patients"] <= patients and cell["epsilon"] * _ROUNDING <= epsilon and cell["sites"] <= sites
    ]
    if not fitting:
        return None
    # The cells form a grid, so that the largest in each of the three is a cell.
    largest = {key: max(cell[key] for cell in fitting) for key in ("patients", "epsilon", "sites")}
    found = next(cell for cell in fitting if all(cell[key] == value for key, value in largest.items()))
    return Expectation(source=content["source"], zero_shot=content["zero_shot"], **found)
