"""Tables of what a model is worth: beside what else could be done, and how well images are re-linked."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from clinifed.jobs.comparison import MODELS, PUBLIC_TEST

__all__ = ["comparison_tables", "relinkage_tables"]

_QUESTION = "Did federation beat what a site can do alone?"
_ALONE = ("local_only", "local_only_dp")
_FIGURES = {
    "balanced_accuracy": "balanced accuracy",
    "corrected": "above chance",
    "auroc": "AUROC",
    "ece": "ECE",
}
_LEGEND = (
    "In percent, by patient, with 95 % intervals of a bootstrap over patients. Above chance: (b − 1/K)/(1 − 1/K) of "
    "balanced accuracy b. A number in brackets: the mean over so many sites' own models."
)
_GAIN = (
    "Gain: balanced accuracy of {name} less that model's, on the same draws of patients; beaten where its interval is "
    "above 0, not where it is below."
)


def _told(figure: Mapping[str, float | None]) -> str:
    """A figure and its interval in percent; a dash where there is none."""
    value, low, high = figure["value"], figure["low"], figure["high"]
    if value is None:
        return "–"
    if low is None or high is None:
        return f"{100 * value:.1f}"
    return f"{100 * value:.1f} ({100 * low:.0f}{'–' if low >= 0 else ' to '}{100 * high:.0f})"


def _verdict(gain: Mapping[str, float | None]) -> str:
    low, high = gain["low"], gain["high"]
    if low is None or high is None:
        return "–"
    return "yes" if low > 0 else "no" if high < 0 else "unclear"


def _line(table: Table, name: str, row: Mapping[str, Any], key: str) -> None:
    figures, gain = row["models"][key], row["gain"].get(key)
    judged = ("", "") if gain is None else (_told(gain["balanced_accuracy"]), _verdict(gain["balanced_accuracy"]))
    table.add_row(name, *(_told(figures[figure]) for figure in _FIGURES), *judged)


def comparison_tables(rows: Sequence[Mapping[str, Any]], candidate: str) -> list[Any]:
    """A table for each specialty and set of patients, every model in it, and what is suppressed.

    Args:
        rows: of a summary or of a report, as :func:`clinifed.jobs.comparison.compare` makes them.
        candidate: the model that the others are held against, a key of :data:`clinifed.jobs.comparison.MODELS`.
    """
    by_site = [row for row in rows if row["patients_of"] == PUBLIC_TEST and row["site"] is not None]
    shown: list[Any] = []
    for row in rows:
        if row in by_site:
            continue
        whose = "" if row["patients_of"] == PUBLIC_TEST else f" of {row['site'] or 'all sites'}"
        few = f"fewer than {row['minimum']}"
        support = ", ".join(f"{name} {few if count is None else count}" for name, count in row["support"].items())
        table = Table(
            title=f"{row['specialty']}, {row['patients_of']}{whose}: {row['patients']} patients ({support}), "
            f"chance {100 * row['chance']:.1f} %",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        table.add_column("model", no_wrap=True)
        for column in (*_FIGURES.values(), "gain", "beaten?"):
            table.add_column(column, justify="right")
        mine = [other for other in by_site if other["specialty"] == row["specialty"]] if not whose else []
        for key in row["models"]:
            alone = [other for other in mine if key in _ALONE and key in other["models"]]
            _line(table, MODELS[key] + (f" ({len(alone)})" if alone else ""), row, key)
            for other in alone:
                _line(table, f"  {other['site']}", other, key)
        shown.append(table)
        if row["suppressed"]:
            shown.append(
                f"suppressed: {', '.join(row['suppressed'])}: {few} patients have it, or have it not; with it "
                "all figures that are means over labels"
            )
    question = [] if all(key not in row["models"] for row in rows for key in _ALONE) else [_QUESTION]
    return [*question, *shown, _LEGEND, _GAIN.format(name=MODELS[candidate])] if shown else []


def relinkage_tables(relinkage: Mapping[str, Any] | None) -> list[Any]:
    """Recall@k of an image's own report, before and after training, beside guessing."""
    if relinkage is None:
        return ["re-linkage: not told, the test set has no captions"]
    table = Table(
        title=f"re-linkage: an image's own report among {relinkage['reports']} "
        f"({relinkage['different_texts']} different texts), {relinkage['images']} images of "
        f"{relinkage['patients']} patients, in percent",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for column in ("recall", "guessing", "base embedding", "trained embedding"):
        table.add_column(column, justify="left" if column == "recall" else "right")
    for rank in map(str, relinkage["ranks"]):
        base, trained = relinkage["base"][rank], relinkage["trained"]
        told = "the same" if trained is None else _told(trained[rank])
        table.add_row(f"@{rank}", f"{100 * base['chance']:.1f}", _told(base), told)
    return [table, *([relinkage["note"]] if relinkage["note"] else [])]
