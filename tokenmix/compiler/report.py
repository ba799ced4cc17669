"""What reports say of a model: stages, blocks, ops, and how its counts compare with the paper's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal
from typing import Any

from tokenmix.blocks.cost import Convention
from tokenmix.blocks.op import Op, Tensor
from tokenmix.compiler.graph import BlockGraph, GraphNode
from tokenmix.compiler.liveness import live_bytes
from tokenmix.compiler.model import Cost, Model
from tokenmix.compiler.spec import UNITS, Published, printed_number
from tokenmix.dsl.diagnostics import Finding

__all__ = ["Figure", "Row", "compare", "exact_misses", "figures", "figures_of", "report_sizes", "rows_by"]


@dataclass(frozen=True)
class Figure:
    """A printed figure beside the computed one.

    Attributes:
        quantity: "params" or "flops".
        printed: the string in the paper.
        rule: the convention under which FLOPs are compared, or "parameters".
        value: the exact integer.
        status: "rounds" if the value rounds to the printed string, "cut off" if its digits begin with it, else "off".
        gap: (value - printed) / printed.
        note: why it is off, as far as known.
    """

    quantity: str
    printed: str
    table: str
    rule: str
    value: int
    status: str
    gap: float
    note: str

    def as_dict(self) -> dict[str, Any]:
        row = {k: getattr(self, k) for k in ("quantity", "printed", "table", "rule", "value", "status")}
        if self.status == "off":
            row |= {"gap": round(self.gap, 6), "note": self.note}
        return row

    def __str__(self) -> str:
        return f"{self.printed} {self.verdict}"

    @property
    def verdict(self) -> str:
        return f"off by {self.gap:+.1%}" if self.status == "off" else self.status


def compare(value: int, printed: str, unit: str = "") -> tuple[str, float]:
    """Whether an integer rounds or is cut off to a printed figure such as `3.6G`, and by what share it misses it.

    Args:
        value: the exact integer.
        printed: the figure as printed.
        unit: letter of a figure that is printed without one.

    Example:
        >>> compare(34797572, "35M")[0], compare(2568242, "2.5", "M")[0], compare(3475237888, "3.6G")[0]
        ('rounds', 'cut off', 'off')
    """
    number = printed_number(printed, unit)
    assert number is not None, printed
    digits, power = number
    step = Decimal(1).scaleb(-len(digits.partition(".")[2]))
    scaled = Decimal(value).scaleb(-power)
    rounded = {scaled.quantize(step, rounding=mode) for mode in (ROUND_HALF_UP, ROUND_HALF_EVEN)}
    wanted = Decimal(digits)
    gap = float(scaled / wanted - 1) if wanted else 0.0
    if wanted in rounded:
        return "rounds", gap
    return "cut off" if scaled.quantize(step, rounding=ROUND_DOWN) == wanted else "off", gap


def figures(model: Model, shape: tuple[int, int, int], *, dense: bool = False) -> list[Figure]:
    """Every printed parameter and FLOP figure of a model at one input shape; none of one with other settings."""
    assert model.spec is not None
    found: list[Figure] = []
    if model.overrides:  # the paper printed them of another model
        return found
    for row in model.spec.published:
        if (row.input or model.input_shape) == shape and row.dense == dense:
            found += figures_of(row, model.cost(shape[1:], dense=dense))
    return found


def figures_of(row: Published, cost: Cost) -> list[Figure]:
    """The printed parameter and FLOP figures of one row."""
    return [_figure(row, quantity, cost) for quantity in UNITS if quantity in row.printed]


def _figure(row: Published, quantity: str, cost: Cost) -> Figure:
    rule = "parameters" if quantity == "params" else row.rule
    value = cost.params if quantity == "params" else cost[row.rule]
    status, gap = compare(value, row.printed[quantity], UNITS[quantity])
    note = row.note if status == "off" else ""
    return Figure(quantity, row.printed[quantity], row.table, rule, value, status, gap, note)


def report_sizes(model: Model) -> list[tuple[int, int]]:
    """Input sizes a report covers where none is asked for: those with printed figures, else the default."""
    assert model.spec is not None
    sizes = dict.fromkeys((r.input or model.input_shape)[1:] for r in model.spec.published if not r.dense)
    return list(sizes) or [model.input_shape[1:]]


def exact_misses(model: Model) -> list[Finding]:
    """Exact targets the spec declares and the model does not have."""
    assert model.spec is not None
    findings = []
    for row in model.spec.exact:
        shape = row.input or model.input_shape
        cost = model.cost(shape[1:], dense=row.dense)
        for name, wanted in row.values.items():
            if cost[name] != wanted:
                findings.append(
                    Finding(
                        "TM1601",
                        f"`{name}` of {model.name} is {cost[name]:,} and the spec says {wanted:,} "
                        f"({cost[name] - wanted:+,}) at {'x'.join(str(s) for s in shape)}"
                        + (", dense backbone" if row.dense else ""),
                        row.spans[name],
                    )
                )
    return findings


@dataclass(frozen=True)
class Row:
    """A line of a breakdown; bytes are for float32 and one image."""

    name: str
    block: str
    depth: int
    output: Tensor | None
    params: int
    costs: dict[str, int]
    activation_bytes: int = 0
    peak_bytes: int = 0


def rows_by(what: str, graph: BlockGraph, conventions: Iterable[Convention]) -> list[Row]:
    """The cost of a model broken down by "stage", "block" or "op"."""
    conventions = list(conventions)
    if what == "op":
        return _by_op(graph, conventions)
    if what == "block":
        return [_row(node.name, [node], conventions) for node in graph.nodes]
    peaks = live_bytes(graph.flatten())
    rows = []
    for name, nodes in _stages(graph.nodes).items():
        prefixes = tuple(n.name for n in nodes)
        inside = tuple(f"{p}." for p in prefixes)
        peak = max((b for op, b in peaks.items() if op in prefixes or op.startswith(inside)), default=0)
        rows.append(_row(name, nodes, conventions, peak))
    return rows


def _stages(nodes: list[GraphNode]) -> dict[str, list[GraphNode]]:
    groups: dict[str, list[GraphNode]] = {}
    for node in nodes:
        parts = node.name.split(".")
        groups.setdefault(".".join(parts[:2]) if parts[0] == "stages" else parts[0], []).append(node)
    return groups


def _row(name: str, nodes: list[GraphNode], conventions: list[Convention], peak: int = 0) -> Row:
    blocks = [n for n in nodes if not n.name.endswith(".down")]
    names = dict.fromkeys(n.target.name for n in blocks or nodes)
    depth = len(blocks)
    body = blocks[0].arguments.get("depth") if len(blocks) == 1 else None
    elements = sum(n.target.activation_elements if isinstance(n.target, BlockGraph) else _elements(n) for n in nodes)
    return Row(
        name,
        ", ".join(names),
        body if isinstance(body, int) else depth,
        nodes[-1].outputs[0],
        sum(n.num_params for n in nodes),
        {c.name: sum(n.count(c) for n in nodes) for c in conventions},
        4 * elements,
        peak,
    )


def _elements(node: GraphNode) -> int:
    from tokenmix.blocks.op import size

    assert isinstance(node.target, Op)
    return 0 if node.target.is_view else sum(size(t) for t in node.outputs)


def _by_op(graph: BlockGraph, conventions: list[Convention]) -> list[Row]:
    groups: dict[str, list[tuple[GraphNode, bool, str]]] = {}
    for name, _, node, reused in graph.walk():
        groups.setdefault(node.target.name, []).append((node, reused, name))
    rows = []
    for op, uses in groups.items():
        rows.append(
            Row(
                op,
                op,
                len(uses),
                None,
                sum(0 if reused else node.num_params for node, reused, _ in uses),
                {
                    c.name: sum(0 if _excluded(name, c) else node.count(c) for node, _, name in uses)
                    for c in conventions
                },
                4 * sum(_elements(node) for node, _, _ in uses),
            )
        )
    first: Callable[[Row], int] = lambda row: -row.costs[conventions[0].name]  # noqa: E731
    return sorted(rows, key=first)


def _excluded(name: str, convention: Convention) -> bool:
    return bool(set(name.split(".")) & set(convention.without))
