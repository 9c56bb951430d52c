import itertools
import os
import stat

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydicom.fileset import FileSet
from pydicom.uid import generate_uid

from clinifed.config import FolderIndex
from clinifed.data import sources
from clinifed.data.index import index_folder
from clinifed.data.manifest import changed_images
from clinifed.data.sources import SOURCES, Row, Spool, open_source
from clinifed.errors import ConfigError, DataError

HEADER = {"StudyDate": "20200101", "StudyTime": "101010", "StudyID": "1", "Modality": "OT", "SeriesNumber": 1}


class Delivered:
    """A source as a PACS will be one: it has no files here, and delivers bytes."""

    def __init__(self, index):
        self.index = index

    def rows(self, spool):
        for path in sorted(self.index.folder.rglob("*")):
            if path.is_file() and path.name != "DICOMDIR":
                content = path.read_bytes()
                try:
                    yield Row(spool.put(content[i : i + 1000] for i in range(0, len(content), 1000)))
                except DataError as reason:
                    yield Row(path, problem=str(reason))


@pytest.fixture
def everywhere(monkeypatch):
    monkeypatch.setattr(sources, "SOURCES", {**SOURCES, "delivered": Delivered})


@pytest.fixture
def disc(tmp_path, dicom):
    """A CD of six images of three patients with its DICOMDIR, and tables of the same files beside it."""
    made = FileSet()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)
        of = f"P{number // 2}"
        uids = {"StudyInstanceUID": generate_uid(entropy_srcs=[of]), "SeriesInstanceUID": generate_uid()}
        more = {"PatientID": of, "PatientName": "", "InstanceNumber": number, "BodyPartExamined": "CHEST", **uids}
        made.add(dicom(tmp_path / f"in/{number}.dcm", pixels, **HEADER, **more))
    made.write(tmp_path / "cd")
    made._stage["t"].cleanup()  # pydicom leaves it to the garbage collector, which warns
    files = sorted(p for p in (tmp_path / "cd").rglob("*") if p.is_file() and p.name != "DICOMDIR")
    table = pd.DataFrame({"image": [f"cd/{p.relative_to(tmp_path / 'cd')}" for p in files]})
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_csv(tmp_path / "t.tsv", index=False, sep="\t")
    return tmp_path / "cd"


def settings(disc, name, **more):
    labels = (disc.parent / "t.csv",) if name == "table" else ()
    return FolderIndex(folder=disc, source=name, labels=labels, **more)


NAMES = [*SOURCES, "delivered"]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_files_are_the_same_records_whichever_source_delivers_them(tmp_path, disc, everywhere, name):
    of = {"label_tag": "BodyPartExamined", "synonyms": {"radiology": {"normal": ("Chest",)}}}
    (tmp_path / "site.key").write_bytes(bytes(32))
    expected = index_folder(settings(disc, "folder", **of), tmp_path / "m.csv", ("radiology",), "hospital").manifest
    assert len(expected.records) == 6
    out = tmp_path / "other"
    out.mkdir()
    (out / "site.key").write_bytes(bytes(32))
    report = index_folder(settings(disc, name, **of), out / "m.csv", ("radiology",), "hospital")
    assert report.manifest.records == expected.records
    assert report.manifest.content_sha256 == expected.content_sha256
    assert changed_images(report.manifest) == ()
    expected_skips = {"no pixel data": 1} if name == "folder" else {}
    assert dict(report.skipped) == expected_skips


@pytest.mark.parametrize("name", NAMES)
def test_a_source_gives_its_rows_again_in_the_same_order_and_writes_nothing_but_its_spool(
    tmp_path, disc, everywhere, name
):
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    first, second = (list(open_source(settings(disc, name)).rows(Spool(tmp_path / "spool"))) for _ in range(2))
    assert first == second
    assert len({row.path for row in first if not row.problem}) >= 6
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.parent.name != "spool"}
    assert after == before


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_file_ends_no_source(tmp_path, disc, everywhere, name):
    bad = next(p for p in sorted(disc.rglob("*")) if p.is_file() and p.name != "DICOMDIR")
    bad.write_bytes(bytes(128) + b"DICM" + b"PLANTED" * 9)
    report = index_folder(settings(disc, name), tmp_path / "m.csv", ("radiology",), "hospital")
    assert report.images == 5
    assert sum(report.skipped.values()) == 1 + (name == "folder")
    assert "PLANTED" not in str(report.skipped)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_gone_ends_no_source(tmp_path, disc, everywhere, name):
    next(p for p in sorted(disc.rglob("*")) if p.is_file() and p.name != "DICOMDIR").unlink()
    report = index_folder(settings(disc, name), tmp_path / "m.csv", ("radiology",), "hospital")
    assert report.images == 5
    assert report.skipped["image missing"] == (name in ("table", "dicomdir"))


def test_a_link_out_of_the_folder_is_no_way_for_any_source(tmp_path, disc, everywhere):
    inside = next(p for p in sorted(disc.rglob("*")) if p.is_file() and p.name != "DICOMDIR")
    inside.rename(tmp_path / "outside.dcm")
    inside.symlink_to(tmp_path / "outside.dcm")
    for name in SOURCES:
        report = index_folder(settings(disc, name), tmp_path / name / "m.csv", ("radiology",), "hospital")
        assert report.images == 5
        assert report.skipped["path leaves the folder"] == (name in ("table", "dicomdir"))


