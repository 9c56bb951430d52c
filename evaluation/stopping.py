"""Which iterate of a training run to keep, and when to stop, by figures on a validation set.

Under differential privacy that set is public: the iterates are released already, and what is done with them by public
data costs nothing (post-processing). On private data the same choice would have to be paid for, and is not offered.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Figures", "Watch"]


@dataclass(frozen=True)
class Figures:
    """One iterate on the validation set."""

    balanced_accuracy: float  # mean over specialties, by patient, in [0, 1]
    loss: float  # mean over images; breaks ties, which are common in a small set

    @property
    def rank(self) -> tuple[float, float]:
        """Greater is better."""
        return self.balanced_accuracy, -self.loss


@dataclass
class Watch:
    """The iterates so far; the first one is the start.

    Args:
        patience: so many iterates in a row without a better one end the run; None: never.
    """

    patience: int | None = None
    seen: list[Figures] = field(default_factory=list)

    def add(self, figures: Figures) -> None:
        """The next iterate."""
        self.seen.append(figures)

    @property
    def best(self) -> int:
        """The best iterate, by balanced accuracy and then by loss; the earliest of equals. 0 is the start."""
        return max(range(len(self.seen)), key=lambda i: (*self.seen[i].rank, -i))

    @property
    def stops(self) -> bool:
        """Whether nothing was gained for ``patience`` iterates."""
        return self.patience is not None and len(self.seen) - 1 - self.best >= self.patience

    def to_dict(self) -> list[dict[str, Any]]:
        """JSON values."""
        return [{"epoch": i, **asdict(figures)} for i, figures in enumerate(self.seen)]
