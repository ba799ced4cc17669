"""Loading checkpoints into emitted modules: their own, and those that others publish for a family."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokenmix import __version__
from tokenmix.compiler.layouts import (
    Layout,
    find_layout,
    known_layouts,
    read_layout,
    shipped_layouts,
    unknown_layout,
)
from tokenmix.compiler.model import Model, load
from tokenmix.compiler.spec import Spec
from tokenmix.dsl.diagnostics import Finding, FindingsError, nearest
from tokenmix.runtime.checkpoints import Checkpoint, CheckpointError, WeightsError, read_checkpoint
from tokenmix.runtime.files import replacing
from tokenmix.runtime.matching import Report, common_prefix, coverage, match
from tokenmix.runtime.module import build, require_torch, unwrapped

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "Mismatch",
    "convert_weights",
    "load_weights",
    "matched",
    "was_converted",
]

# A layout is taken for the right one if it finds this share of the weights, or a place for this share of the entries,
# going by names alone.
ENOUGH = 0.5

OWN = Layout("tokenmix")


class Mismatch(WeightsError):
    """Checkpoint and module do not fit. `report` says what became of every weight and entry."""

    def __init__(self, report: Report):
        self.report = report
        advice = "\nNothing was loaded."
        kinds = Counter(problem.kind for problem in report.problems)
        if kinds["shape"] + kinds["missing"] > len(report.loaded) + len(report.transformed) + len(report.adapted):
            # Patterns for most of the weights would leave a module that was not loaded.
            if kinds["shape"] > kinds["missing"]:
                advice += " Most shapes differ: the checkpoint is of another variant, or of other settings of the spec."
            else:
                advice += " Most weights are missing: the checkpoint is a part of one, or of another model."
        elif kinds["missing"] or kinds["unused"] or kinds["shape"]:
            names = dict.fromkeys(problem.name.split(".")[0] + ".*" for problem in report.problems)
            patterns = ", ".join(f'"{name}"' for name in list(names)[:4])
            advice += f" What may stay fresh or unused is named by patterns: allow=[{patterns}], or --allow PATTERN."
        super().__init__(f"the checkpoint does not fit the module\n{report}{advice}")


def load_weights(
    module: nn.Module,
    source: str | os.PathLike | Mapping[str, Any],
    layout: str = "auto",
    *,
    allow: Iterable[str] = (),
    entry: str | None = None,
    spec: str | Path | Model | None = None,
    adapt: bool = True,
) -> Report:
    """Load a checkpoint into an emitted module, completely or not at all.

    Args:
        module: the module, on any device and of any dtype; values are converted to those of its weights. It may be
            wrapped by `torch.compile` or for data-parallel training.
        source: a file (safetensors, torch, `.pdparams`), or a state dict of tensors or numpy arrays.
        layout: `tokenmix` for the module's own keys, `official` for the first layout of its family, the name of a
            layout, a path to a layout file, or `auto`: the one whose names fit.
        allow: patterns such as `head.*` of weights that may stay fresh and of entries that may stay unused.
        entry: nested entry of the checkpoint that holds the weights. Default: as the layout says.
        spec: the spec of a module that was not made by `build`, which remembers it; needed for its family's layouts.
        adapt: resize position tables to another window, fit the first convolution to other input channels.

    Returns:
        A report: every weight and every entry, by what became of it.

    Raises:
        Mismatch: if anything is missing, left over or of another shape, and not allowed. The module is unchanged.
        CheckpointError: if the file cannot be read or holds anything but weights.
        FindingsError: if the layout file is wrong.
    """
    module = unwrapped(module)
    if getattr(module, "tokenmix_folded", False):
        raise WeightsError("this module is folded for inference: load the weights first, then tokenmix.for_inference")
    wanted = module.state_dict()
    meta = next((key for key, tensor in wanted.items() if tensor.is_meta), None)
    if meta is not None:
        raise WeightsError(
            f"{meta} lies on the meta device and can hold no values: `module.to_empty(device=...)` first"
        )
    checkpoint = read_checkpoint(source)
    known = spec if spec is not None else getattr(module, "tokenmix_spec", None)
    values, report = matched(wanted, checkpoint, layout, known, allow, entry, adapt)
    with torch.no_grad():
        for key, value in values.items():
            wanted[key].copy_(value)
    return report


def matched(
    wanted: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    layout: str = "auto",
    known: str | Path | Model | None = None,
    allow: Iterable[str] = (),
    entry: str | None = None,
    adapt: bool = True,
) -> tuple[dict[str, Tensor], Report]:
    """Values for the weights in a state dict, and the report; arguments and exceptions as in `load_weights`."""
    spec = _spec(known)
    allowed = (allow,) if isinstance(allow, str) else tuple(allow)
    if layout == "auto":
        chosen = _fitting(wanted, checkpoint, spec, entry)
    else:
        chosen = _named(layout, spec)
    place = _entry(checkpoint, chosen, entry)
    prefix, tensors, others = _state(wanted, checkpoint, chosen, place)
    if not tensors:
        raise no_tensors(checkpoint)
    values, report = match(
        wanted, tensors, others, chosen,
        source=checkpoint.name, entry=place, prefix=prefix, allow=allowed, adapt=adapt,
    )  # fmt: skip
    if report.problems:
        raise Mismatch(report)
    return values, report


def _spec(known: str | Path | Model | None) -> Spec | None:
    if known is None:
        return None
    return (known if isinstance(known, Model) else load(known)).spec


def _candidates(spec: Spec | None) -> list[Layout]:
    """The layouts to choose among: the module's own keys and what its family names. Raises `FindingsError`."""
    return [OWN, *(_read(path) for path in (spec.layouts.values() if spec else ()))]


