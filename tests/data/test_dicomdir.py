import warnings

import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.fileset import FileSet
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from clinifed.data import dicomdir
from clinifed.data.decoding import Decoder
from clinifed.data.decoding_worker import Limits
from clinifed.data.dicomdir import listed_images
from clinifed.errors import DataError


def record(file_id, kind="IMAGE", in_use=0xFFFF, **offsets):
    item = Dataset()
    item.OffsetOfTheNextDirectoryRecord = offsets.get("next", 0)
    item.RecordInUseFlag = in_use
    item.OffsetOfReferencedLowerLevelDirectoryEntity = 0
    item.DirectoryRecordType = kind
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no name that a conformant writer would give
        if file_id is not None:
            item.ReferencedFileID = file_id
    return item


def directory(path, records, syntax=ExplicitVRLittleEndian, sop_class=MediaStorageDirectoryStorage):
    """A DICOMDIR as somebody may have written it."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = sop_class
    ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.FileSetID = "PLANTED"
    ds.DirectoryRecordSequence = records
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds.save_as(path, enforce_file_format=True)
    return path


def test_a_directory_that_pydicom_wrote_is_read_whole(tmp_path, dicom):
    made = FileSet()
    study, series = generate_uid(), generate_uid()
    for number in range(3):
        more = {"StudyInstanceUID": study, "SeriesInstanceUID": series, "InstanceNumber": number, "SeriesNumber": 1}
        more |= {"PatientName": "", "StudyDate": "20200101", "StudyTime": "101010", "StudyID": "1", "Modality": "OT"}
        made.add(dicom(tmp_path / f"in/{number}.dcm", **more))
    made.write(tmp_path / "cd")
    made._stage["t"].cleanup()  # pydicom leaves it to the garbage collector, which warns
    found = list(listed_images(tmp_path / "cd/DICOMDIR"))
    assert sorted(found) == sorted(p for p in (tmp_path / "cd").rglob("*") if p.is_file() and p.name != "DICOMDIR")
    assert len(found) == 3


@pytest.mark.parametrize(
    "file_id",
    [
        ["..", "SECRET"],
        ["A", "..", "..", "SECRET"],
        "../SECRET",
        "/etc/passwd",
        ["", "etc", "passwd"],
        ["A", ".", "B"],
        "A/../../B",
        "",
        None,
    ],
)
def test_a_path_that_leads_out_is_none_and_the_others_stay(tmp_path, file_id):
    path = directory(tmp_path / "cd/DICOMDIR", [record(["A", "ONE"]), record(file_id), record("TWO")])
    assert list(listed_images(path)) == [tmp_path / "cd/A/ONE", None, tmp_path / "cd/TWO"]


def test_records_that_are_no_images_or_were_deleted_are_passed_by(tmp_path):
    records = [record("GONE", in_use=0), record("SR", kind="SR DOCUMENT"), record(None, kind="PATIENT"), record("ONE")]
    assert list(listed_images(directory(tmp_path / "DICOMDIR", records))) == [tmp_path / "ONE"]


def test_records_that_point_in_circles_are_each_read_once(tmp_path):
    records = [record("ONE", next=1), record("TWO", next=1)]
    assert len(list(listed_images(directory(tmp_path / "DICOMDIR", records)))) == 2


def test_names_are_found_in_another_case_but_their_own_first(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("one", "TWO", "two"):
        (tmp_path / "images" / name).write_bytes(b"")
    path = directory(tmp_path / "DICOMDIR", [record(["IMAGES", name]) for name in ("ONE", "TWO", "GONE")])
    assert list(listed_images(path)) == [tmp_path / "images" / name for name in ("one", "TWO", "GONE")]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"syntax": DeflatedExplicitVRLittleEndian}, "transfer syntax that none may have"),
        ({"sop_class": SecondaryCaptureImageStorage}, "is no directory"),
    ],
)
def test_what_is_no_directory_is_refused(tmp_path, more, told):
    with pytest.raises(DataError, match=told):
        list(listed_images(directory(tmp_path / "DICOMDIR", [record("ONE")], **more)))


@pytest.mark.parametrize("content", [b"", b"PLANTED", bytes(128) + b"DICM" + b"PLANTED" * 9])
def test_a_damaged_directory_is_a_reason(tmp_path, content):
    (tmp_path / "DICOMDIR").write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(listed_images(tmp_path / "DICOMDIR"))
    assert "DICOMDIR" in str(caught.value)
    assert "PLANTED" not in str(caught.value)


def test_the_directory_is_parsed_in_a_reader_and_nowhere_else(tmp_path, monkeypatch):
    for name in ("dcmread", "read_file_meta_info"):
        monkeypatch.setattr(dicomdir, name, None)
    path = directory(tmp_path / "DICOMDIR", [record(["A", "ONE"])])
    assert list(listed_images(path)) == [tmp_path / "A/ONE"]


def test_a_directory_that_takes_too_much_memory_costs_itself_only(tmp_path):
    large = directory(tmp_path / "large/DICOMDIR", [record(["A", f"I{number}"]) for number in range(3000)])
    small = directory(tmp_path / "small/DICOMDIR", [record("ONE")])
    with Decoder(limits=Limits(memory_mib=2)) as decoder:
        with pytest.raises(DataError, match=r"too much memory|crashed"):
            list(listed_images(large, decoder))
        assert list(listed_images(small, decoder)) == [tmp_path / "small/ONE"]


@pytest.mark.realdata
def test_real_directories_are_read_or_refused(real):
    paths = sorted(p for p in real.rglob("*DICOMDIR*") if p.is_file())
    assert len(paths) >= 5
    listed = {}
    for path in paths:
        try:
            listed[path.name] = len(list(listed_images(path)))
        except DataError as reason:
            listed[path.name] = str(reason)
    assert listed["pydicom__test_files_dicomdirtests_DICOMDIR"] == 31  # what pydicom's own FileSet lists
