"""One model in two forms, on the same public images: how far apart are they?

Shapes: N images, D embedding dimension, K labels of a specialty, S the side of an image in pixels. Everything
here is NumPy; the forms that can be run are torch's (by the caller) and ONNX Runtime's (:func:`run_onnx`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

__all__ = ["EMBEDDING", "LOGITS", "PIXELS", "Outputs", "Parity", "compare", "run_onnx"]

# The names of an exported graph's input and outputs: pixels → embedding, logits_<specialty>.
PIXELS = "pixels"
EMBEDDING = "embedding"
LOGITS = "logits_"

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Outputs:
    """What one form of the model makes of N images."""

    embedding: Array  # (N, D), L2-normalised
    logits: Mapping[str, Array]  # specialty → (N, K), every head on every image


@dataclass(frozen=True)
class Parity:
    """How far a candidate is from its reference; higher is closer but for the two ``max_abs``.

    Top-1 and balanced accuracy look at each image through the head of its own specialty only.
    """

    images: int
    cosine_mean: float  # of the candidate's and the reference's embedding of one image, in [-1, 1]
    cosine_min: float
    embedding_max_abs: float
    logits_max_abs: float  # over all heads
    top1_agreement: float  # fraction of images with the same decision, in [0, 1]
    top1_by_specialty: Mapping[str, float]
    balanced_accuracy_difference: Mapping[str, float]  # candidate - reference; empty without labels

    def to_dict(self) -> dict[str, Any]:
        """JSON values; a figure that is not finite (an overflow in the candidate) becomes None."""
        return {name: _json(value) for name, value in vars(self).items()}


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json(item) for key, item in value.items()}
    return value if math.isfinite(value) else None


def run_onnx(path: Path, pixels: Array, *, batch_size: int = 8, threads: int = 2) -> Outputs:
    """Run an exported model on the CPU through ONNX Runtime.

    Args:
        path: an ONNX file with the names :data:`PIXELS`, :data:`EMBEDDING` and :data:`LOGITS`.
        pixels: (N, 3, S, S) float32, normalised.
        batch_size: images per run, 1 to the graph's own limit; changes memory only.
        threads: of ONNX Runtime; 2 is what the smallest supported machine has.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only: its optimiser's remarks are not for the user of an export
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    batches = [session.run(names, {PIXELS: pixels[i : i + batch_size]}) for i in range(0, len(pixels), batch_size)]
    whole = dict(zip(names, (np.concatenate(parts) for parts in zip(*batches, strict=True)), strict=True))
    logits = {name.removeprefix(LOGITS): value for name, value in whole.items() if name.startswith(LOGITS)}
    return Outputs(whole[EMBEDDING], logits)


def _balanced_accuracy(decisions: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Mean recall over the labels that occur."""
    return float(np.mean([np.mean(decisions[labels == label] == label) for label in np.unique(labels)]))


def compare(
    reference: Outputs,
    candidate: Outputs,
    specialties: Sequence[str],
    labels: Sequence[int] | None = None,
) -> Parity:
    """Compare two forms of one model on the same N ≥ 1 images.

    Args:
        reference: the form to be matched.
        candidate: the form under test; a value that is not finite makes the figures it enters NaN.
        specialties: each image's own specialty, N names that are keys of both ``logits``.
        labels: each image's true label as an index into its specialty's labels, if it is known.
    """
    with np.errstate(invalid="ignore"):  # NaN and infinity are results here; the caller judges them
        one, other = reference.embedding.astype(np.float64), candidate.embedding.astype(np.float64)
        norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        cosine = np.sum(one * other, axis=1) / norms
        embedding_gap = np.max(np.abs(one - other))
        logit_gaps = [np.max(np.abs(reference.logits[s] - candidate.logits[s])) for s in reference.logits]
    own = np.asarray(specialties)
    truth = None if labels is None else np.asarray(labels)
    same = np.zeros(len(own), dtype=bool)
    by_specialty: dict[str, float] = {}
    difference: dict[str, float] = {}
    for name in sorted(set(specialties)):
        rows = own == name
        before = reference.logits[name][rows].argmax(axis=1)
        after = candidate.logits[name][rows].argmax(axis=1)
        # argmax of a row with a NaN is that NaN's place: a broken row must not count as agreement.
        same[rows] = (before == after) & np.isfinite(candidate.logits[name][rows]).all(axis=1)
        by_specialty[name] = float(same[rows].mean())
        if truth is not None:
            true = truth[rows]
            difference[name] = _balanced_accuracy(after, true) - _balanced_accuracy(before, true)
    return Parity(
        images=len(own),
        cosine_mean=float(cosine.mean()),
        cosine_min=float(cosine.min()),
        embedding_max_abs=float(embedding_gap),
        logits_max_abs=float(np.max(logit_gaps)),
        top1_agreement=float(same.mean()),
        top1_by_specialty=by_specialty,
        balanced_accuracy_difference=difference,
    )
