"""The controller on FLARE's task server: rounds with a quorum of good updates, each durable, none twice."""

import threading
import time

import numpy as np
import pytest
from nvflare.apis.analytix import AnalyticsData
from nvflare.apis.dxo import from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.shareable import make_reply
from nvflare.app_common.app_constant import AppConstants
from nvflare.widgets.info_collector import GroupInfoCollector, InfoCollector

from clinifed.aggregators.run_state import SERVER_FOLDER, STATE_FILE, RunState
from clinifed.executors.filters import to_shareable
from clinifed.files import read_lines
from clinifed.messages import TASK_FINISH, TASK_HANDSHAKE

from .served import HEAD, RUN, Served, hello, honest, trains, update

SITES = ("alder", "birch", "cedar")


@pytest.fixture
def agreed(make_contract):
    """Three sites of one specialty, of which two are enough."""

    def make(rounds=1, min_clients=2, **aggregation):
        made = make_contract({name: ["radiology"] for name in SITES})
        settings = {"quorum": 2, "round_timeout_s": 30, "start_timeout_s": 30, **aggregation}
        changed = {
            "rounds": rounds,
            "min_clients": min_clients,
            "aggregation": type(made.aggregation)(**settings),
            "sites": {n: s.model_copy(update={"weight": 1.0}) for n, s in made.sites.items()},
        }
        return made.model_copy(update=changed)

    return make


def all_of(behave=honest, **others):
    return {name: others.get(name, behave) for name in SITES}


def fails(code=ReturnCode.EXECUTION_RESULT_ERROR):
    return trains(lambda site, number, contract: make_reply(code))


def sends(**changes):
    return trains(lambda site, number, contract: to_shareable(update(site, number, contract, **changes)))


def later(seconds):
    def answer(site, number, contract):
        time.sleep(seconds)
        return to_shareable(update(site, number, contract))

    return trains(answer)


def value_of(state) -> float:
    """The one value that all parameters have."""
    (only,) = {float(v) for value in state.delta.values() for v in value.ravel()}
    return only


def test_rounds_are_done_in_order_and_the_mean_of_equal_updates_is_each(tmp_path, agreed):
    served = Served(tmp_path, agreed(rounds=3), all_of())
    assert served.engine.panics == []
    assert [e["round"] for e in served.events("round_closed")] == [0, 1, 2]
    assert sorted(served.trained) == sorted((site, number) for site in SITES for number in range(3))
    assert value_of(served.state) == 3.0
    assert served.state.complete
    assert [e["accepted"] for e in served.state.rounds] == [list(SITES)] * 3


def test_a_round_with_fewer_good_updates_than_the_quorum_changes_nothing(tmp_path, agreed):
    served = Served(tmp_path, agreed(), all_of(birch=fails(), cedar=sends(value=np.nan)))
    (only,) = served.state.rounds
    assert (only["counted"], only["accepted"]) == (False, ["alder"])
    assert only["missing"] == {"birch": "failed", "cedar": "not_finite"}
    assert value_of(served.state) == 0.0
    assert served.engine.panics == ["no round had enough good updates; the model is unchanged"]


def test_the_quorum_counts_good_updates_only_and_the_round_waits_for_the_slow_one(tmp_path, agreed):
    """FLARE counts error results as responses; a round closed by them would have lost the slow site."""
    served = Served(tmp_path, agreed(grace_s=0), all_of(birch=fails(), cedar=later(1.0)))
    (only,) = served.state.rounds
    assert (only["counted"], only["accepted"]) == (True, ["alder", "cedar"])
    assert only["seconds"] >= 1.0


def test_grace_closes_a_round_early_once_it_has_its_quorum(tmp_path, agreed):
    release = threading.Event()

    def waits(site, number, contract):
        release.wait(20)
        return to_shareable(update(site, number, contract))

    def sees(served):
        while not served.events("round_closed"):
            time.sleep(0.01)
        release.set()

    served = Served(tmp_path, agreed(grace_s=1), all_of(cedar=trains(waits)), meanwhile=sees)
    (only,) = served.state.rounds
    assert only["missing"] == {"cedar": "deadline"}
    assert 1.0 <= only["seconds"] < 10
    assert value_of(served.state) == 1.0


