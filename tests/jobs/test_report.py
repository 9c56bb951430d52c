"""The tables a run ends with: every figure of the summary, and what is missing shown as missing."""

import pytest
from rich.console import Console

from clinifed.jobs.report import export_table, privacy_table, summary_tables

CLAIM = {
    "epsilon": 2.5,
    "delta": 1e-5,
    "unit": "patient",
    "relation": "add_remove",
    "budget_epsilon": 3.0,
    "nominal_patients": 120,
    "trust_model": "each site adds its own noise",
    "accountant": {"name": "gaussian-dp filter", "version": "clinifed 0"},
    "ledger_head": "ab" * 32,
}
SUMMARY = {
    "sites": {
        "alder": {"specialties": ["radiology"], "rounds": [{"accepted": True}, {"accepted": False}], "privacy": CLAIM},
        "birch": {
            "specialties": ["radiology"],
            "rounds": [],
            "privacy": {**CLAIM, "epsilon": None, "budget_epsilon": None, "ledger_head": None},
        },
    },
    "comparison": [],
}
PARITY = {"cosine_mean": None, "top1_agreement": 0.5}
EXPORT = {
    "precisions": [
        {"precision": "int8", "onnx_bytes": 2_000_000, "engine_bytes": {}, "packed": False, "parity": PARITY,
         "failures": ["cosine_mean is nan"]},
        {"precision": "fp32", "onnx_bytes": 4_000_000, "engine_bytes": {"tensorrt-rtx": 5_000_000}, "packed": True,
         "parity": {"cosine_mean": 1.0, "top1_agreement": 1.0}, "failures": []},
    ]
}  # fmt: skip


@pytest.mark.parametrize(
    ("table", "texts"),
    [
        (summary_tables(SUMMARY)[-1], ["alder", "birch"]),
        (
            privacy_table(SUMMARY),
            [
                "alder",
                "2.5000",
                "1 of 2",
                "off",
                "add/remove",
                "delta 1e-05",
                "120",
                "adds its own noise",
                "filter",
                "abab",
            ],
        ),
        (export_table(EXPORT), ["int8", "2.00 MB", "–", "cosine_mean is nan", "5.00 MB", "packed", "100.0 %"]),
    ],
    ids=["summary", "privacy", "export"],
)
def test_a_table_shows_every_figure_and_what_is_missing(table, texts) -> None:
    console = Console(width=160)
    with console.capture() as captured:
        console.print(table)
    shown = captured.get()
    assert [t for t in texts if t not in shown] == []
