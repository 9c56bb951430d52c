"""Reading strangers' files in processes of their own: what goes wrong there costs that file, and nothing else.

Guarantees:
    - Whatever a file holds, this process neither parses nor decodes a byte of it.
    - A file that takes too long or too much memory, or ends its reader, is one refused file: a
      :class:`~clinifed.errors.DataError` with one of the reasons of :mod:`clinifed.data.reasons`. The next file has a
      new reader.
    - No reader outlives the process that started it.
"""

import atexit
import json
import os
import time
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import LifoQueue
from threading import Lock
from types import TracebackType
from typing import Any, Self, TypeGuard

import numpy as np
from numpy.typing import NDArray

from clinifed.data.decoding_worker import Limits
from clinifed.data.reader import GoneError, Reader
from clinifed.data.reasons import REASONS, Reason
from clinifed.data.volumes import KEY_FRAME, Frames
from clinifed.errors import DataError

__all__ = ["Decoder", "Usage", "default_decoder"]

Floats = NDArray[np.float32]

_FILES_OF_ONE_READER = 5000  # then a new one, in case a codec leaks
_MAX_TEXT = 1 << 16  # characters of one value of a header
_FIELDS = 6  # of clinifed.data.fingerprint.Header


@dataclass
class Usage:
    """What reading has taken so far."""

    files: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # reason → files
    slowest_s: float = 0.0
    memory_mib: float = 0.0  # the most that a reader has had, all in all


