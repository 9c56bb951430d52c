"""The short table a run ends with."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from clinifed.export.speed import BATCHES, Measured
from clinifed.jobs.report_comparison import comparison_tables

__all__ = ["DISCLAIMER", "export_table", "ledger_tables", "privacy_table", "speed_table", "summary_tables"]

DISCLAIMER = (
    "Figures are as they came out, on patients on whom nothing was decided: no column is promised to win. "
    "Synthetic phantoms prove the machinery, not medicine."
)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def summary_tables(summary: dict[str, Any]) -> list[Any]:
    """What a run ends with: what the model is worth beside what else could be done, and what it cost in privacy."""
    rows = summary.get("comparison", [])
    candidate = next((key for key in ("federated_dp", "federated_no_dp") if rows and key in rows[0]["models"]), "")
    return [*comparison_tables(rows, candidate), privacy_table(summary)]


def privacy_table(summary: dict[str, Any]) -> Table:
    """Per hospital: epsilon spent of its budget, with unit and relation."""
    claims = [site["privacy"] for site in summary["sites"].values()]
    first = next((claim for claim in claims if claim is not None), None)
    title = "privacy"
    if first is not None and first["accountant"] is not None:
        accountant = f"{first['accountant']['name']}, {first['accountant']['version']}"
        title = (
            f"privacy per {first['unit']} ({first['relation'].replace('_', '/')}, delta {first['delta']:g}), by each "
            f"hospital's own ledger\n{accountant}; {first['trust_model']}"
        )
    table = Table(title=title)
    for column in ("hospital", "specialties", "N₀", "epsilon", "budget", "rounds", "ledger head"):
        table.add_column(column, overflow="fold")
    for (name, site), claim in zip(summary["sites"].items(), claims, strict=True):
        if claim is None:  # none of its updates was ever taken, and its ledger is not here
            table.add_row(name, ", ".join(site["specialties"]), "–", "–", "–", f"0 of {len(site['rounds'])}", "–")
            continue
        spent = "off" if claim["epsilon"] is None else f"{claim['epsilon']:.4f}"
        budget = "–" if claim["budget_epsilon"] is None else f"{claim['budget_epsilon']:g}"
        counted = sum(r["accepted"] for r in site["rounds"])
        rounds, head = f"{counted} of {len(site['rounds'])}", claim["ledger_head"] or "–"
        nominal = str(claim["nominal_patients"])
        table.add_row(name, ", ".join(site["specialties"]), nominal, spent, budget, rounds, head[:16])
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


def speed_table(found: Sequence[Measured]) -> Table:
    """Per backend: latency, throughput and memory on this machine; what could not be measured with its reason."""
    table = Table(title="speed")
    for column in ("backend", "model", "batch 1", "p95", *(f"{n} images/s" for n in BATCHES[1:]), "peak", "faster"):
        table.add_column(column, justify="left" if column in ("backend", "model") else "right")
    for m in found:
        if m.latency_s is None or m.latency_p95_s is None or m.images_per_s is None or m.peak_rss_mb is None:
            table.add_row(m.backend, m.name, m.reason)
            continue
        rates = [f"{m.images_per_s[str(n)]:.1f}" for n in BATCHES[1:]]
        times = [f"{1e3 * t:.1f} ms" for t in (m.latency_s, m.latency_p95_s)]
        table.add_row(m.backend, m.name, *times, *rates, f"{m.peak_rss_mb:.0f} MB", f"{m.ratio:.2f} ×")
    return table


def ledger_tables(report: dict[str, Any]) -> list[Any]:
    """What a ledger says: the sum with all that belongs to it, and each job's part."""
    accountant = f"{report['accountant']['name']}, {report['accountant']['version']}"
    lines = [
        f"site {report['site']}: epsilon {report['epsilon']:.6f} of {report['budget_epsilon']:g} spent per "
        f"{report['unit']} ({report['relation'].replace('_', '/')}, delta {report['delta']:g}; {accountant}; "
        f"{report['trust_model']})",
        f"{report['records']} records, format {report['format']}, head {report['ledger_head']}",
    ]
    if report["reserved_units"]:
        lines.append(f"reserved for jobs under way: epsilon {report['reserved_epsilon']:.6f} on its own")
    table = Table()
    for column in ("job", "epsilon alone", "charges", "released", "lost", "state", "contract"):
        table.add_column(column, overflow="fold")
    for job in report["jobs"]:
        state = "finished" if job["finished"] else "under way" if job["reserved_units"] else "ended"
        counts = [str(job[name]) for name in ("charges", "releases", "lost_charges")]
        table.add_row(job["job"], f"{job['epsilon']:.6f}", *counts, state, job["contract_sha256"][:16])
    return [*lines, table] if report["jobs"] else lines
