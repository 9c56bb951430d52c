"""Which nodes INT8 hurts most: groups of weight products, ranked on public calibration images."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx

from clinifed.evaluation.parity import run_onnx
from clinifed.export.onnx import write_onnx
from clinifed.export.precision import Converter
from clinifed.export.presets import Precision
from clinifed.export.quantization import weight_products

__all__ = ["exclusions", "groups"]

_BLOCK = 4  # weight products of one transformer block: qkv, attention's projection, and the MLP's two
_IMAGES = 16  # at least as many are ranked on, where there are: groups differ by more than images do


def groups(model: onnx.ModelProto, nodes: list[str]) -> list[tuple[str, ...]]:
    """``nodes`` in the graph's order, as what is left out together: each convolution, each block, and the rest."""
    kind = {node.name: node.op_type for node in model.graph.node}
    found = [(name,) for name in nodes if kind[name] == "Conv"]
    products = [name for name in nodes if kind[name] != "Conv"]
    return found + [tuple(products[i : i + _BLOCK]) for i in range(0, len(products), _BLOCK)]


def exclusions(converter: Converter, precision: Precision, workdir: Path) -> Iterator[tuple[str, ...]]:
    """Growing sets of nodes to keep unquantised: the most sensitive group, then the two most sensitive, and so on.

    A group's sensitivity is how much closer, per node, the embeddings of calibration images come to FP32 when it alone
    is left out. Nothing is computed before the first set is asked for; none is yielded where the preset does not
    quantise, or beyond its ``most_left_out``.

    Args:
        converter: of the graph; its calibration images are public.
        precision: a preset.
        workdir: an existing folder for intermediate models; one file is left there.
    """
    options = precision.quantize
    if options is None or options.most_left_out == 0:
        return
    # Evenly over the set, which is sorted by specialty and label.
    pixels = converter.pixels[:: max(1, len(converter.pixels) // _IMAGES)]
    path = workdir / "sensitivity.onnx"
    write_onnx(converter.model, path)
    reference = run_onnx(path, pixels).embedding  # (N, D), L2-normalised

    def closeness(left_out: tuple[str, ...]) -> float:
        write_onnx(converter.quantized(options, left_out), path)
        return float(np.mean(np.sum(reference * run_onnx(path, pixels).embedding, axis=1)))

    nodes = weight_products(converter.model, options)
    base = closeness(())
    found = groups(converter.model, nodes)
    ranked = sorted(found, key=lambda group: (closeness(group) - base) / len(group), reverse=True)
    kept: tuple[str, ...] = ()
    for group in ranked:
        kept += group
        if len(kept) > options.most_left_out * len(nodes):
            return
        yield kept
