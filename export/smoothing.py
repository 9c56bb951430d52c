"""LayerNorm → Linear smoothing: outliers of an activation's channels move into the weights that read it, exactly.

SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): where LayerNorm's output X feeds only products X·W, X/s times s·W is
the same. LayerNorm's own gamma and beta take the division, so that the folded graph has no operator more. One scale per
tensor must hold X in INT8; a few channels forty times larger than the others leave these a handful of steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from clinifed.export.ranges import Ranges, without_weights

__all__ = ["Fold", "fold", "foldable", "scales"]

# A channel's maximum counts as no less than this share of the largest one: a channel that is silent on the calibration
# images must not make a scale, and its neighbours' rounding, without bounds.
_FLOOR = 1e-5


@dataclass(frozen=True)
class Fold:
    """A LayerNormalization and the weight products that alone read it."""

    norm: str  # the node's name, as all here
    tensors: tuple[str, ...]  # its output, and what a selection of tokens makes of it; channels last
    products: tuple[str, ...]
    channels: int  # C


def foldable(graph: onnx.GraphProto) -> list[Fold]:
    """Every LayerNormalization over the last axis whose output feeds only products with a weight.

    A Gather between them that selects tokens, as before the projection, leaves the channels as they are and is looked
    through. A graph output, the residual stream or any other reader forbids the fold.
    """
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    outputs = {value.name for value in graph.output}
    found = []
    for node in graph.node:
        if node.op_type != "LayerNormalization" or _attribute(node, "axis", -1) != -1:
            continue
        gamma = sizes.get(node.input[1], ())
        if len(gamma) != 1 or (len(node.input) > 2 and node.input[2] and sizes.get(node.input[2]) != gamma):
            continue
        tensors, products = [node.output[0]], []
        for tensor in tensors:  # grows while it is read
            readers = [n for n in graph.node if tensor in n.input]
            if tensor in outputs or not readers:
                break
            selections = [n for n in readers if _selects_tokens(n, tensor, sizes, ranks)]
            multiplied = [n for n in readers if _multiplies(n, tensor, sizes, gamma[0])]
            if len(selections) + len(multiplied) < len(readers):
                break
            tensors += [n.output[0] for n in selections]
            products += [n.name for n in multiplied]
        else:
            found.append(Fold(node.name, tuple(tensors), tuple(products), gamma[0]))
    return found


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _selects_tokens(
    node: onnx.NodeProto, tensor: str, sizes: dict[str, tuple[int, ...]], ranks: dict[str, int]
) -> bool:
    """Does ``node`` pick entries of (B, T, C) by constant indices along any axis but the last?"""
    constant = node.op_type == "Gather" and node.input[0] == tensor and node.input[1] in sizes
    return constant and 0 <= _attribute(node, "axis", 0) < ranks.get(tensor, 0) - 1


def _multiplies(node: onnx.NodeProto, tensor: str, sizes: dict[str, tuple[int, ...]], channels: int) -> bool:
    """Does ``node`` multiply the channels of ``tensor``, its first input only, by a weight?"""
    if node.op_type not in ("MatMul", "Gemm") or list(node.input).count(tensor) != 1 or node.input[0] != tensor:
        return False
    weight = sizes.get(node.input[1], ())
    return len(weight) == 2 and weight[_input_axis(node)] == channels and not _attribute(node, "transA", 0)


def _input_axis(node: onnx.NodeProto) -> int:
    """The axis of a product's weight that runs over its input channels."""
    return _attribute(node, "transB", 0)


def scales(activation: NDArray[np.float32], weight: NDArray[np.float32], alpha: float) -> NDArray[np.float32]:
    """Eq. 4 of the paper: max|X_j|^alpha / max|W_j|^(1 - alpha) for every input channel j.

    Args:
        activation: (C,) largest magnitude of each channel of X.
        weight: (C,) largest magnitude of each row of W, over all products.
        alpha: migration strength, in (0, 1]; how much of an outlier moves into the weights.

    Returns:
        (C,) float32, positive and finite; ones where all of X or all of W is zero.
    """
    x, w = activation.astype(np.float64), weight.astype(np.float64)
    tiny = np.finfo(np.float32).tiny  # the smallest number that is not denormal
    if x.max() < tiny or w.max() < tiny:
        return np.ones_like(activation)
    x, w = np.maximum(x, _FLOOR * x.max()), np.maximum(w, _FLOOR * w.max())
    return np.asarray(x**alpha / w ** (1 - alpha), np.float32)


def fold(model: onnx.ModelProto, folds: Sequence[Fold], ranges: Ranges, alpha: float) -> tuple[onnx.ModelProto, Ranges]:
    """Fold every one of ``folds``; the graph computes what it did, to FP32's rounding. ``model`` is not changed.

    Args:
        model: the FP32 graph.
        folds: of :func:`foldable` on this graph.
        ranges: with the channels of the folds' tensors.
        alpha: see :func:`scales`.

    Returns:
        the new graph, and the ranges of its tensors.
    """
    nodes = {node.name: node for node in model.graph.node}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    changed: dict[str, dict[int, onnx.TensorProto]] = {}  # node → which input → its new initialiser
    for found in folds:
        norm, products = nodes[found.norm], [nodes[name] for name in found.products]
        # Shared by several products, a weight is read once for each: they may transpose it differently.
        arrays = [numpy_helper.to_array(weights[product.input[1]]) for product in products]
        rows = [np.abs(a).max(axis=1 - _input_axis(p)) for a, p in zip(arrays, products, strict=True)]
        read = np.maximum.reduce([ranges.channels(t) for t in found.tensors if _read(products, t)])  # (C,)
        scale = scales(read, np.maximum.reduce(rows), alpha)
        affine = [i for i in (1, 2) if i < len(norm.input) and norm.input[i]]  # gamma and, where there is one, beta
        changed[norm.name] = {
            i: numpy_helper.from_array(numpy_helper.to_array(weights[norm.input[i]]) / scale, norm.input[i])
            for i in affine
        }
        for product, array in zip(products, arrays, strict=True):
            factor = scale[:, None] if _input_axis(product) == 0 else scale[None, :]
            changed[product.name] = {1: numpy_helper.from_array(array * factor, product.input[1])}
        ranges = ranges.divided(found.tensors, scale)
    return _with_weights(model, changed), ranges


def _read(products: Sequence[onnx.NodeProto], tensor: str) -> bool:
    return any(product.input[0] == tensor for product in products)


def _with_weights(model: onnx.ModelProto, changed: dict[str, dict[int, onnx.TensorProto]]) -> onnx.ModelProto:
    """A copy of ``model`` in which these nodes read these weights; what others read as well keeps its old copy."""
    folded = without_weights(model)
    taken = {tensor.name for tensor in model.graph.initializer}
    for node in folded.graph.node:
        for i, tensor in changed.get(node.name, {}).items():
            shared = sum(list(other.input).count(tensor.name) for other in model.graph.node) > 1
            if shared:
                tensor.name = _free(f"{tensor.name}_smoothed", taken)
                taken.add(tensor.name)
            node.input[i] = tensor.name
            folded.graph.initializer.append(tensor)
    new = {tensor.name for tensor in folded.graph.initializer}
    read = {name for node in folded.graph.node for name in node.input}
    kept = [t for t in model.graph.initializer if t.name in read and t.name not in new]
    folded.graph.initializer.extend(kept)
    return folded


def _free(name: str, taken: set[str]) -> str:
    """``name``, numbered if it is taken."""
    return next(n for i in range(len(taken) + 1) if (n := name if i == 0 else f"{name}_{i}") not in taken)
