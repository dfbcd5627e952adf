"""A pass of torch's compiler over graphs on the CPU: dense products of the same tokens become one call.

To call a product and to wake threads for it takes as long as to read a small weight, such as those of keys
and values in a model of a hundred million parameters.
"""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

MOST = 4
"""Products of a call: ``kLinears`` of ``cpu/calls.h``."""


class JoinedLinears(CustomGraphPass):
    """Such as the queries, keys and values of attention. No number changes.

    All are equal: a config that is copied with one in it says the same.
    """

    def __call__(self, graph: Graph) -> None:
        """Rewrite ``graph``."""
        groups: dict[tuple[Any, Any], list[Node]] = {}
        for node in graph.find_nodes(op="call_function", target=torch.ops.hf_sparse.linear.native):
            x, weight, bias, backend = node.args
            if all(one is None or one.op in ("placeholder", "get_attr") for one in (weight, bias)):
                groups.setdefault((x, backend), []).append(node)
        for (x, backend), nodes in groups.items():
            for start in range(0, len(nodes), MOST):
                if len(some := nodes[start : start + MOST]) > 1:
                    _join(graph, x, backend, some)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))

    def uuid(self) -> bytes:
        """What a cache of graphs knows it by."""
        return get_hash_for_files((__file__,))


def _join(graph: Graph, x: Any, backend: Any, nodes: list[Node]) -> None:
    _, weights, biases, _ = zip(*(node.args for node in nodes), strict=True)
    with graph.inserting_before(nodes[0]):
        joined = graph.call_function(
            torch.ops.hf_sparse.linears.native, (x, list(weights), list(biases), backend)
        )
        joined.meta["val"] = [node.meta["val"] for node in nodes]
        results = [graph.call_function(getitem, (joined, i)) for i in range(len(nodes))]
    for node, result in zip(nodes, results, strict=True):
        result.meta.update(node.meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
