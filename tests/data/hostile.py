"""Files that attack: over 200 of them, made byte by byte from a seed, each with what may become of it.

``truth`` is None where a file must be refused, an array where nothing but that picture may come out (refusing it is
right as well, unless ``readable``), and ``PYDICOM`` where pydicom's own array, displayed, decides.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .raw_dicom import (
    BIG,
    DEFLATED,
    END_ITEM,
    END_SEQUENCE,
    HTJ2K,
    IMPLICIT,
    J2K,
    JPEG,
    PICTURE,
    RLE,
    SIZE,
    SMOOTH,
    UNDEFINED,
    codestreams,
    compressed,
    deflate,
    el,
    elements,
    encoded,
    implicit,
    item,
    part10,
    plain,
    png,
    raw_rows,
    sequence,
    us,
)

PYDICOM = "pydicom"
Truth = NDArray[np.float32] | Literal["pydicom"] | None


@dataclass(frozen=True)
class Hostile:
    name: str  # of the file, with its suffix
    content: bytes
    truth: Truth = None
    readable: bool = False  # must not be refused


def truncations(rng: np.random.Generator) -> Iterator[Hostile]:
    """Cut anywhere, also in the last byte: never a picture, never half a patient."""
    whole = {
        "grey": part10(elements()),
        "implicit": part10(implicit(), IMPLICIT),
        "frames": part10(elements(frames=b"3", pixels=SMOOTH.tobytes() * 3)),
        "deflated": part10(deflate(plain(elements())), DEFLATED),
        **{name: compressed(syntax, stream) for name, (syntax, stream) in codestreams().items()},
    }
    for name, content in whole.items():
        cuts = {1, 100, 131, 132, 200, len(content) - 1, len(content) - 2, len(content) - 9}
        cuts |= {int(cut) for cut in rng.integers(300, len(content), 6)}
        for cut in sorted(cuts):
            yield Hostile(f"cut-{name}-{cut}.dcm", content[:cut])


def bombs() -> Iterator[Hostile]:
    nothing = bytes(1 << 20)
    for mib in (65, 100):
        packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        body = packer.compress(plain(elements(pixels=b""))[:-12] + el(0x00420011, "OB", b"", (mib << 20)))
        body += b"".join(packer.compress(nothing) for _ in range(mib)) + packer.flush()
        yield Hostile(f"bomb-deflate-{mib}.dcm", part10(body, DEFLATED))
        meta_hidden = part10(body, DEFLATED).replace(
            el(0x00020010, "UI", DEFLATED.encode()),
            el(0x00020002, "OB", bytes(8000)) + el(0x00020010, "UI", DEFLATED.encode()),
        )
        yield Hostile(f"bomb-deflate-hidden-{mib}.dcm", meta_hidden)
    huge = 60000
    stream = bytearray(codestreams()["j2k"][1])
    struct.pack_into(">LL", stream, 8, huge, huge)
    yield Hostile("bomb-j2k-siz.dcm", compressed(J2K, bytes(stream)))
    yield Hostile("bomb-j2k-siz-declared.dcm", compressed(J2K, bytes(stream), rows=huge, columns=huge))
    struct.pack_into(">LL", stream, 8, 4000, 4000)
    yield Hostile("bomb-j2k-4000.dcm", compressed(J2K, bytes(stream), rows=4000, columns=4000), PYDICOM)
    struct.pack_into(">LL", stream, 24, 1, 1)
    yield Hostile("bomb-j2k-tiles.dcm", compressed(J2K, bytes(stream), rows=4000, columns=4000), PYDICOM)
    picture = bytearray(encoded("JPEG"))
    at = picture.index(b"\xff\xc0")
    struct.pack_into(">HH", picture, at + 5, 65500, 65500)
    yield Hostile("bomb-jpeg-sof.dcm", compressed(JPEG, bytes(picture)))
    yield Hostile("bomb-jpeg.jpg", bytes(picture))
    run = struct.pack("<16L", 1, 64, *([0] * 14)) + bytes([129, 0]) * (4 << 20)
    yield Hostile("bomb-rle.dcm", compressed(RLE, run), PYDICOM)
    yield Hostile("bomb-png-header.png", png(65535, 65535, b""))
    yield Hostile("bomb-png.png", png(20000, 20000, zlib.compress(bytes(20001 * 2000), 9)))
    yield Hostile(
        "bomb-png-text.png", png(SIZE, SIZE, raw_rows(), b"zTXt", b"k\0\0" + zlib.compress(bytes(100 << 20), 9))
    )
    yield Hostile(
        "bomb-png-icc.png", png(SIZE, SIZE, raw_rows(), b"iCCP", b"k\0\0" + zlib.compress(bytes(100 << 20), 9))
    )
    yield Hostile("many-elements.dcm", part10(b"".join(el(0x00090000 | n, "US", us(n)) for n in range(0x10, 0xFFFF))))
    yield Hostile(
        "many-items.dcm", part10({**elements(), 0x00081140: sequence(0x00081140, item(b"") * 300_000)}), PICTURE
    )
    yield Hostile("many-fragments.dcm", compressed(JPEG, *([b""] * 300_000)))


def sizes() -> Iterator[Hostile]:
    """Headers whose numbers are out of range, or contradict the pixel data."""
    refused: list[dict[str, bytes | int]] = [
        *({"rows": n} for n in (0, 33, 64, 65535)),
        *({"columns": n} for n in (0, 33, 1000, 65535)),
        {"rows": 65535, "columns": 65535},
        *({"frames": text} for text in (b"-1", b"2", b"1000000000", b"1A", b"9" * 12, b"1e3", b"1\\2")),
        *({"samples": n} for n in (2, 3, 4, 255, 65535)),
        *({"allocated": n} for n in (0, 3, 7, 12, 16, 17, 24, 32, 64, 128, 65535)),
        *({"stored": n} for n in (0, 9, 16, 255)),
        {"signed": 2},
        {"samples": 3, "photometric": b"RGB", "planar": 0},
        {"samples": 3, "photometric": b"YBR_FULL_422", "planar": 0},
        {"pixels": b""},
        {"pixels": SMOOTH.tobytes()[:-2]},
        {"rows": us(32, 32)},
        {"rows": b"\x20"},
        *({"photometric": text} for text in (b"FOOBAR", b"RGB", b"YBR_FULL", b"PALETTE COLOR", b"", b"\xff\xfe")),
    ]
    for number, change in enumerate(refused):
        yield Hostile(f"size-{number}-{'-'.join(change)}.dcm", part10(elements(**change)))
    for number, change in enumerate([{"frames": b"0"}, {"frames": b"1"}, {"frames": b""}, {"high": 15}, {"high": 0}]):
        yield Hostile(f"odd-{number}.dcm", part10(elements(**change)), PICTURE)
    yield Hostile("excess.dcm", part10(elements(pixels=SMOOTH.tobytes() + bytes(5000))), PICTURE)
    yield Hostile("stored-4.dcm", part10(elements(stored=4, high=3)), (SMOOTH & 15).astype(np.float32) / 15)


EVIL = (
    b"../../../../tmp/hostile-written",
    b"/etc/passwd",
    b"..\\..\\hostile",
    b"=cmd|' /C calc'!A0",
    b"<img src=x onerror=alert(1)>",
    b"$(touch hostile-written)",
    b"`touch hostile-written`",
    "abc\u202egpj.exe".encode(),
    b"nul\0byte",
    b"a" * 5000,
    b"%n%n%s",
    b"",
)


def identities() -> Iterator[Hostile]:
    """Ids that are paths, formulas or commands: the picture is as good as any."""
    for number, text in enumerate(EVIL):
        for key in ("sop", "patient", "study"):
            yield Hostile(f"id-{key}-{number}.dcm", part10(elements(**{key: text})), PICTURE, readable=len(text) < 5000)


def polyglots() -> Iterator[Hostile]:
    for name, start in {
        "elf": b"\x7fELF\x02\x01\x01",
        "mz": b"MZ\x90\0",
        "html": b"<html><script>alert(1)</script>",
        "php": b"<?php system('id'); ?>",
        "pdf": b"%PDF-1.7\n",
        "tiff": b"II*\0\x80\0\0\0",
        "gif": b"GIF89a",
        "sh": b"#!/bin/sh\ntouch hostile-written\n",
        "zip": b"PK\x03\x04",
    }.items():
        yield Hostile(f"poly-{name}.dcm", part10(elements(), preamble=start), PICTURE, readable=True)
    tail = b"PK\x03\x04" + bytes(26) + b"../../evil.txt" + b"PK\x05\x06" + bytes(18)
    yield Hostile("poly-zip-tail.dcm", part10(elements()) + tail, PICTURE, readable=True)
    yield Hostile("poly-png.png", part10(elements()), PICTURE, readable=True)
    yield Hostile("poly-png.dcm", encoded("PNG"))


def nested(depth: int, *, defined: bool) -> bytes:
    content = b""
    for _ in range(depth):
        if defined:
            content = sequence(0x00081140, item(content))
        else:
            content = sequence(0x00081140, item(content + END_ITEM, UNDEFINED) + END_SEQUENCE, UNDEFINED)
    return content


def structures() -> Iterator[Hostile]:
    """Nesting, VRs, lengths and delimiters."""
    for depth in (50, 500, 3000, 30000):
        yield Hostile(
            f"nested-undefined-{depth}.dcm", part10({**elements(), 0x00081140: nested(depth, defined=False)}), PICTURE
        )
    for depth in (50, 500, 2000):
        yield Hostile(
            f"nested-defined-{depth}.dcm", part10({**elements(), 0x00081140: nested(depth, defined=True)}), PICTURE
        )
    deep = nested(1500, defined=False)
    yield Hostile("nested-groups.dcm", part10({**elements(), 0x52009229: sequence(0x52009229, item(deep))}), PICTURE)
    for vr in ("??", "ZZ", "us", "\0\0", "\xff\xff", "  "):
        yield Hostile(
            f"vr-{vr.encode('latin-1').hex()}.dcm",
            part10({**elements(), 0x00280010: el(0x00280010, vr, us(SIZE))}),
            PICTURE,
        )
    for vr in ("UT", "SQ", "US", "??", "OB", "UN", "OF"):
        yield Hostile(
            f"vr-pixels-{vr.encode().hex()}.dcm",
            part10({**elements(), 0x7FE00010: el(0x7FE00010, vr, SMOOTH.tobytes())}),
            PICTURE,
        )
    for vr in ("SQ", "UN", "OB", "UT"):
        open_end = el(0x00081140, vr, b"", UNDEFINED)
        yield Hostile(f"endless-{vr}.dcm", part10({**elements(), 0x00081140: open_end}))
        yield Hostile(f"endless-item-{vr}.dcm", part10({**elements(), 0x00081140: open_end + item(b"", UNDEFINED)}))
    stray = {**elements(), 0x00090010: END_SEQUENCE}
    yield Hostile("stray-delimiter.dcm", part10(stray))
    yield Hostile("stray-item-end.dcm", part10({**elements(), 0x00090010: END_ITEM}))
    for tag, vr in ((0x00081030, "LO"), (0x00104000, "LT"), (0x00090010, "UN"), (0x00281050, "DS")):
        for length in (300, 1500, 65534, 0xFFFFFFF0, 0x7FFFFFFF):
            yield Hostile(f"overrun-{tag:08x}-{length:x}.dcm", part10({**elements(), tag: el(tag, vr, b"1 ", length)}))
    for length in (1, 1022, 1026, 0x7FFFFFFE, 0xFFFFFFFE):
        yield Hostile(
            f"overrun-pixels-{length:x}.dcm",
            part10({**elements(), 0x7FE00010: el(0x7FE00010, "OW", SMOOTH.tobytes(), length)}),
        )
    yield Hostile(
        "undefined-pixels.dcm", part10({**elements(), 0x7FE00010: el(0x7FE00010, "OW", SMOOTH.tobytes(), UNDEFINED)})
    )
    parts = elements()
    twice = plain(parts).replace(parts[0x00100020], parts[0x00100020] + el(0x00100020, "LO", b"OTHER-2"))
    yield Hostile("patient-twice.dcm", part10(twice))
    late = plain({tag: value for tag, value in parts.items() if tag != 0x00100020})
    yield Hostile("patient-late.dcm", part10(late[: -len(parts[0x7FE00010])] + parts[0x00100020] + parts[0x7FE00010]))
    yield Hostile("pixels-twice.dcm", part10(plain(parts) + el(0x7FE00010, "OW", bytes(1024))), PICTURE)
    yield Hostile("no-meta.dcm", bytes(128) + b"DICM" + plain(parts), PICTURE)
    yield Hostile("wrong-endian.dcm", part10(plain(parts), BIG))
    yield Hostile("says-implicit.dcm", part10(plain(parts), IMPLICIT), PICTURE)
    yield Hostile("says-explicit.dcm", part10(implicit()), PICTURE)
    for syntax in ("1.2.3", "1.2.840.10008.1.2.4.100", "1.2.840.10008.1.2.4.110", "../../x", "", JPEG, J2K, RLE, HTJ2K):
        yield Hostile(f"syntax-{len(syntax)}-{syntax[-3:].replace('/', '_')}.dcm", part10(plain(parts), syntax))


def encapsulations() -> Iterator[Hostile]:
    """Fragments and offset tables that lie, codestreams of another image."""
    for name, (syntax, stream) in codestreams().items():
        good = compressed(syntax, stream)
        yield Hostile(f"whole-{name}.dcm", good, PYDICOM, readable=True)
        yield Hostile(f"no-end-{name}.dcm", compressed(syntax, stream, end=b""))
        yield Hostile(f"wrong-end-{name}.dcm", compressed(syntax, stream, end=END_ITEM))
        yield Hostile(f"no-fragment-{name}.dcm", compressed(syntax))
        yield Hostile(f"empty-fragment-{name}.dcm", compressed(syntax, b""))
        yield Hostile(f"half-{name}.dcm", compressed(syntax, stream[: len(stream) // 2]))
        yield Hostile(f"two-frames-{name}.dcm", compressed(syntax, stream, frames=b"2"))
        yield Hostile(f"rows-{name}.dcm", compressed(syntax, stream, rows=33))
        yield Hostile(f"samples-{name}.dcm", compressed(syntax, stream, samples=3, photometric=b"RGB", planar=0))
        for number, table in enumerate(
            (us(8, 0), us(2, 0), b"\0\0\0", us(0, 0x4000), us(0, 0) * 2, b"\0" * 4 + us(9, 0))
        ):
            yield Hostile(f"table-{number}-{name}.dcm", compressed(syntax, stream, table=table), PYDICOM)
        beyond = part10(
            {
                **elements(),
                0x7FE00010: el(0x7FE00010, "OB", item(b"") + item(stream, 1 << 30) + END_SEQUENCE, UNDEFINED),
            },
            syntax,
        )
        yield Hostile(f"fragment-beyond-{name}.dcm", beyond)
        for other, (_, foreign) in codestreams().items():
            if other != name:
                yield Hostile(f"is-{other}-says-{name}.dcm", compressed(syntax, foreign))


def corrupt(rng: np.random.Generator) -> Iterator[Hostile]:
    """Bytes of a codestream changed, its frame header left alone or not."""
    for name, (syntax, stream) in codestreams().items():
        for number in range(14):
            bad = bytearray(stream)
            first = 0 if number < 4 else min(120, len(bad) // 2)
            for at in rng.integers(first, len(bad), int(rng.integers(1, 40))):
                bad[at] = rng.integers(0, 256)
            yield Hostile(f"corrupt-{name}-{number}.dcm", compressed(syntax, bytes(bad)), PYDICOM)


def tables() -> Iterator[Hostile]:
    """Lookup tables and numbers of the display."""

    def lut(descriptor: bytes, data: bytes, tag: int = 0x00283010) -> bytes:
        return sequence(tag, item(el(0x00283002, "US", descriptor) + el(0x00283006, "OW", data)))

    for number, (descriptor, data) in enumerate(
        [
            (us(0, 0, 16), bytes(100)),
            (us(256, 0, 0), bytes(512)),
            (us(256, 0, 64), bytes(512)),
            (us(256, 0), bytes(512)),
            (us(256, 0, 16, 4), bytes(512)),
            (us(256, 0, 8), us(*([65535] * 256))),
            (b"", bytes(512)),
            (us(256, 0, 16), b""),
        ]
    ):
        for tag in (0x00283000, 0x00283010):
            yield Hostile(f"lut-{number}-{tag:x}.dcm", part10({**elements(), tag: lut(descriptor, data, tag)}))
    yield Hostile("lut-no-item.dcm", part10({**elements(), 0x00283010: sequence(0x00283010, b"")}), PICTURE)
    yield Hostile("lut-empty-item.dcm", part10({**elements(), 0x00283010: sequence(0x00283010, item(b""))}))
    colours = (0x00281101, 0x00281102, 0x00281103)

    def paletted(descriptor: bytes, data: bytes, first: int, others: bytes | None = None) -> bytes:
        more = {tag: el(tag, "US", descriptor) for tag in colours}
        more |= {first + n: el(first + n, "OW", data if n == 0 or others is None else others) for n in range(3)}
        return part10({**elements(photometric=b"PALETTE COLOR"), **more})

    for number, (descriptor, data) in enumerate(
        [
            (us(256, 0, 16), bytes(20)),
            (us(256, 0, 12), bytes(512)),
            (us(256, 0), bytes(512)),
            (us(0, 0, 16), bytes(512)),
        ]
    ):
        yield Hostile(f"palette-{number}.dcm", paletted(descriptor, data, 0x00281201))
    yield Hostile("palette-uneven.dcm", paletted(us(256, 0, 16), bytes(512), 0x00281201, bytes(100)))
    for number, words in enumerate(
        [
            (0, 1, 5) + (1, 65535, 9) * 200,
            (2, 65535, 0, 0) * 50,
            (0, 1, 1, 2, 1, 6, 0),
            (1, 10, 20),
            (7, 7, 7),
            (0, 65535, 1),
        ]
    ):
        yield Hostile(f"segmented-{number}.dcm", paletted(us(256, 0, 16), us(*words), 0x00281221))
    for number, change in enumerate(
        [
            *({"slope": text, "intercept": b"0"} for text in (b"0", b"NaN", b"inf", b"1e400", b"abc", b"1\\2")),
            *({"slope": b"1", "intercept": text} for text in (b"NaN", b"-inf", b"1e39", b"x")),
            *({"center": b"1", "width": text} for text in (b"-5", b"NaN", b"1e-30", b"y")),
            *({"center": text, "width": b"100"} for text in (b"inf", b"NaN", b"1e309")),
            {"center": b"5", "width": b"9", "function": b"EVIL"},
            *({"aspect": text} for text in (b"1\\1000000", b"60000\\1")),
        ]
    ):
        yield Hostile(f"display-{number}-{'-'.join(change)}.dcm", part10(elements(**change)))
    for number, change in enumerate(
        [
            {"center": b"1", "width": b"0"},
            {"aspect": b"0\\0"},
            {"aspect": b"-1\\1"},
            {"spacing": b"nan\\1"},
            {"spacing": b"0\\0"},
            {"padding": 65535},
        ]
    ):
        yield Hostile(f"harmless-{number}.dcm", part10(elements(**change)), PICTURE)
    for number, text in enumerate(
        (b"KLINGON", b"ISO 2022 IR 87\\" * 500, b"\xff\xfe", b"ISO_IR 192\\ISO 2022 IR 999", b"")
    ):
        yield Hostile(f"charset-{number}.dcm", part10(elements(charset=text, name=b"\x1b$B\x1b(J\xff\x1b")), PICTURE)


def others() -> Iterator[Hostile]:
    """No DICOM, or no image, whatever they are named."""
    for name, content in {
        "empty": b"",
        "text": b"no image at all\n" * 60,
        "zip": b"PK\x03\x04" + bytes(500),
        "preamble": bytes(128) + b"DICM",
        "garbage": bytes(128) + b"DICM" + bytes(range(256)) * 40,
        "elf": b"\x7fELF" + bytes(4000),
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(hostile-written) (w) file\n",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>",
    }.items():
        for suffix in (".dcm", ".png"):
            yield Hostile(f"is-{name}{suffix}", content)
    for form in ("GIF", "BMP", "TIFF", "PPM", "JPEG2000"):
        yield Hostile(f"is-{form.lower()}.png", encoded(form))
    for form, suffix in (("PNG", ".png"), ("JPEG", ".jpg")):
        whole = encoded(form)
        for share in (0.1, 0.5, 0.9):
            # A PNG has all of its pixels before its last chunks.
            yield Hostile(f"cut-{share}{suffix}", whole[: int(len(whole) * share)], PICTURE if form == "PNG" else None)
    yield Hostile("crc.png", png(SIZE, SIZE, raw_rows())[:-20] + bytes(20))
    yield Hostile("zero.png", png(0, 0, b""))
    yield Hostile("good.png", encoded("PNG"), PICTURE, readable=True)


def corpus(seed: int = 6) -> list[Hostile]:
    """All of them."""
    rng = np.random.default_rng(seed)
    return [
        *truncations(rng),
        *bombs(),
        *sizes(),
        *identities(),
        *polyglots(),
        *structures(),
        *encapsulations(),
        *corrupt(rng),
        *tables(),
        *others(),
    ]


def declared_by_pydicom(file: Hostile, path: Path) -> NDArray[np.float32] | None:
    """What pydicom's own reader and decoder make of an 8-bit grey image, displayed over its stored range.

    The codec is the one that we ask as well; None: pydicom refuses the file.
    """
    import warnings

    import pydicom
    from pydicom.pixels import pixel_array

    from clinifed.data.pixel_data import PREFERRED

    path.write_bytes(file.content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ds = pydicom.dcmread(path)
            plugin = PREFERRED.get(str(ds.file_meta.TransferSyntaxUID), "")
            array = pixel_array(ds, index=0, decoding_plugin=plugin)
        except Exception:
            return None
    return array.astype(np.float32) / 255
