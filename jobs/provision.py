"""Startup kits of a federation, through FLARE's own provisioning: one folder for the server, each site, coordinator.

FLARE's builders make certificates and scripts; one builder of ours adds what a kit of this project holds besides, and
signs ``startup/``, so that FLARE refuses to start a kit whose startup files were changed.
"""

import contextlib
import io
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nvflare.lighter.constants import CertFileBasename, CtxKey, ParticipantType, PropKey, ProvFileName
from nvflare.lighter.ctx import ProvisionContext
from nvflare.lighter.entity import Participant, Project
from nvflare.lighter.impl.cert import CertBuilder
from nvflare.lighter.impl.static_file import StaticFileBuilder
from nvflare.lighter.impl.workspace import WorkspaceBuilder
from nvflare.lighter.provisioner import Provisioner
from nvflare.lighter.spec import Builder
from nvflare.lighter.utils import load_crt, sign_folders

from clinifed.config import Federation
from clinifed.errors import ConfigError, FederationError
from clinifed.executors.filters import privacy_scope
from clinifed.files import OWNER_ONLY, sync_folder, write_atomic, write_json
from clinifed.jobs.kit import (
    AUTHORIZATION,
    COORDINATOR_ROLE,
    HEART_BEAT_TIMEOUT_S,
    SERVER,
    admin_resources,
    read_kit,
    server_resources,
    site_resources,
)
from clinifed.jobs.kit_texts import admin_readme, policy_template, server_readme, site_readme
from clinifed.policy import POLICY_FOLDER

__all__ = ["AUTHORITY", "KitBuilder", "provision"]

AUTHORITY = "authority"  # beneath the kits' folder: FLARE's state, with the root's private key and every other
_STATE = "cert.json"
_ROOT_DAYS = 5 * 365  # FLARE gives a participant 360 days, and none more than the root has left
# After this line of FLARE's script, which both its daemon and a service of the system go through.
_ANCHOR = 'echo "WORKSPACE set to $WORKSPACE"\n'
_SETTINGS = """\
export NVFLARE_SECURE_LOGGING=true  # FLARE's logs name the kind of an error, and nothing of what it was about
export TMPDIR="$WORKSPACE/tmp"  # nothing of a run in a folder that others share
umask 077
mkdir -p "$TMPDIR"
"""


