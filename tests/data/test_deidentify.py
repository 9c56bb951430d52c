import json
import logging
import stat
from io import BytesIO

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, JPEGBaseline8Bit, RLELossless

from clinifed.config import FolderIndex
from clinifed.data.deid_table import Profile
from clinifed.data.deid_values import is_uid, new_uid, shift, shift_days
from clinifed.data.deidentify import deidentify_file, deidentify_folder, read_key
from clinifed.data.index import index_folder
from clinifed.errors import DataError

# Values that do not fit their VR are planted on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:(Invalid value|A value of type|The value length):UserWarning")
KEY = bytes(range(32))
CT = {"SOPClassUID": CTImageStorage, "Modality": "CT", "PatientName": "PLANTED^NAME", "PatientID": "PLANTED-7"}


@pytest.fixture
def ct(dicom):
    """A CT image of a planted patient, read back de-identified: (keyword → value) → data set."""

    def make(path, options=(), **more):
        dicom(path, **(CT | more))
        return dcmread(BytesIO(deidentify_file(path, Profile(options), KEY).content))

    return make


def test_the_patient_is_who_the_manifest_of_the_same_key_says(tmp_path, dicom):
    dicom(tmp_path / "in/a.dcm", **CT)
    index = FolderIndex(folder=tmp_path / "in")
    manifest = index_folder(index, tmp_path / "site/manifest.csv", ("radiology",), "hospital").manifest
    deidentify_folder(tmp_path / "in", tmp_path / "out", key=tmp_path / "site/site.key")
    (path,) = (tmp_path / "out").iterdir()
    ds = dcmread(path)
    assert [ds.PatientID, str(ds.PatientName)] == [manifest.records[0].patient] * 2


def test_the_file_says_what_was_done(tmp_path, ct):
    ds = ct(tmp_path / "a.dcm", ("retain-modified-dates", "retain-device-identity"))
    assert ds.PatientIdentityRemoved == "YES"
    said = [(code.CodeValue, code.CodingSchemeDesignator) for code in ds.DeidentificationMethodCodeSequence]
    assert said == [("113100", "DCM"), ("113107", "DCM"), ("113109", "DCM")]
    assert ds.DeidentificationMethod[0] == "clinifed: DICOM PS3.15 2026c Annex E"
    assert all(len(text) <= 64 for text in ds.DeidentificationMethod)
    assert ds.LongitudinalTemporalInformationModified == "MODIFIED"


@pytest.mark.parametrize(
    ("options", "said"), [((), "REMOVED"), (("retain-full-dates",), "UNMODIFIED"), (("retain-uids",), "REMOVED")]
)
def test_what_happened_to_times_is_declared(tmp_path, ct, options, said):
    ds = ct(tmp_path / "a.dcm", options, StudyDate="20010203", DeidentificationMethod="PLANTED")
    assert ds.LongitudinalTemporalInformationModified == said
    assert ds.StudyDate == ("20010203" if said == "UNMODIFIED" else "")


def test_preamble_and_file_meta_information_are_new(tmp_path, dicom):
    path = dicom(tmp_path / "a.dcm", **CT)
    whole = dcmread(path)
    whole.preamble = b"PLANTED " * 16
    whole.file_meta.SourceApplicationEntityTitle = "PLANTED"
    whole.file_meta.PrivateInformationCreatorUID = "1.2.3"
    whole.file_meta.PrivateInformation = b"PLANTED!"
    whole.save_as(path, enforce_file_format=True)
    content = deidentify_file(path, Profile(), KEY).content
    ds = dcmread(BytesIO(content))
    assert content[:132] == bytes(128) + b"DICM"
    assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID == new_uid(KEY, whole.SOPInstanceUID)
    assert {element.keyword for element in ds.file_meta} == {
        "FileMetaInformationGroupLength",
        "FileMetaInformationVersion",
        "MediaStorageSOPClassUID",
        "MediaStorageSOPInstanceUID",
        "TransferSyntaxUID",
        "ImplementationClassUID",
        "ImplementationVersionName",
    }
    assert b"PLANTED" not in content


