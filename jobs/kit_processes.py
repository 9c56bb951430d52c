"""The kits of one machine as real FLARE processes: started and stopped by their own scripts, found by their mark."""

import contextlib
import io
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import psutil

from clinifed.errors import ConfigError, FederationError
from clinifed.jobs.kit import Kit, read_kit
from clinifed.jobs.processes import end_processes, marked, marked_environment

__all__ = ["LocalKits", "clear_stale", "connected_sites", "coordinator_session", "free_ports"]

Part = Literal["parent", "job", "trainer", "daemon"]

_KIT = "CLINIFED_KIT"  # beside the mark: whose process it is
# What FLARE's daemon keeps in a kit. After a power cut the process ids are those of strangers, and the daemon would
# take them for its own: it then starts nothing.
_STALE = ("daemon_pid.fl", "pid.fl", "shutdown.fl", "restart.fl")
_STOP_S = 20.0  # FLARE's daemon looks every 5 s and waits 5 s more; measured 6 to 11 s
_PARTS: dict[Part, tuple[str, ...]] = {
    "parent": ("nvflare.private.fed.app.client.client_train", "nvflare.private.fed.app.server.server_train"),
    "job": ("nvflare.private.fed.app.client.worker_process", "nvflare.private.fed.app.server.runner_process"),
    "trainer": ("clinifed.executors.child",),
    "daemon": ("sub_start.sh",),
}


