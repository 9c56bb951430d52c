"""The public basis of a federation: made of public images, tried without noise, and written where every site takes it.

A basis that drops what tells classes apart, such as one of fewer directions than the tower's nuisance has, ruins a run
that nothing else is wrong with, and its budget is spent by then. So it is tried first, on public images: zero-shot, and
a classifier fitted without noise, may lose no more than MAX_LOSS of balanced accuracy in it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from clinifed.config import Federation, Training
from clinifed.contract import Contract
from clinifed.data.manifest import Manifest
from clinifed.errors import ConfigError, ModelError
from clinifed.evaluation.metrics import patient_scores
from clinifed.evaluation.scoring import embedded, score_part
from clinifed.executors.features import patient_tensors
from clinifed.files import write_atomic
from clinifed.jobs.prepare import prepare_public
from clinifed.models.adapters import FrozenPart, build_trainable
from clinifed.models.backbone import Backbone, load_backbone
from clinifed.models.basis import Basis, make_basis, read_basis
from clinifed.models.specialties import resolve_specialties
from clinifed.privacy.objectives import resolve_objective
from clinifed.privacy.patients import PatientTensors

__all__ = ["BASIS_FILE", "MAX_LOSS", "Trial", "basis_file", "planned_basis", "tried", "with_basis", "write_basis"]

BASIS_FILE = "basis.safetensors"  # beneath a run
MAX_LOSS = 0.05  # of balanced accuracy: about what chance does to it at some hundred public patients
_FOLDS = 2  # of patients: fitted on one, judged on the other
_RIDGE = 0.1  # of scikit-learn's inverse penalty, on rows of norm about √d


@dataclass(frozen=True)
class Trial:
    """What one specialty keeps in a basis: balanced accuracy by patient on public images, without and in it."""

    specialty: str
    zero_shot: tuple[float, float]
    probe: tuple[float, float] | None  # fitted without noise; None for labels that do not exclude each other

    @property
    def loses(self) -> bool:
        """Whether more than MAX_LOSS is lost."""
        pairs = [self.zero_shot, *([self.probe] if self.probe else [])]
        return any(before - after > MAX_LOSS for before, after in pairs)

    def __str__(self) -> str:
        parts = [("zero-shot", self.zero_shot), ("fitted", self.probe)]
        figures = ", ".join(f"{name} {pair[0]:.3f} → {pair[1]:.3f}" for name, pair in parts if pair)
        return f"{self.specialty}: {figures}"


def basis_file(federation: Federation, run: Path) -> Path | None:
    """Where the basis of ``federation`` is, or will be; None where its heads train in none."""
    return None if federation.training.basis == "none" else federation.model.basis or run / BASIS_FILE


def with_basis(
    federation: Federation,
    backbone: Backbone,
    run: Path,
    progress: Callable[[str], None],
    contract: Contract | None = None,
) -> Backbone:
    """``backbone`` with the basis that ``federation`` trains in: the file it names, or one made of public images.

    Args:
        contract: of a run that has begun; the basis must be its.

    Raises:
        ConfigError: there is neither a file nor a public validation set.
        ModelError: the file is none, or the basis loses too much.
    """
    path = basis_file(federation, run)
    if path is None:
        return backbone
    if federation.model.basis is None and contract is None and not path.exists():
        write_basis(federation, backbone, path, run / "data", progress)
    return backbone.with_basis(read_basis(path, contract.base_model.basis_sha256 if contract else None))


def planned_basis(federation: Federation, backbone: Backbone) -> Backbone:
    """``backbone`` with a basis of the right shape, for arithmetic on shapes alone."""
    if federation.training.basis == "none":
        return backbone
    if federation.model.basis is not None:
        return backbone.with_basis(read_basis(federation.model.basis))
    width = backbone.encode_text(["a"]).shape[1]
    dims = federation.training.basis_dims if federation.training.basis == "pca" else width
    return backbone.with_basis(Basis(torch.zeros(width), torch.eye(width)[:, :dims]))


def write_basis(
    federation: Federation,
    backbone: Backbone | None,
    out: Path,
    folder: Path,
    progress: Callable[[str], None],
) -> tuple[Basis, list[Trial]]:
    """Make the basis of ``federation`` of its public validation set, try it, and write it to ``out``.

    Args:
        backbone: the base model, where the caller has loaded it already.
        folder: for public data that has to be made or indexed first.

    Raises:
        ConfigError: ``training.basis`` is none, ``out`` exists, or there is no public validation set.
        ModelError: there are too few public images, or the basis loses too much; nothing is written.
    """
    training = federation.training
    if training.basis == "none":
        raise ConfigError("training.basis: 'none' has nothing to make; set it to 'centre', 'whitening' or 'pca'")
    if out.exists():
        raise ConfigError(f"{out} exists; a basis is never overwritten, since contracts name it by its hash")
    manifest = prepare_public(federation, folder, progress).validation
    if manifest is None:
        raise ConfigError(
            f"training.basis: {training.basis!r} is made of public images, and there is no public validation set; "
            "give data.public.validation, or model.basis"
        )
    progress(f"making the basis of {len(manifest.records)} public images")
    backbone = backbone or load_backbone(federation.model.ref)
    basis, trials = _made(federation, backbone.with_basis(None), manifest)
    for trial in trials:
        progress(f"  {trial}")
    if lost := [trial for trial in trials if trial.loses]:
        raise ModelError(
            *(f"training.basis: {training.basis!r} loses more than {MAX_LOSS:g} on public images; {t}" for t in lost),
            "raise training.basis_dims, or take 'centre', which drops nothing",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, basis.content())
    return basis, trials


def _made(federation: Federation, backbone: Backbone, manifest: Manifest) -> tuple[Basis, list[Trial]]:
    named = {name for site in federation.sites.values() for name in site.specialties}
    present = sorted(named & {record.specialty for record in manifest.records})
    specialties = resolve_specialties(set(present), federation.specialties)
    training = federation.training
    plain = training.model_copy(update={"basis": "none"})
    objective = resolve_objective(federation.privacy.objective)
    part = build_trainable(backbone, specialties, plain).ready()
    data = patient_tensors(
        FrozenPart(backbone, part),
        backbone,
        manifest,
        specialties,
        split=None,
        batch_size=training.batch_size,
        cache=None,
        objective=objective,
    )
    embedding = embedded(part, data, training.batch_size).features
    assert training.basis != "none"
    basis = make_basis(training.basis, embedding, training.basis_dims)
    return basis, tried(basis, backbone, federation, plain, data, present, embedding)


def tried(
    basis: Basis,
    backbone: Backbone,
    federation: Federation,
    plain: Training,
    data: PatientTensors,
    names: list[str],
    embedding: Tensor,
) -> list[Trial]:
    """Every specialty's trial on public patients.

    Args:
        plain: the training settings, without a basis.
        data: features of the public patients.
        embedding: (R, D), of the same rows.
    """
    specialties = resolve_specialties(set(names), federation.specialties)
    objective = resolve_objective(federation.privacy.objective)
    inside = federation.training
    without = build_trainable(backbone, specialties, plain).ready()
    within = build_trainable(backbone.with_basis(basis), specialties, inside).ready()
    before, after = (score_part(part, data, names, objective) for part in (without, within))
    trials = []
    for index, name in enumerate(names):
        mine = data.specialty == index
        probe = None
        if objective.labels == "one":
            patient, label = data.patient[mine].numpy(), data.label[mine].numpy()
            rows = embedding[mine].double()  # or rounding could decide for a patient near a border
            probe = (_probe(rows.numpy(), patient, label), _probe(basis(rows)[:, :-1].numpy(), patient, label))
        trials.append(Trial(name, (before[name].balanced_accuracy, after[name].balanced_accuracy), probe))
    return trials


def _probe(rows: NDArray[np.float64], patient: NDArray[np.integer], label: NDArray[np.integer]) -> float:
    """Balanced accuracy of a linear classifier on patients that it was not fitted to, classes counted equally."""
    classes, codes = np.unique(label, return_inverse=True)
    fold = np.random.default_rng(0).integers(_FOLDS, size=patient.max() + 1)[patient]
    logits = np.full((len(rows), len(classes)), 0.0)
    for out in range(_FOLDS):
        held = fold == out
        seen = np.unique(codes[~held])
        if len(seen) < 2 or not held.any():
            continue
        centre = rows[~held].mean(axis=0)
        scale = (rows[~held] - centre).std() or 1.0  # about the centre: a shift of all rows must change nothing
        model = LogisticRegression(C=_RIDGE, class_weight="balanced", max_iter=500)
        model.fit((rows[~held] - centre) / scale, codes[~held])
        logits[np.ix_(held, seen)] = model.predict_log_proba((rows[held] - centre) / scale)
    return patient_scores(logits, patient, codes).balanced_accuracy
