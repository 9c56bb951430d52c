"""One model in two forms, on the same public images: how far apart are they?

Shapes: N images, D embedding dimension, K labels of a specialty, S the side of an image in pixels. Everything
here is NumPy; the forms that can be run are torch's (by the caller) and ONNX Runtime's (:func:`run_onnx`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from clinifed.evaluation.intervals import Difference, paired_differences

__all__ = ["EMBEDDING", "LOGITS", "PIXELS", "ZERO_SHOT", "Outputs", "Parity", "PerImage", "compare", "run_onnx"]

# The names of an exported graph's input and outputs: pixels → embedding, logits_<specialty>, zero_shot_<specialty>.
PIXELS = "pixels"
EMBEDDING = "embedding"
LOGITS = "logits_"
ZERO_SHOT = "zero_shot_"

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Outputs:
    """What one form of the model makes of N images."""

    embedding: Array  # (N, D), L2-normalised
    logits: Mapping[str, Array]  # specialty → (N, K), every head on every image
    zero_shot: Mapping[str, Array] = field(default_factory=dict)  # specialty → (N, K), by the prompts; may be empty

    @classmethod
    def of(cls, outputs: Mapping[str, Array]) -> Self:
        """From a graph's outputs by name: :data:`EMBEDDING`, and those of :data:`LOGITS` and :data:`ZERO_SHOT`."""
        logits, zero_shot = (
            {name.removeprefix(kind): value for name, value in outputs.items() if name.startswith(kind)}
            for kind in (LOGITS, ZERO_SHOT)
        )
        return cls(outputs[EMBEDDING], logits, zero_shot)


@dataclass(frozen=True)
class PerImage:
    """The comparison image by image, for plots."""

    cosine: NDArray[np.float64]  # (N,), NaN where an embedding is broken
    logit_differences: Mapping[str, Array]  # specialty → (its images, K), candidate - reference, of their own head


@dataclass(frozen=True)
class Parity:
    """How far a candidate is from its reference; higher is closer but for the two ``max_abs``.

    Top-1 and the differences look at each image through the head of its own specialty only. Where any number of labels
    may hold, top-1 is the set of those that are said to.
    """

    images: int
    cosine_mean: float  # of the candidate's and the reference's embedding of one image, in [-1, 1]
    cosine_min: float
    embedding_max_abs: float
    logits_max_abs: float  # over all heads, and over the zero-shot logits that both have
    logits_scale: float  # the reference's largest magnitude among them; heads may have weights of any size
    top1_agreement: float  # fraction of images with the same decision, in [0, 1]
    top1_by_specialty: Mapping[str, float]
    # specialty → one of clinifed.evaluation.intervals.FIGURES → difference with its interval; empty without labels
    differences: Mapping[str, Mapping[str, Difference]]
    resampled: Literal["patients", "images"]  # what the intervals drew
    per_image: PerImage = field(compare=False, repr=False)

    @property
    def logits_max_rel(self) -> float:
        """The largest difference of logits as a share of the largest logit, or of 1 where that is smaller."""
        return self.logits_max_abs / max(1.0, self.logits_scale)

    def to_dict(self) -> dict[str, Any]:
        """JSON values but ``per_image``; a figure that is not finite (an overflow in the candidate) becomes None."""
        return {f.name: _json(getattr(self, f.name)) for f in fields(self) if f.name != "per_image"}


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, Difference):
        return value.to_dict()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run_onnx(path: Path, pixels: Array, *, batch_size: int = 8, threads: int = 2) -> Outputs:
    """Run an exported model on the CPU through ONNX Runtime.

    Args:
        path: an ONNX file with the names :data:`PIXELS`, :data:`EMBEDDING`, :data:`LOGITS` and :data:`ZERO_SHOT`.
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
    return Outputs.of(whole)


def compare(
    reference: Outputs,
    candidate: Outputs,
    specialties: Sequence[str],
    labels: Sequence[int] | None = None,
    patients: Sequence[int | str] | None = None,
    *,
    multi_label: bool = False,
) -> Parity:
    """Compare two forms of one model on the same N ≥ 1 images.

    Args:
        reference: the form to be matched.
        candidate: the form under test; a value that is not finite makes the figures it enters NaN.
        specialties: each image's own specialty, N names that are keys of both ``logits``.
        labels: each image's true label, if it is known: an index into its specialty's labels, or with ``multi_label``
            a bit set, bit k for label k.
        patients: whose each image is, if it is known; the intervals then draw patients and not images.
        multi_label: whether any number of labels may hold, each of them said to where its logit is above 0.

    Raises:
        DataError: a label is outside its specialty's.
    """
    with np.errstate(invalid="ignore"):  # NaN and infinity are results here; the caller judges them
        one, other = reference.embedding.astype(np.float64), candidate.embedding.astype(np.float64)
        norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        cosine = np.sum(one * other, axis=1) / norms
        embedding_gap = np.max(np.abs(one - other))
        pairs = [(value, candidate.logits[name]) for name, value in reference.logits.items()]
        both = reference.zero_shot.keys() & candidate.zero_shot.keys()
        pairs += [(reference.zero_shot[name], candidate.zero_shot[name]) for name in both]
        logit_gaps = [np.max(np.abs(value - found)) for value, found in pairs]
    own = np.asarray(specialties)
    truth = None if labels is None else np.asarray(labels)
    whose = None if patients is None else np.unique(np.asarray(patients), return_inverse=True)[1]
    same = np.zeros(len(own), dtype=bool)
    by_specialty: dict[str, float] = {}
    logit_differences: dict[str, Array] = {}
    differences: dict[str, dict[str, Difference]] = {}
    for name in sorted(set(specialties)):
        rows = own == name
        before, after = reference.logits[name][rows], candidate.logits[name][rows]
        if multi_label:
            agree = ((before > 0) == (after > 0)).all(axis=1)
        else:
            agree = before.argmax(axis=1) == after.argmax(axis=1)
        # argmax of a row with a NaN is that NaN's place: a broken row must not count as agreement.
        same[rows] = agree & np.isfinite(after).all(axis=1)
        by_specialty[name] = float(same[rows].mean())
        with np.errstate(invalid="ignore"):
            logit_differences[name] = after - before
        if truth is not None:
            owners = None if whose is None else whose[rows].tolist()
            differences[name] = paired_differences(before, after, truth[rows], owners, multi_label=multi_label)
    return Parity(
        images=len(own),
        cosine_mean=float(cosine.mean()),
        cosine_min=float(cosine.min()),
        embedding_max_abs=float(embedding_gap),
        logits_max_abs=float(np.max(logit_gaps)),
        logits_scale=float(max(np.max(np.abs(value)) for value, _ in pairs)),
        top1_agreement=float(same.mean()),
        top1_by_specialty=by_specialty,
        differences=differences,
        resampled="images" if patients is None else "patients",
        per_image=PerImage(cosine, logit_differences),
    )
