import json
import logging
import stat

import numpy as np
import pytest
from PIL import Image

from clinifed.config import FolderIndex
from clinifed.data.index import index_folder, patient_pseudonym
from clinifed.data.manifest import site_key
from clinifed.errors import DataError


def index(folder, out, table=None, specialties=("radiology",), **more):
    if table is not None:
        (folder / "labels.csv").write_text(table)
        more["labels"] = (folder / "labels.csv",)
    return index_folder(FolderIndex(folder=folder, **more), out / "manifest.csv", specialties, "hospital")


def test_manifest_names_nobody_and_is_owner_only(tmp_path, dicom, caplog):
    caplog.set_level(logging.DEBUG)
    dicom(tmp_path / "in/PLANTED/PLANTED.dcm", PatientID="PLANTED-1", PatientName="PLANTED^NAME")
    report = index(tmp_path / "in", tmp_path / "out")
    assert (report.images, report.patients) == (1, 1)
    assert all("PLANTED" not in p.read_text() for p in (tmp_path / "out").glob("manifest.*"))
    assert "PLANTED" not in caplog.text
    assert (tmp_path / "out" / report.manifest.records[0].image).is_symlink()
    assert stat.S_IMODE((tmp_path / "out/images").stat().st_mode) == 0o700


def test_spelling_does_not_make_another_patient_and_nobody_is_skipped(tmp_path, dicom):
    for name, patient in {"a": " p１ ", "b": "P1", "c": "anonymous", "d": "", "e": "000"}.items():
        dicom(tmp_path / "in" / f"{name}.dcm", PatientID=patient)
    report = index(tmp_path / "in", tmp_path / "out")
    assert (report.images, report.patients, sum(report.skipped.values())) == (2, 1, 3)


def test_same_number_from_two_issuers_is_two_patients(tmp_path, dicom):
    dicom(tmp_path / "in/a.dcm", IssuerOfPatientID="A")
    dicom(tmp_path / "in/b.dcm", IssuerOfPatientID="B")
    assert index(tmp_path / "in", tmp_path / "out").patients == 2


def test_a_folder_of_originals_is_never_deleted(tmp_path, dicom):
    original = dicom(tmp_path / "images/a.dcm")
    with pytest.raises(DataError, match="other files"):
        index(tmp_path, tmp_path)
    assert original.is_file()
    assert not original.is_symlink()


def test_table_that_disagrees_with_the_header_is_quarantined(tmp_path, dicom):
    dicom(tmp_path / "in/a.dcm", PatientID="P1")
    dicom(tmp_path / "in/b.dcm", PatientID="P1")
    report = index(tmp_path / "in", tmp_path / "out", "image,patient\na.dcm,P2\nb.dcm,p1\n")
    assert dict(report.skipped) == {"table and header name different patients": 1}


@pytest.mark.parametrize("name", ["x\x00y.dcm", "y" * 5000, "../secret.dcm", "absent.dcm"])
def test_an_impossible_row_is_skipped_not_fatal(tmp_path, dicom, name):
    dicom(tmp_path / "in/a.dcm")
    dicom(tmp_path / "secret.dcm")
    report = index(tmp_path / "in", tmp_path / "out", f"image\n{name}\na.dcm\n")
    assert (report.images, sum(report.skipped.values())) == (1, 1)


def test_a_table_without_header_is_refused_without_quoting_it(tmp_path, dicom):
    dicom(tmp_path / "in/a.dcm")
    with pytest.raises(DataError, match="missing column") as caught:
        index(tmp_path / "in", tmp_path / "out", "a.dcm,PLANTED,normal\n")
    assert "PLANTED" not in str(caught.value)


def test_a_patient_in_two_splits_leaves_no_manifest(tmp_path, dicom):
    dicom(tmp_path / "in/a.dcm")
    dicom(tmp_path / "in/b.dcm")
    with pytest.raises(DataError, match="two splits"):
        index(tmp_path / "in", tmp_path / "out", "image,split\na.dcm,train\nb.dcm,holdout\n")
    assert not (tmp_path / "out/manifest.csv").exists()


def test_pictures_take_patients_and_labels_from_the_table(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "in/a.png")
    report = index(
        tmp_path / "in",
        tmp_path / "out",
        "file,who,dx\na.png,Q1,1\na.png,Q1,9\n",
        columns={"image": "file", "patient": "who", "label": "dx"},
        values={"radiology": {"1": "abnormal"}},
    )
    assert report.manifest.records[0].label == "abnormal"
    assert dict(report.skipped) == {"label has no meaning in `values`": 1}


def test_links_out_of_the_folder_are_not_followed(tmp_path, dicom):
    dicom(tmp_path / "in/a.dcm")
    (tmp_path / "in/b.dcm").symlink_to(dicom(tmp_path / "elsewhere.dcm", PatientID="P2"))
    assert index(tmp_path / "in", tmp_path / "out").images == 1


def test_nothing_usable_tells_the_counts(tmp_path, dicom):
    dicom(tmp_path / "in/a.dcm", PatientID="")
    with pytest.raises(DataError, match="1 × patient is blank"):
        index(tmp_path / "in", tmp_path / "out")


def quarantine(out):
    return [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]


