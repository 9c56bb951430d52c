"""DICOM files made on the spot."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

REAL = Path(__file__).parents[2].parent / "shared/data/open"


@pytest.fixture
def real() -> Path:
    if not REAL.is_dir():
        pytest.skip("the folder of real images is not beside the project")
    return REAL


@pytest.fixture
def dicom() -> Callable[..., Path]:
    def make(
        path: Path, pixels: NDArray[np.generic] | None = None, photometric: str = "MONOCHROME2", bits: int = 8, **more
    ) -> Path:
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SpecificCharacterSet = "ISO_IR 192"
        ds.SOPClassUID, ds.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
        ds.PatientID, ds.IssuerOfPatientID = "P1", "HOSPITAL"
        if pixels is None:
            pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
        ds.set_pixel_data(pixels, photometric, bits)
        for keyword, value in more.items():
            setattr(ds, keyword, value)
        path.parent.mkdir(parents=True, exist_ok=True)
        ds.save_as(path, enforce_file_format=True)
        return path

    return make
