"""``clinifed privacy touched``: a patient withdraws consent; which releases and models did the data go into?

What left was noised and cannot be called back. What the site derived and keeps can: the embeddings.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clinifed.data.index import patient_pseudonym
from clinifed.data.manifest import read_manifest, site_key
from clinifed.errors import DataError
from clinifed.executors.features import file_content
from clinifed.load import read_yaml, validate
from clinifed.models.shards import keep_only
from clinifed.policy import SitePolicy
from clinifed.privacy.cohorts import Cohorts, Touched, touched
from clinifed.privacy.ledger import read_ledger
from clinifed.privacy.withdrawn import Withdrawn
from clinifed.signing import read_signing_key

__all__ = ["Forgotten", "touched_by", "withdraw"]


@dataclass(frozen=True)
class Forgotten:
    """What :func:`withdraw` did, and what is left to do."""

    rows: int  # of embeddings that were dropped: the patient's, and of images that are in no manifest any more
    shards: int  # dropped whole, since nobody can say whose rows they held
    listed: int  # images of the patient that the manifest still names; no training reads them


def _asked(patient_id: str, policy_file: Path, issuer: str) -> tuple[SitePolicy, str]:
    """The site's policy, and its pseudonym for the patient."""
    policy = validate(SitePolicy, read_yaml(policy_file), str(policy_file))
    if not patient_id.strip():
        raise DataError("no PatientID on standard input")
    return policy, patient_pseudonym(site_key(policy.manifest.parent), issuer, patient_id)


def withdraw(patient_id: str, policy_file: Path, issuer: str = "") -> Forgotten:
    """Leave a patient out of all later training, and drop what the site's embedding cache holds of them.

    Rows stay that are of the manifest's other patients; all others go, so that it does not matter whether the patient's
    files were removed and indexed anew before or after.

    Args:
        patient_id, policy_file, issuer: as for :func:`touched_by`.

    Guarantees:
        - The patient stands on the site's list first: whatever fails afterwards, no later training reads them.
        - No row of an image of this patient remains in the cache, whatever model or version made it.

    Raises:
        DataError: no patient was named, the manifest cannot be read, or something could not be removed.
    """
    policy, patient = _asked(patient_id, policy_file, issuer)
    Withdrawn.of(policy).add(patient)
    manifest = read_manifest(policy.manifest)
    contents: dict[bool, set[str]] = {True: set(), False: set()}
    for record in manifest.records:
        content = record.sha256 or file_content(manifest.folder / record.image)
        if content is not None:
            contents[record.patient == patient].add(content)
    dropped = keep_only(policy.cache, contents[False] - contents[True])
    return Forgotten(dropped.rows, dropped.shards, sum(record.patient == patient for record in manifest.records))


def touched_by(patient_id: str, policy_file: Path, issuer: str = "", cards: Sequence[Path] = ()) -> list[Touched]:
    """The jobs, rounds and releases that the patient's data touched, and which of ``cards`` they went into.

    Args:
        patient_id: PatientID as in the site's records; it is hashed with the site's key, and shown nowhere.
        policy_file: the site's policy, which says where manifest, ledger and keys are.
        issuer: IssuerOfPatientID, where the records have one.
        cards: ``card.json`` of checkpoints, each of which names its job.

    Raises:
        DataError: no patient was named, or a card cannot be read.
        LedgerError: the ledger, or a cohort's list, is missing or damaged.
    """
    policy, patient = _asked(patient_id, policy_file, issuer)
    contents = {}
    for path in cards:
        try:
            contents[str(path)] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a checkpoint's card ({type(error).__name__})") from None
    _, account, more = read_ledger(policy.ledger, policy.anchor)
    cohorts = Cohorts(policy.cohorts_folder, read_signing_key(policy.signing_key))
    return touched(patient, account, more["records"], cohorts, contents)
