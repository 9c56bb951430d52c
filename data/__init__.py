"""Data: DICOM, PNG and JPEG files of one hospital to a manifest, and from it to patients."""