class _Quiet:
    """FLARE's messages while it provisions; the errors are told in the exception."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def info(self, message: str) -> None:
        """Nothing an administrator needs."""

    debug = warning = info

    def error(self, message: str) -> None:
        """Kept."""
        self.errors.append(message)


class KitBuilder(Builder):
    """The last of FLARE's builders: adds to each participant's kit what this project asks of it.

    Args:
        federation: whose kits these are.
    """

    def __init__(self, federation: Federation) -> None:
        self.federation = federation

    def initialize(self, project: Project, ctx: ProvisionContext) -> None:
        """Put secure logging and the kit's own temporary folder into FLARE's start script."""
        script = ctx[CtxKey.TEMPLATE]["sub_start_sh"]
        if script.count(_ANCHOR) != 1:
            raise FederationError("FLARE's sub_start.sh is another than that of 2.9; clinifed must be adapted to it")
        ctx[CtxKey.TEMPLATE]["sub_start_sh"] = script.replace(_ANCHOR, _ANCHOR + _SETTINGS)

    def build(self, project: Project, ctx: ProvisionContext) -> None:
        """Write ``local/`` and the page for the administrator, and sign ``startup/`` with the root's key."""
        for participant in project.get_all_participants():
            workspace, startup = Path(ctx.get_ws_dir(participant)), Path(ctx.get_kit_dir(participant))
            local = Path(ctx.get_local_dir(participant))
            # FLARE's samples would come into force if the file beside them were lost: then rather none.
            for sample in (
                ProvFileName.RESOURCES_JSON_DEFAULT,
                ProvFileName.AUTHORIZATION_JSON_DEFAULT,
                ProvFileName.PRIVACY_JSON_SAMPLE,
            ):
                (local / sample).unlink(missing_ok=True)
            for page in (workspace / ProvFileName.README_TXT, startup / ProvFileName.README_TXT):
                page.unlink(missing_ok=True)
            base = CertFileBasename.SERVER if participant.type == ParticipantType.SERVER else CertFileBasename.CLIENT
            expires = load_crt(startup / f"{base}.crt").not_valid_after_utc
            name, deployment = self.federation.name, self.federation.deployment
            if participant.type == ParticipantType.SERVER:
                write_json(local / "resources.json", server_resources())
                write_json(local / "authorization.json", AUTHORIZATION)
                page = server_readme(name, deployment, expires, HEART_BEAT_TIMEOUT_S)
            elif participant.type == ParticipantType.CLIENT:
                page = self._site(participant, local, expires)
            else:
                write_json(local / "resources.json", admin_resources())
                page = admin_readme(name, deployment, expires)
            (workspace / "README.md").write_text(page, encoding="utf-8")
            sign_folders(startup, ctx[CtxKey.ROOT_PRI_KEY], signature_file=ProvFileName.SIGNATURE_JSON)
            workspace.chmod(0o700)

    def _site(self, participant: Participant, local: Path, expires: Any) -> str:
        site = participant.name
        write_json(local / "resources.json", site_resources())
        write_json(local / "authorization.json", AUTHORIZATION)
        write_json(local / "privacy.json", privacy_scope())
        (local / POLICY_FOLDER).mkdir()
        template = policy_template(site, self.federation.deployment)
        write_atomic(local / POLICY_FOLDER / f"{site}.yaml", template.encode(), OWNER_ONLY)
        deployment = self.federation.deployment
        connect = participant.get_connect_to()
        address = (connect.host, connect.port) if connect else (deployment.host, deployment.port)
        specialties = self.federation.sites[site].specialties
        return site_readme(site, self.federation.name, specialties, deployment, address, expires, HEART_BEAT_TIMEOUT_S)


def _project(federation: Federation, connect_to: Mapping[str, tuple[str, int]]) -> Project:
    """The federation in FLARE's words. Each site is an organization of its own: nobody else's rights reach it."""
    deployment = federation.deployment
    ports = {PropKey.FED_LEARN_PORT: deployment.port, PropKey.ADMIN_PORT: deployment.admin_port}
    project = Project(federation.name, description="", props={"api_version": 3})
    project.set_server(SERVER, deployment.organization, {PropKey.DEFAULT_HOST: deployment.host, **ports})
    for site in sorted(federation.sites):
        props: dict[str, Any] = {PropKey.ALLOW_LOG_STREAMING: False}
        if site in connect_to:
            host, port = connect_to[site]
            props[PropKey.CONNECT_TO] = {PropKey.HOST: host, PropKey.PORT: port}
        project.add_client(site, site.replace("-", "_"), props)
    project.add_admin(deployment.coordinator, deployment.organization, {PropKey.ROLE: COORDINATOR_ROLE})
    return project


def _build(federation: Federation, connect_to: Mapping[str, tuple[str, int]], work: Path) -> Path:
    """Let FLARE provision beneath ``work``; the folder of finished kits."""
    quiet = _Quiet()
    builders = [
        WorkspaceBuilder(),
        StaticFileBuilder(config_folder="config", require_signed_jobs=True),
        CertBuilder(root_valid_days=_ROOT_DAYS),
        KitBuilder(federation),
    ]
    try:
        project = _project(federation, connect_to)
        with contextlib.redirect_stderr(io.StringIO()):  # FLARE prints the traceback of what it then only notes
            ctx = Provisioner(str(work), builders).provision(project, logger=quiet)
    except ValueError as error:
        raise ConfigError(f"deployment: FLARE refuses it: {error}") from None
    if ctx.get(CtxKey.BUILD_ERROR):
        raise FederationError(*(f"FLARE could not provision: {error}" for error in quiet.errors))
    return Path(ctx.get_result_location())


