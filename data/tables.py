"""A table of a hospital (CSV, TSV, Excel, Parquet) as text: what stands in a cell, and nothing that was guessed."""

from pathlib import Path

import pandas as pd

from clinifed.errors import DataError

__all__ = ["TABLES", "read_table"]

TABLES = (".csv", ".tsv", ".xlsx", ".parquet")


def read_table(path: Path) -> pd.DataFrame:
    """The table in ``path``, every cell as text, empty cells as empty text; of a workbook the first sheet.

    Excel and Parquet keep numbers as numbers: a PatientID that was entered as one has lost its leading zeros, and then
    disagrees with the header.

    Raises:
        DataError: the ending is none of :data:`TABLES`, what reads it is not installed, or it cannot be read. The text
            holds nothing of the file.
    """
    kind = path.suffix.lower()
    if kind not in TABLES:
        raise DataError(f"{path}: a table ends in one of {', '.join(TABLES)}")
    try:
        if kind == ".xlsx":
            table = pd.read_excel(path, dtype=str, keep_default_na=False, engine="openpyxl")
        elif kind == ".parquet":
            # Nullable types: NumPy's would turn whole numbers beside an empty cell into 1.0.
            table = pd.read_parquet(path, engine="pyarrow", dtype_backend="numpy_nullable")
        else:
            table = pd.read_csv(path, sep="\t" if kind == ".tsv" else ",", dtype=str, keep_default_na=False)
    except ImportError:
        raise DataError(f"{path}: reading {kind} needs an extra: pip install 'clinifed[tables]'") from None
    except MemoryError:
        raise DataError(f"{path}: the table is too large") from None
    except Exception as error:  # the engines raise about every kind, and quote cells
        raise DataError(f"{path}: the table cannot be read ({type(error).__name__})") from None
    table.columns = table.columns.map(str)
    return table.astype("string").fillna("").astype(object)
