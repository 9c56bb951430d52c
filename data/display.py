"""Stored values → the picture a reader would see, float32 in [0, 1]. Section numbers are those of DICOM PS3.3.

Grey: modality LUT or rescale (C.11.1), then VOI LUT or window (C.11.2), or what :mod:`clinifed.data.windows` says, or
the range of the stored bits; MONOCHROME1 inverted; padding (C.7.5.1.1.2) black. Palette and YBR as RGB (C.7.6.3.1.2).
Pixels that are not square are made so (C.7.6.3.1.7). Overlays, ICC profiles and presentation states are ignored.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset

from clinifed.data.dicom_file import check_whole
from clinifed.data.lookup_tables import palette, table_of
from clinifed.data.pixel_data import Stored
from clinifed.data.reasons import Reason
from clinifed.data.volumes import MAX_FRAME_VALUES
from clinifed.data.windows import PERCENTILES, ct_window
from clinifed.errors import DataError

__all__ = ["displayed", "square"]

Floats = NDArray[np.float32]

_SQUARE = 0.01  # nearer to 1 than this is square: less than half a pixel of the 224 that a backbone sees is gained
_MAX_ASPECT = 16.0
# Height and width of a pixel, in the order in which C.7.6.3.1.7 asks for them.
_SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio")
_GROUPS = ("PixelValueTransformationSequence", "FrameVOILUTSequence", "PixelMeasuresSequence")


def displayed(stored: Stored, dataset: Dataset, index: int) -> Floats:
    """The picture of one frame.

    Args:
        stored: the frame.
        dataset: the header of its file, whole.
        index: which frame it is, for attributes that each frame has of its own (C.7.6.16).

    Returns:
        float32 in [0, 1], (H, W) grey or (H, W, 3) RGB.

    Raises:
        DataError: the header does not say how to display it, or says nonsense.
    """
    attributes = _of_frame(dataset, index)
    grey = stored.photometric in ("MONOCHROME1", "MONOCHROME2")
    picture = _grey(stored, attributes) if grey else _colour(stored, attributes)
    if not np.isfinite(picture).all():
        raise DataError(Reason.NOT_FINITE)
    np.clip(picture, 0, 1, out=picture)
    return np.ascontiguousarray(square(picture, _aspect(attributes)))


def _of_frame(dataset: Dataset, index: int) -> Dataset:
    """The data set with rescale, window and spacing of an enhanced object's frame at the top level (C.7.6.16)."""
    groups = [*(dataset.get("SharedFunctionalGroupsSequence") or [])[:1]]
    groups += (dataset.get("PerFrameFunctionalGroupsSequence") or [])[index : index + 1]
    if not groups:
        return dataset
    merged = Dataset()
    merged.update(dataset)
    merged.file_meta = dataset.file_meta
    merged.set_original_encoding(*dataset.original_encoding)
    for group in groups:
        for name in _GROUPS:
            for item in (group.get(name) or [])[:1]:
                check_whole(item)
                merged.update(item)
    return merged


def _grey(stored: Stored, ds: Dataset) -> Floats:
    padding = _padding(stored.values, ds)
    values, low, high = _modality(stored, ds)
    if ds.get("VOILUTSequence"):
        table = table_of(ds.VOILUTSequence, ds, signed=low < 0)
        picture = table.apply(values)
        picture /= np.float32(table.peak)
    else:
        floats = values.astype(np.float32)
        if window := _first_window(ds):
            picture = _window(floats, *window, str(ds.get("VOILUTFunction") or "LINEAR").upper())
        else:
            picture = _without_window(floats, ds, padding, low, high)
    if stored.photometric == "MONOCHROME1":
        np.subtract(1, picture, out=picture)
    if padding is not None:
        picture[padding] = 0
    return picture


