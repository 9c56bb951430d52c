"""The aggregation rules: how the updates of a round become the change of the global model.

A rule combines one parameter over the sites that sent it, and then takes the server optimiser's step. A new rule is one
entry of ``RULES``; the property tests take it up the moment it is listed.
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clinifed.aggregators.fedavg import weighted_mean
from clinifed.aggregators.robust import MIN_SITES, cut_at_each_end, median, trimmed_mean
from clinifed.aggregators.server_optimizers import MOMENTUM, SECOND_MOMENTUM, Step, adam, as_it_is, momentum
from clinifed.config import Aggregation
from clinifed.errors import ConfigError, FederationError, UpdateError
from clinifed.messages import Parameters, Update, array_problem, specialty_of

__all__ = ["RULES", "Memory", "Rule", "aggregate", "rule_problems"]

Memory = dict[str, NDArray[np.float32]]  # "<slot>.<parameter>" → float32, of the parameter's shape

Combine = Callable[[Sequence[NDArray[np.float32]], Sequence[float], Aggregation], NDArray[np.float64]]
TakeStep = Callable[[NDArray[np.float64], Mapping[str, NDArray[np.float32]], Aggregation], Step]


@dataclass(frozen=True)
class Rule:
    """How one parameter is combined over the sites that sent it, what the server makes of it, and what holds then."""

    combine: Combine  # (arrays in the order of the sites' names, their weights, settings) → float64
    step: TakeStep = as_it_is  # (combined, the parameter's memory by slot, settings) → change, new memory
    memory: tuple[str, ...] = ()  # the slots of the step's memory
    settings: tuple[str, ...] = ()  # the keys of ``aggregation`` that only some rules read, and this one does
    min_sites: int = 1  # a parameter that fewer sites sent does not change
    weighted: bool = True  # whether it reads the contract's weights
    linear: bool = False  # from an empty memory, the change is linear in the updates
    keeps_equal: bool = False  # where all sites send the same, the change is that, in every round


RULES: dict[str, Rule] = {
    "fedavg": Rule(weighted_mean, linear=True, keeps_equal=True),
    "fedavgm": Rule(weighted_mean, momentum, (MOMENTUM,), ("server_learning_rate", "momentum"), linear=True),
    "fedadam": Rule(
        weighted_mean,
        adam,
        (MOMENTUM, SECOND_MOMENTUM),
        ("server_learning_rate", "momentum", "second_momentum", "adaptivity"),
    ),
    "trimmed-mean": Rule(trimmed_mean, settings=("trim",), min_sites=MIN_SITES, weighted=False, keeps_equal=True),
    "median": Rule(median, min_sites=MIN_SITES, weighted=False, keeps_equal=True),
}


def aggregate(
    updates: Sequence[Update],
    weights: Mapping[str, float],
    shapes: Mapping[str, tuple[int, ...]],
    settings: Aggregation,
    memory: Mapping[str, NDArray[np.float32]],
) -> tuple[Parameters, Memory]:
    """The change of every shared parameter in one round, under ``settings.rule``.

    Args:
        updates: checked updates, at most one per site.
        weights: site → weight > 0, from the contract; trimmed-mean and median ignore them.
        shapes: every shared parameter's shape.
        settings: the rule and its numbers.
        memory: what the round before returned; empty before the first.

    Returns:
        name → float32 array for every name of ``shapes``, and the new memory, flat names that one safetensors file
        holds: ``momentum.<parameter>``, ``second_momentum.<parameter>``; empty for rules that remember nothing.

    Guarantees:
        - A parameter is combined over exactly the sites that sent it: the trunk over all, a head over its
          specialty's. Its weights are normalised over these.
        - A parameter nobody sent, one that fewer than the rule's ``min_sites`` sent, and a head that fewer than
          ``min_sites_per_head`` sent, changes by zero, and its memory stays.
        - The result does not depend on the order of arrival, to the bit: sites are taken in sorted order, in float64.
        - NaN and infinity are refused, not passed on, also where only the server optimiser would make them.
        - Memory that is not this rule's, or not whole, is refused.
        - A memory that was saved and read back continues to the same bits.
        - What is given is not changed; one parameter at a time is held in float64.

    Raises:
        UpdateError: ``reason`` is one of duplicate, unknown_site, wrong_names, wrong_dtype, wrong_shape, not_finite.
        FederationError: the memory is not of this rule and these shapes.
        ConfigError: there is no such rule, or its settings cannot hold; :func:`rule_problems` finds it beforehand.
    """
    if settings.rule not in RULES:
        raise ConfigError(_unknown(settings.rule))
    rule = RULES[settings.rule]
    ordered = sorted(updates, key=lambda update: update.site)
    _check_updates(ordered, weights, shapes)
    _check_memory(memory, rule, settings.rule, shapes)
    change: Parameters = {}
    remembered, problems = dict(memory), []
    for name, shape in shapes.items():
        senders = [update for update in ordered if name in update.params]
        is_head = specialty_of(name) is not None
        if len(senders) < max(rule.min_sites, settings.min_sites_per_head if is_head else 1):
            change[name] = np.zeros(shape, dtype=np.float32)
            continue
        before = {slot: memory[f"{slot}.{name}"] for slot in rule.memory if f"{slot}.{name}" in memory}
        # What leaves the range of float32 becomes infinite here, and is refused below.
        with np.errstate(over="ignore", invalid="ignore"):
            combined = rule.combine(
                [update.params[name] for update in senders], [weights[update.site] for update in senders], settings
            )
            step, after = rule.step(combined, before, settings)
            change[name] = np.asarray(step, dtype=np.float32)
            new = {f"{slot}.{name}": np.asarray(value, dtype=np.float32) for slot, value in after.items()}
        if not all(np.isfinite(value).all() for value in (change[name], *new.values())):
            problems.append(
                f"{name}: {settings.rule} over {', '.join(update.site for update in senders)} leaves the range of "
                "float32; the round changes nothing. Look at the size of these updates and at "
                "aggregation.server_learning_rate"
            )
        remembered.update(new)
    if problems:
        raise UpdateError("not_finite", *problems)
    return change, remembered


def _check_updates(
    updates: Sequence[Update], weights: Mapping[str, float], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise UpdateError with everything for which the updates, sorted by site, cannot be combined."""
    found: list[tuple[str, str]] = []
    for before, update in zip([None, *updates], updates, strict=False):
        if before is not None and before.site == update.site:
            found.append(("duplicate", f"{update.site}: a second update in one round; a site counts once"))
        if update.site not in weights:
            found.append(("unknown_site", f"{update.site}: no weight; the contract names {sorted(weights)}"))
        for name, value in sorted(update.params.items()):
            if name not in shapes:
                found.append(("wrong_names", f"{update.site}: {name} is not a shared parameter"))
            elif problem := array_problem(name, value, tuple(shapes[name])):
                found.append((problem[0], f"{update.site}: {problem[1]}"))
    if found:
        raise UpdateError(found[0][0], *(text for _, text in found))


