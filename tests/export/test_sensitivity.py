"""Sensitivity: the groups INT8 hurts most come first, within the preset's share, and only when asked for."""

import itertools
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from clinifed.export.precision import weight_products
from clinifed.export.presets import load_presets
from clinifed.export.sensitivity import exclusions, groups

PRESETS = load_presets()


def test_groups_are_all_nodes_once(graph: onnx.ModelProto) -> None:
    options = PRESETS.precisions["int8"].quantize
    assert options is not None
    nodes = weight_products(graph, options)
    assert sorted(name for group in groups(graph, nodes) for name in group) == sorted(nodes)


def test_sets_grow_to_the_presets_share(
    graph: onnx.ModelProto, calibration: NDArray[np.float32], tmp_path: Path
) -> None:
    preset = PRESETS.precisions["int8"]
    assert preset.quantize is not None
    few = preset.model_copy(update={"quantize": preset.quantize.model_copy(update={"most_left_out": 0.2})})
    sets = list(exclusions(graph, few, calibration[:4], tmp_path))
    assert sets
    assert all(set(a) < set(b) for a, b in itertools.pairwise(sets))
    assert len(sets[-1]) <= 0.2 * len(weight_products(graph, preset.quantize))


def test_a_precision_without_quantisation_has_none(graph: onnx.ModelProto, tmp_path: Path) -> None:
    assert list(exclusions(graph, PRESETS.precisions["fp16"], None, tmp_path)) == []
