"""One precision after the other: converted, judged against torch, built into engines and packed, or left out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from clinifed.evaluation.parity import Outputs, Parity, compare, run_onnx
from clinifed.export.bundle import Row
from clinifed.export.execute import run_engine, why_not
from clinifed.export.half import emulate
from clinifed.export.onnx import write_onnx
from clinifed.export.precision import Converter
from clinifed.export.presets import Precision
from clinifed.export.request import Request
from clinifed.export.sensitivity import exclusions
from clinifed.export.source import PublicImages
from clinifed.export.tensorrt import build_engine, write_engine

__all__ = ["Gate", "Progress"]

Progress = Callable[[str], None]


@dataclass
class Gate:
    """The parity gate of one export.

    Guarantees:
        - A precision or an engine that misses a threshold is not packed.
    """

    request: Request
    converter: Converter
    images: PublicImages
    reference: Outputs  # torch, FP32, on the images
    bundle: Path  # gets onnx/<precision>.onnx and engines/<target>/<precision>.engine
    work: Path  # an existing folder for what is thrown away
    timing_cache: Path | None
    progress: Progress

    def admit(self, name: str) -> Row:
        """Make the precision ``name``, and pack it if it passes; where it does not, the row says why.

        Where INT8 misses, the products that it hurts most are left out of it one group after the other.
        """
        self.progress(f"{name}: converting, and comparing with torch")
        preset = self.request.presets.precisions[name]
        path = self.work / f"{name}.onnx"
        row: Row | None = None
        for kept in chain([()], exclusions(self.converter, preset, self.work)):  # searched only after a failure
            row = self._judged(name, preset, path, kept)
            if not row.failures:
                break
            told = f" with {len(kept)} nodes kept" if kept else ""
            self.progress(f"{name}: {'; '.join(row.failures)}{told}")
        assert row is not None
        if row.failures:
            self.progress(f"{name}: not packed: {'; '.join(row.failures)}")
            return row
        folder = self.bundle / "onnx"
        folder.mkdir(exist_ok=True)
        return self._with_engines(row, path.rename(folder / path.name))

    def _judged(self, name: str, preset: Precision, path: Path, kept: tuple[str, ...]) -> Row:
        """The precision with ``kept`` unquantised, written to ``path`` and compared."""
        model = self.converter.convert(preset, kept)
        size = write_onnx(model, path)
        runtime, judged = "ONNX Runtime on the CPU", path
        if preset.half is not None:
            # ONNX Runtime's CPU computes FP16 graphs in FP32 without their roundings, and BF16 graphs not at all.
            runtime, judged = (
                "ONNX Runtime on the CPU, rounding to 16 bits as the graph says",
                self.work / "judged.onnx",
            )
            write_onnx(emulate(model), judged)
        del model
        parity = self._compare(run_onnx(judged, self.images.pixels))
        folds = None if preset.quantize is None else self.converter.folded(preset.quantize)
        notes = {} if folds is None else {"smoothing_folds": folds}
        return Row(name, parity, tuple(preset.parity.failures(parity)), size, runtime, kept=kept, notes=notes)

    def _with_engines(self, row: Row, path: Path) -> Row:
        """Build every engine that can be built here; one that was run and missed a threshold is left out."""
        preset = self.request.presets.precisions[row.precision]
        engines: dict[str, Mapping[str, Any]] = {}
        none, found = dict(self.request.deferred), {}
        for target in self.request.builders:
            options = self.request.presets.engine_for(self.request.profile, row.precision)
            self.progress(f"{row.precision}: building the {target} engine")
            engine = build_engine(path, target, options, self._step, self.timing_cache)
            metadata = engine.metadata()
            reason = why_not(target, engine.compute_capabilities)
            if reason is None:
                self.progress(f"{row.precision}: running the {target} engine")
                found[target] = self._compare(run_engine(engine, self.images.pixels))
                if failures := preset.parity.failures(found[target]):
                    none[target] = f"not packed: {'; '.join(failures)}"
                    continue
            metadata |= {"executed": reason is None, "parity": reason or "of the engine itself"}
            write_engine(engine, self.bundle / "engines" / target / f"{row.precision}.engine")
            engines[target] = metadata
        return replace(row, engines=engines, deferred=none, engine_parity=found)

    def _step(self, line: str) -> None:
        """The builder's own progress; it comes from another thread."""
        self.progress(f"  {line}")

    def _compare(self, outputs: Outputs) -> Parity:
        images = self.images
        return compare(
            self.reference,
            outputs,
            images.specialties,
            images.labels,
            images.patients,
            multi_label=images.multi_label,
        )
