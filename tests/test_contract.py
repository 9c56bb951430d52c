"""The contract: what it says arrives as it was said, by every way that it takes."""

import io
import json

import pytest

from clinifed.config import Federation, Specialty
from clinifed.contract import Contract
from clinifed.errors import ConfigError
from clinifed.executors.frames import read_frame, write_frame
from clinifed.load import validate

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


def test_how_many_slices_stand_for_a_volume_is_agreed_and_a_contract_from_before_takes_what_it_took(contract):
    content = json.loads(contract.text())
    name = next(iter(content["specialties"]))
    assert content["specialties"][name].pop("frames") is None
    assert Contract.read(json.dumps(content)) == contract
    content["specialties"][name]["frames"] = 5
    assert Contract.read(json.dumps(content)).sha256() != contract.sha256()
    for senseless in (0, 65, "five", 2.5):
        content["specialties"][name]["frames"] = senseless
        with pytest.raises(ConfigError, match="frames"):
            Contract.read(json.dumps(content))


def test_a_label_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        Specialty.model_validate({"labels": [["a", ["x"]], ["b", ["y"]], ["a", ["z"]]]})


@pytest.mark.parametrize("text", ["", "{}", "null", "no contract"])
def test_what_is_no_contract_is_refused_with_what_is_wrong(text):
    with pytest.raises(ConfigError, match="the job's contract"):
        Contract.read(text)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"min_clients": 3}, r"quorum \(1\) <= min_clients \(3\) <= sites \(1\)"),
        ({"max_clients": 0}, r"sites \(1\) <= max_clients \(0\)"),
        ({"min_clients": 0}, "min_clients"),
        ({"rounds": 0}, "rounds"),
        ({"schema_version": 2}, "schema_version"),
        ({"strange": 1}, "strange: unknown key"),
    ],
)
def test_limits_that_cannot_hold_are_refused(contract, changes, said):
    content = {**contract.model_dump(mode="json"), **changes}
    with pytest.raises(ConfigError, match=said):
        Contract.read(json.dumps(content))


def test_a_quorum_above_min_clients_is_refused(contract):
    content = contract.model_dump(mode="json")
    content["aggregation"]["quorum"] = 2
    with pytest.raises(ConfigError, match=r"quorum \(2\) <= min_clients \(1\)"):
        Contract.read(json.dumps(content))


@pytest.mark.parametrize("bound", [0, -1, "NaN", "Infinity", None])
def test_a_bound_that_bounds_nothing_is_refused(contract, bound):
    text = contract.text().replace('"norm_bound":100.0', f'"norm_bound":{json.dumps(bound).strip(chr(34))}')
    assert text != contract.text()
    with pytest.raises(ConfigError, match=r"sites\.alder\.norm_bound"):
        Contract.read(text)


FEDERATION = {
    "name": "unit",
    "rounds": 2,
    "min_clients": 1,
    "max_clients": 3,
    "aggregation": {"quorum": 1, "round_timeout_s": 60},
    "data": {"synthesize": {}},
    "sites": {"alder": {"specialties": ["radiology"]}, "birch": {"specialties": ["radiology"]}},
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"aggregation": {"quorum": 2, "round_timeout_s": 60}}, r"aggregation\.quorum \(2\) is more than min_clients"),
        ({"aggregation": {"round_timeout_s": 60}}, r"aggregation\.quorum: missing"),
        ({"aggregation": {"quorum": 1}}, r"aggregation\.round_timeout_s: missing"),
        ({"aggregation": {"quorum": 1, "round_timeout_s": 0}}, r"aggregation\.round_timeout_s"),
        ({"aggregation": {"quorum": 1, "round_timeout_s": 10**9}}, r"aggregation\.round_timeout_s"),
        ({"aggregation": {"quorum": 1, "round_timeout_s": 60, "grace_s": -1}}, r"aggregation\.grace_s"),
        ({"aggregation": {"quorum": 1, "round_timeout_s": 60, "start_timeout_s": 0}}, r"start_timeout_s"),
        ({"min_clients": 3}, "2 sites, but min_clients is 3"),
        ({"privacy": "off"}, r"aggregation\.norm_bound: missing"),
        ({"privacy": {"reserve_rounds": -1}}, r"privacy\.reserve_rounds"),
        ({"deployment": {"rounds_per_job": 0}}, r"deployment\.rounds_per_job"),
        ({"deployment": {"coordinator": "nobody"}}, r"deployment\.coordinator"),
        ({"deployment": {"port": 70_000}}, r"deployment\.port"),
        ({"sites": {"server": {"specialties": ["radiology"]}}}, "'server' is reserved"),
        ({"sites": {"alder": {"specialties": ["radiology"], "public_key": "x"}}}, r"sites\.alder\.public_key"),
    ],
)
def test_a_federation_whose_rounds_could_never_count_or_end_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        validate(Federation, {**FEDERATION, **changes}, "unit.yaml")


def test_a_federation_at_its_limits_is_taken():
    validate(Federation, {**FEDERATION, "min_clients": 2, "max_clients": 2}, "unit.yaml")
    settings = {"quorum": 2, "round_timeout_s": 5, "grace_s": 0, "start_timeout_s": 5}
    validate(Federation, {**FEDERATION, "min_clients": 2, "aggregation": settings}, "unit.yaml")
