import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from clinifed.data.dicom import read_pixels, read_volume
from clinifed.data.display import square
from clinifed.data.volumes import Frames
from clinifed.data.windows import CT_WINDOWS, SOFT_TISSUE
from clinifed.errors import DataError

RAMP12 = np.arange(4096, dtype=np.uint16).reshape(64, 64)


def lut(entries, first: int, bits: int) -> Sequence:
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item.LUTData = np.asarray(entries, "<u2").tobytes()
    item["LUTData"].VR = "OW"
    item["LUTDescriptor"].VR = "US"
    return Sequence([item])


def describe(ds: Dataset, colour: str, descriptor: list[int]) -> None:
    keyword = f"{colour}PaletteColorLookupTableDescriptor"
    setattr(ds, keyword, descriptor)
    ds[keyword].VR = "US"


def paletted(path, values, entries, first: int, bits: int):
    """A file whose palette is red = entries, green = 0, blue = reversed entries."""
    ds = pydicom.dcmread(path)
    ds.PhotometricInterpretation = "PALETTE COLOR"
    kind = "<u2" if bits == 16 else "u1"
    for colour, table in {"Red": entries, "Green": np.zeros_like(entries), "Blue": entries[::-1]}.items():
        describe(ds, colour, [len(entries) & 0xFFFF, first, bits])
        setattr(ds, f"{colour}PaletteColorLookupTableData", np.asarray(table, kind).tobytes())
    ds.save_as(path)
    return path


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_the_rest_as_without_it(tmp_path, dicom, photometric):
    values = RAMP12.copy()
    plain = read_pixels(dicom(tmp_path / "a.dcm", values, photometric, 12))
    padded = read_pixels(
        dicom(tmp_path / "b.dcm", values, photometric, 12, PixelPaddingValue=10, PixelPaddingRangeLimit=40)
    )
    mask = (values >= 10) & (values <= 40)
    assert (padded[mask] == 0).all()
    np.testing.assert_array_equal(padded[~mask], plain[~mask])


def test_padding_does_not_stretch_the_range_of_mr(tmp_path, dicom):
    values = np.full((64, 64), -2000, np.int16)
    values[20:40, 20:40] = np.arange(400).reshape(20, 20)
    picture = read_pixels(dicom(tmp_path / "a.dcm", values, bits=16, Modality="MR", PixelPaddingValue=-2000))
    assert (picture[:20] == 0).all()
    np.testing.assert_allclose(picture[20:40, 20:40].ravel(), np.clip(np.arange(400) / 398.2, 0, 1), atol=2e-3)


def test_mr_without_a_window_is_scaled_by_its_own_percentiles(tmp_path, dicom):
    values = RAMP12.copy()
    values[0, 0] = 60000  # one spike does not turn the rest black
    picture = read_pixels(dicom(tmp_path / "a.dcm", values, bits=16, Modality="MR"))
    assert picture[32, 0] == pytest.approx(2048 / np.percentile(values, 99.8), abs=1e-3)


def test_an_mr_image_of_one_value_is_black(tmp_path, dicom):
    assert (read_pixels(dicom(tmp_path / "a.dcm", np.full((8, 8), 7, np.uint16), bits=16, Modality="MR")) == 0).all()


@pytest.mark.parametrize(("part", "window"), [*CT_WINDOWS.items(), ("ABDOMEN", SOFT_TISSUE), ("", SOFT_TISSUE)])
def test_ct_without_a_window_gets_the_one_of_its_body_part(tmp_path, dicom, part, window):
    more = {"Modality": "CT", "BodyPartExamined": part, "RescaleSlope": 1, "RescaleIntercept": -1024}
    picture = read_pixels(dicom(tmp_path / "a.dcm", RAMP12, bits=12, **more))
    given = {"WindowCenter": window[0], "WindowWidth": window[1]}
    np.testing.assert_array_equal(
        picture, read_pixels(dicom(tmp_path / "b.dcm", RAMP12, bits=12, **{**more, "BodyPartExamined": "ARM"}, **given))
    )


