"""FLARE launchers that start a killed job process again. A site's or the server's own choice, in its resources.json.

FLARE 2.9 ends the whole job when one site's job process dies, whatever the quorum; it has no restart of its own. Here
a process that a signal killed (SIGKILL, out of memory) is launched again exactly as FLARE launched it, and takes its
place in the running job: the server hands out the same task again, and what was released before lies in the outbox.
"""

import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.job_launcher_spec import JobHandleSpec, JobReturnCode
from nvflare.app_common.job_launcher.client_process_launcher import ClientProcessJobLauncher
from nvflare.app_common.job_launcher.process_launcher import ProcessHandle, ProcessJobLauncher
from nvflare.app_common.job_launcher.server_process_launcher import ServerProcessJobLauncher
from nvflare.fuel.utils.log_utils import get_obj_logger
from nvflare.security.logging import SECURE_LOGGING_VAR_NAME

from clinifed.errors import ConfigError

__all__ = ["RestartingClientLauncher", "RestartingHandle", "RestartingServerLauncher"]

_PAUSE_S = 1.0  # before the first restart; doubled each time, since memory that ran out once is still short
_UNKNOWN_END = -1  # FLARE's answer for a process that somebody else reaped; no signal that anybody sends


class RestartingHandle(JobHandleSpec):
    """One job's process over its restarts; to FLARE it is one process that takes longer.

    Args:
        start: launches the process, the same each time.
        restarts: so many at most.
        job: named in the log.
        exhausted: the return code once the process was killed and cannot be started again.
        pause_s: before the first restart, in seconds.

    Guarantees:
        - Only a signal leads to a restart; a normal end, an error of Python and an abort are as FLARE has them.
        - After :meth:`terminate` no process of the job runs, and none is started, also in the middle of a restart.
        - :meth:`wait` returns when the job's last process has ended; until then :meth:`poll` says UNKNOWN.
    """

    def __init__(
        self,
        start: Callable[[], ProcessHandle],
        restarts: int,
        job: str,
        exhausted: int,
        pause_s: float = _PAUSE_S,
    ) -> None:
        super().__init__()
        self.logger = get_obj_logger(self)
        self._start, self._left, self._job, self._exhausted, self._pause_s = start, restarts, job, exhausted, pause_s
        self._lock = threading.Lock()  # held to start, to terminate and to declare the end
        self._terminated, self._ended = threading.Event(), threading.Event()
        self._code = int(JobReturnCode.UNKNOWN)
        self._process = start()  # an error here is the launch's, and FLARE's to handle
        # Nobody else may reap the process: two who wait for one process cannot both learn how it ended.
        threading.Thread(target=self._supervise, name=f"supervise-{job}", daemon=True).start()

    def _supervise(self) -> None:
        """Wait, restart, wait; whatever happens in here, :meth:`wait` returns in the end."""
        try:
            while self._killed() and self._restarted():
                pass
        except Exception as error:  # a restart that failed: no process runs any more
            self.logger.error(f"job {self._job}: its process could not be started again: {type(error).__name__}")
            self._code = self._exhausted
        finally:
            self._ended.set()

    def _killed(self) -> bool:
        """Wait for the process; whether a signal killed it that was not ours."""
        self._process.wait()
        raw = self._process.adapter.poll()
        with self._lock:
            self._code = self._process.poll()
            if self._terminated.is_set() or raw is None or raw >= 0 or raw == _UNKNOWN_END:
                return False
            if self._left > 0:
                return True
            self.logger.error(f"job {self._job}: its process was killed by {_name(raw)}, and no restart is left")
            self._code = self._exhausted
            return False

    def _restarted(self) -> bool:
        """Pause, then start the process again; False when the job was terminated meanwhile."""
        self.logger.warning(
            f"job {self._job}: its process was killed by {_name(self._process.adapter.poll())}; "
            f"it is started again in {self._pause_s:g} s, {self._left - 1} restarts are left after that"
        )
        self._terminated.wait(self._pause_s)
        with self._lock:
            if self._terminated.is_set():
                return False
            self._left -= 1
            self._pause_s *= 2
            self._process = self._start()
            return True

    def terminate(self) -> None:
        """End the job's process and its children, and start none again."""
        with self._lock:
            self._terminated.set()
            if not self._ended.is_set():  # an ended process' number may belong to somebody else
                self._process.terminate()

    def poll(self) -> int:
        """UNKNOWN while the job runs or restarts, then FLARE's return code of its last process."""
        return self._code if self._ended.is_set() else int(JobReturnCode.UNKNOWN)

    def wait(self) -> None:
        """Return when the job's last process has ended."""
        self._ended.wait()


def _name(raw: int) -> str:
    try:
        return signal.Signals(-raw).name
    except ValueError:  # a real-time signal
        return f"signal {-raw}"


def _checked(restarts: int) -> int:
    if isinstance(restarts, bool) or not isinstance(restarts, int) or restarts < 0:
        raise ConfigError(
            f"resources.json:components.process_launcher.args.restarts: {restarts!r}; give a whole number from 0"
        )
    return restarts


def _secure_logging() -> None:
    """FLARE logs no texts of exceptions, which may quote data, here and in all processes started from here."""
    os.environ[SECURE_LOGGING_VAR_NAME] = "true"


class _Restarting(ProcessJobLauncher):
    """What both launchers do: launch as FLARE does, under a :class:`RestartingHandle`."""

    exhausted: JobReturnCode  # of a job whose process was killed when no restart was left

    def __init__(self, restarts: int = 5) -> None:
        super().__init__()
        self.restarts = _checked(restarts)
        _secure_logging()

    def launch_job(self, job_meta: dict[str, Any], fl_ctx: FLContext) -> RestartingHandle:
        """FLARE's own launch of this job, which can be made again and again.

        FLARE uses its context on for other things after the launch, so what the launch reads is kept in one of ours.
        """
        kept = FLContext()
        for key in (FLContextKey.WORKSPACE_OBJECT, FLContextKey.JOB_PROCESS_ARGS):
            kept.set_prop(key, fl_ctx.get_prop(key), private=True, sticky=False)
        start = partial(super().launch_job, dict(job_meta), kept)
        return RestartingHandle(start, self.restarts, str(job_meta.get(JobMetaKey.JOB_ID.value)), int(self.exhausted))


class RestartingClientLauncher(_Restarting, ClientProcessJobLauncher):
    """Launches a site's job processes, and again when one is killed. Sets FLARE's secure logging.

    Args:
        restarts: of one job's process, at most.

    Guarantees:
        - When no restart is left, only this site drops out; the job goes on with those that remain.

    Raises:
        ConfigError: ``restarts`` is no whole number from 0.
    """

    # FLARE reports the codes of failures to the server, which then fails the job for all sites; it has no name for
    # this code, and does not.
    exhausted = JobReturnCode.UNKNOWN


class RestartingServerLauncher(_Restarting, ServerProcessJobLauncher):
    """Launches the server's job processes, and again when one is killed. Sets FLARE's secure logging.

    Args:
        restarts: of one job's process, at most.

    Guarantees:
        - When no restart is left, the job ends as failed.

    Raises:
        ConfigError: ``restarts`` is no whole number from 0.
    """

    exhausted = JobReturnCode.EXECUTION_ERROR
