import itertools
import json
import logging
import stat
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from clinifed.config import FolderIndex
from clinifed.data.index import index_folder, patient_pseudonym
from clinifed.data.manifest import changed_images, read_manifest, site_key
from clinifed.errors import ConfigError, DataError
from clinifed.files import file_sha256


def noise(number):
    """A picture of its own for each number, (8, 8) uint8."""
    return np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)


def png(path, number):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(noise(number)).save(path)
    return path


@pytest.fixture
def dicom(dicom):
    """The shared one, but that each file has a picture of its own where none is given."""
    numbers = itertools.count(1000)

    def make(path, pixels=None, **more):
        return dicom(path, noise(next(numbers)) if pixels is None else pixels, **more)

    return make


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
    with pytest.raises(DataError, match="2 images: patient is in two splits; give all images of a patient one split"):
        index(tmp_path / "in", tmp_path / "out", "image,split\na.dcm,train\nb.dcm,holdout\n")
    assert not (tmp_path / "out/manifest.csv").exists()


def test_pictures_take_patients_and_labels_from_the_table(tmp_path):
    png(tmp_path / "in/a.png", 1)
    report = index(
        tmp_path / "in",
        tmp_path / "out",
        "file,who,dx\na.png,Q1,1\na.png,Q1,9\n",
        columns={"image": "file", "patient": "who", "label": "dx"},
        values={"radiology": {"1": "abnormal"}},
    )
    assert report.manifest.records[0].label == "abnormal"
    assert dict(report.skipped) == {"label has no meaning in `values`, `mapping` or `synonyms`": 1}


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
    png(tmp_path / "in/b.png", 9)
    table = "image,patient\na.dcm,\nb.png,Q1\n"
    assert index(tmp_path / "in", tmp_path / "out", table, issuer="A").patients == 1
    with pytest.raises(DataError, match="also occurs"):
        index(tmp_path / "in", tmp_path / "other", table)


def test_a_file_listed_for_two_patients_refuses_the_whole_index(tmp_path):
    for number, name in enumerate("ab"):
        png(tmp_path / f"in/{name}.png", number)
    rows = "image,patient\na.png,PLANTED1\nb.png,PLANTED1\na.png,PLANTED2\n"
    with pytest.raises(DataError, match="1 image: listed for two patients; correct the table") as caught:
        index(tmp_path / "in", tmp_path / "out", rows)
    assert "PLANTED" not in str(caught.value)
    assert not (tmp_path / "out/manifest.csv").exists()


def test_a_file_listed_twice_for_the_same_patient_is_counted_and_kept(tmp_path):
    png(tmp_path / "in/a.png", 1)
    report = index(tmp_path / "in", tmp_path / "out", "image,patient\na.png,Q1\na.png, q1\n")
    assert (report.images, dict(report.skipped)) == (1, {"listed twice": 1})


@pytest.mark.parametrize("patient", ["A\\B", "A*", "A?", "A＊", "A\tB", "A\x00B", "A\u200bB", "['A', 'B']"])
def test_an_ambiguous_patient_is_quarantined(tmp_path, patient):
    for number, name in enumerate("ab"):
        png(tmp_path / f"in/{name}.png", number)
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
    assert dict(report.skipped) == {"label has no meaning in `values`, `mapping` or `synonyms`": 1}


def test_every_image_has_the_hash_of_its_file_and_a_changed_one_is_found(tmp_path, dicom):
    path = dicom(tmp_path / "in/a.dcm")
    png(tmp_path / "in/b.png", 2)
    manifest = index(tmp_path / "in", tmp_path / "out", "image,patient\na.dcm,\nb.png,Q1\n").manifest
    assert sorted(r.sha256 for r in manifest.records) == sorted(map(file_sha256, (path, tmp_path / "in/b.png")))
    assert changed_images(manifest) == ()
    path.write_bytes(path.read_bytes() + b" ")
    assert [r.image[-4:] for r in changed_images(manifest)] == [".dcm"]


def test_the_same_data_under_other_names_in_another_place_is_the_same_manifest(tmp_path, dicom):
    for place, names in {"one": "abc", "two": "zyx"}.items():
        for number, name in enumerate(names):
            more = {"PatientID": f"P{number}", "SOPInstanceUID": f"1.2.{number + 1}"}
            dicom(tmp_path / place / name / f"{name}.dcm", noise(number), **more)
    manifests = []
    for place in ("one", "two"):
        (tmp_path / f"out-{place}").mkdir()
        (tmp_path / f"out-{place}/site.key").write_bytes(bytes(32))
        manifests.append(index(tmp_path / place, tmp_path / f"out-{place}").manifest)
    assert manifests[0].sha256 == manifests[1].sha256
    assert manifests[0].content_sha256 == manifests[1].content_sha256 is not None


