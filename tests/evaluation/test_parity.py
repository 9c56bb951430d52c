"""Parity: two forms of one model, compared on each image's own head; broken values never count as agreement."""

import numpy as np
import pytest

from clinifed.evaluation.parity import Outputs, compare

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
    assert parity.balanced_accuracy_difference == {"a": 0.0, "b": 0.0}


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
