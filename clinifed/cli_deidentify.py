"""``clinifed data deidentify``: images made fit to be shared."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from clinifed.errors import ConfigError

__all__ = ["add_deidentify"]


class _Console(Protocol):
    def progress(self, text: str) -> None: ...

    def result(self, content: Any, *tables: Any) -> None: ...


def _deidentify(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.data.deidentify import DEFAULT_OPTIONS, deidentify_folder

    if args.option and args.basic:
        raise ConfigError("--basic is the Basic Profile without options; leave out --option, or --basic")
    options = () if args.basic else tuple(args.option or DEFAULT_OPTIONS)
    report = deidentify_folder(
        args.folder,
        args.out,
        options,
        key=args.key,
        issuer=args.issuer,
        reviewed=args.reviewed,
        progress=console.progress,
    )
    profile = ", ".join(report.options) or "no option"
    lines = [f"{report.written} images de-identified (PS3.15 Basic Profile, {profile}) in {args.out}"]
    lines += [f"there already, unchanged: {report.unchanged}"] if report.unchanged else []
    lines += [f"released, reviewed: {count} × {reason}" for reason, count in sorted(report.reviewed.items())]
    lines += [f"left out: {count} × {reason}" for reason, count in sorted(report.skipped.items())]
    if report.skipped:
        lines.append(f"which files, and why: {args.out}.quarantine.jsonl; it has their paths and stays at the site")
    console.result(report.to_dict(), *lines)


def add_deidentify(data_verbs: Any, verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add ``deidentify`` to the verbs of ``clinifed data``."""
    parser = verb(
        "deidentify", _deidentify, "write DICOM images without who they are of, by DICOM PS3.15 Annex E", data_verbs
    )
    parser.add_argument("folder", type=Path, help="DICOM files, at any depth")
    parser.add_argument("--out", type=Path, required=True, help="folder for the de-identified files")
    parser.add_argument(
        "--option",
        action="append",
        metavar="OPTION",
        help="an option of the profile: retain-modified-dates (the default), retain-full-dates, retain-uids, "
        "retain-device-identity, retain-institution-identity, retain-patient-characteristics, clean-descriptors; "
        "repeat for more",
    )
    parser.add_argument("--basic", action="store_true", help="the Basic Profile alone: no option, no dates")
    parser.add_argument("--key", type=Path, help="the site's key (default: site.key beside --out, made if absent)")
    parser.add_argument(
        "--reviewed",
        type=Path,
        metavar="FILE",
        help="release what is in quarantine for suspected text: a SHA-256 of the input on each line, as sha256sum "
        "prints them, of pictures that somebody looked at",
    )
    parser.add_argument("--issuer", default="", help="whose PatientIDs those without IssuerOfPatientID are")