def test_copies_within_a_patient_are_one_image(tmp_path, dicom):
    same = noise(1)
    dicom(tmp_path / "in/a.dcm", same, SOPInstanceUID="1.1")
    dicom(tmp_path / "in/b.dcm", same, SOPInstanceUID="1.2")
    dicom(tmp_path / "in/c.dcm", SOPInstanceUID="1.2")
    dicom(tmp_path / "in/d.dcm", PatientID="P2")
    report = index(tmp_path / "in", tmp_path / "out")
    assert (report.images, report.patients) == (2, 2)
    assert dict(report.skipped) == {"duplicate of another image": 2}
    assert Counter(e["reason"] for e in quarantine(tmp_path / "out")) == report.skipped


def test_a_picture_and_its_dicom_object_are_copies(tmp_path, dicom):
    dicom(tmp_path / "in/a.dcm", noise(1))
    png(tmp_path / "in/b.png", 1)
    table = "image,patient\na.dcm,P1\nb.png,P1\n"
    report = index(tmp_path / "in", tmp_path / "out", table, issuer="HOSPITAL")
    assert (report.images, dict(report.skipped)) == (1, {"duplicate of another image": 1})
    with pytest.raises(DataError, match="2 images: same picture in two patients; find out whose it is"):
        index(tmp_path / "in", tmp_path / "other", table.replace("b.png,P1", "b.png,P2"), issuer="HOSPITAL")
    assert not (tmp_path / "other/manifest.csv").exists()
    assert {entry["path"][-5:] for entry in quarantine(tmp_path / "other")} == {"a.dcm", "b.png"}


def test_without_pixel_duplicates_bytes_and_uids_still_count_once(tmp_path, dicom):
    dicom(tmp_path / "in/a.dcm", noise(1), SOPInstanceUID="1.1")
    dicom(tmp_path / "in/b.dcm", noise(1), SOPInstanceUID="1.2")
    (tmp_path / "in/c.dcm").write_bytes((tmp_path / "in/a.dcm").read_bytes())
    report = index(tmp_path / "in", tmp_path / "out", pixel_duplicates=False)
    assert (report.images, dict(report.skipped)) == (2, {"duplicate of another image": 1})
    dicom(tmp_path / "in/d.dcm", PatientID="P2", SOPInstanceUID="1.1")
    with pytest.raises(DataError, match="3 images: same SOPInstanceUID in two patients"):
        index(tmp_path / "in", tmp_path / "other", pixel_duplicates=False)


def test_copies_with_different_labels_refuse_the_index(tmp_path, dicom):
    dicom(tmp_path / "in/a.dcm", noise(1))
    dicom(tmp_path / "in/b.dcm", noise(1))
    with pytest.raises(DataError, match="2 images: copies of one image have different labels; correct the labels"):
        index(tmp_path / "in", tmp_path / "out", "image,label\na.dcm,normal\nb.dcm,abnormal\n")
    assert index(tmp_path / "in", tmp_path / "out", "image,label\na.dcm,x|y\nb.dcm,y|x\n").images == 1


def test_pictures_that_cannot_be_read_or_show_nothing_are_left_out_when_they_are_looked_at(tmp_path, dicom):
    dicom(tmp_path / "in/a.dcm")
    dicom(tmp_path / "in/b.dcm", np.zeros((8, 8), np.uint8))
    dicom(tmp_path / "in/c.dcm", Rows=9)
    report = index(tmp_path / "in", tmp_path / "out")
    assert report.images == 1
    assert dict(report.skipped) == {"picture is blank": 1, "pixel data contradicts the header": 1}
    assert index(tmp_path / "in", tmp_path / "other", pixel_duplicates=False).images == 3


def test_labels_come_from_a_tag(tmp_path, dicom):
    for name, text in {"a": "CHEST normal", "b": "Pneumonia", "c": "PLANTED", "d": ""}.items():
        dicom(tmp_path / f"in/{name}.dcm", StudyDescription=text, PatientID=name)
    asked = {"synonyms": {"radiology": {"normal": ("Chest Normal",)}}, "builtin_synonyms": True}
    report = index(tmp_path / "in", tmp_path / "out", label_tag="StudyDescription", **asked)
    assert sorted(r.label for r in report.manifest.records) == ["abnormal", "normal"]
    assert dict(report.skipped) == {"label has no meaning in `values`, `mapping` or `synonyms`": 2}
    assert all("PLANTED" not in p.read_text() for p in (tmp_path / "out").glob("[mq]*.*"))


def test_table_and_tag_may_not_contradict_each_other(tmp_path, dicom):
    for name in "abc":
        dicom(tmp_path / f"in/{name}.dcm", StudyDescription="x" if name != "c" else "", PatientID=name)
    table = "image,label\na.dcm,X\nb.dcm,y\nc.dcm,y\n"
    asked = {"synonyms": {"radiology": {"x": (), "y": ()}}, "label_tag": "0008,1030"}
    report = index(tmp_path / "in", tmp_path / "out", table, **asked)
    assert sorted(r.label for r in report.manifest.records) == ["x", "y"]
    assert dict(report.skipped) == {"table and header give different labels": 1}


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".xlsx", ".parquet"])
def test_every_kind_of_table_makes_the_same_records(tmp_path, kind):
    import pandas as pd

    for number in range(3):
        png(tmp_path / f"in/{number}.png", number)
    table = pd.DataFrame({"image": [f"{n}.png" for n in range(3)], "patient": ["Q1", "Q1", "Q2"], "label": [0, 1, 1]})
    path = tmp_path / f"in/t{kind}"
    if kind == ".xlsx":
        pytest.importorskip("openpyxl")
        table.to_excel(path, index=False)
    elif kind == ".parquet":
        pytest.importorskip("pyarrow")
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False, sep="," if kind == ".csv" else "\t")
    values = {"radiology": {"0": "normal", "1": "abnormal"}}
    report = index(tmp_path / "in", tmp_path / "out", labels=(path,), values=values)
    assert Counter(r.label for r in report.manifest.records) == {"normal": 1, "abnormal": 2}
    assert report.patients == 2


