"""Which nodes INT8 hurts most: groups of weight products, ranked on public calibration images."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from clinifed.evaluation.parity import run_onnx
from clinifed.export.onnx import write_onnx
from clinifed.export.precision import activation_ranges, quantize, weight_products
from clinifed.export.presets import Precision

__all__ = ["exclusions", "groups"]

_BLOCK = 4  # weight products of one transformer block: qkv, attention's projection, and the MLP's two


def groups(model: onnx.ModelProto, nodes: list[str]) -> list[tuple[str, ...]]:
    """``nodes`` in the graph's order, as what is left out together: each convolution, each block, and the rest."""
    kind = {node.name: node.op_type for node in model.graph.node}
    found = [(name,) for name in nodes if kind[name] == "Conv"]
    products = [name for name in nodes if kind[name] != "Conv"]
    return found + [tuple(products[i : i + _BLOCK]) for i in range(0, len(products), _BLOCK)]


def exclusions(
    model: onnx.ModelProto, precision: Precision, pixels: NDArray[np.float32] | None, workdir: Path
) -> Iterator[tuple[str, ...]]:
    """Growing sets of nodes to keep unquantised: the most sensitive group, then the two most sensitive, and so on.

    A group's sensitivity is how much closer, per node, the embeddings of ``pixels`` (N, 3, S, S), public, come to FP32
    when it alone is left out. Nothing is computed before the first set is asked for; none is yielded where the preset
    does not quantise, or beyond its ``most_left_out``.
    """
    options = precision.quantize
    if options is None or pixels is None or options.most_left_out == 0:
        return
    nodes = weight_products(model, options)
    ranges = activation_ranges(model, options, pixels, workdir)
    path = workdir / "sensitivity.onnx"
    write_onnx(model, path)
    reference = run_onnx(path, pixels).embedding  # (N, D), L2-normalised

    def closeness(left_out: tuple[str, ...]) -> float:
        write_onnx(quantize(model, options, [n for n in nodes if n not in left_out], ranges, workdir), path)
        return float(np.mean(np.sum(reference * run_onnx(path, pixels).embedding, axis=1)))

    base = closeness(())
    ranked = sorted(groups(model, nodes), key=lambda group: (closeness(group) - base) / len(group), reverse=True)
    kept: tuple[str, ...] = ()
    for group in ranked:
        kept += group
        if len(kept) > options.most_left_out * len(nodes):
            return
        yield kept
