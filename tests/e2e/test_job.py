"""The exported FLARE job: no code in it, and it runs as people run jobs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clinifed.files import read_lines

from .conftest import CONFIGS

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def exported(clinifed, tmp_path_factory):
    home = tmp_path_factory.mktemp("job")
    done = clinifed(
        "job", CONFIGS / "smoke.yaml", "--out", home / "jobs", "--workspace", home / "ws", "--set", "rounds=1"
    )
    assert done.code == 0, done.err
    return home


def test_an_exported_job_holds_no_code(exported):
    files = [p.relative_to(exported / "jobs") for p in (exported / "jobs").rglob("*") if p.is_file()]
    assert files
    assert {p.suffix for p in files} == {".json"}
    assert not [p for p in (exported / "jobs").rglob("custom")]
    assert "byoc" not in (exported / "jobs" / "smoke" / "meta.json").read_text()


def test_an_existing_job_is_not_overwritten(exported, clinifed):
    done = clinifed("job", CONFIGS / "smoke.yaml", "--out", exported / "jobs")
    assert done.code == 2
    assert "exists" in done.err


def test_the_exported_job_runs_by_typing_nvflare_simulator(exported):
    """Deprecated in FLARE 2.9, still what many people type; the allow-list is in WORKSPACE/local."""
    tools = Path(sys.executable).parent
    sites = "alder,birch,cedar"
    done = subprocess.run(
        [tools / "nvflare", "simulator", exported / "jobs" / "smoke", "-w", exported / "ws", "-c", sites, "-t", "3"],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=exported,
        env={**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"},
    )
    found = list((exported / "ws").glob("**/rounds.jsonl"))
    assert found, done.stdout[-3000:] + done.stderr[-2000:]
    assert read_lines(found[0])[0]["accepted"] == ["alder", "birch", "cedar"]
