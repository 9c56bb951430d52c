"""Text in the pixels of an image: what the header makes one suspect, and what the pixels themselves look like.

No reader of text and no model: a file with letters in its pixels is kept back, not cleaned. The rules are the common
ones of public de-identification rule sets, in our own words; the look at the pixels exists because headers lie.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

__all__ = ["SEEN", "SUSPICIONS", "has_text", "suspicion"]

Floats = NDArray[np.float32]

_DECLARED = "burned-in annotation is declared"
_PAGE = "picture of a screen or a page is suspected"
_COPY = "copy of a film, a page or a video is suspected"
_USUAL = "burned-in annotation is usual for this equipment"
SEEN = "text in the pixels is suspected"  # where has_text() finds some
SUSPICIONS = frozenset((_DECLARED, _PAGE, _COPY, _USUAL, SEEN))  # which a person who looks at the picture can settle

# Words of Image Type (0008,0008) and of descriptions by which pictures of screens and pages are known.
_PAGES = (
    *("SCREEN SAVE", "SCREENSAVE", "SCREEN SHOT", "SCREENSHOT", "SCREEN CAPTURE", "SCREENCAPTURE"),
    *("REPORT", "SCANNED", "PROTOCOL PAGE", "PATIENT PROTOCOL", "SUMMARY", "WORKSHEET"),
)
# Conversion Type (0008,0064), PS3.3 C.8.6.1: digitized film, scanned document or image, digitized video, drawing.
_COPIES = ("DF", "SD", "SI", "DV", "DRW")
# Makers of film digitisers, frame grabbers and printers.
_COPIERS = ("PACSGEAR", "VIDAR", "HOWTEK", "LUMISYS", "ARRAY CORP", "CODONICS", "EPSON", "VITAL IMAGES")
_DOCUMENTS = ("DOC", "HC", "SC", "PR", "KO")  # Modality (0008,0060): documents, hard copies, presentations
# Equipment that draws names and numbers into its pictures by habit.
_LABELLED = ("US", "IVUS", "ES", "OT", "RF", "XA", "GM")
_LABELLED_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.7",  # secondary capture, and its multi-frame kinds
    "1.2.840.10008.5.1.4.1.1.6",  # ultrasound
    "1.2.840.10008.5.1.4.1.1.3.1",  # ultrasound, multi-frame
    "1.2.840.10008.5.1.4.1.1.77.1.1",  # endoscopy
)


def suspicion(ds: Dataset) -> str | None:
    """Why the header makes one suspect text in the pixels, in a few words; None where it does not.

    What the file declares with YES, and pictures of screens, films and pages, stay under suspicion. Equipment that
    often labels its pictures is suspected unless Burned In Annotation (0028,0301) says NO; the pixels have the last
    word (:func:`has_text`).
    """
    declared = _text(ds, "BurnedInAnnotation")
    modality = _text(ds, "Modality")
    described = " ".join(_text(ds, name) for name in ("ImageType", "SeriesDescription", "DerivationDescription"))
    described = described.replace("_", " ")
    if declared == "YES":
        return _DECLARED
    if any(word in described for word in _PAGES):
        return _PAGE
    if _text(ds, "ConversionType") in _COPIES or modality in _DOCUMENTS:
        return _COPY
    makers = " ".join(_text(ds, name) for name in ("Manufacturer", "SecondaryCaptureDeviceManufacturer"))
    if any(maker in makers for maker in _COPIERS):
        return _COPY
    sop_class = str(ds.get("SOPClassUID") or "")
    labelled = any(sop_class == uid or sop_class.startswith(f"{uid}.") for uid in _LABELLED_CLASSES)
    if (labelled or modality in _LABELLED) and declared != "NO":
        return _USUAL
    return None


def _text(ds: Dataset, keyword: str) -> str:
    value = ds.get(keyword)
    values = value if isinstance(value, MultiValue) else [value]
    return " ".join(str(item) for item in values if item is not None).upper().strip()


_STROKE_PX = 9  # strokes of letters are thinner, at one of the scales looked at
_CONTRAST = 0.25  # of the range of the picture, between a stroke and what is around it
_HEIGHT_PX = (6, 40)  # of a letter
_LETTERS = 5  # in one line, at least
_PARTS = 3  # that do not touch, at least
_WIDEST = 6  # times its height: letters that touch each other
_LETTER_WIDTH = 0.8  # of its height, of a broad letter
_UNIFORM = 0.1  # of the range: how much the letters of one line differ in brightness
_SMALLEST_PX = 128  # no coarser scale than this
_MOST_PARTS = 4000  # a picture of more parts is texture; the most contrasting are looked at


def has_text(frame: NDArray[Any]) -> bool:
    """Whether a frame holds what looks like a line of letters, bright on dark or dark on bright, anywhere in it.

    Thin marks that stand out from what surrounds them are looked for at full size and at halves of it; five or more of
    one height and one brightness side by side are a line. Anatomy is seldom of one brightness, and grids and rulers
    have no two marks of a letter's shape beside each other.

    Args:
        frame: stored values of any type, (H, W) or (H, W, 3).
    """
    values = np.asarray(frame, np.float32)
    maps = [values, -values] if values.ndim == 2 else [values.max(-1), -values.min(-1)]
    return any(_has_line(scaled) for picture in maps for scaled in _scales(picture))


def _scales(picture: Floats) -> Iterator[Floats]:
    while min(picture.shape) >= _SMALLEST_PX // 2:
        yield picture
        if min(picture.shape) < 2 * _SMALLEST_PX:
            return
        height, width = (side // 2 * 2 for side in picture.shape)
        picture = picture[:height, :width].reshape(height // 2, 2, width // 2, 2).mean((1, 3))


def _has_line(picture: Floats) -> bool:
    """Whether there is a line of letters brighter than what is around them."""
    low, high = np.percentile(picture, (0.1, 99.9))
    span = float(max(high, picture.max()) - low)
    if span <= 0:
        return False
    hat = picture - ndimage.grey_opening(picture, size=(_STROKE_PX, _STROKE_PX))
    parts, number = ndimage.label(hat > _CONTRAST * span, structure=np.ones((3, 3)))
    if number < _LETTERS:
        return False
    boxes = _boxes(parts, number)
    height, width = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    area = np.bincount(parts.ravel(), minlength=number + 1)[1:]
    like = (height >= _HEIGHT_PX[0]) & (height <= _HEIGHT_PX[1]) & (width <= _WIDEST * height)
    like &= (area >= 0.12 * height * width) & (area >= 8)
    which = np.flatnonzero(like)
    if len(which) < _LETTERS:
        return False
    brightness = ndimage.maximum(picture, parts, which + 1)  # thin strokes are full only in the middle
    if len(which) > _MOST_PARTS:
        order = np.argsort(-brightness)[:_MOST_PARTS]
        which, brightness = which[order], brightness[order]
    return _longest_line(boxes[which], np.asarray(brightness), span) >= _LETTERS


def _boxes(parts: NDArray[np.int32], number: int) -> NDArray[np.int64]:
    """Top, bottom, left and right (exclusive) of each part, (N, 4)."""
    slices = ndimage.find_objects(parts, number)
    return np.array([(y.start, y.stop, x.start, x.stop) for y, x in slices], np.int64)


def _longest_line(boxes: NDArray[np.int64], brightness: NDArray[np.float64], span: float) -> int:
    """How many parts the longest chain of neighbours of one height, one baseline and one brightness has."""
    order = np.argsort(boxes[:, 2], kind="stable")
    boxes, brightness = boxes[order], brightness[order]
    top, bottom, left, right = boxes.T
    height = bottom - top
    first, second = [], []
    for i in range(len(boxes)):
        reach = right[i] + 1.5 * height[i]
        j = np.arange(i + 1, np.searchsorted(left, reach, "right"))
        if not len(j):
            continue
        taller, smaller = np.maximum(height[i], height[j]), np.minimum(height[i], height[j])
        beside = (smaller >= 0.6 * taller) & (np.abs(bottom[j] - bottom[i]) <= 0.25 * taller)
        beside &= (left[j] >= right[i] - 0.25 * taller) & (np.abs(brightness[j] - brightness[i]) <= _UNIFORM * span)
        found = j[beside][:2]
        first += [i] * len(found)
        second += found.tolist()
    if not first:
        return 0
    links = coo_array((np.ones(len(first), bool), (first, second)), shape=(len(boxes), len(boxes)))
    _, chain = connected_components(links, directed=False)
    # Small letters touch each other: a wide part counts as many as fit into it.
    letters = np.maximum(1, np.rint((right - left) / (_LETTER_WIDTH * height)))
    parts = np.bincount(chain)
    return int(np.where(parts >= _PARTS, np.bincount(chain, letters), 0).max())
