"""What a startup kit must be, one check each: yields every problem as ``file:key: what; what to do``."""

import importlib.metadata
import json
import math
import re
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from nvflare.fuel.sec.authz import AuthzContext, Person
from nvflare.lighter.constants import DEFINED_ROLES, ProvFileName
from nvflare.lighter.utils import verify_content
from nvflare.security.logging import SECURE_LOGGING_VAR_NAME
from nvflare.security.security import FLAuthorizer

from clinifed.errors import ConfigError
from clinifed.jobs.kit import LAUNCHER_ID, LAUNCHERS, SERVER_GUARDS, TIME_LIMITS, Kit
from clinifed.policy import POLICY_FOLDER
from clinifed.privacy.lint import lint

__all__ = [
    "certificate_is_valid",
    "files_are_there",
    "flare_is_recent",
    "keys_are_private",
    "launchers_are_named",
    "nobody_brings_code",
    "rules_hold",
    "secure_logging_is_on",
    "startup_is_signed",
    "storage_is_inside",
    "time_outs_are_finite",
    "writable",
]

_LEAST = (2, 9)
_AGAIN = "unpack the kit again, as it was sent"
_FORBIDDEN = ("byoc", "shell_commands", "cat", "head", "tail", "grep", "ls")
# Of a kit's local folder: ours, and what an administrator may add without changing what runs.
_LOCAL = {
    "server": {"resources.json", "authorization.json"},
    "site": {"resources.json", "authorization.json", "privacy.json", POLICY_FOLDER},
    "admin": {"resources.json"},
}
_HARMLESS = {"log_config.json", "log_config.json.default", "comm_config.json", "study_registry.json"}


def flare_is_recent(kit: Kit) -> Iterator[str]:
    """Job signatures, class lists and log streaming are of FLARE 2.9."""
    version = importlib.metadata.version("nvflare")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < _LEAST:
        yield f"nvflare: version {version}; install {'.'.join(map(str, _LEAST))} or later"


def startup_is_signed(kit: Kit) -> Iterator[str]:
    """Every startup file is there as the root signed it, and none besides."""
    path = kit.startup / ProvFileName.SIGNATURE_JSON
    try:
        signatures = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        yield f"{path}: missing or damaged; {_AGAIN}"
        return
    there = {p.name for p in kit.startup.iterdir()} - {path.name}
    for name in sorted(set(signatures) - there):
        yield f"{kit.startup / name}: signed, but not there; {_AGAIN}"
    for name in sorted(there):
        file = kit.startup / name
        if name not in signatures:
            yield f"{file}: not signed by the federation's root; remove it"
            continue
        try:
            if file.is_symlink():
                raise ValueError("a link")
            verify_content(file.read_bytes(), signatures[name], kit.root.public_key())
        except (InvalidSignature, ValueError, TypeError, OSError):
            yield f"{file}: not as the root in rootCA.pem signed it; {_AGAIN}"


def certificate_is_valid(kit: Kit) -> Iterator[str]:
    """The certificate is by the root, in time, and belongs to the key; connections ask for those of both ends."""
    now, root = datetime.now(UTC), kit.startup / "rootCA.pem"
    path = kit.key.with_suffix(".crt")
    for certificate, file in ((kit.certificate, path), (kit.root, root)):
        if now > certificate.not_valid_after_utc:
            yield (
                f"{file}: expired on {certificate.not_valid_after_utc:%Y-%m-%d}; ask the coordinator for a new kit, "
                "and keep local/"
            )
        if now < certificate.not_valid_before_utc:
            yield (
                f"{file}: valid only from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; set this machine's "
                "clock"
            )
    try:
        kit.certificate.verify_directly_issued_by(kit.root)
    except (InvalidSignature, ValueError, TypeError):
        yield f"{path}: not issued by the root in {root.name}; {_AGAIN}"
    try:
        key = serialization.load_pem_private_key(kit.key.read_bytes(), None)
        if key.public_key() != kit.certificate.public_key():
            yield f"{kit.key}: another key than that of {path.name}; {_AGAIN}"
    except (OSError, ValueError, TypeError) as error:
        yield f"{kit.key}: cannot be read ({type(error).__name__}); {_AGAIN}"
    section = (
        kit.config["servers"][0] if kit.role == "server" else kit.config["admin" if kit.role == "admin" else "client"]
    )
    if section.get("connection_security") != "mtls":
        found = section.get("connection_security")
        yield f"{kit.startup / kit.config_name}:connection_security: {found!r}; it must be 'mtls'; {_AGAIN}"


def keys_are_private(kit: Kit) -> Iterator[str]:
    """Nobody else may read the private key, or write what is started."""
    if kit.key.is_file() and kit.key.stat().st_mode & 0o077:
        yield f"{kit.key}: readable by others; say chmod 600 {kit.key}"
    for folder in (kit.path, kit.startup, kit.local):
        for path in (folder, *(p for p in folder.iterdir() if p.is_file())):
            if path.stat().st_mode & 0o022:
                yield f"{path}: writable by others; say chmod go-w {path}"


