"""What one data element holds: its values as text, whether they fit its VR, whether a code is the house's own."""

import re

from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from clinifed.data.deid_values import shift, valid_time
from clinifed.data.deid_words import is_public_code

__all__ = ["AGE", "BYTES", "DATES", "TEXT", "UNVOUCHED", "capped", "fits", "is_local", "searchable", "texts"]

TEXT = ("LO", "LT", "SH", "ST", "UC", "UT")
DATES = ("DA", "DT", "TM")
BYTES = ("OB", "OD", "OF", "OL", "OV", "OW", "UN")
# VRs of free text and names, which may not stay where no rule vouches for the attribute.
UNVOUCHED = ("AE", "AS", "LT", "PN", "ST", "UC", "UN", "UR", "UT")
AGE = re.compile(r"\d{3}[DWMY]")
_CS = re.compile(r"[A-Za-z0-9 _./-]*")
_LONGEST = {"CS": 16, "LO": 64, "SH": 16}  # characters (PS3.5 table 6.2-1)


def texts(element: DataElement) -> list[str]:
    """The values as text, without the ones that are empty."""
    value = element.value
    values = value if isinstance(value, MultiValue | list | tuple) else [value]
    return [text for item in values if (text := str(item if item is not None else "").strip(" \0"))]


def searchable(element: DataElement) -> str:
    """All of the value as one text, bytes as Latin-1, to look for names in."""
    value = element.value
    return value.decode("latin-1") if isinstance(value, bytes) else " \\ ".join(texts(element))


def fits(element: DataElement) -> bool:
    """Whether every value is one that its VR permits; numbers and bytes were read as such."""
    vr, values = element.VR, texts(element) if element.VR not in BYTES else []
    if vr == "CS" and not all(_CS.fullmatch(text) for text in values):
        return False
    if vr in DATES and not all(valid_time(text) if vr == "TM" else shift(vr, text, 0) for text in values):
        return False
    return all(len(text) <= _LONGEST.get(vr, len(text)) for text in values)


def is_local(item: Dataset) -> bool:
    """Whether an item is a code that is no public one."""
    return "CodeValue" in item and not is_public_code(
        str(item.get("CodeValue", "")), str(item.get("CodingSchemeDesignator", ""))
    )


def capped(age: str) -> str:
    """Ages above 89 years are one (45 CFR 164.514(b)(2)(i)(C)): 090Y."""
    years = int(age[:3]) / {"D": 365.25, "W": 52.18, "M": 12, "Y": 1}[age[3]]
    return "090Y" if years >= 90 else age