def test_a_late_update_is_told_of_and_dropped(tmp_path, agreed):
    def answer(site, number, contract):
        time.sleep(0.5 if number == 0 else 0)
        return to_shareable(update(site, number, contract))

    def slow(site, number, contract):
        time.sleep(0.7)
        return to_shareable(update(site, number, contract))

    sites = {"alder": honest, "birch": trains(slow), "cedar": trains(answer)}
    served = Served(tmp_path, agreed(rounds=2, grace_s=0), sites)
    assert [e["site"] for e in served.events("late")] == ["birch"]
    assert [e["accepted"] for e in served.state.rounds] == [["alder", "cedar"]] * 2
    assert value_of(served.state) == 2.0


def test_a_round_ends_at_its_deadline_whoever_is_missing(tmp_path, agreed):
    served = Served(tmp_path, agreed(round_timeout_s=5), all_of(cedar=trains(lambda *_: None)))
    (only,) = served.state.rounds
    assert only["missing"] == {"cedar": "deadline"}
    assert 5 <= only["seconds"] < 10
    assert only["counted"]


@pytest.mark.parametrize(("code", "reason"), [("TASK_UNSUPPORTED", "policy"), ("EXECUTION_EXCEPTION", "failed")])
def test_a_site_that_refuses_says_policy_and_no_more(tmp_path, agreed, code, reason):
    served = Served(tmp_path, agreed(), all_of(birch=fails(getattr(ReturnCode, code))))
    assert served.state.rounds[0]["missing"] == {"birch": reason}
    said = [{k: v for k, v in e.items() if k != "time"} for e in served.events("refused")]
    assert said == [{"event": "refused", "round": 0, "site": "birch", "reason": reason}]


def test_a_rule_that_fails_to_apply_leaves_the_model_and_its_memory(tmp_path, agreed):
    """Each update is good; only their sum over rounds leaves the range of float32."""
    settings = {"rule": "fedavgm", "server_learning_rate": 1e38, "momentum": 0.5}
    contract = agreed(rounds=2, **settings)

    def grows(site, number, contract):
        return to_shareable(update(site, number, contract, value=1.0 if number == 0 else 30.0))

    served = Served(tmp_path, contract, all_of(trains(grows)))
    first, second = served.state.rounds
    assert (first["counted"], second["counted"], second["accepted"]) == (True, False, list(SITES))
    assert value_of(served.state) == pytest.approx(1e38)
    assert {float(v) for m in served.state.memory.values() for v in m.ravel()} == {1.0}
    assert [(e["round"], e["reason"]) for e in served.events("not_applied")] == [(1, "not_finite")]
    assert served.engine.panics == []


def test_the_memory_of_the_optimiser_goes_on_in_the_next_job(tmp_path, agreed):
    contract = agreed(rounds=4, rule="fedadam")
    Served(tmp_path / "whole", contract, all_of())
    for number in range(4):
        Served(tmp_path / "parts", contract, all_of(), until=number + 1, job=f"job-{number}")
    whole, parts = (RunState(tmp_path / d / SERVER_FOLDER / RUN, RUN, contract) for d in ("whole", "parts"))
    assert {n: v.tobytes() for n, v in whole.delta.items()} == {n: v.tobytes() for n, v in parts.delta.items()}
    assert {n: v.tobytes() for n, v in whole.memory.items()} == {n: v.tobytes() for n, v in parts.memory.items()}
    assert whole.memory


