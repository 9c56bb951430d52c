import os
import signal
import threading
from collections import Counter
from dataclasses import dataclass

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from clinifed.data.dataset import iter_pixels, load_pixels, patients
from clinifed.data.decoding import Decoder
from clinifed.data.manifest import Manifest, Record
from clinifed.data.transforms import augment
from clinifed.data.volumes import Frames


@dataclass(frozen=True)
class Want:
    size_px: int = 64
    mean: tuple[float, ...] = (0.48, 0.46, 0.41)
    std: tuple[float, ...] = (0.27, 0.26, 0.28)
    interpolation: str = "bicubic"


def manifest(folder, *names):
    records = tuple(Record(n, f"p{i}", "radiology", "normal", "", "train") for i, n in enumerate(names))
    return Manifest(folder / "manifest.csv", records, "public", "0")


def scene(height, width):
    rng = np.random.default_rng(height * width)
    return Image.fromarray(rng.integers(0, 256, (9, 11, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


# Odd rests (67 - 64 and the like) are where croppers differ by a pixel.
@pytest.mark.parametrize("size", [(120, 160), (64, 64), (67, 64), (64, 67), (71, 64), (100, 151), (40, 50)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_equals_open_clip_preprocess(tmp_path, size, interpolation, mode):
    want = Want(interpolation=interpolation)
    picture = scene(*size).convert(mode)
    picture.save(tmp_path / "a.png")
    theirs = open_clip.image_transform(64, False, want.mean, want.std, interpolation=interpolation)(picture)
    ours = load_pixels(manifest(tmp_path, "a.png"), manifest(tmp_path, "a.png").records, want).pixels[0]
    difference = (ours - theirs).abs() * torch.tensor(want.std)[:, None, None]  # on the scale of [0, 1]
    assert difference.mean() < 3e-3
    assert difference.max() < 1e-2


def test_unreadable_and_elongated_images_are_counted_not_fatal(tmp_path):
    scene(80, 80).save(tmp_path / "good.png")
    Image.fromarray(np.zeros((1, 20000), np.uint8)).save(tmp_path / "strip.png")
    (tmp_path / "bad.dcm").write_bytes(b"no image")
    these = manifest(tmp_path, "bad.dcm", "good.png", "strip.png", "absent.png")
    loaded = load_pixels(these, these.records, Want())
    assert [r.image for r in loaded.records] == ["good.png"]
    assert loaded.pixels.shape == (1, 3, 64, 64)
    assert type(loaded.pixels) is torch.Tensor
    assert sum(loaded.skipped.values()) == 3
    assert not any(name in reason for reason in loaded.skipped for name in ("bad", "strip", str(tmp_path)))


def test_no_records_are_no_images(tmp_path):
    assert load_pixels(manifest(tmp_path), (), Want()).pixels.shape == (0, 3, 64, 64)


def test_batches_are_the_whole_in_pieces(tmp_path):
    for i in range(5):
        scene(64 + i, 70).save(tmp_path / f"{i}.png")
    these = manifest(tmp_path, *(f"{i}.png" for i in range(5)))
    batches = list(iter_pixels(these, these.records, Want(), 2))
    assert [len(b.records) for b in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([b.pixels for b in batches]), load_pixels(these, these.records, Want()).pixels)


def test_a_patient_of_two_specialties_is_one_unit(tmp_path):
    records = (
        Record("b", "p2", "radiology", "", "", "train"),
        Record("a", "p1", "cardiology", "", "", "train"),
        Record("c", "p2", "cardiology", "", "", "train"),
        Record("d", "p3", "cardiology", "", "", "holdout"),
    )
    units = patients(Manifest(tmp_path / "m.csv", records, "public", "0"), "train", ("radiology", "cardiology"))
    assert [(u.key, len(u.records)) for u in units] == [("p1", 1), ("p2", 2)]


def disc(row: int, column: int) -> torch.Tensor:
    """A bright disc on black, (1, 3, 64, 64)."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    return (((y - row) ** 2 + (x - column) ** 2) < 16).float().expand(1, 3, 64, 64).clone()


def centre(image: torch.Tensor) -> tuple[float, float]:
    """Row and column of the disc, from the middle."""
    weight = image[0, 0] / image[0, 0].sum()
    axis = torch.arange(64) - 31.5
    return float((weight.sum(1) * axis).sum()), float((weight.sum(0) * axis).sum())


def test_view_0_is_the_image_and_the_others_turn_both_ways_and_come_nearer():
    picture = disc(32, 50)
    assert augment(picture, 0) is picture
    row, column = centre(picture)
    one, two = centre(augment(picture, 1)), centre(augment(picture, 2))
    assert (one[0] - row) * (two[0] - row) < 0, "one turns up, the other down"
    for view in (one, two):
        assert np.hypot(*view) == pytest.approx(1.04 * np.hypot(row, column), rel=0.02)
        assert view[1] > 0, "nothing is flipped"
    far = centre(augment(picture, 5))
    assert np.hypot(*far) == pytest.approx(1.04**3 * np.hypot(row, column), rel=0.03)


def test_the_views_of_an_image_do_not_depend_on_the_others():
    both = torch.cat([disc(20, 20), disc(40, 30)])
    assert torch.equal(augment(both, 3)[:1], augment(disc(20, 20), 3))


def test_a_volume_adds_a_row_for_each_of_its_frames(tmp_path, dicom):
    frames = np.stack([np.full((70, 70), value, np.uint8) for value in range(0, 250, 10)])
    dicom(tmp_path / "a.dcm", frames)
    dicom(tmp_path / "b.dcm", frames[3])
    these = manifest(tmp_path, "a.dcm", "b.dcm")
    (batch,) = iter_pixels(these, these.records, Want(), 10, frames={"radiology": Frames(5)})
    assert [r.image for r in batch.records] == ["a.dcm"] * 5 + ["b.dcm"]
    shown = batch.pixels[:, 0].mean((1, 2)) * Want().std[0] + Want().mean[0]
    expected = [frames[index].mean() / 255 for index in Frames(5).of(25)] + [30 / 255]
    np.testing.assert_allclose(shown, expected, atol=1e-4)


def test_a_batch_holds_no_more_rows_than_it_may_but_for_a_file_that_has_more_alone(tmp_path, dicom):
    volume = np.arange(9, dtype=np.uint8)[:, None, None] * np.ones((1, 70, 70), np.uint8)
    names = [f"{number}.dcm" for number in range(5)]
    for name in names:
        dicom(tmp_path / name, volume)
    these = manifest(tmp_path, *names)

    def sizes(batch_size, frames):
        batches = list(iter_pixels(these, these.records, Want(), batch_size, frames={"radiology": Frames(frames)}))
        assert [r.image for batch in batches for r in batch.records] == [name for name in names for _ in range(frames)]
        return [len(batch.pixels) for batch in batches]

    assert sizes(8, 4) == [8, 8, 4]
    assert sizes(2, 4) == [4] * 5
    assert sizes(3, 1) == [3, 2]
    assert len(load_pixels(these, these.records, Want(), {"radiology": Frames(4)}).pixels) == 20


def test_a_reader_that_dies_costs_its_image_and_the_batch_goes_on(tmp_path, dicom):
    names = [f"{n}.dcm" for n in range(6)]
    for name in names:
        dicom(tmp_path / name, np.zeros((70, 70), np.uint8))
    these = manifest(tmp_path, *names)
    with Decoder() as decoder:
        batches = iter_pixels(these, these.records, Want(), 1, decoder=decoder)
        first = next(batches)
        for pid in decoder.pids:
            os.kill(pid, signal.SIGKILL)
        rest = list(batches)
    assert len(first.records) == 1
    skipped = sum((batch.skipped for batch in rest), Counter())
    assert sum(len(batch.records) for batch in rest) + sum(skipped.values()) == 5
    assert set(skipped) <= {"reader crashed"}
    assert len(rest[-1].records) == 1


def test_leaving_early_leaves_nothing_running(tmp_path, dicom):
    dicom(tmp_path / "a.dcm", np.zeros((70, 70), np.uint8))
    these = manifest(tmp_path, *["a.dcm"] * 40)
    before = threading.active_count()
    with Decoder() as decoder:
        batches = iter_pixels(these, these.records, Want(), 2, decoder=decoder)
        next(batches)
        batches.close()
    assert threading.active_count() == before
