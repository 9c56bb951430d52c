"""The handshake: a site agrees letter by letter, or takes no part, and the text says on what both sides stand."""

import numpy as np
import pytest

from clinifed.aggregators.handshake import disagreements

KEYS = ("contract_sha256", "clinifed_version", "base_model_sha256")


@pytest.fixture
def same(contract):
    return dict(zip(KEYS, (contract.sha256(), contract.clinifed_version, contract.base_model.sha256), strict=True))


class Agreeable(str):
    """Says of itself that it equals everything."""

    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False

    __hash__ = str.__hash__


def test_a_site_with_the_same_three_agrees(contract, same):
    assert disagreements(same, contract) == ("", "")


@pytest.mark.parametrize("key", KEYS)
def test_each_of_the_three_is_the_reason_with_the_values_of_both_sides(contract, same, key):
    reason, text = disagreements({**same, key: "other-value"}, contract)
    assert reason == f"other_{key}"
    assert text == f"{key} is 'other-value' there, {same[key]!r} here"


def test_all_that_differs_is_told_at_once(contract):
    reason, text = disagreements(dict.fromkeys(KEYS, "x"), contract)
    assert reason == "other_contract_sha256"
    assert [part.split()[0] for part in text.split("; ")] == list(KEYS)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("change", [str.upper, lambda v: f"{v} ", lambda v: v[:-1], lambda v: None, Agreeable])
def test_a_site_agrees_only_letter_by_letter(contract, same, key, change):
    if change is str.upper:
        same = {**same, key: f"{same[key]}f"}  # a letter that has a case
        reason, _ = disagreements({**same, key: same[key].upper()}, contract)
    else:
        reason, _ = disagreements({**same, key: change(same[key])}, contract)
    assert reason == f"other_{key}"


@pytest.mark.parametrize("key", KEYS)
def test_a_word_that_is_missing_is_no_agreement(contract, same, key):
    del same[key]
    assert disagreements(same, contract)[0] == f"other_{key}"


@pytest.mark.parametrize("told", [None, [], "contract", 7, np.ones(3)])
def test_what_is_no_handshake_is_refused(contract, told):
    assert disagreements(told, contract) == ("wrong_handshake", f"it answered {type(told).__name__}")


@pytest.mark.parametrize("word", ["x" * 10**6, "\n" * 500, np.ones(5000), ["x"] * 10**5, {"x": "y" * 10**5}])
def test_a_long_or_hostile_word_is_cut_and_stays_on_its_line(contract, same, word):
    reason, text = disagreements({**same, "clinifed_version": word}, contract)
    assert reason == "other_clinifed_version"
    assert len(text) < 300
    assert "\n" not in text