def test_a_number_with_and_without_issuer_refuses_the_whole_index(tmp_path, dicom):
    """Guessing would make one patient two, or let one patient decide whether another counts."""
    dicom(tmp_path / "in/a.dcm", PatientID="PLANTED", IssuerOfPatientID="A")
    dicom(tmp_path / "in/b.dcm", PatientID=" planted", IssuerOfPatientID="")
    dicom(tmp_path / "in/c.dcm", PatientID="P2", IssuerOfPatientID="")
    with pytest.raises(DataError, match=r"2 images: patient's number also occurs.*--issuer") as caught:
        index(tmp_path / "in", tmp_path / "out")
    assert "planted" not in str(caught.value).lower()
    assert not (tmp_path / "out/manifest.csv").exists()
    assert {entry["path"][-5:] for entry in quarantine(tmp_path / "out")} == {"a.dcm", "b.dcm"}


def test_records_without_issuer_belong_to_the_one_that_is_configured(tmp_path, dicom):
    dicom(tmp_path / "in/a.dcm", IssuerOfPatientID="Hospital A")
    dicom(tmp_path / "in/b.dcm", IssuerOfPatientID=" ")
    dicom(tmp_path / "in/c.dcm", IssuerOfPatientID="B")
    assert index(tmp_path / "in", tmp_path / "out", issuer="hospital a").patients == 2


def test_a_patient_is_found_again_under_any_spelling(tmp_path, dicom):
    dicom(tmp_path / "in/a.dcm", PatientID="P 1", IssuerOfPatientID="Hospital")
    record = index(tmp_path / "in", tmp_path / "out").manifest.records[0]
    assert patient_pseudonym(site_key(tmp_path / "out"), "HOSPITAL ", " p  1") == record.patient


def test_the_configured_issuer_holds_for_pictures_too(tmp_path, dicom):
    dicom(tmp_path / "in/a.dcm", PatientID="Q1", IssuerOfPatientID="A")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "in/b.png")
    table = "image,patient\na.dcm,\nb.png,Q1\n"
    assert index(tmp_path / "in", tmp_path / "out", table, issuer="A").patients == 1
    with pytest.raises(DataError, match="also occurs"):
        index(tmp_path / "in", tmp_path / "other", table)


def test_a_file_listed_for_two_patients_refuses_the_whole_index(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / f"in/{name}.png")
    rows = "image,patient\na.png,PLANTED1\nb.png,PLANTED1\na.png,PLANTED2\n"
    with pytest.raises(DataError, match="1 image: listed for two patients; correct the table") as caught:
        index(tmp_path / "in", tmp_path / "out", rows)
    assert "PLANTED" not in str(caught.value)
    assert not (tmp_path / "out/manifest.csv").exists()


def test_a_file_listed_twice_for_the_same_patient_is_counted_and_kept(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "in/a.png")
    report = index(tmp_path / "in", tmp_path / "out", "image,patient\na.png,Q1\na.png, q1\n")
    assert (report.images, dict(report.skipped)) == (1, {"listed twice": 1})


@pytest.mark.parametrize("patient", ["A\\B", "A*", "A?", "A＊", "A\tB", "A\x00B", "A\u200bB", "['A', 'B']"])
def test_an_ambiguous_patient_is_quarantined(tmp_path, patient):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / f"in/{name}.png")
    report = index(tmp_path / "in", tmp_path / "out", f'image,patient\na.png,"{patient}"\nb.png,Q1\n')
    assert (report.images, dict(report.skipped)) == (1, {"patient is ambiguous": 1})


def test_a_header_with_several_patient_ids_or_issuers_is_quarantined(tmp_path, dicom):
    dicom(tmp_path / "in/a.dcm", PatientID=["P1", "P2"])
    dicom(tmp_path / "in/b.dcm", PatientID="P1", IssuerOfPatientID=["A", "B"])
    dicom(tmp_path / "in/c.dcm", PatientID="P1")
    report = index(tmp_path / "in", tmp_path / "out")
    assert (report.images, dict(report.skipped)) == (1, {"patient is ambiguous": 2})


def test_what_is_left_out_is_listed_for_the_owner_alone_and_anew_each_time(tmp_path, dicom):
    dicom(tmp_path / "in/a.dcm")
    bad = dicom(tmp_path / "in/b.dcm", PatientID="")
    index(tmp_path / "in", tmp_path / "out")
    assert quarantine(tmp_path / "out") == [{"path": str(bad), "reason": "patient is blank"}]
    assert stat.S_IMODE((tmp_path / "out/quarantine.jsonl").stat().st_mode) == 0o600
    bad.unlink()
    folder = FolderIndex(folder=tmp_path / "in")
    index_folder(folder, tmp_path / "out/manifest.csv", ("radiology",), "hospital", overwrite=True)
    assert quarantine(tmp_path / "out") == []


def test_an_index_of_nothing_usable_lists_everything(tmp_path, dicom):
    dicom(tmp_path / "in/a.dcm", PatientID="")
    with pytest.raises(DataError):
        index(tmp_path / "in", tmp_path / "out")
    assert len(quarantine(tmp_path / "out")) == 1


def test_several_labels_of_one_image_are_each_translated(tmp_path, dicom):
    for name in "abcd":
        dicom(tmp_path / f"in/{name}.dcm")
    report = index(
        tmp_path / "in",
        tmp_path / "out",
        "image,label\na.dcm,Eff|Mass\nb.dcm,None\nc.dcm,Eff|Fluid\nd.dcm,Eff|what\n",
        values={"radiology": {"Eff": "effusion", "Fluid": "effusion", "Mass": "mass", "None": ""}},
    )
    assert sorted(r.label for r in report.manifest.records) == ["", "effusion", "effusion|mass"]
    assert dict(report.skipped) == {"label has no meaning in `values`": 1}
