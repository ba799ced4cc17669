"""What a primitive op is: a signature, and one rule each for shape, weights, cost and the torch code it becomes.

An op file in `blocks/ops/` defines one subclass and one instance of it called `op`; the file is named after the op.
Rules are plain arithmetic on dimensions, so that the same rule gives numbers for an input size and formulas for the
emitted source. Checks that need numbers stand in `check`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tokenmix.blocks.cost import Tally
from tokenmix.dsl.diagnostics import Mistake
from tokenmix.dsl.parser import parse_signature
from tokenmix.dsl.syntax import Signature

__all__ = ["KINDS", "Op", "Tensor", "call", "construct", "size"]

# Kind -> its dimensions, the batch left out. Memory order differs: channels always come last (`layout`).
KINDS: dict[str, tuple[str, ...]] = {
    "map": ("C", "H", "W"),  # a feature map or image
    "tokens": ("N", "C"),
    "windows": ("n", "N", "C"),
    "vector": ("C",),  # one number per channel and image
    "weight": ("C",),  # a learnable number per channel, the same for every image
    "scores": ("h", "N", "M"),  # one number per head, query and key
    "window_scores": ("n", "h", "N", "M"),  # the same in every window
    "order": ("N",),  # positions of tokens, first to last
}


@dataclass(frozen=True)
class Tensor:
    """Kind and dimensions of a value; `dims` follow `KINDS[kind]`, numbers in the analysis, formulas in emission."""

    kind: str
    dims: tuple[Any, ...]

    def __getattr__(self, letter: str) -> Any:
        letters = KINDS[self.kind]
        if letter == "N" and self.kind == "map":
            return self.H * self.W
        if letter not in letters:
            raise AttributeError(letter)
        return self.dims[letters.index(letter)]

    def having(self, **dims: Any) -> Tensor:
        """This tensor with some dimensions replaced."""
        letters = KINDS[self.kind]
        return Tensor(self.kind, tuple(dims.get(k, d) for k, d in zip(letters, self.dims, strict=True)))

    @property
    def letters(self) -> tuple[str, ...]:
        return KINDS[self.kind] + (("N",) if self.kind == "map" else ())

    @property
    def layout(self) -> tuple[Any, ...]:
        """Dimensions in memory order, batch left out: a map is (H, W, C)."""
        return (*self.dims[1:], self.dims[0]) if self.kind == "map" else self.dims

    def __str__(self) -> str:
        inner = ", ".join(f"{k}={d}" for k, d in zip(KINDS[self.kind], self.dims, strict=True))
        return f"{self.kind} ({inner})"


def size(tensor: Tensor) -> int:
    """Elements of one image's worth of a tensor."""
    return math.prod(tensor.dims)


class Op(ABC):
    """A primitive op.

    Attributes:
        signature_text: `name(tensor: kinds; hyperparameter: type = default)` in the block language.
        helpers: names from `tokenmix.blocks.kernels` that the emitted code refers to.
        is_view: the output shares the memory of the first input.
        is_parameter: the submodule is a tensor, read and not called.
    """

    signature_text: ClassVar[str]
    helpers: ClassVar[tuple[str, ...]] = ()
    is_view: ClassVar[bool] = False
    is_parameter: ClassVar[bool] = False

    @property
    def signature(self) -> Signature:
        return parse_signature(self.signature_text)

    @property
    def name(self) -> str:
        return self.signature_text.split("(", 1)[0]

    @property
    def doc(self) -> str:
        return (type(self).__doc__ or "").strip()

    def check(self, *inputs: Tensor, **arguments: Any) -> None:
        """Raise `Mistake` where numbers do not fit. Called before `shape`, with numbers only."""
        return  # most ops take whatever their signature admits

    @abstractmethod
    def shape(self, *inputs: Tensor, **arguments: Any) -> Tensor | tuple[Tensor, ...]:
        """The outputs. Must be arithmetic that formulas can go through."""

    def weights(self, *inputs: Tensor, **arguments: Any) -> Mapping[str, tuple[int, ...]]:
        """Learnable parameters: name -> shape, as in the state dict of the emitted module."""
        return {}

    @abstractmethod
    def cost(self, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], **arguments: Any) -> Tally:
        """Exact counts for one image."""

    def module(self, *inputs: Tensor, **arguments: Any) -> str | None:
        """Constructor call of the submodule that this op becomes, or None for a function."""
        return None

    def forward(self, *codes: str, inputs: tuple[Tensor, ...], **arguments: Any) -> str:
        """The torch expression of a function op, from the expressions of its inputs."""
        raise NotImplementedError(f"{self.name} becomes a module")

    def mistake(self, message: str, id: str = "TM1403", **details: Any) -> Mistake:
        """A finding about this op's arguments or inputs; the caller adds the place."""
        return Mistake(id, f"`{self.name}`: {message}", **details)


def construct(name: str, *positional: Any, **keywords: Any) -> str:
    """Text of a call. Keywords given as `(value, default)` are left out where they equal the default.

    Example:
        >>> construct("nn.Linear", 8, 16, bias=(True, True))
        'nn.Linear(8, 16)'
    """
    parts = [str(p) for p in positional]
    for key, value in keywords.items():
        if isinstance(value, tuple):
            value, default = value
            if isinstance(value, type(default)) and value == default:
                continue
        parts.append(f"{key}={value}")
    return f"{name}({', '.join(parts)})"


def call(method: str, code: str, *arguments: Any) -> str:
    """`code.method(arguments)`, with brackets around `code` where it is not a plain name, call or index."""
    simple = code.replace("_", "").replace(".", "").isalnum() or (code.endswith((")", "]")) and _closed(code))
    return f"{code if simple else f'({code})'}.{method}({', '.join(str(a) for a in arguments)})"


def _closed(code: str) -> bool:
    """Whether no operator stands outside of brackets."""
    depth = 0
    for character in code:
        depth += (character in "([") - (character in ")]")
        if depth == 0 and character == " ":
            return False
    return True