def test_a_tree_is_read_by_content_whatever_the_names(tmp_path, dicom):
    tree = tmp_path / "tree"
    dicom(tree / "a/b/c/IM000001")
    dicom(tree / "a/x.txt")
    picture = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    picture.save(tree / "a/photo", format="JPEG")
    picture.save(tree / "a/wrong.jpg", format="PNG")
    (tree / "a/lies.dcm").write_bytes(b"text")
    (tree / "notes.txt").write_bytes(b"text")
    (tree / "link").symlink_to(tree / "a")
    (tree / "a/twin.png").symlink_to(tree / "a/photo")
    os.mkfifo(tree / "a/pipe.dcm")
    rows = list(open_source(FolderIndex(folder=tree)).rows(Spool(tmp_path / "spool")))
    used = {str(row.path.relative_to(tree)) for row in rows if not row.problem}
    assert used == {"a/b/c/IM000001", "a/x.txt", "a/photo", "a/wrong.jpg"}
    assert [(row.path.name, row.problem) for row in rows if row.problem] == [
        ("lies.dcm", "neither DICOM, PNG nor JPEG, whatever its name says")
    ]


def test_several_discs_in_one_folder_each_count_from_their_own(tmp_path, disc):
    other = tmp_path / "all/second"
    other.parent.mkdir()
    disc.rename(tmp_path / "all/first")
    report = index_folder(
        FolderIndex(folder=tmp_path / "all", source="dicomdir"), tmp_path / "m.csv", ("radiology",), "hospital"
    )
    assert report.images == 6
    other.mkdir()
    (other / "DICOMDIR").write_bytes(b"damaged")
    again = FolderIndex(folder=tmp_path / "all", source="dicomdir")
    report = index_folder(again, tmp_path / "m.csv", ("radiology",), "hospital", overwrite=True)
    assert (report.images, dict(report.skipped)) == (6, {"DICOMDIR cannot be read": 1})


def test_a_folder_without_dicomdir_is_refused(tmp_path):
    with pytest.raises(DataError, match="no file named DICOMDIR"):
        list(open_source(FolderIndex(folder=tmp_path, source="dicomdir")).rows(Spool(tmp_path / "spool")))


def test_where_keeps_rows_and_columns_are_renamed(tmp_path):
    (tmp_path / "t.csv").write_text("file,use,who\na.png,yes,1\nb.png,no,2\n")
    index = FolderIndex(
        folder=tmp_path,
        labels=(tmp_path / "t.csv",),
        columns={"image": "file", "patient": "who"},
        where={"use": ("yes",)},
    )
    rows = list(open_source(index).rows(Spool(tmp_path / "spool")))
    assert rows == [Row(tmp_path / "a.png", {"image": "a.png", "patient": "1"})]


def test_a_name_that_two_columns_have_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table([["a.png"], ["P1"], ["P2"]], names=["image", "patient", "patient"])
    pq.write_table(table, tmp_path / "t.parquet")
    index = FolderIndex(folder=tmp_path, labels=(tmp_path / "t.parquet",))
    with pytest.raises(DataError, match=r"two columns have the same name|cannot be read"):
        list(open_source(index).rows(Spool(tmp_path / "spool")))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"source": "pacs"}, "'pacs' is not one of folder, table, dicomdir"),
        ({"source": "table"}, "`table` needs tables"),
        ({"source": "folder", "labels": ("t.csv",)}, "the source 'folder' reads no tables"),
        ({"source": "dicomdir", "labels": ("t.csv",)}, "the source 'dicomdir' reads no tables"),
    ],
)
def test_a_wrong_source_is_refused_before_anything_is_read(asked, told):
    with pytest.raises(ConfigError, match=told):
        open_source(FolderIndex(folder=".", **asked))


def test_what_is_spooled_is_owner_only_named_by_its_hash_and_deleted_when_unused(tmp_path, dicom):
    spool = Spool(tmp_path / "spool")
    content = dicom(tmp_path / "a").read_bytes()
    path = spool.put([content[:100], content[100:]])
    assert path == spool.put([content])
    assert (path.read_bytes(), path.suffix, len(path.stem)) == (content, ".dcm", 64)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(spool.folder.stat().st_mode) == 0o700
    other = spool.put([dicom(tmp_path / "b").read_bytes()])
    spool.keep_only([path])
    assert path.is_file()
    assert not other.exists()


def test_what_is_no_image_or_too_large_leaves_nothing_in_the_spool(tmp_path):
    spool = Spool(tmp_path / "spool")
    with pytest.raises(DataError, match="neither DICOM, PNG nor JPEG"):
        spool.put([b"text"])
    with pytest.raises(DataError, match="larger than 256 MiB"):
        spool.put(itertools.repeat(bytes(16 << 20)))

    def torn():
        yield b"\xff\xd8\xff"
        raise ConnectionError

    with pytest.raises(ConnectionError):
        spool.put(torn())
    assert list(spool.folder.iterdir()) == []
