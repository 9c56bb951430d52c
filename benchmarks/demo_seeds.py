"""The demo over data seeds, each a whole federation: does federating beat zero-shot, and every site alone?

    python benchmarks/demo_seeds.py [--seeds 1 2 3 4 5 6] [--shuffled 1 2 3] [--set KEY=VALUE] [--out runs/seeds]

Writes ``benchmarks/RESULTS.md`` for people and ``benchmarks/results.json`` for programs. Runs that exist are reused.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from results import HERE, Entry, record, write_section

CONFIG = HERE.parent / "simulator_configs" / "demo.yaml"


def run(out: Path, settings: Sequence[str]) -> dict[str, Any]:
    """The summary of one simulated federation."""
    if not (out / "summary.json").is_file():
        command = [sys.executable, "-m", "clinifed", "simulate", str(CONFIG), "--out", str(out), "--json"]
        command += [part for setting in settings for part in ("--set", setting)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def figures(summary: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Specialty → balanced accuracy of zero-shot, of the sites alone under DP, and federated."""
    return {
        name: (
            entry["zero_shot"]["balanced_accuracy"],
            entry["local_only_dp"]["mean"]["balanced_accuracy"],
            entry["federated"]["balanced_accuracy"],
        )
        for name, entry in summary["metrics"].items()
    }


def table(title: str, runs: dict[int, dict[str, tuple[float, float, float]]]) -> list[str]:
    """One Markdown table: rows are seeds, cells are zero-shot / alone / federated."""
    names = sorted(next(iter(runs.values())))
    lines = [f"### {title}", "", f"| seed | {' | '.join(names)} | mean | gain |", "|" + "---|" * (len(names) + 3)]

    def row(label: str, cells: dict[str, tuple[float, float, float]]) -> str:
        middle = [mean(cells[n][i] for n in names) for i in range(3)]
        text = [" / ".join(f"{v:.3f}" for v in cells[n]) for n in names] + [" / ".join(f"{v:.3f}" for v in middle)]
        return f"| {label} | {' | '.join(text)} | {middle[2] - middle[0]:+.3f} |"

    lines += [row(str(seed), cells) for seed, cells in runs.items()]
    average = {n: tuple(mean(c[n][i] for c in runs.values()) for i in range(3)) for n in names}
    return [*lines, row("**mean**", average), ""]  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--shuffled", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    args = parser.parse_args()
    summaries = {s: run(args.out / f"seed{s}", [f"data.synthesize.seed={s}", *args.set]) for s in args.seeds}
    control = {
        s: figures(
            run(
                args.out / f"shuffled{s}",
                [f"data.synthesize.seed={s}", "data.synthesize.shuffle_labels=true", *args.set],
            )
        )
        for s in args.shuffled
    }
    learned = {s: figures(summary) for s, summary in summaries.items()}
    last = next(iter(summaries.values()))
    sent = max(r["bytes_sent"] for site in last["sites"].values() for r in site["rounds"])
    received = max(r["bytes_received"] for site in last["sites"].values() for r in site["rounds"])
    entries = [
        Entry(
            name=f"demo_{which}_{name}",
            ratio=mean(c[name][2] for c in runs.values()) / mean(c[name][0] for c in runs.values()),
            a=mean(c[name][2] for c in runs.values()),
            b=mean(c[name][0] for c in runs.values()),
            unit="balanced accuracy, federated over zero-shot",
            spread=max(c[name][2] for c in runs.values()) - min(c[name][2] for c in runs.values()),
        )
        for which, runs in (("learned", learned), ("shuffled", control))
        if runs
        for name in sorted(next(iter(runs.values())))
    ]
    payload, model = max(sent, received), last["full_model_bytes"]
    unit = "bytes per round and site over the full model's"
    record([*entries, Entry("demo_payload_heads", payload / model, payload, model, unit, 0)])
    text = [
        "Every figure comes from whole runs of `clinifed simulate simulator_configs/demo.yaml`.",
        "",
        "Balanced accuracy by patient on the public test set: zero-shot / mean of the sites alone at the same",
        "epsilon / federated. The scanners (`style_seed`) were chosen, the seeds below were not.",
        "",
        *table("Labels as they are", learned),
    ]
    if control:
        text += table("Control: labels shuffled within every site", control)
    walls = [summary["wall_s"] for summary in summaries.values()]
    text += [
        f"Payload per round and site: {sent} bytes out, {received} bytes in; the full model has "
        f"{last['full_model_bytes']} bytes ({max(sent, received) / last['full_model_bytes']:.2%}).",
        f"Wall time of a run, one at a time: {min(walls):.0f}–{max(walls):.0f} s.",
        "",
    ]
    write_section("The demo over data seeds", text)
    print("\n".join(text))


if __name__ == "__main__":
    main()
