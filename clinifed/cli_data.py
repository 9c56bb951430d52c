"""``clinifed data index``: a hospital's files as a manifest."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from clinifed.errors import ConfigError

__all__ = ["add_index_verb"]


class _Console(Protocol):
    def progress(self, text: str) -> None: ...
    def result(self, content: Any, *tables: Any) -> None: ...


def _index(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.config import FolderIndex
    from clinifed.data.index import index_folder
    from clinifed.load import validate

    values: dict[str, dict[str, str]] = {}
    for specialty, value, label in map(_meaning, args.value or ()):
        values.setdefault(specialty, {})[value] = label
    synonyms: dict[str, dict[str, tuple[str, ...]]] = {}
    for specialty, word, label in map(_meaning, args.synonym or ()):
        mine = synonyms.setdefault(specialty, {})
        mine[label] = (*mine.get(label, ()), word)
    settings = {
        "folder": args.folder,
        "source": args.source,
        "labels": tuple(args.labels or ()),
        "columns": dict(pair.partition("=")[::2] for pair in args.column or ()),
        "values": values,
        "mapping": args.mapping,
        "synonyms": synonyms,
        "builtin_synonyms": args.builtin_synonyms,
        "label_tag": args.label_tag,
        "split": args.split,
        "issuer": args.issuer,
        "pixel_duplicates": not args.no_pixel_duplicates,
        **({} if args.holdout is None else {"holdout": args.holdout}),
    }
    report = index_folder(
        validate(FolderIndex, settings, "command line"),
        args.out,
        tuple(args.specialties.split(",")),
        args.data_class,
        overwrite=args.overwrite,
    )
    content = {
        "manifest": str(args.out),
        "content_sha256": report.manifest.content_sha256 if report.manifest else None,
        "images": report.images,
        "patients": report.patients,
        "skipped": dict(report.skipped),
    }
    lines = [f"{report.images} images of {report.patients} patients in {args.out}"]
    lines += [f"left out: {count} × {reason}" for reason, count in report.skipped.most_common()]
    console.result(content, *lines)


def _meaning(text: str) -> tuple[str, str, str]:
    """(specialty, value, label) of ``SPECIALTY:VALUE=LABEL``; a value may hold both signs."""
    specialty, colon, rest = text.partition(":")
    value, equals, label = rest.rpartition("=")
    if not colon or not equals or not specialty:
        raise ConfigError("--value and --synonym: write them as SPECIALTY:VALUE=LABEL")
    return specialty, value, label


def add_index_verb(verbs: Any, verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add ``index`` to the verbs of ``clinifed data``."""
    index = verb("index", _index, "make a manifest from DICOM, PNG or JPEG files", verbs)
    index.add_argument("folder", type=Path)
    index.add_argument("--out", type=Path, required=True, help="manifest.csv to write")
    index.add_argument("--specialties", required=True, help="comma-separated")
    index.add_argument(
        "--source", help="folder, table, or dicomdir (default: table where --labels are given, else folder)"
    )
    index.add_argument(
        "--labels",
        type=Path,
        action="append",
        metavar="TABLE",
        help="CSV, TSV, .xlsx or Parquet, one row per image; repeatable",
    )
    index.add_argument(
        "--column", action="append", metavar="FIELD=COLUMN", help="where the table names a field otherwise"
    )
    index.add_argument(
        "--value", action="append", metavar="SPECIALTY:VALUE=LABEL", help="what a label in the table means"
    )
    index.add_argument(
        "--mapping", type=Path, help="the same in a file: YAML, or a table with the columns specialty, value, label"
    )
    index.add_argument(
        "--synonym",
        action="append",
        metavar="SPECIALTY:WORD=LABEL",
        help="another word for a label, whatever its case, accents and blanks; repeatable",
    )
    index.add_argument(
        "--builtin-synonyms", action="store_true", help="also clinifed's own, for the labels of its own specialties"
    )
    index.add_argument(
        "--label-tag", metavar="TAG", help="the DICOM element that says the label, e.g. StudyDescription"
    )
    index.add_argument("--issuer", default="", help="whose PatientIDs those without IssuerOfPatientID are")
    index.add_argument("--split", choices=("train", "holdout"), help="put every patient there")
    index.add_argument("--holdout", type=float, help="share of patients held out otherwise (default: 0.2)")
    index.add_argument("--data-class", choices=("hospital", "public", "synthetic"), default="hospital")
    index.add_argument(
        "--no-pixel-duplicates", action="store_true", help="do not decode every image to find those that occur twice"
    )
    index.add_argument("--overwrite", action="store_true", help="replace an existing manifest")
