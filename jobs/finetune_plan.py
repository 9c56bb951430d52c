"""Before a fine-tuning: a federation of one site, that site's policy and data, and what epochs are chosen by."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from clinifed.config import Federation
from clinifed.contract import Contract
from clinifed.data.manifest import Manifest, read_manifest, without_patients
from clinifed.errors import ConfigError, DataError
from clinifed.jobs.basis import basis_file
from clinifed.jobs.prepare import make_site_keys, prepare_data, prepare_public, site_policies
from clinifed.load import validate
from clinifed.policy import SitePolicy
from clinifed.privacy.withdrawn import Withdrawn
from clinifed.signing import public_key, read_signing_key

__all__ = [
    "LOCAL",
    "PreparedSite",
    "Validation",
    "ValidationSet",
    "choose_validation",
    "prepare_site",
    "single_site",
    "site_keys",
    "with_site_basis",
]

LOCAL: Final = "local"  # who submits a job that the site runs by itself; its policy names it among the coordinators
_DATA = "data"  # beneath the run: what was synthesized or indexed
Validation = Literal["public", "holdout", "none"]


def single_site(
    federation: Federation,
    site: str,
    specialties: Sequence[str],
    epochs: int | None,
    learning_rate: float | None,
    batch_size: int | None,
) -> Federation:
    """``federation`` as one site of some of its specialties sees it alone: its rounds are epochs of one step.

    Raises:
        ConfigError: there is no such site, it has no such specialty, or a number is out of its range.
    """
    if site not in federation.sites:
        near = difflib.get_close_matches(site, federation.sites, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(federation.sites)}"
        raise ConfigError(f"--site {site!r}: the configuration has no such site; {hint}")
    offered = federation.sites[site].specialties
    if unknown := [name for name in specialties if name not in offered] or ([] if specialties else ["none"]):
        raise ConfigError(f"--specialty {', '.join(unknown)}: site {site} offers {', '.join(offered)}")
    content = federation.model_dump()
    steps = federation.rounds * federation.training.local_epochs
    changes = {"learning_rate": learning_rate, "batch_size": batch_size}
    content["training"] |= {"local_epochs": 1, **{key: value for key, value in changes.items() if value is not None}}
    content["aggregation"] |= {"quorum": 1, "rule": "fedavg", "weights": "equal", "min_sites_per_head": 1}
    content |= {
        "rounds": steps if epochs is None else epochs,
        "min_clients": 1,
        "max_clients": 1,
        "sites": {site: {**content["sites"][site], "specialties": tuple(dict.fromkeys(specialties))}},
    }
    return validate(Federation, content, "finetune")


@dataclass(frozen=True)
class PreparedSite:
    """One site, ready to train."""

    policy: SitePolicy
    manifest: Manifest  # the site's
    validation: Manifest | None  # public
    test: Manifest | None  # public


@dataclass(frozen=True)
class ValidationSet:
    """What epochs are chosen by."""

    kind: Validation
    manifest: Manifest | None  # None with kind "none"

    @property
    def split(self) -> str | None:
        """Of the manifest."""
        return "holdout" if self.kind == "holdout" else None


def site_keys(plan: Federation, out: Path, policy: SitePolicy | None) -> dict[str, str]:
    """The public half of the site's signing key: of its policy, or made in the run."""
    if policy is None:
        return make_site_keys(plan, out)
    return {name: public_key(read_signing_key(policy.signing_key)) for name in plan.sites}


def with_site_basis(federation: Federation, policy: SitePolicy | None) -> Federation:
    """``federation`` with the basis that the site's own policy names, where its heads train in one."""
    if policy is None or policy.basis is None or federation.training.basis == "none":
        return federation
    return federation.model_copy(update={"model": federation.model.model_copy(update={"basis": policy.basis})})


def prepare_site(
    federation: Federation,
    plan: Federation,
    contract: Contract,
    out: Path,
    policy: SitePolicy | None,
    progress: Callable[[str], None],
) -> PreparedSite:
    """Make or read what a fine-tuning needs.

    Args:
        federation: the whole one, for public sets and synthetic hospitals.
        plan: of the one site.
        policy: the site's own; None: made of the configuration, as in a simulation.

    Raises:
        ConfigError: the policy is another site's.
        DataError, LedgerError: as :func:`clinifed.jobs.prepare.prepare_data` and ``site_policies``.
    """
    (site,) = plan.sites
    basis = basis_file(federation, out)  # the contract, which the policy permits by its hash, names it by its own
    if policy is not None:
        if policy.site != site:
            raise ConfigError(f"--policy: it is the policy of site {policy.site!r}, not of {site!r}")
        public = prepare_public(federation, out / _DATA, progress)
        policy = policy.model_copy(update={"basis": basis})
        return PreparedSite(policy, read_manifest(policy.manifest), public.validation, public.test)
    # The site with all its specialties: its manifest is the federation's, whatever is fine-tuned.
    alone = federation.model_copy(update={"sites": {site: federation.sites[site]}})
    data = prepare_data(alone, out / _DATA, progress, federation)
    made = site_policies(plan, data, out, contract, (LOCAL,), basis)[site]
    return PreparedSite(made, data.sites[site], data.validation, data.test)


def choose_validation(prepared: PreparedSite, plan: Federation, wanted: Validation | None) -> ValidationSet:
    """The validation set: what was asked for, or the public one, or the site's own holdout with privacy off, or none.

    Raises:
        DataError: what was asked for is not there, or lacks a specialty.
    """
    (site,) = plan.sites.values()
    names = set(site.specialties)
    own = without_patients(prepared.manifest, Withdrawn.of(prepared.policy).patients())

    def lacking(manifest: Manifest | None, split: str | None) -> set[str]:
        records = manifest.records if manifest is not None else ()
        return names - {record.specialty for record in records if split in (None, record.split)}

    sets = {"public": (prepared.validation, lacking(prepared.validation, None))}
    if plan.privacy.mode == "off":
        sets["holdout"] = (own, lacking(own, "holdout"))
    if wanted == "none":
        return ValidationSet("none", None)
    if wanted is not None and sets[wanted][1]:
        raise DataError(
            f"validation {wanted!r}: no image of {', '.join(sorted(sets[wanted][1]))} there; give data.public, or "
            "index the site with --holdout, or say validation 'none'"
        )
    for kind, (manifest, missing) in sets.items():
        if wanted in (None, kind) and not missing:
            return ValidationSet("holdout" if kind == "holdout" else "public", manifest)
    return ValidationSet("none", None)