def _read(path: Path) -> Layout:
    findings: list[Finding] = []
    layout = read_layout(path, findings)
    if layout is None:
        raise FindingsError(findings)
    return layout


def _named(name: str, spec: Spec | None) -> Layout:
    layouts = spec.layouts if spec else {}
    if name == "tokenmix":
        return OWN
    if name == "official":
        if not layouts:
            raise WeightsError(f"no official layout is known: {_no_layouts(spec)}")
        return _read(next(iter(layouts.values())))
    if name.endswith((".yaml", ".yml")):
        return _read(Path(name))
    path = layouts.get(name) or find_layout(name, spec.source.folder if spec else Path())
    if path is None:
        finding = unknown_layout(name, known_layouts(["auto", "tokenmix", "official", *layouts], Path()), None)
        raise FindingsError([finding])
    return _read(path)


def _no_layouts(spec: Spec | None) -> str:
    if spec is None:
        return "the module was not made by `tokenmix.build`; name its spec with spec=..."
    return f"{spec.name} names no `layouts`"


def _entry(checkpoint: Checkpoint, layout: Layout, entry: str | None) -> str | None:
    """The nested entry that holds the weights."""
    if entry is not None:
        return entry
    known = checkpoint.entries
    preferred = next((name for name in layout.state if name in known), None)
    if preferred is not None:
        return preferred
    return next(iter(known)) if len(known) == 1 and not checkpoint.state(None)[0] else None


def _state(
    wanted: Mapping[str, Tensor], checkpoint: Checkpoint, layout: Layout, place: str | None
) -> tuple[str, dict[str, Tensor], dict[str, str]]:
    """The prefix that all entries have and the weights have not, then tensors and other things by name without it."""
    tensors, others = checkpoint.state(place)
    prefix = common_prefix(wanted, tensors, layout)
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return prefix, bare, {name.removeprefix(prefix): kind for name, kind in others.items()}


def no_tensors(checkpoint: Checkpoint) -> CheckpointError:
    """What to raise of a checkpoint without tensors where they were looked for."""
    known = ", ".join(f"{name} ({count})" for name, count in checkpoint.entries.items())
    elsewhere = f" at its top; entries that do: {known}; choose one with entry=..." if known else ""
    return CheckpointError(f"{checkpoint.name} holds no tensors{elsewhere}")


