"""The short form of the suite, which runs with all other tests: one run in which every kind of process dies once."""

import pytest

from .federation import SITES, LiveFederation

pytestmark = [pytest.mark.faults, pytest.mark.short, pytest.mark.e2e]


def test_a_run_survives_the_death_of_a_trainer_a_job_process_and_the_servers_job(live: LiveFederation) -> None:
    live.fault("alder", "after-charge", "kill", round=0)
    live.fault("cedar", "answered", "kill", round=1)
    live.fault("server", "commit-not-yet", "kill", round=2)
    live.fault("birch", "before-send", "alter", round=3, how="nan")
    outcome = live.run({"rounds": 5})
    assert live.waiting() == []
    everybody = list(SITES)
    assert outcome.accepted() == [everybody, everybody, everybody, ["alder", "cedar"], everybody]
    assert outcome.rounds[3]["missing"] == {"birch": "not_finite"}
    assert [live.job(outcome, site).lost() for site in SITES] == [1, 0, 0]
    assert len(outcome.jobs) == 1
