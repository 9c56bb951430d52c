"""Who may register as a site, with FLARE's own client manager, cell filters and messages; and what is swept."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.client import Client
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.fl_exception import UnsafeComponentError
from nvflare.apis.shareable import Shareable
from nvflare.apis.utils.event import fire_event_to_components
from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, MessagePropKey, ReturnCode
from nvflare.fuel.f3.cellnet.registry import Registry
from nvflare.fuel.f3.comm_error import CommError
from nvflare.fuel.f3.drivers.connector_info import Mode
from nvflare.fuel.f3.drivers.driver_params import DriverParams
from nvflare.fuel.f3.endpoint import Endpoint
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.sfm.conn_manager import ConnManager
from nvflare.fuel.f3.sfm.constants import HandshakeKeys
from nvflare.private.defs import CellChannel, CellChannelTopic, CellMessageHeaderKeys, ClientType
from nvflare.private.fed.server.client_manager import ClientManager
from nvflare.private.fed.server.fed_server import FederatedServer
from nvflare.private.fed.server.job_runner import JobRunner

from clinifed.errors import ConfigError
from clinifed.jobs import server_guard
from clinifed.jobs.server_guard import IdentityGuard, StaleJobSweeper

ALERT = "SECURITY ALERT"


class Connection:
    """A connection of a site to the server, under mTLS."""

    def __init__(self, site: str, certified: str) -> None:
        params = {"scheme": "grpc", "secure": True}
        self.conn = self
        self.connector = SimpleNamespace(params=params, mode=Mode.PASSIVE)
        self.name, self.certified, self.open = f"{site}-{id(self)}", certified, True
        self.sfm_endpoint: Any = None

    def get_name(self) -> str:
        return self.name

    def get_conn_properties(self) -> dict[str, str]:
        return {DriverParams.PEER_CN.value: self.certified}

    def close(self) -> None:
        """FLARE closes it."""
        self.open = False

    def end(self) -> None:
        """It broke, or the process behind it was killed, and the server sees that."""
        self.sfm_endpoint.remove_connection(self)


class Federation:
    """A server's registration desk: the guard's filters before FLARE's client manager, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        clock = SimpleNamespace(time=lambda: self.now)
        monkeypatch.setattr(server_guard, "time", clock)
        monkeypatch.setattr("nvflare.private.fed.server.client_manager.time", clock)
        monkeypatch.setattr("nvflare.apis.client.time", clock)
        self.sites = ClientManager(project_name="study", min_num_clients=1, max_num_clients=10)
        self.guard = IdentityGuard()
        server = FederatedServer.__new__(FederatedServer)  # its constructor opens ports
        self.cell = CoreCell.__new__(CoreCell)
        self.cell.in_req_filter_reg = Registry()
        self.connections = ConnManager(Endpoint("server"))
        self.cell.communicator = SimpleNamespace(conn_manager=self.connections)
        server.client_manager, server.cell = self.sites, SimpleNamespace(core_cell=self.cell)
        self.context = FLContext()
        self.context.set_prop(FLContextKey.SITE_OBJ, server, private=True, sticky=False)
        fire_event_to_components(EventType.SYSTEM_BOOTSTRAP, [self.guard], self.context)
        assert self.context.get_prop(FLContextKey.EXCEPTIONS) is None

    def connect(self, site: str, certified: str | None = None) -> Connection:
        """A handshake, as FLARE's connection manager makes it."""
        connection = Connection(site, certified or site)
        with suppress(CommError):
            self.connections.update_endpoint(connection, {HandshakeKeys.ENDPOINT_NAME: site})
        return connection

    def _answer(self, topic: str, message: Message) -> Message | None:
        """What the cell's filters say: FLARE takes the first answer."""
        filters = self.cell.in_req_filter_reg.find(CellChannel.SERVER_MAIN, topic) or []
        answers = [f.cb(message, *f.args, **f.kwargs) for f in filters]
        return next((answer for answer in answers if answer), None)

    def register(self, site: str, client_type: str = ClientType.REGULAR) -> str | Message:
        """The token, or the answer to one who does not get one."""
        headers = {
            CellMessageHeaderKeys.CLIENT_NAME: site,
            CellMessageHeaderKeys.CLIENT_TYPE: client_type,
            CellMessageHeaderKeys.CLIENT_IP: "127.0.0.1",
            CellMessageHeaderKeys.PROJECT_NAME: "study",
            MessageHeaderKey.ORIGIN: site,
        }
        message = Message(headers, Shareable())
        answer = self._answer(CellChannelTopic.Register, message)
        if answer:
            return answer
        client = self.sites.authenticate(message, FLContext())
        assert isinstance(client, Client)
        return str(client.token)

    def heartbeat(self, site: str, token: str) -> None:
        message = Message({CellMessageHeaderKeys.CLIENT_NAME: site, CellMessageHeaderKeys.TOKEN: token}, Shareable())
        if site in self.connections.sfm_endpoints:
            message.set_prop(MessagePropKey.ENDPOINT, self.connections.sfm_endpoints[site].endpoint)
        assert self._answer(CellChannelTopic.HEART_BEAT, message) is None
        self.sites.heartbeat(token, site, site, FLContext())

    def later(self, seconds: float, **alive: str) -> None:
        """Time passes; the sites of ``alive`` (site=token) are heard every 10 s."""
        while seconds > 0:
            step = min(seconds, 10)
            self.now += step
            seconds -= step
            for site, token in alive.items():
                self.heartbeat(site, token)

    def token_of(self, site: str) -> str:
        return str(self.sites.name_to_clients[site].token)


