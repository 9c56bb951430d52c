"""``clinifed privacy touched``: a patient withdraws consent; which releases and models did the data go into?"""

import json
from collections.abc import Sequence
from pathlib import Path

from clinifed.data.index import patient_pseudonym
from clinifed.data.manifest import site_key
from clinifed.errors import DataError
from clinifed.load import read_yaml, validate
from clinifed.policy import SitePolicy
from clinifed.privacy.cohorts import Cohorts, Touched, touched
from clinifed.privacy.ledger import read_ledger
from clinifed.privacy.withdrawn import Withdrawn
from clinifed.signing import read_signing_key

__all__ = ["touched_by"]


def touched_by(
    patient_id: str, policy_file: Path, issuer: str = "", cards: Sequence[Path] = (), *, withdraw: bool = False
) -> list[Touched]:
    """The jobs, rounds and releases that the patient's data touched, and which of ``cards`` they went into.

    Args:
        patient_id: PatientID as in the site's records; it is hashed with the site's key, and shown nowhere.
        policy_file: the site's policy, which says where manifest, ledger and keys are.
        issuer: IssuerOfPatientID, where the records have one.
        cards: ``card.json`` of checkpoints, each of which names its job.
        withdraw: put the patient on the site's list of those who withdrew, whom no training reads from then on.

    Raises:
        DataError: no patient was named, or a card cannot be read.
        LedgerError: the ledger, or a cohort's list, is missing or damaged.
    """
    policy = validate(SitePolicy, read_yaml(policy_file), str(policy_file))
    if not patient_id.strip():
        raise DataError("no PatientID on standard input")
    contents = {}
    for path in cards:
        try:
            contents[str(path)] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a checkpoint's card ({type(error).__name__})") from None
    patient = patient_pseudonym(site_key(policy.manifest.parent), issuer, patient_id)
    if withdraw:  # first: whatever else is damaged, the patient's data is used no more
        Withdrawn.of(policy).add(patient)
    _, account, more = read_ledger(policy.ledger, policy.anchor)
    cohorts = Cohorts(policy.cohorts_folder, read_signing_key(policy.signing_key))
    return touched(patient, account, more["records"], cohorts, contents)
