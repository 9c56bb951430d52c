"""Manifest → features: each image once for its content, and never under another's."""

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clinifed.config import Specialty, Training
from clinifed.data.manifest import Manifest, Record, write_manifest
from clinifed.errors import DataError
from clinifed.executors import features
from clinifed.executors.features import file_content, patient_tensors
from clinifed.files import file_sha256
from clinifed.models.adapters import GlobalModel, build_trainable

LABELS = {"radiology": Specialty(labels={"normal": ("a normal chest",), "abnormal": ("an opacity",)})}


def picture(path: Path, number: int) -> None:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (40, 40), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def manifest_of(folder: Path, numbers: list[int]) -> Manifest:
    records = []
    for number in numbers:
        path = folder / "images" / f"{number}.png"
        if not path.exists():
            picture(path, number)
        records.append(Record(f"images/{number}.png", f"p{number // 2:02}", "radiology", "normal", "", "train"))
    return write_manifest(folder / "manifest.csv", records, "synthetic")


@pytest.fixture
def counted(backbone, monkeypatch):
    """The model, and how many images it was given."""
    model = GlobalModel(backbone, build_trainable(backbone, LABELS, Training(train="heads"))).eval()
    counter, forward = Counter(), model.features

    def count(pixels):
        counter["images"] += len(pixels)
        return forward(pixels)

    monkeypatch.setattr(model, "features", count)
    return model, counter


@pytest.fixture
def embed(backbone, counted):
    def run(manifest: Manifest, cache: Path | None, views: int = 1):
        model, counter = counted
        counter.clear()
        options = {"split": "train", "batch_size": 3, "cache": cache, "views": views}
        data = patient_tensors(model, backbone, manifest, LABELS, **options)
        return data, counter["images"]

    return run


def test_with_and_without_a_cache_the_features_are_the_same(tmp_path: Path, embed) -> None:
    manifest = manifest_of(tmp_path, list(range(8)))
    (plain, _), (first, made), (again, none) = (
        embed(manifest, cache) for cache in (None, tmp_path / "c", tmp_path / "c")
    )
    assert torch.equal(plain.features, first.features)
    assert torch.equal(first.features, again.features)
    assert (made, none) == (8, 0)
    assert not again.features.requires_grad
    assert not again.features.is_inference()


def test_a_new_image_is_the_only_one_that_is_encoded_and_a_removed_one_costs_nothing(tmp_path: Path, embed) -> None:
    embed(manifest_of(tmp_path, list(range(6))), tmp_path / "c")
    assert embed(manifest_of(tmp_path, [*range(6), 7]), tmp_path / "c")[1] == 1
    few, made = embed(manifest_of(tmp_path, [1, 4]), tmp_path / "c")
    assert made == 0
    assert torch.equal(few.features, embed(manifest_of(tmp_path, [1, 4]), None)[0].features)


def test_views_stand_together_and_are_kept(tmp_path: Path, embed) -> None:
    manifest = manifest_of(tmp_path, list(range(4)))
    plain, _ = embed(manifest, None, 3)
    embed(manifest, tmp_path / "c", 3)
    kept, made = embed(manifest, tmp_path / "c", 3)
    assert made == 0
    assert kept.patient.tolist() == [0] * 6 + [1] * 6
    assert torch.equal(kept.features, plain.features)
    assert torch.equal(kept.features[::3], embed(manifest, tmp_path / "c", 1)[0].features)


def test_an_image_that_is_replaced_is_another_image(tmp_path: Path, embed) -> None:
    manifest = manifest_of(tmp_path, list(range(4)))
    before, _ = embed(manifest, tmp_path / "c")
    picture(tmp_path / "images" / "2.png", 99)
    after, made = embed(manifest, tmp_path / "c")
    assert made == 1
    changed = (before.features != after.features).any(dim=1)
    assert changed.tolist() == [False, False, True, False]


def test_an_image_that_changes_while_it_is_read_is_left_out(tmp_path: Path, embed, monkeypatch, caplog) -> None:
    manifest = manifest_of(tmp_path, list(range(4)))
    read = features.iter_pixels

    def replaced_meanwhile(*arguments):
        for batch in read(*arguments):
            picture(tmp_path / "images" / "2.png", 99)
            yield batch

    monkeypatch.setattr(features, "iter_pixels", replaced_meanwhile)
    data, _ = embed(manifest, tmp_path / "c")
    assert len(data.features) == 3
    assert "changed since it was listed" in caplog.text
    monkeypatch.undo()
    assert "images/2" not in caplog.text


def hashed(manifest: Manifest) -> Manifest:
    records = [replace(r, sha256=file_sha256(manifest.folder / r.image)) for r in manifest.records]
    return replace(manifest, records=tuple(records))


def test_a_manifest_that_knows_the_content_needs_no_file_for_what_is_kept(tmp_path: Path, embed) -> None:
    manifest = hashed(manifest_of(tmp_path, list(range(4))))
    first, _ = embed(manifest, tmp_path / "c")
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    kept, made = embed(manifest, tmp_path / "c")
    assert made == 0
    assert torch.equal(kept.features, first.features)


def test_a_file_that_is_not_what_the_manifest_knows_is_left_out(tmp_path: Path, embed, caplog) -> None:
    manifest = hashed(manifest_of(tmp_path, list(range(4))))
    picture(tmp_path / "images" / "2.png", 99)
    data, _ = embed(manifest, tmp_path / "c")
    assert len(data.features) == 3
    assert "changed since it was listed" in caplog.text


def test_unreadable_images_are_counted_with_their_reasons_and_asked_for_again(tmp_path: Path, embed, caplog) -> None:
    manifest = manifest_of(tmp_path, list(range(6)))
    (tmp_path / "images" / "1.png").write_bytes(b"no picture")
    (tmp_path / "images" / "2.png").unlink()
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            data, _ = embed(manifest, tmp_path / "c")
        assert data.patients == 3
        assert len(data.features) == 4
        assert "images left out" in caplog.text
        assert "1.png" not in caplog.text
    picture(tmp_path / "images" / "1.png", 1)
    assert len(embed(manifest, tmp_path / "c")[0].features) == 5


def test_where_nothing_can_be_read_the_counts_are_told(tmp_path: Path, embed) -> None:
    manifest = manifest_of(tmp_path, [0, 1])
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of 2 images could be read"):
        embed(manifest, tmp_path / "c")


def test_a_pipe_or_a_folder_has_no_content(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    assert file_content(tmp_path / "pipe") is None
    assert file_content(tmp_path) is None
    assert file_content(tmp_path / "absent") is None


def test_other_code_or_libraries_for_reading_make_other_features(tmp_path: Path, embed, monkeypatch) -> None:
    manifest = manifest_of(tmp_path, list(range(2)))
    embed(manifest, tmp_path / "c")
    monkeypatch.setattr(features, "_reading", lambda: ["other"])
    assert embed(manifest, tmp_path / "c")[1] == 2
