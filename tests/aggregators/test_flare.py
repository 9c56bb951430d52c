"""The FLARE aggregator: a refused update leaves no trace in the aggregate."""

import logging

import numpy as np
import pytest
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType

from clinifed.aggregators.specialty import SpecialtyAggregator

from .conftest import JOB


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
