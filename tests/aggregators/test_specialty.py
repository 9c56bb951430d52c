"""The FLARE aggregator: a refused update leaves no trace in the aggregate."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType

from clinifed.aggregators.specialty import SpecialtyAggregator
from clinifed.messages import packed, rounded
from clinifed.privacy.claims import make_claim

from .conftest import JOB

HEAD = "heads.radiology.weight"


@pytest.fixture
def aggregator(contract, monkeypatch):
    made = SpecialtyAggregator(contract.text())
    made.round, made.job = 1, JOB
    monkeypatch.setattr(made, "warning", logging.getLogger(__name__).info)
    return made


def message(update, **changes) -> FLModel:
    fields = {"params_type": ParamsType.DIFF, "params": update.params, "current_round": update.round}
    meta = {**update.meta, "client_name": update.site, "props": {}}
    return FLModel(**{**fields, **changes}, meta=meta)


def aggregate(aggregator, messages) -> bytes:
    aggregator.reset_stats()
    aggregator.nonces.clear()  # the tests send the same updates again and again
    for one in messages:
        aggregator.accept_model(one)
    return b"".join(v.tobytes() for _, v in sorted(aggregator.aggregate_model().params.items()))


def test_a_refused_update_leaves_no_trace(aggregator, updates):
    good = [message(updates["alder"]), message(updates["birch"])]
    expected = aggregate(aggregator, good)
    hostile = {k: v * np.float32("nan") for k, v in updates["cedar"].params.items()}
    for params, params_type in ((hostile, ParamsType.DIFF), (updates["cedar"].params, ParamsType.FULL)):
        bad = message(updates["cedar"], params=params, params_type=params_type)
        for order in ([bad, *good], [good[0], bad, good[1]], [*good, bad]):
            assert aggregate(aggregator, order) == expected
            assert list(aggregator.refused) == ["cedar"]


def test_sixteen_bits_are_taken_where_the_contract_says_so_and_nowhere_else(contract, updates, signed, monkeypatch):
    found = {}
    for dtype in ("bfloat16", "float32"):
        settings = contract.aggregation.model_copy(update={"update_dtype": dtype})
        agreed, made = contract.model_copy(update={"aggregation": settings}), {}
        for site, update in updates.items():
            claim = make_claim(agreed, site, "job", 10**9, agreed.promise.delta, "a" * 64)
            params = rounded(update.params, agreed.sites[site].norm_bound)
            made[site] = signed(replace(update, params=params, meta={**update.meta, "claim": claim}))
        sent = [message(update, params=packed(update.params)) for update in made.values()]
        aggregator = SpecialtyAggregator(agreed.text())
        aggregator.round, aggregator.job = 1, JOB
        monkeypatch.setattr(aggregator, "warning", logging.getLogger(__name__).info)
        for one in sent:
            aggregator.accept_model(one)
        found[dtype] = aggregator
    assert set(found["bfloat16"].accepted) == set(updates), found["bfloat16"].refused
    for site, update in found["bfloat16"].accepted.items():
        for name, value in rounded(updates[site].params, contract.sites[site].norm_bound).items():
            assert np.array_equal(update.params[name], value)
    assert found["float32"].refused == dict.fromkeys(updates, "wrong_dtype")


def test_a_replayed_update_counts_once(aggregator, updates):
    good = [message(u) for u in updates.values()]
    assert aggregate(aggregator, good + good) == aggregate(aggregator, good)


def test_the_weight_is_the_contracts(aggregator, updates):
    plain = aggregate(aggregator, [message(u) for u in updates.values()])
    loud = [message(u) for u in updates.values()]
    loud[0].meta["NUM_STEPS_CURRENT_ROUND"] = 1e12
    assert aggregate(aggregator, loud) in (
        plain,
        aggregate(aggregator, [message(updates["birch"]), message(updates["cedar"])]),
    )


def told(update, **meta) -> FLModel:
    made = message(update)
    made.meta.update(meta)
    return made


class Strange:
    def __eq__(self, other):
        raise RuntimeError("hostile")

    __hash__ = object.__hash__


ANYTHING = {
    "no parameters": lambda u: message(u, params={}),
    "parameters of no kind": lambda u: message(u, params={HEAD: None}),
    "parameters with numbers for names": lambda u: message(u, params={1: np.ones(1), "x": np.ones(1)}),
    "no round": lambda u: message(u, current_round=None),
    "NaN in its figures": lambda u: told(u, declared={"train_loss": float("nan")}),
    "text for a figure": lambda u: told(u, declared={"train_loss": "low"}),
    "an array for a figure": lambda u: told(u, declared={"train_loss": np.ones(3)}),
    "an array for a claim": lambda u: told(u, claim=np.ones(3)),
    "NaN in its claim": lambda u: told(u, claim={**u.meta["claim"], "epsilon": float("nan")}),
    "metadata with numbers for names": lambda u: told(replace(u, meta={**u.meta, 1: 2}), x=1),
    "bytes for a signature": lambda u: told(u, signature=b"\x00"),
    "an array for a job": lambda u: told(u, job=np.ones(2)),
    "a list for a ledger head": lambda u: told(u, ledger_head=[Strange()]),
}


@pytest.mark.parametrize("make", ANYTHING.values(), ids=ANYTHING)
def test_whatever_a_site_sends_is_refused_and_never_raises(aggregator, updates, make):
    good = aggregate(aggregator, [message(updates["birch"])])
    aggregator.reset_stats()
    aggregator.nonces.clear()
    assert aggregator.accept_model(make(updates["alder"])) is False
    assert list(aggregator.refused) == ["alder"]
    assert aggregator.nonces == set()
    assert aggregator.accept_model(message(updates["birch"])) is True
    assert b"".join(v.tobytes() for _, v in sorted(aggregator.aggregate_model().params.items())) == good


def test_an_update_that_was_refused_may_be_sent_again_whole(aggregator, updates):
    assert not aggregator.accept_model(message(updates["alder"], params={}))
    assert aggregator.accept_model(message(updates["alder"]))
    assert (list(aggregator.accepted), aggregator.refused) == (["alder"], {})


def test_what_comes_after_an_accepted_update_takes_nothing_from_it(aggregator, updates):
    aggregator.accept_model(message(updates["alder"]))
    aggregator.refuse("alder", "failed")
    assert not aggregator.accept_model(message(updates["alder"]))
    assert (list(aggregator.accepted), aggregator.refused) == (["alder"], {})


def test_every_decision_is_told_with_site_and_reason_and_nothing_of_the_data(aggregator, updates):
    said = []
    aggregator.told = lambda kind, **what: said.append((kind, what))
    aggregator.accept_model(message(updates["alder"]))
    aggregator.accept_model(message(updates["birch"], params={}))
    aggregator.refuse("cedar", "policy")
    assert said == [
        ("accepted", {"round": 1, "site": "alder"}),
        ("refused", {"round": 1, "site": "birch", "reason": "wrong_names"}),
        ("refused", {"round": 1, "site": "cedar", "reason": "policy"}),
    ]
    aggregator.reset_stats()
    assert (aggregator.accepted, aggregator.refused) == ({}, {})


def test_an_update_of_an_earlier_round_or_job_is_not_taken_again(aggregator, updates):
    aggregator.accept_model(message(updates["alder"]))
    aggregator.reset_stats()
    assert not aggregator.accept_model(message(updates["alder"]))
    assert aggregator.refused == {"alder": "replayed"}


def test_a_closed_round_takes_no_more_and_an_opened_one_does(aggregator, updates):
    said = []
    aggregator.told = lambda kind, **what: said.append((kind, what["site"]))
    aggregator.accept_model(message(updates["alder"]))
    aggregator.close()
    assert not aggregator.accept_model(message(updates["birch"]))
    assert (list(aggregator.accepted), aggregator.refused) == (["alder"], {})
    assert said[-1] == ("late", "birch")
    aggregator.reset_stats()
    assert aggregator.accept_model(message(updates["birch"]))
