"""A run directory: taken once, and never left without a word on how the run ended."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clinifed.errors import ClinifedError, ConfigError
from clinifed.files import write_json

__all__ = ["run_directory", "take"]


def take(out: Path) -> None:
    """Make ``out`` for a new run.

    Raises:
        ConfigError: an earlier run lies there.
    """
    used = [name for name in ("summary.json", "run.json", "checkpoint", "flare", "sites") if (out / name).exists()]
    if used:
        raise ConfigError(f"--out {out}: holds {', '.join(used)} of an earlier run; choose another directory")
    out.mkdir(parents=True, exist_ok=True)


@contextmanager
def run_directory(out: Path, federation: str) -> Iterator[float]:
    """A run in ``out``; yields ``time.monotonic()`` at its beginning.

    Whatever ends it early is written into ``summary.json``: status ``failed``, or ``interrupted``, and no checkpoint.
    """
    started = time.monotonic()
    try:
        yield started
    except BaseException as error:
        write_json(
            out / "summary.json",
            {
                "schema_version": 1,
                "status": "interrupted" if isinstance(error, KeyboardInterrupt) else "failed",
                "federation": federation,
                "error": list(error.problems) if isinstance(error, ClinifedError) else [type(error).__name__],
                "wall_s": round(time.monotonic() - started, 3),
                "rounds": 0,
                "full_model_bytes": None,
                "checkpoint": None,
                "sites": {},
                "metrics": {},
            },
        )
        raise
