"""What the rules of the linter look for: names, words beside names, and the arithmetic of an agreed run."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import nan
from typing import Any

from clinifed.contract import Contract
from clinifed.errors import ConfigError, PrivacyError
from clinifed.load import load_federation, validate
from clinifed.policy import JOB_CLASSES, SitePolicy
from clinifed.privacy.accountant import budget_units, cost_units, noise_multiplier_for
from clinifed.privacy.lint_reading import Document, Kind, Setting, snake

__all__ = [
    "Check",
    "Hit",
    "either",
    "foreign_classes",
    "foreign_code",
    "job_filters",
    "named",
    "noise_for_one_round",
    "noise_too_small",
    "not_schema",
    "says",
    "scope_without_release_filter",
    "sensitivity_is_not_clip",
    "streamed_logs",
    "wrong_releases",
]

Hit = tuple[str, str]  # key, what was found there
Check = Callable[[Document], Iterable[Hit]]

_OFF: tuple[Any, ...] = (None, False, 0, "", "0", "off", "no", "none", "never", "false", (), [], {})
_RELEASE_FILTER = "clinifed.executors.filters.ReleaseFilter"
_CLASSES = {name for names in JOB_CLASSES.values() for name in names}

# What a number is called, by us and by others; in lower_snake_case.
_ALIASES = {
    "epsilon": ("epsilon", "target_epsilon", "eps"),
    "delta": ("delta", "target_delta"),
    "sigma": ("noise_multiplier", "sigma"),
    "rounds": ("rounds", "num_rounds", "total_rounds", "n_rounds", "nrounds"),
    "steps": ("local_epochs", "local_steps", "num_updates", "steps_per_round", "updates_per_round"),
    "reserve": ("reserve_rounds",),
    "releases": ("releases", "steps", "num_steps", "total_steps", "iterations"),
    "rate": ("sample_rate", "sampling_rate", "sampling_prob"),
}
_CLIP = ("max_grad_norm", "clip", "clipping_norm", "clip_norm", "l2_norm_clip", "max_norm")


def _is_on(value: Any) -> bool:
    if isinstance(value, str):
        value = value.strip().lower()
    return value not in _OFF


def _shown(setting: Setting) -> str:
    text = repr(setting.value)
    return f"{setting.name}: {text if len(text) <= 80 else text[:77] + '...'}"


def named(*patterns: str, when: Callable[[Any], bool] = _is_on, kinds: tuple[Kind, ...] = ()) -> Check:
    """Settings whose whole name matches one of ``patterns`` and whose value is ``when``; of ``kinds`` only."""
    wanted = re.compile("|".join(f"(?:{p})" for p in patterns))

    def check(document: Document) -> Iterator[Hit]:
        if not kinds or document.kind in kinds:
            found = (s for s in document.settings if wanted.fullmatch(s.name) and when(s.value))
            yield from ((s.key, _shown(s)) for s in found)

    return check


def says(name: str, words: str) -> Check:
    """Settings of that name whose text holds one of ``words`` as a whole word; never where it says ``public``."""
    speaks = re.compile(rf"\b(?:{words})\b")

    def when(value: Any) -> bool:
        if not isinstance(value, str) or re.search(r"[()\n]", value):  # an expression of code is no word
            return False
        text = snake(value).replace("_", " ")
        return "public" not in text and bool(speaks.search(text))

    return named(name, when=when)


def either(*checks: Check) -> Check:
    """What any of ``checks`` finds."""
    return lambda document: [hit for check in checks for hit in check(document)]


def _number(value: Any) -> float | None:
    """``value`` as a number, also from the text of a command line; None for anything else, or beyond counting."""
    try:
        number = nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return number if abs(number) < 1e15 else None


def _numbers(document: Document) -> dict[str, tuple[Setting, float]]:
    """The numbers of a privacy promise, wherever they stand in ``document``; the first of each."""
    found: dict[str, tuple[Setting, float]] = {}
    for role, names in _ALIASES.items():
        for setting in document.settings:
            number = _number(setting.value)
            if setting.name in names and number is not None:
                found.setdefault(role, (setting, number))
    return found


def _off(document: Document) -> bool:
    return any(s.name == "mode" and s.value in ("off", False) for s in document.settings)


def _releases(numbers: Mapping[str, tuple[Setting, float]]) -> int | None:
    """(rounds + reserve) · local steps; None where no rounds are known."""
    if "rounds" not in numbers:
        return None
    reserve = numbers["reserve"][1] if "reserve" in numbers else 0
    steps = numbers["steps"][1] if "steps" in numbers else 1
    return int((numbers["rounds"][1] + reserve) * steps)


def wrong_releases(document: Document) -> Iterator[Hit]:
    """A number of releases that is not that of the rounds and local steps."""
    numbers = _numbers(document)
    expected = _releases(numbers)
    if expected is not None and "releases" in numbers and numbers["releases"][1] != expected:
        setting, _ = numbers["releases"]
        yield setting.key, f"{_shown(setting)}, but rounds and local steps make {expected}"


def _pays(sigma: float, epsilon: float, delta: float, releases: int) -> bool:
    return releases * cost_units(sigma) <= budget_units(epsilon, delta)


def _promise(document: Document) -> tuple[Setting, float, float, float, int, int] | None:
    """Where sigma stands, sigma, epsilon, delta, releases of a round and of the run; None if anything is missing."""
    numbers = _numbers(document)
    releases = _releases(numbers) or int(numbers["releases"][1] if "releases" in numbers else 0)
    sampled = "rate" in numbers and numbers["rate"][1] != 1  # has a rule of its own
    if sampled or releases < 1 or _off(document) or not {"sigma", "epsilon", "delta"} <= set(numbers):
        return None
    setting, sigma = numbers["sigma"]
    steps = int(numbers["steps"][1]) if "steps" in numbers else 1
    return setting, sigma, numbers["epsilon"][1], numbers["delta"][1], max(1, steps), releases


def noise_too_small(document: Document) -> Iterator[Hit]:
    """A sigma whose releases together cost more than (epsilon, delta)."""
    if (promise := _promise(document)) is None:
        return
    setting, sigma, epsilon, delta, _, releases = promise
    try:
        if not _pays(sigma, epsilon, delta, releases):
            needed = noise_multiplier_for(epsilon, delta, releases)
            yield setting.key, f"{_shown(setting)}, but epsilon {epsilon:g} over {releases} releases needs {needed:.6g}"
    except (PrivacyError, ArithmeticError) as error:  # no noise, or so little that its cost has no number
        yield setting.key, f"{_shown(setting)}: {error}"


def noise_for_one_round(document: Document) -> Iterator[Hit]:
    """A sigma that pays for the releases of one round, where there are more."""
    if (promise := _promise(document)) is None:
        return
    setting, sigma, epsilon, delta, steps, releases = promise
    try:
        if releases > steps and _pays(sigma, epsilon, delta, steps) and not _pays(sigma, epsilon, delta, 2 * steps):
            yield setting.key, f"{_shown(setting)}, which pays for one round and not for two"
    except (PrivacyError, ArithmeticError):  # told by noise_too_small
        return


def sensitivity_is_not_clip(document: Document) -> Iterator[Hit]:
    """A sensitivity beside a clip of another value, or beside none."""
    groups: dict[str, list[Setting]] = {}
    for setting in document.settings:
        parent = re.match(r"(.*)[.\[ ]", setting.key)
        groups.setdefault(parent[1] if parent else "", []).append(setting)
    for group in groups.values():
        clips = [s.value for s in group if s.name in _CLIP]
        for setting in group:
            if re.fullmatch(r"(l2_)?sensitivity", setting.name):
                if _number(setting.value) not in map(_number, clips):
                    yield (
                        setting.key,
                        f"{_shown(setting)}, " + (f"but the clip is {clips[0]!r}" if clips else "no clip"),
                    )
            elif setting.name == "type" and setting.value == "central" and clips:
                yield setting.key, "noise of the size of a gradient's clip, added to parameters"


def _groups(value: Any) -> list[dict[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def scope_without_release_filter(document: Document) -> Iterator[Hit]:
    """A privacy scope whose last filter on the way out is not clinifed's, or no default scope; or no scopes at all."""
    if document.lacks_scopes:
        yield "", "a site's policy, but no privacy.json beside its folder: FLARE then filters nothing"
    if document.kind != "scopes":
        return
    content = document.content if isinstance(document.content, dict) else {}
    scopes = _groups(content.get("scopes"))
    if content.get("default_scope") not in [s.get("name") for s in scopes]:
        yield "default_scope", f"default_scope: {content.get('default_scope')!r} names no scope"
    for index, scope in enumerate(scopes):
        filters = _groups(scope.get("task_result_filters"))
        out = [f.get("path") or f.get("name") for f in filters if str(f.get("direction", "out")).lower() != "in"]
        if out[-1:] != [_RELEASE_FILTER]:
            yield f"scopes[{index}].task_result_filters", f"on the way out: {out}"


