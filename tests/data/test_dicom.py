import io
import logging
import shutil
import subprocess
import tempfile
import time
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.pixels import pixel_array
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.uid import DeflatedExplicitVRLittleEndian

from clinifed.data.dicom import read_pixels
from clinifed.data.dicom_file import opened
from clinifed.data.fingerprint import read_header
from clinifed.data.pixel_data import PixelData
from clinifed.errors import DataError

from .raw_dicom import JPEG, JPEG_LL, compressed

DCMTK = shutil.which("dcmj2pnm") or shutil.which("dcm2pnm")
# What we display otherwise than DCMTK: a JPEG whose JFIF marker says YCbCr while the header says RGB, which DCMTK shows
# in wrong colours; and a window narrower than 1, which it does not apply.
DIFFER = {"fo-dicom__GH195.dcm", "fo-dicom__RI6XDosiGap.dcm"}
RAMP12 = np.arange(4096, dtype=np.uint16).reshape(64, 64)


def test_stored_range_is_black_to_white(tmp_path, dicom):
    pixels = read_pixels(dicom(tmp_path / "a.dcm", RAMP12, bits=12))
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, RAMP12 / 4095, atol=1e-6)


def test_monochrome1_is_inverted(tmp_path, dicom):
    pixels = read_pixels(dicom(tmp_path / "a.dcm", RAMP12, "MONOCHROME1", 12))
    np.testing.assert_allclose(pixels, 1 - RAMP12 / 4095, atol=1e-6)


def test_signed_values_keep_their_order(tmp_path, dicom):
    signed = np.arange(-2048, 2048, dtype=np.int16).reshape(64, 64)
    np.testing.assert_allclose(
        read_pixels(dicom(tmp_path / "a.dcm", signed, bits=12)), (signed + 2048) / 4095, atol=1e-6
    )


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024), (0.5, 10)])
def test_window_agrees_with_pydicom(tmp_path, dicom, function, slope, intercept):
    path = dicom(
        tmp_path / "a.dcm",
        RAMP12,
        bits=12,
        WindowCenter=40,
        WindowWidth=400,
        VOILUTFunction=function,
        RescaleSlope=slope,
        RescaleIntercept=intercept,
    )
    ds = pydicom.dcmread(path)
    shown = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds)
    low, high = intercept, 4095 * slope + intercept
    np.testing.assert_allclose(read_pixels(path), (shown - low) / (high - low), atol=1e-5)


def test_bits_beside_the_stored_ones_are_ignored(tmp_path, dicom):
    path = dicom(tmp_path / "a.dcm", RAMP12, bits=12)
    ds = pydicom.dcmread(path)
    ds.PixelData = (RAMP12 | np.uint16(0x4000)).tobytes()  # an old overlay in bit 14
    ds.save_as(path)
    np.testing.assert_allclose(read_pixels(path), RAMP12 / 4095, atol=1e-6)


def test_middle_frame_is_taken(tmp_path, dicom):
    frames = np.stack([np.full((8, 8), value, np.uint8) for value in (0, 51, 255)])
    np.testing.assert_allclose(read_pixels(dicom(tmp_path / "a.dcm", frames)), 0.2, atol=1e-6)


def test_ybr_becomes_rgb(tmp_path, dicom):
    ybr = np.full((8, 8, 3), (76, 85, 255), np.uint8)  # red
    picture = read_pixels(dicom(tmp_path / "a.dcm", ybr, "YBR_FULL"))
    np.testing.assert_allclose(picture[0, 0], (1, 0, 0), atol=0.02)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"Rows": 60000, "Columns": 60000}, "MiB"),
        ({"NumberOfFrames": 100_000_000}, "frames"),
        ({"Rows": 0}, "no rows"),
        ({"RescaleSlope": 0, "RescaleIntercept": 0}, "slope"),
        ({"WindowCenter": 1, "WindowWidth": -1}, "width"),
    ],
)
def test_senseless_headers_are_refused_before_decoding(tmp_path, dicom, change, reason):
    with pytest.raises(DataError, match=reason):
        read_pixels(dicom(tmp_path / "a.dcm", **change))


def test_deflate_bomb_is_refused_without_inflating_it(tmp_path, dicom):
    path = dicom(tmp_path / "a.dcm")
    ds = pydicom.dcmread(path)
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    ds.save_as(path)
    whole = path.read_bytes()
    meta = 144 + pydicom.filereader.read_file_meta_info(path).FileMetaInformationGroupLength
    assert read_pixels(path).shape == (8, 8)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    path.write_bytes(whole[:meta] + b"".join(packer.compress(bytes(1 << 20)) for _ in range(80)) + packer.flush())
    with pytest.raises(DataError, match="inflated"):
        read_pixels(path)
    with pytest.raises(DataError, match="inflated"):
        read_header(path)


def test_nothing_of_the_file_is_in_errors_and_logs(tmp_path, dicom, caplog):
    caplog.set_level(logging.DEBUG)
    path = dicom(tmp_path / "PLANTED.dcm", PatientID="PLANTED-1", PatientName="PLANTED^NAME")
    # A character set that nobody knows is one of the values pydicom quotes in its log; then the pixels are cut off.
    path.write_bytes(path.read_bytes().replace(b"ISO_IR 192", b"PLANTEDSET"))
    read_header(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError) as caught:
        read_pixels(path)
    shown = "".join(str(e) for e in (caught.value, *caught.value.problems)) + caplog.text
    assert "PLANTED" not in shown
    assert caught.value.__context__ is None or caught.value.__suppress_context__


