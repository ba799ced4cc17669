"""Trained modules made ready for inference: norms folded into their neighbours, tables of position gathered once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenmix.compiler.model import load
from tokenmix.compiler.passes import Fold, inference_model
from tokenmix.runtime.module import class_name, import_source, unwrapped

if TYPE_CHECKING:
    from tokenmix.compiler.graph import GraphNode
    from tokenmix.compiler.model import Model

__all__ = ["for_inference"]


def for_inference(module: nn.Module) -> nn.Module:
    """A module that computes what `module` computes in evaluation mode, with less to do.

    Batch norms beside a convolution or linear layer, and scale and shift of norms in front of one, become part of its
    weights (computed in float64); position biases are gathered once. What changed can be read in the new module's
    source. The given module is left as it is.

    Args:
        module: made by `build`, with the weights it shall have. Wrappers (`torch.compile`, data-parallel) are left out:
            compile what is returned.

    Returns:
        A module in evaluation mode whose weights take no gradients; results agree to rounding. Its weights and tables
        of position are final: load others into a module that is not folded.

    Raises:
        TypeError: if `build` did not make the module, or its spec has changed since.
    """
    module = unwrapped(module)
    if getattr(module, "tokenmix_folded", False):
        return module
    if not hasattr(module, "tokenmix_spec"):
        raise TypeError("only modules made by tokenmix.build know the spec that says what can be folded")
    made_by: Any = module  # `build` left notes on it
    model = load(made_by.tokenmix_spec, **made_by.tokenmix_settings)
    standalone = made_by.tokenmix_kernels == "reference"
    if import_source(model.source(standalone=standalone), model.name).__name__ != type(module).__module__:
        raise TypeError(f"{made_by.tokenmix_spec} has changed since the module was built: build it again")
    folded, folds = inference_model(model)
    source = import_source(folded.source(standalone=standalone), f"{model.name}_inference")
    with torch.device("meta"):
        made = getattr(source, class_name(model))(**made_by.tokenmix_arguments)
    state = {name: value.detach().clone() for name, value in module.state_dict().items()}
    features_only = bool(made_by.tokenmix_arguments.get("features_only"))
    made.load_state_dict(_folded_state(state, model, folds, features_only), assign=True)
    made.tokenmix_folded = True
    with torch.no_grad():
        for part in made.modules():
            prepare = getattr(part, "prepare_for_inference", None)
            if prepare is not None:
                prepare()
    return made.eval().requires_grad_(False)


def _folded_state(
    state: dict[str, Tensor], model: Model, folds: dict[str, tuple[Fold, ...]], dense: bool
) -> dict[str, Tensor]:
    """The weights of the folded module, from those of the trained one (name -> tensor)."""
    nodes: dict[str, GraphNode] = {}
    done: list[tuple[Fold, str, str]] = []
    graph = model.elaborate(dense=dense)
    for block, path, node in _walk(graph, ""):
        nodes[path] = node
        _, dot, place = node.label.partition(".")  # rounds of a loop stand behind the label
        for fold in folds.get(block, ()):
            if fold.place == node.span:
                done.append((fold, path, path[: len(path) - len(node.label)] + fold.layer + dot + place))
    for fold, norm, layer in sorted(done, key=lambda d: d[0].behind):  # what stands in front of a layer comes first
        _fold(state, fold, norm, layer, nodes)
    return state


def _walk(graph: Any, prefix: str) -> Any:
    """Every op that has weights of its own: name of its block, path, node."""
    for node in graph.nodes:
        path = prefix + node.label
        if hasattr(node.target, "nodes"):
            yield from _walk(node.target, path + ".")
        elif not node.reused:
            yield graph.name, path, node


def _fold(state: dict[str, Tensor], fold: Fold, norm: str, layer: str, nodes: dict[str, GraphNode]) -> None:
    """Take a norm's y = scale * x + shift into a layer's W x + b, in float64.

    Behind the layer: W' = scale W, b' = scale b + shift, by output channel. In front: W' = W scale, b' = b + W shift,
    by input channel, summed over the taps of a kernel. Of a batch norm, scale = weight / sqrt(variance + eps) and
    shift = bias - mean * scale.
    """
    scale, shift = (state.pop(f"{norm}.{name}").double() for name in ("weight", "bias"))
    if f"{norm}.running_mean" in state:
        mean, variance = (state.pop(f"{norm}.running_{name}").double() for name in ("mean", "var"))
        state.pop(f"{norm}.num_batches_tracked", None)
        scale = scale / torch.sqrt(variance + nodes[norm].arguments["eps"])
        shift = shift - mean * scale
    weight = state[f"{layer}.weight"]
    exact = weight.double()
    bias = state[f"{layer}.bias"].double() if f"{layer}.bias" in state else 0.0
    if fold.behind:
        outputs = scale
        if nodes[layer].target.name == "dwconv_transpose":  # weights are listed by input channel
            outputs = scale.repeat_interleave(len(weight) // len(scale))
        exact = exact * outputs.view(-1, *[1] * (weight.ndim - 1))
        bias = bias * scale + shift
    else:
        bias = bias + (exact * shift.view(1, -1, *[1] * (weight.ndim - 2))).flatten(1).sum(1)
        exact = exact * scale.view(1, -1, *[1] * (weight.ndim - 2))
    state[f"{layer}.weight"], state[f"{layer}.bias"] = exact.to(weight.dtype), bias.to(weight.dtype)