def job_filters(document: Document) -> Iterator[Hit]:
    """Filters that a job brings; FLARE runs them after those of the site."""
    if document.kind in ("client", "server") and isinstance(document.content, dict):
        for key in ("task_result_filters", "task_data_filters"):
            if document.content.get(key):
                yield key, f"{key}: {document.content[key]!r}"


def foreign_code(document: Document) -> Iterator[Hit]:
    """A file in a job that is no configuration, or an executor that is not clinifed's."""
    if document.kind == "extra":
        yield "", "a file in the job that is no configuration"
    if document.kind == "client" and isinstance(document.content, dict):
        for index, entry in enumerate(_groups(document.content.get("executors"))):
            executor = entry.get("executor")
            path = (executor.get("path") or executor.get("name")) if isinstance(executor, dict) else executor
            if path not in JOB_CLASSES["site"]:
                yield f"executors[{index}].executor", f"executor: {path!r}"


def foreign_classes(document: Document) -> Iterator[Hit]:
    """A list of classes that lets in more than a job of ours needs, or is not enforced."""
    if document.kind != "resources" or not isinstance(document.content, dict):
        return
    allowed = document.content.get("class_allow_list", "missing, so FLARE's own list applies")
    if not isinstance(allowed, list) or not set(map(str, allowed)) <= _CLASSES:
        yield "class_allow_list", f"class_allow_list: {allowed!r}"
    if (mode := document.content.get("class_list_enforcement_mode", "enforce")) != "enforce":
        yield "class_list_enforcement_mode", f"class_list_enforcement_mode: {mode!r}"


