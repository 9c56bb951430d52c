"""Which frames of a volume stand for it, and how much of one file may be."""

from dataclasses import dataclass

from clinifed.errors import ConfigError

__all__ = ["KEY_FRAME", "MAX_FRAME_VALUES", "Frames"]

MAX_FRAME_VALUES = 64 << 20  # values of all frames that are taken: 256 MiB as float32
_MOST = 64  # frames of one file; more would be most of a batch


@dataclass(frozen=True)
class Frames:
    """How many frames, or slices, of a volume are taken, evenly spread.

    The volume is cut into ``count`` equal parts and the middle of each is taken: one is the key slice in the middle.

    Raises:
        ConfigError: ``count`` is not 1 to 64.
    """

    count: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or not 1 <= self.count <= _MOST:
            raise ConfigError(f"frames: {self.count!r} is not 1 to {_MOST}")

    def of(self, available: int) -> tuple[int, ...]:
        """The indices, from 0 and ascending, in a volume of ``available`` (≥ 1) frames; all where there are fewer."""
        count = min(self.count, available)
        return tuple((2 * part + 1) * available // (2 * count) for part in range(count))


KEY_FRAME = Frames()
