"""How two values of different shape are joined by `+`, `-` and `*`."""

from __future__ import annotations

from typing import Any

from tokenmix.blocks.op import KINDS, Op, Tensor

__all__ = ["aligned", "bracketed", "joined"]


# Kinds with channels only, narrowest last: they spread over the tokens of whatever stands beside them.
_NARROW = ("vector", "weight")


def joined(op: Op, sign: str, a: Tensor, b: Tensor) -> Tensor:
    """Shape of `a sign b`. A vector or weight spreads over a map, tokens or windows; one channel spreads over many."""
    if a.kind != b.kind:
        wide, narrow = (a, b) if _width(a) < _width(b) else (b, a)
        if narrow.kind not in _NARROW or "C" not in KINDS[wide.kind]:
            raise op.mistake(f"`{sign}` cannot join a {a.kind} and a {b.kind}: {a} and {b}", "TM1401")
        if _differ(wide.C, narrow.C):
            raise op.mistake(f"`{sign}` needs equal channels: {a} and {b}", "TM1402")
        return wide
    for letter, p, q in zip(KINDS[a.kind], a.dims, b.dims, strict=True):
        if _differ(p, q) and not (letter == "C" and (_is_one(p) or _is_one(q))):
            raise op.mistake(f"`{sign}` needs equal shapes: {a} and {b}", "TM1402")
    return b if "C" in a.letters and _is_one(a.C) else a


def _width(tensor: Tensor) -> int:
    return _NARROW.index(tensor.kind) + 1 if tensor.kind in _NARROW else 0


def _differ(p: Any, q: Any) -> bool:
    return isinstance(p, int) and isinstance(q, int) and p != q


def _is_one(dim: Any) -> bool:
    # A formula knows the number it stands for in a real use of the block.
    return getattr(dim, "hint", dim) == 1


def aligned(codes: tuple[str, ...], inputs: tuple[Tensor, ...]) -> list[str]:
    """Expressions with vectors viewed as one-token maps (B, 1, 1, C), where something wider stands beside them."""
    widest = max(len(x.dims) for x in inputs)
    views = {1: "", 2: "[:, None]", 3: "[:, None, None]"}
    return [
        bracketed(code) + views[widest] if x.kind == "vector" and widest > 1 else code
        for code, x in zip(codes, inputs, strict=True)
    ]


def bracketed(code: str) -> str:
    """An expression as an operand: in brackets where an operator stands outside of any bracket."""
    depth = 0
    for i, character in enumerate(code):
        depth += (character in "([") - (character in ")]")
        if (depth == 0 and character == " ") or (i == 0 and character == "-"):
            return f"({code})"
    return code
