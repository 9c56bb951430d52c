"""What of a check may leave the site: constant words, public terms, and counts that give no small group away.

Counts are told as ranges as wide as the site's minimum, smaller ones as ``<minimum``, and a sum only where every part
of it is told: otherwise the small part would be the sum less the others. Ranges are not noise: what is told here is
no part of any privacy claim, and telling it again after a patient was added can show that patient at a range's edge.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from clinifed.data.reasons import REASONS

__all__ = ["OTHER", "Counts", "Line", "Shared", "known", "known_reason"]

WITHHELD = "withheld"
OTHER = "other"


@dataclass(frozen=True)
class Counts:
    """A number of images or patients, and the parts that it is the sum, or the union, of."""

    title: str  # constant words, or a public term
    count: int
    parts: tuple["Counts", ...] = ()

    def small(self, minimum: int) -> bool:
        """Whether this count or any part of it is below ``minimum``."""
        return self.count < minimum or any(part.small(minimum) for part in self.parts)

    def told(self, minimum: int, depth: int = 0) -> Iterator["Line"]:
        """This count and its parts, as they may be told.

        Guarantees:
            - A part below ``minimum`` may be any number from 0 to ``minimum − 1``, by all that is told of its tree.
        """
        if any(part.small(minimum) for part in self.parts):
            text = WITHHELD  # also where the sum is small: otherwise `withheld` would say that it is not
        elif self.count < minimum:
            text = f"<{minimum}"
        else:
            low = self.count // minimum * minimum
            text = f"{low}–{low + minimum - 1}"
        yield Line(depth, self.title, text)
        for part in self.parts:
            yield from part.told(minimum, depth + 1)


@dataclass(frozen=True)
class Line:
    """One count, as text."""

    depth: int
    title: str
    text: str


@dataclass(frozen=True)
class Shared:
    """What may be told of one finding besides its check and its level."""

    words: tuple[str, ...] = ()  # constants of the code, public terms and the site's own settings
    counts: tuple[Counts, ...] = ()  # no patient or image is counted in two of a report's trees with parts


def known(term: str, public: Collection[str]) -> str:
    """``term`` where it is one of ``public``; anything else of a file or a table is :data:`OTHER`."""
    return term if term in public else OTHER


def known_reason(reason: str) -> str:
    """A reason why an image is left out, if it is one of ours."""
    return reason if reason in REASONS else OTHER
