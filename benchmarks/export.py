"""The export at BiomedCLIP's real size: time, peak memory, sizes, parity; and INT8 against FP32 on this processor.

``python benchmarks/export.py [--work FOLDER]`` writes two sections of RESULTS.md, with random weights.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import psutil
from real_size import FACTOR, OUTLIERS, make_base, make_checkpoint
from results import write_section

PATIENTS = 16  # per specialty in each public set, with one image each
THREADS = 2
RUNS = 9
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")  # what ONNX Runtime's INT8 kernels look for


def export(checkpoint: Path, out: Path, *options: str) -> tuple[dict, float, float]:
    """Run the command as its user would; returns the report, seconds, and the process's peak in GB."""
    words = ["-P", "-m", "clinifed", "export", str(checkpoint), "--out", str(out), "--json", *options]
    started, peak = time.monotonic(), 0
    with out.with_suffix(".json").open("wb") as told, out.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen([sys.executable, *words], stdout=told, stderr=log)
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                peak = max(peak, watched.memory_info().rss)
            except psutil.NoSuchProcess:
                break
            time.sleep(0.1)
    wall = time.monotonic() - started
    if process.wait():
        sys.exit(out.with_suffix(".log").read_text())
    return json.loads(out.with_suffix(".json").read_text()), wall, peak / 1e9


def processor() -> str:
    """Which of the instructions that matter this processor has."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return ", ".join(name for name in FLAGS if name in line.split())
    return "unknown"


def speed(bundle: Path, batch: int) -> tuple[float, float]:
    """Median seconds of one run through ONNX Runtime, FP32 and int8-cpu, in turns."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    sessions = [
        onnxruntime.InferenceSession(str(bundle / "onnx" / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])
        for name in ("fp32", "int8-cpu")
    ]
    pixels = np.random.default_rng(0).standard_normal((batch, 3, 224, 224)).astype(np.float32)
    times: list[list[float]] = [[], []]
    for turn in range(RUNS + 1):
        for session, found in zip(sessions, times, strict=True):
            started = time.perf_counter()
            session.run(None, {"pixels": pixels})
            if turn:  # the first run allocates
                found.append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="folder to keep models and bundles in")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        lines = []
        for name, outliers in (("plain", False), ("outliers", True)):
            folder = work / name
            if not (folder / "checkpoint").exists():
                make_checkpoint(folder, make_base(folder / "base", outliers=outliers), PATIENTS)
            report, wall, peak = export(folder / "checkpoint", folder / "bundle")
            rows = {row["precision"]: row for row in report["precisions"]}
            lines += [
                f"### {name.capitalize()} weights"
                + (f": {OUTLIERS} channels of every LayerNorm × {FACTOR:g}" * outliers),
                "",
                f"`clinifed export`, all precisions, ONNX and TensorRT-RTX engines: {wall:.0f} s, peak {peak:.2f} GB.",
                "",
                "| precision | ONNX MB | of FP32 | engine MB | cosine mean | cosine min | same top-1 | packed |",
                "|---|---|---|---|---|---|---|---|",
            ]
            whole = rows["fp32"]["onnx_bytes"]
            for precision, row in rows.items():
                parity = row["parity"]
                engine = row["engine_bytes"].get("tensorrt-rtx", 0) / 1e6
                lines.append(
                    f"| {precision} | {row['onnx_bytes'] / 1e6:.1f} | {row['onnx_bytes'] / whole:.3f} | {engine:.1f} "
                    f"| {parity['cosine_mean']:.6f} | {parity['cosine_min']:.6f} | {parity['top1_agreement']:.3f} "
                    f"| {'yes' if row['packed'] else '; '.join(row['failures'])} |"
                )
            lines.append("")
        write_section("Export at BiomedCLIP's size", lines)
        both = work / "plain" / "cpu"
        export(work / "plain" / "checkpoint", both, "--precision", "fp32,int8-cpu", "--target", "onnx")
        table = [
            f"ONNX Runtime {onnxruntime.__version__}, {THREADS} threads; the processor has {processor()}.",
            "",
            "| batch | FP32 ms | int8-cpu ms | FP32 / int8-cpu |",
            "|---|---|---|---|",
        ]
        for batch in (1, 8):
            full, eight = speed(both, batch)
            table.append(f"| {batch} | {full * 1e3:.0f} | {eight * 1e3:.0f} | {full / eight:.2f} |")
        write_section("INT8 on a CPU", table)


if __name__ == "__main__":
    main()