def test_uids_stay_equal_across_files_and_change_with_the_key(tmp_path, dicom):
    a = dicom(tmp_path / "a.dcm", **CT, StudyInstanceUID="1.2.3", FrameOfReferenceUID="1.2.9")
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = CTImageStorage, dcmread(a).SOPInstanceUID
    more = {"StudyInstanceUID": "1.2.3", "ReferencedInstanceSequence": [reference]}
    b = dicom(tmp_path / "b.dcm", **CT, **more)
    first, second = (dcmread(BytesIO(deidentify_file(path, Profile(), KEY).content)) for path in (a, b))
    other = dcmread(BytesIO(deidentify_file(a, Profile(), bytes(32)).content))
    assert first.StudyInstanceUID == second.StudyInstanceUID != "1.2.3"
    assert first.StudyInstanceUID != other.StudyInstanceUID
    assert second.ReferencedInstanceSequence[0].ReferencedSOPInstanceUID == first.SOPInstanceUID
    assert second.ReferencedInstanceSequence[0].ReferencedSOPClassUID == CTImageStorage
    for uid in (first.StudyInstanceUID, first.SOPInstanceUID, first.FrameOfReferenceUID):
        assert is_uid(uid)
        assert uid.startswith("2.25.")


def test_a_uid_that_is_none_is_remapped_even_where_uids_are_retained(tmp_path, ct):
    ds = ct(tmp_path / "a.dcm", ("retain-uids",), StudyInstanceUID="PLANTED 19310626", SeriesInstanceUID="1.2.3")
    assert is_uid(ds.StudyInstanceUID)
    assert ds.SeriesInstanceUID == "1.2.3"
    # DICOM's own root does not make a UID one of DICOM's own.
    assert ct(tmp_path / "b.dcm", StudyInstanceUID="1.2.840.10008.5318908").StudyInstanceUID.startswith("2.25.")


def test_dates_of_one_patient_move_together_and_of_two_apart(tmp_path, ct):
    more = {"StudyDate": "20200229", "AcquisitionDateTime": "20200301120000.5+0100", "StudyTime": "120000"}
    options = ("retain-modified-dates",)
    days = set()
    for number in range(20):
        ds = ct(tmp_path / "a.dcm", options, **more, PatientID=f"P{number}")
        moved = (
            (np.datetime64(f"{ds.StudyDate[:4]}-{ds.StudyDate[4:6]}-{ds.StudyDate[6:]}") - np.datetime64("2020-02-29"))
            .item()
            .days
        )
        assert ds.AcquisitionDateTime == shift("DT", more["AcquisitionDateTime"], moved)
        assert ds.StudyTime == "120000"
        assert 1 <= abs(moved) <= 365
        days.add(moved)
    assert len(days) > 15


def test_shifts_are_spread_over_two_years_and_never_none():
    days = [shift_days(KEY, str(i)) for i in range(20000)]
    assert set(days) == set(range(-365, 366)) - {0}


@pytest.mark.parametrize(
    ("vr", "text", "moved"),
    [
        ("DA", "20200301", "20200229"),
        ("DA", "2020.03.01", "20200229"),
        ("DT", "202003", "202003"),
        ("DT", "2020", "2020"),
        ("DT", "20200301235959.999999-0500", "20200229235959.999999-0500"),
        ("TM", "2359", "2359"),
        ("DA", "20200230", None),
        ("DA", "20200101-20200201", None),
        ("DA", "PLANTED", None),
        ("DT", "2020030199", None),
        ("DA", "00010101", None),
        ("TM", "PLANTED", None),
    ],
)
def test_a_value_moves_by_a_day_or_is_none(vr, text, moved):
    assert shift(vr, text, -1) == moved


def test_a_date_that_is_none_is_not_kept(tmp_path, dicom):
    path = dicom(tmp_path / "a.dcm", **CT, StudyDate="20010203")
    path.write_bytes(path.read_bytes().replace(b"20010203", b"PLANTED!"))
    for options in ((), ("retain-modified-dates",), ("retain-full-dates",)):
        content = deidentify_file(path, Profile(options), KEY).content
        assert b"PLANTED" not in content
        assert dcmread(BytesIO(content)).StudyDate == ""


