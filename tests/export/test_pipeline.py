"""The whole export: a bundle that is complete, described and hashed, or none."""

import errno
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from clinifed.bundle import verify
from clinifed.errors import BundleError, ExportError, PrivacyError
from clinifed.evaluation.parity import run_onnx
from clinifed.export.pipeline import ExportReport, export_checkpoint
from clinifed.export.presets import Thresholds, load_presets
from clinifed.files import file_sha256
from clinifed.models.state import read_checkpoint
from clinifed.signing import make_signing_key, public_key


def export(checkpoint: Path, out: Path, **changes: object) -> ExportReport:
    settings: dict[str, object] = {
        "precisions": ("fp32", "int8"),
        "targets": ("onnx",),
        "calibration": None,
        "test": None,
    }
    return export_checkpoint(checkpoint, out, **{**settings, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "bundle"
    export(checkpoint, out)
    return out


def test_the_bundle_holds_what_its_manifest_says_and_nothing_else(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    on_disk = {str(p.relative_to(bundle)) for p in bundle.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(manifest["files"]) == on_disk >= {"onnx/fp32.onnx", "onnx/int8.onnx", "card.json", "labels.json"}
    assert all(entry["sha256"] == file_sha256(bundle / name) for name, entry in manifest["files"].items())


def test_the_manifest_says_the_calibration_was_public(bundle: Path) -> None:
    calibration = json.loads((bundle / "manifest.json").read_text())["calibration"]
    assert calibration["public"] is True
    assert len(calibration["manifest_sha256"]) == len(calibration["pixels_sha256"]) == 64


def test_no_file_names_this_machine(bundle: Path, checkpoint: Path) -> None:
    for path in (p for p in bundle.rglob("*") if p.is_file()):
        assert str(checkpoint.parent).encode() not in path.read_bytes(), path
        assert str(Path.cwd()).encode() not in path.read_bytes(), path


def test_int8_is_smaller_and_close(bundle: Path) -> None:
    rows = json.loads((bundle / "parity.json").read_text())["precisions"]
    assert rows["fp32"]["parity"]["logits_max_abs"] <= 1e-4
    assert rows["int8"]["parity"]["cosine_mean"] >= 0.9985
    sizes = {name: (bundle / "onnx" / f"{name}.onnx").stat().st_size for name in ("fp32", "int8")}
    assert sizes["int8"] < 0.5 * sizes["fp32"]


def test_an_existing_bundle_and_unknown_names_are_refused_at_once(bundle: Path, checkpoint: Path) -> None:
    with pytest.raises(ExportError) as caught:
        export(checkpoint, bundle, precisions=("fp64",), targets=("openvino",))
    text = "\n".join(caught.value.problems)
    assert "fp64" in text
    assert "openvino" in text
    assert "never overwritten" in text
    with pytest.raises(ExportError, match="profile 'laptop' is not known; use workstation, datacenter, jetson-orin"):
        export(checkpoint, bundle.parent / "other", profile="laptop")


def test_a_hospitals_images_do_not_calibrate_and_leave_nothing(
    checkpoint: Path, sets: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(PrivacyError):
        export(checkpoint, tmp_path / "bundle", calibration=sets["hospital"])
    assert list(tmp_path.iterdir()) == []


def strict(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Presets under which the precisions ``names`` cannot pass."""
    presets = load_presets()
    limit = Thresholds(cosine_mean=0, top1_agreement=0, logits_max_rel=1e-12)
    precisions = {
        n: p.model_copy(update={"parity": limit} if n in names else {}) for n, p in presets.precisions.items()
    }
    changed = presets.model_copy(update={"precisions": precisions})
    monkeypatch.setattr("clinifed.export.request.load_presets", lambda: changed)


def test_a_precision_that_misses_its_threshold_is_not_packed_and_the_report_says_why(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict(monkeypatch, "fp16")
    report = export(checkpoint, tmp_path / "bundle", precisions=("fp32", "fp16", "fp32")).to_dict()
    assert [row["precision"] for row in report["precisions"]] == ["fp32", "fp16"]
    assert [row["packed"] for row in report["precisions"]] == [True, False]
    assert "logits_max_rel" in report["precisions"][1]["failures"][0]
    assert [p.name for p in (tmp_path / "bundle" / "onnx").iterdir()] == ["fp32.onnx"]


def test_no_bundle_is_left_when_no_precision_passes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict(monkeypatch, "fp16")
    with pytest.raises(ExportError, match="fp16: not packed: logits_max_rel"):
        export(checkpoint, tmp_path / "bundle", precisions=("fp16",))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("key", "option"), [("validation", "--calibration"), ("test", "--test")])
def test_a_card_without_public_sets_needs_the_option(key: str, option: str, checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run" / "checkpoint"
    shutil.copytree(checkpoint, copy)
    card = json.loads((copy / "card.json").read_text())
    card["public"] = {k: str((checkpoint / v).resolve()) for k, v in card["public"].items() if k != key}
    (copy / "card.json").write_text(json.dumps(card))
    with pytest.raises(ExportError, match=f"public.{key} names no manifest; give one with {option}"):
        export(copy, tmp_path / "bundle")


def test_another_base_model_is_refused_with_both_hashes(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run" / "checkpoint"
    shutil.copytree(checkpoint, copy)
    card = json.loads((copy / "card.json").read_text())
    actual, card["base_model"]["sha256"] = card["base_model"]["sha256"], "e" * 64
    card["public"] = {k: str((checkpoint / v).resolve()) for k, v in card["public"].items()}
    (copy / "card.json").write_text(json.dumps(card))
    with pytest.raises(ExportError, match=f"(?s){'e' * 64}.*{actual}"):
        export(copy, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def changed_card(checkpoint: Path, folder: Path, **changes: object) -> Path:
    """A copy of the checkpoint whose card says something else; its public sets are found as before."""
    copy = folder / "checkpoint"
    shutil.copytree(checkpoint, copy)
    card = json.loads((copy / "card.json").read_text())
    card["public"] = {name: str((checkpoint / path).resolve()) for name, path in card["public"].items()}
    (copy / "card.json").write_text(json.dumps({**card, **changes}))
    return copy


def manifest_of(bundle: Path) -> dict:
    return json.loads((bundle / "manifest.json").read_text())


def test_a_signed_bundle_is_verified_with_the_key_and_with_no_other(checkpoint: Path, tmp_path: Path) -> None:
    key, stranger = (public_key(make_signing_key(tmp_path / name)) for name in ("key", "stranger"))
    export(checkpoint, tmp_path / "bundle", precisions=("fp32",), sign_key=tmp_path / "key")
    assert verify(tmp_path / "bundle", [key]).exportable
    with pytest.raises(BundleError):
        verify(tmp_path / "bundle", [stranger])


def test_a_bundle_is_a_checkpoint_again(bundle: Path, checkpoint: Path) -> None:
    kept, source = read_checkpoint(bundle), read_checkpoint(checkpoint)
    assert kept.params.keys() == source.params.keys()
    assert all((kept.params[name] == source.params[name]).all() for name in kept.params)


def test_a_subset_holds_nothing_of_the_other_heads(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    export(checkpoint, out, precisions=("fp32",), specialties=("radiology",))
    assert set(read_checkpoint(out).params) == {
        "trunk.projection.weight",
        "heads.radiology.weight",
        "heads.radiology.bias",
    }
    for path in (out / "labels.json", out / "card.json", out / "onnx" / "fp32.onnx", out / "prompts.safetensors"):
        assert b"emergency" not in path.read_bytes(), path


def test_an_in_house_head_or_an_unexportable_checkpoint_marks_the_bundle(checkpoint: Path, tmp_path: Path) -> None:
    cases = {
        "in-house": ({"in_house": ["radiology"]}, None, False),
        "left out": ({"in_house": ["radiology"]}, ("emergency",), True),
        "marked": ({"exportable": False}, None, False),
    }
    for name, (changes, specialties, exportable) in cases.items():
        source = changed_card(checkpoint, tmp_path / name, **changes)
        report = export(source, tmp_path / name / "bundle", precisions=("fp32",), specialties=specialties)
        written = manifest_of(tmp_path / name / "bundle")
        assert written["exportable"] is report.exportable is exportable
        assert bool(written.get("reasons")) is not exportable


def test_a_hospitals_images_are_used_on_demand_and_mark_the_bundle(
    checkpoint: Path, sets: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    export(checkpoint, out, precisions=("int8",), calibration=sets["hospital"], hospital_data=True)
    written = manifest_of(out)
    assert written["exportable"] is False
    assert any("quantisation ranges" in reason for reason in written["reasons"])
    assert written["calibration"]["public"] is False
    assert written["calibration"]["images"] is None


def test_a_head_that_lost_to_zero_shot_is_exported_as_zero_shot_and_marked(checkpoint: Path, tmp_path: Path) -> None:
    source = changed_card(checkpoint, tmp_path)
    params = load_file(source / "model.safetensors")
    params["heads.emergency.weight"] = -params["heads.emergency.weight"]  # now it says the opposite
    params["heads.emergency.bias"] = -params["heads.emergency.bias"]
    save_file(params, source / "model.safetensors")
    report = export(source, tmp_path / "bundle", precisions=("fp32",))
    assert {name: choice.head for name, choice in report.heads.items()} == {
        "emergency": "zero-shot",
        "radiology": "trained",
    }
    labels = json.loads((tmp_path / "bundle" / "labels.json").read_text())
    assert labels["emergency"]["head"] == "zero-shot"
    assert labels["emergency"]["trained"] < labels["emergency"]["zero_shot"]
    pixels = np.random.default_rng(0).standard_normal((2, 3, 160, 160)).astype(np.float32)
    found = run_onnx(tmp_path / "bundle" / "onnx" / "fp32.onnx", pixels)
    assert np.array_equal(found.logits["emergency"], found.zero_shot["emergency"])


def test_the_text_tower_comes_with_its_tokenizer_when_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "bundle", precisions=("fp32",), text=True)
    files = set(manifest_of(tmp_path / "bundle")["files"])
    assert {"text/fp32.onnx", "text/tokenizer/tokenizer_config.json"} <= files
    assert [p.name for p in (tmp_path / "bundle" / "triton").iterdir()] == ["clinifed_fp32"]


@pytest.mark.parametrize("profile", ["datacenter", "jetson-orin"])
def test_an_engine_that_cannot_be_built_here_is_left_to_the_device(
    profile: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # also where it is installed
    report = export(checkpoint, tmp_path / "bundle", profile=profile, precisions=("int8",), targets=None).to_dict()
    assert report["precisions"][0]["engine_bytes"] == {}
    assert "device" in report["precisions"][0]["no_engine"]["tensorrt"] or profile == "datacenter"
    files = set(manifest_of(tmp_path / "bundle")["files"])
    assert {"build_engine.py", "build.json", "device/clinifed_int8_tensorrt/config.pbtxt"} <= files


def test_a_full_disk_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes, mode: int = 0o644) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("clinifed.export.onnx.write_atomic", full)
    with pytest.raises(ExportError, match="No space left"):
        export(checkpoint, tmp_path / "bundle", precisions=("fp32",))
    assert list(tmp_path.iterdir()) == []
