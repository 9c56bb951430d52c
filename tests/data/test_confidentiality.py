"""Table E.1-1, every attribute under every option: made from the table, checked on data sets with planted values."""

from io import BytesIO

import pytest
from pydicom import dcmwrite
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.sr.codedict import codes
from pydicom.tag import Tag
from pydicom.uid import CTImageStorage, XRay3DAngiographicImageStorage

from clinifed.data.deid_dataset import Patient, protect
from clinifed.data.deid_table import METHODS, OPTIONS, Profile, image_classes, table, vr_of
from clinifed.data.deid_values import new_uid, shift
from clinifed.errors import DataError

KEY = bytes(range(32))
PATIENT = Patient("c0ffee", -40)
PROFILES = [(), *((option,) for option in OPTIONS)]
COMMAND_GROUPS = {"00001000", "00001001", "00020003", "00041511"}  # no part of a data set; removed from one whole
PLANTED = {
    **dict.fromkeys(("AE", "CS", "LO", "LT", "SH", "ST", "UC", "UT"), "PLANTED"),
    **dict.fromkeys(("DS", "IS"), "424242"),
    **dict.fromkeys(("FD", "FL"), 424242.0),
    **dict.fromkeys(("SL", "UL", "US", "SS"), 4242),
    **dict.fromkeys(("OB", "OW", "UN"), b"PLANTED!"),
    "PN": "PLANTED^PLANTED",
    "AS": "042Y",
    "DA": "20010203",
    "DT": "20010203040506.7",
    "TM": "040506.7",
    "UI": "1.2.3.424242",
    "UR": "http://PLANTED",
}
IDENTITY = {"00100010", "00100020"}  # these carry the pseudonym at the top


def tags(name: str) -> list[int]:
    """Tags that a row of the table names; of a repeating group, two."""
    if name == "50XXXXXX":
        return [0x50003000, 0x50022500]
    if name.startswith("60XX"):
        return [0x60000000 + int(name[4:], 16), 0x60020000 + int(name[4:], 16)]
    return [0x00111001] if name == "private" else [int(name, 16)]


def planted(tag: int) -> DataElement:
    vr = vr_of(Tag(tag)).split(" or ")[0] or "LO"
    if vr != "SQ":
        return DataElement(tag, vr, PLANTED[vr])
    item = Dataset()
    item.ReferencedSOPInstanceUID, item.PersonName, item.TextValue = PLANTED["UI"], PLANTED["PN"], "PLANTED"
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = "PLANTED", "99PLANTED", "PLANTED"
    return DataElement(tag, vr, Sequence([item]))


def holding(tag: int, sop_class: str = CTImageStorage) -> Dataset:
    """A data set with a planted value at the top, and one two sequences deep."""
    ds, inner, middle = Dataset(), Dataset(), Dataset()
    ds.SOPClassUID = sop_class
    ds[tag], inner[tag] = planted(tag), planted(tag)
    middle.PixelMeasuresSequence = [inner]
    ds.SharedFunctionalGroupsSequence = [middle]
    return ds


def places(ds: Dataset) -> dict[str, Dataset]:
    return {"top": ds, "nested": ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]}


def written(ds: Dataset) -> bytes:
    buffer = BytesIO()
    dcmwrite(buffer, ds, implicit_vr=False, little_endian=True)
    return buffer.getvalue()


def problem(name: str, action: str, found: DataElement | None, original: DataElement) -> str | None:
    """What is wrong with ``found``, which shall be ``original`` after ``action``."""
    vr = original.VR
    if found is None:
        return None if "X" in action else "is gone"
    empty = found.value in (None, "", b"") or (vr == "SQ" and not found.value)
    if empty:
        return None if "Z" in action else "is empty"
    if action == "X":
        return "is there"
    if action == "K":
        return None if vr == "SQ" or found.value == original.value else "is not kept"
    if action == "C" and vr in ("DA", "DT", "TM"):
        return None if found.value == shift(vr, original.value, PATIENT.days) else "has not moved"
    if vr == "UI":
        return None if found.value == new_uid(KEY, original.value) else "is not remapped"
    return "is as it was" if found.value == original.value else None


