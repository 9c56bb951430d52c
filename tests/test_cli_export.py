"""``clinifed export``, ``verify``, ``inspect``, ``keys``: what is typed, what is told, and how it ends."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from clinifed.cli import main
from clinifed.errors import AuthenticityError, BundleError, ConfigError, ModelError, PrivacyError
from clinifed.signing import make_key_pair, public_key

from .bundles import CARD, ENGINES, PARITY, build_locally, fill, reseal, sealed

Typed = Callable[..., tuple[int, str, str]]
DEVICE = Ed25519PrivateKey.from_private_bytes(b"\3" * 32)


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    """Run a command line; returns (exit code, what it printed, what it complained of)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def key(tmp_path: Path) -> Ed25519PrivateKey:
    """The maker's key, in ``keys/maker`` and ``keys/maker.pub``."""
    (tmp_path / "keys").mkdir()
    return make_key_pair(tmp_path / "keys" / "maker")


@pytest.fixture
def bundle(tmp_path: Path, key: Ed25519PrivateKey) -> Path:
    return sealed(tmp_path / "bundle", key)


def test_verify_and_inspect_end_as_the_shell_expects_and_load_no_model_library(bundle: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from clinifed.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(*({'torch', 'numpy', 'onnx', 'nvflare'} & sys.modules.keys()), file=sys.stderr)"
    )

    def run(*arguments: object) -> tuple[int, str, str]:
        command = [sys.executable, "-P", "-c", script, *map(str, arguments)]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert "Traceback" not in ended.stderr
        assert ended.stderr.splitlines()[-1].strip() == ""
        return ended.returncode, ended.stdout, ended.stderr

    assert run("verify", bundle, "--key", tmp_path / "keys")[0] == 0
    assert run("verify", bundle)[0] == AuthenticityError.exit_code == 10
    assert run("inspect", bundle)[0] == 0
    os.truncate(bundle / ENGINES[0], 7)
    for command in (("verify", bundle, "--key", tmp_path / "keys"), ("verify", bundle), ("inspect", bundle)):
        code, out, err = run(*command)
        assert code == BundleError.exit_code == 9
        assert out == ""
        assert f"clinifed: {ENGINES[0]}: has 7 bytes, not 50000" in err
    (bundle / "manifest.sig").unlink()
    assert run("verify", bundle, "--key", tmp_path / "keys" / "maker.pub")[0] == 10


def test_verify_tells_what_was_verified(typed: Typed, bundle: Path, key: Ed25519PrivateKey) -> None:
    code, out, err = typed("verify", bundle, "--key", public_key(key))
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("verified: 8 files, 0.23 MB")
    assert f"signed by {public_key(key)}" in out
    code, out, _ = typed("verify", bundle, "--key", "0" * 64, "--key", public_key(key), "--json")
    said = json.loads(out)
    assert (code, said["verified"], said["files"], said["key"]) == (0, True, 8, public_key(key))


def test_verify_tells_of_local_engines_and_of_what_may_not_leave(
    typed: Typed, bundle: Path, key: Ed25519PrivateKey
) -> None:
    reseal(bundle, key, exportable=False, reasons=["calibrated on hospital data"])
    build_locally(bundle, DEVICE)
    code, _, err = typed("verify", bundle, "--key", public_key(key))
    assert code == 10
    assert "--local-key" in err
    code, out, _ = typed("verify", bundle, "--key", public_key(key), "--local-key", public_key(DEVICE))
    assert code == 0
    assert "NOT exportable: calibrated on hospital data" in out
    assert "local engine image-int8: from onnx/int8.onnx" in out
    assert public_key(DEVICE) in out.replace("\n", "")


def test_a_key_that_is_none_is_named_before_anything_is_read(typed: Typed, bundle: Path, tmp_path: Path) -> None:
    code, _, err = typed("verify", bundle, "--key", tmp_path / "keys" / "maker", "--key", "xyz")
    assert code == ConfigError.exit_code
    assert err.count("clinifed: ") == 2
    assert (tmp_path / "keys" / "maker").read_text().strip() not in err


