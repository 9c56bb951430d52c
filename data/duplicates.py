"""One image seen several times: within a patient it is merged, between two patients nothing can be indexed.

Differential privacy here bounds what one patient moves. An image that is counted for two patients is bounded twice, so
the person in it moves the model by up to two patients' worth; the same person in training and holdout makes every
figure on the holdout look better than it is. Near-duplicates (crops, other windows, lossy copies) are not looked for.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from clinifed.config import SEPARATOR
from clinifed.data.fingerprint import Fingerprint
from clinifed.data.manifest import Record

__all__ = ["REMEDY", "Person", "Sighting", "contradictions", "duplicates"]


@dataclass(frozen=True)
class Person:
    """Whose an image is, normalised."""

    issuer: str  # empty where nobody says which assigning authority the number is of
    number: str


@dataclass(frozen=True)
class Sighting:
    """One row of a source that has become a record."""

    path: Path
    record: Record
    person: Person
    prints: Fingerprint


_TWO_SPELLINGS = "patient's number also occurs with an issuer, or without"
_TWO_PATIENTS = "listed for two patients"
_TWO_UIDS = "same SOPInstanceUID in two patients"
_TWO_PICTURES = "same picture in two patients"
_TWO_SPLITS = "patient is in two splits"
_TWO_LABELS = "copies of one image have different labels"

_WHOSE = (
    "find out whose it is and remove the others: an image counted for two patients moves the model twice as far as one "
    "patient may"
)
REMEDY = {
    _TWO_SPELLINGS: (
        "say whose the numbers without IssuerOfPatientID are (--issuer, or `issuer` of the index): guessing would "
        "make one patient two, or two one"
    ),
    _TWO_PATIENTS: "correct the table of labels: any choice would let one patient change another",
    _TWO_UIDS: _WHOSE,
    _TWO_PICTURES: _WHOSE,
    _TWO_SPLITS: "give all images of a patient one split: what is held out must be of people who were not trained on",
    _TWO_LABELS: "correct the labels: which of them is meant is for a person to say",
}


def contradictions(found: Sequence[Sighting]) -> dict[int, str]:
    """Position in ``found`` → why rows contradict each other about it; each reason has a :data:`REMEDY`.

    Where there is one nothing may be indexed: whether a patient counts would depend on another patient's rows.
    """
    unclear: dict[int, str] = {}
    # The gravest last: it is the one that is told.
    for group in _copies(found).values():
        if len({_meaning(found[i].record) for i in group}) > 1:
            unclear |= dict.fromkeys(group, _TWO_LABELS)
    for reason, key, value in _CHECKS:
        values: dict[Hashable, set[Hashable]] = defaultdict(set)
        for seen in found:
            values[key(seen)].add(value(seen))
        unclear |= {i: reason for i, seen in enumerate(found) if key(seen) and len(values[key(seen)]) > 1}
    return unclear


def duplicates(found: Sequence[Sighting]) -> dict[int, str]:
    """Position in ``found`` → why another row of the same patient stands for it.

    Of the copies of one image the one with the least file hash stays, so that neither names nor order matter; of equal
    files the one with the least record, by label and caption.
    """
    left_out: dict[int, str] = {}
    for group in _copies(found).values():
        kept = min(group, key=lambda i: (found[i].prints.sha256, astuple(found[i].record), i))
        for i in group:
            if i != kept:
                same = found[i].path == found[kept].path
                left_out[i] = "listed twice" if same else "duplicate of another image"
    return left_out


def _meaning(record: Record) -> tuple[str, frozenset[str]]:
    return record.specialty, frozenset(record.label.split(SEPARATOR))


_Of = Callable[[Sighting], Hashable]
# (reason, what is one thing, what of it there may be only one of); an empty key is nothing.
_CHECKS: Sequence[tuple[str, _Of, _Of]] = (
    (_TWO_SPLITS, lambda s: s.record.patient, lambda s: s.record.split),
    (_TWO_PICTURES, lambda s: s.prints.pixels, lambda s: s.record.patient),
    (_TWO_UIDS, lambda s: s.prints.sop_instance_uid, lambda s: s.record.patient),
    (_TWO_PATIENTS, lambda s: s.record.image, lambda s: s.record.patient),
    (_TWO_SPELLINGS, lambda s: s.person.number, lambda s: bool(s.person.issuer)),
)


def _copies(found: Sequence[Sighting]) -> dict[int, list[int]]:
    """Positions that are one image of one patient: by bytes, picture or UID, also through a third (union-find)."""
    parent = list(range(len(found)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[Hashable, int] = {}
    for i, seen in enumerate(found):
        prints = seen.prints
        for key in (("b", prints.sha256), ("p", prints.pixels), ("u", prints.sop_instance_uid)):
            if key[1]:
                parent[root(i)] = root(first.setdefault((seen.record.patient, *key), i))
    groups: dict[int, list[int]] = defaultdict(list)
    for i in range(len(found)):
        groups[root(i)].append(i)
    return {key: group for key, group in groups.items() if len(group) > 1}
