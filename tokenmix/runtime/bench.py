"""Speed of modules: interleaved runs, peak memory, and what the processor could do at best in the same minute."""

from __future__ import annotations

import ast
import gc
import importlib.util
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tokenmix.runtime.memory import page_faults
from tokenmix.runtime.module import build

if TYPE_CHECKING:
    from tokenmix.compiler.model import Model

__all__ = [
    "DTYPES",
    "Setting",
    "Timing",
    "bench",
    "copy_bandwidth",
    "gemm_rate",
    "interleaved",
    "opponent",
    "peak_bytes",
    "tensor_float32",
    "threads",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Setting:
    """How modules are run.

    Attributes:
        batch: images per pass.
        size: (height, width).
        dtype: of weights and images.
        compiled: whether `torch.compile` is put around the modules.
        train: a pass is forward and backward with fresh gradients; else forward in evaluation mode.
        folded: whether the spec's own module is folded for inference; its opponents are not.
        checkpointed: whether it takes part a second time, with activation checkpointing.
    """

    batch: int
    size: tuple[int, int]
    device: str = "cpu"
    dtype: str = "float32"
    compiled: bool = False
    train: bool = False
    folded: bool = False
    checkpointed: bool = False


@dataclass(frozen=True)
class Timing:
    """One module's passes.

    Attributes:
        seconds: of every timed pass, in the order run.
        peak: bytes that tensors took beyond weights and images, at most.
        macs: multiply-adds of one forward pass of the batch; 0 where nobody counted.
        faults: pages that the system supplied during a pass, median; see `tokenmix.keep_memory`.
    """

    name: str
    seconds: tuple[float, ...]
    peak: int
    macs: int = 0
    faults: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def rate(self, train: bool) -> float:
        """Multiply-adds per second; a training pass is three forward ones (gradients of inputs and of weights)."""
        return self.macs * (3 if train else 1) / self.median


def bench(
    model: Model,
    setting: Setting,
    against: Sequence[str] = (),
    *,
    rounds: int = 10,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Timing]:
    """Time a spec's module and its opponents in turns, in one process.

    Args:
        against: "reference", "timm:NAME" or "FILE.py:CLASS"; see `opponent`.
        rounds: timed passes of each, after two that are not.
        progress: told in a word what is being done.
    """
    modules = {model.name: build(model, for_inference=setting.folded)}
    if setting.checkpointed:
        modules[f"{model.name}, checkpointed"] = build(model, checkpoint=True)
    counted = {*modules, "reference"}
    for name in against:
        progress(f"building {name}")
        modules[name] = opponent(name, model)
    shape = (setting.batch, model.input_shape[0], *setting.size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    images = images.to(setting.device, DTYPES[setting.dtype])
    calls = {name: _call(module, images, setting) for name, module in modules.items()}
    peaks = {}
    for name, call in calls.items():
        progress(f"first pass of {name}")
        call()  # compiles, and loads what is loaded once
        peaks[name] = peak_bytes(call, setting.device)
    faults: dict[str, list[int]] = {name: [] for name in calls}
    watched = {name: _watched(call, faults[name]) for name, call in calls.items()}
    times = interleaved(watched, rounds, device=setting.device, progress=progress)
    macs = model.cost(setting.size)["mac"] * setting.batch
    return [
        Timing(n, tuple(times[n]), peaks[n], macs if n in counted else 0, statistics.median_low(faults[n][-rounds:]))
        for n in calls
    ]


def _watched(call: Callable[[], object], faults: list[int]) -> Callable[[], None]:
    """The call, which notes the page faults of every run."""

    def run() -> None:
        before = page_faults()
        call()
        faults.append(page_faults() - before)

    return run


def opponent(name: str, model: Model) -> nn.Module:
    """What a spec's module is compared with.

    Args:
        name: "reference" for the spec on plain torch layers, "timm:NAME" for a model of timm, "FILE.py:CLASS" or
            "FILE.py:CLASS(width=64)" for a class of the user's own file.

    Raises:
        ValueError: if there is no such opponent.
    """
    if name == "reference":
        return build(model, kernels="reference")
    kind, _, rest = name.partition(":")
    if kind == "timm" and rest:
        try:
            import timm
        except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises the latter
            raise ValueError(f"{name} needs timm, which cannot be imported: {error}") from None
        if rest not in timm.list_models():
            raise ValueError(f"timm has no model {rest}")
        return timm.create_model(rest)
    file, colon, call = name.partition(".py:")
    if colon and call:
        return _own(f"{file}.py", call, name)
    raise ValueError(f'an opponent is "reference", "timm:NAME" or "FILE.py:CLASS", not {name!r}')


def _own(file: str, call: str, name: str) -> nn.Module:
    """A module of the user's own file, by the name of its class or by a call with constants."""
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file}")
    try:
        wanted = ast.parse(call, mode="eval").body
        arguments: list[Any] = []
        named: dict[str, Any] = {}
        if isinstance(wanted, ast.Call):
            arguments = [ast.literal_eval(value) for value in wanted.args]
            named = {str(word.arg): ast.literal_eval(word.value) for word in wanted.keywords}
            wanted = wanted.func
        if not isinstance(wanted, ast.Name):
            raise ValueError
    except (SyntaxError, ValueError):
        raise ValueError(f"write FILE.py:CLASS, or FILE.py:CLASS(width=64) with constants, not {name}") from None
    spec = importlib.util.spec_from_file_location(f"tokenmix_opponent_{Path(file).stem}", file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    folder = str(Path(file).parent.resolve())
    sys.path.insert(0, folder)  # files beside it are found, as by `python FILE.py`
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, wanted.id):
            raise ValueError(f"{file} defines no {wanted.id}")
        return getattr(module, wanted.id)(*arguments, **named)
    except ValueError:
        raise
    except Exception as error:  # the user's own code: what is wrong with it is no bug of ours
        raise ValueError(f"{name} cannot be made: {type(error).__name__}: {error}") from error
    finally:
        with suppress(ValueError):
            sys.path.remove(folder)


def _call(module: nn.Module, images: Tensor, setting: Setting) -> Callable[[], object]:
    module = module.to(setting.device, DTYPES[setting.dtype]).train(setting.train)
    run: Any = torch.compile(module) if setting.compiled else module

    def evaluate() -> Tensor:
        with torch.inference_mode():
            return run(images)

    def train() -> None:
        module.zero_grad(set_to_none=True)
        try:
            run(images).float().square().mean().backward()
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError("batch norm over one value cannot be trained: give --batch 2 or more") from error

    return train if setting.train else evaluate


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    device: str = "cpu",
    warm_up: int = 2,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Seconds of every call, once a round in turns, forwards then backwards, so that none always comes first."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.freeze()  # what is there already need not be looked through before every pass
    try:
        for number in range(-warm_up, rounds):
            progress("warming up" if number < 0 else f"round {number + 1} of {rounds}")
            for name in list(calls)[:: -1 if number % 2 else 1]:
                gc.collect()
                _wait(device)
                start = time.perf_counter()
                calls[name]()
                _wait(device)
                if number >= 0:
                    taken[name].append(time.perf_counter() - start)
    finally:
        gc.unfreeze()
    return taken


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def gemm_rate(device: str, dtype: str, side: int = 2048, rounds: int = 5) -> float:
    """Multiply-adds per second of a square matrix product: what can be hoped for."""
    a = torch.randn(side, side).to(device, DTYPES[dtype])
    times = interleaved({"gemm": lambda: a @ a}, rounds, device=device)["gemm"]
    return side**3 / statistics.median(times)


def copy_bandwidth(device: str, mebibytes: int = 256, rounds: int = 5) -> float:
    """Bytes per second read and written by a copy: the limit of what only moves memory."""
    a = torch.zeros(mebibytes * 2**20, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    times = interleaved({"copy": lambda: b.copy_(a)}, rounds, device=device)["copy"]
    return 2 * a.numel() / statistics.median(times)


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most bytes that tensors made by a call held at once."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _Allocations() as seen:
        call()
    return seen.peak


class _Allocations(TorchDispatchMode):
    """Adds up storages as ops return them and takes them off when they die; torch keeps no such record on the CPU.

    Memory inside of an op (the workspace of a convolution) is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage(), given)
        return result

    def _meet(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in given or key in self._known:
            return
        size = storage.nbytes()

        def gone(_: object) -> None:
            self._known.pop(key, None)
            self._held -= size

        self._known[key] = weakref.ref(storage, gone)
        self._held += size
        self.peak = max(self.peak, self._held)


@contextmanager
def tensor_float32(allowed: bool) -> Iterator[None]:
    """Let float32 on CUDA be rounded to TF32, or not, in convolutions and matrix products alike.

    torch's default is convolutions only: a module of convolutions would be held against another precision's limit.
    """
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = allowed
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run with so many threads of torch."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
