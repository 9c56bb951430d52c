"""A frozen tower sees every image once: its features are kept, keyed by what they are a function of.

A row of features is a function of the file's bytes, which frames of it are taken, the view, and the space: the model's
weights, where it is cut, and how a file becomes pixels. So images may come and go, and nothing else is computed again.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import TypeVar

import torch
from torch import Tensor

from clinifed.models.shards import Shards

__all__ = ["SHARD_ROWS", "Embedded", "Encode", "embed_images"]

log = logging.getLogger(__name__)

SHARD_ROWS = 256  # rows computed before they are kept: what an interruption can lose
_SHARD_NUMBERS = 1 << 24  # the same in numbers, 64 MB: where an image is many tokens, rows are long

# (numbers of images, views) → (number of the image of each row, (N, V, F) float32), batch by batch. The frames of an
# image are neighbours, and in one batch.
Encode = Callable[[Sequence[int], Sequence[int]], Iterator[tuple[Sequence[int], Tensor]]]


@dataclass(frozen=True)
class Embedded:
    """The features of all images that could be read."""

    features: Tensor  # (R, F) float32; the rows of an image stand together, frame by frame with their views
    images: list[int]  # R, the image of each row, ascending
    found: int  # rows that were kept from earlier
    computed: int  # rows that the model made now
    damaged: int  # shards that were dropped, and whose rows are among the computed


def embed_images(
    images: Sequence[str | None],
    views: int,
    encode: Encode,
    shards: Shards | None,
    frames: Sequence[int] | None = None,
) -> Embedded:
    """Features of ``images`` from ``shards``, and of those that are not there from ``encode``.

    Args:
        images: SHA-256 of each image's bytes; None where it is not known, which is computed and not kept.
        views: rows of each frame.
        encode: makes features of some views of some images; what it leaves out could not be read.
        shards: where rows are kept; None keeps nothing.
        frames: how many frames an image has at most, by the policy for its specialty; default 1. Another policy
            chooses other frames, so they are kept apart.

    Guarantees:
        - Equal bytes are encoded once, however often they are listed.
        - Memory is that of the result, of a shard, and of what ``encode`` needs: nothing else grows with the images,
          but for some 300 bytes each.
        - What was computed is kept every :data:`SHARD_ROWS` rows, so that an interruption loses little more.
        - A disk that takes no more ends the keeping, never the computing.
    """
    most = [1] * len(images) if frames is None else list(frames)
    table = _Table(most, views)
    places: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
    if shards is not None:
        for number, image in enumerate(images):
            if image is not None:
                for view in range(views):
                    places[shards.row_key(image, most[number], view)].append((number, view))
        for shard in shards.read():
            before = table.count
            for name, start, stop in _runs(shard.names):
                for number, view in places.pop(name, ()):
                    table.put(number, view, shard.features[start:stop])
            if table.count > before:
                shards.use(shard)
    found = table.count
    keeper = _Keeper(shards)
    tried: set[int] = set()
    while chosen := _missing(table, images, tried):
        for seen, numbers in chosen.items():
            tried.update(numbers)
            for read, features in encode(numbers, seen):
                for number, start, stop in _runs(read):
                    for position, view in enumerate(seen):
                        rows, image = features[start:stop, position], images[number]
                        if shards is None or image is None:
                            table.put(number, view, rows)
                            continue
                        name = shards.row_key(image, most[number], view)
                        for twin, its_view in places.pop(name, ()):
                            table.put(twin, its_view, rows)
                        keeper.keep(name, rows)
    keeper.close()
    damaged = 0 if shards is None else shards.damaged
    if damaged:
        log.warning("%d damaged shards of the embedding cache were dropped; their images were computed anew", damaged)
    numbers_of_rows = table.compact()
    return Embedded(table.rows, numbers_of_rows, found, table.count - found, damaged)


_T = TypeVar("_T")


def _runs(items: Sequence[_T]) -> Iterator[tuple[_T, int, int]]:
    """(item, start, stop) of each run of equal neighbours."""
    start = 0
    for item, run in groupby(items):
        stop = start + len(list(run))
        yield item, start, stop
        start = stop


def _missing(table: "_Table", images: Sequence[str | None], tried: set[int]) -> Mapping[tuple[int, ...], list[int]]:
    """Views → the images that lack just these and were not tried yet; of equal ones one at a time."""
    chosen: dict[tuple[int, ...], list[int]] = defaultdict(list)
    taken: set[tuple[str, int]] = set()
    for number, image in enumerate(images):
        lacking = table.lacking(number)
        equal = (image, table.most[number]) if image is not None else None
        if lacking and number not in tried and equal not in taken:
            chosen[lacking].append(number)
            if equal is not None:
                taken.add(equal)
    return chosen


class _Table:
    """Rows that come in any order, in memory once.

    Args:
        most: rows of each image and view, at most.
        views: of each image.
    """

    def __init__(self, most: Sequence[int], views: int) -> None:
        self.most, self.views = most, views
        self.rows = torch.empty(0, 0)
        self.count = 0
        self._first = list(accumulate((count * views for count in most), initial=0))
        self._had = bytearray(len(most) * views)  # rows of each image and view that are there

    def put(self, number: int, view: int, rows: Tensor) -> None:
        """Take (K, F) rows, the frames of one view of an image."""
        if not self.rows.shape[1]:  # the first ones say how long rows are
            self.rows = torch.empty(self._first[-1], rows.shape[1])
        first = self._first[number] + view
        self.rows[first : first + len(rows) * self.views : self.views] = rows
        self.count += len(rows) - self._had[number * self.views + view]
        self._had[number * self.views + view] = len(rows)

    def lacking(self, number: int) -> tuple[int, ...]:
        """The views of an image that are not there."""
        return tuple(view for view in range(self.views) if not self._had[number * self.views + view])

    def compact(self) -> list[int]:
        """Close the gaps, in place; returns the image of each row. An image that lacks a view is left out."""
        numbers, target = [], 0
        for number, first in enumerate(self._first[:-1]):
            if self.lacking(number):
                continue
            size = self._had[number * self.views] * self.views
            if target != first:
                self.rows[target : target + size] = self.rows[first : first + size].clone()
            numbers += [number] * size
            target += size
        self.rows = self.rows[:target]
        return numbers


class _Keeper:
    """Collects rows and writes them a shard at a time; rows of one name stay together."""

    def __init__(self, shards: Shards | None) -> None:
        self._shards = shards
        self._names: list[bytes] = []
        self._rows: list[Tensor] = []

    def keep(self, name: bytes, rows: Tensor) -> None:
        self._names += [name] * len(rows)
        self._rows.append(rows)
        if len(self._names) >= min(SHARD_ROWS, 1 + _SHARD_NUMBERS // rows.shape[1]):
            self.close()

    def close(self) -> None:
        """Write what has been collected."""
        names, rows = self._names, self._rows
        self._names, self._rows = [], []
        if self._shards is None or not names:
            return
        try:
            if not self._shards.write(names, torch.cat(rows)):
                log.warning("the embedding cache is full; %d rows were not kept", len(names))
        except OSError as error:
            log.warning("the disk takes no more of the embedding cache (%s); what follows is not kept", error.strerror)
            self._shards = None