def test_what_no_rule_vouches_for_is_removed(tmp_path, dicom):
    more = {
        "BodyPartExamined": "PLANTED",  # CS, and the patient's name
        "Manufacturer": "made for Planted Name",
        "ContentQualification": "no such thing as this, longer than 16",
        "SoftwareVersions": "v1",
        "KVP": "120",
    }
    path = dicom(tmp_path / "a.dcm", **CT, **more)
    ds = dcmread(path)
    ds.private_block(0x0011, "PLANTED", create=True).add_new(1, "LO", "PLANTED")
    ds.add_new(0x00080001, "UL", 1)  # retired, length to end
    ds.add_new(0x00089999, "LO", "PLANTED")  # in no dictionary
    ds.add_new(0x60000010, "US", 8)
    ds.add_new(0x60003000, "OW", b"PLANTED!")
    ds.add_new(0x50000005, "US", 8)
    ds.add_new(0x00420010, "OB", b"PLANTED!")  # a title, with the VR of bytes
    item = Dataset()
    item.private_block(0x0011, "PLANTED", create=True).add_new(1, "LO", "PLANTED")
    item.PatientComments = item.TextValue = "PLANTED"
    ds.AnatomicRegionSequence = Sequence([item])
    ds.save_as(path)
    content = deidentify_file(path, Profile(), KEY).content
    assert b"planted" not in content.lower()
    left = dcmread(BytesIO(content))
    assert (left.SoftwareVersions, left.KVP) == ("v1", 120)
    assert not any(element.is_private or element.tag.group in (0x5000, 0x6000) for element in left)
    assert [element.value for element in left.AnatomicRegionSequence[0]] == [
        "REMOVED"
    ]  # TextValue; the comments are gone
    assert (left.BodyPartExamined, left.Manufacturer) == ("REMOVED", "REMOVED")
    assert "ContentQualification" not in left


def test_signatures_encrypted_attributes_padding_and_icons_are_gone(tmp_path, dicom):
    path = dicom(tmp_path / "a.dcm", **CT)
    ds = dcmread(path)
    for keyword in (
        "DigitalSignaturesSequence",
        "EncryptedAttributesSequence",
        "IconImageSequence",
        "MACParametersSequence",
    ):
        setattr(ds, keyword, Sequence([Dataset()]))
    ds.DataSetTrailingPadding = b"PLANTED!"
    ds.save_as(path)
    content = deidentify_file(path, Profile(), KEY).content
    left = dcmread(BytesIO(content))
    for keyword in (
        "DigitalSignaturesSequence",
        "EncryptedAttributesSequence",
        "IconImageSequence",
        "MACParametersSequence",
    ):
        assert keyword not in left
    assert b"PLANTED" not in content


def test_a_nested_number_of_someone_is_not_the_patients(tmp_path, ct):
    item = Dataset()
    item.PatientID, item.PatientName = "PLANTED-8", "PLANTED^MOTHER"
    ds = ct(tmp_path / "a.dcm", AnatomicRegionSequence=[item])
    assert ds.AnatomicRegionSequence[0].PatientID == "REMOVED"
    assert ds.AnatomicRegionSequence[0].PatientName == ""


def test_ages_above_89_are_one(tmp_path, ct):
    for age, left in {"042Y": "042Y", "089Y": "089Y", "090Y": "090Y", "101Y": "090Y", "999M": "999M"}.items():
        assert ct(tmp_path / "a.dcm", ("retain-patient-characteristics",), PatientAge=age).PatientAge == left
    assert "PatientAge" not in ct(tmp_path / "b.dcm", PatientAge="042Y")


def test_clean_descriptors_leaves_only_words_of_the_vocabulary(tmp_path, ct):
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "77477000", "SCT", "CT of Planted"
    local = Dataset()
    local.CodeValue, local.CodingSchemeDesignator, local.CodeMeaning = "PLANTED", "99PLANTED", "CHEST"
    more = {
        "StudyDescription": "CHEST Planted follow-up, 12.05.1936 Straße",
        "SeriesDescription": "Head_T2_PLANTED",
        "AdmittingDiagnosesCodeSequence": [code, local],
        "PatientName": "Head^Planted",
    }
    ds = ct(tmp_path / "a.dcm", ("clean-descriptors",), **more)
    assert ds.StudyDescription == "CHEST follow up"
    assert ds.SeriesDescription == "T2"  # the patient is called Head
    assert [(item.CodeValue, item.CodeMeaning) for item in ds.AdmittingDiagnosesCodeSequence] == [("77477000", "CT")]
    assert "StudyDescription" not in ct(tmp_path / "b.dcm", **more)


