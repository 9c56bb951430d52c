"""Who withdrew consent at this site: pseudonyms in a file beside the ledger, owner-only. Training leaves them out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from clinifed.errors import DataError
from clinifed.files import OWNER_ONLY, write_atomic
from clinifed.policy import SitePolicy

__all__ = ["Withdrawn"]


@dataclass(frozen=True)
class Withdrawn:
    """The list of one site.

    Guarantees:
        - A patient who is on it stays on it: names are only ever added.
        - A list that cannot be read is an error, never an empty list.
    """

    path: Path

    @classmethod
    def of(cls, policy: SitePolicy) -> Self:
        """The list beside the ledger that ``policy`` names."""
        return cls(policy.ledger.with_name(f"{policy.ledger.name}.withdrawn"))

    def patients(self) -> frozenset[str]:
        """Keyed pseudonyms, as manifests have them; none where there is no file.

        Raises:
            DataError: the list is there and cannot be read: then nobody can say who withdrew, and nothing trains.
        """
        try:
            return frozenset(self.path.read_text(encoding="utf-8").split())
        except FileNotFoundError:
            return frozenset()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path}: who withdrew cannot be read ({type(error).__name__}); restore it") from None

    def add(self, patient: str) -> None:
        """Put one patient on the list, on the disk before this returns."""
        names = sorted(self.patients() | {patient})
        write_atomic(self.path, ("\n".join(names) + "\n").encode(), OWNER_ONLY)
