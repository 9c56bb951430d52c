"""A killed job process is started again; every other end is as FLARE has it. With real processes."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_launcher_spec import JobProcessArgs, JobReturnCode
from nvflare.apis.workspace import Workspace
from nvflare.app_common.job_launcher.process_launcher import ProcessHandle
from nvflare.private.fed.client.client_executor import REPORTABLE_JOB_FAILURES
from nvflare.security.logging import is_secure
from nvflare.utils.process_utils import spawn_process

from clinifed.errors import ConfigError
from clinifed.jobs.launchers import RestartingClientLauncher, RestartingHandle, RestartingServerLauncher

EXHAUSTED = 55
LAUNCHERS = [RestartingClientLauncher, RestartingServerLauncher]
FOREVER = "import time; time.sleep(600)"


def until(condition: Callable[[], Any], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def waited(handle: RestartingHandle, timeout_s: float = 20) -> int:
    until(lambda: handle._ended.is_set(), timeout_s)
    handle.wait()
    return handle.poll()


class Job:
    """Starts ``code`` in real processes, as FLARE does, and remembers them."""

    def __init__(self, *codes: str) -> None:
        self.codes, self.pids = codes, list[int]()

    def __call__(self) -> ProcessHandle:
        code = self.codes[min(len(self.pids), len(self.codes) - 1)]
        handle = ProcessHandle(process_adapter=spawn_process([sys.executable, "-c", code], dict(os.environ)))
        self.pids.append(handle.adapter.pid)
        return handle

    def alive(self) -> list[int]:
        return [pid for pid in self.pids if psutil.pid_exists(pid)]


@pytest.fixture(autouse=True)
def no_process_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NVFLARE_SECURE_LOGGING", "no")  # the launchers set it; put back afterwards
    before = psutil.Process().children(recursive=True)  # of other tests: the readers of files
    yield
    left = [child for child in psutil.Process().children(recursive=True) if child not in before]
    for process in left:
        process.kill()
    assert not left


@pytest.fixture
def run() -> Iterator[Callable[..., tuple[Job, RestartingHandle]]]:
    handles: list[RestartingHandle] = []

    def make(*codes: str, restarts: int = 2, pause_s: float = 0.05) -> tuple[Job, RestartingHandle]:
        job = Job(*codes)
        handles.append(RestartingHandle(job, restarts, "j1", EXHAUSTED, pause_s))
        return job, handles[-1]

    yield make
    for handle in handles:
        handle.terminate()
        waited(handle)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_killed_process_is_started_again_and_the_job_ends_well(run: Any, number: signal.Signals) -> None:
    job, handle = run(FOREVER, "pass")
    assert handle.poll() == JobReturnCode.UNKNOWN
    os.kill(job.pids[0], number)
    assert waited(handle) == JobReturnCode.SUCCESS
    assert len(job.pids) == 2


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("pass", JobReturnCode.SUCCESS),
        ("raise SystemExit(1)", JobReturnCode.EXECUTION_ERROR),
        ("raise SystemExit(9)", JobReturnCode.ABORTED),
        ("raise SystemExit(255)", JobReturnCode.EXECUTION_ERROR),
    ],
)
def test_an_end_without_a_signal_is_as_flare_has_it(run: Any, code: str, outcome: int) -> None:
    job, handle = run(code)
    assert waited(handle) == outcome
    assert len(job.pids) == 1


def test_restarts_are_counted_and_end_with_the_code_for_it(run: Any) -> None:
    job, handle = run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", restarts=3)
    assert waited(handle) == EXHAUSTED
    assert len(job.pids) == 4


def test_the_pause_doubles(run: Any) -> None:
    started = time.monotonic()
    _, handle = run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", restarts=3, pause_s=0.2)
    waited(handle)
    assert time.monotonic() - started >= 0.2 + 0.4 + 0.8


def test_after_terminate_nothing_is_started(run: Any) -> None:
    job, handle = run(FOREVER)
    handle.terminate()
    assert waited(handle) == JobReturnCode.EXECUTION_ERROR  # FLARE's own answer to its own SIGKILL
    assert len(job.pids) == 1
    assert not job.alive()


def test_terminate_ends_the_children_of_the_process(run: Any, tmp_path: Path) -> None:
    note = tmp_path / "child"
    _, handle = run(
        "import pathlib, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {FOREVER!r}])\n"
        f"pathlib.Path({str(note)!r}).write_text(str(child.pid))\n"
        "child.wait()"
    )
    until(lambda: note.exists() and note.read_text())
    handle.terminate()
    waited(handle)
    child = int(note.read_text())
    until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)


def test_terminate_in_the_pause_ends_the_wait_and_starts_nothing(run: Any) -> None:
    job, handle = run(FOREVER, pause_s=600)
    os.kill(job.pids[0], signal.SIGKILL)
    until(lambda: not psutil.pid_exists(job.pids[0]))
    time.sleep(0.1)  # in the pause
    assert handle.poll() == JobReturnCode.UNKNOWN
    handle.terminate()
    assert waited(handle, 5) == JobReturnCode.EXECUTION_ERROR
    assert len(job.pids) == 1


def test_terminate_just_at_a_restart_leaves_no_process(run: Any) -> None:
    for delay in (0.0, 0.04, 0.05, 0.06, 0.1):  # around the pause of 0.05 s
        job, handle = run(FOREVER, pause_s=0.05)
        os.kill(job.pids[0], signal.SIGKILL)
        time.sleep(delay)
        handle.terminate()
        waited(handle, 5)
        assert not job.alive()


def test_terminate_after_the_end_does_nothing(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, handle = run("pass")
    waited(handle)
    monkeypatch.setattr(os, "killpg", lambda *_: pytest.fail("killed a number that may belong to somebody else"))
    handle.terminate()
    assert waited(handle) == JobReturnCode.SUCCESS


def test_a_restart_that_fails_ends_the_wait(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job, handle = run(FOREVER)

    def broken() -> ProcessHandle:
        raise OSError("no more processes")

    monkeypatch.setattr(handle, "_start", broken)
    os.kill(job.pids[0], signal.SIGKILL)
    assert waited(handle) == EXHAUSTED


def test_a_process_reaped_by_somebody_else_is_not_started_again() -> None:
    """FLARE's adapter then answers -1, which is no signal: how the process ended is not known."""
    started = []

    def start() -> Any:
        started.append(1)
        adapter = SimpleNamespace(poll=lambda: -1)
        return SimpleNamespace(wait=lambda: None, adapter=adapter, poll=lambda: JobReturnCode.EXECUTION_ERROR)

    assert waited(RestartingHandle(start, 2, "j1", EXHAUSTED, 0.05)) == JobReturnCode.EXECUTION_ERROR
    assert len(started) == 1


