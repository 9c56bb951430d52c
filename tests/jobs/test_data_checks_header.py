"""Headers of strangers' files are read in a process of its own, and no file keeps the next from being read."""

import os
from pathlib import Path

import numpy as np
import psutil
import pytest

from clinifed.data.modalities import MODALITIES, Identity, dicom_object
from clinifed.jobs import data_checks_header
from clinifed.jobs.data_checks_header import HeaderReader


@pytest.fixture
def image(tmp_path: Path) -> Path:
    identity = Identity("P1", "ALDER", "1.2.3", "1.2.4", "1.2.5", 1, "")
    ds = dicom_object(np.zeros((8, 8), np.float32), MODALITIES["radiology"][0], identity)
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    return tmp_path / "a.dcm"


def test_what_is_compared_is_read_and_nothing_else(image: Path) -> None:
    with HeaderReader() as reader:
        header = reader.read(image)
    assert header["PatientID"] == "P1"
    assert header["Modality"] == "CR"
    assert header["StudyInstanceUID"] == "1.2.3"
    assert set(header) <= set(data_checks_header._KEYWORDS)


@pytest.mark.parametrize("content", [b"", b"x", bytes(128) + b"DICM", bytes(128) + b"DICM\xff" * 100])
def test_a_file_without_a_header_has_none_and_the_next_is_read(image: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.dcm").write_bytes(content)
    with HeaderReader() as reader:
        assert reader.read(tmp_path / "bad.dcm") == {}
        assert reader.read(tmp_path / "absent.dcm") == {}
        assert reader.read(image)["PatientID"] == "P1"


def test_a_file_that_never_ends_costs_its_time_alone(image: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(data_checks_header, "_PATIENCE_S", 0.5)
    os.mkfifo(tmp_path / "pipe")
    with HeaderReader() as reader:
        assert reader.read(image)
        assert reader.read(tmp_path / "pipe") == {}
        assert reader.read(image)["PatientID"] == "P1"


def test_a_process_that_was_killed_is_started_again_and_none_is_left(image: Path) -> None:
    def children() -> list[psutil.Process]:
        return [p for p in psutil.Process().children() if data_checks_header.__name__ in p.cmdline()]

    with HeaderReader() as reader:
        reader.read(image)
        [child] = children()
        child.kill()
        child.wait()
        assert reader.read(image) == {}
        assert reader.read(image)["PatientID"] == "P1"
    assert children() == []
