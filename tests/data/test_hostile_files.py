import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from clinifed.data.decoding import Decoder, Usage
from clinifed.data.dicom import is_dicom
from clinifed.data.reasons import REASONS
from clinifed.errors import DataError

from .hostile import Hostile, corpus, declared_by_pydicom

SPECIAL = ("folder.dcm", "pipe.dcm", "pipe.png", "socket.dcm", "loop.dcm", "zero.dcm", "to-folder.png", "absent.dcm")


@dataclass(frozen=True)
class Ran:
    found: dict[str, np.ndarray | str]  # name → picture or reason
    origins: dict[str, tuple[str, ...] | str]
    directories: dict[str, list[list[str]] | str]
    usage: Usage
    before: dict[Path, tuple[int, int, int]]
    after: dict[Path, tuple[int, int, int]]


def listing(*folders: Path) -> dict[Path, tuple[int, int, int]]:
    """Every file: kind, size, and when it changed."""
    return {
        path: (stat.S_IFMT(state.st_mode), state.st_size, state.st_mtime_ns)
        for folder in folders
        for path in folder.rglob("*")
        if (state := path.lstat())
    }


def outcome(ask, path: Path):
    try:
        return ask(path)
    except DataError as error:
        return str(error)


@pytest.fixture(scope="module")
def files() -> dict[str, Hostile]:
    these = corpus()
    assert len({file.name for file in these}) == len(these)
    return {file.name: file for file in these}


@pytest.fixture(scope="module")
def ran(files: dict[str, Hostile], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The whole corpus and special files read once, from a folder of its own."""
    spool = tmp_path_factory.mktemp("spool")
    for file in files.values():
        (spool / file.name).write_bytes(file.content)
    (spool / "folder.dcm").mkdir()
    os.mkfifo(spool / "pipe.dcm")
    os.mkfifo(spool / "pipe.png")
    (spool / "loop.dcm").symlink_to("loop.dcm")
    (spool / "zero.dcm").symlink_to("/dev/zero")
    (spool / "to-folder.png").symlink_to("folder.dcm")
    was = Path.cwd()
    os.chdir(spool)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.dcm")
        before = listing(spool, spool.parent)
        names = [*files, *SPECIAL]
        with Decoder() as decoder:
            found = {name: outcome(decoder.pixels, spool / name) for name in names}
            origins = {name: outcome(decoder.origin, spool / name) for name in names}
            directories = {name: outcome(decoder.directory, spool / name) for name in names}
            usage = decoder.usage
        after = listing(spool, spool.parent)
    os.chdir(was)
    return Ran(found, origins, directories, usage, before, after)


def test_the_corpus_is_large(files):
    assert len(files) >= 200


def test_every_file_is_a_picture_or_one_of_the_reasons(ran):
    for found in (ran.found, ran.origins, ran.directories):
        assert {f for f in found.values() if isinstance(f, str)} <= REASONS


def test_what_is_decoded_is_what_the_file_declares(ran, files, tmp_path):
    wrong = {}
    for name, file in files.items():
        found = ran.found[name]
        if isinstance(found, str):
            if file.readable:
                wrong[name] = f"refused: {found}"
            continue
        truth = declared_by_pydicom(file, tmp_path / name) if isinstance(file.truth, str) else file.truth
        if truth is None:
            wrong[name] = "decoded"
        elif found.shape != truth.shape or not np.allclose(found, truth, atol=1e-5):
            wrong[name] = "another picture"
    assert wrong == {}


def test_special_files_are_refused_and_nothing_waits_for_them(ran):
    assert all(isinstance(ran.found[name], str) for name in SPECIAL)


def test_a_file_takes_5_s_and_512_mib_at_most(ran):
    assert ran.usage.files >= 600
    assert ran.usage.slowest_s < 5.5, "the parent's own clock: the limit of 5 s, and the end of the reader"
    assert ran.usage.memory_mib <= 512


def test_no_file_is_written(ran):
    assert ran.before == ran.after


def test_half_a_patient_is_never_a_patient(ran):
    """A file that is cut off, doubled or in disorder names the whole patient, or nobody."""
    named = {found[:2] for found in ran.origins.values() if not isinstance(found, str)}
    for name, found in ran.origins.items():
        if name.startswith("cut-"):
            assert isinstance(found, str) or found[:2] == ("", "PLANTED-1"), name
    assert isinstance(ran.origins["patient-twice.dcm"], str)
    assert isinstance(ran.origins["patient-late.dcm"], str)
    assert ("", "PLANTED-1") in named


def test_no_image_is_a_directory(ran):
    assert all(isinstance(found, str) for found in ran.directories.values())


def test_asking_whether_a_file_is_dicom_waits_for_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    assert not any(is_dicom(tmp_path / name) for name in ("pipe", "folder", "absent", "nul\0byte"))


@pytest.mark.realdata
def test_real_oddities_are_pictures_or_reasons(real):
    paths = [p for p in sorted((real / "dicom_bad").iterdir()) if p.suffix != ".csv"]
    assert len(paths) > 80
    with Decoder() as decoder:
        found = {path.name: outcome(decoder.pixels, path) for path in paths}
        refused = {f for f in found.values() if isinstance(f, str)}
        assert refused <= REASONS
        assert decoder.usage.slowest_s < 5.5
        assert decoder.usage.memory_mib <= 512
    for name in ("gen__trunc_050.dcm", "gen__trunc_600.dcm", "gen__duplicate_tag.dcm"):
        assert isinstance(found[name], str)
