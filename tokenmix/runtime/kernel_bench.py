"""Fast kernels alone, in turns with the references they replace and with a copy of as many bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenmix.fast.cases import Case, find, module
from tokenmix.runtime.bench import DTYPES, Setting, interleaved

__all__ = ["KernelTiming", "bench_kernels"]

# On a GPU a call returns before its kernels ran: so many follow each other unwatched, and waiting is paid once.
_QUEUED = 10


@dataclass(frozen=True)
class KernelTiming:
    """A kernel at one shape.

    Attributes:
        step: "forward", or "forward and backward" with gradients of all inputs.
        runs: what runs as the kernel on this device, as `status` calls it.
        moved: bytes that no implementation can avoid: inputs read once, outputs written once; with gradients inputs
            and the outputs' gradients read once more, and the inputs' gradients written.
        fast, reference, copy: seconds, round by round; `copy` moves as many bytes from one tensor to another.
    """

    kernel: str
    case: str
    step: str
    runs: str
    moved: int
    fast: tuple[float, ...]
    reference: tuple[float, ...]
    copy: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """How many times the kernel goes into its reference: the median of rounds."""
        return statistics.median(b / a for a, b in zip(self.fast, self.reference, strict=True))

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.moved / statistics.median(self.fast)

    @property
    def share(self) -> float:
        """Of the bandwidth that the copy reaches: the median of rounds."""
        return statistics.median(b / a for a, b in zip(self.fast, self.copy, strict=True))


def bench_kernels(
    names: Sequence[str], setting: Setting, *, rounds: int = 30, progress: Callable[[str], None] = lambda _: None
) -> Iterator[KernelTiming]:
    """Time kernels at the shapes of the families' stages: forward, and with `setting.train` forward and backward too.

    Args:
        names: of kernels as `tokenmix doctor` has them; all if empty.
        setting: its `size` has no meaning here.

    Raises:
        ValueError: if a name is of no kernel.
    """
    device = setting.device.partition(":")[0]
    for kernel in find(list(names)):
        runs = module(kernel).status().get(device, ("reference", ""))[0]
        for case in module(kernel).cases(setting.batch):
            for step in ("forward", "forward and backward")[: 1 + setting.train]:
                calls, moved = _calls(case, setting, step != "forward")
                if not calls:
                    continue
                progress(f"{kernel} {case.name}, {step}")
                times = interleaved(calls, rounds, device=setting.device, warm_up=3)
                repeats = _QUEUED if device == "cuda" else 1
                seconds = (tuple(t / repeats for t in times[side]) for side in ("fast", "reference", "copy"))
                yield KernelTiming(kernel, case.name, step, runs, moved, *seconds)


def _calls(case: Case, setting: Setting, train: bool) -> tuple[dict[str, Callable[[], object]], int]:
    """(Both sides and the copy as calls without arguments, how many bytes a call moves at least).

    There are no calls for a training step of a kernel without gradients.
    """
    inputs = tuple(
        x.detach().to(setting.device, DTYPES[setting.dtype] if x.is_floating_point() else x.dtype) for x in case.inputs
    )
    read = _bytes(inputs)
    if train:
        inputs = tuple(x.requires_grad_(x.is_floating_point()) for x in inputs)
    with torch.set_grad_enabled(train):
        outputs = _tensors(case.fast(*inputs))
    moved = read + _bytes(outputs)
    wanted: list[Tensor] = []
    grads: list[Tensor] = []
    if train:
        results = [y for y in outputs if y.requires_grad]
        if not results:
            return {}, 0
        grads = [torch.randn_like(y) for y in results]
        wanted = [x for x in inputs if x.requires_grad]
        reached = torch.autograd.grad(results, wanted, grads, allow_unused=True)
        wanted = [x for x, grad in zip(wanted, reached, strict=True) if grad is not None]
        moved += read + _bytes(grads) + _bytes(wanted)
    if setting.compiled:
        torch._dynamo.reset()  # every case is compiled for its own shape

    def call(side: Callable[..., Any]) -> Callable[[], object]:
        function: Any = torch.compile(side) if setting.compiled else side

        def evaluate() -> None:
            with torch.inference_mode():
                function(*inputs)

        def step() -> None:
            torch.autograd.grad([y for y in _tensors(function(*inputs)) if y.requires_grad], wanted, grads)

        return step if train else evaluate

    source = torch.zeros(-(-moved // 2), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {
        "fast": call(case.fast),
        "reference": call(case.reference),
        "copy": partial(target.copy_, source),
    }
    if setting.device.startswith("cuda"):
        calls = {name: partial(_queue, one) for name, one in calls.items()}
    return calls, moved


def _queue(call: Callable[[], object]) -> None:
    for _ in range(_QUEUED):
        call()


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
