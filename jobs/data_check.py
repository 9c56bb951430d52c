"""``clinifed data check``: what a site has, and whether it may and can take part, before anything is started.

Nothing is repaired and nothing is written but the reports that are asked for.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clinifed.contract import Contract
from clinifed.errors import ClinifedError, ConfigError, PrivacyError
from clinifed.jobs.data_checks_images import duplicates, files_used, kinds, leakage, unchanged
from clinifed.jobs.data_checks_labels import label_support, patient_bags
from clinifed.jobs.data_checks_machine import cache_room, gpu, memory, model_files, permissions
from clinifed.jobs.data_checks_names import names_in_rows
from clinifed.jobs.data_checks_privacy import budget_left, outlook
from clinifed.jobs.data_checks_share import WITHHELD
from clinifed.jobs.data_checks_site import Finding, Level, SiteUnderCheck
from clinifed.load import load_federation, read_yaml, validate
from clinifed.policy import SitePolicy

__all__ = ["CHECKS", "DataCheck", "SharedRow", "data_check", "site_under_check"]

Check = Callable[[SiteUnderCheck], Finding]

# What is asked, in the order of the table. A site that fails one is still asked all the others.
CHECKS: dict[str, Check] = {
    "files": files_used,
    "changed files": unchanged,
    "kinds of images": kinds,
    "labels": label_support,
    "patients": patient_bags,
    "duplicates": duplicates,
    "leakage": leakage,
    "names in the manifest": names_in_rows,
    "privacy outlook": outlook,
    "budget": budget_left,
    "base model": model_files,
    "embedding cache": cache_room,
    "memory": memory,
    "GPU": gpu,
    "permissions": permissions,
}
_SITE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")  # as in a federation's configuration
_LEAST_MINIMUM = 3
_SHORTEST_SECRET = 4  # characters; shorter ones stand in any text


@dataclass(frozen=True)
class SharedRow:
    """One check, as it may be told outside."""

    name: str
    level: Level | None  # None: kept at the site
    lines: tuple[str, ...]


@dataclass(frozen=True)
class DataCheck:
    """What was found of one site."""

    site: SiteUnderCheck
    findings: dict[str, Finding]

    @property
    def failed(self) -> tuple[str, ...]:
        """The checks that failed; empty when the site may take part."""
        return tuple(name for name, finding in self.findings.items() if finding.level == "FAIL")

    @property
    def verdict(self) -> Level:
        """The worst level."""
        levels = {finding.level for finding in self.findings.values()}
        return "FAIL" if "FAIL" in levels else "WARN" if "WARN" in levels else "PASS"

    def to_dict(self) -> dict[str, Any]:
        """All of it, for the site's own eyes."""
        return {
            "schema_version": 1,
            "site": self.site.name,
            "manifest": str(self.site.manifest_path),
            "verdict": self.verdict,
            "checks": {
                name: {"level": f.level, "says": list(f.says), "remedy": f.remedy} for name, f in self.findings.items()
            },
        }

    @property
    def public_name(self) -> str:
        """The site's name, if it is one that a federation could have."""
        return self.site.name if _SITE_NAME.fullmatch(self.site.name) else "a site"

    def shared(self) -> tuple[SharedRow, ...]:
        """What may leave the site: constant words, public terms, and counts in ranges as wide as the minimum.

        Guarantees:
            - No UID, path, file name, patient or row; no count below the minimum, nor what one could be computed from.

        Raises:
            PrivacyError: something of the site's images or rows would be in it; nothing is told.
        """
        rows = []
        for name, finding in self.findings.items():
            if finding.share is None:
                rows.append(SharedRow(name, None, ("kept at the site",)))
                continue
            lines = [*finding.share.words]
            for tree in finding.share.counts:
                lines += [f"{'  ' * line.depth}{line.title}: {line.text}" for line in tree.told(self.site.minimum)]
            rows.append(SharedRow(name, finding.level, tuple(lines)))
        _guard(self.site, rows)
        return tuple(rows)

    def shared_dict(self) -> dict[str, Any]:
        """:meth:`shared`, for JSON."""
        return {
            "schema_version": 1,
            "site": self.public_name,
            "minimum": self.site.minimum,
            "note": f"counts are ranges, <{self.site.minimum} or {WITHHELD}; rounded, not noised: no privacy claim",
            "checks": {row.name: {"level": row.level, "says": list(row.lines)} for row in self.shared()},
        }