def test_no_round_is_applied_twice_and_a_job_goes_on_where_the_state_ends(tmp_path, agreed):
    contract = agreed(rounds=3)
    jobs = [Served(tmp_path, contract, all_of(), until=until, job=f"job-{n}") for n, until in enumerate((2, 2, 3, 3))]
    assert [sorted({number for _, number in job.trained}) for job in jobs] == [[0, 1], [], [2], []]
    assert value_of(jobs[-1].state) == 3.0
    assert [e["round"] for e in jobs[-1].state.rounds] == [0, 1, 2]
    assert all(not job.engine.panics for job in jobs)


def test_an_update_of_an_earlier_job_is_a_replay_in_the_next(tmp_path, agreed):
    contract = agreed(rounds=2)
    Served(tmp_path, contract, all_of(), until=1)
    again = sends(nonce=f"{0:016x}{0:016x}")  # alder's, of round 0
    served = Served(tmp_path, contract, all_of(alder=again), job="job-2")
    assert served.state.rounds[1]["missing"] == {"alder": "replayed"}


@pytest.mark.parametrize("key", ["contract_sha256", "clinifed_version", "base_model_sha256"])
def test_a_site_that_holds_another_version_base_model_or_contract_takes_no_part(tmp_path, agreed, key):
    def other(site, task, came, contract):
        return hello(contract, **{key: "f" * 64}) if task == TASK_HANDSHAKE else honest(site, task, came, contract)

    served = Served(tmp_path, agreed(), all_of(cedar=other))
    assert {site for site, _ in served.trained} == {"alder", "birch"}
    assert served.state.rounds[0]["missing"] == {"cedar": f"other_{key}"}
    (refused,) = served.events("site_refused")
    assert (refused["site"], refused["reason"]) == ("cedar", f"other_{key}")
    assert "f" * 64 in refused["why"]
    assert str(hello(served.contract)[TASK_HANDSHAKE][key]) in refused["why"]


