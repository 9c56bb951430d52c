"""What stands in for what is taken out: UIDs and dates by the site's key, dummies by VR."""

import hmac
import re
from datetime import date, timedelta
from hashlib import sha256
from types import MappingProxyType

from pydicom.uid import UID

__all__ = ["DUMMIES", "is_registered", "is_uid", "new_uid", "shift", "shift_days", "valid_time"]

_UID = re.compile(r"(0|[1-9]\d*)(\.(0|[1-9]\d*))+")  # PS3.5 9.1
_DA = re.compile(r"(\d{4})\.?(\d\d)\.?(\d\d)")  # with full stops: ACR-NEMA, still read (PS3.5 table 6.2-1, note)
_DT = re.compile(r"(\d{4})(\d\d)?(\d\d)?((?:\d{2}){0,3}(?:\.\d{1,6})?)([+-]\d{4})?")
_TM = re.compile(r"([01]\d|2[0-3])(:?[0-5]\d(:?([0-5]\d|60)(\.\d{1,6})?)?)?")
_LONGEST = 365  # days

# One value of each VR that says nothing (action D). Dates are those of nobody alive.
DUMMIES = MappingProxyType(
    {
        **dict.fromkeys(("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UT"), "REMOVED"),
        **dict.fromkeys(("DS", "IS"), "0"),
        **dict.fromkeys(("FD", "FL"), 0.0),
        **dict.fromkeys(("AT", "SL", "SS", "SV", "UL", "US", "UV"), 0),
        **dict.fromkeys(("OB", "OD", "OF", "OL", "OV", "OW", "UN"), bytes(8)),
        "AS": "000Y",
        "DA": "19000101",
        "DT": "19000101000000",
        "TM": "000000",
        "UR": "urn:removed",
    }
)


def _digest(key: bytes, purpose: str, text: str) -> bytes:
    return hmac.new(key, f"{purpose}\x1f{text}".encode(), sha256).digest()


def new_uid(key: bytes, uid: str) -> str:
    """The UID that replaces ``uid`` everywhere at this site: 2.25 and a UUID of version 8 (PS3.5 B.2, RFC 9562).

    Returns:
        At most 44 characters; equal for equal ``uid`` and ``key``, unrelated to it for anyone without the key.
    """
    number = int.from_bytes(_digest(key, "uid", uid)[:16], "big")
    number = number & ~(0xF << 76) | 8 << 76  # version
    number = number & ~(0x3 << 62) | 2 << 62  # variant
    return f"2.25.{number}"


def is_uid(text: str) -> bool:
    """Whether ``text`` is a UID (PS3.5 9.1): digits and full stops, no leading zeros, at most 64 characters."""
    return len(text) <= 64 and _UID.fullmatch(text) is not None


def is_registered(text: str) -> bool:
    """Whether ``text`` is one of the UIDs that PS3.6 Annex A registers, which name kinds of things, not things."""
    return is_uid(text) and UID(text).name != text


def shift_days(key: bytes, patient: str) -> int:
    """By how many days all dates of ``patient`` (the site's pseudonym) move: -365 to 365, never 0."""
    number = int.from_bytes(_digest(key, "days", patient)[:8], "big") % (2 * _LONGEST)
    return number - _LONGEST if number < _LONGEST else number - _LONGEST + 1


def shift(vr: str, text: str, days: int) -> str | None:
    """A DA or DT value moved by ``days``, a TM as it is; None where it is not a valid value of its VR.

    The time of day and the precision stay: a DT without a day is moved from the middle of its month or year.
    """
    text = text.strip(" \0")
    if vr == "TM":
        return text if valid_time(text) else None
    match = (_DA if vr == "DA" else _DT).fullmatch(text)
    if match is None:
        return None
    year, month, day = match[1], match[2] or "07", match[3] or "15"
    try:
        moved = date(int(year), int(month), int(day)) + timedelta(days)
    except (ValueError, OverflowError):
        return None
    digits = f"{moved.year:04}{moved.month:02}{moved.day:02}"
    if vr == "DA":
        return digits
    if match[4] and not valid_time(match[4]):
        return None
    return digits[: 4 + 2 * bool(match[2]) + 2 * bool(match[3])] + match[4] + (match[5] or "")


def valid_time(text: str) -> bool:
    """Whether ``text`` is a time of day (PS3.5 table 6.2-1), or one with colons as ACR-NEMA wrote it."""
    return _TM.fullmatch(text) is not None
