"""The specialties clinifed knows: labels, and the prompts that make a head start as zero-shot.

Add a specialty here, or as the same entry under ``specialties:`` in a federation's YAML.
"""

from clinifed.config import Specialty

__all__ = ["SPECIALTIES", "resolve_specialties"]

SPECIALTIES: dict[str, Specialty] = {
    "radiology": Specialty(
        modality="chest X-ray",
        labels={
            "normal": ("a chest x-ray of a normal chest", "normal lungs on a chest x-ray", "clear lungs"),
            "abnormal": (
                "a chest x-ray with an opacity",
                "lung opacity on a chest x-ray",
                "an opacity in the lung",
            ),
        },
    ),
    "dermatology": Specialty(
        modality="dermatoscopic photograph",
        labels={
            "benign": (
                "a photo of a benign skin lesion",
                "benign nevus",
                "a regular benign lesion of the skin",
            ),
            "malignant": (
                "a photo of a malignant skin lesion",
                "malignant melanoma",
                "an irregular malignant lesion of the skin",
            ),
        },
    ),
    "emergency": Specialty(
        modality="photograph of a burn",
        labels={
            "superficial": ("a photo of a superficial burn", "a red superficial burn of the skin"),
            "partial": ("a photo of a partial thickness burn", "a partial thickness burn with blisters"),
            "deep": ("a photo of a deep burn", "a deep burn with eschar"),
        },
    ),
    "cardiology": Specialty(
        modality="echocardiogram",
        labels={
            "normal": ("an echocardiogram of a normal ventricle", "normal ventricle on ultrasound"),
            "dilated": ("an echocardiogram of a dilated ventricle", "dilated ventricle on ultrasound"),
        },
    ),
    "pathology": Specialty(
        modality="blood smear",
        labels={
            "absent": ("a blood smear without platelets", "no platelets on a blood smear"),
            "present": ("a blood smear with platelets", "platelets on a blood smear"),
        },
    ),
}


def resolve_specialties(names: set[str], overrides: dict[str, Specialty]) -> dict[str, Specialty]:
    """The specialties of a federation, in sorted order, its own definitions first.

    Raises:
        KeyError: a name is neither in ``overrides`` nor in :data:`SPECIALTIES` (the configuration
            is checked for this before anything runs).
    """
    known = {**SPECIALTIES, **overrides}
    return {name: known[name] for name in sorted(names)}