@pytest.mark.realdata
@pytest.mark.parametrize("folder", ["dicom", "dicom_bad"])
def test_every_real_file_is_a_picture_or_a_reason(real, folder):
    files = [p for p in sorted((real / folder).iterdir()) if p.suffix not in (".csv", ".json")]
    assert len(files) > 80
    for path in files:
        started = time.perf_counter()
        pixels, reason = None, ""
        try:
            pixels = read_pixels(path)
        except DataError as error:
            reason = str(error)
        assert len(reason) < 130
        assert path.stem not in reason
        if pixels is not None:
            assert pixels.dtype == np.float32
            assert 0 <= pixels.min() <= pixels.max() <= 1
        assert time.perf_counter() - started < 5


def test_a_missing_codec_is_reported_as_that(tmp_path, dicom, monkeypatch):
    path = tmp_path / "a.dcm"
    path.write_bytes(compressed(JPEG_LL, b"\xff\xd8"))
    monkeypatch.setattr("clinifed.data.pixel_data.get_decoder", lambda _: SimpleNamespace(is_available=False))
    with pytest.raises(DataError, match=r"^missing codec for JPEG Lossless$"):
        read_pixels(path)


@pytest.mark.parametrize(("adobe", "photometric"), [(1, b"YBR_FULL_422"), (None, b"YBR_FULL_422"), (None, b"RGB")])
def test_a_jpeg_has_its_colours_whatever_marks_them(tmp_path, adobe, photometric):
    """JFIF says YCbCr (also where the header says RGB); an Adobe segment says which, and the codec undoes it."""
    colours = np.zeros((32, 32, 3), np.uint8)
    colours[:16, :16], colours[16:, :16], colours[:16, 16:] = (250, 10, 10), (10, 250, 10), (10, 10, 250)
    out = io.BytesIO()
    Image.fromarray(colours).save(out, "JPEG", quality=95, subsampling=0)
    stream = out.getvalue()
    if adobe is not None:
        length = int.from_bytes(stream[4:6], "big")
        segment = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([adobe])
        stream = stream[:2] + segment + stream[4 + length :]
    path = tmp_path / "a.dcm"
    path.write_bytes(compressed(JPEG, stream, samples=3, planar=0, photometric=photometric))
    np.testing.assert_allclose(read_pixels(path), colours / 255, atol=0.05)


@pytest.mark.realdata
def test_what_pydicom_decodes_is_used_and_equal_and_the_rest_is_refused(real):
    """Stored values of the middle frame, bit for bit; codecs of lossy JPEGs may differ by one."""
    compared, refused = 0, {}
    for path in sorted((real / "dicom").iterdir()):
        if path.suffix == ".csv":
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ds = pydicom.dcmread(path)
                theirs = pixel_array(ds, index=int(ds.get("NumberOfFrames") or 1) // 2, raw=True)
        except Exception:
            theirs = None
        try:
            picture = read_pixels(path)
        except DataError as error:
            assert theirs is None, path.name
            refused[path.name] = str(error)
            continue
        if theirs is None:
            assert path.name == "pydicom__JPGExtended.dcm", "a codec that pydicom does not ask"
            continue
        with opened(path) as found:
            data = PixelData(found)
            ours = data.frame(data.frames // 2).values
        np.testing.assert_allclose(ours, theirs, atol=1 if "JPEG" in ds.file_meta.TransferSyntaxUID.name else 0)
        assert np.isfinite(picture).all()
        compared += 1
    assert compared >= 115
    assert set(refused.values()) <= {"no image", "no pixel data", "cut off"}


def has_window(path) -> bool:
    ds = pydicom.dcmread(path, stop_before_pixels=True)
    return any(ds.get(name) for name in ("WindowWidth", "VOILUTSequence"))


def pnm(path, frame):
    """What DCMTK displays of one frame, in [0, 1]."""
    ds = pydicom.dcmread(path, stop_before_pixels=True)
    window = ["+Wi", "1"] if ds.get("WindowWidth") and not ds.get("VOILUTSequence") else []
    window = ["+Wl", "1"] if ds.get("VOILUTSequence") else window
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "a.pnm")
        command = [DCMTK, "-q", "+F", str(frame + 1), *window, "+op", str(path), str(out)]
        run = subprocess.run(command, capture_output=True)
        if run.returncode or not out.exists():
            return None
        with Image.open(out) as picture:
            return np.asarray(picture, np.float32) / 255


@pytest.mark.realdata
@pytest.mark.skipif(DCMTK is None, reason="DCMTK is not installed")
def test_the_picture_is_the_one_that_dcmtk_displays(real):
    agreed, other = [], {}
    for path in sorted((real / "dicom").iterdir()):
        if path.suffix == ".csv":
            continue
        try:
            ours = read_pixels(path)
        except DataError:
            continue
        told = pydicom.dcmread(path, stop_before_pixels=True)
        if told.get("Modality") in ("CT", "MR", "RTDOSE") and not has_window(path):
            continue  # no window of its own: ours is by public constants, DCMTK's by the values of the file
        if told.get("BitsStored") == 1:
            continue  # DCMTK shows ones as grey
        theirs = pnm(path, int(told.get("NumberOfFrames") or 1) // 2)
        if theirs is None or theirs.shape != ours.shape:
            continue  # not a syntax of this tool, or pixels that are not square
        difference = float(np.abs(theirs - ours).mean())
        if difference < 0.006:
            agreed.append(path.name)
        else:
            other[path.name] = round(difference, 3)
    assert len(agreed) >= 50
    assert set(other) <= DIFFER, other
