"""``clinifed preflight``: everything that a startup kit must be, asserted before anything is started."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clinifed.data.manifest import read_manifest
from clinifed.errors import ClinifedError
from clinifed.jobs.kit import Kit, Role, read_kit
from clinifed.jobs.kit_checks import (
    certificate_is_valid,
    files_are_there,
    flare_is_recent,
    keys_are_private,
    launchers_are_named,
    nobody_brings_code,
    rules_hold,
    secure_logging_is_on,
    startup_is_signed,
    storage_is_inside,
    time_outs_are_finite,
    writable,
)
from clinifed.jobs.kit_flare import Outcome, flare_check
from clinifed.models.basis import read_basis
from clinifed.policy import POLICY_FOLDER, SitePolicy, find_policy
from clinifed.privacy.accountant import epsilon_of
from clinifed.privacy.ledger import Ledger
from clinifed.signing import public_key, read_signing_key

__all__ = ["CHECKS", "Preflight", "preflight"]

Check = Callable[[Kit], Iterator[str]]

_EVERY: tuple[Role, ...] = ("server", "site", "admin")
_BOTH: tuple[Role, ...] = ("server", "site")

# What is asserted, of which kits, and by what. A kit that fails one is still asked all the others.
CHECKS: dict[str, tuple[tuple[Role, ...], Check]] = {
    "FLARE 2.9 or later": (_EVERY, flare_is_recent),
    "startup files as they were signed": (_EVERY, startup_is_signed),
    "certificate of this root, and valid": (_EVERY, certificate_is_valid),
    "private key owner-only": (_EVERY, keys_are_private),
    "only known configuration files": (_EVERY, files_are_there),
    "class list, log streaming, release filter": (_BOTH, rules_hold),
    "nobody brings code or reads files": (_BOTH, nobody_brings_code),
    "restarting launcher and guards": (_BOTH, launchers_are_named),
    "secure logging": (_BOTH, secure_logging_is_on),
    "time-outs finite": (_EVERY, time_outs_are_finite),
    "storage inside the kit, and writable": (_BOTH, storage_is_inside),
}
FLARE_CHECK = "nvflare preflight-check"
_POLICY_CHECK = "policy, ledger, manifest, key, basis"


@dataclass(frozen=True)
class Preflight:
    """What was found of one kit."""

    kit: Path
    name: str
    role: Role
    checks: dict[str, tuple[str, ...]]  # check → its problems, none where it passed
    notes: tuple[str, ...]  # what an administrator should know, and need not mend
    certificate_expires: datetime

    @property
    def problems(self) -> tuple[str, ...]:
        """All of them, to be mended in one go; empty when the kit may be started."""
        return tuple(p for problems in self.checks.values() for p in problems)

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "kit": str(self.kit),
            "name": self.name,
            "role": self.role,
            "ok": not self.problems,
            "checks": {name: list(problems) for name, problems in self.checks.items()},
            "notes": list(self.notes),
            "certificate_expires": self.certificate_expires.isoformat(),
        }


def _site(kit: Kit, problems: list[str], notes: list[str]) -> None:
    """What only a site has: each of these is the hospital's own, so each is looked at though another is missing."""

    def attempt(what: Callable[[], str]) -> None:
        try:
            if note := what():
                notes.append(note)
        except ClinifedError as error:
            problems.extend(error.problems)

    try:
        policy = find_policy(kit.local, kit.name)
    except ClinifedError as error:
        problems.extend(error.problems)
        return
    path = kit.local / POLICY_FOLDER / f"{kit.name}.yaml"
    if not policy.approved_contracts:
        problems.append(f"{path}:approved_contracts: empty, so nothing may run; add the hash of the contract")
    if not policy.coordinators:
        problems.append(f"{path}:coordinators: empty, so nobody may submit; add the coordinator's name")
    notes.extend(f"approves contract {contract}" for contract in policy.approved_contracts)
    notes.extend(f"accepts jobs of {name}" for name in policy.coordinators)
    attempt(lambda: f"manifest: {len(read_manifest(policy.manifest).records)} images")
    attempt(lambda: _ledger(policy))
    if (basis := policy.basis) is not None:
        attempt(lambda: f"basis {read_basis(basis).sha256()}")
    attempt(lambda: f"signs as {public_key(read_signing_key(policy.signing_key))}")
    for key in ("ledger", "cache", "diary"):
        problems.extend(f"{path}:{key}: {problem}" for problem in writable(getattr(policy, key).parent))


def _ledger(policy: SitePolicy) -> str:
    state = Ledger.of(policy).state()
    left = state.budget_units - state.spent_units - state.reserved_units
    if left <= 0:
        raise ClinifedError(
            f"{policy.ledger}: epsilon {state.epsilon_spent:.4f} of {state.epsilon_budget:g} is spent or reserved; "
            "nothing is left for a job"
        )
    return (
        f"ledger: {state.records} records, head {state.head[:16]}; epsilon {state.epsilon_spent:.4f} of "
        f"{state.epsilon_budget:g} spent per patient, room for {epsilon_of(left, state.delta):.4f} on its own "
        f"(delta {state.delta:g}, add/remove)"
    )


def preflight(path: Path, *, flare: bool = True, patience_s: float = 75.0) -> Preflight:
    """Ask a kit everything at once, then let FLARE check it. Nothing is repaired.

    Args:
        path: the kit of a site, the server, or the coordinator.
        flare: whether to run FLARE's own check as well; it needs the server, except for the server's kit.
        patience_s: how long to wait for ports that a server stopped a moment ago still holds.

    Raises:
        ConfigError: it is no kit at all.
    """
    kit = read_kit(path)
    checks: dict[str, tuple[str, ...]] = {}
    for name, (roles, check) in CHECKS.items():
        if kit.role in roles:
            checks[name] = tuple(check(kit))
    notes: list[str] = []
    if kit.role == "site":
        problems: list[str] = []
        _site(kit, problems, notes)
        checks[_POLICY_CHECK] = tuple(problems)
    if flare:
        outcome: Outcome = flare_check(kit, patience_s)
        checks[FLARE_CHECK] = outcome.problems
        notes.append(f"{FLARE_CHECK}: {outcome.says}")
    notes.append(f"federation's root {kit.root_fingerprint}; compare it with the coordinator's")
    expires = kit.certificate.not_valid_after_utc
    notes.append(f"certificate valid until {expires:%Y-%m-%d}, {(expires - datetime.now(UTC)).days} days")
    return Preflight(kit.path, kit.name, kit.role, checks, tuple(notes), expires)
