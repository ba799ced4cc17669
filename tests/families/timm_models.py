"""timm's and torchvision's models as references. Tests that need one are skipped where it is absent."""

import pytest
import torch
from torch import nn

from tests.families.keys import randomise


def _define_missing_operators() -> None:
    """Schemas that torchvision registers fakes for when it is imported, and that a build for another torch lacks."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        try:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:
            return  # torchvision's own operators are there
    _KEPT.append(library)  # what a library defines goes with it


_KEPT: list[torch.library.Library] = []


def reference_package(name: str):
    """`timm` or `torchvision`, or a skip."""
    if not _KEPT:
        try:
            import torchvision  # noqa: F401
        except ImportError:
            pass
        except RuntimeError:
            _define_missing_operators()
    return pytest.importorskip(name)


def timm_model(name: str, **options) -> nn.Module:
    """A model in float64 with random weights and no drop path."""
    timm = reference_package("timm")
    model = timm.create_model(name, **{"num_classes": 11, "drop_path_rate": 0.0, **options})
    return _with_random_weights(model)


def torchvision_model(name: str) -> nn.Module:
    """As `timm_model`, from torchvision."""
    torchvision = reference_package("torchvision")
    model = getattr(torchvision.models, name)(num_classes=11)
    for layer in model.modules():
        if isinstance(layer, torchvision.ops.StochasticDepth):
            layer.p = 0.0
    return _with_random_weights(model)


def timm_parameters(name: str) -> int:
    timm = reference_package("timm")
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())


def _with_random_weights(model: nn.Module) -> nn.Module:
    model = model.double()
    tables = {n: b.clone() for n, b in model.named_buffers() if "running_" not in n}  # indices and masks
    randomise(model)
    for name, buffer in model.named_buffers():
        if name in tables:
            buffer.copy_(tables[name])
    return model
