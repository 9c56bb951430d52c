"""A site that sends anything but its update: it costs the federation that site's update, and leaves no trace."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from clinifed.aggregators.rules import aggregate
from clinifed.config import Federation
from clinifed.executors.trainer import SiteTrainer
from clinifed.files import read_lines
from clinifed.messages import update_norm

from .federation import OFF, SITES, LiveFederation, Outcome, merged

pytestmark = pytest.mark.faults

# What leaves by a hostile site's door (tap/alterations.py), and the reason that the server must give. All but what is
# about signatures is signed with the site's own key, so that each check itself is met.
ATTACKS = [
    ("x-100", "too_long"),  # early, while an honest update is still long
    ("nan", "not_finite"),
    ("inf", "not_finite"),
    ("unknown name", "wrong_names"),
    ("unknown head", "wrong_names"),
    ("missing name", "wrong_names"),
    ("another site's head", "wrong_names"),
    ("no parameters", "wrong_names"),
    ("numbers as names", "wrong_names"),
    ("wrong shape", "wrong_shape"),
    ("broadcastable", "wrong_shape"),
    ("scalar", "wrong_dtype"),  # it arrives as a number, not as an array
    ("float64", "wrong_dtype"),
    ("text", "wrong_dtype"),
    ("x1e6", "too_long"),
    ("full", "not_diff"),
    ("weight", "wrong_meta"),
    ("not an update", "deadline"),  # FLARE itself cannot read this: no update came
    ("metrics", "wrong_meta"),
    ("another's name", "wrong_meta"),
    ("undeclared", "wrong_meta"),
    ("loss is text", "wrong_meta"),
    ("NaN as loss", "wrong_meta"),
    ("count is a list", "wrong_meta"),
    ("numbers as keys", "wrong_meta"),
    ("other round", "wrong_round"),
    ("other run", "wrong_job"),
    ("other contract", "wrong_contract"),
    ("no claim", "wrong_contract"),
    ("other claim", "wrong_claim"),
    ("another site's update", "wrong_names"),
    ("another site's update as it was", "replayed"),
    ("changed after signing", "wrong_signature"),
    ("unsigned", "wrong_signature"),
    ("foreign key", "wrong_signature"),
    ("success without anything", "deadline"),  # the last of its half, as the other: one deadline for both
]
HONEST = "alder"
HOSTILE = ("birch", "cedar")  # two at a time: an attack for each round takes its time


def honest_norms(live: LiveFederation, federation: Federation) -> dict[str, float]:
    """How long each site's first update is."""
    norms = {}
    for site in SITES:
        with trainer_of(live, federation, site) as trainer:
            zero = {name: value * 0 for name, value in trainer.start.items()}
            norms[site] = update_norm(trainer.train(0, zero).params)
    return norms


@contextmanager
def trainer_of(live: LiveFederation, federation: Federation, site: str) -> Iterator[SiteTrainer]:
    """The site's own trainer, here instead of beside its FLARE process."""
    contract = live.contract(federation)
    live.approve(federation, contract)
    trainer = SiteTrainer(contract, live.policies[site], "here", federation.deployment.coordinator)
    yield trainer
    trainer.releases.outbox.clean(["here"])


def without_the_hostile(live: LiveFederation, federation: Federation) -> bytes:
    """The global delta of a federation in which the honest site is alone: no FLARE, no ingress."""
    contract = live.contract(federation)
    delta = {name: np.zeros(shape, np.float32) for name, shape in contract.shapes.items()}
    with trainer_of(live, federation, HONEST) as trainer:
        for number in range(contract.rounds):
            update = trainer.train(number, {name: torch.from_numpy(value) for name, value in delta.items()})
            weights = {HONEST: contract.sites[HONEST].weight}
            change, _ = aggregate([update], weights, contract.shapes, contract.aggregation, {})
            delta = {name: value + change[name] for name, value in delta.items()}
    return b"".join(delta[name].tobytes() for name in sorted(delta))


def attack(live: LiveFederation, site: str, attacks: Iterable[tuple[str, str]], first: int = 0) -> None:
    for number, (how, _) in enumerate(attacks, first):
        live.fault(site, "before-send", "alter", how=how, round=number)


def reasons(outcome: Outcome, site: str) -> list[str]:
    """Round by round: what the state says, which must be what the event log says."""
    told = [e["reason"] for e in outcome.events if e["event"] == "refused" and e["site"] == site]
    missing = [entry["missing"].get(site, "") for entry in outcome.rounds]
    assert told == [reason for reason in missing if reason not in ("", "deadline")]
    return missing


def figures(live: LiveFederation, outcome: Outcome, tag: str) -> list[float]:
    """What FLARE's tracking brought home of the run."""
    found = (live.home / "runs" / outcome.run / "results").glob("**/figures.jsonl")
    return [line["value"] for path in sorted(found) for line in read_lines(path) if line["tag"] == tag]


def test_a_refused_update_leaves_no_trace_in_the_aggregate(live: LiveFederation) -> None:
    rounds = len(ATTACKS) // 2
    plan = merged(OFF, {"rounds": rounds, "min_clients": 1, "aggregation": {"quorum": 1}})
    norms = honest_norms(live, live.federation(**plan))
    bound = 5 * max(norms.values())  # an honest update is within it as it is, and a hundred of them are not
    assert all(100 * norms[site] > bound for site in HOSTILE)
    plan = merged(plan, {"aggregation": {"norm_bound": bound}})
    turns = dict(zip(HOSTILE, (ATTACKS[:rounds], ATTACKS[rounds:]), strict=True))
    for site, attacks in turns.items():
        attack(live, site, attacks)
    outcome = live.run(plan)
    assert live.waiting() == []
    for site, attacks in turns.items():
        given = reasons(outcome, site)
        assert dict(zip([how for how, _ in attacks], given, strict=True)) == dict(attacks)
    assert outcome.accepted() == [[HONEST]] * rounds
    assert len(outcome.jobs) == 1, "no attack ended the job"
    assert figures(live, outcome, "accepted") == [1.0] * rounds
    assert outcome.delta() == without_the_hostile(live, live.federation(**plan))


def test_an_accepted_update_counts_once_and_its_site_is_welcome_again(live: LiveFederation) -> None:
    """Under differential privacy, with the contract's own bound: honest updates pass it, whatever their noise."""
    first = [("replay as it was", "wrong_round")]  # the very bytes of the round before, with their signature
    second = [
        ("replay", "replayed"),  # of the round before, with the present round's number
        ("x-100", "too_long"),
        ("NaN in the claim", "wrong_meta"),
    ]
    attack(live, "cedar", first, 1)
    attack(live, "cedar", second, 3)
    outcome = live.run({"rounds": 7, "aggregation": {"norm_bound": None}})
    assert live.waiting() == []
    assert reasons(outcome, "cedar") == ["", "wrong_round", "", "replayed", "too_long", "wrong_meta", ""]
    for entry in outcome.rounds:
        assert entry["accepted"] == (list(SITES) if entry["round"] in (0, 2, 6) else ["alder", "birch"])
    # It was charged for each of its rounds all the same: noise was drawn, whatever became of it.
    assert len(set(outcome.spent.values())) == 1
