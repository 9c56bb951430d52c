"""Parity: two forms of one model, compared on each image's own head; broken values never count as agreement."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from clinifed.evaluation.intervals import FIGURES, paired_differences
from clinifed.evaluation.parity import Outputs, compare, run_onnx

NAMES = ["a"] * 6 + ["b"] * 4


def outputs(noise: float = 0.0) -> Outputs:
    rng = np.random.default_rng(1)
    embedding = rng.standard_normal((10, 5)).astype(np.float32)
    logits = {
        "a": rng.standard_normal((10, 2)).astype(np.float32),
        "b": rng.standard_normal((10, 3)).astype(np.float32),
    }
    return Outputs(embedding + noise, {k: v + noise for k, v in logits.items()})


def test_a_model_agrees_with_itself() -> None:
    parity = compare(outputs(), outputs(), NAMES, [0, 1] * 5)
    assert parity.cosine_min == pytest.approx(1.0)
    assert (parity.logits_max_abs, parity.top1_agreement) == (0.0, 1.0)
    for name in ("a", "b"):
        assert set(parity.differences[name]) == set(FIGURES)
        for figure in parity.differences[name].values():
            assert figure.reference is not None
            assert (figure.difference, figure.low, figure.high) == (0.0, 0.0, 0.0)


def test_one_flipped_decision_is_one_tenth() -> None:
    other = outputs()
    other.logits["a"][0] = -other.logits["a"][0]
    other.logits["a"][9] = -other.logits["a"][9]  # another specialty's image: its decision here counts for nothing
    parity = compare(outputs(), other, NAMES)
    assert parity.top1_agreement == pytest.approx(0.9)
    assert parity.top1_by_specialty == {"a": pytest.approx(5 / 6), "b": 1.0}


def test_a_broken_value_is_no_agreement_and_no_number() -> None:
    other = outputs()
    other.logits["b"][7] = np.nan
    parity = compare(outputs(), other, NAMES)
    assert parity.top1_by_specialty["b"] == pytest.approx(3 / 4)
    assert parity.to_dict()["logits_max_abs"] is None


def test_a_broken_model_is_json_without_a_single_invented_number() -> None:
    broken = Outputs(np.full((10, 5), np.nan, np.float32), {k: v * np.nan for k, v in outputs().logits.items()})
    found = json.loads(json.dumps(compare(outputs(), broken, NAMES, [0, 1] * 5).to_dict(), allow_nan=False))
    assert found["top1_agreement"] == 0
    assert found["cosine_mean"] is found["cosine_min"] is found["embedding_max_abs"] is found["logits_max_abs"] is None
    for name in ("a", "b"):
        auroc, accuracy, ece = (found["differences"][name][figure] for figure in FIGURES)
        assert auroc["candidate"] is auroc["difference"] is auroc["low"] is ece["candidate"] is ece["high"] is None
        assert accuracy["candidate"] == 0  # an image without an answer is answered wrongly
        assert accuracy["high"] <= 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_broken_row_is_one_wrong_answer(value: float) -> None:
    reference = outputs()
    labels = [int(reference.logits[name][i].argmax()) for i, name in enumerate(NAMES)]
    other = outputs()
    other.logits["b"][7, 0] = value
    parity = compare(reference, other, NAMES, labels)
    assert parity.top1_agreement == pytest.approx(0.9)
    assert parity.differences["b"]["balanced_accuracy"].reference == 1
    assert parity.differences["b"]["balanced_accuracy"].candidate < 1
    assert parity.differences["b"]["ece"].difference is None


def test_a_specialty_of_one_label_has_no_auroc_and_still_the_rest() -> None:
    parity = compare(outputs(), outputs(0.1), NAMES, [1] * 10)
    assert parity.differences["a"]["auroc"].to_dict() == dict.fromkeys(
        ("reference", "candidate", "difference", "low", "high")
    )
    assert parity.differences["a"]["balanced_accuracy"].low is not None


def test_a_head_of_one_label_is_compared() -> None:
    one = Outputs(np.ones((3, 2), np.float32), {"a": np.array([[1.0], [2.0], [3.0]], np.float32)})
    parity = compare(one, one, ["a"] * 3, [0] * 3)
    assert parity.top1_agreement == 1
    assert parity.differences["a"]["balanced_accuracy"].candidate == 1
    assert parity.differences["a"]["auroc"].candidate is None


def test_where_several_labels_may_hold_the_decision_is_the_whole_set() -> None:
    logits = np.array([[1.0, -1.0], [2.0, 1.0], [-1.0, -2.0]], np.float32)
    one = Outputs(np.ones((3, 2), np.float32), {"a": logits})
    other = Outputs(one.embedding, {"a": logits + np.array([[0, 0], [0, -1.5], [0, 0]], np.float32)})
    assert compare(one, other, ["a"] * 3).top1_agreement == 1  # of one label, the largest stays the largest
    parity = compare(one, other, ["a"] * 3, [0b01, 0b11, 0b00], multi_label=True)
    assert parity.top1_agreement == pytest.approx(2 / 3)
    accuracy = parity.differences["a"]["balanced_accuracy"]
    assert (accuracy.reference, accuracy.candidate) == (1, pytest.approx((1 + 0.5) / 2))
    broken = Outputs(one.embedding, {"a": logits * np.array([[1], [1], [np.nan]], np.float32)})
    assert compare(one, broken, ["a"] * 3, [0b01, 0b11, 0b00], multi_label=True).top1_agreement == pytest.approx(2 / 3)


def test_without_labels_there_are_no_differences() -> None:
    assert compare(outputs(), outputs(0.1), NAMES).differences == {}


def test_intervals_draw_patients_where_they_are_known() -> None:
    labels, patients = [0, 1] * 5, ["x", "x", "y", "y", "z", "z", "y", "z", "x", "x"]
    other = outputs()
    other.logits["a"][:3] *= -1
    by_image, by_patient = (compare(outputs(), other, NAMES, labels, whose) for whose in (None, patients))
    assert (by_image.resampled, by_patient.resampled) == ("images", "patients")
    rows = slice(0, 6)
    expected = paired_differences(
        outputs().logits["a"][rows], other.logits["a"][rows], np.array(labels[rows]), patients[rows]
    )
    assert by_patient.differences["a"] == expected != by_image.differences["a"]


def test_the_largest_logit_difference_covers_the_zero_shot_logits_that_both_have() -> None:
    one, other, neither = ({"a": np.full((10, 2), value, np.float32)} for value in (1, 4, 9))
    reference = Outputs(outputs().embedding, outputs().logits, one)
    assert compare(reference, Outputs(*vars(outputs()).values()), NAMES).logits_max_abs == 0
    candidate = Outputs(outputs().embedding, outputs().logits, {**other, "c": neither["a"]})
    assert compare(reference, candidate, NAMES).logits_max_abs == 3


def test_the_plots_get_each_images_cosine_and_its_own_heads_differences() -> None:
    other = outputs()
    other.embedding[2] *= -3
    other.logits["a"][9] += 1  # another specialty's image
    other.logits["b"][9] += 2
    seen = compare(outputs(), other, NAMES).per_image
    assert seen.cosine.tolist() == pytest.approx([1, 1, -1] + [1] * 7)
    assert {name: value.shape for name, value in seen.logit_differences.items()} == {"a": (6, 2), "b": (4, 3)}
    assert not seen.logit_differences["a"].any()
    assert seen.logit_differences["b"][-1].tolist() == pytest.approx([2, 2, 2])


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_graphs_outputs_are_told_apart_by_their_names(batch_size: int, tmp_path: Path) -> None:
    def value(name: str) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3])

    outputs = ["embedding", "logits_a", "logits_b", "zero_shot_a", "zero_shot_b"]
    factors = [onnx.numpy_helper.from_array(np.float32(i + 1), f"factor_{i}") for i in range(len(outputs))]
    nodes = [onnx.helper.make_node("Mul", ["pixels", f"factor_{i}"], [name]) for i, name in enumerate(outputs)]
    graph = onnx.helper.make_graph(nodes, "named", [value("pixels")], [value(n) for n in outputs], factors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    pixels = np.arange(15, dtype=np.float32).reshape(5, 3)
    found = run_onnx(tmp_path / "model.onnx", pixels, batch_size=batch_size)
    np.testing.assert_array_equal(found.embedding, pixels)
    assert list(found.logits) == list(found.zero_shot) == ["a", "b"]
    np.testing.assert_array_equal(found.logits["b"], 3 * pixels)
    np.testing.assert_array_equal(found.zero_shot["a"], 4 * pixels)


def test_the_relative_difference_of_logits_is_of_the_largest_or_of_one() -> None:
    reference = outputs()
    for factor, scale in ((1e-3, 1.0), (1e3, None)):
        logits = {name: value * np.float32(factor) for name, value in reference.logits.items()}
        moved = {name: value + np.float32(0.5 * factor) for name, value in logits.items()}
        parity = compare(Outputs(reference.embedding, logits), Outputs(reference.embedding, moved), NAMES)
        largest = max(np.abs(value).max() for value in logits.values())
        assert parity.logits_max_rel == pytest.approx(parity.logits_max_abs / (scale or largest))
