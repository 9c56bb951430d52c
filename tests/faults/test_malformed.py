"""Hostile bytes at every boundary: refused, no code of theirs run, and no more memory taken than they are long."""

import io
import pickle  # noqa: TID251 — what an attacker sends
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from nvflare.app_common.decomposers import numpy_decomposers
from nvflare.fuel.utils import fobs
from nvflare.fuel.utils.zip_utils import unzip_all_from_bytes

from clinifed.errors import ClinifedError, FederationError
from clinifed.executors.frames import read_frame
from clinifed.models import backbone
from clinifed.models.backbone import load_backbone
from clinifed.models.state import CARD, WEIGHTS, read_checkpoint
from clinifed.privacy.outbox import unpack

pytestmark = pytest.mark.faults

MIB = 1 << 20
NDARRAY = "numpy.ndarray"
ARRAYS = "nvflare.app_common.decomposers.numpy_decomposers.NumpyArrayDecomposer"


@contextmanager
def little_memory(most: int = 64 * MIB) -> Iterator[None]:
    """What happens in here takes no more than ``most`` bytes at its peak."""

    def resident(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = resident("VmRSS")
    yield
    assert resident("VmHWM") - before < most


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def evil(tmp_path: Path) -> Iterator[bytes]:
    """A pickle whose code must not run; it does run when it is unpickled."""
    mark = tmp_path / "pickle-ran"
    content = pickle.dumps(Evil(mark))
    yield content
    assert not mark.exists()
    pickle.loads(content)
    assert mark.exists(), "the attack is none"


def message(body: Any, announced: int | None = None) -> bytes:
    """``body`` as the main section of a FOBS message, which may announce another length."""
    packed = body if isinstance(body, bytes) else msgpack.packb(body)
    honest = fobs.dumps(1)
    header = bytearray(honest[: len(honest) - 1])  # the section's header; the number 1 is one byte
    length = (len(packed) if announced is None else announced).to_bytes(8, "big")
    assert header.count((1).to_bytes(8, "big")) == 1
    return bytes(header).replace((1).to_bytes(8, "big"), length) + packed


def typed(name: str, data: Any, decomposer: str) -> dict[str, Any]:
    return {"__fobs_type__": name, "__fobs_data__": data, "__fobs_dc__": decomposer}


def array(content: bytes) -> bytes:
    """A message that is an array, as FLARE sends small ones."""
    return message(typed(NDARRAY, {"type": "native", "data": content}, ARRAYS))


def array_file(value: Any = None, header: str = "") -> bytes:
    """An .npy file, its header as given: numpy reads the shape from there."""
    stream = io.BytesIO()
    np.save(stream, value if value is not None else np.zeros(2, np.float32), allow_pickle=True)
    content = stream.getvalue()
    if header:
        content = content[:8] + len(header).to_bytes(2, "little") + header.encode() + content[128:]
    return content


# FLARE raises of many kinds; these are all of them, and no crash of ours.
REFUSED = (RuntimeError, ValueError, TypeError, MemoryError)
HUGE = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}\n"
MESSAGES = {
    "a class that runs commands": lambda _: message(typed("subprocess.Popen", "id", ARRAYS)),
    "a class of ours": lambda _: message(typed("clinifed.privacy.ledger.Ledger", {}, ARRAYS)),
    "a decomposer of its own": lambda _: message(typed(NDARRAY + "s", "x", "os.system")),
    "a data class that is none": lambda _: message(
        typed("pathlib.Path", {}, "nvflare.fuel.utils.fobs.decomposer.DataClassDecomposer")
    ),
    "an array of pickles": lambda evil: array(array_file(np.array([evil], object))),
    "an array that is a pickle": lambda evil: array(evil),
    "an array that announces terabytes": lambda _: array(array_file(header=HUGE)),
    "a list that announces billions": lambda _: message(b"\xdd\xff\xff\xff\xff"),
    "a text that announces gigabytes": lambda _: message(b"\xdb\xff\xff\xff\xff"),
    "lists in lists": lambda _: message(b"\x91" * 100_000 + b"\xc0"),
    "a section that announces exabytes": lambda _: message(1, announced=1 << 60),
    "a pickle": lambda evil: evil,
    "a pickle in a message": lambda evil: message(evil),
    "a torn message": lambda _: fobs.dumps({"x": np.ones(1000, np.float32)})[:-100],
    "nothing": lambda _: b"",
}


@pytest.mark.parametrize("make", MESSAGES.values(), ids=MESSAGES)
def test_a_malformed_message_is_refused_by_flare(make: Callable[[bytes], bytes], evil: bytes) -> None:
    numpy_decomposers.register()
    content = make(evil)
    with little_memory(), pytest.raises(REFUSED):
        fobs.loads(content)


def test_the_same_construction_of_an_honest_message_is_read() -> None:
    """The messages above fail for what is wrong in them."""
    numpy_decomposers.register()
    assert fobs.loads(message({"x": 1})) == {"x": 1}
    assert (fobs.loads(array(array_file())) == np.zeros(2)).all()


def archive(name: str, mode: int = 0o644) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        entry = zipfile.ZipInfo(name)
        entry.external_attr = mode << 16
        file.writestr(entry, "/etc/passwd")
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [archive("../evil"), archive("a/../../evil"), archive("/evil"), archive("link", 0o120777), b"PK\x03\x04none", b""],
    ids=["parent", "parent further in", "absolute", "symbolic link", "torn", "empty"],
)
def test_a_job_archive_that_leaves_its_folder_is_refused(content: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    with pytest.raises((ValueError, zipfile.BadZipFile)):
        unzip_all_from_bytes(content, str(folder))
    assert list(folder.iterdir()) == []
    assert sorted(tmp_path.iterdir()) == [folder]


def weights(evil: bytes) -> list[bytes]:
    """Files that are no safetensors: the length of the header, the header, the arrays."""
    return [
        evil,
        (1 << 62).to_bytes(8, "little") + b"{}",
        (1 << 32).to_bytes(8, "little") + b"{}",
        _safetensors('{"x":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'),
        _safetensors('{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),  # beyond the end
        b"",
    ]


def _safetensors(header: str) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + b"\0" * 4


def test_weights_that_are_no_safetensors_are_refused(evil: bytes, tmp_path: Path) -> None:
    """As a release from the outbox, and as a checkpoint."""
    (tmp_path / CARD).write_text("{}")
    for content in weights(evil):
        (tmp_path / WEIGHTS).write_bytes(content)
        for read in (lambda c=content: unpack(c), lambda: read_checkpoint(tmp_path)):
            with little_memory(), pytest.raises(ClinifedError, match=r"damaged|cannot be read"):
                read()


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin"])
def test_a_pickle_as_a_base_model_is_refused(name: str, evil: bytes, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(Path(backbone.__file__).with_name("tiny"), model)
    for there in model.glob("*.safetensors"):
        there.unlink()
    (model / name).write_bytes(evil)
    with pytest.raises(ClinifedError, match="could not be loaded"):
        load_backbone(f"local-dir:{model}")


def test_a_frame_that_announces_gigabytes_is_refused() -> None:
    stream = io.BytesIO(b"\xff\xff\xff\xff{}")
    with little_memory(), pytest.raises(FederationError, match="announces a header"):
        read_frame(stream.read)