STRANGE = {
    "nothing": make_reply(ReturnCode.OK),
    "an array": hello,
    "a refusal": make_reply(ReturnCode.TASK_UNSUPPORTED),
    "a failure": make_reply(ReturnCode.EXECUTION_EXCEPTION),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_strange_handshake_costs_that_site_its_part_and_no_other(tmp_path, agreed, kind):
    def strange(site, task, came, contract):
        if task != TASK_HANDSHAKE:
            return honest(site, task, came, contract)
        return hello(contract, contract_sha256=np.ones(3)) if kind == "an array" else STRANGE[kind]

    def slow(site, task, came, contract):
        time.sleep(0.3 if task == TASK_HANDSHAKE else 0)  # still to come when the strange one is heard
        return honest(site, task, came, contract)

    served = Served(tmp_path, agreed(), all_of(slow, alder=strange))
    assert served.engine.panics == []
    assert [e["site"] for e in served.events("site_refused")] == ["alder"]
    assert sorted(e["site"] for e in served.events("site_ready")) == ["birch", "cedar"]
    assert served.state.rounds[0]["accepted"] == ["birch", "cedar"]


def test_no_round_begins_before_min_clients_agree(tmp_path, agreed):
    served = Served(tmp_path, agreed(min_clients=3), {"alder": honest, "birch": honest})
    assert served.trained == []
    (panic,) = served.engine.panics
    assert panic == "2 sites are ready, min_clients is 3; not with us: {'cedar': 'away'}"
    assert not (served.state.folder / STATE_FILE).exists()


def test_a_site_that_falls_silent_in_the_handshake_is_not_waited_for_beyond_its_time(tmp_path, agreed):
    def silent(site, task, came, contract):
        return None if task == TASK_HANDSHAKE else honest(site, task, came, contract)

    served = Served(tmp_path, agreed(start_timeout_s=5), all_of(cedar=silent))
    assert served.state.rounds[0]["missing"] == {"cedar": "away"}
    assert 5 <= served.seconds < 12


def test_every_site_hears_when_the_run_is_over_and_not_before(tmp_path, agreed):
    heard = []

    def listening(site, task, came, contract):
        heard.append((site, task))
        return honest(site, task, came, contract)

    contract = agreed(rounds=2)
    Served(tmp_path, contract, all_of(listening), until=1)
    assert TASK_FINISH not in {task for _, task in heard}
    served = Served(tmp_path, contract, all_of(listening), job="job-2")
    assert sorted(site for site, task in heard if task == TASK_FINISH) == list(SITES)
    assert [e["counted"] for e in served.events("run_finished")] == [2]


def test_what_a_job_publishes_is_the_state_whether_it_finished_or_not(tmp_path, agreed):
    contract = agreed(rounds=3)

    def stops(served):
        while not served.events("round_closed"):
            time.sleep(0.01)
        served.engine.abort.trigger(True)

    served = Served(tmp_path, contract, all_of(later(0.2)), meanwhile=stops)
    home = RunState(tmp_path / "job-1" / SERVER_FOLDER, RUN, contract)
    assert 1 <= home.next_round < 3
    assert (home.next_round, home.rounds) == (served.state.next_round, served.state.rounds)
    assert served.events("job_ended")[0]["next_round"] == home.next_round


def test_a_damaged_state_ends_the_job_before_any_site_is_asked(tmp_path, agreed):
    contract = agreed(rounds=2)
    Served(tmp_path, contract, all_of(), until=1)
    (tmp_path / SERVER_FOLDER / RUN / STATE_FILE).write_text("{")
    served = Served(tmp_path, contract, all_of(), job="job-2")
    assert served.trained == []
    assert "damaged (JSONDecodeError); nothing of it is used" in served.engine.panics[0]


def test_a_disk_that_is_full_ends_the_job_and_the_next_one_does_the_round(tmp_path, agreed, monkeypatch):
    contract = agreed(rounds=2)
    commit = RunState.commit

    def full(state, number, *what):
        if number == 1:
            raise OSError(28, "No space left on device")
        commit(state, number, *what)

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "commit", full)
        served = Served(tmp_path, contract, all_of())
    assert "No space left" in served.engine.panics[0]
    assert served.state.next_round == 1
    assert served.events("job_ended")[-1]["next_round"] == 1

    def fresh(site, number, contract):
        return to_shareable(update(site, number, contract))  # the outbox: the same as before

    again = Served(tmp_path, contract, all_of(trains(fresh)), job="job-2")
    assert (again.state.complete, value_of(again.state)) == (True, 2.0)


def test_two_jobs_of_a_run_at_once_apply_no_round_twice(tmp_path, agreed):
    contract = agreed(rounds=3)
    done = []

    def another(served):
        done.append(Served(tmp_path, contract, all_of(later(0.05)), job="job-2"))

    first = Served(tmp_path, contract, all_of(later(0.05)), meanwhile=another)
    (second,) = done
    panics = first.engine.panics + second.engine.panics
    assert all("another one has gone on" in panic for panic in panics)
    assert value_of(first.state) == first.state.next_round == 3
    assert [e["round"] for e in first.state.rounds] == [0, 1, 2]


def test_a_site_that_flare_holds_for_dead_is_not_asked_until_it_is_back(tmp_path, agreed):
    contract, heard = agreed(rounds=3), []

    def answer(site, number, contract):
        heard.append((site, number))
        return to_shareable(update(site, number, contract))

    def cable(served):
        real = served.controller.get_client_disconnect_time
        served.controller.get_client_disconnect_time = lambda name: (
            1.0 if (name, 0) in heard and name == "cedar" and len(heard) < 5 else real(name)
        )

    served = Served(tmp_path, contract, all_of(trains(answer)), meanwhile=cable)
    assert [e["missing"] for e in served.state.rounds] == [{}, {"cedar": "away"}, {}]
    assert ("cedar", 1) not in heard
    assert value_of(served.state) == 3.0


