"""Ops that differ in one line share the rest here: activations, sums and products, pooling windows."""

from __future__ import annotations

from typing import Any, ClassVar

from tokenmix.blocks.broadcast import joined
from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, size

__all__ = ["Activation", "Elementwise", "WindowPool"]


class Activation(Op):
    """A function of every element on its own; `tally` counts the elements, `code` is the torch call."""

    tally: ClassVar[str]
    code: ClassVar[str]

    def shape(self, x: Tensor) -> Tensor:
        return x

    def cost(self, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> Tally:
        return Tally(**{self.tally: size(outputs[0])})

    def forward(self, x: str, *, inputs: tuple[Tensor, ...]) -> str:
        return f"{self.code}({x})"


class Elementwise(Op):
    """Two values joined position by position; `sign` is how the language writes it."""

    sign: ClassVar[str]

    def check(self, a: Tensor, b: Tensor) -> None:
        joined(self, self.sign, a, b)

    def shape(self, a: Tensor, b: Tensor) -> Tensor:
        return joined(self, self.sign, a, b)

    def cost(self, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> Tally:
        return Tally(elementwise=size(outputs[0]))


class WindowPool(Op):
    """One number per channel out of every kernel x kernel window; with `ceil_mode` the border may cut the last one."""

    def check(self, x: Tensor, *, kernel: int, stride: int, padding: int, ceil_mode: bool = False) -> None:
        if min(kernel, stride) < 1 or not 0 <= padding <= kernel // 2:
            raise self.mistake(
                "kernel and stride are at least 1, padding at most half of the kernel, "
                f"got {kernel}, {stride} and {padding}"
            )
        if ceil_mode and stride > kernel - padding:
            raise self.mistake(f"with `ceil_mode` a stride of {stride} may put a window of {kernel} beside the map")
        if min(x.H, x.W) + 2 * padding + self._beyond(stride, ceil_mode) < kernel:
            raise self.mistake(f"a {x.H}x{x.W} map is smaller than the {kernel}x{kernel} window", "TM1404")

    def shape(self, x: Tensor, *, kernel: Any, stride: Any, padding: Any, ceil_mode: Any = False) -> Tensor:
        if not isinstance(ceil_mode, bool):
            raise self.mistake("`ceil_mode` must be written as true or false", "TM1702")
        beyond = self._beyond(stride, ceil_mode)
        height, width = ((side + 2 * padding - kernel + beyond) // stride + 1 for side in (x.H, x.W))
        return x.having(H=height, W=width)

    @staticmethod
    def _beyond(stride: Any, ceil_mode: bool) -> Any:
        """How far the last window may reach over the border."""
        return stride - 1 if ceil_mode else 0

    def cost(self, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], **arguments: Any) -> Tally:
        return Tally(pool=size(inputs[0]))

    def forward(self, x: str, *, inputs: Any, kernel: Any, stride: Any, padding: Any, ceil_mode: bool = False) -> str:
        return f"{self.name}({x}, {kernel}, {stride}, {padding}{', ceil_mode=True' if ceil_mode else ''})"