def files_are_there(kit: Kit) -> Iterator[str]:
    """FLARE merges more files than one would think; a kit holds those that are checked here."""
    for name in sorted(_LOCAL[kit.role]):
        if not (kit.local / name).exists():
            yield f"{kit.local / name}: missing; take it from the kit as it was sent"
    known = _LOCAL[kit.role] | _HARMLESS
    for path in sorted(kit.local.iterdir() if kit.local.is_dir() else []):
        if path.name not in known:
            yield f"{path}: FLARE would take settings or code from it that nothing here checks; remove it"
    for path in sorted(kit.startup.glob("*resources.json")):
        yield f"{path}: FLARE would merge it into local/resources.json; remove it"


def rules_hold(kit: Kit) -> Iterator[str]:
    """What ``clinifed privacy lint`` refuses; the policy is asked by itself."""
    try:
        findings = lint(kit.local)
    except ConfigError as error:
        yield from error.problems
        return
    for finding in findings:
        if finding.rule != "schema":
            yield f"{finding.where}: {finding.found}; {finding.remedy}"
    if kit.config.get("require_signed_jobs") is not True:
        found = kit.config.get("require_signed_jobs")
        yield f"{kit.startup / kit.config_name}:require_signed_jobs: {found!r}; it must be true; {_AGAIN}"


def _read(path: Path) -> tuple[Any, str]:
    """The content of a JSON file, or what is wrong with it."""
    try:
        return json.loads(path.read_text(encoding="utf-8")), ""
    except (OSError, ValueError) as error:
        return None, f"{path}: cannot be read ({type(error).__name__}); take it from the kit as it was sent"


def nobody_brings_code(kit: Kit) -> Iterator[str]:
    """Asked of FLARE's own authorizer, for each of its roles and those of the file."""
    path = kit.local / "authorization.json"
    content, problem = _read(path)
    if problem:
        yield problem
        return
    try:
        authorizer = FLAuthorizer("site", content)
    except (SyntaxError, TypeError, AssertionError, AttributeError) as error:
        yield f"{path}: FLARE cannot read it ({error}); take it from the kit as it was sent"
        return
    for role in sorted({*DEFINED_ROLES, *content["permissions"]}):
        # Of the site's own organization, and the submitter: no condition of the file can be met better.
        person = Person("anyone", "site", role)
        for right in _FORBIDDEN:
            if authorizer.authorize(AuthzContext(right, person, person))[0]:
                yield f'{path}:permissions.{role}.{right}: permitted; set it to "none"'


def launchers_are_named(kit: Kit) -> Iterator[str]:
    """Without them, one killed process ends the job of all."""
    path = kit.local / "resources.json"
    content, problem = _read(path)
    if problem:
        yield problem
        return
    there = {c.get("id"): c.get("path") for c in content.get("components", []) if isinstance(c, dict)}
    wanted = {LAUNCHER_ID: LAUNCHERS[kit.role], **(SERVER_GUARDS if kit.role == "server" else {})}
    for name, wants in wanted.items():
        if there.get(name) != wants:
            yield f"{path}:components.{name}: {there.get(name)!r}; it must be {wants}"


def secure_logging_is_on(kit: Kit) -> Iterator[str]:
    """FLARE reads it from the environment, which the signed start script sets."""
    path = kit.startup / ProvFileName.SUB_START_SH
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not re.search(rf"^export {SECURE_LOGGING_VAR_NAME}=true\b", text, re.M):
        yield f"{path}:{SECURE_LOGGING_VAR_NAME}: not set; FLARE would log what an error was about; {_AGAIN}"


def time_outs_are_finite(kit: Kit) -> Iterator[str]:
    """Nothing may wait for ever."""
    path = kit.local / "resources.json"
    content, problem = _read(path)
    if problem:
        yield problem
        return
    for key, most in TIME_LIMITS[kit.role].items():
        value = content
        for part in re.findall(r"\w+", key):
            try:
                value = value[int(part)] if part.isdigit() else value[part]
            except (KeyError, IndexError, TypeError):
                value = None
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not 0 < value <= most:
            yield f"{path}:{key}: {value!r}; it must be more than 0 and at most {most:g} seconds"


def writable(folder: Path) -> Iterator[str]:
    """Whether a file can be made in ``folder``, tried."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        yield f"{folder} cannot be written ({error.strerror}); make it, owned by the user that runs the kit"


def storage_is_inside(kit: Kit) -> Iterator[str]:
    """Jobs, results and snapshots lie in the kit: a shared temporary folder is read by others and emptied."""
    yield from writable(kit.path)
    if kit.role != "server":
        return
    path = kit.local / "resources.json"
    content, problem = _read(path)
    if problem:
        yield problem
        return
    for key, folder in _folders(content):
        target = (kit.path / folder).resolve()
        if not target.is_relative_to(kit.path):
            yield f"{path}:{key}: {folder!r} lies outside the kit; give a folder relative to it"
        elif target.exists():
            yield from (f"{path}:{key}: {problem}" for problem in writable(target))


def _folders(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Where a server's configuration puts things."""
    parts = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for part, value in parts:
        inner = (f"{key}[{part}]" if isinstance(node, list) else f"{key}.{part}").removeprefix(".")
        names_folder = part in ("root_dir", "folder", "admin_storage") or (part == "uri_root" and value != "/")
        if names_folder and isinstance(value, str):
            yield inner, value
        yield from _folders(value, inner)
