"""What can be learned at small epsilon, on data large enough to tell: federated against pooled, noise against none.

    python benchmarks/learning.py [--parts study demo table] [--seeds 1 2 ...] [--demo FOLDER]

No FLARE: ``benchmarks/federate.py`` calls the engine, the accountant and the aggregation rule that a federation uses.
Writes its sections of ``RESULTS.md``, its entries of ``results.json``, the table of ``docs/privacy.md``, and
``privacy/expectations.json``, which ``clinifed privacy plan`` quotes.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from demo_embeddings import SITES, embeddings, some_patients
from embeddings import LABELS, SPECIALTY, Draw
from federate import (
    AVERAGE_LAST,
    DELTA,
    NOISE_OF_A_LOGIT,
    ROUNDS,
    State,
    View,
    balanced_accuracy,
    federate,
    pooled,
    public_rate,
)
from results import HERE, Entry, record, write_section
from scipy.stats import t as student

from clinifed.messages import head_name
from clinifed.models.basis import make_basis
from clinifed.privacy.patients import PatientTensors

EPSILONS = (8.0, 3.0, 1.0)
RATES = (30.0, 100.0, 300.0)  # without noise, the best of them on the public validation set
RAW_RATES = (0.03, 0.3, 3.0)  # without a basis; larger ones swing
TEMPERATURE = 10.0
DIMS = 64  # of the reduced basis in study and table
TABLE = {"patients": (100, 500, 2000, 10_000), "epsilon": (1.0, 3.0, 8.0), "sites": (1, 3, 10)}
TARGETS = {
    "central": ("no noise", "pooled", 0.97),
    "eps 8": ("eps 8", "no noise", 0.90),
    "eps 3": ("eps 3", "no noise", 0.75),
}
DATA = HERE.parent / "privacy" / "expectations.json"
DOCS = HERE.parent / "docs" / "privacy.md"

Figures = dict[str, list[float]]  # what → chance-corrected balanced accuracy, one for each seed


def above_chance(state: State, data: PatientTensors) -> float:
    """Balanced accuracy on a scale from chance, 0, to 1; mean over specialties."""
    found = []
    for name, accuracy in balanced_accuracy(state, data).items():
        chance = 1 / len(state[head_name(name, "weight")])
        found.append((accuracy - chance) / (1 - chance))
    return mean(found)


def compared(
    view: View,
    sites: Sequence[PatientTensors],
    zero_shot: State,
    validation: PatientTensors,
    test: PatientTensors,
    patients: int,
) -> dict[str, float]:
    """Every way of training in one basis, on the test set."""
    sites, start = [view.patients(site) for site in sites], view.start(zero_shot)
    validation, test = view.patients(validation), view.patients(test)
    rates = RAW_RATES if view.basis is None else RATES

    def best(models: Sequence[State]) -> float:
        chosen = max(models, key=lambda state: above_chance(state, validation))
        return above_chance(chosen, test)

    found = {"zero-shot": above_chance(start, test)}
    together = [pooled(sites)]
    found["pooled"] = best([federate(together, start, rate) for rate in rates])
    found["no noise"] = best([federate(sites, start, rate) for rate in rates])
    found["no noise, 4 local steps"] = best(
        [federate(sites, start, rate, rounds=ROUNDS // 4, local_steps=4) for rate in rates]
    )
    for epsilon in EPSILONS:
        if view.basis is None:  # in hindsight, which a run could not do: to be fair to what has no basis
            models = [federate(sites, start, rate, epsilon, patients) for rate in rates]
            found[f"eps {epsilon:g}"] = best(models)
        else:
            rate = public_rate(epsilon, patients, len(sites))
            found[f"eps {epsilon:g}"] = above_chance(federate(sites, start, rate, epsilon, patients), test)
            if epsilon == 1:
                last = federate(sites, start, rate, epsilon, patients, average_last=0)
                found["eps 1, last model"] = above_chance(last, test)
    return found


def views(validation: torch.Tensor, dims: int) -> dict[str, View]:
    return {
        "as they are": View(None),
        "centre": View(make_basis("centre", validation)),
        "whitening": View(make_basis("whitening", validation)),
        f"pca {dims}": View(make_basis("pca", validation, dims)),
    }


def drawn(seed: int) -> tuple[Draw, PatientTensors, PatientTensors, State]:
    """A world, its public validation and test sets, and its zero-shot head."""
    draw = Draw(seed)
    validation = draw.patients(2000, 1000 * seed + 998, sites=10, balanced=True)
    test = draw.patients(4000, 1000 * seed + 999, sites=10, balanced=True)
    start = {
        head_name(SPECIALTY, "weight"): TEMPERATURE * draw.prompts,
        head_name(SPECIALTY, "bias"): torch.zeros(len(LABELS)),
    }
    return draw, validation, test, start


def study(seeds: Sequence[int]) -> dict[str, Figures]:
    """10 sites of about 500 patients, drawn embeddings."""
    found: dict[str, Figures] = {}
    for seed in seeds:
        draw, validation, test, start = drawn(seed)
        # N₀ is 500 for all; how many they really have is not what it says.
        sites = [draw.patients(400 + 20 * site, 1000 * seed + site) for site in range(11) if site != 5]
        for name, view in views(validation.features, DIMS).items():
            into = found.setdefault(name, defaultdict(list))
            for what, value in compared(view, sites, start, validation, test, 500).items():
                into[what].append(value)
    return found


def demo(seeds: Sequence[int], folder: Path) -> dict[str, Figures]:
    """4 hospitals of 1,000 patients each, over 4 specialties, tiny tower."""
    sets, start = embeddings(folder)
    found: dict[str, Figures] = {}
    for seed in seeds:
        sites = [some_patients(sets[site], 1000, 100 * seed + i) for i, site in enumerate(SITES)]
        for name, view in views(sets["validation"].features, 32).items():
            into = found.setdefault(name, defaultdict(list))
            for what, value in compared(view, sites, start, sets["validation"], sets["test"], 1000).items():
                into[what].append(value)
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval over seeds, by Student's t."""
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return mean(values), half


