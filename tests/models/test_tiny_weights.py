"""The tiny model that ships: small, whole, useful on drawn images, and worse on the sites' devices."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from clinifed.data.devices import STRENGTH, draw_device, photograph
from clinifed.data.phantoms import LABELS, draw_patients, render
from clinifed.models.backbone import Backbone, load_backbone
from clinifed.models.heads import prompt_matrix
from clinifed.models.specialties import SPECIALTIES

FOLDER = Path(__file__).resolve().parents[2] / "models" / "tiny"
PER_DEVICE, DEVICES = 24, 8


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return load_backbone("tiny")


def zero_shot(tiny: Backbone, specialty: str, jitter: float, least: float = 0.0) -> float:
    """Balanced accuracy over devices whose strength lies between ``least`` and ``jitter``."""
    rng, count = np.random.default_rng(7), len(LABELS[specialty])
    right: list[list[bool]] = [[] for _ in range(count)]
    prompts = prompt_matrix(tiny, SPECIALTIES[specialty])
    mean, std = (torch.tensor(v)[:, None, None] for v in (tiny.preprocess.mean, tiny.preprocess.std))
    for _ in range(DEVICES):
        label = np.arange(PER_DEVICE) % count
        patients = draw_patients(rng, specialty, label)
        images = photograph(
            rng, render(rng, patients, np.arange(PER_DEVICE)), draw_device(rng, rng.uniform(least, jitter))
        )
        colour = images if images.ndim == 4 else np.repeat(images[..., None], 3, axis=-1)
        pixels: Tensor = (torch.from_numpy(colour).permute(0, 3, 1, 2) - mean) / std
        with torch.inference_mode():
            answer = (tiny.model.visual(pixels) @ prompts.T).argmax(dim=1)
        for truth, given in zip(label, answer.tolist(), strict=True):
            right[truth].append(truth == given)
    return float(np.mean([np.mean(r) for r in right]))


def test_all_files_together_are_at_most_four_megabytes():
    assert sum(p.stat().st_size for p in FOLDER.rglob("*")) <= 4_000_000


def test_no_prompt_has_an_unknown_word(tiny):
    vocabulary = (FOLDER / "vocab.txt").read_text().split()
    assert len(tiny.tokenizer.tokenizer) == len(vocabulary)
    for name in LABELS:
        for prompts in SPECIALTIES[name].labels.values():
            assert vocabulary.index("[UNK]") not in tiny.tokenizer(list(prompts))


@pytest.mark.parametrize("specialty", sorted(LABELS))
def test_zero_shot_is_useful_near_the_atlas(tiny, specialty):
    chance = 1 / len(LABELS[specialty])
    assert chance + 0.2 < zero_shot(tiny, specialty, jitter=0.35)


@pytest.mark.parametrize("specialty", sorted(LABELS))
def test_zero_shot_is_above_chance_and_not_saturated_on_site_devices(tiny, specialty):
    strength, chance = STRENGTH[specialty], 1 / len(LABELS[specialty])
    assert chance + 0.08 < zero_shot(tiny, specialty, strength, least=strength) <= 0.995
