"""One image file to the picture a reader would see. Every failure is a reason of a few words.

Reasons hold no text of the file, neither does anything logged: the caller names the file by its opaque image id.
This runs in the process that calls it; files that strangers made go through :mod:`clinifed.data.decoding`.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clinifed.data.dicom_file import open_regular, opened, reasons
from clinifed.data.display import displayed
from clinifed.data.pixel_data import PixelData
from clinifed.data.reasons import Reason
from clinifed.data.volumes import KEY_FRAME, MAX_FRAME_VALUES, Frames
from clinifed.errors import DataError

__all__ = ["is_dicom", "read_pixels", "read_volume"]

Floats = NDArray[np.float32]


def is_dicom(path: Path) -> bool:
    """Whether the file begins as PS3.10 asks: 128 bytes of preamble, then ``DICM``. Unreadable means no."""
    try:
        with open_regular(path) as file:
            return file.read(132)[128:] == b"DICM"
    except (OSError, ValueError, DataError):
        return False


def read_pixels(path: Path) -> Floats:
    """The picture in a DICOM, PNG or JPEG file; of several frames the middle one; see :func:`read_volume`.

    Returns:
        float32 in [0, 1], (H, W) grey or (H, W, 3) RGB.

    Raises:
        DataError: no picture can be made of it; the text is a reason of a few words.
    """
    picture: Floats = read_volume(path, KEY_FRAME)[0]
    return picture


def read_volume(path: Path, frames: Frames) -> Floats:
    """The frames of a file that stand for it, as a reader would see them: see :mod:`clinifed.data.display`.

    Returns:
        float32 in [0, 1], (N, H, W) grey or (N, H, W, 3) RGB, N ≤ ``frames.count``, in the file's order.

    Raises:
        DataError: no picture can be made of it; the text is a reason of a few words.
    """
    return _read_dicom(path, frames) if path.suffix.lower() == ".dcm" or is_dicom(path) else _read_picture(path)


def _read_dicom(path: Path, frames: Frames) -> Floats:
    with opened(path) as found:
        with reasons(Reason.DAMAGED_HEADER):
            pixel_data = PixelData(found)
            chosen = frames.of(pixel_data.frames)
            if len(chosen) * pixel_data.frame_values > MAX_FRAME_VALUES:
                raise DataError(Reason.TOO_LARGE)
        pictures = []
        for index in chosen:
            with reasons(Reason.UNDECODABLE):
                stored = pixel_data.frame(index)
            with reasons(Reason.DISPLAY):
                pictures.append(displayed(stored, found.dataset, index))
        if any(picture.shape != pictures[0].shape for picture in pictures):
            raise DataError(Reason.DISPLAY)  # pixels of a different shape in each frame
        return pictures[0][None] if len(pictures) == 1 else np.stack(pictures)


def _read_picture(path: Path) -> Floats:
    with (
        reasons(Reason.NOT_AN_IMAGE_FILE),
        open_regular(path) as file,
        Image.open(file, formats=("PNG", "JPEG")) as picture,
    ):
        if picture.width * picture.height * 3 > MAX_FRAME_VALUES:
            raise DataError(Reason.TOO_LARGE)
        if picture.mode.startswith("I"):  # 16-bit grey
            values, peak = np.array(picture, np.float32), 65535
        else:
            values, peak = np.array(picture.convert("L" if picture.mode in ("1", "L") else "RGB"), np.float32), 255
        values /= np.float32(peak)
        return values[None]
