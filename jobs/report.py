"""The short table a run ends with."""

from typing import Any

from rich.table import Table

__all__ = ["DISCLAIMER", "export_table", "metrics_table", "privacy_table"]

DISCLAIMER = (
    "Balanced accuracy by patient on the public test set, as it came out: no column is promised to win. "
    "Synthetic phantoms prove the machinery, not medicine."
)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def metrics_table(summary: dict[str, Any]) -> Table:
    """Per specialty: chance, zero-shot, local-only (with and without DP), federated."""
    table = Table(title="balanced accuracy")
    for column in ("specialty", "chance", "zero-shot", "local only, DP", "local only, no DP", "federated"):
        table.add_column(column, justify="left" if column == "specialty" else "right")
    for name, entry in summary["metrics"].items():
        alone = [entry[k]["mean"]["balanced_accuracy"] if entry[k] else None for k in ("local_only_dp", "local_only")]
        values = [entry["chance"], entry["zero_shot"]["balanced_accuracy"], *alone]
        table.add_row(name, *map(_percent, values), _percent(entry["federated"]["balanced_accuracy"]))
    return table


def privacy_table(summary: dict[str, Any]) -> Table:
    """Per hospital: epsilon spent of its budget, with unit and relation."""
    claims = [site["privacy"] for site in summary["sites"].values()]
    delta = next((f", delta {c['delta']:g}" for c in claims if c["delta"] is not None), "")
    relation = claims[0]["relation"].replace("_", "/") if claims else ""
    table = Table(title=f"privacy per patient ({relation}{delta}), by each hospital's own ledger")
    for column in ("hospital", "specialties", "epsilon", "budget", "rounds"):
        table.add_column(column, overflow="fold")
    for (name, site), claim in zip(summary["sites"].items(), claims, strict=True):
        spent = "off" if claim["epsilon"] is None else f"{claim['epsilon']:.4f}"
        budget = "–" if claim["budget_epsilon"] is None else f"{claim['budget_epsilon']:g}"
        counted = sum(r["accepted"] for r in site["rounds"])
        table.add_row(name, ", ".join(site["specialties"]), spent, budget, f"{counted} of {len(site['rounds'])}")
    return table


def export_table(report: dict[str, Any]) -> Table:
    """Per precision: sizes, and parity with the FP32 model in torch."""
    table = Table(title="export")
    targets = sorted({t for row in report["precisions"] for t in row["engine_bytes"]})
    for column in ("precision", "ONNX", *(f"{t} engine" for t in targets), "cosine, mean", "same top-1", "verdict"):
        table.add_column(column, justify="left" if column == "precision" else "right")
    for row in report["precisions"]:
        sizes = [row["onnx_bytes"], *(row["engine_bytes"].get(t) for t in targets)]
        text = ["–" if s is None else f"{s / 1e6:.2f} MB" for s in sizes]
        parity, packed = row["parity"], row["packed"]
        cosine = "–" if parity["cosine_mean"] is None else f"{parity['cosine_mean']:.6f}"
        verdict = "packed" if packed else "; ".join(row["failures"])
        table.add_row(row["precision"], *text, cosine, _percent(parity["top1_agreement"]), verdict)
    return table
