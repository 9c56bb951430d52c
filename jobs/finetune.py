"""``clinifed finetune``: one site, one specialty or several, by the engine and on the ledger of a federation.

A fine-tuning is a federation of one site whose rounds are its epochs: the same contract, the same checks by the site's
policy, the same releases. So a killed one goes on from its ledger, outbox and checkpoints, and what it makes may leave
the hospital for the same reason that a federation's checkpoint may.
"""

import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clinifed.config import Federation
from clinifed.errors import ConfigError, PrivacyError
from clinifed.executors.trainer import SiteTrainer
from clinifed.files import canonical_json, sha256_of, write_json
from clinifed.jobs.basis import with_basis
from clinifed.jobs.card import without_basis
from clinifed.jobs.finetune_plan import (
    LOCAL,
    Validation,
    choose_validation,
    prepare_site,
    single_site,
    site_keys,
    with_site_basis,
)
from clinifed.jobs.finetune_run import CHECKPOINT, REPORT, FineTuningRun, Params
from clinifed.jobs.recipe import build_contract
from clinifed.models.adaptation import ALIKE, Start, start_from
from clinifed.models.adapters import build_trainable
from clinifed.models.backbone import load_backbone
from clinifed.models.state import Checkpoint, read_checkpoint
from clinifed.policy import SitePolicy

__all__ = ["fine_tune_for_specialty"]

_RUN = "run.json"  # which run lies in a directory