def waits(answer: str | Message) -> bool:
    """Whether FLARE's client takes this for "not yet" and asks again."""
    return isinstance(answer, Message) and (
        answer.get_header(MessageHeaderKey.RETURN_CODE) == ReturnCode.OK and answer.payload == {}
    )


def refused(answer: str | Message) -> bool:
    """Whether FLARE's client gives up and says why."""
    return isinstance(answer, Message) and (
        answer.get_header(MessageHeaderKey.RETURN_CODE) == ReturnCode.UNAUTHENTICATED
        and "alive" in answer.get_header(MessageHeaderKey.ERROR)
    )


@pytest.fixture
def federation(monkeypatch: pytest.MonkeyPatch) -> Federation:
    return Federation(monkeypatch)


@pytest.fixture
def alerts(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The security alerts of the audit; the log must have the same number."""
    audited: list[str] = []
    monkeypatch.setattr(
        server_guard.AuditService, "add_event", lambda user, action, msg: audited.append(f"{user}: {msg}")
    )
    with caplog.at_level(logging.INFO):
        yield audited
    logged = [r for r in caplog.get_records("call") if r.levelno == logging.CRITICAL and ALERT in r.message]
    assert len(logged) == len(audited)


def test_sites_register_once_without_a_word(federation: Federation, alerts: list[str]) -> None:
    tokens = {site: federation.register(site) for site in ("alder", "birch")}
    federation.later(100, **tokens)
    assert not alerts
    assert {site: federation.token_of(site) for site in tokens} == tokens


def test_a_session_that_is_heard_keeps_its_name(federation: Federation, alerts: list[str]) -> None:
    first = str(federation.register("alder"))
    for _ in range(100):  # as FLARE's client does, and starts again when refused
        federation.now += 2
        answer = federation.register("alder")
        assert waits(answer) or refused(answer)
        if federation.now % 10 == 0:
            federation.heartbeat("alder", first)
    assert federation.token_of("alder") == first
    assert alerts


def test_a_second_process_is_refused_with_an_alert_once_the_first_is_heard(
    federation: Federation, alerts: list[str]
) -> None:
    first = str(federation.register("alder"))
    assert waits(federation.register("alder"))
    assert not alerts
    federation.later(10, alder=first)
    assert len(alerts) == 1
    assert alerts[0].startswith("alder: a second process")
    assert refused(federation.register("alder"))


def test_a_second_process_that_goes_on_asking_leads_to_an_alert_each_minute(
    federation: Federation, alerts: list[str]
) -> None:
    first = str(federation.register("alder"))
    for _ in range(30):
        federation.register("alder")
        federation.later(10, alder=first)
    assert len(alerts) == 5


def test_a_connected_site_keeps_its_connection(federation: Federation, alerts: list[str]) -> None:
    held = federation.connect("alder")
    first = str(federation.register("alder"))
    federation.later(10, alder=first)
    for _ in range(5):
        second = federation.connect("alder")
        assert not second.open
        assert held.open
        federation.later(10, alder=first)
    assert federation.connections.sfm_endpoints["alder"].connections == [held]
    assert len(alerts) == 1


def test_a_site_whose_connection_broke_connects_again_at_once(federation: Federation, alerts: list[str]) -> None:
    old = federation.connect("alder")
    first = str(federation.register("alder"))
    federation.later(10, alder=first)
    old.end()
    again = federation.connect("alder")
    assert again.open
    federation.later(10, alder=first)
    assert again.open
    assert not alerts


def test_a_site_whose_broken_connection_still_stands_is_let_in_after_its_silence(
    federation: Federation, alerts: list[str]
) -> None:
    """A firewall forgot it, and the server does not know yet."""
    old = federation.connect("alder")
    first = str(federation.register("alder"))
    federation.later(10, alder=first)
    federation.now += 12
    assert not federation.connect("alder").open
    federation.now += 8
    again = federation.connect("alder")
    assert again.open
    assert not old.open
    federation.heartbeat("alder", first)
    assert not alerts


def test_a_second_process_that_connects_in_a_gap_gives_way_to_the_first(
    federation: Federation, alerts: list[str]
) -> None:
    old = federation.connect("alder")
    first = str(federation.register("alder"))
    federation.later(10, alder=first)
    old.end()
    second = federation.connect("alder")
    assert second.open
    assert waits(federation.register("alder"))
    again = federation.connect("alder")  # the site itself; the second never proved to have its session
    assert again.open
    assert not second.open
    federation.later(10, alder=first)
    assert not federation.connect("alder").open
    assert len(alerts) == 1


def test_flares_own_check_of_certificates_comes_first(federation: Federation) -> None:
    assert not federation.connect("alder", certified="birch").open
    assert federation.connect("alder").open


def test_a_site_that_was_killed_and_restarted_is_let_in_after_its_silence(
    federation: Federation, alerts: list[str]
) -> None:
    first = federation.register("alder")
    federation.now += 8  # FLARE's daemon, and Python's imports
    while waits(answer := federation.register("alder")):
        federation.now += 2
    assert isinstance(answer, str)
    assert answer != first
    assert federation.now == 1020
    assert not alerts


def test_an_old_claim_does_not_count_against_a_restart(federation: Federation, alerts: list[str]) -> None:
    first = str(federation.register("alder"))
    federation.register("alder")
    federation.later(10, alder=first)  # the second process went away without asking again
    federation.later(3600, alder=first)
    federation.now += 5
    assert waits(federation.register("alder"))  # the site itself, restarted
    federation.now += 15
    assert isinstance(federation.register("alder"), str)
    assert len(alerts) == 1  # of the second process


def test_a_site_that_took_its_leave_is_let_in_at_once(federation: Federation, alerts: list[str]) -> None:
    federation.sites.remove_client(federation.register("alder"))
    assert isinstance(federation.register("alder"), str)
    assert not alerts


def test_sites_do_not_stand_in_each_others_way(federation: Federation, alerts: list[str]) -> None:
    federation.register("alder")
    assert isinstance(federation.register("birch"), str)
    assert waits(federation.register("alder"))
    assert isinstance(federation.register("cedar"), str)


def test_a_relay_of_the_same_name_does_not_displace_a_site(federation: Federation) -> None:
    """FLARE drops the site of that name whatever the newcomer says it is."""
    first = federation.register("alder")
    assert waits(federation.register("alder", ClientType.RELAY))
    assert federation.token_of("alder") == first


def test_two_living_processes_lead_to_an_alert_also_when_the_second_has_the_name(
    federation: Federation, alerts: list[str]
) -> None:
    """For example after a restart of the server, when the second was the first to register again."""
    first = str(federation.register("alder"))
    federation.sites.remove_client(first)
    second = federation.register("alder")
    federation.later(30, alder=first)
    assert len(alerts) == 1  # not with every heartbeat
    assert "shut out" in alerts[0]
    assert federation.token_of("alder") == second


def test_a_session_taken_up_again_after_a_restart_of_the_server_is_no_alert(
    federation: Federation, alerts: list[str]
) -> None:
    first = str(federation.register("alder"))
    federation.sites.set_clients({})
    federation.later(30, alder=first)  # FLARE activates the old token again
    assert federation.token_of("alder") == first
    assert not alerts


def test_without_the_guard_the_first_would_be_displaced(federation: Federation) -> None:
    """What the guard is for; when FLARE mends it, the guard can go."""
    federation.cell.in_req_filter_reg = Registry()
    first = federation.register("alder")
    assert federation.register("alder") != first
    assert first not in federation.sites.clients


def test_on_anything_but_a_server_it_stops_the_start() -> None:
    context = FLContext()
    context.set_prop(FLContextKey.SITE_OBJ, object(), private=True, sticky=False)
    fire_event_to_components(EventType.SYSTEM_BOOTSTRAP, [IdentityGuard()], context)
    (error,) = context.get_prop(FLContextKey.EXCEPTIONS).values()
    assert isinstance(error, UnsafeComponentError)


@pytest.mark.parametrize("silence_s", [10, 0, -1, float("nan"), float("inf"), "20", True, None])
def test_a_silence_shorter_than_a_heartbeat_is_refused(silence_s: Any) -> None:
    with pytest.raises(ConfigError, match=r"silence_s: .*heartbeat"):
        IdentityGuard(silence_s=silence_s)


class Engine:
    """As much of FLARE's engine as the sweeping of jobs needs."""

    def __init__(self, statuses: dict[str, str], running: bool = False) -> None:
        self.statuses = statuses
        self.job_runner: JobRunner | None = JobRunner("unused")
        self.run_processes = {"j1": {}} if running else {}

    def get_component(self, _: str) -> "Engine":
        return self  # the job manager

    def get_jobs_by_status(self, wanted: list[str], _: FLContext) -> list[Any]:
        return [SimpleNamespace(job_id=job) for job, status in self.statuses.items() if status in wanted]

    def set_status(self, job: str, status: str, _: FLContext) -> None:
        self.statuses[job] = status

    def start(self) -> None:
        context = SimpleNamespace(get_engine=lambda: self)
        StaleJobSweeper().handle_event(EventType.SYSTEM_START, context)


def test_jobs_of_a_killed_server_are_abandoned_and_others_left() -> None:
    statuses = {"a": "RUNNING", "b": "DISPATCHED", "c": "SUBMITTED", "d": "FINISHED:COMPLETED"}
    Engine(statuses).start()
    assert statuses == {
        "a": "FINISHED:ABANDONED",
        "b": "FINISHED:ABANDONED",
        "c": "SUBMITTED",
        "d": "FINISHED:COMPLETED",
    }


def test_jobs_that_have_a_process_are_not_swept() -> None:
    statuses = {"j1": "RUNNING"}
    Engine(statuses, running=True).start()
    assert statuses == {"j1": "RUNNING"}


def test_in_a_job_process_there_is_nothing_to_sweep() -> None:
    engine = Engine({"j1": "RUNNING"})
    engine.job_runner = None
    engine.start()
    assert engine.statuses == {"j1": "RUNNING"}