@pytest.fixture
def launch(tmp_path: Path) -> Callable[[Any], tuple[RestartingHandle, Path]]:
    """Launches through FLARE's own launch, a module in the place of FLARE's job process, which notes what it got."""
    notes = tmp_path / "notes"
    module = tmp_path / "j1" / "app_site-1" / "custom" / "jobprocess.py"  # where FLARE puts the code of a job
    module.parent.mkdir(parents=True)
    module.write_text(
        "import json, os, pathlib, sys, time\n"
        f"folder = pathlib.Path({str(notes)!r}); folder.mkdir(exist_ok=True)\n"
        "keys = ('NVFLARE_JOB_AUTH_TOKEN', 'NVFLARE_JOB_SSID', 'NVFLARE_SECURE_LOGGING')\n"
        "told = json.dumps({'argv': sys.argv[1:], 'env': {k: os.environ.get(k) for k in keys}})\n"
        "(folder / 'part').write_text(told); (folder / 'part').rename(folder / str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    (tmp_path / "startup").mkdir()
    (tmp_path / "local").mkdir()

    def make(launcher: Any) -> tuple[RestartingHandle, Path]:
        context = FLContext()
        args = {
            JobProcessArgs.EXE_MODULE: ("-m", "jobprocess"),
            JobProcessArgs.JOB_ID: ("-n", "j1"),
            JobProcessArgs.AUTH_TOKEN: ("-t", "token-1"),
            JobProcessArgs.SSID: ("-d", "ssid-1"),
        }
        context.set_prop(FLContextKey.JOB_PROCESS_ARGS, args, private=True, sticky=False)
        context.set_prop(FLContextKey.WORKSPACE_OBJECT, Workspace(str(tmp_path), "site-1"), private=True, sticky=False)
        handle = launcher.launch_job({"job_id": "j1"}, context)
        # FLARE uses its context on.
        context.set_prop(FLContextKey.JOB_PROCESS_ARGS, {}, private=True, sticky=False)
        return handle, notes

    return make


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_job_is_started_again_with_the_same_arguments_and_credentials(launcher: Any, launch: Any) -> None:
    handle, notes = launch(launcher(restarts=1))
    until(lambda: notes.is_dir() and list(notes.glob("[0-9]*")))
    (first,) = notes.glob("[0-9]*")
    os.kill(int(first.name), signal.SIGKILL)
    until(lambda: len(list(notes.glob("[0-9]*"))) == 2)
    handle.terminate()
    handle.wait()
    told = {note.read_text() for note in notes.glob("[0-9]*")}
    assert len(told) == 1
    assert '"-n", "j1"' in (text := told.pop())
    assert "token-1" in text
    assert "ssid-1" in text


@pytest.mark.parametrize(
    ("launcher", "reportable"), [(RestartingClientLauncher, False), (RestartingServerLauncher, True)]
)
def test_without_restarts_left_a_site_drops_out_and_a_server_job_fails(
    launcher: Any, reportable: bool, launch: Any
) -> None:
    handle, notes = launch(launcher(restarts=0))
    until(lambda: notes.is_dir() and list(notes.glob("[0-9]*")))
    os.kill(int(next(notes.glob("[0-9]*")).name), signal.SIGKILL)
    code = waited(handle)
    assert code not in REPORTABLE_JOB_FAILURES
    # FLARE makes its own, reportable EXCEPTION of EXECUTION_ERROR; on the server it is the job's failure.
    assert (code == JobReturnCode.EXECUTION_ERROR) == reportable


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_job_processes_and_their_parent_log_securely(launcher: Any, launch: Any) -> None:
    assert not is_secure()
    handle, notes = launch(launcher())
    assert is_secure()
    until(lambda: notes.is_dir() and list(notes.glob("[0-9]*")))
    handle.terminate()
    handle.wait()
    assert '"NVFLARE_SECURE_LOGGING": "true"' in next(notes.glob("[0-9]*")).read_text()


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("restarts", [-1, 1.5, "5", True, None])
def test_a_wrong_number_of_restarts_is_refused(launcher: Any, restarts: Any) -> None:
    with pytest.raises(ConfigError, match=r"restarts: .*whole number"):
        launcher(restarts=restarts)