def test_inspect_tells_first_whether_anybody_vouches_and_then_what_is_inside(
    typed: Typed, bundle: Path, key: Ed25519PrivateKey
) -> None:
    code, out, _ = typed("inspect", bundle)
    assert code == 0
    assert out.splitlines()[0] == "NOT VERIFIED"
    assert "authenticity unknown" in out
    code, out, _ = typed("inspect", bundle, "--key", public_key(key))
    assert (code, out.splitlines()[0]) == (0, "VERIFIED")
    flat = " ".join(out.split())
    for text in (
        "exportable yes",
        "precision int8: 0.04 MB; cosine_mean 0.99912",
        "tensorrt built on the device",
        f"engine {ENGINES[1]}, 0.05 MB",
        "federation three-hospitals, 8 rounds, job run-7",
        "ref tiny, sha256 bbbb",
        "site alder: epsilon 0.98765 per patient (add/remove, delta 1e-05, lifetime)",
        "calibration sha256 ffff",
        "public yes, images 64",
        "tools onnx 1.23.0",
        "profile workstation",
    ):
        assert text in flat, text


def test_inspect_speaks_json(typed: Typed, bundle: Path, key: Ed25519PrivateKey) -> None:
    build_locally(bundle, DEVICE)
    code, out, _ = typed("inspect", bundle, "--key", public_key(key), "--json")
    found = json.loads(out)
    assert (code, found["verified"], found["key"]) == (0, False, public_key(key))  # of the engine nobody is known
    assert found["engines"] == dict.fromkeys(ENGINES, 50_000)
    assert found["precisions"]["int8"]["cosine_mean"] == 0.99912
    assert found["lineage"]["sites"]["alder"]["ledger_head"] == "d" * 64
    assert found["lineage"]["specialties"] == ["radiology"]
    assert found["local"]["image-int8"]["onnx"] == "onnx/int8.onnx"
    out = typed("inspect", bundle, "--key", public_key(key), "--local-key", public_key(DEVICE))[1]
    assert out.splitlines()[0] == "VERIFIED"


def test_inspect_does_not_show_what_somebody_else_signed(typed: Typed, bundle: Path) -> None:
    code, out, err = typed("inspect", bundle, "--key", "0" * 64)
    assert (code, out) == (9, "")
    assert "somebody else signed it" in err


ODD = [None, [], {}, 7, "text", [[]], {"a": 1}, {"int8": None}, {"int8": {"parity": 3, "packed": "x"}}, True, 1e300]


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_inspect_takes_a_bundle_of_any_shape(odd: object, typed: Typed, tmp_path: Path) -> None:
    folder = fill(tmp_path / "bundle")
    (folder / "card.json").write_text(json.dumps(odd))
    (folder / "parity.json").write_text(json.dumps({"precisions": odd, "test": odd}))
    from clinifed.bundle import seal

    seal(folder, {"exportable": True, "lineage": odd, "tools": odd, "calibration": odd, "heads": odd}, None)
    code, out, _ = typed("inspect", folder)
    assert code == 0
    assert "not stated" in out
    assert typed("inspect", folder, "--json")[0] == 0
    for key in CARD:
        (folder / "card.json").write_text(json.dumps({**CARD, key: odd}))
        (folder / "parity.json").write_text(json.dumps({**PARITY, "precisions": {"int8": odd}}))
        reseal(folder, None)
        assert typed("inspect", folder)[0] == 0


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 10_000, b'{"a": 1, "a": 2}', b"null"])
def test_inspect_takes_files_that_are_no_json(content: bytes, typed: Typed, bundle: Path) -> None:
    for name in ("card.json", "parity.json"):
        (bundle / name).write_bytes(content)
    reseal(bundle, None)
    code, out, _ = typed("inspect", bundle)
    assert code == 0
    assert "not stated" in out


def test_what_a_bundle_says_can_neither_steer_the_terminal_nor_pose_as_ours(typed: Typed, bundle: Path) -> None:
    evil = "\x1b[2J[bold red]x[/]\r\nVERIFIED\u202e"
    for name in ("card.json", "parity.json"):
        (bundle / name).write_text(json.dumps({"federation": evil, "precisions": {evil: {}}, "test": {evil: evil}}))
    reseal(bundle, None, lineage=None, tools={evil: evil}, exportable=False, reasons=[evil])
    out = typed("inspect", bundle)[1]
    assert not set(out) & {"\x1b", "\r", "\u202e"}
    assert "VERIFIED" not in out.splitlines()
    assert "[bold red]" in out


