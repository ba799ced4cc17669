"""Which values are alive while a graph runs, and how much memory they take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenmix.blocks.op import size

if TYPE_CHECKING:
    import networkx

__all__ = ["live_bytes"]


def live_bytes(graph: networkx.DiGraph, bytes_per_element: int = 4) -> dict[str, int]:
    """Bytes of all values alive while each op runs (its inputs and outputs included), for one image in inference.

    Ops run in the order of the graph. A value dies after its last reader; views share the memory of what they view;
    weights are not counted.

    Args:
        graph: a flattened model (`BlockGraph.flatten`).
        bytes_per_element: 4 for float32, 2 for half precision.
    """
    order = list(graph)
    position = {name: i for i, name in enumerate(order)}
    storage: dict[tuple[str, int], tuple[str, int]] = {}
    last_use: dict[tuple[str, int], int] = {}
    for name in order:
        reads = [
            (source, output, into) for source, _, uses in graph.in_edges(name, data="uses") for output, into in uses
        ]
        for source, output, _ in reads:
            last_use[storage[source, output]] = position[name]
        op = graph.nodes[name]["op"]
        viewed = next((storage[source, output] for source, output, into in reads if into == 0), None)
        for i in range(len(graph.nodes[name]["outputs"])):
            storage[name, i] = viewed if op is not None and op.is_view and viewed is not None else (name, i)
    dying: dict[int, list[tuple[str, int]]] = {}
    for value, i in last_use.items():
        dying.setdefault(i, []).append(value)
    alive, result = 0, {}
    for i, name in enumerate(order):
        if name != "output":
            for k, tensor in enumerate(graph.nodes[name]["outputs"]):
                if storage[name, k] == (name, k) and (name, k) in last_use:
                    alive += size(tensor) * bytes_per_element
        result[name] = alive
        for source, output in dying.get(i, []):
            alive -= size(graph.nodes[source]["outputs"][output]) * bytes_per_element
    return result
