"""A bundle is what was signed, whole, or it is refused; whatever else it holds, nothing but an error comes of it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from clinifed import bundle_signed
from clinifed.bundle import check, seal, verify
from clinifed.errors import AuthenticityError, BundleError, ExportError
from clinifed.files import file_sha256, sha256_of
from clinifed.signing import public_key, sign

from .bundles import CONTENT, ENGINES, ONNX, build_locally, fill, reseal, sealed

KEY, STRANGER, DEVICE = (Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i in (1, 2, 3))
KEYS, DEVICES = (public_key(KEY),), (public_key(DEVICE),)
FLIPS = 200


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed bundle; not to be changed."""
    return sealed(tmp_path_factory.mktemp("made") / "bundle", KEY)


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(original, tmp_path / "bundle")


def refused(bundle: Path) -> str:
    """What the error says, which is none of authenticity alone."""
    with pytest.raises(BundleError) as caught:
        verify(bundle, KEYS, DEVICES)
    assert not isinstance(caught.value, AuthenticityError)
    return "\n".join(caught.value.problems)


def test_a_bundle_as_it_was_signed_is_verified_and_read(original: Path) -> None:
    found = verify(original, [public_key(STRANGER), *KEYS])
    assert found.key == KEYS[0]
    assert found.exportable
    assert set(found.files) == {str(p.relative_to(original)) for p in original.rglob("*") if p.is_file()} - {
        "manifest.json",
        "manifest.sig",
    }
    assert found.read(ENGINES[0]) == (original / ENGINES[0]).read_bytes()
    assert (original / "manifest.sig").stat().st_size == 64
    assert verify(original, KEYS) == check(original, KEYS) or vars(verify(original, KEYS)) == vars(
        check(original, KEYS)
    )


def test_no_flipped_bit_anywhere_passes(bundle: Path) -> None:
    """200 bits, drawn evenly over all bytes of all files, and the first and last of each file besides."""
    files = sorted(p for p in bundle.rglob("*") if p.is_file())
    ends = np.cumsum([p.stat().st_size for p in files])
    draw = np.random.default_rng(2025)
    places = [int(place) for place in draw.integers(0, ends[-1], FLIPS)]
    drawn = []
    for place in places:
        number = int(np.searchsorted(ends, place, side="right"))
        drawn.append((files[number], place - (int(ends[number - 1]) if number else 0)))
    drawn += [(path, at) for path in files for at in (0, path.stat().st_size - 1)]
    passed = []
    for path, at in drawn:
        content = bytearray(path.read_bytes())
        content[at] ^= 1 << int(draw.integers(8))
        before = path.read_bytes()
        path.write_bytes(content)
        try:
            verify(bundle, KEYS)
        except BundleError:
            pass
        else:
            passed.append((path.name, at))
        path.write_bytes(before)
    assert len(drawn) >= FLIPS
    assert passed == []
    verify(bundle, KEYS)


def test_every_bit_of_the_signature_counts(bundle: Path) -> None:
    path = bundle / "manifest.sig"
    signature = path.read_bytes()
    for bit in range(512):
        path.write_bytes((int.from_bytes(signature, "little") ^ (1 << bit)).to_bytes(64, "little"))
        assert "manifest.sig" in refused(bundle)


def _swap(bundle: Path) -> None:
    one, other = (bundle / name for name in ENGINES)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def _link_away(bundle: Path) -> None:
    path = bundle / ENGINES[0]
    shutil.move(path, bundle.parent / "elsewhere")
    path.symlink_to(bundle.parent / "elsewhere")  # the same bytes, but not for long


def _link_folder(bundle: Path) -> None:
    shutil.move(bundle / "onnx", bundle.parent / "onnx")
    (bundle / "onnx").symlink_to(bundle.parent / "onnx")


def _pipe(bundle: Path) -> None:
    (bundle / ONNX).unlink()
    os.mkfifo(bundle / ONNX)


def _sign_again(bundle: Path, key: Ed25519PrivateKey, purpose: str) -> None:
    digest = file_sha256(bundle / "manifest.json")
    (bundle / "manifest.sig").write_bytes(bytes.fromhex(sign(key, purpose, digest)))


def _resealed(bundle: Path) -> None:
    (bundle / ENGINES[0]).write_bytes(b"mine")
    reseal(bundle, STRANGER)


ATTACKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "an added file": (lambda b: (b / "onnx" / "extra.onnx").write_bytes(b""), "onnx/extra.onnx: was added"),
    "a hidden file": (lambda b: (b / ".hook").write_bytes(b"x"), ".hook: was added"),
    "an empty directory": (lambda b: (b / "plugins").mkdir(), "plugins: is a directory that does not belong"),
    "a full directory": (lambda b: shutil.copytree(b / "onnx", b / "more"), "more: is a directory that does not"),
    "an added link": (lambda b: (b / "latest").symlink_to(ONNX), "latest: is a symbolic link"),
    "a dangling link": (lambda b: (b / "gone").symlink_to("/nowhere"), "gone: is a symbolic link"),
    "a linked file": (_link_away, f"{ENGINES[0]}: is a symbolic link"),
    "a linked folder": (_link_folder, "onnx: is a symbolic link"),
    "a pipe": (_pipe, f"{ONNX}: is a pipe"),
    "a file for a folder": (lambda b: (shutil.rmtree(b / "onnx"), (b / "onnx").write_text("")), "onnx: was added"),
    "a folder for a file": (
        lambda b: ((b / "card.json").unlink(), (b / "card.json").mkdir()),
        "card.json: is a directory",
    ),
    "a removed file": (lambda b: (b / ENGINES[1]).unlink(), f"{ENGINES[1]}: is missing"),
    "a removed folder": (lambda b: shutil.rmtree(b / "onnx"), "onnx/fp32.onnx: is missing"),
    "a file cut short": (lambda b: os.truncate(b / ONNX, 39_999), f"{ONNX}: has 39999 bytes, not 40000"),
    "a file made longer": (lambda b: os.truncate(b / ONNX, 40_001), f"{ONNX}: has 40001 bytes, not 40000"),
    "a file emptied": (lambda b: os.truncate(b / "card.json", 0), "card.json: has 0 bytes"),
    "engines exchanged": (_swap, f"{ENGINES[0]}: its SHA-256 is"),
    "a name with a blank": (lambda b: (b / ONNX).rename(b / "onnx" / "int8.onnx "), f"{ONNX}: is missing"),
    "a name in capitals": (lambda b: (b / ONNX).rename(b / "onnx" / "INT8.onnx"), f"{ONNX}: is missing"),
    "a name that looks alike": (lambda b: (b / ONNX).rename(b / "onnx" / "int8.оnnx"), f"{ONNX}: is missing"),
    "a foreign signature": (lambda b: _sign_again(b, STRANGER, "bundle"), "somebody else signed it"),
    "a signature for something else": (lambda b: _sign_again(b, KEY, "update"), "manifest.sig"),
    "a local engine's signature": (lambda b: _sign_again(b, KEY, "local engine"), "manifest.sig"),
    "sealed again by a stranger": (_resealed, "somebody else signed it"),
    "a hexadecimal signature": (
        lambda b: (b / "manifest.sig").write_text((b / "manifest.sig").read_bytes().hex()),
        "manifest.sig",
    ),
    "a signature cut short": (lambda b: os.truncate(b / "manifest.sig", 63), "has 63 bytes"),
    "a signature made longer": (lambda b: os.truncate(b / "manifest.sig", 65), "more than 64 bytes"),
    "a linked signature": (
        lambda b: (shutil.move(b / "manifest.sig", b.parent / "s"), (b / "manifest.sig").symlink_to(b.parent / "s")),
        "manifest.sig: cannot be read",
    ),
    "a linked manifest": (
        lambda b: (shutil.move(b / "manifest.json", b.parent / "m"), (b / "manifest.json").symlink_to(b.parent / "m")),
        "manifest.json: cannot be read",
    ),
    "a pipe for a manifest": (
        lambda b: ((b / "manifest.json").unlink(), os.mkfifo(b / "manifest.json")),
        "manifest.json: is a pipe",
    ),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "manifest.json: cannot be read (No such file"),
    "a file in local": (lambda b: ((b / "local").mkdir(), (b / "local" / "x").write_text("")), "local/x: is a file"),
    "an empty local": (lambda b: (b / "local").mkdir(), "local: is an empty directory"),
    "a link for local": (lambda b: (b / "local").symlink_to("/tmp"), "local: is a symbolic link"),
    "an empty local engine": (lambda b: (b / "local" / "m").mkdir(parents=True), "local/m/engine.json: cannot be"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_changed_is_refused_and_named(attack: str, bundle: Path) -> None:
    change, says = ATTACKS[attack]
    change(bundle)
    assert says in refused(bundle)


def test_every_problem_is_told_at_once_but_no_more_than_can_be_read(bundle: Path) -> None:
    (bundle / ONNX).unlink()
    (bundle / "a").write_text("")
    _swap(bundle)
    assert len(refused(bundle).splitlines()) == 4
    for i in range(100):
        (bundle / f"added-{i}").write_text("")
    told = refused(bundle).splitlines()
    assert len(told) == 21
    assert told[-1] == "and 84 more"


def test_names_on_the_disk_cannot_speak_to_the_terminal(bundle: Path) -> None:
    (bundle / "\x1b[2Jall is well\n").write_text("")
    (bundle / os.fsdecode(b"\xff")).mkdir()
    said = refused(bundle)
    assert "\x1b" not in said
    assert r"\x1b[2Jall is well\n: was added" in said


def test_without_key_or_signature_nobody_vouches_but_a_change_is_still_found(bundle: Path) -> None:
    with pytest.raises(AuthenticityError, match="authenticity unknown"):
        verify(bundle, ())
    (bundle / "manifest.sig").unlink()
    with pytest.raises(AuthenticityError, match="nobody vouches"):
        verify(bundle, KEYS)
    with pytest.raises(AuthenticityError, match="authenticity unknown"):
        verify(bundle, ())
    os.truncate(bundle / ONNX, 1)
    with pytest.raises(BundleError, match="has 1 bytes") as caught:
        verify(bundle, ())
    assert not isinstance(caught.value, AuthenticityError)


def test_nothing_is_parsed_before_the_signature_held(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*_: object, **__: object) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(bundle_signed.json, "loads", parse)
    with pytest.raises(BundleError, match="somebody else signed it"):
        verify(bundle, [public_key(STRANGER)])
    with pytest.raises(AssertionError, match="parsed"):
        verify(bundle, KEYS)


def test_a_file_that_changes_after_the_check_is_not_read(bundle: Path) -> None:
    found = verify(bundle, KEYS)
    _swap(bundle)
    with pytest.raises(BundleError, match="changed after"):
        found.read(ENGINES[0])
    _link_away(bundle)
    with pytest.raises(BundleError, match="cannot be read"):
        found.read(ENGINES[0])
    _link_folder(bundle)
    with pytest.raises(BundleError, match="cannot be read"):
        found.read(ONNX)
    os.truncate(bundle / "labels.json", 3)
    for name in ("labels.json", "manifest.json", "../bundle/card.json", "/etc/hostname", "card.json\0", ""):
        with pytest.raises(BundleError):
            found.read(name)


# --- engines built on a device


def test_an_engine_that_the_device_signed_belongs_to_the_bundle(bundle: Path) -> None:
    place = build_locally(bundle, DEVICE)
    found = verify(bundle, KEYS, DEVICES)
    assert found.local["image-int8"].key == DEVICES[0]
    assert found.local["image-int8"].content["tensorrt"] == "10.3.0"
    assert found.read("local/image-int8/1/model.plan") == (place / "1" / "model.plan").read_bytes()
    (place / "1" / "model.plan").write_bytes(b"x" * 5_000)
    with pytest.raises(BundleError, match="changed after"):
        found.read("local/image-int8/1/model.plan")


def test_an_engine_of_the_device_is_refused_without_its_signature_or_its_key(bundle: Path) -> None:
    place = build_locally(bundle, DEVICE)
    with pytest.raises(AuthenticityError, match="local/image-int8: built on a device"):
        verify(bundle, KEYS)
    (place / "engine.sig").unlink()
    with pytest.raises(AuthenticityError, match=r"local/image-int8/engine\.sig: is missing"):
        verify(bundle, KEYS, DEVICES)


def test_the_makers_key_does_not_sign_for_a_device(bundle: Path) -> None:
    build_locally(bundle, KEY)
    assert "local/image-int8/engine.sig" in refused(bundle)


WRONG_ENGINES: dict[str, tuple[dict[str, object], str]] = {
    "another bundle": ({"manifest_sha256": "0" * 64}, "built from another bundle"),
    "another ONNX": ({"onnx": {"name": ONNX, "sha256": "0" * 64}}, f"built from another {ONNX}"),
    "an ONNX that is not there": ({"onnx": {"name": "x.onnx", "sha256": "0" * 64}}, "x.onnx is not in the bundle"),
    "an ONNX outside": ({"onnx": {"name": "../x.onnx", "sha256": "0" * 64}}, "not a plain name"),
    "no files": ({"files": {}}, "engine.json: files"),
    "a file outside": ({"files": {"../../card.json": {"sha256": "0" * 64, "bytes": 1}}}, "not a plain name"),
    "its own sidecar": ({"files": {"engine.json": {"sha256": "0" * 64, "bytes": 1}}}, "lists engine.json"),
    "another version": ({"schema_version": 2}, "schema_version"),
}


@pytest.mark.parametrize("name", WRONG_ENGINES)
def test_an_engine_of_something_else_is_refused_though_the_device_signed_it(name: str, bundle: Path) -> None:
    changes, says = WRONG_ENGINES[name]
    build_locally(bundle, DEVICE, **changes)
    assert says in refused(bundle)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: (p / "more").write_text(""), "local/image-int8/more: was added"),
        (lambda p: (p / "1" / "model.plan").write_bytes(b"x" * 5_000), "local/image-int8/1/model.plan: its SHA-256"),
        (lambda p: (p / "build.log").unlink(), "local/image-int8/build.log: is missing"),
        (lambda p: (p / "empty").mkdir(), "local/image-int8/empty: is a directory"),
        (lambda p: p.rename(p.with_name("an other")), "local/an other: not a plain name"),
        (lambda p: shutil.copytree(p, p.with_name("image-fp16")) and (p / "engine.sig").unlink(), "engine.sig"),
    ],
)
def test_an_engine_that_was_changed_on_the_device_is_refused(
    change: Callable[[Path], object], says: str, bundle: Path
) -> None:
    change(build_locally(bundle, DEVICE))
    with pytest.raises(BundleError) as caught:
        verify(bundle, KEYS, DEVICES)
    assert says in str(caught.value)


