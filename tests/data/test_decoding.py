import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from clinifed.data import decoding, reader
from clinifed.data.decoding import Decoder, default_decoder
from clinifed.data.decoding_worker import Limits
from clinifed.data.dicom import read_pixels, read_volume
from clinifed.data.fingerprint import Header, read_header
from clinifed.data.reasons import REASONS
from clinifed.data.volumes import Frames
from clinifed.errors import DataError

from .raw_dicom import J2K, compressed


@pytest.fixture
def decoder():
    with Decoder() as it:
        yield it


def readers(decoder: Decoder) -> list[psutil.Process]:
    return [psutil.Process(pid) for pid in decoder.pids]


def gone(process: psutil.Process, patience_s: float = 10) -> bool:
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> None:
    """A reader that says ``body`` in place of what ours does; ``answer(header, content)`` sends."""
    script = tmp_path / "reader.py"
    script.write_text(
        "import json, os, sys, time\n"
        "def answer(header, content=b''):\n"
        "    text = header if isinstance(header, bytes) else json.dumps(header).encode()\n"
        "    os.write(1, len(text).to_bytes(4, 'big') + text + content)\n"
        "answer({'ready': True})\n"
        f"while sys.stdin.buffer.read1(1 << 16):\n    {body}\n"
    )
    started = subprocess.Popen
    monkeypatch.setattr(reader.subprocess, "Popen", lambda _, **more: started([sys.executable, script], **more))


def test_readers_answer_as_the_functions_do(decoder, tmp_path, dicom):
    frames = np.arange(5 * 64, dtype=np.uint16).reshape(5, 8, 8)
    path = dicom(tmp_path / "a.dcm", frames, bits=12)
    assert Header(*decoder.origin(path)) == read_header(path)
    assert decoder.origin(path)[:2] == ("HOSPITAL", "P1")
    np.testing.assert_array_equal(decoder.pixels(path), read_pixels(path))
    np.testing.assert_array_equal(decoder.volume(path, Frames(3)), read_volume(path, Frames(3)))
    assert decoder.volume(path, Frames(3)).shape == (3, 8, 8)


def test_a_name_that_is_no_text_is_read_all_the_same(decoder, tmp_path, dicom):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.dcm"))
    dicom(tmp_path / "a.dcm").rename(odd)
    assert decoder.pixels(odd).shape == (8, 8)


def test_one_reader_is_used_again(decoder, tmp_path, dicom):
    path = dicom(tmp_path / "a.dcm")
    decoder.pixels(path)
    first = readers(decoder)
    for _ in range(5):
        decoder.pixels(path)
    assert readers(decoder) == first
    assert len(first) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_reader_that_dies_costs_one_file(decoder, tmp_path, dicom, number):
    path = dicom(tmp_path / "a.dcm")
    decoder.pixels(path)
    (process,) = readers(decoder)
    process.send_signal(number)
    assert gone(process)
    with pytest.raises(DataError, match="reader crashed"):
        decoder.pixels(path)
    assert decoder.pixels(path).shape == (8, 8)
    assert decoder.usage.refused == {"reader crashed": 1}


def test_a_file_that_takes_too_long_is_given_up(tmp_path, dicom):
    path = dicom(tmp_path / "a.dcm")
    with Decoder(limits=Limits(wall_s=1)) as decoder:
        decoder.pixels(path)
        (process,) = readers(decoder)
        process.suspend()
        with pytest.raises(DataError, match="too long"):
            decoder.pixels(path)
        assert gone(process)
        assert decoder.pixels(path).shape == (8, 8)


def test_the_kernel_ends_a_file_that_takes_too_much_processor_time(tmp_path):
    noise = np.random.default_rng(1).integers(0, 256, (600, 600), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "JPEG2000", no_jp2=True)
    path = tmp_path / "a.dcm"
    path.write_bytes(compressed(J2K, *[out.getvalue()] * 64, rows=600, columns=600, frames=b"64"))
    with Decoder(limits=Limits(cpu_s=1, wall_s=60)) as decoder, pytest.raises(DataError, match="too long"):
        decoder.volume(path, Frames(64))
    assert decoder.usage.slowest_s < 30


def test_a_file_that_takes_too_much_memory_is_given_up_and_the_next_has_a_new_reader(tmp_path, dicom):
    large = dicom(tmp_path / "large.dcm", np.zeros((6000, 6000), np.uint8))
    small = dicom(tmp_path / "small.dcm")
    with Decoder(limits=Limits(memory_mib=64)) as decoder:
        decoder.pixels(small)
        (first,) = readers(decoder)
        with pytest.raises(DataError, match="too much memory"):
            decoder.pixels(large)
        assert decoder.pixels(small).shape == (8, 8)
        assert readers(decoder) != [first]
        assert gone(first)


def test_a_reader_can_write_no_file_and_start_no_process(decoder, tmp_path, dicom):
    decoder.pixels(dicom(tmp_path / "a.dcm"))
    (process,) = readers(decoder)
    assert process.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
    assert process.rlimit(psutil.RLIMIT_CORE) == (0, 0)
    assert process.rlimit(psutil.RLIMIT_NPROC) == (0, 0)
    assert process.rlimit(psutil.RLIMIT_NOFILE) == (32, 32)
    assert process.rlimit(psutil.RLIMIT_AS)[0] <= (512 << 20) + process.memory_info().vms
    status = Path(f"/proc/{process.pid}/status").read_text()
    assert "NoNewPrivs:\t1" in status


