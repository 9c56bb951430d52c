import sys

import pandas as pd
import pytest

from clinifed.data.tables import TABLES, read_table
from clinifed.errors import DataError

CELLS = {"image": ["a.dcm", "b.dcm", "c.dcm"], "patient": ["007", "", "NA"], "label": ["1", "2", ""]}


def write(path, cells):
    """``cells`` as a table of the kind that ``path`` says, every cell a text."""
    table = pd.DataFrame(cells, dtype=object)
    if path.suffix == ".xlsx":
        pytest.importorskip("openpyxl")
        table.to_excel(path, index=False)
    elif path.suffix == ".parquet":
        pytest.importorskip("pyarrow")
        table.to_parquet(path, index=False)
    else:
        table.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("kind", TABLES)
def test_every_kind_gives_the_same_texts(tmp_path, kind):
    table = read_table(write(tmp_path / f"t{kind}", CELLS))
    assert table.to_dict("list") == CELLS
    assert all(type(cell) is str for cells in table.to_dict("list").values() for cell in cells)


@pytest.mark.parametrize("kind", [".xlsx", ".parquet"])
def test_numbers_beside_empty_cells_stay_whole(tmp_path, kind):
    table = read_table(write(tmp_path / f"t{kind}", {"image": ["a", "b"], "label": [1, None], "age": [7.5, 8]}))
    assert table["label"].tolist() == ["1", ""]
    assert table["age"].tolist()[0] == "7.5"


def test_a_row_that_ends_early_has_empty_cells(tmp_path):
    (tmp_path / "t.csv").write_text("image,patient\na.dcm\n")
    assert read_table(tmp_path / "t.csv").to_dict("list") == {"image": ["a.dcm"], "patient": [""]}


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    (tmp_path / "t.csv").write_text("image,patient\na.dcm,7\n", encoding="utf-8-sig")
    assert read_table(tmp_path / "t.csv").columns.tolist() == ["image", "patient"]


@pytest.mark.parametrize("kind", TABLES)
def test_what_cannot_be_read_is_refused_without_quoting_it(tmp_path, kind):
    if kind in (".xlsx", ".parquet"):
        pytest.importorskip("openpyxl" if kind == ".xlsx" else "pyarrow")
    path = tmp_path / f"t{kind}"
    path.write_bytes(b'PLANTED\xff\n"PLANTED')
    for wrong in (path, tmp_path / f"absent{kind}"):
        with pytest.raises(DataError, match="the table cannot be read") as caught:
            read_table(wrong)
        assert "PLANTED" not in str(caught.value)


@pytest.mark.parametrize("name", ["t.xls", "t", "t.csv.gz", "t.pkl"])
def test_other_kinds_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"image\na\n")
    with pytest.raises(DataError, match=r"a table ends in one of \.csv, \.tsv, \.xlsx, \.parquet"):
        read_table(tmp_path / name)


@pytest.mark.parametrize(("kind", "module"), [(".xlsx", "openpyxl"), (".parquet", "pyarrow")])
def test_an_absent_extra_is_named(tmp_path, monkeypatch, kind, module):
    (tmp_path / f"t{kind}").write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"needs an extra: pip install 'clinifed\[tables\]'"):
        read_table(tmp_path / f"t{kind}")
