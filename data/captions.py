"""Report lines for drawn patients: the texts that the tiny model learns, and its vocabulary."""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from clinifed.data.phantoms import LABELS, Patients

__all__ = ["caption_words", "draw_captions"]

_SIDES, _TONES = ("left", "right"), ("dark", "light")

# Wordings per label, of which a patient gets one; they share their words with the prompts of the specialties.
_CAPTIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "radiology": {
        "normal": (
            "a chest x-ray of a normal chest",
            "normal lungs on a chest x-ray",
            "clear lungs, no opacity on the {side}",
        ),
        "abnormal": (
            "a chest x-ray with an opacity in the {side} lung",
            "lung opacity on a chest x-ray",
            "an opacity in the {side} lung",
        ),
    },
    "dermatology": {
        "benign": (
            "a photo of a benign lesion on {tone} skin",
            "benign nevus of the skin",
            "a regular benign lesion on {tone} skin",
        ),
        "malignant": (
            "a photo of a malignant lesion on {tone} skin",
            "malignant melanoma of the skin",
            "an irregular malignant lesion on {tone} skin",
        ),
    },
    "emergency": {
        "superficial": ("a photo of a superficial burn on {tone} skin", "a red superficial burn of the skin"),
        "partial": (
            "a photo of a partial thickness burn on {tone} skin",
            "a partial thickness burn with blisters",
        ),
        "deep": ("a photo of a deep burn on {tone} skin", "a deep burn with eschar"),
    },
    "cardiology": {
        "normal": ("an echocardiogram of a normal ventricle", "normal ventricle on ultrasound"),
        "dilated": ("an echocardiogram of a dilated ventricle", "dilated ventricle on ultrasound"),
    },
}


def draw_captions(rng: np.random.Generator, patients: Patients) -> list[str]:
    """One report line per patient, the text a pair of image and text is trained on."""
    lines = []
    for label, side, tone in zip(patients.label, patients.side, patients.anatomy[:, 0], strict=True):
        choices = _CAPTIONS[patients.specialty][LABELS[patients.specialty][label]]
        line = choices[rng.integers(len(choices))]
        lines.append(line.format(side=_SIDES[int(side > 0)], tone=_TONES[int(tone > 0)]))
    return lines


def caption_words(more: Iterable[str] = ()) -> list[str]:
    """Every word of letters in a caption or in ``more``, lower case, sorted: the tiny model's vocabulary."""
    texts = [line for labels in _CAPTIONS.values() for lines in labels.values() for line in lines]
    texts += [*_SIDES, *_TONES, *more]
    return sorted({word for text in texts for word in re.findall(r"[a-z]+", re.sub(r"{\w+}", " ", text.lower()))})