def table(seeds: Sequence[int]) -> dict[str, Any]:
    """Every cell of TABLE, by balanced accuracy."""
    cells: dict[tuple[int, float, int], list[float]] = defaultdict(list)
    zero_shot, ceiling = [], []
    for seed in seeds:
        draw, validation, test, start = drawn(seed)
        view = View(make_basis("pca", validation.features, DIMS))
        begun, tested = view.start(start), view.patients(test)
        zero_shot.append(balanced_accuracy(begun, tested)[SPECIALTY])
        for patients in TABLE["patients"]:
            every = [view.patients(draw.patients(patients, 1000 * seed + i)) for i in range(max(TABLE["sites"]))]
            for epsilon in TABLE["epsilon"]:
                for count in TABLE["sites"]:
                    rate = public_rate(epsilon, patients, count)
                    state = federate(every[:count], begun, rate, epsilon, patients)
                    cells[patients, epsilon, count].append(balanced_accuracy(state, tested)[SPECIALTY])
            if patients == max(TABLE["patients"]):
                ceiling.append(balanced_accuracy(federate(every, begun, max(RATES)), tested)[SPECIALTY])
    rows = []
    for (patients, epsilon, count), values in cells.items():
        (accuracy, half), gains = interval(values), [a - b for a, b in zip(values, zero_shot, strict=True)]
        gain, gain_half = interval(gains)
        figures = {"balanced_accuracy": accuracy, "interval": half, "gain": gain, "gain_interval": gain_half}
        rows.append(
            {"patients": patients, "epsilon": epsilon, "sites": count, **{k: round(v, 4) for k, v in figures.items()}}
        )
    return {
        "source": "synthetic embeddings study",
        "delta": DELTA,
        "seeds": len(seeds),
        "labels": len(LABELS),
        "dims": DIMS,
        "zero_shot": round(mean(zero_shot), 4),
        "without_noise": round(mean(ceiling), 4),
        "cells": rows,
    }


def basis_table(found: Mapping[str, Figures]) -> list[str]:
    """Rows are ways of training, columns are bases; the last rows say which targets are met."""
    names = list(found)
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for what in dict.fromkeys(what for figures in found.values() for what in figures):
        cells = ["{:.3f} ± {:.3f}".format(*interval(found[n][what])) if what in found[n] else "" for n in names]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    for above, below, least in TARGETS.values():
        ratios = [mean(found[n][above]) / mean(found[n][below]) for n in names]
        cells = [f"{ratio:.3f}{'' if ratio >= least else ' (missed)'}" for ratio in ratios]
        lines.append(f"| **{above} over {below}, goal ≥ {least}** | {' | '.join(cells)} |")
    return [*lines, ""]