def streamed_logs(document: Document) -> Iterator[Hit]:
    """A site whose log FLARE may send to the server; that is FLARE's default."""
    if document.kind == "resources" and isinstance(document.content, dict):
        allowed = document.content.get("allow_log_streaming", "missing, and FLARE's default is true")
        if allowed is not False:
            yield "allow_log_streaming", f"allow_log_streaming: {allowed!r}"


def not_schema(document: Document) -> Iterator[Hit]:
    """What a federation, a contract or a policy of ours does not permit."""
    source = str(document.path)
    try:
        if document.kind == "federation":
            federation = load_federation(document.path)
            releases = (federation.rounds + federation.privacy.reserve_rounds) * federation.training.local_epochs
            if federation.privacy.mode == "dp":
                noise_multiplier_for(federation.privacy.epsilon, federation.privacy.delta, releases)
        elif document.kind in ("contract", "policy"):
            validate(Contract if document.kind == "contract" else SitePolicy, document.content, source)
    except ConfigError as error:
        for problem in error.problems:
            message = problem.removeprefix(f"{source}: ")
            key, _, text = message.partition(": ")
            named_key = re.fullmatch(r"[\w.\-]+", key)
            where = f"{document.prefix}.{key}".strip(".") if named_key else document.prefix
            yield where, text if named_key else message
    except PrivacyError as error:
        yield "rounds", str(error)
