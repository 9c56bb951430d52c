"""Where the benchmarks write: a section of ``RESULTS.md`` each for people, entries of ``results.json`` for programs."""

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGES = ("nvflare", "torch", "opacus", "open_clip_torch")


def machine() -> str:
    """What the figures were measured on."""
    packages = ", ".join(f"{p} {version(p)}" for p in PACKAGES)
    return f"{os.cpu_count()} cores, {platform.machine()}{_gpu()}, Python {platform.python_version()}, {packages}"


def _gpu() -> str:
    """What the driver's own tool says there is; torch would make a small process large."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return ""
    told = subprocess.run([tool, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    return "".join(f", {name}" for name in told.stdout.split("\n") if name)


def write_section(title: str, lines: Sequence[str]) -> None:
    """Put ``lines`` into the section ``title``, and leave the other sections as they are."""
    path = HERE / "RESULTS.md"
    before = path.read_text(encoding="utf-8") if path.exists() else "# Results\n"
    head, *sections = before.split("\n## ")
    kept = {text.partition("\n")[0]: text.partition("\n")[2].strip("\n") for text in sections}
    kept[title] = "\n".join([f"Machine: {machine()}.", "", *lines]).strip("\n")
    text = "\n\n".join([head.strip("\n"), *(f"## {name}\n\n{body}" for name, body in kept.items())])
    path.write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Entry:
    """One figure: a ratio of two things measured in one run."""

    name: str
    ratio: float  # a / b
    a: float
    b: float
    unit: str
    spread: float  # of the ratio over repetitions, largest minus smallest


def record(entries: Sequence[Entry]) -> None:
    """Put ``entries`` into ``results.json``, each in the place of what had its name, with the machine beside it."""
    path = HERE / "results.json"
    kept = {entry["name"]: entry for entry in json.loads(path.read_text())} if path.exists() else {}
    kept |= {entry.name: {**asdict(entry), "machine": machine()} for entry in entries}
    path.write_text(json.dumps(list(kept.values()), indent=2) + "\n")


def peak_gb() -> float:
    """Peak resident memory of this process, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def printed(script: str, *words: str) -> Any:
    """The JSON in the last line that ``script`` prints in a process of its own.

    Linux counts a parent's memory into what it starts, so whoever asks for a peak must be small.
    """
    done = subprocess.run([sys.executable, script, *words], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])
