"""The blocks of a stage, one after the other."""

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["Stage", "kept_statistics", "passes"]


class Stage(nn.Sequential):
    """Named parts in a row: `down`, then `blocks` or `body`.

    Where `checkpointed` is set, a block's activations are not kept for the backward pass but computed anew, block by
    block: less memory for about a third more time, with the same gradients.
    """

    def __init__(self, **parts: nn.Module):
        super().__init__(OrderedDict(parts))
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        if not (self.checkpointed and torch.is_grad_enabled()):
            return super().forward(x)
        compiling = torch.compiler.is_compiling()  # a trace computes anew what it needs, and statistics once
        for part in self:
            for block in part if isinstance(part, nn.Sequential) else (part,):
                if compiling:
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = checkpoint(block, x, use_reentrant=False, context_fn=functools.partial(passes, block))
        return x


def passes(block: nn.Module) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """What stands around the first and the second computation of a block."""
    return contextlib.nullcontext(), kept_statistics(block)


@contextlib.contextmanager
def kept_statistics(block: nn.Module) -> Iterator[None]:
    """Leave running statistics as they are, while a block is computed a second time."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