def free_ports(number: int) -> list[int]:
    """``number`` different TCP ports that nothing listens on at the moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def clear_stale(kit: Path) -> None:
    """Remove what a killed daemon left in ``kit``; only ever where no process of the kit lives."""
    for name in _STALE:
        (kit / name).unlink(missing_ok=True)
    shutil.rmtree(kit / "tmp", ignore_errors=True)


@contextlib.contextmanager
def coordinator_session(admin: Path, timeout_s: float) -> Iterator[Any]:
    """A FLARE admin session of the coordinator whose kit is ``admin``.

    Raises:
        FederationError: the server does not answer within ``timeout_s``, or refuses the coordinator.
    """
    from nvflare.fuel.flare_api.api_spec import AuthenticationError
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    kit = read_kit(admin)
    host, port = kit.address
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # FLARE prints that it connects
                session = new_secure_session(
                    kit.name, str(kit.path), timeout=min(10.0, timeout_s), auto_login_max_tries=1
                )
            break
        except AuthenticationError as error:
            raise FederationError(f"{admin}: the server at {host}:{port} refuses {kit.name}: {error}") from None
        except Exception as error:  # a server that is just coming up makes FLARE's client fail in many ways
            if time.monotonic() > deadline:
                raise FederationError(
                    f"{admin}: no answer of the server at {host}:{port} within {timeout_s:g} s "
                    f"({type(error).__name__}); is it started?"
                ) from None
            time.sleep(1.0)
    try:
        yield session
    finally:
        session.close()


def connected_sites(session: Any) -> dict[str, float]:
    """The sites that the server takes for alive, and when it last heard of each (seconds since 1970, its clock)."""
    return {client.name: float(client.last_connect_time) for client in session.get_connected_client_list()}


class LocalKits:
    """Startup kits of this machine as running FLARE processes.

    Args:
        kits: name → kit, as ``provision`` returns them.
        mark: every process carries it; nothing else may.
        logs: folder for what the processes say on their way up; FLARE's own logs are in the kits.
        environment: more variables for all of them.

    Guarantees:
        - Started kits need no terminal, and come up after everything was killed before.
        - Leaving the ``with`` block ends every process, whatever was raised.
        - Nothing is left in shared temporary folders.
    """

    def __init__(
        self, kits: Mapping[str, Path], mark: str, logs: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.kits: dict[str, Kit] = {name: read_kit(path) for name, path in kits.items()}
        self.mark, self.logs, self.environment = mark, logs, dict(environment or {})
        self._started: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.stop()
        else:
            self.kill()

    def _named(self, names: Iterable[str] | None, *roles: str) -> list[str]:
        """The kits meant: those of ``names``, or all of ``roles``."""
        chosen = list(self.kits if names is None else names)
        unknown = [f"{name!r} is none of the kits {', '.join(self.kits)}" for name in chosen if name not in self.kits]
        if unknown:
            raise ConfigError(*unknown)
        return [name for name in chosen if self.kits[name].role in roles]

    def _whose(self, name: str) -> dict[str, str]:
        return {_KIT: name}

    def processes(self, name: str, part: Part | None = None) -> list[psutil.Process]:
        """The living processes of a kit, or one part: its ``daemon``, FLARE's ``parent``, a ``job``, a ``trainer``."""
        found = marked(self.mark, self._whose(name))
        if part is None:
            return found
        chosen = []
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                line = process.cmdline()
                if any(word == wanted or word.endswith(f"/{wanted}") for word in line for wanted in _PARTS[part]):
                    chosen.append(process)
        return chosen

    def start(self, names: Iterable[str] | None = None) -> None:
        """Start the server and sites among ``names`` (all by default) that do not run; returns at once.

        Raises:
            ConfigError: a name is unknown.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        for name in self._named(names, "server", "site"):
            if self.processes(name):
                continue
            kit = self.kits[name]
            clear_stale(kit.path)
            self._started[name] = time.time()
            environment = marked_environment(self.mark, None, **self.environment, **self._whose(name))
            with (self.logs / f"{name}.txt").open("ab") as output:
                subprocess.run(
                    [str(kit.startup / "start.sh")],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                    check=True,
                )

    def wait_connected(self, sites: Iterable[str], timeout_s: float = 90.0) -> float:
        """Wait until the server has heard all ``sites`` since they were started; returns the seconds it took.

        Raises:
            ConfigError: there is no coordinator's kit to ask with.
            FederationError: some are not there in time; the message names them and where they log.
        """
        admins = self._named(None, "admin")
        if not admins:
            raise ConfigError("no coordinator's kit among the kits; without one, nobody can ask the server")
        started, missing = time.monotonic(), sorted(sites)
        with coordinator_session(self.kits[admins[0]].path, timeout_s) as session:
            while True:
                heard = connected_sites(session)
                # The server keeps a dead site for a while: one that was started again counts once it speaks itself.
                missing = [name for name in missing if heard.get(name, -1.0) < self._started.get(name, 0.0)]
                if not missing:
                    return time.monotonic() - started
                if time.monotonic() - started > timeout_s:
                    raise FederationError(
                        *(
                            f"site {name}: not connected after {timeout_s:g} s; see {self.logs / name}.txt"
                            for name in missing
                        )
                    )
                time.sleep(0.5)

    def stop(self, names: Iterable[str] | None = None) -> None:
        """Stop through each kit's ``stop_fl.sh``, all at once; what is left after FLARE's own time is killed."""
        stopping = [name for name in self._named(names, "server", "site") if self.processes(name)]
        deadline = time.monotonic() + _STOP_S
        while (left := [n for n in stopping if self.processes(n, "daemon")]) and time.monotonic() < deadline:
            for name in left:
                # A kit that was only just started takes the request away again as it comes up.
                if not (self.kits[name].path / "shutdown.fl").exists():
                    self._ask_to_stop(name)
            time.sleep(0.2)
        for name in stopping:
            end_processes(self.mark, more=self._whose(name))
            clear_stale(self.kits[name].path)

    def _ask_to_stop(self, name: str) -> None:
        with (self.logs / f"{name}.txt").open("ab") as output:
            subprocess.run(
                [str(self.kits[name].startup / "stop_fl.sh")],
                input=b"y",  # it asks
                stdout=output,
                stderr=subprocess.STDOUT,
                env=marked_environment(self.mark, None, **self._whose(name)),
                check=True,
            )

    def kill(self, *names: str) -> None:
        """SIGKILL every process of ``names`` (all by default), the daemons too; the kits stay as they are."""
        for name in self._named(names or None, "server", "site"):
            end_processes(self.mark, grace_s=0, more=self._whose(name))
