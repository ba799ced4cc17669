"""The analytic count against fvcore's trace of the emitted module, layer by layer and op by op."""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tokenmix.blocks.cost import CONVENTIONS
from tokenmix.compiler.graph import GraphNode
from tokenmix.compiler.model import Model
from tokenmix.dsl.diagnostics import Finding
from tokenmix.runtime.module import build

__all__ = ["Audit", "audit"]

# Tally of an op -> the name under which fvcore books what it sees of it.
_OPERATORS = {
    "macs_conv": "weights",  # a pointwise convolution runs as a matrix product: one name for both
    "macs_linear": "weights",
    "macs_attention": "attention",
    "batch_norm": "batch_norm",
    "layer_norm": "layer_norm",
    "group_norm": "group_norm",
    "adaptive_pool": "adaptive_avg_pool",
    "resize_nearest": "upsample_nearest",
    "resize_bilinear": "upsample_bilinear",
    "grid_sample": "grid_sampler",
}

# Operators of a trace that fvcore has no rule for and that cost nothing under its convention.
_FREE = frozenset(
    [
        "add",
        "add_",
        "sub",
        "rsub",
        "mul",
        "mul_",
        "div",
        "div_",
        "neg",
        "gelu",
        "sigmoid",
        "silu",
        "relu",
        "softmax",
        "mean",
        "sum",
        "max_pool2d",
        "avg_pool2d",
        "pad",
        "constant_pad_nd",
        "stack",
        "unbind",
        "chunk",
        "split",
        "cat",
        "floor",
        "floor_divide",
        "remainder",
        "arange",
        "to",
        "gather",
        "clamp",
        "clamp_min",
        "clamp_max",
        "expand",
        "unflatten",
        "flip",
        "unfold",
        "ne",
        "eq",
        "ge",
        "le",
        "gt",
        "lt",
        "rand",
        "bernoulli",
        "sqrt",
        "pow",
        "feature_dropout",
        "dropout",
        "ceil",
        "abs",
        "detach",
        "empty_like",
        "clone",
        "type_as",
        "axial_sample",
        "tensor_split",
        "roll",
        "sort",
        "argsort",
        "scatter",
        "index",
        "index_select",
        "index_copy",
        "im2col",
        "col2im",
        "masked_fill",
        "hardtanh",
        "relu6",
        "where",
        "_upsample_bicubic2d_aa",  # of weights, not of a map
    ]
)


@dataclass
class Audit:
    """Outcome of one comparison.

    Attributes:
        analytic, measured: totals under the fvcore convention.
        entries: pairs of (layer, operator) compared.
        findings: every pair that differs.
    """

    analytic: int
    measured: int
    entries: int
    findings: list[Finding] = field(default_factory=list)


def audit(model: Model, size: tuple[int, int], *, dense: bool = False) -> Audit:
    """Trace the emitted module with fvcore and compare every layer with the graph.

    Shapes are all that counts: the module is built without drawing weights and runs on zeros.

    Args:
        model: without findings.
        size: height and width of the input.
        dense: audit the dense backbone.
    """
    import torch

    with torch.device("meta"):
        module = build(model, features_only=dense, kernels="reference").eval()
    # The tracer cannot go through meta tensors, nor into fast kernels.
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.zero_()
    images = torch.zeros(1, model.input_shape[0], *size)
    measured, unsupported = _trace(module, images)
    graph = model.elaborate(size, dense=dense)
    analytic: Counter[tuple[str, str]] = Counter()
    params = 0
    layers = {name for name, _ in module.named_modules()}
    for _, path, node, reused in graph.walk():
        params += 0 if reused else node.num_params
        for operator, count in _expected(node):
            owner = path if path in layers else path.rpartition(".")[0]
            analytic[owner, operator] += count
    result = Audit(sum(analytic.values()), sum(measured.values()), len(analytic.keys() | measured.keys()))
    place = model.spec.root.span.source.span(0, 1) if model.spec else None
    for key in sorted(analytic.keys() | measured.keys()):
        if analytic[key] != measured[key]:
            layer, operator = key
            result.findings.append(
                Finding(
                    "TM1602",
                    f"{model.name} at {size[0]}x{size[1]}: {operator} of `{layer or 'the model'}` is "
                    f"{analytic[key]:,} by the graph and {measured[key]:,} by fvcore",
                    place,
                )
            )
    for name, count in sorted(unsupported.items()):
        result.findings.append(
            Finding(
                "TM1602",
                f"{model.name}: fvcore met {name} {count} times, which neither it nor the graph accounts for",
                place,
            )
        )
    actual = sum(p.numel() for p in module.parameters())
    if actual != params:
        result.findings.append(
            Finding("TM1602", f"{model.name}: {params:,} parameters by the graph, {actual:,} in the module", place)
        )
    if graph.count(CONVENTIONS["fvcore"]) != result.analytic:
        result.findings.append(
            Finding("TM1602", f"{model.name}: the fvcore convention weighs a tally that no operator stands for", place)
        )
    return result


def _expected(node: GraphNode) -> list[tuple[str, int]]:
    weights = CONVENTIONS["fvcore"].weights
    return [
        (_OPERATORS[name], weights[name] * count)
        for name, count in node.tally.items()
        if weights.get(name, 0) and count
    ]


def _trace(module: Any, images: Any) -> tuple[Counter[tuple[str, str]], dict[str, int]]:
    """What fvcore counts, by (innermost module, operator), and the operators it has no rule for."""
    import torch
    from fvcore.nn import FlopCountAnalysis

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer's remarks on sizes read as numbers: an audit is for one size
        logging.getLogger("fvcore").setLevel(logging.ERROR)
        analysis = FlopCountAnalysis(module, images).set_op_handle(**_handles())
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        by_module = analysis.by_module_and_operator()
        unsupported = analysis.unsupported_ops()
    children: dict[str, Counter] = {name: Counter() for name in by_module}
    for name, counts in by_module.items():
        if name:
            parent = name.rpartition(".")[0]
            while parent not in children:
                parent = parent.rpartition(".")[0]
            children[parent].update(counts)
    measured: Counter[tuple[str, str]] = Counter()
    for name, counts in by_module.items():
        for operator, count in counts.items():
            own = int(count) - int(children[name][operator])
            if own:
                measured[name, _BOOKED.get(operator, operator)] += own
    unknown = {
        name: count
        for name, count in unsupported.items()
        if name.removeprefix("aten::").removeprefix("tokenmix::").rstrip("_") not in _FREE
    }
    return measured, unknown


# Operators that stand for the same arithmetic.
_BOOKED = {
    "conv": "weights",
    "linear": "weights",
    "addmm": "weights",
    "matmul": "attention",
    "bmm": "attention",
    "scaled_dot_product_attention": "attention",
    "adaptive_avg_pool2d": "adaptive_avg_pool",
    "upsample_nearest2d": "upsample_nearest",
    "upsample_bilinear2d": "upsample_bilinear",
}


def _handles() -> dict[str, Callable[[list[Any], list[Any]], Any]]:
    """Rules for operators that fvcore does not know or counts for itself only in older forms."""
    from fvcore.nn.jit_handles import get_shape

    def attention(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        query, key = get_shape(inputs[0]), get_shape(inputs[1])
        value = get_shape(inputs[2])
        assert query is not None and key is not None and value is not None
        return Counter(attention=math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))

    return {"aten::scaled_dot_product_attention": attention}
