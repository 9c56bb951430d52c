"""Real images of natural sites: a small version of ``real_sites.yaml``, where the folder beside the checkout exists."""

from pathlib import Path

import pytest

from .conftest import CONFIGS

pytestmark = [pytest.mark.e2e, pytest.mark.realdata]
FOLDER = Path(__file__).parents[3] / "shared/data/open/fed"


@pytest.mark.skipif(not FOLDER.is_dir(), reason="no folder of real images beside the checkout")
def test_real_sites_train_together_on_real_files(clinifed, tmp_path):
    out = tmp_path / "run"
    done = clinifed(
        "simulate",
        CONFIGS / "real_sites.yaml",
        "--out",
        out,
        "--json",
        "--set",
        "rounds=1",
        "--set",
        f"data.root={FOLDER}",
    )
    assert done.code == 0, done.err
    summary = done.json()
    assert len(summary["sites"]) >= 6
    assert len({s for site in summary["sites"].values() for s in site["specialties"]}) == 3
    assert all(r["accepted"] for site in summary["sites"].values() for r in site["rounds"])
    assert all(entry["federated"]["patients"] >= 20 for entry in summary["metrics"].values())
