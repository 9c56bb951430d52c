"""The demo's hospitals and scanners with more patients, as embeddings of the tiny tower: 4 sites, 4 specialties.

Made once in a folder of the caller's (about 5 minutes on one core) and read from there.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from clinifed.executors.features import patient_tensors
from clinifed.jobs.prepare import prepare_data
from clinifed.load import load_federation
from clinifed.models.adapters import GlobalModel, build_trainable
from clinifed.models.backbone import load_backbone
from clinifed.models.specialties import resolve_specialties
from clinifed.privacy.patients import PatientTensors

CONFIG = Path(__file__).resolve().parent.parent / "simulator_configs" / "demo.yaml"
SITES = ("alder", "birch", "cedar", "douglas")
NAMES = ("cardiology", "dermatology", "emergency", "radiology")
POOL, PUBLIC = 320, 400  # patients per specialty: of a site, of which each seed takes a part, and of a public set
_COLUMNS = ("features", "patient", "specialty", "label")


def embeddings(folder: Path) -> tuple[dict[str, PatientTensors], dict[str, torch.Tensor]]:
    """The sites' pools, ``validation`` and ``test``; and the zero-shot heads."""
    file = folder / "embeddings.safetensors"
    if not file.is_file():
        save_file(_embed(folder), file)
    content = load_file(file)
    sets = {n: PatientTensors(*(content[f"{n}.{c}"] for c in _COLUMNS)) for n in (*SITES, "validation", "test")}
    return sets, {n.removeprefix("start."): t for n, t in content.items() if n.startswith("start.")}


def some_patients(data: PatientTensors, count: int, seed: int) -> PatientTensors:
    """``count`` of the patients, drawn anew for each seed."""
    chosen = torch.randperm(data.patients, generator=torch.Generator().manual_seed(seed))[:count]
    rows = torch.isin(data.patient, chosen)
    numbers = torch.unique(data.patient[rows], return_inverse=True)[1]
    return PatientTensors(data.features[rows], numbers, data.specialty[rows], data.label[rows])


def _embed(folder: Path) -> dict[str, torch.Tensor]:
    settings = [f"sites.{site}.specialties=[{', '.join(NAMES)}]" for site in SITES]
    settings += [f"data.synthesize.{key}" for key in ("seed=11", f"patients_per_specialty={POOL}")]
    federation = load_federation(CONFIG, [*settings, f"data.synthesize.public_patients_per_specialty={PUBLIC}"])
    prepared = prepare_data(federation, folder / "data", print)
    backbone, specialties = load_backbone(federation.model.ref), resolve_specialties(set(NAMES), {})
    part = build_trainable(backbone, specialties, federation.training)
    model = GlobalModel(backbone, part).eval()
    manifests = {**prepared.sites, "validation": prepared.validation, "test": prepared.test}
    content = {f"start.{name}": tensor for name, tensor in part.shared().items()}
    for name, manifest in manifests.items():
        assert manifest is not None
        data = patient_tensors(
            model, backbone, manifest, specialties, split="train", batch_size=64, cache=None
        )  # all are of that split: holding out is what the public sets are for
        content |= {f"{name}.{column}": getattr(data, column).contiguous() for column in _COLUMNS}
    return content
