import json

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, SecondaryCaptureImageStorage, UltrasoundImageStorage

from clinifed.data.burned_in import SUSPICIONS, has_text, suspicion
from clinifed.data.deid_pixels import bare_pixels, frames


def tissue(size=384, seed=0):
    """Something like anatomy: smooth shapes, an edge, noise. uint16, 12 bit."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    picture = 0.5 + 0.2 * np.sin(7 * x + 3 * y) + 0.2 * (np.hypot(x - 0.5, y - 0.5) < 0.3)
    for _ in range(12):  # ribs and vessels
        a, b, w = rng.uniform(0, 1, 3)
        picture += 0.1 * np.exp(-(((y - a - 0.2 * np.sin(3 * x + b)) / (0.004 + 0.02 * w)) ** 2))
    return (np.clip(picture + rng.normal(0, 0.02, picture.shape), 0, 1) * 4095).astype(np.uint16)


def labelled(text="NAME, Some  DOB 01/02/1934", height=14, at=(8, 8), bright=True, size=384):
    picture = tissue(size)
    mask = Image.new("L", picture.shape[::-1])
    ImageDraw.Draw(mask).text(at, text, fill=255, font=ImageFont.load_default(height))
    share = np.asarray(mask, np.float32) / 255
    return ((1 - share) * picture + share * (4095 if bright else 0)).astype(np.uint16)


@pytest.mark.parametrize("height", [12, 14, 18, 24, 32])
@pytest.mark.parametrize("bright", [True, False])
def test_a_line_of_text_is_seen_at_any_size_and_polarity(height, bright):
    assert has_text(labelled(height=height, bright=bright))


@pytest.mark.parametrize("at", [(8, 8), (60, 350), (100, 180)])
def test_a_line_of_text_is_seen_anywhere(at):
    assert has_text(labelled("PATIENT 5318908", at=at))


def test_text_in_a_colour_is_seen():
    picture = np.repeat((tissue() >> 5).astype(np.uint8)[..., None], 3, -1)
    mask = Image.new("L", picture.shape[1::-1])
    ImageDraw.Draw(mask).text((9, 9), "PATIENT 5318908", fill=255, font=ImageFont.load_default(16))
    picture[np.asarray(mask) > 128] = (255, 255, 0)
    assert has_text(picture)


@pytest.mark.parametrize("seed", range(5))
def test_a_picture_without_text_is_not_suspected(seed):
    assert not has_text(tissue(seed=seed))
    assert not has_text(np.zeros((64, 64), np.uint8))


def test_a_side_marker_and_a_ruler_are_not_text():
    assert not has_text(labelled("R", height=32))
    picture = tissue()
    for x in range(20, 360, 12):
        picture[340 : 340 + (12 if x % 60 == 20 else 6), x : x + 2] = 4095
    assert not has_text(picture)


def header(**more):
    ds = Dataset()
    ds.SOPClassUID, ds.Modality = CTImageStorage, "CT"
    for keyword, value in more.items():
        setattr(ds, keyword, value)
    return ds


@pytest.mark.parametrize(
    "more",
    [
        {"BurnedInAnnotation": "YES"},
        {"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"], "BurnedInAnnotation": "NO"},
        {"SeriesDescription": "Patient Protocol", "BurnedInAnnotation": "NO"},
        {"ConversionType": "DF"},
        {"ConversionType": "SD", "BurnedInAnnotation": "NO"},
        {"Manufacturer": "Vidar Systems"},
        {"SOPClassUID": SecondaryCaptureImageStorage},
        {"SOPClassUID": SecondaryCaptureImageStorage + ".4"},
        {"SOPClassUID": UltrasoundImageStorage, "Modality": "US"},
        {"Modality": "ES"},
    ],
)
def test_a_header_that_makes_one_suspect(more):
    assert suspicion(header(**more)) in SUSPICIONS


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"BurnedInAnnotation": "NO"},
        {"SOPClassUID": UltrasoundImageStorage, "Modality": "US", "BurnedInAnnotation": "NO"},
        {"SeriesDescription": "Low dose screening"},
    ],
)
def test_a_header_that_does_not(more):
    assert suspicion(header(**more)) is None


@pytest.mark.realdata
def test_planted_text_in_real_pictures_is_seen_whatever_the_header_says(real):
    missed, alarms, clean = [], [], 0
    for entry in json.loads((real / "dicom_phi/truth.json").read_text()):
        ds = dcmread(real / "dicom_phi" / entry["file"])
        bare_pixels(ds)
        seen = any(map(has_text, frames(ds)))
        if entry["pixel_text"] and not seen:
            missed.append(entry["file"])
        if not entry["pixel_text"]:
            clean += 1
            alarms += [entry["file"]] * seen
    assert missed == []
    assert clean == 6
    assert alarms == []


@pytest.mark.realdata
def test_of_real_pictures_only_those_with_letters_are_suspected(real):
    suspected, looked_at = set(), 0
    for path in sorted((real / "dicom").glob("*.dcm")):
        try:
            ds = dcmread(path)
            if len(ds.get("PixelData", "")) > 4 << 20 or ds.get("Modality") not in (
                "CR",
                "CT",
                "DX",
                "MR",
                "NM",
                "PT",
                "RTIMAGE",
                "SM",
                "XA",
            ):
                continue
            bare_pixels(ds)
            picture = next(frames(ds))
        except Exception:  # whether it can be decoded is not the question here
            continue
        looked_at += 1
        suspected |= {path.name} if has_text(picture) else set()
    assert looked_at >= 40
    assert suspected == {"fo-dicom__GH355.dcm", "presidio__2_ORIGINAL.dcm"}
