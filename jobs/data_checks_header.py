"""The few attributes of a DICOM header that a check compares; they stay in memory and are never told."""

import warnings
from pathlib import Path

from pydicom import dcmread
from pydicom.filereader import read_file_meta_info
from pydicom.multival import MultiValue
from pydicom.uid import DeflatedExplicitVRLittleEndian

__all__ = ["MODALITIES", "PHOTOMETRIC", "read_header"]

# Defined terms of Modality (0008,0060), PS3.3 C.7.3.1.1.1, whose objects hold images.
MODALITIES = frozenset(
    (
        *(
            "BI",
            "BMD",
            "CR",
            "CT",
            "DG",
            "DMS",
            "DX",
            "ECG",
            "EPS",
            "ES",
            "GM",
            "HD",
            "IO",
            "IVOCT",
            "IVUS",
            "LS",
            "MG",
        ),
        *("MR", "NM", "OAM", "OCT", "OP", "OPM", "OPT", "OPTBSV", "OPTENF", "OT", "PT", "PX", "RF", "RG", "SC", "SM"),
        *("TG", "US", "VA", "XA", "XC"),
    )
)
# Defined terms of Photometric Interpretation (0028,0004), PS3.3 C.7.6.3.1.2.
PHOTOMETRIC = frozenset(
    ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
)

_KEYWORDS = (
    "Modality",
    "PhotometricInterpretation",
    "BurnedInAnnotation",
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "AccessionNumber",
    "StudyInstanceUID",
    "SOPInstanceUID",
)


def read_header(path: Path) -> dict[str, str]:
    """Keyword → text of what stands there; empty where the header cannot be read. Pixels are not read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they quote values
        try:
            # A deflated file would be inflated whole; decoding knows its limits and gives the reason.
            if read_file_meta_info(path).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
                return {}
            ds = dcmread(path, stop_before_pixels=True, specific_tags=list(_KEYWORDS))
            values = {name: ds.get(name) for name in _KEYWORDS}
            return {
                name: "\\".join(map(str, value)) if isinstance(value, MultiValue) else str(value)
                for name, value in values.items()
                if value
            }
        except Exception:  # a stranger's bytes; pydicom raises whatever they make it meet
            return {}
