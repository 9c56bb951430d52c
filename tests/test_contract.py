"""The contract: what it says arrives as it was said, by every way that it takes."""

import io

import pytest

from clinifed.config import Specialty
from clinifed.contract import Contract
from clinifed.errors import ConfigError
from clinifed.executors.frames import read_frame, write_frame

LABELS = {"normal": ["a normal chest"], "abnormal": ["an opacity"], "mass": ["a mass"]}


def turned(contract: Contract) -> Contract:
    """The same contract with its labels in another order."""
    specialty = Specialty.model_validate({"labels": dict(reversed(LABELS.items()))})
    return contract.model_copy(update={"specialties": {"radiology": specialty}})


@pytest.fixture
def contract(make_contract) -> Contract:
    made: Contract = make_contract({"alder": ["radiology"]})
    return made.model_copy(update={"specialties": {"radiology": Specialty.model_validate({"labels": LABELS})}})


def by_text(contract: Contract) -> Contract:
    return Contract.read(contract.text())


def by_frame(contract: Contract) -> Contract:
    sent = io.BytesIO()
    write_frame(sent.write, {"contract": contract.model_dump(mode="json")})
    sent.seek(0)
    frame = read_frame(sent.read)
    assert frame is not None
    return Contract.model_validate(frame.header["contract"])


@pytest.mark.parametrize("way", [by_text, by_frame])
def test_the_order_of_the_labels_which_is_that_of_the_logits_arrives_as_it_was(contract, way):
    arrived = way(contract)
    assert arrived == contract
    assert list(arrived.specialties["radiology"].labels) == list(LABELS)
    assert arrived.sha256() == contract.sha256()


def test_another_order_of_the_labels_is_another_contract(contract):
    assert turned(contract).sha256() != contract.sha256()


def test_a_label_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        Specialty.model_validate({"labels": [["a", ["x"]], ["b", ["y"]], ["a", ["z"]]]})


@pytest.mark.parametrize("text", ["", "{}", "null", "no contract"])
def test_what_is_no_contract_is_refused_with_what_is_wrong(text):
    with pytest.raises(ConfigError, match="the job's contract"):
        Contract.read(text)
