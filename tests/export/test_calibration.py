"""Calibration reads public images only, evenly, and the same ones each time."""

from collections import Counter
from pathlib import Path

import pytest

from clinifed.data.manifest import read_manifest
from clinifed.errors import PrivacyError
from clinifed.export.calibration import calibration_set, select_evenly
from clinifed.models.backbone import Backbone


def test_a_hospitals_images_are_refused_and_the_error_says_why(sets: dict[str, Path], backbone: Backbone) -> None:
    with pytest.raises(PrivacyError, match="hospital"):
        calibration_set(read_manifest(sets["hospital"]), backbone.preprocess, 8)


def test_images_are_taken_evenly_and_the_same_each_time(sets: dict[str, Path], backbone: Backbone) -> None:
    manifest = read_manifest(sets["validation"])
    chosen = select_evenly(manifest.records, 10)
    assert chosen == select_evenly(list(reversed(manifest.records)), 10)
    assert set(Counter((r.specialty, r.label) for r in chosen).values()) == {2}  # five labels in all


def test_the_set_says_what_it_was_made_of(sets: dict[str, Path], backbone: Backbone) -> None:
    manifest = read_manifest(sets["validation"])
    found = calibration_set(manifest, backbone.preprocess, 6)
    assert found.pixels.shape == (6, 3, backbone.preprocess.size_px, backbone.preprocess.size_px)
    assert (found.sha256, found.data_class, found.count) == (manifest.sha256, "public", 6)
