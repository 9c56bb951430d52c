"""Manifest → features: each image once for its content, and never under another's."""

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from clinifed.config import Specialty, Training
from clinifed.data.manifest import Manifest, Record, write_manifest
from clinifed.errors import DataError
from clinifed.executors import features
from clinifed.executors.features import file_content, patient_tensors
from clinifed.files import file_sha256
from clinifed.models.adapters import FrozenPart, build_trainable

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
    model = FrozenPart(backbone, build_trainable(backbone, LABELS, Training(train="heads")).ready())
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

    def replaced_meanwhile(*arguments, **more):
        for batch in read(*arguments, **more):
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


def volume(path: Path, number: int, frames: int = 9, **more: object) -> str:
    """A CT file of so many frames; returns its name in a manifest."""
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (frames, 40, 40), dtype=np.uint8)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = CTImageStorage, f"1.2.{number}", "CT"
    ds.PatientID = "P1"
    ds.set_pixel_data(pixels if frames > 1 else pixels[0], "MONOCHROME2", 8)
    for keyword, value in more.items():
        setattr(ds, keyword, value)
    ds.save_as(path, enforce_file_format=True)
    return f"images/{path.name}"


@pytest.fixture
def sliced(backbone, counted):
    """As ``embed``, by a policy of so many slices."""

    def run(manifest: Manifest, frames: int | None, cache: Path | None = None, views: int = 1):
        model, counter = counted
        counter.clear()
        agreed = {"radiology": LABELS["radiology"].model_copy(update={"frames": frames})}
        data = patient_tensors(model, backbone, manifest, agreed, split="train", batch_size=4, cache=cache, views=views)
        return data, counter["images"]

    return run


def test_each_slice_that_a_policy_takes_is_a_row_of_its_patient(tmp_path: Path, sliced) -> None:
    names = [volume(tmp_path / f"images/{n}.dcm", n, frames) for n, frames in enumerate((9, 2, 1))]
    records = [Record(name, f"p{i // 2}", "radiology", "normal", "", "train") for i, name in enumerate(names)]
    manifest = write_manifest(tmp_path / "manifest.csv", records, "synthetic")
    key, _ = sliced(manifest, None)
    assert key.image.tolist() == [0, 1, 2]
    assert torch.equal(sliced(manifest, 1)[0].features, key.features)
    several, made = sliced(manifest, 3, views=2)
    assert made == 12
    assert several.image.tolist() == [0] * 6 + [1] * 4 + [2] * 2
    assert several.patient.tolist() == [0] * 10 + [1] * 2
    assert several.first.nonzero().flatten().tolist() == [0, 6, 10]
    torch.testing.assert_close(several.features[2], key.features[0])  # the middle one of three


def test_another_policy_is_kept_apart_and_the_same_is_found_again(tmp_path: Path, sliced) -> None:
    name = volume(tmp_path / "images/0.dcm", 0)
    manifest = write_manifest(tmp_path / "m.csv", [Record(name, "p", "radiology", "normal", "", "train")], "synthetic")
    made = {frames: sliced(manifest, frames, tmp_path / "c")[1] for frames in (1, 3, 5)}
    assert made == {1: 1, 3: 3, 5: 5}
    for frames in (5, 1, 3):
        kept, none = sliced(manifest, frames, tmp_path / "c")
        assert none == 0
        assert torch.equal(kept.features, sliced(manifest, frames)[0].features)


def test_of_a_series_of_files_the_slices_are_taken_by_their_position(tmp_path: Path, sliced) -> None:
    order = [3, 0, 4, 1, 2]  # file → place in the stack
    records = [
        Record(
            volume(tmp_path / f"images/{n}.dcm", n, 1), "p", "radiology", "normal", "", "train", "", "stack", str(place)
        )
        for n, place in enumerate(order)
    ]
    manifest = write_manifest(tmp_path / "m.csv", records, "synthetic")
    every, _ = sliced(manifest, None)
    assert len(every.features) == 5
    key, made = sliced(manifest, 1)
    assert made == 1
    torch.testing.assert_close(key.features[0], every.features[order.index(2)])
    assert sliced(manifest, 3)[1] == 3
    assert sliced(manifest, 64)[1] == 5
