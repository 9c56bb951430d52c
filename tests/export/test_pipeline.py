"""The whole export: a bundle that is complete, described and hashed, or none."""

import json
import shutil
from pathlib import Path

import pytest

from clinifed.errors import ExportError, PrivacyError
from clinifed.export.pipeline import ExportReport, export_checkpoint
from clinifed.export.presets import Thresholds, load_presets
from clinifed.files import file_sha256


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
    assert len(calibration["sha256"]) == 64


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


def test_a_hospitals_images_do_not_calibrate_and_leave_nothing(
    checkpoint: Path, sets: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(PrivacyError):
        export(checkpoint, tmp_path / "bundle", calibration=sets["hospital"])
    assert list(tmp_path.iterdir()) == []


def strict(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Presets under which the precisions ``names`` cannot pass."""
    presets = load_presets()
    limit = Thresholds(cosine_mean=0, top1_agreement=0, logits_max_abs=1e-12)
    precisions = {
        n: p.model_copy(update={"parity": limit} if n in names else {}) for n, p in presets.precisions.items()
    }
    changed = presets.model_copy(update={"precisions": precisions})
    monkeypatch.setattr("clinifed.export.pipeline.load_presets", lambda: changed)


def test_a_precision_that_misses_its_threshold_is_not_packed_and_the_report_says_why(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict(monkeypatch, "fp16")
    report = export(checkpoint, tmp_path / "bundle", precisions=("fp32", "fp16", "fp32")).to_dict()
    assert [row["precision"] for row in report["precisions"]] == ["fp32", "fp16"]
    assert [row["packed"] for row in report["precisions"]] == [True, False]
    assert "logits_max_abs" in report["precisions"][1]["failures"][0]
    assert [p.name for p in (tmp_path / "bundle" / "onnx").iterdir()] == ["fp32.onnx"]


def test_no_bundle_is_left_when_no_precision_passes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict(monkeypatch, "fp16")
    with pytest.raises(ExportError, match="fp16: not packed: logits_max_abs"):
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
