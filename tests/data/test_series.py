"""A series of CT, MR or PET slices, each a file of its own: found by the header, chosen by position."""

import random
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from clinifed.config import FolderIndex, Specialty
from clinifed.data.fingerprint import read_header
from clinifed.data.index import index_folder
from clinifed.data.manifest import Record
from clinifed.data.series import chosen_slices, frames_of, slice_of
from clinifed.data.volumes import Frames

AXIAL, CORONAL, SAGITTAL = [1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1]


def header(**changes) -> Dataset:
    ds = Dataset()
    values = {"Modality": "CT", "SeriesInstanceUID": "1.2.3", "InstanceNumber": 7}
    values |= {"ImagePositionPatient": [-100, -90.5, 12.25], "ImageOrientationPatient": AXIAL}
    for keyword, value in (values | changes).items():
        if value is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # no value that a conformant writer would give
                setattr(ds, keyword, value)
    return ds


@pytest.mark.parametrize(
    ("directions", "told"),
    [(AXIAL, ("1.2.3 axial", 12.25)), (CORONAL, ("1.2.3 coronal", -90.5)), (SAGITTAL, ("1.2.3 sagittal", -100))],
)
def test_the_position_lies_along_the_normal(directions, told):
    stack, position = slice_of(header(ImageOrientationPatient=directions))
    assert stack == told[0]
    assert abs(float(position)) == pytest.approx(abs(told[1]))


def test_a_tilted_stack_is_in_the_order_of_its_normal():
    tilted = [1, 0, 0, 0, 0.8, -0.6]  # the normal is (0, 0.6, 0.8)
    places = [float(slice_of(header(ImageOrientationPatient=tilted, ImagePositionPatient=[5, 0.6 * k, 0.8 * k]))[1])
              for k in range(5)]  # fmt: skip
    assert places == pytest.approx(range(5))


@pytest.mark.parametrize(
    "changes",
    [
        {"ImagePositionPatient": None},
        {"ImageOrientationPatient": None},
        {"ImagePositionPatient": [1, 2]},
        {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]},
        {"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]},
    ],
)
def test_without_geometry_the_instance_number_says_it(changes):
    assert slice_of(header(**changes)) == ("1.2.3", "7")


@pytest.mark.parametrize(
    "changes",
    [
        *({"Modality": modality} for modality in ("CR", "DX", "XC", "ES", "US", "MG", None)),
        {"SeriesInstanceUID": None},
        {"SeriesInstanceUID": "../../etc"},
        {"NumberOfFrames": 40},
        {"ImagePositionPatient": None, "InstanceNumber": None},
    ],
)
def test_what_is_no_slice_has_no_place(changes):
    assert slice_of(header(**changes)) == ("", "")


def record(image: str, series: str, position: float | str, patient: str = "p", specialty: str = "ct") -> Record:
    return Record(image, patient, specialty, "normal", "", "train", "", series, str(position))


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 90), frames=st.integers(1, 64), seed=st.integers(0, 99))
def test_slices_are_chosen_by_position_in_whatever_order_they_are_listed(count, frames, seed):
    stack = [record(f"{number * 7919 % 1000:03}", "s", number - 40.5) for number in range(count)]
    expected = {stack[index].image for index in Frames(frames).of(count)}
    random.Random(seed).shuffle(stack)
    chosen = chosen_slices(stack, {"ct": Frames(frames)})
    assert {r.image for r in chosen} == expected
    assert [r for r in stack if r in chosen] == list(chosen)


def test_a_choice_depends_on_the_stack_of_its_own_patient_alone():
    mine = [record(f"a{n}", "s", n) for n in range(9)]
    theirs = [record(f"b{n}", "s", n, patient="q") for n in range(5)]
    chosen = chosen_slices([*mine, *theirs], {"ct": Frames(1)})
    assert [r.image for r in chosen] == ["a4", "b2"]
    assert chosen_slices(mine, {"ct": Frames(1)}) == (mine[4],)


def test_by_default_every_file_is_an_image_and_files_that_are_no_slices_always_are():
    stack = [record(f"a{n}", "s", n) for n in range(9)]
    pictures = [record(f"x{n}", "", "") for n in range(4)]
    assert chosen_slices([*stack, *pictures], {}) == (*stack, *pictures)
    assert chosen_slices([*stack, *pictures], {"mr": Frames(1)}) == (*stack, *pictures)
    assert chosen_slices([*stack, *pictures], {"ct": Frames(1)}) == (stack[4], *pictures)


def test_frames_are_of_the_specialties_that_say_so():
    labels = {"a": ("a",), "b": ("b",)}
    agreed = {"ct": Specialty(labels=labels, frames=5), "derma": Specialty(labels=labels)}
    assert frames_of(agreed) == {"ct": Frames(5)}


def test_an_index_knows_the_series_by_a_pseudonym_and_the_place_in_it(tmp_path, dicom):
    labels = ["image,label"]
    for number in range(5):
        more = {"SeriesInstanceUID": "1.2.826.77", "ImageOrientationPatient": AXIAL, "Modality": "CT"}
        dicom(tmp_path / f"in/{number}.dcm", ImagePositionPatient=[0, 0, 2.5 * (4 - number)], **more,
              WindowCenter=number + 20, WindowWidth=80)  # fmt: skip
        labels.append(f"{number}.dcm,normal")
    dicom(tmp_path / "in/cr.dcm", SeriesInstanceUID="1.2.826.77", Modality="CR", InstanceNumber=1, PatientID="P2")
    (tmp_path / "in/labels.csv").write_text("\n".join([*labels, "cr.dcm,normal"]) + "\n")
    index = FolderIndex(folder=tmp_path / "in", labels=(tmp_path / "in/labels.csv",))
    report = index_folder(index, tmp_path / "m/manifest.csv", ("ct",), "hospital")
    assert report.manifest is not None
    slices = [r for r in report.manifest.records if r.series]
    assert len({r.series for r in slices}) == 1
    assert sorted(float(r.position) for r in slices) == [0, 2.5, 5, 7.5, 10]
    assert "1.2.826" not in (tmp_path / "m/manifest.csv").read_text()
    others = [r for r in report.manifest.records if not r.series]
    assert len(others) == 1
    assert len(chosen_slices(report.manifest.records, {"ct": Frames(1)})) == 2


def test_a_place_that_cannot_be_read_is_not_a_damaged_file(tmp_path, dicom):
    path = dicom(tmp_path / "a.dcm", Modality="CT", SeriesInstanceUID="1.2.3", ImagePositionPatient=[1, 2, 3])
    path.write_bytes(path.read_bytes().replace(b"1\\2\\3", b"1\\x\\3"))
    assert read_header(path).series == ""