def _check_memory(
    memory: Mapping[str, NDArray[np.float32]], rule: Rule, called: str, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise FederationError unless ``memory`` is one that ``rule`` returned for these shapes."""
    known = {f"{slot}.{name}": name for name in shapes for slot in rule.memory}
    problems = [
        f"{key!r} is not remembered by rule {called!r}; go on under the rule it was saved under, or start a new run"
        for key in sorted(set(memory) - set(known))
    ]
    for key in sorted(set(memory) & set(known)):
        name, value = known[key], memory[key]
        if value.dtype != np.float32 or value.shape != tuple(shapes[name]):
            problems.append(f"{key} is {value.dtype} {value.shape}, not float32 {tuple(shapes[name])}")
        elif not np.isfinite(value).all():
            problems.append(f"{key} holds NaN or infinity")
        if lacking := [slot for slot in rule.memory if f"{slot}.{name}" not in memory]:
            problems.append(f"{key} stands without {lacking[0]}.{name}")
    if problems:
        raise FederationError(*(f"the server optimiser's memory: {problem}" for problem in problems))


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), RULES, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(RULES)}"
    return f"aggregation.rule: {name!r} is not a rule; {hint}"


def rule_problems(settings: Aggregation, sites: Mapping[str, Sequence[str]]) -> list[str]:
    """Everything for which ``settings`` cannot mean what they say in a federation of ``sites``; empty where they can.

    Args:
        sites: site → its specialties.

    Returns:
        One line per problem, each with the key, the value and what to do.

    Guarantees:
        - With no problem, every parameter can change in a round in which all sites answer.
        - With no problem, a round that has its quorum has sites enough for the rule, and no number of answers stops it.
        - With no problem, no setting is without effect.
    """
    members: dict[str, list[str]] = {}
    for site, specialties in sorted(sites.items()):
        for specialty in specialties:
            members.setdefault(specialty, []).append(site)
    problems = [
        f"aggregation.min_sites_per_head: {settings.min_sites_per_head} is more than the {len(own)} sites of "
        f"{specialty!r} ({', '.join(own)}): its head could never change; lower it, or add sites"
        for specialty, own in sorted(members.items())
        if settings.min_sites_per_head > len(own)
    ]
    if settings.rule not in RULES:
        return [_unknown(settings.rule), *problems]
    rule = RULES[settings.rule]
    return [*_size_problems(settings, rule, len(sites), members), *problems, *_setting_problems(settings, rule)]


def _size_problems(settings: Aggregation, rule: Rule, sites: int, members: Mapping[str, Sequence[str]]) -> list[str]:
    """Where there are too few sites for the rule."""
    called, needed = settings.rule, rule.min_sites
    other = "or choose a rule for fewer sites, such as 'fedavg'"
    if sites < needed:
        return [f"aggregation.rule: {called!r} needs {needed} sites, here are {sites}; add sites, {other}"]
    problems = [
        f"aggregation.rule: {called!r} needs {needed} sites for each head, {specialty!r} has {len(own)} "
        f"({', '.join(own)}): its head could never change; add sites, {other}"
        for specialty, own in sorted(members.items())
        if len(own) < needed
    ]
    if settings.quorum < needed:
        problems.append(
            f"aggregation.quorum: {settings.quorum} is less than the {needed} sites that rule {called!r} needs: a "
            f"round could count and change nothing; raise it to {needed}"
        )
    return problems


def _setting_problems(settings: Aggregation, rule: Rule) -> list[str]:
    """Settings that the rule does not read, or cannot use."""
    problems = []
    if settings.weights != "equal" and not rule.weighted:
        problems.append(
            f"aggregation.weights: {settings.weights!r} has no effect under rule {settings.rule!r}, which counts "
            "every site once; set it to 'equal', or choose a weighted rule, such as 'fedavg'"
        )
    for key in dict.fromkeys(key for each in RULES.values() for key in each.settings):
        value, default = getattr(settings, key), Aggregation.model_fields[key].default
        readers = ", ".join(name for name, each in RULES.items() if key in each.settings)
        if key in rule.settings and not math.isfinite(value):
            problems.append(f"aggregation.{key}: {value} is not a finite number; give one, for example {default}")
        elif key not in rule.settings and value != default:
            problems.append(
                f"aggregation.{key}: {value} has no effect under rule {settings.rule!r}; remove it, or choose a rule "
                f"that reads it ({readers})"
            )
    if "trim" in rule.settings:
        try:  # of the fewest sites that the rule may meet: there the share cuts least
            cut_at_each_end(settings.trim, max(rule.min_sites, min(settings.quorum, settings.min_sites_per_head)))
        except ConfigError as error:
            problems.extend(error.problems)
    return problems
