"""Pictures that were kept back because text is suspected in them, and that a person has looked at since."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from clinifed.data.burned_in import SUSPICIONS
from clinifed.errors import DataError
from clinifed.files import file_sha256

__all__ = ["content_of", "read_reviewed"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHOWN = 12  # characters of a hash in a message


def content_of(path: Path) -> str | None:
    """SHA-256 of the file, hexadecimal; None where it cannot be read. Nothing of it is parsed."""
    try:
        return file_sha256(path)
    except OSError:
        return None


def read_reviewed(path: Path, quarantine: Path) -> dict[str, str]:
    """SHA-256 of each file that is released → why it was kept back.

    Args:
        path: one hash to a line, hexadecimal; what follows it, as ``sha256sum`` prints names, is not read. Empty lines
            and those that begin with ``#`` say nothing.
        quarantine: ``<out>.quarantine.jsonl`` of an earlier run: what the person looked at. Only files that were kept
            back for suspected text are released.

    Raises:
        DataError: with every line that is no hash, or names no file in quarantine for suspected text.
    """
    suspects = dict(_suspects(quarantine))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the list of reviewed files cannot be read ({type(error).__name__})") from None
    problems, released = [], {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        digest = line.split(maxsplit=1)[0].lower()
        if not _SHA256.fullmatch(digest):
            problems.append(f"{path}:{number}: not a SHA-256; write 64 hexadecimal digits first")
        elif digest not in suspects:
            problems.append(
                f"{path}:{number}: {digest[:_SHOWN]}… is not in quarantine for suspected text; see {quarantine}"
            )
        else:
            released[digest] = suspects[digest]
    if problems:
        raise DataError(*problems)
    return released


def _suspects(quarantine: Path) -> Iterator[tuple[str, str]]:
    """(SHA-256, suspicion) of each file that was kept back for one."""
    if not quarantine.is_file():
        raise DataError(
            f"{quarantine}: no such quarantine; run without --reviewed first, and look at what stays behind"
        )
    try:
        for line in quarantine.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if entry.get("reason") in SUSPICIONS and _SHA256.fullmatch(str(entry.get("sha256"))):
                yield entry["sha256"], entry["reason"]
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"{quarantine}: not a list of what was left out ({type(error).__name__}); run without --reviewed first"
        ) from None
