"""The server killed at every boundary and in every phase of a round: it goes on where its state says, and once only."""

import threading

import numpy as np
import pytest

from .federation import OFF, SITES, LiveFederation, Outcome

pytestmark = pytest.mark.faults

ROUNDS = 3
EVERYBODY = list(SITES)
# Privacy off: without noise two runs of the same contract give the same model, if the same sites are in every round.
EXACT = {**OFF, "rounds": ROUNDS, "min_clients": len(SITES), "aggregation": {"quorum": len(SITES)}}


@pytest.fixture(scope="module")
def uninterrupted(started: LiveFederation) -> Outcome:
    started.clear_faults()
    return started.run(EXACT)


def assert_same_model(outcome: Outcome, reference: Outcome) -> None:
    assert outcome.contract.sha256() == reference.contract.sha256()
    assert [entry["round"] for entry in outcome.rounds] == list(range(ROUNDS)), "a round twice, or none"
    for name, value in reference.state.delta.items():
        assert np.abs(value).max() > 1e-3, "nothing was learned, so this shows nothing"
        assert np.allclose(outcome.state.delta[name], value, rtol=0, atol=1e-6), name


def test_killed_at_each_round_boundary_the_result_is_that_of_an_uninterrupted_run(
    live: LiveFederation, uninterrupted: Outcome
) -> None:
    for number in range(ROUNDS - 1):
        live.fault("server", "committed", "kill", round=number)
    live.fault("server", "commit-not-yet", "kill", round=ROUNDS - 1)  # this round is lost, and done again
    outcome = live.run(EXACT)
    assert live.waiting() == []
    assert len(outcome.jobs) == 1, "the job went on by itself"
    assert [e["next_round"] for e in outcome.events if e["event"] == "job_started"] == [*range(ROUNDS), ROUNDS - 1]
    assert outcome.accepted() == [EVERYBODY] * ROUNDS
    assert_same_model(outcome, uninterrupted)


def test_killed_in_every_phase_of_a_round_no_site_pays_twice(live: LiveFederation) -> None:
    points = ["one-accepted", "weights-written-not-yet", "record-written-not-yet"]
    for number, point in enumerate(points):
        live.fault("server", point, "kill", round=number)
    outcome = live.run({"rounds": len(points) + 1})
    assert live.waiting() == []
    assert [entry["round"] for entry in outcome.rounds] == list(range(len(points) + 1))
    assert outcome.accepted() == [EVERYBODY] * (len(points) + 1)
    # Asked for the same round again, each site sent the same bytes: one charge for each round, whatever happened.
    for site in SITES:
        assert sorted(number for number, _ in live.job(outcome, site).charges.values()) == list(range(len(points) + 1))


def test_the_whole_server_killed_and_started_again_resumes_with_the_next_job(
    live: LiveFederation, uninterrupted: Outcome
) -> None:
    killed = threading.Event()

    def told(text: str) -> None:
        if text.startswith("round 2 of") and not killed.is_set():
            killed.set()
            live.kits.kill("server")  # daemon, server and job at once: a power cut
            live.kits.start(["server"])

    outcome = live.run(EXACT, told=told)
    assert killed.is_set()
    assert len(outcome.jobs) == 2
    starts = [e["next_round"] for e in outcome.events if e["event"] == "job_started"]
    assert starts[0] == 0
    assert starts[-1] >= 2
    assert_same_model(outcome, uninterrupted)
