"""``clinifed privacy lint``: a table of the ways in which an epsilon turns out wrong, each refused by one rule.

The settings are looked at as they stand in a federation, a FLARE job, a site's folder or anybody's YAML or JSON.
Findings are certain to be against this project's rules, not certain to be a leak; finding nothing proves nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clinifed.policy import JOB_CLASSES
from clinifed.privacy.lint_reading import read_documents
from clinifed.privacy.lint_rules import (
    Check,
    either,
    foreign_classes,
    foreign_code,
    job_filters,
    named,
    noise_for_one_round,
    noise_too_small,
    not_schema,
    says,
    scope_without_release_filter,
    sensitivity_is_not_clip,
    streamed_logs,
    wrong_releases,
)

__all__ = ["LINT_RULES", "Finding", "Rule", "lint"]


@dataclass(frozen=True)
class Finding:
    """One setting that a rule refuses."""

    rule: str  # a key of LINT_RULES
    where: str  # file:key
    found: str  # the setting and its value
    why: str
    remedy: str


@dataclass(frozen=True)
class Rule:
    """What is looked for, why it is refused, and what to do instead."""

    check: Check
    why: str
    remedy: str


def _given(value: Any) -> bool:
    """Set at all; 0 is a seed like any other."""
    return value is not None and value is not False


_ROUND = "rounds?|epochs?|tasks?|start run|end run|jobs?"
_PRIVATE_DATA = "sites?|local|train|training|private|patients?|own|clients?|hospitals?|balanced|auto"
_SCALING = (
    r"(\w+_)?(normali[sz]\w*|standardi[sz]\w*|scal(e|er|ing)|whiten\w*|mean|std|stats|statistics|fit|class_weights?)"
)

LINT_RULES: dict[str, Rule] = {
    "accountant-per-round": Rule(
        either(
            named("svt_privacy", "local_differential_privacy", "local_dp_mod"),
            named(r"(epsilon|eps|budget)_per_(round|epoch|task)|(per_)?round_(epsilon|budget)"),
            named(r"reset_(accountant|budget|epsilon|ledger)\w*|(accountant|budget|epsilon|ledger)_reset\w*"),
            says(r"(accountant|budget|epsilon)(_\w+)?|ledger_(scope|lifetime)", _ROUND),
            noise_for_one_round,
        ),
        "an accountant that begins anew forgets what was released: epsilon 1 a round is epsilon 9.4 after fifty",
        "one sigma for all releases of the run, and one ledger per site for its lifetime",
    ),
    "calibration-per-round": Rule(
        either(named("make_private_with_epsilon"), says(r"(re)?calibrate(_\w+)?|(sigma|noise)_calibration", _ROUND)),
        "it takes the whole budget as unspent each time: against a target of 3, three rounds came to 4.5",
        "calibrate sigma once, for (rounds + reserve rounds) · local epochs releases",
    ),
    "step-count": Rule(
        wrong_releases,
        "epsilon is counted for other steps than are taken; a fourfold epsilon has come of it",
        "set releases to (rounds + reserve_rounds) · local_epochs",
    ),
    "noise-multiplier": Rule(
        noise_too_small,
        "the noise does not pay for all releases at the promised epsilon and delta",
        "take sigma from `clinifed privacy plan`",
    ),
    "sensitivity": Rule(
        sensitivity_is_not_clip,
        "noise of sigma · sensitivity hides a patient only if no patient can move the sum by more than the sensitivity",
        "clip each patient's gradient to max_grad_norm, and scale the noise by that and nothing else",
    ),
    "filter-fails-open": Rule(
        either(
            scope_without_release_filter,
            named("percentile_privacy", "statistics_privacy_filter", r"fail(s|ed)?_open", r"ignore_filter_errors?"),
            says(r"on_(filter_)?(error|failure)", "pass|continue|ignore|skip|send|open"),
        ),
        "what the filter cannot judge leaves the site as it is",
        "end every scope of the site's privacy.json with clinifed.executors.filters.ReleaseFilter, direction out",
    ),
    "job-filters": Rule(
        job_filters,
        "FLARE runs a job's filters after those of the site, so they see and change what was already checked",
        "leave task_result_filters and task_data_filters of the job empty",
    ),
    "allow-list": Rule(
        foreign_classes,
        "a job may then bring executors and senders that never pass the release filter, or call any function",
        f"set class_allow_list to {list(JOB_CLASSES['site'])} in the site's resources.json, as its kit has it",
    ),
    "log-streaming": Rule(
        streamed_logs,
        "FLARE's default sends the site's log to the server as it is written, past the release filter",
        "set allow_log_streaming to false in the site's resources.json",
    ),
    "server-decides": Rule(
        either(
            named(
                r"(target_|max_)?(epsilon|eps|delta)",
                r"(privacy_)?budget\w*",
                "noise_multiplier|sigma|noise_var|max_grad_norm|clip(ping)?(_norm)?|accountant",
                kinds=("client", "server", "meta", "code"),
            ),
            named(
                r"(\w+_)?cost|cost_\w+|mu2\w*|accountant|spent|remaining|ledger_\w+", kinds=("federation", "contract")
            ),
            named(r"budget\w*|ledger", kinds=("contract",)),
            says(
                r"(\w+_)?(epsilon|budget|cost|accountant|noise|sigma)(_\w+)?", "server|job|coordinator|task|meta|model"
            ),
        ),
        "whoever sends the job would decide what a hospital's patients may lose",
        "put the budget into the site's own policy; the site counts the cost from the contract's sigma and its ledger",
    ),
    "late-join": Rule(
        either(
            named(
                r"(dp|privacy|noise|clipping)_(starts?|from|after|begins?)(_\w+)?",
                r"(start|enable)_(dp|privacy|noise)_\w*rounds?|(dp|privacy|noise|clipping)_(on|enabled?)_\w*rounds?",
                r"(dp_|privacy_)?warm_?up(_\w+)?_rounds?|dp_warm_?up\w*",
                r"rounds_(without|before)_(dp|privacy|noise)",
            ),
            named(
                r"(init_|create_|make_)?(\w*engine|accountant|make_private)_\w*round\w*", when=lambda v: v is not None
            ),
            named("compares_round"),
        ),
        "rounds before, and sites that join or restart after, train without differential privacy",
        "remove it: every round of every site is private, and the trainer needs no round to begin with",
    ),
    "private-statistics": Rule(
        either(
            named("(standard|min_max|robust|max_abs)_scaler|(power|quantile)_transformer|fit_transform|partial_fit"),
            says(rf"{_SCALING}(_\w+)?", _PRIVATE_DATA),
        ),
        "means, ranges and frequencies of a site's patients enter the model without noise and leave with it",
        "use public constants; the base model's own preprocessing has them",
    ),
    "private-selection": Rule(
        either(
            named("intime_model_selector", r"patience|stop_cond(ition)?|early_stop\w*|key_metric(_mode)?"),
            says(
                r"(model_)?select(ion|or)?(_\w+)?|best(_\w+)?|stop\w*|monitor",
                r"train\w*|val\w*|local|clients?|sites?|private|holdout|accuracy|auc|auroc|loss",
            ),
        ),
        "which model is kept, and when training stops, tells about the patients it was measured on",
        "fix the number of rounds; select on the public validation set",
    ),
    "sampling": Rule(
        either(
            named("shuffle|poisson(_sampling)?|sampler|drop_last|(weighted_)?random_sampler"),
            named(
                "(sample|sampling)_(rate|prob|probability)",
                when=lambda v: v is not None and str(v) not in ("1", "1.0"),
            ),
        ),
        "amplification holds for Poisson samples only, and most loaders shuffle; at hospital sizes it gains nothing",
        "remove it: each step takes all patients, so that nothing is sampled",
    ),
    "rand-on-empty": Rule(
        either(named(r"rand_on_empty|skip_empty\w*"), says(r"(on_)?empty(_batch\w*)?", r"skip\w*|rand\w*|fake|ignore")),
        "an invented row is not the mechanism that was analysed, and a skipped batch releases without noise",
        "remove it; a full batch is never empty, and a site without patients is refused",
    ),
    "secure-mode": Rule(
        named("secure_mode", when=lambda v: v is not None),
        "Opacus' secure mode needs a package that is no longer built; without it, its noise is from torch's generator",
        "remove it; the noise here is keyed by the operating system in every release",
    ),
    "noise-seed": Rule(
        either(
            named(
                "noise_(seed|generator|rng)|manual_seed(_all)?|(dp|privacy|torch|global|random)_seed|set_seed|seed_everything",
                when=_given,
            ),
            named("seed", when=_given, kinds=("client", "server", "contract", "code")),
        ),
        "noise that can be drawn again can be subtracted, and two releases with the same noise differ by the patients",
        "remove it; noise is never seeded",
    ),
    "batch-coupled": Rule(
        either(
            named(
                r"(clip|info_?nce|nt_?xent|sup_?con|sig_?lip|triplet\w*|contrastive)_loss|batch_norm\w*|mixup|cutmix"
            ),
            says(
                r"(\w+_)?(objective|loss(_\w+)?|criterion|norm(_layer)?)",
                r"contrastive|info ?nce|clip|sig ?lip|triplet\w*|nt ?xent|sup ?con|batch(norm\w*)?",
            ),
        ),
        "every patient is in every other patient's gradient, so that clipping bounds nothing: 111 C at 256 images",
        "use a loss per image against fixed prompts: objective cross-entropy; LayerNorm in place of BatchNorm",
    ),
    "custom-code": Rule(
        either(
            foreign_code,
            named(r"byoc|(task_|train_|launch_)?script(_path|_args)?|subprocess_launcher|\w*client_api_executor"),
        ),
        "code that comes with a job can read and send whatever the site's process can",
        "run clinifed.executors.flare.SiteExecutor, installed at the site, from a job without code",
    ),
    "private-counts": Rule(
        either(
            named("num_steps_current_round|expected_batch_size|data(set)?_size|(num|n)_(samples|examples|train)"),
            named("fed_avg|scatter_and_gather|in_time_accumulate_weighted_aggregator", kinds=("server", "client")),
            says(r"(\w+_)?weight(s|ed|ing)?(_\w+)?", r"(num|n|true|data|dataset) \w+|samples?|counts?|steps?"),
        ),
        "the true number of patients or images leaves without noise, or a client chooses its own weight",
        "weights: equal or nominal_patients, from the contract; the denominator is the public nominal_patients",
    ),
    "unnoised-metrics": Rule(
        either(
            named("summary_writer|analytics_sender|convert_to_fed_event|validation_json_generator|job_log_streamer"),
            named(r"\w*analytics_receiver|(global|cross_site)_model_eval|cross_site_eval\w*|log_streaming"),
            named(r"(send|report|stream)_\w*(metrics?|loss|accuracy|logs?)", r"train_with_evaluation"),
            named("metrics", kinds=("client", "code")),
        ),
        "losses and accuracies of a site's patients leave without noise in every round",
        "evaluate on the public test set at the server; what a site does tell is declared in its policy",
    ),
    "schema": Rule(
        not_schema,
        "clinifed refuses this file, so that nothing would run",
        "set the key to a value that the reference of the configuration lists",
    ),
}


def lint(path: Path) -> list[Finding]:
    """What :data:`LINT_RULES` refuse in a YAML or JSON file, or in a folder of them, in the order of files.

    Raises:
        ConfigError: with every file that cannot be read.
    """
    findings: dict[tuple[str, str], Finding] = {}
    for document in read_documents(path):
        for name, rule in LINT_RULES.items():
            for key, found in rule.check(document):
                where = f"{document.path}:{key}" if key else str(document.path)
                findings.setdefault((name, where), Finding(name, where, found, rule.why, rule.remedy))
    return list(findings.values())
