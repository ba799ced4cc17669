"""Where a pass spends its time: torch's profiler with one range per block, beside the block's multiply-adds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from tokenmix.runtime.bench import DTYPES, Setting
from tokenmix.runtime.module import build

if TYPE_CHECKING:
    from tokenmix.compiler.model import Model

__all__ = ["BlockTime", "profile"]


@dataclass(frozen=True)
class BlockTime:
    """A block's share of a forward pass.

    Attributes:
        name: as in the graph, such as `stages.2.blocks.5`.
        block: name of its definition.
        seconds: per pass; on a GPU the time of its kernels.
        macs: multiply-adds of the batch.
    """

    name: str
    block: str
    seconds: float
    macs: int


def profile(
    model: Model, setting: Setting, *, rounds: int = 5, tensorboard: Path | None = None, kernels: str = "fast"
) -> list[BlockTime]:
    """Profile forward passes in evaluation mode.

    Args:
        tensorboard: folder for a trace that TensorBoard's profiler plugin reads.
    """
    module = build(model, kernels=kernels).eval().to(setting.device, DTYPES[setting.dtype])
    images = torch.randn(setting.batch, model.input_shape[0], *setting.size).to(setting.device, DTYPES[setting.dtype])
    graph = model.elaborate(setting.size)
    places = {node.name: node for node in graph.nodes}
    handles = [h for name in places for h in _ranges(module, name)]
    cuda = setting.device.startswith("cuda")
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    ready: Callable[[Any], None] | None = None
    if tensorboard is not None:
        ready = torch.profiler.tensorboard_trace_handler(str(tensorboard), worker_name=model.name)
    with torch.inference_mode(), ExitStack() as stack:
        stack.callback(lambda: [h.remove() for h in handles])
        for _ in range(2):
            module(images)
        with torch.profiler.profile(activities=activities, on_trace_ready=ready) as seen:
            for _ in range(rounds):
                module(images)
            if cuda:
                torch.cuda.synchronize()
    micro: Counter[str] = Counter()
    for event in seen.key_averages():
        if event.key in places:
            micro[event.key] += event.device_time_total if cuda else event.cpu_time_total
    mac = model.conventions["mac"]
    return [
        BlockTime(name, node.target.name, micro[name] / 1e6 / rounds, node_macs(node, mac) * setting.batch)
        for name, node in places.items()
    ]


def node_macs(node: Any, convention: Any) -> int:
    """Multiply-adds of one image in a placed block or op."""
    tally = node.target.tally if hasattr(node.target, "tally") else node.tally
    return convention.total(tally)


def _ranges(module: nn.Module, name: str) -> list[Any]:
    """Hooks that open and close a profiler range of that name around a submodule."""
    part = module.get_submodule(name)
    running: list[Any] = []

    def begin(*_: Any) -> None:
        running.append(record_function(name))
        running[-1].__enter__()

    def end(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    return [part.register_forward_pre_hook(begin), part.register_forward_hook(end)]
