"""DICOM PS3.15 Table E.1-1 as data: what is done to an attribute under the Basic Profile and the options declared.

The table is ``confidentiality.csv``, transcribed from the edition it names and held against the table of the library
dicom-anonymizer by a test. ``confidentiality_iods.csv`` says where an action depends on an attribute's Type. The engine
is ours: that library leaves nested attributes, replaces dates that shall be removed, and draws UIDs without a key.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType

from pydicom.datadict import dictionary_VR
from pydicom.tag import BaseTag

from clinifed.errors import DataError

__all__ = ["BASIC", "EDITION", "METHODS", "OPTIONS", "Method", "Profile", "image_classes", "table", "vr_of"]

EDITION = "2026c"


@dataclass(frozen=True)
class Method:
    """One code of CID 7050, De-identification Method (PS3.16), coding scheme DCM."""

    code: str
    meaning: str


BASIC = Method("113100", "Basic Application Confidentiality Profile")
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "clean-pixel-data": Method("113101", "Clean Pixel Data Option"),
        "clean-recognizable-visual-features": Method("113102", "Clean Recognizable Visual Features Option"),
        "clean-graphics": Method("113103", "Clean Graphics Option"),
        "clean-structured-content": Method("113104", "Clean Structured Content Option"),
        "clean-descriptors": Method("113105", "Clean Descriptors Option"),
        "retain-full-dates": Method("113106", "Retain Longitudinal Temporal Information Full Dates Option"),
        "retain-modified-dates": Method("113107", "Retain Longitudinal Temporal Information Modified Dates Option"),
        "retain-patient-characteristics": Method("113108", "Retain Patient Characteristics Option"),
        "retain-device-identity": Method("113109", "Retain Device Identity Option"),
        "retain-uids": Method("113110", "Retain UIDs Option"),
        "retain-safe-private": Method("113111", "Retain Safe Private Option"),
        "retain-institution-identity": Method("113112", "Retain Institution Identity Option"),
    }
)
# Those we do. Text in pixels, overlays and structured reports cannot be cleaned without a reader of text: such files
# are kept back instead. Which private attributes are safe is their makers' word, which nobody here can check.
OPTIONS = (
    "retain-modified-dates",
    "retain-full-dates",
    "retain-uids",
    "retain-device-identity",
    "retain-institution-identity",
    "retain-patient-characteristics",
    "clean-descriptors",
)
_REPEATING = {"50XXXXXX": (0x50000000, 0xFF000000), "60XX3000": (0x60003000, 0xFF00FFFF)}
_REPEATING["60XX4000"] = (0x60004000, 0xFF00FFFF)


@cache
def table() -> Mapping[str, Mapping[str, str]]:
    """Tag (eight hexadecimal digits, or ``private``) → column → action; the Basic Profile's column is ``basic``."""
    return MappingProxyType({row["tag"]: MappingProxyType(row) for row in _rows("confidentiality.csv")})


@cache
def image_classes() -> Mapping[str, Mapping[str, str]]:
    """SOP class UID → its IOD, and the attributes that are of Type 1 or 2 in it."""
    return MappingProxyType({row["sop_class"]: MappingProxyType(row) for row in _rows("confidentiality_iods.csv")})


def _rows(name: str) -> list[dict[str, str]]:
    text = (files("clinifed.data") / name).read_text(encoding="utf-8")
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


class Profile:
    """The Basic Profile with the options declared.

    Guarantees:
        - An attribute of the table gets the action of the profile, or that of an option, which overrides it; of two
          options the one that cleans wins over the one that keeps.
        - Combined actions are resolved by the attribute's Type in the SOP class's IOD: X for Type 3 and for attributes
          that the IOD lacks, Z for 2 and 2C, D (or U) for 1 and 1C, whether or not the condition holds. For SOP
          classes that are not listed the action that keeps every IOD valid is taken.

    Args:
        options: of :data:`OPTIONS`.

    Raises:
        DataError: an option is unknown, not implemented, or contradicts another.
    """

    def __init__(self, options: Sequence[str] = ()) -> None:
        problems = []
        for option in dict.fromkeys(options):
            if option in OPTIONS:
                continue
            known = ", ".join(OPTIONS)
            what = "is an option of PS3.15 that is not implemented" if option in METHODS else "is no option of PS3.15"
            problems.append(f"option {option!r} {what}; choose from {known}")
        if {"retain-full-dates", "retain-modified-dates"} <= set(options):
            problems.append("options retain-full-dates and retain-modified-dates contradict each other; say one")
        if problems:
            raise DataError(*problems)
        self.options = tuple(sorted(set(options)))

    @property
    def methods(self) -> tuple[Method, ...]:
        """What De-identification Method Code Sequence (0012,0064) says."""
        return (BASIC, *sorted((METHODS[option] for option in self.options), key=lambda method: method.code))

    @property
    def temporal(self) -> str:
        """Longitudinal Temporal Information Modified (0028,0303)."""
        if "retain-full-dates" in self.options:
            return "UNMODIFIED"
        return "MODIFIED" if "retain-modified-dates" in self.options else "REMOVED"

    def action(self, tag: BaseTag, sop_class: str, *, nested: bool) -> str | None:
        """One of X, Z, D, U, K, C; None for an attribute that Table E.1-1 does not name."""
        row = table().get(_name(tag))
        if row is None:
            return None
        said = {row[option] for option in self.options} - {""}
        if said:
            return "C" if "C" in said else "K"
        return self.basic(tag, sop_class, nested=nested)

    def basic(self, tag: BaseTag, sop_class: str, *, nested: bool) -> str:
        """The Basic Profile's own action: one of X, Z, D, U."""
        action = table()[_name(tag)]["basic"]
        if "/" not in action:
            return action
        choices = action.rstrip("*").split("/")
        iod = image_classes().get(sop_class)
        if iod is None:
            return choices[-1]
        where = "nested_" if nested else ""
        if _name(tag) in iod[f"{where}type_1"].split():
            return choices[-1]
        if _name(tag) in iod[f"{where}type_2"].split():
            return "Z" if "Z" in choices else choices[-1]
        return choices[0]


@cache
def _name(tag: BaseTag) -> str:
    """The table's name for ``tag``."""
    if tag.is_private:
        return "private"
    for name, (base, mask) in _REPEATING.items():
        if tag & mask == base:
            return name
    return f"{int(tag):08X}"


def vr_of(tag: BaseTag) -> str:
    """The VR of a standard attribute in the data dictionary, several joined by `` or ``; empty where it is unknown."""
    try:
        return dictionary_VR(tag)
    except KeyError:
        return ""