def fine_tune_for_specialty(
    federation: Federation,
    site: str,
    specialty: str | Sequence[str],
    out: Path,
    *,
    policy: SitePolicy | None = None,
    epochs: int | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    start: Path | None = None,
    from_specialty: str | None = None,
    alike: float = ALIKE,
    validation: Validation | None = None,
    patience: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Fine-tune ``specialty`` at ``site``, and leave ``out/checkpoint``; called again with the same ``out``, go on.

    An epoch is one step over all patients of the split ``train``: the gradient of each patient is the mean over the
    patient's images, clipped to C, summed, noised with N(0, σ²C²) and divided by the public N₀
    (:mod:`clinifed.privacy.engine`). σ is calibrated once, for all epochs. After each epoch the parameters are a
    durable checkpoint, ``out/epochs/<number>``. Kept is the epoch with the best balanced accuracy on the validation
    set (ties: the lower loss); the start is epoch 0, so that a fine-tuning that only loses ends as it began.

    Args:
        federation: gives the model, privacy, specialties, training, public sets, and where the site's data is.
        site: a key of ``federation.sites``.
        specialty: one or several of that site's.
        out: the run's directory; what it holds of an unfinished run is taken up.
        policy: the site's own policy, at a hospital: its manifest, ledger and keys are used, and it must permit the
            contract by its hash and ``local`` as a coordinator. Default: a policy made of the configuration, as in a
            simulation.
        epochs: ≥ 1; default: as many steps as the federation takes, ``rounds · training.local_epochs``.
        learning_rate: of a step; default ``training.learning_rate``.
        batch_size: images per physical batch; changes memory, never the result. Default ``training.batch_size``.
        start: a checkpoint to begin with; default: zero-shot on the base model.
        from_specialty: adapt from this specialty's head of ``start`` (:func:`clinifed.models.adaptation.start_from`).
        alike: cosine of two labels' prompts from which one takes over what the other learned, in (0, 1].
        validation: what epochs are chosen by: the configuration's public set, the site's own patients of the split
            ``holdout``, or nothing: then the last epoch is kept. Default: the public set where there is one.
        patience: stop after so many epochs without a better one; what is left of the reservation is freed.
        progress: called with one line per step.

    Returns:
        The report, also in ``out/finetune.json``: epochs, what was chosen and by what, the privacy claim, and scores
        on the public test set.

    Raises:
        ConfigError: a setting is wrong, or ``out`` holds another fine-tuning.
        PrivacyError: the policy does not permit it, the start holds a hospital's un-noised head, or the validation set
            would be private under differential privacy.
        BudgetExceededError: the site's budget does not pay for all epochs. No image was read.
        DataError, ModelError: images, manifests or models cannot be used.

    Guarantees:
        - The whole cost is reserved before an image is read, and every epoch charged before its noise is drawn.
        - Under differential privacy neither the number of epochs nor the choice of one depends on private data.
        - A killed run that goes on draws no noise twice, and ends with the parameters of one that was never killed.
        - Nothing begins with a head that was trained on a hospital's data without noise.
    """
    names = (specialty,) if isinstance(specialty, str) else tuple(specialty)
    plan = single_site(federation, site, names, epochs, learning_rate, batch_size)
    _check(plan, validation, patience, start, from_specialty, alike)
    backbone = load_backbone((policy.model_ref if policy else None) or plan.model.ref)
    source = None if start is None else _public_start(read_checkpoint(start))
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    federation = with_site_basis(federation, policy)
    backbone = with_basis(federation, backbone, out, progress)
    contract = build_contract(plan, backbone, site_keys(plan, out, policy))
    plain = without_basis(contract).training  # what lies on the disk reads the embedding itself
    begun = Start(build_trainable(backbone, contract.specialties, plain).shared())
    if source is not None:
        begun = start_from(source, backbone, contract.specialties, plain, from_specialty, alike)
    run = _take_up(out, contract.sha256(), begun.params, validation, patience)
    if (out / CHECKPOINT).exists():
        report: dict[str, Any] = json.loads((out / REPORT).read_text(encoding="utf-8"))
        return report
    prepared = prepare_site(federation, plan, contract, out, policy, progress)
    judges = choose_validation(prepared, plan, validation)
    if patience is not None and judges.manifest is None:
        raise ConfigError(f"patience={patience}: there is no validation set to stop by; give data.public")
    progress(f"{site}: {', '.join(names)}, {contract.rounds} epochs, contract {contract.sha256()}")
    inside = backbone.basis.heads(begun.params) if backbone.basis else begun.params
    trainer = SiteTrainer(contract, prepared.policy, run, LOCAL, backbone, inside)
    return FineTuningRun(trainer, backbone, prepared, judges, source, begun, out, patience, progress).finish()


def _check(
    plan: Federation,
    validation: Validation | None,
    patience: int | None,
    start: Path | None,
    from_specialty: str | None,
    alike: float,
) -> None:
    """Refuse what does not go together, before anything is made."""
    if plan.privacy.mode == "dp" and validation == "holdout":
        raise PrivacyError(
            "validation 'holdout': under differential privacy epochs are chosen by public data only, or the choice "
            "would tell of patients without noise; use 'public' or 'none'"
        )
    problems = []
    if start is None and (from_specialty is not None or alike != ALIKE):
        problems.append("--from-specialty and --alike say what to take of a checkpoint; give one with --start")
    if patience is not None and (patience < 1 or validation == "none"):
        problems.append(f"patience={patience}: needs a validation set, and at least 1")
    if problems:
        raise ConfigError(*problems)


def _public_start(source: Checkpoint) -> Checkpoint:
    """``source``, unless something in it was trained on a hospital's data without noise."""
    if source.card.get("exportable") is not True or source.card.get("in_house"):
        raise PrivacyError(
            f"{source.path}: holds heads that one hospital trained without noise (its card says in_house, or is not "
            "exportable); what begins with them may not leave. Begin with the global checkpoint"
        )
    return source


def _take_up(out: Path, contract: str, params: Params, validation: str | None, patience: int | None) -> str:
    """The name of the run in ``out``: the one that stands there, or a new one.

    Raises:
        ConfigError: it is another run.
    """
    digest = sha256_of(canonical_json({n: sha256_of(t.numpy().tobytes()) for n, t in sorted(params.items())}))
    wanted = {"contract_sha256": contract, "start_sha256": digest, "validation": validation, "patience": patience}
    path = out / _RUN
    if not path.exists():
        write_json(path, {"run": uuid.uuid4().hex, **wanted})
    found = json.loads(path.read_text(encoding="utf-8"))
    if differing := [key for key, value in wanted.items() if found.get(key) != value]:
        raise ConfigError(f"--out {out}: holds a fine-tuning with another {', '.join(differing)}; choose another")
    return str(found["run"])
