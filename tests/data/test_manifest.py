import json
import stat
from dataclasses import replace

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinifed.data.manifest import (
    Record,
    changed_images,
    content_sha256,
    pseudonym,
    read_manifest,
    site_key,
    split_of,
    without_patients,
    write_manifest,
)
from clinifed.errors import DataError
from clinifed.files import file_sha256, sha256_of

RECORD = Record("images/a.png", "p1", "radiology", "normal", 'a "caption", with commas', "train")


def test_what_is_written_is_read_and_owner_only(tmp_path):
    path = tmp_path / "manifest.csv"
    assert write_manifest(path, [RECORD], "public").records == (RECORD,)
    assert read_manifest(path).data_class == "public"
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_changed_manifest_is_refused(tmp_path):
    path = tmp_path / "manifest.csv"
    write_manifest(path, [RECORD], "public")
    path.write_text(path.read_text().replace("normal", "abnormal"))
    with pytest.raises(DataError, match="changed since"):
        read_manifest(path)


def test_an_unknown_data_class_is_refused(tmp_path):
    path = tmp_path / "manifest.csv"
    write_manifest(path, [RECORD], "public")
    meta = tmp_path / "manifest.meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"data_class": "mine"}))
    with pytest.raises(DataError, match="'mine'"):
        read_manifest(path)


def test_missing_columns_are_named_with_what_is_there(tmp_path):
    path = tmp_path / "manifest.csv"
    path.write_text("image,label\na,b\n")
    with pytest.raises(DataError, match="missing columns patient, specialty, caption, split; it has image, label"):
        read_manifest(path)


def test_bad_rows_are_refused_all_at_once_and_nothing_is_written(tmp_path):
    bad = [
        RECORD,
        RECORD,
        replace(RECORD, image="../b.png", split="holdout"),
        replace(RECORD, image="/c.png", patient="p2", split="test"),
        replace(RECORD, image="d.png", patient=""),
    ]
    with pytest.raises(DataError) as caught:
        write_manifest(tmp_path / "manifest.csv", bad, "public")
    assert len(caught.value.problems) == 5
    assert not list(tmp_path.iterdir())


def test_key_is_made_once_and_splits_are_stable(tmp_path):
    key = site_key(tmp_path)
    assert key == site_key(tmp_path)
    assert len(key) == 32
    assert pseudonym(key, "a", "bc") != pseudonym(key, "ab", "c")
    share = sum(split_of(key, str(i), 0.2) == "holdout" for i in range(2000)) / 2000
    assert 0.15 < share < 0.25
    assert split_of(key, "x", 0) == "train"


HASHED = [replace(RECORD, image=f"images/{n}.png", patient=f"p{n}", sha256=sha256_of(bytes([n]))) for n in range(4)]


def edit(path, **meta):
    """Change the file beside the manifest; None takes a key away."""
    beside = path.with_suffix(".meta.json")
    content = json.loads(beside.read_text()) | meta
    beside.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_the_content_hash_is_of_what_is_trained_on_and_of_nothing_else():
    known = content_sha256(HASHED)
    assert known == content_sha256(HASHED[::-1]) != content_sha256(HASHED[1:])
    for same in ({"image": "images/other.png"}, {"caption": "other"}):
        assert content_sha256([replace(HASHED[0], **same), *HASHED[1:]]) == known
    for other in ("sha256", "patient", "specialty", "label", "split"):
        assert content_sha256([replace(HASHED[0], **{other: "other"}), *HASHED[1:]]) != known
    assert content_sha256([RECORD, *HASHED]) is None


def test_the_content_hash_stands_beside_the_manifest_and_is_checked(tmp_path):
    path = tmp_path / "manifest.csv"
    written = write_manifest(path, HASHED, "public")
    meta = json.loads(path.with_suffix(".meta.json").read_text())
    assert meta["schema_version"] == 3
    assert meta["content_sha256"] == written.content_sha256 == content_sha256(HASHED)
    edit(path, content_sha256="0" * 64)
    with pytest.raises(DataError, match="content_sha256 is of other records"):
        read_manifest(path)