def test_a_strangers_engine_is_refused(bundle: Path) -> None:
    build_locally(bundle, STRANGER)
    assert "local/image-int8/engine.sig: no given key (1) made this signature" in refused(bundle)


# --- manifests of any shape


def _entry(**changes: object) -> dict[str, object]:
    return {"sha256": "0" * 64, "bytes": 1, **changes}


def _manifest(**changes: object) -> bytes:
    return json.dumps({"schema_version": 2, "exportable": True, "files": {"a": _entry()}, **changes}).encode()


MALFORMED = {
    "empty": b"",
    "not JSON": b"{",
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": _manifest().decode().encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + _manifest(),
    "a list": b"[]",
    "an old version": _manifest(schema_version=1),
    "a version that is a text": _manifest(schema_version="2"),
    "a version that is true": _manifest(schema_version=True),
    "no files": _manifest(files={}),
    "files as a list": _manifest(files=[]),
    "no word on export": b'{"schema_version": 2, "files": {}}',
    "export without reasons": _manifest(exportable=False),
    "export with reasons": _manifest(reasons=["in-house head"]),
    "export as a number": _manifest(exportable=1),
    "a key twice": b'{"schema_version": 2, "schema_version": 2, "exportable": true, "files": {}}',
    "infinity": _manifest().replace(b"true", b"1e999"),
    "NaN": _manifest().replace(b"true", b"NaN"),
    "an endless number": _manifest().replace(b"true", b"9" * 10_000),
    "deep lists": b"[" * 200_000,
    "deep objects": _manifest()[:-1] + b', "x": ' + b'{"a":' * 40 + b"1" + b"}" * 41,
    "huge": b" " * (5 << 20) + _manifest(),
    "a negative size": _manifest(files={"a": _entry(bytes=-1)}),
    "a size that is true": _manifest(files={"a": _entry(bytes=True)}),
    "a size of a half": _manifest(files={"a": _entry(bytes=0.5)}),
    "a size beyond all": _manifest(files={"a": _entry(bytes=2**64)}),
    "a short hash": _manifest(files={"a": _entry(sha256="00")}),
    "a hash in capitals": _manifest(files={"a": _entry(sha256="A" * 64)}),
    "a hash with a newline": _manifest(files={"a": _entry(sha256="0" * 64 + "\n")}),
    "an entry with more": _manifest(files={"a": _entry(mode=7)}),
    **{
        f"the name {name!r}": _manifest(files={name: _entry()})
        for name in (
            "..",
            "../a",
            "a/../b",
            "/a",
            "a//b",
            "a/",
            "./a",
            "",
            "a\\b",
            "a\nb",
            "a\0b",
            "a b",
            "\u202ea",
            "é",
        )
    },
    **{
        f"the reserved name {name!r}": _manifest(files={name: _entry()})
        for name in ("manifest.json", "manifest.sig", "local/m/engine.json", "local")
    },
    "a long name": _manifest(files={"a" * 300: _entry()}),
    "a deep name": _manifest(files={"a/" * 50 + "a": _entry()}),
    "a lone surrogate": _manifest(files={"\ud800": _entry()}),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_manifest_is_refused_even_when_it_is_signed(name: str, tmp_path: Path) -> None:
    content = MALFORMED[name]
    (tmp_path / "manifest.json").write_bytes(content)
    (tmp_path / "manifest.sig").write_bytes(bytes.fromhex(sign(KEY, "bundle", sha256_of(content))))
    assert "manifest.json" in refused(tmp_path)
    for problem in refused(tmp_path).splitlines():
        assert problem.isprintable()
        assert len(problem) < 1000


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=300)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["schema_version", "files", "exportable", "reasons", "sha256", "bytes", "..", "a"])
                | st.text(max_size=5),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode())
)
@example(content=_manifest())
def test_any_bytes_as_a_manifest_end_in_one_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    (tmp_path / "manifest.sig").write_bytes(bytes.fromhex(sign(KEY, "bundle", sha256_of(content))))
    for keys in (KEYS, ()):
        with pytest.raises(BundleError):
            verify(tmp_path, keys)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "no such bundle" in refused(tmp_path / "absent")
    assert "manifest.json: cannot be read" in refused(tmp_path)


