import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import RLELossless

from clinifed.data.dicom import read_pixels
from clinifed.data.fingerprint import Header, image_suffix, picture_hashes, picture_sha256, read_header
from clinifed.data.labels import tag_of
from clinifed.errors import DataError

GREY = np.random.default_rng(1).integers(0, 256, (9, 7), np.uint8)
COLOUR = np.random.default_rng(2).integers(0, 256, (9, 7, 3), np.uint8)


def sha(path):
    return picture_sha256(read_pixels(path))


def test_what_a_file_is_shows_in_how_it_begins(tmp_path, dicom):
    picture = Image.fromarray(COLOUR)
    picture.save(tmp_path / "a.dcm", format="PNG")
    picture.save(tmp_path / "b", format="JPEG")
    (tmp_path / "c.png").write_bytes(b"no picture")
    (tmp_path / "d.png").write_bytes(b"")
    found = [image_suffix(tmp_path / name) for name in ("a.dcm", "b", "c.png", "d.png")]
    assert found == [".png", ".jpg", "", ""]
    assert image_suffix(dicom(tmp_path / "e.txt")) == ".dcm"


def test_a_picture_is_the_same_in_every_lossless_form(tmp_path, dicom):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    Image.fromarray(GREY).convert("RGB").save(tmp_path / "b.png")
    paths = [tmp_path / "a.png", tmp_path / "b.png", dicom(tmp_path / "c.dcm", GREY)]
    paths.append(dicom(tmp_path / "d.dcm", 255 - GREY, photometric="MONOCHROME1"))
    paths.append(dicom(tmp_path / "e.dcm", GREY, PatientID="Q", WindowCenter=128, WindowWidth=256))
    assert len(set(map(sha, paths))) == 1
    Image.fromarray(COLOUR).save(tmp_path / "f.png")
    assert sha(tmp_path / "f.png") == sha(dicom(tmp_path / "g.dcm", COLOUR, photometric="RGB"))


def test_compression_without_loss_is_the_same_picture(tmp_path, dicom):
    plain = dicom(tmp_path / "a.dcm", GREY)
    ds = dcmread(plain)
    ds.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
    ds.save_as(tmp_path / "b.dcm")
    assert sha(plain) == sha(tmp_path / "b.dcm")
    assert plain.read_bytes() != (tmp_path / "b.dcm").read_bytes()


def test_one_step_of_one_value_is_another_picture(tmp_path):
    pixels = np.full((4, 5), 1000, np.float32) / 65535
    pixels[0, 0] = 0
    other = pixels.copy()
    other[3, 4] += 1 / 65535
    flipped, turned = pixels[:, ::-1], pixels.T
    assert len({picture_sha256(p) for p in (pixels, other, flipped, turned)}) == 4
    assert picture_sha256(pixels) == picture_sha256(np.asfortranarray(pixels))


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3)])
def test_a_blank_picture_is_nobodys(shape):
    with pytest.raises(DataError, match=r"^picture is blank$"):
        picture_sha256(np.full(shape, 0.3, np.float32))


def test_pictures_come_in_order_and_a_bad_one_is_a_reason(tmp_path, dicom):
    (tmp_path / "b.png").write_bytes(b"PLANTED")
    paths = [dicom(tmp_path / "a.dcm", GREY), tmp_path / "b.png", dicom(tmp_path / "c.dcm", COLOUR, photometric="RGB")]
    first, bad, last = picture_hashes(paths)
    assert (first, last) == (sha(paths[0]), sha(paths[2]))
    assert isinstance(bad, DataError)
    assert "PLANTED" not in str(bad)


def test_a_header_tells_whose_which_and_what(tmp_path, dicom):
    path = dicom(
        tmp_path / "a.dcm", SOPInstanceUID="1.2.3", BodyPartExamined="CHEST", ImageType=["ORIGINAL", "PRIMARY"]
    )
    assert read_header(path) == Header("HOSPITAL", "P1", "1.2.3", "")
    assert read_header(path, tag_of("BodyPartExamined")).label == "CHEST"
    assert read_header(path, tag_of("ImageType")).label == "ORIGINAL\\PRIMARY"
    assert read_header(path, tag_of("Rows")).label == "8"
    assert read_header(path, tag_of("StudyDescription")).label == ""


def test_a_sequence_or_bytes_are_no_label(tmp_path, dicom):
    path = dicom(tmp_path / "a.dcm", AnatomicRegionSequence=[Dataset()], EncapsulatedDocument=b"PLANTED!")
    for keyword in ("AnatomicRegionSequence", "EncapsulatedDocument"):
        with pytest.raises(DataError, match=r"^label tag holds no text$"):
            read_header(path, tag_of(keyword))


def test_a_header_that_is_none_is_a_reason(tmp_path):
    path = tmp_path / "PLANTED.dcm"
    for content in (b"", b"PLANTED" * 30):
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            read_header(path)
        assert "PLANTED" not in str(caught.value)
