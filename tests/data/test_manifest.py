import json
import stat
from dataclasses import replace

import pytest

from clinifed.data.manifest import Record, pseudonym, read_manifest, site_key, split_of, write_manifest
from clinifed.errors import DataError

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
