"""Drawn patients and devices: deterministic, in range, with labels that show."""

import numpy as np
import pytest

from clinifed.data.captions import caption_words, draw_captions
from clinifed.data.devices import STRENGTH, Device, draw_device, photograph, quantise
from clinifed.data.phantoms import COLOUR, LABELS, SIZE_PX, draw_patients, render, smooth_noise
from clinifed.errors import DataError
from clinifed.models.specialties import SPECIALTIES

EVERY = sorted(LABELS)


def draw(specialty: str, seed: int, count: int = 12) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    patients = draw_patients(rng, specialty, np.arange(count) % len(LABELS[specialty]))
    return render(rng, patients, np.arange(count)), draw_captions(rng, patients)


def test_labels_are_those_of_the_specialties():
    assert {name: tuple(SPECIALTIES[name].labels) for name in LABELS} == dict(LABELS)
    assert set(STRENGTH) == set(LABELS)


@pytest.mark.parametrize("specialty", EVERY)
def test_scenes_have_the_promised_shape_dtype_and_range(specialty):
    scenes, _ = draw(specialty, 1)
    assert scenes.shape == (12, SIZE_PX, SIZE_PX) + ((3,) if specialty in COLOUR else ())
    assert scenes.dtype == np.float32
    assert 0 <= scenes.min() < 0.3 < 0.5 < scenes.max() <= 1


@pytest.mark.parametrize("specialty", EVERY)
def test_same_seed_gives_the_same_scenes_and_captions(specialty):
    (first, lines), (again, same_lines), (other, _) = draw(specialty, 1), draw(specialty, 1), draw(specialty, 2)
    assert np.array_equal(first, again)
    assert lines == same_lines
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("specialty", EVERY)
def test_images_of_a_patient_differ_less_than_patients(specialty):
    rng = np.random.default_rng(3)
    patients = draw_patients(rng, specialty, np.zeros(10, np.int64))
    smooth = render(rng, patients, np.repeat(np.arange(10), 6)).reshape(10, 6, -1)
    within = np.square(smooth - smooth.mean(axis=1, keepdims=True)).mean() * 6 / 5
    between = np.square(smooth.mean(axis=1) - smooth.mean(axis=(0, 1))).mean() * 10 / 9 - within / 6
    assert within > 0
    assert between > 0


def test_an_opacity_brightens_the_lung_on_its_side():
    rng = np.random.default_rng(4)
    patients = draw_patients(rng, "radiology", np.ones(64, np.int64))
    scenes = render(rng, patients, np.arange(64))
    half = SIZE_PX // 2
    excess = scenes[:, :, half:].mean(axis=(1, 2)) - scenes[:, :, :half].mean(axis=(1, 2))
    assert excess[patients.side > 0].mean() > excess[patients.side < 0].mean() + 0.02


def test_captions_use_the_label_and_only_known_words():
    words = set(caption_words())
    for specialty in EVERY:
        for caption in draw(specialty, 5, 40)[1]:
            assert set(caption.replace("-", " ").replace(",", " ").split()) <= words


def test_unknown_specialty_and_label_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(DataError, match=r"no phantom for specialty 'pathology'; choose from"):
        draw_patients(rng, "pathology", np.zeros(1, np.int64))
    with pytest.raises(DataError, match=r"labels of radiology are 0 to 1, got \[2\]"):
        draw_patients(rng, "radiology", np.array([2]))


def test_smooth_noise_has_unit_variance_everywhere():
    noise = smooth_noise(np.random.default_rng(0), 1000, 5)
    assert noise.dtype == np.float32
    assert np.abs(noise.std(axis=0)[::16, ::16] - 1).max() < 0.12


@pytest.mark.parametrize("specialty", EVERY)
def test_the_atlas_device_changes_nothing_and_others_do(specialty):
    scenes, _ = draw(specialty, 6)
    rng = np.random.default_rng(1)
    assert draw_device(rng, 0.0).gain == 1.0
    assert np.allclose(photograph(rng, scenes, Device()), scenes, atol=1e-6)
    seen = photograph(rng, scenes, draw_device(rng, 0.8))
    assert seen.shape == scenes.shape
    assert seen.dtype == np.float32
    assert 0 <= seen.min() <= seen.max() <= 1
    assert np.abs(seen - scenes).mean() > 0.01


def test_strength_moves_devices_away_from_the_atlas():
    gains = [abs(np.log([draw_device(np.random.default_rng(s), k).gain for s in range(50)])).mean() for k in (0.3, 0.9)]
    assert gains[1] == pytest.approx(3 * gains[0])


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_quantise_spans_the_bits(bits):
    levels = quantise(np.array([0, 0.5, 1], np.float32), bits)
    assert levels.dtype == np.uint16
    assert levels.tolist() == [0, 2 ** (bits - 1), 2**bits - 1]