@pytest.mark.parametrize("options", PROFILES, ids=lambda options: "+".join(options) or "basic")
def test_every_attribute_of_the_table_gets_its_action_at_the_top_and_in_sequences(options):
    profile, wrong, checked = Profile(options), [], 0
    for name, row in table().items():
        for tag in tags(name):
            ds = holding(tag)
            basic, said = row["basic"], [row[option] for option in options if row[option]]
            action = said[0] if said else basic
            if name in COMMAND_GROUPS or not vr_of(Tag(tag)) or (name[:4] in ("50XX", "60XX")):
                action = "X"  # stricter: not of a data set, unknown to the dictionary, or a part of an overlay
            original = planted(tag)
            protect(ds, profile, KEY, PATIENT)
            for where, place in places(ds).items():
                found = place.get(Tag(tag))
                checked += 1
                if name in IDENTITY and where == "top":
                    why = None if found.value == PATIENT.pseudonym else "is not the pseudonym"
                elif action == "C" and original.VR not in ("DA", "DT", "TM"):
                    # Cleaned: nothing of the value is in the vocabulary, so the profile's own action is left.
                    why = problem(name, basic + "C", found, original)
                else:
                    why = problem(name, action, found, original)
                if why:
                    wrong.append(f"{name} {row['keyword']} {action} {where}: {why}")
            if action != "K" and b"PLANTED" in written(ds):
                wrong.append(f"{name} {row['keyword']} {action}: the planted value is in the file")
    assert wrong == []
    assert checked >= 2 * 655


def test_the_table_is_that_of_the_library_in_the_same_edition():
    database = pytest.importorskip("dicomanonymizer.dicom_anonymization_databases.dicomfields_2026c")
    actions = ("D", "Z", "X", "U", "Z_D", "X_Z", "X_D", "X_Z_D", "X_Z_U_STAR")
    theirs = {}
    for action in actions:
        for group, element, *mask in getattr(database, f"{action}_TAGS"):
            name = f"{group:04X}{element:04X}"
            if mask:
                name = f"{group >> 8:02X}XX" + (f"{element:04X}" if mask[1] else "XXXX")
            theirs[name] = action.replace("_STAR", "*").replace("_", "/")
    ours = {name: row["basic"] for name, row in table().items() if name != "private"}
    assert len(ours) == 655
    assert ours == theirs


def test_the_method_codes_are_those_of_cid_7050():
    theirs = {str(code.value): code.meaning for code in (getattr(codes.cid7050, name) for name in codes.cid7050.dir())}
    ours = {method.code: method.meaning for method in (*METHODS.values(), *Profile().methods)}
    assert ours == theirs


def test_types_decide_between_removing_emptying_and_replacing():
    profile = Profile()
    serial = Tag("DeviceSerialNumber")  # X/Z/D
    assert profile.action(serial, CTImageStorage, nested=False) == "X"
    enhanced_ct = "1.2.840.10008.5.1.4.1.1.2.1"
    assert profile.action(serial, enhanced_ct, nested=False) == "D"
    assert profile.action(Tag("AcquisitionContextSequence"), enhanced_ct, nested=False) == "Z"  # X/Z, Type 2
    assert profile.action(Tag("SourceImageSequence"), CTImageStorage, nested=False) == "X"  # X/Z/U*, Type 3
    assert profile.action(Tag("SourceImageSequence"), XRay3DAngiographicImageStorage, nested=True) == "U"
    # A class that is not listed keeps whatever might be required.
    assert profile.action(serial, "1.2.3", nested=False) == "D"
    assert profile.action(Tag("Rows"), CTImageStorage, nested=False) is None


def test_every_listed_sop_class_is_an_image_of_the_standard():
    from pydicom.uid import UID

    assert len(image_classes()) == 55
    for uid in image_classes():
        name = UID(uid).name
        assert "Image Storage" in name or "Volume Storage" in name or "Tomosynthesis" in name, name


@pytest.mark.parametrize("option", sorted(set(METHODS) - set(OPTIONS)))
def test_an_option_that_is_not_implemented_is_refused(option):
    with pytest.raises(DataError, match="that is not implemented; choose from"):
        Profile([option])


def test_wrong_options_are_refused_all_at_once():
    with pytest.raises(DataError) as caught:
        Profile(["retain-everything", "retain-full-dates", "retain-modified-dates"])
    assert [problem.split(";")[0] for problem in caught.value.problems] == [
        "option 'retain-everything' is no option of PS3.15",
        "options retain-full-dates and retain-modified-dates contradict each other",
    ]


def test_of_two_options_the_one_that_cleans_wins():
    both = Profile(["retain-device-identity", "retain-modified-dates"])
    calibrated = Tag("DateOfLastCalibration")
    assert Profile(["retain-device-identity"]).action(calibrated, CTImageStorage, nested=False) == "K"
    assert both.action(calibrated, CTImageStorage, nested=False) == "C"