def _guard(site: SiteUnderCheck, rows: Sequence[SharedRow]) -> None:
    """A second lock: nothing that stands in a row of the manifest or in a header may stand in the text."""
    text = "\n".join(line for row in rows for line in row.lines)
    words = set(re.findall(r"[^\s,;:]+", text))
    public = {*site.vocabulary, *(label for entry in site.vocabulary.values() for label in entry.labels)}
    if any(
        (secret in words or (" " in secret and secret in text))
        and len(secret) >= _SHORTEST_SECRET
        and secret not in public
        and not _COUNT.fullmatch(secret)
        for secret in _secrets(site)
    ):
        raise PrivacyError("the shareable report would hold text of the site's rows or images; it was not written")


def _secrets(site: SiteUnderCheck) -> Iterator[str]:
    """Everything of rows and headers that names an image or a person."""
    yield from (str(site.manifest_path), str(site.manifest_path.parent))
    try:
        looks = site.looks
    except ClinifedError:  # the manifest cannot be read, so that nothing of it was told
        return
    for look in looks:
        yield from (look.record.image, Path(look.record.image).name, look.record.patient, look.record.caption)
        for keyword, value in look.header.items():
            if keyword not in _TOLD_OF_HEADERS:
                yield value
                yield from re.split(r"[\^= \\]", value)


_TOLD_OF_HEADERS = ("Modality", "PhotometricInterpretation", "BurnedInAnnotation")  # by their defined terms alone
_COUNT = re.compile(r"\d{1,6}")  # a short number of a patient cannot be told from a count


def site_under_check(
    policy: Path | None = None,
    *,
    manifest: Path | None = None,
    federation: Path | None = None,
    overrides: Sequence[str] = (),
    contract: Path | None = None,
    name: str | None = None,
    sample: int | None = None,
    minimum: int = 10,
) -> SiteUnderCheck:
    """The site that the arguments name.

    Args:
        policy: the site's policy file.
        manifest: where there is no policy.
        federation: configuration whose specialties, model and privacy the site is held against.
        overrides: ``key=value`` settings of the federation.
        contract: file of the agreed contract, as JSON.
        name: of the site; default: the policy's, or the federation's site with this manifest, or its only one.
        sample: images to open; None opens all.
        minimum: the least count that may be told outside.

    Raises:
        ConfigError: with every problem of the arguments and files.
    """
    problems = []
    if (policy is None) == (manifest is None):
        problems.append("give either the site's policy file, or --manifest")
    if sample is not None and sample < 1:
        problems.append(f"--sample {sample}: at least one image")
    if minimum < _LEAST_MINIMUM:
        problems.append(f"--minimum {minimum}: groups below {_LEAST_MINIMUM} are always too small to tell of")
    if problems:
        raise ConfigError(*problems)
    read = None if policy is None else validate(SitePolicy, read_yaml(policy), str(policy))
    configured = None if federation is None else load_federation(federation, overrides)
    try:
        agreed = None if contract is None else Contract.read(contract.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{contract}: cannot be read ({type(error).__name__})") from error
    path = manifest if read is None else read.manifest
    assert path is not None
    name = name or (read.site if read else None)
    if configured is not None and name is None:
        here = [site for site, entry in configured.sites.items() if entry.manifest == path.resolve()]
        name = next(iter(here or (configured.sites if len(configured.sites) == 1 else ())), None)
    for what, sites in (("federation", configured and configured.sites), ("contract", agreed and agreed.sites)):
        if sites and name is not None and name not in sites:
            problems.append(f"site {name!r} is none of the {what}'s: {', '.join(sorted(sites))}; say --site NAME")
    if problems:
        raise ConfigError(*problems)
    return SiteUnderCheck(path, read, policy, configured, name or "", agreed, sample, minimum)


def data_check(site: SiteUnderCheck, progress: Callable[[str], None] = lambda text: None) -> DataCheck:
    """Ask a site everything at once. A check that cannot be made has failed."""
    findings = {}
    for name, check in CHECKS.items():
        progress(f"checking {name}")
        try:
            findings[name] = check(site)
        except ClinifedError as error:
            findings[name] = Finding("FAIL", tuple(error.problems), "mend this first; other checks need it")
        except OSError as error:
            findings[name] = Finding("FAIL", (f"{type(error).__name__}: {error.strerror}",), "see the file system")
    return DataCheck(site, findings)
