"""The FP32 graph in every precision of the presets: TensorRT 11 is strongly typed, so precision is decided in the ONNX.

Smoothing, INT8 ranges and FP16's headroom all depend on what the graph makes of public images. That is measured once.
"""

from collections.abc import Collection
from functools import cached_property

import numpy as np
import onnx
from numpy.typing import NDArray

from clinifed.errors import ExportError
from clinifed.export.half import to_half
from clinifed.export.onnx import strip_metadata
from clinifed.export.presets import Precision, Quantization
from clinifed.export.quantization import quantize, unquantize, weight_products
from clinifed.export.ranges import Ranges, measure
from clinifed.export.smoothing import fold, foldable

__all__ = ["Converter"]


class Converter:
    """One FP32 graph, and everything that its conversions share.

    Args:
        model: the FP32 graph of :func:`clinifed.export.onnx.export_onnx`; never changed.
        pixels: (N, 3, S, S) float32, normalised, public calibration images; a precision that quantises or halves
            needs them.
    """

    def __init__(self, model: onnx.ModelProto, pixels: NDArray[np.float32] | None) -> None:
        self.model = model
        self._pixels = pixels
        self._folds = foldable(model.graph)
        self._folded: dict[float, tuple[onnx.ModelProto, Ranges]] = {}
        self._quantized: dict[Quantization, onnx.ModelProto] = {}

    @property
    def pixels(self) -> NDArray[np.float32]:
        """The calibration images.

        Raises:
            ExportError: there are none.
        """
        if self._pixels is None or not len(self._pixels):
            raise ExportError("this precision depends on calibration images; none were given")
        return self._pixels

    @cached_property
    def ranges(self) -> Ranges:
        """What values the FP32 graph takes on the calibration images."""
        return measure(self.model, self.pixels, {t: f.channels for f in self._folds for t in f.tensors})

    def folded(self, options: Quantization) -> int:
        """How many LayerNormalizations ``options`` folds into the products behind them."""
        return len(self._folds) if options.smoothing > 0 else 0

    def quantized(self, options: Quantization, keep: Collection[str] = ()) -> onnx.ModelProto:
        """The graph with INT8 weight products, the rest FP32.

        Args:
            options: of the preset.
            keep: nodes of :func:`~clinifed.export.quantization.weight_products` that stay FP32.

        Raises:
            ExportError: a node that the preset quantises was not quantised, or ``keep`` names another.
        """
        model, ranges = self._smooth(options)
        if strangers := set(keep).difference(weight_products(model, options)):
            raise ExportError(f"cannot be kept, since INT8 does not touch it: {', '.join(sorted(strangers))}")
        if options not in self._quantized:
            self._quantized[options] = quantize(model, options, weight_products(model, options), ranges)
        whole = self._quantized[options]
        return unquantize(whole, model, keep) if keep else whole

    def convert(self, precision: Precision, keep: Collection[str] = ()) -> onnx.ModelProto:
        """A graph of the same inputs and outputs (FP32) that computes in ``precision``.

        Args:
            precision: a preset.
            keep: nodes that are not quantised although the preset would.

        Raises:
            ExportError: there are no calibration images, a node that the preset quantises was not quantised, or the
                result is not valid ONNX.
        """
        model, ranges = self.model, None
        if precision.quantize is not None:
            model, ranges = self.quantized(precision.quantize, keep), self._smooth(precision.quantize)[1]
        if precision.half is not None:
            model = to_half(model, precision.half, ranges or self.ranges)
        try:
            onnx.checker.check_model(model, full_check=True)
        except onnx.checker.ValidationError as error:
            raise ExportError(f"the converted graph is not valid ONNX: {error}") from error
        return strip_metadata(model) if model is not self.model else model

    def _smooth(self, options: Quantization) -> tuple[onnx.ModelProto, Ranges]:
        """The FP32 graph with its smoothing folds, and its ranges."""
        if not self.folded(options):
            return self.model, self.ranges
        if options.smoothing not in self._folded:
            self._folded[options.smoothing] = fold(self.model, self._folds, self.ranges, options.smoothing)
        return self._folded[options.smoothing]
