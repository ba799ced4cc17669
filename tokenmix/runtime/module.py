"""Importing an emitted source and building its module."""

from __future__ import annotations

import atexit
import copyreg
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from functools import cache
from importlib.abc import InspectLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tokenmix.compiler.model import Model, load
from tokenmix.compiler.spec import shipped_specs
from tokenmix.dsl.diagnostics import FindingsError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["MissingTorch", "build", "import_source", "require_torch", "unwrapped"]

# Where imported sources live in `sys.modules`: below a name no file has.
_PACKAGE = "tokenmix_emitted"


class MissingTorch(ImportError):
    """torch (or another package of the extra) is not installed."""


def require_torch(*packages: str) -> None:
    """Raise `MissingTorch` with the remedy if torch or one of `packages` cannot be found. Imports nothing."""
    for name in ("torch", *packages):
        if importlib.util.find_spec(name) is None:
            extra = "audit" if name == "fvcore" else "torch"
            raise MissingTorch(f"this needs {name}, which is not installed: pip install 'tokenmix[{extra}]'")


class _Loader(InspectLoader):
    """Serves an emitted source to the import system, so that tracebacks and `inspect` show its lines."""

    def __init__(self, source: str, filename: str):
        self._source = source
        self._filename = filename

    def get_source(self, fullname: str) -> str:
        return self._source

    def get_filename(self, fullname: str) -> str:
        return self._filename

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self._source, self._filename)


def import_source(source: str, name: str) -> ModuleType:
    """The emitted source as a module; equal sources are imported once."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    fullname = f"{_PACKAGE}.{name}_{digest}"
    if fullname in sys.modules:
        return sys.modules[fullname]
    if _PACKAGE not in sys.modules:
        package = ModuleType(_PACKAGE)
        package.__path__ = []
        sys.modules[_PACKAGE] = package
    loader = _Loader(source, _shown_file(f"{name}_{digest}.py", source))
    spec = importlib.util.spec_from_loader(fullname, loader, origin=loader.get_filename(fullname))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = loader.get_filename(fullname)
    sys.modules[fullname] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[fullname]
        raise
    _make_picklable(module, source, name)
    return module


def _shown_file(name: str, source: str) -> str:
    """A file with the source for as long as the process lives: tracebacks and debuggers show lines of files only."""
    try:
        path = Path(_folder()) / name
        path.write_text(source, encoding="utf-8")
    except OSError:
        return f"{_PACKAGE}/{name}"
    return str(path)


@cache
def _folder() -> str:
    folder = tempfile.mkdtemp(prefix="tokenmix-")
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a forked worker
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def _make_picklable(module: ModuleType, source: str, name: str) -> None:
    """Pickles of emitted modules carry the source, so that a process that never built the model can load them."""
    from torch import nn

    def reduce(instance: nn.Module) -> tuple:
        return _restore, (source, name, type(instance).__name__), instance.__dict__

    for value in list(vars(module).values()):
        if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == module.__name__:
            copyreg.pickle(value, reduce)


def _restore(source: str, name: str, class_name: str) -> nn.Module:
    cls = getattr(import_source(source, name), class_name)
    return cls.__new__(cls)


def build(
    spec: str | Path | Model,
    *,
    num_classes: int | None = None,
    features_only: bool = False,
    kernels: str = "fast",
    for_inference: bool = False,
    checkpoint: bool = False,
    **overrides: Any,
) -> nn.Module:
    """Compile a spec and build its module, freshly initialised, in training mode like any torch module.

    Args:
        spec: a path, the name of a shipped spec, or a loaded model.
        num_classes: width of the classifier; 0 gives the pooled features. Default: as the spec says.
        features_only: return the map of every stage behind the spec's `features`, (B, C, H, W), instead of scores.
        kernels: "fast", or "reference" for the plain torch layers that the fast ones are compared with.
        for_inference: fold what can be folded, as `tokenmix.for_inference` does with a module that holds weights.
        checkpoint: do not keep the activations of blocks for the backward pass but compute them anew, block by block.
        overrides: values for parameters of the spec.

    Raises:
        FindingsError: if the spec has findings.
        TypeError, ValueError: if `num_classes` is nothing that the spec allows, or arguments exclude each other.
        MissingTorch: if torch is not installed.

    Example:
        >>> build("mixformer_b1", num_classes=10).head.classifier
        Linear(in_features=1280, out_features=10, bias=True)
    """
    require_torch()
    if kernels not in ("fast", "reference"):
        raise ValueError(f'kernels is "fast" or "reference", not {kernels!r}')
    if num_classes is not None and "classes" in overrides:
        raise TypeError("num_classes and classes say the same: give one of them")
    if isinstance(spec, Model):
        if overrides:
            raise TypeError("give overrides to load() where a loaded model is built")
        model = spec
    else:
        model = load(spec, **overrides)
    if model.findings:
        raise FindingsError(model.findings)
    module = import_source(model.source(standalone=kernels == "reference"), model.name)
    cls = getattr(module, class_name(model))
    arguments: dict[str, Any] = {}
    assert model.plan is not None
    if num_classes is not None:
        arguments["num_classes"] = _classes(model, num_classes)
    if features_only:
        if not model.plan.norms:
            raise ValueError(f"{model.name} does not say under `features` what a dense backbone puts on its maps")
        arguments["features_only"] = True
    built = cls(**arguments)
    # By these `load_weights` finds the layouts of the family, and `for_inference` what can be folded.
    built.tokenmix_spec = _reference(model)
    built.tokenmix_settings = dict(model.overrides)
    built.tokenmix_arguments = arguments
    built.tokenmix_kernels = kernels
    if checkpoint:
        if for_inference:
            raise ValueError("checkpoint saves memory of training, for_inference is for evaluation: choose one")
        for stage in built.stages:
            stage.checkpointed = True
    if for_inference:
        from tokenmix.runtime import inference

        return inference.for_inference(built)
    return built


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside the wrappers of `torch.compile` and data-parallel training, whose weights it keeps."""
    from torch import nn

    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def _classes(model: Model, number: int) -> int:
    """`num_classes`, held against what the spec declares of its parameter `classes`."""
    import operator

    assert model.spec is not None
    assert model.plan is not None
    if "classes" not in model.plan.parameters:
        raise ValueError(f"{model.name} has no parameter `classes` for num_classes to set")
    declared = model.spec.parameters.get("classes")
    low, high = (getattr(getattr(declared, bound, None), "value", None) for bound in ("low", "high"))
    bounds = [f"at {word} {bound}" for word, bound in (("least", low), ("most", high)) if bound is not None]
    wanted = f"num_classes sets `classes` of {model.name}, a whole number{', ' if bounds else ''}{' and '.join(bounds)}"
    if isinstance(number, bool) or not hasattr(number, "__index__"):
        raise TypeError(f"{wanted}; got {number!r}")
    number = operator.index(number)
    if (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(f"{wanted}; got {number}")
    return number


def _reference(model: Model) -> str:
    """Name of a shipped spec, path of any other: what `load` takes."""
    assert model.spec is not None
    path = os.path.abspath(model.spec.source.name)
    shipped = shipped_specs().get(Path(path).stem)
    return path if shipped is None or os.path.abspath(shipped) != path else shipped.stem


def class_name(model: Model) -> str:
    """Name of the emitted class of a model."""
    return "".join(part.capitalize() for part in model.name.split("_"))