@pytest.mark.parametrize("more", [{"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, {"RescaleType": "US"}])
def test_a_ct_image_that_is_not_in_hounsfield_units_or_a_projection_has_its_stored_range(tmp_path, dicom, more):
    path = dicom(tmp_path / "a.dcm", RAMP12, bits=12, Modality="CT", RescaleSlope=1, RescaleIntercept=-1024, **more)
    np.testing.assert_allclose(read_pixels(path), RAMP12 / 4095, atol=1e-6)


def test_a_window_of_width_0_is_none(tmp_path, dicom):
    path = dicom(tmp_path / "a.dcm", RAMP12, bits=12, WindowCenter=1, WindowWidth=0)
    np.testing.assert_allclose(read_pixels(path), RAMP12 / 4095, atol=1e-6)


def test_a_window_in_fractions_of_a_unit_is_exact(tmp_path, dicom):
    more = {"RescaleSlope": 0.0001, "RescaleIntercept": 0, "WindowCenter": 0.2, "WindowWidth": 0.2}
    picture = read_pixels(dicom(tmp_path / "a.dcm", RAMP12, bits=12, **more))
    np.testing.assert_allclose(picture, np.clip((RAMP12 * 0.0001 - 0.1) / 0.2, 0, 1), atol=1e-5)


def test_modality_and_voi_tables_are_applied_one_after_the_other(tmp_path, dicom):
    reverse = np.arange(4095, -1, -1)
    path = dicom(tmp_path / "a.dcm", RAMP12, bits=12, ModalityLUTSequence=lut(reverse, 0, 12))
    np.testing.assert_allclose(read_pixels(path), reverse.reshape(64, 64) / 4095, atol=1e-6)
    both = dicom(
        tmp_path / "b.dcm",
        RAMP12,
        bits=12,
        ModalityLUTSequence=lut(reverse, 0, 12),
        VOILUTSequence=lut(np.arange(100) * 10, 1000, 10),
    )
    expected = np.clip(reverse.reshape(64, 64) - 1000, 0, 99) * 10 / 1023
    np.testing.assert_allclose(read_pixels(both), expected, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_is_looked_up_by_the_whole_value(tmp_path, dicom, bits):
    """Also by 16-bit values, of which a palette of bytes sees only the low one elsewhere."""
    entries = np.linspace(0, 2**bits - 1, 256).astype(int)
    path = dicom(tmp_path / "a.dcm", RAMP12, bits=16)
    picture = read_pixels(paletted(path, RAMP12, entries, 100, bits))
    index = np.clip(RAMP12.astype(int) - 100, 0, 255)
    expected = np.stack([entries[index], 0 * index, entries[::-1][index]], -1) / (2**bits - 1)
    np.testing.assert_allclose(picture, expected, atol=1e-6)


def test_a_segmented_palette_is_expanded(tmp_path, dicom):
    path = dicom(tmp_path / "a.dcm", np.arange(64, dtype=np.uint8).reshape(8, 8))
    ds = pydicom.dcmread(path)
    ds.PhotometricInterpretation = "PALETTE COLOR"
    # Discrete 1 entry (0), linear 31 entries to 31000, indirect: the same two again.
    words = np.array([0, 1, 0, 1, 31, 31000, 2, 2, 0, 0], "<u2").tobytes()
    for colour in ("Red", "Green", "Blue"):
        describe(ds, colour, [64, 0, 16])
        setattr(ds, f"Segmented{colour}PaletteColorLookupTableData", words)
    ds.save_as(path)
    expected = np.tile(np.arange(32) * 1000 / 65535, 2).reshape(8, 8)
    np.testing.assert_allclose(read_pixels(path), np.stack([expected] * 3, -1), atol=1e-5)


@pytest.mark.parametrize(("bits", "kind"), [(8, np.uint8), (16, np.uint16)])
@pytest.mark.parametrize(
    "rgb", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 1.0), (0.2, 0.5, 0.8), (0.0, 0.0, 0.0)]
)
def test_ybr_of_any_depth_becomes_rgb(tmp_path, dicom, bits, kind, rgb):
    """PS3.3 C.7.6.3.1.2, forwards."""
    r, g, b = rgb
    y = 0.299 * r + 0.587 * g + 0.114 * b
    cb, cr = (b - y) / 1.772, (r - y) / 1.402
    peak = 2**bits - 1
    ybr = np.clip([y * peak, cb * peak + 2 ** (bits - 1), cr * peak + 2 ** (bits - 1)], 0, peak)
    pixels = np.broadcast_to(np.rint(ybr).astype(kind), (8, 8, 3)).copy()
    picture = read_pixels(dicom(tmp_path / "a.dcm", pixels, "YBR_FULL", bits))
    np.testing.assert_allclose(picture[0, 0], rgb, atol=0.01)


def test_bits_above_the_lowest_are_read_from_where_they_are(tmp_path, dicom):
    path = dicom(tmp_path / "a.dcm", RAMP12, bits=12)
    ds = pydicom.dcmread(path)
    ds.HighBit = 15
    ds.PixelData = (RAMP12 << 4 | np.uint16(9)).tobytes()
    ds.save_as(path)
    np.testing.assert_allclose(read_pixels(path), RAMP12 / 4095, atol=1e-6)


@pytest.mark.parametrize(
    "more", [{"PixelAspectRatio": [2, 1]}, {"PixelSpacing": [0.8, 0.4]}, {"ImagerPixelSpacing": [0.3, 0.15]}]
)
def test_pixels_that_are_taller_than_wide_become_square(tmp_path, dicom, more):
    picture = read_pixels(dicom(tmp_path / "a.dcm", RAMP12, bits=12, **more))
    assert picture.shape == (128, 64)
    np.testing.assert_allclose(picture[:, 5].mean(), RAMP12[:, 5].mean() / 4095, atol=1e-3)


def test_spacing_comes_before_the_aspect_ratio_and_nearly_square_is_square(tmp_path, dicom):
    path = dicom(tmp_path / "a.dcm", RAMP12, bits=12, PixelSpacing=[0.5, 0.501], PixelAspectRatio=[2, 1])
    assert read_pixels(path).shape == (64, 64)


def test_wide_pixels_and_colours_become_square():
    assert square(np.zeros((10, 20, 3), np.float32), 0.5).shape == (10, 40, 3)
    with pytest.raises(DataError, match="aspect"):
        square(np.zeros((10, 20), np.float32), 17)


def test_frames_of_a_volume_are_displayed_by_their_own_attributes(tmp_path, dicom):
    frames = np.stack([RAMP12] * 4)

    def group(width):
        item, window = Dataset(), Dataset()
        window.WindowCenter, window.WindowWidth = width / 2, width
        item.FrameVOILUTSequence = Sequence([window])
        return item

    path = dicom(
        tmp_path / "a.dcm",
        frames,
        bits=12,
        PerFrameFunctionalGroupsSequence=Sequence([group(w) for w in (4, 400, 4, 4000)]),
    )
    volume = read_volume(path, Frames(2))
    assert volume.shape == (2, 64, 64)
    for picture, width in zip(volume, (400, 4000), strict=True):
        window = {"WindowCenter": width / 2, "WindowWidth": width}
        alone = read_pixels(dicom(tmp_path / "b.dcm", RAMP12, bits=12, **window))
        np.testing.assert_array_equal(picture, alone)


def test_one_frame_of_a_large_file_takes_the_memory_of_one_frame(tmp_path, dicom):
    """An enhanced CT is a gigabyte; the key slice is not."""
    path = dicom(tmp_path / "a.dcm", np.zeros((3, 512, 512), np.uint16), bits=16)
    content = path.read_bytes().replace(b"(\x00\x08\x00IS\x02\x003 ", b"(\x00\x08\x00IS\x04\x002000")
    at = content.index(b"\xe0\x7f\x10\x00OW")
    size = 2000 * 512 * 512 * 2
    with path.open("wb") as file:
        file.write(content[: at + 8] + size.to_bytes(4, "little"))
        file.truncate(at + 12 + size)  # sparse
    picture = read_pixels(path)
    assert picture.shape == (512, 512)
