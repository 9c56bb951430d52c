"""The mean of the last models: of those rounds and no other, whatever was killed in between."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from clinifed.aggregators.averaging import first_averaged
from clinifed.aggregators.run_state import STATE_FILE, RunState
from clinifed.contract import Contract
from clinifed.errors import FederationError
from clinifed.files import file_sha256

ROUNDS = 7
Make = Callable[[float], Contract]


@pytest.fixture(scope="module")
def make(make_contract: Callable[..., Contract]) -> Make:
    contract = make_contract({"alder": ["radiology"], "birch": ["radiology"]}).model_copy(update={"rounds": ROUNDS})

    def with_share(share: float) -> Contract:
        aggregation = contract.aggregation.model_copy(update={"average_last": share})
        return contract.model_copy(update={"aggregation": aggregation})

    return with_share


def delta(contract: Contract, number: int) -> dict[str, np.ndarray]:
    dice = np.random.default_rng(number)
    return {name: dice.normal(size=shape).astype(np.float32) for name, shape in contract.shapes.items()}


def commit(state: RunState, number: int) -> None:
    state.commit(number, delta(state.contract, number), {}, {"round": number, "counted": True, "nonces": {}})


def mean_of(contract: Contract, rounds: range) -> dict[str, np.ndarray]:
    deltas = [delta(contract, number) for number in rounds]
    return {n: np.mean([d[n] for d in deltas], axis=0, dtype=np.float64).astype(np.float32) for n in contract.shapes}


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(
        v.dtype == np.float32 and np.allclose(v, expected[n], rtol=0, atol=1e-7) for n, v in found.items()
    )


@pytest.mark.parametrize(
    ("rounds", "share", "first"), [(20, 0.5, 10), (7, 0.5, 3), (10, 0.7, 3), (10, 1, 0), (10, 0, 10), (1, 0.01, 0)]
)
def test_the_last_share_of_the_rounds_is_averaged(rounds: int, share: float, first: int) -> None:
    assert first_averaged(rounds, share) == first


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_the_model_is_the_mean_of_the_deltas_after_the_last_rounds_whenever_processes_were_killed(
    share: float, make: Make, tmp_path: Path
) -> None:
    contract = make(share)
    first = first_averaged(ROUNDS, share)
    whole = RunState(tmp_path / "whole", "run", contract)
    for number in range(ROUNDS):
        commit(whole, number)
        commit(RunState(tmp_path / "parts", "run", contract), number)  # a process for each round
        for state in (whole, RunState(tmp_path / "parts", "run", contract)):
            begun = range(first, number + 1)
            assert same(state.model(), mean_of(contract, begun) if begun else delta(contract, number))
            assert same(state.delta, delta(contract, number))  # the next round begins where the last one ended
    parts = RunState(tmp_path / "parts", "run", contract).model()
    assert {n: v.tobytes() for n, v in whole.model().items()} == {n: v.tobytes() for n, v in parts.items()}
    whole.publish(tmp_path / "home")
    home = RunState(tmp_path / "home", "run", contract).model()
    assert {n: v.tobytes() for n, v in home.items()} == {n: v.tobytes() for n, v in parts.items()}


def test_without_a_share_the_model_is_the_last_one_and_nothing_else_is_kept(make: Make, tmp_path: Path) -> None:
    contract = make(0.0)
    state = RunState(tmp_path, "run", contract)
    for number in range(ROUNDS):
        commit(state, number)
    assert same(state.model(), delta(contract, ROUNDS - 1))
    (file,) = tmp_path.glob("*.safetensors")
    assert load_file(file).keys() == contract.shapes.keys()


def test_a_round_that_is_not_committed_is_not_in_the_mean(make: Make, tmp_path: Path) -> None:
    contract = make(1.0)
    state = RunState(tmp_path, "run", contract)
    commit(state, 0)
    with pytest.raises(FederationError, match="round 0 was to be applied"):
        commit(state, 0)
    assert same(state.model(), mean_of(contract, range(1)))


def test_a_state_without_its_sums_is_refused(make: Make, tmp_path: Path) -> None:
    contract = make(1.0)
    commit(RunState(tmp_path, "run", contract), 0)
    (file,) = tmp_path.glob("*.safetensors")
    before = file_sha256(file)
    file.write_bytes(save(delta(contract, 0)))
    text = (tmp_path / STATE_FILE).read_text().replace(before, file_sha256(file))
    (tmp_path / STATE_FILE).write_text(text)
    with pytest.raises(FederationError, match="does not hold the sums"):
        RunState(tmp_path, "run", contract)
