"""What a startup kit of a federation holds besides FLARE's own files, and what one reads back from it.

The words here are those of the simulator's folder, of the kits that ``provision`` makes, and of what ``preflight``
asserts of a kit: one list for all three.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID
from nvflare.app_common.logging.constants import ALLOW_LOG_STREAMING_VAR
from nvflare.app_common.widgets.component_path_authorizer import CLASS_ALLOW_LIST, CLASS_LIST_ENFORCEMENT_MODE
from nvflare.lighter.constants import AdminRole, CertFileBasename, ProvFileName

from clinifed.errors import ConfigError
from clinifed.policy import JOB_CLASSES

__all__ = [
    "AUTHORIZATION",
    "COORDINATOR_ROLE",
    "HEART_BEAT_TIMEOUT_S",
    "LAUNCHERS",
    "LAUNCHER_ID",
    "SERVER",
    "SERVER_GUARDS",
    "STORAGE",
    "TIME_LIMITS",
    "Kit",
    "Role",
    "admin_resources",
    "job_rules",
    "read_kit",
    "server_resources",
    "site_resources",
]

Role = Literal["server", "site", "admin"]
SERVER = "server"  # the server's name in FLARE, and its kit's folder; no site may be called so
COORDINATOR_ROLE = AdminRole.LEAD  # submits jobs, and manages its own

# A killed job process is started again, where FLARE would end the whole job.
LAUNCHERS = {
    "site": "clinifed.jobs.launchers.RestartingClientLauncher",
    "server": "clinifed.jobs.launchers.RestartingServerLauncher",
}
SERVER_GUARDS = {
    "stale_job_sweeper": "clinifed.jobs.server_guard.StaleJobSweeper",
    "identity_guard": "clinifed.jobs.server_guard.IdentityGuard",
}
LAUNCHER_ID = "process_launcher"  # FLARE takes exactly one launcher, by this id
STORAGE = "storage"  # beneath the server's kit: jobs, their results, snapshots
_STORAGE_CLASS = "clinifed.jobs.kit_storage.KitStorage"

# Seconds. FLARE's defaults wait ten minutes for a dead site, and some of its waits are endless.
HEART_BEAT_TIMEOUT_S = 30.0  # three heartbeats of a site (10 s): after them it is dead
ADMIN_TIMEOUT_S = 10.0  # the server's wait for a site's answer when it deploys or starts a job
RETRY_TIMEOUT_S = 30.0  # a site's wait for the server before it tries again
ANSWER_S = 20.0  # a site's wait for any answer but that to its update; FLARE's 300 outlast a firewall that swallows one
HEART_BEAT_ANSWER_S = 5.0  # a site's wait for the answer to a heartbeat; with FLARE's 30 one lost beat makes it dead
# Which of a kit's settings are time-outs, and the most that preflight accepts of each.
TIME_LIMITS: dict[Role, dict[str, float]] = {
    "server": {"servers[0].heart_beat_timeout": 60.0, "servers[0].admin_timeout": 60.0},
    "site": {"client.retry_timeout": 300.0, "client.communication_timeout": 60.0, "client.maint_msg_timeout": 10.0},
    "admin": {
        "admin.idle_timeout": 3600.0,
        "admin.login_timeout": 60.0,
        "admin.authenticate_msg_timeout": 60.0,
    },
}

# FLARE asks this file for every command, at the server and again at each site. What a role is not given it has not.
# Nobody may bring code, nor read files of a machine, nor stop or restart another's processes: who runs a kit does.
AUTHORIZATION: dict[str, Any] = {
    "format_version": "1.0",
    "permissions": {
        COORDINATOR_ROLE: {
            "submit_job": "any",
            "clone_job": "none",
            "manage_job": "n:submitter",
            "download_job": "n:submitter",
            "view": "any",
            "operate": "none",
            "shell_commands": "none",
            "byoc": "none",
            "server-predeployed-flwr": "none",
        }
    },
}


def job_rules(*roles: Literal["site", "server"]) -> dict[str, Any]:
    """What every ``resources.json`` says of jobs: only the classes of these roles, and no log leaves."""
    return {
        "format_version": 2,
        CLASS_LIST_ENFORCEMENT_MODE: "enforce",
        CLASS_ALLOW_LIST: [name for role in roles for name in JOB_CLASSES[role]],
        ALLOW_LOG_STREAMING_VAR: False,
    }


def _component(name: str, path: str, **args: Any) -> dict[str, Any]:
    return {"id": name, "path": path, "args": args}


def site_resources() -> dict[str, Any]:
    """``local/resources.json`` of a site."""
    managers = "nvflare.app_common"
    return {
        **job_rules("site"),
        "client": {
            "retry_timeout": RETRY_TIMEOUT_S,
            "communication_timeout": ANSWER_S,
            "maint_msg_timeout": HEART_BEAT_ANSWER_S,
            "compression": "Gzip",
        },
        "components": [
            _component(
                "resource_manager",
                f"{managers}.resource_managers.gpu_resource_manager.GPUResourceManager",
                num_of_gpus=0,
                mem_per_gpu_in_GiB=0,
                expiration_period=300,
            ),
            _component("resource_consumer", f"{managers}.resource_consumers.gpu_resource_consumer.GPUResourceConsumer"),
            _component(LAUNCHER_ID, LAUNCHERS["site"]),
        ],
    }


def server_resources() -> dict[str, Any]:
    """``local/resources.json`` of the server."""
    return {
        **job_rules("server"),
        "servers": [
            {
                "admin_storage": "transfer",
                "max_num_clients": 1000,
                "heart_beat_timeout": HEART_BEAT_TIMEOUT_S,
                "admin_timeout": ADMIN_TIMEOUT_S,
                "download_job_url": "",
            }
        ],
        "snapshot_persistor": {
            "path": "nvflare.app_common.state_persistors.storage_state_persistor.StorageStatePersistor",
            "args": {
                "uri_root": "/",
                "storage": {"path": _STORAGE_CLASS, "args": {"folder": f"{STORAGE}/snapshots"}},
            },
        },
        "components": [
            _component(
                "job_scheduler", "nvflare.app_common.job_schedulers.job_scheduler.DefaultJobScheduler", max_jobs=4
            ),
            _component(
                "job_manager",
                "nvflare.apis.impl.job_def_manager.SimpleJobDefManager",
                uri_root=f"{STORAGE}/jobs",
                job_store_id="job_store",
            ),
            _component("job_store", _STORAGE_CLASS, folder="."),
            _component(LAUNCHER_ID, LAUNCHERS["server"]),
            *(_component(name, path) for name, path in SERVER_GUARDS.items()),
        ],
    }


def admin_resources() -> dict[str, Any]:
    """``local/resources.json`` of the coordinator."""
    return {
        "format_version": 1,
        "admin": {
            "idle_timeout": 900.0,
            "login_timeout": 10.0,
            "with_debug": False,
            "authenticate_msg_timeout": 5.0,
            "prompt": "> ",
        },
    }


@dataclass(frozen=True)
class Kit:
    """One startup kit on disk."""

    path: Path
    role: Role
    name: str  # as its certificate says
    config: dict[str, Any]  # of FLARE's startup file, which is signed
    config_name: str
    certificate: x509.Certificate
    root: x509.Certificate

    @property
    def startup(self) -> Path:
        """Signed by the federation's root; nobody edits it."""
        return self.path / "startup"

    @property
    def local(self) -> Path:
        """The administrator's own."""
        return self.path / "local"

    @property
    def key(self) -> Path:
        """The private key of its certificate."""
        base = CertFileBasename.SERVER if self.role == "server" else CertFileBasename.CLIENT
        return self.startup / f"{base}.key"

    @property
    def root_fingerprint(self) -> str:
        """SHA-256 of the root's certificate, to be compared with the coordinator's over another channel."""
        return self.root.fingerprint(hashes.SHA256()).hex()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to which it connects, or at which it listens."""
        if self.role == "admin":
            return self.config["admin"]["host"], int(self.config["admin"]["port"])
        host, port = self.config["servers"][0]["service"]["target"].rsplit(":", 1)
        return ("localhost" if self.role == "server" else host), int(port)


_STARTUP: dict[str, Role] = {
    ProvFileName.FED_SERVER_JSON: "server",
    ProvFileName.FED_CLIENT_JSON: "site",
    ProvFileName.FED_ADMIN_JSON: "admin",
}


def read_kit(path: Path) -> Kit:
    """The kit in ``path``.

    Raises:
        ConfigError: it is no kit, or one whose startup files cannot be read.
    """
    path = path.resolve()
    startup = path / "startup"
    found = [name for name in _STARTUP if (startup / name).is_file()]
    if len(found) != 1:
        raise ConfigError(f"{path}: not a startup kit; {startup} must hold one of {', '.join(_STARTUP)}")
    role = _STARTUP[found[0]]
    base = CertFileBasename.SERVER if role == "server" else CertFileBasename.CLIENT
    at = found[0]
    try:
        config = json.loads((startup / at).read_text(encoding="utf-8"))
        at = f"{base}.crt"
        certificate = x509.load_pem_x509_certificate((startup / at).read_bytes())
        at = "rootCA.pem"
        root = x509.load_pem_x509_certificate((startup / at).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{startup / at}: cannot be read ({type(error).__name__}); unpack the kit again, as it was sent"
        ) from None
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    name = str(names[0].value) if names else ""
    return Kit(path, role, name, config, found[0], certificate, root)
