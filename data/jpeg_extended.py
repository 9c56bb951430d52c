"""JPEG Extended with 12 bits (process 4), which pydicom has no freely licensed decoder for: GDCM's, as its plugin.

pydicom declines GDCM for more than 8 bits; GDCM 3.2 decodes them, equal to DCMTK's values (tests/data/test_dicom.py).
"""

from importlib import import_module
from importlib.util import find_spec
from typing import cast

from pydicom.pixels.decoders.base import DecodeRunner, get_decoder
from pydicom.uid import JPEGExtended12Bit

__all__ = ["DECODER_DEPENDENCIES", "add_jpeg_extended", "is_available"]

_NAME = "clinifed"
# What pydicom asks of a module of plugins.
DECODER_DEPENDENCIES = {JPEGExtended12Bit: ("gdcm>=3.2",)}


def is_available(uid: str) -> bool:
    """Whether GDCM is installed."""
    return uid == JPEGExtended12Bit and find_spec("gdcm") is not None


def add_jpeg_extended() -> None:
    """Make pydicom use this for the transfer syntax, once; nothing where GDCM is not installed."""
    decoder = get_decoder(JPEGExtended12Bit)
    if _NAME not in decoder.available_plugins and is_available(JPEGExtended12Bit):
        decoder.add_plugin(_NAME, (__name__, "decode_frame"))


def decode_frame(src: bytes, runner: DecodeRunner) -> bytes:
    """One codestream, grey, 9 to 12 bits in 16; pydicom asks its other plugins where this raises."""
    gdcm = import_module("gdcm")
    if runner.samples_per_pixel != 1 or runner.bits_allocated != 16 or runner.bits_stored <= 8:
        raise NotImplementedError("grey with 9 to 12 bits only")
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(src)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((runner.columns, runner.rows, 1))
    image.SetDataElement(element)
    kind = gdcm.PhotometricInterpretation.GetPIType(str(runner.photometric_interpretation))
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(kind))
    syntax = gdcm.TransferSyntax.GetTSType(str.__str__(JPEGExtended12Bit))
    image.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    image.SetPixelFormat(
        gdcm.PixelFormat(1, 16, runner.bits_stored, runner.bits_stored - 1, runner.pixel_representation)
    )
    return cast(bytes, image.GetBuffer().encode("utf-8", "surrogateescape"))
