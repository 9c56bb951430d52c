"""A site's processes killed in every phase of a round: it costs the federation that site for that round at most."""

import threading
import time

import pytest

from .federation import SITES, LiveFederation

pytestmark = pytest.mark.faults

ALDER = ["trainer-asked", "before-charge", "after-charge", "before-noise", "after-noise"]
BIRCH = ["before-outbox", "after-outbox", "before-release", "after-release", "before-answer"]
CEDAR = ["task-received", "answered", "before-send"]
CHARGED_AND_NOTHING_KEPT = {"after-charge", "before-noise", "after-noise", "before-outbox"}
EVERYBODY = list(SITES)


def test_trainers_and_a_job_process_killed_in_every_phase_of_a_round(live: LiveFederation) -> None:
    """In each round two sites' trainers, each in another phase, and the third site's FLARE job process.

    All go on from the disk in the very same round. FLARE alone would end the whole job with the job process; here it
    is started again and asked for the same round.
    """
    for number, (first, second) in enumerate(zip(ALDER, BIRCH, strict=True)):
        live.fault("alder", first, "kill", round=number)
        live.fault("birch", second, "kill", round=number)
    for number, point in enumerate(CEDAR):
        live.fault("cedar", point, "kill", round=number)
    for _ in range(2):  # its second one as well: then the round is lost to the site, which is back in the next
        live.fault("cedar", "before-charge", "kill", round=len(ALDER))
    outcome = live.run({"rounds": len(ALDER) + 2, "aggregation": {"round_timeout_s": 60}})
    assert live.waiting() == []
    assert outcome.accepted() == [EVERYBODY] * len(ALDER) + [["alder", "birch"], EVERYBODY]
    assert outcome.rounds[len(ALDER)]["missing"] == {"cedar": "failed"}
    assert len(outcome.jobs) == 1
    # A charge without a kept release is lost, and is paid again from the contract's reserve; nothing else is: what was
    # kept before a job process died was sent again as it was.
    assert live.job(outcome, "alder").lost() == len(CHARGED_AND_NOTHING_KEPT & set(ALDER)) == 3
    assert live.job(outcome, "birch").lost() == len(CHARGED_AND_NOTHING_KEPT & set(BIRCH)) == 1
    assert live.job(outcome, "cedar").lost() == 0


def test_a_whole_site_killed_is_noticed_and_is_back_in_the_next_job(live: LiveFederation) -> None:
    killed, returned = threading.Event(), threading.Event()
    live.fault("cedar", "trainer-asked", "sleep", round=1, seconds=20)  # so that it is killed before it has answered

    def told(text: str) -> None:
        if text.startswith("round 1 of") and not killed.is_set():
            live.kits.kill("cedar")
            killed.set()
        if "cedar: " in text and not returned.is_set():  # a round that it missed
            live.kits.start(["cedar"])
            live.kits.wait_connected(SITES, 120)
            returned.set()

    began = time.time()
    outcome = live.run({"rounds": 6, "deployment": {"rounds_per_job": 3}, "aggregation": {"grace_s": 60}}, told=told)
    assert killed.is_set()
    assert returned.is_set()
    assert len(outcome.jobs) == 2
    assert all(entry["counted"] for entry in outcome.rounds)
    assert outcome.accepted()[0] == EVERYBODY
    assert outcome.accepted()[1] == ["alder", "birch"]
    assert outcome.accepted()[3:] == [EVERYBODY] * 3, "it is back in the next job"
    lost = next(e for e in outcome.events if e["event"] == "site_lost")
    opened = next(e for e in outcome.events if e["event"] == "round_opened" and e["round"] == 1)
    assert lost["site"] == "cedar"
    assert lost["time"] - opened["time"] < 60
    assert outcome.events[-1]["time"] > began
