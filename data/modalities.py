"""A drawn image as a DICOM object: the SOP class, bit depth and attributes of its specialty's equipment."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence

from clinifed.data.devices import quantise

__all__ = ["MODALITIES", "Identity", "Modality", "dicom_object"]


@dataclass(frozen=True)
class Modality:
    """What one kind of equipment writes."""

    code: str  # Modality (0008,0060)
    sop_class: uid.UID
    photometric: str  # PhotometricInterpretation (0028,0004)
    bits: int  # BitsStored (0028,0101); above 8, two bytes per value
    attributes: Mapping[str, object]  # keyword → value, what its SOP class asks for besides


@dataclass(frozen=True)
class Identity:
    """Who and what an image belongs to; all UIDs are given, so that equal seeds write equal bytes."""

    patient_id: str
    issuer: str
    study_uid: str
    series_uid: str
    sop_uid: str
    instance_number: int
    comment: str  # the report line, ImageComments (0020,4000)


_CHEST = {"BodyPartExamined": "CHEST", "ViewPosition": "PA"}
# PS3.3 C.8.11: a digital X-ray image says how its values relate to the X-rays; they fall where bone absorbs.
_DX = {
    **_CHEST,
    "PresentationIntentType": "FOR PRESENTATION",
    "PixelIntensityRelationship": "LOG",
    "PixelIntensityRelationshipSign": -1,
    "RescaleIntercept": 0,
    "RescaleSlope": 1,
    "RescaleType": "US",
    "PresentationLUTShape": "IDENTITY",
    "ImageLaterality": "U",
}

# The kinds of equipment a site may have. Ultrasound in grey is 8 bit by its SOP class (PS3.3 C.8.5.6).
MODALITIES: Mapping[str, tuple[Modality, ...]] = {
    "radiology": (
        Modality("CR", uid.ComputedRadiographyImageStorage, "MONOCHROME2", 12, _CHEST),
        Modality("CR", uid.ComputedRadiographyImageStorage, "MONOCHROME1", 12, _CHEST),
        Modality("DX", uid.DigitalXRayImageStorageForPresentation, "MONOCHROME2", 16, _DX),
    ),
    "dermatology": (
        Modality("DMS", uid.DermoscopicPhotographyImageStorage, "RGB", 8, {"BodyPartExamined": "SKIN"}),
        Modality("XC", uid.VLPhotographicImageStorage, "RGB", 8, {"BodyPartExamined": "SKIN"}),
    ),
    "emergency": (Modality("XC", uid.VLPhotographicImageStorage, "RGB", 8, {"BodyPartExamined": "SKIN"}),),
    "cardiology": (Modality("US", uid.UltrasoundImageStorage, "MONOCHROME2", 8, {"BodyPartExamined": "HEART"}),),
}


def dicom_object(image: NDArray[np.float32], modality: Modality, identity: Identity) -> Dataset:
    """Encode one image, explicit little endian and uncompressed, ready for ``Dataset.save_as``.

    Args:
        image: float32 in [0, 1], bright is bright: (S, S) grey, or (S, S, 3) where ``modality`` is RGB.
        modality: the equipment.
        identity: patient, study, series and instance.
    """
    pixels = quantise(image, modality.bits)
    if modality.photometric == "MONOCHROME1":  # the smallest value is displayed white
        pixels = np.uint16(2**modality.bits - 1) - pixels
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.ImageType = ["ORIGINAL", "PRIMARY"]
    ds.SOPClassUID = modality.sop_class
    ds.SOPInstanceUID = identity.sop_uid
    ds.StudyDate = ds.StudyTime = ds.AccessionNumber = ds.ReferringPhysicianName = ""
    ds.Modality = modality.code
    ds.Manufacturer = "clinifed phantoms"
    ds.PatientName = ds.PatientBirthDate = ds.PatientSex = ""
    ds.PatientID = identity.patient_id
    ds.IssuerOfPatientID = identity.issuer
    ds.PatientIdentityRemoved = "YES"
    ds.DeidentificationMethod = "drawn by a computer, no person was imaged"
    ds.StudyInstanceUID = identity.study_uid
    ds.SeriesInstanceUID = identity.series_uid
    ds.StudyID = ds.PatientOrientation = ""
    ds.SeriesNumber = 1
    ds.InstanceNumber = identity.instance_number
    ds.ImageComments = identity.comment
    ds.BurnedInAnnotation = "NO"
    ds.LossyImageCompression = "00"
    for keyword, value in modality.attributes.items():
        setattr(ds, keyword, value)
    if modality.photometric == "RGB":
        ds.AcquisitionContextSequence = Sequence()
    elif modality.bits > 8:
        ds.WindowCenter, ds.WindowWidth = 2 ** (modality.bits - 1), 2**modality.bits
    ds.set_pixel_data(
        pixels if modality.bits > 8 else pixels.astype(np.uint8),
        modality.photometric,
        modality.bits,
        generate_instance_uid=False,
    )
    return ds
