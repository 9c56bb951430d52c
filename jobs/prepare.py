"""Before a run: make or index the data, look at every site at once, and write what each site's FLARE folder needs."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from clinifed.config import DataClass, Federation, FolderIndex
from clinifed.contract import Contract
from clinifed.data.index import index_folder
from clinifed.data.manifest import Manifest, read_manifest
from clinifed.data.synthesize import synthesize
from clinifed.errors import ClinifedError, DataError, LedgerError
from clinifed.executors.filters import privacy_scope
from clinifed.files import write_atomic, write_json
from clinifed.jobs.kit import job_rules
from clinifed.policy import POLICY_FOLDER, Budget, SitePolicy
from clinifed.privacy.ledger import Ledger
from clinifed.signing import make_signing_key, public_key, read_signing_key

__all__ = [
    "PreparedData",
    "make_site_keys",
    "prepare_data",
    "prepare_public",
    "site_policies",
    "write_policy",
    "write_site_folder",
]

log = logging.getLogger(__name__)

_KEY = "signing.key"


@dataclass(frozen=True)
class PreparedData:
    """Manifests of a run, all readable."""

    sites: dict[str, Manifest]
    validation: Manifest | None
    test: Manifest | None


def _index(index: FolderIndex, out: Path, specialties: tuple[str, ...], data_class: DataClass) -> Path:
    """Index a folder into ``out/manifest.csv`` unless it is there."""
    path = out / "manifest.csv"
    if not path.exists():
        report = index_folder(index, path, specialties, data_class)
        if report.skipped:
            log.warning("%s: files left out: %s", out.name, dict(report.skipped))
    return path


def prepare_public(federation: Federation, folder: Path, progress: Callable[[str], None]) -> PreparedData:
    """The public sets alone, for a coordinator: what the sites hold is the sites' own."""
    return prepare_data(federation.model_copy(update={"sites": {}}), folder, progress, federation)


def prepare_data(
    federation: Federation, folder: Path, progress: Callable[[str], None], whole: Federation | None = None
) -> PreparedData:
    """Make or index what is absent under ``folder``, and read every manifest.

    Args:
        whole: the federation, where ``federation`` holds only some of its sites.

    Raises:
        DataError: with the problems of all sites and public sets at once.
    """
    plan, sites = federation.data, (whole or federation).sites
    every = tuple(sorted({n for s in sites.values() for n in s.specialties}))
    paths: dict[str, Path] = {}
    if plan.synthesize is not None:
        if not folder.exists():
            progress(f"synthesizing hospitals (seed {plan.synthesize.seed})")
            synthesize(plan.synthesize, {n: s.specialties for n, s in sites.items()}, folder)
        for name in [*federation.sites, "public/validation", "public/test"]:
            here = folder / name
            index = FolderIndex(folder=here, labels=(here / "labels.csv",), split="train")
            site = federation.sites.get(name)
            paths[name] = _index(index, here, site.specialties if site else every, "synthetic")
    problems: list[str] = []

    def attempt(name: str, index: FolderIndex, specialties: tuple[str, ...], data_class: DataClass) -> None:
        progress(f"indexing {name}")
        try:
            paths[name] = _index(index, folder / name, specialties, data_class)
        except ClinifedError as error:
            problems.extend(f"{name}: {p}" for p in error.problems)

    for name, site in federation.sites.items():
        if site.manifest is not None:
            paths[name] = site.manifest
        elif site.index is not None:
            attempt(name, site.index, site.specialties, site.data_class)
        elif plan.synthesize is None:
            problems.append(f"sites.{name}: no data; give manifest, index, or data.synthesize for all sites")
    for which, index in (plan.public_index or {}).items():
        attempt(f"public/{which}", index, every, "public")
    if plan.public is not None:
        paths |= {"public/validation": plan.public.validation, "public/test": plan.public.test}

    manifests: dict[str, Manifest] = {}
    for name, path in paths.items():
        try:
            manifests[name] = read_manifest(path)
        except ClinifedError as error:
            problems.extend(f"{name}: {p}" for p in error.problems)
    for name, site in federation.sites.items():
        if name in manifests:
            records = [r for r in manifests[name].records if r.split == "train"]
            problems.extend(
                f"{name}: declares {wanted}, but {manifests[name].path} has no training image of it; remove it from "
                f"sites.{name}.specialties or add images"
                for wanted in sorted(set(site.specialties) - {r.specialty for r in records})
            )
    problems += _shared_images(manifests, sorted(federation.sites))
    if problems:
        raise DataError(*problems)
    return PreparedData(
        sites={name: manifests[name] for name in sorted(federation.sites)},
        validation=manifests.get("public/validation"),
        test=manifests.get("public/test"),
    )


