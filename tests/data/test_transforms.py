"""Pixels as the backbone wants them: held against open_clip's own preprocessing, by the constants of a model's config.

Both start from the same 8-bit picture, but Pillow rounds to 8 bits between its two passes and again at their end. We do
not, since 12-bit images would lose by it; so the two differ by about two steps of 1/255 on the scale of [0, 1].
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

import clinifed.models
from clinifed.data.dicom import read_pixels
from clinifed.data.transforms import augment, transform
from clinifed.errors import ModelError
from clinifed.models.backbone import load_backbone

TINY = Path(clinifed.models.__file__).parent / "tiny"


@dataclass(frozen=True)
class Want:
    size_px: int = 224
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of BiomedCLIP
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: str = "bicubic"


def natural(height, width, mode, seed=0):
    """A picture whose spectrum falls as that of photographs does, amplitude ~ 1/frequency; 8 bit."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    planes = []
    for _ in range(3 if mode == "RGB" else 1):
        phase = np.exp(2j * np.pi * rng.random(frequency.shape))
        plane = np.fft.irfft2(phase / frequency, (height, width))
        planes.append(np.clip(0.5 + 0.2 * plane / plane.std(), 0, 1))
    return Image.fromarray(np.rint(255 * np.stack(planes, -1).squeeze()).astype(np.uint8), mode)


def theirs(picture, want):
    of = PreprocessCfg(want.size_px, mean=want.mean, std=want.std, interpolation=want.interpolation)
    return image_transform_v2(of, is_train=False)(picture)


def difference(path, want):
    """|ours - open_clip's| of the file, on the scale of [0, 1], (3, S, S)."""
    ours = torch.as_tensor(np.asarray(transform(want)(read_pixels(path))))
    with Image.open(path) as picture:
        other = theirs(picture, want)
    assert ours.shape == other.shape == (3, want.size_px, want.size_px)
    assert ours.dtype == torch.float32
    return (ours - other).abs() * torch.tensor(want.std)[:, None, None]


# Smaller than the model's input, about it by odd rests, and several times larger; upright and across.
SIZES = [(53, 40), (223, 224), (224, 224), (225, 231), (301, 224), (333, 512), (600, 290), (1022, 1511)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_equals_open_clip_on_pictures_like_photographs(tmp_path, size, interpolation, mode):
    natural(*size, mode).save(tmp_path / "a.png")
    found = difference(tmp_path / "a.png", Want(interpolation=interpolation))
    assert found.max() < 1e-2
    assert found.mean() < 2e-3


@settings(max_examples=25, deadline=None)
@given(st.integers(20, 400), st.integers(20, 400), st.sampled_from([32, 33, 64, 97]), st.sampled_from(["RGB", "L"]))
def test_equals_open_clip_for_any_size(tmp_path_factory, height, width, size_px, mode):
    path = tmp_path_factory.mktemp("any") / "a.png"
    natural(height, width, mode).save(path)
    assert difference(path, Want(size_px=size_px)).max() < 1e-2


@pytest.mark.realdata
def test_equals_open_clip_on_photographs(real):
    paths = sorted((real / "fed").rglob("*.jpg")) + sorted((real / "fed").rglob("*.png"))
    some = paths[:: max(1, len(paths) // 40)]
    assert len(some) >= 30
    for path in some:
        found = difference(path, Want())
        assert found.max() < 1e-2, path.name
        assert found.mean() < 2e-3, path.name


def test_twelve_bits_are_not_rounded_to_eight():
    ramp = np.broadcast_to(np.arange(224, dtype=np.float32) / 4095, (224, 224))
    made = transform(Want(mean=(0, 0, 0), std=(1, 1, 1)))(np.ascontiguousarray(ramp))
    assert len(np.unique(np.asarray(made)[0])) == 224


def test_grey_is_the_same_in_all_channels_and_the_input_is_left_as_it_was():
    pixels = np.random.default_rng(1).random((60, 80), np.float32)
    before = pixels.copy()
    made = torch.as_tensor(np.asarray(transform(Want(size_px=60))(pixels)))
    assert np.array_equal(pixels, before)
    back = made * torch.tensor(Want().std)[:, None, None] + torch.tensor(Want().mean)[:, None, None]
    assert torch.allclose(back[0], back[1], atol=1e-6)
    assert torch.allclose(back[0], torch.from_numpy(pixels[:, 10:70]), atol=1e-6)


CONFIGS = {
    "biomedclip's": {"mean": list(Want().mean), "std": list(Want().std)},
    "another's": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_constants_are_those_of_the_models_own_config(tmp_path, name):
    shutil.copytree(TINY, tmp_path / "model")
    path = tmp_path / "model/open_clip_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"preprocess_cfg": CONFIGS[name]}))
    backbone = load_backbone(f"local-dir:{tmp_path / 'model'}")
    picture = natural(211, 190, "RGB")
    picture.save(tmp_path / "a.png")
    own = image_transform_v2(PreprocessCfg(**open_clip.get_model_preprocess_cfg(backbone.model)), is_train=False)(
        picture
    )
    ours = torch.as_tensor(np.asarray(transform(backbone.preprocess)(read_pixels(tmp_path / "a.png"))))
    assert ours.shape == own.shape == (3, 160, 160)
    scale = torch.tensor(CONFIGS[name]["std"])[:, None, None]
    assert ((ours - own).abs() * scale).max() < 1e-2
    assert backbone.preprocess.interpolation == CONFIGS[name].get("interpolation", "bicubic")


@pytest.mark.parametrize(
    "wrong",
    [
        {"interpolation": "nearest"},
        {"interpolation": "random"},
        {"mean": (0.5,)},
        {"std": (1.0, 1.0)},
        {"std": (0.3, 0.3, 0.0)},
        {"mean": (0.5, 0.5, float("nan"))},
        {"size_px": 0},
    ],
)
def test_constants_that_cannot_be_are_refused(wrong):
    with pytest.raises(ModelError, match="preprocess"):
        transform(replace(Want(), **wrong))


IMAGES = torch.from_numpy(np.random.default_rng(3).normal(size=(3, 3, 40, 40)).astype(np.float32))


@pytest.mark.parametrize("view", range(16))
def test_a_view_is_the_same_each_time_within_the_image_and_leaves_it_alone(view):
    before = IMAGES.clone()
    made = augment(IMAGES, view)
    assert torch.equal(made, augment(IMAGES, view))
    assert torch.equal(IMAGES, before)
    assert type(made) is torch.Tensor
    assert (made.shape, made.dtype) == (IMAGES.shape, torch.float32)
    assert made.min() >= IMAGES.min() - 1e-5, "between neighbouring pixels, never beyond them"
    assert made.max() <= IMAGES.max() + 1e-5


def test_all_views_differ_and_each_image_has_as_many_whatever_stands_beside_it():
    """Views count within their patient, so their number may depend on nothing but the settings."""
    views = [augment(IMAGES, view) for view in range(16)]
    for a in range(16):
        assert all(not torch.equal(views[a], views[b]) for b in range(a))
        assert torch.equal(views[a][1:2], augment(IMAGES[1:2], a))
        assert torch.equal(views[a][[2, 0]], augment(IMAGES[[2, 0]], a))
