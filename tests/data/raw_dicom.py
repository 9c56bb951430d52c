"""DICOM and PNG files byte by byte, so that they can lie: elements, fragments, codestreams."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

UNDEFINED = 0xFFFFFFFF
NATIVE, IMPLICIT, BIG = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
DEFLATED, RLE = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5"
JPEG, JPEG_LL, JPEG_LS = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.80"
J2K, HTJ2K = "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.201"
LONG = ("OB", "OW", "OF", "OD", "OL", "SQ", "UC", "UN", "UR", "UT")
SIZE = 32
SMOOTH = np.add.outer(np.arange(SIZE) * 5, np.arange(SIZE) * 3).astype(np.uint8)
PICTURE = SMOOTH.astype(np.float32) / 255


def el(tag: int, vr: str, value: bytes, length: int | None = None) -> bytes:
    """One element, explicit little endian; ``length`` lies."""
    value += (b"\0" if vr in ("UI", "OB", "UN") else b" ") * (len(value) % 2)
    length = len(value) if length is None else length
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr.encode("latin-1")
    return head + (struct.pack("<HL", 0, length) if vr in LONG else struct.pack("<H", length & 0xFFFF)) + value


def us(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}H", *(v & 0xFFFF for v in values))


def item(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<HHL", 0xFFFE, 0xE000, len(content) if length is None else length) + content


END_ITEM, END_SEQUENCE = struct.pack("<HHL", 0xFFFE, 0xE00D, 0), struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)

Elements = dict[int, bytes]


def elements(**change: bytes | int) -> Elements:
    """A small grey image; keywords change the value of an element of group 0028 or the identities."""
    of: dict[str, tuple[int, str, bytes]] = {
        "charset": (0x00080005, "CS", b"ISO_IR 192"),
        "sop_class": (0x00080016, "UI", b"1.2.840.10008.5.1.4.1.1.7"),
        "sop": (0x00080018, "UI", b"1.2.3.4"),
        "modality": (0x00080060, "CS", b"OT"),
        "name": (0x00100010, "PN", b"PLANTED^NAME"),
        "patient": (0x00100020, "LO", b"PLANTED-1"),
        "study": (0x0020000D, "UI", b"1.2.3"),
        "series": (0x0020000E, "UI", b"1.2.3.5"),
        "samples": (0x00280002, "US", us(1)),
        "photometric": (0x00280004, "CS", b"MONOCHROME2"),
        "rows": (0x00280010, "US", us(SIZE)),
        "columns": (0x00280011, "US", us(SIZE)),
        "allocated": (0x00280100, "US", us(8)),
        "stored": (0x00280101, "US", us(8)),
        "high": (0x00280102, "US", us(7)),
        "signed": (0x00280103, "US", us(0)),
        "pixels": (0x7FE00010, "OW", SMOOTH.tobytes()),
    }
    optional = {
        "frames": (0x00280008, "IS"),
        "planar": (0x00280006, "US"),
        "spacing": (0x00280030, "DS"),
        "aspect": (0x00280034, "IS"),
        "padding": (0x00280120, "US"),
        "center": (0x00281050, "DS"),
        "width": (0x00281051, "DS"),
        "intercept": (0x00281052, "DS"),
        "slope": (0x00281053, "DS"),
        "function": (0x00281056, "CS"),
    }
    for key, value in change.items():
        tag, vr = of[key][:2] if key in of else optional[key]
        of[key] = (tag, vr, us(value) if isinstance(value, int) else value)
    return {tag: el(tag, vr, value) for tag, vr, value in of.values()}


def part10(content: Elements | bytes, syntax: str = NATIVE, preamble: bytes = b"") -> bytes:
    """A DICOM file."""
    meta = el(0x00020001, "OB", b"\0\1") + el(0x00020002, "UI", b"1.2.840.10008.5.1.4.1.1.7")
    meta += el(0x00020003, "UI", b"1.2.3.4") + el(0x00020010, "UI", syntax.encode()) + el(0x00020012, "UI", b"1.2")
    head = preamble[:128].ljust(128, b"\0") + b"DICM" + el(0x00020000, "UL", struct.pack("<L", len(meta))) + meta
    return head + (b"".join(content[tag] for tag in sorted(content)) if isinstance(content, dict) else content)


def encapsulated(*fragments: bytes, table: bytes = b"", end: bytes = END_SEQUENCE) -> bytes:
    return el(
        0x7FE00010, "OB", item(table) + b"".join(item(f + b"\0" * (len(f) % 2)) for f in fragments) + end, UNDEFINED
    )


def encoded(form: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(SMOOTH).save(out, form, **options)  # type: ignore[arg-type]
    return out.getvalue()


def rle_of(plane: bytes) -> bytes:
    """One RLE segment of literal runs."""
    packed = b"".join(bytes([len(part) - 1]) + part for part in (plane[i : i + 128] for i in range(0, len(plane), 128)))
    return struct.pack("<16L", 1, 64, *([0] * 14)) + packed + b"\0" * (len(packed) % 2)


def jpeg_ls() -> bytes | None:
    try:
        import jpeg_ls
    except ImportError:
        return None
    return bytes(jpeg_ls.encode(SMOOTH))


def codestreams() -> dict[str, tuple[str, bytes]]:
    """Name → transfer syntax and codestream."""
    found = {
        "jpeg": (JPEG, encoded("JPEG", quality=95)),
        "j2k": (J2K, encoded("JPEG2000", no_jp2=True)),
        "rle": (RLE, rle_of(SMOOTH.tobytes())),
    }
    if (lossless := jpeg_ls()) is not None:
        found["jls"] = (JPEG_LS, lossless)
    return found


def compressed(
    syntax: str, *fragments: bytes, table: bytes = b"", end: bytes = END_SEQUENCE, **change: bytes | int
) -> bytes:
    return part10({**elements(**change), 0x7FE00010: encapsulated(*fragments, table=table, end=end)}, syntax)


def deflate(content: bytes, level: int = 9) -> bytes:
    packer = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(content) + packer.flush()


def plain(content: Elements) -> bytes:
    return b"".join(content[tag] for tag in sorted(content))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">L", len(content)) + kind + content + struct.pack(">L", zlib.crc32(kind + content))


def png(width: int, height: int, pixels: bytes, extra: bytes = b"", value: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">LLBBBBB", width, height, 8, 0, 0, 0, 0))
    more = chunk(extra, value) if extra else b""
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def raw_rows() -> bytes:
    return zlib.compress(b"".join(b"\0" + row.tobytes() for row in SMOOTH))


def sequence(tag: int, content: bytes, length: int | None = None) -> bytes:
    return el(tag, "SQ", content, length)


def implicit() -> bytes:
    out = b""
    for tag, element in sorted(elements().items()):
        vr = element[4:6].decode()
        value = element[12:] if vr in LONG else element[8:]
        out += struct.pack("<HHL", tag >> 16, tag & 0xFFFF, len(value)) + value
    return out
