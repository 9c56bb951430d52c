"""A checkpoint on the tiny model that ships, and small public sets of stripes that its heads can tell apart."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from clinifed.config import DataClass, Training
from clinifed.data.dataset import load_pixels
from clinifed.data.manifest import Record, read_manifest, write_manifest
from clinifed.export.deployed import DeployedModel, deploy
from clinifed.export.onnx import export_onnx
from clinifed.models.adapters import GlobalModel, TrainablePart, build_trainable
from clinifed.models.backbone import Backbone, load_backbone
from clinifed.models.specialties import SPECIALTIES

SPECIALTY_NAMES = ("emergency", "radiology")  # three labels, and two
IMAGES_PER_LABEL = 8
TEMPERATURE = 10.0
TRAINING = Training(train="projection", temperature=TEMPERATURE)


def picture(specialty: str, label: int, rng: np.random.Generator) -> Image.Image:
    """Stripes whose number and colour depend on the label, with noise: 96 × 96, RGB."""
    x, y = np.meshgrid(np.linspace(0, 1, 96), np.linspace(0, 1, 96))
    axis = x if specialty == "radiology" else y
    stripes = 0.5 + 0.4 * np.sin(2 * np.pi * (2 + 4 * label) * axis + rng.uniform(0, 6))
    colour = np.roll([0.9, 0.5, 0.3], label)
    pixels = stripes[..., None] * colour + 0.05 * rng.standard_normal((96, 96, 3))
    return Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))


def make_set(folder: Path, seed: int, data_class: DataClass) -> Path:
    """Images and manifest.csv in ``folder``; returns the manifest's path."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    records = []
    for specialty in SPECIALTY_NAMES:
        for k, label in enumerate(SPECIALTIES[specialty].labels):
            for i in range(IMAGES_PER_LABEL):
                name = f"{specialty}-{k}-{i}.png"
                picture(specialty, k, rng).save(folder / name)
                records.append(Record(name, f"patient-{k}-{i}", specialty, label, "", "train"))
    return write_manifest(folder / "manifest.csv", records, data_class).path


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Manifests: validation and test (public), hospital (not)."""
    root = tmp_path_factory.mktemp("sets")
    classes: dict[str, DataClass] = {"validation": "public", "test": "synthetic", "hospital": "hospital"}
    return {name: make_set(root / name, seed, kind) for seed, (name, kind) in enumerate(classes.items())}


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    return load_backbone("tiny")


@pytest.fixture(scope="session")
def images(sets: dict[str, Path], backbone: Backbone) -> dict[str, SimpleNamespace]:
    """``validation`` and ``test``: pixels (N, 3, S, S), specialties (N), labels (N)."""
    found = {}
    for name in ("validation", "test"):
        manifest = read_manifest(sets[name])
        loaded = load_pixels(manifest, manifest.records, backbone.preprocess)
        found[name] = SimpleNamespace(
            pixels=loaded.pixels.numpy(),
            specialties=[r.specialty for r in loaded.records],
            labels=[list(SPECIALTIES[r.specialty].labels).index(r.label) for r in loaded.records],
        )
    return found


def fit_heads(part: TrainablePart, embedding: torch.Tensor, images: SimpleNamespace) -> None:
    """Least-squares heads with biases, so that decisions on the test images are not ties."""
    with torch.no_grad():
        for name, head in part.heads.items():
            rows = [i for i, s in enumerate(images.specialties) if s == name]
            target = torch.nn.functional.one_hot(torch.tensor([images.labels[i] for i in rows])).float()
            x = torch.cat([embedding[rows], torch.ones(len(rows), 1)], dim=1).double()
            ridge = x.T @ x + 1e-3 * torch.eye(x.shape[1], dtype=torch.float64)
            solution = torch.linalg.solve(ridge, x.T @ target.double()).float()  # (D + 1, K)
            head.weight.copy_(TEMPERATURE * solution[:-1].T)
            head.bias.copy_(TEMPERATURE * solution[-1])


@pytest.fixture(scope="session")
def trained(backbone: Backbone, images: dict[str, SimpleNamespace]) -> GlobalModel:
    specialties = {name: SPECIALTIES[name] for name in SPECIALTY_NAMES}
    part = build_trainable(backbone, specialties, TRAINING)
    with torch.no_grad():  # so that the trained projection and the base model's differ
        weight = part.trunk.projection.weight
        weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    model = GlobalModel(backbone, part).eval()
    with torch.no_grad():
        embedding, _ = model(torch.from_numpy(images["validation"].pixels))
    fit_heads(part, embedding, images["validation"])
    return model


@pytest.fixture(scope="session")
def model(trained: GlobalModel, backbone: Backbone) -> DeployedModel:
    """The trained model with its prompts baked in; not to be changed."""
    return deploy(trained, backbone, {name: SPECIALTIES[name] for name in SPECIALTY_NAMES}, TRAINING)


@pytest.fixture(scope="session")
def graph(model: DeployedModel, backbone: Backbone) -> onnx.ModelProto:
    """The model as FP32 ONNX; not to be changed."""
    return export_onnx(model, backbone.preprocess.size_px)


@pytest.fixture(scope="session")
def calibration(images: dict[str, SimpleNamespace]) -> NDArray[np.float32]:
    return np.ascontiguousarray(images["validation"].pixels)


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, trained: GlobalModel, backbone: Backbone, sets: dict[str, Path]
) -> Path:
    """A checkpoint directory as a federation leaves it, beside its public sets."""
    path = tmp_path_factory.mktemp("run") / "checkpoint"
    path.mkdir()
    save_file({k: v.contiguous() for k, v in trained.part.state_dict().items()}, path / "model.safetensors")
    card = {
        "federation": "stripes",
        "objective": "cross-entropy",
        "exportable": True,
        "base_model": {"ref": "tiny", "sha256": backbone.sha256},
        "training": {"train": "projection", "temperature": TEMPERATURE},
        "specialties": {name: SPECIALTIES[name].model_dump(mode="json") for name in SPECIALTY_NAMES},
        "public": {which: os.path.relpath(sets[which], path) for which in ("validation", "test")},
    }
    (path / "card.json").write_text(json.dumps(card))
    return path