def _shared_images(manifests: dict[str, Manifest], sites: list[str]) -> list[str]:
    """What would make a figure of the public test set too good: its images among those that something is learned from.

    By the images' hashes, so of files that are the same; images without a hash count as different.
    """
    if "public/test" not in manifests:
        return []
    test = {record.sha256 for record in manifests["public/test"].records if record.sha256}
    problems = []
    for name in ("public/validation", *sites):
        if name not in manifests:
            continue
        learned = {r.sha256 for r in manifests[name].records if name not in sites or r.split == "train"}
        if shared := len(learned & test):
            problems.append(
                f"{name}: {shared} of its images are in the public test set {manifests['public/test'].path} as well; "
                "figures are told of images that nothing was learned from: remove them from one of the two"
            )
    return problems


def _home(run: Path, site: str) -> Path:
    """What a simulated site keeps for itself."""
    home = run / "sites" / site
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    return home


def make_site_keys(federation: Federation, run: Path) -> dict[str, str]:
    """A signing key for each simulated site, made where there is none; returns the public halves for the contract."""
    keys = {}
    for name in federation.sites:
        path = _home(run, name) / _KEY
        keys[name] = public_key(read_signing_key(path) if path.exists() else make_signing_key(path))
    return keys


def site_policies(
    federation: Federation,
    data: PreparedData,
    run: Path,
    contract: Contract,
    coordinators: tuple[str, ...],
    basis: Path | None = None,
) -> dict[str, SitePolicy]:
    """The policies of sites that this machine plays, from the federation's configuration, and their ledgers.

    Args:
        basis: the file of the public basis, where the heads train in one.

    Raises:
        LedgerError: the ledger of a hospital's data is not there; its steward makes it, once, for its lifetime.
    """
    policies, missing = {}, []
    for name, manifest in data.sites.items():
        home, site = _home(run, name), federation.sites[name]
        policy = policies[name] = SitePolicy(
            site=name,
            manifest=manifest.path,
            ledger=site.ledger or home / "ledger.jsonl",
            outbox=home / "outbox",
            signing_key=home / _KEY,
            cache=home / "cache",
            diary=home / "diary.jsonl",
            budget=Budget(epsilon=site.budget_epsilon or federation.privacy.epsilon, delta=federation.privacy.delta),
            min_nominal_patients=1,
            approved_contracts=(contract.sha256(),),
            coordinators=coordinators,
            declare=site.declare,
            permit_privacy_off=federation.privacy.mode == "off",
            basis=basis,
            threads=1,  # the sites share the machine's cores
        )
        ledger = Ledger.of(policy)
        if contract.promise.mode == "off" or ledger.chain.path.exists() or ledger.chain.anchor.exists():
            continue
        if site.ledger is not None and manifest.data_class == "hospital":
            missing.append(
                f"sites.{name}.ledger: {site.ledger} is not there; the data is a hospital's, so its steward makes it, "
                f"once: `clinifed privacy ledger init {site.ledger} --site {name} --epsilon E --delta D`"
            )
        else:
            ledger.create()
    if missing:
        raise LedgerError(*missing)
    return policies


def write_site_folder(local: Path, policies: dict[str, SitePolicy], contract: Contract) -> None:
    """Write a FLARE folder ``local``: class allow-list, privacy scope, and the policies of the sites that live there.

    In a simulation all sites share one such folder; a real site has its own.
    """
    local.mkdir(parents=True, exist_ok=True)
    write_json(local / "resources.json", job_rules("site", "server"))
    write_json(local / "privacy.json", privacy_scope())
    for name, policy in policies.items():
        if name in contract.sites:
            write_policy(local, policy)


def write_policy(local: Path, policy: SitePolicy) -> None:
    """Write ``policy`` where its site's FLARE folder ``local`` has it."""
    (local / POLICY_FOLDER).mkdir(exist_ok=True)
    text = yaml.safe_dump(policy.model_dump(mode="json"), sort_keys=False)
    write_atomic(local / POLICY_FOLDER / f"{policy.site}.yaml", text.encode(), 0o600)