class Decoder:
    """Readers that are started when they are needed, and used again.

    Safe in several threads; a forked child begins with none of its parent's readers.

    Args:
        readers: processes at most, 1 or 2.
        limits: what one file may take.
    """

    def __init__(self, readers: int = 1, limits: Limits | None = None) -> None:
        if readers not in (1, 2):
            raise ValueError(f"readers: {readers!r} is not 1 or 2")
        self.readers, self.limits = readers, limits or Limits()
        self.usage = Usage()
        self._reset()
        _decoders.add(self)

    def _reset(self) -> None:
        self._lock = Lock()
        self._living: set[Reader] = set()
        # Last in, first out: a second reader starts only when the first is busy.
        self._idle: LifoQueue[Reader | None] = LifoQueue()
        for _ in range(self.readers):
            self._idle.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all readers; the next file would start one again."""
        with self._lock:
            living, self._living = self._living, set()
        for reader in living:
            reader.end()

    @property
    def pids(self) -> list[int]:
        """The readers' processes."""
        with self._lock:
            return sorted(reader.pid for reader in self._living)

    def origin(self, path: Path, label_tag: int | None = None) -> tuple[str, ...]:
        """The fields of :func:`clinifed.data.fingerprint.read_header`, in a reader.

        Raises:
            DataError: as there, or reading it crashed, took too long or too much memory.
        """
        value = self._ask({"ask": "origin", "path": str(path), "label_tag": label_tag})[0].get("value")
        if not _texts(value) or len(value) != _FIELDS or any(len(text) > _MAX_TEXT for text in value):
            raise DataError(Reason.CRASHED)
        return tuple(value)

    def directory(self, path: Path) -> list[list[str]]:
        """As :func:`clinifed.data.dicomdir.read_directory`, in a reader. Raises as :meth:`origin` does."""
        listed = self._ask({"ask": "directory", "path": str(path)})[1]
        try:
            names = json.loads(listed) if isinstance(listed, bytes) else None
        except (ValueError, RecursionError):
            names = None
        if not isinstance(names, list) or not all(_texts(parts) for parts in names):
            raise DataError(Reason.CRASHED)
        return names

    def pixels(self, path: Path) -> Floats:
        """As :func:`clinifed.data.dicom.read_pixels`, in a reader. Raises as :meth:`origin` does."""
        picture: Floats = self.volume(path, KEY_FRAME)[0]
        return picture

    def volume(self, path: Path, frames: Frames = KEY_FRAME) -> Floats:
        """As :func:`clinifed.data.dicom.read_volume`, in a reader. Raises as :meth:`origin` does."""
        values = self._ask({"ask": "pixels", "path": str(path), "frames": frames.count})[1]
        # NaN is in no range.
        if not isinstance(values, np.ndarray) or not (values.min() >= 0 and values.max() <= 1):
            raise DataError(Reason.CRASHED)
        return values

    def map(self, paths: Iterable[Path]) -> Iterator[Floats | DataError]:
        """:meth:`pixels` of each path, in order, or why not; a few are read ahead, so memory is bounded."""
        for found in self.volumes((path, KEY_FRAME) for path in paths):
            yield found if isinstance(found, DataError) else found[0]

    def volumes(self, wanted: Iterable[tuple[Path, Frames]]) -> Iterator[Floats | DataError]:
        """:meth:`volume` of each, in order, or why not; two for each reader are read ahead."""
        ahead: deque[Future[Floats]] = deque()
        with ThreadPoolExecutor(self.readers, thread_name_prefix="decoding") as threads:
            try:
                for path, frames in wanted:
                    ahead.append(threads.submit(self.volume, path, frames))
                    if len(ahead) > 2 * self.readers:
                        yield _result(ahead.popleft())
                while ahead:
                    yield _result(ahead.popleft())
            finally:
                threads.shutdown(wait=False, cancel_futures=True)

    def _ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], Floats | bytes | None]:
        if "\0" in request["path"]:
            raise DataError(Reason.NO_FILE)
        idle = self._idle
        reader = idle.get()
        started = time.monotonic()
        reason = ""
        try:
            if reader is None or reader not in self._living:
                reader = None
                reader = Reader(self.limits)
                with self._lock:
                    self._living.add(reader)
                started = time.monotonic()
            header, values = reader.ask(request)
            reader.rss_kib = max(reader.rss_kib, int(header.get("rss_kib", 0)))
            if "reason" in header:
                reason = header["reason"] if header["reason"] in REASONS else Reason.CRASHED
            if header.get("last") or reader.files >= _FILES_OF_ONE_READER:
                self._drop(reader)
        except GoneError as gone:
            reason = str(gone)
            if reader is not None:
                ended = self._drop(reader, 0.0 if reason == Reason.TIME else 0.5)
                reason = ended if reason == Reason.CRASHED else reason
            header, values = {}, None
        except BaseException:
            # Interrupted in the middle of an answer: the rest of it would be taken for the next.
            if reader is not None:
                self._drop(reader)
            raise
        finally:
            idle.put(reader)
            self._count(time.monotonic() - started, reader, reason)
        if reason:
            raise DataError(str(reason))
        return header, values

    def _drop(self, reader: Reader, patience_s: float = 0.5) -> str:
        with self._lock:
            self._living.discard(reader)
        return reader.end(patience_s)

    def _count(self, seconds: float, reader: Reader | None, reason: str) -> None:
        with self._lock:
            self.usage.files += 1
            self.usage.slowest_s = max(self.usage.slowest_s, seconds)
            if reader is not None:
                self.usage.memory_mib = max(self.usage.memory_mib, reader.rss_kib / 1024)
            if reason:
                self.usage.refused[str(reason)] += 1

    def forget(self) -> None:
        """In a forked child: begin anew, without the parent's readers."""
        for reader in self._living:
            reader.forget()
        self._reset()


def _texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _result(future: Future[Floats]) -> Floats | DataError:
    try:
        return future.result()
    except DataError as error:
        return error


_decoders: "weakref.WeakSet[Decoder]" = weakref.WeakSet()
_default: Decoder | None = None
_default_lock = Lock()


def default_decoder() -> Decoder:
    """The decoder of this process; its readers start with the first file, and end with the process."""
    global _default
    with _default_lock:
        if _default is None:
            _default = Decoder(2 if (os.cpu_count() or 1) >= 4 else 1)
        return _default


def _after_fork() -> None:
    global _default_lock
    _default_lock = Lock()
    for decoder in list(_decoders):
        decoder.forget()


def _at_exit() -> None:
    for decoder in list(_decoders):
        decoder.close()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
