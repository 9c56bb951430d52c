"""FLARE components of the server's resources.json: who may be a site, and what becomes of jobs of a killed server."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.fl_exception import UnsafeComponentError
from nvflare.fuel.f3.cellnet.defs import MessagePropKey, ReturnCode
from nvflare.fuel.f3.cellnet.identity import CellIdentityResolver
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.message import Message
from nvflare.fuel.sec.audit import AuditService
from nvflare.private.defs import CellChannel, CellChannelTopic, CellMessageHeaderKeys
from nvflare.private.fed.server.client_manager import ClientManager

from clinifed.errors import ConfigError

__all__ = ["IdentityGuard", "StaleJobSweeper"]

_HEARTBEAT_S = 10.0  # FLARE's interval between a site's heartbeats
_ALERT_EVERY_S = 60.0  # a second process tries every few seconds


class StaleJobSweeper(FLComponent):
    """Marks the jobs that a killed server left as running, when it starts again.

    FLARE 2.9 does not resume them, and would neither end nor delete them.

    Guarantees:
        - A job that no process runs any more is abandoned in FLARE's words, and can be deleted.
    """

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Sweep once, when the server starts; in a job's process there is nothing to sweep."""
        if event_type == EventType.SYSTEM_START:
            engine = fl_ctx.get_engine()
            runner = getattr(engine, "job_runner", None)
            if runner is not None and not engine.run_processes:
                runner.update_unfinished_jobs(fl_ctx)


@dataclass
class _Claim:
    """Somebody asked for the name of a site that has a session."""

    asked: float  # when last, in seconds of time.time()
    proven: bool = False  # the session was heard after that: there are two processes


class _Door(CellIdentityResolver):
    """FLARE's check of a new connection's certificate, and after it the guard's."""

    def __init__(self, checks: CellIdentityResolver, admit: Callable[[str], None]) -> None:
        super().__init__(checks.local_fqcn, checks.prefix_identity_map, checks.exact_identity_map)
        self._admit = admit

    def require_match(self, fqcn: str, peer_cn: str, peer_desc: str) -> None:
        """Raise ValueError, at which FLARE closes the connection."""
        super().require_match(fqcn, peer_cn, peer_desc)
        self._admit(fqcn)