def test_a_manifest_of_the_first_schema_is_read_without_hashes(tmp_path):
    path = tmp_path / "manifest.csv"
    path.write_text("image,patient,specialty,label,caption,split\nimages/a.png,p1,radiology,normal,,train\n")
    path.with_suffix(".meta.json").write_text(
        json.dumps({"schema_version": 1, "data_class": "public", "sha256": file_sha256(path)})
    )
    manifest = read_manifest(path)
    assert manifest.records == (replace(RECORD, caption=""),)
    assert manifest.content_sha256 is None


def test_a_manifest_of_the_second_schema_is_read_without_series(tmp_path):
    path = tmp_path / "manifest.csv"
    written = write_manifest(path, HASHED, "public")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table.drop(columns=["series", "position"]).to_csv(path, index=False)
    edit(path, schema_version=2, sha256=file_sha256(path))
    assert read_manifest(path).records == written.records
    assert read_manifest(path).content_sha256 == written.content_sha256


@pytest.mark.parametrize(("series", "position"), [("s", ""), ("", "1.0"), ("s", "nan"), ("s", "inf"), ("s", "front")])
def test_a_place_in_a_series_that_is_none_is_refused(tmp_path, series, position):
    with pytest.raises(DataError, match="position in its series is none: row 2"):
        write_manifest(tmp_path / "m.csv", [replace(RECORD, series=series, position=position)], "public")


@pytest.mark.parametrize("version", [0, 4, "2", True, 2.0])
def test_another_schema_is_refused(tmp_path, version):
    path = tmp_path / "manifest.csv"
    write_manifest(path, HASHED, "public")
    edit(path, schema_version=version)
    with pytest.raises(DataError, match=r"schema_version .* is unknown here; run `clinifed data index` again"):
        read_manifest(path)


@pytest.mark.parametrize("key", ["schema_version", "data_class", "sha256", "content_sha256"])
def test_a_meta_file_that_lacks_something_is_refused(tmp_path, key):
    path = tmp_path / "manifest.csv"
    write_manifest(path, HASHED, "public")
    edit(path, **{key: None})
    with pytest.raises(DataError, match="missing or damaged"):
        read_manifest(path)


def test_a_hash_that_is_none_is_refused(tmp_path):
    with pytest.raises(DataError, match="sha256 is none: row 2"):
        write_manifest(tmp_path / "manifest.csv", [replace(RECORD, sha256="f00")], "public")


def test_patients_who_are_left_out_are_in_no_record_and_in_no_hash(tmp_path):
    records = [replace(RECORD, image=f"{n}.png", patient=f"p{n}", sha256=f"{n:064x}") for n in range(3)]
    whole = write_manifest(tmp_path / "manifest.csv", records, "public")
    fewer = without_patients(whole, {"p1", "unknown"})
    assert [r.patient for r in fewer.records] == ["p0", "p2"]
    assert fewer.content_sha256 == content_sha256([records[0], records[2]])
    assert without_patients(whole, set()) is whole
    with pytest.raises(DataError, match="every patient withdrew"):
        without_patients(whole, {"p0", "p1", "p2"})


def test_images_that_changed_or_are_gone_are_found(tmp_path):
    for name in ("same", "changed", "unhashed"):
        (tmp_path / name).write_bytes(b"1")
    records = [
        Record(name, f"p-{name}", "radiology", "", "", "train", "" if name == "unhashed" else sha256_of(b"1"))
        for name in ("same", "changed", "gone", "unhashed")
    ]
    manifest = write_manifest(tmp_path / "manifest.csv", records, "public")
    (tmp_path / "changed").write_bytes(b"2")
    assert [record.image for record in changed_images(manifest)] == ["changed", "gone"]
    (tmp_path / "unhashed").unlink()
    assert [record.image for record in changed_images(manifest)] == ["changed", "gone", "unhashed"]


@settings(deadline=None)
@given(st.binary(min_size=32, max_size=32), st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_patient_who_is_held_out_stays_held_out_when_more_are(key, patient, one, other):
    low, high = sorted((one, other))
    assert not (split_of(key, patient, low) == "holdout" and split_of(key, patient, high) == "train")
