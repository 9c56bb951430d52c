"""One data set, its sequences included, under a profile of PS3.15 Annex E: attribute by attribute, failing closed."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.tag import BaseTag, Tag

from clinifed.data.deid_elements import AGE, BYTES, DATES, TEXT, UNVOUCHED, capped, fits, is_local, searchable, texts
from clinifed.data.deid_table import EDITION, Profile, vr_of
from clinifed.data.deid_values import DUMMIES, is_registered, is_uid, new_uid, shift
from clinifed.data.deid_words import Identifiers, clean

__all__ = ["DEEDS", "Patient", "protect"]

# What may be done to an attribute, by the names that reports count them under.
DEEDS = ("removed", "emptied", "replaced", "remapped", "moved", "cleaned", "kept")


@dataclass(frozen=True)
class Patient:
    """The patient as the site's key has it."""

    pseudonym: str
    days: int  # all dates move by


_IMAGE_GROUP = 0x0028  # whose bytes are look-up tables and colour profiles
_PIXELS = 0x7FE0  # one Pixel Data (7FE0,0010) was looked at; there shall be no other
_NOT_IN_DATA_SETS = (0x0000, 0x0002, 0x0004)  # commands, file meta information, directories
# Signatures of what is no longer so, and what others encrypted: nobody here knows what is in it.
_SEALED = frozenset(map(Tag, ("DigitalSignaturesSequence", "MACParametersSequence", "EncryptedAttributesSequence")))
_PATIENT_NAME, _PATIENT_ID, _PATIENT_AGE = Tag("PatientName"), Tag("PatientID"), Tag("PatientAge")
_CODE = tuple(map(Tag, ("CodeValue", "CodingSchemeDesignator", "CodingSchemeVersion", "CodeMeaning")))
# Values that say how to read the rest; the file cannot be used without them, and only few are possible.
_READING = frozenset(map(Tag, ("SpecificCharacterSet", "Modality", "PhotometricInterpretation")))


def protect(ds: Dataset, profile: Profile, key: bytes, patient: Patient) -> Counter[str]:
    """De-identify ``ds`` in place, and say so in it.

    Guarantees:
        - Every attribute of Table E.1-1, at the top and in any item of any sequence, gets the profile's action.
        - Private attributes, overlays (60xx), curves (50xx), group lengths, signatures, encrypted attributes, and
          attributes that the data dictionary does not know or knows with another VR are removed whole.
        - Attributes outside of the table are kept only where their VR has no room for free text; of short texts, values
          that hold one of the patient's own identifiers are replaced. UIDs and dates are treated as those of the table.
        - Codes of a coding scheme that is not public are replaced.
        - All UIDs are remapped but those that PS3.6 registers; equal UIDs stay equal.

    Args:
        ds: read from a file; its SOP Class UID decides which attributes must stay.
        key: the site's.
        patient: whose it is.

    Returns:
        What was done, of :data:`DEEDS` → how many attributes.
    """
    identifiers = Identifiers(ds, institution="retain-institution-identity" not in profile.options)
    work = _Work(profile, key, patient, identifiers, str(ds.get("SOPClassUID", "")), Counter())
    work.data_set(ds, nested=False, cleaning=False)
    ds.PatientIdentityRemoved = "YES"
    ds.DeidentificationMethod = [
        f"clinifed: DICOM PS3.15 {EDITION} Annex E",
        *(m.meaning[:64] for m in profile.methods),
    ]
    ds.DeidentificationMethodCodeSequence = [_code(method.code, method.meaning) for method in profile.methods]
    ds.LongitudinalTemporalInformationModified = profile.temporal
    return work.done


