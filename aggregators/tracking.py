"""What operators see of a run: an event log in JSON lines, and per-round figures through FLARE's own tracking."""

import time
from pathlib import Path
from typing import Any

from nvflare.apis.analytix import AnalyticsData, AnalyticsDataType
from nvflare.apis.dxo import from_shareable
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.utils.analytix_utils import create_analytic_dxo, send_analytic_dxo
from nvflare.app_common.widgets.streaming import AnalyticsReceiver

from clinifed.aggregators.run_state import SERVER_FOLDER
from clinifed.files import append_line

__all__ = ["EVENTS_FILE", "FIGURES_FILE", "EventLog", "FiguresReceiver", "track"]

EVENTS_FILE = "events.jsonl"
FIGURES_FILE = "figures.jsonl"


class EventLog:
    """One JSON line for each thing that happened: ``time`` (seconds since 1970), ``event``, and what belongs to it.

    Sites appear by their names, never anything of their data. A full disk loses lines here, not the run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost = 0  # lines that could not be written

    def __call__(self, event: str, **what: Any) -> None:
        """Append one event."""
        try:
            append_line(self.path, {"time": round(time.time(), 3), "event": event, **what})
        except OSError:
            self.lost += 1


def track(component: FLComponent, figures: dict[str, float], round_number: int, fl_ctx: FLContext) -> None:
    """Hand ``figures`` (tag → value) of one round to every FLARE analytics receiver of the server."""
    for tag, value in figures.items():
        dxo = create_analytic_dxo(tag, float(value), AnalyticsDataType.SCALAR, global_step=round_number)
        send_analytic_dxo(component, dxo, fl_ctx)


class FiguresReceiver(AnalyticsReceiver):
    """Writes per-round figures as JSON lines beside the job's records. TensorBoard or MLflow receivers may join it."""

    def __init__(self) -> None:
        super().__init__()
        self._path: Path | None = None

    def initialize(self, fl_ctx: FLContext) -> None:
        """Find the job's folder."""
        folder = Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id())) / SERVER_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / FIGURES_FILE

    def save(self, fl_ctx: FLContext, shareable: Shareable, record_origin: str) -> None:
        """Append one figure."""
        data = AnalyticsData.from_dxo(from_shareable(shareable))
        if self._path is not None and data is not None:
            append_line(self._path, {"round": data.step, "tag": data.tag, "value": data.value})

    def finalize(self, fl_ctx: FLContext) -> None:
        """Nothing is held open."""
