"""Tables of what a model is worth: beside what else could be done, in full, and how well images are re-linked."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from clinifed.jobs.comparison import MODELS, PUBLIC_TEST

__all__ = ["comparison_tables", "relinkage_tables"]

_QUESTION = "did federation beat what a site can do alone?"
_FIGURES = ("auroc", "balanced_accuracy", "corrected", "ece")
_ALONE = ("local_only", "local_only_dp")


def _told(figure: Mapping[str, float | None], percent: bool = True, sign: bool = False) -> str:
    """A figure over its 95 % interval; a dash where there is none."""
    value, low, high = figure["value"], figure["low"], figure["high"]
    if value is None:
        return "–"
    scale, kind = (100, ".1f") if percent else (1, ".3f")
    kind = f"+{kind}" if sign else kind
    text = f"{scale * value:{kind}}" + (" %" if percent else "")
    return text if low is None or high is None else f"{text}\n{scale * low:{kind}} to {scale * high:{kind}}"


def _verdict(gain: Mapping[str, float | None]) -> str:
    low, high = gain["low"], gain["high"]
    if low is None or high is None:
        return "–"
    word = "yes" if low > 0 else "no" if high < 0 else "not told apart"
    return f"{word}\n{_told(gain, sign=True)}"


def _who(row: Mapping[str, Any]) -> str:
    """On whom, and by whose own model."""
    site = row["site"]
    if row["patients_of"] == PUBLIC_TEST:
        return PUBLIC_TEST if site is None else f"{PUBLIC_TEST}, {site} alone"
    return "held out, all sites" if site is None else f"held out, {site}"


def _support(row: Mapping[str, Any]) -> str:
    few = f"< {row['minimum']}"
    counts = "\n".join(f"{name} {few if count is None else count}" for name, count in row["support"].items())
    return f"{row['patients']} patients\n{counts}"


def comparison_tables(rows: Sequence[Mapping[str, Any]], candidate: str) -> list[Any]:
    """Balanced accuracy of every model, and all figures of ``candidate``; and a line on what is suppressed.

    Args:
        rows: of a summary or of a report, as :func:`clinifed.jobs.comparison.compare` makes them.
        candidate: a key of :data:`clinifed.jobs.comparison.MODELS`.
    """
    if not rows:
        return []
    models = [key for key in MODELS if any(key in row["models"] for row in rows)]
    asked = [key for key in _ALONE if key in models]
    beside = Table(title=(f"{_QUESTION}\n" if asked else "") + "balanced accuracy by patient, with its 95 % interval")
    for column in ("specialty", "judged on"):
        beside.add_column(column)
    for column in ("chance", *(MODELS[key] for key in models)):
        beside.add_column(column, justify="right")
    for key in asked:
        beside.add_column(f"beats {MODELS[key]}?", justify="right")
    full = Table(title=f"{MODELS[candidate]}: every figure, with its 95 % interval")
    for column in ("specialty", "judged on", "patients"):
        full.add_column(column)
    for column in ("AUROC", "balanced accuracy", "(b − chance)/(1 − chance)", "ECE"):
        full.add_column(column, justify="right")
    for row in rows:
        cells = [_told(row["models"][key]["balanced_accuracy"]) if key in row["models"] else "–" for key in models]
        verdicts = [_verdict(row["gain"][key]["balanced_accuracy"]) if key in row["gain"] else "–" for key in asked]
        head = (row["specialty"], _who(row))
        beside.add_row(*head, f"{100 * row['chance']:.1f} %", *cells, *verdicts)
        if row["site"] is None or row["patients_of"] != PUBLIC_TEST:  # a site's line there repeats the others'
            figures = row["models"][candidate]
            full.add_row(*head, _support(row), *(_told(figures[name], percent=False) for name in _FIGURES))
    hidden = sorted({(row["specialty"], label, row["minimum"]) for row in rows for label in row["suppressed"]})
    notes = [
        f"suppressed where fewer than {least} patients have it, or have it not: {name}, {label}"
        for name, label, least in hidden
    ]
    return [beside, full, *notes]


def relinkage_tables(relinkage: Mapping[str, Any] | None) -> list[Any]:
    """Recall@k of an image's own report, before and after training, beside guessing."""
    if relinkage is None:
        return ["re-linkage: not told, the test set has no captions"]
    table = Table(
        title=f"re-linkage: an image's own report among {relinkage['reports']}\n"
        f"({relinkage['different_texts']} different texts; {relinkage['images']} images of {relinkage['patients']} patients)"
    )
    for column in ("recall", "guessing", "base embedding", "trained embedding"):
        table.add_column(column, justify="left" if column == "recall" else "right")
    for rank in map(str, relinkage["ranks"]):
        base, trained = relinkage["base"][rank], relinkage["trained"]
        told = "the same" if trained is None else _told(trained[rank])
        table.add_row(f"@{rank}", f"{100 * base['chance']:.1f} %", _told(base), told)
    return [table, *([relinkage["note"]] if relinkage["note"] else [])]