class IdentityGuard(FLComponent):
    """Refuses a second process with the identity of a site that is alive.

    FLARE 2.9 gives the name to whoever comes last: the newest connection of a name closes the one before, and whoever
    registers last has the session, both without a word. A copied startup kit would take a hospital's place. So:

    1. A connection under the name of a site that is connected and alive is closed at once; else both processes would
       throw each other out in turn, and the site's heartbeats would be lost.
    2. A registration under the name of a site whose session is not over waits, since FLARE's client asks again by
       itself. When the old session falls silent the site was restarted, and is let in. When the old session goes on
       there are two processes, and the second is refused.
    3. When the old session is heard after somebody asked for its name, a security alert is logged and audited.

    FLARE has no event that knows the certified name. For registration and heartbeat this uses the filters that FLARE's
    cells offer. For connections it puts its own check in the place of the one that the server's connection manager
    holds: nothing else is replaced in FLARE. Connections are checked under mTLS only, as in every provisioned kit.
    Job processes connect under names of their own and do not register.

    Args:
        silence_s: a session that was not heard for so long is over, in seconds; more than FLARE's heartbeat of 10 s.

    Guarantees:
        - A session that is heard keeps its name and its connection.
        - A site that was killed and restarted is let in once its old session has been silent.
        - A site that took its leave is let in at once.
        - Two living processes of one identity lead to a security alert, whichever came first.
        - On anything but the server of a federation it stops the start.

    Raises:
        ConfigError: ``silence_s`` is no finite number above 10.
    """

    def __init__(self, silence_s: float = 2 * _HEARTBEAT_S) -> None:
        super().__init__()
        if isinstance(silence_s, bool) or not isinstance(silence_s, int | float) or not _HEARTBEAT_S < silence_s < inf:
            raise ConfigError(
                f"resources.json:components.identity_guard.args.silence_s: {silence_s!r}; give more than "
                f"{_HEARTBEAT_S:g} seconds, FLARE's heartbeat interval: every site is silent between two heartbeats"
            )
        self.silence_s = silence_s
        self._sites: ClientManager | None = None
        self._connected: Mapping[str, Any] = {}  # name → FLARE's SfmEndpoint
        self._lock = threading.Lock()  # of all below, which hold sites that have a session only
        self._held: dict[str, Any] = {}  # site → the Endpoint of the connection on which its session was last heard
        self._claims: dict[str, _Claim] = {}
        self._told: dict[str, float] = {}  # site → when the last alert was given

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Take post before the server starts."""
        if event_type != EventType.SYSTEM_BOOTSTRAP:
            return
        server = fl_ctx.get_prop(FLContextKey.SITE_OBJ)
        try:
            self._sites, cell = server.client_manager, server.cell.core_cell
            connections = cell.communicator.conn_manager
            self._connected = connections.sfm_endpoints
            connections.identity_resolver = _Door(connections.identity_resolver, self.on_connect)
            cell.add_incoming_request_filter(CellChannel.SERVER_MAIN, CellChannelTopic.Register, self.on_register)
            cell.add_incoming_request_filter(CellChannel.SERVER_MAIN, CellChannelTopic.HEART_BEAT, self.on_heartbeat)
        except AttributeError as error:
            # The one error at which FLARE does not start; of others it makes a line in its log.
            raise UnsafeComponentError(f"IdentityGuard cannot guard a {type(server).__name__}: {error}") from error

    def _heard(self, site: str) -> tuple[str, float] | None:
        """Token of the site's session, and when it was last heard; None when it has none, or it is over."""
        assert self._sites is not None
        with self._sites.lock:
            sessions = [
                (token, client.last_connect_time)
                for token, client in self._sites.clients.items()
                if client.name == site and time.time() - client.last_connect_time < self.silence_s
            ]
        return max(sessions, key=lambda session: session[1]) if sessions else None

    def _claim(self, site: str, what: str, heard: float) -> _Claim:
        """Note that somebody asked for the name of a living site."""
        now = time.time()
        claim = self._claims.get(site)
        if claim is None or now - claim.asked > self.silence_s:  # an older one was another day's
            self.logger.warning(f"{site}: {what} a second time; it was heard {now - heard:.0f} s ago, and goes first")
            claim = self._claims[site] = _Claim(now)
        claim.asked = now
        return claim

    def on_connect(self, site: str) -> None:
        """Whether a connection of that name may take the place of the one before. Raises ValueError if not."""
        session = self._heard(site)
        with self._lock:
            if session is None:
                self._claims.pop(site, None)
                return
            held, connected = self._held.get(site), self._connected.get(site)
            if connected is None or not connected.connections or connected.endpoint is not held:
                return  # not connected, or on a connection that never proved to be the session's
            self._claim(site, "connects", session[1])
        raise ValueError(f"{site} is alive and connected")

    def on_register(self, message: Message) -> Message | None:
        """None lets FLARE go on with the registration; anything else is the answer."""
        site = str(message.get_header(CellMessageHeaderKeys.CLIENT_NAME))
        session = self._heard(site)
        with self._lock:
            if session is None:
                if self._claims.pop(site, None) is not None:
                    self.logger.info(f"{site}: its old session is over; it may register again")
                return None
            if not self._claim(site, "asks to register", session[1]).proven:
                # FLARE's own word for "not yet": its client asks again in 2 s, with the same challenge.
                return make_reply(ReturnCode.OK, body={})
        return make_reply(ReturnCode.UNAUTHENTICATED, error=f"{site} is alive in another process")

    def on_heartbeat(self, message: Message) -> None:
        """A session that is heard after somebody asked for its name proves two processes. FLARE goes on in any case."""
        assert self._sites is not None
        site = str(message.get_header(CellMessageHeaderKeys.CLIENT_NAME))
        own = self._sites.clients.get(message.get_header(CellMessageHeaderKeys.TOKEN))
        session = self._heard(site)
        with self._lock:
            if own is not None and own.name == site:
                self._held[site] = message.get_prop(MessagePropKey.ENDPOINT)
                claim = self._claims.get(site)
                if claim is not None and time.time() - claim.asked <= self.silence_s:
                    claim.proven = True
                    self._alert(site, "a second process, which asked for the name of this living site, is kept out")
            elif session is not None:
                self._alert(site, "two processes are alive under this name; the one that registered first is shut out")

    def _alert(self, site: str, what: str) -> None:
        now = time.time()
        if now - self._told.get(site, -_ALERT_EVERY_S) >= _ALERT_EVERY_S:
            self._told[site] = now
            text = f"{what}; its startup kit was started twice or copied: end one process, or revoke the kit"
            self.logger.critical(f"SECURITY ALERT: {site}: {text}")
            AuditService.add_event(user=site, action="identity_guard", msg=text)