def test_no_round_begins_that_could_not_count(tmp_path, agreed):
    contract = agreed(rounds=2, round_timeout_s=5)

    def cable(served):
        served.controller.get_client_disconnect_time = lambda name: 1.0 if name != "alder" and served.trained else None

    served = Served(tmp_path, contract, all_of(), meanwhile=cable)
    assert {number for _, number in served.trained} == {0}
    (panic,) = served.engine.panics
    assert panic.startswith("round 1: only ['alder'] are connected, the quorum is 2")
    assert served.state.next_round == 1


def test_a_lost_site_and_its_return_are_told(tmp_path, agreed):
    served = Served(tmp_path, agreed(), all_of())
    context = served.engine.new_context()
    context.set_prop(FLContextKey.DISCONNECTED_CLIENT_NAME, "cedar")
    context.set_prop(FLContextKey.RECONNECTED_CLIENT_NAME, "cedar")
    served.controller.handle_event(EventType.CLIENT_DISCONNECTED, context)
    served.controller.handle_event(EventType.CLIENT_RECONNECTED, context)
    assert [e["site"] for kind in ("site_lost", "site_back") for e in served.events(kind)] == ["cedar", "cedar"]


def test_figures_of_a_site_are_tracked_only_where_it_declares_them(tmp_path, agreed):
    told = sends(declared={"train_loss": 0.25})
    served = Served(tmp_path, agreed(), all_of(alder=told))
    figures = [AnalyticsData.from_dxo(from_shareable(figure)) for figure in served.engine.figures]
    tags = {figure.tag: figure.value for figure in figures}
    assert set(tags) == {"accepted", "seconds", "global_norm", "train_loss/alder"}
    assert (tags["accepted"], tags["train_loss/alder"]) == (3.0, 0.25)
    assert served.state.rounds[0]["declared"] == {"alder": {"train_loss": 0.25}}


def test_who_asks_for_the_jobs_stats_hears_how_far_the_run_is(tmp_path, agreed):
    served = Served(tmp_path, agreed(rounds=2), all_of(cedar=fails()))
    collector, context = GroupInfoCollector(), served.engine.new_context()
    context.set_prop(InfoCollector.CTX_KEY_STATS_COLLECTOR, collector)
    served.controller.handle_event(InfoCollector.EVENT_TYPE_GET_STATS, context)
    said = collector.info[SERVER_FOLDER]
    assert (said["run"], said["next_round"], said["rounds"]) == (RUN, 2, 2)
    assert [(e["round"], e["accepted"]) for e in said["last"]] == [(n, ["alder", "birch"]) for n in range(2)]
    assert HEAD not in str(said), "claims and nonces stay in the state"


def test_an_event_log_holds_what_happened_in_order(tmp_path, agreed):
    served = Served(tmp_path, agreed(), all_of())
    kinds = [e["event"] for e in read_lines(served.state.folder / "events.jsonl")]
    assert [k for k in kinds if k not in ("site_ready", "accepted")] == [
        "job_started",
        "round_opened",
        "round_closed",
        "run_finished",
        "job_ended",
    ]
    assert kinds.count("site_ready") == kinds.count("accepted") == 3
    assert AppConstants.TASK_TRAIN not in kinds


def test_a_site_whose_handshake_is_late_takes_part_from_the_next_round_on(tmp_path, agreed):
    """``grace_s`` after enough sites agree the rounds begin; nobody waits for the slowest to load its images."""
    began = threading.Event()

    def late(site, task, came, contract):
        if task == TASK_HANDSHAKE:
            began.wait(20)
        return honest(site, task, came, contract)

    def answer(site, number, contract):
        began.set()
        time.sleep(1.0)
        return to_shareable(update(site, number, contract))

    served = Served(tmp_path, agreed(rounds=2, grace_s=0), {**all_of(trains(answer)), "cedar": late})
    assert served.state.rounds[0]["missing"] == {"cedar": "away"}
    assert "cedar" in served.events("round_opened")[1]["sites"]
    assert ("cedar", 1) in served.trained
