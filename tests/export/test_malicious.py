"""Checkpoints and base models made to do harm: refused by name, with nothing executed, unpacked or allocated."""

import io
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import clinifed.models
from clinifed.errors import ClinifedError, ExportError, ModelError
from clinifed.export.pipeline import export_checkpoint
from clinifed.models.backbone import load_backbone
from clinifed.models.state import CARD, WEIGHTS, read_checkpoint

TINY = Path(clinifed.models.__file__).parent / "tiny"
BIN = "open_clip_pytorch_model.bin"


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What appears if anything of a stranger's runs, or is unpacked to where it wants to be."""
    return tmp_path / "executed"


def pickled(marker: Path) -> bytes:
    """A pickle (protocol 0) that runs ``touch`` when it is loaded."""
    return f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()


def zipped(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return content.getvalue()


def torch_archive(marker: Path) -> bytes:
    """A ``.pt`` of torch's own form whose pickle does harm, with a member that would leave the folder."""
    harm = {"archive/data.pkl": pickled(marker), "archive/version": b"3\n", "archive/byteorder": b"little"}
    return zipped({**harm, "archive/../../executed": b"x"})


def zip_slip(marker: Path) -> bytes:
    """A zip whose members would all be unpacked elsewhere."""
    return zipped({"../executed": b"x", str(marker): b"x", "../../executed": b"x", f"../{WEIGHTS}": b"x"})


def safetensors(header: object, data: bytes = b"\0" * 64, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(begin: int, end: int, shape: tuple[int, ...] = (4,), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


WEIGHTS_THAT_LIE: dict[str, bytes] = {
    "nothing": b"",
    "a header of 2^62 bytes": safetensors({}, length=1 << 62),
    "a header of 2^64 - 1 bytes": safetensors({}, length=(1 << 64) - 1),
    "a header of 2^31 bytes": safetensors({}, length=1 << 31),
    "a header of just under its limit": safetensors({}, length=99_999_999),
    "a header beyond the file": safetensors({"x": tensor(0, 16)}, b"", length=500),
    "a header of nested lists": safetensors(b"[" * 100_000),
    "a header that is no JSON": safetensors(b"\xff" * 50),
    "arrays that overlap": safetensors({"x": tensor(0, 16), "y": tensor(8, 24)}, b"\0" * 24),
    "an array beyond the file": safetensors({"x": tensor(0, 4 * 10**12, (10**12,))}),
    "an array before the file": safetensors({"x": tensor(-16, 0)}),
    "an array that ends before it begins": safetensors({"x": tensor(16, 0)}),
    "more elements than bytes": safetensors({"x": tensor(0, 16, (1000,))}, b"\0" * 16),
    "a shape that overflows": safetensors({"x": tensor(0, 16, (1 << 40, 1 << 40))}, b"\0" * 16),
    "an unknown kind of number": safetensors({"x": tensor(0, 16, dtype="O")}, b"\0" * 16),
    "a hole": safetensors({"x": tensor(16, 32)}, b"\0" * 32),
    "more than it lists": safetensors({"x": tensor(0, 16)}, b"\0" * 1000),
}


def checkpoint_of(folder: Path, weights: bytes, card: bytes = b"{}") -> Path:
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(weights)
    (folder / CARD).write_bytes(card)
    return folder


def refused(checkpoint: Path, match: str) -> None:
    """By the reader, and by the whole export, which leaves nothing behind."""
    with pytest.raises(ModelError, match=match):
        read_checkpoint(checkpoint)
    out = checkpoint.parent / "out" / "bundle"
    with pytest.raises(ModelError, match=match):
        export_checkpoint(checkpoint, out, precisions=("fp32",), targets=("onnx",))
    assert not out.exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [pickled, torch_archive])
def test_the_harm_is_real(make: Callable[[Path], bytes], tmp_path: Path, marker: Path) -> None:
    """Loaded without care, the two programs do what the tests below look for."""
    (tmp_path / "weights.pt").write_bytes(make(marker))
    with suppress(RuntimeError):  # it comes after the harm
        torch.load(tmp_path / "weights.pt", weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("make", [pickled, torch_archive, zip_slip])
def test_weights_that_are_a_program_are_not_run(make: Callable[[Path], bytes], tmp_path: Path, marker: Path) -> None:
    refused(checkpoint_of(tmp_path / "checkpoint", make(marker)), "cannot be read as safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]


@pytest.mark.parametrize("make", [pickled, torch_archive, zip_slip])
def test_a_file_in_place_of_the_checkpoint_is_not_unpacked(
    make: Callable[[Path], bytes], tmp_path: Path, marker: Path
) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(make(marker))
    refused(tmp_path / "checkpoint.pt", "not a checkpoint")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt"]


@pytest.mark.parametrize("name", WEIGHTS_THAT_LIE)
def test_weights_that_lie_about_themselves_are_refused(name: str, tmp_path: Path) -> None:
    refused(checkpoint_of(tmp_path / "checkpoint", WEIGHTS_THAT_LIE[name]), "cannot be read as safetensors")


def test_no_header_makes_the_reader_allocate_what_it_announces(tmp_path: Path) -> None:
    """In a process that may take 256 MiB more than it has when it begins; a thread's arena alone reserves 64."""
    for number, content in enumerate(WEIGHTS_THAT_LIE.values()):
        checkpoint_of(tmp_path / str(number), content)
    script = """
import resource, sys
from pathlib import Path
from clinifed.errors import ModelError
from clinifed.models.state import read_checkpoint
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (256 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    bytearray(512 << 20)
except MemoryError:
    print("limited")
for folder in Path(sys.argv[1]).iterdir():
    try:
        read_checkpoint(folder)
    except ModelError:
        print("refused")
"""
    run = subprocess.run([sys.executable, "-P", "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert run.stdout.split() == ["limited", *["refused"] * len(WEIGHTS_THAT_LIE)], run.stderr


CARDS = {
    "a list": (b"[]", "expected an object, found list"),
    "a text": (b'"card"', "expected an object, found str"),
    "null": (b"null", "expected an object, found NoneType"),
    "no JSON": (b"{", "cannot be read"),
    "no UTF-8": (b"\xff\xfe", "cannot be read"),
    "nothing": (b"", "cannot be read"),
    "deep lists": (b"[" * 1_000_000, "nested too deeply"),
    "deep objects": (b'{"a":' * 1_000_000, "nested too deeply"),
    "an endless number": (b'{"rounds": ' + b"9" * 1_000_000 + b"}", "cannot be read"),
    "another's hash": (b'{"weights_sha256": "00"}', "is not the one that card.json describes"),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_of_another_shape_is_refused(name: str, tmp_path: Path) -> None:
    card, says = CARDS[name]
    refused(checkpoint_of(tmp_path / "checkpoint", safetensors({}, b""), card), says)


def test_a_card_of_100_megabytes_is_not_read(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "checkpoint", safetensors({}, b""))
    os.truncate(checkpoint / CARD, 100 << 20)
    tracemalloc.start()
    refused(checkpoint, "has 104857600 bytes")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20


@pytest.mark.parametrize(
    "change",
    [
        {"base_model": "tiny"},
        {"base_model": None},
        {"training": {"train": "heads", "temperature": "hot"}},
        {"training": []},
        {"specialties": {"radiology": {"labels": 7}}},
        {"specialties": []},
        {"specialties": {"../../escaped": {"labels": [["a", ["x"]], ["b", ["y"]]]}}},
        {"public": 7},
        {"public": {"validation": 7, "test": {}}},
    ],
    ids=str,
)
def test_a_card_with_other_kinds_of_values_ends_in_our_error(
    change: dict[str, object], checkpoint: Path, sets: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copy)
    card = json.loads((copy / CARD).read_text())
    card["public"] = {which: os.path.relpath(sets[which], copy) for which in ("validation", "test")}
    (copy / CARD).write_text(json.dumps({**card, **change}))
    with pytest.raises((ExportError, ModelError)):
        export_checkpoint(copy, tmp_path / "out" / "bundle", precisions=("int8",), targets=("onnx",))
    assert not list(tmp_path.rglob("escaped*"))
    assert not (tmp_path / "out" / "bundle").exists()


def _pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    "put",
    [_pipe, lambda p: p.symlink_to("/dev/zero"), lambda p: p.symlink_to("/nowhere"), lambda p: p.symlink_to(p.name)],
    ids=["a pipe", "a link to a device", "a dangling link", "a link to itself"],
)
@pytest.mark.parametrize("name", [WEIGHTS, CARD])
def test_what_is_no_file_is_not_opened(name: str, put: Callable[[Path], None], tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "checkpoint", safetensors({}, b""))
    (checkpoint / name).unlink()
    put(checkpoint / name)
    refused(checkpoint, f"not a checkpoint, {name} missing")


def test_a_link_to_a_pickle_is_as_little_run_as_the_pickle(tmp_path: Path, marker: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "checkpoint", b"")
    (tmp_path / "elsewhere").write_bytes(pickled(marker))
    (checkpoint / WEIGHTS).unlink()
    (checkpoint / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    refused(checkpoint, "cannot be read as safetensors")
    assert not marker.exists()


# --- base models


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The tiny model as a stranger's directory, to be changed."""
    return shutil.copytree(TINY, tmp_path / "model")


def change_json(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def not_loaded(model: Path, match: str = "could not be loaded") -> None:
    with pytest.raises(ModelError, match=match):
        load_backbone(f"local-dir:{model}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [pickled, torch_archive, zip_slip])
@pytest.mark.parametrize("name", [BIN, "pytorch_model.bin", "model.pth", "open_clip_model.safetensors"])
def test_a_base_model_whose_weights_are_a_program_is_not_run(
    name: str, make: Callable[[Path], bytes], model: Path, marker: Path
) -> None:
    (model / "open_clip_model.safetensors").unlink()
    (model / name).write_bytes(make(marker))
    not_loaded(model)
    assert not marker.exists()
    assert {p.name for p in model.parent.iterdir()} == {"model"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["a header of 2^62 bytes", "an array beyond the file", "nothing"])
def test_a_base_model_whose_weights_lie_is_refused(name: str, model: Path) -> None:
    (model / "open_clip_model.safetensors").write_bytes(WEIGHTS_THAT_LIE[name])
    not_loaded(model)


def _program(model: Path, marker: Path) -> None:
    for folder in (model, model / "text"):
        (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")


def _tokenizer_of_its_own(content: dict[str, object]) -> None:
    content |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}


def _text_tower_of_its_own(content: dict[str, object]) -> None:
    content |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}


def _trusts_itself(content: dict[str, object]) -> None:
    content["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}  # type: ignore[index]


@pytest.mark.parametrize("trusts_itself", [False, True])
@pytest.mark.parametrize(
    ("file", "change"),
    [("tokenizer_config.json", _tokenizer_of_its_own), ("text/config.json", _text_tower_of_its_own)],
)
def test_a_base_model_that_brings_a_program_is_not_run_and_nobody_is_asked(
    file: str,
    change: Callable[[dict[str, object]], object],
    trusts_itself: bool,
    model: Path,
    marker: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _program(model, marker)
    change_json(model / file, change)
    if trusts_itself:
        change_json(model / "open_clip_config.json", _trusts_itself)
    monkeypatch.setattr("builtins.input", lambda _: marker.touch() or "y")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    not_loaded(model)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"{}", b'{"model_cfg": []}', b'{"model_cfg": {"text_cfg": 7}}', b"\xff", b"[" * 100_000]
)
def test_a_base_model_without_a_configuration_is_refused(content: bytes, model: Path) -> None:
    (model / "open_clip_config.json").write_bytes(content)
    not_loaded(model, "no configuration of a model")


def test_a_card_cannot_have_a_program_run_as_its_base_model(
    checkpoint: Path, sets: dict[str, Path], model: Path, marker: Path, tmp_path: Path
) -> None:
    (model / "open_clip_model.safetensors").unlink()
    (model / BIN).write_bytes(pickled(marker))
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copy)
    public = {which: os.path.relpath(sets[which], copy) for which in ("validation", "test")}
    base = {"ref": f"local-dir:{model}"}
    change_json(copy / CARD, lambda c: c.update(public=public, base_model={**c["base_model"], **base}))  # type: ignore[dict-item]
    with pytest.raises(ClinifedError, match="could not be loaded"):
        export_checkpoint(copy, tmp_path / "out" / "bundle", precisions=("fp32",), targets=("onnx",))
    assert not marker.exists()
