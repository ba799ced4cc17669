"""Trained modules made ready for inference: rewritten as the passes of the compiler say, with the weights to match."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenmix.compiler.model import load
from tokenmix.compiler.passes import Fold, inference_model
from tokenmix.runtime.module import class_name, import_source, unwrapped

if TYPE_CHECKING:
    from tokenmix.compiler.passes import Inference
    from tokenmix.compiler.passes.flow import FlowOp

__all__ = ["for_inference"]


def for_inference(module: nn.Module, *, size: int | str | tuple[int, int] | None = None) -> nn.Module:
    """A module that computes what `module` computes in evaluation mode, with less to do.

    Batch norms beside a convolution or linear layer, and scale and shift of norms in front of one, become part of its
    weights (computed in float64); activations are computed by the layer in front of them; linear layers that read the
    same value become one; position biases are gathered once. What changed can be read in the new module's source. The
    given module is left as it is.

    Args:
        module: made by `build`, with the weights it shall have. Wrappers (`torch.compile`, data-parallel) are left out:
            compile what is returned.
        size: of all images to come, `224`, `"256x320"` or `(256, 320)`. Paddings, crops and resizings that do nothing
            at this size are left out, and the module takes no other. Default: images of any size.

    Returns:
        A module in evaluation mode whose weights take no gradients; results agree to rounding. Its weights and tables
        of position are final: load others into a module that is not folded.

    Raises:
        TypeError: if `build` did not make the module, or its spec has changed since.
        ValueError: if `size` is no size, or the module is ready for inference with another one.
        FindingsError: if the model does not take images of `size`.
    """
    module = unwrapped(module)
    if getattr(module, "tokenmix_folded", False):
        if size is not None:
            raise ValueError("the module is folded already: give `size` when a trained module is made ready")
        return module
    if not hasattr(module, "tokenmix_spec"):
        raise TypeError("only modules made by tokenmix.build know the spec that says what can be folded")
    made_by: Any = module  # `build` left notes on it
    model = load(made_by.tokenmix_spec, **made_by.tokenmix_settings)
    standalone = made_by.tokenmix_kernels == "reference"
    if import_source(model.source(standalone=standalone), model.name).__name__ != type(module).__module__:
        raise TypeError(f"{made_by.tokenmix_spec} has changed since the module was built: build it again")
    inference = inference_model(model, size=size, dense=bool(made_by.tokenmix_arguments.get("features_only")))
    source = import_source(inference.model.source(standalone=standalone), f"{model.name}_inference")
    with torch.device("meta"):
        made = getattr(source, class_name(model))(**made_by.tokenmix_arguments)
    state = {name: value.detach().clone() for name, value in module.state_dict().items()}
    made.load_state_dict(_folded_state(state, inference), assign=True)
    made.tokenmix_folded = True
    with torch.no_grad():
        for part in made.modules():
            prepare = getattr(part, "prepare_for_inference", None)
            if prepare is not None:
                prepare()
    return made.eval().requires_grad_(False)


def _folded_state(state: dict[str, Tensor], inference: Inference) -> dict[str, Tensor]:
    """The weights of the rewritten module, from those of the trained one (name -> tensor)."""
    layers = inference.layers
    for path in inference.biased:
        weight = state[f"{path}.weight"]
        state.setdefault(f"{path}.bias", weight.new_zeros(layers[path].outputs[0].C))
    affine = {norm: _affine(state, layers[norm]) for norm in {fold.norm for fold in inference.folds}}
    # What stands in front of a layer comes first.
    for fold in sorted(inference.folds, key=lambda f: f.behind):
        _fold(state, fold, layers[fold.layer], *affine[fold.norm])
    for join in inference.joins:
        for name in ("weight", "bias"):
            parts = [state.pop(f"{path}.{name}", None) for path in join.layers]
            if found := [part for part in parts if part is not None]:
                state[f"{join.into}.{name}"] = torch.cat(found)
    return state


def _affine(state: dict[str, Tensor], norm: FlowOp) -> tuple[Tensor, Tensor]:
    """Scale and shift of a norm, taken out of the weights, in float64.

    Of a batch norm, scale = weight / sqrt(variance + eps) and shift = bias - mean * scale.
    """
    scale, shift = (state.pop(f"{norm.module}.{name}").double() for name in ("weight", "bias"))
    if f"{norm.module}.running_mean" in state:
        mean, variance = (state.pop(f"{norm.module}.running_{name}").double() for name in ("mean", "var"))
        state.pop(f"{norm.module}.num_batches_tracked", None)
        scale = scale / torch.sqrt(variance + norm.arguments["eps"])
        shift = shift - mean * scale
    return scale, shift


def _fold(state: dict[str, Tensor], fold: Fold, layer: FlowOp, scale: Tensor, shift: Tensor) -> None:
    """Take a norm's y = scale * x + shift into a layer's W x + b, in float64.

    Behind the layer: W' = scale W, b' = scale b + shift, by output channel. In front: W' = W scale, b' = b + W shift,
    by input channel, summed over the taps of a kernel.
    """
    weight, bias = state[f"{fold.layer}.weight"], state[f"{fold.layer}.bias"]
    exact, shifted = weight.double(), bias.double()
    taps = [1] * (weight.ndim - 2)
    if fold.behind:
        outputs = scale
        if layer.op.name == "dwconv_transpose":  # weights are listed by input channel
            outputs = scale.repeat_interleave(len(weight) // len(scale))
        exact = exact * outputs.view(-1, 1, *taps)
        shifted = shifted * scale + shift
    else:
        read = slice(fold.first, fold.first + len(scale))
        shifted = shifted + (exact[:, read] * shift.view(1, -1, *taps)).flatten(1).sum(1)
        exact[:, read] *= scale.view(1, -1, *taps)
    state[f"{fold.layer}.weight"], state[f"{fold.layer}.bias"] = exact.to(weight.dtype), shifted.to(weight.dtype)
