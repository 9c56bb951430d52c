"""Sensitivity: the groups INT8 hurts most come first, within the preset's share, and only when asked for."""

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from clinifed.export.precision import Converter
from clinifed.export.presets import Precision, load_presets
from clinifed.export.quantization import weight_products
from clinifed.export.sensitivity import exclusions, groups

PRESETS = load_presets()


def int8(**changes: float) -> Precision:
    preset = PRESETS.precisions["int8"]
    assert preset.quantize is not None
    return preset.model_copy(update={"quantize": preset.quantize.model_copy(update=changes)})


def products(graph: onnx.ModelProto) -> list[str]:
    options = int8().quantize
    assert options is not None
    return weight_products(graph, options)


def test_groups_are_all_nodes_once(graph: onnx.ModelProto) -> None:
    nodes = products(graph)
    assert sorted(name for group in groups(graph, nodes) for name in group) == sorted(nodes)


def test_sets_grow_to_the_presets_share(
    graph: onnx.ModelProto, calibration: NDArray[np.float32], tmp_path: Path
) -> None:
    sets = list(exclusions(Converter(graph, calibration[:4]), int8(most_left_out=0.2), tmp_path))
    assert sets
    assert all(set(a) < set(b) for a, b in itertools.pairwise(sets))
    assert len(sets[-1]) <= 0.2 * len(products(graph))


def test_the_block_that_int8_hurts_most_comes_first(
    graph: onnx.ModelProto, calibration: NDArray[np.float32], tmp_path: Path
) -> None:
    """A few channels of the third block's attention are larger, and the weights behind them smaller."""
    block = groups(graph, products(graph))[1 + 2]
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    nodes = {node.name: node for node in changed.graph.node}
    weights = {tensor.name: tensor for tensor in changed.graph.initializer}
    bias = next(node for node in changed.graph.node if nodes[block[0]].output[0] in node.input)
    width = weights[nodes[block[1]].input[1]].dims[0]
    factor = np.ones(width, np.float32)
    factor[:6] = 200
    qkv = np.concatenate([np.ones(2 * width, np.float32), factor])
    for name, scale in (
        (nodes[block[0]].input[1], qkv),
        (next(name for name in bias.input if name in weights), qkv),
        (nodes[block[1]].input[1], 1 / factor[:, None]),
    ):
        weights[name].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights[name]) * scale, name))
    first = next(exclusions(Converter(changed, calibration[:8]), int8(), tmp_path))
    assert first == block


@pytest.mark.parametrize("preset", [PRESETS.precisions["fp16"], int8(most_left_out=0.0)])
def test_a_precision_that_may_leave_nothing_out_has_none(
    preset: Precision, graph: onnx.ModelProto, tmp_path: Path
) -> None:
    assert list(exclusions(Converter(graph, None), preset, tmp_path)) == []
    assert not list(tmp_path.iterdir())