def test_compressed_pixels_come_out_bare_and_the_same(tmp_path, dicom):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    path = dicom(tmp_path / "a.dcm", pixels, **CT)
    ds = dcmread(path)
    ds.compress(RLELossless, generate_instance_uid=False)
    ds.save_as(path)
    left = dcmread(BytesIO(deidentify_file(path, Profile(), KEY).content))
    assert not left.file_meta.TransferSyntaxUID.is_encapsulated
    np.testing.assert_array_equal(left.pixel_array, pixels)


def test_a_comment_inside_a_jpeg_stream_is_gone(tmp_path, dicom):
    from PIL import Image

    stream = BytesIO()
    Image.fromarray(np.full((8, 8), 90, np.uint8)).save(stream, "JPEG", comment=b"PLANTED")
    path = dicom(tmp_path / "a.dcm", **CT)
    ds = dcmread(path)
    ds.PixelData, ds.file_meta.TransferSyntaxUID = encapsulate([stream.getvalue()]), JPEGBaseline8Bit
    ds["PixelData"].VR = "OB"
    ds.save_as(path)
    assert b"PLANTED" in path.read_bytes()
    content = deidentify_file(path, Profile(), KEY).content
    assert b"PLANTED" not in content
    assert abs(dcmread(BytesIO(content)).pixel_array.astype(int) - 90).max() <= 1


def test_a_code_of_the_houses_own_names_no_house(tmp_path, ct):
    local, public = Dataset(), Dataset()
    local.CodeValue, local.CodingSchemeDesignator, local.CodeMeaning = "SGH0101", "99SGH", "CT brain at SGH"
    public.CodeValue, public.CodingSchemeDesignator, public.CodeMeaning = "12738006", "SCT", "Brain"
    left = ct(tmp_path / "a.dcm", ProcedureCodeSequence=[local], AnatomicRegionSequence=[public])
    assert {element.value for element in left.ProcedureCodeSequence[0]} == {"REMOVED"}
    assert [element.value for element in left.AnatomicRegionSequence[0]] == ["12738006", "SCT", "Brain"]


@pytest.mark.parametrize("signed", [False, True])
def test_spare_bits_and_a_tail_of_the_pixel_data_are_cleared(tmp_path, dicom, signed):
    values = np.arange(-32 * signed, 64 - 32 * signed).reshape(8, 8).astype(np.int16 if signed else np.uint16)
    path = dicom(tmp_path / "a.dcm", values, bits=12, **CT)
    ds = dcmread(path)
    hidden = values.view(np.uint16) & 0x0FFF | 0x5000
    ds.PixelData = hidden.tobytes() + b"PLANTED!"
    ds.save_as(path)
    content = deidentify_file(path, Profile(), KEY).content
    left = dcmread(BytesIO(content))
    assert b"PLANTED" not in content
    assert left.PixelData == values.tobytes()


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11"}, "not an image of a known SOP class"),  # a report
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.104.1"}, "not an image of a known SOP class"),  # a PDF
        ({"SOPClassUID": "1.3.46.670589.1"}, "not an image of a known SOP class"),
        ({"PatientID": ""}, "patient is blank"),
        ({"PatientID": "ANONYMOUS"}, "patient is anonymous or a placeholder"),
        ({"PatientID": ["A", "B"]}, "patient is ambiguous"),
        ({"BurnedInAnnotation": "YES"}, "burned-in annotation is declared"),
        ({"Rows": 4000}, "pixel data is shorter than declared"),
        ({"Rows": 65535, "Columns": 65535}, "larger than 256 MiB when decoded"),
        ({"BitsStored": 0}, "bits stored out of range"),
    ],
)
def test_a_file_that_may_not_be_shared_is_left_out_with_a_reason(tmp_path, dicom, more, reason):
    path = dicom(tmp_path / "a.dcm", **(CT | more))
    with pytest.raises(DataError) as caught:
        deidentify_file(path, Profile(), KEY)
    assert str(caught.value) == reason


