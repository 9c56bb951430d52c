import signal

import numpy as np
import psutil
import pytest
from pydicom.uid import CTImageStorage

from clinifed.data.deid_process import Deidentifier
from clinifed.data.deid_table import Profile
from clinifed.data.deidentify import deidentify_file
from clinifed.errors import DataError

KEY = bytes(range(32))
CT = {"SOPClassUID": CTImageStorage, "Modality": "CT", "PatientID": "PLANTED-7"}


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "clinifed.data.deid_process" in child.cmdline()]


@pytest.fixture
def process():
    with Deidentifier((), KEY, "") as made:
        yield made
    assert children() == []


def test_it_says_what_the_function_says(tmp_path, dicom, process):
    path, bad = dicom(tmp_path / "a.dcm", **CT), dicom(tmp_path / "b.dcm", **(CT | {"PatientID": ""}))
    with pytest.raises(DataError, match="patient is blank"):
        process.file(bad)
    name, content, sop_class, done = process.file(path)
    there = deidentify_file(path, Profile(), KEY)
    assert (name, content, sop_class, done) == (there.name, there.content, there.sop_class, there.done)


def test_a_process_that_dies_costs_one_file(tmp_path, dicom, process):
    path = dicom(tmp_path / "a.dcm", **CT)
    process.file(path)
    (child,) = children()
    child.send_signal(signal.SIGSTOP)
    child.kill()
    child.wait(10)
    with pytest.raises(DataError, match="reading it ended its process"):
        process.file(path)
    assert process.file(path)[0].endswith(".dcm")


def test_a_file_that_takes_too_long_is_left_out_and_nothing_lives_on(tmp_path, dicom):
    path = dicom(tmp_path / "a.dcm", **CT)
    with Deidentifier((), KEY, "", wall_s=2) as process:
        with pytest.raises(DataError, match="not DICOM"):
            process.file(tmp_path / "none.dcm")
        (child,) = children()
        child.send_signal(signal.SIGSTOP)
        with pytest.raises(DataError, match="takes too long"):
            process.file(path)
    assert children() == []


def test_a_file_that_takes_too_much_memory_is_left_out(tmp_path, dicom):
    large = dicom(tmp_path / "a.dcm", np.zeros((3000, 3000), np.uint16), bits=16, **CT)
    small = dicom(tmp_path / "b.dcm", **CT)
    with Deidentifier((), KEY, "", memory_mib=48) as process:
        with pytest.raises(DataError, match=r"too large|ended its process"):
            process.file(large)
        process.file(small)


def test_neither_the_key_nor_a_path_is_on_a_command_line(tmp_path, dicom, process):
    process.file(dicom(tmp_path / "PLANTED.dcm", **CT))
    (child,) = children()
    line = " ".join(child.cmdline())
    assert KEY.hex() not in line
    assert "PLANTED" not in line


def test_it_ends_with_its_standard_input(tmp_path, dicom, process):
    process.file(dicom(tmp_path / "a.dcm", **CT))
    (child,) = children()
    process._process.stdin.close()
    gone, alive = psutil.wait_procs([child], timeout=10)
    assert (gone, alive) == ([child], [])