# --- sealing


def test_sealing_lists_every_file_and_says_what_it_was_given(tmp_path: Path) -> None:
    seal(fill(tmp_path), {**CONTENT, "exportable": False, "reasons": ["calibrated on hospital data"]}, None)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["schema_version"] == 2
    assert manifest["calibration"] == CONTENT["calibration"]
    on_disk = {str(p.relative_to(tmp_path)): p for p in tmp_path.rglob("*") if p.is_file()}
    assert {*manifest["files"], "manifest.json"} == set(on_disk)
    for name, entry in manifest["files"].items():
        assert entry == {"sha256": file_sha256(on_disk[name]), "bytes": on_disk[name].stat().st_size}
    found = check(tmp_path)
    assert (found.exportable, found.reasons, found.key) == (False, ("calibrated on hospital data",), None)


@pytest.mark.parametrize(
    ("change", "content", "says"),
    [
        (lambda f: (f / "l").symlink_to("card.json"), {}, "l: is a symbolic link"),
        (lambda f: os.mkfifo(f / "p"), {}, "p: is a pipe"),
        (lambda f: (f / "empty" / "er").mkdir(parents=True), {}, "empty/er: is an empty directory"),
        (lambda f: (f / "a b").write_text(""), {}, "a b: not a plain name"),
        (lambda f: (f / "a\\b").write_text(""), {}, "not a plain name"),
        (lambda f: (f / "a\nb").write_text(""), {}, r"a\nb: not a plain name"),
        (lambda f: (f / "manifest.json").write_text(""), {}, "manifest.json: is there before"),
        (lambda f: (f / "local" / "m").mkdir(parents=True), {}, "local: is there before"),
        (lambda f: None, {"files": {}}, "files: is what sealing writes"),
        (lambda f: None, {"exportable": False}, "say why a bundle is not exportable"),
        (lambda f: None, {"exportable": None}, "exportable"),
        (lambda f: None, {"tools": float("nan")}, "not JSON"),
        (lambda f: None, {"tools": object()}, "not JSON"),
        (lambda f: None, {"tools": "x" * (5 << 20)}, "more than"),
    ],
)
def test_what_could_not_be_verified_is_not_sealed(
    change: Callable[[Path], object], content: dict[str, object], says: str, tmp_path: Path
) -> None:
    change(fill(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ExportError) as caught:
        seal(tmp_path, {**CONTENT, **content}, KEY)
    assert says in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_looking_at_a_bundle_loads_no_model_library() -> None:
    script = (
        "import sys; import clinifed.bundle, clinifed.bundle_contents\n"
        "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    run = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert not set(run.stdout.split()) & {"torch", "numpy", "onnx", "onnxruntime", "nvflare", "safetensors", "tensorrt"}
