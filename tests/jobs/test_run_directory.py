"""A run directory: taken once, and never left without a word on how the run ended."""

import json
import time

import jsonschema
import pytest

from clinifed.errors import ConfigError, FederationError
from clinifed.jobs.finish import summary_schema
from clinifed.jobs.run_directory import run_directory, take


@pytest.mark.parametrize("name", ["summary.json", "run.json", "checkpoint", "flare", "sites"])
def test_a_directory_with_an_earlier_run_is_refused_and_left_as_it_is(tmp_path, name):
    (tmp_path / name).write_text("earlier")
    with pytest.raises(ConfigError, match=rf"--out .*holds {name} of an earlier run; choose another"):
        take(tmp_path)
    assert (tmp_path / name).read_text() == "earlier"


def test_an_empty_one_or_none_is_taken(tmp_path):
    take(tmp_path / "a" / "b")
    take(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


ENDS = {
    "failed": FederationError("two sites are away", "and a third"),
    "interrupted": KeyboardInterrupt(),
    "unexpected": RuntimeError("could not read /data/MILLER^ANNA.dcm"),
}


@pytest.mark.parametrize("end", ENDS)
def test_whatever_ends_a_run_early_stands_in_its_summary(tmp_path, end):
    with pytest.raises(type(ENDS[end])), run_directory(tmp_path, "unit"):
        raise ENDS[end]
    summary = json.loads((tmp_path / "summary.json").read_text())
    jsonschema.validate(summary, summary_schema())
    assert summary["status"] == ("interrupted" if end == "interrupted" else "failed")
    assert summary["checkpoint"] is None
    said = {"failed": ["two sites are away", "and a third"], "interrupted": ["KeyboardInterrupt"]}
    assert summary["error"] == said.get(end, ["RuntimeError"]), "the text of a foreign error may quote data"


def test_a_run_that_ends_well_writes_its_own_summary(tmp_path):
    with run_directory(tmp_path, "unit") as started:
        assert 0 <= time.monotonic() - started < 5
    assert list(tmp_path.iterdir()) == []
