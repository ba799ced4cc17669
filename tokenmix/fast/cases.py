"""What fast kernels are timed at: each file of `tokenmix.fast` has a function `cases` beside its `status`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokenmix.blocks.kernels import FAST

__all__ = ["Case", "find", "kernels", "module"]


@dataclass(frozen=True)
class Case:
    """A kernel and what it replaces, at one shape.

    Attributes:
        name: the shape in a few words.
        inputs: tensors on the CPU in float32, or of whole numbers; those of floats get gradients.
        fast, reference: called with the inputs, return a tensor or several; of the same values up to rounding.
    """

    name: str
    inputs: tuple[Tensor, ...]
    fast: Callable[..., Any]
    reference: Callable[..., Any]


def kernels() -> list[str]:
    """The files of `tokenmix.fast` that hold kernels, named after them."""
    return sorted(set(FAST.values()))


def module(kernel: str) -> Any:
    """A kernel's file: `status()`, what runs where, and `cases(batch)`, an iterator over `Case`."""
    return importlib.import_module(f"tokenmix.fast.{kernel}")


def find(names: list[str]) -> list[str]:
    """Kernels by the names of their files, or of what they give to emitted modules; all if none is named.

    Raises:
        ValueError: if a name is of no kernel.
    """
    known = {kernel: kernel for kernel in kernels()} | FAST
    for name in names:
        if name not in known:
            raise ValueError(f"there is no fast kernel {name}; there are {', '.join(kernels())}")
    return sorted({known[name] for name in names}) or kernels()
