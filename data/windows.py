"""What a grey image is displayed with where its file brings no window: public constants, never the site's data."""

from collections.abc import Mapping, Sequence

__all__ = ["CT_WINDOWS", "PERCENTILES", "SOFT_TISSUE", "ct_window"]

Window = tuple[float, float]  # centre, width, in Hounsfield units

# Radiopaedia, "Windowing (CT)", https://radiopaedia.org/articles/windowing-ct: soft tissues of the abdomen, brain,
# lungs, bone, soft tissues of the spine. Keys are defined terms of BodyPartExamined (PS3.16 Annex L).
SOFT_TISSUE: Window = (50.0, 400.0)
_BRAIN: Window = (40.0, 80.0)
_LUNGS: Window = (-600.0, 1500.0)
_BONE: Window = (400.0, 1800.0)
_SPINE: Window = (50.0, 250.0)
CT_WINDOWS: Mapping[str, Window] = {
    "HEAD": _BRAIN,
    "BRAIN": _BRAIN,
    "CHEST": _LUNGS,
    "LUNG": _LUNGS,
    "CSPINE": _SPINE,
    "TSPINE": _SPINE,
    "LSPINE": _SPINE,
    "SPINE": _SPINE,
    "SKULL": _BONE,
    "EXTREMITY": _BONE,
    "HAND": _BONE,
    "WRIST": _BONE,
    "FOOT": _BONE,
    "ANKLE": _BONE,
    "KNEE": _BONE,
    "ELBOW": _BONE,
    "SHOULDER": _BONE,
}

# Of one image's own values, black and white: the landmarks of Nyúl, Udupa and Zhang, "New variants of a method of MRI
# scale standardization", IEEE Transactions on Medical Imaging 19(2), 2000.
PERCENTILES = (0.0, 99.8)


def ct_window(body_part: str, image_type: Sequence[str]) -> Window | None:
    """Centre and width for a CT image in Hounsfield units; None for a localizer, which is a projection."""
    if "LOCALIZER" in image_type:
        return None
    return CT_WINDOWS.get(body_part.strip().upper(), SOFT_TISSUE)