def _fitting(wanted: Mapping[str, Tensor], checkpoint: Checkpoint, spec: Spec | None, entry: str | None) -> Layout:
    """The layout that goes furthest with the names. Raises `WeightsError` if none or several do."""
    layouts = _candidates(spec)
    found = []
    for layout in layouts:
        _, tensors, _ = _state(wanted, checkpoint, layout, _entry(checkpoint, layout, entry))
        found.append((coverage(wanted, tensors, layout), layout, tensors))
    found.sort(key=lambda item: -item[0].share)
    best = found[0][0].share
    fitting = [layout for covered, layout, _ in found if covered.share == best]
    if best >= ENOUGH and len(fitting) == 1:
        return fitting[0]
    if best >= ENOUGH:
        names = " and ".join(layout.name for layout in fitting)
        raise WeightsError(f"{checkpoint.name} fits several layouts equally well: {names}; choose one with layout=...")
    if not any(tensors for *_, tensors in found):
        raise no_tensors(checkpoint)
    lines = [f"{checkpoint.name} fits no layout that is known for the module; weights found, going by names:"]
    for covered, layout, tensors in found:
        pair = _nearest_pair(wanted, tensors, layout)
        lines.append(f"  {layout.name:20} {covered.placed} of {covered.needed}; {pair}")
    if len(layouts) == 1:
        lines.append(f"  the module's own keys are all that was tried: {_no_layouts(spec)}")
    others = [name for name in shipped_layouts() if name not in {layout.name for layout in layouts}]
    if others:
        lines.append(f"  layouts of other families: {', '.join(others)}")
    raise WeightsError("\n".join(lines))


def _nearest_pair(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], layout: Layout) -> str:
    """A weight without an entry and the entry whose name comes nearest."""
    places = {target: name for name in tensors for target in layout.resolve(name)[1] or (name,)}
    key = next((key for key in wanted if key not in places and not layout.is_fresh(key)), None)
    if key is None:
        return "all there"
    near = nearest(key, places)
    return f"no {key}" + (
        f", nearest {places[near[0]]}" if near else f", the entries begin with {next(iter(tensors), '-')}"
    )


def convert_weights(
    spec: str | Path | Model,
    source: str | os.PathLike | Mapping[str, Any],
    output: str | os.PathLike,
    layout: str = "auto",
    *,
    allow: Iterable[str] = (),
    entry: str | None = None,
    features_only: bool = False,
    adapt: bool = True,
    **overrides: Any,
) -> Report:
    """Write a checkpoint as safetensors with the keys and shapes of the emitted module of a spec.

    Values keep their dtype. Weights that stay fresh are left out: the file holds nothing that was drawn at random.
    Counters such as `num_batches_tracked` are written as a new module has them.

    Raises:
        Mismatch, CheckpointError, FindingsError: as `load_weights`. Nothing is written then.
    """
    require_torch("safetensors")
    from safetensors.torch import save_file

    checkpoint = read_checkpoint(source)
    module = build(spec, features_only=features_only, **overrides)
    wanted = module.state_dict()
    found = _spec(spec)
    values, report = matched(wanted, checkpoint, layout, spec, allow, entry, adapt)
    counters = {key for key, tensor in wanted.items() if not tensor.is_floating_point()} - values.keys()
    whole = {key: values.get(key, tensor) for key, tensor in wanted.items() if key in values or key in counters}
    tensors = {
        key: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format) for key, tensor in whole.items()
    }
    metadata = {"format": "pt", "tokenmix": __version__, "spec": found.name if found else "", "layout": report.layout}
    with replacing(Path(output)) as beside:
        save_file(tensors, beside, metadata)
    return report


def was_converted(path: Path) -> bool:
    """Whether a file was written by `convert_weights`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return "tokenmix" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False
