"""A site's policy: found in its own folder, whole, and for that site only; otherwise nothing runs."""

from pathlib import Path

import pytest
import yaml

from clinifed.errors import PrivacyError
from clinifed.policy import find_policy

POLICY = {
    "site": "alder",
    "manifest": "/data/manifest.csv",
    "ledger": "/safe/ledger.jsonl",
    "signing_key": "/safe/signing.key",
    "cache": "/data/cache",
    "diary": "/data/diary.jsonl",
    "budget": {"epsilon": 1.0, "delta": 1e-5},
}


def write(tmp_path: Path, **changes: object) -> Path:
    (tmp_path / "clinifed").mkdir()
    (tmp_path / "clinifed" / "alder.yaml").write_text(yaml.safe_dump({**POLICY, **changes}))
    return tmp_path


def test_a_policy_is_read_as_it_stands(tmp_path: Path) -> None:
    policy = find_policy(write(tmp_path), "alder")
    assert (policy.budget.epsilon, policy.permit_privacy_off) == (1.0, False)


def test_what_a_policy_does_not_name_it_does_not_permit(tmp_path: Path) -> None:
    policy = find_policy(write(tmp_path), "alder")
    assert (policy.approved_contracts, policy.coordinators, policy.declare, policy.officers) == ((), (), (), {})


def test_what_belongs_to_the_ledger_lies_beside_it(tmp_path: Path) -> None:
    policy = find_policy(write(tmp_path), "alder")
    assert str(policy.outbox_folder) == "/safe/ledger.jsonl.outbox"
    assert str(policy.cohorts_folder) == "/safe/ledger.jsonl.cohorts"


def test_without_a_policy_nothing_runs(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="without one, nothing may run"):
        find_policy(tmp_path, "alder")


def test_another_sites_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="'birch', but this is 'alder'"):
        find_policy(write(tmp_path, site="birch"), "alder")


@pytest.mark.parametrize(
    "change", [{"budget": {"epsilon": 0, "delta": 1e-5}}, {"budgett": 1}, {"ledger": None}, {"declare": ["paths"]}]
)
def test_a_damaged_policy_is_refused_with_its_place(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(PrivacyError, match=r"alder\.yaml"):
        find_policy(write(tmp_path, **change), "alder")