def _code(value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
    return item


@dataclass
class _Work:
    """One data set being de-identified."""

    profile: Profile
    key: bytes
    patient: Patient
    identifiers: Identifiers
    sop_class: str
    done: Counter[str]

    def data_set(self, ds: Dataset, *, nested: bool, cleaning: bool) -> None:
        """All attributes of ``ds``; ``cleaning`` where it is inside of a sequence whose texts shall be cleaned."""
        if nested and is_local(ds):
            for tag in _CODE:  # a code of the house's own names the house
                if tag in ds:
                    self._set(ds, DataElement(tag, vr_of(tag), None), DUMMIES[vr_of(tag)], "replaced")
        for tag in list(ds.keys()):
            if self._never(tag) or (tag.group == _PIXELS and (nested or tag.element != 0x0010)):
                self._remove(ds, tag)
                continue
            if tag.group == _PIXELS:
                continue
            try:
                element = ds[tag]
            except Exception:  # pydicom raises about every kind on values that do not fit their VR
                element = None
            action = self.profile.action(tag, self.sop_class, nested=nested)
            if element is None or element.VR not in (*vr_of(tag).split(" or "), vr_of(tag)):
                # Nothing of it can be kept; what must be there is replaced.
                action = None if action is None else self.profile.basic(tag, self.sop_class, nested=nested)
                element = DataElement(tag, vr_of(tag).split(" or ")[0], None)
                self._apply(ds, element, action if action in ("Z", "D") else "X", nested)
            elif action is None:
                self._unlisted(ds, element, nested=nested, cleaning=cleaning)
            elif action == "C":
                self._clean(ds, element, nested)
            elif action == "K":
                self._keep(ds, element, nested)
            else:
                self._apply(ds, element, action, nested)

    @staticmethod
    def _never(tag: BaseTag) -> bool:
        """Removed whatever it holds. Groups 50xx and 60xx go whole: what is left of an overlay is none."""
        group, element = tag.group, tag.element
        return (
            tag.is_private
            or element == 0
            or group in _NOT_IN_DATA_SETS
            or group & 0xFF00 in (0x5000, 0x6000)
            or tag in _SEALED
            or not vr_of(tag)
        )

    def _remove(self, ds: Dataset, tag: BaseTag) -> None:
        del ds[tag]
        self.done["removed"] += 1

    def _set(self, ds: Dataset, element: DataElement, value: object, what: str) -> None:
        ds[element.tag] = DataElement(element.tag, element.VR, value)
        self.done[what] += 1

    def _apply(self, ds: Dataset, element: DataElement, action: str, nested: bool) -> None:
        """Actions X, Z, D and U; the patient's own name and number are replaced by the pseudonym."""
        tag = element.tag
        if not nested and tag in (_PATIENT_NAME, _PATIENT_ID):
            self._set(ds, element, self.patient.pseudonym, "replaced")
        elif action == "Z":
            self._set(ds, element, None, "emptied")
        elif action == "D" and element.VR == "SQ":
            self._set(ds, element, Items([self._dummy_item(element.value)]), "replaced")
        elif action == "D" and element.VR == "UI":
            self._remap(ds, element)
        elif action == "D":
            self._set(ds, element, DUMMIES[element.VR], "replaced")
        elif action == "U" and element.VR == "UI":
            self._remap(ds, element)
        elif action == "U" and element.VR == "SQ":
            self._items(element, cleaning=False)
        else:
            self._remove(ds, tag)

    def _dummy_item(self, items: Sequence[Dataset] | None) -> Dataset:
        """One item with the attributes of the first, all of them dummies: what a sequence of Type 1 needs."""
        dummy = Dataset()
        for tag in list(items[0].keys()) if items else []:
            if self._never(tag):
                continue
            vr = vr_of(tag).split(" or ")[0]
            if vr == "SQ":
                inner = items[0].get(tag) if items else None
                dummy[tag] = DataElement(tag, vr, Items([self._dummy_item(inner.value if inner else None)]))
            else:
                dummy[tag] = DataElement(tag, vr, new_uid(self.key, f"dummy {tag}") if vr == "UI" else DUMMIES[vr])
        return dummy

    def _items(self, element: DataElement, *, cleaning: bool) -> None:
        for item in element.value:
            self.data_set(item, nested=True, cleaning=cleaning)
        self.done["kept"] += 1

    def _remap(self, ds: Dataset, element: DataElement) -> None:
        values = [text if is_registered(text) else new_uid(self.key, text) for text in texts(element)]
        self._set(ds, element, values or None, "remapped")

    def _keep(self, ds: Dataset, element: DataElement, nested: bool) -> None:
        """Action K; a value that is not what its VR says, or names the patient, gets the Basic Profile's action."""
        if element.VR == "SQ":
            self._items(element, cleaning=False)
        elif element.tag == _PATIENT_AGE:
            self._set(ds, element, [capped(age) for age in texts(element) if AGE.fullmatch(age)] or None, "kept")
        elif element.VR == "UI":
            values = [
                text if is_uid(text) and not self._named(text) else new_uid(self.key, text) for text in texts(element)
            ]
            self._set(ds, element, values or None, "kept")
        elif fits(element) and not self._named(searchable(element)):
            self.done["kept"] += 1
        else:
            self._apply(ds, element, self.profile.basic(element.tag, self.sop_class, nested=nested), nested)

    def _clean(self, ds: Dataset, element: DataElement, nested: bool) -> None:
        """Action C: dates move, texts lose the words that are not in the vocabulary, sequences are gone through."""
        value: object = None
        what = "cleaned"
        if element.VR in DATES and "retain-modified-dates" in self.profile.options:
            moved = [shift(element.VR, text, self.patient.days) for text in texts(element)]
            value, what = None if None in moved else moved, "moved"
        elif element.VR in TEXT:
            value = [words for text in texts(element) if (words := clean(text, self.identifiers))]
        elif element.VR == "SQ":
            kept = [item for item in element.value if not is_local(item)]
            for item in kept:
                self.data_set(item, nested=True, cleaning=True)
            value = Items(kept)
        if value:
            self._set(ds, element, value, what)
        else:
            self._apply(ds, element, self.profile.basic(element.tag, self.sop_class, nested=nested), nested)

    def _unlisted(self, ds: Dataset, element: DataElement, *, nested: bool, cleaning: bool) -> None:
        """An attribute that Table E.1-1 does not name."""
        vr, options = element.VR, self.profile.options
        if vr == "SQ":
            self._items(element, cleaning=cleaning)
        elif vr == "UI":
            self._remap(ds, element)
        elif vr in DATES and "retain-modified-dates" in options:
            moved = [shift(vr, text, self.patient.days) for text in texts(element)]
            if moved and None not in moved:
                self._set(ds, element, moved, "moved")
            else:
                self._remove(ds, element.tag)
        elif not fits(element) or (vr in BYTES and element.tag.group != _IMAGE_GROUP):
            self._remove(ds, element.tag)
        elif vr in UNVOUCHED or (vr in DATES and "retain-full-dates" not in options):
            # What an item of a sequence must have, only its macro says; at the top the table has all that is required.
            self._apply(ds, element, "D" if nested else "X", nested)
        elif cleaning and vr in TEXT and element.keyword not in ("CodeValue", "CodingSchemeDesignator"):
            words = [words for text in texts(element) if (words := clean(text, self.identifiers))]
            self._set(ds, element, words or DUMMIES[vr], "cleaned")
        elif element.tag not in _READING and self._named(searchable(element)):
            values = [DUMMIES["LO"] if self._named(text) else text for text in texts(element)]
            if vr in ("CS", "LO", "SH") and DUMMIES["LO"] in values:
                self._set(ds, element, values, "replaced")
            else:
                self._remove(ds, element.tag)
        else:
            self.done["kept"] += 1

    def _named(self, text: str) -> bool:
        return self.identifiers.found_in(text)