def _padding(values: NDArray[Any], ds: Dataset) -> NDArray[np.bool_] | None:
    """Where the detector saw nothing: Pixel Padding Value (0028,0120) to Range Limit (0028,0121), ends included."""
    names = (
        ("FloatPixelPaddingValue", "FloatPixelPaddingRangeLimit")
        if values.dtype == np.float32
        else ("DoubleFloatPixelPaddingValue", "DoubleFloatPixelPaddingRangeLimit")
        if values.dtype == np.float64
        else ("PixelPaddingValue", "PixelPaddingRangeLimit")
    )
    value, limit = (ds.get(name) for name in names)
    if value is None:
        return None
    ends = sorted((float(value), float(value if limit is None else limit)))
    if np.issubdtype(values.dtype, np.signedinteger):
        # Written as unsigned by some, although the values are signed.
        ends = sorted(end - 65536 if end > np.iinfo(values.dtype).max and end < 65536 else end for end in ends)
    mask = (values >= ends[0]) & (values <= ends[1])
    # All of it would be no image; then the value is a wrong one.
    return mask if mask.any() and not mask.all() else None


def _modality(stored: Stored, ds: Dataset) -> tuple[NDArray[Any], float, float]:
    """Values after the modality LUT or rescale (C.11.1), and the least and greatest the header permits."""
    bits, signed = stored.bits, stored.signed
    if ds.get("ModalityLUTSequence"):
        table = table_of(ds.ModalityLUTSequence, ds, signed=signed)
        return table.apply(stored.values), 0.0, table.peak
    low, high = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if signed else (0.0, 2.0**bits - 1)
    if ds.get("RescaleSlope") is None or ds.get("RescaleIntercept") is None:
        return stored.values, low, high
    slope, intercept = float(ds.RescaleSlope), float(ds.RescaleIntercept)
    if not (math.isfinite(slope) and math.isfinite(intercept)) or slope == 0:
        raise DataError(Reason.RESCALE)
    ends = sorted((low * slope + intercept, high * slope + intercept))
    values = stored.values.astype(np.float32)
    values *= np.float32(slope)
    values += np.float32(intercept)
    return values, ends[0], ends[1]


def _first_window(ds: Dataset) -> tuple[float, float] | None:
    """Centre and width; None where there is no window, or one of width 0, which equipment writes for none."""
    if ds.get("WindowCenter") is None or ds.get("WindowWidth") is None:
        return None
    center, width = (float(np.atleast_1d(ds[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
    return None if width == 0 else (center, width)


def _window(values: Floats, center: float, width: float, function: str) -> Floats:
    """A window, mapped to [0, 1] (C.11.2.1.2 and C.11.2.1.3); ``values`` are overwritten."""
    if not (math.isfinite(center) and math.isfinite(width)) or width < 1e-9:
        raise DataError(Reason.WINDOW_WIDTH)
    if function == "LINEAR" and width < 1:
        function = "LINEAR_EXACT"  # LINEAR is for integers; in fractions of a unit only this one has a meaning
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -80, 80))), np.float32)
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    elif function != "LINEAR_EXACT":
        raise DataError(Reason.VOI_FUNCTION)
    if width == 0:  # a threshold
        return np.asarray(values > center, np.float32)
    return _between(values, center - width / 2, center + width / 2)


def _without_window(values: Floats, ds: Dataset, padding: NDArray[np.bool_] | None, low: float, high: float) -> Floats:
    """CT in Hounsfield units and MR by public constants; what has no fixed scale by percentiles; else the stored range.

    Nothing here depends on another image.
    """
    modality = str(ds.get("Modality") or "")
    floating = not ds.get("BitsStored")  # FloatPixelData and DoubleFloatPixelData have no range of stored bits
    rescaled = ds.get("RescaleSlope") is not None and str(ds.get("RescaleType") or "HU").upper() == "HU"
    if modality == "CT" and rescaled and not ds.get("ModalityLUTSequence"):
        image_type = ds.get("ImageType") or ()
        kinds = [image_type] if isinstance(image_type, str) else list(image_type)
        if window := ct_window(str(ds.get("BodyPartExamined") or ""), kinds):
            return _window(values, *window, "LINEAR")
    if floating or modality == "MR":
        seen = values if padding is None else values[~padding]
        if not np.isfinite(seen).all():
            raise DataError(Reason.NOT_FINITE)
        low, high = (float(end) for end in np.percentile(seen, PERCENTILES))
        if low == high:  # nothing but background, or one spot in it
            low, high = float(seen.min()), float(seen.max())
        if low == high:
            return np.zeros_like(values)
    return _between(values, low, high)


