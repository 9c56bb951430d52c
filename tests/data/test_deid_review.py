"""What is kept back for suspected text leaves only by its hash, after somebody looked, and the report says so."""

import json
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.uid import CTImageStorage

from clinifed.data import deidentify
from clinifed.data.deidentify import deidentify_folder
from clinifed.errors import DataError
from clinifed.files import file_sha256

CT = {"SOPClassUID": CTImageStorage, "Modality": "CT", "PatientID": "PLANTED-7"}


@pytest.fixture
def kept(tmp_path: Path, dicom) -> dict[str, Path]:
    """A run in which one file was written, two were kept back for suspected text, and one has no patient."""
    files = {
        "good": dicom(tmp_path / "in/good.dcm", **CT),
        "declared": dicom(tmp_path / "in/declared.dcm", **CT, BurnedInAnnotation="YES"),
        "screen": dicom(tmp_path / "in/screen.dcm", **CT, SeriesDescription="Screen Save"),
        "nobody": dicom(tmp_path / "in/nobody.dcm", **(CT | {"PatientID": ""})),
    }
    report = deidentify_folder(tmp_path / "in", tmp_path / "out")
    assert (report.written, sum(report.skipped.values())) == (1, 3)
    return files


def entries(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def again(tmp_path: Path, *lines: str):
    (tmp_path / "reviewed.txt").write_text("".join(f"{line}\n" for line in lines))
    return deidentify_folder(tmp_path / "in", tmp_path / "out", reviewed=tmp_path / "reviewed.txt")


def test_the_quarantine_has_the_hash_of_what_may_be_reviewed_and_of_nothing_else(tmp_path, kept):
    hashes = {entry["path"]: entry.get("sha256") for entry in entries(tmp_path / "out.quarantine.jsonl")}
    expected = {str(kept[name]): file_sha256(kept[name]) for name in ("declared", "screen")}
    assert hashes == expected | {str(kept["nobody"]): None}


def test_a_file_that_was_looked_at_is_released_and_the_report_says_so(tmp_path, kept):
    released = file_sha256(kept["declared"])
    report = again(tmp_path, "# looked at by A. Steward", "", f"{released.upper()}  in/declared.dcm")
    assert (report.written, report.unchanged) == (1, 1)
    assert report.to_dict()["reviewed"] == {"burned-in annotation is declared": 1}
    assert report.to_dict()["left_out"] == {"patient is blank": 1, "picture of a screen or a page is suspected": 1}
    (line,) = [line for line in entries(tmp_path / "out.report.jsonl")[:-1] if "reviewed" in line]
    assert line["reviewed"] == "burned-in annotation is declared"
    assert str(dcmread(tmp_path / "out" / str(line["file"])).PatientID) != "PLANTED-7"
    assert "PLANTED" not in (tmp_path / "out.report.jsonl").read_text()
    assert released not in (tmp_path / "out.report.jsonl").read_text()


def test_a_review_holds_for_the_next_run_and_can_grow(tmp_path, kept):
    first, second = (file_sha256(kept[name]) for name in ("declared", "screen"))
    again(tmp_path, first)
    marked = [entry for entry in entries(tmp_path / "out.quarantine.jsonl") if entry.get("reviewed")]
    assert [entry["sha256"] for entry in marked] == [first]
    report = again(tmp_path, first, second)
    assert (report.written, report.unchanged, sum(report.reviewed.values())) == (1, 2, 2)
    without = deidentify_folder(tmp_path / "in", tmp_path / "out")
    assert sum(without.skipped.values()) == 3, "a review is given each time"


def test_what_is_not_in_quarantine_for_text_is_an_error_and_nothing_is_written(tmp_path, kept):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(DataError) as caught:
        again(tmp_path, "0" * 64, file_sha256(kept["good"]), file_sha256(kept["nobody"]), "declared.dcm")
    assert [problem.split(":")[1] for problem in caught.value.problems] == ["1", "2", "3", "4"]
    assert sum("is not in quarantine" in problem for problem in caught.value.problems) == 3
    assert "not a SHA-256" in caught.value.problems[3]
    (tmp_path / "reviewed.txt").unlink()
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_without_a_quarantine_there_is_nothing_to_release(tmp_path, dicom):
    dicom(tmp_path / "in/a.dcm", **CT)
    with pytest.raises(DataError, match="run without --reviewed first"):
        again(tmp_path, "0" * 64)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_the_one_that_was_looked_at_stays(tmp_path, kept, dicom):
    reviewed = file_sha256(kept["declared"])
    dicom(kept["declared"], **CT, BurnedInAnnotation="YES", Rows=8, ImageComments="another")
    report = again(tmp_path, reviewed)
    assert report.skipped["burned-in annotation is declared"] == 1
    assert not report.reviewed


def test_a_file_that_changes_while_it_is_read_stays(tmp_path, kept, monkeypatch):
    reviewed, read = file_sha256(kept["declared"]), deidentify.content_of

    def changing(path: Path) -> str | None:
        before = read(path)
        if path == kept["declared"]:
            path.write_bytes(path.read_bytes() + b"\0\0")
        return before

    monkeypatch.setattr(deidentify, "content_of", changing)
    assert again(tmp_path, reviewed).skipped["changed while it was read"] == 1
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_another_reason_keeps_a_reviewed_file_all_the_same(tmp_path, kept, dicom):
    path = dicom(tmp_path / "in/both.dcm", **CT, BurnedInAnnotation="YES", PixelPaddingValue=0, BitsStored=0)
    deidentify_folder(tmp_path / "in", tmp_path / "out")
    report = again(tmp_path, file_sha256(path))
    assert report.skipped["bits stored out of range"] == 1
    assert not report.reviewed