def test_a_reader_loads_neither_torch_nor_monai_nor_flare():
    script = "import sys, clinifed.data.decoding_worker, clinifed.data.dicom; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert not {name.split(".")[0] for name in run.stdout.split()} & {"torch", "monai", "nvflare", "pandas"}


def test_the_process_that_asks_does_not_load_pydicom():
    script = "import sys, clinifed.data.decoding; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert "pydicom" not in run.stdout.split()


@pytest.mark.parametrize(
    "body",
    [
        "answer({'shape': [1, 1 << 20, 1 << 20]})",
        "answer({'shape': [1, -8, 8]}, bytes(256))",
        "answer({'shape': [1, 8, 8, 4]}, bytes(1024))",
        "answer({'shape': '8'})",
        "answer(b'[]')",
        "answer(b'no JSON')",
        "answer({'shape': [1, 1, 1]}, b'\\0\\0\\xc0\\x7f')",  # NaN
        "answer({'shape': [1, 1, 1]}, b'\\0\\0\\0\\x40')",  # 2.0
        "answer({'reason': 'PLANTED^NAME'})",
        "os.write(1, b'\\xff\\xff\\xff\\xff')",
        "sys.exit()",
    ],
)
def test_an_answer_that_is_none_is_a_crash(decoder, tmp_path, monkeypatch, body):
    fake(monkeypatch, tmp_path, body)
    with pytest.raises(DataError, match=r"^reader crashed$"):
        decoder.pixels(tmp_path / "a.dcm")


@pytest.mark.parametrize("body", ["answer({'value': [1] * 6})", "answer({'value': ['a']})", "answer({})"])
def test_an_origin_that_is_none_is_a_crash(decoder, tmp_path, monkeypatch, body):
    fake(monkeypatch, tmp_path, body)
    with pytest.raises(DataError, match=r"^reader crashed$"):
        decoder.origin(tmp_path / "a.dcm")


@pytest.mark.parametrize(
    "body",
    [
        "answer({'bytes': 3}, b'[1]')",
        "answer({'bytes': 7}, b'[[\"a\"], ')",
        "answer({'bytes': -1})",
        "answer({'bytes': 1 << 40})",
        "answer({'value': [['a']]})",
    ],
)
def test_a_directory_that_is_none_is_a_crash(decoder, tmp_path, monkeypatch, body):
    fake(monkeypatch, tmp_path, body)
    with pytest.raises(DataError, match=r"^reader crashed$"):
        decoder.directory(tmp_path / "DICOMDIR")


def test_results_come_in_order_and_few_are_read_ahead(tmp_path, dicom):
    asked = []

    def paths():
        for number in range(40):
            asked.append(number)
            if number % 7 == 3:
                yield tmp_path / "absent.dcm"
            else:
                yield dicom(tmp_path / f"{number}.dcm", np.full((8, 8), number, np.uint8))

    with Decoder(readers=2) as decoder:
        for number, found in enumerate(decoder.map(paths())):
            assert len(asked) <= number + 6
            if number % 7 == 3:
                assert str(found) == "no such file"
            else:
                np.testing.assert_allclose(found, number / 255, atol=1e-6)
    assert number == 39


def test_a_reader_is_shared_by_threads(decoder, tmp_path, dicom):
    paths = [dicom(tmp_path / f"{n}.dcm", np.full((8, 8), n, np.uint8)) for n in range(8)]
    wrong = []

    def work(number: int) -> None:
        for _ in range(10):
            if not np.allclose(decoder.pixels(paths[number]), number / 255, atol=1e-6):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_reader_ends_with_its_parent_however_that_ends(tmp_path, dicom):
    path = dicom(tmp_path / "a.dcm")
    script = (
        "import sys, pathlib, time, psutil\nfrom clinifed.data.decoding import default_decoder\n"
        f"default_decoder().pixels(pathlib.Path({str(path)!r}))\n"
        "print(psutil.Process().children()[0].pid, flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-P", "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        process = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert gone(process)


def test_a_forked_child_has_readers_of_its_own_and_leaves_the_parents_alone(tmp_path, dicom):
    path = dicom(tmp_path / "a.dcm")
    script = (
        "import os, pathlib, psutil\nfrom clinifed.data.decoding import default_decoder\n"
        f"path = pathlib.Path({str(path)!r})\n"
        "before = default_decoder().pixels(path)\nmine = psutil.Process().children()[0].pid\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    same = (default_decoder().pixels(path) == before).all()\n"
        "    mine = [p.pid for p in psutil.Process().children()]\n"
        "    default_decoder().close()\n"
        "    os._exit(0 if same and len(mine) == 1 else 1)\n"
        "_, status = os.waitpid(child, 0)\nassert status == 0, status\n"
        "assert (default_decoder().pixels(path) == before).all()\n"
        "assert [p.pid for p in psutil.Process().children()] == [mine]\n"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-P", "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""


def test_the_default_decoder_is_one_for_the_process():
    assert default_decoder() is default_decoder()
    assert default_decoder() in decoding._decoders


def test_nothing_of_the_file_is_in_what_is_said(decoder, tmp_path, dicom, capfd, caplog):
    path = dicom(tmp_path / "PLANTED.dcm", PatientID="PLANTED-1", PatientName="PLANTED^NAME")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError) as caught:
        decoder.pixels(path)
    assert str(caught.value) in REASONS
    assert "PLANTED" not in "".join(capfd.readouterr()) + caplog.text


@pytest.mark.parametrize("readers", [0, 3, -1])
def test_readers_are_one_or_two(readers):
    with pytest.raises(ValueError, match="1 or 2"):
        Decoder(readers)