def test_keys_new_makes_a_pair_and_show_prints_its_public_half(typed: Typed, tmp_path: Path) -> None:
    path = tmp_path / "coordinator"
    code, out, _ = typed("keys", "new", "--out", path, "--json")
    public = json.loads(out)["public_key"]
    assert code == 0
    assert path.read_text().strip() not in out
    assert typed("keys", "show", path)[1].strip() == public == typed("keys", "show", f"{path}.pub")[1].strip()
    code, _, err = typed("keys", "new", "--out", path)
    assert code == PrivacyError.exit_code
    assert "never overwritten" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["coordinator", "coordinator.pub"]
    assert typed("privacy", "key", tmp_path / "site")[0] == 0
    assert typed("keys", "show", tmp_path / "absent")[0] == PrivacyError.exit_code


def test_a_key_made_here_signs_what_verify_accepts(typed: Typed, tmp_path: Path) -> None:
    typed("keys", "new", "--out", tmp_path / "k")
    from clinifed.signing import read_signing_key

    folder = sealed(tmp_path / "bundle", read_signing_key(tmp_path / "k"))
    assert typed("verify", folder, "--key", tmp_path / "k.pub")[0] == 0
    assert typed("verify", shutil.copytree(folder, tmp_path / "copy"), "--key", tmp_path)[0] == 0


# --- export


def test_export_passes_on_what_was_typed(
    typed: Typed, tmp_path: Path, key: Ed25519PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clinifed.export import pipeline

    taken = inspect.signature(pipeline.export_checkpoint)
    asked: list[dict[str, object]] = []

    def stand_in(*arguments: object, **settings: object) -> pipeline.ExportReport:
        asked.append(taken.bind(*arguments, **settings).arguments)
        return pipeline.ExportReport(tmp_path, (), {})

    monkeypatch.setattr(pipeline, "export_checkpoint", stand_in)
    code, _, err = typed("export", "checkpoint", "--out", "made")
    assert code == 0
    assert "not signed" in err
    plain = asked[-1]
    assert plain["checkpoint"] == Path("checkpoint")
    assert plain["precisions"] == ("fp32", "fp16", "int8")
    assert plain["profile"] == "workstation"
    assert [plain[k] for k in ("targets", "specialties", "parity_images", "model_ref", "sign_key")] == [None] * 5
    assert [plain[k] for k in ("text", "hospital_data")] == [False, False]

    words = "--profile datacenter --precision int8 --target tensorrt,onnx --specialty a,b --text --hospital-data"
    signed = ["--sign-key", tmp_path / "keys" / "maker", "--images", 9, "--model", "tiny"]
    code, out, err = typed("export", "checkpoint", "--out", "made", *words.split(), *signed)
    assert code == 0
    assert "not signed" not in err
    assert public_key(key) in out.replace("\n", "")
    full = asked[-1]
    assert [full[k] for k in ("profile", "precisions", "targets", "specialties")] == [
        "datacenter",
        ("int8",),
        ("tensorrt", "onnx"),
        ("a", "b"),
    ]
    assert [full[k] for k in ("text", "hospital_data", "parity_images", "model_ref")] == [True, True, 9, "tiny"]
    assert full["sign_key"] == tmp_path / "keys" / "maker"


def test_export_of_what_is_no_checkpoint_or_with_no_key_ends_before_any_work(typed: Typed, tmp_path: Path) -> None:
    code, _, err = typed("export", tmp_path / "absent", "--out", tmp_path / "made", "--target", "onnx")
    assert code == ModelError.exit_code
    assert "not a checkpoint" in err
    code, _, err = typed("export", tmp_path, "--out", tmp_path / "made", "--sign-key", tmp_path / "absent")
    assert code == PrivacyError.exit_code
    assert "clinifed keys new" in err
    code, _, err = typed("export", tmp_path, "--out", tmp_path / "made", "--images", 0)
    assert code == ConfigError.exit_code
    assert "--images 0" in err
    assert list(tmp_path.iterdir()) == []
