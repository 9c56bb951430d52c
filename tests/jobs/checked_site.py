"""A site on disk that passes every check; tests spoil it."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from pydicom.uid import generate_uid

from clinifed.data.manifest import Record, site_key, write_manifest
from clinifed.data.modalities import MODALITIES, Identity, dicom_object
from clinifed.files import file_sha256
from clinifed.jobs.data_check import DataCheck, data_check, site_under_check
from clinifed.jobs.data_check_report import write_shareable
from clinifed.models.backbone import load_backbone
from clinifed.policy import SitePolicy
from clinifed.privacy.ledger import Ledger
from clinifed.signing import make_signing_key

load_once = cache(load_backbone)  # the tiny model takes a second, and every check wants it

FEDERATION = {
    "name": "unit",
    "rounds": 2,
    "min_clients": 1,
    "max_clients": 2,
    "privacy": {"epsilon": 8.0},
    "aggregation": {"quorum": 1, "round_timeout_s": 60},
    "sites": {"alder": {"specialties": ["radiology"], "nominal_patients": 20}},
}


def pixels(number: int) -> NDArray[np.float32]:
    return np.random.default_rng(number).random((32, 32), dtype=np.float32)


def dicom(path: Path, number: int, **header: object) -> None:
    identity = Identity(f"ID{number}", "ALDER", generate_uid(), generate_uid(), generate_uid(), 1, "")
    ds = dicom_object(pixels(number), MODALITIES["radiology"][0], identity)
    for keyword, value in header.items():
        setattr(ds, keyword, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)


def record(number: int, **changes: str) -> Record:
    fields = {
        "image": f"images/{number:020x}.dcm",
        "patient": f"{number:020x}",
        "specialty": "radiology",
        "label": ("normal", "abnormal")[number % 2],
        "caption": "",
        "split": "train",
    }
    return Record(**{**fields, **changes})


class Site:
    """A site on disk that passes; tests spoil it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        home.mkdir(mode=0o700, exist_ok=True)
        self.records = [record(number) for number in range(24)]
        for number, row in enumerate(self.records):
            dicom(home / row.image, number)
        self.settings = {
            "site": "alder",
            "manifest": str(home / "manifest.csv"),
            "ledger": str(home / "ledger.jsonl"),
            "signing_key": str(home / "signing.key"),
            "cache": str(home / "cache"),
            "diary": str(home / "diary.jsonl"),
            "budget": {"epsilon": 8.0, "delta": 1e-5},
        }
        self.federation = json.loads(json.dumps(FEDERATION))
        Ledger.of(SitePolicy.model_validate(self.settings)).create()
        make_signing_key(home / "signing.key")
        site_key(home)

    def write(self) -> tuple[Path, Path]:
        write_manifest(self.home / "manifest.csv", [self._hashed(row) for row in self.records], "synthetic")
        policy, federation = self.home / "site.yaml", self.home / "federation.yaml"
        policy.write_text(yaml.safe_dump(self.settings))
        federation.write_text(yaml.safe_dump(self.federation))
        return policy, federation

    def _hashed(self, row: Record) -> Record:
        """As the index would list the file, if there is one and nothing else was said of it."""
        path = self.home / row.image
        return row if row.sha256 or not path.is_file() else replace(row, sha256=file_sha256(path))

    def check(self, **options: object) -> DataCheck:
        policy, federation = self.write()
        return data_check(site_under_check(policy, federation=federation, **options))


def level(found: DataCheck, name: str) -> str:
    return found.findings[name].level


def says(found: DataCheck, name: str) -> str:
    return "\n".join(found.findings[name].says)


def told(found: DataCheck, folder: Path) -> bytes:
    """All forms that may leave, as bytes."""
    paths = [folder / name for name in ("share.json", "share.html", "share.txt")]
    for path in paths:
        write_shareable(found, path)
    return b"\n".join(path.read_bytes() for path in paths)
