"""A folder from a stranger, read so that nothing in it can surprise.

No link is followed below the folder, nothing but a regular file is opened, and every size has a limit.
"""

import os
import re
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from clinifed.errors import BundleError

__all__ = [
    "FileEntry",
    "FileName",
    "differences",
    "entries",
    "folders_of",
    "kind_of",
    "limited",
    "measure",
    "plain_name",
    "read_file",
    "shown",
]

_PART = re.compile(r"[A-Za-z0-9._+-]{1,200}")
_MAX_PARTS = 10
_MAX_SHOWN = 20  # problems in one error
_BLOCK = 1 << 20
_UNLIMITED = 2**63 - 2


def plain_name(name: str) -> str:
    """``name``, if it is a relative POSIX path of ASCII letters, digits and ``. _ + -`` alone.

    So no two names look alike, none leaves the folder, and none speaks to a terminal.

    Raises:
        ValueError: it is not.
    """
    parts = name.split("/")
    if len(parts) > _MAX_PARTS or not all(_PART.fullmatch(part) and part.strip(".") for part in parts):
        raise ValueError("not a plain name: relative, of ASCII letters, digits and . _ + - only")
    return name


FileName = Annotated[str, AfterValidator(plain_name)]


class FileEntry(BaseModel):
    """What a signed list says of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0, le=_UNLIMITED)


def shown(text: object, limit: int = 200) -> str:
    """``text`` for a terminal: one line, at most ``limit`` characters, nothing that a terminal would obey."""
    plain = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text)[: limit + 1])
    return plain if len(plain) <= limit else plain[: limit - 1] + "…"


def limited(problems: Sequence[str]) -> list[str]:
    """The first problems, and how many more there are."""
    rest = len(problems) - _MAX_SHOWN
    return [*problems[:_MAX_SHOWN], *([f"and {rest} more"] if rest > 0 else [])]


def kind_of(mode: int) -> str:
    """What ``st_mode`` says a directory entry is, in a word or two."""
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a directory", stat.S_IFLNK: "a symbolic link"}
    kinds |= {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFBLK: "a device", stat.S_IFCHR: "a device"}
    return kinds.get(stat.S_IFMT(mode), "no ordinary file")


def folders_of(names: Collection[str]) -> set[str]:
    """Every directory that ``names`` imply."""
    return {name[:i] for name in names for i, letter in enumerate(name) if letter == "/"}


def _open(folder: Path, name: str) -> int:
    """A handle on the regular file ``name`` below ``folder``.

    Every step is taken from the handle of the last, so that no link is followed even if one appears meanwhile.
    """
    *above, last = name.split("/")
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in above:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = inner
        # Without O_NONBLOCK a pipe would be waited for.
        handle = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
    finally:
        os.close(at)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise BundleError(f"{shown(name)}: is {kind_of(mode)}, not a file")
    return handle


def _blocks(folder: Path, name: str, limit: int) -> Iterator[bytes]:
    """The bytes of a file, in blocks, and no more than one byte beyond ``limit``."""
    try:
        with os.fdopen(_open(folder, name), "rb", buffering=0) as file:
            left = limit + 1
            while left > 0 and (block := file.read(min(_BLOCK, left))):
                left -= len(block)
                yield block
    except OSError as error:
        raise BundleError(f"{shown(name)}: cannot be read ({error.strerror})") from error


def measure(folder: Path, name: str, limit: int = _UNLIMITED) -> FileEntry:
    """Size and SHA-256 of the file ``name``, reading no more than one byte beyond ``limit``.

    Raises:
        BundleError: it is absent, unreadable or no regular file.
    """
    digest, size = sha256(), 0
    for block in _blocks(folder, name, limit):
        digest.update(block)
        size += len(block)
    return FileEntry(sha256=digest.hexdigest(), bytes=size)


def read_file(folder: Path, name: str, limit: int) -> bytes:
    """All bytes of the file ``name``.

    Raises:
        BundleError: it is absent, unreadable, no regular file, or has more than ``limit`` bytes.
    """
    content = b"".join(_blocks(folder, name, limit))
    if len(content) > limit:
        raise BundleError(f"{shown(name)}: has more than {limit} bytes")
    return content


def entries(folder: Path, enter: Callable[[str], bool]) -> Iterator[tuple[str, os.stat_result]]:
    """Everything below ``folder``: its name relative to it, and what it is, no link followed.

    Args:
        folder: the directory.
        enter: whether to look into a directory of this name.

    Raises:
        BundleError: a directory cannot be listed.
    """
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        try:
            with os.scandir(folder / prefix) as found:
                here = sorted((prefix + entry.name, entry.stat(follow_symlinks=False)) for entry in found)
        except OSError as error:
            raise BundleError(f"{shown(prefix) or folder}: cannot be listed ({error.strerror})") from error
        for name, status in here:
            yield name, status
            if stat.S_ISDIR(status.st_mode) and enter(name):
                waiting.append(f"{name}/")


def differences(
    folder: Path, files: Mapping[str, FileEntry], besides: Collection[str] = (), elsewhere: Collection[str] = ()
) -> list[str]:
    """In what ``folder`` is not exactly ``files``: everything missing, added, of another kind, size or content.

    Args:
        folder: the directory.
        files: what must be there, by name.
        besides: files that may be there as well, whose content is judged elsewhere.
        elsewhere: entries that are not looked at.
    """
    expected = folders_of(files)
    problems, seen = [], set()
    for name, status in entries(folder, expected.__contains__):
        mode, entry = status.st_mode, files.get(name)
        if name in elsewhere or (name in expected and stat.S_ISDIR(mode)):
            continue
        seen.add(name)
        if not stat.S_ISREG(mode):
            problems.append(f"{shown(name)}: is {kind_of(mode)} that does not belong there")
        elif entry is not None:
            problems += _changes(folder, name, status.st_size, entry)
        elif name not in besides:
            problems.append(f"{shown(name)}: was added")
    problems += [f"{name}: is missing" for name in sorted(files.keys() - seen)]
    return problems


def _changes(folder: Path, name: str, size: int, entry: FileEntry) -> list[str]:
    """In what the file ``name`` is not ``entry``; one of another size is not read."""
    if size != entry.bytes:
        return [f"{name}: has {size} bytes, not {entry.bytes}"]
    try:
        measured = measure(folder, name, entry.bytes)
    except BundleError as error:
        return list(error.problems)
    if measured != entry:
        return [f"{name}: its SHA-256 is {measured.sha256}, not {entry.sha256}"]
    return []
