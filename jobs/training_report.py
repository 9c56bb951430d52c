"""The tables that ``clinifed finetune`` and ``clinifed personalise`` end with."""

from typing import Any

from rich.table import Table

__all__ = ["finetune_table", "personalise_tables"]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def finetune_table(report: dict[str, Any]) -> Table:
    """Per specialty: zero-shot, the start, and what was kept, on the public test set."""
    claim = report["privacy"]
    cost = "privacy off" if claim["epsilon"] is None else f"epsilon {claim['epsilon']:.4f}, delta {claim['delta']:g}"
    title = (
        f"{report['site']}: epoch {report['epoch']} of {report['epochs_done']}, by validation {report['validation']}\n"
        f"{cost} per patient; balanced accuracy on the public test set"
    )
    table = Table("specialty", "patients", "zero-shot", "start", "fine-tuned", title=title)
    metrics = (report["evaluation"] or {"metrics": {}})["metrics"]
    for name, entry in metrics.items():
        figures = [_percent(entry[key]["balanced_accuracy"]) for key in ("zero_shot", "start", "fine_tuned")]
        table.add_row(name, str(entry["fine_tuned"]["patients"]), *figures)
    return table


def personalise_tables(report: dict[str, Any]) -> list[Table | str]:
    """Per specialty: every candidate on the site's own held-out patients, and what was chosen."""
    tables: list[Table | str] = []
    for name, choice in report["specialties"].items():
        table = Table("head", "balanced accuracy", "against global", title=f"{name}: {choice['chosen']}")
        for candidate, entry in choice["candidates"].items():
            gain = entry["difference"]
            shown = "" if gain is None else "no interval"
            if gain is not None and gain["low"] is not None:
                shown = f"{100 * gain['difference']:+.1f} ({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})"
            mark = " *" if candidate == choice["chosen"] else ""
            table.add_row(candidate + mark, _percent(entry["balanced_accuracy"]), shown)
        tables += [table, f"{name}: {choice['reason']}"]
    return [*tables, "Figures and heads are this hospital's own: they stay at the site."]
