"""Re-linkage: Recall@k by hand, by brute force, and by chance."""

import numpy as np
import pytest

from clinifed.errors import DataError
from clinifed.evaluation.relinkage import RANKS, linked, recall_at, reports_of


def unit(rng: np.random.Generator, rows: int, dim: int = 16) -> np.ndarray:
    value = rng.standard_normal((rows, dim))
    return value / np.linalg.norm(value, axis=1, keepdims=True)


def test_a_report_is_a_patient_s_and_its_images_share_it() -> None:
    reports, own = reports_of(["p", "p", "q", "p"], ["mass", "mass", "mass", "clear"])
    assert reports == ["mass", "mass", "clear"]
    assert own.tolist() == [0, 0, 1, 2]


def test_the_hits_are_those_of_a_full_sort() -> None:
    rng = np.random.default_rng(1)
    image, report, own = unit(rng, 700), unit(rng, 40), rng.integers(40, size=700)
    order = np.argsort(-(image @ report.T), axis=1)
    wanted = np.stack([(order[:, :k] == own[:, None]).any(axis=1) for k in RANKS], axis=1)
    assert np.array_equal(linked(image, report, own), wanted)


def test_reports_with_the_same_text_are_told_apart_by_luck_alone() -> None:
    """Three patients share the nearest text: one guess in three is right, and three guesses always are."""
    rng = np.random.default_rng(2)
    texts = unit(rng, 2)
    report = texts[[0, 0, 0, 1]]
    found = linked(texts[[0, 1]], report, np.array([1, 3]), ranks=(1, 2, 3, 4))
    assert found[0] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert found[1] == pytest.approx([1, 1, 1, 1])
    behind = linked(texts[[1]], report, np.array([0]), ranks=(1, 2, 4))
    assert behind[0] == pytest.approx([0, 1 / 3, 1])


def test_embeddings_that_know_nothing_are_linked_as_often_as_by_guessing() -> None:
    rng = np.random.default_rng(3)
    hits = linked(unit(rng, 3000), unit(rng, 50), rng.integers(50, size=3000))
    told = recall_at(hits, [f"p{i}" for i in range(3000)], 50)
    for k in RANKS:
        figure = told[str(k)]
        assert figure["chance"] == k / 50
        assert figure["low"] - 0.02 < figure["chance"] < figure["high"] + 0.02


def test_the_interval_is_by_patient() -> None:
    rng = np.random.default_rng(4)
    hits = (rng.random((40, 1)) < 0.5).astype(float)
    once = recall_at(hits, [str(i) for i in range(40)], 9, ranks=(1,))["1"]
    copied = recall_at(np.repeat(hits, 10, axis=0), [str(i) for i in range(40) for _ in range(10)], 9, ranks=(1,))["1"]
    assert copied == pytest.approx(once)
    assert once["value"] == pytest.approx(hits.mean())
    assert once["low"] < once["value"] < once["high"]


def test_chance_is_at_most_certain() -> None:
    assert recall_at(np.ones((2, 1)), ["p", "q"], 3, ranks=(5,))["5"]["chance"] == 1


def test_a_broken_embedding_is_refused() -> None:
    with pytest.raises(DataError, match="not finite"):
        linked(np.full((1, 4), np.nan), np.eye(4), np.array([0]))