def provision(
    federation: Federation,
    out: Path,
    progress: Callable[[str], None],
    connect_to: Mapping[str, tuple[str, int]] | None = None,
) -> dict[str, Path]:
    """Make the startup kits of ``federation`` in ``out``, or those that are missing there.

    Args:
        out: one folder per kit, and ``authority/``, which holds the root's private key and stays with the coordinator.
        progress: told what was made, and what is there that the configuration no longer names.
        connect_to: site → (host, port) where it reaches the server otherwise than at ``deployment``.

    Returns:
        ``server``, each site and the coordinator → its kit.

    Raises:
        ConfigError: the kits in ``out`` are of another deployment or another root; nothing was changed.
        FederationError: FLARE could not provision; nothing was changed.

    Guarantees:
        - A kit that is there stays as it is, byte for byte; so do the root and every certificate.
        - A failure leaves ``out`` as it was.
        - The folder of keys is readable by its owner alone.
    """
    out = out.resolve()
    connect_to = dict(connect_to or {})
    strangers = sorted(set(connect_to) - set(federation.sites))
    if strangers:
        raise ConfigError(*(f"connect_to: {name!r} is no site of this federation" for name in strangers))
    names = [SERVER, *sorted(federation.sites), federation.deployment.coordinator]
    state = out / AUTHORITY / _STATE
    there = [name for name in names if (out / name).exists()]
    if there and not state.is_file():
        raise ConfigError(
            f"{out}: holds kits ({', '.join(there)}), but no {AUTHORITY}/{_STATE}; put it back, or choose another "
            "folder"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        work = Path(folder)
        if state.is_file():
            copy = work / federation.name / "state"
            copy.mkdir(parents=True)
            shutil.copyfile(state, copy / _STATE)
        made = _build(federation, connect_to, work)
        problems = [p for name in there for p in _differences(out / name, made / name)]
        if problems:
            raise ConfigError(*problems)
        new = [name for name in names if name not in there]
        _install(work / federation.name / "state" / _STATE, made, new, out)
    for name in new:
        kit = read_kit(out / name)
        progress(f"{name}: new kit, certificate valid until {kit.certificate.not_valid_after_utc:%Y-%m-%d}")
    for name in there:
        progress(f"{name}: has its kit; unchanged")
    progress(f"the federation's root is {read_kit(out / SERVER).root_fingerprint}; say so to whom you send a kit")
    for name in sorted(p.parent.name for p in out.glob("*/startup") if p.parent.name not in names):
        progress(
            f"{name}: the configuration no longer names it. Its kit stays, and its certificate is valid until it "
            "expires: FLARE knows no revocation. No contract names the site any more, so its updates are refused"
        )
    return {name: out / name for name in names}


def _differences(there: Path, made: Path) -> list[str]:
    """What a kit would say otherwise if it were made now; it was sent to its owner, so that nobody can change it."""
    problems = []
    for new in sorted((made / "startup").iterdir()):
        if new.suffix not in {".json", ".crt", ".pem", ".key"} or new.name == ProvFileName.SIGNATURE_JSON:
            continue
        old = there / "startup" / new.name
        if not old.is_file() or old.read_bytes() != new.read_bytes():
            problems.append(
                f"{old}: says otherwise than the configuration now does (deployment, federation's name, or root); put "
                "the configuration back, or make all kits anew in another folder"
            )
    return problems


def _install(state: Path, made: Path, new: list[str], out: Path) -> None:
    """Put the state and the new kits into ``out``: at once if it is new, else the state first, then kit by kit.

    Interrupted after the state, the next call makes the same kits from the same certificates.
    """
    fresh = not out.exists()
    target = made if fresh else out
    authority = target / AUTHORITY
    authority.mkdir(mode=0o700, exist_ok=True)
    write_atomic(authority / _STATE, state.read_bytes(), OWNER_ONLY)
    if fresh:
        made.chmod(0o700)
        made.rename(out)
    else:
        for name in new:
            (made / name).rename(out / name)
    sync_folder(out)
    sync_folder(out.parent)
