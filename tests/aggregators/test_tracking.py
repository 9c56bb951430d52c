"""What operators see: events in order, figures as numbers, and a full disk costs lines and no run."""

import json
from types import SimpleNamespace

import pytest
from nvflare.apis.analytix import AnalyticsDataType
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.utils.analytix_utils import create_analytic_dxo

from clinifed.aggregators.run_state import SERVER_FOLDER
from clinifed.aggregators.tracking import FIGURES_FILE, EventLog, FiguresReceiver
from clinifed.files import read_lines


def test_an_event_is_one_line_with_its_time(tmp_path):
    told = EventLog(tmp_path / "events.jsonl")
    told("round_opened", round=0, sites=["alder"])
    told("refused", site="alder", reason="not\nfinite")
    first, second = read_lines(told.path)
    assert {k: v for k, v in first.items() if k != "time"} == {"event": "round_opened", "round": 0, "sites": ["alder"]}
    assert second["reason"] == "not\nfinite"
    assert first["time"] <= second["time"]
    assert len(told.path.read_text().splitlines()) == 2


def test_a_full_disk_loses_lines_and_not_the_run(tmp_path):
    told = EventLog(tmp_path / "absent" / "events.jsonl")
    for _ in range(3):
        told("round_opened")
    assert told.lost == 3
    told.path.parent.mkdir()
    told("round_closed")
    assert [e["event"] for e in read_lines(told.path)] == ["round_closed"]
    assert told.lost == 3


def test_the_log_is_its_owners(tmp_path):
    told = EventLog(tmp_path / "events.jsonl")
    told("job_started")
    assert told.path.stat().st_mode & 0o077 == 0


@pytest.fixture
def context(tmp_path) -> FLContext:
    made = FLContext()
    workspace = SimpleNamespace(get_run_dir=lambda job: str(tmp_path / job))
    made.set_prop(ReservedKey.ENGINE, SimpleNamespace(get_workspace=lambda: workspace), private=True)
    made.set_prop(ReservedKey.RUN_NUM, "job")
    return made


def test_figures_lie_beside_the_jobs_records_as_they_were_sent(tmp_path, context):
    receiver = FiguresReceiver()
    figure = create_analytic_dxo("global_norm", 0.1, AnalyticsDataType.SCALAR, global_step=3).to_shareable()
    receiver.save(context, figure, "server")  # before the start of the job: there is no place for it
    receiver.initialize(context)
    receiver.save(context, figure, "server")
    receiver.finalize(context)
    path = tmp_path / "job" / SERVER_FOLDER / FIGURES_FILE
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"round": 3, "tag": "global_norm", "value": 0.1}
    ]
