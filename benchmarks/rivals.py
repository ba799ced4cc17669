"""The usual way to the cost of a model: build it with timm and run an image through it under a counter.

Nothing but what that needs is imported here, so that a cold process pays for nothing else.

example: python benchmarks/rivals.py fvcore swin_tiny_patch4_window7_224
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch

_KEEP = []


def _complete_torchvision() -> None:
    """Declare the two operators that torchvision looks for at import where its binary does not fit this torch.

    timm imports torchvision; none of the models here calls these operators.
    """
    found = find_spec("torchvision")
    if found is None or found.origin is None:
        return
    try:
        for binary in Path(found.origin).parent.glob("_C.*"):
            torch.ops.load_library(binary)
    except OSError:
        pass
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEEP.append(library)


def create(name: str) -> torch.nn.Module:
    """A model by name in evaluation mode: one of timm's, or `tokenmix:NAME` for a shipped spec."""
    if name.startswith("tokenmix:"):
        import tokenmix

        return tokenmix.build(name.removeprefix("tokenmix:")).eval()
    if "timm" not in sys.modules:
        _complete_torchvision()
    import timm

    return timm.create_model(name, pretrained=False).eval()


def fvcore(name: str, size: int = 224) -> int:
    """Multiply-adds as fvcore counts them."""
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(create(name), torch.zeros(1, 3, size, size))
    return int(analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total())


def torch_meta(name: str, size: int = 224) -> int:
    """Multiply-adds as torch's own counter has them, on tensors without data: no weights drawn, nothing computed."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        module, images = create(name), torch.zeros(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(images)
    return counter.get_total_flops() // 2


COUNTERS = {"fvcore": fvcore, "torch_meta": torch_meta}

if __name__ == "__main__":
    print(COUNTERS[sys.argv[1]](sys.argv[2]))
