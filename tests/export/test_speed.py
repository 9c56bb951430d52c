"""``clinifed bench``: each form of the model in a process of its own, and a reason where one does not run."""

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from clinifed.bundle import check
from clinifed.errors import ExportError
from clinifed.export import speed
from clinifed.export.pipeline import export_checkpoint
from clinifed.export.speed import BATCHES, Measured, Subject, measure, measure_here, subjects
from clinifed.jobs.report import speed_table


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("speed") / "bundle"
    export_checkpoint(checkpoint, out, precisions=("fp32", "fp16"), targets=("onnx",))
    return out


def test_every_model_of_the_bundle_is_measured_the_reference_first(bundle: Path, checkpoint: Path) -> None:
    alone = subjects(bundle, check(bundle), None, None, 1)
    assert [(s.backend, s.name) for s in alone] == [("onnxruntime", "fp32"), ("onnxruntime", "fp16")]
    both = subjects(bundle, check(bundle), checkpoint, "tiny", 1)
    assert [(s.backend, s.name) for s in both[:2]] == [("torch", "fp32"), ("torch.compile", "fp32")]


def test_figures_come_from_a_process_of_its_own_and_ratios_from_the_first(
    bundle: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Subject("onnxruntime", "broken", str(bundle / "card.json"))
    fp32 = subjects(bundle, check(bundle), None, None, 1)[0]
    told: list[str] = []
    failed, done = measure([broken, fp32], told.append)
    assert told == ["onnxruntime broken", "onnxruntime fp32"]
    assert failed.latency_s is None
    assert failed.reason.startswith("ended with 1: ")
    assert done.latency_s is not None
    assert done.latency_p95_s is not None
    assert done.latency_s <= done.latency_p95_s
    assert done.ratio == 1.0
    assert done.images_per_s is not None
    assert set(done.images_per_s) == {str(n) for n in BATCHES}
    assert done.peak_rss_mb is not None
    assert done.peak_rss_mb > 50
    assert json.loads(json.dumps(done.to_dict()))["backend"] == "onnxruntime"
    assert speed_table([failed, done]).row_count == 2


def test_torch_runs_what_was_exported(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_SECONDS", 0.0)
    found = measure_here(Subject("torch", "fp32", str(checkpoint), "tiny"))
    assert found.latency_s is not None
    assert found.latency_s > 0


def test_what_does_not_end_is_listed_with_its_reason(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_LIMIT_S", 0.01)
    (found,) = measure(subjects(bundle, check(bundle), None, None, 1)[:1], lambda text: None)
    assert found == Measured("onnxruntime", "fp32", reason="did not end within 0.01 s")


def test_a_bundle_without_an_onnx_model_is_refused(bundle: Path) -> None:
    contents = replace(check(bundle), files={})
    with pytest.raises(ExportError, match="holds no ONNX model to measure; export with --target onnx"):
        subjects(bundle, contents, None, None, 1)


def test_the_side_of_an_image_is_the_models_own(bundle: Path) -> None:
    size = onnx.load(bundle / "onnx" / "fp32.onnx").graph.input[0].type.tensor_type.shape.dim[-1].dim_value
    _, found = speed.BACKENDS["onnxruntime"](subjects(bundle, check(bundle), None, None, 1)[0])
    assert found == size
