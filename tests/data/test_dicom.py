import logging
import time
import zlib

import numpy as np
import pydicom
import pytest
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.uid import DeflatedExplicitVRLittleEndian

from clinifed.data.dicom import identity, read_pixels
from clinifed.errors import DataError

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
        identity(path)


def test_nothing_of_the_file_is_in_errors_and_logs(tmp_path, dicom, caplog):
    caplog.set_level(logging.DEBUG)
    path = dicom(tmp_path / "PLANTED.dcm", PatientID="PLANTED-1", PatientName="PLANTED^NAME")
    # A character set that nobody knows is one of the values pydicom quotes in its log; then the pixels are cut off.
    path.write_bytes(path.read_bytes().replace(b"ISO_IR 192", b"PLANTEDSET"))
    identity(path)
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
