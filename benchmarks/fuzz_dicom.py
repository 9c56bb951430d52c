"""Mutation fuzzing of the readers: files of the hostile corpus, changed at random, through real worker processes.

    python benchmarks/fuzz_dicom.py --minutes 30 [--seed 1] [--readers 1] [--keep FOLDER] [--json FILE]

Prints files per second, how many were pictures, refused and by which reason, how often a reader died, and the worst
time and memory of one file. Files that ended a reader, or took too long or too much, are written to ``--keep``.
The parsers under test run in the readers alone; this process only counts.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from clinifed.data.decoding import Decoder
from clinifed.data.reasons import Reason
from clinifed.errors import DataError

sys.path.append(str(Path(__file__).parents[1]))
from tests.data.hostile import corpus

LARGEST = 64 << 10  # a seed file; larger ones are bombs, which the tests run as they are
NUMBERS = (0, 1, 2, 7, 8, 16, 127, 128, 255, 256, 32767, 32768, 65535, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
KINDS = (0.2, 0.15, 0.15, 0.15, 0.05, 0.05, 0.05, 0.15, 0.05)  # mostly in place: what moves, is refused at once
GRAVE = (Reason.CRASHED, Reason.TIME, Reason.MEMORY)


def mutate(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """A few changes of the kinds that break parsers."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 6))):
        if len(data) < 8:
            break
        # Headers matter more than pixels: most changes come early.
        end = len(data) if rng.random() < 0.4 else min(len(data), 700)
        at = int(rng.integers(min(132, end - 4), end)) if rng.random() < 0.9 else int(rng.integers(0, end))
        length = int(rng.integers(1, 64))
        match int(rng.choice(9, p=KINDS)):
            case 0:
                data[at] ^= 1 << int(rng.integers(0, 8))
            case 1:
                data[at : at + length] = rng.bytes(length)
            case 2:
                data[at : at + 2] = (int(rng.choice(NUMBERS)) & 0xFFFF).to_bytes(2, "little")
            case 3:
                data[at : at + 4] = int(rng.choice(NUMBERS)).to_bytes(4, "little")
            case 4:
                del data[at : at + length]
            case 5:
                data[at:at] = data[at : at + length]
            case 6:
                data[at:at] = rng.bytes(length)
            case 7:
                start = int(rng.integers(0, max(1, len(other))))
                data[at : at + length] = other[start : start + length]
            case _:
                del data[at + length :]
    return bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--readers", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for the files that were grave")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    seeds = [file for file in corpus() if 300 < len(file.content) <= LARGEST and "cut-" not in file.name]
    outcomes: Counter[str] = Counter()
    grave: list[str] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, Decoder(options.readers) as decoder:
        made = 0
        while time.monotonic() - started < options.minutes * 60:
            file, other = (seeds[int(rng.integers(0, len(seeds)))] for _ in range(2))
            content = mutate(file.content, other.content, rng)
            path = Path(folder) / f"{made}{Path(file.name).suffix}"
            path.write_bytes(content)
            made += 1
            for ask in (decoder.pixels, decoder.origin):
                try:
                    ask(path)
                    outcomes["read"] += 1
                except DataError as error:
                    outcomes[str(error)] += 1
                    if str(error) in GRAVE:
                        grave.append(f"{made} {ask.__name__} {file.name}: {error}")
                        if options.keep:
                            options.keep.mkdir(parents=True, exist_ok=True)
                            (options.keep / f"{options.seed}-{made}-{file.name}").write_bytes(content)
            path.unlink()
        usage = decoder.usage
    seconds = time.monotonic() - started
    figures = {
        "minutes": round(seconds / 60, 2),
        "files": made,
        "requests": usage.files,
        "files_per_s": round(made / seconds, 1),
        "seeds": len(seeds),
        "slowest_s": round(usage.slowest_s, 3),
        "memory_mib": round(usage.memory_mib, 1),
        "readers_crashed": outcomes[str(Reason.CRASHED)],
        "too_long": outcomes[str(Reason.TIME)],
        "too_much_memory": outcomes[str(Reason.MEMORY)],
        "outcomes": dict(outcomes.most_common()),
        "grave": grave[:50],
    }
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
