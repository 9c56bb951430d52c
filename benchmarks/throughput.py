"""DICOM → kept embedding against the bare forward pass, at BiomedCLIP's size; and memory over many images.

``python benchmarks/throughput.py`` writes its section of ``RESULTS.md``.

The reader, the cache and the forward pass run as in training; the forward pass alone is timed on the same batches,
decoded before. Both are timed in turns, so that a busy machine is busy for both.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import psutil

SIZE_PX = 2048  # of a computed radiograph; 12 bits stored
BATCH = 16
STEPS = (1_000, 5_000, 10_000)


def radiographs(folder: Path, count: int, size: int, *, rle: bool = False) -> Path:
    """A manifest of ``count`` radiographs: a drawn chest, enlarged, with noise of its own, as CR objects."""
    from PIL import Image
    from pydicom.uid import RLELossless, generate_uid

    from clinifed.data.manifest import Record, write_manifest
    from clinifed.data.modalities import MODALITIES, Identity, dicom_object

    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    base = np.asarray(Image.fromarray(np.hypot(*np.mgrid[-1:1:64j, -1:1:64j]).astype(np.float32)).resize((size, size)))
    records = []
    for number in range(count):
        noisy = np.clip(base / 1.5 + 0.05 * rng.standard_normal((size, size), np.float32), 0, 1).astype(np.float32)
        identity = Identity(f"{number}", "BENCH", *(generate_uid() for _ in range(3)), 1, "")
        ds = dicom_object(noisy, MODALITIES["radiology"][0], identity)
        if rle:
            ds.compress(RLELossless)
        name = f"images/{number:020x}.dcm"
        ds.save_as(folder / name, enforce_file_format=True)
        records.append(
            Record(name, f"{number // 2:020x}", "radiology", ("normal", "abnormal")[number % 2], "", "train")
        )
    return write_manifest(folder / "manifest.csv", records, "synthetic").path


def _model(ref: str):
    from clinifed.config import Training
    from clinifed.models.adapters import FrozenPart, build_trainable
    from clinifed.models.backbone import load_backbone
    from clinifed.models.specialties import SPECIALTIES

    backbone = load_backbone(ref)
    mine = {"radiology": SPECIALTIES["radiology"]}
    return backbone, mine, FrozenPart(backbone, build_trainable(backbone, mine, Training(train="heads")).eval())


def measure(ref: str, path: Path, cache: Path, turns: int) -> dict[str, float]:
    """Images/s of the whole way and of the forward pass alone, in turns on the same images."""
    import torch

    from clinifed.data.dataset import iter_pixels
    from clinifed.data.manifest import read_manifest
    from clinifed.executors.features import patient_tensors

    backbone, mine, model = _model(ref)
    manifest = read_manifest(path)
    count = len(manifest.records)
    began = time.perf_counter()
    batches = [batch.pixels for batch in iter_pixels(manifest, manifest.records, backbone.preprocess, BATCH)]
    decode = time.perf_counter() - began
    with torch.no_grad():
        model.features(batches[0])  # the first pass allocates
    bare, whole, kept = [], [], []
    busy = {"bare": 0.0, "whole": 0.0}  # CPU seconds, of the readers' processes too
    for turn in range(turns):
        began, worked = time.perf_counter(), cpu_s()
        with torch.no_grad():
            for pixels in batches:
                model.features(pixels)
        bare.append(time.perf_counter() - began)
        busy["bare"] += cpu_s() - worked
        for where in (whole, kept):
            began, worked = time.perf_counter(), cpu_s()
            patient_tensors(model, backbone, manifest, mine, split="train", batch_size=BATCH, cache=cache / str(turn))
            where.append(time.perf_counter() - began)
            if where is whole:
                busy["whole"] += cpu_s() - worked
    return {
        "images": count,
        "bare": count / median(bare),
        "whole": count / median(whole),
        "kept": count / median(kept),
        "decode_alone": count / decode,
        "ratio_cpu": busy["bare"] / busy["whole"],
        "ratio": median(b / w for b, w in zip(bare, whole, strict=True)),
        "ratio_low": min(b / w for b, w in zip(bare, whole, strict=True)),
        "ratio_high": max(b / w for b, w in zip(bare, whole, strict=True)),
    }


def stages(ref: str, path: Path, count: int = 8) -> dict[str, float]:
    """CPU milliseconds of each stage for one image, one thread: what no other load on the machine can flatter."""
    import torch

    from clinifed.data.dicom import read_pixels
    from clinifed.data.manifest import read_manifest
    from clinifed.data.transforms import transform
    from clinifed.files import file_sha256

    backbone, _, model = _model(ref)
    manifest, apply = read_manifest(path), transform(backbone.preprocess)
    files = [manifest.folder / record.image for record in manifest.records[:count]]
    pictures = [read_pixels(file) for file in files]
    batch = torch.stack([torch.as_tensor(np.asarray(apply(picture))) for picture in pictures])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    took = {}
    try:
        with torch.no_grad():
            for name, run in {
                "hash": lambda: [file_sha256(file) for file in files],
                "read": lambda: [read_pixels(file) for file in files],
                "transform": lambda: [apply(picture) for picture in pictures],
                "forward": lambda: model.features(batch),
            }.items():
                run()
                began = time.process_time()
                run()
                took[name] = 1000 * (time.process_time() - began) / len(files)
    finally:
        torch.set_num_threads(threads)
    return took


def memory(path: Path, cache: Path) -> list[tuple[int, float]]:
    """(images encoded, MB of this process and its children) on the tiny model, through the whole way."""
    from clinifed.data.manifest import read_manifest
    from clinifed.executors import features

    backbone, mine, model = _model("tiny")
    manifest = read_manifest(path)
    seen, rows = 0, []
    forward = model.features

    def noted(pixels):
        nonlocal seen
        seen += len(pixels)
        if any(seen - len(pixels) < step <= seen for step in STEPS) or seen == len(manifest.records):
            gc.collect()
            rows.append((seen, resident()))
        return forward(pixels)

    model.features = noted
    began = time.perf_counter()
    features.patient_tensors(model, backbone, manifest, mine, split="train", batch_size=64, cache=cache)
    rows.append((-1, time.perf_counter() - began))
    size = sum(file.stat().st_size for file in cache.iterdir())
    rows.append((-2, size / len(manifest.records)))
    return rows


def cpu_s() -> float:
    """CPU seconds of this process and of the processes that it started and that live."""
    times = [process.cpu_times() for process in [psutil.Process(), *psutil.Process().children(recursive=True)]]
    return sum(t.user + t.system for t in times)


def resident() -> float:
    """MB of this process and of what it started (PSS: shared pages are counted once)."""
    me = psutil.Process()
    return sum(process.memory_full_info().pss for process in [me, *me.children(recursive=True)]) / 1e6


def _lines(figures: dict[str, float], busy: tuple[float, float], compressed: bool) -> Iterator[str]:
    kind = "RLE-compressed" if compressed else "uncompressed"
    yield (
        f"DICOM → kept embedding, ViT-B/16 with random weights, {int(figures['images'])} drawn radiographs of "
        f"{SIZE_PX} × {SIZE_PX}, 12 bit, {kind}, batches of {BATCH}; the median of turns, each of which times both. "
        f"Load of the machine before and after: {busy[0]:.1f} and {busy[1]:.1f} (2 cores: below 1 is quiet)."
    )
    yield ""
    yield "| what | images/s | ratio to the forward pass |"
    yield "|---|---|---|"
    yield f"| forward pass alone, on batches in memory | {figures['bare']:.2f} | 1 |"
    yield (
        f"| files → features, kept (hash, decode, transform, forward, shards) | {figures['whole']:.2f} | "
        f"{figures['ratio']:.2f} ({figures['ratio_low']:.2f}–{figures['ratio_high']:.2f}) |"
    )
    yield (
        "| the same by CPU seconds of all processes (a thread that waits for another one counts as busy) | – | "
        f"{figures['ratio_cpu']:.2f} |"
    )
    yield f"| reading and transforming alone, nothing beside it | {figures['decode_alone']:.1f} | {_over(figures)} |"
    yield f"| the same files again, from the cache | {figures['kept']:.0f} | {figures['kept'] / figures['bare']:.0f} |"


def _over(figures: dict[str, float]) -> str:
    return f"{figures['decode_alone'] / figures['bare']:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--many", type=int, default=10_000)
    parser.add_argument("--rle", action="store_true", help="compressed files, which take longer to decode")
    parser.add_argument("--dry", action="store_true", help="print, and leave RESULTS.md alone")
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)  # in a process of its own, as a site's trainer
    args = parser.parse_args()
    if args.memory:
        print(json.dumps(memory(args.memory, args.memory.parent / "cache")))
        return
    from real_size import make_base
    from results import write_section

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        path = radiographs(home / "large", args.images, SIZE_PX, rle=args.rle)
        ref = make_base(home / "base")
        before = os.getloadavg()[0]
        figures = measure(ref, path, home / "cache", args.turns)
        lines = list(_lines(figures, (before, os.getloadavg()[0]), args.rle))
        took = stages(ref, path)
        lines += [
            "",
            "CPU milliseconds of each stage for one image, on one thread: "
            + ", ".join(f"{name} {value:.1f}" for name, value in took.items())
            + f". The forward pass's share, which no overlap can raise: {took['forward'] / sum(took.values()):.2f} "
            "(the reader's pipe is not counted).",
        ]
        print("\n".join(lines), flush=True)
        many = radiographs(home / "many", args.many, 96)
        script = [sys.executable, __file__, "--memory", str(many)]
        rows = json.loads(subprocess.run(script, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    points = [(seen, value) for seen, value in rows if seen > 0]
    first = points[0][1]
    lines += [
        "",
        f"Memory over {args.many:,} small DICOM files on the tiny model, batches of 64 (PSS of the process and its "
        "children):",
        "",
        "| images encoded | MB | ratio to the first |",
        "|---|---|---|",
        *(f"| {seen:,} | {value:.0f} | {value / first:.2f} |" for seen, value in points),
        "",
        f"On the disk: {dict(rows)[-2]:.0f} bytes for each image (64 numbers of 4 bytes, a name of 32, and the "
        "headers of shards); at BiomedCLIP's 512 numbers 2,080 and a little.",
    ]
    print("\n".join(lines[-10:]))
    if not args.dry:
        write_section("Throughput of the embeddings", lines)


if __name__ == "__main__":
    main()