def _between(values: Floats, low: float, high: float) -> Floats:
    """``values`` with ``low`` at 0 and ``high`` at 1, clipped; overwritten."""
    values -= np.float32(low)
    values /= np.float32(high - low)
    return np.clip(values, 0, 1, out=values)


def _colour(stored: Stored, ds: Dataset) -> Floats:
    if stored.photometric == "PALETTE COLOR" and stored.values.ndim == 2:
        return palette(ds, signed=stored.signed).apply(stored.values)
    if stored.values.ndim != 3 or not np.issubdtype(stored.values.dtype, np.integer) or stored.signed:
        raise DataError(Reason.PHOTOMETRIC)
    picture = stored.values.astype(np.float32)
    picture /= np.float32(2.0**stored.bits - 1)
    if stored.photometric in ("YBR_FULL", "YBR_FULL_422"):
        return _rgb(picture, 2.0 ** (stored.bits - 1) / (2.0**stored.bits - 1))
    if stored.photometric not in ("RGB", "YBR_ICT", "YBR_RCT"):
        raise DataError(Reason.PHOTOMETRIC)
    return picture  # the transforms of JPEG 2000 are undone by the codec itself


def _rgb(ybr: Floats, middle: float) -> Floats:
    """YBR_FULL in [0, 1] → RGB (C.7.6.3.1.2: the inverse of CCIR 601-2 with the full range)."""
    y, cb, cr = ybr[..., 0], ybr[..., 1] - np.float32(middle), ybr[..., 2] - np.float32(middle)
    out = np.empty_like(ybr)
    out[..., 0] = y + np.float32(1.402) * cr
    out[..., 1] = y - np.float32(0.114 * 1.772 / 0.587) * cb - np.float32(0.299 * 1.402 / 0.587) * cr
    out[..., 2] = y + np.float32(1.772) * cb
    return out


def _aspect(ds: Dataset) -> float:
    """Height of a pixel / its width; 1 where nothing is said, or nothing that makes sense."""
    for name in _SPACINGS:
        value = ds.get(name)
        if isinstance(value, Iterable) and not isinstance(value, str):
            sizes = [float(part) for part in value]
            if len(sizes) == 2 and all(math.isfinite(size) and size > 0 for size in sizes):
                return sizes[0] / sizes[1]
    return 1.0


def square(picture: Floats, aspect: float) -> Floats:
    """The picture with square pixels: stretched along the side on which they are long, so that nothing is lost.

    Args:
        picture: (H, W) or (H, W, 3) float32 in [0, 1].
        aspect: height of a pixel / its width.

    Raises:
        DataError: ``aspect`` is beyond 16, which no equipment has, or the result would be too large.
    """
    if abs(aspect - 1) < _SQUARE:
        return picture
    if not 1 / _MAX_ASPECT <= aspect <= _MAX_ASPECT:
        raise DataError(Reason.ASPECT)
    rows, columns = picture.shape[:2]
    size = (columns, round(rows * aspect)) if aspect > 1 else (round(columns / aspect), rows)
    if size[0] * size[1] * (3 if picture.ndim == 3 else 1) > MAX_FRAME_VALUES:
        raise DataError(Reason.TOO_LARGE)
    planes = [picture] if picture.ndim == 2 else [picture[..., colour] for colour in range(3)]
    stretched = [np.array(Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR)) for plane in planes]
    return stretched[0] if picture.ndim == 2 else np.stack(stretched, axis=-1)