def test_a_damaged_file_is_left_out_and_nothing_of_it_is_said(tmp_path, dicom, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    whole = dicom(tmp_path / "in/PLANTED.dcm", **CT).read_bytes()
    for size in range(0, len(whole) - 1, 40):
        (tmp_path / "in" / f"PLANTED{size}.dcm").write_bytes(whole[:size])
    report = deidentify_folder(tmp_path / "in", tmp_path / "out")
    assert report.written == 1
    assert "PLANTED" not in caplog.text + "".join(capfd.readouterr()) + json.dumps(report.to_dict())


def test_files_are_opaque_owner_only_and_the_same_again(tmp_path, dicom):
    for number in range(3):
        dicom(tmp_path / f"in/PLANTED/{number}.dcm", **CT)
    (tmp_path / "in/notes.txt").write_text("PLANTED")
    first = deidentify_folder(tmp_path / "in", tmp_path / "out")
    contents = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    second = deidentify_folder(tmp_path / "in", tmp_path / "out")
    assert (first.written, first.unchanged, second.written, second.unchanged) == (3, 0, 0, 3)
    assert first.to_dict()["left_out"] == {"not DICOM": 1}
    assert contents == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for path in (tmp_path / "out").iterdir():
        assert len(path.stem) == 20
        assert set(path.stem) <= set("0123456789abcdef")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    deidentify_folder(tmp_path / "in", tmp_path / "again", key=tmp_path / "site.key")
    assert contents == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}


def test_lists_lie_beside_the_folder_owner_only_and_the_report_names_nobody(tmp_path, dicom):
    dicom(tmp_path / "in/a.dcm", **CT)
    bad = dicom(tmp_path / "in/PLANTED.dcm", **(CT | {"PatientID": ""}))
    deidentify_folder(tmp_path / "in", tmp_path / "out")
    quarantine = tmp_path / "out.quarantine.jsonl"
    assert json.loads(quarantine.read_text()) == {"path": str(bad), "reason": "patient is blank"}
    lines = [json.loads(line) for line in (tmp_path / "out.report.jsonl").read_text().splitlines()]
    assert lines[0]["sop_class"] == "CT Image Storage"
    assert lines[-1] == {
        "standard": "DICOM PS3.15 2026c Annex E",
        "options": ["retain-modified-dates"],
        "written": 1,
        "unchanged": 0,
        "left_out": {"patient is blank": 1},
        "reviewed": {},
    }
    assert "PLANTED" not in (tmp_path / "out.report.jsonl").read_text()
    for path in (quarantine, tmp_path / "out.report.jsonl", tmp_path / "site.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_is_there_is_never_overwritten(tmp_path, dicom):
    dicom(tmp_path / "in/a.dcm", **CT)
    deidentify_folder(tmp_path / "in", tmp_path / "out")
    (path,) = (tmp_path / "out").iterdir()
    path.write_bytes(b"mine")
    report = deidentify_folder(tmp_path / "in", tmp_path / "out")
    assert report.to_dict()["left_out"] == {"another file of this SOP Instance UID is there": 1}
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize("out", ["in", "in/out", "."])
def test_files_are_never_mixed_with_the_originals(tmp_path, dicom, out):
    dicom(tmp_path / "in/a.dcm", **CT)
    with pytest.raises(DataError, match="need a folder apart"):
        deidentify_folder(tmp_path / "in", tmp_path / out)
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "a.dcm"]


def test_a_wrong_key_or_option_stops_before_anything_is_written(tmp_path, dicom):
    dicom(tmp_path / "in/a.dcm", **CT)
    with pytest.raises(DataError, match="no such key"):
        deidentify_folder(tmp_path / "in", tmp_path / "out", key=tmp_path / "none")
    (tmp_path / "short").write_bytes(b"short")
    with pytest.raises(DataError, match="not a site's key"):
        read_key(tmp_path / "short")
    with pytest.raises(DataError, match="no option of"):
        deidentify_folder(tmp_path / "in", tmp_path / "out", ("keep",))
    assert not (tmp_path / "out").exists()