def entries(prefix: str, figures: Figures, basis: str) -> list[Entry]:
    found = []
    for name, (above, below, _) in TARGETS.items():
        ratios = [a / b for a, b in zip(figures[above], figures[below], strict=True)]
        a, b = mean(figures[above]), mean(figures[below])
        unit = f"balanced accuracy above chance, {above} over {below}, {basis}"
        found.append(Entry(f"{prefix}_{name.replace(' ', '')}", a / b, a, b, unit, max(ratios) - min(ratios)))
    return found


def cohort_table(data: Mapping[str, Any]) -> list[str]:
    """The minimum cohorts as Markdown."""
    cells = {(c["patients"], c["epsilon"], c["sites"]): c for c in data["cells"]}
    lines = [
        f"Zero-shot {data['zero_shot']:.2f}; 10 sites of {max(TABLE['patients']):,} without noise "
        f"{data['without_noise']:.2f}; chance {1 / data['labels']:.2f}.",
        "",
        "| N₀ of a site, ε | " + " | ".join(f"{s} site{'s' * (s > 1)}" for s in TABLE["sites"]) + " |",
        "|---|" + "---|" * len(TABLE["sites"]),
    ]
    for patients in TABLE["patients"]:
        for epsilon in TABLE["epsilon"]:
            row = []
            for count in TABLE["sites"]:
                c = cells[patients, epsilon, count]
                text = f"{c['balanced_accuracy']:.2f} ({c['gain']:+.2f} ± {c['gain_interval']:.2f})"
                row.append(text if c["gain"] > c["gain_interval"] else f"*{text}*")
            lines.append(f"| {patients:,}, ε {epsilon:g} | {' | '.join(row)} |")
    return lines


def into_docs(path: Path, marker: str, lines: Sequence[str]) -> None:
    """Put ``lines`` between the markers of ``path``."""
    begin, end = f"<!-- {marker} -->\n", f"<!-- /{marker} -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{path}: no section between {begin.strip()} and {end}")
    path.write_text(before + begin + "\n".join(lines) + "\n" + end + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--parts", nargs="+", default=["study", "demo", "table"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--demo", type=Path, default=Path("runs/learning"), help="folder for the demo's embeddings")
    args = parser.parse_args()
    torch.set_num_threads(1)
    how = [
        f"{ROUNDS} rounds of one step, the mean of the last {AVERAGE_LAST:.0%} of models, {len(args.seeds)} seeds.",
        f"With noise: every site its own, delta {DELTA:g}, C = 1, learning rate by a public rule (the noise of a logit",
        f"is {NOISE_OF_A_LOGIT:g} in the end). Without: the best of three rates on the public validation set. Balanced",
        "accuracy by patient on the public test set, from chance (0) to 1, with the 95 % interval over seeds.",
        "“As they are” has no basis; its rates are the best of three in hindsight, with noise as well. It ends near or",
        "below zero-shot, so that its ratios say nothing.",
        "",
    ]
    for name, prefix, headline, run in (
        ("study", "learning", f"pca {DIMS}", lambda: study(args.seeds)),
        ("demo", "learning_demo", "centre", lambda: demo(args.seeds, args.demo)),
    ):
        if name in args.parts:
            began = time.perf_counter()
            found = run()
            title = {"study": "Learning at small epsilon: 10 sites of 500 patients, drawn embeddings"}.get(
                name, "Learning at small epsilon: the demo's hospitals with 1,000 patients each"
            )
            seconds = f"{time.perf_counter() - began:.0f} s on one core."
            write_section(title, [*how, *basis_table(found), seconds])
            record(entries(prefix, found[headline], headline))
            print(title, *basis_table(found), seconds, sep="\n")
    if "table" in args.parts:
        data = table(args.seeds)
        DATA.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        lines = cohort_table(data)
        into_docs(DOCS, "cohorts", lines)
        print(*lines, sep="\n")


if __name__ == "__main__":
    main()
