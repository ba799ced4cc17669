"""Rewrites of a model for inference.

Every pass reads the dataflow of the whole model (`flow.py`), decides, and notes what the text of which call becomes
(`rewrite.py`). The rewritten definitions go through the same elaboration and emission as any others: what was done is
seen in the source. What becomes of the weights is told as `Fold`s, which `runtime/inference.py` carries out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tokenmix.compiler.model import Model
from tokenmix.compiler.passes.activations import fuse_activations
from tokenmix.compiler.passes.flow import FlowOp, depends_on_size, flows_of
from tokenmix.compiler.passes.joins import Join, join_layers
from tokenmix.compiler.passes.norms import Fold, fold_norms
from tokenmix.compiler.passes.rewrite import Edits, RewrittenLibrary
from tokenmix.compiler.passes.sizes import drop_idle

__all__ = ["Fold", "Inference", "Join", "inference_model"]


@dataclass(frozen=True)
class Inference:
    """A model rewritten for inference.

    Attributes:
        model: the rewritten model; its modules hold other weights than the original's.
        layers: ops of the original model by the path of their submodule.
        folds: norms and the layers that take them in.
        biased: paths of the layers that have a bias now, whether they had one or not.
        joins: layers that become one once the norms are folded.
    """

    model: Model
    layers: dict[str, FlowOp]
    folds: tuple[Fold, ...]
    biased: frozenset[str]
    joins: tuple[Join, ...]


def inference_model(model: Model, *, size: int | str | tuple[int, int] | None = None, dense: bool = False) -> Inference:
    """A model without findings as it runs in inference.

    Args:
        size: of all images to come; what does nothing at this size is left out. Default: images of any size.
        dense: whether the folds are those of the backbone with the maps of all stages.

    Raises:
        FindingsError: if the model has findings, or does not take that size.
    """
    assert model.plan is not None and model.spec is not None
    library = model.plan.library
    flows = flows_of(model, size)
    chosen = 1 if dense else 0
    layers = {op.module: op for op in flows[chosen].ops.values()}
    edits = Edits()
    if not any(depends_on_size(d, library) for f in flows for d in f.definitions):
        if size is not None:
            drop_idle(flows, edits)
        fold_norms(flows, edits)
        join_layers(flows, edits)
        fuse_activations(flows, edits)
    plan = replace(model.plan, library=RewrittenLibrary(library, edits))
    rewritten = Model(model.spec, plan, [], model.name, model.overrides)
    rewritten.fixed_size = rewritten.elaborate(size).inputs[0].dims[1:] if size is not None else None
    folds = tuple(edits.folds[chosen]) if edits.folds else ()
    joins = tuple(edits.joins[chosen]) if edits.joins else ()
    biased = frozenset(path for path, op in layers.items() if op.span in edits.biased)
    return Inference(rewritten, layers, folds, biased, joins)