def test_a_wrong_setting_leaves_nothing_behind(tmp_path, dicom):
    dicom(tmp_path / "in/a.dcm")
    for wrong in ({"source": "pacs"}, {"label_tag": "No Such Tag"}, {"label_tag": "Rows"}):
        with pytest.raises(ConfigError):
            index(tmp_path / "in", tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


PEOPLE = st.lists(st.text("abcdefgh", min_size=2, max_size=3), min_size=1, max_size=5, unique=True)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PEOPLE, PEOPLE)
def test_more_patients_and_images_move_nobody_and_rename_nothing(tmp_path_factory, first, more):
    folder = tmp_path_factory.mktemp("grows")
    numbers = itertools.count()

    def add(people):
        rows = []
        for who in people:
            path = png(folder / f"in/{next(numbers)}.png", next(numbers))
            rows.append(f"{path.name},{who}\n")
        return rows

    rows = add(first)
    before = index(folder / "in", folder / "out", "image,patient\n" + "".join(rows), holdout=0.5).manifest
    rows = [*add(more), *rows]
    (folder / "in/labels.csv").write_text("image,patient\n" + "".join(rows))
    asked = FolderIndex(folder=folder / "in", labels=(folder / "in/labels.csv",), holdout=0.5)
    after = index_folder(asked, folder / "out/manifest.csv", ("radiology",), "hospital", overwrite=True).manifest
    assert set(before.records) <= set(after.records)
    assert read_manifest(after.path) == after


def test_nothing_that_may_be_shared_holds_a_name_of_a_file_or_folder(tmp_path, dicom, capsys, caplog):
    from clinifed.cli import main

    caplog.set_level(logging.DEBUG)
    for number in range(3):
        dicom(tmp_path / f"PLANTED/PLANTED^{number}/PLANTED{number}.dcm", PatientID=f"PLANTED{number}")
    dicom(tmp_path / "PLANTED/PLANTED.dcm", PatientID="")
    out = tmp_path / "out/manifest.csv"
    main(["data", "index", str(tmp_path / "PLANTED"), "--out", str(out), "--specialties", "radiology", "--json"])
    said = capsys.readouterr()
    assert json.loads(said.out)["skipped"] == {"patient is blank": 1}
    assert json.loads(said.out)["content_sha256"] == read_manifest(out).content_sha256
    assert "PLANTED" not in said.out + said.err + caplog.text
    for path in (tmp_path / "out").rglob("*"):
        assert "PLANTED" not in path.name
        if path.is_file() and not path.is_symlink() and path.name != "quarantine.jsonl":
            assert b"PLANTED" not in path.read_bytes()
    assert stat.S_IMODE((tmp_path / "out/quarantine.jsonl").stat().st_mode) == 0o600


def test_the_command_line_says_all_that_an_index_may_be_told(tmp_path, dicom, capsys):
    from clinifed.cli import main

    dicom(tmp_path / "in/a.dcm", noise(1), StudyDescription="Eff=x", PatientID="A")
    dicom(tmp_path / "in/b.dcm", noise(1), StudyDescription="fluid", PatientID="A")
    dicom(tmp_path / "in/c.dcm", StudyDescription="opacity", PatientID="C")
    dicom(tmp_path / "in/d.dcm", StudyDescription="Clear", PatientID="D")
    (tmp_path / "m.yaml").write_text('radiology: {"Clear": normal}\n')
    asked = ["data", "index", str(tmp_path / "in"), "--out", str(tmp_path / "out/m.csv"), "--specialties", "radiology"]
    asked += ["--source", "folder", "--label-tag", "StudyDescription", "--mapping", str(tmp_path / "m.yaml")]
    asked += ["--synonym", "radiology:eff=x=abnormal", "--synonym", "radiology:fluid=abnormal", "--builtin-synonyms"]
    main([*asked, "--json"])
    assert json.loads(capsys.readouterr().out)["skipped"] == {"duplicate of another image": 1}
    assert Counter(r.label for r in read_manifest(tmp_path / "out/m.csv").records) == {"abnormal": 2, "normal": 1}
    main([*asked, "--json", "--no-pixel-duplicates", "--overwrite"])
    assert json.loads(capsys.readouterr().out)["images"] == 4
    with pytest.raises(SystemExit) as ended:
        main([*asked, "--synonym", "radiology", "--overwrite"])
    assert ended.value.code == ConfigError.exit_code
