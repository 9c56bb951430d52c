"""Does the manifest name anybody? Its rows are read by programs that say them in errors and logs."""

import re
import unicodedata
from collections import defaultdict

from clinifed.jobs.data_checks_share import Counts, Shared
from clinifed.jobs.data_checks_site import Finding, Look, SiteUnderCheck, rows_text

__all__ = ["names_in_rows"]

# Names that say nothing: this package's pseudonyms (20 hexadecimal digits), longer hashes, and UUIDs.
_OPAQUE = re.compile(
    r"(?<![0-9a-f])(?:[0-9a-f]{20}|(?=[0-9]*[a-f])[0-9a-f]{16,}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?![0-9a-f])"
)
_PATTERNS = {
    "a date": re.compile(
        r"(?<!\d)(?:(?:19|20)\d\d[-_./]?(?:0[1-9]|1[0-2])[-_./]?(?:0[1-9]|[12]\d|3[01])"
        r"|(?:0?[1-9]|[12]\d|3[01])[-_.](?:0?[1-9]|1[0-2])[-_.](?:19|20)\d\d)(?!\d)"
    ),
    "a UID": re.compile(r"(?<![\d.])[0-2](?:\.\d+){4,}"),
    "a number like a patient's": re.compile(r"(?<!\d)\d{6,}(?!\d)"),
    "a person name's ^": re.compile(r"\^"),
    "two words like a name": re.compile(r"(?<![A-Za-z])[A-Z][a-z]{2,}[ _,-]+[A-Z][a-z]{2,}(?![A-Za-z])"),
}
_IDENTIFIERS = ("PatientID", "PatientBirthDate", "AccessionNumber", "StudyInstanceUID", "SOPInstanceUID")
_MIN_NAME, _MIN_NUMBER = 3, 4  # letters and characters; shorter ones stand in any text


def names_in_rows(site: SiteUnderCheck) -> Finding:
    """Image paths, patients and captions: patterns of names, dates and numbers, and what the image's header says."""
    found: dict[str, list[int]] = defaultdict(list)
    for look in site.looks:
        for what in _suspicions(look):
            found[what].append(look.row)
    rows = {row for some in found.values() for row in some}
    share = Shared(counts=(Counts("rows that may name somebody", len(rows)),))
    if not rows:
        return Finding("PASS", ("no row looks as if it named anybody",), "", share)
    says = tuple(f"{len(some)} × {what}: {rows_text(some)}" for what, some in sorted(found.items()))
    certain = any("header" in what for what in found)
    remedy = (
        "index anew with `clinifed data index`: it links images under names that say nothing, and keys the patients; "
        "captions come from the table as they are"
    )
    return Finding("FAIL" if certain else "WARN", says, remedy, share)


def _suspicions(look: Look) -> set[str]:
    """What is suspicious in one row; each is a constant text."""
    found = set()
    for field, text in (("path", look.record.image), ("patient", look.record.patient)):
        clear = _OPAQUE.sub("", text)
        found |= {f"{name} in its {field}" for name, pattern in _PATTERNS.items() if pattern.search(clear)}
    words = {word for word in _words(look.header.get("PatientName", "")) if len(word) >= _MIN_NAME}
    numbers = {look.header[name] for name in _IDENTIFIERS if len(look.header.get(name, "")) >= _MIN_NUMBER}
    for field, text in (
        ("path", look.record.image),
        ("patient", look.record.patient),
        ("caption", look.record.caption),
    ):
        if words & set(_words(text)):
            found.add(f"the header's PatientName in its {field}")
        if any(number in text for number in numbers):
            found.add(f"an identifier of the header in its {field}")
    return found


def _words(text: str) -> list[str]:
    """The words of a text in one spelling: no accents, no case; an apostrophe or hyphen parts no word."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    plain = "".join(c for c in plain if not unicodedata.combining(c) and c not in "'’")
    return re.findall(r"[^\W\d_]+", plain)
