"""Embeddings are what an L2 norm makes, whatever it is written with and however many there are."""

import onnx
from onnx import TensorProto, helper

from clinifed.evaluation.parity import EMBEDDING, LOGITS, ZERO_SHOT
from clinifed.export.norms import downstream, l2_norms


def small(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    return helper.make_graph(list(nodes), "small", ends[:1], ends[1:])


def test_the_trained_and_the_base_embedding_are_found(graph: onnx.ModelProto) -> None:
    norms = l2_norms(graph.graph)
    assert len(norms) == 2
    assert EMBEDDING in norms
    kinds = {node.name: node.op_type for node in graph.graph.node}
    for nodes in norms.values():
        assert kinds[nodes[0]] == "ReduceL2"
        assert kinds[nodes[-1]] == "Div"
        assert not {"Gemm", "MatMul"} & {kinds[name] for name in nodes}


def test_every_head_lies_behind_an_embedding(graph: onnx.ModelProto) -> None:
    reached = {name for node in downstream(graph.graph, l2_norms(graph.graph)) for name in node.output}
    heads = {value.name for value in graph.graph.output if value.name.startswith((LOGITS, ZERO_SHOT))}
    assert heads
    assert heads <= reached


def test_a_norm_in_one_operator_is_found() -> None:
    assert l2_norms(small(helper.make_node("LpNormalization", ["x"], ["y"], name="norm"))) == {"y": ("norm",)}


def test_what_stands_beside_a_norm_is_not_part_of_it() -> None:
    found = l2_norms(
        small(
            helper.make_node("ReduceL2", ["x"], ["length"], name="length"),
            helper.make_node("Neg", ["length"], ["other"], name="beside"),
            helper.make_node("Reciprocal", ["length"], ["inverse"], name="inverse"),
            helper.make_node("Mul", ["inverse", "x"], ["y"], name="quotient"),
        )
    )
    assert found == {"y": ("length", "inverse", "quotient")}


def test_a_length_that_divides_nothing_is_no_norm() -> None:
    assert l2_norms(small(helper.make_node("ReduceL2", ["x"], ["y"], name="length"))) == {}
