"""Where a graph makes embeddings: the L2 norms that end its projections, and what lies behind them."""

from collections.abc import Collection

import onnx

__all__ = ["L2_NORMS", "downstream", "l2_norms"]

# The operators with which an L2 norm starts: the length of x, or x over its length in one.
L2_NORMS = ("ReduceL2", "LpNormalization")


def downstream(graph: onnx.GraphProto, tensors: Collection[str]) -> list[onnx.NodeProto]:
    """All nodes that depend on ``tensors``, in the graph's own (topological) order."""
    reached = set(tensors)
    found = []
    for node in graph.node:
        if reached.intersection(node.input):
            reached.update(node.output)
            found.append(node)
    return found


def l2_norms(graph: onnx.GraphProto, starts: Collection[str] = L2_NORMS) -> dict[str, tuple[str, ...]]:
    """Every embedding, that is, what an L2 norm makes, with the names of the nodes that compute it.

    A norm starts at one of ``starts``, which reads x, and ends at the first node that reads x again together with what
    became of its length; LpNormalization is both. A length that never meets x is no norm, and is left out.
    """
    found: dict[str, tuple[str, ...]] = {}
    for start in graph.node:
        if start.op_type not in starts:
            continue
        if start.op_type == "LpNormalization":
            found[start.output[0]] = (start.name,)
            continue
        behind = downstream(graph, start.output)
        end = next((node for node in behind if start.input[0] in node.input), None)
        if end is not None:
            between = _upstream(behind[: behind.index(end)], end)
            found[end.output[0]] = (start.name, *(node.name for node in between), end.name)
    return found


def _upstream(nodes: list[onnx.NodeProto], end: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Those of ``nodes``, in topological order, on which ``end`` depends."""
    wanted, found = set(end.input), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            found.append(node)
    return found[::-1]
