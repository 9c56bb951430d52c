"""``clinifed evaluate``: a global checkpoint, and zero-shot beside it, on a public test set."""

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.table import Table

from clinifed.config import Specialty, Training
from clinifed.data.manifest import read_manifest
from clinifed.errors import DataError, ModelError
from clinifed.executors.features import patient_tensors
from clinifed.jobs.baselines import score_part
from clinifed.load import validate
from clinifed.models.adapters import GlobalModel, build_trainable
from clinifed.models.backbone import load_backbone
from clinifed.models.state import read_checkpoint
from clinifed.privacy.objectives import resolve_objective

__all__ = ["evaluate_checkpoint", "scores_table"]

_BATCH = 64  # images per forward pass; changes memory only


def evaluate_checkpoint(checkpoint: Path, test: Path | None, model_ref: str | None) -> dict[str, Any]:
    """Scores by specialty of the checkpoint and of zero-shot.

    Args:
        test: manifest of public patients; by default the one the card names.
        model_ref: where the base model is, if not where the card says.

    Raises:
        DataError: there is no test set, or it is a hospital's.
        ModelError: the base model is another one than the checkpoint was trained on.
    """
    read = read_checkpoint(checkpoint)
    if test is None:
        named = read.card.get("public", {}).get("test")
        if named is None:
            raise DataError(f"{checkpoint}: the card names no public test set; give one with --test MANIFEST")
        test = checkpoint / named
    manifest = read_manifest(test)
    if manifest.data_class == "hospital":
        raise DataError(f"{test}: marked as a hospital's data; figures are reported on public or synthetic data only")
    base = read.card["base_model"]
    backbone = load_backbone(model_ref or base["ref"])
    if backbone.sha256 != base["sha256"]:
        raise ModelError(f"the base model is {backbone.sha256}, the checkpoint was trained on {base['sha256']}")
    every = TypeAdapter(dict[str, Specialty]).validate_python(read.card["specialties"])
    names = sorted({r.specialty for r in manifest.records} & set(every))
    training = validate(Training, read.card["training"], f"{checkpoint}: training")
    objective = resolve_objective(read.card["objective"])
    start = build_trainable(backbone, every, training)
    trained = build_trainable(backbone, every, training, read.params)
    public = patient_tensors(
        GlobalModel(backbone, start).eval(),
        backbone,
        manifest,
        {n: every[n] for n in names},
        split=None,
        batch_size=_BATCH,
        cache=None,
        objective=objective,
    )
    zero_shot, federated = (score_part(part, public, names, objective) for part in (start, trained))
    return {
        "checkpoint": str(checkpoint),
        "test": {"sha256": manifest.sha256, "data_class": manifest.data_class},
        "metrics": {n: {"zero_shot": zero_shot[n].to_dict(), "federated": federated[n].to_dict()} for n in names},
    }


def scores_table(report: dict[str, Any]) -> Table:
    """The report as a table."""
    table = Table("specialty", "patients", "zero-shot", "federated", "AUROC, zero-shot", "AUROC, federated")
    for name, entry in report["metrics"].items():
        figures = [entry[m][k] for k in ("balanced_accuracy", "auroc") for m in ("zero_shot", "federated")]
        text = ["–" if f is None else f"{f:.3f}" for f in figures]
        table.add_row(name, str(entry["federated"]["patients"]), *text)
    return table
