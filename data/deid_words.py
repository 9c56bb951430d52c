"""Free text reduced to words that name no one: the Clean Descriptors Option (PS3.15 E.3.5) by a closed vocabulary."""

import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from importlib.resources import files

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.tag import Tag

__all__ = ["Identifiers", "clean", "is_public_code"]

# Coding schemes whose codes are public (PS3.16 table 8-1); a local code may name a hospital.
_SCHEMES = frozenset(
    (
        *("DCM", "SCT", "SRT", "SNM3", "RADLEX", "LN", "UCUM", "FMA", "NCIt", "RO", "UMLS", "ACR", "BI", "MDC"),
        *("I9", "I9C", "I10", "I10P", "I11"),
    )
)

_CODE = re.compile(r"[A-Za-z0-9._-]{1,16}")
# Whole values that name a patient, a visit or a place, wherever they turn up again.
_NUMBERS = ("PatientID", "OtherPatientIDs", "PatientBirthDate", "AccessionNumber", "AdmissionID", "StudyID")
_PLACES = ("PatientAddress", "PatientTelephoneNumbers", "MedicalRecordLocator")
_PHRASES = frozenset(map(Tag, (*_NUMBERS, *_PLACES)))
_INSTITUTION = frozenset(map(Tag, ("InstitutionName", "InstitutionAddress")))
_ADDRESS = Tag("PatientAddress")
_SHORTEST_NAME, _SHORTEST_PHRASE, _SHORTEST_STREET = 3, 4, 5  # characters; shorter ones are found in everything


def _plain(text: str) -> str:
    """One spelling: letters and digits in lower case, single blanks between words."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold().replace("_", " ")))


class Identifiers:
    """What a file's own header says of who its patient is, to be found again where no rule expects it.

    Args:
        ds: the data set, before anything was changed.
        institution: whether the hospital's name and address count.
    """

    def __init__(self, ds: Dataset, *, institution: bool) -> None:
        self._searched = _PHRASES | _INSTITUTION if institution else _PHRASES
        self._names: set[str] = set()
        self._phrases: set[str] = set()
        self._collect(ds)

    def _collect(self, ds: Dataset) -> None:
        for tag in list(ds.keys()):
            try:
                element = ds[tag]
                value = element.value
            except Exception:  # noqa: S112 - what cannot be read is removed later, unseen
                continue
            if element.VR == "SQ":
                for item in value:
                    self._collect(item)
            elif element.VR == "PN":
                words = _plain(re.sub(r"[\\^=]", " ", str(value))).split()
                # Two signs are a whole name in Chinese, Japanese or Korean.
                self._names |= {word for word in words if len(word) >= (_SHORTEST_NAME if word.isascii() else 2)}
            elif tag in self._searched:
                for text in value if isinstance(value, MultiValue) else [value]:
                    if len(phrase := _plain(str(text or ""))) >= _SHORTEST_PHRASE:
                        self._phrases.add(phrase)
                    if tag == _ADDRESS:
                        self._names |= {word for word in phrase.split() if len(word) >= _SHORTEST_STREET}

    def found_in(self, text: str) -> bool:
        """Whether ``text`` holds one of the names as a word, or one of the numbers, dates and places."""
        plain = _plain(text)
        return not self._names.isdisjoint(plain.split()) or any(phrase in plain for phrase in self._phrases)


@cache
def _words() -> frozenset[str]:
    """The closed vocabulary."""
    text = (files("clinifed.data") / "deid_words.txt").read_text(encoding="utf-8")
    return frozenset(word for line in text.splitlines() if not line.startswith("#") for word in line.split())


def clean(text: str, identifiers: Identifiers) -> str:
    """The words of ``text`` that the vocabulary has and nobody is called by, in order; never longer than ``text``."""
    words: Iterable[str] = re.findall(r"\w+", text.replace("_", " "))
    return " ".join(word for word in words if word.lower() in _words() and not identifiers.found_in(word))


def is_public_code(value: str, scheme: str) -> bool:
    """Whether a code is one of a public coding scheme."""
    return scheme in _SCHEMES and _CODE.fullmatch(value) is not None
